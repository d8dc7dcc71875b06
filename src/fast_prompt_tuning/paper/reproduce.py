"""The cost columns of the paper's Tables 1 and 2: FLOPs analytically, wall clock by measuring real training steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..cost.flops import relative_flops, step_flops
from ..cost.shapes import BatchShape, CostModel
from ..cost.timing import random_batch, random_plm, time_steps, tuned_model
from ..errors import ConfigError
from ..plm.configs import full_stage
from ..schedule.stages import PAPER_SPLIT, Stage
from .costs import PAPER_TABLE2, paper_config, paper_rows, paper_table1_flops, paper_table2_flops


def parse_scale(text: str) -> tuple[int, int, int, int]:
    """`(batch, input tokens, short target, long target)` from `BATCHxINPUT`; `paper` is 32x492 with its targets.

    Raises:
        ConfigError: not of that form.
    """
    if text == "paper":
        return 32, 492, 10, 512
    batch, _, tokens = text.partition("x")
    if not (batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
        raise ConfigError(f"--scale {text!r} is not BATCHxINPUT (for example 1x128) or paper")
    return int(batch), int(tokens), 10, max(10, int(tokens) // 2)


def measure_partial_plms(
    plm: str = "large",
    *,
    batch: int = 1,
    input_tokens: int = 108,
    short_target: int = 10,
    long_target: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
    rounds: int | None = None,
    seconds: float | None = None,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Time real prompt-tuning steps of the full T5 and of the nine partial PLMs of Table 1, in interleaved rounds.

    T5 v1.1 is built from its config with random weights: cost does not depend on their values. Two batch shapes stand
    for the paper's tasks: a short target, where the encoder alone is reduced (MNLI, QQP), and a long one, where both
    stacks are (SQuAD 2.0, ReCoRD, XSum). Costs are summed over both and taken relative to the full model's sum.

    Args:
        rounds, seconds: how often, or for how long, to go round; at least one round.

    Returns:
        Plain JSON: `shapes`, `full` (`seconds`, `flops`, `samples`) and `rows`, each with `wall_clock` (percent of
        full, medians), `wall_clock_low`, `wall_clock_high` (over rounds), `flops_all`, `flops_linear`,
        `above_flops` (points), the paper's figures and all samples.
    """
    import torch

    config = paper_config(plm)
    cost, full = CostModel.from_config(config), full_stage(config)
    tasks = [
        (BatchShape(batch=batch, input_tokens=input_tokens, target_tokens=target), stacks)
        for target, stacks in ((short_target, ("encoder",)), (long_target, ("encoder", "decoder")))
    ]
    model = tuned_model(random_plm(config, dtype=getattr(torch, dtype), device=device), tasks[0][0].prompt_tokens)
    batches = [random_batch(config, shape, device=device) for shape, _ in tasks]
    rows = paper_rows(plm)
    jobs: list[tuple[Stage, Any]] = [(full, b) for b in batches]
    for row in rows:
        jobs += [(row.stage(stacks), b) for (_, stacks), b in zip(tasks, batches, strict=True)]
    limits = {"rounds": rounds} if rounds is not None else {"seconds": seconds if seconds is not None else 60.0}
    samples = time_steps(model, jobs, on_round=on_round, **limits)  # type: ignore[arg-type]
    # Both batch shapes of one model, summed round by round, so that a ratio compares what ran close together.
    sums = [[a + b for a, b in zip(*samples[i : i + 2], strict=True)] for i in range(0, len(samples), 2)]
    medians = [sum(statistics.median(s) for s in samples[i : i + 2]) for i in range(0, len(samples), 2)]
    fastest = [sum(min(s) for s in samples[i : i + 2]) for i in range(0, len(samples), 2)]
    results = []
    for i, row in enumerate(rows, start=1):
        ratios = sorted(part / whole for part, whole in zip(sums[i], sums[0], strict=True))
        result: dict[str, Any] = {"method": row.method, "layers": row.layers, "ffn": row.ffn}
        for convention in ("all", "linear"):
            result[f"flops_{convention}"] = 100 * relative_flops(
                (
                    step_flops(cost, row.stage(stacks), shape, convention=convention),
                    step_flops(cost, None, shape, convention=convention),
                )
                for shape, stacks in tasks
            )
        result["wall_clock"] = 100 * medians[i] / medians[0]
        result["wall_clock_best"] = 100 * fastest[i] / fastest[0]  # what other load disturbs least
        result["wall_clock_low"], result["wall_clock_high"] = 100 * ratios[0], 100 * ratios[-1]
        result["above_flops"] = result["wall_clock"] - result["flops_all"]
        result["paper_flops"], result["paper_wall_clock"] = row.flops, row.wall_clock
        result["seconds"] = medians[i]
        result["samples"] = samples[2 * i : 2 * i + 2]
        results.append(result)
    return {
        "plm": f"t5-v1_1-{plm}",
        "weights": "random",
        "dtype": dtype,
        "prompt_dtype": "float32",
        "rounds": len(samples[0]),
        "shapes": [{**asdict(shape), "reduced": list(stacks)} for shape, stacks in tasks],
        "full": {
            "seconds": medians[0],
            "flops": sum(step_flops(cost, None, shape) for shape, _ in tasks),
            "samples": samples[:2],
        },
        "rows": results,
    }


