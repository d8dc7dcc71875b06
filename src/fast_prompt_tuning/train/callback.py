"""Progressive training in a `transformers` Trainer: the thin part that decides when the model grows."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.trimming import TAIL, trim
from ..errors import ConfigError, ModelError, ScheduleError
from ..plm.partial import PartialPLM, get_plm
from ..prompt.soft_prompt import prompt_parameter
from ..schedule.auto import PROBE, AutoSchedule
from ..schedule.stages import Schedule
from .checkpoint import CANNOT_WRITE

logger = logging.getLogger(__name__)

_BRACKETED = ("training_step", "get_batch_samples")
_TRAINED, _TRAINED_STEP = "trained_prompt", "trained_prompt_step"  # in the optimizer's state, of `EmaCallback`


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

    def __init__(self, partial: PartialPLM, schedule: Schedule | AutoSchedule):
        for stage in schedule.candidates:
            partial.check(stage)
        self.partial = partial
        self.schedule: Schedule | AutoSchedule = schedule
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
        if state.max_steps <= self.schedule.now.boundaries[-1]:
            logger.warning(
                "training stops after %d steps, but the schedule reaches its last stage at step %d: the prompt will "
                "never be tuned on it. Make the schedule with total_steps=%d.",
                state.max_steps,
                self.schedule.now.boundaries[-1],
                state.max_steps,
            )
        own_step = trainer.training_step
        previous = None

        @functools.wraps(own_step)
        def training_step(*step_args: Any, **step_kwargs: Any) -> Any:
            nonlocal previous
            stage = self.schedule.now.stage_at(trainer.state.global_step)
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
            stage = self.schedule.now.stage_at(trainer.state.global_step)
            turn = int(trainer.state.epoch or 0)
            cut = (trim(batch, stage, decoder=decoder, turn=turn) for batch in epoch_iterator)
            return own_batches(cut, *args, **kwargs)

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
        for stage in self.schedule.candidates:
            self.partial.check(stage)  # again: by now FSDP or DeepSpeed may have sharded what a stage wants to cut
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


class AutoCallback(ProgressiveCallback):
    """Grows the model when the full PLM's held-out loss says so (`AutoSchedule`).

    Probes are measured on the full PLM, between steps, and logged: a run resumed from a checkpoint reads them from the
    Trainer's log and decides as it did. The Trainer's `max_steps`, or the steps of its epochs, should be at least
    `schedule.most_steps`, so that an abandoned stage can be made up for, and steps come on top that a small start has
    saved; with a constant learning rate, since one that falls would fall over steps that may never come.

    Args:
        partial, schedule: as `ProgressiveCallback`.
        probe: a batch of training examples that training does not see, as the Trainer's `compute_loss` takes it.
        on_probe: called after every probe, to count its cost.

    Raises:
        ScheduleError, ScoreError, ModelError: as `ProgressiveCallback`.
    """

    schedule: AutoSchedule

    def __init__(
        self,
        partial: PartialPLM,
        schedule: AutoSchedule,
        probe: Mapping[str, Any],
        *,
        on_probe: Callable[[], None] = lambda: None,
    ):
        super().__init__(partial, schedule)
        self.probe, self.on_probe = {k: v for k, v in probe.items() if k != TAIL}, on_probe
        self._begun_with: torch.Tensor | None = None
        self._most_steps = 0  # the Trainer's own, of `max_steps` or of its epochs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.schedule.replay(state.log_history)
        super().on_train_begin(args, state, control, **kwargs)
        self._most_steps, self._begun_with = state.max_steps, None
        self._set_end(state)
        start = _stage_start(args)
        if state.global_step and self.schedule.may_go_back and not start.is_file():
            logger.warning(
                "%s is missing (was the checkpoint moved?): should this stage be given up, the prompt goes back to "
                "what it is now, at step %d, not to the stage's first",
                start,
                state.global_step,
            )
            self._remember(self._trainer, start)
        self._consider(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._consider(state)
        self._set_end(state)
        if state.global_step >= state.max_steps:  # the Trainer's own callback has compared with another end
            DefaultFlowCallback().on_step_end(args, state, control)

    def _set_end(self, state: TrainerState) -> None:
        end = self.schedule.total_steps
        # Where the end may yet be put off, it must not be reached before that is decided, in `on_step_end`.
        later = self.schedule.may_go_on and state.global_step < end
        state.max_steps = min(end + later, self._most_steps)

    def _consider(self, state: TrainerState) -> None:
        trainer: Any = self._trainer
        step = state.global_step
        if trainer is None or step >= self._most_steps or not self.schedule.wants_probe(step):
            return
        loss = self._measure(trainer)
        due = trainer.control.should_log
        trainer.log({PROBE: loss})  # into `state.log_history`, so into every checkpoint
        trainer.control.should_log = due  # a log of the Trainer's own at this step is still to come
        stage, decision = self.schedule.rung, self.schedule.tell(step, loss)
        start = _stage_start(trainer.args)
        if decision == "abandon":
            logger.info("step %d: the full model has learned nothing on stage %d: growing to the last", step, stage + 1)
            self._go_back(trainer, start)
        elif decision == "go on":
            logger.info("step %d: the full model's loss still falls: on to step %d", step, self.schedule.total_steps)
        elif decision == "grow":
            logger.info("step %d: the full model's loss is %.4f: the next stage", step, loss)
        if decision == "grow" or step == 0:
            self._remember(trainer, start)

    def _measure(self, trainer: Any) -> float:
        """The loss of the full PLM on the probe."""
        model = trainer.model
        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                inputs = trainer._prepare_inputs(dict(self.probe))
                loss = float(trainer.compute_loss(model, inputs))
        finally:
            model.train(was)
        self.on_probe()
        return loss

    def _remember(self, trainer: Any, path: Path) -> None:
        """Keep the prompt as it is where a stage begins, for a resumed run too."""
        self._begun_with = prompt_parameter(self.partial.model).detach().cpu().clone()
        if trainer.is_world_process_zero():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                work = path.with_name(f".{path.name}")
                save_file({"prompt": self._begun_with}, work)
                os.replace(work, path)
            except CANNOT_WRITE as error:
                logger.warning("%s cannot be written (%s); training goes on", path, error)

    def _go_back(self, trainer: Any, path: Path) -> None:
        prompt = prompt_parameter(self.partial.model)
        if self._begun_with is None:  # resumed since the stage began
            self._begun_with = load_file(path)["prompt"]
        with torch.no_grad():
            prompt.copy_(self._begun_with)
        trainer.optimizer.state.pop(prompt, None)  # moments of gradients that led nowhere


class EmaCallback(TrainerCallback):
    """Evaluates and saves the running mean of the prompt instead of its last value (Polyak and Juditsky 1992).

    Inside a step the model has the prompt that is trained; between steps, so whenever the Trainer evaluates, saves,
    probes or ends, it has the mean: after step t, `mean ← d · mean + (1 − d) · prompt` with `d = min(decay, (1 + t) /
    (10 + t))`, which forgets the first prompts sooner. Training itself is what it would be without. The trained prompt
    lies in the optimizer's state, so that a checkpoint holds both and a resumed run goes on exactly. An exception
    inside a step leaves the trained prompt.

    Args:
        decay: what a step leaves of the mean, at least 0 and below 1; 0.9 averages ten steps, fewer in the first 80.

    Raises:
        ConfigError: another `decay`. ModelError: when training begins, a model without a soft prompt, or DeepSpeed,
            which steps by itself.
    """

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise ConfigError(f"decay={decay!r} must be at least 0 and below 1; 0.9 averages some ten steps")
        self.decay = decay
        self._mean: torch.Tensor | None = None  # inside a step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        prompt_parameter(kwargs["model"])
        if getattr(args, "deepspeed", None):
            raise ModelError("EmaCallback cannot be used with DeepSpeed, which steps by itself; leave it out")
        self._mean = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        prompt = prompt_parameter(kwargs["model"])
        self._mean = prompt.detach().clone()
        kept = kwargs["optimizer"].state.get(prompt, {})
        # Of another step it is stale: no step yet, a stage given up, or a run that went on without a mean.
        if kept.get(_TRAINED_STEP) == state.global_step:
            with torch.no_grad():
                prompt.copy_(kept[_TRAINED])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here, not at the step's end, where callbacks that save or probe may come first.
        prompt, step = prompt_parameter(kwargs["model"]), state.global_step + 1
        kept = kwargs["optimizer"].state[prompt]
        if self._mean is None or (not kept and torch.equal(prompt, self._mean)):
            return  # no update yet, and an optimizer takes a state that is not empty for its own
        kept[_TRAINED], kept[_TRAINED_STEP] = prompt.detach().clone(), step
        with torch.no_grad():
            prompt.copy_(torch.lerp(kept[_TRAINED], self._mean, min(self.decay, (1 + step) / (10 + step))))
        self._mean = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave_step(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave_step(kwargs["model"])

    def _leave_step(self, model: Any) -> None:
        """Give the model its mean back after a step that was broken off, as a callback may within accumulation."""
        if self._mean is not None:
            with torch.no_grad():
                prompt_parameter(model).copy_(self._mean)
            self._mean = None


def _stage_start(args: TrainingArguments) -> Path:
    """Where the prompt is kept that a stage which is given up goes back to."""
    return Path(str(args.output_dir)) / "stage_start.safetensors"


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
