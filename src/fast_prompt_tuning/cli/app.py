"""The command `fpt`: its commands, and how it ends. Every command parses, calls one function and prints."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import FptError, TrainingStopped
from ..train.launcher import end_with_launcher
from . import catalog, evaluate, init, plan, predict, report, reproduce, share, signals, study, train
from .console import Debug, Json, Quiet, command, remember, state

EXIT_STOPPED, EXIT_INPUT, EXIT_BUG = 1, 2, 70

app = typer.Typer(
    name="fpt",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Tune a soft prompt on a growing partial model. Start with [bold]fpt demo[/bold]; then [bold]fpt ls "
    "recipes[/bold], [bold]fpt plan[/bold] (what will it cost?), [bold]fpt train --config RECIPE[/bold] and "
    "[bold]fpt report RUN[/bold].",
    epilog="Exit codes: 0 done, 1 training stopped (loss not finite), 2 bad input, 70 a bug, 130 Ctrl-C, 143 SIGTERM.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        sys.stdout.write(__version__ + "\n")
        raise typer.Exit


@app.callback()
def _options(
    debug: Debug = False,
    quiet: Quiet = False,
    as_json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    remember(debug=debug, quiet=quiet, as_json=as_json)


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "demo": (train.demo, "fpt demo --set train.steps=100"),
    "init": (init.init, "fpt init tickets.csv -o tickets"),
    "train": (train.train, "fpt train -c bbc_topics_smollm2 --set train.steps=50 --set output=runs/mine"),
    "eval": (evaluate.evaluate, "fpt eval runs/mine runs/other --zero-shot"),
    "predict": (predict.predict, 'fpt predict runs/mine "Shares fell after the announcement"'),
    "ls": (catalog.ls, "fpt ls tasks"),
    "show": (catalog.show, "fpt show task bbc_topics --model smollm2-135m"),
    "export": (share.export, "fpt export runs/mine prompt.safetensors"),
    "push": (share.push, "fpt push runs/mine my-name/my-prompt"),
    "pull": (share.pull, "fpt pull my-name/my-prompt prompts/mine"),
    "plan": (plan.plan, "fpt plan --model my-model --compare pt,ld,fr,cr,auto --steps 2000 --input-tokens 256"),
    "reproduce": (reproduce.reproduce, "fpt reproduce table2"),
    "compare": (report.compare, "fpt compare runs/plain runs/mine"),
    "report": (report.report, "fpt report runs/plain runs/mine -o report.html --pictures svg"),
    "score": (study.score, "fpt score -c bbc_topics_smollm2 --signal"),
    "similarity": (study.similarity, "fpt similarity runs/mine runs/other --picture similarity.svg"),
}
"""The commands, in the order of `fpt --help`; and what to type, at the end of each one's help."""
for _name, (_function, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_example}")(command(_function))


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every refusal is one line on standard error and a documented exit code."""
    state.update(debug=False, quiet=False, json=False)
    code = 0
    end_with_launcher()
    with signals.heard() as received:
        try:
            code = app(args=arguments, standalone_mode=False) or 0
        except BaseException as error:
            code = _report_end(error, received)
    if os.environ.get("WORLD_SIZE", "1") != "1" and "torch" in sys.modules and not received:
        from ..train import parallel

        parallel.stop()
    sys.exit(code)


def _report_end(error: BaseException, received: list[int]) -> int:
    """Say on standard error how a command ended, where there is something to say; the exit code.

    Raises:
        BaseException: the error itself, under --debug, where it is none of usage.
    """
    errors = Console(stderr=True)
    if received or isinstance(error, (KeyboardInterrupt, typer.Abort)):
        errors.print("interrupted")
        return 128 + (received[0] if received else signal.SIGINT)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    usage = getattr(error, "format_message", None)  # click's usage errors
    if not isinstance(error, Exception) or (state["debug"] and usage is None):
        raise error
    message, code, hint = escape(" ".join(str(usage() if usage else error).split("\n"))), EXIT_INPUT, ""
    if isinstance(error, TrainingStopped):
        code = EXIT_STOPPED
    elif usage is None and not isinstance(error, FptError):
        message, code = f"{type(error).__name__}: {message}", EXIT_BUG
        hint = " (a bug, or a machine's trouble: fpt --debug … shows where)"
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    mark = "[red]error:[/red]" if processes == "1" else f"[red]error:[/red] process {escape(rank)} of {processes}:"
    errors.print(f"{mark} {message}{hint}", highlight=False, soft_wrap=True)
    return code
