"""What a checkpoint must hold for a run to go on from it, checked as a whole before anything is computed.

Checksums say that files are as they were written, not by whom: anybody can write a manifest that fits. So every part
is compared with what this run would have written in its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from ..errors import CheckpointError, shown
from ..prompt.prompted import PromptedPLM
from ..recipe import OptimConfig
from . import checkpoint
from .optimizer import make_optimizer

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(allow_inf_nan=True)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Optim(_Part):
    optimizer: str


class _Recipe(_Part):
    optim: _Optim


class _Record(_Part):
    config: _Recipe
    flops: dict[str, Amount]
    train_seconds: Amount
    total_seconds: Amount


class _Logged(_Part):
    __pydantic_extra__: dict[str, Number | str | None]
    step: Count
    loss: Number = 0.0
    probe_loss: Number = 0.0


class _Evaluated(_Logged):
    train_flops: Amount
    train_seconds: Amount


class _State(_Part):
    log: list[dict[str, Any]]
    losses: list[Annotated[float, Field(allow_inf_nan=False)]]
    parts: Annotated[int, Field(ge=1, le=10**6)]
    skipped: Count
    skipped_in_a_row: Count


class _Best(_Part):
    value: Number


def _as(kind: Any, value: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except (ValidationError, RecursionError, OverflowError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "input": value, "msg": error}
        field = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(
            f"{where}: {field} is {shown(first['input'])}: {first['msg']}; use --overwrite, or remove this checkpoint"
        ) from None


def best_value(stored: checkpoint.Checkpoint) -> float:
    """The metric recorded with the best prompt.

    Raises:
        CheckpointError: there is none.
    """
    return float(_as(_Best, stored.record, str(stored.folder)).value)


def check(stored: checkpoint.Checkpoint, prompted: PromptedPLM, optim: OptimConfig) -> None:
    """Raise unless a run can go on from this checkpoint.

    Args:
        prompted: what is trained; only read.
        optim: the run's settings. The saved optimizer's state is not used where it is another optimizer's.

    Raises:
        CheckpointError: a part is missing, malformed, or not of this run's form.
    """
    folder, where, trained = stored.folder, str(stored.folder), prompted.trained
    record = _as(_Record, stored.record, f"{where}: {checkpoint.MANIFEST}")
    _check_state(checkpoint.load_state(folder, "loop"), f"{where}: loop")
    if not isinstance(checkpoint.load_state(folder, "process_0"), dict):
        raise CheckpointError(f"{where}: process_0 holds no state of random generators")
    if not prompted.whole:
        _like(checkpoint.load_state(folder, "good"), [p.detach() for p in trained], f"{where}: good")
    optimizer, rates = make_optimizer(trained, optim, 1)
    _like(checkpoint.load_state(folder, "scheduler"), rates.state_dict(), f"{where}: scheduler")
    saved = checkpoint.load_state(folder, "optimizer")
    if record.config.optim.optimizer == optim.optimizer:
        ours = optimizer.state_dict()
        _, used = _one_step(2, optim)  # an optimizer may add to its groups when it steps
        groups = [{**used.param_groups[0], "params": group["params"]} for group in ours["param_groups"]]
        _like(saved, {**ours, "state": ..., "param_groups": groups}, f"{where}: optimizer")
        _check_moments(saved["state"], trained, optim, f"{where}: optimizer")
    if prompted.whole:
        check_weights(folder, prompted.module)


def _check_state(state: Any, where: str) -> None:
    for i, line in enumerate(_as(_State, state, where).log):
        metrics = {name: value for name, value in line.items() if name.startswith("eval_")}
        _as(_Evaluated if metrics else _Logged, line, f"{where}: log.{i}")
        _as(dict[str, Number], metrics, f"{where}: log.{i}")


def _like(value: Any, pattern: Any, where: str) -> None:
    """Raise unless a value has the form of `own`: types, keys, lengths, shapes; numbers finite. `...` is anything."""
    fits = True
    if isinstance(pattern, torch.Tensor):
        fits = isinstance(value, torch.Tensor) and value.shape == pattern.shape and value.dtype == pattern.dtype
        fits = fits and bool(torch.isfinite(value).all())
    elif isinstance(pattern, Mapping):
        fits = isinstance(value, dict) and set(value) == set(pattern)
        for key in pattern if fits else ():
            _like(value[key], pattern[key], f"{where}.{key}")
    elif isinstance(pattern, (list, tuple)):
        fits = type(value) is type(pattern) and len(value) == len(pattern)
        for i in range(len(pattern)) if fits else ():
            _like(value[i], pattern[i], f"{where}.{i}")
    elif isinstance(pattern, (int, float)) and not isinstance(pattern, bool):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    elif pattern is not ...:
        fits = type(value) is type(pattern)
    if not fits:
        raise CheckpointError(
            f"{where} is {_described(value)}, this run's is {_described(pattern)}; use --overwrite or remove the "
            "checkpoint"
        )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        finite = "" if torch.isfinite(value).all() else ", not finite"
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}{finite}"
    return shown(value)


def _one_step(dimensions: int, optim: OptimConfig) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A tiny parameter, and the optimizer that has made a step on it."""
    tiny = nn.Parameter(torch.ones([2] * dimensions))
    tiny.grad = torch.ones_like(tiny)
    scratch, _ = make_optimizer([tiny], optim, 1)
    scratch.step()
    return tiny, scratch


def _check_moments(state: Any, trained: Sequence[nn.Parameter], optim: OptimConfig, where: str) -> None:
    """What the optimizer remembers of each parameter: what one step on a tiny one leaves, in this one's sizes."""
    if not isinstance(state, dict) or not set(state) <= set(range(len(trained))):
        raise CheckpointError(f"{where}.state is not of this run's {len(trained)} parameters; use --overwrite")
    for i, moments in state.items():
        shape = tuple(trained[i].shape)
        tiny, scratch = _one_step(len(shape), optim)
        expected = scratch.state[tiny]
        if not isinstance(moments, dict) or not set(expected) <= set(moments):
            raise CheckpointError(f"{where}.state.{i} lacks {', '.join(expected)}; use --overwrite")
        shapes = {(), shape, shape[:-1], shape[:-2] + shape[-1:], (math.prod(shape),)}
        for name, value in moments.items():
            tensor = isinstance(value, torch.Tensor)
            if tensor != isinstance(expected[name], torch.Tensor) if name in expected else False:
                fits = False
            elif tensor:
                ranks = {expected[name].ndim} if name in expected else {0, len(shape)}
                fits = tuple(value.shape) in shapes and value.ndim in ranks and value.is_floating_point()
                fits = fits and bool(torch.isfinite(value).all())
            else:
                fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not fits:
                raise CheckpointError(
                    f"{where}.state.{i}.{name} is {_described(value)}, of a parameter {shape}; use --overwrite"
                )


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise unless a folder holds a whole model's weights: safetensors alone, and of this model's shapes.

    Raises:
        CheckpointError: they are missing, cannot be read, or are another model's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = sorted(folder.glob("model*.safetensors"))
    try:
        PreTrainedConfig.from_json_file(str(folder / "config.json"))
        index = folder / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        if not files or named != {file.name for file in files}:
            raise CheckpointError(f"{str(folder)!r} lacks the weights it should have: {', '.join(sorted(named))}")
        for file in files:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    shape = tuple(opened.get_slice(name).get_shape())
                    if shapes.get(name) != shape:
                        raise CheckpointError(
                            f"{str(file)!r}: {name} is {shape}, this model's is {shapes.get(name)}; use --overwrite"
                        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{str(folder)!r}: its weights cannot be read ({type(error).__name__})") from error
