"""One run from a recipe: load, check everything, score, train on the schedule, evaluate on the full PLM, save."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any, Literal

from accelerate.tracking import get_available_trackers
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from ..cost.ledger import FlopsLedger
from ..data.batches import input_lengths
from ..data.splits import examples_fingerprint, tokens_fingerprint, train_split
from ..errors import ConfigError, TrainingStopped
from ..placements import FRONT
from ..plm import fingerprint
from ..plm.dropout import without_dropout
from ..plm.partial import PartialPLM
from ..prompt.prompted import PromptedPLM
from ..recipe import RunConfig
from ..schedule.auto import WINDOWS, AutoSchedule, probe_examples
from ..schedule.stages import Schedule
from ..train import checkpoint, parallel
from ..train.batches import Batches, make_collator
from ..train.loop import Loop
from ..train.resuming import log_of
from ..train.running_mean import EmaCallback
from .advice import GradientCheck, advise
from .best import Best, EarlyStop, Scored
from .choices import chosen
from .finish import finish, zero_shot
from .folder import Earlier, check_folder, open_folder, write_log
from .preparation import Needed, check_rate, checked_schedule, needed_by, scored_partial, trainable
from .pricing import batches_of_epoch, priced, say_if_nothing_is_saved
from .results import RunResult
from .session import Session, evaluate, open_session, with_steps

__all__ = ["Run", "train", "zero_shot"]

logger = logging.getLogger(__name__)


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
        callbacks: told of what `train.loop.EVENTS` names.
        session: a loaded session of the same model and data, to share between runs.
        on_schedule: called with the schedule and the full size before the first step.

    Raises:
        FptError: bad input, before compute is spent. TrainingStopped: loss or gradient stayed non-finite, memory did
            not suffice, or another process ended; the last good prompt or checkpoint is there.
    """
    started = time.perf_counter()
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := sorted(set(config.train.report_to) - available):
        raise ConfigError(f"train.report_to names {missing[0]!r}, which is not installed: pip install {missing[0]}")
    earlier = Earlier.of(overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    check_folder(config, earlier)
    set_seed(config.train.seed)
    if session is None:
        session = open_session(config, ("train", "validation"), resume=resume)
        config = session.config
    session.config = config = with_steps(chosen(config, session.task, session.plm), session.encoded["train"])
    run = Run.prepared(session, started)
    with ExitStack() as held:
        # All that can be refused has been: only now is an earlier run replaced, or a folder made.
        parallel.on_main(lambda: held.enter_context(checkpoint.locked(run.folder)))
        resume_point = parallel.on_main(lambda: open_folder(config, run.identity, run.prompted, earlier))
        run.score()
        if parallel.rank() == 0:
            advise(session)
        if on_schedule:
            on_schedule(run.schedule, session.cost.full_stage)
        return run.train(resume_point, callbacks)


@dataclass
class Run:
    """A recipe with everything it needs: checked, not begun.

    Args:
        prompted: the PLM with what is trained of it.
        rows, held_out: what is trained on, and what `auto` probes with.
        identity: hashes that a checkpoint belongs to.
        started: when the run began, in seconds of the clock that only goes on.
        partial: the PLM that can be cut, once `score` has made it.
        scoring_seconds: what that took.
    """

    session: Session
    prompted: PromptedPLM
    schedule: Schedule | AutoSchedule
    needed: Needed
    rows: Dataset
    held_out: Dataset | None
    identity: dict[str, Any]
    started: float
    partial: PartialPLM | None = None
    scoring_seconds: float = 0.0
    ledger: FlopsLedger = field(default_factory=FlopsLedger)

    @classmethod
    def prepared(cls, session: Session, started: float) -> Run:
        """The run of a session's recipe; nothing is computed or written.

        Raises:
            FptError: the recipe does not fit the model or the data.
        """
        config, rows = session.config, session.encoded["train"]
        prompted = trainable(session)
        check_rate(config, prompted.trained[0].dtype)
        schedule, needed = checked_schedule(session, prompted.module)
        held_out = None
        if isinstance(schedule, AutoSchedule):
            schedule, rows, held_out = _with_probe(schedule, session)
            needed = needed_by(schedule.candidates, config, prompted.module, session.cost.full_stage)
        if config.train.batch_tokens is not None:  # refused here, where an example is longer
            batches_of_epoch(config, input_lengths(rows))
        return cls(session, prompted, schedule, needed, rows, held_out, _identity(session), started)

    @property
    def config(self) -> RunConfig:
        """The recipe."""
        return self.session.config

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.config.output)

    def score(self) -> None:
        """Score neurons and layers where the schedule needs it, and make the PLM that can be cut."""
        self.partial, self.scoring_seconds = scored_partial(
            self.session, self.prompted.module, self.schedule, self.needed, self.folder, self.ledger
        )
        say_if_nothing_is_saved(self.session, self.schedule, self.ledger)

    def train(self, resume_point: checkpoint.Checkpoint | None, callbacks: Sequence[TrainerCallback]) -> RunResult:
        """Make the steps, from a checkpoint or the start, and end the run.

        Raises:
            TrainingStopped: as `train`.
        """
        places, primary = self.folder / "checkpoints", self.session.task.primary
        past = resume_point.record if resume_point else {}
        parallel.on_main(lambda: write_log(self.folder, log_of(resume_point)))
        for what in ("probe", "eval"):
            self.ledger.add(what, past.get("flops", {}).get(what, 0.0))
        best, scored = Best(places, primary, resume_point.step if resume_point else 0, self.prompted), Scored()

        def evaluate_prompt(step: int) -> dict[str, float]:
            prompt = None if self.prompted.whole else self.prompted.parameter.detach()
            evaluated = evaluate(self.session, self.session.prompted(prompt))
            self.ledger.add("eval", evaluated.flops)
            is_best = best.offer(step, evaluated.result.values[primary])
            scored.keep(prompt, evaluated, is_best)
            return dict(evaluated.result.values)

        def spent() -> dict[str, Any]:
            seconds = past.get("total_seconds", 0.0) + time.perf_counter() - self.started
            return {"total_seconds": seconds, "dtype": str(self.session.plm.dtype).removeprefix("torch.")}

        loop = self._loop(places, best, evaluate_prompt, spent, callbacks)
        loop.seconds = self.scoring_seconds  # a checkpoint's seconds hold them already
        quiet = without_dropout(self.prompted.module) if self.config.trains_without_dropout else nullcontext()
        with quiet:
            status, reason = self._steps(loop, resume_point)
        whole = self.prompted.whole
        if (self.config.train.keep == "best" and status != "stopped") or (whole and status == "stopped"):
            best.restore()  # all weights are too many to keep the last good ones: a stopped run has its best
        result = finish(self, loop, best, scored, status, reason)
        if status == "stopped":
            raise TrainingStopped(f"{reason} (saved in {self.folder / 'prompt'})")
        return result

    def _loop(
        self,
        places: Path,
        best: Best,
        evaluate_prompt: Callable[[int], dict[str, float]],
        spent: Callable[[], dict[str, Any]],
        callbacks: Sequence[TrainerCallback],
    ) -> Loop:
        config, session = self.config, self.session
        mean = [] if config.optim.ema_decay is None else [EmaCallback(config.optim.ema_decay)]
        collate = make_collator(session.tokenizer, session.plm, tails=True)
        return Loop(
            self.prompted,
            Batches(self.rows, collate, config.train),
            config,
            schedule=self.schedule,
            cost=session.cost,
            partial=self.partial,
            folder=places,
            evaluate=evaluate_prompt,
            probe=None if self.held_out is None else collate(list(self.held_out)),
            ledger=self.ledger,
            record={"config": config.model_dump(mode="json"), **self.identity},
            spent=spent,
            callbacks=[
                GradientCheck(self.prompted.trained, self.schedule),
                *mean,
                *([EarlyStop(best, config.train)] if config.train.patience else []),
                _RunLog(self.folder / "log.jsonl"),
                *callbacks,
            ],
        )

    def _steps(
        self, loop: Loop, resume_point: checkpoint.Checkpoint | None
    ) -> tuple[Literal["finished", "interrupted", "stopped"], str | None]:
        """Make the steps; how they ended, and why where it was not at the schedule's end."""
        try:
            loop.run(resume_point)
        except TrainingStopped as error:
            loop.book()
            if loop.good is not None:
                loop.good.go_back()
            return "stopped", str(error)
        except RuntimeError as error:
            if not parallel.is_lost(error):
                raise
            raise TrainingStopped(
                "another process of this run has ended, so this one cannot go on; start all of them again "
                "with --resume, from the last checkpoint if there is one"
            ) from error
        if loop.skipped_in_a_row and loop.good is not None:
            loop.good.go_back()  # the run ended within a row of bad steps: its prompt is the one before them
        if loop.signals.number is not None and loop.state.global_step < loop.state.max_steps:
            return "interrupted", f"signal {loop.signals.number}"
        return "finished", None


