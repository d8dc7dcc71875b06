"""One run from a recipe: load, check everything, score, train on the schedule, evaluate on the full PLM, save."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.integrations import get_available_reporting_integrations

from ..cost.flops import BatchShape, FlopsLedger, forward_flops, schedule_flops, step_flops
from ..data.encoding import (
    LengthBatchSampler,
    examples_fingerprint,
    input_lengths,
    tokens_fingerprint,
    train_split,
)
from ..errors import CheckpointError, ConfigError, TrainingStopped
from ..plm import fingerprint
from ..plm.loading import describe_dtype
from ..plm.partial import PartialPLM
from ..prompt.placement import SuffixPromptModel
from ..prompt.soft_prompt import (
    load_prompt,
    placement_of,
    prompt_parameter,
)
from ..recipe import RunConfig
from ..schedule.auto import WINDOWS, AutoSchedule, default_ladder, probe_examples
from ..schedule.stages import Schedule, Stage
from ..train import checkpoint, parallel
from ..train.callback import AutoCallback, EmaCallback, ProgressiveCallback
from ..train.trainer import (
    PromptTrainer,
    StepGuard,
    batch_shape,
    make_collator,
    make_optimizer,
    training_arguments,
)
from .folder import check_folder, differences, log_of, prepare_folder, recipe_changes, write_log
from .preparation import calibration_batches, checked_schedule, scored_partial, trainable
from .results import Point, RunResult, environment, save_result
from .session import Evaluation, Session, evaluate, open_session, write_predictions

logger = logging.getLogger(__name__)


class _RunLog(TrainerCallback):
    """Appends what the Trainer logs to `log.jsonl`; its state holds the same, so a full disk loses nothing."""

    def __init__(self, path: Path):
        self.path, self.told = path, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
        except OSError as error:
            if not self.told:
                logger.warning("%s cannot be written (%s); training goes on", self.path, error)
            self.told = True


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_changed: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    session: Session | None = None,
    on_schedule: Callable[[Schedule | AutoSchedule, Any], None] | None = None,
) -> RunResult:
    """Run a recipe to its end; see `docs/` for what lies in the folder afterwards.

    Started by torchrun or accelerate, every process calls it and gets the result; the main one writes.

    Args:
        allow_changed: resume although the recipe, the model's weights or the data have changed since the checkpoint.
        session: a loaded session of the same model and data, to share between runs.
        on_schedule: called with the schedule and the full size before the first step.

    Raises:
        FptError: bad input, before compute is spent. TrainingStopped: loss or gradient stayed non-finite, memory did
            not suffice, or another process ended; the last good prompt or checkpoint is there.
    """
    started = time.perf_counter()
    if missing := sorted(set(config.train.report_to) - set(get_available_reporting_integrations())):
        raise ConfigError(f"train.report_to names {missing[0]!r}, which is not installed: pip install {missing[0]}")
    check_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    set_seed(config.train.seed)
    session = session or open_session(config, ("train", "validation"), resume=resume)
    session.config = config
    parallel.check_one_gpu(session.plm.device)
    model, trained = trainable(session)
    schedule, needed = checked_schedule(session, model)
    rows, held_out = session.encoded["train"], None
    if isinstance(schedule, AutoSchedule) and config.stages is None and config.train.batch_tokens is not None:
        # A quarter of the batches that there are, not of those that the budget leaves no room for.
        batches = _batches(config, input_lengths(rows))
        schedule = AutoSchedule(default_ladder(schedule.ladder[-1], median_high(map(len, batches))), config.train.steps)
    if isinstance(schedule, AutoSchedule) and not schedule.tries:
        logger.warning(
            "method=auto has nothing to try here, so this is plain prompt tuning: batches must have at least 4 "
            "examples (train.batch_size, train.batch_tokens), or stages be named, and train.steps=%d be at least %d",
            config.train.steps,
            WINDOWS,
        )
    elif isinstance(schedule, AutoSchedule):
        step_examples = config.train.batch_size * config.train.accumulate * parallel.size()
        size = min(probe_examples(config.train.steps, step_examples), len(rows) // 4)
        held_out, rows = train_split(rows, size, config.train.seed)
        schedule = _priced(schedule, session, rows, size)
    if config.train.batch_tokens is not None:  # refused here, where an example is longer
        _batches(config, input_lengths(rows))
    identity = _identity(session)
    folder = Path(config.output)
    with ExitStack() as held:
        # All that can be refused has been: only now is an earlier run replaced, or a folder made.
        parallel.on_main(lambda: held.enter_context(checkpoint.locked(folder)))
        found = parallel.on_main(
            lambda: _prepare(config, identity, model, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
        )
        ledger = FlopsLedger()
        partial = scored_partial(session, model, schedule, needed, folder, ledger)
        _say_if_nothing_is_saved(session, schedule, ledger)
        if on_schedule:
            on_schedule(schedule, session.cost.full_stage)
        data = rows, held_out
        return _train(
            session, data, model, trained, schedule, partial, folder, ledger, identity, found, started, callbacks
        )


def _batches(config: RunConfig, lengths: Sequence[int]) -> LengthBatchSampler:
    """An epoch's batches of one process."""
    train = config.train
    return LengthBatchSampler(lengths, train.batch_size, seed=train.seed, max_tokens=train.batch_tokens)


