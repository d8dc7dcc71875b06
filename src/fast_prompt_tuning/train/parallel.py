"""What the processes of one run agree on: who writes, what the main one found, and when all of them stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from ..errors import ConfigError, FptError
from .launcher import end_with_launcher

T = TypeVar("T")

_way = "data"
"""How the processes share the work, as `train.parallel` has it; `start` sets it."""

_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
"""What errors say of a process that is gone."""


def launched() -> int:
    """Processes that torchrun or accelerate started for this run; 1 without them.

    Raises:
        ConfigError: the launcher asks for weights in parts, which the recipe says.
    """
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{name} is set: fpt does not take {what} from the launcher; launch it without, and set "
                "train.parallel=shard to hold a part of the PLM on each process"
            )
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: str | None, way: str = "data") -> str | None:
    """Join the other processes, if there are any.

    Args:
        device: the recipe's torch device, or None.
        way: they share the work, as `train.parallel` has it.

    Returns:
        This process's device: with several processes on CUDA, each has its own.
    """
    global _way
    end_with_launcher()
    if launched() == 1:
        return device
    _way = way
    from accelerate import PartialState  # here: it joins the processes' group, which a single one needs not

    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu)
    return str(state.device) if device is None or (device == "cuda" and not cpu) else device


def stop() -> None:
    """Leave the group of processes, at the very end."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def in_parts() -> str | None:
    """The way in which each process holds a part of the weights; None where each holds all of them."""
    return None if size() == 1 or _way == "data" else _way


def shares() -> int:
    """Shares of each batch: one per process, or a single one where all compute every example together."""
    return 1 if in_parts() == "tensor" else size()


def size() -> int:
    """Processes in this run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; 0 is the main one, which alone writes files."""
    return distributed.get_rank() if size() > 1 else 0


def _device() -> torch.device:
    on_gpu = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _reduced(number: int, how: Any) -> int:
    if size() == 1:
        return number
    reduced = torch.tensor([number], device=_device())
    distributed.all_reduce(reduced, op=how)
    return int(reduced.item())


def largest(number: int) -> int:
    """The largest `number` of all processes; every process must ask."""
    return _reduced(number, distributed.ReduceOp.MAX)


def total(number: int) -> int:
    """The sum of the `number` of all shares; every process must ask."""
    return number if shares() == 1 else _reduced(number, distributed.ReduceOp.SUM)


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Put the sum over all shares into each tensor; every process must ask, with as many."""
    if shares() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """`value` of every process, in order of rank; on every process."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of `items`; `merge` puts the shares' results together again.

    Processes that hold parts of the weights need one another at every pass: their shares are of one length, filled with
    the last item.
    """
    number = shares()
    mine = items[rank() % number :: number]
    short = in_parts() is not None and len(mine) < -(-len(items) // number)
    return [*mine, items[-1]] if short else mine


def rows_of(batch: Sequence[T]) -> Sequence[T]:
    """This process's rows of a batch: they follow one another."""
    number = shares()
    place = rank() % number
    return batch[len(batch) * place // number : len(batch) * (place + 1) // number]


def merge(mine: list[T], count: int) -> list[T]:
    """The results of `share` of every process, in the order of the `count` items."""
    merged: list[Any] = [None] * count
    for i, results in enumerate(gather(mine)[: shares()]):
        merged[i :: shares()] = results[: len(range(i, count, shares()))]
    return merged


def spent(flops: float) -> float:
    """The FLOPs of all shares; every process must ask."""
    return sum(gather(flops)[: shares()])


def computed(function: Callable[[], T]) -> T:
    """What `function`, which runs the PLM, gives: as `on_main`, but on every process where each holds a part of it."""
    return on_main(function) if in_parts() is None else function()


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives on the main process, handed to all; the others wait and do not call it.

    Raises:
        FptError: what the main process raised, on every process.
    """
    if size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer = [function(), None]
        except FptError as error:
            answer = [None, error]
    distributed.broadcast_object_list(answer, src=0, device=_device())
    if answer[1] is not None:
        raise answer[1]
    return answer[0]  # type: ignore[no-any-return]


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process can no longer be reached."""
    text = str(error).lower()
    return size() > 1 and (isinstance(error, distributed.DistError) or any(word in text for word in _LOST))
