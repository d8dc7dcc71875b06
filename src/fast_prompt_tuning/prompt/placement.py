"""Prompts after the text: the text is run once, without a gradient, and its states can be kept.

In a causal decoder a soft prompt that stands *after* the input text leaves the text's hidden states as they are without
it. The text's keys and values then follow from its tokens alone: they need no backward pass, and one forward pass
serves every epoch, seed and trial. A training step computes the prompt and the target only:

    [text] no gradient, kept  →  [prompt][target] with gradient over the text's keys and values

`infix` is the same with the end of the text behind the prompt: `[context]  →  [prompt][question][target]`. The question
then sees the prompt, and the context's states serve every question about it.

In an encoder-decoder the prompt stands in front of the decoder's input, and what is kept is the encoder's output.

The model's own forward does all computing: it is handed a `transformers` cache that holds the text and never grows, and
an attention function that leaves the text's keys and values out of the backward pass.
Sizes: B batch, T text tokens, P prompt length, D target tokens, H `d_model`, L layers.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ..data.trimming import AFTER
from ..errors import ConfigError, ModelError
from ..plm import families, fingerprint
from ..plm.objective import IGNORED, last_layer_rows, selected_rows
from ..plm.partial import cut_key
from .soft_prompt import (
    check_prompt_tokens,
    context_length,
    init_soft_prompt,
    load_prompt,
    save_suffix_prompt,
    suffix_record,
)
from .text_cache import TextCache

logger = logging.getLogger(__name__)


PLACEMENTS = ("suffix", "infix")
"""Where a prompt stands that leaves the text, or its beginning, as it is without a prompt."""


def check_suffix(plm: Any, placement: str = "suffix") -> None:
    """Raise unless a prompt can stand after this PLM's text, or within it.

    Raises:
        ConfigError: another placement.
        UnknownFamilyError: the architecture is not registered.
        ModelError: its attention is not causal; `infix` for an encoder-decoder, whose encoder reads the text as a
            whole; gradient checkpointing is on, under which `transformers` drops the cache that holds the text.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement={placement!r} is unknown here; choose {' or '.join(PLACEMENTS)}")
    if placement == "infix" and plm.config.is_encoder_decoder:
        raise ModelError(
            "placement='infix' needs a decoder-only model: an encoder reads its text as a whole; use placement='suffix'"
        )
    if not plm.config.is_encoder_decoder and "decoder" not in families.of(plm.config).stacks:
        raise ModelError(
            f"placement='suffix' needs a decoder-only model or an encoder-decoder, which {type(plm).__name__} is not; "
            "use placement='prefix'"
        )
    if plm.training and any(module.__dict__.get("gradient_checkpointing") for module in plm.modules()):
        raise ModelError(
            "placement='suffix' cannot be trained with gradient checkpointing, which drops the text's states; turn it "
            "off (plm.gradient_checkpointing_disable()): the text keeps no activations here anyway"
        )


