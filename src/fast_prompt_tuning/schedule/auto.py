"""When to grow, decided by what the full PLM has learned: the controller of `method: auto`. Pure, no torch.

The stages before the last are tried in order, each in windows of equal length. Before the first and after every
window the *full* PLM's loss on held-out training examples is measured: a probe. A stage

* is abandoned, with every other one before the last, when its first window has not lowered that loss: nothing that
  it teaches reaches the full PLM, so the rest is plain prompt tuning, and the steps it took are given back;
* goes on while its windows lower the loss, and ends when two in a row have not;
* ends at the latest where the paper's last growth is, at 60% of the steps (Huang et al. 2022, Section 4.1).

A stage whose gradient is not the full PLM's (fewer layers, neurons or input tokens) has more to show. Where it begins,
and after every window, the signal of a step on it is asked (`scores.signal`): it is run only while that is certainly
above the signal of a step on the full PLM for the same FLOPs. All questions cost at most 3% of the run.

The last stage lasts to the end of the steps asked for, and goes on in further windows while they lower the loss, until
the run has cost what plain prompt tuning would: what a small start saved is spent where the task needs it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ScheduleError, is_whole
from .stages import PAPER_SPLIT, Schedule, Stage

decisions = logging.getLogger("fast_prompt_tuning.auto")
"""Where every choice, question and decision of `auto` is said in one line, at level INFO; `fpt` shows it."""

LEAST_DROP = 0.01
"""A window counts as progress if it lowers the best probe of its stage by this part of it."""

PATIENCE = 2
"""Windows in a row without progress that end a stage."""

WINDOWS = 12
"""Windows in a whole run, so probes: few enough to cost little, enough to notice in time."""

PROBE_EXAMPLES = (4, 16)
"""Fewest and most training examples of a probe: held out, and the same ones every time."""

PROBE_SHARE = 0.04
"""Probes up to the latest growth cost at most this part of a run's steps, where the fewest examples allow it."""

PROBE = "probe_loss"
"""The key of a probe among what a Trainer logs."""

ASK_SHARE = 0.03
"""Questions cost at most this part of what plain prompt tuning would."""

SIGNAL = "signal_per_flop"
"""The key of an answer among what a Trainer logs; `SIGNAL`_low and _high are its interval."""


@dataclass(frozen=True)
class Entered:
    """A stage that was begun: its place in the ladder and its first step (0-based)."""

    rung: int
    start: int


