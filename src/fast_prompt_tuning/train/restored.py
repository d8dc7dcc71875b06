"""What a checkpoint must hold for a run to go on from it, checked as a whole before anything is computed.

Checksums say that files are as they were written, not by whom: anybody can write a manifest that fits. So every part
is compared with what this run would have written in its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..errors import CheckpointError, shown
from ..recipe import OptimConfig
from . import checkpoint
from .trainer import make_optimizer

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


Every = Annotated[float, Field(ge=1, le=1e15)]


class _State(_Part):
    epoch: Amount
    global_step: Count
    max_steps: Count
    num_train_epochs: Count
    logging_steps: Every
    eval_steps: Every
    save_steps: Every
    train_batch_size: Count | None
    total_flos: Amount
    num_input_tokens_seen: Count
    best_metric: Number | None
    best_global_step: Count | None
    best_model_checkpoint: str | None
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_hyper_param_search: bool
    stateful_callbacks: dict[str, Any]
    log_history: list[dict[str, Any]]


class _Counts(_Part):
    parts: Annotated[int, Field(ge=1, le=10**6)]
    skipped: Count
    skipped_in_a_row: Count
    logged: Count
    lost: Count = Field(alias="_lost")


class _Process(_Part):
    random: dict[str, Any]
    loss: Annotated[float, Field(allow_inf_nan=False)]


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


def best_value(found: checkpoint.Checkpoint) -> float:
    """The metric recorded with the best prompt.

    Raises:
        CheckpointError: there is none.
    """
    return float(_as(_Best, found.record, str(found.folder)).value)


def check(
    found: checkpoint.Checkpoint, model: nn.Module, trained: Sequence[nn.Parameter], optim: OptimConfig, *, full: bool
) -> None:
    """Raise unless a run can go on from this checkpoint.

    Args:
        model: the PLM or the prompted model; only read.
        trained: the parameters that are trained.
        optim: the run's settings. The saved optimizer's state is not used where it is another optimizer's.
        full: all weights are trained.

    Raises:
        CheckpointError: a part is missing, malformed, or not of this run's form.
    """
    folder, where = found.folder, str(found.folder)
    record = _as(_Record, found.record, f"{where}: {checkpoint.MANIFEST}")
    _check_trainer_state(folder / TRAINER_STATE_NAME, found.step)
    _as(_Counts, checkpoint.load_state(folder, "counts"), f"{where}: counts")
    _as(_Process, checkpoint.load_state(folder, "process_0"), f"{where}: process_0")
    good = checkpoint.load_state(folder, "good") if (folder / "good.json").is_file() else []
    if not full:
        _like(good, [p.detach() for p in trained], f"{where}: good")
    optimizer, rates = make_optimizer(trained, optim)
    _like(checkpoint.load_state(folder, "scheduler"), rates.state_dict(), f"{where}: scheduler")
    saved = checkpoint.load_state(folder, "optimizer")
    if record.config.optim.optimizer == optim.optimizer:
        _like(saved, {**optimizer.state_dict(), "state": ...}, f"{where}: optimizer")
        _check_moments(saved["state"], trained, optim, f"{where}: optimizer")
    if full:
        check_weights(folder, model)


def _check_trainer_state(path: Path, step: int) -> None:
    where = str(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read ({type(error).__name__})") from error
    state = _as(_State, found, where)
    if odd := sorted(set(found) - {f.name for f in fields(TrainerState)}):
        raise CheckpointError(f"{where}: {odd[0]} is no field of it")
    if state.global_step != step:
        raise CheckpointError(f"{where}: global_step is {state.global_step}, the checkpoint's is {step}")
    for i, line in enumerate(state.log_history):
        metrics = {name: value for name, value in line.items() if name.startswith("eval_")}
        _as(_Evaluated if metrics else _Logged, line, f"{where}: log_history.{i}")
        _as(dict[str, Number], metrics, f"{where}: log_history.{i}")


def _like(value: Any, own: Any, where: str) -> None:
    """Raise unless a value has the form of `own`: types, keys, lengths, shapes; numbers finite. `...` is anything."""
    fits = True
    if isinstance(own, torch.Tensor):
        fits = isinstance(value, torch.Tensor) and value.shape == own.shape and value.dtype == own.dtype
        fits = fits and bool(torch.isfinite(value).all())
    elif isinstance(own, Mapping):
        fits = isinstance(value, dict) and set(value) == set(own)
        for key in own if fits else ():
            _like(value[key], own[key], f"{where}.{key}")
    elif isinstance(own, (list, tuple)):
        fits = type(value) is type(own) and len(value) == len(own)
        for i in range(len(own)) if fits else ():
            _like(value[i], own[i], f"{where}.{i}")
    elif isinstance(own, (int, float)) and not isinstance(own, bool):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    elif own is not ...:
        fits = type(value) is type(own)
    if not fits:
        raise CheckpointError(
            f"{where} is {_described(value)}, this run's is {_described(own)}; use --overwrite or remove the checkpoint"
        )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        finite = "" if torch.isfinite(value).all() else ", not finite"
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}{finite}"
    return shown(value)


def _check_moments(state: Any, trained: Sequence[nn.Parameter], optim: OptimConfig, where: str) -> None:
    """What the optimizer remembers of each parameter: what one step on a tiny one leaves, in this one's sizes."""
    if not isinstance(state, dict) or not set(state) <= set(range(len(trained))):
        raise CheckpointError(f"{where}.state is not of this run's {len(trained)} parameters; use --overwrite")
    for i, mine in state.items():
        shape = tuple(trained[i].shape)
        tiny = nn.Parameter(torch.zeros([2] * len(shape)))
        tiny.grad = torch.zeros_like(tiny)
        scratch, _ = make_optimizer([tiny], optim)
        scratch.step()
        own = scratch.state[tiny]
        if not isinstance(mine, dict) or not set(own) <= set(mine):
            raise CheckpointError(f"{where}.state.{i} lacks {', '.join(own)}; use --overwrite")
        shapes = {(), shape, shape[:-1], shape[:-2] + shape[-1:]}
        for name, value in mine.items():
            tensor = isinstance(value, torch.Tensor)
            if tensor != isinstance(own[name], torch.Tensor) if name in own else False:
                fits = False
            elif tensor:
                ranks = {own[name].ndim} if name in own else {0, len(shape)}
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
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
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
                    if own.get(name) != shape:
                        raise CheckpointError(
                            f"{str(file)!r}: {name} is {shape}, this model's is {own.get(name)}; use --overwrite"
                        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{str(folder)!r}: its weights cannot be read ({type(error).__name__})") from error
