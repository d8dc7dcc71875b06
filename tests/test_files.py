"""Files that appear whole or not at all, and what is cleared of those that did not."""

from __future__ import annotations

import os
import re
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from fast_prompt_tuning import files
from fast_prompt_tuning.files import clear_leftovers, new_file, new_folder, write_atomic


@pytest.fixture
def umask():
    """Group members may read, others not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_may_be_read_by_whom_the_user_lets(tmp_path, umask):
    write_atomic(tmp_path / "text", "{}")
    with new_file(tmp_path / "tensors") as work:
        save_file({"a": torch.ones(2)}, work)
    with new_folder(tmp_path / "folder") as work:
        save_file({"a": torch.ones(2)}, work / "tensors")
    found = [mode(tmp_path / name) for name in ("text", "tensors", "folder/tensors", "folder")]
    assert found == [0o640, 0o640, 0o640, 0o750]
    assert load_file(tmp_path / "tensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("replace", [True, False])
def test_writing_is_all_or_nothing(tmp_path, monkeypatch, replace):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("no space")

    def torn():
        with new_file(path, replace=replace) as work:
            work.write_text("new")
            fail()

    with pytest.raises(OSError, match="no space"):
        torn()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_two_writers_wins(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError("operation not supported")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    path = tmp_path / "scores"

    def second():
        with new_file(path, replace=False) as mine:
            mine.write_text("second")
            with new_file(path, replace=False) as other:
                other.write_text("first")

    with pytest.raises(FileExistsError):
        second()
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def test_content_and_name_reach_the_disk_in_that_order(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_sync(handle)

    def replace(*paths):
        done.append("rename")
        real_replace(*paths)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", replace)
    write_atomic(tmp_path / "a", "text")
    assert done == ["file", "rename", "folder"]


def test_only_our_own_leftovers_are_cleared(tmp_path):
    ours = re.compile("prompt|result")
    unique = "0" * 32
    mine = {".notes-new", ".prompt-newer", "..-old", ".-old", "prompt-new", "result"}
    for name in (".prompt-new", ".result-old", *mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("mine")
    for name in (f".result-{unique}", f".notes-{unique}", f".result-{unique}0", ".prompt-old"):
        (tmp_path / name).write_text("mine")
    outside = tmp_path / "result"
    (tmp_path / ".result-new").symlink_to(outside)
    clear_leftovers(tmp_path, ours)
    gone = {".prompt-new", ".result-old", f".result-{unique}"}
    kept = mine | {".result-new", ".prompt-old", f".notes-{unique}", f".result-{unique}0"}
    found = {p.name for p in tmp_path.iterdir()}
    assert not gone & found
    assert found == kept
    assert (outside / "thesis").exists()
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / ".prompt-new").mkdir()
    clear_leftovers(linked, ours)
    assert (tmp_path / "real" / ".prompt-new").exists()
    clear_leftovers(tmp_path / "nowhere", ours)


def test_a_file_system_that_cannot_sync_folders_is_borne(tmp_path, monkeypatch):
    real = files._sync

    def sync(path):
        if path.is_dir():
            raise OSError("invalid argument")
        real(path)

    monkeypatch.setattr(files, "_sync", sync)
    write_atomic(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
