"""Keeping what texts left behind: in memory up to a budget, or on disk for every run to come."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConfigError, ModelError
from ..files import new_file
from ..plm import fingerprint

logger = logging.getLogger(__name__)


def check_cross_attention(plm: Any, wanted: bool) -> None:
    """Raise ConfigError where a cache is to keep cross-attention keys and values, and the PLM has none."""
    if wanted and not plm.config.is_encoder_decoder:
        raise ConfigError(
            f"cache.cross_attention=True is for encoder-decoders, which {type(plm).__name__} is not; leave it out"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still use on a device; of a machine's memory its share among the local processes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = psutil.virtual_memory().available // processes
    for file in _LIMITS:
        if file.is_file() and (limit := file.read_text(encoding="utf-8").strip()).isdigit():
            free = min(free, int(limit) // processes - psutil.Process().memory_info().rss)
    return max(free, 0)


_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use, by the version of its control groups."""


class TextCache:
    """States of texts in memory, for one PLM and all of its stages.

    What came first stays: a run reads its texts in turn, so that putting out the oldest one would put out exactly what
    is needed next. When the budget is spent, further texts are computed at every step.

    Args:
        plm: the bare PLM the states are of; its weights must not change.
        budget_mib: memory of the PLM's device it may use, in MiB. By default it takes no more than it leaves free:
            half of what is free, and less where other programs take some meanwhile.
        cross_attention: of an encoder-decoder, keep the keys and values of the cross-attention in place of the
            encoder's output: steps compute them no more, and their room is at least twice the decoder's layers times
            as large.

    Raises:
        ConfigError: a negative budget, or `cross_attention` of a model without one.
    """

    def __init__(self, plm: Any, *, budget_mib: float | None = None, cross_attention: bool = False):
        if budget_mib is not None and not budget_mib >= 0:
            raise ConfigError(f"budget_mib={budget_mib!r} must be at least 0")
        check_cross_attention(plm, cross_attention)
        self.plm, self.cross_attention = plm, cross_attention
        self.budget: float = math.inf if budget_mib is None else int(budget_mib * 2**20)
        self.bytes = 0
        self._full = False
        self._stage = ""
        self._states: dict[str, torch.Tensor] = {}

    def check_model(self, plm: Any) -> None:
        """Raise `ModelError` unless the states are of `plm`."""
        if self.plm is not plm:
            raise ModelError("the text cache is another model's; make it of this one: TextCache(plm)")

    @staticmethod
    def key(cut: str, ids: Sequence[int]) -> str:
        """What a text's states follow from beside the model: the stage (`cut_key`) and the token ids."""
        return f"{cut}-{hashlib.sha256(array('q', ids).tobytes()).hexdigest()[:32]}"

    def __len__(self) -> int:
        return len(self._states)

    @property
    def room(self) -> int:
        """Bytes that further texts may take."""
        return int((free_memory(self.plm.device) if self.budget == math.inf else self.budget) - self.bytes)

    def get(self, key: str) -> torch.Tensor | None:
        """A text's states, never to be written to; None where they are not kept."""
        return self._states.get(key)

    def put(self, key: str, states: torch.Tensor) -> None:
        """Keep a text's states if there is room."""
        if key not in self._states and states.nbytes <= self.room:
            self._states[key] = states
            self.bytes += states.nbytes
        elif self.budget and not self._full:
            self._full = True
            mib = self.budget / 2**20
            what = "half of the free memory" if mib == math.inf else f"cache.budget_mib={mib:.0f}"
            logger.warning("%s is spent after %d texts: further ones run at every step", what, len(self))

    def enter_stage(self, cut: str) -> None:
        """Training runs at this stage from here on, and never goes back: the last one's states only take room."""
        if self._stage and cut != self._stage:
            self.forget(self._stage)
        self._stage = cut

    def forget(self, cut: str | None = None) -> None:
        """Free the states of one stage, or all."""
        self.bytes -= sum(states.nbytes for states in self._let_go(cut))

    def _let_go(self, cut: str | None) -> list[torch.Tensor]:
        """The states of one stage, or all, which are no longer held."""
        return [self._states.pop(key) for key in list(self._states) if cut is None or key.startswith(f"{cut}-")]


OWN_FOLDER = "fpt-texts-1"
"""Nothing outside a folder of this name is ever counted or removed; the number is the format's."""

_FOLDER = re.compile("[0-9a-f]{32}(-int8)?")
_TEXT = r"[0-9a-f]+-[0-9a-f]{32}\.safetensors"
_FILE = re.compile(rf"{_TEXT}|\.({_TEXT}-)?[0-9a-f]{{32}}|\.tmp[0-9A-Za-z]{{6}}")
"""Names of folders, of texts and of what a killed process was writing: safetensors, here and in earlier versions."""

MAPPINGS = 16384
"""Files that a process maps at most: Linux allows 65,530 mappings, and a mapped file is read again at no cost but its
checksum's."""


