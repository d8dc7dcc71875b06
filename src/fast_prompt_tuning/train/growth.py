"""What `auto` does between two steps: it has the full PLM measured, grows, goes on, or gives a stage up."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import new_file
from ..plm.partial import PartialPLM
from ..schedule.auto import PROBE, SIGNAL, AutoSchedule, decisions
from ..schedule.stages import Stage
from ..scores.signal import Signal
from .checkpoint import CANNOT_WRITE, STAGE_START

logger = logging.getLogger(__name__)


class Growth:
    """Tells an `AutoSchedule` of probes, and does to the prompt what it decides.

    Args:
        auto: the controller; it has replayed what was logged before.
        prompt: the soft prompt `(P, H)`.
        folder: where the checkpoints lie.
        writes: whether this process writes files.
        measure: gives the loss of the full PLM on the probe.
        ask: gives the signal of a stage that is cut, at the prompt as it is.
        log: takes numbers into the log that every checkpoint holds.
    """

    def __init__(
        self,
        auto: AutoSchedule,
        prompt: nn.Parameter,
        folder: Path,
        *,
        writes: bool,
        measure: Callable[[], float],
        ask: Callable[[Stage], Signal],
        log: Callable[[dict[str, float]], None],
    ):
        self.auto, self.prompt, self.start, self.writes = auto, prompt, folder / STAGE_START, writes
        self.measure, self.ask, self.log = measure, ask, log
        self._begun_with: torch.Tensor | None = None

    def begin(self, step: int) -> None:
        """Called once, before the first step that is made: `step` steps are done."""
        if step and self.auto.may_go_back and not self.start.is_file():
            logger.warning(
                "%s is missing (was the checkpoint moved?): should this stage be given up, the prompt goes back to "
                "what it is now, at step %d, not to the stage's first",
                self.start,
                step,
            )
            self._remember()

    def consider(self, step: int, optimizer_state: Mapping[Any, Any]) -> None:
        """Probe, where a probe is due after `step` steps, and do what it decides.

        Args:
            optimizer_state: of an optimizer, by parameter; a stage that is given up leaves nothing of the prompt there.
        """
        rung, done = self.auto.rung, list[str]()
        grown = self._ask(step, done)
        if self.auto.wants_probe(step):
            loss = self.measure()
            self.log({PROBE: loss})
            done.append(f"held-out loss {loss:.4f}")
            decision = self.auto.tell(step, loss)
            if decision == "abandon":
                done.append("nothing has been learned, so the prompt goes back to where this stage began")
                self._go_back(optimizer_state)
            elif decision == "go on":
                done.append(f"it still falls, so on to step {self.auto.total_steps}")
            grown = decision == "grow" or grown
        grown = self._ask(step, done) or grown
        if done:
            what = "next" if self.auto.rung != rung else "goes on"
            decisions.info("auto, step %d: %s; %s: %s", step, "; ".join(done), what, self.auto.ladder[self.auto.rung])
        if grown or (done and step == 0):
            self._remember()

    def _ask(self, step: int, done: list[str]) -> bool:
        """Ask what has to be asked before the next step; whether a later stage is to come."""
        grown = False
        while self.auto.asks(step):
            stage = self.auto.ladder[self.auto.rung]
            said = self.ask(stage).per_flop
            # A number that is none, of a gradient lost in noise, is no promise; and no JSON.
            low, high = (value if math.isfinite(value) else 0.0 for value in (said.low, said.high))
            self.log({SIGNAL: (low + high) / 2, f"{SIGNAL}_low": low, f"{SIGNAL}_high": high})
            grown = self.auto.answer(step, low) is not None or grown
            done.append(f"signal of {stage} {low:.2f} to {high:.2f} of plain's, asking {self._ask_share():.1%} so far")
        return grown

    def _ask_share(self) -> float:
        """What questions have cost, of what plain prompt tuning would."""
        return self.auto.ask_spent / self.auto.asked

    def _remember(self) -> None:
        """Keep the prompt as it is where a stage begins, for a resumed run too."""
        self._begun_with = self.prompt.detach().cpu().clone()
        if self.writes:
            try:
                with new_file(self.start) as work:
                    save_file({"prompt": self._begun_with}, work)
            except CANNOT_WRITE as error:
                logger.warning("%s cannot be written (%s); training goes on", self.start, error)

    def _go_back(self, optimizer_state: Any) -> None:
        if self._begun_with is None:  # resumed since the stage began
            self._begun_with = load_file(self.start)["prompt"]
        with torch.no_grad():
            self.prompt.copy_(self._begun_with)
        optimizer_state.pop(self.prompt, None)  # moments of gradients that led nowhere


def log_growth(partial: PartialPLM, step: int, before: Stage | None, after: Stage) -> None:
    """Say which size a step is the first of."""
    layers_of = {name: layers for name, layers in partial.kept_layers(after).items() if name in after.stacks}
    if before is None:
        logger.info("step %d: tuning on %s (layers %s) of %s", step, after, layers_of, partial.full_stage)
    else:
        logger.info("step %d: growing %s to %s (layers %s)", step, before, after, layers_of)
