"""Model families as data: where each architecture keeps the parts a partial PLM cuts.

Every path is relative: `layers` to the headless model (`plm.base_model`), the others to one layer. A number in a path
indexes a module list, so `layer.-1.DenseReluDense.wo` is the output projection in a T5 layer's last sub-layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownFamilyError
from ..schedule.stages import Size


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """One stack of Transformer layers.

    Args:
        layers: path of its module list.
        ffn_in: alternatives of the FFN input projections; the first whose modules all exist is used. Two projections
            are a gated FFN's gate and up.
        ffn_out: path of the FFN output projection.
        fused: how many projections of width F one `ffn_in` module holds back to back (2 for a fused gate and up).
        self_attention: path of the self-attention module.
        cross_attention: path of the cross-attention module, if the stack has one.
        cross_query: name within it of the projection of decoder states.
        cross_kv: names within it of the projections of encoder states.
        token_wise: paths of the attention's projections of queries and of its output, where they are modules of their
            own: what they compute at a token is used at that token alone, so the last layer can leave out the others.
        count_fields: config fields that count this stack's layers; the first one is authoritative.
        live_fields: fields of the whole model's config that follow the stage; default `count_fields`.
        own_count_fields: fields that count them in the stack's own config, where it has a copy.
        width_field: config field with the FFN width F.
        heads_field: config field with the number of attention heads.
        per_layer_fields: config lists with one entry per layer.
        always_kept: layers that own state the others use (T5's position bias), never dropped.
    """

    layers: str
    ffn_in: tuple[tuple[str, ...], ...]
    ffn_out: str
    fused: int = 1
    self_attention: str = "self_attn"
    cross_attention: str | None = None
    cross_query: str = "q"
    cross_kv: tuple[str, ...] = ("k", "v")
    token_wise: tuple[str, ...] = ()
    count_fields: tuple[str, ...] = ("num_hidden_layers",)
    live_fields: tuple[str, ...] | None = None
    own_count_fields: tuple[str, ...] = ()
    width_field: str = "intermediate_size"
    heads_field: str = "num_attention_heads"
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    always_kept: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: its stacks by name (`encoder`, `decoder`). `peers` are `model_type`s built the same way."""

    name: str
    stacks: Mapping[str, StackSpec]
    peers: tuple[str, ...] = ()


def _t5(stack: str, **fields: Any) -> StackSpec:
    return StackSpec(
        layers=f"{stack}.block",
        ffn_in=(
            ("layer.-1.DenseReluDense.wi_0", "layer.-1.DenseReluDense.wi_1"),
            ("layer.-1.DenseReluDense.wi",),
        ),
        ffn_out="layer.-1.DenseReluDense.wo",
        self_attention="layer.0.SelfAttention",
        width_field="d_ff",
        heads_field="num_heads",
        always_kept=(0,),
        **fields,
    )


def _bart(stack: str, **fields: Any) -> StackSpec:
    return StackSpec(
        layers=f"{stack}.layers",
        ffn_in=(("fc1",),),
        ffn_out="fc2",
        width_field=f"{stack}_ffn_dim",
        heads_field=f"{stack}_attention_heads",
        **fields,
    )


_LLAMA = StackSpec(
    layers="layers",
    ffn_in=(("mlp.gate_proj", "mlp.up_proj"),),
    ffn_out="mlp.down_proj",
    token_wise=("self_attn.q_proj", "self_attn.o_proj"),
)

_BERT = StackSpec(
    layers="encoder.layer",
    ffn_in=(("intermediate.dense",),),
    ffn_out="output.dense",
    self_attention="attention",
    token_wise=("attention.self.query", "attention.output.dense"),
)

_BUILT_IN = (
    Family(
        name="t5",
        stacks={
            # `transformers` sizes the decoder's cache by the whole model's `num_layers`, the encoder's count: a cut
            # encoder must not make that cache too short.
            "encoder": _t5("encoder", count_fields=("num_layers",), live_fields=(), own_count_fields=("num_layers",)),
            "decoder": _t5(
                "decoder",
                count_fields=("num_decoder_layers",),
                own_count_fields=("num_layers", "num_decoder_layers"),
                cross_attention="layer.1.EncDecAttention",
            ),
        },
        peers=("mt5",),
    ),
    Family(
        name="bart",
        stacks={
            "encoder": _bart("encoder", count_fields=("encoder_layers", "num_hidden_layers")),
            "decoder": _bart(
                "decoder",
                count_fields=("decoder_layers",),
                cross_attention="encoder_attn",
                cross_query="q_proj",
                cross_kv=("k_proj", "v_proj"),
            ),
        },
        peers=("mbart", "pegasus"),
    ),
    Family(
        name="llama",
        stacks={"decoder": _LLAMA},
        peers=("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    ),
    Family(
        name="phi3",
        stacks={
            "decoder": StackSpec(
                layers="layers",
                ffn_in=(("mlp.gate_up_proj",),),
                ffn_out="mlp.down_proj",
                fused=2,
                token_wise=("self_attn.o_proj",),
            )
        },
    ),
    Family(
        name="gpt2",
        stacks={
            "decoder": StackSpec(
                layers="h",
                ffn_in=(("mlp.c_fc",),),
                ffn_out="mlp.c_proj",
                self_attention="attn",
                token_wise=("attn.c_proj",),
                width_field="n_inner",
            )
        },
    ),
    Family(
        name="opt",
        stacks={
            "decoder": StackSpec(
                layers="decoder.layers",
                ffn_in=(("fc1",),),
                ffn_out="fc2",
                token_wise=("self_attn.q_proj", "self_attn.out_proj"),
                width_field="ffn_dim",
            )
        },
    ),
    Family(
        name="gpt_neox",
        stacks={
            "decoder": StackSpec(
                layers="layers",
                ffn_in=(("mlp.dense_h_to_4h",),),
                ffn_out="mlp.dense_4h_to_h",
                self_attention="attention",
                token_wise=("attention.dense",),
            )
        },
    ),
    # BERT's one stack is called what it is for the method: the stack that is cut. As a masked or causal language
    # model alike, nothing else is stacked.
    Family(name="bert", stacks={"encoder": _BERT}, peers=("roberta",)),
)

REGISTRY: dict[str, Family] = {}
"""Every family by its `model_type`s; `register` adds one."""


def register(family: Family) -> None:
    """Make a family known under its name and its peers' `model_type`s.

    Example: a Llama-like architecture takes one line,
    `register(Family(name="my_model", stacks={"decoder": StackSpec(layers="layers",
    ffn_in=(("mlp.gate_proj", "mlp.up_proj"),), ffn_out="mlp.down_proj")}))`.
    """
    for model_type in (family.name, *family.peers):
        REGISTRY[model_type] = family


for _family in _BUILT_IN:
    register(_family)


def names() -> list[str]:
    """Every registered `model_type`."""
    return sorted(REGISTRY)


def of(config: Any) -> Family:
    """The family of a `transformers` config.

    Raises:
        UnknownFamilyError: nothing is registered for `config.model_type`; the message says how to register it.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in REGISTRY:
        raise UnknownFamilyError(
            f"model_type={model_type!r} is not a registered family (known: {', '.join(names())}). Register it: "
            "from fast_prompt_tuning.plm.families import Family, StackSpec, register; register(Family(name="
            f"{model_type!r}, stacks={{'decoder': StackSpec(layers=…, ffn_in=…, ffn_out=…)}})); the paths are those of "
            "print(model)."
        )
    return REGISTRY[model_type]


def layer_count(config: Any, spec: StackSpec) -> int:
    """Layers of a stack, from the config of the whole model."""
    return int(getattr(config, spec.count_fields[0]))


def ffn_width(config: Any, spec: StackSpec) -> int:
    """FFN width F of a stack, from the config of the whole model; four times d_model where it is left unset (GPT-2)."""
    width = getattr(config, spec.width_field, None)
    return int(width) if width is not None else 4 * int(config.hidden_size)


def full_sizes(config: Any) -> dict[str, Size]:
    """The full size of every stack of a config; the model's weights are not needed."""
    return {s: Size(layer_count(config, spec), ffn_width(config, spec)) for s, spec in of(config).stacks.items()}
