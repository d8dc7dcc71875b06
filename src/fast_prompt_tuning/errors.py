"""Typed errors: every refusal names the field, the value and the fix."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST_MESSAGE = 2000
"""Characters of an error's message; of a longer one the middle is left out, for the fix stands at the end."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 4, 160, 160
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = 12


class FptError(ValueError):
    """Base of every error this package raises on bad input; a `ValueError`, so existing handlers catch it."""

    def __init__(self, message: str = ""):
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} […] {message[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(message)


def shown(value: Any) -> str:
    """A value as a message shows it: its `repr`, cut where it is long or deep."""
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # a whole number of 5000 digits has no `repr`
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 400 else f"{text[:400]}…"


def quote_hint(value: object) -> str:
    """How to write in YAML what was meant as text and read as `value`; empty where quotes would not help."""
    if isinstance(value, bool):
        meant = "yes" if value else "no"
        return f"; YAML reads an unquoted {meant} as {str(value).lower()}, quote it: {meant!r}"
    return f"; quote it: {str(value)!r}" if isinstance(value, (int, float)) else ""


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least `least`; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest(name: str, known: Iterable[str], *, kind: str = "", all_are: str = "choose from") -> str:
    """How a message about an unknown name ends: with the known one that was meant, or with all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {kind}{close[0]!r}?" if close else f"; {all_are} {', '.join(known)}"


class ConfigError(FptError):
    """A setting is unknown, malformed or contradicts another."""


class DataError(FptError):
    """A data file or a row of it cannot be used.

    Args:
        reason: what is wrong, and what would be right.
        file: the offending file, if any.
        line: 1-based line (or record) number in that file, if known.
    """

    def __init__(self, reason: str, *, file: str | None = None, line: int | None = None):
        place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(place + reason)
        self.reason, self.file, self.line = reason, file, line


class ModelError(FptError):
    """The model cannot be loaded, or cannot be cut the way it was asked to be."""


class UnknownFamilyError(ModelError):
    """No family is registered for this `config.model_type`."""


class ScheduleError(FptError):
    """A stage or schedule does not fit the model or itself."""


class ScoreError(FptError):
    """Scores are missing, malformed, or belong to another model."""


class CheckpointError(FptError):
    """A checkpoint is damaged, or belongs to another run."""


class TrainingStopped(FptError):
    """Training ended early on purpose (a run of non-finite losses, say); what was good is kept."""
