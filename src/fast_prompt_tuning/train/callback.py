"""Progressive training in a `transformers` Trainer of the user's own: callbacks that decide when the model grows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..data.trimming import TAIL, trim
from ..errors import ModelError, ScheduleError
from ..plm.modes import inference, recomputes
from ..plm.partial import PartialPLM
from ..plm.stacks import get_plm
from ..prompt.places import prompted_of
from ..prompt.soft_prompt import prompt_parameter
from ..schedule.auto import AutoSchedule
from ..schedule.stages import Schedule, Stage
from ..scores.signal import Signal, ask
from .growth import Growth, log_growth

logger = logging.getLogger(__name__)


class ProgressiveCallback(TrainerCallback):
    """Runs every training step of a Trainer or Seq2SeqTrainer on the schedule's partial PLM, and part of its batch.

    The model is partial only *inside* the forward passes of a training step. Between steps, so whenever the Trainer
    evaluates, chooses its best checkpoint, saves, calls other callbacks, ends or fails, it is the full PLM. The stage
    follows from `state.global_step` alone: resuming from any checkpoint needs nothing else. While it trains, the
    model's class is a child of its own that has another `__call__` (as in `torch.nn.utils.parametrize`). With gradient
    checkpointing, whose backward pass runs layers again, the model stays partial until that has ended.

    A schedule whose stages cut batches or inputs needs one line more, `callback.attach(trainer)`.

    Args:
        partial: the `PartialPLM` of the model the Trainer trains.
        schedule: which size each step runs on.

    Raises:
        ScheduleError, ScoreError, ModelError: the schedule does not fit the model; raised here, before any step. When
            training begins: the Trainer's model is another one or compiled, it runs on several GPUs in one process, or
            it was not attached and had to be.
    """

    def __init__(self, partial: PartialPLM, schedule: Schedule | AutoSchedule):
        for stage in schedule.candidates:
            partial.check(stage)
        self.partial = partial
        self.schedule: Schedule | AutoSchedule = schedule
        self._trainer: Trainer | None = None
        self._model: nn.Module | None = None  # whose calls are bracketed
        self._stage: Stage | None = None  # within a step
        self._previous: Stage | None = None
        self._checkpoints = False
        self._held: ExitStack | None = None  # makes the model full again, once its layers will not be run again

    @property
    def _cuts_batches(self) -> bool:
        return any(stage.cuts_batch for stage in self.schedule.candidates)

    def attach(self, trainer: Trainer) -> None:
        """Cut the batches that `trainer` takes to the stage's `batch` and `length`, before it counts their labels.

        Called once, after the Trainer is made. Its `get_batch_samples` is wrapped: which batches it deals stays as it
        is, so that a run resumed anywhere sees those it would have seen.
        """
        if self._trainer is trainer:
            return
        self._trainer = trainer
        own_batches = trainer.get_batch_samples
        decoder = not self.partial.plm.config.is_encoder_decoder

        def get_batch_samples(epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            stage, turn = self.schedule.now.stage_at(trainer.state.global_step), int(trainer.state.epoch or 0)
            cut = (trim(batch, stage, decoder=decoder, turn=turn) for batch in epoch_iterator)
            return own_batches(cut, *args, **kwargs)

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    def detach(self) -> None:
        """Leave the model to itself; for a training that was broken off and is not to be taken up again."""
        self._leave()
        self._stage = self._previous = None
        if self._model is not None:
            self._model.__class__ = type(self._model).__mro__[1]
            self._model = None
        self.partial.restore()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.detach()
        model = kwargs["model"]
        self._check(model, args, state)
        if (left := getattr(type(model), "fpt_callback", None)) is not None:
            left.detach()  # an earlier callback of ours whose run was broken off
        if state.max_steps <= self.schedule.now.boundaries[-1]:
            logger.warning(
                "training stops after %d steps, but the schedule reaches its last stage at step %d: the prompt will "
                "never be tuned on it. Make the schedule with total_steps=%d.",
                state.max_steps,
                self.schedule.now.boundaries[-1],
                state.max_steps,
            )
        last = self.schedule.candidates[-1]
        if not last.is_full(self.partial.full_stage):
            logger.warning(
                "the last stage is %s, not the full model (%s): the prompt will be used on a model that it was not "
                "tuned on. End the schedule with a stage of the full size.",
                last,
                self.partial.full_stage,
            )
        self._checkpoints = any(map(recomputes, model.modules()))
        self._model = model
        model.__class__ = _bracketed(type(model), self)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._leave()
        self._stage = stage = self.schedule.now.stage_at(state.global_step)
        if self._previous is None or not stage.same_size(self._previous):
            log_growth(self.partial, state.global_step, self._previous, stage)
            self._previous = stage
            self.partial.restore()  # frees the narrowed copies of the stage before

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._leave()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._leave()
        self._stage = None

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.detach()

    @contextmanager
    def forward_pass(self, model: nn.Module) -> Iterator[None]:
        """Around every call of the model: the size of the stage within a step, the full size elsewhere."""
        if not (model.training and torch.is_grad_enabled()):
            self._leave()
        elif self._stage is not None and self._held is None:
            with ExitStack() as stack:
                stack.enter_context(self.partial.at(self._stage))
                yield
                if self._checkpoints:
                    self._held = stack.pop_all()
            return
        yield

    def _leave(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _check(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if get_plm(model) is not self.partial.plm:
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
        if args.torch_compile:
            raise ModelError(
                "torch_compile=True compiles the model at one size, and a stage needs another; leave it out, or run "
                "fpt train with train.compile"
            )
        if self._cuts_batches and (self._trainer is None or self._trainer.state is not state):
            raise ScheduleError(
                "stages with batch or length cut what the Trainer's loader gives; write callback.attach(trainer) after "
                "the Trainer is made, or leave batch and length out"
            )


def _bracketed(model_class: type, callback: ProgressiveCallback) -> type:
    """The class `own` with calls that run within the callback's `forward_pass`."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with callback.forward_pass(self):
            return model_class.__call__(self, *args, **kwargs)  # type: ignore[operator]

    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (model_class,), {**names, "__call__": call, "fpt_callback": callback})


