"""How runs compare: their numbers beside each other, as records and as tables for the terminal."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..cost.units import flops_unit, human_seconds
from ..run.results import RunResult


def task_of(result: RunResult) -> str:
    """The task of a run as people call it: a built-in's name, the stem of a task's file, or folder and stem of data."""
    data = result.config.get("data", {})
    if data.get("task"):
        return Path(data["task"]).stem
    file = (data.get("files") or {}).get("validation")
    return f"own data {'/'.join(Path(file).with_suffix('').parts[-2:])}" if file else "own data"


def by_task(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs of one task and one metric, in order, by the name of their table."""
    metrics: dict[str, set[str]] = {}
    for result in results:
        metrics.setdefault(task_of(result), set()).add(result.primary)
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        task = task_of(result)
        groups.setdefault(task if len(metrics[task]) == 1 else f"{task}, {result.primary}", []).append(result)
    return groups


def spent_flops(result: RunResult) -> float:
    """What the method itself spent: training, scoring and probing.

    Evaluation is counted apart, since it is the user's choice and the same for every method.
    """
    return result.flops["train"] + result.flops["score"] + result.flops["probe"]


def stopped_at(plain: RunResult, flops: float, metric: str) -> float:
    """The best value plain prompt tuning had reached for at most `flops`; its first one if even that cost more."""
    reached = [p.metrics[metric] for p in plain.curve if p.train_flops <= flops]
    return max(reached) if reached else plain.curve[0].metrics[metric]


def improvement(result: RunResult, plain: RunResult | None) -> float | None:
    """The paper's "Improve": points gained over plain prompt tuning stopped at the same FLOPs, on validation data.

    None for plain prompt tuning itself, and where there is nothing to compare with.
    """
    if plain is None or result.method == "none" or not (result.curve and plain.curve):
        return None
    if result.method == "pt" and _prompt_place(result) == _prompt_place(plain):
        return None
    metric = result.primary
    end = next((p for p in result.curve if p.step == result.best_step), result.curve[-1])
    if metric not in end.metrics or any(metric not in p.metrics for p in plain.curve):
        return None
    return end.metrics[metric] - stopped_at(plain, spent_flops(result), metric)


def _prompt_place(result: RunResult) -> str:
    return str(result.config.get("prompt", {}).get("placement", "prefix"))


def plain_run(result: RunResult, results: Sequence[RunResult]) -> RunResult | None:
    """The first run of method `pt` that a run is compared with: the same task, model and validation examples.

    Its prompt stands in front of the text, as the paper's does, unless no such run is there.
    """

    def data(run: RunResult) -> Any:
        return task_of(run), run.fingerprints.get("validation")

    def of_one_model(one: RunResult, other: RunResult) -> bool:
        hashes = [r.fingerprints.get("model") for r in (one, other)]
        if all(hashes) and "full" not in (one.method, other.method):  # of all weights tuned, the model is another one
            return hashes[0] == hashes[1]
        models = [r.config.get("model", {}) for r in (one, other)]
        return all(models[0].get(key) == models[1].get(key) for key in ("path", "revision"))

    same = [r for r in results if r.method == "pt" and data(r) == data(result) and of_one_model(r, result)]
    return next((r for r in same if _prompt_place(r) == "prefix"), next(iter(same), None))