def _with_probe(schedule: AutoSchedule, session: Session) -> tuple[AutoSchedule, Dataset, Dataset | None]:
    """`auto` with its prices, the rows to train on, and those it probes with; None where it has nothing to try."""
    config, rows = session.config, session.encoded["train"]
    if config.stages is None and config.train.batch_tokens is not None:
        # A quarter of the batches that there are, not of those that the budget leaves no room for.
        usual = median_high(map(len, batches_of_epoch(config, input_lengths(rows))))
        schedule = AutoSchedule(config.auto_ladder(schedule.ladder[-1], usual), config.train.steps)
    if not schedule.tries and len(schedule.ladder) == 1 and config.prompt.placement != FRONT:
        return schedule, rows, None
    if not schedule.tries:
        logger.warning(
            "method=auto has nothing to try here, so this is plain prompt tuning: batches must have at least 4 "
            "examples (train.batch_size, train.batch_tokens), or stages be named, and train.steps=%d be at least %d",
            config.train.steps,
            WINDOWS,
        )
        return schedule, rows, None
    step_examples = config.train.batch_size * config.train.accumulate * parallel.shares()
    size = min(probe_examples(config.train.steps, step_examples), len(rows) // 4)
    held_out, rows = train_split(rows, size, config.train.seed)
    return priced(schedule, session, rows, size), rows, held_out


def _identity(session: Session) -> dict[str, Any]:
    """What a checkpoint belongs to beside its recipe: hashes of the model's weights, the data and its tokens."""
    data = {split: examples_fingerprint(session.examples[split]) for split in ("train", "validation")}
    tokens = tokens_fingerprint(session.encoded["train"])
    return {
        "fingerprints": {"model": fingerprint.of_model(session.plm), **data, "tokens": tokens},
        "processes": parallel.size(),
    }


class _RunLog(TrainerCallback):
    """Appends what is logged to `log.jsonl`; checkpoints hold the same, so a full disk loses nothing."""

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
