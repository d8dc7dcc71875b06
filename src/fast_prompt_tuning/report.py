"""What people look at: tables in the terminal and the picture of quality against training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .results import Point, RunResult

COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
"""Paul Tol's bright scheme: told apart by colour-blind readers and in grey."""


def human_flops(flops: float) -> str:
    """FLOPs with a metric prefix: `1.23 TFLOPs`."""
    flops = float(f"{flops:.3g}")  # first, so that 999.9 G is 1 T
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= limit:
            scaled = flops / limit
            return f"{scaled:.0f} {prefix}FLOPs" if scaled >= 1000 else f"{scaled:.3g} {prefix}FLOPs"
    return f"{flops:.0f} FLOPs"


def flops_unit(flops: float) -> tuple[float, str]:
    """One unit for a whole column: the largest of which `flops`, its largest number, is at least one."""
    units = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next((unit for unit in units if flops >= unit[0]), (1.0, ""))


def human_seconds(seconds: float) -> str:
    """`43 s`, `2 min 05 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table_rows(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One plain record per run; costs relative to the first run of method `pt`, where there is one.

    `flops` is everything the method itself spent: training, scoring and probing. Evaluation is counted apart, since
    it is the user's choice and the same for every method.
    """
    plain = next((r for r in results if r.method == "pt"), None)
    rows = []
    for result in results:
        spent = result.flops["train"] + result.flops["score"] + result.flops["probe"]
        base = plain.flops["train"] if plain else 0.0
        low, high = result.intervals[result.primary]
        rows.append(
            {
                "name": result.name,
                "method": result.method,
                "metric": result.primary,
                "value": result.metrics[result.primary],
                "interval": [low, high],
                "flops": spent,
                "flops_eval": result.flops["eval"],
                "seconds": result.train_seconds,
                "relative_flops": spent / base if base and spent else None,
                "relative_seconds": result.train_seconds / plain.train_seconds
                if plain and plain.train_seconds and result.train_seconds
                else None,
                "status": result.status,
            }
        )
    return rows


def comparison_table(results: Sequence[RunResult], title: str | None = None) -> Table:
    """The comparison as a `rich` table that fits 80 columns."""
    rows = table_rows(results)
    scale, prefix = flops_unit(max(row["flops"] for row in rows))
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    names = (rows[0]["metric"] + " %", "95% range", f"{prefix}FLOPs", "of plain", "time", "of plain")
    table.add_column("run", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f}%"

    for row in rows:
        low, high = row["interval"]
        table.add_row(
            escape(row["name"] if row["status"] in ("finished", "evaluated") else f"{row['name']} ({row['status']})"),
            f"{row['value']:.1f}",
            f"{low:.1f}–{high:.1f}",
            f"{row['flops'] / scale:.3g}" if row["flops"] else "none",
            percent(row["relative_flops"]),
            human_seconds(row["seconds"]) if row["seconds"] else "none",
            percent(row["relative_seconds"]),
        )
    return table


def draw_quality(results: Sequence[RunResult], path: str | Path, *, against: str = "flops") -> Path:
    """Draw the first metric on the full PLM against training cost for every run; stages shaded, growths marked.

    Args:
        path: a `.png` or `.svg` file.
        against: `flops` or `seconds`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_flops = against == "flops"
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever the user's default backend
    axes = figure.add_subplot()
    scale = 1e12 if by_flops else 1.0
    primary = results[0].primary
    curves = [r for r in results if len(r.curve) > 1 or (r.curve and r.steps)]
    for result, colour in zip(curves, COLOURS * (1 + len(curves) // len(COLOURS)), strict=False):
        points = [(_spent(result, p, by_flops) / scale, p.metrics[primary]) for p in result.curve]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", markersize=4, color=colour, label=result.name, zorder=3)
        for start, stage in list(zip(result.boundaries, result.schedule, strict=True))[1:]:
            at = _cost_at(result, start, by_flops) / scale
            axes.axvline(at, color=colour, linestyle=":", linewidth=1, alpha=0.8)
            axes.annotate(
                f"grows to {_size(stage)}",
                (at, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=7,
                color=colour,
                ha="right",
                va="bottom",
            )
        if len(result.boundaries) > 1:
            full_from = _cost_at(result, result.boundaries[-1], by_flops) / scale
            axes.axvspan(min(xs[0], 0), full_from, color=colour, alpha=0.07, zorder=0)
    for result in results:
        if result not in curves:
            value = (result.curve[0].metrics if result.curve else result.metrics)[primary]
            axes.axhline(value, color="#777777", linestyle="--", linewidth=1, label=f"{result.name} ({value:.1f}%)")
    axes.set_xlabel("training compute (TFLOPs)" if by_flops else "training time (s)")
    axes.set_ylabel(f"{primary} of the full model on validation data (%)")
    axes.set_title(f"Quality against training {'compute' if by_flops else 'time'}", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", framealpha=0.9)
    figure.savefig(path, dpi=150)
    return Path(path)


def size_text(size: Any) -> str:
    """A stage's size as text: `6`, or `6/3` where the stacks differ."""
    return "/".join(map(str, size.values())) if isinstance(size, Mapping) else str(size)


def _size(stage: dict[str, Any]) -> str:
    return f"{size_text(stage['layers'])}×{size_text(stage['ffn'])}"


def _overhead(result: RunResult, by_flops: bool) -> float:
    """What the method spent before its first step: scoring and probing."""
    return result.flops["score"] + result.flops["probe"] if by_flops else 0.0


def _spent(result: RunResult, point: Point, by_flops: bool) -> float:
    return _overhead(result, by_flops) + point.train_flops if by_flops else point.train_seconds


def _cost_at(result: RunResult, step: int, by_flops: bool) -> float:
    """Cost after `step` steps, between the two evaluations around it in proportion to steps."""
    points = [(0, _overhead(result, by_flops)), *((p.step, _spent(result, p, by_flops)) for p in result.curve)]
    for (s0, c0), (s1, c1) in pairwise(points):
        if s0 <= step <= s1:
            return c0 if s1 == s0 else c0 + (c1 - c0) * (step - s0) / (s1 - s0)
    return points[-1][1]
