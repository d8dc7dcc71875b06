"""Predictions, and what makes them: batches by length, evaluation mode, the likeliest label, several prompts' votes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..cost.units import human_seconds
from ..errors import DataError

logger = logging.getLogger(__name__)
progress = logging.getLogger("fast_prompt_tuning.progress")
"""Says how far long work is, at level INFO, which `fpt` shows."""

PROGRESS_SECONDS = 15.0
"""Between two such lines at least."""


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


def by_length(inputs: Sequence[Sequence[int]]) -> list[int]:
    """Order that brings inputs of like length together, longest first (so that memory runs out at once or never)."""
    return sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))


def batches_by_length(inputs: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of at most `size` inputs at a time, in the order of `by_length`; long work is heard of on the way."""
    order = by_length(inputs)
    begun = heard = time.monotonic()
    tokens, seen = sum(map(len, inputs)), 0
    for start in range(0, len(order), size):
        yield (picked := order[start : start + size])
        seen += sum(len(inputs[i]) for i in picked)
        now, done = time.monotonic(), start + len(picked)
        if now - heard >= PROGRESS_SECONDS and done < len(order):
            left = human_seconds((now - begun) / max(seen, 1) * (tokens - seen))
            progress.info("%d of %d inputs done, %s left", done, len(order), left)
            heard = now


def padded_ids(rows: Sequence[Sequence[int]], least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as one batch `(B, T)`, T at least `least`, padded with 0 on the right; and 1 where a token is real."""
    ids = torch.zeros(len(rows), max(least, *map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        real[i, : len(row)] = 1
    return ids, real


def prompts_of(prompt: torch.Tensor | None, picked: Sequence[int]) -> torch.Tensor | None:
    """The prompts of some inputs: of K prompts `(K, P, H)`, input i has prompt i mod K; one prompt is everyone's."""
    return prompt if prompt is None or prompt.dim() == 2 else prompt[[i % len(prompt) for i in picked]]


def likeliest(words: Sequence[str], scores: torch.Tensor) -> Prediction:
    """The label with the highest of the scores `(number of labels,)`."""
    table = dict(zip(words, scores.tolist(), strict=True))
    if scores.isnan().any():
        return Prediction("", math.nan, table)
    best = int(scores.argmax())
    return Prediction(words[best], float(scores[best]), table)


def log_probability(logits: torch.Tensor, targets: torch.Tensor, sequence: torch.Tensor, size: int) -> torch.Tensor:
    """Summed log-probability of each sequence's targets: `(size,)`."""
    each = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]
    return torch.zeros(size, device=each.device).index_add_(0, sequence, each)


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
    return likeliest(words, mean.log())
