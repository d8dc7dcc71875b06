"""What each of several devices holds and sends, where they share a run in one of the ways of `train.parallel`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from .memory import activation_bytes
from .shapes import BatchShape, CostModel

Way = Literal["data", "shard", "tensor"]
"""`data`: each device holds the whole model. `shard`: a part of each layer, gathered to run it. `tensor`: all devices
compute each layer together."""
WAYS: tuple[Way, ...] = get_args(Way)

ROOM = 0.9
"""The part of a device's memory that a plan fills: the rest is for the allocator, kernels and the driver."""
GATHERED = 2
"""Layers that a device of `shard` holds whole: the one that runs, and the next, which is on its way."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One device's part of a run, in bytes.

    Args:
        weights, activations: as `memory` estimates them.
        texts: states of its texts, where they are kept.
        received: from other devices, in a step.
    """

    way: Way
    devices: int
    weights: float
    activations: float
    texts: float
    received: float

    @property
    def memory(self) -> float:
        """All that it holds."""
        return self.weights + self.activations + self.texts


def share(
    cost: CostModel,
    way: Way,
    devices: int,
    shape: BatchShape,
    *,
    accumulate: int = 1,
    texts: float = 0,
    dtype_bytes: float = 2,
) -> Share:
    """A device's share of a step on the full model.

    With `tensor` all devices compute one batch; otherwise each computes one of its own. An all-reduce of n bytes over D
    devices receives 2n(D−1)/D (a ring); a layer computed in parts takes two of its output going forward and two going
    backward, one more each for cross-attention (Shoeybi et al. 2019, Megatron-LM, section 3).

    Args:
        shape: the padded shape of a batch.
        accumulate: batches of a step.
        texts: bytes that the states of all training texts take together; 0 where none are kept.
        dtype_bytes: bytes of a weight and of an activation.
    """
    others = (devices - 1) / devices
    width = next(iter(cost.stacks.values())).d_model
    received = 2 * others * 4 * shape.prompt_tokens * width  # the prompt's gradient, in float32
    layers = {name: dtype_bytes * s.layers * s.layer_params for name, s in cost.stacks.items()}
    whole = dtype_bytes * cost.params
    activations = activation_bytes(cost, None, shape, dtype_bytes=dtype_bytes)
    kept = texts / devices
    if way == "data" or devices == 1:
        return Share(way=way, devices=devices, weights=whole, activations=activations, texts=kept, received=received)
    runs = {name: size for name, size in layers.items() if name != "encoder" or not shape.text_apart}
    if way == "shard":
        outside = whole - sum(layers.values())
        gathered = GATHERED * max(dtype_bytes * s.layer_params for s in cost.stacks.values())
        weights = outside + sum(layers.values()) / devices + gathered
        received += accumulate * 2 * others * sum(runs.values())
    else:
        weights = whole / devices
        activations = activation_bytes(_part(cost, devices), None, shape, dtype_bytes=dtype_bytes)
        reduced = sum(
            cost.stacks[name].layers * (6 if cost.stacks[name].cross_width else 4) * _tokens(cost, name, shape)
            for name in runs
        )
        received = accumulate * 2 * others * dtype_bytes * shape.batch * width * reduced
    return Share(way=way, devices=devices, weights=weights, activations=activations, texts=kept, received=received)


def fewest(cost: CostModel, way: Way, memory: float, most: int, shape: BatchShape, **options: float) -> Share | None:
    """The share of the fewest devices of `memory` bytes, at most `most` of them, that hold the run; None if too few."""
    for devices in range(1, most + 1):
        if way == "tensor" and not divides(cost, devices):
            continue
        found = share(cost, way, devices, shape, **options)  # type: ignore[arg-type]
        if found.memory <= ROOM * memory:
            return found
    return None


def divides(cost: CostModel, devices: int) -> bool:
    """Whether so many devices can each take as many heads, of queries and of keys, and as many FFN neurons."""
    for stack in cost.stacks.values():
        keys = stack.kv_width * stack.heads // (2 * stack.attention_width)
        if any(number % devices for number in (stack.heads, keys, stack.ffn)):
            return False
    return True


def _part(cost: CostModel, devices: int) -> CostModel:
    """What one device of `tensor` computes."""
    names = ("ffn", "attention_width", "kv_width", "heads", "cross_width")
    stacks = {
        stack: replace(s, **{name: -(-getattr(s, name) // devices) for name in names})
        for stack, s in cost.stacks.items()
    }
    return replace(cost, stacks=stacks, vocab=-(-cost.vocab // devices))


def _tokens(cost: CostModel, stack: str, shape: BatchShape) -> float:
    """Tokens of an example that run through a stack in a step."""
    if cost.seq2seq and stack == "decoder":
        return shape.target_tokens + (shape.prompt_tokens if shape.text_apart else 0)
    if shape.text_apart:
        return shape.prompt_tokens + shape.target_tokens
    return shape.source_tokens + (0 if cost.seq2seq else shape.target_tokens)
