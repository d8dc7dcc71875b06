"""Pictures of runs: quality against cost, loss, schedules, heat maps. Drawn by matplotlib, one figure each.

A figure is saved as PNG or SVG (`save`), or inlined into a page (`inline_svg`), where text takes the page's colour.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ..cost.units import flops_unit, size_text
from ..errors import ConfigError
from ..run.results import Point, RunResult
from .tables import task_of

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme: told apart by colour-blind readers and in grey."""
DASHES = ("-", "--", ":")
"""Line styles, for more runs than colours."""
INK = "#1f2328"
"""Text and axes; `inline_svg` gives them the page's colour instead."""
GREY = "#808080"
WIDTH = 4.8
"""Inches: at this width the text is readable on a phone and not too large in two columns."""

_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a run may be called "$5"
    "svg.hashsalt": "fast-prompt-tuning",
}


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """Our style, whatever the user's; names in a script that the font lacks are drawn as boxes, not warned of."""
    with warnings.catch_warnings(), rc_context({**_STYLE, **more}):  # type: ignore[dict-item]
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


def figure_of(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever the user's default backend
    return figure


def _name(text: str, longest: int = 28) -> str:
    """A run's name for a legend: one line, not too long, and no leading underscore, which would hide it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())  # XML has no control characters
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line


def line_look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def legend(figure: Figure, labels: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Above the axes, where it hides nothing."""
    if labels:
        handles = [Line2D([], [], **look) for _, look in labels]
        names = [_name(name) for name, _ in labels]
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
    flat = [r for r in results if not (r.curve and r.steps)]
    growing = [(i, r) for i, r in curves if len(r.boundaries) > 1]
    longest = max((_spent(r, p, by_flops) for _, r in curves for p in r.curve), default=1.0)
    scale, unit = flops_unit(longest) if by_flops else _time_unit(longest)
    with style():
        figure = figure_of(3.2 + 0.24 * len(growing))
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
        for result in flat:
            value = (result.curve[0].metrics if result.curve else result.metrics)[result.primary]
            axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
            labels.append((f"{result.name} ({value:.1f}%)", {"color": GREY, "linestyle": "--", "linewidth": 1}))
        axes.set_ylabel(f"{results[0].primary} (%), full model")
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
    with style():
        figure = figure_of(3.0)
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
            title = _name(", ".join(same), 44) + (f": {stack}" if len(_stacks(result)) > 1 else "")
            panels.append((i, title, result, stack))
    if not panels:
        return None
    with style():
        figure = figure_of(0.4 + 1.2 * len(panels))
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (i, title, result, stack) in zip(rows, panels, strict=True):
            _layers_over_steps(axes, result, stack, COLOURS[i % len(COLOURS)])
            axes.set_title(title, loc="left", pad=14)
            axes.set_ylabel("layer")
        rows[-1].set_xlabel("step")
    return figure


def _layers_over_steps(axes: Any, result: RunResult, stack: str, colour: str) -> None:
    kept = [_kept(result, n, stack, int(_size_in(stage["layers"], stack))) for n, stage in enumerate(result.schedule)]
    widths = [_size_in(stage["ffn"], stack) for stage in result.schedule]
    top = max(max(layers) for layers in kept) + 1
    total = sum(stage["steps"] for stage in result.schedule)
    start = 0
    for stage, layers, width in zip(result.schedule, kept, widths, strict=True):
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


def _kept(result: RunResult, stage: int, stack: str, layers: int) -> list[int]:
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
    with style():
        figure = figure_of(4.8)
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
    with style(**{"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(size + 0.8, size), layout="constrained")
        FigureCanvasAgg(figure)
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
        shown = [_name(name, 20) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), shown)
        axes.tick_params(length=0)
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    return figure


# -- files ------------------------------------------------------------------------------------------------------------


def save(figure: Figure, path: str | Path) -> Path:
    """Save a figure as `.png` or `.svg`, on white; its folder is made if need be.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = Path(path)
    more: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure.savefig(path, dpi=200, facecolor="white", **more)
    except OSError as error:
        raise ConfigError(f"the picture {str(path)!r} cannot be written: {error.strerror or error}") from error
    return path


def draw_quality(results: Sequence[RunResult], path: str | Path, *, against: str = "flops") -> Path:
    """`quality` as a `.png` or `.svg` file."""
    return save(quality(results, against), path)


def inline_svg(figure: Figure, label: str, prefix: str) -> str:
    """A figure as an `<svg>` element for an HTML page: no address, no id of another picture, colours of the page.

    Args:
        label: what the picture shows, for who cannot see it.
        prefix: makes the ids unique in the page.

    Returns:
        Markup whose text and axes have the colour of the text around it, and whose runs have the CSS colours
        `--run-0`, `--run-1`, … where the page defines them.
    """
    handle = io.StringIO()
    with style(**{"svg.fonttype": "none"}):
        figure.savefig(handle, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(handle.getvalue())
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith("}metadata")]:
            parent.remove(child)
    recolour = _recolour()
    for element in root.iter():
        element.tag = element.tag.rsplit("}")[-1]
        for name, value in list(element.attrib.items()):
            short = name.rsplit("}")[-1]
            if short == "id":
                value = prefix + value
            elif value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            del element.attrib[name]
            element.attrib[short] = recolour(value.replace("url(#", f"url(#{prefix}"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _recolour() -> Callable[[str], str]:
    changes = {INK: "currentColor", **{c: f"var(--run-{i}, {c})" for i, c in enumerate(COLOURS)}}

    def recolour(value: str) -> str:
        if "fill" in value or "stroke" in value:
            for colour, new in changes.items():
                value = value.replace(f": {colour}", f": {new}")
        return value

    return recolour
