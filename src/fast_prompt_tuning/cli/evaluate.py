"""The command that scores saved prompts: `fpt eval`."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from .console import Sets, check_output, emit, people, quiet_libraries, say, wants_json

logger = logging.getLogger(__name__)


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
    also: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Another run of the model, scored on its own task; repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write one prompt's predictions as JSONL into this file.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write one prompt's answers in the benchmark's format; needs no labels.")
    ] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Score saved prompts side by side on the full model. Next: `fpt predict RUN`.

    Texts that the tasks of --also share are read once, where the same words stand before the prompts.
    """
    from ..recipe import settings_of
    from .run_folder import check_ensemble, check_one_model

    settings = settings_of(runs[0], sets)
    for path in (output, submission):
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
    others = {run: settings_of(run, sets) for run in also or ()}
    methods = {settings.method, *(its.method for its in others.values())}
    if others and (submission or ensemble or partial or "full" in methods):
        raise ConfigError(
            "--also scores prompts one by one on the full model; leave out --submission, --ensemble, --partial and "
            "runs of all weights"
        )
    for run, its in others.items():
        check_one_model("--also", runs[0], settings, run, its)
    if ensemble is not None:
        check_ensemble(ensemble, runs, settings)
    from ..data.submissions import check_submission
    from ..plm.partial import PartialPLM
    from ..prompt.soft_prompt import load_prompt, place_of, stack_prompts
    from ..run.preparation import partial_of
    from ..run.session import beside, load_split, open_session, task_of, write_predictions, write_submission
    from ..run.session import evaluate as score
    from ..run.together import fronts
    from ..train import parallel

    quiet_libraries()
    prompts: dict[str, Any] = {"zero-shot": None} if zero_shot else {}
    placed: dict[str, str] = {}
    whole = settings.method == "full"  # all weights were tuned: there is no prompt
    for folder in runs:
        prompts[str(folder)] = None if whole else load_prompt(folder)
        placed[str(folder)] = place_of(folder)
    if ensemble:
        if len(set(placed.values())) > 1:
            several = ", ".join(sorted(set(placed.values())))
            raise ConfigError(f"--ensemble needs prompts that stand in one place; these stand in several: {several}")
        placed[f"ensemble ({ensemble})"] = placed[str(runs[0])]
        prompts[f"ensemble ({ensemble})"] = stack_prompts([p for p in prompts.values() if p is not None])
    if submission is not None:
        check_submission(task_of(settings))
    session = open_session(settings, (split,))
    for folder in runs:
        _warn_if_of_another_model(folder, session)
    if submission is not None:
        write_submission(session, session.prompted(prompts[str(runs[0])]), split, submission)
        say(f"{submission} written")
        if wants_json():
            emit({"split": split, "submission": str(submission)})
        return
    asked = [(name, session, session.prompted(prompt, placed.get(name))) for name, prompt in prompts.items()]
    for run, its in others.items():
        own = beside(session, its)
        load_split(own, split)
        asked.append((str(run), own, own.prompted(load_prompt(run), place_of(run))))
    at_size = partial_of(session, partial, runs[0]) if partial else PartialPLM(session.plm).full()
    records = {}
    table = Table(header_style="bold")
    for column in ("prompt", *(("task",) if others else ()), "metric", "value %", "95% interval", "examples"):
        table.add_column(column)
    with at_size:
        for name, on, prompted in asked:
            scored = score(on, prompted, split, voting=ensemble or "probabilities")
            records[name] = {
                "task": on.task.name,
                "metrics": scored.result.values,
                "intervals": scored.result.intervals,
                "examples": scored.result.n,
                "seconds": scored.seconds,
                "flops": scored.flops,
            }
            for metric, value in scored.result.values.items():
                low, high = scored.result.intervals[metric]
                task = (escape(on.task.name),) if others else ()
                scores = (f"{value:.2f}", f"{low:.2f} – {high:.2f}", str(scored.result.n))
                table.add_row(escape(name), *task, metric, *scores)
            if output is not None and name == str(runs[0]) and parallel.rank() == 0:
                write_predictions(output, session.examples[split], scored)
    if parallel.rank() != 0:  # the main process speaks for all
        return
    people().print(table)
    if others:
        before = [fronts(name, on, prompted, on.encoded[split]) for name, on, prompted in asked]
        say(f"{sum(map(len, before))} examples have {len(set(chain(*before)))} different texts before their prompts")
    if wants_json():
        emit({"split": split, "partial": partial, "results": records})


def _warn_if_of_another_model(folder: Path, session: Any) -> None:
    from ..plm import fingerprint
    from .run_folder import weights_of

    tuned_on = weights_of(folder)
    if tuned_on is None or session.config.method == "full":
        return
    if wrong := fingerprint.mismatch(tuned_on, fingerprint.of_model(session.plm)):
        logger.warning("%s was tuned on another model than %s: %s", folder, session.config.model.path, wrong)
