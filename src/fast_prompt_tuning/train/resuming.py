"""What a checkpoint holds of the loop: writing it, and going on from it as if the run had never stopped."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files import new_folder
from . import checkpoint, parallel
from .optimizer import go_on

if TYPE_CHECKING:
    from .loop import Loop

logger = logging.getLogger(__name__)

LOG = "log"
_STATE = "loop"
_COUNTS = ("parts", "skipped", "skipped_in_a_row", "losses")  # attributes of the loop


def save(loop: Loop, folder: Path) -> None:
    """Write a checkpoint, whole or not at all; a disk that refuses is a warning, not the end of the run."""
    step = loop.state.global_step
    states = parallel.gather(checkpoint.random_state())
    if parallel.rank() != 0:
        return
    target = folder / f"checkpoint-{step}"
    try:
        with contextlib.suppress(CheckpointError):
            checkpoint.verify(target)
            return  # the same step of the same run
        with new_folder(target) as work:
            _fill(loop, work, states)
            checkpoint.seal(work, step, {**loop.record, **_progress(loop)})
        checkpoint.prune(folder, loop.train.keep_checkpoints, step)
    except checkpoint.CANNOT_WRITE as error:
        steps = checkpoint.steps_of(folder)
        logger.warning(
            "the checkpoint of step %d cannot be written (%s); training goes on, the last one is of step %s",
            step,
            error,
            steps[-1] if steps else "none",
        )


def _fill(loop: Loop, work: Path, states: list[Any]) -> None:
    checkpoint.save_trained(work, loop.prompted.module)
    checkpoint.save_state(work, "optimizer", loop.optimizer.state_dict())
    checkpoint.save_state(work, "scheduler", loop.rates.state_dict())
    for process, state in enumerate(states):
        checkpoint.save_state(work, f"process_{process}", state)
    counts = {name: getattr(loop, name) for name in _COUNTS}
    checkpoint.save_state(work, _STATE, {LOG: loop.state.log_history, **counts})
    if loop.good is not None:  # the last update may have been the one that spoiled the prompt
        checkpoint.save_state(work, "good", loop.good.values)


def _progress(loop: Loop) -> dict[str, Any]:
    schedule, step = loop.schedule.now, loop.state.global_step
    return {
        "stage": schedule.index_at(step),
        "next_size": str(schedule.stage_at(step)),
        "schedule": schedule.to_dict(),
        "flops": loop.ledger.to_dict(),
        "train_seconds": loop.seconds,
        **loop.spent(),
    }


def load(loop: Loop, resume_point: checkpoint.Checkpoint) -> None:
    """Give a new loop the state that `save` wrote.

    Raises:
        CheckpointError: it holds something else.
    """
    folder = resume_point.folder
    checkpoint.load_trained(folder, loop.prompted.module)
    saved = checkpoint.load_state(folder, "optimizer"), checkpoint.load_state(folder, "scheduler")
    now = loop.config.optim.model_dump(mode="json")
    go_on(loop.optimizer, loop.rates, saved, resume_point.record["config"]["optim"], now)
    counts = checkpoint.load_state(folder, _STATE)
    for name in _COUNTS:
        setattr(loop, name, counts[name])
    loop.state.log_history = counts[LOG]
    loop.state.global_step, loop.seconds = resume_point.step, resume_point.record["train_seconds"]
    loop.state.epoch = resume_point.step / loop.batches.steps_an_epoch
    loop.ledger.add("train", resume_point.record["flops"]["train"])
    if loop.good is not None:
        loop.good.set(checkpoint.load_state(folder, "good"))
    processes = len(list(folder.glob("process_*.json")))
    mine = checkpoint.load_state(folder, f"process_{min(parallel.rank(), processes - 1)}")
    checkpoint.set_random_state(mine)


def log_of(resume_point: checkpoint.Checkpoint | None) -> list[dict[str, Any]]:
    """What was logged up to a checkpoint."""
    return list(checkpoint.load_state(resume_point.folder, _STATE)[LOG]) if resume_point is not None else []
