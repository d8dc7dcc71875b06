"""Ten tasks about one text: prompts within the text that share its states, against ten separate passes.

Each task has labels of one token and asks a question of its own behind the prompt. The prompts are random, for only
time is measured. In interleaved rounds over the same texts, one text at a time and in batches:

  shared    every text is run once; ten prompts are scored behind its states, in the same passes
  apart     every prompt runs the whole text, as ten calls of `fpt predict` would
  in front  ten prompts in front of the text, as PEFT has them

    OMP_NUM_THREADS=2 python benchmarks/many_prompts.py --check
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from step_time import PROMPT, build, machine
from transformers import LlamaConfig

from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.plm.loading import choose_dtype
from fast_prompt_tuning.plm.objective import choose_attention
from fast_prompt_tuning.prompt.places import place
from fast_prompt_tuning.prompt.prompted import Input
from fast_prompt_tuning.prompt.text_cache import TextCache
from fast_prompt_tuning.prompt.together import score_together

COMMITTED = Path(__file__).parent / "results" / "many_prompts.json"
TASKS, QUESTION, LABELS = 10, 6, 5
TARGET = 0.25
"""Most that ten answers about one text of 256 tokens may take of ten separate passes."""


def measure(batch: int, args: argparse.Namespace) -> dict[str, Any]:
    dtype = choose_dtype(args.dtype, torch.device("cpu"), LlamaConfig(hidden_size=576, intermediate_size=1536))
    plm, _ = build(args.model, dtype)
    choose_attention(plm, PROMPT + args.tokens + QUESTION + 1)
    generator, size = random.Random(0), plm.config.vocab_size
    ids = lambda number: [generator.randrange(4, size) for _ in range(number)]  # noqa: E731
    questions = [ids(QUESTION) for _ in range(TASKS)]
    labels = [{str(word): [word] for word in ids(LABELS)} for _ in range(TASKS)]
    prompts = torch.randn(TASKS, PROMPT, plm.config.hidden_size) * 0.02
    texts = [ids(args.tokens) for _ in range(args.texts)]

    def answer(where: str, shared: bool) -> list[Any]:
        cache = TextCache(plm, budget_mib=16384) if shared else None
        prompted = [place(plm, prompt, where, cache) for prompt in prompts]
        found = []
        for start in range(0, len(texts), batch):
            inputs = [[Input([*text, *q], QUESTION) for text in texts[start : start + batch]] for q in questions]
            if shared:
                scored = score_together(prompted, inputs, labels)
            else:
                each = zip(prompted, inputs, labels, strict=True)
                scored = [asked.score(rows, choices, batch_size=batch)[0] for asked, rows, choices in each]
            found += [p.text for predictions in scored for p in predictions]
        return found

    variants = {"shared": ("infix", True), "apart": ("infix", False), "in front": ("prefix", False)}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    said = {name: answer(*how) for name, how in variants.items()}  # which warms up
    for done in range(args.rounds):
        for name in list(variants) if done % 2 else list(reversed(variants)):
            start = time.perf_counter()
            answer(*variants[name])
            samples[name].append((time.perf_counter() - start) / len(texts))
    ratios = [s / a for s, a in zip(samples["shared"], samples["apart"], strict=True)]
    return {
        "model": args.model, "tokens": args.tokens, "tasks": TASKS, "batch": batch, "texts": len(texts),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds_a_text": {name: statistics.median(values) for name, values in samples.items()},
        "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "ratio_to_in_front": statistics.median(
            s / f for s, f in zip(samples["shared"], samples["in front"], strict=True)),
        "same_answers": sum(a == b for a, b in zip(said["shared"], said["apart"], strict=True)) / len(said["apart"]),
        "machine": machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=COMMITTED)
    parser.add_argument("--check", action="store_true", help=f"fail where the ratio is above {TARGET}")
    args = parser.parse_args()
    results = [measure(batch, args) for batch in (1, 4)]
    write_atomic(args.output, json.dumps(results, indent=1) + "\n")
    for r in results:
        low, high = r["ratio_range"]
        print(
            f"batch {r['batch']}: {r['ratio']:.2f} ({low:.2f} to {high:.2f}) of ten passes, "
            f"{r['ratio_to_in_front']:.2f} of ten prompts in front; {r['same_answers']:.0%} same answers"
        )
    if args.check and any(r["ratio"] > TARGET for r in results):
        sys.exit(f"above {TARGET}")


if __name__ == "__main__":
    main()
