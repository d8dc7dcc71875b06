"""What a run will cost, before anything is spent on it: the pure functions behind `fpt plan`.

A plan needs a config, not weights. Seconds come from `measure_stages`, which times real training steps of a model of
random weights: cost does not depend on the values. Heavy imports are made where they are used, so that a plan for a
model of any size answers in a few seconds.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, ScheduleError
from ..paths import is_path
from ..plm import families
from ..schedule.auto import best_case, default_ladder
from ..schedule.stages import Schedule, Stage
from .flops import (
    BatchShape,
    Convention,
    CostModel,
    activation_bytes,
    relative_flops,
    schedule_flops,
    step_flops,
    text_bytes,
    text_flops,
    weight_bytes,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_config(path_or_id: str | os.PathLike[str]) -> Any:
    """The `transformers` config of a model; its weights are neither needed nor read.

    Args:
        path_or_id: a model folder, a folder or file with just a `config.json`, or a hub id. Code that comes with a
            model is never run.

    Raises:
        ModelError: nothing is found there, or it is not a config (a GGUF file has none).
        UnknownFamilyError: a config of an architecture that no family is registered for.
    """
    from transformers import AutoConfig

    path = Path(path_or_id).expanduser()
    where = f"model={str(path_or_id)!r}"
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf"))):
        raise ModelError(
            f"{where} is GGUF, which holds no config; pass the folder or hub id of the model it was made from, or a "
            "config.json of it"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{where} is a folder without a config.json; pass the folder the model was saved in")
    if not path.exists() and is_path(str(path_or_id)):
        raise ModelError(f"{where} does not exist; pass a model folder, a config.json or a hub id")
    try:
        config = AutoConfig.from_pretrained(str(path if path.exists() else path_or_id), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{where} gives no config: {reason} (pass a model folder, a config.json or a hub id)"
        ) from error
    families.of(config)
    return config


def full_stage(config: Any) -> Stage:
    """The full size of the model a config describes.

    Raises:
        UnknownFamilyError: the architecture is not registered.
    """
    sizes = families.full_sizes(config)
    return Stage({n: s[0] for n, s in sizes.items()}, {n: s[1] for n, s in sizes.items()}, stacks=tuple(sizes))


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlanStage:
    """What one stage costs.

    Args:
        stage: its size and steps.
        flops_per_step: FLOPs of one training step.
        relative_flops: the same, relative to the full model's step.
        weight_bytes, activation_bytes: estimates of the memory it needs, see `flops`.
        seconds_per_step: measured, or None.
    """

    stage: Stage
    flops_per_step: float
    relative_flops: float
    weight_bytes: int
    activation_bytes: int
    seconds_per_step: float | None = None

    @property
    def flops(self) -> float:
        """FLOPs of all steps of the stage."""
        return self.stage.steps * self.flops_per_step

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps of the stage, if measured."""
        return None if self.seconds_per_step is None else self.stage.steps * self.seconds_per_step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a schedule costs.

    Args:
        stages: cost of each stage.
        full_flops_per_step: FLOPs of a step of plain prompt tuning.
        full_seconds_per_step: the same in seconds, if measured.
        accumulate: batches of a step.
    """

    stages: tuple[PlanStage, ...]
    full_flops_per_step: float
    full_seconds_per_step: float | None = None
    accumulate: int = 1

    @property
    def total_steps(self) -> int:
        return sum(s.stage.steps for s in self.stages)

    @property
    def flops(self) -> float:
        """FLOPs of the training steps of the whole run."""
        return sum(s.flops for s in self.stages)

    @property
    def relative_flops(self) -> float:
        """The run relative to plain prompt tuning of as many steps."""
        return self.flops / (self.total_steps * self.full_flops_per_step)

    @property
    def seconds(self) -> float | None:
        """Seconds of the training steps of the whole run, if measured."""
        parts = [s.seconds for s in self.stages]
        return None if any(p is None for p in parts) else sum(p for p in parts if p is not None)

    @property
    def relative_seconds(self) -> float | None:
        """Wall clock of the run relative to plain prompt tuning of as many steps, if measured."""
        if self.seconds is None or self.full_seconds_per_step is None:
            return None
        return self.seconds / (self.total_steps * self.full_seconds_per_step)

    def with_timing(self, timing: Timing) -> Plan:
        """The same plan with measured seconds of a batch.

        Raises:
            ScheduleError: the timing is of another number of stages.
        """
        if len(timing.stages) != len(self.stages):
            raise ScheduleError(
                f"timing has {len(timing.stages)} stages, the plan {len(self.stages)}; measure it again"
            )
        n = self.accumulate
        stages = tuple(replace(s, seconds_per_step=n * t) for s, t in zip(self.stages, timing.stages, strict=True))
        return replace(self, stages=stages, full_seconds_per_step=n * timing.full)

    def to_dict(self) -> dict[str, Any]:
        """`{"relative_flops": …, "stages": […]}` in plain JSON types; `seconds` only where measured."""
        stages = []
        for s in self.stages:
            row = {
                **s.stage.to_dict(),
                "flops_per_step": s.flops_per_step,
                "relative_flops": s.relative_flops,
                "flops": s.flops,
                "weight_bytes": s.weight_bytes,
                "activation_bytes": s.activation_bytes,
            }
            if s.seconds_per_step is not None:
                row |= {"seconds_per_step": s.seconds_per_step, "seconds": s.seconds}
            stages.append(row)
        return {"relative_flops": self.relative_flops, "stages": stages}

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)


def make_plan(
    config: Any,
    schedule: Schedule,
    shape: BatchShape,
    *,
    accumulate: int = 1,
    convention: Convention = "all",
    dtype_bytes: float = 2,
    cost: CostModel | None = None,
) -> Plan:
    """The cost of a schedule on the model of `config`.

    Args:
        shape: the padded shape of every batch. With the prompt after the text, too, costs are relative to a step of
            plain prompt tuning with the prompt in front.
        accumulate: batches of a step.
        convention: what is counted, see `flops.CONVENTIONS`.
        dtype_bytes: bytes of a weight and of an activation.
        cost: the model's shapes, if they are at hand.

    Raises:
        UnknownFamilyError: the architecture is not registered.
        ScheduleError: a stage does not fit the model.
        ConfigError: unknown convention.
    """
    cost = cost or CostModel.from_config(config)
    plain = replace(shape, placement="prefix", text_examples=None)
    whole = accumulate * step_flops(cost, None, plain, convention=convention)
    stages = []
    for stage in schedule.stages:
        flops = accumulate * step_flops(cost, stage, shape, convention=convention)
        stages.append(
            PlanStage(
                stage=stage,
                flops_per_step=flops,
                relative_flops=flops / whole,
                weight_bytes=weight_bytes(cost, stage, dtype_bytes=dtype_bytes),
                activation_bytes=activation_bytes(cost, stage, shape, dtype_bytes=dtype_bytes),
            )
        )
    return Plan(stages=tuple(stages), full_flops_per_step=whole, accumulate=accumulate)


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """What keeping the texts' states costs and saves, with the prompt after the text.

    Args:
        bytes_per_example: of a text of the planned length on the full PLM.
        bytes: of all training examples.
        fill_flops: FLOPs of running every text once at every size of the PLM that the schedule passes.
        cold: FLOPs of a step on the full PLM that runs its texts, relative to one with the prompt in front.
        warm: the same, with all texts kept.
    """

    bytes_per_example: int
    bytes: int
    fill_flops: float
    cold: float
    warm: float


def plan_texts(
    cost: CostModel, schedule: Schedule, shape: BatchShape, *, examples: int, dtype_bytes: float = 2
) -> TextPlan:
    """The text cache of a run.

    Args:
        shape: the padded shape of every batch, with the prompt after the text.
        examples: training examples.

    Raises:
        ConfigError: fewer than one example.
    """
    if examples < 1:
        raise ConfigError(f"examples={examples} must be at least 1")
    cross = shape.kept_cross
    each = text_bytes(cost, None, shape.input_tokens, dtype_bytes=dtype_bytes, kept_cross=cross)
    sizes: list[Stage] = []
    for stage in schedule.stages:
        if not any(stage.same_size(other) for other in sizes):
            sizes.append(stage)
    whole = step_flops(cost, None, replace(shape, placement="prefix", text_examples=None))
    return TextPlan(
        bytes_per_example=each,
        bytes=each * examples,
        fill_flops=sum(text_flops(cost, s, examples, shape.input_tokens, kept_cross=cross) for s in sizes),
        cold=step_flops(cost, None, replace(shape, text_examples=None)) / whole,
        warm=step_flops(cost, None, replace(shape, text_examples=0)) / whole,
    )


def compare(
    config: Any,
    methods: Iterable[str],
    shape: BatchShape,
    *,
    total_steps: int,
    stacks: Iterable[str] | None = None,
    accumulate: int = 1,
    convention: Convention = "all",
    dtype_bytes: float = 2,
) -> dict[str, Plan]:
    """The plan of every method (`pt`, `ld`, `fr`, `cr`; `auto` at its cheapest), by name, for the same batches.

    Raises:
        ScheduleError: unknown method or too few steps. UnknownFamilyError: the architecture is not registered.
    """
    cost, full = CostModel.from_config(config), full_stage(config)
    chosen = None if stacks is None else tuple(stacks)

    def schedule(method: str) -> Schedule:
        if method == "auto":
            return best_case(default_ladder(full, shape.batch), total_steps)
        return Schedule.preset(method, full, total_steps=total_steps, stacks=chosen)

    common: dict[str, Any] = {"convention": convention, "dtype_bytes": dtype_bytes, "cost": cost}
    return {method: make_plan(config, schedule(method), shape, accumulate=accumulate, **common) for method in methods}


# -- measuring --------------------------------------------------------------------------------------------------------


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
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.initialization import no_init_weights

    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    with torch.device(device), no_init_weights():
        plm = auto.from_config(copy.deepcopy(config), dtype=dtype)  # a model writes into its config
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
    ids = torch.randint(
        min(4, config.vocab_size - 1), config.vocab_size, (shape.batch, shape.input_tokens), generator=generator
    )
    target = torch.randint(
        min(4, config.vocab_size - 1), config.vocab_size, (shape.batch, shape.target_tokens), generator=generator
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
    from ..plm.partial import PartialPLM, get_plm

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


# -- the paper's cost columns -----------------------------------------------------------------------------------------

PAPER_TASKS: Mapping[str, tuple[int, tuple[str, ...]]] = MappingProxyType(
    # name -> (target tokens, stacks that are reduced)
    {
        "mnli": (10, ("encoder",)),
        "qqp": (10, ("encoder",)),
        "squad2": (200, ("encoder", "decoder")),
        "record": (200, ("encoder", "decoder")),
        "xsum": (512, ("encoder", "decoder")),
    }
)
"""The five tasks of the paper: 492 input tokens after 20 of prompt, targets padded to their full length."""

PAPER_PLMS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "large": MappingProxyType({"d_model": 1024, "d_ff": 2816, "num_heads": 16}),
        "xl": MappingProxyType({"d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    }
)
"""T5 v1.1 (LM-adapted) as in the paper; 24 + 24 layers, heads of 64."""


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1: prompt tuning on one partial PLM of T5-LARGE, cost relative to the full one in percent."""

    method: str
    layers: int
    ffn: int
    flops: int | None
    wall_clock: int | None

    def stage(self, stacks: tuple[str, ...], *, steps: int = 0) -> Stage:
        """The partial PLM of the row, where `stacks` are reduced."""
        return Stage(self.layers, self.ffn, steps, stacks)