# -- the text ---------------------------------------------------------------------------------------------------------


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
        if _apart.get() is not None:
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
        ModelError: as `check_suffix`; the cache is another model's.
    """
    check_suffix(plm)
    if cache is not None and cache.plm is not plm:
        raise ModelError("the text cache is another model's; make it of this one: TextCache(plm)")
    cut = _cut(plm, cache) if cache is not None else ""
    keys = [TextCache.key(cut, ids) for ids in texts] if cache is not None else []
    rows: list[torch.Tensor | None] = [cache.get(key) for key in keys] if cache is not None else [None] * len(texts)
    # The same text twice in a batch (several prompts asked about it) is run once.
    missing: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row is None:
            missing.setdefault(tuple(texts[i]), []).append(i)
    if missing:
        made = _run_texts(plm, list(missing), cross_attention=cache is not None and cache.cross_attention)
        for places, row in zip(missing.values(), made, strict=True):
            if cache is not None:
                row = cache.put(keys[places[0]], row)
            for i in places:
                rows[i] = row
    found = [row for row in rows if row is not None]
    mask = torch.zeros(len(texts), max(len(ids) for ids in texts), dtype=torch.long)
    left = not plm.config.is_encoder_decoder
    for i, ids in enumerate(texts):
        mask[i, slice(mask.shape[1] - len(ids), None) if left else slice(len(ids))] = 1
    encoded = found[0].dim() == 2
    states = nn.utils.rnn.pad_sequence(found, batch_first=True) if encoded else _joined(found, mask.shape[1], left)
    ran = (len(missing), max((len(ids) for ids in missing), default=0))
    if cache is not None and missing:
        cache.ran.append(ran)
    return TextStates(states.to(plm.device), mask.to(plm.device), ran)


def _cut(plm: Any, cache: TextCache) -> str:
    """What the PLM runs now, as far as the states in a cache follow from it."""
    if not plm.config.is_encoder_decoder:
        return cut_key(plm, "decoder")
    return cut_key(plm, "encoder") + (cut_key(plm, "decoder") if cache.cross_attention else "")


def _run_texts(plm: Any, texts: Sequence[Sequence[int]], cross_attention: bool) -> list[torch.Tensor]:
    """Each text's own states: `(L, 2, heads, T, D)`, or the output `(T, H)` of an encoder.

    Padded on the right, where causal attention, or the encoder's mask, keeps padding from being seen.
    """
    longest = max(1, *(len(ids) for ids in texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.as_tensor(text, dtype=torch.long)
        mask[i, : len(text)] = 1
    ids, mask = ids.to(plm.device), mask.to(plm.device)
    with _undisturbed(plm):
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
            states = _stacked(both.cross_attention_cache)
        else:
            past = DynamicCache()  # without a config, so that no layer crops: the window is the mask's matter
            # Its keys and values are all that the last layer gives.
            with last_layer_rows(plm, lambda _: torch.zeros(0, dtype=torch.long)):
                plm.base_model(
                    input_ids=ids, attention_mask=torch.ones_like(mask), past_key_values=past, use_cache=True
                )
            states = _stacked(past)
        return [states[:, :, i, :, : len(text)].clone() for i, text in enumerate(texts)]


def _stacked(past: Any) -> torch.Tensor:
    """A cache's keys and values `(L, 2, B, heads, T, D)`."""
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in past.layers])


@contextlib.contextmanager
def _undisturbed(plm: Any) -> Iterator[None]:
    """No gradient and no dropout, and every module's mode as it was afterwards."""
    training = [module for module in plm.modules() if module.training]
    plm.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _joined(rows: Sequence[torch.Tensor], length: int, left: bool = True) -> torch.Tensor:
    """Rows `(L, 2, heads, T, D)` as one batch `(L, 2, B, heads, T, D)`, padded with zeros on the left or the right."""
    layers, two, heads, _, width = rows[0].shape
    out = rows[0].new_empty(layers, two, len(rows), heads, length, width)
    for i, row in enumerate(rows):
        own = row.shape[3]
        start = length - own if left else 0
        out[:, :, i, :, start : start + own] = row
        out[:, :, i, :, slice(start) if left else slice(own, None)] = 0
    return out


# -- attention to it --------------------------------------------------------------------------------------------------

_APART = "fast_prompt_tuning_text"
"""The name of `_attention` among the attention functions of `transformers`."""

_apart: contextvars.ContextVar[tuple[Cache, bool] | None] = contextvars.ContextVar("_apart", default=None)
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
    text, eager = _apart.get()  # type: ignore[misc]
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
def _text_apart(plm: Any, text: Cache, new: int) -> Iterator[None]:
    """Forwards of a decoder over `text` compute what they usually do, by `_attention`.

    Elsewhere text and what follows are put together: for other kernels than PyTorch's own (FlashAttention), for many
    new positions where the kernel is a fused one, and in architectures that do not ask for an attention function.
    """
    own = plm.config._attn_implementation
    if not (own == "eager" or (own == "sdpa" and new <= _FEW)) or not _knows_attention(plm):
        yield
        return
    token = _apart.set((text, own == "eager"))
    plm.config._attn_implementation = _APART
    try:
        yield
    finally:
        plm.config._attn_implementation = own
        _apart.reset(token)


# -- prompt and target ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A batch taken apart: `texts` (token ids of each), `targets (B, D)` and their `labels (B, D)`, right-padded."""

    texts: list[list[int]]
    targets: torch.Tensor
    labels: torch.Tensor


