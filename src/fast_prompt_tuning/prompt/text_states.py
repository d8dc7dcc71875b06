"""What a text leaves behind: run once, without a gradient, and handed to the model as a `transformers` cache.

Sizes: B batch, T text tokens, H `d_model`, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ..errors import ModelError
from ..plm import families
from ..plm.in_parts import any_process
from ..plm.modes import inference
from ..plm.objective import last_layer_rows
from ..plm.partial import cut_key
from .prediction import padded_ids
from .text_attention import text_read_apart
from .text_cache import TextCache


def check_text_apart(plm: Any) -> None:
    """Raise unless this PLM's text can run apart from a prompt that stands after it.

    Raises:
        UnknownFamilyError: the architecture is not registered.
        ModelError: its attention is not causal; gradient checkpointing is on, under which `transformers` drops the
            cache that holds the text.
    """
    if not plm.config.is_encoder_decoder and "decoder" not in families.of(plm.config).stacks:
        raise ModelError(
            f"placement='suffix' needs a decoder-only model or an encoder-decoder, which {type(plm).__name__} is not; "
            "use placement='prefix'"
        )
    if any(module.training and module.__dict__.get("gradient_checkpointing") for module in plm.modules()):
        raise ModelError(
            "placement='suffix' cannot be trained with gradient checkpointing, which drops the text's states; turn it "
            "off (plm.gradient_checkpointing_disable()): the text keeps no activations here anyway"
        )


class _TextLayer(DynamicLayer):
    """One layer's keys and values of the text `(B, heads, T, D)`: seen by whatever comes after, changed by nothing."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if text_read_apart.get() is not None:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@dataclass(frozen=True)
class TextStates:
    """What a batch of texts leaves behind.

    Args:
        states: keys and values `(L, 2, B, heads, T, D)` padded on the left, so that prompt and target follow at once;
            of an encoder-decoder the encoder's output `(B, T, H)`, padded on the right, or as a cache keeps them the
            decoder's cross-attention keys and values `(L, 2, B, heads, T, D)`, likewise.
        mask: 1 at real tokens `(B, T)`.
        ran: `(texts, tokens)` of the forward pass that was needed; `(0, 0)` where all were kept from before.
    """

    states: torch.Tensor
    mask: torch.Tensor
    ran: tuple[int, int]

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each text `(B,)`."""
        return self.mask.sum(1)

    def cache(self) -> Cache:
        """The text as a cache for a decoder-only model's forward; forwards never change it."""
        return Cache(layers=[_TextLayer(keys, values) for keys, values in self.states])

    def encoded(self) -> tuple[BaseModelOutput, EncoderDecoderCache | None]:
        """For an encoder-decoder's forward: the encoder's output, and the keys and values where they are kept."""
        if self.states.dim() == 3:
            return BaseModelOutput(last_hidden_state=self.states), None
        # With keys and values at hand the decoder reads no more of the encoder's output than how long it is.
        stand_in = self.states.new_zeros(1, 1, 1).expand(*self.mask.shape, 1)
        cross = DynamicCache()  # of this type, or beams do not take it
        cross.layers = self.cache().layers
        return BaseModelOutput(last_hidden_state=stand_in), EncoderDecoderCache(DynamicCache(), cross)


