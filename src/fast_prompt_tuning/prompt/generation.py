"""Greedy and beam-search answers of a PLM that has its inputs: how they end, and how sure they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .prediction import Prediction


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are generated.

    Args:
        num_beams: 1 is greedy.
        stop_at_newline: keep the first line only, for decoders whose targets are one line; greedy rows end with it.
    """

    max_new_tokens: int
    num_beams: int = 1
    batch_size: int = 16
    stop_at_newline: bool = False


def answers(plm: Any, tokenizer: Any, inputs: dict[str, Any], options: GenerationOptions) -> list[Prediction]:
    """The answers of one batch.

    Args:
        plm: the bare PLM. BERT-like models do not generate from embeddings and are refused by `transformers`.
        given: the inputs that `plm.generate` takes.
    """
    beams, one_line = options.num_beams, options.stop_at_newline
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    probabilities, line = _TokenProbabilities(), [_LineEnd(tokenizer, plm.device)] if one_line and beams == 1 else []
    # A checkpoint's own sampling options would contradict our arguments, with a warning.
    full = plm.generation_config
    bare = type(full)(decoder_start_token_id=full.decoder_start_token_id, bos_token_id=full.bos_token_id)
    with generation_config(plm, bare):
        out = plm.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_scores=beams > 1,
            logits_processor=LogitsProcessorList([probabilities] if beams == 1 else []),
            stopping_criteria=StoppingCriteriaList(line),
        )
    if beams == 1:
        new = out.sequences[:, probabilities.start :]
        steps = torch.stack(probabilities.steps[: new.shape[1]], 1)  # on some devices `generate` looks a step ahead
    else:
        steps = plm.compute_transition_scores(out.sequences, out.scores, out.beam_indices).float()
        new = out.sequences[:, -steps.shape[1] :]
    real = (new != pad) & torch.isfinite(steps)
    means = (steps.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)).tolist()
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    if one_line:
        texts = [text.split("\n")[0].strip() for text in texts]
    return [Prediction(text, mean) for text, mean in zip(texts, means, strict=True)]


class _TokenProbabilities(LogitsProcessor):
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
def generation_config(plm: Any, config: GenerationConfig) -> Iterator[None]:
    """Generate by `config` in place of the PLM's own."""
    before, plm.generation_config = plm.generation_config, config
    try:
        yield
    finally:
        plm.generation_config = before
