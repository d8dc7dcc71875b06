"""What a run's steps will cost before they are made: batches, their usual shape, and what stages save."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_high

from datasets import Dataset

from ..cost.flops import forward_flops, schedule_flops, step_flops
from ..cost.ledger import FlopsLedger
from ..cost.shapes import BatchShape
from ..data.batches import LengthBatchSampler, input_lengths
from ..placements import placement_of
from ..prompt.front import batch_shape
from ..recipe import RunConfig
from ..schedule.auto import AutoSchedule, decisions
from ..schedule.stages import Schedule, Stage
from ..train import parallel
from .preparation import calibration_batches
from .session import Session

logger = logging.getLogger(__name__)


def batches_of_epoch(config: RunConfig, lengths: Sequence[int]) -> LengthBatchSampler:
    """An epoch's batches of one process."""
    train = config.train
    return LengthBatchSampler(lengths, train.batch_size, seed=train.seed, max_tokens=train.batch_tokens)


def usual_shape(session: Session) -> BatchShape:
    """A training batch of usual size; texts that run apart from the prompt are kept."""
    config = session.config
    batch = calibration_batches(session, config.train.batch_size)[0]
    shape = batch_shape(batch, config.prompt.tokens, decoder=session.decoder)
    tail = int(median_high(session.encoded["train"]["n_tail"]))
    return shape.placed(placement_of(config.prompt.placement), tail=tail, kept_cross=config.cache.cross_attention)


def priced(schedule: AutoSchedule, session: Session, rows: Dataset, probe: int) -> AutoSchedule:
    """The schedule with what its stages, a probe of so many examples and questions cost, on the batches of an epoch.

    Stages that would have to be asked, and save less than that costs, are left out.
    """
    train, usual = session.config.train, usual_shape(session)
    lengths = input_lengths(rows)
    batches = batches_of_epoch(session.config, lengths)
    # What of a row stands behind the prompt: a decoder's rows hold their targets.
    rest = (usual.target_tokens if session.decoder else 0) + usual.prompt_tokens - session.config.prompt.tokens
    shapes = [replace(usual, batch=len(b), input_tokens=max(max(lengths[i] for i in b) - rest, 0)) for b in batches]

    def flops(stage: Stage) -> float:
        return sum(step_flops(session.cost, stage, shape) for shape in shapes)

    full = flops(schedule.ladder[-1])

    def relative(stage: Stage) -> float:
        if usual.text_apart and not stage.is_full(schedule.ladder[-1]):
            return 1.0  # a partial PLM has texts of its own to run: nothing is known to be saved
        return min(1.0, flops(stage) / full)

    costs = [relative(stage) for stage in schedule.ladder]
    once = parallel.shares() * forward_flops(session.cost, None, replace(usual, batch=probe))  # every process probes
    step = train.accumulate * parallel.shares() * full / len(shapes)
    asked = replace(usual.in_front, batch=probe)  # no texts are kept of a stage that is only asked

    def asking(stage: Stage) -> float:
        sizes = (schedule.ladder[-1], replace(stage, batch=None))
        return parallel.shares() * sum(step_flops(session.cost, size, asked) for size in sizes) / step

    prices = [asking(stage) for stage in schedule.ladder]
    known = AutoSchedule(schedule.ladder, schedule.asked, costs, once / step, prices)
    paying = [i for i, stage in enumerate(known.ladder) if not known.is_cut(i) or known.pays(i)]
    for i in sorted(set(range(len(known.ladder))) - set(paying)):
        decisions.info("auto: %s is not tried: to ask what it teaches costs more than it could save", known.ladder[i])
    return AutoSchedule(
        [known.ladder[i] for i in paying],
        schedule.asked,
        [costs[i] for i in paying],
        once / step,
        [prices[i] for i in paying],
    )


def say_if_nothing_is_saved(session: Session, schedule: Schedule | AutoSchedule, ledger: FlopsLedger) -> None:
    """Warn where scoring costs what the stages save: a short run does not earn it back."""
    config = session.config
    if not ledger["score"] or isinstance(schedule, AutoSchedule):
        return
    shape = usual_shape(session)
    batches = config.train.accumulate * parallel.shares()
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