class DiskTextCache(TextCache):
    """States of texts in files, memory-mapped, for every run of the same PLM to come.

    One safetensors file a text, in the dtype the PLM computes in, under `folder/fpt-texts-1/<model>/`, where the
    model's key stands for its weights, its config and the `transformers` version. A file appears whole or not at all,
    whatever is killed when; its checksum is verified when it is first read, and a damaged one is removed and computed
    again. Several processes may share a folder: each counts it anew whenever it has written a sixteenth of the budget.
    When that is spent, files that no run has used since this one began go, the longest unused first; with none left,
    further texts are computed at every step. What has another form of name, or lies behind a link, is neither counted
    nor removed.

    Args:
        plm: as `TextCache`.
        folder: where the files are; made if need be.
        budget_mib: most that the folder may hold, of all models together, in MiB; default 8192.
        cross_attention: as `TextCache`.

    Raises:
        ConfigError: as `TextCache`, or a folder that cannot be written, or is behind a link of our own name.
    """

    def __init__(
        self,
        plm: Any,
        folder: str | Path,
        *,
        budget_mib: float | None = None,
        cross_attention: bool = False,
    ):
        super().__init__(plm, budget_mib=8192 if budget_mib is None else budget_mib, cross_attention=cross_attention)
        self.root = Path(folder) / OWN_FOLDER
        self.folder = self.root / model_key(plm)
        for place in (self.root, self.folder):
            if place.is_symlink():
                raise ConfigError(
                    f"cache.folder={str(folder)!r}: {place.name} in it is a link, behind which nothing is removed or "
                    "written; remove it, or choose another folder"
                )
        self._uncounted = 0  # bytes that this process has written since it last counted the folder
        self._began = time.time() - 1  # file systems date by a coarser clock, which may lag behind
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cache.folder={str(folder)!r} cannot be written: {reason}; choose another") from error
        self._make_room(0)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> torch.Tensor | None:
        if key in self._states:
            return self._states[key]
        file = self._file(key)
        try:
            with safe_open(str(file), framework="pt") as opened:
                states = opened.get_tensor("states")
                if opened.metadata()["crc32"] != _checksum(states):
                    raise ValueError("checksum")
            os.utime(file)  # used now: the last to go
        except (FileNotFoundError, PermissionError):
            return None
        except (MemoryError, RuntimeError):  # no further mapping to be had
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s is damaged (%s): computing it again", file.name, error)
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        while len(self._states) >= MAPPINGS:
            del self._states[next(iter(self._states))]
        self._states[key] = states
        return states

    def put(self, key: str, states: torch.Tensor) -> None:
        file, size = self._file(key), states.nbytes
        if self._full or file.exists():
            return
        if self.bytes + size > self.budget and not self._make_room(size):
            self._full = True
            logger.warning("cache.budget_mib is spent: further texts run at every step")
            return
        states = states.cpu().contiguous()
        try:
            with new_file(file) as work:
                save_file({"states": states}, work, metadata={"crc32": _checksum(states)})
            self.bytes += size
            self._uncounted += size
            if self._uncounted > self.budget / 16:  # other processes write too
                self._make_room(0)
        except (OSError, SafetensorError) as error:  # a full disk costs time, not the run
            logger.warning("a text's states could not be kept in %s: %s", self.folder, error)

    def forget(self, cut: str | None = None) -> None:
        """Let go of the mappings of one stage, or all; their files stay for other runs."""
        self._let_go(cut)

    def _make_room(self, size: int) -> bool:
        """Count what the folder holds, remove what is left over and what no run uses; is there room for `size`?"""
        files, self._uncounted = [], 0
        for file in self._own_files():
            with contextlib.suppress(OSError):  # another process was quicker
                stat = file.stat()
                if file.name.startswith(".") and stat.st_mtime < self._began - 3600:
                    file.unlink()  # of a process that was killed
                else:
                    files.append((stat.st_mtime, stat.st_size, file))
        self.bytes = sum(length for _, length, _ in files)
        for used, length, file in sorted(files, key=lambda entry: entry[0]):
            if self.bytes + size <= self.budget or used >= self._began:
                break
            with contextlib.suppress(OSError):
                file.unlink()
            self.bytes -= length
        return self.bytes + size <= self.budget

    def _own_files(self) -> Iterator[Path]:
        """Files with names of ours in folders with names of ours, of every model; nothing behind a link."""
        for folder in self.root.glob("*"):
            if _FOLDER.fullmatch(folder.name) and not folder.is_symlink():
                yield from (f for f in folder.glob("*") if _FILE.fullmatch(f.name) and not f.is_symlink())


def model_key(plm: Any) -> str:
    """What a PLM's text states follow from beside stage, dtype and text, as 32 hex digits.

    Its weights, its config and the `transformers` version. A text's own key holds its token ids, so that tokenizer and
    template need no key.
    """
    volatile = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
    config = {k: v for k, v in plm.config.to_dict().items() if k not in volatile}
    known = json.dumps([fingerprint.of_model(plm), transformers.__version__, config], sort_keys=True, default=str)
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def _checksum(states: torch.Tensor) -> str:
    return str(zlib.crc32(states.contiguous().view(torch.uint8).numpy().data))
