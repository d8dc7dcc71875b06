"""The folder of a run: what is ours in it, when it may be used, its recipe and its log."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import CheckpointError, ConfigError, ScheduleError
from ..files import clear_leftovers, write_atomic
from ..plm import fingerprint
from ..prompt.prompted import PromptedPLM
from ..prompt.soft_prompt import form_of, prompt_folder
from ..recipe import RunConfig
from ..train import checkpoint, restored
from ..yaml_text import read_yaml
from .choices import left_open

logger = logging.getLogger(__name__)

OURS = ("config.yaml", "result.json", "log.jsonl", "predictions.jsonl", "scores.safetensors", "layers.safetensors")
OUR_FOLDERS = ("prompt", "model", "checkpoints")
_NAMES = re.compile("|".join(map(re.escape, (*OURS, *OUR_FOLDERS))))


class Earlier(Enum):
    """What becomes of an earlier run in the output folder."""

    REFUSE = "refuse"
    OVERWRITE = "overwrite"
    RESUME = "resume"
    RESUME_CHANGED = "resume, although recipe, weights or data have changed since"

    @classmethod
    def of(cls, *, overwrite: bool, resume: bool, allow_changed: bool) -> Earlier:
        """As the command line's options say.

        Raises:
            ConfigError: options that exclude each other.
        """
        if overwrite and resume:
            raise ConfigError("--overwrite and --resume exclude each other; choose one")
        if resume:
            return cls.RESUME_CHANGED if allow_changed else cls.RESUME
        return cls.OVERWRITE if overwrite else cls.REFUSE

    @property
    def goes_on(self) -> bool:
        """Whether the earlier run is resumed."""
        return self in (Earlier.RESUME, Earlier.RESUME_CHANGED)


def check_folder(config: RunConfig, earlier: Earlier) -> None:
    """Raise where the run's folder cannot be used; nothing is written, so it can be asked before weights are loaded.

    Raises:
        ConfigError: it holds a run already, holds other files, or there is nothing to resume, or another recipe's.
    """
    folder = Path(config.output)
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={str(folder)!r} is a file; choose a folder")
    for name in OUR_FOLDERS:
        if (folder / name).is_symlink():
            raise ConfigError(
                f"output={str(folder)!r} has a link called {name!r}, behind which nothing is removed or written; put a "
                "folder in its place, or choose another output"
            )
    if earlier.goes_on:
        if not saved.is_file():
            raise ConfigError(f"output={str(folder)!r} holds no run to resume; leave out --resume")
        changed = recipe_changes(config)
        if changed and earlier is Earlier.RESUME:
            raise ConfigError(
                f"the recipe has changed since the run began: {'; '.join(changed)}; set it back, or add --allow-changed"
            )
    elif saved.exists() and not _is_ours(saved):
        raise ConfigError(f"output={str(folder)!r} has a config.yaml that is not a run's; choose another folder")
    elif saved.exists() and earlier is Earlier.REFUSE:
        raise ConfigError(f"output={str(folder)!r} holds a run already; add --resume, --overwrite, or choose another")
    elif not saved.exists() and folder.is_dir() and any(not _WORK.match(f.name) for f in folder.iterdir()):
        raise ConfigError(f"output={str(folder)!r} is not empty and holds no run of ours; choose another folder")


_WORK = re.compile(r"\.lock$|\.config\.yaml-")  # all that a run killed before its first word leaves


def recipe_changes(config: RunConfig) -> list[str]:
    """How a recipe differs from the one saved in its output folder."""
    saved = Path(config.output) / "config.yaml"
    try:
        before = read_yaml(saved, str(saved))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(saved)!r} cannot be read ({type(error).__name__}); use --overwrite") from error
    if isinstance(before, dict):
        before["output"] = config.output  # the same folder, however it is spelled
    return changes_from(before, config)


def changes_from(before: Any, config: RunConfig) -> list[str]:
    """How a recipe differs from one that was saved: settings that came later have their defaults there.

    What `auto` chose for the saved one is no difference to a recipe that leaves it open, and its steps are none to a
    recipe of epochs.
    """
    now = config.model_dump(mode="json")
    with suppress(ValidationError, ScheduleError):
        before = RunConfig.model_validate(before).model_dump(mode="json")
        by_epochs = [("train", "steps"), ("train", "epochs")] if config.train.epochs is not None else []
        for section, name in [*left_open(config), *by_epochs]:
            now[section][name] = before[section][name]
    return differences(before, now)


RUN_MARK = "# The resolved recipe of a run of fast-prompt-tuning.\n"
"""First line of a run's config.yaml: what has it may be overwritten when asked, nothing else."""


def _is_ours(saved: Path) -> bool:
    with saved.open("rb") as file:
        return file.readline() == RUN_MARK.encode()