def split_batch(plm: Any, batch: Mapping[str, Any]) -> Parts:
    """The texts and targets of a batch as the model's forward takes it, padded on either side.

    In a decoder-only model's batch a row's text ends where its first label begins; a row without labels is all text.
    Where the batch has `n_after` `(B,)`, so many tokens at a text's end stand before its target, without labels.

    Raises:
        ModelError: no `input_ids`, or no `labels`.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None:
        lacking = "input_ids" if ids is None else "labels"
        raise ModelError(f"batch[{lacking!r}] is missing: a prompt after the text needs token ids and labels")
    mask = batch.get("attention_mask")
    keep = [[True] * ids.shape[1]] * len(ids) if mask is None else mask.bool().tolist()
    rows = [list(itertools.compress(row, kept)) for row, kept in zip(ids.tolist(), keep, strict=True)]
    if plm.config.is_encoder_decoder:
        return Parts(rows, labels, labels)
    marks = [list(itertools.compress(row, kept)) for row, kept in zip(labels.tolist(), keep, strict=True)]
    ends = [next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in marks]
    if batch.get(AFTER) is not None:
        ends = [_first_part(end, after) for end, after in zip(ends, _counts(batch[AFTER], len(rows)), strict=True)]

    def padded(tails: list[list[int]], value: int) -> torch.Tensor:
        width = max(1, *(len(tail) for tail in tails))
        return torch.tensor([tail + [value] * (width - len(tail)) for tail in tails], device=ids.device)

    return Parts(
        [row[:end] for row, end in zip(rows, ends, strict=True)],
        padded([row[end:] for row, end in zip(rows, ends, strict=True)], 0),
        padded([row[end:] for row, end in zip(marks, ends, strict=True)], IGNORED),
    )


def _counts(after: Any, rows: int) -> list[int]:
    """`n_after` of a batch or of `generate`, one whole number a row.

    Raises:
        ModelError: anything else.
    """
    found = after.tolist() if isinstance(after, torch.Tensor) else list(after)
    whole = (
        [isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in found] if isinstance(found, list) else []
    )
    if len(whole) != rows or not all(whole):
        raise ModelError(f"{AFTER}={found!r} must be a whole number of at least 0 for each of the {rows} texts")
    return found


def _first_part(length: int, after: int) -> int:
    """Tokens of a text that stand before the prompt: one at least, since a prompt needs something to stand after."""
    return max(length - after, min(length, 1))


def split_texts(
    texts: Sequence[Sequence[int]], after: Sequence[int] | None
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """What of each text stands before the prompt, and what after it: its last `after` tokens, or none."""
    places = [_first_part(len(t), n) for t, n in zip(texts, after or [0] * len(texts), strict=True)]
    return [t[:i] for t, i in zip(texts, places, strict=True)], [t[i:] for t, i in zip(texts, places, strict=True)]


def suffix_logits(
    plm: Any, prompt: torch.Tensor, text: TextStates, targets: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at the labelled positions of targets that follow a text and a prompt.

    The first target token is predicted from the last prompt vector; in an encoder-decoder from the start token, which
    stands between the prompt and the target.

    Args:
        prompt: one for all rows `(P, H)`, or one each `(B, P, H)`.
        text: what the texts left behind.
        targets: token ids `(B, D)`, right-padded with any valid id.
        labels: `(B, D)`; `IGNORED` where there is none.

    Returns:
        `(logits (N, V), targets (N,), row of the batch (N,))`, as `objective.labelled_logits`.

    Raises:
        ModelError: as `check_suffix`; an encoder-decoder's decoder lacks positions for prompt and target.
    """
    check_suffix(plm)
    labels = labels.to(plm.device)
    rows, size = labels.shape[0], prompt.shape[-2]
    causal = not plm.config.is_encoder_decoder
    # Nothing is predicted from the last target token of a decoder, so it is not run.
    ids = targets[:, :-1] if causal else plm.prepare_decoder_input_ids_from_labels(labels=labels)
    embeds = plm.get_input_embeddings()(ids.to(plm.device))
    embeds = torch.cat([prompt.to(embeds).expand(rows, *prompt.shape[-2:]), embeds], dim=1)
    inputs: dict[str, Any]
    apart: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if causal:
        past = text.cache()
        apart = _text_apart(plm, past, embeds.shape[1])
        # Padding stays on a row's last position: rows that fit by themselves must not run out of them together.
        columns = torch.arange(labels.shape[1], device=plm.device)
        last = size - 1 + ((labels != IGNORED) * columns).amax(1, keepdim=True)
        after = torch.arange(embeds.shape[1], device=plm.device).minimum(last)
        inputs = {
            "inputs_embeds": embeds,
            # What is padded on the right no labelled position can see: it needs no mask.
            "attention_mask": torch.cat([text.mask, text.mask.new_ones(embeds.shape[:2])], dim=1),
            "position_ids": text.lengths[:, None] + after,
            "past_key_values": past,
            "use_cache": True,
        }
        aligned = F.pad(labels, (size - 1, 0), value=IGNORED)
    else:
        encoded, kept = text.encoded()
        inputs = {
            "encoder_outputs": encoded,
            "attention_mask": text.mask,
            "decoder_inputs_embeds": embeds,
            "past_key_values": kept,
            "use_cache": kept is not None,
        }
        aligned = F.pad(labels, (size, 0), value=IGNORED)
        limit = context_length(plm)
        if limit is not None and aligned.shape[1] > limit:
            raise ModelError(
                f"a prompt of {size} tokens and a target of {labels.shape[1]} need {aligned.shape[1]} positions in the "
                f"decoder, which has {limit}; shorten one"
            )
    index = (aligned.reshape(-1) != IGNORED).nonzero(as_tuple=True)[0]
    with selected_rows(plm, lambda _: index), last_layer_rows(plm, lambda _: index), apart:
        logits = plm(**inputs).logits
    found = aligned.reshape(-1).index_select(0, index)
    return logits, found, torch.div(index, aligned.shape[1], rounding_mode="floor")