class AutoCallback(ProgressiveCallback):
    """Grows the model when the full PLM's held-out loss says so (`AutoSchedule`).

    Made with `callback.attach(trainer)` after the Trainer, whose `compute_loss` it measures with. Probes are measured
    on the full PLM, between steps, and logged: a run resumed from a checkpoint reads them from the
    Trainer's log and decides as it did. The Trainer's `max_steps`, or the steps of its epochs, should be at least
    `schedule.most_steps`, so that an abandoned stage can be made up for, and steps come on top that a small start has
    saved; with a constant learning rate, since one that falls would fall over steps that may never come.

    Args:
        partial: as `ProgressiveCallback`.
        schedule: as `ProgressiveCallback`.
        probe: a batch of training examples that training does not see, as the Trainer's `compute_loss` takes it.

    Raises:
        ScheduleError, ScoreError, ModelError: as `ProgressiveCallback`.
    """

    schedule: AutoSchedule

    def __init__(self, partial: PartialPLM, schedule: AutoSchedule, probe: Mapping[str, Any]):
        super().__init__(partial, schedule)
        self.probe = {k: v for k, v in probe.items() if k != TAIL}
        self._growth: Growth | None = None
        self._most_steps = 0  # the Trainer's own, of `max_steps` or of its epochs

    @property
    def _cuts_batches(self) -> bool:
        return True

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.schedule.replay(state.log_history)
        super().on_train_begin(args, state, control, **kwargs)
        trainer: Any = self._trainer
        self._most_steps = state.max_steps
        self._set_end(state)

        def log(numbers: dict[str, float]) -> None:
            due = trainer.control.should_log
            trainer.log(numbers)  # into `state.log_history`, so into every checkpoint
            trainer.control.should_log = due  # a log of the Trainer's own at this step is still to come

        self._growth = Growth(
            self.schedule,
            prompt_parameter(kwargs["model"]),
            Path(str(args.output_dir)),
            writes=state.is_world_process_zero,
            measure=self._measure,
            ask=self._ask,
            log=log,
        )
        self._growth.begin(state.global_step)
        self._consider(state, kwargs["optimizer"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._consider(state, kwargs["optimizer"])
        self._set_end(state)
        if state.global_step >= state.max_steps:  # the Trainer's own callback has compared with another end
            DefaultFlowCallback().on_step_end(args, state, control)

    def _set_end(self, state: TrainerState) -> None:
        end = self.schedule.total_steps
        # Where the end may yet be put off, it must not be reached before that is decided, in `on_step_end`.
        later = self.schedule.may_go_on and state.global_step < end
        state.max_steps = min(end + later, self._most_steps)

    def _consider(self, state: TrainerState, optimizer: Any) -> None:
        if self._growth is not None and state.global_step < self._most_steps:
            self._growth.consider(state.global_step, optimizer.state)

    def _ask(self, stage: Stage) -> Signal:
        """The signal of a stage on the probe."""
        args = self._trainer.args  # type: ignore[union-attr]
        rows = (stage.batch or args.per_device_train_batch_size) * args.gradient_accumulation_steps * args.world_size
        return ask(prompted_of(self._trainer.model), self.partial, stage, self.probe, step_examples=rows)[0]  # type: ignore[union-attr]

    def _measure(self) -> float:
        """The loss of the full PLM on the probe."""
        trainer: Any = self._trainer
        with inference(trainer.model):
            probe = {k: v.to(trainer.args.device) for k, v in self.probe.items()}
            return float(trainer.compute_loss(trainer.model, probe))
