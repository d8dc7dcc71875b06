"""The command that makes the paper's tables: `fpt reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..errors import ConfigError
from .console import Sets, emit, listed, people, progress, quiet_libraries, wants_json


def reproduce(
    table: Annotated[str, typer.Argument(help="table1 or table2 of the paper.")],
    columns: Annotated[
        str, typer.Option(help="flops, wallclock, both separated by a comma, or all: train and score every cell.")
    ] = "flops",
    plm: Annotated[str, typer.Option(help="large or xl.")] = "large",
    scale: Annotated[
        str, typer.Option(help="For wallclock: BATCHxINPUT, or `paper` for 32x492; small machines want small ones.")
    ] = "6x44",
    seconds: Annotated[float, typer.Option(help="For wallclock: time to spend on measuring.")] = 300.0,
    dtype: Annotated[str, typer.Option(help="For wallclock: dtype of the weights.")] = "float32",
    model: Annotated[str | None, typer.Option(help="For all: hub id or folder of the T5 weights.")] = None,
    data: Annotated[
        str | None, typer.Option(help="For all: folder with TASK/train.* and TASK/validation.*; default the Hub.")
    ] = None,
    output: Annotated[str, typer.Option(help="For all: folder for the runs; finished ones are not run again.")] = (
        "runs/reproduce"
    ),
    tasks: Annotated[str, typer.Option(help="For all: which of the paper's tasks.")] = "mnli,qqp,squad2,record,xsum",
    sets: Sets = [],  # noqa: B006
) -> None:
    """The paper's tables beside its own figures: costs from T5's config alone, quality with weights and data."""
    from ..paper.reproduce import cost_rows

    if table not in ("table1", "table2"):
        raise ConfigError(f"TABLE={table!r} is unknown; choose table1 or table2")
    if plm not in ("large", "xl"):
        raise ConfigError(f"--plm {plm!r} is unknown; choose large or xl")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {dtype!r} is unknown; choose bfloat16, float16 or float32")
    column_names = listed(columns)
    if column_names == ["all"]:
        if model is None:
            raise ConfigError("--columns all trains T5 and needs its weights: give --model (a hub id or a folder)")
        from ..paper.quality import run_table

        quiet_libraries()
        if not tasks.strip(" ,"):
            raise ConfigError(f"--tasks {tasks!r} names no task, for example mnli,squad2")
        rows = run_table(
            table,
            plm=plm,
            model=model,
            data=data,
            output=output,
            tasks=listed(tasks),
            overrides=sets,
            on_run=lambda task, row, what: progress().print(f"{task} {row}: {what}", highlight=False),
        )
        note = "Metrics of the best prompt on validation data; costs relative to pt in percent."
    elif column_names and not set(column_names) - {"flops", "wallclock"}:
        quiet_libraries(transformers_only=True)
        rows, note = cost_rows(table, column_names, plm=plm, scale=scale, seconds=seconds, dtype=dtype)
    else:
        raise ConfigError(f"--columns {columns!r} must be flops, wallclock, both with a comma, or all")
    if wants_json():
        emit({"table": table, "plm": plm, "rows": rows, "note": note})
        return
    shown = Table(title=f"{table} of the paper, T5-{plm.upper()}", title_justify="left", header_style="bold")

    def text(value: object) -> str:
        return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    for name in rows[0]:
        shown.add_column(name.replace("_", " "), justify="left" if name == "method" else "right")
    for row in rows:
        shown.add_row(*map(text, row.values()))
    people().print(shown)
    people().print(note, highlight=False)