def generation_inputs(
    plm: Any,
    prompt: torch.Tensor,
    texts: Sequence[Sequence[int]],
    *,
    after: Sequence[int] | None = None,
    copies: int = 1,
    cache: TextCache | None = None,
) -> dict[str, Any]:
    """What `plm.generate` takes to answer texts with a prompt after them (in front of the decoder's input).

    The model has read text and prompt already. A decoder-only one gets the keys and values of all but the last vector
    of `[padding][text][prompt]`, and that one's embedding behind placeholders. In an encoder-decoder P placeholder ids
    stand for the prompt in `decoder_input_ids`, and in the sequences that come out.

    Args:
        prompt: one for all texts `(P, H)`, or one each `(B, P, H)`.
        after: of each text, the tokens at its end that stand after the prompt; default none.
        copies: sequences that run for each text: beams, or samples.
        cache: kept states of the texts.
    """
    firsts, ends = split_texts(texts, after)
    text = text_states(plm, firsts, cache)
    rows, size = len(texts), prompt.shape[-2]
    embed = plm.get_input_embeddings()
    front = prompt.to(embed.weight).expand(rows, *prompt.shape[-2:])
    if not plm.config.is_encoder_decoder:
        text, last = _read_on(plm, text, front, ends)
        placeholders = last.new_zeros(rows, text.mask.shape[1], last.shape[-1])
        past: Cache = DynamicCache()
        for layer, (keys, values) in enumerate(text.states):
            past.update(keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), layer)
        return {
            "inputs_embeds": torch.cat([placeholders, last], dim=1),
            "attention_mask": F.pad(text.mask, (0, 1), value=1),
            "past_key_values": past,
        }
    encoded, kept = text.encoded()
    past = EncoderDecoderCache(DynamicCache(), DynamicCache()) if kept is None else kept
    with _undisturbed(plm), selected_rows(plm, lambda _: torch.zeros(1, dtype=torch.long)):
        plm(
            encoder_outputs=encoded,
            attention_mask=text.mask,
            decoder_inputs_embeds=front,
            past_key_values=past,
            use_cache=True,
        )
    past.batch_repeat_interleave(copies)
    chosen = plm.generation_config.decoder_start_token_id
    start = plm.config.decoder_start_token_id if chosen is None else chosen
    ids = torch.full((rows, size + 1), start, device=plm.device)
    return {
        "encoder_outputs": encoded,
        "attention_mask": text.mask,
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.ones_like(ids),  # as long as the ids: says that some are in the cache
        "past_key_values": past,
    }


