"""Texts kept on disk: shared, bounded, whole whatever is killed, and never trusted blindly."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from settings import BY_NAME

import fast_prompt_tuning
from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt import text_cache
from fast_prompt_tuning.prompt.text_cache import DiskTextCache, TextCache, model_key
from fast_prompt_tuning.prompt.text_states import text_states

TEXTS = [[5, 6, 7], [8, 9, 10, 11], [12]]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("fpt-texts-1/*/*"))


KEPT = pytest.mark.parametrize(("name", "cross"), [("llama", False), ("t5", False), ("t5", True)])


@KEPT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_computed(tmp_path, name, cross, dtype):
    plm = BY_NAME[name].plm().to(dtype)
    fresh = text_states(plm, TEXTS, TextCache(plm, cross_attention=cross))
    for ran in ((3, 4), (0, 0)):
        plm = BY_NAME[name].plm().to(dtype)  # as another process would load it
        found = text_states(plm, TEXTS, DiskTextCache(plm, tmp_path, cross_attention=cross))
        assert found.ran == ran
        assert torch.equal(found.states, fresh.states)
        assert torch.equal(found.mask, fresh.mask)


def test_other_models_dtypes_and_stages_have_files_of_their_own(tmp_path):
    family = BY_NAME["llama"]
    plm = family.plm()
    text_states(plm, TEXTS, DiskTextCache(plm, tmp_path))
    assert len(files(tmp_path)) == 3
    for other in (family.plm(seed=1), family.plm(rms_norm_eps=1e-3), family.plm().double()):
        assert text_states(other, TEXTS, DiskTextCache(other, tmp_path)).ran == (3, 4)
    partial = PartialPLM(plm, keep_neurons="first")
    cache = DiskTextCache(plm, tmp_path)
    for stage in (family.stage(3, 24), family.stage(5, 10), family.stage(3, 10)):
        with partial.at(stage):
            assert text_states(plm, TEXTS, cache).ran == (3, 4)
            assert text_states(plm, TEXTS, cache).ran == (0, 0)
    assert text_states(plm, TEXTS, cache).ran == (0, 0)
    assert model_key(family.plm()) == model_key(family.plm())


@pytest.mark.parametrize(("name", "cross"), [("llama", False), ("bart", True)])
def test_attention_kernels_have_states_of_their_own(tmp_path, name, cross):
    plm = BY_NAME[name].plm()
    caches = [TextCache(plm, cross_attention=cross), DiskTextCache(plm, tmp_path, cross_attention=cross)]
    for ran in ((3, 4), (0, 0)):
        for kernel in ("eager", "sdpa"):
            plm.set_attn_implementation(kernel)
            assert [text_states(plm, TEXTS, cache).ran for cache in caches] == [ran, ran]


def test_nothing_of_others_is_removed_and_nothing_behind_a_link(tmp_path):
    plm = BY_NAME["llama"].plm()
    text_states(plm, TEXTS, DiskTextCache(plm, tmp_path / "texts"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(files(tmp_path / "texts")[0].parent, elsewhere)
    root = files(tmp_path / "texts")[0].parents[1]
    (root / ("a" * 32)).symlink_to(elsewhere)
    (root / "mine").mkdir()
    (root / ("b" * 32)).mkdir()
    text = files(tmp_path / "texts")[0].name
    mine = [root / "mine" / text, root / ("b" * 32) / "thesis.safetensors", root / ("b" * 32) / ".notes"]
    gone = [root / ("b" * 32) / text, root / ("b" * 32) / f".{'c' * 32}", root / ("b" * 32) / f".{text}-{'d' * 32}"]
    gone.append(root / ("b" * 32) / ".tmpAb3dE9")  # safetensors' own
    for file in (*mine, *gone):
        file.write_bytes(bytes(100))
    (root / ("b" * 32) / f"e-{'f' * 32}.safetensors").symlink_to(mine[0])
    for file in (*files(tmp_path / "texts"), *elsewhere.iterdir()):
        os.utime(file, (0, 0))
    cache = DiskTextCache(plm, tmp_path / "texts", budget_mib=0)
    assert cache.bytes == 0
    assert len(list(elsewhere.iterdir())) == 3
    assert all(file.exists() for file in mine)
    assert not any(file.exists() for file in gone)
    assert (root / ("b" * 32) / f"e-{'f' * 32}.safetensors").is_symlink()
    for link in (cache.folder, root):
        shutil.rmtree(link)
        link.symlink_to(elsewhere)
        with pytest.raises(ConfigError, match=rf"cache.folder=.*{link.name} in it is a link"):
            DiskTextCache(plm, tmp_path / "texts")


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "noise"])
def test_damaged_files_are_computed_again(tmp_path, harm, caplog):
    plm = BY_NAME["llama"].plm()
    wanted = text_states(plm, TEXTS, DiskTextCache(plm, tmp_path)).states
    victim = files(tmp_path)[1]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes({"flip": bytes(content), "cut": content[:-7], "empty": b"", "noise": b"\x07" * 99}[harm])
    cache = DiskTextCache(plm, tmp_path)
    found = text_states(plm, TEXTS, cache)
    assert found.ran[0] == 1
    torch.testing.assert_close(found.states, wanted)  # not bit for bit: it ran in another batch
    assert "is damaged" in caplog.text
    assert text_states(plm, TEXTS, DiskTextCache(plm, tmp_path)).ran == (0, 0)


def test_the_longest_unused_go_first_and_what_this_run_uses_stays(tmp_path):
    plm = BY_NAME["llama"].plm()
    text_states(plm, TEXTS[:2], DiskTextCache(plm, tmp_path))
    before = {f.name: f for f in files(tmp_path)}
    for age, file in zip((500, 900), before.values(), strict=True):
        os.utime(file, (time.time() - age, time.time() - age))
    old, older = before.values()
    size = sum(f.stat().st_size for f in before.values())
    cache = DiskTextCache(plm, tmp_path, budget_mib=(size + 10) / 2**20)
    text_states(plm, [TEXTS[2]], cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.safetensors").write_bytes(bytes(10_000))
    os.utime(tmp_path / "mine" / "thesis.safetensors", (0, 0))
    assert old.exists()
    assert not older.exists()
    for text in ([[20 + i, 4, 4, 4]] for i in range(5)):
        text_states(plm, text, cache)
    assert sum(f.stat().st_size for f in files(tmp_path)) <= size + 10
    assert text_states(plm, [TEXTS[2]], cache).ran == (0, 0)
    assert (tmp_path / "mine" / "thesis.safetensors").exists()
    assert text_states(plm, [[24, 4, 4, 4]], cache).ran == (1, 4)  # no room: this run uses all there is


def test_several_processes_keep_one_budget(tmp_path):
    plm = BY_NAME["llama"].plm()
    size = 2**20 * 1.0
    caches = [DiskTextCache(plm, tmp_path, budget_mib=8) for _ in range(4)]  # as four processes would have
    states = torch.zeros(int(size / 8 / 4))
    for i in range(40):
        for number, cache in enumerate(caches):
            cache.put(TextCache.key(str(number), [i]), states)
    written = sum(file.stat().st_size for file in files(tmp_path))
    assert 0.9 * 8 * size < written < 1.3 * 8 * size


def test_files_are_for_whom_the_umask_says_and_those_of_others_stay(tmp_path, monkeypatch):
    plm = BY_NAME["llama"].plm()
    before = os.umask(0o002)
    try:
        text_states(plm, TEXTS, DiskTextCache(plm, tmp_path))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files(tmp_path)} == {0o664}

    def refused(*_, **__):
        raise PermissionError("of another user")

    monkeypatch.setattr(text_cache, "safe_open", refused)
    assert text_states(plm, TEXTS, DiskTextCache(plm, tmp_path)).ran == (3, 4)
    assert len(files(tmp_path)) == 3


def test_mappings_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "MAPPINGS", 2)
    plm = BY_NAME["llama"].plm()
    cache = DiskTextCache(plm, tmp_path)
    text_states(plm, TEXTS, cache)
    assert text_states(plm, TEXTS, cache).ran == (0, 0)
    assert len(cache) == 2


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache.folder=.* cannot be written"):
        DiskTextCache(BY_NAME["llama"].plm(), tmp_path / "file")


WRITER = """
import sys, torch
from fast_prompt_tuning.prompt.text_cache import DiskTextCache

