"""The signal of a stage: how much a step of it teaches the full PLM, for what the step costs.

With per-example prompt gradients g of the full PLM and h of a candidate, both at the current prompt, a step along the
mean h of b examples lowers the full PLM's loss, at the best step length and under a curvature λ that is the same in
all directions, by

    (ḡ·h̄)² / (‖h̄‖² + V_h / b) / 2λ        V_h = E‖h − h̄‖²

For h = g this is McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", Section 2.2, with its noise
scale V_g / ‖ḡ‖². A candidate's direction h̄ need not be ḡ. Where ḡ·h̄ is negative, the step raises the loss: the signal
has its sign.

Sizes: n examples, P prompt length, H `d_model`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch

from ..cost.flops import work_flops
from ..cost.shapes import CostModel
from ..cost.work import Work
from ..data.trimming import trim
from ..errors import ScoreError
from ..plm.modes import evaluating
from ..plm.partial import PartialPLM
from ..prompt.prompted import PromptedPLM
from ..schedule.stages import Stage
from .neurons import on_device


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval, from a jackknife over examples (Efron and Stein 1981, "The Jackknife Estimate of
    Variance"). A bootstrap would draw examples twice, and bring back the terms of an example with itself.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One batch at one stage.

    Args:
        gradients: with respect to each example's prompt `(B, P·H)`; None where the stage keeps a part of the batch, and
            only its cost was asked.
        flops: of a training step of this stage on this batch.
        seconds: likewise.
        spent: FLOPs of all that was run here.
    """

    gradients: torch.Tensor | None
    flops: float
    seconds: float
    spent: float


@dataclass(frozen=True)
class Signal:
    """What a candidate stage teaches the full PLM, beside plain prompt tuning on the same examples.

    Args:
        stage: its size, batch and input length, as `Stage.to_dict` gives it.
        batch: examples b of a step.
        full: it is the full PLM on whole inputs, whatever its batch: its gradient has no other direction.
        flops: of a step, relative to a plain step.
        seconds: likewise.
        cosine: of ḡ and h̄. An estimate may lie beyond 1, and is NaN where h̄ or ḡ is lost in noise.
        noise: V_h / ‖h̄‖², in examples: with so many a step's mean is as much noise as direction.
        signal: relative to that of a plain step.
        per_flop: signal for the FLOPs of a step, relative to plain prompt tuning.
        per_second: likewise for its seconds.
        per_batch: signal relative to that of the full PLM on so few examples that it costs the same FLOPs.
        saves: the interval of `per_flop` lies above 1, and so does that of `per_second`.
    """

    stage: dict[str, Any]
    batch: int
    full: bool
    flops: float
    seconds: float
    cosine: Estimate
    noise: float
    signal: Estimate
    per_flop: Estimate
    per_second: Estimate
    per_batch: Estimate
    saves: bool


# -- gradients ---------------------------------------------------------------------------------------------------------


def example_gradients(prompted: PromptedPLM, batch: Mapping[str, Any]) -> tuple[torch.Tensor, Work]:
    """Prompt gradients `(B, P·H)` of every example's loss, summed over its labels, and the work: one step's.

    Every example gets a copy of the prompt: one backward pass then gives all gradients, as quick as that of the batch.

    Args:
        prompted: with its prompt `(P, H)`, and the PLM at the size it has.
        batch: as `PromptedPLM.loss`.

    Raises:
        ScoreError: a gradient is not finite.
    """
    prompt = prompted.prompt
    if prompt is None or prompt.dim() != 2:
        raise ScoreError("prompted.prompt must be one soft prompt (P, H); make it with session.prompted(prompt)")
    copies = prompt.detach().float().expand(len(batch["input_ids"]), *prompt.shape).clone().requires_grad_()
    with evaluating(prompted.plm), torch.enable_grad():
        loss, work = replace(prompted, prompt=copies, module=None).loss(batch, 1)
        (found,) = torch.autograd.grad(loss, copies)
    if not torch.isfinite(found).all():
        raise ScoreError("a prompt gradient is not finite; measure in bfloat16 or float32, or at another prompt")
    return found.flatten(1).cpu(), work


