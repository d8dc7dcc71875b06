"""Checkpoints that are whole or not there: written aside, checksummed, renamed into place, verified before use.

A checkpoint is a folder `checkpoint-STEP` of safetensors and JSON files and a manifest with the SHA-256 of each. A kill
or a full disk at any moment leaves the ones before it as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError, ConfigError
from ..files import clear_leftovers, remove
from ..plm import fingerprint
from ..prompt.soft_prompt import load_prompt, prompt_parameter

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2

CANNOT_WRITE = (OSError, SafetensorError)
"""What a full or read-only disk raises; safetensors has its own error."""

_NAME = re.compile(r"(checkpoint|best)-(\d{1,18})")

STAGE_START = "stage_start.safetensors"
"""The prompt that a stage which is given up goes back to lies beside the checkpoints."""

_OURS = re.compile(f"{_NAME.pattern}|{re.escape(STAGE_START)}")


class OtherFormat(CheckpointError):
    """A whole checkpoint that another version wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, its step, and what was recorded with it (`write`'s `record`)."""

    folder: Path
    step: int
    record: dict[str, Any]


# -- states as safetensors and JSON -----------------------------------------------------------------------------------


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write a nested state (dicts, lists, tuples, numbers, texts, None, tensors) as `name.json` and tensors beside it.

    Floats keep every bit. A tensor is written as `{"tensor": key}`, a tuple as `{"tuple": [...]}`, a dict as
    `{"dict": [[key, value], ...]}`: its keys need not be texts.
    """
    tensors: dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach().cpu().contiguous().clone()
            return {"tensor": key}
        if isinstance(value, Mapping):
            return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [encode(v) for v in value]}
        return [encode(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(encode(state))
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: it is not there, or not of that form.
    """

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            ((kind, inner),) = value.items()
            if kind == "tensor":
                return tensors[inner]
            if kind == "dict":
                return {decode(k): decode(v) for k, v in inner}
            if kind == "tuple":
                return tuple(decode(v) for v in inner)
            raise KeyError(kind)
        return [decode(v) for v in value] if isinstance(value, list) else value

    try:
        encoded = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        path = folder / f"{name}.safetensors"
        tensors = load_file(path) if path.is_file() else {}
        return decode(encoded)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{str(folder)!r}: {name} cannot be read ({type(error).__name__}: {error})") from error


def random_state() -> dict[str, Any]:
    """The state of every random generator that training may use: Python's, NumPy's, torch's, each CUDA device's."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what `random_state` gave; states of CUDA devices that are not here are left out.

    Raises:
        CheckpointError: it is no such state.
    """
    try:
        random.setstate(state["python"])
        kind, keys, position, *rest = state["numpy"]
        if not 0 <= position <= len(keys):  # NumPy would read beyond them
            raise ValueError(f"position {position} of {len(keys)}")
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
        torch.set_rng_state(state["torch"])
        for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one, device)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the state of the random generators is none ({error})") from error


