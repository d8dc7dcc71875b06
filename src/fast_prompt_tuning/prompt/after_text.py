"""The prompt after the text, or between the text and what the template asks about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ..cost.shapes import BatchShape
from ..cost.work import PromptPass, TextPass, Work
from ..plm.objective import IGNORED, loss_of
from .passes import generation_inputs, split_batch, split_texts, suffix_logits
from .prompted import Input, Loss, PromptedPLM, Reader, labelled_tokens
from .text_states import TextStates, check_text_apart, cut_of_texts, text_states


class AfterText(PromptedPLM):
    """The prompt after the text; of an encoder-decoder, in front of the decoder's input."""

    placement: ClassVar[str] = "suffix"

    @classmethod
    def check(cls, plm: Any) -> None:
        """As `PromptedPLM.check`, and `text_states.check_text_apart`."""
        super().check(plm)
        check_text_apart(plm)

    def loss(self, batch: Mapping[str, Any], num_items: torch.Tensor | int | None = None) -> Loss:
        """As `PromptedPLM.loss`."""
        parts = split_batch(self.plm, batch, tails=self.spec().needs_tail)
        if torch.is_grad_enabled() and self.cache is not None:
            self.cache.enter_stage(cut_of_texts(self.plm, self.cache))
        text = text_states(self.plm, parts.texts, self.cache)
        logits, targets, _ = suffix_logits(self.plm, self.prompt, text, parts.targets, parts.labels)
        loss = loss_of(logits, targets, num_items)
        most, mean = labelled_tokens(parts.labels)
        width = parts.labels.shape[1]
        target = width if self.plm.config.is_encoder_decoder else max(most, 1)
        shape = self._apart_shape(len(parts.texts), text.mask.shape[1], width - target, target)
        work = self._texts(text) + Work((PromptPass(replace(shape, label_tokens=mean), self._kind()),))
        return Loss(loss, work)

    def _reader(self, prompt: torch.Tensor | None, inputs: Sequence[Input]) -> tuple[Reader, Work]:
        """As `PromptedPLM._reader`: the text is run once for all targets, or not at all if its states are kept."""
        firsts, ends = self._split(inputs)
        text = text_states(self.plm, firsts, self.cache)

        def read(targets: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            width = max(len(end) + len(ids) for end, ids in zip(ends, targets, strict=True))
            rows = torch.zeros(len(inputs), width, dtype=torch.long)
            labels = torch.full_like(rows, IGNORED)
            for i, (end, ids) in enumerate(zip(ends, targets, strict=True)):
                rows[i, : len(end) + len(ids)] = torch.tensor([*end, *ids])
                labels[i, len(end) : len(end) + len(ids)] = torch.tensor(ids)
            return suffix_logits(self.plm, prompt, text, rows, labels)

        return read, self._texts(text)

    def generation_inputs(
        self, prompt: torch.Tensor | None, inputs: Sequence[Input], copies: int
    ) -> tuple[dict[str, Any], Work]:
        firsts, ends = self._split(inputs)
        text = text_states(self.plm, firsts, self.cache)
        return generation_inputs(self.plm, prompt, text, ends, copies), self._texts(text)

    def _shape(self, inputs: Sequence[Input], target_tokens: int) -> BatchShape:
        firsts, ends = self._split(inputs)
        return self._apart_shape(len(inputs), max(map(len, firsts)), max(map(len, ends)), target_tokens)

    def _apart_shape(self, rows: int, text: int, between: int, target: int) -> BatchShape:
        """Of rows whose texts have so many tokens in front of the prompt; texts are counted by themselves."""
        whole = BatchShape(
            batch=rows, input_tokens=text + between, prompt_tokens=self.prompt_tokens, target_tokens=target
        )
        return whole.apart(tail=between, kept_cross=self._kept_cross)

    @property
    def _kept_cross(self) -> bool:
        return self.cache is not None and self.cache.cross_attention

    def _texts(self, text: TextStates) -> Work:
        return Work(texts=(TextPass(*text.ran, self._kept_cross),)) if text.ran[0] else Work()

    def _split(self, inputs: Sequence[Input]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """What of each text stands before the prompt, and what after it."""
        return split_texts([i.ids for i in inputs], [i.tail for i in inputs] if self.spec().needs_tail else None)


class WithinText(AfterText):
    """The prompt between a text and what the template asks about it, of a decoder-only model."""

    placement: ClassVar[str] = "infix"
