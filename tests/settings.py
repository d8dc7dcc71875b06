"""One row per family: a tiny model from a config, and the facts every shared test needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MBartConfig,
    MistralConfig,
    MT5Config,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from fast_prompt_tuning.prompt.soft_prompt import soft_prompt_config
from fast_prompt_tuning.schedule.stages import Stage

VOCAB, HIDDEN, FFN, LAYERS, HEADS = 61, 16, 24, 5, 4


@dataclass(frozen=True)
class Settings:
    name: str
    config: Callable[[], Any]
    stacks: tuple[str, ...] = ("decoder",)
    encoder_decoder: bool = False

    def plm(self, seed: int = 0, **changes: Any) -> Any:
        """The tiny model with random weights, in evaluation mode."""
        torch.manual_seed(seed)
        config = self.config()
        for key, value in changes.items():
            setattr(config, key, value)
        auto = AutoModelForSeq2SeqLM if self.encoder_decoder else AutoModelForCausalLM
        return auto.from_config(config).eval()

    def peft(self, seed: int = 0, prompt: int = 3) -> Any:
        plm = self.plm(seed)
        return get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=prompt)).eval()

    def batch(self, seed: int = 0, size: int = 3, length: int = 7, target: int = 4) -> dict[str, torch.Tensor]:
        """Mixed lengths, right-padded, some labels."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, size):
            mask[row, length - row :] = 0
        ids[mask == 0] = 1
        if self.encoder_decoder:
            labels = torch.randint(3, VOCAB, (size, target), generator=generator)
            labels[-1, -1] = -100
        else:
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :2] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def stage(self, layers: int = 3, ffn: int = 10, stacks: tuple[str, ...] | None = None) -> Stage:
        return Stage(layers, ffn, stacks=stacks or self.stacks)


def _decoder(config: type, **fields: Any) -> Callable[[], Any]:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        # The library's initial values hardly change a residual stream: larger ones make every layer matter.
        "initializer_range": 0.2,
    }
    return lambda: config(**{**common, **fields})


def _t5(config: type, **fields: Any) -> Callable[[], Any]:
    common = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_ff": FFN,
        "d_kv": HIDDEN // HEADS,
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 1,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "initializer_factor": 1.0,
    }
    return lambda: config(**{**common, **fields})


def _bart(config: type) -> Callable[[], Any]:
    return lambda: config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )


BOTH = ("encoder", "decoder")
_GQA = {"num_key_value_heads": 2, "head_dim": 4}
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}

FAMILIES = [
    Settings("t5", _t5(T5Config, feed_forward_proj="relu"), BOTH, True),
    Settings("t5-gated", _t5(T5Config, feed_forward_proj="gated-gelu", tie_word_embeddings=False), BOTH, True),
    Settings("mt5", _t5(MT5Config, feed_forward_proj="gated-gelu"), BOTH, True),
    Settings("bart", _bart(BartConfig), BOTH, True),
    Settings("mbart", _bart(MBartConfig), BOTH, True),
    Settings("pegasus", _bart(PegasusConfig), BOTH, True),
    Settings("llama", _decoder(LlamaConfig, **_GQA)),
    Settings("mistral", _decoder(MistralConfig, sliding_window=4, **_GQA)),
    Settings("qwen2", _decoder(Qwen2Config, num_key_value_heads=2, use_sliding_window=True, **_WINDOW)),
    Settings("qwen3", _decoder(Qwen3Config, **_GQA)),
    Settings("gemma", _decoder(GemmaConfig, **_GQA)),
    Settings("gemma2", _decoder(Gemma2Config, **_GQA, **_WINDOW, query_pre_attn_scalar=4)),
    Settings("gemma3", _decoder(Gemma3TextConfig, **_GQA, **_WINDOW, query_pre_attn_scalar=4)),
    Settings("phi3", _decoder(Phi3Config, num_key_value_heads=2)),
    Settings(
        "gpt2",
        _decoder(GPT2Config, n_inner=FFN, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, intermediate_size=None),
    ),
    Settings("opt", _decoder(OPTConfig, ffn_dim=FFN, dropout=0.0, word_embed_proj_dim=HIDDEN)),
    Settings("gpt_neox", _decoder(GPTNeoXConfig)),
    Settings(
        "bert",
        _decoder(BertConfig, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        ("encoder",),
    ),
    Settings(
        "roberta",
        _decoder(RobertaConfig, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        ("encoder",),
    ),
]
BY_NAME = {s.name: s for s in FAMILIES}
