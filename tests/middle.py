"""A placement of one's own: the prompt in the middle of a text, by the half of its tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fast_prompt_tuning.cost.shapes import BatchShape
from fast_prompt_tuning.cost.work import PromptPass, Work
from fast_prompt_tuning.plm.objective import IGNORED, labelled_logits
from fast_prompt_tuning.prompt.passes import split_batch
from fast_prompt_tuning.prompt.prediction import padded_ids
from fast_prompt_tuning.prompt.prompted import Loss, PromptedPLM


class Middle(PromptedPLM):
    placement: ClassVar[str] = "middle"

    def loss(self, batch, num_items=None):
        parts = split_batch(self.plm, batch)
        logits, targets, _ = self._logits(self.prompt, parts.texts, parts.targets, parts.labels)
        total = F.cross_entropy(logits, targets, reduction="sum")
        work = Work((PromptPass(self._sized(parts.texts, parts.targets.shape[1]), self._kind()),))
        return Loss(total / (targets.numel() if num_items is None else num_items), work)

    def _reader(self, prompt, inputs):
        texts = [i.ids for i in inputs]

        def read(targets):
            ids, real = padded_ids(targets)
            return self._logits(prompt, texts, ids, ids.masked_fill(real == 0, IGNORED))

        return read, Work()

    def generation_inputs(self, prompt, inputs, copies):
        rows = self._embedded(prompt, [i.ids for i in inputs])
        return self._padded(rows, "left"), Work()

    def _shape(self, inputs, target_tokens):
        return self._sized([i.ids for i in inputs], target_tokens)

    def _sized(self, texts, target_tokens):
        longest = max(map(len, texts))
        return BatchShape(
            batch=len(texts), input_tokens=longest, prompt_tokens=self.prompt_tokens, target_tokens=target_tokens
        )

    def _embedded(self, prompt, texts, targets=None):
        embed, ends = self.plm.get_input_embeddings(), [()] * len(texts) if targets is None else targets.tolist()
        for text, end, own in zip(texts, ends, prompt.expand(len(texts), *prompt.shape[-2:]), strict=True):
            vectors = embed(torch.tensor([*text, *end], device=self.plm.device))
            half = len(text) // 2
            yield torch.cat([vectors[:half], own.to(vectors), vectors[half:]])

    def _padded(self, rows, side):
        rows = list(rows)
        mask = [row.new_ones(len(row), dtype=torch.long) for row in rows]
        embeds, mask = (pad_sequence(each, batch_first=True, padding_side=side) for each in (rows, mask))
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _logits(self, prompt, texts, targets, labels):
        batch = self._padded(self._embedded(prompt, texts, targets), "right")
        marks = torch.full(batch["attention_mask"].shape, IGNORED)
        for row, text, marked in zip(marks, texts, labels, strict=True):
            start = len(text) + self.prompt_tokens
            row[start : start + len(marked)] = marked
        return labelled_logits(self.plm, {**batch, "labels": marks})