def _read_on(
    plm: Any, text: TextStates, front: torch.Tensor, ends: Sequence[Sequence[int]]
) -> tuple[TextStates, torch.Tensor]:
    """What texts leave behind with a prompt `(B, P, H)` and what stands after it, less their last vector `(B, 1, H)`.

    Prompt and ends run padded on the right, and come out padded on the left as one text: generated tokens follow at
    once, at the distances that a sliding window counts.
    """
    rows, size = front.shape[:2]
    ids = torch.zeros(rows, max(map(len, ends)), dtype=torch.long)
    for i, end in enumerate(ends):
        ids[i, : len(end)] = torch.as_tensor(end, dtype=torch.long)
    embeds = torch.cat([front, plm.get_input_embeddings()(ids.to(plm.device))], dim=1)
    read = [size + len(end) - 1 for end in ends]
    positions = torch.arange(embeds.shape[1], device=plm.device).minimum(torch.tensor(read, device=plm.device)[:, None])
    past = DynamicCache()
    for layer, (keys, values) in enumerate(text.states):
        past.update(keys, values, layer)
    with _undisturbed(plm), last_layer_rows(plm, lambda _: torch.zeros(0, dtype=torch.long)):
        plm.base_model(
            inputs_embeds=embeds,
            attention_mask=torch.cat([text.mask, text.mask.new_ones(embeds.shape[:2])], dim=1),
            position_ids=text.lengths[:, None] + positions,
            past_key_values=past,
            use_cache=True,
        )
    states = _stacked(past)
    width = text.mask.shape[1]
    places = [(width - int(n), width + more) for n, more in zip(text.lengths, read, strict=True)]
    longest = max(stop - start for start, stop in places)
    mask = torch.zeros(rows, longest, dtype=torch.long, device=plm.device)
    for i, (start, stop) in enumerate(places):
        mask[i, longest - (stop - start) :] = 1
    joined = _joined([states[:, :, i, :, start:stop] for i, (start, stop) in enumerate(places)], longest)
    last = torch.stack([embeds[i, n] for i, n in enumerate(read)])[:, None]
    return TextStates(joined, mask, text.ran), last


# -- the model --------------------------------------------------------------------------------------------------------


