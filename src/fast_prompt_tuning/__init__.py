"""Fast Prompt Tuning: tune a soft prompt on a growing partial model, keep it on the full one.

The three lines in a script of your own::

    partial = PartialPLM(model, neuron_scores=activation_scores(model, calibration_batches))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=30_000)
    trainer = Trainer(model=model, ..., callbacks=[ProgressiveCallback(partial, schedule)])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.metrics import register_metric
    from .errors import FptError
    from .plm.dropout import without_dropout
    from .plm.objective import label_loss
    from .plm.partial import PartialPLM
    from .prompt.soft_prompt import init_soft_prompt, soft_prompt_config
    from .prompt.suffix_model import SuffixPromptModel, load_soft_prompt, suffix_loss
    from .prompt.text_cache import DiskTextCache, TextCache
    from .schedule.auto import AutoSchedule
    from .schedule.stages import Schedule, Stage
    from .scores.layers import LayerScores, block_influence, greedy_removal
    from .scores.neurons import NeuronScores, activation_scores
    from .train.callback import AutoCallback, ProgressiveCallback
    from .train.running_mean import EmaCallback

_EXPORTS = {
    "AutoCallback": "train.callback",
    "AutoSchedule": "schedule.auto",
    "DiskTextCache": "prompt.text_cache",
    "EmaCallback": "train.running_mean",
    "FptError": "errors",
    "LayerScores": "scores.layers",
    "NeuronScores": "scores.neurons",
    "PartialPLM": "plm.partial",
    "ProgressiveCallback": "train.callback",
    "Schedule": "schedule.stages",
    "Stage": "schedule.stages",
    "SuffixPromptModel": "prompt.suffix_model",
    "TextCache": "prompt.text_cache",
    "activation_scores": "scores.neurons",
    "block_influence": "scores.layers",
    "greedy_removal": "scores.layers",
    "init_soft_prompt": "prompt.soft_prompt",
    "label_loss": "plm.objective",
    "load_soft_prompt": "prompt.suffix_model",
    "register_metric": "data.metrics",
    "soft_prompt_config": "prompt.soft_prompt",
    "suffix_loss": "prompt.suffix_model",
    "without_dropout": "plm.dropout",
}

__all__ = [
    "AutoCallback",
    "AutoSchedule",
    "DiskTextCache",
    "EmaCallback",
    "FptError",
    "LayerScores",
    "NeuronScores",
    "PartialPLM",
    "ProgressiveCallback",
    "Schedule",
    "Stage",
    "SuffixPromptModel",
    "TextCache",
    "activation_scores",
    "block_influence",
    "greedy_removal",
    "init_soft_prompt",
    "label_loss",
    "load_soft_prompt",
    "register_metric",
    "soft_prompt_config",
    "suffix_loss",
    "without_dropout",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: `fpt --help` and `fpt plan` need neither PEFT nor the Trainer.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fast-prompt-tuning")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+unknown"
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
