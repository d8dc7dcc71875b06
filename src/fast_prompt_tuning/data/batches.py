"""Batches: rows padded together, and which rows share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..plm.objective import IGNORED
from .trimming import TAIL


class Collator:
    """Rows of `encode` -> one padded batch. Other columns are dropped.

    Padding is on the right: the soft prompt sits in front of the text, and padding on the left would come between.

    Args:
        tokenizer: gives the padding token; EOS, then 0, where it has none (padding is masked in any case).
        decoder: the rows are a decoder-only model's.
        tails: also give `n_tail` `(B,)`, for stages that cut inputs (`trimming.trim`) and for
            prompts within them; a model does not take it.

    Returns:
        When called on B rows: `input_ids` and `attention_mask` (B, T) and `labels`, (B, T) for a decoder-only model,
        else (B, T_target); -100 where there is no label. All int64.
    """

    def __init__(self, tokenizer: Any, *, decoder: bool, tails: bool = False):
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(i for i in ids if i is not None)
        self.decoder, self.tails = decoder, tails

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not rows:
            raise DataError("an empty batch")
        inputs = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows]
        length = max(1, *map(len, inputs))
        target_length = length if self.decoder else max(1, *map(len, labels))
        return {
            **({TAIL: torch.tensor([row[TAIL] for row in rows])} if self.tails else {}),
            "input_ids": _padded(inputs, length, self.pad_id),
            "attention_mask": _padded([torch.ones_like(ids) for ids in inputs], length, 0),
            "labels": _padded(labels, target_length, IGNORED),
        }


def _padded(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    out = torch.full((len(rows), length), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def input_lengths(dataset: datasets.Dataset) -> list[int]:
    """Number of `input_ids` of each row of `encode`, for `LengthBatchSampler`."""
    return [len(ids) for ids in dataset["input_ids"]]


class LengthBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of similar length, the same for the same seed and epoch; every index once an epoch.

    Indices are shuffled and cut into windows, each window is sorted by length and cut into batches, and the batches
    are shuffled: little padding, and still a random order.

    Every process of a distributed run makes the same batches. Where accelerate deals them out, each gets as many: it is
    not told a batch size, which would make it take a smaller batch for the last one.

    Args:
        lengths: tokens of each example.
        batch_size: B, the most examples of a batch.
        seed: seed of the order, together with the epoch.
        window: batches in a window. 1: no sorting; more: less padding.
        max_tokens: the most tokens of a batch's share, padding included. Which examples share a batch then stays the
            same at every epoch, so that all have as many batches and a resumed run finds its place.
        shares: processes that a batch is dealt to, in parts of like size.

    Raises:
        ConfigError: `batch_size` or `window` below 1, a negative seed, an example longer than `max_tokens`.
        DataError: no examples.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        window: int = 32,
        max_tokens: int | None = None,
        shares: int = 1,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("window", window, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        self.lengths = np.asarray(lengths)
        if max_tokens is not None and len(self.lengths) and self.lengths.max() > max_tokens:
            raise ConfigError(
                f"train.batch_tokens={max_tokens} has no room for the longest example, {self.lengths.max()} tokens; "
                "raise it or lower data.max_input_tokens"
            )
        self.size, self.seed, self.window = batch_size, seed, window
        self.max_tokens, self.shares, self.epoch = max_tokens, shares, 0
        if not len(self.lengths):
            raise DataError("there are no examples to make a batch of")
        self._count = -(-len(self.lengths) // batch_size)
        if max_tokens is not None:
            self._count = len(self._batches_of(np.random.default_rng(seed).permutation(len(self.lengths))))

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def _batches_of(self, order: np.ndarray) -> list[list[int]]:
        """Examples in this order -> batches, in windows sorted by length."""
        batches: list[list[int]] = []
        size = self.window * self.size
        for start in range(0, len(order), size):
            window = order[start : start + size]
            if self.window > 1:
                window = window[np.argsort(self.lengths[window], kind="stable")]
            batch: list[int] = []
            longest = 0
            for i, length in zip(window.tolist(), self.lengths[window].tolist(), strict=True):
                longest = max(longest, length)
                largest = -(-(len(batch) + 1) // self.shares)  # rows of the largest share with this one
                over = self.max_tokens is not None and largest * longest > self.max_tokens
                if batch and (over or len(batch) == self.size):
                    batches.append(batch)
                    batch, longest = [], length
                batch.append(i)
            batches.append(batch)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        fixed = self.max_tokens is not None
        order = (np.random.default_rng(self.seed) if fixed else rng).permutation(len(self.lengths))
        batches = self._batches_of(order)
        for i in rng.permutation(len(batches)):
            yield batches[i]
