"""Tasks by name, from files, and from templates given as settings; each is checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, DataError, nearest
from ..paths import built_in
from ..yaml_text import problems, read_yaml
from .metrics import METRICS
from .tasks import Source, Task, check_apart, render_input
from .templates import compiled


def load_task(name_or_path: str) -> Task:
    """A built-in task by name, or the user's own from a YAML file.

    Raises:
        ConfigError: unknown name, unreadable file, or a key or value that does not fit; names the nearest valid one.
    """
    tasks = built_in("tasks")
    if name_or_path in tasks:
        return _parse(read_yaml(tasks[name_or_path], name_or_path), name_or_path, None)
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"task {name_or_path!r} is unknown{nearest(name_or_path, tasks)} (or give a .yaml)")
    try:
        return _parse(read_yaml(path, f"task file {name_or_path}"), str(path), path.parent)
    except OSError as error:
        raise ConfigError(
            f"task file {name_or_path!r} cannot be read: {error.strerror or error}; give the right one with "
            "--set data.task=FILE"
        ) from None


def _parse(data: Any, where: str, folder: Path | None) -> Task:
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
        texts = problems(
            error, Task, missing="key {name!r} is required", unknown="unknown key {name!r}", all_are="choose from"
        )
        raise ConfigError("\n".join(f"{where}: {text}" for text in texts)) from None


def with_source(task: Task, hub: str, config: str | None, splits: Mapping[str, str]) -> Task:
    """The task with the rows of a data set on the Hub, or of a folder of one, in place of its own.

    Args:
        config: its configuration.
        splits: split -> the data set's own name of it; default the same name. Its class labels become their names.
    """
    splits = {**Task.model_fields["splits"].default, **splits}
    return task.model_copy(update={"source": Source(hub=hub, config=config), "splits": splits})


def task_from_templates(
    *,
    files: Mapping[str, str],
    input_template: str,
    target_template: str,
    labels: Sequence[str] | None = None,
    max_target_tokens: int = 64,
) -> Task:
    r"""A task from the command line: the templates are used as they are for every kind of model.

    What is shortened when an input is too long is the template's only field, if it stands there once and without a
    filter; else an input loses its own end. The metric is accuracy with labels, else ROUGE.

    Args:
        files: split -> local file.
        input_template: Jinja template, such as `"{{ text }}\nTopic:"`.
        target_template: Jinja template, such as `" {{ label }}"`.
        labels: the words of a closed set, which the field `label` holds.
        max_target_tokens: longest target.

    Raises:
        ConfigError: the settings do not fit together.
    """
    check_apart(labels or ())
    metric = "rouge" if labels is None else "accuracy"
    data = {
        "name": "custom",
        "version": 1,
        "source": {"files": files},
        "input_template": input_template,
        "target_template": target_template,
        "labels": None if labels is None else {word: word for word in labels},
        "label_field": None if labels is None else "label",
        "truncate": _only_field(input_template),
        "metric": metric,
        "primary": METRICS[metric].scores[0],
        "max_target_tokens": max_target_tokens,
    }
    return _validate(data, "custom")


def _only_field(template: str) -> str | None:
    """The field that a template reads, if it is the only one and is shown once, as it is."""
    fields = compiled(template)[1]
    if len(fields) != 1:
        return None
    (field,) = fields
    try:
        _, start, _ = render_input(template, {field: "text"}, field)
    except (ConfigError, DataError):
        return None
    return field if start >= 0 else None