PAPER_TABLE1 = (
    PaperRow("ld", 6, 2816, 30, 35),
    PaperRow("ld", 12, 2816, 54, 56),
    PaperRow("ld", 18, 2816, 77, 77),
    PaperRow("fr", 24, 704, 58, 72),
    PaperRow("fr", 24, 1408, 72, 81),
    PaperRow("fr", 24, 2112, 86, 91),
    PaperRow("cr", 6, 704, 20, 28),
    PaperRow("cr", 12, 1408, 40, 47),
    PaperRow("cr", 18, 2112, 66, 71),
)

PAPER_TABLE2: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    # PLM -> method -> (FLOPs, wall clock) of the whole run in percent
    {
        "large": MappingProxyType({"ld": (72, 74), "fr": (83, 89), "cr": (65, 70)}),
        "xl": MappingProxyType({"ld": (86, 86), "fr": (84, 87), "cr": (74, 76)}),
    }
)


def paper_config(plm: str = "large") -> Any:
    """The config of the paper's T5 v1.1 `large` or `xl`.

    Raises:
        ConfigError: another name.
    """
    from transformers import T5Config

    if plm not in PAPER_PLMS:
        raise ConfigError(f"plm={plm!r} is unknown; choose one of {', '.join(PAPER_PLMS)}")
    fields: dict[str, Any] = {
        "vocab_size": 32128,
        "d_kv": 64,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        **PAPER_PLMS[plm],
    }
    return T5Config(**fields)