def measure(
    prompted: PromptedPLM,
    partial: PartialPLM,
    stages: Sequence[Stage],
    batches: Sequence[Mapping[str, Any]],
) -> list[dict[Stage, Measured]]:
    """Gradients and cost of the full PLM and of every stage, at the current prompt; the PLM keeps the size it has.

    Stages that differ in their batch alone share their gradients.

    Args:
        partial: of `prompted.plm`.
        stages: candidates.
        batches: training examples as `PromptedPLM.loss` takes them, with `n_tail` where a stage cuts inputs.

    Returns:
        For every batch what `signals` reads. Processes may share the batches and put their lists together.

    Raises:
        ScheduleError, ScoreError, ModelError: as `PartialPLM.check` and `example_gradients`.
    """
    full = partial.full_stage
    for stage in stages:
        partial.check(stage)
    with partial.at(full):
        cost = CostModel.from_model(prompted.plm)
    runs = list(dict.fromkeys(r for stage in (full, *stages) for r in (_whole(stage, full), _step(stage, full))))
    found: list[dict[Stage, Measured]] = [{} for _ in batches]
    for i, batch in enumerate(batches):
        # Rows of a batch may be sorted by length: over all batches, parts of them begin everywhere.
        turn = len(batch["input_ids"]) * i // len(batches)
        # Every other batch goes backwards, so that drift of the machine falls on all stages alike.
        for run in runs if i % 2 == 0 else reversed(runs):
            with partial.at(run):
                found[i][run] = _measured(prompted, batch, run, cost, turn=turn, first=i == 0)
    partial.resize(partial.stage)  # let go of what was narrowed for stages that are over
    return found


def ask(
    prompted: PromptedPLM, partial: PartialPLM, stage: Stage, examples: Mapping[str, Any], *, step_examples: int
) -> tuple[Signal, float]:
    """The signal of one stage beside the full PLM on as many examples of a step, and the FLOPs that asking took.

    Args:
        examples: training examples, as `measure` takes a batch.
        step_examples: of an optimizer step on `stage`.

    Raises:
        ScheduleError, ScoreError, ModelError: as `measure` and `signals`.
    """
    size = min(step_examples, len(examples["input_ids"]))
    parts = [{k: v[i : i + size] for k, v in examples.items()} for i in range(0, len(examples["input_ids"]), size)]
    whole = replace(stage, batch=None)
    found = measure(replace(prompted, cache=None), partial, [whole], parts)
    signal = signals({"": whole}, found, partial.full_stage)[""]
    return signal, sum(one.spent for each in found for one in each.values())


def _step(stage: Stage, full: Stage) -> Stage:
    """What a step of `stage` runs, spelled in one way."""
    size = full if stage.is_full(full) else stage
    return replace(size, steps=0, batch=stage.batch, length=stage.length)


def _whole(stage: Stage, full: Stage) -> Stage:
    """What a step of `stage` runs on whole batches."""
    return replace(_step(stage, full), batch=None)


def _measured(
    prompted: PromptedPLM, batch: Mapping[str, Any], run: Stage, cost: CostModel, *, turn: int, first: bool
) -> Measured:
    decoder = not prompted.plm.config.is_encoder_decoder

    def trimmed(stage: Stage) -> dict[str, Any]:
        return on_device(trim(batch, stage, decoder=decoder, turn=turn, keep_tail=True), prompted.plm)

    rows = trimmed(run)
    spent = 0.0
    # What a first pass alone has to do is not a step's: kernels set up, texts run whose states are kept from then on.
    texts = prompted.spec().keeps_texts and prompted.cache is not None
    if texts or first:
        _, work = example_gradients(prompted, rows if texts else trimmed(replace(run, batch=1)))
        spent += work_flops(cost, work, run)
    _wait(prompted.plm.device)
    begun = time.perf_counter()
    gradients, work = example_gradients(prompted, rows)
    _wait(prompted.plm.device)
    seconds, flops = time.perf_counter() - begun, work_flops(cost, work, run)
    return Measured(gradients if run.batch is None else None, flops, seconds, spent + flops)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- estimates ---------------------------------------------------------------------------------------------------------


