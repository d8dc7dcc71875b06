"""Figures: one style for all, saved as PNG or SVG, or inlined into a page, where text takes the page's colour."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import ConfigError

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
def styled(**more: Any) -> Iterator[None]:
    """Our style, whatever the user's; names in a script that the font lacks are drawn as boxes, not warned of."""
    with warnings.catch_warnings(), rc_context({**_STYLE, **more}):  # type: ignore[dict-item]
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


def blank_figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever the user's default backend
    return figure


def short_name(text: str, longest: int = 28) -> str:
    """A run's name for a legend: one line, not too long, and no leading underscore, which would hide it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())  # XML has no control characters
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line


def save(figure: Figure, path: str | Path) -> Path:
    """Save a figure as `.png` or `.svg`, on white; its folder is made if need be.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = Path(path)
    more: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            figure.savefig(path, dpi=200, facecolor="white", **more)
    except OSError as error:
        raise ConfigError(f"the picture {str(path)!r} cannot be written: {error.strerror or error}") from error
    return path


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
    with styled(**{"svg.fonttype": "none"}):
        figure.savefig(handle, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(handle.getvalue())
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith("}metadata")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rsplit("}")[-1]
        for name, value in list(element.attrib.items()):
            short = name.rsplit("}")[-1]
            if short == "id":
                value = prefix + value
            elif value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            del element.attrib[name]
            element.attrib[short] = _in_page_colours(value.replace("url(#", f"url(#{prefix}"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


_PAGE_COLOURS = {INK: "currentColor", **{c: f"var(--run-{i}, {c})" for i, c in enumerate(COLOURS)}}


def _in_page_colours(value: str) -> str:
    if "fill" in value or "stroke" in value:
        for colour, new in _PAGE_COLOURS.items():
            value = value.replace(f": {colour}", f": {new}")
    return value
