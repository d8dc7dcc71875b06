"""Is prompt tuning the right tool? Plain prompt tuning, `auto`, LoRA and prefix tuning on the same data and steps.

    python benchmarks/adapters.py --runs runs/adapters
    python benchmarks/adapters.py --summary       # the table, from the committed JSON alone

SmolLM2-135M-Instruct, float32, BBC articles cut to 64 tokens, 256 training examples, steps of 8, one seed. LoRA and
prefix tuning are `fpt compare --with lora,prefix` of the plain run. A run that is in the folder is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from step_time import machine

from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.run.results import load_result

COMMITTED = Path(__file__).parent / "results" / "adapters.json"
RECIPE: dict[str, Any] = {
    "model": {"path": "smollm2-135m", "dtype": "float32"},
    "data": {"train_limit": 256, "max_input_tokens": 64},
    "train": {"batch_size": 8},
}
TASKS: dict[str, dict[str, Any]] = {
    "headlines": {
        "data": {"task": "bbc_headlines", "validation_limit": 60, "max_target_tokens": 20},
        "train": {"steps": 96, "eval_every": 48},
    },
    "topics": {
        "data": {"task": "bbc_topics", "validation_limit": 100, "max_target_tokens": 8},
        "train": {"steps": 48, "eval_every": 24},
    },
}
PLAIN = ["method=pt", "optim.lr=0.03"]
"""The rate that was best on both tasks (`quality/results/held_out/smollm2-*-tuning.json`)."""

NAMES = {"pt": "plain prompt tuning", "auto": "`auto`", "lora": "LoRA", "prefix": "prefix tuning"}


def fpt(*arguments: str) -> str:
    command = [sys.executable, "-m", "fast_prompt_tuning", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(task: str, folder: Path, sets: list[str]) -> None:
    if (folder / "result.json").is_file():
        return
    recipe = {name: {**RECIPE[name], **TASKS[task].get(name, {})} for name in RECIPE}
    file = folder.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**recipe, "output": str(folder.resolve())}))
    fpt("train", "-c", str(file), *(part for one in sets for part in ("--set", one)))


def compared(task: str, runs: Path) -> dict[str, Any]:
    plain, auto = runs / f"{task}-plain", runs / f"{task}-auto"
    train(task, plain, PLAIN)
    train(task, auto, [])
    rows = json.loads(fpt("--json", "compare", str(plain), str(auto), "--with", "lora,prefix"))["runs"]
    result = load_result(plain)
    return {"runs": rows, "steps": result.steps, "examples": result.examples, "environment": result.environment}


def table(record: dict[str, Any]) -> str:
    lines = ["| task | run | metric | 95% interval | FLOPs, of plain's |", "|" + " --- |" * 5]
    for task in TASKS:
        for row in record[task]["runs"]:
            low, high = row["interval"]
            cells = [task, NAMES[row["method"]], f"{row['value']:.1f}", f"{low:.1f} to {high:.1f}"]
            lines.append(f"| {' | '.join(cells)} | {row['relative_flops']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=COMMITTED)
    parser.add_argument("--summary", action="store_true", help="print the table of the results and end")
    args = parser.parse_args()
    if not args.summary:
        if args.runs is None:
            parser.error("give --runs FOLDER, or --summary")
        record = {task: compared(task, args.runs) for task in TASKS}
        write_atomic(args.out, json.dumps({**record, "processor": machine()["processor"]}, indent=1) + "\n")
    print(table(json.loads(args.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
