"""The shapes that costs follow from: of a batch, of a stack, of an architecture.

No weights are needed: shapes are read off a model of two layers per stack on the `meta` device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, is_whole
from ..placements import Placement
from ..plm import families
from ..plm.configs import model_class
from ..schedule.stages import Size, Stage

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The padded shape of one batch; padding costs what it costs.

    Args:
        batch: examples B.
        input_tokens: text tokens of the input, without prompt and target.
        prompt_tokens: soft prompt length P, in front of the input.
        target_tokens: target tokens. A decoder-only model runs over P + input + target tokens; an encoder-decoder
            over P + input in the encoder and the target in the decoder.
        label_tokens: positions of one example (its mean over the batch) the LM head runs on; None is every target
            token. Fewer if targets are padded: padding carries no label.
        full_logits: the LM head runs on every position (a plain `model(**batch).loss`), whatever `label_tokens`.
        text_apart: the text runs forward only, without the prompt, which stands after it (in front of the decoder's
            input); prompt and target run over the text's keys and values.
        text_examples: of texts apart, those that run at all; None is every one, 0 a warm cache.
        kept_cross: of texts apart, running one gives an encoder-decoder's cross-attention its keys and values, and
            what follows computes none (`TextCache`).

    Raises:
        ConfigError: a size below its least value, more labels than target tokens, or a prompt of none after the text.
    """

    batch: int = 32
    input_tokens: int = 492
    prompt_tokens: int = 20
    target_tokens: int = 10
    label_tokens: float | None = None
    full_logits: bool = False
    text_apart: bool = False
    text_examples: int | None = None
    kept_cross: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("input_tokens", 0), ("prompt_tokens", 0), ("target_tokens", 1)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.prompt_tokens + self.input_tokens < 1:
            raise ConfigError("prompt_tokens=0 and input_tokens=0 leave nothing to run on; give at least one token")
        if self.label_tokens is not None and not 0 <= self.label_tokens <= self.target_tokens:
            raise ConfigError(
                f"label_tokens={self.label_tokens!r} must be between 0 and target_tokens={self.target_tokens}"
            )
        if self.text_apart and self.prompt_tokens < 1:
            raise ConfigError("prompt_tokens=0 leaves no prompt after the text; give at least one token")

    @property
    def source_tokens(self) -> int:
        """Prompt and input tokens of one example, P + input."""
        return self.prompt_tokens + self.input_tokens

    @property
    def labels(self) -> float:
        """Positions of one example that carry a label."""
        return self.target_tokens if self.label_tokens is None else self.label_tokens

    @property
    def texts_run(self) -> int:
        """Of texts apart, those that run."""
        return self.batch if self.text_examples is None else self.text_examples

    @property
    def in_front(self) -> BatchShape:
        """The same batch with the prompt in front of its texts."""
        return replace(self, text_apart=False, text_examples=None)

    def apart(self, *, tail: int = 0, kept: bool = True, kept_cross: bool = False) -> BatchShape:
        """The same batch with its text run apart from the prompt.

        Args:
            tail: input tokens that stand behind the prompt: they cost what the prompt does.
            kept: the texts have been run before.
            kept_cross: as the field of this name.
        """
        return replace(
            self,
            input_tokens=max(self.input_tokens - tail, 1),
            prompt_tokens=self.prompt_tokens + tail,
            text_apart=True,
            text_examples=0 if kept else None,
            kept_cross=kept_cross,
        )

    def placed(self, place: Placement, *, tail: int = 0, kept_cross: bool = False) -> BatchShape:
        """The same batch, its prompt moved from the front to `place`; where that keeps texts, they have been run.

        Args:
            tail, kept_cross: as `apart`; only a place that needs it has a tail.
        """
        if not place.keeps_texts:
            return self
        return self.apart(tail=tail if place.needs_tail else 0, kept_cross=kept_cross)

    def at(self, stage: Stage | None) -> BatchShape:
        """The part of the batch that `stage` trains on: at most its `batch` examples, its `length` input tokens."""
        if stage is None or not stage.cuts_batch:
            return self
        return replace(
            self,
            batch=self.batch if stage.batch is None else min(self.batch, stage.batch),
            input_tokens=self.input_tokens if stage.length is None else min(self.input_tokens, stage.length),
            text_examples=None if self.text_examples is None else min(self.text_examples, stage.batch or self.batch),
        )