def text_states(plm: Any, texts: Sequence[Sequence[int]], cache: TextCache | None = None) -> TextStates:
    """Run texts without a gradient and without dropout, or take their states from a cache.

    Args:
        plm: the bare PLM, at any stage: each partial PLM has text states of its own.
        texts: token ids of each text, unpadded.
        cache: where states are kept; None computes them every time.

    Raises:
        ModelError: as `check_text_apart`; the cache is another model's.
    """
    check_text_apart(plm)
    if cache is not None:
        cache.check_model(plm)
    cut = cut_of_texts(plm, cache) if cache is not None else ""
    keys = [TextCache.key(cut, ids) for ids in texts] if cache is not None else []
    rows: list[torch.Tensor | None] = [cache.get(key) for key in keys] if cache is not None else [None] * len(texts)
    # The same text twice in a batch (several prompts asked about it) is run once.
    missing: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row is None:
            missing.setdefault(tuple(texts[i]), []).append(i)
    if any_process(plm, bool(missing)):
        # A process that has all of its texts, but not all of the weights, takes part with one of them.
        missing = missing or {tuple(texts[0]): [0]}
        computed = _run_texts(plm, list(missing), cross_attention=cache is not None and cache.cross_attention)
        for places, row in zip(missing.values(), computed, strict=True):
            if cache is not None and rows[places[0]] is None:
                cache.put(keys[places[0]], row)
            for i in places:
                rows[i] = row
    states_of_each = [row for row in rows if row is not None]
    _, mask = padded_ids(texts)
    if left := not plm.config.is_encoder_decoder:
        mask = mask.flip(1)
    encoded = states_of_each[0].dim() == 2
    states = (
        nn.utils.rnn.pad_sequence(states_of_each, batch_first=True)
        if encoded
        else padded_states(states_of_each, mask.shape[1], left)
    )
    ran = (len(missing), max((len(ids) for ids in missing), default=0))
    return TextStates(states.to(plm.device), mask.to(plm.device), ran)


def cut_of_texts(plm: Any, cache: TextCache) -> str:
    """What the PLM runs now, as far as the states in a cache follow from it."""
    if not plm.config.is_encoder_decoder:
        return cut_key(plm, "decoder")
    return cut_key(plm, "encoder") + (cut_key(plm, "decoder") if cache.cross_attention else "")


def _run_texts(plm: Any, texts: Sequence[Sequence[int]], cross_attention: bool) -> list[torch.Tensor]:
    """Each text's own states: `(L, 2, heads, T, D)`, or the output `(T, H)` of an encoder.

    Padded on the right, where causal attention, or the encoder's mask, keeps padding from being seen.
    """
    ids, mask = (tensor.to(plm.device) for tensor in padded_ids(texts, least=1))
    with inference(plm):
        if plm.config.is_encoder_decoder:
            hidden = plm.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            if not cross_attention:
                return [hidden[i, : len(text)].clone() for i, text in enumerate(texts)]
            both = EncoderDecoderCache(DynamicCache(), DynamicCache())
            plm.get_decoder()(  # over any one token
                input_ids=ids[:, :1],
                encoder_hidden_states=hidden,
                encoder_attention_mask=mask,
                past_key_values=both,
                use_cache=True,
            )
            states = stacked(both.cross_attention_cache)
        else:
            past = DynamicCache()  # without a config, so that no layer crops: the window is the mask's matter
            # Its keys and values are all that the last layer gives.
            with last_layer_rows(plm, lambda _: torch.zeros(0, dtype=torch.long)):
                plm.base_model(
                    input_ids=ids, attention_mask=torch.ones_like(mask), past_key_values=past, use_cache=True
                )
            states = stacked(past)
        return [states[:, :, i, :, : len(text)].clone() for i, text in enumerate(texts)]


def dynamic_cache(states: torch.Tensor, copies: int = 1) -> DynamicCache:
    """The inverse of `stacked`, with so many copies of each row one after the other."""
    past = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        past.update(keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), layer)
    return past


def stacked(past: Any) -> torch.Tensor:
    """A cache's keys and values `(L, 2, B, heads, T, D)`."""
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in past.layers])


def padded_states(rows: Sequence[torch.Tensor], length: int, left: bool = True) -> torch.Tensor:
    """Rows `(L, 2, heads, T, D)` as one batch `(L, 2, B, heads, T, D)`, padded with zeros on the left or the right."""
    layers, two, heads, _, width = rows[0].shape
    out = rows[0].new_empty(layers, two, len(rows), heads, length, width)
    for i, row in enumerate(rows):
        tokens = row.shape[3]
        start = length - tokens if left else 0
        out[:, :, i, :, start : start + tokens] = row
        out[:, :, i, :, slice(start) if left else slice(tokens, None)] = 0
    return out
