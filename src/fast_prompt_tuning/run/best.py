"""The best prompt of a run so far, and the scores that need not be made twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..files import new_folder
from ..prompt.prompted import PromptedPLM
from ..prompt.soft_prompt import load_prompt
from ..recipe import TrainConfig
from ..train import checkpoint, parallel, restored
from .folder import check_fits
from .session import Evaluation

logger = logging.getLogger(__name__)


class Best:
    """The best prompt so far by the task's first metric on the full PLM, kept on disk beside the checkpoints.

    Args:
        folder: where the checkpoints lie; the best is `best-STEP` there.
        reached: step that the run goes on from; a later best will be found again.
        prompted: what is trained.
    """

    def __init__(self, folder: Path, primary: str, reached: int, prompted: PromptedPLM):
        self.folder, self.primary, self.prompted = folder, primary, prompted
        self.step, self.value = 0, float("-inf")
        self.prompt: torch.Tensor | None = None
        self.saved: Path | None = None
        earlier = parallel.on_main(lambda: checkpoint.latest(folder, "best", until=reached))
        if earlier is not None:
            check_fits(earlier, prompted)
            if prompted.whole:
                restored.check_weights(earlier.folder, prompted.module)
            self.step, self.value, self.saved = earlier.step, restored.best_value(earlier), earlier.folder
            self.prompt = None if prompted.whole else load_prompt(earlier.folder)
        if parallel.rank() == 0:
            checkpoint.discard_best(folder, after=reached)

    def offer(self, step: int, value: float) -> bool:
        """Keep the prompt if it is the best yet, and say so; the earlier one on a tie."""
        if value <= self.value:
            return False
        self.step, self.value = step, value
        if not self.prompted.whole:
            self.prompt = self.prompted.parameter.detach().cpu().clone()
        self.saved = self.folder / f"best-{step}"
        if parallel.rank() != 0:
            return True
        try:
            with new_folder(self.saved) as work:
                checkpoint.save_trained(work, self.prompted.module)
                checkpoint.seal(work, step, {"value": value, "metric": self.primary})
        except checkpoint.CANNOT_WRITE as error:
            logger.warning("the best prompt, of step %d, cannot be written (%s); training goes on", step, error)
        return True

    def restore(self) -> None:
        """Give the model its best prompt back, or all of its best weights."""
        if self.prompt is not None:
            with torch.no_grad():
                self.prompted.parameter.copy_(self.prompt)
        elif self.prompted.whole and self.saved is not None:
            checkpoint.load_trained(self.saved, self.prompted.module)


class EarlyStop(TrainerCallback):
    """Ends a run that has not found a better prompt for `train.patience` evaluations."""

    def __init__(self, best: Best, train: TrainConfig):
        self.best, self.patience, self.every = best, train.patience or 0, train.evaluation_interval

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step - self.best.step < self.patience * self.every or state.global_step >= state.max_steps:
            return
        control.should_training_stop = True
        logger.warning(
            "step %d: no better %s since step %d, so the run ends here (train.patience=%d)",
            state.global_step,
            self.best.primary,
            self.best.step,
            self.patience,
        )


class Scored:
    """Scores of the last prompt and of the best on validation data, so that a run's end need not score them again."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, Evaluation] | None = None
        self._best: tuple[torch.Tensor, Evaluation] | None = None

    def keep(self, prompt: torch.Tensor | None, evaluation: Evaluation, is_best: bool) -> None:
        if prompt is not None:
            self._last = prompt.clone(), evaluation
            self._best = self._last if is_best else self._best

    def of(self, prompt: torch.Tensor | None) -> Evaluation | None:
        """What was found of exactly this prompt; None if it was not scored in this process."""
        for pair in (self._last, self._best):
            if pair is not None and prompt is not None and torch.equal(pair[0], prompt):
                return pair[1]
        return None
