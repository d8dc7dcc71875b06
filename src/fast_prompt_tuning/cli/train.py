"""The commands that tune prompts: `fpt demo` and `fpt train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from .console import Config, Sets, emit, people, progress, quiet_libraries, signal_code, wants_json


def demo(
    output: Annotated[str, typer.Option(help="Folder for the results.")] = "runs/demo",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Compare plain prompt tuning, the paper's FPT and auto on a real model and real news, on two CPU cores."""
    from .demo import demo as run_demo

    quiet_libraries()
    record = run_demo(progress(), people(), output=output, overwrite=overwrite, overrides=sets)
    if wants_json():
        emit(record)
    if record["status"] == "interrupted":
        raise typer.Exit(signal_code(record["reason"]))


def train(
    config: Config,
    sets: Sets = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume although recipe, weights or data have changed since.")
    ] = False,
    on_bad_row: Annotated[str | None, typer.Option(help="error or skip: rows that cannot be used.")] = None,
    input_template: Annotated[
        str | None, typer.Option(help=r"Your own task: Jinja template of the input, e.g. '{{ text }}\nTopic:'.")
    ] = None,
    target_template: Annotated[str | None, typer.Option(help="And of the target, e.g. ' {{ label }}'.")] = None,
) -> None:
    """Tune a soft prompt as a recipe says. Next: `fpt eval RUN`, `fpt predict RUN`."""
    from ..recipe import load, override

    options = {"on_bad_row": on_bad_row, "input_template": input_template, "target_template": target_template}
    overrides = [override(f"data.{k}", v.replace("\\n", "\n")) for k, v in options.items() if v is not None]
    if input_template or target_template:
        overrides.append("data.task=null")
    settings = load(config, [*sets, *overrides])  # first of all: a typing error must not wait for PyTorch
    from ..report.tables import comparison_table, table_rows
    from ..run import run
    from ..run.folder import Earlier, check_folder
    from ..run.session import open_session
    from ..train import parallel
    from .progress import reporting

    quiet_libraries()
    if allow_changed and not resume:
        raise ConfigError("--allow-changed is for --resume; add it, or leave this out")
    check_folder(settings, Earlier.of(overwrite=overwrite, resume=resume, allow_changed=allow_changed))
    session = open_session(settings, ("train", "validation"), resume=resume)
    speaks = parallel.rank() == 0  # the main process, for all
    under_way, out = (progress(), people()) if speaks else (Console(quiet=True),) * 2
    with reporting(under_way, settings.name or Path(settings.output).name, session) as (callbacks, hook):
        result = run.train(
            session.config,
            overwrite=overwrite,
            resume=resume,
            allow_changed=allow_changed,
            session=session,
            callbacks=callbacks,
            on_schedule=hook,
        )
    out.print(comparison_table([result]))
    run_folder = shlex.quote(settings.output)
    advice = f"next: fpt eval {run_folder} --zero-shot, or fpt predict {run_folder} 'some text'"
    for line in (f"run {settings.output}", *([advice] if result.status == "finished" else [])):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if wants_json() and speaks:
        emit({**table_rows([result])[0], "output": settings.output, "prompt_folder": result.prompt_folder})
    if result.status == "interrupted":
        out.print("[yellow]interrupted[/yellow]: go on with the same command and --resume")
        raise typer.Exit(signal_code(result.reason))
