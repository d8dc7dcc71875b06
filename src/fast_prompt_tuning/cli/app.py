"""The command `fpt`. Thin: every command parses, calls one function and prints."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, DataError, FptError, TrainingStopped
from . import cost as cli_cost
from . import report as cli_report
from . import study as cli_study
from .console import check_output, emit, people, plain, progress, quiet_libraries, state

logger = logging.getLogger(__name__)

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

EXIT_STOPPED, EXIT_INPUT = 1, 2

Config = Annotated[str, typer.Option("--config", "-c", help="Recipe: a YAML file, or a name from `fpt ls recipes`.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override one setting, e.g. --set train.steps=100. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all library messages.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")] = False,
) -> None:
    state["debug"], state["quiet"] = debug, quiet
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(message)s")
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about each other


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for the results.")] = "runs/demo",
    method: Annotated[str, typer.Option(help="What to compare with plain prompt tuning: ld, fr, cr or auto.")] = "cr",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    sets: Sets = [],  # noqa: B006 (typer reads it, nothing changes it)
    as_json: Json = False,
) -> None:
    """Compare plain prompt tuning and FPT on a real model and real news, in minutes on two CPU cores."""
    from .demo import demo as run_demo

    quiet_libraries()
    record = run_demo(
        progress(as_json), people(as_json), output=output, method=method, overwrite=overwrite, overrides=sets
    )
    if as_json:
        emit(record)
    if record["status"] == "interrupted":
        raise typer.Exit(_signal_code(record["reason"]))


@app.command()
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
    as_json: Json = False,
) -> None:
    """Tune a soft prompt as a recipe says. Next: `fpt eval RUN`, `fpt predict RUN`."""
    from ..recipe import load, override

    given = {"on_bad_row": on_bad_row, "input_template": input_template, "target_template": target_template}
    lines = {k: v.replace("\\n", "\n") for k, v in given.items() if v is not None}
    chosen = [override(f"data.{name}", text) for name, text in lines.items()]
    if input_template or target_template:
        chosen.append("data.task=null")
    settings = load(config, [*sets, *chosen])  # first of all: a typing error must not wait for PyTorch
    from ..report.tables import comparison_table, table_rows
    from ..run import run
    from ..run.folder import Earlier, check_folder
    from ..run.session import open_session
    from ..train import parallel
    from .demo import reporting

    quiet_libraries()
    out = people(as_json)
    if allow_changed and not resume:
        raise ConfigError("--allow-changed is for --resume; add it, or leave this out")
    check_folder(settings, Earlier.of(overwrite=overwrite, resume=resume, allow_changed=allow_changed))
    session = open_session(settings, ("train", "validation"), resume=resume)
    told = progress(as_json)
    if parallel.rank() != 0:  # the main process speaks for all
        out = told = Console(quiet=True)
        as_json = False
    with reporting(told, settings.name or Path(settings.output).name, session) as (callbacks, hook):
        result = run.train(
            settings,
            overwrite=overwrite,
            resume=resume,
            allow_changed=allow_changed,
            session=session,
            callbacks=callbacks,
            on_schedule=hook,
        )
    out.print(comparison_table([result]))
    out.print(f"run {plain(settings.output)}", highlight=False, soft_wrap=True)
    if as_json:
        emit({**table_rows([result])[0], "output": settings.output, "prompt_folder": result.prompt_folder})
    if result.status == "interrupted":
        out.print("[yellow]interrupted[/yellow]: go on with the same command and --resume")
        raise typer.Exit(_signal_code(result.reason))


def _signal_code(reason: str | None) -> int:
    """128 and the number of the signal that ended a run."""
    return 128 + int((reason or "signal 2").split()[-1])


@app.command(name="eval")
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; the first one's task and model are used.")],
    split: Annotated[str, typer.Option(help="Split to score.")] = "validation",
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="Also score the model without a prompt.")] = False,
    ensemble: Annotated[
        str | None, typer.Option(help="Also all prompts as one: probabilities (of labels) or votes.")
    ] = None,
    partial: Annotated[
        str | None, typer.Option(help="Score on a partial PLM instead, e.g. 15x768 (layers × neurons).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write one prompt's predictions as JSONL into this file.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write one prompt's answers in the benchmark's format; needs no labels.")
    ] = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Score saved prompts side by side on the full model. Next: `fpt predict RUN`."""
    from ..recipe import load

    settings = load(_run_file(runs[0], "config.yaml"), [*_tuned_model(runs[0]), *sets])
    for path in (output, submission):
        if path is not None:
            check_output(path)
    if (output or submission) and len(runs) > 1:
        raise ConfigError("--output and --submission are for one prompt; give one RUN")
    if submission and (output or zero_shot or partial):
        raise ConfigError(
            "--submission writes one prompt's answers on the full model; leave out --output, --zero-shot and --partial"
        )
    if settings.method == "full" and (zero_shot or len(runs) > 1):
        raise ConfigError(
            f"{str(runs[0])!r} is a run of all weights: without a prompt, or with another's, its model would be the "
            "tuned one; score it by itself"
        )
    if ensemble and len(runs) < 2:
        raise ConfigError("--ensemble needs at least two prompts; give more RUNs")
    from ..data.tasks import check_submission
    from ..plm.partial import PartialPLM
    from ..prompt.soft_prompt import load_prompt, placement_of, stack_prompts
    from ..run.preparation import partial_of
    from ..run.session import evaluate as score
    from ..run.session import open_session, task_of, write_predictions, write_submission

    quiet_libraries()
    prompts: dict[str, Any] = {"zero-shot": None} if zero_shot else {}
    placed: dict[str, str] = {}
    for folder in runs:
        whole = settings.method == "full" and folder == runs[0]  # all weights were tuned: there is no prompt
        saved = folder / "prompt" if (folder / "prompt").is_dir() else folder
        prompts[str(folder)] = None if whole else load_prompt(saved)
        placed[str(folder)] = placement_of(saved)
    if ensemble:
        if len(set(placed.values())) > 1:
            raise ConfigError("--ensemble needs prompts that stand in one place (prefix, suffix or infix)")
        placed[f"ensemble ({ensemble})"] = placed[str(runs[0])]
        prompts[f"ensemble ({ensemble})"] = stack_prompts([p for p in prompts.values() if p is not None])
    if submission is not None:
        check_submission(task_of(settings))
    session = open_session(settings, (split,))
    for folder in runs:
        _say_if_of_another_model(folder, session)
    if submission is not None:
        write_submission(session, prompts[str(runs[0])], split, submission)
        people(as_json).print(f"{plain(str(submission))} written", highlight=False)
        if as_json:
            emit({"split": split, "submission": str(submission)})
        return
    at = partial_of(session, partial, runs[0]) if partial else PartialPLM(session.plm).full()
    records = {}
    table = Table(header_style="bold")
    for column in ("prompt", "metric", "value %", "95% interval", "examples"):
        table.add_column(column)
    with at:
        for name, prompt in prompts.items():
            on_device = None if prompt is None else prompt.to(session.plm.device)
            where = placed.get(name)
            found = score(session, on_device, split, voting=ensemble or "probabilities", placement=where)
            records[name] = {
                "metrics": found.result.values,
                "intervals": found.result.intervals,
                "examples": found.result.n,
                "seconds": found.seconds,
                "flops": found.flops,
            }
            for metric, value in found.result.values.items():
                low, high = found.result.intervals[metric]
                table.add_row(plain(name), metric, f"{value:.2f}", f"{low:.2f} – {high:.2f}", str(found.result.n))
            if output is not None and name == str(runs[0]):
                write_predictions(output, session.examples[split], found)
    people(as_json).print(table)
    if as_json:
        emit({"split": split, "partial": partial, "results": records})


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]…", help="Texts; none: one per line on standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read inputs from this file, one per line.")] = None,
    sets: Sets = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: input, prediction, score.")] = False,
) -> None:
    """Answer new texts with a saved prompt, one line each; empty lines are passed over.

    A line that is a JSON object gives the task's fields by name.
    """
    from ..data.encoding import encode
    from ..data.readers import render_rows
    from ..prompt.soft_prompt import load_prompt
    from ..recipe import load
    from ..run.session import open_session
    from ..run.session import predict as answers_to

    quiet_libraries()
    settings = load(_run_file(folder, "config.yaml"), [*_tuned_model(folder), *sets])
    prompt = None if settings.method == "full" else load_prompt(folder / "prompt")
    session = open_session(settings, ())
    if texts:
        lines = iter(texts)
    elif file is not None:
        lines = _file_lines(file)
    else:
        lines = _stdin_lines()
    answered = 0
    batch: list[str] = []

    def answer(batch: list[str]) -> None:
        rows = [_fields(session.task, text, session.decoder) for text in batch]
        encoded = encode(
            render_rows(session.task, rows, decoder=session.decoder),
            session.tokenizer,
            session.task,
            decoder=session.decoder,
            max_input_tokens=settings.data.max_input_tokens,
            max_target_tokens=session.max_target_tokens,
        )
        on_device = None if prompt is None else prompt.to(session.plm.device)
        found, answers, _ = answers_to(session, on_device, encoded)
        for text, prediction, said in zip(batch, found, answers, strict=True):
            if as_json:
                emit({"input": text, "prediction": said, "score": prediction.score})
            else:
                sys.stdout.write(said + "\n")
        sys.stdout.flush()

    # Typed at a terminal, every line is answered at once; piped in, in batches.
    size = 1 if sys.stdin.isatty() and not (texts or file) else settings.eval.batch_size
    for line in lines:
        if line.strip():
            batch.append(line)
        if len(batch) == size:
            answer(batch)
            answered, batch = answered + len(batch), []
    if batch:
        answer(batch)
        answered += len(batch)
    if not answered:
        raise DataError("there is no text to answer; give it as an argument, with --file, or on standard input")


