"""The paper's models, tasks and cost columns (Tables 1 and 2), and their FLOPs as we count them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ..cost.flops import Convention, relative_flops, schedule_flops, step_flops
from ..cost.shapes import BatchShape, CostModel
from ..errors import ConfigError
from ..schedule.stages import Schedule, Stage

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

    def stage(self, stacks: tuple[str, ...]) -> Stage:
        """The partial PLM of the row, where `stacks` are reduced."""
        return Stage(self.layers, self.ffn, 0, stacks)


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


def over_tasks(flops: Callable[[BatchShape, tuple[str, ...]], tuple[float, float]]) -> float:
    """Relative FLOPs over the paper's five tasks: FLOPs summed over the tasks, over the full model's sum.

    Args:
        flops: `(shape, stacks reduced) → (FLOPs, FLOPs of plain prompt tuning)`.
    """
    return relative_flops(
        flops(BatchShape(batch=32, target_tokens=target), stacks) for target, stacks in PAPER_TASKS.values()
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

    return [over_tasks(partial(pair, row)) for row in paper_rows(plm)]


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

    return {method: over_tasks(partial(pair, method)) for method in PAPER_TABLE2[plm]}
