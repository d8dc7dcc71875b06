"""What a run says once of settings and data that are allowed and are mostly mistakes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from ..placements import placement_of
from ..recipe import CacheConfig, RunConfig
from ..schedule.auto import AutoSchedule
from ..schedule.stages import Schedule
from .session import Session

logger = logging.getLogger(__name__)

_UNREAD = MappingProxyType({"none": {"budget_mib", "folder"}, "memory": {"folder"}, "disk": set[str]()})
"""Cache tier -> settings of the cache that it does not read."""


def advise(session: Session) -> None:
    """Warn of cache settings that nothing reads, and of splits whose texts say nothing."""
    if unused := unused_cache_settings(session.config):
        settings = f"prompt.placement={session.config.prompt.placement!r} and cache.tier={session.config.cache.tier!r}"
        logger.warning("%s: not used with %s; leave it out", ", ".join(unused), settings)
    for split, rows in session.examples.items():
        if _says_nothing(rows):
            logger.warning(
                "all %d examples of the split %r have an empty text, or one and the same: nothing can be learned from "
                "them; check that the template's fields are the data's (fpt show task)",
                len(rows),
                split,
            )


def unused_cache_settings(config: RunConfig) -> list[str]:
    """Settings of the cache that differ from their defaults and that nothing reads, as `cache.name=value`."""
    settings = config.cache.model_dump()
    unread = set(settings) if not placement_of(config.prompt.placement).keeps_texts else _UNREAD[config.cache.tier]
    fields = CacheConfig.model_fields
    return [f"cache.{k}={v!r}" for k, v in settings.items() if k in unread and v != fields[k].default]


def _says_nothing(rows: Dataset) -> bool:
    texts = zip(rows["input"], rows["cut_start"], rows["cut_end"], strict=True)
    if all(not (text[start:end] if start >= 0 else text).strip() for text, start, end in texts):
        return True
    first = rows["input"][0]
    return len(rows) > 1 and all(text == first for text in rows["input"])


class GradientCheck(TrainerCallback):
    """Warns where the first step of a stage gives what is trained no gradient at all.

    A prompt has none where each labelled token is further from it than layers times sliding window reach.
    """

    def __init__(self, trained: Sequence[nn.Parameter], schedule: Schedule | AutoSchedule):
        self.trained, self.schedule = trained, schedule
        self._checked: set[int] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.schedule.now.index_at(state.global_step)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        if stage in self._checked or not gradients:  # a step that is left out has none
            return
        self._checked.add(stage)
        if state.is_world_process_zero and not any(gradient.any() for gradient in gradients):
            logger.warning(
                "step %d, the first of stage %d: the prompt gets no gradient, so nothing is learned; are the labelled "
                "tokens out of its reach (layers × sliding window)? Shorten inputs, keep more layers, or move the "
                "prompt nearer (prompt.placement)",
                state.global_step,
                stage + 1,
            )
