"""The `transformers` Trainer for prompts: label-position loss, length batches, evaluation on the full PLM."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_constant_schedule_with_warmup,
)
from transformers.optimization import Adafactor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import speed_metrics

from ..cost.flops import BatchShape, CostModel, FlopsLedger, forward_flops, step_flops, text_flops
from ..data.encoding import Collator, LengthBatchSampler, input_lengths
from ..errors import TrainingStopped
from ..plm.objective import IGNORED, label_loss
from ..plm.partial import find_stacks, get_plm
from ..prompt.placement import SuffixPromptModel, suffix_loss
from ..prompt.soft_prompt import load_prompt, prompt_parameter
from ..recipe import OptimConfig, RunConfig
from ..schedule.auto import AutoSchedule
from ..schedule.stages import Schedule
from . import checkpoint, parallel

logger = logging.getLogger(__name__)


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its learning-rate schedule (constant after a linear warm-up).

    `adafactor` is the paper's (Section 4.1): no relative step, no parameter scaling. `adam` has PyTorch's defaults.
    """
    trained = list(parameters)
    if config.optimizer == "adafactor":
        optimizer: torch.optim.Optimizer = Adafactor(
            trained,
            lr=config.lr,
            weight_decay=config.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    else:
        optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer, get_constant_schedule_with_warmup(optimizer, config.warmup_steps)


def training_arguments(
    config: RunConfig, folder: str, device: torch.device, *, spare_steps: int = 0
) -> TrainingArguments:
    """The Trainer's arguments for a recipe; `spare_steps` come on top where a stage may be given up."""
    every = config.train.eval_every or max(1, math.ceil(config.train.steps / 10))
    return TrainingArguments(
        output_dir=folder,
        max_steps=config.train.steps + spare_steps,
        per_device_train_batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.accumulate,
        max_grad_norm=config.optim.max_grad_norm,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=config.train.save_every or every,
        save_total_limit=config.train.keep_checkpoints,
        logging_steps=config.train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a step whose loss is not finite is skipped, and its loss not counted
        report_to=list[str](config.train.report_to) or "none",
        seed=config.train.seed,
        data_seed=config.train.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device.type == "cpu" and parallel.size() > 1 else None,
        gradient_checkpointing=config.train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.train.gradient_checkpointing else None,
        dataloader_pin_memory=device.type == "cuda",
    )


MAX_SKIPPED = 5
"""Steps in a row whose loss or gradient is not finite, after which a run stops with its last good prompt."""

_COUNTS = ("parts", "skipped", "skipped_in_a_row", "_lost")


class PromptTrainer(Trainer):
    """A Trainer whose loss touches labelled positions only and whose evaluation is the task's, on the full PLM.

    It survives what a long run meets: its checkpoints are whole or not there (`checkpoint.py`), a batch that does not
    fit into memory is trained in parts, and a step whose loss or gradient is not finite is left out.

    Args:
        schedule: for the log lines and the FLOPs; the sizes themselves are `ProgressiveCallback`'s.
        cost: what a step costs.
        full_tuning: all weights are trained, so the backward pass costs twice the forward one.
        compile_layers: run training steps on layers that `torch.compile` has compiled, each by itself: the layers of a
            stage are alike, so that a stage compiles once, and dropping layers alone compiles nothing.
        batch_tokens: the most text tokens of a batch, padding included.
        evaluate_prompt: `step → metrics` on the validation set.
        ledger: what was spent beside training, logged with it so that no tracker shows a gross saving.
        record: kept in every checkpoint's manifest: what the run is, for a resumed one to compare.
        spent: seconds so far, logged with every record.
    """

    def __init__(
        self,
        *args: Any,
        schedule: Schedule | AutoSchedule,
        cost: CostModel,
        prompt_tokens: int,
        evaluate_prompt: Callable[[int], dict[str, float]],
        ledger: FlopsLedger | None = None,
        full_tuning: bool = False,
        compile_layers: bool = False,
        batch_tokens: int | None = None,
        record: Mapping[str, Any] | None = None,
        spent: Callable[[], dict[str, Any]] = dict,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.schedule, self.cost, self.full_tuning = schedule, cost, full_tuning
        self.prompt_tokens, self.evaluate_prompt = prompt_tokens, evaluate_prompt
        self.ledger, self.batch_tokens = ledger or FlopsLedger(), batch_tokens
        self.record, self.spent = dict(record or {}), spent
        self._compiled: dict[nn.Module, Any] = {}
        if compile_layers:
            stacks = find_stacks(get_plm(self.model)).values()
            self._compiled = {
                layer: torch.compile(layer._call_impl, dynamic=True) for stack in stacks for layer in stack.layers
            }
        self.parts = 1  # a batch is trained in so many, after it once did not fit into memory
        self.skipped = self.skipped_in_a_row = 0
        self.good: list[torch.Tensor] = []  # what was trained when it was last seen to be good, of a `StepGuard`
        self._trained = [p for p in self.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
        self._not_finite = False  # the loss of a batch of this step
        self._loss_before = torch.zeros(())  # sum of the losses since the last log line, before this step
        self._lost = 0  # skipped steps since the last log line
        self._window = 0  # steps since the last log line
        self.model_accepts_loss_kwargs = True  # label_loss divides by the labels of the whole accumulated batch
        self.remove_callback(PrinterCallback)

    # -- a step -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss_of = suffix_loss if isinstance(self.model, SuffixPromptModel) else label_loss
        loss = loss_of(model, inputs, num_items=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's own step; in parts of the batch where the whole does not fit into memory.

        Raises:
            TrainingStopped: a single example does not fit.
        """
        rows = len(inputs["input_ids"])
        accumulated = any(p.grad is not None for p in self._trained)
        # All weights' gradients are too large to keep twice.
        kept = self._trained if accumulated and not self.full_tuning else []
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in kept]
        while True:
            try:
                with self._on_compiled_layers():
                    loss = self._step_in_parts(model, inputs, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)):
                    raise
                reason = str(error).split("\n")[0]
            else:
                break
            for i, parameter in enumerate(self._trained):
                parameter.grad = before[i].clone() if before else None
            clear_device_cache(garbage_collection=True)
            if self.parts >= rows or (accumulated and not before):
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
        if not torch.isfinite(loss):
            self._not_finite = True
            return torch.zeros_like(loss)
        return loss

    @contextlib.contextmanager
    def _on_compiled_layers(self) -> Iterator[None]:
        """As `nn.Module.compile` does, but for a training step alone: evaluation and scoring would compile others."""
        try:
            for layer, compiled in self._compiled.items():
                layer._compiled_call_impl = compiled
            yield
        finally:
            for layer in self._compiled:
                layer.__dict__.pop("_compiled_call_impl", None)

    def _step_in_parts(self, model: nn.Module, inputs: Any, num_items: Any) -> torch.Tensor:
        rows = len(inputs["input_ids"])
        size = -(-rows // self.parts)
        starts = range(0, rows, size)
        total: Any = 0.0
        self._texts: list[tuple[int, int]] = []
        longest = [0, 0]
        for start in starts:
            part = {k: v[start : start + size] for k, v in inputs.items()}
            last = start == starts[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                total = total + super().training_step(model, part, num_items)
            if isinstance(self.model, SuffixPromptModel):
                self._texts.append(self.model.text_ran)
                longest = [max(longest[0], self.model.text_tokens), max(longest[1], self.model.after_tokens)]
                self.model.text_tokens, self.model.after_tokens = longest  # of the whole batch
        return total  # type: ignore[no-any-return]

    def begin_step(self) -> None:
        """Called before the first batch of a step."""
        self._loss_before = self._tr_loss.clone()  # type: ignore[union-attr]

    def leave_out_bad_step(self) -> bool:
        """Drop the gradient of a step where it, or the loss, is not finite; whether it was dropped.

        Called when the gradient is complete, before the optimizer's step, which then changes nothing.

        Raises:
            TrainingStopped: after `MAX_SKIPPED` such steps in a row.
        """
        grads = [p.grad for p in self._trained if p.grad is not None]
        bad = self._not_finite or not all(torch.isfinite(g).all() for g in grads)
        loss_too, self._not_finite = self._not_finite, False
        if not parallel.any_process(bad):
            self.skipped_in_a_row = 0
            return False
        for parameter in self._trained:
            parameter.grad = None
        self._tr_loss.copy_(self._loss_before)
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self._lost += 1
        what, step = "loss" if loss_too else "gradient", self.state.global_step
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise TrainingStopped(
                f"the {what} is not finite at step {step}, for {MAX_SKIPPED} steps in a row; the prompt before them is "
                "kept. Try a lower optim.lr, optim.warmup_steps, or model.dtype=float32"
            )
        logger.warning("the %s is not finite at step %d, which is left out (%d so far)", what, step, self.skipped)
        return True

    # -- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the whole run, of which every process takes its own rows: the order is that of one process."""
        whole = LengthBatchSampler(
            input_lengths(self.train_dataset),  # type: ignore[arg-type]
            self.args.per_device_train_batch_size * parallel.size(),
            seed=self.args.data_seed or 0,
            max_tokens=self.batch_tokens,
            shares=parallel.size(),
        )
        # Not accelerate.prepare: it would deal out whole batches, each of another length, and repeat rows at the end.
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=_OwnRows(whole),
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collate(self, rows: list[Any]) -> Any:
        if rows:
            return self.data_collator(rows)
        # Fewer rows than processes: this one takes part in the step with an example that carries no loss.
        batch = self.data_collator([self.train_dataset[0]])  # type: ignore[index]
        batch["labels"].fill_(IGNORED)
        return batch

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all; a disk that refuses is a warning, not the end of the run."""
        self.store_flos()  # of all processes
        step = self.state.global_step
        states = parallel.gather({"random": checkpoint.random_state(), "loss": float(self._tr_loss)})
        if not self.args.should_save:
            return
        folder = Path(str(self.args.output_dir))
        target = folder / f"checkpoint-{step}"
        try:
            with contextlib.suppress(checkpoint.CheckpointError):
                checkpoint.verify(target)
                return  # the same step of the same run
            with checkpoint.new_folder(target) as work:
                self._fill(work, states)
                checkpoint.seal(work, step, {**self.record, **self._progress()})
            checkpoint.prune(folder, self.args.save_total_limit or 1, step)
        except checkpoint.CANNOT_WRITE as error:
            kept = checkpoint.steps_of(folder)
            logger.warning(
                "the checkpoint of step %d cannot be written (%s); training goes on, the last one is of step %s",
                step,
                error,
                kept[-1] if kept else "none",
            )

    def _fill(self, work: Path, states: list[Any]) -> None:
        checkpoint.save_trained(work, self.model)
        checkpoint.save_state(work, "optimizer", self.optimizer.state_dict())  # type: ignore[union-attr]
        checkpoint.save_state(work, "scheduler", self.lr_scheduler.state_dict())  # type: ignore[union-attr]
        for process, state in enumerate(states):
            checkpoint.save_state(work, f"process_{process}", state)
        counts = {name: getattr(self, name) for name in _COUNTS}
        checkpoint.save_state(work, "counts", {**counts, "logged": self._globalstep_last_logged})
        checkpoint.save_state(work, "good", self.good)
        self.state.save_to_json(str(work / TRAINER_STATE_NAME))

    def _progress(self) -> dict[str, Any]:
        stage = self.schedule.now.stage_at(self.state.global_step)
        return {
            "stage": self.schedule.now.index_at(self.state.global_step),
            "next_size": str(stage),
            "schedule": self.schedule.now.to_dict(),
            "flops": {**self.ledger.to_dict(), "train": self.state.total_flos},
            **self.spent(),
        }

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        if self.full_tuning:
            super()._load_from_checkpoint(folder, model)
        else:
            with torch.no_grad():
                prompt_parameter(self.model).copy_(load_prompt(folder))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        optimizer, rates = self.optimizer, self.lr_scheduler
        saved, steps = (checkpoint.load_state(Path(folder), name) for name in ("optimizer", "scheduler"))
        before = checkpoint.verify(Path(folder)).record["config"]["optim"]
        now = self.record.get("config", {}).get("optim", before)
        if now == before:
            optimizer.load_state_dict(saved)  # type: ignore[union-attr]
            rates.load_state_dict(steps)  # type: ignore[union-attr]
            return
        # The recipe was changed on purpose: its settings hold, with the moments where they mean the same.
        if now["optimizer"] == before["optimizer"]:
            groups = optimizer.state_dict()["param_groups"]  # type: ignore[union-attr]
            optimizer.load_state_dict({**saved, "param_groups": groups})  # type: ignore[union-attr]
        made = {key: steps[key] for key in ("last_epoch", "_step_count")}
        rates.load_state_dict({**rates.state_dict(), **made})  # type: ignore[union-attr]
        for group, base, factor in zip(
            optimizer.param_groups,  # type: ignore[union-attr]
            rates.base_lrs,  # type: ignore[union-attr]
            rates.lr_lambdas,  # type: ignore[union-attr]
            strict=True,
        ):
            group["lr"] = base * factor(made["last_epoch"])

    def _load_rng_state(self, folder: str | None) -> None:
        """All that a process goes on from, once the resumed epoch's first batch is read."""
        if folder is None:
            return
        mine = checkpoint.load_state(Path(folder), f"process_{min(parallel.rank(), self._processes(folder) - 1)}")
        checkpoint.set_random_state(mine["random"])
        counts = self._load_counts(folder)
        if (Path(folder) / "good.json").is_file():  # the last update may have been the one that spoiled the prompt
            for kept, saved in zip(self.good, checkpoint.load_state(Path(folder), "good"), strict=True):
                kept.copy_(saved)
        self._tr_loss += mine["loss"]
        self._globalstep_last_logged = counts["logged"]

    def _load_counts(self, folder: str) -> dict[str, Any]:
        counts = checkpoint.load_state(Path(folder), "counts")
        for name in _COUNTS:
            setattr(self, name, counts[name])
        return counts

    @staticmethod
    def _processes(folder: str) -> int:
        return len(list(Path(folder).glob("process_*.json")))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: weights are loaded in the dtype they are trained in."""

    def resume_finished(self, folder: str) -> None:
        """Load the checkpoint of a run that has made all its steps; `train` would make one more of it."""
        self._load_from_checkpoint(folder)
        self.state = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
        self._load_counts(folder)

    # -- what is counted ----------------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: Any) -> float:  # type: ignore[override]
        """FLOPs of the training step on `inputs`, at the stage it ran on (`flops.py`, convention `all`)."""
        if self.full_tuning:
            return 3 * forward_flops(self.cost, None, self._shape(inputs))  # weight gradients cost one more pass
        stage = self.schedule.now.stage_at(self.state.global_step)
        # The batch has been cut by now: neither `batch` nor `length` of the stage is to cut it once more.
        size, shape = replace(stage, batch=None, length=None), self._shape(inputs)
        if not isinstance(self.model, SuffixPromptModel):
            return step_flops(self.cost, size, shape)
        texts = sum(text_flops(self.cost, size, *ran, kept_cross=shape.kept_cross) for ran in self._texts)
        return step_flops(self.cost, size, shape) + texts

    def probe_flops(self, inputs: Any) -> float:
        """FLOPs of the last forward pass, if it was of `inputs` on the full PLM."""
        shape, texts = self._shape(inputs), 0.0
        if isinstance(self.model, SuffixPromptModel):
            texts = text_flops(self.cost, None, *self.model.text_ran, kept_cross=shape.kept_cross)
        return forward_flops(self.cost, None, shape) + texts

    def _shape(self, inputs: Any) -> BatchShape:
        shape = batch_shape(inputs, self.prompt_tokens, self.cost)
        if not isinstance(self.model, SuffixPromptModel):
            return shape
        # What stands between prompt and target costs what the prompt does.
        between = self.model.after_tokens - shape.target_tokens if self.model.placement == "infix" else 0
        return replace(
            shape,
            placement="suffix",
            input_tokens=self.model.text_tokens,
            prompt_tokens=shape.prompt_tokens + between,
            text_examples=0,
            kept_cross=self.model.cache is not None and self.model.cache.cross_attention,
        )

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        self._memory_tracker.start()
        start = time.time()
        self.store_flos()
        found = self.evaluate_prompt(self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_dataset)))  # type: ignore[arg-type]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = max(self.state.global_step - 1, 0)  # the step that these numbers are of
        stage = self.schedule.now.stage_at(step)
        sizes = {"stage": self.schedule.now.index_at(step)}
        for name in stage.stacks:
            sizes[f"{name}_layers"], sizes[f"{name}_ffn"] = stage.layers_in(name), stage.ffn_in(name)  # type: ignore[assignment]
        spent = {f"flops_{what}": self.ledger[what] for what in ("score", "probe", "eval")}
        if self.skipped:
            spent["skipped_steps"] = self.skipped
        if "loss" in logs and self._lost:
            counted = self._window - self._lost
            mean = {"loss": logs["loss"] * self._window / counted} if counted else {}
            logs, self._lost = {**{k: v for k, v in logs.items() if k not in ("loss", "grad_norm")}, **mean}, 0
        super().log({**logs, **sizes, "train_flops": self.state.total_flos, **spent, **self.spent()}, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._window = self.state.global_step - self._globalstep_last_logged
        super()._maybe_log_save_evaluate(*args, **kwargs)


class _OwnRows:
    """This process's rows of every batch of the whole run, one piece of it: all of it where it is the only one."""

    def __init__(self, batch_sampler: LengthBatchSampler):
        self.batch_sampler = batch_sampler

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        rank, size = parallel.rank(), parallel.size()
        for batch in self.batch_sampler:
            yield batch[len(batch) * rank // size : len(batch) * (rank + 1) // size]


def batch_shape(batch: Any, prompt_tokens: int, cost: CostModel) -> BatchShape:
    """The padded shape of a training batch, as `flops.py` counts it."""
    size, length = batch["input_ids"].shape
    labelled = (batch["labels"] != IGNORED).sum(1)
    if "encoder" in cost.stacks and "decoder" in cost.stacks:
        target, text = batch["labels"].shape[1], length
    else:
        target = max(int(labelled.max()), 1)
        text = length - target
    return BatchShape(
        batch=size,
        input_tokens=text,
        prompt_tokens=prompt_tokens,
        target_tokens=target,
        label_tokens=float(labelled.sum()) / size,
    )


class StepGuard(TrainerCallback):
    """Keeps the clock of training steps and the last good prompt, and ends the run on Ctrl-C or SIGTERM.

    A first signal finishes the step, saves a checkpoint and stops; a second one interrupts at once.

    Args:
        trained: what is trained.
        remember: keep a copy of the values whose loss and gradient were last seen to be finite, for `go_back`.
        save_minutes: also save where so many minutes have passed since the last checkpoint.
    """

    def __init__(self, trained: list[nn.Parameter], *, remember: bool = True, save_minutes: float | None = None):
        self.trained, self.seconds = trained, 0.0
        self.good = [p.detach().clone() for p in trained] if remember else []
        self._now = [p.clone() for p in self.good]  # with a running mean: the mean that belongs to this step's prompt
        self.save_minutes = save_minutes
        self.signal: int | None = None
        self.trainer: PromptTrainer | None = None
        self._start = self._saved = time.perf_counter()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StepGuard:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("stopping after this step; once more to stop at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for kept, parameter in zip(self.good, self.trained, strict=False):  # a checkpoint is loaded by now
            kept.copy_(parameter.detach())
        self._saved = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        for kept, parameter in zip(self._now, self.trained, strict=False):
            kept.copy_(parameter.detach())
        if self.trainer is not None:
            self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer is not None and self.trainer.leave_out_bad_step():
            return
        for kept, now in zip(self.good, self._now, strict=False):
            kept.copy_(now)

    def go_back(self) -> None:
        """Give the trained parameters their last good values back."""
        with torch.no_grad():
            for kept, parameter in zip(self.good, self.trained, strict=False):
                parameter.copy_(kept)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds += now - self._start
        number = parallel.largest(self.signal or 0)  # a launcher's signal reaches its processes at different steps
        if number:
            self.signal = number
            control.should_save = control.should_training_stop = True
        elif self.save_minutes and parallel.any_process(now - self._saved >= 60 * self.save_minutes):
            control.should_save = True


def make_collator(tokenizer: Any, plm: Any, *, tails: bool = False, after: bool = False) -> Collator:
    """The collator for a PLM: what its kind of model takes, and what cutting inputs or an infix prompt takes."""
    return Collator(tokenizer, decoder=not plm.config.is_encoder_decoder, tails=tails, after=after)
