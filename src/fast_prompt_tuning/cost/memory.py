"""What a stage takes in memory: weights, kept texts, activations."""

from __future__ import annotations

from ..schedule.stages import Stage
from .shapes import BatchShape, CostModel


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
    if cost.seq2seq and kept_cross:
        width = 2 * cost.stacks["decoder"].cross_width
        return int(dtype_bytes * tokens * cost.sizes(stage)["decoder"].layers * width)
    if cost.seq2seq:
        return int(dtype_bytes * tokens * cost.stacks["encoder"].d_model)
    name = next(iter(cost.stacks))
    return int(dtype_bytes * tokens * cost.sizes(stage)[name].layers * cost.stacks[name].kv_width)


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
    seq2seq = cost.seq2seq
    apart = shape.text_apart
    source = shape.source_tokens if seq2seq else shape.source_tokens + shape.target_tokens
    if apart:
        source = shape.input_tokens
    total = 0.0
    for name, stack in cost.stacks.items():
        layers, ffn = sizes[name]
        cross = stack.cross_width > 0
        length = shape.target_tokens if cross else source
        cross_source: float = 0
        seen = 0  # text tokens among the keys
        if apart:
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
        activations = length * per_token + cross_source + (scores if keep_scores or seen else 0)
        # Attention to a kept text keeps its weights in float32, too (`prompt.text_attention`).
        norms = 4 * length * stack.d_model * (3 if cross else 2) + (4 * scores if seen else 0)
        total += shape.batch * layers * (dtype_bytes * activations + norms)
    labels = shape.labels
    if shape.full_logits:
        labels = length if apart else shape.target_tokens if seq2seq else source
    return int(total + shape.batch * labels * cost.vocab * (dtype_bytes + 8))
