"""Layers compiled for training steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..plm.stacks import find_stacks


class CompiledLayers:
    """The layers of a PLM as `torch.compile` makes them, each by itself.

    The layers of a stage are alike, so that a stage compiles once, and dropping layers alone compiles nothing.
    """

    def __init__(self, plm: Any):
        self._compiled: dict[Any, Any] = {
            layer: torch.compile(layer._call_impl, dynamic=True)
            for stack in find_stacks(plm).values()
            for layer in stack.layers
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """As `nn.Module.compile` does, but for a training step alone: evaluation and scoring would compile others."""
        try:
            for layer, compiled in self._compiled.items():
                layer._compiled_call_impl = compiled
            yield
        finally:
            for layer in self._compiled:
                layer.__dict__.pop("_compiled_call_impl", None)
