"""How a model is put into evaluation mode and out of it again, and which modules a backward pass runs anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode, then give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def recomputes(module: nn.Module) -> bool:
    """Whether gradient checkpointing, by `transformers` or PyTorch's wrapper, runs a module again going backward."""
    return bool(getattr(module, "gradient_checkpointing", False)) or hasattr(module, "_checkpoint_wrapped_module")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """As `evaluating`, without gradients."""
    with evaluating(model), torch.no_grad():
        yield
