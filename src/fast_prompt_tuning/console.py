"""What every command of `fpt` shares: where its output goes, and how much the libraries under it may say."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

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


def emit(value: Any) -> None:
    """One JSON value on a line of standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def plain(text: str) -> str:
    """A text as it is, for `rich`: its brackets are no markup."""
    return escape(text)
