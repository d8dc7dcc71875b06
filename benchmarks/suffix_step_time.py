"""What a step costs with the prompt after the text: kept texts, fresh texts and the prompt in front, side by side.

For each text length, in interleaved rounds over the same random examples, in our Trainer, in the dtype that
`model.dtype: auto` measures to be faster here, or in the one asked for:

  prefix   the prompt in front of the text
  warm     the prompt after the text, all texts kept in memory
  cold     the prompt after the text, every text run at every step
  cross    as warm, for an encoder-decoder, whose cross-attention's keys and values are kept, too

    OMP_NUM_THREADS=2 python benchmarks/suffix_step_time.py --check
    OMP_NUM_THREADS=2 python benchmarks/suffix_step_time.py --model t5-large --tokens 256,512 --batch 2

Each model, length and dtype replaces this machine's last measurement in the JSON. Threads must not sleep between
operations (OMP_WAIT_POLICY=passive): waking them costs short steps a third of their time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import get_peft_model
from step_time import PROMPT, build, machine, run_loop, spread
from transformers import LlamaConfig

from fast_prompt_tuning import Schedule, SuffixPromptModel, TextCache, soft_prompt_config
from fast_prompt_tuning.cost.shapes import CostModel
from fast_prompt_tuning.data.batches import Collator
from fast_prompt_tuning.plm.loading import choose_dtype
from fast_prompt_tuning.plm.objective import choose_attention

COMMITTED = Path(__file__).parent / "results" / "suffix_step_time.json"
TARGETS = {64: 0.35, 256: 0.15, 512: 0.10}
"""Text tokens -> most that a warm step of SmolLM2-135M may take of a step with the prompt in front."""

HEADER = (
    "| model | CPU | dtype | text tokens | batch | seconds a step, in front | of that: texts kept | "
    "of that: cross-attention kept, too | of that: texts run at every step | goal, texts kept |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def measure(name: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One text length."""
    dtype = choose_dtype(args.dtype, torch.device("cpu"), LlamaConfig(hidden_size=576, intermediate_size=1536))
    plm, tokenizer = build(name, dtype)
    seq2seq = plm.config.is_encoder_decoder
    choose_attention(plm, PROMPT + tokens + 2)
    generator = random.Random(tokens)
    rows = []
    for _ in range(args.steps * args.batch):
        ids = [generator.randrange(4, plm.config.vocab_size) for _ in range(tokens + 2)]
        text, end = ids[:tokens], ids[tokens:]
        rows.append({"input_ids": text if seq2seq else ids, "labels": end if seq2seq else [-100] * tokens + end})
    data = datasets.Dataset.from_list(rows)
    cost, collate = CostModel.from_model(plm), Collator(tokenizer, decoder=not seq2seq)
    schedule = Schedule.constant(cost.full_stage, args.steps)
    models = {
        "prefix": get_peft_model(plm, soft_prompt_config(plm, PROMPT)),
        "warm": SuffixPromptModel(plm, PROMPT, cache=TextCache(plm, budget_mib=16384)),
        "cold": SuffixPromptModel(plm, PROMPT),
    }
    if seq2seq:
        models["cross"] = SuffixPromptModel(plm, PROMPT, cache=TextCache(plm, budget_mib=16384, cross_attention=True))

    def seconds(model: Any) -> float:
        return run_loop(model, data, collate, args.batch, schedule)[0] / args.steps

    samples: dict[str, list[float]] = {v: [] for v in models}
    for done in range(args.rounds + 1):
        for variant in list(models) if done % 2 == 0 else list(reversed(models)):
            found = seconds(models[variant])
            if done:  # the first round warms up, and fills the cache
                samples[variant].append(found)
        print(f"{name}, {tokens} tokens: round {done} of {args.rounds}", file=sys.stderr)

    def ratio(part: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(samples[part], samples["prefix"], strict=True)])

    return {
        "model": name,
        "text_tokens": tokens,
        "batch": args.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(),
        "attention": plm.config._attn_implementation,
        "seconds_per_step": {v: spread(s) for v, s in samples.items()},
        "samples": samples,
        **{variant: ratio(variant) for variant in models if variant != "prefix"},
    }


def kind(result: dict[str, Any]) -> str:
    """The processor a row was measured on, and its vector instructions."""
    return f"{result['machine']['processor'].replace('(R)', '')}, {result['machine']['capability']}"


def ranged(ratio: dict[str, float]) -> str:
    """Median and range."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def target(result: dict[str, Any]) -> float | None:
    """What a warm step is to cost at most, where there is a target."""
    return TARGETS.get(result["text_tokens"]) if result["model"] == "smollm2-135m" else None


def table_rows(results: list[dict[str, Any]]) -> list[str]:
    """A table row for every text length."""
    return [
        f"| {r['model']} | {kind(r)} | {r['dtype']} | {r['text_tokens']} | {r['batch']} | "
        f"{r['seconds_per_step']['prefix']['median']:.2f} | {ranged(r['warm'])} | "
        f"{ranged(r['cross']) if 'cross' in r else '–'} | {r['cold']['median']:.2f} | {target(r) or '–'} |"
        for r in results
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", default="64,256,512")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="batches in a round")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--out", type=Path, default=COMMITTED, help="JSON to add to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = [measure(args.model, int(tokens), args) for tokens in args.tokens.split(",")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(args.out.read_text())["results"] if args.out.is_file() else []
    kept = {(r["model"], kind(r), r["dtype"], r["text_tokens"]): r for r in [*before, *results]}
    record = {"benchmark": "suffix_step_time", "results": [kept[key] for key in sorted(kept)]}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*HEADER, *table_rows(results)]))
    missed = [r["text_tokens"] for r in results if r["warm"]["median"] > (target(r) or 1)]
    if args.check and missed:
        print(f"missed at {', '.join(map(str, missed))} text tokens")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