class SuffixPromptModel(nn.Module):
    """A frozen PLM with a soft prompt after the text: trains in a stock `transformers.Trainer`, generates, saves.

    Only the prompt is trained, and only it stands in the state dict.

    Args:
        plm: a bare `transformers` model, decoder-only or encoder-decoder; its weights are frozen here.
        num_virtual_tokens: prompt length P.
        placement: `suffix`, after the text; or `infix`, before the last tokens of a decoder-only model's text, whose
            number comes with each row (`n_after`).
        cache: where the texts' states are kept between steps; None computes them at every step, forward only.
        init: how the prompt starts, see `init_soft_prompt`; `vocab` needs nothing else.
        seed: of the initialisation.

    Raises:
        ConfigError: a prompt length the model has no room for.
        UnknownFamilyError, ModelError: as `check_suffix`; the cache is another model's.
    """

    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(
        self,
        plm: Any,
        num_virtual_tokens: int = 20,
        *,
        placement: str = "suffix",
        cache: TextCache | None = None,
        init: str = "vocab",
        seed: int = 0,
    ):
        super().__init__()
        check_suffix(plm, placement)
        check_prompt_tokens(plm, num_virtual_tokens)
        if cache is not None and cache.plm is not plm:
            raise ModelError("the text cache is another model's; make it of this one: TextCache(plm)")
        self.plm = plm.requires_grad_(False)
        self.placement, self.cache = placement, cache
        width = plm.get_input_embeddings().weight.shape[-1]
        self.soft_prompt = nn.Parameter(torch.zeros(num_virtual_tokens, width, device=plm.device))
        # Of the last forward, for who counts its cost: texts run, and padded tokens before and after the prompt.
        self.text_ran, self.text_tokens, self.after_tokens = (0, 0), 0, 0
        self._cut = ""
        init_soft_prompt(self, init, seed=seed)
        self.register_state_dict_post_hook(_prompt_only)
        self.register_load_state_dict_post_hook(_plm_is_not_missing)

    @property
    def config(self) -> Any:
        """The PLM's."""
        return self.plm.config

    @property
    def device(self) -> torch.device:
        """The PLM's."""
        return self.plm.device

    def get_base_model(self) -> Any:
        """The PLM, as of a PEFT model."""
        return self.plm

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        n_after: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> CausalLMOutput:
        """The loss of a batch as the PLM's own forward takes it: `input_ids (B, T)`, text and target together for a
        decoder-only model. Logits exist at labelled positions only and are not returned.

        Args:
            n_after: with `infix`, tokens at the end of each text that stand after the prompt `(B,)`. A text's first
                token always stands before it.

        Raises:
            ModelError: no labels; `n_after` missing with `infix`, given without it, or no whole numbers.
        """
        self._check_after(n_after)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, AFTER: n_after}
        parts = split_batch(self.plm, batch)
        if self.training and self.cache is not None:
            self._forget_last_stage()
        text = text_states(self.plm, parts.texts, self.cache)
        self.text_ran, self.text_tokens, self.after_tokens = text.ran, text.mask.shape[1], parts.targets.shape[1]
        logits, targets, _ = suffix_logits(self.plm, self.soft_prompt, text, parts.targets, parts.labels)
        if targets.numel() == 0 and num_items_in_batch is None:
            raise ModelError("batch['labels'] marks no position: every label is -100, so there is no loss")
        total = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets, reduction="sum")
        loss = total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutput(loss=loss)  # type: ignore[arg-type]

    def _check_after(self, n_after: Any) -> None:
        if (n_after is not None) != (self.placement == "infix"):
            problem = "is missing" if n_after is None else "is given"
            raise ModelError(
                f"{AFTER} {problem} with placement={self.placement!r}: an infix prompt, and no other, is told how many "
                "tokens at the end of each text stand after it"
            )

    def _forget_last_stage(self) -> None:
        """Training never goes back to an earlier stage: its texts' states only take room."""
        cut = _cut(self.plm, self.cache)  # type: ignore[arg-type]
        if self._cut and cut != self._cut:
            self.cache.forget(self._cut)  # type: ignore[union-attr]
        self._cut = cut

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refused: as `check_suffix`."""
        raise ModelError(
            "a prompt after the text cannot be trained with gradient checkpointing, which drops the text's states; "
            "leave it out: the text keeps no activations here anyway"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the prompt, and where it stands; `load_soft_prompt(plm, folder)` reads it.

        Raises:
            ConfigError: the folder holds a stock adapter.
        """
        name = str(self.config.name_or_path or self.config.model_type)
        found = fingerprint.of_model(self.plm)
        save_suffix_prompt(folder, self.soft_prompt, placement=self.placement, base_model=name, model_fingerprint=found)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        n_after: torch.Tensor | Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """`plm.generate` with the prompt after the text; takes and gives what the PLM's own `generate` does.

        With `infix` it also takes `n_after`, as `forward` does. The cache is always a dynamic one, since it holds the
        text: `use_cache` and `cache_implementation` do not count.
        """
        self._check_after(n_after)
        after = None if n_after is None else _counts(n_after, len(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        texts = [row[keep].tolist() for row, keep in zip(input_ids, mask.bool(), strict=True)]
        read = 1 if self.plm.config.is_encoder_decoder else input_ids.shape[1]
        config, more = _generation_config(self.plm.generation_config, options, read)
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        prompt = self.soft_prompt.detach()
        inputs = generation_inputs(self.plm, prompt, texts, after=after, copies=copies, cache=self.cache)
        own, self.plm.generation_config = self.plm.generation_config, config
        try:
            found = self.plm.generate(**inputs, **more)
        finally:
            self.plm.generation_config = own
        sequences = found if isinstance(found, torch.Tensor) else found.sequences
        if self.plm.config.is_encoder_decoder:
            sequences = sequences[:, len(self.soft_prompt) :]
        else:
            text = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
            sequences = torch.cat([text, sequences], dim=1)
        if isinstance(found, torch.Tensor):
            return sequences
        found.sequences = sequences
        return found


def _generation_config(own: Any, options: dict[str, Any], read: int) -> tuple[Any, dict[str, Any]]:
    """What `generate` would make of its options and the model's own config, for a text whose states are at hand.

    Lengths are those of the tokens to come: `max_length` and `min_length` count the `read` ones, not the prompt.

    Returns:
        The config, and options that are none of its.

    Raises:
        ConfigError: `max_length` is at most `read`.
    """
    given = options.pop("generation_config", None)
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    config.update(**own.to_dict(), defaults_only=True, allow_custom_entries=True)
    more = config.update(**options)
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if getattr(config, total) and getattr(config, new) is None:
            setattr(config, new, max(getattr(config, total) - read, 0))
            if total == "max_length" and config.max_new_tokens == 0:
                raise ConfigError(
                    f"max_length={config.max_length} leaves no room for an answer to {read} tokens; raise it, or set "
                    "max_new_tokens"
                )
        setattr(config, total, None)
    config.use_cache, config.cache_implementation = True, None
    return config, more


def _prompt_only(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}plm.")]:
        del state[name]


def _plm_is_not_missing(_module: nn.Module, result: Any) -> None:
    result.missing_keys[:] = [n for n in result.missing_keys if "plm." not in n]


def load_soft_prompt(plm: Any, folder: str | Path, *, cache: TextCache | None = None) -> Any:
    """A PLM with the soft prompt saved in a folder, wherever it stands: its `generate` and `forward` just work.

    Args:
        plm: the bare PLM the prompt was tuned on.
        folder: where `save_pretrained` has put it, or `prompt/` of a run.
        cache: where the texts' states are kept, of a prompt after the text.

    An `infix` prompt's model is told where the prompt stands in each text: `n_after`, as in training.

    Returns:
        A `SuffixPromptModel`, or the `PeftModel` of a stock prompt in front of the text.

    Raises:
        ConfigError: no prompt there, or one of another width.
        ModelError: as `SuffixPromptModel`.
    """
    values = load_prompt(folder)
    record = suffix_record(folder)
    width = plm.get_input_embeddings().weight.shape[-1]
    if values.shape[-1] != width:
        raise ConfigError(
            f"{str(folder)!r} holds a prompt of vectors of {values.shape[-1]} numbers, this model's embeddings have "
            f"{width}: it is another model's prompt"
        )
    if record is None:
        try:
            return PeftModel.from_pretrained(plm, str(folder))
        except Exception as error:  # PEFT makes what the file says, and fails as each of its fields does
            raise ConfigError(
                f"{str(folder)!r}: PEFT cannot load what adapter_config.json describes; save the prompt again "
                f"({type(error).__name__}: {error})"
            ) from error
    if record["model_fingerprint"] != fingerprint.of_model(plm):
        logger.warning("%s was tuned on %s, whose weights are not this model's", folder, record["base_model"])
    model = SuffixPromptModel(plm, len(values), placement=record["placement"], cache=cache)
    with torch.no_grad():
        model.soft_prompt.copy_(values)
    return model.eval()


def suffix_loss(
    model: nn.Module, batch: Mapping[str, Any], *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of a batch with the prompt after its text; as `label_loss`, for a `SuffixPromptModel`.

    Args:
        model: a `SuffixPromptModel`, possibly wrapped for data parallelism.
        num_items: divisor of the summed loss; default the labelled positions of this batch.

    Raises:
        ModelError: another kind of model, or a batch without labels.
    """
    if not isinstance(getattr(model, "module", model), SuffixPromptModel):
        raise ModelError(f"{type(model).__name__} is not a SuffixPromptModel: its prompt is not after the text")
    inputs = {k: batch.get(k) for k in ("input_ids", "attention_mask", "labels", AFTER)}
    loss: torch.Tensor = model(**inputs, num_items_in_batch=num_items).loss
    return loss
