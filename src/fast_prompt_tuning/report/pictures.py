"""Pictures of runs: quality against cost, loss, schedules, heat maps. Drawn by matplotlib, one figure each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ..cost.units import flops_unit
from ..run.results import Point, RunResult
from ..schedule.stages import size_text
from .figures import COLOURS, DASHES, GREY, blank_figure, short_name, styled
from .tables import task_of


def line_look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def legend(figure: Figure, labels: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Above the axes, where it hides nothing."""
    if labels:
        handles = [Line2D([], [], **look) for _, look in labels]
        names = [short_name(name) for name, _ in labels]
        columns = 2 if max(map(len, names)) > 15 else 3
        figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.2)


# -- quality and loss -------------------------------------------------------------------------------------------------


def quality(results: Sequence[RunResult], against: str = "flops") -> Figure:
    """The first metric on the full PLM against training cost, for runs of one task; growths and stages are marked.

    Below the curves a strip for every run that grows shows its stages over the same cost, stronger the larger.

    Args:
        against: `flops` or `seconds`.
    """
    by_flops = against == "flops"
    curves = [(i, r) for i, r in enumerate(results) if r.curve and r.steps]
    untrained = [r for r in results if not (r.curve and r.steps)]
    growing = [(i, r) for i, r in curves if len(r.boundaries) > 1]
    longest = max((_spent(r, p, by_flops) for _, r in curves for p in r.curve), default=1.0)
    scale, unit = flops_unit(longest) if by_flops else _time_unit(longest)
    with styled():
        figure = blank_figure(3.2 + 0.24 * len(growing))
        rows = figure.subplots(
            2 if growing else 1,
            1,
            sharex=True,
            squeeze=False,
            height_ratios=[3.0, 0.24 * len(growing)] if growing else None,
        )
        axes = rows[0, 0]
        labels: list[tuple[str, dict[str, Any]]] = []
        for i, result in curves:
            points = [(_spent(result, p, by_flops) / scale, p.metrics[result.primary]) for p in result.curve]
            xs, ys = zip(*points, strict=True)
            look = {**line_look(i), "marker": "o", "markersize": 4}
            axes.plot(xs, ys, zorder=3, **look)
            labels.append((result.name, look))
            for start in result.boundaries[1:]:
                at = _cost_at(result, start, by_flops) / scale
                axes.axvline(at, color=look["color"], linestyle=":", linewidth=1, alpha=0.8)
        for result in untrained:
            value = (result.curve[0].metrics if result.curve else result.metrics)[result.primary]
            axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
            labels.append((f"{result.name} ({value:.1f}%)", {"color": GREY, "linestyle": "--", "linewidth": 1}))
        axes.set_ylabel(f"validation {results[0].primary} (%)")
        axes.grid(alpha=0.25)
        for row, (i, result) in enumerate(growing):
            _strip(rows[1, 0], len(growing) - 1 - row, result, COLOURS[i % len(COLOURS)], by_flops, scale, longest)
        bottom = rows[-1, 0]
        if growing:
            bottom.set_yticks([])
            bottom.set_ylim(0, len(growing))
            bottom.spines["left"].set_visible(False)
            bottom.set_ylabel("stages", rotation=0, ha="right", va="center")
        bottom.set_xlabel(f"training compute ({unit}FLOPs)" if by_flops else f"training time ({unit})")
        bottom.set_xlim(left=0)
        legend(figure, labels)
    return figure


def _strip(axes: Any, row: int, result: RunResult, colour: str, by_flops: bool, scale: float, longest: float) -> None:
    """The stages of a run over its cost: one bar each, labelled where there is room on axes up to `longest`."""
    ends = [*result.boundaries[1:], result.steps]
    costs = [_cost_at(result, step, by_flops) / scale for step in (0, *ends)]
    for n, (left, right) in enumerate(pairwise(costs)):
        if right <= left:
            continue  # a run that was stopped before it got there
        shade = 0.2 + 0.6 * (n + 1) / len(ends)
        axes.add_patch(Rectangle((left, row + 0.08), right - left, 0.84, color=colour, alpha=shade, linewidth=0))
        text = _size(result.schedule[n])
        if (right - left) * scale / longest > 0.02 * len(text):
            axes.text((left + right) / 2, row + 0.5, text, ha="center", va="center", fontsize=7)


