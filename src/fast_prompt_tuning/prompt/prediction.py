"""Predictions of a PLM with, or without, a soft prompt: label scoring and generation in batches.

Everything here works on the bare PLM and the prompt's vectors, so that a trained prompt, an untrained one and none at
all are predicted by the same code. Decoder-only inputs are padded on the left *of the prompt* and positions follow
the attention mask: a batch of many gives the predictions of a batch of one. With `placement="suffix"` the prompt stands
after the text, with `"infix"` within it (see `placement.py`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..errors import ConfigError, DataError
from ..plm.objective import IGNORED, labelled_logits, last_layer_rows, selected_rows
from .placement import check_suffix, generation_inputs, split_texts, suffix_logits, text_states
from .text_cache import TextCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What the model answered for one example, and how sure it was. No answer where its scores are no numbers.

    `score` is the total log-probability of the chosen label (label scoring), or of the generated tokens per token
    (generation, greedy and beam). `label_scores` holds every label's, for ensembles.
    """

    text: str
    score: float
    label_scores: Mapping[str, float] | None = None

    @property
    def probabilities(self) -> dict[str, float] | None:
        """Of each label, among the labels; None for generated answers."""
        if self.label_scores is None:
            return None
        shares = torch.tensor(list(self.label_scores.values())).softmax(-1)
        return dict(zip(self.label_scores, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Padded:
    """Inputs of one batch: `embeds (B, P + T, H)` and `mask (B, P + T)`, the soft prompt in front of the text."""

    embeds: torch.Tensor
    mask: torch.Tensor


def prompted_inputs(plm: Any, prompt: torch.Tensor | None, inputs: Sequence[Sequence[int]], *, left: bool) -> Padded:
    """Embed token ids, put the prompt in front of each and pad: `[pad…][prompt][text]` if `left`.

    Args:
        prompt: one for all inputs `(P, H)`, or one for each `(B, P, H)`.
    """
    embed = plm.get_input_embeddings()
    length = max(len(ids) for ids in inputs)
    ids = torch.zeros(len(inputs), length, dtype=torch.long)
    real = torch.zeros(len(inputs), length, dtype=torch.long)
    for row, tokens in enumerate(inputs):
        ids[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        real[row, : len(tokens)] = 1
    embeds, mask = embed(ids.to(plm.device)), real.to(plm.device)
    if prompt is not None:
        front = prompt.to(embeds).expand(len(inputs), *prompt.shape[-2:])
        embeds = torch.cat([front, embeds], dim=1)
        mask = torch.cat([mask.new_ones(front.shape[:2]), mask], dim=1)
    if left:
        # Rolling each row moves its padding from the end to the front, ahead of the prompt.
        shift = mask.shape[1] - mask.sum(1)
        index = (torch.arange(mask.shape[1], device=mask.device)[None] - shift[:, None]) % mask.shape[1]
        embeds = embeds.gather(1, index[..., None].expand_as(embeds))
        mask = mask.gather(1, index)
    return Padded(embeds, mask)


def batches_of(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def by_length(inputs: Sequence[Sequence[int]]) -> list[int]:
    """Order that brings inputs of like length together, longest first (so that memory runs out at once or never)."""
    return sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))


def prompts_of(prompt: torch.Tensor | None, picked: Sequence[int]) -> torch.Tensor | None:
    """The prompts of some inputs: of K prompts `(K, P, H)`, input i has prompt i mod K; one prompt is everyone's."""
    return prompt if prompt is None or prompt.dim() == 2 else prompt[[i % len(prompt) for i in picked]]


@contextlib.contextmanager
def inference(plm: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and the mode that was, afterwards."""
    training = plm.training
    plm.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        plm.train(training)


def score_labels(
    plm: Any,
    prompt: torch.Tensor | None,
    inputs: Sequence[Sequence[int]],
    labels: Mapping[str, Sequence[int]],
    *,
    batch_size: int = 16,
    length_normalize: bool = False,
    placement: str = "prefix",
    after: Sequence[int] | None = None,
    cache: TextCache | None = None,
) -> list[Prediction]:
    """Rank classification: the label whose tokens the model finds most probable, exactly and without generating.

    Args:
        plm: the bare PLM (encoder-decoder or decoder-only).
        prompt: soft prompt `(P, H)`, None for zero-shot, or several: see `prompts_of`.
        inputs: token ids of each input, unpadded.
        labels: label word -> its target token ids, as in training (`data.label_ids`).
        length_normalize: divide each label's log-probability by its number of tokens.
        placement: `prefix`, `suffix` or `infix`: where the prompt stands.
        after: with `infix`, tokens at the end of each input that stand after the prompt.
        cache: kept states of the texts, for `suffix` and `infix`.

    Raises:
        DataError: no labels, or a label without tokens.
        ConfigError, ModelError: the prompt cannot stand there; `after` is missing with `infix`, or given without it.
    """
    _check_placement(plm, prompt, placement, after)
    if not labels or any(len(ids) == 0 for ids in labels.values()):
        raise DataError(f"labels={dict(labels)!r} must name at least one label, each with at least one token")
    score = _score_encoder_decoder if plm.config.is_encoder_decoder else _score_decoder
    words = list(labels)
    ids_of = [list(labels[w]) for w in words]
    lengths = torch.tensor([len(labels[w]) for w in words], dtype=torch.float32)
    found: dict[int, Prediction] = {}
    with inference(plm):
        for picked in batches_of(by_length(inputs), batch_size):
            fronts, tokens = prompts_of(prompt, picked), [inputs[i] for i in picked]
            if fronts is not None and placement != "prefix":
                table = _score_suffix(plm, fronts, tokens, _picked(after, picked), ids_of, cache).float().cpu()
            else:
                table = score(plm, fronts, tokens, ids_of).float().cpu()
            if length_normalize:
                table = table / lengths
            for i, row in zip(picked, table, strict=True):
                found[i] = _likeliest(words, row)
    lost = sum(prediction.text == "" for prediction in found.values())
    if lost:
        logger.warning("%d of %d inputs have no answer: the model's output is not a number", lost, len(inputs))
    return [found[i] for i in range(len(inputs))]


def _likeliest(words: Sequence[str], scores: torch.Tensor) -> Prediction:
    """The label with the highest of the scores `(number of labels,)`."""
    table = dict(zip(words, scores.tolist(), strict=True))
    if scores.isnan().any():
        return Prediction("", math.nan, table)
    best = int(scores.argmax())
    return Prediction(words[best], float(scores[best]), table)


def _log_probability(logits: torch.Tensor, targets: torch.Tensor, sequence: torch.Tensor, size: int) -> torch.Tensor:
    """Summed log-probability of each sequence's targets: `(size,)`."""
    each = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]
    return torch.zeros(size, device=each.device).index_add_(0, sequence, each)


def _score_decoder(
    plm: Any, prompt: torch.Tensor | None, inputs: list[Sequence[int]], labels: list[list[int]]
) -> torch.Tensor:
    """`(B, number of labels)` summed log-probabilities."""
    if all(len(ids) == 1 for ids in labels):
        # One pass serves all labels: they compete for the same next token.
        padded = prompted_inputs(plm, prompt, inputs, left=False)
        last = padded.mask.sum(1) - 1

        def ends(shape: torch.Size) -> torch.Tensor:
            return torch.arange(shape[0], device=last.device) * shape[1] + last

        with selected_rows(plm, ends), last_layer_rows(plm, ends):
            logits = plm(inputs_embeds=padded.embeds, attention_mask=padded.mask, use_cache=False).logits
        return torch.log_softmax(logits.float(), -1)[:, [ids[0] for ids in labels]]
    columns = []
    for ids in labels:
        padded = prompted_inputs(plm, prompt, [[*tokens, *ids] for tokens in inputs], left=False)
        targets = torch.full(padded.mask.shape, IGNORED, device=padded.mask.device)
        for row, end in enumerate(padded.mask.sum(1).tolist()):
            targets[row, end - len(ids) : end] = torch.tensor(ids)
        batch = {"inputs_embeds": padded.embeds, "attention_mask": padded.mask, "labels": targets}
        columns.append(_log_probability(*labelled_logits(plm, batch), len(inputs)))
    return torch.stack(columns, 1)


def _score_encoder_decoder(
    plm: Any, prompt: torch.Tensor | None, inputs: list[Sequence[int]], labels: list[list[int]]
) -> torch.Tensor:
    """`(B, number of labels)`; the encoder runs once for all labels."""
    padded = prompted_inputs(plm, prompt, inputs, left=False)
    encoded = plm.get_encoder()(inputs_embeds=padded.embeds, attention_mask=padded.mask)
    columns = []
    for ids in labels:
        targets = torch.tensor([ids] * len(inputs), device=padded.mask.device)
        batch = {"encoder_outputs": encoded, "attention_mask": padded.mask, "labels": targets}
        columns.append(_log_probability(*labelled_logits(plm, batch), len(inputs)))
    return torch.stack(columns, 1)


def _check_placement(plm: Any, prompt: torch.Tensor | None, placement: str, after: Sequence[int] | None) -> None:
    if prompt is not None and placement != "prefix":
        check_suffix(plm, placement)
    if (after is not None) != (placement == "infix"):
        raise ConfigError(f"after={after!r} with placement={placement!r}: an infix prompt, and no other, takes it")


def _picked(values: Sequence[int] | None, places: Sequence[int]) -> list[int] | None:
    return None if values is None else [values[i] for i in places]


def _score_suffix(
    plm: Any,
    prompt: torch.Tensor,
    inputs: list[Sequence[int]],
    after: Sequence[int] | None,
    labels: list[list[int]],
    cache: TextCache | None,
) -> torch.Tensor:
    """`(B, number of labels)`; the text is run once for all labels, or not at all if its states are kept."""
    firsts, ends = split_texts(inputs, after)
    text = text_states(plm, firsts, cache)
    width = max(map(len, ends))

    def logits_of(label: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one label after each text."""
        targets = torch.zeros(len(inputs), width + len(label), dtype=torch.long)
        marks = torch.full_like(targets, IGNORED)
        for i, end in enumerate(ends):
            targets[i, : len(end) + len(label)] = torch.tensor([*end, *label])
            marks[i, len(end) : len(end) + len(label)] = torch.tensor(label)
        return suffix_logits(plm, prompt, text, targets, marks)

    if not plm.config.is_encoder_decoder and all(len(ids) == 1 for ids in labels):
        return torch.log_softmax(logits_of(labels[0])[0].float(), -1)[:, [ids[0] for ids in labels]]
    return torch.stack([_log_probability(*logits_of(ids), len(inputs)) for ids in labels], 1)


def generate(
    plm: Any,
    tokenizer: Any,
    prompt: torch.Tensor | None,
    inputs: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    stop_at_newline: bool = False,
    use_cache: bool = True,
    placement: str = "prefix",
    after: Sequence[int] | None = None,
    cache: TextCache | None = None,
) -> list[Prediction]:
    """Greedy (`num_beams=1`) or beam-search answers, in the order of `inputs`.

    Args:
        plm: the bare PLM. BERT-like models do not generate from embeddings and are refused by `transformers`.
        stop_at_newline: keep the first line only, for decoders whose targets are one line; greedy rows end with it.
        placement, after, cache: as `score_labels`.

    Returns:
        Texts without special tokens, stripped; `score` is the mean log-probability per generated token.
    """
    _check_placement(plm, prompt, placement, after)
    found: dict[int, Prediction] = {}
    left = not plm.config.is_encoder_decoder
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    with inference(plm), _no_leftover_options(plm):
        for picked in batches_of(by_length(inputs), batch_size):
            fronts, tokens = prompts_of(prompt, picked), [inputs[i] for i in picked]
            if fronts is not None and placement != "prefix":
                ends = _picked(after, picked)
                given = generation_inputs(plm, fronts, tokens, after=ends, copies=num_beams, cache=cache)
            else:
                padded = prompted_inputs(plm, fronts, tokens, left=left)
                given = {"inputs_embeds": padded.embeds, "attention_mask": padded.mask}
            chosen, line = _Chosen(), [_LineEnd(tokenizer, plm.device)] if stop_at_newline and num_beams == 1 else []
            out = plm.generate(
                **given,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                use_cache=use_cache or "past_key_values" in given,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
                return_dict_in_generate=True,
                output_scores=num_beams > 1,
                logits_processor=LogitsProcessorList([chosen] if num_beams == 1 else []),
                stopping_criteria=StoppingCriteriaList(line),
            )
            if num_beams == 1:
                new = out.sequences[:, chosen.start :]
                steps = torch.stack(chosen.steps[: new.shape[1]], 1)  # on some devices `generate` looks a step ahead
            else:
                steps = plm.compute_transition_scores(out.sequences, out.scores, out.beam_indices).float()
                new = out.sequences[:, -steps.shape[1] :]
            real = (new != pad) & torch.isfinite(steps)
            means = (steps.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)).tolist()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text, mean in zip(picked, texts, means, strict=True):
                text = text.strip()
                found[i] = Prediction(text.split("\n")[0].strip() if stop_at_newline else text, mean)
    return [found[i] for i in range(len(inputs))]


class _Chosen(LogitsProcessor):
    """Log-probability of every greedily chosen token: `steps` of `(B,)`.

    Kept one by one, since the scores that `generate` would keep are one vocabulary a token: gigabytes.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.start = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = self.start if self.steps else input_ids.shape[1]
        self.steps.append(scores.max(-1).values.float() - scores.float().logsumexp(-1))
        return scores


class _LineEnd(StoppingCriteria):
    """Ends a row once its first line that is not blank is over; `generate` then pads it."""

    eos_token_id = None  # `generate` pads rows that have ended only where a criterion has this attribute

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        self.breaks, self.text, self.both = (tokens.to(device) for tokens in _line_tokens(tokenizer))
        self.start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        # A padded vocabulary has ids that no token stands for; the last entry is theirs.
        new = input_ids[:, self.start :].clamp(max=len(self.text) - 1)
        last = new[:, -1]
        return self.both[last] | (self.breaks[last] & self.text[new[:, :-1]].any(1))


@functools.lru_cache(maxsize=4)
def _line_tokens(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens `(V + 1,)` have a line break, have text, have a break after text; the last is no token."""
    texts = [*tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True), ""]
    tests = (lambda t: "\n" in t, lambda t: bool(t.strip()), lambda t: "\n" in t.lstrip())
    breaks, text, both = (torch.tensor([test(t) for t in texts]) for test in tests)
    return breaks, text, both


@contextlib.contextmanager
def _no_leftover_options(plm: Any) -> Iterator[None]:
    """Generation by our arguments alone: a checkpoint's own sampling options would contradict them, with a warning."""
    own = plm.generation_config
    plm.generation_config = type(own)(decoder_start_token_id=own.decoder_start_token_id, bos_token_id=own.bos_token_id)
    try:
        yield
    finally:
        plm.generation_config = own


VOTINGS = ("probabilities", "votes")


def combine(answers: Sequence[Prediction], how: str = "probabilities") -> Prediction:
    """One answer from those of several prompts to the same input (Lester et al. 2021, Section 6).

    Args:
        how: `probabilities`: the label with the highest mean probability (of the label set); `votes`: the answer given
            most often, ties to the one its voters were surest of. Generated answers have votes only.

    Raises:
        DataError: unknown `how`, no answers, or probabilities of generated ones.
    """
    if how not in VOTINGS:
        raise DataError(f"ensemble={how!r} is unknown; choose one of {', '.join(VOTINGS)}")
    if not answers:
        raise DataError("an ensemble needs at least one answer")
    if how == "votes":
        voters: dict[str, list[float]] = {}
        for answer in answers:
            voters.setdefault(answer.text, []).append(answer.score)
        text = max(voters, key=lambda t: (len(voters[t]), sum(voters[t]) / len(voters[t])))
        return Prediction(text, sum(voters[text]) / len(voters[text]))
    tables = [a.probabilities for a in answers]
    if any(t is None for t in tables):
        raise DataError("ensemble='probabilities' needs labels; use votes for generated answers")
    words = list(tables[0] or {})
    mean = torch.tensor([[t[w] for w in words] for t in tables if t]).mean(0)
    return _likeliest(words, mean.log())
