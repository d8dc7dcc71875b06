"""A PLM with an adapter of PEFT's in place of a soft prompt, to compare prompt tuning with: LoRA, or a prefix.

Sizes: B batch, P virtual tokens, L layers, H `d_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
)
from transformers.pytorch_utils import Conv1D

from ..cost.shapes import BatchShape, CostModel
from ..cost.work import Work
from ..errors import ConfigError
from ..plm.modes import inference
from .front import Front
from .prompted import Input, Loss

LORA_RANK = 8
"""PEFT's default; Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", take 1 to 8."""


def _lora(plm: Any, tokens: int) -> PeftConfig:
    return LoraConfig(
        task_type="SEQ_2_SEQ_LM" if plm.config.is_encoder_decoder else "CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in plm.modules()),  # GPT-2's linear layers
    )


def _prefix(plm: Any, tokens: int) -> PeftConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


ADAPTERS: dict[str, Callable[[Any, int], PeftConfig]] = {"lora": _lora, "prefix": _prefix}
"""Adapter → its PEFT config for a PLM and a number of virtual tokens.

`lora` adapts every linear layer but the LM head; `prefix` learns P keys and values in every layer (Li and Liang 2021,
"Prefix-Tuning: Optimizing Continuous Prompts for Generation").
"""


@dataclass
class Adapted(Front):
    """A PLM with an adapter, of which alone the weights are trained. `module` is a PEFT model, `prompt` is None.

    Args:
        kind: of `ADAPTERS`.
        cost: of the PLM without the adapter.
    """

    kind: str = field(kw_only=True)
    cost: CostModel = field(kw_only=True)

    @property
    def whole(self) -> bool:
        """The weights of the PLM stay as they are."""
        return False

    @property
    def net(self) -> Any:
        """The PEFT model, which puts the prefix there itself."""
        return self.module

    def loss(self, batch: Mapping[str, Any], num_items: torch.Tensor | int | None = None) -> Loss:
        """As `PromptedPLM.loss`; the adapter's own products are in the work."""
        loss = super().loss(batch, num_items)
        (ran,) = loss.work.prompts
        trains = torch.is_grad_enabled()
        work = Work((replace(ran, kind="step" if trains else "forward"),), added=self._added(ran.shape, trains))
        return Loss(loss.value, work)

    def _added(self, shape: BatchShape, trains: bool) -> float:
        """FLOPs of the adapter's products in a pass, and in its backward pass.

        LoRA's matrices are multiplied once forward and twice backward, for the gradients of their inputs and of
        themselves. In an encoder-decoder they are counted at the tokens of both stacks, which is too many. Of a prefix
        the queries meet P keys and values, which have gradients too.
        """
        tokens = shape.batch * (shape.source_tokens + shape.target_tokens)
        if self.kind == "lora":
            return 2 * tokens * sum(p.numel() for p in self.trained) * (3 if trains else 1)
        length = self.module.active_peft_config.num_virtual_tokens
        products = sum(stack.layers * length * stack.attention_width for stack in self.cost.stacks.values())
        return 2 * tokens * products * (6 if trains else 2)

    def generation_inputs(
        self, prompt: torch.Tensor | None, inputs: Sequence[Input], copies: int
    ) -> tuple[dict[str, Any], Work]:
        """As `PromptedPLM.generation_inputs`: a prefix is a cache that has been read already."""
        given, work = super().generation_inputs(prompt, inputs, copies)
        if self.kind != "prefix":
            return given, work
        past = self.module.get_prompt(batch_size=len(inputs))
        past.batch_repeat_interleave(copies)
        embeds, mask = given["inputs_embeds"], given["attention_mask"]
        placeholders = embeds.new_zeros(len(inputs), past.get_seq_length(), embeds.shape[-1])
        return {
            "inputs_embeds": torch.cat([placeholders, embeds], dim=1),
            "attention_mask": torch.cat([mask.new_ones(placeholders.shape[:2]), mask], dim=1),
            "past_key_values": past,
        }, work


def check_adapter(kind: str, *, decoder: bool) -> None:
    """Raise unless a PLM can have an adapter.

    Raises:
        ConfigError: there is none of this name, or a prefix in an encoder-decoder.
    """
    if kind not in ADAPTERS:
        raise ConfigError(f"--with {kind!r} is unknown; choose from {', '.join(ADAPTERS)}")
    if kind == "prefix" and not decoder:
        raise ConfigError("--with prefix is for decoder-only models, and this one is an encoder-decoder; take lora")


def adapt(plm: Any, kind: str, start: torch.Tensor, cost: CostModel) -> Adapted:
    """A PLM with a new adapter that is trained; the PLM is changed in place by LoRA, until `module.unload()`.

    Args:
        start: a soft prompt `(P, H)`; a prefix starts as the keys and values that the PLM makes of it.

    Raises:
        ConfigError: as `check_adapter`.
    """
    check_adapter(kind, decoder=not plm.config.is_encoder_decoder)
    model = get_peft_model(plm, ADAPTERS[kind](plm, len(start)))
    if kind == "prefix":
        with inference(plm):
            read = plm(inputs_embeds=start[None].to(plm.device, plm.dtype), use_cache=True)
        initialize_kv_prefix_from_past_key_values(model, past_key_values=read.past_key_values)
    return Adapted(plm, None, module=model, kind=kind, cost=cost)
