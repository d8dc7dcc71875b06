"""Attention to a kept text, as an attention function of `transformers`: its keys and values get no gradient."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import eager_mask

_APART = "fast_prompt_tuning_text"
"""The name of `_attention` among the attention functions of `transformers`."""

text_read_apart: contextvars.ContextVar[tuple[Cache, bool] | None] = contextvars.ContextVar(
    "text_read_apart", default=None
)
"""The text that `_attention` reads, and whether it stands in for the eager attention."""


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to a text and to what comes after it, as an attention function of `transformers`.

    As one pass over both, but the text's keys and values, which nothing learns from, get no gradient and are neither
    copied nor repeated for the query heads that share them.

    Args:
        query: `(B, heads, Q, D)`.
        key, value: of the Q positions after the text alone `(B, kv heads, Q, D)`.
        attention_mask: added to the scores `(B, 1, Q, T + Q)`.

    Returns:
        `(B, Q, heads, D)`, and no weights.
    """
    text, eager = text_read_apart.get()  # type: ignore[misc]
    layer: Any = text.layers[module.layer_idx]
    rows, heads, new, width = query.shape
    shared, before = key.shape[1], layer.keys.shape[-2]
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, shared, -1, width)
    scores = torch.cat([query @ layer.keys.transpose(-2, -1), query @ key.transpose(-2, -1)], dim=-1)
    if softcap is not None and eager:  # PyTorch's fused attention has none
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, shared, heads // shared, new, -1) + attention_mask[:, :, None]
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training).view(rows, shared, -1, before + new)
    of_text, of_new = weights.split([before, new], dim=-1)
    out = of_text @ layer.values + of_new @ value
    return out.view(rows, heads, new, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(_APART, _attention)
AttentionMaskInterface.register(_APART, eager_mask)


_FEW = 64
"""Positions after a text, about the width of a head, up to which the scores that `_attention` keeps for the backward
pass take less room than what a fused kernel copies of the text."""


def _knows_attention(plm: Any) -> bool:
    """Whether `_attention` can stand in for the model's own: it asks `transformers` for it, and has no sinks."""
    asks = getattr(plm, "_supports_attention_backend", False)
    return asks and not any("sinks" in module._parameters for module in plm.modules())


@contextlib.contextmanager
def text_apart(plm: Any, text: Cache, new: int) -> Iterator[None]:
    """Forwards of a decoder over `text` compute what they usually do, by `_attention`.

    Elsewhere text and what follows are put together: for other kernels than PyTorch's own (FlashAttention), for many
    new positions where the kernel is a fused one, and in architectures that do not ask for an attention function.
    """
    kernel = plm.config._attn_implementation
    if not (kernel == "eager" or (kernel == "sdpa" and new <= _FEW)) or not _knows_attention(plm):
        yield
        return
    token = text_read_apart.set((text, kernel == "eager"))
    plm.config._attn_implementation = _APART
    try:
        yield
    finally:
        plm.config._attn_implementation = kernel
        text_read_apart.reset(token)
