"""What every command of `fpt` shares: where its output goes, and how much the libraries under it may say."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError

state = {"debug": False, "quiet": False, "json": False}
"""The options that every command has, as they were given."""

Config = Annotated[str, typer.Option("--config", "-c", help="Recipe: a YAML file, or a name from `fpt ls recipes`.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override one setting, e.g. --set train.steps=100. Repeatable.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and all library messages.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object and nothing else on standard output (predict: one a line)."),
]


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is standard error at that moment: a live bar takes its place, and goes on below the line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def remember(debug: Debug = False, quiet: Quiet = False, as_json: Json = False) -> None:
    """Remember the options that every command has; each may stand before the command, or anywhere behind it."""
    for name, is_set in (("debug", debug), ("quiet", quiet), ("json", as_json)):
        state[name] |= is_set


def command(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as a command that also takes the options of `remember`."""
    special, shared = (inspect.signature(f, eval_str=True).parameters for f in (function, remember))

    @functools.wraps(function)
    def run(**options: Any) -> None:
        remember(**{name: options.pop(name) for name in shared})
        level = logging.DEBUG if state["debug"] else logging.WARNING
        logging.basicConfig(level=level, format="%(levelname)s %(message)s", handlers=[StderrHandler()])
        speaks = not state["quiet"] and os.environ.get("RANK", "0") == "0"  # of several processes the main one
        for name in ("auto", "progress"):
            logging.getLogger(f"fast_prompt_tuning.{name}").setLevel(logging.INFO if speaks else logging.WARNING)
        if not state["debug"]:
            # Read when tqdm is imported, which any import of ours may do; transformers' GGUF bar has no other switch.
            os.environ.setdefault("TQDM_DISABLE", "1")
            warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about each other
        function(**options)

    run.__signature__ = inspect.Signature([*special.values(), *shared.values()])  # type: ignore[attr-defined]
    return run


def wants_json() -> bool:
    """Whether results are to be one JSON object."""
    return state["json"]


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


def progress() -> Console:
    """Where work under way is told of: nowhere under --quiet, on standard error under --json."""
    return Console(quiet=state["quiet"], stderr=wants_json())


def people() -> Console:
    """Where people read results: on standard error under --json, and nowhere under both that and --quiet."""
    return Console(quiet=state["quiet"] and wants_json(), stderr=wants_json())


def say(text: str) -> None:
    """A line for people: one of a file that was made, say. It is shown as it is; its brackets are no markup."""
    people().print(text, markup=False, highlight=False, soft_wrap=True)


def listed(text: str) -> list[str]:
    """The parts of an option that names several, separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


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


def check_output(path: Path | None) -> None:
    """Raise, before any work, where a file that is asked for cannot be made.

    Raises:
        ConfigError: it exists already, or its folder is none or may not be written.
    """
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{str(path)!r} exists already; choose another name")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{str(path)!r} cannot be written: {str(folder)!r} is no folder that may be written")


def check_picture(path: Path | None) -> None:
    """As `check_output`, of a picture.

    Raises:
        ConfigError: as `check_output`, or its name says no format of ours.
    """
    check_output(path)
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture {str(path)!r} must end in .png or .svg")


def signal_code(reason: str | None) -> int:
    """128 and the number of the signal that ended a run."""
    return 128 + int((reason or "signal 2").split()[-1])