class AutoSchedule:
    """Makes a schedule longer as it is told of probes; `now` is the schedule as it stands.

    Until it grows again, the last stage of `now` lasts to the end.

    Args:
        ladder: stages from small to large, their `steps` ignored; the last is where plain prompt tuning would be.
        total_steps: steps that plain prompt tuning would take; those of an abandoned stage come on top.
        costs: what a step of each stage costs, relative to one of the last. Without, nothing is known to be saved, and
            the run ends with `total_steps`.
        probe_cost: what a probe costs, relative to a step of the last stage.
        ask_costs: what it costs to ask each stage's signal, likewise. Without, questions are taken to be free.

    Raises:
        ScheduleError: no stage, fewer than one step, not one cost of at most 1 for each stage, or a negative one.
    """

    def __init__(
        self,
        ladder: Sequence[Stage],
        total_steps: int,
        costs: Sequence[float] | None = None,
        probe_cost: float = 0.0,
        ask_costs: Sequence[float] | None = None,
    ):
        if not ladder:
            raise ScheduleError("ladder=[] is empty; auto needs at least one stage")
        if not is_whole(total_steps, 1):
            raise ScheduleError(f"total_steps={total_steps!r} must be a whole number of at least 1")
        self.costs = tuple(costs) if costs is not None else (1.0,) * len(ladder)
        if len(self.costs) != len(ladder) or not all(0 < cost <= 1 for cost in self.costs):
            raise ScheduleError(f"costs={costs!r} must be {len(ladder)} numbers above 0 and at most 1, one a stage")
        if not probe_cost >= 0:
            raise ScheduleError(f"probe_cost={probe_cost!r} must be at least 0")
        self.ask_costs = tuple(ask_costs) if ask_costs is not None else (0.0,) * len(ladder)
        if len(self.ask_costs) != len(ladder) or not all(cost >= 0 for cost in self.ask_costs):
            raise ScheduleError(f"ask_costs={ask_costs!r} must be {len(ladder)} numbers of at least 0, one a stage")
        self.probe_cost = probe_cost
        self.ladder, self.asked = tuple(ladder), total_steps
        self.window = max(1, math.ceil(total_steps / WINDOWS))
        self.latest = max(1, round(total_steps * (1 - PAPER_SPLIT[-1])))
        self.clear()

    def clear(self) -> None:
        """Forget every probe: the state before the first step."""
        self.entered = [Entered(0 if self.tries else len(self.ladder) - 1, 0)]
        self.probes: list[tuple[int, float]] = []
        self.answers: list[tuple[int, int]] = []
        """Steps and stages that were asked."""
        self.given_back = self.added = 0
        self._leave_unpaid(0)

    @property
    def now(self) -> Schedule:
        """Stages begun so far; the last one's steps reach to the end."""
        starts = [e.start for e in self.entered] + [self.total_steps]
        return Schedule(
            replace(self.ladder[e.rung], steps=end - e.start)
            for e, end in zip(self.entered, starts[1:], strict=True)
        )  # fmt: skip

    @property
    def candidates(self) -> tuple[Stage, ...]:
        """Every stage that it may come to."""
        return self.ladder

    @property
    def total_steps(self) -> int:
        """Steps that the run has, as far as the probes say."""
        return self.asked + self.given_back + self.added

    # -- how it grows -------------------------------------------------------------------------------------------------

    @property
    def tries(self) -> bool:
        """Whether a stage before the last is tried; windows of a single step would be judged by noise."""
        return len(self.ladder) > 1 and self.asked >= WINDOWS

    @property
    def most_steps(self) -> int:
        """More steps than these it never has, whatever the probes say."""
        return self.asked + max(self.window, math.ceil(self.latest * (1 - min(self.costs)))) * self.tries

    @property
    def may_go_on(self) -> bool:
        """Whether the last stage may yet be given more steps than it has."""
        return self.rung == len(self.ladder) - 1 and self.added < self._room()

    def _room(self) -> int:
        """Steps of the last stage that what was saved before it pays for, and the probes of all stages."""
        starts = [e.start for e in self.entered]
        saved = sum(
            (end - e.start) * (1 - self.costs[e.rung]) for e, end in zip(self.entered, starts[1:], strict=False)
        )
        probes = sum(at <= starts[-1] for at, _ in self.probes) + PATIENCE + 1
        left = saved - self.given_back - probes * self.probe_cost - self.ask_spent
        return max(0, math.floor(left / (1 + self.probe_cost / self.window)))  # every window ends with a probe

    @property
    def rung(self) -> int:
        """Place in the ladder of the stage that runs now."""
        return self.entered[-1].rung

    def wants_probe(self, step: int) -> bool:
        """Whether the full PLM's loss is to be measured when `step` steps are done."""
        if any(at == step for at, _ in self.probes):
            return False
        if self.rung == len(self.ladder) - 1:
            left = self.total_steps - step
            return self.may_go_on and left in (0, self.window, PATIENCE * self.window)
        return step >= self.latest or (step - self.entered[-1].start) % self.window == 0

    # -- questions ----------------------------------------------------------------------------------------------------

    def is_cut(self, rung: int) -> bool:
        """Whether a stage's gradient is another one than the full PLM's, so that it has to be asked."""
        stage, last = self.ladder[rung], self.ladder[-1]
        return not stage.same_size(last) or stage.length != last.length

    def pays(self, rung: int) -> bool:
        """Whether a window on a stage saves more than it costs to ask for it, and the questions' share holds one."""
        instead = next(self.costs[i] for i in range(rung, len(self.ladder)) if not self.is_cut(i))
        saved = self.window * (instead - self.costs[rung])
        return self.ask_costs[rung] <= min(saved, ASK_SHARE * self.asked)

    def asks(self, step: int) -> bool:
        """Whether the signal of the stage that runs now is to be asked when `step` steps are done."""
        begins = self.entered[-1].start == step
        window_ends = bool(self.probes) and self.probes[-1][0] == step
        return self.is_cut(self.rung) and (begins or window_ends) and (step, self.rung) not in self.answers

    @property
    def ask_spent(self) -> float:
        """What all questions so far have cost, in steps of the last stage."""
        return sum(self.ask_costs[rung] for _, rung in self.answers)

    def answer(self, step: int, low: float) -> str | None:
        """Take note of the lower end of the signal's interval, relative to plain, and grow where it is not above 1.

        Returns:
            None: the stage is run for a window. `grow`: a later one begins with the next step.
        """
        self.answers.append((step, self.rung))
        if low > 1:
            return None
        self._enter(self.rung + 1, step)
        self._leave_unpaid(step)
        return "grow"

    def _leave_unpaid(self, step: int) -> bool:
        """Leave the stages that would have to be asked now, where the questions' share holds no more."""
        before = self.rung
        while self.asks(step) and self.ask_spent + self.ask_costs[self.rung] > ASK_SHARE * self.asked:
            self._enter(self.rung + 1, step)
        return self.rung > before

    def _enter(self, rung: int, step: int) -> None:
        if self.entered[-1].start == step:  # the stage before has made no step
            self.entered.pop()
        self.entered.append(Entered(rung, step))

    @property
    def may_go_back(self) -> bool:
        """Whether the stage that runs now may yet be given up: its first window has not been judged."""
        start = self.entered[-1].start
        return self.rung < len(self.ladder) - 1 and sum(at >= start for at, _ in self.probes) < 2

    def tell(self, step: int, loss: float) -> str | None:
        """Take note of the full PLM's loss after `step` steps, and grow if it is time.

        Returns:
            None: the stage goes on. `grow`: the next one begins with the next step. `abandon`: the last one does,
            and the prompt should go back to what it was at this stage's start, when `given_back` steps are added.
            `go on`: the last stage lasts a window longer.
        """
        self.probes.append((step, loss))
        start, last = self.entered[-1].start, len(self.ladder) - 1
        if self.rung == last:
            if step < self.total_steps or not self.may_go_on or _stale([v for _, v in self.probes]) >= PATIENCE:
                return None
            self.added = min(self.added + self.window, self._room())
            return "go on"
        seen = [value for at, value in self.probes if at >= start]
        stale = _stale(seen)
        if len(seen) == 2 and stale:
            self.given_back += step - start
            self._enter(last, step)
            return "abandon"
        if len(seen) > 1 and step >= self.latest:
            self._enter(last, step)
        elif stale >= PATIENCE:
            self._enter(self.rung + 1, step)
        elif not self._leave_unpaid(step):
            return None
        self._leave_unpaid(step)
        return "grow"

    def replay(self, log: Iterable[Mapping[str, Any]]) -> None:
        """Come to the state after the probes that a Trainer's log holds (`state.log_history`): resuming."""
        self.clear()
        for entry in log:
            if SIGNAL in entry:
                self.answer(int(entry["step"]), float(entry[f"{SIGNAL}_low"]))
            elif PROBE in entry:
                self.tell(int(entry["step"]), float(entry[PROBE]))


