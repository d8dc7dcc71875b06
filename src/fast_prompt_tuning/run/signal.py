"""Whether a smaller stage would pay for this model and task: the signal of candidates at prompts along the way.

A partial PLM may point where the full PLM does at the initial prompt, and elsewhere a few steps later. So candidates
are asked at both, and save only where they certainly would at both.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..cost.flops import work_flops
from ..data.splits import train_split
from ..errors import ConfigError, ScheduleError
from ..plm.modes import evaluating
from ..plm.objective import IGNORED
from ..plm.partial import PartialPLM
from ..prompt.prompted import PromptedPLM
from ..prompt.soft_prompt import init_soft_prompt, place_of
from ..schedule.stages import METHODS, PAPER_FRACTIONS, Schedule, Stage
from ..scores.neurons import on_device
from ..scores.signal import measure, signals
from ..train import parallel
from ..train.batches import make_collator, sampler_of
from ..train.optimizer import make_optimizer
from .preparation import (
    calibration_batches,
    cut_by,
    needed_by,
    score_flops,
    score_layers,
    score_neurons,
    trainable,
)
from .session import Session

BATCH = "batch"
"""The group of candidates that are the full PLM on a part of the batch."""

PRESETS = tuple(name for name, cuts in METHODS.items() if any(cuts))
"""The paper's methods that cut the PLM."""


@dataclass(frozen=True)
class Candidate:
    """A stage, and the words for it: of the `group` that a sentence names, and its own `name`."""

    group: str
    name: str
    stage: Stage


