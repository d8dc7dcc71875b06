"""LoRA and prefix tuning on a run's own recipe: is prompt tuning the right tool for this task and model?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import TrainerCallback, set_seed

from ..cost.ledger import FlopsLedger
from ..data.splits import examples_fingerprint
from ..errors import ConfigError, DataError
from ..files import new_folder
from ..plm import fingerprint
from ..plm.dropout import without_dropout
from ..plm.loading import loadable_config
from ..prompt.adapted import ADAPTERS, Adapted, adapt, check_adapter
from ..recipe import RunConfig
from ..schedule.stages import Schedule
from ..train import checkpoint, parallel
from ..train.batches import Batches, make_collator
from ..train.loop import Loop
from .finish import final_split, result_of
from .folder import written
from .preparation import trainable
from .results import RunResult, load_result, save_result
from .session import Evaluation, Session, evaluate, write_predictions

ADAPTER = "adapter"
"""Where in the run's folder the adapter lies, as PEFT saves it."""


def folder_of(run: Path, kind: str) -> Path:
    """Where an adapter that a run is compared with goes: beside the run."""
    return run.with_name(f"{run.name}-{kind}")


def recipe_for(run: RunResult, folder: Path, kind: str) -> RunConfig:
    """The recipe of an adapter: the run's data, steps, batches and seed, and a rate that Prodigy finds.

    Raises:
        ConfigError: the run has no recipe to go by, the model cannot have this adapter, or several processes run.
    """
    if parallel.size() > 1:
        raise ConfigError("--with trains in one process; start it without torchrun or accelerate")
    try:
        config = RunConfig.model_validate(run.config)
    except ValidationError as error:
        raise ConfigError(f"the run {run.name!r} has no recipe that this version reads; train it again") from error
    if not run.steps:
        raise ConfigError(
            f"the run {run.name!r} has made no steps, so an adapter has no length to go by; name a trained run"
        )
    model = loadable_config(config.model.path, revision=config.model.revision)
    check_adapter(kind, decoder=not model.is_encoder_decoder)
    plain = {"method": "pt", "stages": None, "name": f"{config.name or run.name}-{kind}", "output": str(folder)}
    prompt = {"tokens": config.prompt.tokens}
    optim = {"optimizer": "prodigy", "lr": 1.0, "lr_schedule": "linear", "max_grad_norm": config.optim.max_grad_norm}
    train = config.train.model_dump() | {
        "steps": run.steps,
        "epochs": None,
        "patience": None,
        "compile": False,
        "parallel": "data",
        "report_to": [],
        "eval_every": config.train.evaluation_interval,
    }
    changed = {"prompt": prompt, "optim": optim, "train": train, "cache": {}, "scoring": {}}
    return RunConfig.model_validate({**config.model_dump(), **plain, **changed})


def earlier(config: RunConfig) -> RunResult | None:
    """The result of a comparison that was made before with the same recipe; None where it is to be made.

    Raises:
        ConfigError: the folder holds something else.
    """
    folder = Path(config.output)
    if not folder.exists():
        return None
    unfinished = {checkpoint.LOCK, ADAPTER, f".{ADAPTER}-new", "predictions.jsonl"}
    if folder.is_dir() and {file.name for file in folder.iterdir()} <= unfinished:
        return None
    try:
        found = load_result(folder)
    except DataError:
        found = None
    if found is None or found.method not in ADAPTERS:
        raise ConfigError(f"{str(folder)!r} exists and holds no comparison of ours; move it away")
    if found.status == "interrupted":
        return None
    elsewhere = {"name": None, "output": None}  # a run's folder may have been moved, or given another name
    if {**found.config, **elsewhere} != {**config.model_dump(mode="json"), **elsewhere}:
        raise ConfigError(f"{str(folder)!r} was trained by another recipe; move it away, to compare anew")
    return found


def train_adapter(
    session: Session,
    kind: str,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_schedule: Callable[[Schedule, Any], None] | None = None,
) -> RunResult:
    """Train an adapter and write its folder: result, predictions, and the adapter in PEFT's own form.

    Args:
        session: the loaded recipe of `recipe_for`, with training data; its PLM is changed in place by LoRA.
        callbacks, on_schedule: as of `run.train`.

    Raises:
        FptError: as `run.train`, before compute is spent. TrainingStopped: loss or gradient stayed non-finite, or
            memory did not suffice.
    """
    started = time.perf_counter()
    config, ledger = session.config, FlopsLedger()
    folder, split, chooses = Path(config.output), final_split(session), config.train.keep == "best"
    set_seed(config.train.seed)
    prints = {"model": fingerprint.of_model(session.plm)}
    prints |= {name: examples_fingerprint(rows) for name, rows in session.examples.items()}
    adapted = adapt(session.plm, kind, trainable(session).parameter.detach().clone(), session.cost)
    best = _Best(adapted)

    def evaluate_adapter(step: int) -> dict[str, float]:
        found = evaluate(session, adapted)
        ledger.add("eval", found.flops)
        best.offer(step, found, found.result.values[session.task.primary])
        return dict(found.result.values)

    schedule = Schedule.preset("pt", session.cost.full_stage, total_steps=config.train.steps)
    if on_schedule is not None:
        on_schedule(schedule, session.cost.full_stage)
    loop = Loop(
        adapted,
        Batches(session.encoded["train"], make_collator(session.tokenizer, session.plm), config.train),
        config,
        schedule=schedule,
        cost=session.cost,
        evaluate=evaluate_adapter,
        ledger=ledger,
        callbacks=callbacks,
    )
    with ExitStack() as stack, written(folder):
        stack.enter_context(checkpoint.locked(folder))
        stack.enter_context(without_dropout(adapted.module) if config.trains_without_dropout else nullcontext())
        loop.run()
        if chooses:
            best.restore()
        final = best.evaluation if chooses and split == "validation" else None
        if final is None:
            final = evaluate(session, adapted, split)
            ledger.add("eval", final.flops)
        interrupted = loop.state.global_step < loop.state.max_steps
        result = result_of(
            session,
            loop,
            final,
            split,
            method=kind,
            status="interrupted" if interrupted else "finished",
            reason=f"signal {loop.signals.number}" if interrupted else None,
            best_step=best.step if chooses else loop.state.global_step,
            total_seconds=time.perf_counter() - started,
            fingerprints=prints,
        )
        with new_folder(folder / ADAPTER) as work:
            adapted.module.save_pretrained(str(work))
            (work / "README.md").unlink(missing_ok=True)  # a card with nothing filled in
        write_predictions(folder / "predictions.jsonl", session.examples[split], final)
        save_result(result, folder)
    return result


class _Best:
    """The best values of an adapter so far, in memory, and their scores; the earlier ones on a tie."""

    def __init__(self, adapted: Adapted):
        self.adapted, self.step, self.value = adapted, 0, float("-inf")
        self.values: list[torch.Tensor] = []
        self.evaluation: Evaluation | None = None

    def offer(self, step: int, evaluation: Evaluation, value: float) -> None:
        if value > self.value:
            self.step, self.value, self.evaluation = step, value, evaluation
            self.values = [p.detach().clone() for p in self.adapted.trained]

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.adapted.trained, self.values, strict=False):
                parameter.copy_(value)
