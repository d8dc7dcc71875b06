"""Fast Prompt Tuning: tune a soft prompt on a growing partial model, keep it on the full one.

The three lines in a script of your own::

    partial = PartialPLM(model, neuron_scores=activation_scores(model, calibration_batches))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=30_000)
    trainer = Trainer(model=model, ..., callbacks=[ProgressiveCallback(partial, schedule)])
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import AutoCallback, EmaCallback, ProgressiveCallback
    from .errors import FptError
    from .growth import AutoSchedule
    from .layer_scores import LayerScores, block_influence, greedy_removal
    from .objective import label_loss
    from .partial_plm import PartialPLM
    from .placement import SuffixPromptModel, load_soft_prompt, suffix_loss
    from .schedule import Schedule, Stage
    from .scoring import NeuronScores, activation_scores
    from .soft_prompt import init_soft_prompt, soft_prompt_config
    from .text_cache import DiskTextCache, TextCache

try:
    __version__ = version("fast-prompt-tuning")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_EXPORTS = {
    "AutoCallback": "callback",
    "AutoSchedule": "growth",
    "DiskTextCache": "text_cache",
    "EmaCallback": "callback",
    "FptError": "errors",
    "LayerScores": "layer_scores",
    "NeuronScores": "scoring",
    "PartialPLM": "partial_plm",
    "ProgressiveCallback": "callback",
    "Schedule": "schedule",
    "Stage": "schedule",
    "SuffixPromptModel": "placement",
    "TextCache": "text_cache",
    "activation_scores": "scoring",
    "block_influence": "layer_scores",
    "greedy_removal": "layer_scores",
    "init_soft_prompt": "soft_prompt",
    "label_loss": "objective",
    "load_soft_prompt": "placement",
    "soft_prompt_config": "soft_prompt",
    "suffix_loss": "placement",
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
    "soft_prompt_config",
    "suffix_loss",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: `fpt --help` and `fpt plan` need neither PEFT nor the Trainer.
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
