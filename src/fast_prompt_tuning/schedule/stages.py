"""Schedules: which size of the model, and how much of each batch, every training step runs on. Pure, no torch.

Source of the presets: Huang et al. 2022, "FPT: Improving Prompt Tuning Efficiency via Progressive Training"
(Findings of EMNLP 2022), Section 4.1 and Appendix: three partial stages of 20% of the steps each at 25%, 50% and
75% of the layers and/or FFN neurons, then 40% of the steps on the full PLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import ScheduleError, is_whole

METHODS: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    # name -> (reduces layers, reduces FFN neurons)
    {"pt": (False, False), "ld": (True, False), "fr": (False, True), "cr": (True, True)}
)
"""The paper's methods: plain prompt tuning, layer dropping, FFN reduction, compound reduction."""

PAPER_FRACTIONS = (0.25, 0.50, 0.75)
"""Part of the layers and neurons kept in each partial stage (paper, Section 4.1)."""

PAPER_SPLIT = (0.20, 0.20, 0.20, 0.40)
"""Part of the steps spent in each stage, the full PLM last (paper, Section 4.1)."""

STACKS = ("encoder", "decoder")

PerStack = int | Mapping[str, int]
"""One number for every stack, or one each."""


class Size(NamedTuple):
    """The size of one stack: layers, and FFN neurons in each of them."""

    layers: int
    ffn: int


def _per_stack(name: str, value: PerStack, stacks: tuple[str, ...]) -> dict[str, int]:
    if isinstance(value, Mapping):
        sizes = {str(k): v for k, v in value.items()}
        if set(sizes) != set(stacks):
            raise ScheduleError(f"{name}={sizes} must name exactly the stacks {list(stacks)}; fix the keys")
        sizes = {stack: sizes[stack] for stack in stacks}  # in one order: equal stages must hash and print the same
    else:
        sizes = dict.fromkeys(stacks, value)
    for stack, size in sizes.items():
        if not is_whole(size, 1):
            raise ScheduleError(f"{name}={size!r} for the {stack} must be a whole number of at least 1")
    return sizes


_OPTIONAL = ("batch", "length")  # what a stage may say beside its size


