"""One forward pass as the loop sees it: a loss, and an immutable record of what ran for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cost.flops import BatchShape, CostModel, forward_flops, step_flops, text_flops
from ..plm.objective import IGNORED, label_loss
from ..plm.partial import find_stacks, get_plm
from ..prompt.placement import SuffixPromptModel, suffix_loss
from ..prompt.soft_prompt import prompt_parameter
from ..schedule.stages import Stage
from . import checkpoint


@dataclass(frozen=True)
class Work:
    """The passes that ran for one loss.

    Args:
        shape: the padded batch; with a prompt after the text, without its texts.
        texts: how many texts ran by themselves, and their padded length.
        weights: the backward pass computes the gradients of all weights, too.
    """

    shape: BatchShape
    texts: tuple[int, int] = (0, 0)
    weights: bool = False


class Loss(NamedTuple):
    """The loss `()` of a batch, and what ran for it."""

    value: torch.Tensor
    work: Work


def work_flops(cost: CostModel, work: Work, stage: Stage | None, *, backward: bool = True) -> float:
    """FLOPs of `work` at the size of `stage` (None: the full model)."""
    if work.weights:  # weight gradients cost one more pass
        return (3 if backward else 1) * forward_flops(cost, None, work.shape)
    # The batch has been cut by now: neither `batch` nor `length` of the stage is to cut it once more.
    size = stage and replace(stage, batch=None, length=None)
    texts = text_flops(cost, size, *work.texts, kept_cross=work.shape.kept_cross) if work.texts[0] else 0.0
    return step_flops(cost, size, work.shape, backward=backward) + texts


class Prompted:
    """A PLM with what is trained of it: a soft prompt in front of the text or after it, or all of its weights.

    Args:
        module: a PEFT model with a soft prompt, a `SuffixPromptModel`, or a bare PLM to be trained as a whole.
        cost: of the PLM.
    """

    def __init__(self, module: nn.Module, cost: CostModel):
        self.module, self.cost = module, cost
        self.plm = get_plm(module)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.whole = module is self.plm
        """Whether all weights are trained, so that there is no soft prompt."""

    @property
    def parameter(self) -> nn.Parameter:
        """The soft prompt `(P, H)`."""
        return prompt_parameter(self.module)

    def loss(self, batch: Mapping[str, torch.Tensor], num_items: int | None = None) -> Loss:
        """The loss of a batch, divided by `num_items` labels; by default by its own."""
        if isinstance(self.module, SuffixPromptModel):
            value = suffix_loss(self.module, batch, num_items=num_items)
            return Loss(value, Work(self._suffix_shape(batch), self.module.text_ran))
        value = label_loss(self.module, batch, num_items=num_items)
        tokens = 0 if self.whole else len(self.parameter)
        return Loss(value, Work(batch_shape(batch, tokens, self.cost), weights=self.whole))

    def _suffix_shape(self, batch: Any) -> BatchShape:
        model: Any = self.module
        shape = batch_shape(batch, len(self.parameter), self.cost)
        # What stands between prompt and target costs what the prompt does.
        between = model.after_tokens - shape.target_tokens if model.placement == "infix" else 0
        return replace(
            shape,
            placement="suffix",
            input_tokens=model.text_tokens,
            prompt_tokens=shape.prompt_tokens + between,
            text_examples=0,
            kept_cross=model.cache is not None and model.cache.cross_attention,
        )

    def save(self, folder: Path) -> None:
        """Write what is trained: a prompt as PEFT's adapter, or a whole model."""
        checkpoint.save_trained(folder, self.module)


def batch_shape(batch: Any, prompt_tokens: int, cost: CostModel) -> BatchShape:
    """The padded shape of a training batch, as `flops.py` counts it."""
    size, length = batch["input_ids"].shape
    labelled = (batch["labels"] != IGNORED).sum(1)
    if "encoder" in cost.stacks and "decoder" in cost.stacks:
        target, text = batch["labels"].shape[1], length
    else:
        target = max(int(labelled.max()), 1)
        text = length - target
    return BatchShape(
        batch=size,
        input_tokens=text,
        prompt_tokens=prompt_tokens,
        target_tokens=target,
        label_tokens=float(labelled.sum()) / size,
    )


class CompiledLayers:
    """The layers of a PLM as `torch.compile` makes them, each by itself.

    The layers of a stage are alike, so that a stage compiles once, and dropping layers alone compiles nothing.
    """

    def __init__(self, plm: Any):
        self._compiled: dict[Any, Any] = {
            layer: torch.compile(layer._call_impl, dynamic=True)
            for stack in find_stacks(plm).values()
            for layer in stack.layers
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """As `nn.Module.compile` does, but for a training step alone: evaluation and scoring would compile others."""
        try:
            for layer, compiled in self._compiled.items():
                layer._compiled_call_impl = compiled
            yield
        finally:
            for layer in self._compiled:
                layer.__dict__.pop("_compiled_call_impl", None)
