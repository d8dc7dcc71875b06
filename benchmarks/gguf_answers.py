"""Does llama.cpp answer with a run's prompt as `fpt` does? Greedy answers on a GGUF file, how many are equal.

    python benchmarks/gguf_answers.py MODEL.gguf runs/mine --out benchmarks/results/gguf_answers.json

`fpt` computes with the file's weights made whole; llama.cpp with the packed ones, and rounds its activations to 8 bits.
So answers may differ where two of them are nearly as likely: of each pair that differs, the report has the difference
of their log-probabilities under `fpt`'s model. Needs `pip install llama-cpp-python`, which builds llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from llama_cpp_client import Model
from vllm_client import placed

from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.prompt.generation import GenerationOptions
from fast_prompt_tuning.prompt.prompted import Input
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, place_of
from fast_prompt_tuning.recipe import override, settings_of
from fast_prompt_tuning.run.results import environment
from fast_prompt_tuning.run.session import input_ids_of, open_session


def compare(model: Model, folder: Path, examples: int) -> dict[str, Any]:
    """Greedy answers of both to a run's first test examples."""
    session = open_session(settings_of(folder, [override("model.dtype", "float32")]), ("test",))
    prompt, where, rows = load_prompt(folder), place_of(folder), session.encoded["test"]
    asked = list(zip(input_ids_of(session, rows), rows["n_tail"], strict=True))[:examples]
    prompted, most = session.prompted(prompt, where), session.max_target_tokens
    inputs = [Input(ids, tail) for ids, tail in asked]
    ours, _ = prompted.generate(inputs, session.tokenizer, GenerationOptions(max_new_tokens=most))
    theirs = [model.answer(placed(session, prompt, where, ids, tail), most) for ids, tail in asked]
    texts = [session.tokenizer.decode(ids).strip().split("\n")[0].strip() for ids in theirs]
    different = []
    for one, answer, text in zip(inputs, ours, texts, strict=True):
        if answer.text != text:
            targets = [
                session.tokenizer(f" {each}", add_special_tokens=False)["input_ids"] for each in (answer.text, text)
            ]
            found = prompted.likelihoods([one, one], targets, batch_size=1)
            different.append({"ours": answer.text, "theirs": text, "log_probability": found[0].value - found[1].value})
    return {
        "run": folder.name,
        "placement": where,
        "examples": len(asked),
        "equal": len(asked) - len(different),
        "different": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    model = Model(args.model)
    report = {
        "benchmark": "gguf_answers",
        "model": args.model.name,
        "llama_cpp_python": llama_cpp.__version__,
        "environment": environment("cpu"),
        "runs": [compare(model, run, args.examples) for run in args.runs],
    }
    for one in report["runs"]:
        print(f"{one['run']} ({one['placement']}): {one['equal']} of {one['examples']} answers are equal")
        for pair in one["different"]:
            print(f"  {pair['ours']!r} or {pair['theirs']!r}: {pair['log_probability']:+.3f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
