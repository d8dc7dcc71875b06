"""The record of a run: one schema for every result, written to be audited, and how runs compare."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import DataError
from ..files import write_atomic


class Point(BaseModel):
    """The full PLM under the run's prompt after `step` steps: metrics in percent, cost so far."""

    step: int
    metrics: dict[str, float]
    train_flops: float
    train_seconds: float


class RunResult(BaseModel):
    """What a run was and what came of it. FLOPs are absolute; seconds are wall clock.

    `train_seconds` are those of scoring, probes and training steps, `total_seconds` of evaluation and saving, too.

    `metrics` and `intervals` are of the run's last prompt on `split`; `curve` is on the validation split throughout.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    schema_version: int = 1
    name: str
    method: str
    status: Literal["finished", "interrupted", "stopped", "evaluated"]
    reason: str | None = None
    config: dict[str, Any]
    schedule: list[dict[str, Any]]
    boundaries: list[int]
    kept_layers: list[dict[str, list[int]]] = Field(default_factory=list)
    steps: int
    skipped_steps: int = 0
    primary: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    split: str = "validation"
    examples: int
    best_step: int
    curve: list[Point]
    losses: list[tuple[int, float]] = Field(default_factory=list)
    flops: dict[str, float]
    train_seconds: float
    total_seconds: float
    prompt_folder: str | None = None
    fingerprints: dict[str, str]
    environment: dict[str, str]


def environment(device: Any, **more: str) -> dict[str, str]:
    """Versions and device that a measurement depends on, and what else the caller knows of."""
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device),
        "threads": str(torch.get_num_threads()),
        **more,
    }
    for package in ("fast-prompt-tuning", "torch", "transformers", "peft", "accelerate"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def save_result(result: RunResult, folder: str | Path) -> Path:
    """Write `result.json` into the run's folder."""
    path = Path(folder) / "result.json"
    write_atomic(path, json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    return path


def load_result(folder: str | Path) -> RunResult:
    """Read the result of a run's folder (or a result file). Characters that cannot be shown are replaced.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    path = Path(folder)
    path = path / "result.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError("no result of a run (no such file)", file=str(path))
    try:
        result = RunResult.model_validate(legible(json.loads(path.read_text(encoding="utf-8"))))
        _Checked.model_validate(result.model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"not a run's result: {where}: {first['msg']}", file=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no result of a run ({type(error).__name__})", file=str(path)) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise DataError(f"not a run's result: {error}", file=str(path)) from error
    return result


def legible(value: Any, depth: int = 0) -> Any:
    """A JSON value whose texts can be shown anywhere: control characters and half surrogate pairs become U+FFFD.

    Raises:
        ValueError: it is nested more than 40 deep.
    """
    if depth > 40:
        raise ValueError("nested more than 40 deep")
    if isinstance(value, str):
        return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {legible(k): legible(v, depth + 1) for k, v in value.items()}
    return [legible(v, depth + 1) for v in value] if isinstance(value, list) else value


_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# What pictures, tables and cards rely on, beyond the types: a result may have been written by anybody.
Real = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=10**7)]
Widths = Annotated[list[Width], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _CheckedPoint(_Part):
    step: Count
    metrics: dict[str, Real]
    train_flops: Amount
    train_seconds: Amount


class _CheckedStage(_Part):
    layers: Layers | dict[str, Layers]
    ffn: Width | Widths | dict[str, Width | Widths]
    steps: Count
    stacks: list[str] = ["decoder"]


class _CheckedModel(_Part):
    path: str
    revision: str | None = None


class _CheckedData(_Part):
    task: str | None = None
    files: dict[str, str] | None = None


class _CheckedPrompt(_Part):
    tokens: Count
    placement: str = "prefix"


class _CheckedConfig(_Part):
    model: _CheckedModel = _CheckedModel(path="")
    data: _CheckedData = _CheckedData()
    prompt: _CheckedPrompt = _CheckedPrompt(tokens=0)


class _Checked(_Part):
    config: _CheckedConfig
    schedule: Annotated[list[_CheckedStage], Field(max_length=1000)]
    boundaries: list[Count]
    kept_layers: list[dict[str, Annotated[list[Annotated[int, Field(ge=0, lt=10_000)]], Field(min_length=1)]]]
    steps: Count
    examples: Count
    best_step: Count
    primary: str
    metrics: dict[str, Real]
    intervals: dict[str, tuple[Real, Real]]
    curve: list[_CheckedPoint]
    losses: list[tuple[Count, float]]
    flops: dict[str, Amount]
    train_seconds: Amount
    total_seconds: Amount

    @model_validator(mode="after")
    def _agrees(self) -> _Checked:
        stacks = {name for stage in self.schedule for name in stage.stacks}
        wrong = {
            "primary": self.primary not in self.metrics,
            "intervals": not set(self.metrics) <= set(self.intervals),
            "curve": any(self.primary not in point.metrics for point in self.curve),
            "flops": not {"train", "score", "probe", "eval"} <= set(self.flops),
            "boundaries": len(self.boundaries) != len(self.schedule) or self.boundaries != sorted(self.boundaries),
            "schedule": bool(self.schedule) and not (stacks and sum(stage.steps for stage in self.schedule)),
            "stacks": any(
                isinstance(size, dict) and not stacks <= set(size)
                for stage in self.schedule
                for size in (stage.layers, stage.ffn)
            ),
        }
        if first := next((name for name, is_wrong in wrong.items() if is_wrong), None):
            raise ValueError(f"{first} does not agree with the rest")
        return self
