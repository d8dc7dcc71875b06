"""Experiment trackers, through `accelerate`."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator

from ..recipe import RunConfig


def open_trackers(config: RunConfig, folder: Path | None) -> Accelerator:
    """What `train.report_to` names, ready to be logged to; every process opens them, the main one writes.

    TensorBoard's files go into `$TENSORBOARD_LOGGING_DIR`, by default `runs` beside the checkpoints. The project is
    `$WANDB_PROJECT`, by default `fast-prompt-tuning`.
    """
    place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str((folder or Path(config.output)) / "runs")
    accelerator = Accelerator(log_with=list(config.train.report_to), project_dir=place)
    settings = {"config": config.model_dump(mode="json")}
    project = os.environ.get("WANDB_PROJECT", "fast-prompt-tuning")
    accelerator.init_trackers(project, init_kwargs={"wandb": settings, "trackio": settings})
    return accelerator
