"""Typed errors: every refusal names the field, the value and the fix."""

from __future__ import annotations


class FptError(ValueError):
    """Base of every error this package raises on bad input; a `ValueError`, so existing handlers catch it."""


def quote_hint(value: object) -> str:
    """How to write in YAML what was meant as text and read as `value`; empty where quotes would not help."""
    if isinstance(value, bool):
        meant = "yes" if value else "no"
        return f"; YAML reads an unquoted {meant} as {str(value).lower()}, quote it: {meant!r}"
    return f"; quote it: {str(value)!r}" if isinstance(value, (int, float)) else ""


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