def _stale(values: Sequence[float]) -> int:
    """How many of the last values in a row were no progress over the best before them."""
    best, stale = values[0], 0
    for value in values[1:]:
        # Not "value > …": a loss that is no number is no progress.
        stale = 0 if value <= best - LEAST_DROP * abs(best) else stale + 1
        best = min(best, value)
    return stale


def probe_examples(total_steps: int, step_examples: int) -> int:
    """How many examples a probe takes: few in a short run, whose few steps its probes would outweigh.

    Args:
        total_steps: optimizer steps of the run.
        step_examples: examples of an optimizer step on the full batch.
    """
    probes = 1 + round(WINDOWS * (1 - PAPER_SPLIT[-1]))  # the first, and one a window up to the latest growth
    passes = 2 * PROBE_SHARE * total_steps * step_examples / probes  # a forward pass is half a training step
    return max(PROBE_EXAMPLES[0], min(PROBE_EXAMPLES[1], int(passes)))


LONG_RUN = 8192
"""Examples of a whole run from which on `auto` asks for three quarters of the layers: what they save in a window then
pays for the question, two steps on `PROBE_EXAMPLES`, and `ASK_SHARE` holds one for every window."""


def default_ladder(full: Stage, batch_size: int, total_steps: int = 0) -> tuple[Stage, ...]:
    """The stages that `auto` climbs where a recipe names none: a quarter of each batch, then all of it.

    Steps on a few examples cost a quarter and teach as much at first. In a long run three quarters of the layers come
    before, and are run only if the model turns out to be so redundant: on the decoders we measured none is
    (docs/methods/signal.md).
    """
    small = batch_size // 4
    if not small:
        return (full,)
    ladder = (replace(full, batch=small), full)
    if total_steps * batch_size >= LONG_RUN:
        with suppress(ScheduleError):  # too few layers
            preset = Schedule.preset("ld", full, total_steps=len(PAPER_SPLIT), stacks=full.stacks)
            return (replace(preset.stages[-2], steps=0, batch=small), *ladder)
    return ladder


def best_case(ladder: Sequence[Stage], total_steps: int) -> Schedule:
    """What `auto` costs at least: its first stage pays to the end of all the steps it may have. Probes come on top."""
    schedule = AutoSchedule(ladder, total_steps)
    if schedule.tries:
        early = schedule.latest
        return Schedule((replace(ladder[0], steps=early), replace(ladder[-1], steps=total_steps - early)))
    return schedule.now
