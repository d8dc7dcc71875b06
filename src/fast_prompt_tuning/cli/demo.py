"""`fpt demo`: plain prompt tuning, the paper's FPT and `auto` on a real model and real text, on two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from ..files import write_atomic
from ..recipe import RunConfig, load, override
from ..report.figures import save
from ..report.page import find_runs, render
from ..report.pictures import quality
from ..report.tables import comparison_table, table_rows
from ..run import run
from ..run.folder import Earlier, check_folder
from ..run.results import RunResult, save_result
from ..run.session import open_session
from .progress import reporting

RECIPE = "bbc_topics_smollm2"
RUNS = {"plain": ("pt", "plain PT"), "cr": ("cr", "FPT-CR"), "auto": ("auto", "auto")}
"""The runs by name: method, and what tables call them. The first is what the others are compared with."""


def demo(
    console: Console,
    answers: Console,
    *,
    output: str,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the comparison and write `result.json`, `quality.png`, `report.html` and the runs into `output`.

    Returns:
        The content of `result.json`: accuracy, FLOPs and seconds of zero-shot and of every run.

    Raises:
        FptError: as `run.train`.
    """
    folder = Path(output)
    there = [name for name in ("result.json", "report.html", "quality.png") if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"output={output!r} holds a {there[0]} already; add --overwrite or choose another --output")
    configs: dict[str, RunConfig] = {
        name: load(RECIPE, [*overrides, f"method={m}", override("output", str(folder / name)), f"name={label}"])
        for name, (m, label) in RUNS.items()
    }
    baseline = configs["plain"]
    for config in configs.values():
        check_folder(config, Earlier.OVERWRITE if overwrite else Earlier.REFUSE)
    subject = escape(f"{baseline.model.path} on {baseline.data.task}")
    console.print(f"[bold]Fast Prompt Tuning[/bold]: {subject}", highlight=False)
    console.print("loading the model and the articles …")
    session = open_session(baseline, ("train", "validation", "test"))
    train, validation, test = (len(session.encoded[split]) for split in ("train", "validation", "test"))
    console.print(
        f"  {session.plm.config.num_hidden_layers} layers, {session.plm.num_parameters() / 1e6:.0f}M frozen weights "
        f"({str(session.plm.dtype).removeprefix('torch.')}); {train} training articles, "
        f"{validation} for validation, {test} for the final test, cut to {baseline.data.max_input_tokens} tokens",
        highlight=False,
        soft_wrap=True,
    )
    console.print("[bold]zero-shot[/bold] …")
    results: list[RunResult] = [run.zero_shot(session)]
    console.print(f"  {results[0].primary} {results[0].metrics[results[0].primary]:.1f}%", highlight=False)
    for config in configs.values():
        console.print(f"[bold]{escape(str(config.name))}[/bold], {config.train.steps} steps", highlight=False)
        with reporting(console, str(config.name), session) as (callbacks, hook):
            result = run.train(config, overwrite=overwrite, callbacks=callbacks, session=session, on_schedule=hook)
        results.append(result)
        if result.status != "finished":
            break
    answers.print()
    answers.print(comparison_table(results, f"On the full model, {test} test articles no run has seen"))
    picture = save(quality(results), folder / "quality.png")
    _show_predictions(console, Path(results[-1].config["output"]) / "predictions.jsonl")
    record = {
        "recipe": RECIPE,
        "status": results[-1].status,
        "reason": results[-1].reason,
        "environment": results[-1].environment,
        "runs": dict(zip(("zero_shot", *RUNS), table_rows(results), strict=False)),
        "prompt_folder": results[-1].prompt_folder,
        "picture": str(picture),
    }
    write_atomic(folder / "result.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    save_result(results[0], folder / "zero-shot")
    runs = find_runs([folder / "zero-shot", *(Path(r.config["output"]) for r in results[1:])])
    write_atomic(folder / "report.html", render(runs))
    tuned = f'{results[-1].prompt_folder}  (fpt predict {results[-1].config["output"]} "some text")'
    for what, where in (
        ("report    ", folder / "report.html"),
        ("picture   ", picture),
        ("result    ", folder / "result.json"),
        ("prompt    ", tuned),
    ):
        console.print(f"{what}{where}", markup=False, highlight=False, soft_wrap=True)
    if results[-1].status == "finished":
        console.print(f"\n{_take_home(results[1:])}", highlight=False, soft_wrap=True)
    return record


def _take_home(results: Sequence[RunResult]) -> str:
    plain, *others = table_rows(results)
    ends = " and ".join(
        f"{escape(row['name'])} at {row['value']:.1f}% for {100 * row['relative_flops']:.0f}%" for row in others
    )
    return (
        f"On {plain['metric']}, plain prompt tuning ended at {plain['value']:.1f}%; {ends} of its training FLOPs. "
        "A recipe that names no method takes auto."
    )


def _show_predictions(console: Console, path: Path, number: int = 6) -> None:
    """A few held-out examples, wrong ones among them if there are any."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wrong = [r for r in rows if r["prediction"] not in r["gold"]][: number // 3]
    right = [r for r in rows if r["prediction"] in r["gold"]][: number - len(wrong)]
    table = Table(title="Predictions of the last prompt", title_justify="left", header_style="bold")
    for name in ("article", "gold", "predicted"):
        table.add_column(name, no_wrap=name != "article")
    for row in right + wrong:
        colour = "green" if row["prediction"] in row["gold"] else "red"
        headline = row["input"].split("\n")[0][:60]
        table.add_row(
            escape(headline), escape(" / ".join(row["gold"])), f"[{colour}]{escape(row['prediction'])}[/{colour}]"
        )
    console.print(table)
