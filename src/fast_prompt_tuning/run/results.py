"""The record of a run: one schema for every result, written to be audited, and how runs compare."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device),
        "threads": str(torch.get_num_threads()),
        **more,
    }
    for package in ("fast-prompt-tuning", "torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def save_result(result: RunResult, folder: str | Path) -> Path:
    """Write `result.json` into the run's folder."""
    path = Path(folder) / "result.json"
    write_atomic(path, json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    return path


def load_result(folder: str | Path) -> RunResult:
    """Read the result of a run's folder (or a result file).

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    path = Path(folder)
    path = path / "result.json" if path.is_dir() else path
    try:
        return RunResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no result of a run ({type(error).__name__})", file=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"not a run's result: {where}: {first['msg']}", file=str(path)) from None