def save_trained(folder: Path, model: Any) -> None:
    """Write what is trained: a prompt as PEFT's adapter without PEFT's card, or a whole model."""
    if isinstance(model, PeftModel):
        model.peft_config[model.active_adapter].save_pretrained(str(folder))
        # The prompt alone is asked for: of weights in parts, the whole state would be gathered from every process.
        prompt = get_peft_model_state_dict(model, state_dict={})
        weights = {k: v.detach().cpu().contiguous() for k, v in prompt.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(str(folder))


def load_trained(folder: Path, model: Any) -> None:
    """Give a model what `save_trained` wrote.

    Raises:
        CheckpointError: neither a prompt nor weights as safetensors are there.
    """
    if (folder / "adapter_config.json").is_file():
        with torch.no_grad():
            prompt_parameter(model).copy_(load_prompt(folder))
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no weights as safetensors, which alone are read")
    for file in files:
        model.load_state_dict(load_file(file), strict=False)  # tied weights are saved once


# -- writing, verifying, choosing -------------------------------------------------------------------------------------


def seal(folder: Path, step: int, record: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder: `record`, and size and SHA-256 of every file."""
    files = {f.name: {"bytes": f.stat().st_size, "sha256": fingerprint.of_file(f)} for f in sorted(folder.iterdir())}
    content = {"format": FORMAT, "step": step, "record": dict(record), "files": files}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, each of its bytes checked.

    Raises:
        CheckpointError: a file is missing, altered, added, or a symbolic link (which is never followed).
    """
    where = str(folder)
    named = _NAME.fullmatch(folder.name)
    if folder.is_symlink() or not folder.is_dir() or named is None:
        raise CheckpointError(f"{where!r} is no checkpoint's folder")
    try:
        entries = {e.name: e for e in os.scandir(folder)}
        for name, entry in entries.items():
            if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
                raise CheckpointError(f"{where!r}: {name} is no plain file; links are not followed")
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
        if checksum != _digest(content) or content["step"] != int(named[2]):
            raise CheckpointError(f"{where!r}: {MANIFEST} was altered")
        if content["format"] != FORMAT:
            raise OtherFormat(
                f"{where!r} was written by another version (format {content['format']!r}, this one reads {FORMAT}); go "
                "on with that version, or start anew with --overwrite"
            )
        files = content["files"]
        if set(files) != set(entries) - {MANIFEST}:
            odd = sorted(set(files) ^ (set(entries) - {MANIFEST}))
            raise CheckpointError(f"{where!r}: {', '.join(odd)} is missing, or was not saved with it")
        for name in files:
            if not name.endswith((".json", ".safetensors")):  # a `.bin` would be unpickled by whoever loads it
                raise CheckpointError(f"{where!r}: {name} is neither JSON nor safetensors; nothing else is read")
        for name, recorded in files.items():
            if entries[name].stat(follow_symlinks=False).st_size != recorded["bytes"]:
                raise CheckpointError(f"{where!r}: {name} is cut off")
            if fingerprint.of_file(folder / name) != recorded["sha256"]:
                raise CheckpointError(f"{where!r}: {name} was altered")
        record = content["record"]
        if not isinstance(record, dict):
            raise CheckpointError(f"{where!r}: {MANIFEST} holds no record")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where!r}: {MANIFEST} cannot be read ({type(error).__name__})") from error
    return Checkpoint(folder, int(named[2]), record)


def steps_of(folder: Path, kind: str = "checkpoint") -> list[int]:
    """Steps of the folders `KIND-STEP` in `folder`, ascending; nothing is verified."""
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[2]) for m in names if m is not None and m[1] == kind)


def latest(folder: Path, kind: str = "checkpoint", until: int | None = None) -> Checkpoint | None:
    """The newest checkpoint in `folder` that verifies; a damaged one is passed over, with a message.

    Args:
        until: only those of this step or before.

    Raises:
        OtherFormat: it is whole, but another version wrote it.
    """
    for step in reversed(steps_of(folder, kind)):
        if until is None or step <= until:
            try:
                return verify(folder / f"{kind}-{step}")
            except OtherFormat:
                raise
            except CheckpointError as error:
                logger.warning("damaged, so the one before it is used: %s", error)
    return None


def prune(folder: Path, keep: int, newest: int) -> None:
    """Remove all but the last `keep` checkpoints up to step `newest`, and the best prompts that none of them needs.

    A checkpoint needs the last best one up to its step: a run resumed from it goes on from that.
    """
    for step in [s for s in steps_of(folder) if s <= newest][:-keep]:
        _discard(folder / f"checkpoint-{step}")
    oldest = min(steps_of(folder), default=0)
    for step in [s for s in steps_of(folder, "best") if s <= oldest][:-1]:
        _discard(folder / f"best-{step}")


def discard_best(folder: Path, after: int = -1) -> None:
    """Remove the best prompts found after step `after`."""
    for step in steps_of(folder, "best"):
        if step > after:
            _discard(folder / f"best-{step}")


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing beside its checkpoints."""
    clear_leftovers(folder, _OURS)


def _discard(target: Path) -> None:
    """Remove a folder so that no reader meets a part of it; never a link, nor what lies behind one."""
    if target.is_symlink() or target.parent.is_symlink():
        return
    work = target.with_name(f".{target.name}-new")
    remove(work)
    with contextlib.suppress(OSError):
        target.rename(work)
        remove(work)


# -- one run, one folder ----------------------------------------------------------------------------------------------

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; the system lets go of it however this one ends.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(
            f"output={str(folder)!r} is in use: another run is writing there; wait for it or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise ConfigError(f"output={str(folder)!r} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()