def _usual_shape(session: Session) -> BatchShape:
    """A training batch of usual size; with a prompt after the text, the texts are kept."""
    config = session.config
    batch = calibration_batches(session, config.train.batch_size)[0]
    shape = batch_shape(batch, config.prompt.tokens, session.cost)
    if config.prompt.placement == "prefix":
        return shape
    between = _usually_after(session)
    return replace(
        shape,
        placement="suffix",
        prompt_tokens=shape.prompt_tokens + between,
        input_tokens=max(shape.input_tokens - between, 1),
        text_examples=0,
        kept_cross=config.cache.cross_attention,
    )


def _usually_after(session: Session) -> int:
    """Tokens of an input that stand after an infix prompt: they cost what the prompt does."""
    infix = session.config.prompt.placement == "infix"
    return int(median_high(session.encoded["train"]["n_tail"])) if infix else 0


def _priced(schedule: AutoSchedule, session: Session, rows: Dataset, probe: int) -> AutoSchedule:
    """The schedule with what its stages and a probe of so many examples cost, on the batches of an epoch."""
    train, usual = session.config.train, _usual_shape(session)
    lengths = input_lengths(rows)
    batches = _batches(session.config, lengths)
    rest = usual.target_tokens if session.decoder else 0  # a decoder's rows hold their targets
    rest += _usually_after(session)
    shapes = [replace(usual, batch=len(b), input_tokens=max(max(lengths[i] for i in b) - rest, 0)) for b in batches]

    def flops(stage: Stage) -> float:
        return sum(step_flops(session.cost, stage, shape) for shape in shapes)

    full = flops(schedule.ladder[-1])

    def relative(stage: Stage) -> float:
        if usual.placement == "suffix" and not stage.is_full(schedule.ladder[-1]):
            return 1.0  # a partial PLM has texts of its own to run: nothing is known to be saved
        return min(1.0, flops(stage) / full)

    costs = [relative(stage) for stage in schedule.ladder]
    once = parallel.size() * forward_flops(session.cost, None, replace(usual, batch=probe))  # every process probes
    step = train.accumulate * parallel.size() * full / len(shapes)
    return AutoSchedule(schedule.ladder, schedule.asked, costs, once / step)