def open_folder(
    config: RunConfig, identity: Mapping[str, Any], prompted: PromptedPLM, earlier: Earlier
) -> checkpoint.Checkpoint | None:
    """Make the folder ready to be written, and find the checkpoint to go on from.

    Args:
        identity: hashes that a checkpoint belongs to.
        prompted: what is trained.

    Raises:
        ConfigError: as `check_folder`; it cannot be written; or model, data or the number of processes have changed
            since the checkpoint.
        CheckpointError: the checkpoint is of another method or another prompt, or not of the form that a run goes on
            from.
    """
    folder, places = Path(config.output), Path(config.output) / "checkpoints"
    check_folder(config, earlier)
    changed = recipe_changes(config) if earlier.goes_on else []
    if earlier.goes_on:
        checkpoint.clear_unfinished(places)
    resume_point = checkpoint.latest(places) if earlier.goes_on else None
    if resume_point is not None:
        before = {key: resume_point.record.get(key) for key in identity}
        prints = before["fingerprints"]
        note = fingerprint.by_earlier_version(prints.get("model") if isinstance(prints, dict) else None)
        changed += [c + note * c.startswith("fingerprints.model") for c in differences(before, identity)]
    if changed and earlier is Earlier.RESUME:
        step = resume_point.step if resume_point else 0
        raise ConfigError(
            f"changed since the checkpoint of step {step}: {'; '.join(changed)}; set it back, or add "
            "--allow-changed to go on all the same"
        )
    if resume_point is not None:
        check_fits(resume_point, prompted)
        restored.check(resume_point, prompted, config.optim)
    _prepare(config, earlier)  # writes the new recipe
    if changed:
        logger.warning("going on although changed: %s", "; ".join(changed))
        if any(c.startswith(("scoring", "fingerprints.model")) for c in changed):
            for name in ("scores.safetensors", "layers.safetensors"):  # of another model, or made another way
                (folder / name).unlink(missing_ok=True)
        if any(c.startswith(("fingerprints.model", "fingerprints.validation")) for c in changed):
            checkpoint.discard_best(places)  # measured on something else
    if earlier.goes_on and resume_point is None:
        logger.warning("no checkpoint in %s that could be used: starting from step 0", folder)
    return resume_point


def check_fits(stored: checkpoint.Checkpoint, prompted: PromptedPLM) -> None:
    """Raise unless the checkpoint holds what this run trains (its recipe may have been changed on request).

    Raises:
        CheckpointError: it is of another method, or of another prompt.
    """
    where = str(stored.folder)
    if prompted.whole != (not (stored.folder / "adapter_config.json").is_file()):
        raise CheckpointError(f"{where!r} is of another method; use --overwrite")
    if not prompted.whole:
        form = form_of(stored.folder)
        if form != (needed := prompted.form):
            raise CheckpointError(f"{where!r} holds a prompt {form}, this run needs {needed}: placement, tokens, width")


def _prepare(config: RunConfig, earlier: Earlier) -> None:
    """Make the folder, with the recipe in it."""
    folder = Path(config.output)
    if earlier.goes_on:
        with written(folder):
            clear_leftovers(folder.resolve(), _NAMES)
            checkpoint.clear_unfinished(folder / "checkpoints")
            if recipe_changes(config):
                write_atomic(folder / "config.yaml", RUN_MARK + config.to_yaml())
        return
    doomed = [(folder / name).resolve() for name in (*OURS, *OUR_FOLDERS)]
    for name, used in (
        ("model.path", config.model.path),
        ("prompt.path", config.prompt.path and prompt_folder(config.prompt.path)),
        ("scoring.path", config.scoring.path),
        ("scoring.layer_path", config.scoring.layer_path),
        *((f"data.files.{split}", file) for split, file in config.data.files.items()),
    ):
        path = Path(used).resolve() if used else None
        if path is not None and path.exists() and any(path == d or d in path.parents for d in doomed):
            raise ConfigError(f"{name}={str(used)!r} lies in the run that would be overwritten; choose another output")
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in OUR_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in OURS:
            if name != "config.yaml":  # what marks the folder as a run's is replaced last, by a rename
                (folder / name).unlink(missing_ok=True)
        clear_leftovers(folder.resolve(), _NAMES)
        write_atomic(folder / "config.yaml", RUN_MARK + config.to_yaml())


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """A block that writes into a run's folder.

    Raises:
        ConfigError: it cannot, for the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output={str(folder)!r} cannot be written: {error.strerror or error}") from error


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{at}.{k}".lstrip("."))]
    return [] if before == after else [f"{at} was {before!r}, is {after!r}"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`; a torn last line (of a run that was killed) is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def write_log(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `log.jsonl` anew: a killed run may have torn its last line, or logged steps that will be made again.

    Raises:
        ConfigError: it cannot be written.
    """
    with written(folder):
        write_atomic(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history))
