"""What tests of a Trainer of the user's own share."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainingArguments, TrainingArguments


class Rows(Dataset):
    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {k: v[i] for k, v in self.batch.items()}


def arguments(folder: Any, seq2seq: bool = False, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(**{**defaults, **options})
