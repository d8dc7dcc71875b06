"""FFN projections on the kept neurons only, and which projections can be narrowed so."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError


class NarrowProjection:
    """An FFN projection on the kept neurons only; its `forward` stands in for the module's own.

    Holds a contiguous copy of the kept rows (input projection) or columns (output projection), and makes it anew if
    the module's weight has moved, changed dtype or been written to since.
    """

    def __init__(self, module: Any, neurons: torch.Tensor, dim: int, keep_bias: bool):
        self.module, self.neurons, self.dim, self.keep_bias = module, neurons, dim, keep_bias
        self.transposed = isinstance(module, Conv1D)  # stores (in, out), the reverse of nn.Linear
        self.neurons_key = hashlib.sha256(neurons.cpu().numpy().tobytes()).hexdigest()[:16]
        self.refresh()

    def _select(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.module.weight, self.module.bias
        neurons = self.neurons.to(weight.device)
        weight = (weight.t() if self.transposed else weight).index_select(self.dim, neurons)
        return weight, bias if bias is None or self.keep_bias else bias.index_select(0, neurons)

    def _source_key(self) -> tuple[Any, ...]:
        weight = self.module.weight
        version = None if weight.is_inference() else weight._version
        return weight.dtype, weight.device, version

    def refresh(self) -> None:
        with torch.no_grad():
            weight, bias = self._select()
        self.weight, self.bias = weight.contiguous(), bias
        self.key = self._source_key()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.module.weight.requires_grad:
            return F.linear(x, *self._select())  # someone trains the base weights: gradients must reach them
        if not torch.compiler.is_compiling() and self._source_key() != self.key:
            self.refresh()
        # The output projection keeps the module's own bias, whose dtype and device follow the module.
        return F.linear(x, self.weight, self.module.bias if self.keep_bias else self.bias)


def narrowed_to(module: nn.Module | None) -> NarrowProjection | None:
    """What stands in for a projection's own forward now."""
    owner = getattr(getattr(module, "__dict__", {}).get("forward"), "__self__", None)
    return owner if isinstance(owner, NarrowProjection) else None


def check_projection(module: nn.Module | None, shape: tuple[int, int], where: str) -> None:
    is_linear = isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if not is_linear:
        raise ModelError(
            f"{where} is {type(module).__name__}, not a plain linear layer, so its neurons cannot be left out; "
            "load the model unquantized and without adapters on the FFN, or use layer dropping (method ld)"
        )
    weight = module.weight  # type: ignore[union-attr]
    if weight.device.type == "meta" and hasattr(module, "_hf_hook"):
        raise ModelError(f"{where} is offloaded, so its neurons cannot be left out; use layer dropping (method ld)")
    if hasattr(weight, "ds_id") or hasattr(weight, "device_mesh"):
        raise ModelError(
            f"{where} is sharded over processes, so its neurons cannot be left out; use layer dropping (method ld)"
        )
    got = tuple(reversed(weight.shape)) if isinstance(module, Conv1D) else tuple(weight.shape)
    if (shape[0] and got[0] != shape[0]) or (shape[1] and got[1] != shape[1]):
        raise ModelError(f"{where} has shape {got}, expected {shape} (out, in; 0 is any); its family's paths are wrong")
