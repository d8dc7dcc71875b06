"""YAML of unknown origin, read in bounded time and memory; and what is wrong with the settings it holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ConfigError, nearest, quote_hint, shown

LONGEST = 200_000
"""Characters that a text may have, as it is written and with its aliases unfolded."""
LONGEST_NUMBER = 100
"""Characters of a number: YAML's numbers to base 60 take a time that grows with the square of their length."""
MOST_PROBLEMS, LONGEST_NAME = 10, 200
"""What a message names at most: settings, and characters of a setting's name."""

DEEPEST = 50
"""Lists and mappings within one another: PyYAML takes long for a thousand open brackets."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which gives up where a text is nested too deep."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def load_yaml(text: str, where: str) -> Any:
    """What a YAML text holds: plain values only.

    Args:
        where: what the text is, for messages.

    Raises:
        ConfigError: not valid YAML, too long, or its aliases unfold to more than `LONGEST` characters.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{where} has more than {LONGEST} characters; shorten it")
    try:
        loader = _Loader(text)
        node: Any = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > LONGEST:
            raise ConfigError(f"{where}: its aliases (*name) unfold to over {LONGEST} characters; write fewer")
        return loader.construct_document(node)
    except ConfigError:
        raise
    except Exception as error:  # PyYAML raises many kinds: KeyError for `!!bool x`, IndexError for `!!int ""`
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path, where: str) -> Any:
    """As `load_yaml`, of a file; no more than `LONGEST` characters of it are read.

    Raises:
        ConfigError: as `load_yaml`, or it is not UTF-8. OSError, ValueError: it cannot be read.
    """
    with path.open(encoding="utf-8") as file:
        try:
            text = file.read(LONGEST + 1)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8 ({error.reason}); convert it to UTF-8") from None
    return load_yaml(text, where)


def _unfolded(node: Any, sizes: dict[int, float]) -> float:
    """Characters of a node with its aliases unfolded; infinite where it holds itself."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf
    if isinstance(node, yaml.ScalarNode):
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > LONGEST_NUMBER:
            raise ConfigError(f"a number of {len(node.value)} characters; it may have {LONGEST_NUMBER}")
        size: float = len(node.value)
    elif isinstance(node, yaml.MappingNode):
        size = sum(_unfolded(part, sizes) for pair in node.value for part in pair)
    else:
        size = sum(_unfolded(part, sizes) for part in node.value)
    sizes[id(node)] = 1 + size
    return sizes[id(node)]


def problems(error: ValidationError, model: type[BaseModel], *, missing: str, unknown: str, all_are: str) -> list[str]:
    """What is wrong with the settings of `model`, one text each.

    Args:
        missing, unknown: what to say of a setting, called `{name}`, that is not given or not known.
        all_are: stands before the list of what is known where nothing is near.
    """
    texts = []
    for each in error.errors()[:MOST_PROBLEMS]:
        location, kind, value = each["loc"], each["type"], each["input"]
        name = ".".join(map(str, location))[:LONGEST_NAME]
        message = each["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = fields_at(model, location[:-1])
            texts.append(unknown.format(name=name) + nearest(str(location[-1]), known, all_are=all_are))
        elif kind == "missing":
            texts.append(missing.format(name=name))
        elif kind == "value_error":
            texts.append(f"{name}: {message}" if name else message)
        else:
            texts.append(f"{name}={shown(value)}: {message}{quote_hint(value) if kind == 'string_type' else ''}")
    return texts


def fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Names of the settings in the section at `location`, which may be one of a list or may be left out."""
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kinds += [inner for kind in kinds for inner in getattr(kind, "__args__", ())]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
