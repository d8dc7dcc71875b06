"""The end of a run: the prompt it is left with, scored, and the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..cost.ledger import FlopsLedger
from ..data.splits import examples_fingerprint
from ..errors import ConfigError
from ..files import new_folder
from ..plm import fingerprint
from ..plm.loading import describe_dtype
from ..train import checkpoint, parallel
from ..train.loop import Loop
from .best import Best, Scored
from .card import model_card
from .folder import write_log
from .results import Point, RunResult, environment, save_result
from .session import Evaluation, Session, evaluate, write_predictions

if TYPE_CHECKING:
    from .run import Run


def finish(
    run: Run,
    loop: Loop,
    best: Best,
    scored: Scored,
    status: Literal["finished", "interrupted", "stopped"],
    reason: str | None,
) -> RunResult:
    """Score what the run is left with, and write its prompt, predictions, log and result.

    Args:
        status, reason: how the steps ended, and why.

    Raises:
        ConfigError: the folder cannot be written.
    """
    session, config, folder, partial = run.session, run.config, run.folder, run.partial
    whole = run.prompted.whole
    prompt = None if whole else run.prompted.parameter.detach()
    split = final_split(session)
    final = scored.of(prompt) if split == "validation" else None
    if final is None:
        final = evaluate(session, session.prompted(prompt), split)
        # A resumed run scores again what it no longer knows; like steps that are made twice, that counts once.
        if status != "finished" or split != "validation" or whole:
            run.ledger.add("eval", final.flops)
    known = run.identity["fingerprints"]
    result = result_of(
        session,
        loop,
        final,
        split,
        method=config.method,
        status=status,
        reason=reason,
        kept_layers=[partial.kept_layers(s) for s in run.schedule.now.stages] if partial is not None else [],
        best_step=best.step if config.train.keep == "best" else loop.state.global_step,
        total_seconds=loop.spent()["total_seconds"],
        prompt_folder=None if whole else str(folder / "prompt"),
        fingerprints={
            **{split: known.get(split) or examples_fingerprint(rows) for split, rows in session.examples.items()},
            **known,
            **({"model": "trained"} if whole else {}),
        },
    )
    if parallel.rank() == 0:
        try:
            with new_folder(folder / ("model" if whole else "prompt")) as work:
                run.prompted.save(work)
                if whole:
                    session.tokenizer.save_pretrained(str(work))  # a whole model, that `model.path` can name
                else:  # in place of the blank one that PEFT writes
                    (work / "README.md").write_text(model_card(result), encoding="utf-8")
            write_predictions(folder / "predictions.jsonl", session.examples[split], final)
            write_log(folder, loop.state.log_history)
            save_result(result, folder)
        except (*checkpoint.CANNOT_WRITE, ConfigError) as error:
            steps = checkpoint.steps_of(folder / "checkpoints")
            resumable = f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint"
            raise ConfigError(
                f"output={str(folder)!r} cannot be written at the end of the run ({error}); {resumable}: make room, "
                f"and run it again with {'--resume' if steps else '--overwrite'}"
            ) from error
    return result


def final_split(session: Session) -> str:
    """The split that a run's end is scored on: a test split, where one is loaded, has had no part in choosing."""
    return "test" if "test" in session.examples else "validation"


def result_of(session: Session, loop: Loop, final: Evaluation, split: str, **own: Any) -> RunResult:
    """The record of a loop's run, scored as `final` on a split.

    Args:
        own: the fields of `RunResult` that the loop does not know.
    """
    config, schedule = session.config, loop.schedule.now
    log: list[dict[str, Any]] = loop.state.log_history
    curve = [
        Point(
            step=r["step"],
            metrics={name: r[f"eval_{name}"] for name in final.result.values if f"eval_{name}" in r},
            train_flops=r["train_flops"],
            train_seconds=r["train_seconds"],
        )
        for r in log
        if f"eval_{session.task.primary}" in r
    ]
    return RunResult(
        name=config.name or Path(config.output).name,
        config=config.model_dump(mode="json"),
        schedule=schedule.to_dict(),
        boundaries=list(schedule.boundaries),
        steps=loop.state.global_step,
        skipped_steps=loop.skipped,
        primary=session.task.primary,
        metrics=final.result.values,
        intervals=final.result.intervals,
        split=split,
        examples=final.result.n,
        curve=list({p.step: p for p in curve}.values()),
        losses=[(r["step"], r["loss"]) for r in log if "loss" in r],
        flops=loop.ledger.to_dict(),
        train_seconds=loop.seconds,
        environment=environment(session.plm.device, dtype=describe_dtype(config.model.dtype, session.plm)),
        **own,
    )


def zero_shot(session: Session) -> RunResult:
    """The PLM without any prompt, as a result to compare with: on validation data, and on test data if loaded."""
    evaluations = {
        split: evaluate(session, session.prompted(None), split)
        for split in ("validation", "test")
        if split in session.examples
    }
    split, evaluation = list(evaluations.items())[-1]
    start = Point(step=0, metrics=evaluations["validation"].result.values, train_flops=0.0, train_seconds=0.0)
    return RunResult(
        name="zero-shot",
        method="none",
        status="evaluated",
        config=session.config.model_dump(mode="json"),
        schedule=[],
        boundaries=[],
        steps=0,
        primary=session.task.primary,
        metrics=evaluation.result.values,
        intervals=evaluation.result.intervals,
        split=split,
        examples=evaluation.result.n,
        best_step=0,
        curve=[start],
        flops=FlopsLedger({"eval": sum(e.flops for e in evaluations.values())}).to_dict(),
        train_seconds=0.0,
        total_seconds=sum(e.seconds for e in evaluations.values()),
        fingerprints={"model": fingerprint.of_model(session.plm)},
        environment=environment(session.plm.device, dtype=describe_dtype(session.config.model.dtype, session.plm)),
    )
