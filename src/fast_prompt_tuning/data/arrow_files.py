"""Rows of files that say of what kind their columns are: Parquet, Arrow, and what `datasets` has saved to disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from ..errors import DataError, nearest

_AT_A_TIME = 1000


def with_label_names(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows whose class labels are names in place of numbers; None where a row has none, which is written -1."""
    classes = {k: v.names for k, v in features.items() if isinstance(v, datasets.ClassLabel)}
    for row in rows:
        named = dict(row)
        for column, names in classes.items():
            number = named[column]
            named[column] = names[number] if number is not None and number >= 0 else None
        yield named


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        DataError: it cannot be read.
    """
    with _readable(path, "Parquet file"), parquet.ParquetFile(path) as file:
        yield from _rows(file.iter_batches(_AT_A_TIME), file.schema_arrow)


def arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow stream, as `datasets` writes it, or of an Arrow file (Feather).

    Raises:
        DataError: it cannot be read.
    """
    with _readable(path, "Arrow file"), pa.memory_map(str(path)) as source:
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        if whole:
            file = pa.ipc.open_file(source)
            yield from _rows(map(file.get_batch, range(file.num_record_batches)), file.schema)
        else:
            stream = pa.ipc.open_stream(source)
            yield from _rows(stream, stream.schema)


def is_saved(folder: Path, *, several: bool = False) -> bool:
    """Whether `save_to_disk` of `datasets` has made this folder: of one split, or of several."""
    return (folder / ("dataset_dict.json" if several else "state.json")).is_file()


def saved_rows(folder: Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a folder made by `save_to_disk`: of one split, or of the one of its splits that is named.

    Raises:
        DataError: it cannot be read, or has no such split.
    """
    with _readable(folder, "saved data set"):
        saved = datasets.load_from_disk(str(folder))
        if split is not None:
            if split not in saved:
                raise DataError(f"it has no split {split!r}{nearest(split, saved)}", file=str(folder))
            saved = saved[split]
        yield from with_label_names(saved, saved.features)


def _rows(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """Of a file that `datasets` has written, whose schema says which columns are labels, with their names."""
    features = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
    yield from with_label_names((row for batch in batches for row in batch.to_pylist()), features)


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"not a readable {what}: {error}", file=str(path)) from None
