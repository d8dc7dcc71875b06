"""Prompts that are trained as something else than their vectors, and folded into vectors when the run ends.

    python benchmarks/reparametrised.py
    python benchmarks/reparametrised.py --summary       # the table, from the committed JSON alone

  vectors      the prompt itself, from vocabulary embeddings
  superposed   each vector is a weighted sum of the same 128 vocabulary embeddings; weights and embeddings are trained
               (SadraeiJavaeri et al. 2024, "SuperPos-Prompt")
  residual     each vector x is x + MLP(x), one MLP of 64 hidden units for all (Razdaibiedina et al. 2023, "Residual
               Prompt Tuning"); without its layer norm, and its last layer starts at zero

All three start as the same vectors, stand after texts of 32 tokens, and take the same batches, 60 steps of 8, with
Prodigy. Loss per target token on 48 test examples. One JSON file a task and seed; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grown_placement as grown
import torch
from grown_placement import grid, study
from signal_study import HELD_OUT, in_batches, labels_of, token_loss
from torch import nn
from transformers import set_seed

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.run.preparation import trainable
from fast_prompt_tuning.run.results import environment
from fast_prompt_tuning.run.session import Session, open_session
from fast_prompt_tuning.train.batches import Batches, make_collator
from fast_prompt_tuning.train.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results" / "reparametrised"
SUPERPOSED, HIDDEN = 128, 64


class Vectors(nn.Module):
    def __init__(self, start: torch.Tensor, vocabulary: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(start.clone())

    def forward(self) -> torch.Tensor:
        return self.vectors


class Superposed(nn.Module):
    def __init__(self, start: torch.Tensor, vocabulary: torch.Tensor):
        super().__init__()
        drawn = vocabulary[torch.randperm(len(vocabulary))[: SUPERPOSED - len(start)]]
        self.embeddings = nn.Parameter(torch.cat([start, drawn]).clone())
        self.weights = nn.Parameter(torch.eye(len(start), SUPERPOSED))

    def forward(self) -> torch.Tensor:
        return self.weights @ self.embeddings


class Residual(nn.Module):
    def __init__(self, start: torch.Tensor, vocabulary: torch.Tensor):
        super().__init__()
        width = start.shape[1]
        self.vectors = nn.Parameter(start.clone())
        self.mlp = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self) -> torch.Tensor:
        return self.vectors + self.mlp(self.vectors)


FORMS = {"vectors": Vectors, "superposed": Superposed, "residual": Residual}


def tuned(session: Session, form: str, start: torch.Tensor, held_out: Any) -> list[list[float]]:
    """[step, held-out loss] of a run."""
    settings, plm = session.config, session.plm
    set_seed(settings.train.seed)
    prompt = FORMS[form](start, plm.get_input_embeddings().weight.detach())
    optimizer, rates = make_optimizer(prompt.parameters(), settings.optim, settings.train.steps)
    batches = Batches(session.encoded["train"], make_collator(session.tokenizer, plm, tails=True), settings.train)
    curve = []
    for step in range(settings.train.steps):
        for batch in batches.of(step):
            session.prompted(prompt()).loss(batch, labels_of([batch])).value.backward()
        nn.utils.clip_grad_norm_(prompt.parameters(), settings.optim.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % (settings.train.steps // 4) == 0:
            curve.append([step + 1, token_loss(session.prompted(prompt().detach()), held_out)])
    return curve


def one(task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    started, named = time.time(), grown.TASKS[task]
    study.TASKS[named] = grid.TASKS[named] = grid.TASKS[task]
    with tempfile.TemporaryDirectory(prefix="fpt-reparametrised-") as folder:
        settings = study.settings_of("smollm2", named, "after-prodigy", 1.0, seed, args, Path(folder))
        settings["data"]["validation_limit"] = HELD_OUT
        session = open_session(config.load(settings), ("train", "validation"))
    held_out = in_batches(session, session.encoded["validation"])
    start = trainable(session).parameter.detach().clone()
    curves = {}
    for form in FORMS:
        curves[form] = tuned(session, form, start, held_out)
        print(task, seed, form, curves[form], flush=True)
    return {
        **{"model": "smollm2", "task": task, "seed": seed, "curves": curves},
        "minutes": (time.time() - started) / 60,
        "environment": {**environment(session.plm.device), "processor": grid.machine()["processor"]},
    }


def summary(out: Path) -> str:
    lines = ["| task | trained as | half-way | final loss, each seed | mean |", "|" + " --- |" * 5]
    for task in grown.TASKS:
        cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"{task}-*.json"))]
        for form in FORMS if cells else ():
            half = statistics.fmean(cell["curves"][form][1][1] for cell in cells)
            ends = [cell["curves"][form][-1][1] for cell in cells]
            each = ", ".join(f"{end:.3f}" for end in ends)
            lines.append(f"| {task} | {form} | {half:.3f} | {each} | {statistics.fmean(ends):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    grown.cells(__doc__, ["headlines"], [0, 1], RESULTS, one, summary)
