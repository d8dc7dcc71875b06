"""Whether other people's programs answer with a run's prompt as `fpt` does: how many answers are equal.

Inputs are the run's test examples as they were cut for it, turned back into text. Runs of labels are given to
lm-evaluation-harness, runs whose answers are written to `transformers.pipeline`. Other runs' results stay in the file.

python benchmarks/engines.py runs/demo/plain runs/demo/auto
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import pipeline

from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.engines.lm_eval import PromptedLM
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.prompt.generation import GenerationOptions
from fast_prompt_tuning.prompt.prompted import Input
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, place_of
from fast_prompt_tuning.prompt.suffix_model import load_soft_prompt
from fast_prompt_tuning.recipe import settings_of
from fast_prompt_tuning.run.results import environment
from fast_prompt_tuning.run.session import Session, input_ids_of, open_session, predict

COMMITTED = Path(__file__).parent / "results" / "engines.json"


def compare(folder: Path) -> dict[str, Any]:
    """The other program's answers to the test examples against ours."""
    session = open_session(settings_of(folder), ("test",))
    found = labels_of_lm_eval(session, folder) if session.choices else texts_of_pipeline(session, folder)
    return {
        "run": folder.name,
        "placement": place_of(folder),
        "task": session.task.name,
        "examples": len(session.examples["test"]),
        **found,
        "environment": environment(session.plm.device, dtype=str(session.plm.dtype).removeprefix("torch.")),
    }


def labels_of_lm_eval(session: Session, folder: Path) -> dict[str, Any]:
    """The label that lm-evaluation-harness finds likeliest."""
    rows = session.encoded["test"]
    predictions, answers, _ = predict(session, session.prompted(load_prompt(folder), place_of(folder)), rows)
    model, texts = PromptedLM(str(folder)), session.task.choices(decoder=session.decoder)
    inputs = [session.tokenizer.decode(ids) for ids in input_ids_of(session, rows)]
    asked = [(text, target) for text in inputs for target in texts.values()]
    scores = iter(model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked]))
    tables = [{word: next(scores)[0] for word in texts} for _ in rows]
    return {
        "engine": "lm_eval",
        "equal": sum(max(table, key=table.__getitem__) == a for table, a in zip(tables, answers, strict=True)),
        "largest_difference": max(
            abs(value - (p.label_scores or {})[word])
            for table, p in zip(tables, predictions, strict=True)
            for word, value in table.items()
        ),
    }


def texts_of_pipeline(session: Session, folder: Path) -> dict[str, Any]:
    """What a pipeline of `transformers` writes, greedily."""
    rows, where = session.encoded["test"], place_of(folder)
    asked = [Input(*each) for each in zip(input_ids_of(session, rows), rows["n_tail"], strict=True)]
    prompted = session.prompted(load_prompt(folder), where)
    most = session.max_target_tokens
    ours, _ = prompted.generate(asked, session.tokenizer, GenerationOptions(max_new_tokens=most))
    pipe = pipeline("text-generation", model=load_soft_prompt(session.plm, folder), tokenizer=session.tokenizer)
    options = {"max_new_tokens": most, "do_sample": False, "return_full_text": False}
    equal = 0
    for row, answer in zip(asked, ours, strict=True):
        placed = {"n_after": row.tail} if prompted.spec().needs_tail else {}
        (found,) = pipe(session.tokenizer.decode(row.ids), **options, **placed)
        equal += found["generated_text"].strip() == answer.text
    return {"engine": "pipeline", "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=COMMITTED)
    args = parser.parse_args()
    quiet_libraries()
    results = [compare(folder) for folder in args.runs]
    names = {r["run"] for r in results}
    kept = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else []
    results = [r for r in kept if r["run"] not in names] + results
    write_atomic(args.output, json.dumps(results, indent=1) + "\n")
    for r in results:
        print(f"{r['run']} ({r['placement']}): {r['equal']} of {r['examples']} answers of {r['engine']} equal")


if __name__ == "__main__":
    main()
