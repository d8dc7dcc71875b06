"""The `transformers` Trainer for prompts: label-position loss, length batches, evaluation on the full PLM."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
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

from .config import OptimConfig, RunConfig
from .data import Collator, LengthBatchSampler, input_lengths
from .errors import TrainingStopped
from .flops import BatchShape, CostModel, FlopsLedger, forward_flops, step_flops, text_flops
from .objective import IGNORED, label_loss
from .placement import SuffixPromptModel, suffix_loss
from .schedule import Schedule, Stage

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
        logging_nan_inf_filter=False,
        report_to=config.train.report_to or "none",
        seed=config.train.seed,
        data_seed=config.train.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        gradient_checkpointing=config.train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.train.gradient_checkpointing else None,
        dataloader_pin_memory=device.type == "cuda",
    )


class PromptTrainer(Trainer):
    """A Trainer whose loss touches labelled positions only and whose evaluation is the task's, on the full PLM.

    Args:
        schedule: for the log lines and the FLOPs; the sizes themselves are `ProgressiveCallback`'s.
        cost: what a step costs.
        full_tuning: all weights are trained, so the backward pass costs twice the forward one.
        evaluate_prompt: `step → metrics` on the validation set.
        ledger: what was spent beside training, logged with it so that no tracker shows a gross saving.
    """

    def __init__(
        self,
        *args: Any,
        schedule: Schedule,
        cost: CostModel,
        prompt_tokens: int,
        evaluate_prompt: Callable[[int], dict[str, float]],
        ledger: FlopsLedger | None = None,
        full_tuning: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.schedule, self.cost, self.full_tuning = schedule, cost, full_tuning
        self.prompt_tokens, self.evaluate_prompt = prompt_tokens, evaluate_prompt
        self.ledger = ledger or FlopsLedger()
        self.model_accepts_loss_kwargs = True  # label_loss divides by the labels of the whole accumulated batch
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss_of = suffix_loss if isinstance(self.model, SuffixPromptModel) else label_loss
        loss = loss_of(model, inputs, num_items=num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"the loss is {loss.item()} at step {self.state.global_step}; the prompt before it is kept. Try a "
                "lower optim.lr, optim.warmup_steps, or model.dtype=float32"
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        sampler = LengthBatchSampler(
            input_lengths(self.train_dataset),  # type: ignore[arg-type]
            self.args.per_device_train_batch_size,
            seed=self.args.data_seed or 0,
        )
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def resume_finished(self, checkpoint: str) -> None:
        """Load the checkpoint of a run that has made all its steps; `train` would make one more of it."""
        path = os.path.join(checkpoint, TRAINER_STATE_NAME)
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(path)

    def floating_point_ops(self, inputs: Any) -> float:  # type: ignore[override]
        """FLOPs of the training step on `inputs`, at the stage it ran on (`flops.py`, convention `all`)."""
        shape, stage = self._shape(inputs), self.schedule.stage_at(self.state.global_step)
        if self.full_tuning:
            return 3 * forward_flops(self.cost, None, shape)  # weight gradients cost one more forward pass
        return step_flops(self.cost, stage, shape) + self._text_flops(stage)

    def probe_flops(self, inputs: Any) -> float:
        """FLOPs of the last forward pass, if it was of `inputs` on the full PLM."""
        return forward_flops(self.cost, None, self._shape(inputs)) + self._text_flops(None)

    def _shape(self, inputs: Any) -> BatchShape:
        shape = batch_shape(inputs, self.prompt_tokens, self.cost)
        if not isinstance(self.model, SuffixPromptModel):
            return shape
        return replace(shape, placement="suffix", input_tokens=self.model.text_tokens, text_examples=0)

    def _text_flops(self, stage: Stage | None) -> float:
        """What running texts has cost the last forward pass, where the prompt stands after them."""
        return text_flops(self.cost, stage, *self.model.text_ran) if isinstance(self.model, SuffixPromptModel) else 0.0

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
        stage = self.schedule.stage_at(step)
        sizes = {"stage": self.schedule.index_at(step)}
        for name in stage.stacks:
            sizes[f"{name}_layers"], sizes[f"{name}_ffn"] = stage.layers_in(name), stage.ffn_in(name)  # type: ignore[assignment]
        spent = {f"flops_{what}": self.ledger[what] for what in ("score", "probe", "eval")}
        super().log({**logs, **sizes, "train_flops": self.state.total_flos, **spent}, start_time)


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
    """Keeps the clock of training steps, refuses non-finite gradients, and ends the run on Ctrl-C or SIGTERM.

    A first signal finishes the step, saves a checkpoint and stops; a second one interrupts at once.

    Args:
        trained: what is trained.
        remember: keep a copy of the values whose loss and gradient were last seen to be finite, for `go_back`.
    """

    def __init__(self, trained: list[nn.Parameter], *, remember: bool = True):
        self.trained, self.seconds = trained, 0.0
        self.good = [p.detach().clone() for p in trained] if remember else []
        self.signal: int | None = None
        self._start = 0.0
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
        self.good = [p.detach().clone() for p in self.trained] if self.good else []  # a checkpoint is loaded by now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for parameter in self.trained:
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise TrainingStopped(
                    f"the gradient is not finite at step {state.global_step}; the prompt before it is kept. Try a "
                    "lower optim.lr or model.dtype=float32"
                )
        for kept, parameter in zip(self.good, self.trained, strict=False):
            kept.copy_(parameter.detach())

    def go_back(self) -> None:
        """Give the trained parameters their last good values back."""
        with torch.no_grad():
            for kept, parameter in zip(self.good, self.trained, strict=False):
                parameter.copy_(kept)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


def make_collator(tokenizer: Any, plm: Any, *, tails: bool = False) -> Collator:
    """The collator for a PLM: what its kind of model takes, and with `tails` what cutting inputs takes."""
    return Collator(tokenizer, decoder=not plm.config.is_encoder_decoder, tails=tails)