def losses(results: Sequence[RunResult]) -> Figure | None:
    """Training loss over steps for every run that logged it; None where none did. Growths are dotted lines."""
    logged = [(i, r) for i, r in enumerate(results) if len(r.losses) > 1]
    if not logged:
        return None
    with styled():
        figure = blank_figure(3.0)
        axes = figure.subplots()
        labels = []
        for i, result in logged:
            look = {**line_look(i), "linewidth": 1.2}
            axes.plot(*zip(*result.losses, strict=True), **look)
            labels.append((result.name, look))
            for start in result.boundaries[1:]:
                axes.axvline(start, color=look["color"], linestyle=":", linewidth=1, alpha=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats per token)")
        axes.grid(alpha=0.25)
        legend(figure, labels)
    return figure


# -- schedules --------------------------------------------------------------------------------------------------------


def schedules(results: Sequence[RunResult]) -> Figure | None:
    """Which layers each run trains on over its steps, the colour stronger the wider their FFN; None without training.

    Equal schedules are drawn once.
    """
    panels: list[tuple[int, str, RunResult, str]] = []
    seen: set[str] = set()
    before: dict[str, int] = {}
    for result in results:
        i = before.setdefault(task_of(result), 0)  # the colour it has among the runs of its task
        before[task_of(result)] += 1
        key = repr((result.schedule, result.kept_layers))
        if not result.schedule or key in seen:
            continue
        seen.add(key)
        same = dict.fromkeys(r.name for r in results if repr((r.schedule, r.kept_layers)) == key)
        for stack in _stacks(result):
            title = short_name(", ".join(same), 44) + (f": {stack}" if len(_stacks(result)) > 1 else "")
            panels.append((i, title, result, stack))
    if not panels:
        return None
    with styled():
        figure = blank_figure(0.4 + 1.2 * len(panels))
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (i, title, result, stack) in zip(rows, panels, strict=True):
            _layers_over_steps(axes, result, stack, COLOURS[i % len(COLOURS)])
            axes.set_title(title, loc="left", pad=14)
            axes.set_ylabel("layer")
        rows[-1].set_xlabel("step")
    return figure


