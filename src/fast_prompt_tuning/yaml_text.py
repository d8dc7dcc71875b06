"""YAML of unknown origin, read in bounded time and memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

LONGEST = 200_000
"""Characters that a text may have, as it is written and with its aliases unfolded."""
LONGEST_NUMBER = 100
"""Characters of a number: YAML's numbers to base 60 take a time that grows with the square of their length."""
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
