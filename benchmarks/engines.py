"""Whether other people's programs answer with a run's prompt as `fpt` does: how many answers are equal.

Inputs are the run's test examples as they were cut for it, turned back into text.

python benchmarks/engines.py runs/demo/plain runs/demo/auto      # runs of labels, with test examples
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.engines.lm_eval import PromptedLM
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, place_of
from fast_prompt_tuning.recipe import settings_of
from fast_prompt_tuning.run.results import environment
from fast_prompt_tuning.run.session import input_ids_of, open_session, predict

COMMITTED = Path(__file__).parent / "results" / "engines.json"


def compare(folder: Path) -> dict[str, Any]:
    """The label that lm-evaluation-harness finds likeliest against `fpt eval`'s, on the test examples."""
    session = open_session(settings_of(folder), ("test",))
    rows, where = session.examples["test"], place_of(folder)
    predictions, answers, _ = predict(session, session.prompted(load_prompt(folder), where), session.encoded["test"])
    model, texts = PromptedLM(str(folder)), session.task.choices(decoder=session.decoder)
    inputs = [session.tokenizer.decode(ids) for ids in input_ids_of(session, session.encoded["test"])]
    asked = [(text, target) for text in inputs for target in texts.values()]
    scores = iter(model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked]))
    tables = [{word: next(scores)[0] for word in texts} for _ in rows]
    return {
        "run": folder.name,
        "placement": where,
        "task": session.task.name,
        "examples": len(rows),
        "equal": sum(max(table, key=table.__getitem__) == a for table, a in zip(tables, answers, strict=True)),
        "largest_difference": max(
            abs(value - (p.label_scores or {})[word])
            for table, p in zip(tables, predictions, strict=True)
            for word, value in table.items()
        ),
        "environment": environment(session.plm.device, dtype=str(session.plm.dtype).removeprefix("torch.")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=COMMITTED)
    args = parser.parse_args()
    quiet_libraries()
    results = [compare(folder) for folder in args.runs]
    write_atomic(args.output, json.dumps(results, indent=1) + "\n")
    for r in results:
        print(f"{r['run']} ({r['placement']}): {r['equal']} of {r['examples']} labels equal")


if __name__ == "__main__":
    main()
