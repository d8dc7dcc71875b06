"""What a training step computes: analytic FLOPs and memory for any family × stage × batch shape.

Only matrix products are counted, a multiply-add as 2 FLOPs (Kaplan et al. 2020, "Scaling Laws for Neural Language
Models", Section 2.1), which is what `torch.utils.flop_counter.FlopCounterMode` counts too; the tests hold the two
together. The base weights are frozen, so the backward pass computes the gradients of activations only: every linear
layer that a gradient passes through costs one more product (not two), the two products of an attention two more each.

Where the count and a measured one may differ:

* Attention is counted as the eager kernels compute it: causal and sliding-window masks save nothing, grouped-query
  attention costs as many score products as there are query heads. A fused kernel that recomputes the scores in its
  backward (FlashAttention: five products rather than four) costs more; the recomputation is not counted, as in "model
  FLOPs" utilisation. `FlopCounterMode` does not see PyTorch's fused CPU kernel at all: compare with
  `attn_implementation="eager"`.
* Where a text's keys and values are put together with those after it (`placement._text_apart`), they get gradients that
  nothing uses, two score products more a layer.
* Norms, activations, softmax, position tables (rotary angles) and the optimizer step on the prompt are left out; they
  are below 1% except in toy models.
* Recomputation by gradient checkpointing is not counted.

No weights are needed: shapes are read off a model of two layers per stack on the `meta` device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, ModelError
from ..plm import families
from ..schedule.stages import Schedule, Stage

if TYPE_CHECKING:
    from torch import nn

Convention = Literal["all", "linear"]

CONVENTIONS = ("all", "linear")
"""`all`: every matrix product of a step as we run it. `linear`: the paper's tool, linear layers only and the LM head at
every position (the authors' profiler is ptflops on `T5ForConditionalGeneration`, whose logits are never left out)."""

LEDGER_CATEGORIES = ("train", "score", "probe", "eval")


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
        placement: `prefix`, or `suffix`: the prompt after the text (in front of the decoder's input). The text then
            runs forward only, and prompt and target run over its keys and values (`placement.py`).
        text_examples: with `suffix`, examples whose text runs at all; None is every one, 0 a warm cache.
        kept_cross: with `suffix`, running a text gives an encoder-decoder's cross-attention its keys and values, and
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
    placement: Literal["prefix", "suffix"] = "prefix"
    text_examples: int | None = None
    kept_cross: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("input_tokens", 0), ("prompt_tokens", 0), ("target_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.prompt_tokens + self.input_tokens < 1:
            raise ConfigError("prompt_tokens=0 and input_tokens=0 leave nothing to run on; give at least one token")
        if self.label_tokens is not None and not 0 <= self.label_tokens <= self.target_tokens:
            raise ConfigError(
                f"label_tokens={self.label_tokens!r} must be between 0 and target_tokens={self.target_tokens}"
            )

        if self.placement == "suffix" and self.prompt_tokens < 1:
            raise ConfigError("prompt_tokens=0 with placement='suffix' has no prompt; give at least one token")

    @property
    def source_tokens(self) -> int:
        """Prompt and input tokens of one example, P + input."""
        return self.prompt_tokens + self.input_tokens

    def at(self, stage: Stage | None) -> BatchShape:
        """The part of the batch that `stage` trains on: at most its `batch` examples, its `length` input tokens."""
        if stage is None or (stage.batch is None and stage.length is None):
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
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        sizes = families.full_sizes(config)
        small = copy.deepcopy(config)
        for name, spec in families.of(config).stacks.items():
            present = min(2, sizes[name][0])
            for field in spec.count_fields:
                setattr(small, field, present)
            for field in spec.per_layer_fields:
                if getattr(small, field, None):
                    setattr(small, field, list(getattr(small, field))[:present])
        auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
        with torch.device("meta"):
            plm = auto.from_config(small)
        return cls._read(plm, {name: layers for name, (layers, _) in sizes.items()})

    @classmethod
    def from_model(cls, model: nn.Module) -> CostModel:
        """Shapes of a live model at its full size, whatever stage it is at now.

        Args:
            model: a PEFT model or a bare `transformers` model.

        Raises:
            UnknownFamilyError, ModelError: as `from_config`.
        """
        from ..plm.partial import get_plm

        return cls._read(get_plm(model), None)

    @classmethod
    def _read(cls, plm: nn.Module, depth: Mapping[str, int] | None) -> CostModel:
        """Read every stack off the last layer of `plm`; `depth` is the layer count where `plm` itself is cut."""
        from ..plm.partial import resolve

        config: Any = plm.config
        specs = families.of(config).stacks
        base = getattr(plm, "base_model", plm)
        found: dict[str, tuple[Any, list[nn.Module]]] = {}
        for name, spec in specs.items():
            parent_path, _, attribute = spec.layers.rpartition(".")
            parent = resolve(base, parent_path) if parent_path else base
            # `_modules` holds the whole list also where a partial PLM shadows it.
            layers: Any = parent._modules.get(attribute) if parent is not None else None
            if parent is None or layers is None or not len(layers):
                raise ModelError(
                    f"{type(plm).__name__} (model_type={config.model_type!r}) has no layers at {spec.layers!r}; if it "
                    "is a variant of the family, register it with its own paths"
                )
            found[name] = (parent, list(layers))
        inside = {id(m) for _, layers in found.values() for layer in layers for m in layer.modules()}
        head = plm.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ModelError(f"{type(plm).__name__} has no LM head; load it with AutoModelForCausalLM or …Seq2SeqLM")
        outside = dict.fromkeys(found, 0)
        for module in plm.modules():
            shape = _linear_shape(module)
            if shape and module is not head and id(module) not in inside:
                owner = [n for n, (parent, _) in found.items() if any(module is m for m in parent.modules())]
                outside[owner[0] if len(owner) == 1 else list(found)[-1]] += shape[0] * shape[1]

        stacks = {}
        extra_params = 0
        for name, (_, layers) in found.items():
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
    def full_stage(self) -> Stage:
        """The full size of the model."""
        return Stage(
            {n: s.layers for n, s in self.stacks.items()}, {n: s.ffn for n, s in self.stacks.items()},
            stacks=tuple(self.stacks),
        )  # fmt: skip

    def sizes(self, stage: Stage | None) -> dict[str, tuple[int, int]]:
        """`{stack: (layers, FFN width)}` at `stage`; None is the full model.

        Raises:
            ScheduleError: the stage does not fit this model.
        """
        if stage is None:
            return {n: (s.layers, s.ffn) for n, s in self.stacks.items()}
        stage.check_fits(self.full_stage)
        return {n: (_or(stage.layers_in(n), s.layers), _or(stage.ffn_in(n), s.ffn)) for n, s in self.stacks.items()}


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


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
    from ..plm.partial import resolve

    attention = resolve(layer, spec.self_attention)
    ffn_out = resolve(layer, spec.ffn_out)
    choices = [[resolve(layer, p) for p in paths] for paths in spec.ffn_in]
    ffn_in = next((ms for ms in choices if all(m is not None for m in ms)), None)
    if attention is None or ffn_out is None or ffn_in is None:
        raise ModelError(
            f"a layer of model_type={config.model_type!r} lacks {spec.self_attention!r}, {spec.ffn_out!r} or the FFN "
            f"inputs {spec.ffn_in}; register the family with the paths of print(model)"
        )
    in_shapes = [_linear_shape(m) for m in ffn_in if m is not None]
    out_shape = _linear_shape(ffn_out)
    if out_shape is None or any(s is None for s in in_shapes):
        raise ModelError(f"the FFN of model_type={config.model_type!r} is not made of linear layers")
    width, d_model = out_shape
    biased = sum(getattr(m, "bias", None) is not None for m in ffn_in)
    neuron = sum(i * o for i, o in in_shapes if i) // width + d_model  # type: ignore[misc]

    own = list(_linears(attention))
    attention_width = _attention_width(own, d_model)
    cross_module = resolve(layer, spec.cross_attention) if spec.cross_attention else None
    cross = list(_linears(cross_module)) if cross_module is not None else []
    # Keys and values are the projections that read the encoder; every registered family names them k… and v….
    kv = sum(i * o for n, _, i, o in cross if n[0] in "kv")
    query = sum(i * o for n, _, i, o in cross if n[0] == "q")
    known = {id(m) for _, m, _, _ in (*own, *cross)} | {id(m) for m in (*ffn_in, ffn_out)}
    return StackCost(
        layers=count,
        ffn=width,
        d_model=d_model,
        attention=sum(i * o for _, _, i, o in own),
        attention_width=attention_width,
        kv_width=sum(o for _, _, _, o in own) - d_model - attention_width,
        heads=int(getattr(config, spec.heads_field)),
        token_wise=sum(i * o for p in spec.token_wise for i, o in [_linear_shape(resolve(layer, p)) or (0, 0)]),
        cross_query=query,
        cross_kv=kv,
        cross_out=sum(i * o for _, _, i, o in cross) - kv - query,
        cross_width=_attention_width(cross, d_model) if cross else 0,
        neuron=neuron,
        ffn_in=round((neuron - d_model) / d_model),
        other=sum(i * o for _, m, i, o in _linears(layer) if id(m) not in known),
        outside=outside,
        layer_params=_params(layer),
        neuron_params=neuron + (biased * spec.fused),
    )


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def _check_convention(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")


def _pass_flops(
    cost: CostModel, stage: Stage | None, shape: BatchShape, convention: str, whole_last_layer: bool = False
) -> tuple[float, float]:
    """FLOPs of `(forward, backward)` of one batch, as far as `stage` trains on it."""
    _check_convention(convention)
    shape = shape.at(stage)
    if shape.placement == "suffix":
        return _suffix_pass_flops(cost, stage, shape, convention)
    sizes = cost.sizes(stage)
    products = 1 if convention == "all" else 0
    full_logits = shape.full_logits or convention == "linear"
    forward = backward = 0.0
    seq2seq = len(cost.stacks) > 1
    source = shape.source_tokens if seq2seq else shape.source_tokens + shape.target_tokens
    for name, stack in cost.stacks.items():
        layers, ffn = sizes[name]
        cross = stack.cross_width > 0
        length = shape.target_tokens if cross else source
        tokens = shape.batch * length
        own = tokens * stack.attention
        own_scores = products * tokens * length * stack.attention_width  # one product; a pass has two
        rest = tokens * (stack.neuron * ffn + stack.other)
        forward += tokens * stack.outside + layers * (own + 2 * own_scores + rest)
        if not cross:
            # The prompt is among the inputs of the first layer: everything after it passes a gradient back.
            backward += tokens * stack.outside + layers * (own + 4 * own_scores + rest)
            continue
        query, out = tokens * stack.cross_query, tokens * stack.cross_out
        kv = shape.batch * source * stack.cross_kv
        cross_scores = products * tokens * source * stack.cross_width
        forward += layers * (query + kv + out + 2 * cross_scores)
        # A gradient enters the decoder through the encoder states only. In its first layer nothing before the
        # cross-attention has one: no backward for self-attention, the cross-attention's query or its score product
        # with respect to the query.
        first = kv + out + 3 * cross_scores + rest
        backward += first + (layers - 1) * (own + 4 * own_scores + query + kv + out + 4 * cross_scores + rest)
    labels = shape.target_tokens if shape.label_tokens is None else shape.label_tokens
    if full_logits:
        labels = shape.target_tokens if seq2seq else source
    elif not seq2seq and not whole_last_layer:
        # Queries, attention output and FFN of the last layer run where a label is (objective.last_layer_rows).
        (stack,), ((_, ffn),) = cost.stacks.values(), sizes.values()
        left_out = shape.batch * (source - labels) * (stack.token_wise + stack.neuron * ffn)
        forward, backward = forward - left_out, backward - left_out
    logits = shape.batch * labels * cost.head
    return 2 * (forward + logits), 2 * (backward + logits)


def text_flops(
    cost: CostModel,
    stage: Stage | None,
    examples: int,
    tokens: int,
    *,
    convention: Convention = "all",
    kept_cross: bool = False,
) -> float:
    """FLOPs of running texts alone, forward, as a prompt after the text lets one do: no LM head, no prompt.

    Args:
        examples, tokens: how many texts, and their padded length.
        kept_cross: as of `BatchShape`: the decoder has run over one token, which computes keys and values.

    Raises:
        ScheduleError: the stage does not fit the model. ConfigError: unknown convention.
    """
    _check_convention(convention)
    name = "encoder" if len(cost.stacks) > 1 else next(iter(cost.stacks))
    stack, (layers, ffn) = cost.stacks[name], cost.sizes(stage)[name]
    scores = tokens * stack.attention_width if convention == "all" else 0
    each = stack.outside + layers * (stack.attention + 2 * scores + stack.neuron * ffn + stack.other)
    if name == "decoder" and convention == "all":
        each -= stack.token_wise + stack.neuron * ffn  # of the last layer only keys and values are wanted
    once = 0.0
    if kept_cross and name == "encoder":
        decoder, (layers, ffn) = cost.stacks["decoder"], cost.sizes(stage)["decoder"]
        each += layers * decoder.cross_kv
        token = decoder.attention + decoder.neuron * ffn + decoder.other + decoder.cross_query + decoder.cross_out
        scores = decoder.attention_width + tokens * decoder.cross_width if convention == "all" else 0
        once = decoder.outside + layers * (token + 2 * scores)
    return 2 * examples * (tokens * each + once)


def _suffix_pass_flops(cost: CostModel, stage: Stage | None, shape: BatchShape, convention: str) -> tuple[float, float]:
    """As `_pass_flops`, with the prompt after the text: a gradient passes through prompt and target only."""
    products = 1 if convention == "all" else 0
    seq2seq = len(cost.stacks) > 1
    name = "decoder" if seq2seq else next(iter(cost.stacks))
    stack, (layers, ffn) = cost.stacks[name], cost.sizes(stage)[name]
    # A decoder-only model is not run on the last target token, from which nothing is predicted.
    length = shape.prompt_tokens + shape.target_tokens - (0 if seq2seq else 1)
    tokens = shape.batch * length
    linear = stack.attention + stack.neuron * ffn + stack.other
    scores = products * tokens * length * stack.attention_width
    text_scores = 0 if seq2seq else products * tokens * shape.input_tokens * stack.attention_width
    forward: float = tokens * stack.outside + layers * (tokens * linear + 2 * scores + 2 * text_scores)
    # Scores and weights of the text pass a gradient on, its keys and values have none.
    backward: float = tokens * stack.outside + layers * (tokens * linear + 4 * scores + 2 * text_scores)
    if seq2seq:
        projections = tokens * (stack.cross_query + stack.cross_out)
        cross_scores = products * tokens * shape.input_tokens * stack.cross_width
        kv = 0 if shape.kept_cross else shape.batch * shape.input_tokens * stack.cross_kv
        forward += layers * (projections + kv + 2 * cross_scores)
        backward += layers * (projections + 2 * cross_scores)  # the encoder's states have no gradient
    labels = shape.target_tokens if shape.label_tokens is None else shape.label_tokens
    if shape.full_logits or convention == "linear":
        labels = length
    elif not seq2seq:
        left_out = shape.batch * (length - labels) * (stack.token_wise + stack.neuron * ffn)  # as in `_pass_flops`
        forward, backward = forward - left_out, backward - left_out
    logits = shape.batch * labels * cost.head
    examples = shape.batch if shape.text_examples is None else shape.text_examples
    text = text_flops(
        cost,
        stage,
        examples,
        shape.input_tokens,
        convention=convention,  # type: ignore[arg-type]
        kept_cross=shape.kept_cross,
    )
    return text + 2 * (forward + logits), 2 * (backward + logits)


def forward_flops(
    cost: CostModel,
    stage: Stage | None,
    shape: BatchShape,
    *,
    convention: Convention = "all",
    whole_last_layer: bool = False,
) -> float:
    """FLOPs of a forward pass of one batch at `stage` (None: the full model), LM head as `shape` says.

    Args:
        whole_last_layer: count a causal model's last layer at every position, not at the labelled ones alone.

    Raises:
        ScheduleError: the stage does not fit the model. ConfigError: unknown convention.
    """
    return _pass_flops(cost, stage, shape, convention, whole_last_layer)[0]


def step_flops(
    cost: CostModel,
    stage: Stage | None,
    shape: BatchShape,
    *,
    convention: Convention = "all",
    backward: bool = True,
) -> float:
    """FLOPs of one training step on one batch: forward, and backward with frozen weights.

    Args:
        stage: size of the partial PLM; None is the full model.
        shape: the padded batch.
        convention: `all` or `linear`, see `CONVENTIONS`.
        backward: count the backward pass.

    Raises:
        ScheduleError: the stage does not fit the model. ConfigError: unknown convention.
    """
    there, back = _pass_flops(cost, stage, shape, convention)
    return there + back if backward else there


def schedule_flops(cost: CostModel, schedule: Schedule, shape: BatchShape, *, convention: Convention = "all") -> float:
    """FLOPs of all training steps of a schedule, every batch of the same shape."""
    return sum(s.steps * step_flops(cost, s, shape, convention=convention) for s in schedule.stages)


def generation_flops(cost: CostModel, shape: BatchShape, *, stage: Stage | None = None) -> float:
    """FLOPs of generating `shape.target_tokens` for one batch with a key-value cache, greedily.

    The prompt and input are read once, with logits at the last position only; then every new token runs alone against
    the cache. Approximate: all examples are taken to use every token, and the first generated token, which comes out
    of reading the input, is counted as a step of its own.
    """
    sizes = cost.sizes(stage)
    seq2seq = len(cost.stacks) > 1
    source, new = shape.source_tokens, shape.target_tokens
    text = 0.0
    if suffix := shape.placement == "suffix":
        examples = shape.batch if shape.text_examples is None else shape.text_examples
        text = text_flops(cost, stage, examples, shape.input_tokens, kept_cross=shape.kept_cross)
        source = shape.input_tokens
    macs = 0.0
    for name, stack in cost.stacks.items():
        layers, ffn = sizes[name]
        linear = stack.attention + stack.neuron * ffn + stack.other
        cross = stack.cross_width > 0
        if not cross and not suffix:
            macs += source * (stack.outside + layers * (linear + 2 * source * stack.attention_width))
        if cross or not seq2seq:
            seen = 0 if cross else source
            read = shape.prompt_tokens if suffix else 0  # in one pass, after what was seen
            macs += read * (stack.outside + layers * (linear + 2 * (seen + read) * stack.attention_width))
            keys = new * (seen + read) + new * (new + 1) / 2  # summed over the new tokens
            macs += new * stack.outside + layers * (new * linear + 2 * keys * stack.attention_width)
            if cross:
                keys = 0 if suffix and shape.kept_cross else source
                macs += layers * (keys * stack.cross_kv + (read + new) * (stack.cross_query + stack.cross_out))
                macs += layers * 2 * (read + new) * source * stack.cross_width
    return text + 2 * shape.batch * (macs + new * cost.head)


# -- memory -----------------------------------------------------------------------------------------------------------


def stage_params(cost: CostModel, stage: Stage | None) -> int:
    """Parameters a stage computes with (embeddings and LM head included)."""
    total = cost.params
    for name, (layers, ffn) in cost.sizes(stage).items():
        s = cost.stacks[name]
        total -= s.layers * s.layer_params - layers * (s.layer_params - (s.ffn - ffn) * s.neuron_params)
    return total


def weight_bytes(cost: CostModel, stage: Stage | None, *, dtype_bytes: float = 2) -> int:
    """Bytes of weights in memory at a stage: the whole model, which stays loaded, and the narrowed FFN copies."""
    copies = sum(
        layers * ffn * cost.stacks[name].neuron_params
        for name, (layers, ffn) in cost.sizes(stage).items()
        if ffn < cost.stacks[name].ffn
    )
    return int(dtype_bytes * (cost.params + copies))


def text_bytes(
    cost: CostModel, stage: Stage | None, tokens: int, *, dtype_bytes: float = 2, kept_cross: bool = False
) -> int:
    """Bytes that a text of `tokens` leaves behind where the prompt stands after it: what a text cache keeps of it.

    Keys and values of every layer; of an encoder-decoder the encoder's output, or those of the decoder's
    cross-attention (`kept_cross`).
    """
    if len(cost.stacks) > 1 and kept_cross:
        width = 2 * cost.stacks["decoder"].cross_width
        return int(dtype_bytes * tokens * cost.sizes(stage)["decoder"][0] * width)
    if len(cost.stacks) > 1:
        return int(dtype_bytes * tokens * cost.stacks["encoder"].d_model)
    name = next(iter(cost.stacks))
    return int(dtype_bytes * tokens * cost.sizes(stage)[name][0] * cost.stacks[name].kv_width)


def activation_bytes(
    cost: CostModel, stage: Stage | None, shape: BatchShape, *, dtype_bytes: float = 2, keep_scores: bool = False
) -> int:
    """Estimate of the bytes a forward pass keeps for the backward with frozen weights.

    A frozen linear layer keeps nothing but its weight. Kept per token and layer: the input of each norm in float32,
    queries, keys, values and the attention's output, and of the FFN the pre-activation and, where it is gated, gate
    and up as well; at the labelled positions the logits, once in the model's type and twice in float32.

    Args:
        dtype_bytes: bytes of an activation.
        keep_scores: also keep the attention weights (eager attention; fused kernels do not).

    Returns:
        Bytes. An estimate: activations written in several elementary operations keep more, fused norms less.
    """
    sizes, shape = cost.sizes(stage), shape.at(stage)
    seq2seq = len(cost.stacks) > 1
    suffix = shape.placement == "suffix"
    source = shape.source_tokens if seq2seq else shape.source_tokens + shape.target_tokens
    if suffix:
        source = shape.input_tokens
    total = 0.0
    for name, stack in cost.stacks.items():
        layers, ffn = sizes[name]
        cross = stack.cross_width > 0
        length = shape.target_tokens if cross else source
        cross_source: float = 0
        seen = 0  # text tokens among the keys
        if suffix:
            if seq2seq and not cross:
                continue  # the encoder runs without a gradient
            length = shape.prompt_tokens + shape.target_tokens
            seen = 0 if cross else shape.input_tokens
        per_token = 2 * stack.attention_width + stack.kv_width + (3 if stack.ffn_in > 1 else 1) * ffn
        scores = stack.heads * length * (length + seen)
        if cross:
            per_token += 2 * stack.cross_width
            cross_source = 2 * stack.cross_width * source
            scores += stack.heads * length * source
        kept = length * per_token + cross_source + (scores if keep_scores or seen else 0)
        # Attention to a kept text keeps its weights in float32, too (`placement._attention`).
        norms = 4 * length * stack.d_model * (3 if cross else 2) + (4 * scores if seen else 0)
        total += shape.batch * layers * (dtype_bytes * kept + norms)
    labels = shape.target_tokens if shape.label_tokens is None else shape.label_tokens
    if shape.full_logits:
        labels = length if suffix else shape.target_tokens if seq2seq else source
    return int(total + shape.batch * labels * cost.vocab * (dtype_bytes + 8))


# -- accounting -------------------------------------------------------------------------------------------------------


class FlopsLedger:
    """FLOPs spent, by what they were spent on, so that what a method saves is never stated gross.

    Args:
        spent: FLOPs by category to start from (a resumed run), as `to_dict` gave them.

    Raises:
        ConfigError: an unknown category, or a negative amount.
    """

    def __init__(self, spent: Mapping[str, float] | None = None):
        self._spent = dict.fromkeys(LEDGER_CATEGORIES, 0.0)
        for category, flops in (spent or {}).items():
            if category != "total":
                self.add(category, flops)

    def add(self, category: str, flops: float) -> None:
        """Book `flops` under `train`, `score`, `probe` or `eval`."""
        if category not in self._spent:
            raise ConfigError(f"category={category!r} is unknown; choose one of {', '.join(LEDGER_CATEGORIES)}")
        if not flops >= 0:
            raise ConfigError(f"flops={flops!r} for {category!r} must be at least 0")
        self._spent[category] += float(flops)

    def __getitem__(self, category: str) -> float:
        return self._spent[category]

    @property
    def total(self) -> float:
        """FLOPs of all categories."""
        return sum(self._spent.values())

    def to_dict(self) -> dict[str, float]:
        """Every category and `total`."""
        return {**self._spent, "total": self.total}


def relative_flops(pairs: Iterable[tuple[float, float]]) -> float:
    """Sum of the parts over the sum of the wholes: the relative FLOPs of several tasks taken together."""
    part, whole = (sum(column) for column in zip(*pairs, strict=True))
    return part / whole
