"""The commands that look back at runs: `fpt compare` and `fpt report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..errors import ConfigError
from ..files import write_atomic
from .console import emit, listed, people, progress, quiet_libraries, say, signal_code, wants_json

if TYPE_CHECKING:
    from ..recipe import RunConfig
    from ..report.page import Run
    from ..run.results import RunResult

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, or a folder that holds them; plain PT first.")
]
FORMATS = ("png", "svg")


def compare(
    folders: Runs,
    adapters: Annotated[
        str | None,
        typer.Option(
            "--with", help="lora, prefix or lora,prefix: train these as the first prompt was, into folders beside it."
        ),
    ] = None,
) -> None:
    """Runs side by side: quality, FLOPs, time, Improve. Next: `fpt report RUN…`, `fpt eval RUN…`."""
    from ..report.page import find_runs
    from ..report.tables import average_rows, average_table, by_task, comparison_table, table_rows

    runs = find_runs(folders)
    results = [run.result for run in runs]
    if wanted := list(dict.fromkeys(listed(adapters or ""))):
        named = {run.folder.resolve() for run in runs}
        made = _adapters_beside(runs, wanted)
        results += [result for folder, result in made.items() if folder.resolve() not in named]
    tasks = by_task(results)
    if wants_json():
        emit({"runs": table_rows(results), "averages": average_rows(results) if len(tasks) > 1 else []})
        return
    out = people()
    for task, of_task in tasks.items():
        gains = any(row["improve"] is not None for row in table_rows(of_task))
        out.print(comparison_table(of_task, escape(f"{task}, on the full model"), improve=gains))
    if len(tasks) > 1:
        out.print(average_table(results))


def _adapters_beside(runs: list[Run], kinds: list[str]) -> dict[Path, RunResult]:
    """Adapters trained as the first trained prompt was, by their folders; what is there is not trained again."""
    from ..prompt.adapted import ADAPTERS
    from ..run.adapters import earlier, folder_of, recipe_for

    prompts = [run for run in runs if run.result.steps and run.result.method not in ADAPTERS]
    run = (prompts or runs)[0]
    recipes = {kind: recipe_for(run.result, folder_of(run.folder, kind), kind) for kind in kinds}
    found = {kind: earlier(recipe) for kind, recipe in recipes.items()}
    quiet_libraries()
    for kind, recipe in recipes.items():
        if found[kind] is not None:
            continue
        progress().print(f"{kind}, as {run.result.name} was trained → {recipe.output}", markup=False, highlight=False)
        found[kind] = result = _adapter(recipe, kind, run.result.split)
        if result.status == "interrupted":
            people().print("[yellow]interrupted[/yellow]: the same command trains it again")
            raise typer.Exit(signal_code(result.reason))
    return {Path(recipes[kind].output): result for kind, result in found.items() if result is not None}


def _adapter(recipe: RunConfig, kind: str, split: str) -> RunResult:
    """One adapter, trained; its model is let go of before the next one is loaded."""
    from ..run.adapters import train_adapter
    from ..run.session import open_session
    from .progress import reporting

    session = open_session(recipe, dict.fromkeys(("train", "validation", split)))
    with reporting(progress(), str(recipe.name), session) as (callbacks, hook):
        return train_adapter(session, kind, callbacks=callbacks, on_schedule=hook)


def report(
    folders: Runs,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    formats: Annotated[
        str | None, typer.Option("--pictures", help="Also save each picture beside the page: png, svg or png,svg.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier report.")] = False,
) -> None:
    """One HTML page about runs, with curves, costs, schedules and predictions; it needs no network. Open it."""
    from ..report.figures import save
    from ..report.page import figures, find_runs, render
    from ..report.tables import table_rows

    wanted = listed(formats or "")
    if unknown := sorted(set(wanted) - set(FORMATS)):
        raise ConfigError(f"--pictures {unknown[0]!r} is unknown; choose from {', '.join(FORMATS)}")
    if output.is_dir():
        raise ConfigError(f"--output {str(output)!r} is a folder; name a file, for example report.html")
    runs = find_runs(folders)
    drawn = {
        output.with_name(f"{output.stem}-{name}.{kind}"): figure
        for kind in wanted
        for name, (_, figure) in figures(runs).items()
    }
    there = [str(path) for path in (output, *drawn) if path.exists()]
    if there and not overwrite:
        raise ConfigError(f"{there[0]!r} exists already; choose another --output, or add --overwrite")
    try:
        write_atomic(output, render(runs))
        for path, figure in drawn.items():
            save(figure, path)
    except OSError as error:
        raise ConfigError(f"--output {str(output)!r} cannot be written: {error.strerror or error}") from error
    if wants_json():
        emit({"page": str(output), "pictures": [str(p) for p in drawn], "runs": table_rows([r.result for r in runs])})
        return
    for path in (output, *drawn):
        say(str(path))
