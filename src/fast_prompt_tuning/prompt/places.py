"""The prompted PLM of a prompt's values, of a new prompt, or of a model."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model

from ..plm.stacks import get_plm
from .front import Front
from .prompted import PromptedPLM, placement_named
from .soft_prompt import prompt_length, prompt_parameter, soft_prompt_config
from .suffix_model import SuffixPromptModel
from .text_cache import TextCache


def place(
    plm: Any, prompt: torch.Tensor | None, placement: str = "prefix", cache: TextCache | None = None
) -> PromptedPLM:
    """A PLM with a prompt's values, to score and answer with.

    Args:
        prompt: `(P, H)`, None for zero-shot wherever a prompt would stand, or several `(K, P, H)`.

    Raises:
        ConfigError: an unknown placement. ModelError, UnknownFamilyError: no prompt can stand there in this PLM.
    """
    kind = placement_named(placement) if prompt is not None else Front
    kind.check(plm)
    return kind(plm, prompt, cache if kind.spec().keeps_texts else None)


def tune(
    plm: Any, num_virtual_tokens: int = 20, placement: str = "prefix", cache: TextCache | None = None
) -> PromptedPLM:
    """A PLM with a new prompt that is trained: `parameter` of `module`, a stock PEFT model where it is in front.

    Raises:
        ConfigError: a prompt length the model has no room for; and as `place`.
    """
    if (kind := placement_named(placement)) is Front:
        plm.requires_grad_(False)
        model: Any = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=num_virtual_tokens))
    else:
        model = SuffixPromptModel(plm, num_virtual_tokens, placement=placement, cache=cache)
    return kind(plm, prompt_parameter(model), cache if kind.spec().keeps_texts else None, model)


def prompted_of(model: Any) -> PromptedPLM:
    """The prompted PLM of a model as users make them: a `SuffixPromptModel`, a PEFT model, or a bare PLM."""
    if isinstance(model, SuffixPromptModel):
        return model.prompted
    prompt = prompt_parameter(model) if prompt_length(model) else None
    return Front(get_plm(model), prompt, module=model)
