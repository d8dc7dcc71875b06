"""The running mean of a prompt, in place of its last value, wherever a run looks between two steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from ..errors import ConfigError, ModelError
from ..prompt.soft_prompt import prompt_parameter

_TRAINED, _TRAINED_STEP = "trained_prompt", "trained_prompt_step"  # in the optimizer's state


class EmaCallback(TrainerCallback):
    """Evaluates and saves the running mean of the prompt instead of its last value (Polyak and Juditsky 1992).

    Inside a step the model has the prompt that is trained; between steps, so whenever the Trainer evaluates, saves,
    probes or ends, it has the mean: after step t, `mean ← d · mean + (1 − d) · prompt` with `d = min(decay, (1 + t) /
    (10 + t))`, which forgets the first prompts sooner. Training itself is what it would be without. The trained prompt
    lies in the optimizer's state, so that a checkpoint holds both and a resumed run goes on exactly. An exception
    inside a step leaves the trained prompt.

    Args:
        decay: what a step leaves of the mean, at least 0 and below 1; 0.9 averages ten steps, fewer in the first 80.

    Raises:
        ConfigError: another `decay`. ModelError: when training begins, a model without a soft prompt, or DeepSpeed,
            which steps by itself.
    """

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise ConfigError(f"decay={decay!r} must be at least 0 and below 1; 0.9 averages some ten steps")
        self.decay = decay
        self._mean: torch.Tensor | None = None  # inside a step

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        prompt_parameter(kwargs["model"])
        if getattr(args, "deepspeed", None):
            raise ModelError("EmaCallback cannot be used with DeepSpeed, which steps by itself; leave it out")
        self._mean = None

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        prompt = prompt_parameter(kwargs["model"])
        self._mean = prompt.detach().clone()
        remembered = kwargs["optimizer"].state.get(prompt, {})
        # Of another step it is stale: no step yet, a stage given up, or a run that went on without a mean.
        if remembered.get(_TRAINED_STEP) == state.global_step:
            with torch.no_grad():
                prompt.copy_(remembered[_TRAINED])

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Here, not at the step's end, where callbacks that save or probe may come first.
        prompt, step = prompt_parameter(kwargs["model"]), state.global_step + 1
        remembered = kwargs["optimizer"].state[prompt]
        if self._mean is None or (not remembered and torch.equal(prompt, self._mean)):
            return  # no update yet, and an optimizer takes a state that is not empty for its own
        remembered[_TRAINED], remembered[_TRAINED_STEP] = prompt.detach().clone(), step
        with torch.no_grad():
            prompt.copy_(torch.lerp(remembered[_TRAINED], self._mean, min(self.decay, (1 + step) / (10 + step))))
        self._mean = None

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._leave_step(kwargs["model"])

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._leave_step(kwargs["model"])

    def _leave_step(self, model: Any) -> None:
        """Give the model its mean back after a step that was broken off, as a callback may within accumulation."""
        if self._mean is not None:
            with torch.no_grad():
                prompt_parameter(model).copy_(self._mean)
            self._mean = None