def _say_if_nothing_is_saved(session: Session, schedule: Schedule | AutoSchedule, ledger: FlopsLedger) -> None:
    """Warn where scoring costs what the stages save: a short run does not earn it back."""
    config = session.config
    if not ledger["score"] or isinstance(schedule, AutoSchedule):
        return
    shape = _usual_shape(session)
    batches = config.train.accumulate * parallel.size()
    stages = batches * schedule_flops(session.cost, schedule, shape)
    plain = batches * schedule.total_steps * step_flops(session.cost, None, shape)
    if stages + ledger["score"] >= plain:
        logger.warning(
            "nothing is saved: the stages cost %.0f%% of plain prompt tuning and scoring another %.0f%%; train longer, "
            "lower scoring.examples or scoring.layer_examples, reuse scores (scoring.path, scoring.layer_path), or "
            "take method=pt",
            100 * stages / plain,
            100 * ledger["score"] / plain,
        )


def _train(
    session: Session,
    data: tuple[Dataset, Dataset | None],
    model: nn.Module,
    trained: list[nn.Parameter],
    schedule: Schedule | AutoSchedule,
    partial: PartialPLM | None,
    folder: Path,
    ledger: FlopsLedger,
    identity: dict[str, Any],
    found: checkpoint.Checkpoint | None,
    started: float,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    """The steps of a run whose folder is held, from the checkpoint `found` or the start.

    Args:
        data: the rows to train on, and those that `auto` probes with.
    """
    config = session.config
    rows, held_out = data
    spare = schedule.most_steps - schedule.asked if isinstance(schedule, AutoSchedule) else 0
    full_tuning = config.method == "full"
    reached, past = (found.step, found.record) if found else (0, {})
    history = log_of(found)
    if parallel.rank() == 0:
        write_log(folder, history)
    for what in ("probe", "eval"):
        ledger.add(what, past.get("flops", {}).get(what, 0.0))
    guard = StepGuard(trained, remember=not full_tuning, save_minutes=config.train.save_minutes)
    guard.seconds = past.get("train_seconds", 0.0)
    past_total = past.get("total_seconds", 0.0)

    def spent() -> dict[str, Any]:
        return {
            "train_seconds": guard.seconds,
            "total_seconds": past_total + time.perf_counter() - started,
            "dtype": str(session.plm.dtype).removeprefix("torch."),
        }

    best = _Best(folder / "checkpoints", session.task.primary, full_tuning, reached)

    scored = _Scored()

    def evaluate_prompt(step: int) -> dict[str, float]:
        prompt = None if full_tuning else prompt_parameter(model).detach()
        found = evaluate(session, prompt)
        ledger.add("eval", found.flops)
        is_best = best.offer(step, found.result.values[session.task.primary], model)
        scored.keep(prompt, found, is_best)
        return dict(found.result.values)

    decay, infix = config.optim.ema_decay, config.prompt.placement == "infix"
    ema = [] if decay is None else [EmaCallback(decay)]  # the guard before it: it keeps means, too
    trainer = PromptTrainer(
        model=model,
        args=training_arguments(config, str(folder / "checkpoints"), session.plm.device, spare_steps=spare),
        train_dataset=rows,
        eval_dataset=session.encoded["validation"],
        data_collator=make_collator(session.tokenizer, session.plm, tails=partial is not None, after=infix),
        optimizers=make_optimizer(trained, config.optim),
        callbacks=[guard, *ema, _RunLog(folder / "log.jsonl"), *callbacks],
        schedule=schedule,
        cost=session.cost,
        prompt_tokens=0 if full_tuning else config.prompt.tokens,
        evaluate_prompt=evaluate_prompt,
        ledger=ledger,
        full_tuning=full_tuning,
        record={"config": config.model_dump(mode="json"), **identity},
        spent=spent,
        batch_tokens=config.train.batch_tokens,
        compile_layers=config.train.compile,
    )
    guard.trainer, trainer.good = trainer, guard.good
    if isinstance(schedule, AutoSchedule) and partial is not None and held_out is not None:
        probe = make_collator(session.tokenizer, session.plm, after=infix)(list(held_out))
        counted = lambda: ledger.add("probe", parallel.size() * trainer.probe_flops(probe))  # noqa: E731
        trainer.add_callback(AutoCallback(partial, schedule, probe, on_probe=counted))
        schedule.replay(history)
    elif partial is not None:
        trainer.add_callback(ProgressiveCallback(partial, schedule))
    status, reason = "finished", None
    with guard:
        try:
            if found is not None and reached >= schedule.total_steps:
                trainer.resume_finished(str(found.folder))
            else:
                trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
            if guard.signal is not None and trainer.state.global_step < schedule.total_steps:
                status, reason = "interrupted", f"signal {guard.signal}"
        except TrainingStopped as error:
            status, reason = "stopped", str(error)
            guard.go_back()
            trainer.store_flos()
        except RuntimeError as error:
            if not parallel.is_lost(error):
                raise
            raise TrainingStopped(
                "another process of this run has ended, so this one cannot go on; the last checkpoint is kept: start "
                "all of them again with --resume"
            ) from error
        finally:
            if partial is not None:
                partial.restore()
            if config.train.gradient_checkpointing:
                session.plm.gradient_checkpointing_disable()  # the session may serve other runs
    if trainer.skipped_in_a_row:
        guard.go_back()  # the run ended within a row of bad steps: its prompt is the one before them
    ledger.add("train", trainer.state.total_flos)
    scored_at = [entry["step"] for entry in trainer.state.log_history if f"eval_{session.task.primary}" in entry]
    if status == "finished" and trainer.state.global_step not in scored_at:
        trainer.evaluate()
    if (config.train.keep == "best" and status != "stopped") or (full_tuning and status == "stopped"):
        best.restore(model)  # all weights are too many to keep the last good ones: a stopped run has its best
    result = _finish(
        session, model, trainer, schedule, partial, folder, ledger, best, scored, status, reason, spent(), identity
    )
    if status == "stopped":
        raise TrainingStopped(f"{reason} (saved in {folder / 'prompt'})")
    return result


def _identity(session: Session) -> dict[str, Any]:
    """What a checkpoint belongs to beside its recipe: hashes of the model's weights, the data and its tokens."""
    data = {split: examples_fingerprint(session.examples[split]) for split in ("train", "validation")}
    tokens = tokens_fingerprint(session.encoded["train"])
    return {
        "fingerprints": {"model": fingerprint.of_model(session.plm), **data, "tokens": tokens},
        "processes": parallel.size(),
    }


def _prepare(
    config: RunConfig,
    identity: dict[str, Any],
    model: nn.Module,
    *,
    overwrite: bool,
    resume: bool,
    allow_changed: bool,
) -> checkpoint.Checkpoint | None:
    """Make the folder ready to be written, and find the checkpoint to go on from.

    Raises:
        ConfigError: as `prepare_folder`; or model, data or the number of processes have changed since the checkpoint.
        CheckpointError: the checkpoint is of another method or another prompt than `model` has.
    """
    folder, places = Path(config.output), Path(config.output) / "checkpoints"
    check_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    changed = recipe_changes(config) if resume else []
    if resume:
        checkpoint.clear_leftovers(places)
    found = checkpoint.latest(places) if resume else None
    if found is not None:
        before = {key: found.record.get(key) for key in identity}
        changed += differences(before, identity)
    if changed and not allow_changed:
        raise ConfigError(
            f"changed since the checkpoint of step {found.step if found else 0}: {'; '.join(changed)}; set it back, or "
            "add --allow-changed to go on all the same"
        )
    if found is not None:
        _check_fits(found, model, config.method == "full")
    prepare_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)  # writes the new recipe
    if changed:
        logger.warning("going on although changed: %s", "; ".join(changed))
        if any(c.startswith(("scoring", "fingerprints.model")) for c in changed):
            for name in ("scores.safetensors", "layers.safetensors"):  # of another model, or made another way
                (folder / name).unlink(missing_ok=True)
        if any(c.startswith(("fingerprints.model", "fingerprints.validation")) for c in changed):
            checkpoint.discard_best(places)  # measured on something else
    if resume and found is None:
        logger.warning("no checkpoint in %s that could be used: starting from step 0", folder)
    return found


