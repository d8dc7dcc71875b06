"""The prompted PLM: one door to a PLM with a soft prompt, wherever the prompt stands.

Each placement of the prompt is a class, named in `placements.PLACEMENTS`. Losses, scores and answers go through it and
return the work that was done, which `cost.flops.work_flops` prices.
Sizes: B batch, T text tokens, P prompt length, D target tokens, H `d_model`.
"""

from __future__ import annotations

import logging
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from ..cost.shapes import BatchShape
from ..cost.work import Kind, PromptPass, Work
from ..errors import DataError
from ..placements import Placement, placement_of
from ..plm.modes import inference
from ..plm.objective import IGNORED
from .generation import GenerationOptions, answers
from .prediction import Prediction, batches_by_length, likeliest, log_probability, prompts_of
from .soft_prompt import prompt_parameter
from .text_cache import TextCache

logger = logging.getLogger(__name__)


class Input(NamedTuple):
    """Token ids of one input, unpadded, and how many at its end are what the template asks about the text."""

    ids: Sequence[int]
    tail: int = 0


Reader = Callable[[list[list[int]]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Targets, one for each input → logits `(N, V)` at their tokens, the tokens `(N,)`, and the input of each `(N,)`."""


class Likelihood(NamedTuple):
    """Log-probability of a target, summed over its tokens, and whether each of them is the likeliest."""

    value: float
    greedy: bool


class Loss(NamedTuple):
    """Cross-entropy at the labelled positions, and the passes that it took."""

    value: torch.Tensor
    work: Work


@dataclass
class PromptedPLM(ABC):
    """A PLM and a soft prompt in one place.

    Args:
        plm: the bare PLM, encoder-decoder or decoder-only.
        prompt: soft prompt `(P, H)`, None for none, or several `(K, P, H)`: of K prompts, input i has prompt i mod K.
        cache: where the states of texts are kept between passes, of a placement that keeps any.
        module: what is trained and saved, if there is one: a PEFT model, a `SuffixPromptModel`, or a bare PLM of which
            all weights are trained.
    """

    plm: Any
    prompt: torch.Tensor | None
    cache: TextCache | None = None
    module: Any = None

    placement: ClassVar[str]

    @property
    def parameter(self) -> nn.Parameter:
        """The soft prompt that is trained."""
        return prompt_parameter(self.module)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The soft prompt, or all weights."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def whole(self) -> bool:
        """Whether there is no soft prompt: all weights are trained."""
        return self.prompt is None

    @property
    def form(self) -> tuple[str, int, int]:
        """Where the soft prompt stands, and its P and H: `soft_prompt.form_of` of the folder it is saved in."""
        return self.placement, self.parameter.shape[0], self.parameter.shape[1]

    @property
    def calibrated(self) -> nn.Module:
        """The module that neurons and layers are scored on: its forward takes a batch, with or without labels."""
        return self.plm  # type: ignore[no-any-return]

    @classmethod
    def spec(cls) -> Placement:
        """What is known of this placement without a model."""
        return placement_of(cls.placement)

    @classmethod
    def check(cls, plm: Any) -> None:
        """Raise unless a prompt can stand here in this PLM: a subclass of `FptError` that says why."""
        cls.spec().positions(decoder=not plm.config.is_encoder_decoder)

    @abstractmethod
    def loss(self, batch: Mapping[str, Any], num_items: torch.Tensor | int | None = None) -> Loss:
        """Cross-entropy of a batch, as the model's own loss would be.

        Args:
            batch: `input_ids (B, T)`, `attention_mask`, `labels`, and `n_tail (B,)` where the placement needs it.
            num_items: divisor of the summed loss; default the labelled positions of this batch (their mean).

        Raises:
            ModelError: no labels, or what the placement needs is missing.
        """

    @abstractmethod
    def _reader(self, prompt: torch.Tensor | None, inputs: Sequence[Input]) -> tuple[Reader, Work]:
        """What reads targets behind the inputs, as often as wanted; and the work of texts alone."""

    def _label_scores(
        self, prompt: torch.Tensor | None, inputs: Sequence[Input], labels: list[list[int]]
    ) -> tuple[torch.Tensor, Work]:
        """Summed log-probabilities `(B, number of labels)`, and the work of texts alone."""
        read, work = self._reader(prompt, inputs)
        several = [[ids] * len(inputs) for ids in labels]
        if not self.plm.config.is_encoder_decoder and all(len(ids) == 1 for ids in labels):
            # One pass serves all labels: they compete for the same next token.
            logits = read(several[0])[0]
            return torch.log_softmax(logits.float(), -1)[:, [ids[0] for ids in labels]], work
        return torch.stack([log_probability(*read(targets), len(inputs)) for targets in several], 1), work

    @abstractmethod
    def generation_inputs(
        self, prompt: torch.Tensor | None, inputs: Sequence[Input], copies: int
    ) -> tuple[dict[str, Any], Work]:
        """What `plm.generate` takes to answer the inputs, and the work of texts alone."""

    @abstractmethod
    def _shape(self, inputs: Sequence[Input], target_tokens: int) -> BatchShape:
        """The padded shape of a batch of inputs with targets of so many tokens."""

    def score(
        self,
        inputs: Sequence[Input],
        labels: Mapping[str, Sequence[int]],
        *,
        batch_size: int = 16,
        length_normalize: bool = False,
    ) -> tuple[list[Prediction], Work]:
        """Rank classification: the label whose tokens the model finds most probable, exactly and without generating.

        Args:
            labels: label word -> its target token ids, as in training (`data.encoding.label_ids`).
            length_normalize: divide each label's log-probability by its number of tokens.

        Raises:
            DataError: no labels, or a label without tokens.
        """
        if not labels or any(len(ids) == 0 for ids in labels.values()):
            raise DataError(f"labels={dict(labels)!r} must name at least one label, each with at least one token")
        words, ids_of = list(labels), [list(ids) for ids in labels.values()]
        lengths = torch.tensor([len(ids) for ids in ids_of], dtype=torch.float32)
        # One pass serves all labels of one token: they compete for the same next token.
        passes = 1 if int(lengths.max()) == 1 and not self.plm.config.is_encoder_decoder else len(words)
        predictions: dict[int, Prediction] = {}
        work = Work()
        with inference(self.plm):
            for picked in batches_by_length([i.ids for i in inputs], batch_size):
                rows = [inputs[i] for i in picked]
                table, texts = self._label_scores(prompts_of(self.prompt, picked), rows, ids_of)
                work += texts + Work((PromptPass(self._shape(rows, int(lengths.max())), times=passes),))
                table = table.float().cpu()
                if length_normalize:
                    table = table / lengths
                for i, row in zip(picked, table, strict=True):
                    predictions[i] = likeliest(words, row)
        lost = sum(prediction.text == "" for prediction in predictions.values())
        if lost:
            logger.warning("%d of %d inputs have no answer: the model's output is not a number", lost, len(inputs))
        return [predictions[i] for i in range(len(inputs))], work

    def likelihoods(
        self, inputs: Sequence[Input], targets: Sequence[Sequence[int]], *, batch_size: int = 16
    ) -> list[Likelihood]:
        """How probable each input's own target is, and whether greedy generation would begin with it.

        Args:
            targets: token ids, at least one for each input.
        """
        found: dict[int, Likelihood] = {}
        with inference(self.plm):
            for picked in batches_by_length([[*i.ids, *t] for i, t in zip(inputs, targets, strict=True)], batch_size):
                read, _ = self._reader(prompts_of(self.prompt, picked), [inputs[i] for i in picked])
                logits, wanted, sequence = read([list(targets[i]) for i in picked])
                sums = log_probability(logits, wanted, sequence, len(picked)).tolist()
                missed = set(sequence[logits.argmax(-1) != wanted].tolist())
                found.update({i: Likelihood(sums[n], n not in missed) for n, i in enumerate(picked)})
        return [found[i] for i in range(len(inputs))]

    def generate(
        self, inputs: Sequence[Input], tokenizer: Any, options: GenerationOptions
    ) -> tuple[list[Prediction], Work]:
        """Greedy or beam-search answers, in the order of `inputs`.

        Returns:
            Texts without special tokens, stripped, each with its mean log-probability per generated token.
        """
        predictions: dict[int, Prediction] = {}
        work = Work()
        with inference(self.plm):
            for picked in batches_by_length([i.ids for i in inputs], options.batch_size):
                rows = [inputs[i] for i in picked]
                model_inputs, texts = self.generation_inputs(prompts_of(self.prompt, picked), rows, options.num_beams)
                shape = self._shape(rows, options.max_new_tokens)
                work += texts + Work((PromptPass(shape, "generation", options.num_beams),))
                predictions.update(zip(picked, answers(self.plm, tokenizer, model_inputs, options), strict=True))
        return [predictions[i] for i in range(len(inputs))], work

    def save(self, folder: str | Path) -> None:
        """Save what is trained."""
        # Of weights in parts, PEFT would gather the whole state from every process, to save the prompt alone.
        alone: dict[str, Any] = {"state_dict": {}} if isinstance(self.module, PeftModel) else {}
        self.module.save_pretrained(str(folder), **alone)

    @property
    def prompt_tokens(self) -> int:
        """Prompt length P; 0 without a prompt."""
        return 0 if self.prompt is None else self.prompt.shape[-2]

    def _kind(self) -> Kind:
        """The kind of pass a loss is, from whether a backward pass can follow it."""
        if not torch.is_grad_enabled():
            return "forward"
        return "full_step" if self.prompt is None else "step"


def placement_named(name: str) -> type[PromptedPLM]:
    """The class of a placement.

    Raises:
        ConfigError: there is none of this name.
    """
    return pkgutil.resolve_name(placement_of(name).code)  # type: ignore[no-any-return]


def labelled_tokens(labels: torch.Tensor) -> tuple[int, float]:
    """Of labels `(B, T)` the most in a row, and their mean over the rows."""
    counts = (labels != IGNORED).sum(1)
    return int(counts.max()), float(counts.sum()) / len(counts)
