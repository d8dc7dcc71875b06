"""The training loop of `fpt train`: deal a batch, run it at its stage's size, check, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial as partial_function
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

from ..cost.flops import work_flops
from ..cost.ledger import FlopsLedger
from ..cost.shapes import CostModel
from ..cost.work import Work
from ..data.trimming import trim
from ..errors import TrainingStopped
from ..plm.objective import IGNORED
from ..plm.partial import PartialPLM
from ..prompt.prompted import PromptedPLM
from ..recipe import RunConfig
from ..schedule.auto import AutoSchedule
from ..schedule.stages import Schedule, Stage
from ..scores.signal import Signal, ask
from . import checkpoint, parallel, resuming
from .batches import Batches
from .compiled import CompiledLayers
from .growth import Growth, log_growth
from .guard import LastGood, Signals
from .optimizer import make_optimizer, reaching
from .trackers import open_trackers

logger = logging.getLogger(__name__)

MAX_SKIPPED = 5
"""Steps in a row whose loss or gradient is not finite, after which a run stops with its last good prompt."""

EVENTS = (
    "on_train_begin",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_train_end",
)
"""What a `TrainerCallback` is told of. It gets the recipe in place of training arguments."""


class Loop:
    """Tunes a prompt, or all weights, along a schedule.

    It survives what a long run meets: its checkpoints are whole or not there (`checkpoint.py`), a batch that does not
    fit into memory is trained in parts, and a step whose loss or gradient is not finite is left out. The model is
    partial only inside a step's forward and backward passes.

    Args:
        prompted: the PLM with what is trained of it.
        batches: what every step trains on.
        config: the recipe.
        schedule: which size each step runs on; an `AutoSchedule` decides as it goes.
        cost: what a step costs.
        partial: the PLM that can be cut; None where every stage is the whole model on whole batches.
        folder: where checkpoints go; None: none are saved.
        evaluate: `step → metrics` on the validation set; None: the run evaluates nothing.
        probe: examples that training does not see, for an `AutoSchedule`.
        ledger: what was spent on scoring, probes and evaluation; the loop adds what it spends, and logs all of it.
        record: kept in every checkpoint's manifest: what the run is, for a resumed one to compare.
        spent: numbers logged with every record.
        callbacks: told of `EVENTS`, with `state` and `control` as in a Trainer, and `model`, `optimizer` and
            `lr_scheduler` by name.
    """

    def __init__(
        self,
        prompted: PromptedPLM,
        batches: Batches,
        config: RunConfig,
        *,
        schedule: Schedule | AutoSchedule,
        cost: CostModel,
        partial: PartialPLM | None = None,
        folder: Path | None = None,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        probe: Mapping[str, torch.Tensor] | None = None,
        ledger: FlopsLedger | None = None,
        record: Mapping[str, Any] | None = None,
        spent: Callable[[], dict[str, Any]] = dict,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.prompted, self.batches, self.config, self.train = prompted, batches, config, config.train
        self.schedule, self.cost, self.partial = schedule, cost, partial
        self.folder, self.evaluate_prompt, self.callbacks = folder, evaluate, list(callbacks)
        self.ledger, self.record, self.spent = ledger or FlopsLedger(), dict(record or {}), spent
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.max_steps = schedule.now.total_steps
        self.optimizer, self.rates = make_optimizer(prompted.trained, config.optim, self.state.max_steps)
        self.state.is_world_process_zero = self.state.is_local_process_zero = parallel.rank() == 0
        self.signals = Signals()
        self.good = None if prompted.whole else LastGood(prompted.trained)  # all weights are too many to keep twice
        self.parts = 1  # a batch is trained in so many, after it once did not fit into memory
        self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0  # of what training takes: scoring, probes, steps
        self.losses: list[float] = []  # of the steps since the last log line, less those left out
        self._norm = self._rate = self._flops = 0.0  # of the last step; of this process, not in the ledger yet
        self._stage: Stage | None = None
        self._every = self.train.evaluation_interval
        self._compiled = CompiledLayers(prompted.plm) if self.train.compile else None
        self._trackers: Accelerator | None = None
        self.growth: Growth | None = None
        if isinstance(schedule, AutoSchedule) and folder is not None and probe is not None and partial is not None:
            self.growth = Growth(
                schedule,
                prompted.parameter,
                folder,
                writes=self.state.is_world_process_zero,
                measure=partial_function(self.probe, probe),
                ask=partial_function(self.ask, partial, probe),
                log=self.log,
            )

    # -- a run --------------------------------------------------------------------------------------------------------

    def run(self, resume_point: checkpoint.Checkpoint | None = None) -> None:
        """Make the steps that are left, from a checkpoint or the start, until the schedule's end or a signal.

        Raises:
            TrainingStopped: loss or gradient stayed non-finite, or a single example does not fit into memory.
        """
        set_seed(self.train.seed)
        self.optimizer.zero_grad()
        if resume_point is not None:
            resuming.load(self, resume_point)
        if isinstance(self.schedule, AutoSchedule):
            self.schedule.replay(self.state.log_history)
        self._saved = time.perf_counter()
        self._set_end()
        if self.state.global_step >= self.state.max_steps:
            return
        with self.signals, self._ready():
            self._tell("on_train_begin")
            if self.growth is not None:
                self.growth.begin(self.state.global_step)
                self.growth.consider(self.state.global_step, self.optimizer.state)
            while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                self._step()
            self._tell("on_train_end")
        self.book()

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """The model and the trackers as a run needs them; afterwards the full model, whatever happened."""
        plm = self.prompted.plm
        if self.train.gradient_checkpointing:
            plm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.train.report_to:
            self._trackers = open_trackers(self.config, self.folder)
        try:
            yield
        finally:
            if self.partial is not None:
                self.partial.restore()
            if self.train.gradient_checkpointing:
                plm.gradient_checkpointing_disable()  # it may serve other runs
            if self._trackers is not None:
                self._trackers.end_training()
                self._trackers = None

    def _tell(self, event: str, **more: Any) -> None:
        known = {"model": self.prompted.module, "optimizer": self.optimizer, "lr_scheduler": self.rates}
        for each in self.callbacks:
            self.control = getattr(each, event)(self.config, self.state, self.control, **known, **more) or self.control

    # -- a step -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        step = self.state.global_step
        epoch = step // self.batches.steps_an_epoch
        stage = self._enter(step)
        decoder, device = not self.prompted.plm.config.is_encoder_decoder, self.prompted.plm.device
        batches = [trim(batch, stage, decoder=decoder, turn=epoch, keep_tail=True) for batch in self.batches.of(step)]
        labels = parallel.total(sum(int((batch["labels"] != IGNORED).sum()) for batch in batches))
        begun = time.perf_counter()
        if self.good is not None:
            self.good.begin_step()
        self._tell("on_step_begin")
        loss, work = self.gradient([{k: v.to(device) for k, v in batch.items()} for batch in batches], labels, stage)
        self._flops += work_flops(self.cost, work, stage)
        parallel.add_up([loss, *(p.grad for p in self.prompted.trained if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.prompted.trained, self.config.optim.max_grad_norm)
        self._leave_out_if_bad(float(loss), float(norm))
        self._tell("on_pre_optimizer_step")
        self.optimizer.step()
        self._tell("on_optimizer_step")
        (self._rate,) = self.rates.get_last_lr()
        self.rates.step()
        self.optimizer.zero_grad()
        self.state.global_step = step + 1
        self.state.epoch = self.state.global_step / self.batches.steps_an_epoch
        self.seconds += time.perf_counter() - begun
        if self.growth is not None:
            self.growth.consider(self.state.global_step, self.optimizer.state)
            self._set_end()
        self._set_due()
        self._tell("on_step_end")
        self._do_what_is_due()

    def _set_end(self) -> None:
        """Take the end that the schedule has by now: rates that fall are at zero there."""
        end = self.schedule.now.total_steps
        if end != self.state.max_steps:
            self.state.max_steps, self.rates = end, reaching(self.rates, self.config.optim, end)

    def _enter(self, step: int) -> Stage:
        stage = self.schedule.now.stage_at(step)
        if self.partial is not None and (self._stage is None or not stage.same_size(self._stage)):
            log_growth(self.partial, step, self._stage, stage)
            self.partial.restore()  # frees the narrowed copies of the stage before
        self._stage = stage
        return stage

    def gradient(
        self, batches: Sequence[Mapping[str, torch.Tensor]], labels: int, stage: Stage
    ) -> tuple[torch.Tensor, Work]:
        """The loss of accumulated batches at a stage's size, divided by `labels`, and what ran; gradients are left.

        In parts of each batch where the whole does not fit into memory.

        Raises:
            TrainingStopped: a single example does not fit.
        """
        rows = max(len(batch["input_ids"]) for batch in batches)
        while True:
            try:
                with contextlib.ExitStack() as inside:
                    if self.partial is not None:
                        inside.enter_context(self.partial.at(stage))
                    if self._compiled is not None:
                        inside.enter_context(self._compiled.used())
                    return self._in_parts(batches, labels)
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)):
                    raise
                reason = str(error).split("\n")[0]
                if parallel.in_parts():  # the others wait for this one's part of the weights
                    raise TrainingStopped(
                        f"out of memory at step {self.state.global_step} ({reason}), and with train.parallel="
                        f"{parallel.in_parts()} a process cannot make its batch smaller alone; lower train.batch_size"
                    ) from error
            self.optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)
            if self.parts >= rows:
                raise TrainingStopped(
                    f"out of memory at step {self.state.global_step} ({reason}), and the batch cannot be cut further; "
                    "lower train.batch_size or data.max_input_tokens, or set train.gradient_checkpointing=true"
                )
            self.parts *= 2
            logger.warning(
                "out of memory at step %d: batches are trained in %d parts of at most %d examples from here on, with "
                "the same gradients",
                self.state.global_step,
                self.parts,
                -(-rows // self.parts),
            )

    def _in_parts(self, batches: Sequence[Mapping[str, torch.Tensor]], labels: int) -> tuple[torch.Tensor, Work]:
        self.prompted.module.train()
        total, ran = torch.zeros((), device=self.prompted.plm.device), Work()
        for batch in batches:
            rows = len(batch["input_ids"])
            size = -(-rows // self.parts)
            for start in range(0, rows, size):
                loss = self.prompted.loss({k: v[start : start + size] for k, v in batch.items()}, labels)
                loss.value.backward()
                total += loss.value.detach().to(total.device)
                ran += loss.work
        return total, ran

    def _leave_out_if_bad(self, loss: float, norm: float) -> None:
        """Drop the gradient where it or the loss, of all processes, is not finite: the optimizer then changes nothing.

        Raises:
            TrainingStopped: they were not for `MAX_SKIPPED` steps in a row.
        """
        self._norm = norm
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.losses.append(loss)
            if self.good is not None:
                self.good.confirm()
            return
        self.optimizer.zero_grad()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what, step = "gradient" if math.isfinite(loss) else "loss", self.state.global_step
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise TrainingStopped(
                f"the {what} is not finite at step {step}, for {MAX_SKIPPED} steps in a row; the prompt before them is "
                "kept. Try a lower optim.lr, optim.warmup_steps, or model.dtype=float32"
            )
        logger.warning("the %s is not finite at step %d, which is left out (%d so far)", what, step, self.skipped)

    def probe(self, probe: Mapping[str, torch.Tensor]) -> float:
        """The loss of the full PLM on the probe; every process measures it."""
        begun = time.perf_counter()
        self.prompted.module.eval()
        with torch.no_grad():
            loss = self.prompted.loss({k: v.to(self.prompted.plm.device) for k, v in probe.items()})
        value = float(loss.value)
        self.ledger.add("probe", parallel.shares() * work_flops(self.cost, loss.work))
        self.seconds += time.perf_counter() - begun
        return value

    def ask(self, partial: PartialPLM, examples: Mapping[str, torch.Tensor], stage: Stage) -> Signal:
        """The signal of a stage on the probe's examples; every process measures it."""
        begun = time.perf_counter()
        rows = (stage.batch or self.train.batch_size) * self.train.accumulate * parallel.shares()
        signal, flops = ask(self.prompted, partial, stage, examples, step_examples=rows)
        self.ledger.add("probe", parallel.shares() * flops)
        self.seconds += time.perf_counter() - begun
        return signal

    # -- between two steps --------------------------------------------------------------------------------------------

    def _set_due(self) -> None:
        """Mark what the recipe asks for after this step; a callback may ask for more or less."""
        step, last = self.state.global_step, self.state.global_step >= self.state.max_steps
        # A launcher's signal reaches its processes at different steps.
        self.signals.number = parallel.largest(self.signals.number or 0) or None
        stopped = self.signals.number is not None
        due = self.control
        due.should_log = step == 1 or step % self.train.log_every == 0
        due.should_evaluate = last or step % self._every == 0
        due.should_save = last or stopped or step % (self.train.save_every or self._every) == 0
        if (minutes := self.train.save_minutes) is not None:
            late = time.perf_counter() - self._saved >= 60 * minutes
            due.should_save |= parallel.largest(int(late)) == 1  # clocks differ between processes
        due.should_training_stop = last or stopped

    def _do_what_is_due(self) -> None:
        due = self.control
        if due.should_log:
            self._log_step()
        if due.should_evaluate or (due.should_training_stop and self.signals.number is None):
            self.evaluate()
        if due.should_save and self.folder is not None:
            self.book()
            resuming.save(self, self.folder)
            self._tell("on_save")
            self._saved = time.perf_counter()

    def _log_step(self) -> None:
        numbers = {"learning_rate": self._rate}
        if self.losses:
            numbers = {"loss": sum(self.losses) / len(self.losses), **numbers}
        if math.isfinite(self._norm):
            numbers["grad_norm"] = self._norm
        self.losses = []
        self.log(numbers)

    def log(self, numbers: Mapping[str, float]) -> None:
        """Log numbers with the size of the last step and what was spent: to checkpoints, callbacks and trackers."""
        self.book()
        step = max(self.state.global_step - 1, 0)  # the step that these numbers are of
        schedule = self.schedule.now
        stage = schedule.stage_at(step)
        record: dict[str, Any] = {**numbers, "epoch": self.state.epoch or 0.0, "stage": schedule.index_at(step)}
        for name in stage.stacks:
            record |= {f"{name}_layers": stage.layers_in(name), f"{name}_ffn": stage.ffn_in(name)}
        record |= {"train_flops": self.ledger["train"]}
        record |= {f"flops_{what}": self.ledger[what] for what in ("score", "probe", "eval")}
        if self.skipped:
            record["skipped_steps"] = self.skipped
        record |= {"train_seconds": self.seconds, **self.spent()}
        self.state.log_history.append({**record, "step": self.state.global_step})
        self._tell("on_log", logs=record)
        if self._trackers is not None:
            told = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            paths = {name: f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}" for name in told}
            self._trackers.log({paths[name]: value for name, value in told.items()}, step=self.state.global_step)

    def book(self) -> None:
        """Put what all processes have spent on steps into the ledger; every process must ask."""
        self.ledger.add("train", parallel.spent(self._flops))
        self._flops = 0.0

    def evaluate(self) -> None:
        """Evaluate the prompt, or the weights, as they are, on the full PLM, and log it."""
        if self.evaluate_prompt is not None:
            metrics = {f"eval_{name}": value for name, value in self.evaluate_prompt(self.state.global_step).items()}
            self.log(metrics)
            self._tell("on_evaluate", metrics=metrics)
