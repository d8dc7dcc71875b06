"""What every command of `fpt` shares: where its output goes, and how much the libraries under it may say."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..errors import ConfigError

state: dict[str, Any] = {"debug": False, "quiet": False}
"""The options before the command: `fpt --debug`, `fpt --quiet`."""


def quiet_libraries(transformers_only: bool = False) -> None:
    """Our own progress is shown; the libraries' bars and notices are noise beside it."""
    if state["debug"]:
        return
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not transformers_only:
        import datasets

        datasets.disable_progress_bars()


def progress(as_json: bool = False) -> Console:
    """Where work under way is told of: nowhere under --quiet, on standard error under --json."""
    return Console(quiet=state["quiet"], stderr=as_json)


def people(as_json: bool = False) -> Console:
    """Where people read results: on standard error under --json, and nowhere under both that and --quiet."""
    return Console(quiet=state["quiet"] and as_json, stderr=as_json)


def _finite(value: Any) -> Any:
    """A JSON value with null in place of the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit(value: Any) -> None:
    """One JSON value on a line of standard output."""
    sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def check_output(path: Path) -> None:
    """Raise, before any work, where a file cannot be made.

    Raises:
        ConfigError: it exists already, or its folder is none or may not be written.
    """
    if path.exists():
        raise ConfigError(f"{str(path)!r} exists already; choose another name")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{str(path)!r} cannot be written: {str(folder)!r} is no folder that may be written")


def plain(text: str) -> str:
    """A text as it is, for `rich`: its brackets are no markup."""
    return escape(text)
