"""Reading a recipe: from a file, by name or from a mapping, with settings of the command line in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import paths
from ..errors import ConfigError, DataError, ScheduleError, nearest, shown
from ..yaml_text import load_yaml, problems, read_yaml
from .settings import RunConfig


def override(key: str, value: Any) -> str:
    """One of the `overrides` of `load`, whatever characters the value holds."""
    pair = r"(?<!\\)((?:\\\\)*)(\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2})"
    # YAML reads JSON, but does not join the two halves by which it escapes an emoji.
    joined = re.sub(pair, lambda m: m[1] + json.loads(f'"{m[2]}"'), json.dumps(value))
    return f"{key}={joined}"


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and validate a recipe.

    Args:
        source: path of a YAML file, name of a built-in recipe (`fpt ls recipes`), or a mapping.
        overrides: `key=value` texts, keys dotted (`train.steps=100`), values YAML.

    Returns:
        The recipe with absolute paths: a file's relative ones are taken from its folder, all others from the current.

    Raises:
        ConfigError: unreadable, an unknown key (the nearest valid one is named), a value of the wrong kind.
    """
    data = dict(source) if isinstance(source, Mapping) else _read(source)
    data = _placed(data, "" if isinstance(source, Mapping) else Path(source).parent)
    for override in overrides:
        _override(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        missing = "{name} is missing; set it in the recipe or with --set {name}=…"
        texts = problems(error, RunConfig, missing=missing, unknown="{name} is not a setting", all_are="valid:")
        raise ConfigError("; ".join(texts)) from None
    except ScheduleError as error:
        raise ConfigError(str(error)) from error


_PLACES = {
    ("model", "path"): paths.of_model,
    ("data", "task"): paths.of_task,
    ("data", "files", "*"): paths.absolute,
    ("prompt", "path"): paths.absolute,
    ("cache", "folder"): paths.absolute,
    ("scoring", "path"): paths.absolute,
    ("scoring", "layer_path"): paths.absolute,
    ("output",): paths.absolute,
}
"""The settings that are paths, and what makes each absolute."""


def _placed(value: Any, folder: str | Path, keys: tuple[Any, ...] = ()) -> Any:
    """A value of a recipe at `keys`, with absolute paths; relative ones are taken from `folder`."""
    if isinstance(value, dict) and len(keys) < 3:  # YAML can hold a mapping that holds itself
        return {key: _placed(inner, folder, (*keys, key)) for key, inner in value.items()}
    place = _PLACES.get(keys) or _PLACES.get((*keys[:-1], "*"))
    return place(value, folder) if place and value and isinstance(value, str) else value


def _read(source: str | Path) -> dict[str, Any]:
    path, name, recipes = Path(source), str(source), paths.built_in("recipes")
    if not path.is_file():
        path = recipes.get(name, path)
    try:
        data = read_yaml(path, f"config={name!r}")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # not text, or a name that cannot be one
        hint = nearest(name, recipes, kind="the recipe ", all_are="recipes:")
        raise ConfigError(f"config={name!r} cannot be read ({type(error).__name__}){hint}") from error
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise ConfigError(f"config={name!r} must hold settings (key: value), found {type(data).__name__}")
    return data


def _override(data: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {shown(text)} is not key=value; write for example --set train.steps=100")
    parsed = load_yaml(value, f"--set {shown(text)}: the value")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = data.get(section)
        data[section] = dict(inner) if isinstance(inner, dict) else {}
        data = data[section]
    data[last] = _placed(parsed, "", (*sections, last))


def settings_of(folder: Path, sets: Iterable[str] = ()) -> RunConfig:
    """The recipe of a run; of a run of all weights, with its own model in place of the one it began with.

    Raises:
        DataError: there is none in the folder. ConfigError: as `load`.
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise DataError("there is no config.yaml: this is not the folder of a run", file=str(folder))
    tuned = [override("model.path", str(folder / "model"))] if (folder / "model").is_dir() else []
    return load(saved, [*tuned, *sets])
