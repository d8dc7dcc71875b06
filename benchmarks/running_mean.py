"""What the running mean of a prompt is worth beside its last value: both of the same run, at the same steps.

    python benchmarks/running_mean.py --runs smollm2/headlines/pt,gemma/topics/auto
    python benchmarks/running_mean.py --summary

Runs are those of `quality/run.py` with the rate tuned there, on its tuning split: examples that are neither trained nor
tested on. The prompt after every step is kept, and the means that `EmaCallback` makes of them are scored afterwards;
they change no step. (`auto` probes the last prompt here; with `optim.ema_decay` it would probe the mean, and a stage
that it gives up would leave none behind.) One JSON file holds all runs; what is in it is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent / "quality"))
import run as grid

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import evaluate, open_session

RESULTS = Path(__file__).parent / "results" / "running_mean.json"
DECAYS = (0.8, 0.9, 0.95)
PLACES = (0.8, 0.9, 1.0)
"""Parts of a run after which its prompts are scored."""


class Prompts(TrainerCallback):
    """The prompt before the first step, and after every one."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found.append(prompt_parameter(model).detach().clone())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found.append(prompt_parameter(model).detach().clone())


def mean_after(prompts: list[torch.Tensor], steps: int, decay: float) -> torch.Tensor:
    """The running mean `(P, H)` after so many steps, as `EmaCallback` has it; `prompts[0]` is the one before them."""
    mean = prompts[0]
    for step in range(1, steps + 1):
        mean = torch.lerp(prompts[step], mean, min(decay, (1 + step) / (10 + step)))
    return mean


def measure(model: str, task_name: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    rate = grid.best_rate(grid.tried_rates(args.grid, model, task_name, method))
    with tempfile.TemporaryDirectory(prefix="fpt-mean-") as work:
        settings = grid.settings_of(model, task_name, method, rate, seed, args, Path(work), tuning=True)
        recipe = config.load(settings)
        session, kept = open_session(recipe, ("train", "validation")), Prompts()
        result = run.train(recipe, session=session, callbacks=[kept])
        score = lambda prompt: evaluate(session, session.prompted(prompt)).result.values[result.primary]  # noqa: E731
        steps = [round(place * result.steps) for place in PLACES]
        return {
            **{"model": model, "task": task_name, "method": method, "seed": seed, "rate": rate},
            "metric": result.primary,
            "steps": steps,
            "last": [score(kept.found[step]) for step in steps],
            "mean": {str(d): [score(mean_after(kept.found, step, d)) for step in steps] for d in DECAYS},
            "environment": result.environment,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the quality after 80, 90 and 100% of the steps."""
    several = lambda values: ", ".join(f"{v:.1f}" for v in values)  # noqa: E731
    lines = ["| model | task | method | last prompt | mean of decay 0.9 |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['task']} | {r['method']} | {several(r['last'])} | {several(r['mean']['0.9'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=lambda text: text.split(","), default=[], help="MODEL/TASK/METHOD,…")
    parser.add_argument("--seed", type=int, default=grid.TUNE_SEED)
    parser.add_argument("--squad", type=Path, help="SQuAD 2.0 in the official JSON format")
    parser.add_argument("--reviews", type=Path, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("--grid", type=Path, default=grid.HERE / "results", help="where the tuned rates are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--summary", action="store_true", help="print the table of the results and end")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    if args.summary:
        print(table(rows))
        return
    quiet_libraries()
    done = {(r["model"], r["task"], r["method"], r["seed"]) for r in rows}
    for name in args.runs:
        model, task, method = name.split("/")
        if (model, task, method, args.seed) not in done:
            rows.append(measure(model, task, method, args.seed, args))
            write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