def _check_fits(found: checkpoint.Checkpoint, model: nn.Module, full_tuning: bool) -> None:
    """Raise unless the checkpoint holds what this run trains (its recipe may have been changed on request)."""
    where = str(found.folder)
    if full_tuning != (not (found.folder / "adapter_config.json").is_file()):
        raise CheckpointError(f"{where!r} is of another method; use --overwrite")
    if not full_tuning:
        place = model.placement if isinstance(model, SuffixPromptModel) else "prefix"
        have = (placement_of(found.folder), *load_prompt(found.folder).shape)
        if have != (want := (place, *prompt_parameter(model).shape)):
            raise CheckpointError(f"{where!r} holds a prompt {have}, this run needs {want}: placement, tokens, width")


class _Best:
    """The best prompt so far by the task's first metric on the full PLM, kept on disk beside the checkpoints.

    Args:
        folder: where the checkpoints lie; the best is `best-STEP` there.
        reached: step that the run goes on from; a later best will be found again.
    """

    def __init__(self, folder: Path, primary: str, full_tuning: bool, reached: int):
        self.folder, self.primary, self.full_tuning = folder, primary, full_tuning
        self.step, self.value = 0, float("-inf")
        self.prompt: torch.Tensor | None = None
        self.saved: Path | None = None
        found = parallel.on_main(lambda: checkpoint.latest(folder, "best", until=reached))
        if found is not None:
            self.step, self.value, self.saved = found.step, found.record["value"], found.folder
            self.prompt = None if full_tuning else load_prompt(found.folder)
        if parallel.rank() == 0:
            checkpoint.discard_best(folder, after=reached)

    def offer(self, step: int, value: float, model: nn.Module) -> bool:
        """Keep the model's prompt if it is the best yet, and say so; the earlier one on a tie."""
        if value <= self.value:
            return False
        self.step, self.value = step, value
        if not self.full_tuning:
            self.prompt = prompt_parameter(model).detach().cpu().clone()
        self.saved = self.folder / f"best-{step}"
        if parallel.rank() != 0:
            return True
        try:
            with checkpoint.new_folder(self.saved) as work:
                checkpoint.save_trained(work, model)
                checkpoint.seal(work, step, {"value": value, "metric": self.primary})
        except checkpoint.CANNOT_WRITE as error:
            logger.warning("the best prompt, of step %d, cannot be written (%s); training goes on", step, error)
        return True

    def restore(self, model: nn.Module) -> None:
        """Give the model its best prompt back, or all of its best weights."""
        with torch.no_grad():
            if self.prompt is not None:
                prompt_parameter(model).copy_(self.prompt)
            elif self.full_tuning and self.saved is not None:
                for file in sorted(self.saved.glob("*.safetensors")):
                    model.load_state_dict(load_file(file), strict=False)  # tied weights are saved once


