"""One process of a run of several: makes the runs listed in a JSON file, and the main one writes what came of them.

Started by the harness or a test with the environment that torchrun sets (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    python ranks.py RUNS.json RESULT.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from transformers import TrainerCallback

from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run
from fast_prompt_tuning.train import parallel


class Break(TrainerCallback):
    """Ends the run with an error, as if the machine had gone."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def losses(recipe: dict, break_at: int | None = None) -> dict:
    """Make a run, broken off after a step and resumed where `break_at` says so."""
    config = load(recipe)
    if break_at is not None:
        with contextlib.suppress(InterruptedError):
            run.train(config, callbacks=[Break(break_at)])
    result = run.train(config, resume=break_at is not None)
    return {"losses": [v for _, v in result.losses], "metrics": result.metrics, "flops": result.flops}


if __name__ == "__main__":
    found = [losses(**one) for one in json.loads(Path(sys.argv[1]).read_text())]
    if parallel.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    parallel.stop()
