"""Parts of a split to watch training with or to compute scores on, and hashes that tell data sets apart."""

from __future__ import annotations

import hashlib
import json

import datasets
import numpy as np

from ..errors import ConfigError, DataError


def examples_fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 (hex) of the rows' rendered inputs, targets and references, in order: tells data sets apart."""
    digest = hashlib.sha256()
    columns = [name for name in ("id", "input", "target", "references") if name in dataset.column_names]
    for row in dataset.select_columns(columns or dataset.column_names):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def train_split(dataset: datasets.Dataset, n: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """n random rows of the *training* data, and all others: what training is watched with, it must not see.

    Raises:
        ConfigError: n below 1, or not below the number of rows.
    """
    if not 1 <= n < len(dataset):
        raise ConfigError(f"n={n} held-out examples of {len(dataset)} must leave some to train on")
    order = np.random.default_rng((seed, 1)).permutation(len(dataset))
    return dataset.select(np.sort(order[:n])), dataset.select(np.sort(order[n:]))


def tokens_fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 (hex) of the token ids and labels of the rows of `encode`, in order: another tokenizer, another hash."""
    digest = hashlib.sha256()
    for row in dataset.select_columns(["input_ids", "labels"]).with_format("numpy"):
        for ids in row.values():
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def train_calibration(dataset: datasets.Dataset, n: int, seed: int) -> datasets.Dataset:
    """n random rows of the *training* data to compute scores on; all of them, in order, where there are fewer.

    Never pass a validation or test split: what is chosen with these rows would then have seen it.

    Raises:
        ConfigError: `n` below 1.
        DataError: no rows.
    """
    if n < 1:
        raise ConfigError(f"n={n} calibration examples must be at least 1")
    if len(dataset) == 0:
        raise DataError("no training examples to calibrate on")
    picked = np.random.default_rng(seed).permutation(len(dataset))[:n]
    return dataset.select(np.sort(picked))
