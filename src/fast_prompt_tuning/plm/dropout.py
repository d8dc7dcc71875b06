"""Training a prompt on a PLM that runs as in evaluation: its dropout has nothing to regularise in frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .stacks import get_plm


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Inside the block the PLM stays in evaluation mode, whoever calls `train()`: a Trainer does so before every step.

    Gradient checkpointing goes on: its layers are told that they train, for they recompute only then, and run in
    evaluation mode. When the block ends, the PLM is in the mode it was in before.

    Args:
        model: PEFT model, `SuffixPromptModel` or bare PLM.
    """
    plm = get_plm(model)
    was, outer = plm.training, vars(plm).get("train")

    def train(mode: bool = True) -> Any:
        type(plm).train(plm, False)
        for layer in _checkpointed(plm) if mode else ():
            layer.training = True
            if not isinstance(layer._gradient_checkpointing_func, _Evaluating):
                layer._gradient_checkpointing_func = _Evaluating(layer, layer._gradient_checkpointing_func)
        return plm

    plm.train = train
    try:
        plm.train(was)
        yield
    finally:
        for layer in _checkpointed(plm):
            if isinstance(layer._gradient_checkpointing_func, _Evaluating):
                layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.checkpointing
        del plm.train
        if outer is not None:
            plm.train = outer
        plm.train(was)


def _checkpointed(plm: nn.Module) -> list[Any]:
    layers = (m for m in plm.modules() if isinstance(m, GradientCheckpointingLayer))
    return [layer for layer in layers if "_gradient_checkpointing_func" in vars(layer)]


class _Evaluating:
    """A layer's checkpointing function; the layer runs in evaluation mode, now and when it is recomputed."""

    def __init__(self, layer: nn.Module, checkpointing: Callable[..., Any]):
        self.layer, self.checkpointing = layer, checkpointing

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            was, self.layer.training = self.layer.training, False
            try:
                return function(*inputs)
            finally:
                self.layer.training = was

        return self.checkpointing(run, *args)