@dataclass(frozen=True)
class Stage:
    """One size of the model and of its batches, kept for a number of steps.

    Args:
        layers: layers kept in each stack of `stacks`: one number for all of them, or one per stack
            (`{"encoder": 6, "decoder": 3}`).
        ffn: FFN neurons kept in every kept layer, likewise.
        steps: optimizer steps this stage lasts.
        stacks: the stacks that are cut; a stack of the model that is not named here stays whole.
        batch: examples of each forward pass (and process) that the step trains on; None: all it is given.
        length: tokens an input is cut to, the soft prompt not counted; None: whole inputs.

    Raises:
        ScheduleError: sizes below one, unknown stacks, negative steps.
    """

    layers: PerStack
    ffn: PerStack
    steps: int = 0
    stacks: tuple[str, ...] = ("decoder",)
    batch: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        stacks = tuple(s for s in STACKS if s in self.stacks)
        if not stacks or set(stacks) != set(self.stacks):
            raise ScheduleError(f"stacks={list(self.stacks)} must be a non-empty choice of {list(STACKS)}")
        if not is_whole(self.steps, 0):
            raise ScheduleError(f"steps={self.steps!r} must be a whole number of at least 0")
        for name in ("batch", "length"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise ScheduleError(f"{name}={value!r} must be a whole number of at least 1, or left out")
        object.__setattr__(self, "stacks", stacks)
        # One number wherever the stacks agree, so that equal stages compare equal however they were written.
        for name in ("layers", "ffn"):
            sizes = _per_stack(name, getattr(self, name), stacks)
            numbers = set(sizes.values())
            object.__setattr__(self, name, numbers.pop() if len(numbers) == 1 else MappingProxyType(sizes))

    def __hash__(self) -> int:
        return hash((tuple(self.sizes.items()), self.steps, self.batch, self.length))

    def __reduce__(self) -> tuple[Any, ...]:
        return Stage.from_dict, (self.to_dict(),)  # a mapping that cannot be changed cannot be pickled

    @classmethod
    def of(cls, sizes: Mapping[str, Size]) -> Stage:
        """The stage of these sizes, by stack."""
        layers, ffn = ({name: size[i] for name, size in sizes.items()} for i in range(2))
        return cls(layers, ffn, stacks=tuple(sizes))

    @property
    def sizes(self) -> dict[str, Size]:
        """The size of every stack that is cut."""
        layers, ffn = (v if isinstance(v, Mapping) else dict.fromkeys(self.stacks, v) for v in (self.layers, self.ffn))
        return {stack: Size(layers[stack], ffn[stack]) for stack in self.stacks}

    def layers_in(self, stack: str) -> int | None:
        """Layers kept in `stack`; None where the stack stays whole."""
        return self.sizes[stack].layers if stack in self.stacks else None

    def ffn_in(self, stack: str) -> int | None:
        """FFN neurons kept per layer of `stack`; None where the stack stays whole."""
        return self.sizes[stack].ffn if stack in self.stacks else None

    def same_size(self, other: Stage) -> bool:
        """Whether both stages keep the same layers and widths, whatever their steps and batches."""
        same: dict[str, Any] = {"steps": 0, "batch": None, "length": None}
        return replace(self, **same) == replace(other, **same)

    def check_fits(self, full: Stage) -> None:
        """Raise unless every size is within the model's.

        Raises:
            ScheduleError: a stack the model lacks, or more layers or neurons than it has.
        """
        _check_stacks(self.stacks, full)
        for stack, size in self.sizes.items():
            for name, number, limit in zip(Size._fields, size, full.sizes[stack], strict=True):
                if number > limit:
                    raise ScheduleError(
                        f"{name}={number} does not fit: the {stack} of this model has {limit}; choose 1 to {limit}"
                    )

    def is_full(self, full: Stage) -> bool:
        """Whether this stage keeps the whole model `full` describes, whatever its batches."""
        return all(self.layers_in(s) == full.layers_in(s) and self.ffn_in(s) == full.ffn_in(s) for s in self.stacks)

    @property
    def cuts_batch(self) -> bool:
        """Whether a step trains on a part of its batch, in examples or tokens."""
        return any(getattr(self, name) is not None for name in _OPTIONAL)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Stage(**d)` gives the stage back (tuples as lists)."""
        sizes = {"layers": self.layers, "ffn": self.ffn}
        json_sizes = {name: dict(size) if isinstance(size, Mapping) else size for name, size in sizes.items()}
        small = {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return {**json_sizes, "steps": self.steps, "stacks": list(self.stacks), **small}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Stage:
        """The inverse of `to_dict`."""
        unknown = set(d) - {"layers", "ffn", "steps", "stacks", *_OPTIONAL}
        if unknown or not {"layers", "ffn"} <= set(d):
            optional = ", ".join(("steps", "stacks", *_OPTIONAL))
            raise ScheduleError(f"stage={dict(d)!r} needs layers and ffn, may have {optional}, and nothing else")
        stacks = tuple(d.get("stacks", ("decoder",)))
        return cls(d["layers"], d["ffn"], d.get("steps", 0), stacks, *(d.get(name) for name in _OPTIONAL))

    def __str__(self) -> str:
        parts = [f"{size_text(self.layers)} layers × {size_text(self.ffn)} neurons"]
        parts += [f"{self.batch} examples"] if self.batch is not None else []
        parts += [f"{self.length} tokens"] if self.length is not None else []
        return ", ".join(parts)


def _check_stacks(stacks: tuple[str, ...], full: Stage) -> None:
    for stack in stacks:
        if stack not in full.stacks:
            raise ScheduleError(f"stacks={list(stacks)} names the {stack}, but this model has only {list(full.stacks)}")


def size_text(size: PerStack) -> str:
    """Layers or FFN neurons of a stage as text: `6`, or `6/3` where the stacks differ."""
    return "/".join(map(str, size.values())) if isinstance(size, Mapping) else str(size)


def part_of(size: int, fraction: float) -> int:
    """`fraction` of `size`, halves up, at least 1."""
    return max(1, int(size * fraction + 0.5))


@dataclass(frozen=True)
class Schedule:
    """Stages in the order they are trained in.

    Raises:
        ScheduleError: no stage, or a stage of zero steps.
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: Iterable[Stage]):
        object.__setattr__(self, "stages", tuple(stages))
        if not self.stages:
            raise ScheduleError("stages=[] is empty; a schedule needs at least one stage")
        for i, stage in enumerate(self.stages):
            if stage.steps < 1:
                raise ScheduleError(f"stages[{i}].steps={stage.steps} must be at least 1")

    @property
    def now(self) -> Schedule:
        """Itself: an `AutoSchedule`, which may stand in its place, has one schedule now and another later."""
        return self

    @property
    def candidates(self) -> tuple[Stage, ...]:
        """Every stage that a run may come to."""
        return self.stages

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First step (0-based) of every stage."""
        starts, at = [], 0
        for stage in self.stages:
            starts.append(at)
            at += stage.steps
        return tuple(starts)

    def index_at(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (0-based, so `state.global_step`) trains on.

        Steps past the end belong to the last stage: a run resumed after its last growth is on the last stage.

        Raises:
            ScheduleError: a negative step.
        """
        if step < 0:
            raise ScheduleError(f"step={step} must be at least 0")
        return max(i for i, start in enumerate(self.boundaries) if start <= step)

    def stage_at(self, step: int) -> Stage:
        """The stage that optimizer step `step` (0-based) trains on; see `index_at`."""
        return self.stages[self.index_at(step)]

    def check_fits(self, full: Stage) -> None:
        """Raise unless every stage fits the model whose full size is `full` (`ScheduleError`)."""
        for stage in self.stages:
            stage.check_fits(full)

    def to_dict(self) -> list[dict[str, Any]]:
        return [stage.to_dict() for stage in self.stages]

    @classmethod
    def from_dict(cls, stages: Iterable[Mapping[str, Any]]) -> Schedule:
        return cls(Stage.from_dict(s) for s in stages)

    @classmethod
    def constant(cls, stage: Stage, total_steps: int) -> Schedule:
        """One size for the whole run: a partial-only run as in the paper's Table 1, or plain prompt tuning."""
        return cls((replace(stage, steps=total_steps),))

    @classmethod
    def preset(
        cls,
        method: str,
        full_stage: Stage,
        *,
        total_steps: int,
        stacks: Iterable[str] | None = None,
    ) -> Schedule:
        """The paper's schedule for a model of any depth and width.

        Args:
            method: `pt`, `ld`, `fr` or `cr`.
            full_stage: the model's full size, `PartialPLM.full_stage`.
            total_steps: optimizer steps of the whole run; at least 4 for the methods that grow.
            stacks: stacks to cut; default all of the model's. The paper cuts the encoder only for tasks with
                short targets (MNLI, QQP).

        Returns:
            25/50/75% of the layers and/or neurons for 20% of the steps each, then the full PLM for 40%. Sizes are
            rounded to the nearest whole number, halves up. Stage boundaries are rounded so that they add up.

        Raises:
            ScheduleError: unknown method, too few steps, or a model so small that the method would cut nothing.
        """
        if method not in METHODS:
            raise ScheduleError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
        cut_layers, cut_ffn = METHODS[method]
        cut_stacks = tuple(stacks) if stacks is not None else full_stage.stacks
        least = len(PAPER_SPLIT) if cut_layers or cut_ffn else 1
        if not is_whole(total_steps, least):
            raise ScheduleError(
                f"total_steps={total_steps!r} must be a whole number of at least {least} for {method!r}"
            )
        if not cut_stacks:
            raise ScheduleError(f"stacks=[] names no stack to cut; this model has {list(full_stage.stacks)}")
        _check_stacks(cut_stacks, full_stage)
        layers, ffn = ({s: full_stage.sizes[s][i] for s in cut_stacks} for i in range(2))
        if not (cut_layers or cut_ffn):
            return cls((Stage(layers, ffn, total_steps, cut_stacks),))
        for what, cut, sizes in (("layers", cut_layers, layers), ("FFN neurons", cut_ffn, ffn)):
            if cut and all(part_of(n, PAPER_FRACTIONS[0]) == n for n in sizes.values()):
                raise ScheduleError(
                    f"method={method!r} would leave out no {what}: this model has {max(sizes.values())} in each of "
                    f"{', '.join(sizes)}; use method 'pt'"
                )
        shares = [sum(PAPER_SPLIT[: i + 1]) for i in range(len(PAPER_SPLIT))]
        ends = [
            max(i + 1, min(round(total_steps * s), total_steps - len(shares) + i + 1)) for i, s in enumerate(shares)
        ]
        steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return cls(
            Stage(
                {s: part_of(n, f) if cut_layers else n for s, n in layers.items()},
                {s: part_of(n, f) if cut_ffn else n for s, n in ffn.items()},
                n_steps,
                cut_stacks,
            )
            for f, n_steps in zip((*PAPER_FRACTIONS, 1.0), steps, strict=True)
        )

    def __str__(self) -> str:
        return " → ".join(f"{stage} ({stage.steps} steps)" for stage in self.stages)
