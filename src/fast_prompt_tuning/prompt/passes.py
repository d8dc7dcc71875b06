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
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..data.trimming import TAIL
from ..errors import ModelError, is_whole
from ..plm.modes import inference
from ..plm.objective import IGNORED, last_layer_rows, selected_rows
from .prediction import padded_ids
from .soft_prompt import context_length
from .text_attention import text_apart
from .text_states import TextStates, check_text_apart, dynamic_cache, padded_states, stacked


@dataclass(frozen=True)
class Parts:
    """A batch taken apart: `texts` (token ids of each), `targets (B, D)` and their `labels (B, D)`, right-padded."""

    texts: list[list[int]]
    targets: torch.Tensor
    labels: torch.Tensor


def split_batch(plm: Any, batch: Mapping[str, Any], *, tails: bool = False) -> Parts:
    """The texts and targets of a batch as the model's forward takes it, padded on either side.

    In a decoder-only model's batch a row's text ends where its first label begins; a row without labels is all text.
    With `tails`, the last `n_tail` `(B,)` tokens of a text stand before its target, without labels.

    Raises:
        ModelError: no `input_ids`, `labels` or, with `tails`, `n_tail`; an `n_tail` that is no whole number.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None:
        lacking = "input_ids" if ids is None else "labels"
        raise ModelError(f"batch[{lacking!r}] is missing: a prompt after the text needs token ids and labels")
    mask = batch.get("attention_mask")
    keep = [[True] * ids.shape[1]] * len(ids) if mask is None else mask.bool().tolist()
    rows = [list(itertools.compress(row, real)) for row, real in zip(ids.tolist(), keep, strict=True)]
    if plm.config.is_encoder_decoder:
        return Parts(rows, labels, labels)
    marks = [list(itertools.compress(row, real)) for row, real in zip(labels.tolist(), keep, strict=True)]
    ends = [next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in marks]
    if tails:
        ends = [_first_part(end, tail) for end, tail in zip(ends, counts(batch.get(TAIL), len(rows)), strict=True)]

    def padded(tails: list[list[int]], value: int) -> torch.Tensor:
        width = max(1, *(len(tail) for tail in tails))
        return torch.tensor([tail + [value] * (width - len(tail)) for tail in tails], device=ids.device)

    return Parts(
        [row[:end] for row, end in zip(rows, ends, strict=True)],
        padded([row[end:] for row, end in zip(rows, ends, strict=True)], 0),
        padded([row[end:] for row, end in zip(marks, ends, strict=True)], IGNORED),
    )


def counts(tail: Any, rows: int) -> list[int]:
    """The tokens of each text that stand after the prompt, one whole number a row.

    Raises:
        ModelError: anything else.
    """
    numbers = tail.tolist() if isinstance(tail, torch.Tensor) else tail
    if not isinstance(numbers, Sequence) or len(numbers) != rows or not all(is_whole(n, 0) for n in numbers):
        raise ModelError(
            f"{numbers!r} must be a whole number of at least 0 for each of the {rows} texts: its tokens after the "
            "prompt"
        )
    return list(numbers)


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
    plm: Any, prompt: Any, text: TextStates, targets: torch.Tensor, labels: torch.Tensor
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
        ModelError: as `check_text_apart`; an encoder-decoder's decoder lacks positions for prompt and target.
    """
    check_text_apart(plm)
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
        apart = text_apart(plm, past, embeds.shape[1])
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
        encoded, text_cache = text.encoded()
        inputs = {
            "encoder_outputs": encoded,
            "attention_mask": text.mask,
            "decoder_inputs_embeds": embeds,
            "past_key_values": text_cache,
            "use_cache": text_cache is not None,
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
    label_ids = aligned.reshape(-1).index_select(0, index)
    return logits, label_ids, torch.div(index, aligned.shape[1], rounding_mode="floor")


def generation_inputs(
    plm: Any, prompt: Any, text: TextStates, ends: Sequence[Sequence[int]], copies: int = 1
) -> dict[str, Any]:
    """What `plm.generate` takes to answer texts with a prompt after them (in front of the decoder's input).

    The model has read text and prompt already. A decoder-only one gets the keys and values of all but the last vector
    of `[padding][text][prompt]`, and that one's embedding behind placeholders. In an encoder-decoder P placeholder ids
    stand for the prompt in `decoder_input_ids`, and in the sequences that come out.

    Args:
        prompt: one for all texts `(P, H)`, or one each `(B, P, H)`.
        text: what the texts left behind.
        ends: of each text, the tokens that stand after the prompt.
        copies: sequences that run for each text: beams, or samples.
    """
    rows, size = len(ends), prompt.shape[-2]
    embed = plm.get_input_embeddings()
    front = prompt.to(embed.weight).expand(rows, *prompt.shape[-2:])
    if not plm.config.is_encoder_decoder:
        text, last = _read_on(plm, text, front, ends)
        placeholders = last.new_zeros(rows, text.mask.shape[1], last.shape[-1])
        return {
            "inputs_embeds": torch.cat([placeholders, last], dim=1),
            "attention_mask": F.pad(text.mask, (0, 1), value=1),
            "past_key_values": dynamic_cache(text.states, copies),
        }
    encoded, text_cache = text.encoded()
    past = EncoderDecoderCache(DynamicCache(), DynamicCache()) if text_cache is None else text_cache
    with inference(plm), selected_rows(plm, lambda _: torch.zeros(1, dtype=torch.long)):
        plm(
            encoder_outputs=encoded,
            attention_mask=text.mask,
            decoder_inputs_embeds=front,
            past_key_values=past,
            use_cache=True,
        )
    past.batch_repeat_interleave(copies)
    own_start = plm.generation_config.decoder_start_token_id
    start = plm.config.decoder_start_token_id if own_start is None else own_start
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
    ids, _ = padded_ids(ends)
    embeds = torch.cat([front, plm.get_input_embeddings()(ids.to(plm.device))], dim=1)
    read = [size + len(end) - 1 for end in ends]
    positions = torch.arange(embeds.shape[1], device=plm.device).minimum(torch.tensor(read, device=plm.device)[:, None])
    past = dynamic_cache(text.states)
    with inference(plm), last_layer_rows(plm, lambda _: torch.zeros(0, dtype=torch.long)):
        plm.base_model(
            inputs_embeds=embeds,
            attention_mask=torch.cat([text.mask, text.mask.new_ones(embeds.shape[:2])], dim=1),
            position_ids=text.lengths[:, None] + positions,
            past_key_values=past,
            use_cache=True,
        )
    states = stacked(past)
    width = text.mask.shape[1]
    places = [(width - int(n), width + more) for n, more in zip(text.lengths, read, strict=True)]
    longest = max(stop - start for start, stop in places)
    mask = torch.zeros(rows, longest, dtype=torch.long, device=plm.device)
    for i, (start, stop) in enumerate(places):
        mask[i, longest - (stop - start) :] = 1
    joined = padded_states([states[:, :, i, :, start:stop] for i, (start, stop) in enumerate(places)], longest)
    last = torch.stack([embeds[i, n] for i, n in enumerate(read)])[:, None]
    return TextStates(joined, mask, text.ran), last