def table_rows(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One plain record per run; costs relative to its `plain_run`, where there is one.

    `flops` is `spent_flops`, `improve` is `improvement`.
    """
    rows = []
    for result in results:
        plain, spent = plain_run(result, results), spent_flops(result)
        base = plain.flops["train"] if plain else 0.0
        low, high = result.intervals[result.primary]
        rows.append(
            {
                "name": result.name,
                "task": task_of(result),
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
                "improve": improvement(result, plain),
                "status": result.status,
            }
        )
    return rows


def average_rows(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """The paper's Table 2 of any runs: one record per method, averaged over tasks.

    Runs are one row if they are called the same once the task's name is left out. Only rows that have every task are
    averaged: a mean over other tasks would compare unlike numbers. Several runs in a cell (seeds) count as their mean.

    Returns:
        `name`, `values` (task -> metric), `average`, `relative_flops`, `relative_seconds` and `improve`; None where it
        cannot be had.
    """
    records = table_rows(results)
    tasks = list(dict.fromkeys(r["task"] for r in records))
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        # Between other characters than letters and digits alone: the task "a" is in the name "plain-a" once.
        task = rf"(?<![^\W_]){re.escape(record['task'])}(?![^\W_])"
        name = re.sub(task, "", record["name"]).strip(" -_/.,:") or record["method"]
        groups.setdefault(name, []).append(record)

    def mean(runs: list[dict[str, Any]], what: str) -> float | None:
        """Over tasks, of the means of each task's runs."""
        cells = [[r[what] for r in runs if r["task"] == task] for task in tasks]
        if any(not cell or None in cell for cell in cells):
            return None
        return statistics.fmean(statistics.fmean(cell) for cell in cells)

    return [
        {
            "name": name,
            "values": {
                t: statistics.fmean(r["value"] for r in runs if r["task"] == t)
                for t in tasks
                if any(r["task"] == t for r in runs)
            },
            "average": mean(runs, "value"),
            **{what: mean(runs, what) for what in ("relative_flops", "relative_seconds", "improve")},
        }
        for name, runs in groups.items()
    ]


def comparison_table(results: Sequence[RunResult], title: str | None = None, *, improve: bool = False) -> Table:
    """The comparison of runs on one task as a `rich` table that fits 80 columns.

    Args:
        improve: with the paper's last column (`improvement`), and time relative to plain prompt tuning alone.
    """
    rows = table_rows(results)
    scale, prefix = flops_unit(max(row["flops"] for row in rows))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        f"{rows[0]['metric']} %": lambda row: number(row["value"]),
        "95% range": lambda row: "–".join(map(number, row["interval"])),
        f"{prefix}FLOPs": lambda row: f"{row['flops'] / scale:.3g}" if row["flops"] else "none",
        "of plain": lambda row: percent(row["relative_flops"]),
        "time": lambda row: human_seconds(row["seconds"]) if row["seconds"] else "none",
        " of plain": lambda row: percent(row["relative_seconds"]),
    }
    if improve:
        del columns["time"]
        columns["time"] = columns.pop(" of plain")
        columns["Improve"] = lambda row: signed(row["improve"])
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")  # the only one that gives way in a narrow terminal
    for name in columns:
        table.add_column(name.strip(), justify="right", no_wrap=True)
    for row in rows:
        status = "" if row["status"] in ("finished", "evaluated") else f" ({row['status']})"
        table.add_row(escape(row["name"] + status), *(text(row) for text in columns.values()))
    return table


def average_table(results: Sequence[RunResult]) -> Table:
    """`average_rows` as a `rich` table."""
    rows = average_rows(results)
    tasks = list(dict.fromkeys(task_of(r) for r in results))
    table = Table(
        title="Averages over tasks", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("runs")
    for name in (*tasks, "average", "FLOPs", "time", "Improve"):
        table.add_column(escape(name), justify="right")
    for row in rows:
        table.add_row(
            escape(row["name"]),
            *(number(row["values"].get(task)) for task in tasks),
            number(row["average"]),
            percent(row["relative_flops"]),
            percent(row["relative_seconds"]),
            signed(row["improve"]),
        )
    return table


def number(value: float | None) -> str:
    """One decimal; a dash where there is none."""
    return "–" if value is None else f"{value:.1f}"


def percent(part: float | None) -> str:
    """A part of one as whole percent; a dash where there is none."""
    return "–" if part is None else f"{100 * part:.0f}%"


def signed(points: float | None) -> str:
    """A difference with its sign; a dash where there is none."""
    return "–" if points is None else f"{points:+.1f}"
