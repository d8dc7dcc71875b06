"""The prompt in front of the text, as in the paper and in PEFT; and a PLM without any prompt.

Decoder-only inputs are padded on the left *of the prompt* and positions follow the attention mask: a batch of many
gives the predictions of a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..cost.shapes import BatchShape
from ..cost.work import PromptPass, Work
from ..data.trimming import TAIL
from ..plm.objective import IGNORED, label_loss, labelled_logits, last_layer_rows, selected_rows
from .prediction import padded_ids
from .prompted import Input, Loss, PromptedPLM, Reader, labelled_tokens


class Front(PromptedPLM):
    """The prompt in front of the (encoder) input."""

    placement: ClassVar[str] = "prefix"

    @property
    def net(self) -> Any:
        """What scores inputs that have the prompt in front of them."""
        return self.plm

    @property
    def calibrated(self) -> nn.Module:
        """The module with its prompt, which all of the text sees."""
        return self.plm if self.module is None else self.module  # type: ignore[no-any-return]

    def loss(self, batch: Mapping[str, Any], num_items: torch.Tensor | int | None = None) -> Loss:
        """As `PromptedPLM.loss`; without a `module` or a prompt the PLM's own loss."""
        inputs = {name: value for name, value in batch.items() if name != TAIL}
        given = inputs if self.module is not None or self.prompt is None else self._behind_prompt(inputs)
        value = label_loss(self.calibrated, given, num_items=num_items)
        shape = batch_shape(inputs, self.prompt_tokens, decoder=not self.plm.config.is_encoder_decoder)
        return Loss(value, Work((PromptPass(shape, self._kind()),)))

    def _behind_prompt(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the bare PLM takes it, its ids embedded behind the prompt `(P, H)`, or one each `(B, P, H)`."""
        ids, mask, prompt = batch["input_ids"].to(self.plm.device), batch.get("attention_mask"), self.prompt
        embeds = self.plm.get_input_embeddings()(ids)
        front = prompt.to(embeds).expand(len(ids), *prompt.shape[-2:])  # type: ignore[union-attr]
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        return {
            "inputs_embeds": torch.cat([front, embeds], dim=1),
            "attention_mask": torch.cat([mask.new_ones(front.shape[:2]), mask], dim=1),
            "labels": batch["labels"],
        }

    def _reader(self, prompt: torch.Tensor | None, inputs: Sequence[Input]) -> tuple[Reader, Work]:
        """As `PromptedPLM._reader`; an encoder runs once for all targets."""
        rows = [i.ids for i in inputs]
        if not self.plm.config.is_encoder_decoder:
            return lambda targets: _behind(self.net, prompt, rows, targets), Work()
        padded = prompted_inputs(self.plm, prompt, rows, left=False)
        encoded = self.plm.get_encoder()(inputs_embeds=padded.embeds, attention_mask=padded.mask)

        def read(targets: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            ids, real = padded_ids(targets)
            labels = ids.masked_fill(real == 0, IGNORED).to(padded.mask.device)
            batch = {"encoder_outputs": encoded, "attention_mask": padded.mask, "labels": labels}
            return labelled_logits(self.plm, batch)

        return read, Work()

    def _label_scores(
        self, prompt: torch.Tensor | None, inputs: Sequence[Input], labels: list[list[int]]
    ) -> tuple[torch.Tensor, Work]:
        """Labels of one token compete for the next one: nothing of a decoder runs behind the input."""
        if self.plm.config.is_encoder_decoder or any(len(ids) > 1 for ids in labels):
            return super()._label_scores(prompt, inputs, labels)
        padded = prompted_inputs(self.plm, prompt, [i.ids for i in inputs], left=False)
        last = padded.mask.sum(1) - 1

        def ends(shape: torch.Size) -> torch.Tensor:
            return torch.arange(shape[0], device=last.device) * shape[1] + last

        with selected_rows(self.plm, ends), last_layer_rows(self.plm, ends):
            logits = self.net(inputs_embeds=padded.embeds, attention_mask=padded.mask, use_cache=False).logits
        return torch.log_softmax(logits.float(), -1)[:, [ids[0] for ids in labels]], Work()

    def generation_inputs(
        self, prompt: torch.Tensor | None, inputs: Sequence[Input], copies: int
    ) -> tuple[dict[str, Any], Work]:
        left = not self.plm.config.is_encoder_decoder
        padded = prompted_inputs(self.plm, prompt, [i.ids for i in inputs], left=left)
        return {"inputs_embeds": padded.embeds, "attention_mask": padded.mask}, Work()

    def _shape(self, inputs: Sequence[Input], target_tokens: int) -> BatchShape:
        return BatchShape(
            batch=len(inputs),
            input_tokens=max(len(i.ids) for i in inputs),
            prompt_tokens=self.prompt_tokens,
            target_tokens=target_tokens,
        )


def batch_shape(batch: Mapping[str, Any], prompt_tokens: int, *, decoder: bool) -> BatchShape:
    """The padded shape of a training batch `(B, T)` behind a prompt of so many tokens, or of none."""
    size, length = batch["input_ids"].shape
    most, mean = labelled_tokens(batch["labels"])
    target = max(most, 1) if decoder else batch["labels"].shape[1]
    return BatchShape(
        batch=size,
        input_tokens=length - target if decoder else length,
        prompt_tokens=prompt_tokens,
        target_tokens=target,
        label_tokens=mean,
    )


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
    ids, real = padded_ids(inputs)
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


def _behind(
    plm: Any, prompt: torch.Tensor | None, inputs: list[Sequence[int]], targets: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`labelled_logits` of a decoder's targets, each behind its input."""
    padded = prompted_inputs(plm, prompt, [[*i, *t] for i, t in zip(inputs, targets, strict=True)], left=False)
    labels = torch.full(padded.mask.shape, IGNORED, device=padded.mask.device)
    for row, (end, ids) in enumerate(zip(padded.mask.sum(1).tolist(), targets, strict=True)):
        labels[row, end - len(ids) : end] = torch.tensor(ids)
    batch = {"inputs_embeds": padded.embeds, "attention_mask": padded.mask, "labels": labels}
    return labelled_logits(plm, batch)
