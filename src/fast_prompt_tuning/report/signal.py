"""The signal of stages (`run.signal.report`) as a picture and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .figures import GREY, blank_figure, styled
from .pictures import legend, line_look


def asked_at(record: Mapping[str, Any], prompt: Mapping[str, Any]) -> str:
    """What a prompt is called: `initial prompt`, `after 8 steps`, or the run it is of."""
    if record["at"] is not None:
        return f"prompt of {record['at']}"
    return f"after {prompt['step']} steps" if prompt["step"] else "initial prompt"


def picture(record: Mapping[str, Any]) -> Figure:
    """Cosine, and signal per FLOP relative to plain, against a step's FLOPs, at every prompt; a line per group.

    The full PLM on parts of the batch is the line to beat. Bars are 95% intervals; they may leave the axes.
    """
    prompts = record["prompts"]
    groups = list(dict.fromkeys(row["group"] for row in prompts[0]["rows"].values()))
    looks = {group: {**line_look(i), "marker": "o", "markersize": 4} for i, group in enumerate(groups)}
    with styled():
        figure = blank_figure(4.8)
        axes = figure.subplots(2, len(prompts), sharex=True, sharey="row", squeeze=False)
        for (upper, lower), prompt in zip(axes.T, prompts, strict=True):
            for group in groups:
                rows = sorted((r for r in prompt["rows"].values() if r["group"] == group), key=lambda r: r["flops"])
                xs = [100 * row["flops"] for row in rows]
                for place, key in ((upper, "cosine"), (lower, "per_flop")):
                    values = [row[key]["value"] for row in rows]
                    reach = [row[key]["high"] - row[key]["value"] for row in rows]
                    place.errorbar(xs, values, reach, elinewidth=0.8, **looks[group])
            upper.set_title(asked_at(record, prompt))
            for place, level in ((upper, 0), (lower, 1)):
                place.axhline(level, color=GREY, linewidth=0.8, linestyle=":")
            lower.set_xlabel("FLOPs of a step (% of plain)")
        axes[0, 0].set_ylim(-1.1, 1.1)
        axes[0, 0].set_ylabel("cosine of mean\ngradients")
        shown = [row["per_flop"]["value"] for prompt in prompts for row in prompt["rows"].values()]
        shown = [0.0, 1.0, *(value for value in shown if value == value)]
        margin = 0.1 * (max(shown) - min(shown))
        axes[1, 0].set_ylim(min(shown) - margin, max(shown) + margin)
        axes[1, 0].set_ylabel("signal per FLOP\n(plain: 1)")
        legend(figure, list(looks.items()))
    return figure


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """One table for every prompt: candidates beside a plain step."""
    for prompt in record["prompts"]:
        moved = f" (the prompt has moved by {prompt['moved']:.2f} of its norm)" if "moved" in prompt else ""
        noise = f"as much noise as direction in {prompt['noise']:.1f} examples; plain steps have {record['batch']}"
        title = f"{asked_at(record, prompt)}{moved}\n{noise}"
        table = Table(
            title=title,
            title_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("stage")
        for name in ("FLOPs", "time", "cosine", "per FLOP", "per s", "per batch", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for name, row in prompt["rows"].items():
            table.add_row(
                name,
                f"{row['flops']:.0%}",
                f"{row['seconds']:.0%}",
                interval(row["cosine"]),
                interval(row["per_flop"]),
                _number(row["per_second"]["value"]),
                _number(row["per_batch"]["value"]),
                "saves" if row["saves"] else "",
            )
        yield table


def interval(estimate: Mapping[str, float]) -> str:
    """An estimate and how far its interval reaches, as `0.58±0.15`."""
    return f"{_number(estimate['value'])}±{estimate['high'] - estimate['value']:.2f}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
