"""Which examples every step of a run trains on: a function of the step alone, the same for any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from ..data.batches import Collator, LengthBatchSampler, input_lengths
from ..plm.objective import IGNORED
from ..recipe import TrainConfig
from . import parallel


class Batches:
    """Batches of the whole run, of which every process takes its own rows.

    Args:
        rows: encoded examples (`data.encoding.encode`).
        collate: makes a batch of rows.
        train: batch size of each process, accumulated batches, token budget and seed.
    """

    def __init__(self, rows: Dataset, collate: Collator, train: TrainConfig):
        self.rows, self.collate, self.accumulate = rows, collate, train.accumulate
        self._sampler = sampler_of(rows, train)
        self.steps_an_epoch = steps_an_epoch(self._sampler, train)
        self._dealt: tuple[int, list[list[int]]] = (-1, [])

    def of(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The batches of optimizer step `step` (0-based): `train.accumulate`, fewer in the last step of an epoch."""
        epoch, place = divmod(step, self.steps_an_epoch)
        if self._dealt[0] != epoch:
            self._sampler.set_epoch(epoch)
            self._dealt = epoch, list(self._sampler)
        start = place * self.accumulate
        return [self._mine(batch) for batch in self._dealt[1][start : start + self.accumulate]]

    def _mine(self, batch: list[int]) -> dict[str, torch.Tensor]:
        mine = parallel.rows_of(batch)
        columns = self.rows[mine or [0]]
        padded = self.collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        if not mine:  # fewer rows than processes: this one takes part with an example that carries no loss
            padded["labels"].fill_(IGNORED)
        return padded


def sampler_of(rows: Dataset, train: TrainConfig) -> LengthBatchSampler:
    """Deals the batches of an epoch, each for all processes together."""
    size = parallel.shares()
    return LengthBatchSampler(
        input_lengths(rows), train.batch_size * size, seed=train.seed, max_tokens=train.batch_tokens, shares=size
    )


def steps_an_epoch(sampler: LengthBatchSampler, train: TrainConfig) -> int:
    """Optimizer steps of an epoch: the last one may accumulate fewer batches."""
    return -(-len(sampler) // train.accumulate)


def make_collator(tokenizer: Any, plm: Any, *, tails: bool = False) -> Collator:
    """The collator for a PLM; with `tails`, for a prompted PLM and for stages that cut inputs."""
    return Collator(tokenizer, decoder=not plm.config.is_encoder_decoder, tails=tails)
