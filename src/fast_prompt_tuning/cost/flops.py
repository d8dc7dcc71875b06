"""What a training step computes: analytic FLOPs for any family × stage × batch shape.

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
* Where a text's keys and values are put together with those after it (`prompt.text_attention`), they get gradients that
  nothing uses, two score products more a layer.
* Norms, activations, softmax, position tables (rotary angles) and the optimizer step on the prompt are left out; they
  are below 1% except in toy models.
* Recomputation by gradient checkpointing is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from ..errors import ConfigError
from ..schedule.stages import Schedule, Stage
from .shapes import BatchShape, CostModel
from .work import Work

Convention = Literal["all", "linear"]

CONVENTIONS = ("all", "linear")
"""`all`: every matrix product of a step as we run it. `linear`: the paper's tool, linear layers only and the LM head at
every position (the authors' profiler is ptflops on `T5ForConditionalGeneration`, whose logits are never left out)."""


def _check_convention(convention: Convention) -> None:
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")


def _pass_flops(
    cost: CostModel, stage: Stage | None, shape: BatchShape, convention: Convention, whole_last_layer: bool = False
) -> tuple[float, float]:
    """FLOPs of `(forward, backward)` of one batch, as far as `stage` trains on it."""
    _check_convention(convention)
    shape = shape.at(stage)
    if shape.text_apart:
        return _apart_pass_flops(cost, stage, shape, convention)
    sizes = cost.sizes(stage)
    products = 1 if convention == "all" else 0
    full_logits = shape.full_logits or convention == "linear"
    forward = backward = 0.0
    source = shape.source_tokens if cost.seq2seq else shape.source_tokens + shape.target_tokens
    for name, stack in cost.stacks.items():
        layers, ffn = sizes[name]
        cross = stack.cross_width > 0
        length = shape.target_tokens if cross else source
        tokens = shape.batch * length
        linear = tokens * stack.linear(ffn)
        self_scores = products * tokens * length * stack.attention_width  # one product; a pass has two
        forward += tokens * stack.outside + layers * (linear + 2 * self_scores)
        if not cross:
            # The prompt is among the inputs of the first layer: everything after it passes a gradient back.
            backward += tokens * stack.outside + layers * (linear + 4 * self_scores)
            continue
        query, out = tokens * stack.cross_query, tokens * stack.cross_out
        kv = shape.batch * source * stack.cross_kv
        cross_scores = products * tokens * source * stack.cross_width
        forward += layers * (query + kv + out + 2 * cross_scores)
        # A gradient enters the decoder through the encoder states only. In its first layer nothing before the
        # cross-attention has one: no backward for self-attention, the cross-attention's query or its score product
        # with respect to the query.
        first = linear - tokens * stack.attention + kv + out + 3 * cross_scores
        backward += first + (layers - 1) * (linear + 4 * self_scores + query + kv + out + 4 * cross_scores)
    labels = shape.labels
    if full_logits:
        labels = shape.target_tokens if cost.seq2seq else source
    elif not cost.seq2seq and not whole_last_layer:
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
    name = "encoder" if cost.seq2seq else next(iter(cost.stacks))
    stack, (layers, ffn) = cost.stacks[name], cost.sizes(stage)[name]
    scores = tokens * stack.attention_width if convention == "all" else 0
    each = stack.outside + layers * (stack.linear(ffn) + 2 * scores)
    if name == "decoder" and convention == "all":
        each -= stack.token_wise + stack.neuron * ffn  # of the last layer only keys and values are wanted
    once = 0.0
    if kept_cross and name == "encoder":
        decoder, (layers, ffn) = cost.stacks["decoder"], cost.sizes(stage)["decoder"]
        each += layers * decoder.cross_kv
        token = decoder.linear(ffn) + decoder.cross_query + decoder.cross_out
        scores = decoder.attention_width + tokens * decoder.cross_width if convention == "all" else 0
        once = decoder.outside + layers * (token + 2 * scores)
    return 2 * examples * (tokens * each + once)


def _apart_pass_flops(
    cost: CostModel, stage: Stage | None, shape: BatchShape, convention: Convention
) -> tuple[float, float]:
    """As `_pass_flops`, with the prompt after the text: a gradient passes through prompt and target only."""
    products = 1 if convention == "all" else 0
    seq2seq = cost.seq2seq
    name = "decoder" if seq2seq else next(iter(cost.stacks))
    stack, (layers, ffn) = cost.stacks[name], cost.sizes(stage)[name]
    # A decoder-only model is not run on the last target token, from which nothing is predicted.
    length = shape.prompt_tokens + shape.target_tokens - (0 if seq2seq else 1)
    tokens = shape.batch * length
    linear = tokens * stack.linear(ffn)
    scores = products * tokens * length * stack.attention_width
    text_scores = 0 if seq2seq else products * tokens * shape.input_tokens * stack.attention_width
    forward: float = tokens * stack.outside + layers * (linear + 2 * scores + 2 * text_scores)
    # Scores and weights of the text pass a gradient on, its keys and values have none.
    backward: float = tokens * stack.outside + layers * (linear + 4 * scores + 2 * text_scores)
    if seq2seq:
        projections = tokens * (stack.cross_query + stack.cross_out)
        cross_scores = products * tokens * shape.input_tokens * stack.cross_width
        kv = 0 if shape.kept_cross else shape.batch * shape.input_tokens * stack.cross_kv
        forward += layers * (projections + kv + 2 * cross_scores)
        backward += layers * (projections + 2 * cross_scores)  # the encoder's states have no gradient
    labels = shape.labels
    if shape.full_logits or convention == "linear":
        labels = length
    elif not seq2seq:
        left_out = shape.batch * (length - labels) * (stack.token_wise + stack.neuron * ffn)  # as in `_pass_flops`
        forward, backward = forward - left_out, backward - left_out
    logits = shape.batch * labels * cost.head
    examples, tokens, cross = shape.texts_run, shape.input_tokens, shape.kept_cross
    text = text_flops(cost, stage, examples, tokens, convention=convention, kept_cross=cross)
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


def step_flops(cost: CostModel, stage: Stage | None, shape: BatchShape, *, convention: Convention = "all") -> float:
    """FLOPs of one training step on one batch: forward, and backward with frozen weights.

    Args:
        stage: size of the partial PLM; None is the full model.
        shape: the padded batch.
        convention: `all` or `linear`, see `CONVENTIONS`.

    Raises:
        ScheduleError: the stage does not fit the model. ConfigError: unknown convention.
    """
    return sum(_pass_flops(cost, stage, shape, convention))


def work_flops(cost: CostModel, work: Work, stage: Stage | None = None) -> float:
    """FLOPs of the passes that ran at `stage` (None: the full model)."""
    # What ran had been cut by then: neither `batch` nor `length` of the stage is to cut it once more.
    stage = stage and replace(stage, batch=None, length=None)
    total = work.added
    total += sum(text_flops(cost, stage, t.examples, t.tokens, kept_cross=t.kept_cross) for t in work.texts)
    for ran in work.prompts:
        if ran.kind == "generation":
            once = generation_flops(cost, ran.shape, stage=stage)
        elif ran.kind == "step":
            once = step_flops(cost, stage, ran.shape)
        else:  # gradients of all weights cost one more pass than those of activations
            passes = 3 if ran.kind == "full_step" else 1
            once = passes * forward_flops(cost, stage, ran.shape)
        total += ran.times * once
    return total


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
    source, new = shape.source_tokens, shape.target_tokens
    text = 0.0
    if shape.text_apart:
        text = text_flops(cost, stage, shape.texts_run, shape.input_tokens, kept_cross=shape.kept_cross)
        source = shape.input_tokens
    macs = 0.0
    for name, stack in cost.stacks.items():
        layers, ffn = sizes[name]
        linear = stack.linear(ffn)
        cross = stack.cross_width > 0
        if not cross and not shape.text_apart:
            macs += source * (stack.outside + layers * (linear + 2 * source * stack.attention_width))
        if cross or not cost.seq2seq:
            seen = 0 if cross else source
            read = shape.prompt_tokens if shape.text_apart else 0  # in one pass, after what was seen
            macs += read * (stack.outside + layers * (linear + 2 * (seen + read) * stack.attention_width))
            keys = new * (seen + read) + new * (new + 1) / 2  # summed over the new tokens
            macs += new * stack.outside + layers * (new * linear + 2 * keys * stack.attention_width)
            if cross:
                keys = 0 if shape.text_apart and shape.kept_cross else source
                macs += layers * (keys * stack.cross_kv + (read + new) * (stack.cross_query + stack.cross_out))
                macs += layers * 2 * (read + new) * source * stack.cross_width
    return text + 2 * shape.batch * (macs + new * cost.head)


def relative_flops(pairs: Iterable[tuple[float, float]]) -> float:
    """Sum of the parts over the sum of the wholes: the relative FLOPs of several tasks taken together."""
    part, whole = (sum(column) for column in zip(*pairs, strict=True))
    return part / whole
