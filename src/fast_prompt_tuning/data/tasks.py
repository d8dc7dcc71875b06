"""Tasks as data: where the examples come from, how they become text, and how predictions are scored.

A task is one YAML file (`tasks/*.yaml`, or the user's own). Its Jinja templates turn a row's fields into an input and
a target text; `readers.load_examples` reads a split from the Hub or from local files in the benchmarks' formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import ConfigError, DataError, nearest, shown
from .metrics import METRICS
from .patterns import LONGEST_BY, pattern_of, substitute
from .templates import compiled, render

Format = Literal["jsonl", "csv", "tsv", "glue_tsv", "squad", "record", "bbc_package"]

_SENTINEL = re.compile(r"<extra_id_\d+>")


def render_input(template: str, fields: Mapping[str, Any], truncate: str | None) -> tuple[str, int, int]:
    """The input text and the characters [start, end) of it that may be cut from their end; (-1, -1) for none."""
    text = render(template, fields)
    if truncate is None or truncate not in fields:
        return text, -1, -1
    value = fields[truncate]
    if not isinstance(value, str):
        raise DataError(f"field {truncate!r}, the one to shorten, is {type(value).__name__}; it must be text")
    # Render again with a mark on both sides of the field: where the marks land is where the field lies.
    used = set(text) | set(value)
    mark = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in used), None)
    if mark is None:
        raise DataError(f"field {truncate!r} has every character that is for private use; take one of them out")
    parts = render(template, {**fields, truncate: f"{mark}{value}{mark}"}).split(mark)
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

    @model_validator(mode="after")
    def _fits(self) -> Replace:
        if len(self.by) > LONGEST_BY:
            raise ValueError(f"by {shown(self.by)} has more than {LONGEST_BY} characters; shorten it")
        try:
            pattern_of(self.pattern)
        except ValueError as error:
            raise ValueError(f"pattern {shown(self.pattern)}: {error}") from None
        try:
            re.compile(f"{self.pattern}|").sub(self.by, "")  # matches the empty text: its template is looked at
        except (re.error, IndexError, OverflowError) as error:
            raise ValueError(f"by {self.by!r} does not fit the pattern {self.pattern!r}: {error}") from None
        return self


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
        chat: field with a conversation. Templates then see `before`, `user`, `after` and `assistant`, as `chat.turns`
            gives them.
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
        one_line: answers end with their first line; false where targets have several.
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
    chat: str | None = None
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
    one_line: bool = True
    max_target_tokens: int = Field(ge=1)
    stacks: list[Literal["encoder", "decoder"]] = Field(default=["encoder", "decoder"], min_length=1)

    @field_validator("labels", mode="before")
    @classmethod
    def _label_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        check_apart(map(str, value))
        check_apart(dict.fromkeys(word for word in value.values() if isinstance(word, str)))
        return {_label_key(k): v for k, v in value.items()}

    @model_validator(mode="after")
    def _agrees(self) -> Task:
        for decoder in (False, True) if self.decoder else (False,):
            input_template, target_template = self.templates(decoder=decoder)
            _, read = compiled(input_template)
            compiled(target_template)
            if self.truncate and self.truncate not in read:
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
            raise ConfigError(
                f"metric={self.metric!r} is unknown{nearest(self.metric, METRICS)}; one of your own is "
                "Python code: call register_metric in a script before the task is loaded there"
            )
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
        return compiled(self.templates(decoder=decoder)[0])[1]

    def choices(self, *, decoder: bool) -> dict[str, str]:
        """Label word -> target text, in the order of `labels`; empty for a task with open answers.

        Raises:
            ConfigError: the target template needs more than the label.
        """
        _, template = self.templates(decoder=decoder)
        if self.labels and (others := sorted(compiled(template)[1] - {"label"})):
            raise ConfigError(
                f"target_template={shown(template)} must need `label` only to score labels; it reads {others[0]!r}"
            )
        return {word: render(template, {"label": word}) for word in (self.labels or {}).values()}

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
            text, start, end = render_input(input_template, seen, self.truncate)
            target = render(target_template, seen) if labelled else ""
            if labelled and references is None:
                references = [self.postprocess(target)]
            for part in (text, target, row_id, *(references or ()), *extra.values()):
                _check_text(part)
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
            other = next((name for name in others if name in row), None)
            if field not in row and other is not None:
                row[field] = row.pop(other)
        for rule in self.replace:
            if isinstance(row.get(rule.field), str):
                row[rule.field] = substitute(rule.pattern, rule.by, row[rule.field])
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
            targets = list(dict.fromkeys(answers)) if self.expand and train else answers[:1]
            return [({"answer": answer}, answers, True) for answer in targets]
        if test and not compiled(target_template)[1] <= set(row):
            return unlabelled
        return [({}, None, True)]


def _has(row: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no fields'}"


def _label_key(value: Any) -> str:
    return str(value).strip()


def check_apart(labels: Iterable[str]) -> None:
    """Raise where two labels are one after stripping: answers and references are compared stripped."""
    seen: dict[str, str] = {}
    for label in labels:
        if label.strip() in seen:
            raise ConfigError(
                f"labels {seen[label.strip()]!r} and {label!r} are the same once stripped; give each once"
            )
        seen[label.strip()] = label


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