class Model(torch.nn.Linear):
    class config:
        to_dict = staticmethod(dict)

torch.manual_seed(0)
cache = DiskTextCache(Model(2, 2), sys.argv[1], budget_mib=400)
print("ready", flush=True)
for i in range(int(sys.argv[2]), 10**6):
    cache.put(f"a-{i:032}", torch.full((50_000,), float(i)))
"""


def test_killing_writers_leaves_nothing_torn_and_loses_nothing(tmp_path):
    """Two processes write into one folder and are killed at random moments."""
    source = str(Path(fast_prompt_tuning.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    chance, seen = random.Random(0), set()
    writers = []
    for start in (0, 500):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(start)]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        seen |= {f.name for f in files(tmp_path) if not f.name.startswith(".")}
        time.sleep(chance.uniform(0.05, 0.3))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    whole = [f for f in files(tmp_path) if not f.name.startswith(".")]
    assert whole
    assert seen <= {f.name for f in whole}
    plm = BY_NAME["llama"].plm()
    cache = DiskTextCache(plm, tmp_path, budget_mib=400)
    cache.folder = whole[0].parent
    for file in whole:
        states = cache.get(file.stem)
        assert states is not None
        assert torch.equal(states, torch.full((50_000,), float(file.stem.removeprefix("a-"))))
    left = [f for f in files(tmp_path) if f.name.startswith(".")]
    for file in left:
        os.utime(file, (0, 0))
    DiskTextCache(plm, tmp_path, budget_mib=400)
    assert not [f for f in files(tmp_path) if f.name.startswith(".")]


def test_both_kinds_have_one_interface():
    own = {n for n in vars(TextCache) if not n.startswith("_")}
    assert {n for n in vars(DiskTextCache) if not n.startswith("_")} <= own


def test_no_more_is_taken_than_is_left_free(monkeypatch, tmp_path, caplog):
    """Of the machine's memory, or of what a container may use, shared among the processes of a run."""
    plm = BY_NAME["llama"].plm()
    size = text_states(plm, [[5, 6, 7]]).states.nbytes
    cache = TextCache(plm)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(text_cache, "_LIMITS", (limit,))
    whole = 8 * size
    monkeypatch.setattr(text_cache.psutil, "virtual_memory", lambda: SimpleNamespace(available=whole - cache.bytes))
    assert cache.room == whole
    for i in range(10):
        cache.put(str(i), torch.zeros(size, dtype=torch.uint8))
    assert (len(cache), cache.room) == (4, 0)
    assert caplog.text.count("half of the free memory is spent after 4 texts") == 1
    cache.forget()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cache.room == whole // 2
    limit.write_text("max\n")
    assert cache.room == whole // 2
    limit.write_text("1000\n")
    assert cache.room == 0
    assert TextCache(plm, budget_mib=3).room == 3 * 2**20


def test_a_container_may_use_less_than_its_machine_has(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(text_cache, "_LIMITS", (limit,))
    used = psutil.Process().memory_info().rss
    limit.write_text(f"{used + 2**27}\n")
    assert text_cache.free_memory(torch.device("cpu")) == pytest.approx(2**27, rel=0.2)
