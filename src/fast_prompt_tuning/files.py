"""Files and folders that appear whole or not at all, for whom the umask says, and the clearing of what was left over.

Everything is written aside, under a name that starts with a dot, forced to the disk and renamed into place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ASIDE = re.compile(r"\.(?P<target>.+)-(?P<kind>new|old|[0-9a-f]{32})", re.DOTALL)
"""Names that work is written aside under: folders end in `new` or `old`, files in 32 hex digits."""


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A file to write that takes the name `path` when the block ends, all of it or nothing.

    Args:
        replace: whether it may take the place of another file; else the first of several writers wins.

    Raises:
        OSError: it cannot be written; `path` is then what it was.
        FileExistsError: without `replace`, where `path` exists by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        work.touch(exist_ok=False)
        mode = work.stat().st_mode & 0o777
        yield work
        work.chmod(mode)  # safetensors makes its files for their owner alone
        _sync(work)
        if replace:
            os.replace(work, path)
        else:
            _place(work, path)
        _sync_names(path.parent)
    finally:
        work.unlink(missing_ok=True)


def _place(work: Path, path: Path) -> None:
    """Give a finished file its name, unless another has it."""
    try:
        os.link(work, path)  # unlike a rename, this fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(work, path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, finds the old content or the new, never a part."""
    with new_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` when the block ends, all of it or nothing.

    One process at a time may fill it: the caller holds a lock.

    Raises:
        OSError: it cannot be written; `target` is then what it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work, old = target.with_name(f".{target.name}-new"), target.with_name(f".{target.name}-old")
    remove(work)
    try:
        work.mkdir()
        mode = work.stat().st_mode & 0o666
        yield work
        for file in sorted(work.iterdir()):
            if file.is_file():
                file.chmod(mode)  # as in `new_file`
            _sync(file)
        _sync(work)
        if target.is_symlink() or target.exists():
            remove(old)
            target.rename(old)
        work.rename(target)
        _sync_names(target.parent)
    except BaseException:
        remove(work)
        raise
    remove(old)


def clear_leftovers(folder: Path, ours: re.Pattern[str]) -> None:
    """Remove what killed processes were writing aside in `folder`; a target that one had set aside comes back.

    Nothing else is touched, and nothing behind a link.

    Args:
        ours: names of the targets.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        name = _ASIDE.fullmatch(path.name)
        if name is None or not ours.fullmatch(name["target"]) or path.is_symlink():
            continue
        if path.is_dir() != (name["kind"] in ("new", "old")):
            continue
        target = path.with_name(name["target"])
        if name["kind"] == "old" and not target.exists():
            path.rename(target)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a folder, or a file, or a link but nothing behind it."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    """Force a rename to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        _sync(folder)