def paper_rows(plm: str = "large") -> tuple[PaperRow, ...]:
    """The nine partial PLMs of Table 1; for `xl`, which the table leaves out, the same parts of it, without figures."""
    if plm == "large":
        return PAPER_TABLE1
    width, large = PAPER_PLMS[plm]["d_ff"], PAPER_PLMS["large"]["d_ff"]
    return tuple(replace(row, ffn=row.ffn * width // large, flops=None, wall_clock=None) for row in PAPER_TABLE1)


def over_tasks(flops: Callable[[str, BatchShape, tuple[str, ...]], tuple[float, float]], batch: int = 32) -> float:
    """Relative FLOPs over the paper's five tasks: FLOPs summed over the tasks, over the full model's sum.

    Args:
        flops: `(task, shape, stacks reduced) → (FLOPs, FLOPs of plain prompt tuning)`.
    """
    return relative_flops(
        flops(task, BatchShape(batch=batch, target_tokens=target), stacks)
        for task, (target, stacks) in PAPER_TASKS.items()
    )


def paper_table1_flops(plm: str = "large", *, convention: Convention = "linear") -> list[float]:
    """Relative FLOPs of the nine partial PLMs of Table 1 (parts of 1), over the paper's five tasks.

    With `linear` they match the paper's column within a point. The authors' profiler counts a forward pass of the
    linear layers, LM head included, with targets padded to their full length; a backward pass hardly changes the
    ratio. Attention products, which it does not see, make FFN reduction cheaper on paper than it is: by 1.6 to 4.6
    points under `all`.
    """
    cost = CostModel.from_config(paper_config(plm))

    def pair(row: PaperRow, shape: BatchShape, stacks: tuple[str, ...]) -> tuple[float, float]:
        part = step_flops(cost, row.stage(stacks), shape, convention=convention)
        return part, step_flops(cost, None, shape, convention=convention)

    return [over_tasks(lambda _, shape, stacks, row=row: pair(row, shape, stacks)) for row in paper_rows(plm)]  # type: ignore[misc]


def paper_table2_flops(plm: str = "large", *, convention: Convention = "linear") -> dict[str, float]:
    """Relative FLOPs of the paper's whole runs by method (parts of 1), over its five tasks.

    The published split of 20/20/20/40% of the steps gives the paper's figures for LARGE. It does not for XL: the
    figures there fit partial stages that are shorter, of a length the paper does not state.
    """
    cost = CostModel.from_config(paper_config(plm))

    def pair(method: str, shape: BatchShape, stacks: tuple[str, ...]) -> tuple[float, float]:
        schedules = (Schedule.preset(m, cost.full_stage, total_steps=1000, stacks=stacks) for m in (method, "pt"))
        part, whole = (schedule_flops(cost, s, shape, convention=convention) for s in schedules)
        return part, whole

    return {m: over_tasks(lambda _, shape, stacks, m=m: pair(m, shape, stacks)) for m in PAPER_TABLE2[plm]}  # type: ignore[misc]
