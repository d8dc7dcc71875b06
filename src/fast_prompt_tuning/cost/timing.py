"""Seconds of real training steps, of a model of random weights: cost does not depend on the values.

Heavy imports are made where they are used, so that a plan for a model of any size answers in a few seconds.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError
from ..plm.configs import full_stage, model_class
from ..schedule.stages import Schedule, Stage
from .memory import activation_bytes, weight_bytes
from .shapes import BatchShape, CostModel

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Measured seconds of a training step.

    Args:
        stages: median of each stage, in the order of the schedule.
        full: median of the full model.
        samples: every sample of each stage, then of the full model.
    """

    stages: tuple[float, ...]
    full: float
    samples: tuple[tuple[float, ...], ...]


def available_bytes(device: str) -> int:
    """Memory that a new model could use on `device`, in bytes."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def random_plm(config: Any, *, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """The model of `config` with random weights, quickly: one block of noise is repeated through all of them."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        plm = model_class(config).from_config(copy.deepcopy(config), dtype=dtype)  # a model writes into its config
    plm.tie_weights()
    noise = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(device, dtype)
    with torch.no_grad():
        for name, parameter in plm.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            for part in parameter.data.view(-1).split(noise.numel()):
                part.copy_(noise[: part.numel()])
    return plm


def random_batch(config: Any, shape: BatchShape, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A batch of random tokens of the given shape; the first `label_tokens` target tokens carry a label."""
    import torch

    generator = torch.Generator().manual_seed(0)
    causal = not getattr(config, "is_encoder_decoder", False)
    least = min(4, config.vocab_size - 1)
    ids, target = (
        torch.randint(least, config.vocab_size, (shape.batch, length), generator=generator)
        for length in (shape.input_tokens, shape.target_tokens)
    )
    labels = target.clone()
    if shape.label_tokens is not None:
        labels[:, round(shape.label_tokens) :] = -100
    if causal:
        labels = torch.cat((torch.full_like(ids, -100), labels), dim=1)
        ids = torch.cat((ids, target), dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def tuned_model(plm: nn.Module, prompt_tokens: int) -> nn.Module:
    """`plm` with a soft prompt of P virtual tokens in float32 in front of its (encoder) input, ready to train."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    task = TaskType.SEQ_2_SEQ_LM if plm.config.is_encoder_decoder else TaskType.CAUSAL_LM  # type: ignore[union-attr]
    prompt = PromptTuningConfig(task_type=task, num_virtual_tokens=prompt_tokens, num_transformer_submodules=1)
    model = get_peft_model(plm, prompt)  # type: ignore[arg-type]
    model.prompt_encoder.float()
    return model.train()


def time_steps(
    model: nn.Module,
    jobs: Sequence[tuple[Stage, Mapping[str, torch.Tensor]]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    on_round: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Time real training steps (forward with the loss at the labels, backward, optimizer) of every job, interleaved.

    A round times each job once, after one step that is not timed; every other round goes backwards, so that drift
    of the machine falls on all jobs alike. Growing is not timed.

    Args:
        model: a PEFT model with a soft prompt, at its full size. Which neurons are kept does not matter here.
        jobs: `(stage, batch)` pairs.
        rounds: rounds to time; default as many as fit in `seconds`, at least one.
        seconds: stop starting rounds that would not end in time; default 20 where `rounds` is not given.
        on_round: called with the number of rounds done.

    Returns:
        Seconds per step, one list per job.
    """
    import torch

    from ..plm.objective import choose_attention, label_loss
    from ..plm.partial import PartialPLM
    from ..plm.stacks import get_plm

    if rounds is None and seconds is None:
        seconds = 20.0
    tokens = max(batch["input_ids"].shape[1] for _, batch in jobs)
    choose_attention(get_plm(model), tokens + sum(len(p) for p in model.parameters() if p.requires_grad))
    partial = PartialPLM(model, keep_neurons="first")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    on_gpu = trained[0].is_cuda

    def step(batch: Mapping[str, torch.Tensor]) -> None:
        loss = label_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    samples: list[list[float]] = [[] for _ in jobs]
    start, done, longest = time.perf_counter(), 0, 0.0
    try:
        while rounds is None or done < rounds:
            begun = time.perf_counter()
            if seconds is not None and done and begun - start + longest > seconds:
                break
            order = range(len(jobs)) if done % 2 == 0 else reversed(range(len(jobs)))
            for i in order:
                stage, batch = jobs[i]
                partial.resize(stage)
                step(batch)
                at = time.perf_counter()
                step(batch)
                samples[i].append(time.perf_counter() - at)
            done += 1
            longest = max(longest, time.perf_counter() - begun)
            if on_round is not None:
                on_round(done)
    finally:
        partial.restore()
    return samples


def measure_stages(
    config: Any,
    schedule: Schedule,
    shape: BatchShape,
    *,
    seconds: float = 20,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> Timing:
    """Seconds per training step of every stage and of the full model, on this machine, with random weights.

    Args:
        seconds: time to spend on steps. At least one round is timed, however long it takes.
        dtype: type of the weights, `bfloat16`, `float16` or `float32`.
        device: default a CUDA device if there is one, else the CPU.

    Raises:
        ModelError: the model would not fit in memory. ConfigError: unknown dtype.
        ScheduleError: a stage does not fit the model.
    """
    import torch

    dtype_bytes = {"bfloat16": 2, "float16": 2, "float32": 4}.get(dtype)
    if dtype_bytes is None:
        raise ConfigError(f"dtype={dtype!r} is unknown; choose one of bfloat16, float16, float32")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cost, full = CostModel.from_config(config), full_stage(config)
    schedule.check_fits(full)
    sizes = (*schedule.stages, full)
    need = max(weight_bytes(cost, s, dtype_bytes=dtype_bytes) for s in sizes)
    need += max(activation_bytes(cost, s, shape, dtype_bytes=dtype_bytes, keep_scores=True) for s in sizes)
    free = available_bytes(device)
    if need > free:
        raise ModelError(
            f"measuring needs about {need / 1e9:.1f} GB on {device}, but {free / 1e9:.1f} GB are free; plan without "
            "measuring, or with a smaller batch_size or model"
        )
    model = tuned_model(random_plm(config, dtype=getattr(torch, dtype), device=device), shape.prompt_tokens)
    samples = time_steps(model, [(s, random_batch(config, shape.at(s), device=device)) for s in sizes], seconds=seconds)
    medians = [statistics.median(s) for s in samples]
    return Timing(stages=tuple(medians[:-1]), full=medians[-1], samples=tuple(tuple(s) for s in samples))
