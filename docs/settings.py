"""Writes docs/settings.md, every setting of a recipe, from the code: `python docs/settings.py`."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fast_prompt_tuning.recipe import RunConfig

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings of a recipe

A recipe is a YAML file with these settings. `fpt train -c recipe.yaml --set SECTION.NAME=VALUE` overrides one of them.
This page is made from the code by `docs/settings.py`. What `auto` leaves to itself is on [its page](methods/auto.md).
"""


def kind(annotation: Any) -> str:
    """A type in words: `int`, `a | b` for choices, `list of …`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(parts[0])
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(part) for part in parts if part is not type(None)))
    if origin is list:
        return f"list of {kind(parts[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if value is None or value == []:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", kind(field.annotation), default(field), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting is, or that each of its list is."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def page() -> str:
    top, sections = [], []
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            top.append(row(name, field))
            continue
        title = f"{name}, a list" if typing.get_origin(field.annotation) is not None else name
        intro = (section.__doc__ or "").split("\n")[0]
        more = f" {field.description[0].upper()}{field.description[1:]}." if field.description else ""
        rows = [row(inner, of) for inner, of in section.model_fields.items()]
        sections.append(table(title, f"{intro}{more}", rows))
    return "\n".join([HEAD, table("At the top", "", top), *sections])


def table(title: str, intro: str, rows: list[str]) -> str:
    lines = [f"## {title}", "", *([intro, ""] if intro else [])]
    return "\n".join([*lines, "| setting | kind | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
