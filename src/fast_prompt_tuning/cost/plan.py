"""What a run will cost, before anything is spent on it: the pure functions behind `fpt plan`.

A plan needs a config, not weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, ScheduleError
from ..plm.configs import full_stage
from ..schedule.auto import best_case, default_ladder
from ..schedule.stages import Schedule, Stage
from .flops import Convention, step_flops, text_flops
from .memory import activation_bytes, text_bytes, weight_bytes
from .shapes import BatchShape, CostModel
from .timing import Timing


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
    def memory_bytes(self) -> int:
        """Weights and activations together."""
        return self.weight_bytes + self.activation_bytes

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
    def peak_bytes(self) -> int:
        """Memory of the stage that needs most."""
        return max(s.memory_bytes for s in self.stages)

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
            names = ("flops_per_step", "relative_flops", "flops", "weight_bytes", "activation_bytes")
            row = {**s.stage.to_dict(), **{name: getattr(s, name) for name in names}}
            if s.seconds_per_step is not None:
                row |= {"seconds_per_step": s.seconds_per_step, "seconds": s.seconds}
            stages.append(row)
        return {"relative_flops": self.relative_flops, "stages": stages}


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
    whole = accumulate * step_flops(cost, None, shape.in_front, convention=convention)
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
    whole = step_flops(cost, None, shape.in_front)
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
    cut = None if stacks is None else tuple(stacks)

    def schedule(method: str) -> Schedule:
        if method == "auto":
            return best_case(default_ladder(full, shape.batch), total_steps)
        return Schedule.preset(method, full, total_steps=total_steps, stacks=cut)

    common: dict[str, Any] = {"convention": convention, "dtype_bytes": dtype_bytes, "cost": cost}
    return {method: make_plan(config, schedule(method), shape, accumulate=accumulate, **common) for method in methods}
