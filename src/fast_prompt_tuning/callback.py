"""Progressive training in a `transformers` Trainer: the thin part that decides when the model grows."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import ModelError, ScheduleError
from .partial_plm import PartialPLM, get_plm
from .schedule import Schedule
from .trimming import trim

logger = logging.getLogger(__name__)

_BRACKETED = ("training_step", "get_batch_samples")


class ProgressiveCallback(TrainerCallback):
    """Runs every training step of a Trainer or Seq2SeqTrainer on the schedule's partial PLM, and part of its batch.

    The model is partial only *inside* a training step (forward and backward). Between steps, so whenever the Trainer
    evaluates, chooses its best checkpoint, saves, calls other callbacks, ends or fails, it is the full PLM. The stage
    follows from `state.global_step` alone: resuming from any checkpoint needs nothing else. Batches are cut to the
    stage's `batch` and `length` as the Trainer takes them from its loader (`trimming.trim`), before it counts labels.

    Args:
        partial: the `PartialPLM` of the model the Trainer trains.
        schedule: which size each step runs on.

    Raises:
        ScheduleError, ScoreError, ModelError: the schedule does not fit the model; raised here, before any step. When
            training begins: the Trainer's model is another one, or runs on several GPUs in one process.
    """

    def __init__(self, partial: PartialPLM, schedule: Schedule):
        for stage in schedule.stages:
            partial.check(stage)
        self.partial, self.schedule = partial, schedule
        self._trainer: Trainer | None = None
        self._users_own: dict[str, Any] = {}  # methods the user has set on the trainer itself

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()
        trainer = _calling_trainer()
        self._check(trainer, args)
        if (left := getattr(trainer.training_step, "fpt_callback", None)) is not None:
            left._release()  # an earlier callback of ours whose run was broken off between two steps
        self._trainer = trainer
        self._users_own = {name: trainer.__dict__[name] for name in _BRACKETED if name in trainer.__dict__}
        if state.max_steps <= self.schedule.boundaries[-1]:
            logger.warning(
                "training stops after %d steps, but the schedule reaches its last stage at step %d: the prompt will "
                "never be tuned on it. Make the schedule with total_steps=%d.",
                state.max_steps,
                self.schedule.boundaries[-1],
                state.max_steps,
            )
        own_step = trainer.training_step
        previous = None

        @functools.wraps(own_step)
        def training_step(*step_args: Any, **step_kwargs: Any) -> Any:
            nonlocal previous
            stage = self.schedule.stage_at(trainer.state.global_step)
            if previous is None or not stage.same_size(previous):
                _log_growth(self.partial, trainer.state.global_step, previous, stage)
                previous = stage
                self.partial.restore()  # frees the narrowed copies of the stage before
            try:
                with self.partial.at(stage):
                    return own_step(*step_args, **step_kwargs)
            except BaseException:
                self.partial.restore()
                self._release()
                raise

        own_batches = trainer.get_batch_samples
        decoder = not self.partial.plm.config.is_encoder_decoder

        @functools.wraps(own_batches)
        def get_batch_samples(epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            stage = self.schedule.stage_at(trainer.state.global_step)
            return own_batches((trim(batch, stage, decoder=decoder) for batch in epoch_iterator), *args, **kwargs)

        training_step.fpt_callback = self  # type: ignore[attr-defined]
        trainer.training_step = training_step  # type: ignore[method-assign]
        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.partial.restore()
        self._release()

    def _check(self, trainer: Trainer, args: TrainingArguments) -> None:
        if get_plm(trainer.model) is not self.partial.plm:
            raise ModelError(
                "the PartialPLM is of another model than the Trainer's; make it of the model the Trainer is given"
            )
        if args.n_gpu > 1:
            raise ModelError(
                f"{args.n_gpu} GPUs in one process: torch.nn.DataParallel cannot run a partial PLM; start one process "
                "per GPU (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES to one GPU"
            )

    def _release(self) -> None:
        if self._trainer is not None:
            for name in _BRACKETED:
                self._trainer.__dict__.pop(name, None)
            self._trainer.__dict__.update(self._users_own)
            self._trainer, self._users_own = None, {}


def _log_growth(partial: PartialPLM, step: int, before: Any, after: Any) -> None:
    kept = {name: layers for name, layers in partial.kept_layers(after).items() if name in after.stacks}
    if before is None:
        logger.info("step %d: tuning on %s (layers %s) of %s", step, after, kept, partial.full_stage)
    else:
        logger.info("step %d: growing %s to %s (layers %s)", step, before, after, kept)


def _calling_trainer() -> Trainer:
    """The Trainer whose `train` is on the call stack: callbacks are not handed it.

    Only the Trainer's own `training_step` can bracket exactly the part of a step that runs on the partial PLM, and
    exceptions in it; no callback event does (docs/decisions.md).
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise ScheduleError(
        "ProgressiveCallback works inside a transformers Trainer; in a loop of your own call "
        "partial.resize(schedule.stage_at(step)) before every step and partial.restore() after the last"
    )
