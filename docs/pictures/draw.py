"""Draw `how_it_works.svg`: one prompt under a growing model. `python docs/pictures/draw.py` makes it anew."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fast_prompt_tuning.plm.selection import evenly
from fast_prompt_tuning.report.figures import COLOURS, save
from fast_prompt_tuning.schedule.stages import Schedule, Stage

FULL = Stage(12, 2048)


def draw(path: Path) -> Path:
    """The paper's compound reduction of a model of 12 layers: kept layers as bars, as long as their FFNs are wide."""
    schedule = Schedule.preset("cr", FULL, total_steps=100)
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for n, stage in enumerate(schedule.stages):
        left, kept = 1.25 * n, evenly(int(stage.layers), 12)
        for layer in range(12):
            width = stage.ffn / FULL.ffn if layer in kept else 1.0
            look = {"facecolor": COLOURS[0], "alpha": 0.85} if layer in kept else {"fill": False, "alpha": 0.25}
            axes.add_patch(Rectangle((left, layer + 1.6), width, 0.75, linewidth=0.8, edgecolor="#808080", **look))
        axes.add_patch(Rectangle((left, 0.3), 1.0, 0.8, facecolor=COLOURS[1]))
        size = "full model" if stage.is_full(FULL) else f"{stage.layers} layers × {stage.ffn}"
        axes.text(left + 0.5, 14.2, f"{stage.steps}% of the steps", ha="center", fontsize=9)
        axes.text(left + 0.5, -0.5, size, ha="center", fontsize=9)
        if n:
            arrow = {"arrowstyle": "->", "color": COLOURS[1]}
            axes.annotate("", (left - 0.01, 0.7), (left - 0.24, 0.7), arrowprops=arrow)
    axes.text(-0.08, 0.7, "soft prompt", ha="right", va="center", fontsize=9, color=COLOURS[1])
    axes.text(-0.08, 7.5, "frozen layers", ha="right", va="center", fontsize=9, color=COLOURS[0])
    axes.set_xlim(-0.95, 5.0)
    axes.set_ylim(-1, 15)
    axes.axis("off")
    return save(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).with_name("how_it_works.svg"))