class _Scored:
    """Scores of the last prompt and of the best on validation data, so that a run's end need not score them again."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, Evaluation] | None = None
        self._best: tuple[torch.Tensor, Evaluation] | None = None

    def keep(self, prompt: torch.Tensor | None, found: Evaluation, is_best: bool) -> None:
        if prompt is not None:
            self._last = prompt.clone(), found
            self._best = self._last if is_best else self._best

    def of(self, prompt: torch.Tensor | None) -> Evaluation | None:
        """What was found of exactly this prompt; None if it was not scored in this process."""
        for pair in (self._last, self._best):
            if pair is not None and prompt is not None and torch.equal(pair[0], prompt):
                return pair[1]
        return None


def _finish(
    session: Session,
    model: nn.Module,
    trainer: PromptTrainer,
    schedule: Schedule | AutoSchedule,
    partial: PartialPLM | None,
    folder: Path,
    ledger: FlopsLedger,
    best: _Best,
    scored: _Scored,
    status: Any,
    reason: str | None,
    spent: dict[str, float],
    identity: dict[str, Any],
) -> RunResult:
    full_tuning = session.config.method == "full"
    prompt = None if full_tuning else prompt_parameter(model).detach()
    # A test split, where one is loaded, has had no part in choosing the best prompt.
    split = "test" if "test" in session.examples else "validation"
    final = scored.of(prompt) if split == "validation" else None
    if final is None:
        final = evaluate(session, prompt, split)
        # A resumed run scores again what it no longer knows; like steps that are made twice, that counts once.
        if status != "finished" or split != "validation" or full_tuning:
            ledger.add("eval", final.flops)
    log: list[dict[str, Any]] = list(trainer.state.log_history)
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
    config = session.config
    result = RunResult(
        name=config.name or folder.name,
        method=config.method,
        status=status,
        reason=reason,
        config=config.model_dump(mode="json"),
        schedule=schedule.now.to_dict(),
        boundaries=list(schedule.now.boundaries),
        kept_layers=[partial.kept_layers(s) for s in schedule.now.stages] if partial is not None else [],
        steps=trainer.state.global_step,
        skipped_steps=trainer.skipped,
        primary=session.task.primary,
        metrics=final.result.values,
        intervals=final.result.intervals,
        split=split,
        examples=final.result.n,
        best_step=best.step if config.train.keep == "best" else trainer.state.global_step,
        curve=list({p.step: p for p in curve}.values()),
        losses=[(r["step"], r["loss"]) for r in log if "loss" in r],
        flops=ledger.to_dict(),
        train_seconds=spent["train_seconds"],
        total_seconds=spent["total_seconds"],
        prompt_folder=None if full_tuning else str(folder / "prompt"),
        fingerprints={
            **{split: examples_fingerprint(rows) for split, rows in session.examples.items()},
            **identity["fingerprints"],
            **({"model": "trained"} if full_tuning else {}),
        },
        environment=environment(session.plm.device, dtype=describe_dtype(config.model.dtype, session.plm)),
    )
    if parallel.rank() == 0:
        try:
            with checkpoint.new_folder(folder / ("model" if full_tuning else "prompt")) as work:
                model.save_pretrained(str(work))  # type: ignore[operator]
                if full_tuning:
                    session.tokenizer.save_pretrained(str(work))  # a whole model, that `model.path` can name
            write_predictions(folder / "predictions.jsonl", session.examples[split], final)
            write_log(folder, log)
            save_result(result, folder)
        except checkpoint.CANNOT_WRITE as error:
            raise ConfigError(
                f"output={str(folder)!r} cannot be written at the end of the run ({error}); the checkpoints are kept: "
                "make room, and run it again with --resume"
            ) from error
    return result


def zero_shot(session: Session) -> RunResult:
    """The PLM without any prompt, as a result to compare with: on validation data, and on test data if loaded."""
    on = {split: evaluate(session, None, split) for split in ("validation", "test") if split in session.examples}
    split, found = list(on.items())[-1]
    start = Point(step=0, metrics=on["validation"].result.values, train_flops=0.0, train_seconds=0.0)
    return RunResult(
        name="zero-shot",
        method="none",
        status="evaluated",
        config=session.config.model_dump(mode="json"),
        schedule=[],
        boundaries=[],
        steps=0,
        primary=session.task.primary,
        metrics=found.result.values,
        intervals=found.result.intervals,
        split=split,
        examples=found.result.n,
        best_step=0,
        curve=[start],
        flops=FlopsLedger({"eval": sum(e.flops for e in on.values())}).to_dict(),
        train_seconds=0.0,
        total_seconds=sum(e.seconds for e in on.values()),
        fingerprints={"model": fingerprint.of_model(session.plm)},
        environment=environment(session.plm.device, dtype=describe_dtype(session.config.model.dtype, session.plm)),
    )
