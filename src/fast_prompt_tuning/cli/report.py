"""The commands that look back at runs: `fpt compare` and `fpt report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import ConfigError
from ..files import write_atomic
from .console import emit, listed, people, say, wants_json

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, or a folder that holds them; plain PT first.")
]
FORMATS = ("png", "svg")


def compare(folders: Runs) -> None:
    """Runs side by side: quality, FLOPs, time, Improve. Next: `fpt report RUN…`, `fpt eval RUN…`."""
    from ..report.page import find_runs
    from ..report.tables import average_rows, average_table, by_task, comparison_table, table_rows

    results = [run.result for run in find_runs(folders)]
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