def mean_product(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """ḡ·h̄ `(n + 1,)` of gradients `(n, D)`, without any example's product with itself, so free of its noise.

    A U-statistic (Hoeffding 1948): its expectation is the product of the expectations. First of all examples, then of
    all but one, for each of them.
    """
    g, h = g.double(), h.double()
    g_sum, h_sum, own = g.sum(0), h.sum(0), (g * h).sum(1)
    cross = torch.cat([(g_sum @ h_sum)[None], g_sum @ h_sum - g @ h_sum - h @ g_sum + own])
    count = _counts(len(g))
    return (cross - torch.cat([own.sum()[None], own.sum() - own])) / (count * (count - 1))


def total_variance(h: torch.Tensor) -> torch.Tensor:
    """V = E‖h − h̄‖² `(n + 1,)` of gradients `(n, D)`, unbiased; of all, then of all but one."""
    squares = h.double().square().sum(1)
    mean = torch.cat([squares.mean()[None], (squares.sum() - squares) / (len(h) - 1)])
    return mean - mean_product(h, h)


def _counts(n: int) -> torch.Tensor:
    return torch.tensor([n, *[n - 1] * n], dtype=torch.float64)


def step_signal(dot: Any, square: Any, variance: Any, batch: float) -> Any:
    """(ḡ·h̄)² / (‖h̄‖² + V_h / b) with the sign of ḡ·h̄; of numbers or tensors."""
    return dot * abs(dot) / (square + variance / batch)


def jackknife(values: torch.Tensor, confidence: float = 0.95) -> Estimate:
    """A statistic `(n + 1,)` of all examples, then of all but one, as a number with its interval."""
    value, others = float(values[0]), values[1:]
    error = float(((others - others.mean()).square().sum() * (len(others) - 1) / len(others)).sqrt())
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Estimate(value, value - reach, value + reach)


def signals(
    stages: Mapping[str, Stage], measured: Sequence[Mapping[Stage, Measured]], full: Stage, *, passes: int = 1
) -> dict[str, Signal]:
    """The signal of every stage, from what `measure` found on all batches.

    Args:
        stages: candidates, by any name.
        full: the full size, `PartialPLM.full_stage`.
        passes: forward passes of an optimizer step, of all processes and in accumulation: b counts all of them.

    Raises:
        ScoreError: fewer than three examples, or fewer than a plain step has.
    """
    plain = _whole(full, full)
    n = sum(len(_gradients(each, plain)) for each in measured)
    rows = max((len(_gradients(each, plain)) for each in measured), default=0)
    least = max(3, rows * passes)
    if n < least:
        raise ScoreError(f"{n} examples are too few for the signal of steps of {rows * passes}; give at least {least}")
    g = torch.cat([_gradients(each, plain) for each in measured])
    g_square, g_variance = mean_product(g, g), total_variance(g)
    g_signal = step_signal(g_square, g_square, g_variance, rows * passes)
    found = {}
    for name, stage in stages.items():
        step, whole = _step(stage, full), _whole(stage, full)
        h = torch.cat([_gradients(each, whole) for each in measured])
        dot, square, variance = mean_product(g, h), mean_product(h, h), total_variance(h)
        batch = passes * min(rows, stage.batch or rows)
        ratio = step_signal(dot, square, variance, batch) / g_signal
        flops, seconds = (
            sum(getattr(each[step], cost) for each in measured) / sum(getattr(each[plain], cost) for each in measured)
            for cost in ("flops", "seconds")
        )
        line = step_signal(g_square, g_square, g_variance, rows * passes * flops)
        per_flop, per_second = jackknife(ratio / flops), jackknife(ratio / seconds)
        found[name] = Signal(
            stage.to_dict(),
            batch,
            full=whole == plain,
            flops=flops,
            seconds=seconds,
            cosine=jackknife(dot / (square.sqrt() * g_square.sqrt())),
            noise=float(variance[0] / square[0]) if square[0] > 0 else math.inf,
            signal=jackknife(ratio),
            per_flop=per_flop,
            per_second=per_second,
            per_batch=jackknife(ratio * g_signal / line),
            saves=per_flop.low > 1 and per_second.low > 1,
        )
    return found


def _gradients(measured: Mapping[Stage, Measured], stage: Stage) -> torch.Tensor:
    found = measured.get(stage)
    if found is None or found.gradients is None:
        raise ScoreError(f"no gradients were measured at {stage}; pass the stage to measure")
    return found.gradients