def candidates(session: Session, full: Stage, passes: int = 1) -> list[Candidate]:
    """The recipe's own stages, or those of the paper's presets; then the full PLM on halves of the batch.

    Args:
        passes: as `signals`; a batch's name counts all of them.
    """
    config = session.config
    stacks = config.cut_stacks(full, session.task.stacks)
    found = []
    if config.stages is not None:
        own = (replace(s.stage(full, stacks), steps=0) for s in config.stages)
        small = [s for s in own if not s.is_full(full) or s.cuts_batch]
        found = [Candidate(str(stage), str(stage), stage) for stage in small]
    else:
        for method in PRESETS:
            with suppress(ScheduleError):  # a model so small that the preset cuts nothing
                stages = Schedule.preset(method, full, total_steps=4, stacks=stacks).stages
                found += [
                    Candidate(method, f"{method} {part:.0%}", replace(stage, steps=0))
                    for part, stage in zip(PAPER_FRACTIONS, stages, strict=False)
                ]
    halves = itertools.takewhile(lambda n: n >= 1, (config.train.batch_size // 2**k for k in itertools.count(1)))
    return [*found, *(Candidate(BATCH, f"a batch of {n * passes}", replace(full, batch=n)) for n in halves)]


def report(session: Session, *, examples: int | None = None, after: int = 8, at: Path | None = None) -> dict[str, Any]:
    """The signal of every candidate on training examples.

    Args:
        session: with its training split loaded; `config.scoring` says how layers and neurons are chosen.
        examples: to measure on, rounded up to whole batches; the steps between train on others. Default 32, or a plain
            step's where those are more.
        after: plain steps between the initial prompt and the second one; 0: the initial one alone.
        at: the run, or folder, whose prompt is asked instead.

    Returns:
        Plain JSON types: `prompts`, each with its `rows` (`Signal` by name), what a plain step costs and its `noise`,
        and how far the prompt has `moved`, of its norm; `verdict`, one sentence; and what it took, `flops`, `seconds`.

    Raises:
        ConfigError: `at` is another model's prompt or stands elsewhere; too few training examples.
        ScoreError: as `measure` and `signals`.
    """
    begun = time.perf_counter()
    config, train = session.config, session.config.train
    if at is not None and place_of(at) != config.prompt.placement:
        raise ConfigError(
            f"--at {str(at)!r} holds a prompt of placement {place_of(at)!r}, the recipe's is "
            f"{config.prompt.placement!r}; set prompt.placement={place_of(at)}"
        )
    passes = train.accumulate * parallel.shares()
    wanted = max(32, train.batch_size * passes) if examples is None else examples
    measured_on, rows = train_split(
        session.encoded["train"], math.ceil(wanted / train.batch_size) * train.batch_size, train.seed
    )
    prompted = trainable(session)
    if at is not None:
        init_soft_prompt(prompted.module, "prompt", path=at)
    found = candidates(session, PartialPLM(prompted.module).full_stage, passes)
    partial, scoring = _partial(session, prompted, [c.stage for c in found])
    batches = [batch for step in _batches(session, measured_on) for batch in step]
    prompts = [_asked(partial, prompted, found, batches, passes)]
    steps = 0.0
    if after and at is None:
        start = prompted.parameter.detach().clone()
        values, steps = parallel.computed(lambda: _plain_steps(session, prompted, rows, after))
        with torch.no_grad():
            prompted.parameter.copy_(values)
        prompts.append(_asked(partial, prompted, found, batches, passes))
        prompts[-1] |= {"step": after, "moved": float((prompted.parameter.detach() - start).norm() / start.norm())}
    return {
        "model": config.model.path,
        "task": session.task.name,
        "placement": config.prompt.placement,
        "dtype": str(session.plm.dtype).removeprefix("torch."),
        "keep_layers": config.scoring.keep_layers,
        "seed": train.seed,
        "examples": len(measured_on),
        "batch": train.batch_size * passes,
        "at": None if at is None else str(at),
        "prompts": prompts,
        "verdict": verdict(found, [p["rows"] for p in prompts]),
        "flops": {"score": scoring, "steps": steps, "signal": sum(p.pop("flops") for p in prompts)},
        "seconds": time.perf_counter() - begun,
    }


def _partial(session: Session, prompted: PromptedPLM, stages: list[Stage]) -> tuple[PartialPLM, float]:
    """The PLM as the recipe's `scoring` cuts it for these stages, checked; and the FLOPs of scoring it."""
    model, scoring = prompted.module, session.config.scoring
    needed = needed_by(stages, session.config, model, PartialPLM(model, keep_neurons="first").full_stage)
    neurons, layers, flops = needed.neurons, needed.layers, 0.0
    if needed.scores and neurons is None:
        neurons = parallel.computed(lambda: score_neurons(session, model))
        flops += sum(score_flops(session, batch) for batch in calibration_batches(session, scoring.examples))
    if needed.down_to and layers is None:
        layers = parallel.computed(lambda: score_layers(session, model, scoring.keep_layers, needed.down_to))
        flops += float(layers.metadata["flops"])
    return cut_by(session.config, model, neurons, layers), flops


def _batches(session: Session, rows: Dataset, epoch: int = 0) -> Iterator[list[dict[str, torch.Tensor]]]:
    """An epoch's batches, each as the forward passes of all processes, with what stages that cut inputs need."""
    size, order = session.config.train.batch_size, sampler_of(rows, session.config.train)
    order.set_epoch(epoch)
    collate = make_collator(session.tokenizer, session.plm, tails=True)
    for picked in order:
        starts = range(0, len(picked), size)
        yield [collate([rows[i] for i in picked[start : start + size]]) for start in starts]


def _plain_steps(session: Session, prompted: PromptedPLM, rows: Dataset, steps: int) -> tuple[torch.Tensor, float]:
    """The prompt `(P, H)` after plain steps, on the CPU, and their FLOPs; one process makes the passes of all."""
    parameter, optim = prompted.parameter, session.config.optim
    optimizer, rates = make_optimizer([parameter], optim, session.config.train.steps)
    epochs = itertools.chain.from_iterable(_batches(session, rows, epoch) for epoch in itertools.count())
    flops = 0.0
    with evaluating(prompted.module):
        for _ in range(steps):
            taken = itertools.islice(epochs, session.config.train.accumulate)
            batches = [on_device(batch, prompted.plm) for step in taken for batch in step]
            labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
            for batch in batches:
                loss, work = prompted.loss(batch, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                flops += work_flops(session.cost, work)
            torch.nn.utils.clip_grad_norm_([parameter], optim.max_grad_norm)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
    return parameter.detach().cpu().clone(), flops


def _asked(
    partial: PartialPLM,
    prompted: PromptedPLM,
    found: Sequence[Candidate],
    batches: Sequence[dict[str, torch.Tensor]],
    passes: int,
) -> dict[str, Any]:
    """The signal of the candidates at the prompt as it is; processes share the batches."""
    full = partial.full_stage
    stages = {"full": full, **{c.name: c.stage for c in found}}
    measured = parallel.merge(measure(prompted, partial, list(stages.values()), parallel.share(batches)), len(batches))
    made = signals(stages, measured, full, passes=passes)
    plain = [one[full] for one in measured]
    return {
        "step": 0,
        "noise": made.pop("full").noise,
        "step_flops": passes * sum(m.flops for m in plain) / len(plain),
        "step_seconds": passes * sum(m.seconds for m in plain) / len(plain),
        "flops": sum(m.spent for one in measured for m in one.values()),
        "rows": {c.name: {"group": c.group, **asdict(made[c.name])} for c in found},
    }


def verdict(found: Sequence[Candidate], prompts: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """One sentence on what would save something, certainly and at every prompt asked.

    Args:
        prompts: of each prompt, the signals by the candidates' names.
    """

    def best(candidate: Candidate) -> float:
        return min(rows[candidate.name]["per_second"]["value"] for rows in prompts)

    saving = [c for c in found if all(rows[c.name]["saves"] for rows in prompts)]
    groups = {c.group for c in saving}
    parts = [f"{_joined(none)} would save nothing"] if (none := _idle(found, groups)) else []
    for c in saving:
        if c.group != BATCH:
            beyond = all(rows[c.name]["per_batch"]["low"] > 1 for rows in prompts)
            parts.append(f"{c.name} would save" + ("" if beyond else ", though not surely more than a smaller batch"))
    halves = [c for c in saving if c.group == BATCH]
    if halves:
        parts.append(f"{max(halves, key=best).name} would" + (" save" if not none else ""))
    elif any(c.group == BATCH for c in found):
        parts.append("nor would a smaller batch" if none else "a smaller batch would save nothing")
    return f"On this model and task {'; '.join(parts)}."


def _idle(found: Sequence[Candidate], saving: set[str]) -> list[str]:
    return list(dict.fromkeys(c.group for c in found if c.group != BATCH and c.group not in saving))


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