def cost_rows(
    table: str, columns: list[str], *, plm: str, scale: str, seconds: float, dtype: str
) -> tuple[list[dict[str, Any]], str]:
    """Rows of a table's cost columns beside the paper's figures, in percent, and a note on how they were made.

    Args:
        table: `table1` (partial PLMs) or `table2` (whole runs).
        columns: `flops`, `wallclock` or both.
        scale: batch and input length of the measured steps, see `parse_scale`.

    Raises:
        ConfigError: unknown PLM or scale.
    """
    notes = ["FLOPs over the paper's five tasks at its shapes: `linear` as its tool counts, `all` with attention."]
    measured = None
    if "wallclock" in columns:
        batch, tokens, short, long = parse_scale(scale)
        measured = measure_partial_plms(
            plm,
            batch=batch,
            input_tokens=tokens,
            short_target=short,
            long_target=long,
            dtype=dtype,
            seconds=seconds,
        )
        notes.append(
            f"Wall clock: medians of {measured['rounds']} interleaved rounds of real steps, batches of {batch} × "
            f"(20 + {tokens}) tokens, targets of {short} (encoder cut) and {long} (both cut), {dtype}; the paper's are "
            "of whole runs on its GPUs."
        )
    if table == "table1":
        flops = {c: paper_table1_flops(plm, convention=c) for c in ("linear", "all")}  # type: ignore[arg-type]
        rows: list[dict[str, Any]] = []
        for i, row in enumerate(paper_rows(plm)):
            entry: dict[str, Any] = {"method": row.method, "layers": row.layers, "d_ff": row.ffn}
            if "flops" in columns:
                entry |= {
                    "flops_linear": 100 * flops["linear"][i],
                    "flops_all": 100 * flops["all"][i],
                    "paper_flops": row.flops,
                }
            if measured:
                entry |= {"wall_clock": measured["rows"][i]["wall_clock"], "paper_wall_clock": row.wall_clock}
            rows.append(entry)
        return rows, " ".join(notes)
    runs = {c: paper_table2_flops(plm, convention=c) for c in ("linear", "all")}  # type: ignore[arg-type]
    rows = []
    for method, (paper_flops, paper_clock) in PAPER_TABLE2[plm].items():
        entry = {"method": f"FPT-{method.upper()}"}
        if "flops" in columns:
            entry |= {
                "flops_linear": 100 * runs["linear"][method],
                "flops_all": 100 * runs["all"][method],
                "paper_flops": paper_flops,
            }
        if measured:
            stages = [r["wall_clock"] for r in measured["rows"] if r["method"] == method]
            clock = sum(share * part for share, part in zip(PAPER_SPLIT, [*stages, 100.0], strict=True))
            entry |= {"wall_clock": clock, "paper_wall_clock": paper_clock}
        rows.append(entry)
    return rows, " ".join(notes)