def _layers_over_steps(axes: Any, result: RunResult, stack: str, colour: str) -> None:
    layers_of = [
        _layers_kept(result, n, stack, int(_size_in(stage["layers"], stack))) for n, stage in enumerate(result.schedule)
    ]
    widths = [_size_in(stage["ffn"], stack) for stage in result.schedule]
    top = max(map(max, layers_of)) + 1
    total = sum(stage["steps"] for stage in result.schedule)
    start = 0
    for stage, layers, width in zip(result.schedule, layers_of, widths, strict=True):
        for first, count in _together(layers):
            axes.add_patch(
                Rectangle(
                    (start, first + 0.5),
                    stage["steps"],
                    count,
                    facecolor=colour,
                    alpha=0.25 + 0.6 * width / max(widths),
                    linewidth=0,
                )
            )
        text = f"{len(layers)}×{width:g}"
        if stage["steps"] / total > 0.022 * len(text):
            middle = start + stage["steps"] / 2
            axes.annotate(text, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
        start += stage["steps"]
    axes.set_xlim(0, total)
    axes.set_ylim(0.5, top + 0.5)
    axes.yaxis.get_major_locator().set_params(integer=True)


def _stacks(result: RunResult) -> list[str]:
    return list(dict.fromkeys(s for stage in result.schedule for s in stage.get("stacks", ["decoder"])))


def _size_in(size: Any, stack: str) -> float:
    """A stage's size in one stack; the mean where every layer has its own."""
    size = size.get(stack, 0) if isinstance(size, Mapping) else size
    return sum(size) / len(size) if isinstance(size, Sequence) else float(size)


def _layers_kept(result: RunResult, stage: int, stack: str, layers: int) -> list[int]:
    """0-based indices of the layers a stage keeps; without a record, a run of the whole model."""
    recorded = result.kept_layers[stage].get(stack) if stage < len(result.kept_layers) else None
    return list(range(layers)) if recorded is None else sorted(recorded)


def _together(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring layers as (first, how many)."""
    groups: list[tuple[int, int]] = []
    for layer in layers:
        if groups and sum(groups[-1]) == layer:
            groups[-1] = (groups[-1][0], groups[-1][1] + 1)
        else:
            groups.append((layer, 1))
    return groups


# -- costs ------------------------------------------------------------------------------------------------------------


def _size(stage: Mapping[str, Any]) -> str:
    return f"{size_text(stage['layers'])}×{size_text(stage['ffn'])}"


def _time_unit(seconds: float) -> tuple[float, str]:
    return next(u for u in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if seconds >= 2 * u[0] or u[0] == 1.0)


def _spent(result: RunResult, point: Point, by_flops: bool) -> float:
    """What the method had spent at a point: scoring came before the first step, probing as training went."""
    if not by_flops:
        return point.train_seconds
    probing = result.flops["probe"] / result.flops["train"] if result.flops["train"] else 0.0
    return result.flops["score"] + point.train_flops * (1 + probing)


def _cost_at(result: RunResult, step: int, by_flops: bool) -> float:
    """Cost after `step` steps, between the two evaluations around it in proportion to steps."""
    before = result.flops["score"] if by_flops else 0.0
    points = [(0, before), *((p.step, _spent(result, p, by_flops)) for p in result.curve)]
    for (s0, c0), (s1, c1) in pairwise(points):
        if s0 <= step <= s1:
            return c0 if s1 == s0 else c0 + (c1 - c0) * (step - s0) / (s1 - s0)
    return points[-1][1]


# -- partial models and prompts ---------------------------------------------------------------------------------------


def fidelity(rows: Sequence[Mapping[str, Any]], full_loss: float) -> Figure:
    """Loss and agreement of partial PLMs (`fidelity.report`) against the FLOPs of a step, a line per selection."""
    names = list(dict.fromkeys(row["selection"] for row in rows))
    with styled():
        figure = blank_figure(4.8)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for i, name in enumerate(names):
            mine = sorted((r for r in rows if r["selection"] == name), key=lambda r: r["relative_flops"])
            for axes, key, full in ((upper, "agreement", 1.0), (lower, "loss", full_loss)):
                scale = 100 if key == "agreement" else 1
                xs = [100 * r["relative_flops"] for r in mine] + [100.0]
                axes.plot(
                    xs, [scale * v for v in (*(r[key] for r in mine), full)], marker="o", markersize=4, **line_look(i)
                )
        lower.axhline(full_loss, color=GREY, linewidth=0.8, linestyle=":")
        upper.set_ylabel("says what the full\nmodel says (%)")
        lower.set_ylabel("loss (nats/token)")
        lower.set_xlabel("FLOPs of a training step (% of the full model's)")
        legend(figure, [(name, {**line_look(i), "marker": "o", "markersize": 4}) for i, name in enumerate(names)])
    return figure


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], label: str) -> Figure:
    """A matrix of similarities, each cell with its number. Colours are those of −1 to 1."""
    size = max(3.0, 0.55 * len(names) + 1.8)
    with styled(**{"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = blank_figure(size, size + 0.8)
        axes = figure.subplots()
        drawn = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if abs(value) > 0.6 else "black",  # on the cell's colour, whatever the page's
                )
        shown = [short_name(name, 20) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), shown)
        axes.tick_params(length=0)
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    return figure