@dataclass(frozen=True, kw_only=True)
class StackCost:
    """What one token costs in one stack, in multiply-adds per layer (so: weights of the matrices it meets).

    Args:
        layers, ffn: full layers L and FFN width F.
        d_model: width H of the hidden states.
        attention: weights of the self-attention projections.
        token_wise: those of them that `families` names token-wise; a causal model's last layer runs them, and its FFN,
            on labelled positions only (`objective.last_layer_rows`).
        attention_width: heads × head_dim; a query against one key costs as many multiply-adds.
        kv_width: width of keys and values together.
        heads: query heads.
        cross_query, cross_kv, cross_out: weights of the cross-attention projections of decoder states, of encoder
            states, and of the output; 0 without cross-attention.
        cross_width: heads × head_dim of the cross-attention.
        neuron: FFN weights per neuron.
        ffn_in: FFN input projections (2 if gated).
        other: weights of further linear layers in a layer.
        outside: weights of linear layers outside the layers that every token of this stack meets.
        layer_params: parameters of a layer at full width; neuron_params: those of one neuron.
    """

    layers: int
    ffn: int
    d_model: int
    attention: int
    attention_width: int
    kv_width: int
    heads: int
    token_wise: int = 0
    cross_query: int = 0
    cross_kv: int = 0
    cross_out: int = 0
    cross_width: int = 0
    neuron: int
    ffn_in: int
    other: int = 0
    outside: int = 0
    layer_params: int
    neuron_params: int

    def linear(self, ffn: int) -> int:
        """Weights that a token meets in a layer of `ffn` neurons, without cross-attention."""
        return self.attention + self.neuron * ffn + self.other


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The shapes of one architecture that its cost follows from.

    Args:
        stacks: cost of each stack, by name.
        head: weights of the LM head (V × H), tied or not.
        vocab: vocabulary size V.
        params: parameters of the whole model at full size (tied ones once).
    """

    stacks: Mapping[str, StackCost]
    head: int
    vocab: int
    params: int

    @classmethod
    def from_config(cls, config: Any) -> CostModel:
        """Shapes from a config alone: two layers per stack are built on the `meta` device, no weight is allocated.

        The layers of a stack are taken to be alike, as they are in every registered family but for state that the
        first one owns (T5's position bias).

        Raises:
            UnknownFamilyError: the architecture is not registered.
            ModelError: its modules are not where its family says.
        """
        import torch

        sizes = families.full_sizes(config)
        small = copy.deepcopy(config)
        for name, spec in families.of(config).stacks.items():
            present = min(2, sizes[name].layers)
            for field in spec.count_fields:
                setattr(small, field, present)
            for field in spec.per_layer_fields:
                if getattr(small, field, None):
                    setattr(small, field, list(getattr(small, field))[:present])
        with torch.device("meta"):
            plm = model_class(config).from_config(small)
        return cls._read(plm, {name: size.layers for name, size in sizes.items()})

    @classmethod
    def from_model(cls, model: nn.Module) -> CostModel:
        """Shapes of a live model at its full size, whatever stage it is at now.

        Args:
            model: a PEFT model or a bare `transformers` model.

        Raises:
            UnknownFamilyError, ModelError: as `from_config`.
        """
        from ..plm.stacks import get_plm

        return cls._read(get_plm(model), None)

    @classmethod
    def _read(cls, plm: nn.Module, depth: Mapping[str, int] | None) -> CostModel:
        """Read every stack off the last layer of `plm`; `depth` is the layer count where `plm` itself is cut."""
        from ..plm.stacks import layer_list

        config: Any = plm.config
        specs = families.of(config).stacks
        stack_parts: dict[str, tuple[Any, list[nn.Module]]] = {}
        for name, spec in specs.items():
            parent, attribute = layer_list(plm, spec)
            layers: Any = parent._modules.get(attribute) if parent is not None else None
            if parent is None or layers is None or not len(layers):
                raise ModelError(
                    f"{type(plm).__name__} (model_type={config.model_type!r}) has no layers at {spec.layers!r}; if it "
                    "is a variant of the family, register it with its own paths"
                )
            stack_parts[name] = (parent, list(layers))
        inside = {id(m) for _, layers in stack_parts.values() for layer in layers for m in layer.modules()}
        head = plm.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ModelError(f"{type(plm).__name__} has no LM head; load it with AutoModelForCausalLM or …Seq2SeqLM")
        outside = dict.fromkeys(stack_parts, 0)
        for module in plm.modules():
            shape = _linear_shape(module)
            if shape and module is not head and id(module) not in inside:
                owner = [n for n, (parent, _) in stack_parts.items() if any(module is m for m in parent.modules())]
                outside[owner[0] if len(owner) == 1 else list(stack_parts)[-1]] += shape[0] * shape[1]

        stacks = {}
        extra_params = 0
        for name, (_, layers) in stack_parts.items():
            count = len(layers) if depth is None else depth[name]
            stack = _read_layer(layers[-1], specs[name], config, outside[name], count)
            stacks[name] = stack
            extra_params += (stack.layers - len(layers)) * stack.layer_params
        head_shape = _linear_shape(head)
        if head_shape is None:
            raise ModelError(f"the LM head of {type(plm).__name__} is {type(head).__name__}, not a linear layer")
        return cls(
            stacks=stacks,
            head=head_shape[0] * head_shape[1],
            vocab=head_shape[1],
            params=_params(plm) + extra_params,
        )

    @property
    def seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return len(self.stacks) > 1

    @property
    def full_stage(self) -> Stage:
        """The full size of the model."""
        return Stage.of(self._full_sizes)

    @property
    def _full_sizes(self) -> dict[str, Size]:
        return {name: Size(stack.layers, stack.ffn) for name, stack in self.stacks.items()}

    def sizes(self, stage: Stage | None) -> dict[str, Size]:
        """The size of every stack at `stage`; None is the full model.

        Raises:
            ScheduleError: the stage does not fit this model.
        """
        if stage is None:
            return self._full_sizes
        stage.check_fits(self.full_stage)
        return {**self._full_sizes, **stage.sizes}


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(in, out)` of a linear layer of any make (plain, Conv1D, quantized); None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children()):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """`(own name, module, in, out)` of every linear layer in `module`."""
    for path, child in module.named_modules():
        if shape := _linear_shape(child):
            yield path.rpartition(".")[2], child, *shape


def _attention_width(linears: list[tuple[str, nn.Module, int, int]], d_model: int) -> int:
    # Only the output projection is fed by the heads; where no input differs from d_model, the widths are the same.
    return next((i for _, _, i, _ in linears if i != d_model), d_model)


def _read_layer(layer: nn.Module, spec: families.StackSpec, config: Any, outside: int, count: int) -> StackCost:
    from ..plm.stacks import ffn_projections, resolve

    attention = resolve(layer, spec.self_attention)
    ffn_in, ffn_out = ffn_projections(layer, spec)
    if attention is None or ffn_out is None or not ffn_in:
        raise ModelError(
            f"a layer of model_type={config.model_type!r} lacks {spec.self_attention!r}, {spec.ffn_out!r} or the FFN "
            f"inputs {spec.ffn_in}; register the family with the paths of print(model)"
        )
    in_shapes = [_linear_shape(m) for m in ffn_in]
    out_shape = _linear_shape(ffn_out)
    if out_shape is None or any(s is None for s in in_shapes):
        raise ModelError(f"the FFN of model_type={config.model_type!r} is not made of linear layers")
    width, d_model = out_shape
    biased = sum(getattr(m, "bias", None) is not None for m in ffn_in)
    neuron = sum(i * o for i, o in in_shapes if i) // width + d_model  # type: ignore[misc]

    attention_linears = list(_linears(attention))
    attention_width = _attention_width(attention_linears, d_model)
    cross_module = resolve(layer, spec.cross_attention) if spec.cross_attention else None
    cross_linears = list(_linears(cross_module)) if cross_module is not None else []
    kv = sum(i * o for name, _, i, o in cross_linears if name in spec.cross_kv)
    query = sum(i * o for name, _, i, o in cross_linears if name == spec.cross_query)
    known = {id(m) for _, m, _, _ in (*attention_linears, *cross_linears)} | {id(m) for m in (*ffn_in, ffn_out)}
    return StackCost(
        layers=count,
        ffn=width,
        d_model=d_model,
        attention=sum(i * o for _, _, i, o in attention_linears),
        attention_width=attention_width,
        kv_width=sum(o for _, _, _, o in attention_linears) - d_model - attention_width,
        heads=int(getattr(config, spec.heads_field)),
        token_wise=sum(i * o for p in spec.token_wise for i, o in [_linear_shape(resolve(layer, p)) or (0, 0)]),
        cross_query=query,
        cross_kv=kv,
        cross_out=sum(i * o for _, _, i, o in cross_linears) - kv - query,
        cross_width=_attention_width(cross_linears, d_model) if cross_linears else 0,
        neuron=neuron,
        ffn_in=round((neuron - d_model) / d_model),
        other=sum(i * o for _, m, i, o in _linears(layer) if id(m) not in known),
        outside=outside,
        layer_params=_params(layer),
        neuron_params=neuron + (biased * spec.fused),
    )
