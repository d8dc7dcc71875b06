"""Where relative paths are taken from, and which names are paths at all. Only the presence of files is looked at."""

from __future__ import annotations

import os
from pathlib import Path


def is_path(name: str) -> bool:
    """Whether a model's name can only be a path: a hub id is `name` or `owner/name`."""
    return (
        name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1 or name.endswith((".gguf", ".json"))
    )


def absolute(path: str, folder: str | os.PathLike[str]) -> str:
    """The absolute path; a relative one is taken from `folder`, and `~` is the home folder."""
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def of_model(name: str, folder: str | os.PathLike[str]) -> str:
    """The absolute path where a model's name is one, or names a folder that is there; else the name as it is."""
    there = os.path.join(folder, name)
    is_folder = os.path.isdir(there) if "/" in name else os.path.isfile(os.path.join(there, "config.json"))
    return absolute(name, folder) if is_folder or is_path(name) else name


def of_task(name: str, folder: str | os.PathLike[str]) -> str:
    """The absolute path of a task's YAML file; a built-in task's name as it is."""
    return absolute(name, folder) if name.endswith((".yaml", ".yml")) else name


def built_in(folder: str) -> dict[str, Path]:
    """The YAML files that come with the package in its folder `tasks` or `recipes`, by name, sorted."""
    return {path.stem: path for path in sorted((Path(__file__).parent / folder).glob("*.yaml"))}
