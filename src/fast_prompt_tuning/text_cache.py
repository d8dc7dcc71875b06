"""Keeping what texts left behind: in memory up to a budget, or on disk for every run to come."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from .errors import ConfigError


class TextCache:
    """States of texts in memory, for one PLM and all of its stages.

    What came first stays: a run reads its texts in turn, so that putting out the oldest one would put out exactly what
    is needed next. When the budget is spent, further texts are computed at every step.

    Args:
        plm: the bare PLM the states are of; its weights must not change.
        budget_mib: memory of the PLM's device it may use, in MiB.

    `ran` lists `(texts, padded tokens)` of every forward pass that had to be made: what the cache did not save.

    Raises:
        ConfigError: a negative budget.
    """

    def __init__(self, plm: Any, *, budget_mib: float = 1024):
        if not budget_mib >= 0:
            raise ConfigError(f"budget_mib={budget_mib!r} must be at least 0")
        self.plm = plm
        self.budget = int(budget_mib * 2**20)
        self.bytes = 0
        self.ran: list[tuple[int, int]] = []
        self._kept: dict[str, torch.Tensor] = {}

    @staticmethod
    def key(cut: str, ids: Sequence[int]) -> str:
        """What a text's states follow from beside the model: the stage (`cut_key`) and the token ids."""
        return f"{cut}-{hashlib.sha256(array('q', ids).tobytes()).hexdigest()[:32]}"

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> torch.Tensor | None:
        """A text's states, never to be written to; None where they are not kept."""
        return self._kept.get(key)

    def put(self, key: str, states: torch.Tensor) -> None:
        """Keep a text's states if there is room."""
        size = states.numel() * states.element_size()
        if key not in self._kept and self.bytes + size <= self.budget:
            self._kept[key] = states
            self.bytes += size

    def forget(self, cut: str) -> None:
        """Free the states of one stage."""
        for key in [k for k in self._kept if k.startswith(f"{cut}-")]:
            states = self._kept.pop(key)
            self.bytes -= states.numel() * states.element_size()
