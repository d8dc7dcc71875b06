"""What really ran: the record that losses, scores and answers return, and that `flops.work_flops` alone prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .shapes import BatchShape

Kind = Literal["forward", "step", "full_step", "generation"]
"""A forward pass; with the backward pass of prompt tuning; with that of all weights; an answer token by token."""


@dataclass(frozen=True)
class TextPass:
    """A forward pass over texts alone, whose states are kept for what follows.

    Args:
        examples, tokens: how many texts, and their padded length.
        kept_cross: an encoder-decoder's decoder has run over one token, for its cross-attention's keys and values.
    """

    examples: int
    tokens: int
    kept_cross: bool = False


@dataclass(frozen=True)
class PromptPass:
    """A pass of prompt and target, and of the text unless `shape.text_apart`; `times` passes of this shape."""

    shape: BatchShape
    kind: Kind = "forward"
    times: int = 1


@dataclass(frozen=True)
class Work:
    """Passes that ran, in no order; two records add up.

    Args:
        added: FLOPs of what an adapter has put into the PLM.
    """

    prompts: tuple[PromptPass, ...] = ()
    texts: tuple[TextPass, ...] = ()
    added: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.prompts + other.prompts, self.texts + other.texts, self.added + other.added)
