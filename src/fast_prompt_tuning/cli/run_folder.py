"""What the commands read of the folder of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..recipe import RunConfig, settings_of

if TYPE_CHECKING:
    from ..data.tasks import Task


def check_ensemble(how: str, runs: Sequence[Path], first: RunConfig) -> None:
    """Raise where prompts cannot answer together; nothing is loaded yet but the prompts' recipes.

    Args:
        how: the value of --ensemble.
        first: the recipe of the first run. A prompt that lies in no run has none to compare.

    Raises:
        ConfigError: unknown `how`, one run alone, or a run of another model or task than the first.
    """
    from ..prompt.prediction import VOTINGS
    from ..run.session import task_of

    if how not in VOTINGS:
        raise ConfigError(f"--ensemble {how!r} is unknown; choose one of {', '.join(VOTINGS)}")
    if len(runs) < 2:
        raise ConfigError("--ensemble needs at least two prompts; give more RUNs")
    task = task_of(first)
    if how == "probabilities" and not task.labels:
        raise ConfigError(f"--ensemble probabilities needs labels, and the task {task.name!r} has none; use votes")
    for folder in runs[1:]:
        run = folder.parent if folder.name == "prompt" else folder
        if not (run / "config.yaml").is_file():
            continue
        other = settings_of(run)
        check_one_model("--ensemble", runs[0], first, run, other)
        if _content(task_of(other)) != _content(task):
            raise ConfigError(
                f"--ensemble needs prompts of one task: {str(folder)!r} is of {task_of(other).name!r}, not of "
                f"{task.name!r} as {str(runs[0])!r} is; leave one out"
            )


def check_one_model(option: str, run: Path, settings: RunConfig, other: Path, its: RunConfig) -> None:
    """Raise ConfigError unless two runs are of one model: by its name, or by its weights."""
    if not (_named(settings) == _named(its) or (weights_of(run) == weights_of(other) is not None)):
        raise ConfigError(
            f"{option} needs prompts of one model: {str(run)!r} is of {settings.model.path!r}, {str(other)!r} "
            f"of {its.model.path!r}; leave one out"
        )


def _named(settings: RunConfig) -> tuple[str, str | None]:
    return settings.model.path, settings.model.revision


def weights_of(run: Path) -> str | None:
    """The fingerprint of the model that a run tuned; None for a bare prompt."""
    from ..run.results import load_result

    return load_result(run).fingerprints.get("model") if (run / "result.json").is_file() else None


def _content(task: Task) -> dict[str, Any]:
    """What makes a task the same: not where its rows are."""
    return task.model_dump(exclude={"source", "description"})
