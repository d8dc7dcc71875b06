"""What `auto` does between two steps: it has the full PLM measured, grows, goes on, or gives a stage up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import new_file
from ..plm.partial import PartialPLM
from ..schedule.auto import PROBE, AutoSchedule
from ..schedule.stages import Stage
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
        log: Callable[[dict[str, float]], None],
    ):
        self.auto, self.prompt, self.start, self.writes = auto, prompt, folder / STAGE_START, writes
        self.measure, self.log = measure, log
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
        if not self.auto.wants_probe(step):
            return
        loss = self.measure()
        self.log({PROBE: loss})
        stage, decision = self.auto.rung, self.auto.tell(step, loss)
        if decision == "abandon":
            logger.info("step %d: the full model has learned nothing on stage %d: growing to the last", step, stage + 1)
            self._go_back(optimizer_state)
        elif decision == "go on":
            logger.info("step %d: the full model's loss still falls: on to step %d", step, self.auto.total_steps)
        elif decision == "grow":
            logger.info("step %d: the full model's loss is %.4f: the next stage", step, loss)
        if decision == "grow" or step == 0:
            self._remember()

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
