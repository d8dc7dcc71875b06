"""Draw `house.svg`: the packages and who imports whom. `python docs/pictures/house.py` makes it anew."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import fast_prompt_tuning
from fast_prompt_tuning.report.figures import COLOURS, GREY, save

SOURCE = Path(fast_prompt_tuning.__file__).parent
APART = {"__init__", "__main__"}


def packages() -> dict[str, list[Path]]:
    """The packages and their files."""
    return {p.name: sorted(p.rglob("*.py")) for p in sorted(SOURCE.iterdir()) if (p / "__init__.py").is_file()}


def for_all() -> list[str]:
    """Modules beside the packages, which every package may import."""
    return sorted(p.stem for p in SOURCE.glob("*.py") if p.stem not in APART)


def imports(files: list[Path], names: set[str]) -> set[str]:
    """The packages that files import from."""
    found: set[str] = set()
    for path in files:
        depth = len(path.relative_to(SOURCE).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return found & names


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    """How many packages stand below each, at most, one on another."""
    found: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((level(other) for other in arrows[name]), default=-1)
        return found[name]

    for name in arrows:
        level(name)
    return found


def draw(path: Path) -> Path:
    """Boxes stand on what they import; an arrow that follows from two others is left out."""
    files = packages()
    arrows = {name: imports(paths, set(files)) - {name} for name, paths in files.items()}
    rows = levels(arrows)
    places: dict[str, tuple[float, float]] = {}
    for row in range(max(rows.values()) + 1):
        here = [name for name in files if rows[name] == row]
        for n, name in enumerate(here):
            places[name] = 5.0 * (n - (len(here) - 1) / 2), 1.25 * row
    figure = Figure(figsize=(7.6, 0.95 * (len(set(rows.values())) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (x, y) in places.items():
        text = ast.get_docstring(ast.parse(files[name][0].read_text(encoding="utf-8"))) or ""
        box(axes, x, y, f"{name}/", _first(text))
        for other in sorted(arrows[name]):
            if any(other in arrows[between] for between in arrows[name]):
                continue
            a, b = places[other]
            look = {"arrowstyle": "-|>", "mutation_scale": 8, "color": GREY, "linewidth": 0.8, "zorder": 1}
            ends = ((x, y), (a, b + 0.78))
            if rows[name] - rows[other] > 1:  # around the boxes between
                ends = ((x + 2.35, y + 0.39), (a + 2.35, b + 0.39))
                look["connectionstyle"] = "arc3,rad=-0.25"
            axes.add_patch(FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, **look))
    box(axes, 0, -1.25, ", ".join(f"{name}.py" for name in for_all()), "for every package above")
    spread = max(abs(x) for x, _ in places.values()) + 3.0
    axes.set_xlim(-spread, spread)
    axes.set_ylim(-1.35, 1.25 * max(rows.values()) + 0.9)
    axes.axis("off")
    return save(figure, path)


def box(axes: Any, x: float, y: float, title: str, text: str) -> None:
    """A box whose bottom edge has its middle at `(x, y)`."""
    look = {"boxstyle": "round,pad=0.02,rounding_size=0.12", "facecolor": "white", "edgecolor": COLOURS[0]}
    axes.add_patch(FancyBboxPatch((x - 2.35, y), 4.7, 0.78, linewidth=1.1, zorder=2, **look))
    axes.text(x, y + 0.53, title, ha="center", va="center", fontsize=9, weight="bold", zorder=3)
    axes.text(x, y + 0.22, text, ha="center", va="center", fontsize=6.5, color="#404040", zorder=3)


def _first(text: str) -> str:
    """The first line of a docstring, broken in two where it is long."""
    line = text.split("\n")[0].rstrip(".")
    if len(line) <= 62:
        return line
    middle = line.rfind(" ", 0, len(line) // 2 + 8)
    return f"{line[:middle]}\n{line[middle + 1 :]}"


if __name__ == "__main__":
    draw(Path(__file__).with_name("house.svg"))
