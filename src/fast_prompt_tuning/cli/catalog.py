"""The commands that show what there is: `fpt ls` and `fpt show`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from ..paths import built_in
from .console import emit, people, quiet_libraries, wants_json


def ls(
    what: Annotated[str, typer.Argument(help="recipes, tasks, families or methods; default all.")] = "all",
) -> None:
    """List what is built in: recipes, tasks, model families, methods. Next: `fpt show task NAME`, `fpt plan`."""
    from ..plm import families

    kinds: dict[str, Any] = {
        "recipes": lambda: {name: _first_comment(path) for name, path in built_in("recipes").items()},
        "tasks": _task_lines,
        "families": lambda: {name: " + ".join(families.REGISTRY[name].stacks) for name in families.names()},
        "methods": lambda: dict(METHOD_TEXTS),
    }
    if what != "all" and what not in kinds:
        raise ConfigError(f"what={what!r} is unknown; choose one of {', '.join(kinds)}")
    listed = {kind: entries() for kind, entries in kinds.items() if what in ("all", kind)}
    if wants_json():
        emit(listed)
        return
    for kind, entries in listed.items():
        table = Table(title=kind, title_justify="left", show_header=False, box=None)
        for name, text in entries.items():
            table.add_row(f"[bold]{escape(name)}[/bold]", escape(text))
        people().print(table)


METHOD_TEXTS = {
    "pt": "plain prompt tuning on the full model (Lester et al. 2021)",
    "ld": "layer dropping: 25, 50, 75% of the layers for 20% of the steps each, then the full model",
    "fr": "FFN reduction: 25, 50, 75% of the feed-forward neurons, by activation score, likewise",
    "cr": "compound reduction: both",
    "auto": "chooses place, rate and stages; grows by the full model's held-out loss, never costs much more than pt",
    "full": "fine-tuning of all weights, as a baseline",
}


def _first_comment(recipe: Path) -> str:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return comment.split(". ")[0].rstrip(".") + "."


def _task_lines() -> dict[str, str]:
    from ..data.task_files import load_task

    return {name: load_task(name).description for name in built_in("tasks")}


def show(
    what: Annotated[str, typer.Argument(help="task, or recipe.")],
    name: Annotated[str, typer.Argument(help="Its name, or the path of a YAML file.")],
    model: Annotated[str | None, typer.Option(help="Also count tokens with this model's tokenizer.")] = None,
    split: Annotated[str, typer.Option(help="Split of the task.")] = "train",
    file: Annotated[str | None, typer.Option(help="Local file to read instead of the task's own source.")] = None,
    limit: Annotated[int, typer.Option(help="Examples to count lengths over.")] = 500,
) -> None:
    """Show three rendered examples of a task and its lengths, or a recipe's text: see mistakes before training."""
    if what == "recipe":
        from ..recipe import load

        recipe = load(name)
        if wants_json():
            emit(recipe.model_dump(mode="json"))
        else:
            sys.stdout.write(recipe.to_yaml())
        return
    if what != "task":
        raise ConfigError(f"WHAT={what!r} is unknown; choose task or recipe")
    from ..data.readers import load_examples
    from ..data.task_files import load_task

    quiet_libraries()
    task = load_task(name)
    tokenizer, decoder = None, task.decoder is not None
    if model is not None:
        from transformers import AutoConfig

        from ..plm.loading import load_tokenizer, locate

        tokenizer = load_tokenizer(model)
        decoder = not AutoConfig.from_pretrained(locate(model)).is_encoder_decoder
    files = {split: file} if file else None
    rows = load_examples(task, split, decoder=decoder, files=files, limit=limit, tokenizer=tokenizer)
    count = (lambda t: len(tokenizer(t)["input_ids"])) if tokenizer else (lambda t: len(t.split()))
    unit = "tokens" if tokenizer else "words"
    lengths = {field: _percentiles([count(text) for text in rows[field]]) for field in ("input", "target")}
    shown = shown_of(list(rows)[:3])
    if wants_json():
        emit({"task": task.name, "split": split, "examples": shown, "counted": len(rows), unit: lengths})
        return
    console = people()
    print_examples(console, f"{task.name} {split}", shown)
    table = Table(title=f"lengths of {len(rows)} examples", title_justify="left", header_style="bold")
    for column in ("", *lengths["input"]):
        table.add_column(column, justify="right" if column else "left")
    for field, percentiles in lengths.items():
        table.add_row(f"{field} ({unit})", *map(str, percentiles.values()))
    console.print(table)


def shown_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is shown of rendered examples."""
    return [{key: row[key] for key in ("id", "input", "target", "references")} for row in rows]


def print_examples(console: Any, title: str, rows: list[dict[str, Any]]) -> None:
    """Rendered examples, one below the other."""
    for row in rows:
        console.rule(f"{title} {row['id']}", align="left")
        console.print(f"[bold]input[/bold]   {escape(_shortened(row['input']))}", highlight=False)
        console.print(f"[bold]target[/bold]  {escape(repr(row['target']))}", highlight=False)
        gold = json.dumps(row["references"], ensure_ascii=False)
        console.print(f"[bold]gold[/bold]    {escape(gold)}", highlight=False)


def _percentiles(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    percentiles = {f"{p}%": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (5, 25, 50, 75, 95)}
    return {**percentiles, "longest": ordered[-1]}


def _shortened(text: str, head: int = 400, tail: int = 200) -> str:
    """Both ends of a long text: a template's mistakes show there."""
    if len(text) <= head + tail + 40:
        return text
    return f"{text[:head]} [… {len(text) - head - tail} characters …] {text[-tail:]}"
