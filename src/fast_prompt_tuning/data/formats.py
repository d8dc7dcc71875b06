"""Rows of local files in the formats people have: JSONL, JSON, CSV, TSV, Parquet, Arrow, GLUE's TSV, SQuAD, ReCoRD.

Read here rather than with the loaders of `datasets`: those name neither the line nor the reason of a bad row, and
GLUE's TSV has no quoting.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from ..errors import DataError

LONGEST_LINE = 2**27
"""Bytes of a line, and of a JSON file that is read as a whole: a gzipped file may unfold to anything."""


@dataclass(frozen=True)
class Row:
    fields: dict[str, Any]
    number: int  # 1-based line (or record) number


Rows = Iterator[Row | DataError]  # a bad row is passed on, so that one loop decides whether to skip it


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes). Split at newline only: texts hold other characters that `str.splitlines` splits at."""
    try:
        with gzip.open(path) if _is_zipped(path) else path.open("rb") as handle:
            yield from numbered(handle, str(path))  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read the file: {reason}", file=str(path)) from None


def numbered(handle: BinaryIO, where: str) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of an open file, without a byte-order mark.

    Raises:
        DataError: a line is longer than `LONGEST_LINE`.
    """
    number = 0
    while line := handle.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(f"a line of over {LONGEST_LINE} bytes; shorten it", file=where, line=number)
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def text_lines(handle: BinaryIO, where: str) -> Iterator[str]:
    r"""Lines of an open file as text, without their ends (`\n`, `\r\n`).

    Raises:
        DataError: a line is not UTF-8, or too long.
    """
    for number, line in numbered(handle, where):
        yield _decode(line, where, number).rstrip("\r\n")


def _is_zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _suffix(path: Path) -> str:
    """What says how a file is written: `.csv` of `a.csv` and of `a.csv.gz`."""
    return Path(path.stem if _is_zipped(path) else path.name).suffix.lower()


def _decode(line: bytes, where: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.object[error.start]:#04x}); convert it to UTF-8", file=where, line=number
        ) from None


def _decoded_rows(path: Path, parse: Callable[[str], Iterable[dict[str, Any]]]) -> Rows:
    """Rows of a file that has one record (or a list of them) on each line; blank lines do not count."""
    for number, line in _lines(path):
        try:
            text = _decode(line, str(path), number).rstrip("\r\n")
            if text.strip():
                for fields in parse(text):
                    yield Row(fields, number)
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


def _read_jsonl(path: Path) -> Rows:
    """One object a line; a `.json` file may be one array of objects, whose rows count from 1."""
    if _suffix(path) == ".json" and next((line for _, line in _lines(path) if line.strip()), b"").lstrip()[:1] == b"[":
        return _read_array(path)
    return _decoded_rows(path, lambda text: [_json_object(text)])


def _read_array(path: Path) -> Rows:
    for number, value in enumerate(_document(path), start=1):
        if isinstance(value, dict):
            yield Row(value, number)
        else:
            reason = f"a JSON {type(value).__name__}; an array of objects {{...}} is expected"
            yield DataError(reason, file=str(path), line=number)


def _document(path: Path) -> Any:
    """The value of a JSON file that is read as a whole."""
    pieces, size = [], 0
    for number, line in _lines(path):
        pieces.append(_decode(line, str(path), number))
        size += len(line)
        if size > LONGEST_LINE:
            raise DataError(f"more than {LONGEST_LINE} bytes of JSON; use one object a line (.jsonl)", file=str(path))
    try:
        return json.loads("".join(pieces))
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg}", file=str(path), line=error.lineno) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a thousand brackets
        raise DataError(f"not valid JSON: {error}", file=str(path)) from None


def _with_header(path: Path, cells: Iterator[tuple[int, list[str]]]) -> Rows:
    header: list[str] | None = None
    for number, values in cells:
        if header is None:
            header = values
            if len(set(header)) < len(header) or not all(header):
                raise DataError(f"the header {header} has an empty or a repeated name", file=str(path), line=number)
        elif len(values) != len(header):
            yield DataError(f"{len(values)} columns; the header has {len(header)}", file=str(path), line=number)
        else:
            yield Row(dict(zip(header, values, strict=True)), number)


def _read_quoted(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a long text is cut later, as in JSONL
    bad: list[DataError] = []
    at = 0  # the line read last: undecodable ones do not reach the reader
    opened = before = 0  # the line of the quote that is open now, and that was before this line; 0 for none

    def texts() -> Iterator[str]:
        nonlocal at, opened, before
        for at, line in _lines(path):
            try:
                text = _decode(line, str(path), at)
            except DataError as error:
                bad.append(error)
                continue
            before, quotes = opened, (text.replace('""', "") if opened else text).count('"')
            if quotes:
                opened = at if (quotes + bool(opened)) % 2 else 0
            yield text

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        nonlocal opened
        while True:
            begun = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num > begun + 1:  # an open quote has swallowed rows: not one bad row
                    line = opened if "end of data" in str(error) else before
                    raise DataError(
                        f"malformed: a quote that opens here swallows the rows after it ({error})",
                        file=str(path),
                        line=line or at,
                    ) from None
                bad.append(DataError(f"malformed: {error}", file=str(path), line=at))
                opened = 0
            else:
                if cells:
                    yield at, cells

    yield from _between(_with_header(path, records()), bad)


def _between(rows: Rows, bad: list[DataError]) -> Rows:
    """Rows, and what could not be read as one, in the order of the file."""
    for row in rows:
        yield from bad
        bad.clear()
        yield row
    yield from bad


def _read_csv(path: Path) -> Rows:
    """Cells between commas, or between semicolons where the header has those and no comma."""
    header = next((line for _, line in _lines(path) if line.strip()), b"")
    return _read_quoted(path, ";" if b";" in header and b"," not in header else ",")


def _read_tsv(path: Path) -> Rows:
    return _read_quoted(path, "\t")


def _read_glue_tsv(path: Path) -> Rows:
    # GLUE writes bare quotes into its cells: no quoting at all. Undecodable lines are bad rows of their own.
    bad: list[DataError] = []

    def cells() -> Iterator[tuple[int, list[str]]]:
        for number, line in _lines(path):
            try:
                text = _decode(line, str(path), number).rstrip("\r\n")
            except DataError as error:
                bad.append(error)
                continue
            if text:
                yield number, text.split("\t")

    yield from _between(_with_header(path, cells()), bad)


def _read_squad(path: Path) -> Rows:
    """SQuAD 1.1 and 2.0 JSON: data[] > paragraphs[] > qas[]; rows count the questions."""
    document = _document(path)
    try:
        articles = _member(document, "data", list)
    except DataError as error:
        raise DataError(f"not SQuAD JSON: {error.reason}", file=str(path)) from None
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
                yield Row({**fields, "title": str(article.get("title", ""))}, number)


def _counted(rows: Iterable[dict[str, Any]]) -> Rows:
    return (Row(fields, number) for number, fields in enumerate(rows, start=1))


def _read_parquet(path: Path) -> Rows:
    from .arrow_files import parquet_rows

    return _counted(parquet_rows(path))


def _read_arrow(path: Path) -> Rows:
    from .arrow_files import arrow_rows

    return _counted(arrow_rows(path))


def _member(value: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, dict):
        raise DataError(f"a JSON object with {key!r} is expected, not {type(value).__name__}")
    if not isinstance(value.get(key), kind):
        raise DataError(f"{key!r} is missing or of the wrong type")
    return value[key]


def _read_record(path: Path) -> Rows:
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


_READERS: Mapping[str, tuple[tuple[str, ...], Callable[[Path], Rows]]] = MappingProxyType(
    {  # format -> (suffixes, reader); of two formats with one suffix, the first is the default
        "jsonl": ((".jsonl", ".ndjson", ".json"), _read_jsonl),
        "csv": ((".csv",), _read_csv),
        "tsv": ((".tsv",), _read_tsv),
        "glue_tsv": ((".tsv", ".txt"), _read_glue_tsv),
        "squad": ((".json",), _read_squad),
        "record": ((".jsonl", ".json"), _read_record),
        "parquet": ((".parquet",), _read_parquet),
        "arrow": ((".arrow", ".feather"), _read_arrow),
    }
)


def rows_of(path: Path, preferred: str | None) -> Rows:
    """The rows of a file, or of a folder saved by `datasets`, and a `DataError` in place of each that cannot be read.

    Args:
        preferred: the format where the suffix leaves a choice.

    Raises:
        DataError: at once or later: another kind of file, or nothing of it can be read.
    """
    if path.is_dir():
        from .arrow_files import saved_rows

        return _counted(saved_rows(path))
    suffix = _suffix(path)
    fitting = [name for name, (suffixes, _) in _READERS.items() if suffix in suffixes]
    if not fitting:
        known = ", ".join(sorted({s for suffixes, _ in _READERS.values() for s in suffixes}))
        raise DataError(f"unknown file type {suffix!r}; use one of {known}, or one of them in a .gz", file=str(path))
    return _READERS[preferred if preferred in fitting else fitting[0]][1](path)
