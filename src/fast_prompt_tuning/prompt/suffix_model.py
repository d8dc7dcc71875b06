"""A PLM with a soft prompt after or within its text, as a module that any Trainer trains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from ..data.trimming import TAIL
from ..errors import ConfigError, ModelError
from ..placements import PLACEMENTS
from ..plm import fingerprint
from .generation import generation_config
from .passes import counts
from .prompted import Input, PromptedPLM, placement_named
from .soft_prompt import (
    check_prompt_tokens,
    init_soft_prompt,
    load_prompt,
    prompt_folder,
    save_suffix_prompt,
    suffix_record,
)
from .text_cache import TextCache

logger = logging.getLogger(__name__)

AFTER = "n_after"
"""What a prompt within the text is told of each row `(B,)`: the tokens at the text's end that stand after it."""


_OF_THE_PLM = (
    *("can_generate", "config", "device", "dtype", "generation_config"),
    *("input_modalities", "main_input_name", "output_modalities"),
)
"""What Trainers and pipelines ask of a model and the PLM answers."""


class SuffixPromptModel(nn.Module):
    """A frozen PLM with a soft prompt after the text: trains in a stock `transformers.Trainer`, generates, saves.

    Only the prompt is trained, and only it stands in the state dict.

    Args:
        plm: a bare `transformers` model, decoder-only or encoder-decoder; its weights are frozen here.
        num_virtual_tokens: prompt length P.
        placement: any but `prefix`: `suffix`, after the text; `infix`, before the last tokens of a decoder-only model's
            text, whose number comes with each row (`n_after`); or one of your own.
        cache: where the texts' states are kept between steps; None computes them at every step, forward only.
        init: how the prompt starts, see `init_soft_prompt`; `vocab` needs nothing else.
        seed: of the initialisation.

    Raises:
        ConfigError: a prompt length the model has no room for.
        UnknownFamilyError, ModelError: as `AfterText.check`; the cache is another model's.
    """

    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(
        self,
        plm: Any,
        num_virtual_tokens: int = 20,
        *,
        placement: str = "suffix",
        cache: TextCache | None = None,
        init: str = "vocab",
        seed: int = 0,
    ):
        super().__init__()
        others = [name for name in PLACEMENTS if name != "prefix"]
        if placement not in others:
            raise ConfigError(f"placement={placement!r} is unknown here; choose {' or '.join(others)}")
        placement_named(placement).check(plm)
        check_prompt_tokens(plm, num_virtual_tokens)
        if cache is not None:
            cache.check_model(plm)
        self.plm = plm.requires_grad_(False)
        self.placement, self.cache = placement, cache
        width = plm.get_input_embeddings().weight.shape[-1]
        self.soft_prompt = nn.Parameter(torch.zeros(num_virtual_tokens, width, device=plm.device))
        init_soft_prompt(self, init, seed=seed)
        self.register_state_dict_post_hook(_prompt_only)
        self.register_load_state_dict_post_hook(_plm_is_not_missing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plm, name) if name in _OF_THE_PLM else super().__getattr__(name)

    @property
    def prompted(self) -> PromptedPLM:
        """The prompted PLM that does the computing."""
        return placement_named(self.placement)(self.plm, self.soft_prompt, self.cache, self)

    def get_base_model(self) -> Any:
        """The PLM, as of a PEFT model."""
        return self.plm

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        n_after: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> CausalLMOutput:
        """The loss of a batch as the PLM's own forward takes it: `input_ids (B, T)`, text and target together for a
        decoder-only model. Logits exist at labelled positions only and are not returned.

        Args:
            n_after: with `infix`, tokens at the end of each text that stand after the prompt `(B,)`. A text's first
                token always stands before it.

        Raises:
            ModelError: no labels; `n_after` missing with `infix`, given without it, or no whole numbers.
        """
        self._check_after(n_after)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, TAIL: n_after}
        return CausalLMOutput(loss=self.prompted.loss(batch, num_items_in_batch).value)  # type: ignore[arg-type]

    def _check_after(self, n_after: Any) -> None:
        if (n_after is not None) != self.prompted.spec().needs_tail:
            problem = "is missing" if n_after is None else "is given"
            raise ModelError(
                f"{AFTER} {problem} with placement={self.placement!r}: only an infix prompt is told how many tokens at "
                "the end of each text stand after it"
            )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as by `check_text_apart`."""
        raise ModelError(
            "a prompt after the text cannot be trained with gradient checkpointing, which drops the text's states; "
            "leave it out: the text keeps no activations here anyway"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the prompt, and where it stands; `load_soft_prompt(plm, folder)` reads it.

        Raises:
            ConfigError: the folder holds a stock adapter.
        """
        name = str(self.config.name_or_path or self.config.model_type)
        save_suffix_prompt(
            folder,
            self.soft_prompt,
            placement=self.placement,
            base_model=name,
            model_fingerprint=fingerprint.of_model(self.plm),
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        n_after: torch.Tensor | Sequence[int] | int | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """`plm.generate` with the prompt after the text; takes and gives what the PLM's own `generate` does.

        The cache is always a dynamic one, since it holds the text: `use_cache` and `cache_implementation` do not count.

        Args:
            n_after: with `infix`, as `forward` takes it; or one number for all rows.
            streamer: is given the text first, as by the PLM's own `generate`.

        Raises:
            ModelError: `n_after` as in `forward`.
            ConfigError: assisted generation, which would read the text again without the prompt; no room for an answer.
        """
        self._check_after(n_after)
        after = [n_after] * len(input_ids) if isinstance(n_after, int) else n_after
        after = None if after is None else counts(after, len(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        texts = [row[keep].tolist() for row, keep in zip(input_ids, mask.bool(), strict=True)]
        read = 1 if self.plm.config.is_encoder_decoder else input_ids.shape[1]
        config, more = _merged_options(self.plm.generation_config, options, read)
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        rows = [Input(ids, n) for ids, n in zip(texts, after or [0] * len(texts), strict=True)]
        inputs, _ = self.prompted.generation_inputs(self.soft_prompt.detach(), rows, copies)
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if more.get(name) is not None or getattr(config, name, None) is not None:
                raise ConfigError(
                    f"{name} guesses tokens from those of the text, which is read already, with a prompt behind it; "
                    "leave it out"
                )
        if streamer is not None and not self.plm.config.is_encoder_decoder:
            streamer.put(input_ids.cpu())  # the PLM is given no text to show
        with generation_config(self.plm, config):
            generated = self.plm.generate(**inputs, streamer=streamer, **more)
        sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
        if self.plm.config.is_encoder_decoder:
            sequences = sequences[:, len(self.soft_prompt) :]
        else:
            text = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
            sequences = torch.cat([text, sequences], dim=1)
        if isinstance(generated, torch.Tensor):
            return sequences
        generated.sequences = sequences
        return generated


def _merged_options(defaults: Any, options: dict[str, Any], read: int) -> tuple[Any, dict[str, Any]]:
    """What `generate` would make of its options and the model's own config, for a text whose states are at hand.

    Lengths are those of the tokens to come: `max_length` and `min_length` count the `read` ones, not the prompt.

    Returns:
        The config, and options that are none of its.

    Raises:
        ConfigError: `max_length` is at most `read`.
    """
    base = options.pop("generation_config", None)
    config = GenerationConfig() if base is None else copy.deepcopy(base)
    config.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
    more = config.update(**options)
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if getattr(config, total) and getattr(config, new) is None:
            setattr(config, new, max(getattr(config, total) - read, 0))
            if total == "max_length" and config.max_new_tokens == 0:
                raise ConfigError(
                    f"max_length={config.max_length} leaves no room for an answer to {read} tokens; raise it, or set "
                    "max_new_tokens"
                )
        setattr(config, total, None)
    config.use_cache, config.cache_implementation = True, None
    return config, more


def _prompt_only(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}plm.")]:
        del state[name]


def _plm_is_not_missing(_module: nn.Module, result: Any) -> None:
    result.missing_keys[:] = [n for n in result.missing_keys if "plm." not in n]


def load_soft_prompt(plm: Any, folder: str | Path, *, cache: TextCache | None = None) -> Any:
    """A PLM with the soft prompt saved in a folder, wherever it stands: its `generate` and `forward` just work.

    Args:
        plm: the bare PLM the prompt was tuned on.
        folder: where `save_pretrained` has put it, or a run.
        cache: where the texts' states are kept, of a prompt after the text.

    An `infix` prompt's model is told where the prompt stands in each text: `n_after`, as in training.

    Returns:
        A `SuffixPromptModel`, or the `PeftModel` of a stock prompt in front of the text.

    Raises:
        ConfigError: no prompt there, or one of another width.
        ModelError: as `SuffixPromptModel`.
    """
    values = load_prompt(folder)
    record = suffix_record(folder)
    width = plm.get_input_embeddings().weight.shape[-1]
    if values.shape[-1] != width:
        raise ConfigError(
            f"{str(folder)!r} holds a prompt of vectors of {values.shape[-1]} numbers, this model's embeddings have "
            f"{width}: it is another model's prompt"
        )
    if record is None:
        try:
            return PeftModel.from_pretrained(plm, str(prompt_folder(folder)))
        except Exception as error:  # PEFT makes what the file says, and fails as each of its fields does
            raise ConfigError(
                f"{str(folder)!r}: PEFT cannot load what adapter_config.json describes; save the prompt again "
                f"({type(error).__name__}: {error})"
            ) from error
    if wrong := fingerprint.mismatch(record["model_fingerprint"], fingerprint.of_model(plm)):
        logger.warning(
            "%s was tuned on %s, whose weights are not this model's: %s", folder, record["base_model"], wrong
        )
    model = SuffixPromptModel(plm, len(values), placement=record["placement"], cache=cache)
    with torch.no_grad():
        model.soft_prompt.copy_(values)
    return model.eval()


def suffix_loss(
    model: nn.Module, batch: Mapping[str, Any], *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of a batch with the prompt after its text; as `label_loss`, for a `SuffixPromptModel`.

    Args:
        model: a `SuffixPromptModel`, possibly wrapped for data parallelism.
        num_items: divisor of the summed loss; default the labelled positions of this batch.

    Raises:
        ModelError: another kind of model, or a batch without labels.
    """
    if not isinstance(getattr(model, "module", model), SuffixPromptModel):
        raise ModelError(f"{type(model).__name__} is not a SuffixPromptModel: its prompt is not after the text")
    inputs = {k: batch.get(k) for k in ("input_ids", "attention_mask", "labels", AFTER)}
    loss: torch.Tensor = model(**inputs, num_items_in_batch=num_items).loss
    return loss
