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


def losses(recipe: dict, break_at: int | None = None, *, goes_on: bool = True, moved: bool = False) -> dict:
    """Make a run, broken off after the step `break_at`, and resumed unless it does not go on.

    Args:
        moved: the run goes on from a checkpoint that another number of processes wrote.
    """
    config = load(recipe)
    if break_at is not None:
        with contextlib.suppress(InterruptedError):
            run.train(config, callbacks=[Break(break_at)])
        if not goes_on:
            return {}
    result = run.train(config, resume=break_at is not None or moved, allow_changed=moved)
    return {"losses": [v for _, v in result.losses], "metrics": result.metrics, "flops": result.flops}


if __name__ == "__main__":
    found = [losses(**one) for one in json.loads(Path(sys.argv[1]).read_text())]
    if parallel.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    parallel.stop()