def _say_if_of_another_model(folder: Path, session: Any) -> None:
    from ..plm import fingerprint
    from ..run.results import load_result

    if not (folder / "result.json").is_file() or session.config.method == "full":
        return
    tuned_on = load_result(folder).fingerprints.get("model")
    if tuned_on is not None and tuned_on != fingerprint.of_model(session.plm):
        logger.warning("%s was tuned on another model than %s", folder, session.config.model.path)


def _tuned_model(folder: Path) -> list[str]:
    """The setting that a run of all weights needs to be used: its own model in place of the one it began with."""
    from ..recipe import override

    return [override("model.path", str(folder / "model"))] if (folder / "model").is_dir() else []


def _file_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:  # other line ends are part of a text
            for line in lines:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", file=str(file)) from error


def _stdin_lines() -> Iterator[str]:
    try:
        for number, line in enumerate(sys.stdin):
            yield (line if number else line.removeprefix("\ufeff")).rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason})", file="standard input") from error


def _fields(task: Any, text: str, decoder: bool) -> dict[str, Any]:
    """The task's fields from one line: a JSON object, or the text of the one field a plain line can mean."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
            if isinstance(found, dict):
                return found
        except (ValueError, RecursionError):
            pass
    fields = sorted(task.input_fields(decoder=decoder))
    if not fields:
        raise DataError(f"task {task.name!r} has an input template without a field: there is nothing to answer to")
    name = task.truncate or fields[0]
    # Fields beside the main text (a headline) may be empty; a task of several real questions wants JSON.
    others = {f: "" for f in fields if f != name}
    if others and not all(f in ("headline", "title") for f in others):
        raise DataError(
            f"task {task.name!r} has the fields {', '.join(fields)}; give each input as a JSON object, e.g. "
            + json.dumps(dict.fromkeys(fields, "…"), ensure_ascii=False)
        )
    return {name: text, **others}


@app.command()
def ls(
    what: Annotated[str, typer.Argument(help="recipes, tasks, families or methods; default all.")] = "all",
    as_json: Json = False,
) -> None:
    """List what is built in: recipes, tasks, model families, methods. Next: `fpt show task NAME`, `fpt plan`."""
    from .. import recipe as config
    from ..plm import families

    kinds: dict[str, Any] = {
        "recipes": lambda: {n: _first_comment(n) for n in config.recipe_names()},
        "tasks": lambda: _task_lines(),
        "families": lambda: {n: " + ".join(families._REGISTRY[n].stacks) for n in families.names()},
        "methods": lambda: dict(METHOD_TEXTS),
    }
    if what != "all" and what not in kinds:
        raise ConfigError(f"what={what!r} is unknown; choose one of {', '.join(kinds)}")
    found = {k: v() for k, v in kinds.items() if what in ("all", k)}
    if as_json:
        emit(found)
        return
    for kind, entries in found.items():
        table = Table(title=kind, title_justify="left", show_header=False, box=None)
        for name, text in entries.items():
            table.add_row(f"[bold]{plain(name)}[/bold]", plain(text))
        people().print(table)


METHOD_TEXTS = {
    "pt": "plain prompt tuning on the full model (Lester et al. 2021)",
    "ld": "layer dropping: 25, 50, 75% of the layers for 20% of the steps each, then the full model",
    "fr": "FFN reduction: 25, 50, 75% of the feed-forward neurons, by activation score, likewise",
    "cr": "compound reduction: both",
    "auto": "small batches first; grows when the full model's held-out loss says so, and never costs much more than pt",
    "full": "fine-tuning of all weights, as a baseline",
}


def _first_comment(recipe: str) -> str:
    from importlib import resources

    text = (resources.files("fast_prompt_tuning") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return comment.split(". ")[0].rstrip(".") + "."


def _task_lines() -> dict[str, str]:
    from ..data import tasks

    return {name: tasks.load_task(name).description for name in tasks.task_names()}


def _run_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no {name}: this is not the folder of a run", file=str(folder))
    return path


@app.command()
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

        sys.stdout.write(load(name).to_yaml())
        return
    if what != "task":
        raise ConfigError(f"WHAT={what!r} is unknown; choose task or recipe")
    from ..data import tasks
    from ..data.readers import load_examples

    quiet_libraries()
    task = tasks.load_task(name)
    tokenizer, decoder = None, task.decoder is not None
    if model is not None:
        from transformers import AutoConfig

        from ..plm.loading import load_tokenizer, locate

        tokenizer = load_tokenizer(model)
        decoder = not AutoConfig.from_pretrained(locate(model)).is_encoder_decoder
    rows = load_examples(task, split, decoder=decoder, files={split: file} if file else None, limit=limit)
    console = people()
    for row in list(rows)[:3]:
        console.rule(f"{task.name} {split} {row['id']}", align="left")
        console.print(f"[bold]input[/bold]   {plain(_shortened(row['input']))}", highlight=False)
        console.print(f"[bold]target[/bold]  {plain(repr(row['target']))}", highlight=False)
        gold = json.dumps(row["references"], ensure_ascii=False)
        console.print(f"[bold]gold[/bold]    {plain(gold)}", highlight=False)
    count = (lambda t: len(tokenizer(t)["input_ids"])) if tokenizer else (lambda t: len(t.split()))
    table = Table(title=f"lengths of {len(rows)} examples", title_justify="left", header_style="bold")
    for column in ("", *(f"{p}%" for p in (5, 25, 50, 75, 95)), "longest"):
        table.add_column(column, justify="right" if column else "left")
    for field in ("input", "target"):
        lengths = sorted(count(text) for text in rows[field])
        picked = [lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (5, 25, 50, 75, 95)]
        unit = "tokens" if tokenizer else "words"
        table.add_row(f"{field} ({unit})", *map(str, picked), str(lengths[-1]))
    console.print(table)


def _shortened(text: str, head: int = 400, tail: int = 200) -> str:
    """Both ends of a long text: a template's mistakes show there."""
    if len(text) <= head + tail + 40:
        return text
    return f"{text[:head]} [… {len(text) - head - tail} characters …] {text[-tail:]}"


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a saved prompt.")],
    output: Annotated[Path, typer.Argument(help="New safetensors file.")],
    kind: Annotated[str, typer.Option("--format", help="prompt-embeds is the only one.")] = "prompt-embeds",
) -> None:
    """Write the prompt's vectors (P, H) as one tensor `prompt_embeds`, as serving engines take them."""
    from ..prompt.soft_prompt import PLACES, export_prompt, placement_of

    if kind != "prompt-embeds":
        raise ConfigError(f"--format {kind!r} is unknown; prompt-embeds is the only one")

    saved = folder / "prompt" if (folder / "prompt").is_dir() else folder
    shape = export_prompt(saved, output)
    made = f"{output}: prompt_embeds {shape}, embeddings to stand {PLACES[placement_of(saved)]}"
    people().print(plain(made), highlight=False, soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; default private.")] = False,
) -> None:
    """Upload a run's prompt and a card with its quality and cost to the Hugging Face Hub."""
    from ..report.hub import push_prompt

    sys.stdout.write(push_prompt(folder, repo_id, private=not public) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every refusal is one line on standard error and a documented exit code."""
    code = 0
    errors = Console(stderr=True)
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    error_mark = "[red]error:[/red]" if processes == "1" else f"[red]error:[/red] process {plain(rank)} of {processes}:"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(args=arguments, standalone_mode=False) or 0
    except typer.Exit as stop:
        code = stop.exit_code
    except (TrainingStopped, FptError) as error:
        if state["debug"]:
            raise
        errors.print(f"{error_mark} {_line(error)}", highlight=False, soft_wrap=True)
        code = EXIT_STOPPED if isinstance(error, TrainingStopped) else EXIT_INPUT
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        errors.print("interrupted")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's usage errors
        if usage is not None:
            errors.print(f"{error_mark} {plain(usage())}", highlight=False, soft_wrap=True)
            code = EXIT_INPUT
        elif state["debug"]:
            raise
        else:
            said = f"{type(error).__name__}: {_line(error)}"
            hint = "(a bug, or a machine's trouble: fpt --debug … shows where)"
            errors.print(f"{error_mark} {said} {hint}", highlight=False, soft_wrap=True)
            code = 70
    if processes != "1" and "torch" in sys.modules:
        from ..train import parallel

        parallel.stop()
    sys.exit(code)


def _line(error: Exception) -> str:
    return plain(" ".join(str(error).split("\n")))


cli_cost.register(app)
cli_report.register(app)
cli_study.register(app)

EXAMPLES = {
    "demo": "fpt demo --method ld",
    "train": "fpt train -c bbc_topics_smollm2 --set train.steps=50 --set output=runs/mine",
    "eval": "fpt eval runs/mine runs/other --zero-shot",
    "predict": 'fpt predict runs/mine "Shares fell after the announcement"',
    "ls": "fpt ls tasks",
    "show": "fpt show task bbc_topics --model smollm2-135m",
    "score": "fpt score -c bbc_topics_smollm2 --output scores.safetensors",
    "export": "fpt export runs/mine prompt.safetensors",
    "push": "fpt push runs/mine my-name/my-prompt",
    "plan": "fpt plan --model my-model --compare pt,ld,fr,cr --steps 2000 --input-tokens 256",
    "reproduce": "fpt reproduce table2",
    "similarity": "fpt similarity runs/mine runs/other --picture similarity.svg",
    "compare": "fpt compare runs/plain runs/mine",
    "report": "fpt report runs/plain runs/mine -o report.html --pictures svg",
}
"""What to type, at the end of each command's help."""
for _command in app.registered_commands:
    _name = _command.name or getattr(_command.callback, "__name__", "")
    if _name in EXAMPLES:
        _command.epilog = f"Example: {EXAMPLES[_name]}"

if __name__ == "__main__":
    main()
