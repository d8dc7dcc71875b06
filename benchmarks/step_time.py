"""What a training step costs in seconds: peft + Trainer, ours, every FPT stage, and the bare model, side by side.

For each model, in interleaved rounds over the same examples in the same dtype:

  (a) peer     stock `PromptTuningConfig` + `transformers.Trainer` + `DataCollatorForSeq2Seq`
  (b) plain    our loop on the full model: loss at labels, batches by length
  (c) stage i  the same at the sizes of the paper's CR
  (d) bare     forward and backward of the model on the batches of (b), no loop, no optimizer
  (e) peak     the fastest large matrix product in the same dtype

The dtype is the one that `model.dtype: auto` measures to be faster here. `loop` is the part of (b) outside forward
and backward: data, collation, the guard, clipping, the optimizer, logging.

A round passes over every example once, so that a ratio of two rounds compares the same work; what is reported are
medians over rounds, with the smallest and the largest. A growth, which a run does once a stage and a round once too, is
timed by itself: a whole FPT run is 100 steps of which every stage begins with its growth. `demo` is no model but the
command `fpt demo`, timed whole.

    python benchmarks/step_time.py                          # all models; each is written to the JSON as it is done
    python benchmarks/step_time.py --models gpt2,t5-large   # these only; the others in the JSON stay
    python benchmarks/step_time.py --summary --check        # the tables of the committed JSON, nothing measured
    python benchmarks/step_time.py --quick                  # the two models with targets, in a few minutes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fast_prompt_tuning import Schedule
from fast_prompt_tuning.cost.flops import step_flops
from fast_prompt_tuning.cost.shapes import CostModel
from fast_prompt_tuning.cost.timing import random_plm
from fast_prompt_tuning.data.batches import Collator, LengthBatchSampler
from fast_prompt_tuning.paper.costs import paper_config
from fast_prompt_tuning.plm.loading import choose_dtype, load_plm, load_tokenizer
from fast_prompt_tuning.plm.objective import choose_attention, label_loss
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt.front import batch_shape
from fast_prompt_tuning.prompt.places import prompted_of
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.recipe import load as load_recipe
from fast_prompt_tuning.train.batches import Batches
from fast_prompt_tuning.train.loop import Loop
from fast_prompt_tuning.train.optimizer import make_optimizer

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "step_time.json"


@dataclass(frozen=True)
class Work:
    """What a model is timed on: batches of `batch` examples of at most `longest` text tokens, `steps` a round."""

    batch: int
    longest: int
    steps: int
    title: str


MODELS = {
    "smollm2-135m": Work(8, 96, 6, "SmolLM2-135M, news paragraphs of mixed length"),
    "gemma-3-270m-shaped": Work(4, 96, 3, "a decoder shaped like Gemma-3-270M (vocabulary of 262k)"),
    "gpt2": Work(4, 96, 3, "a decoder shaped like GPT-2 (vocabulary of 50k)"),
    "t5-large": Work(2, 64, 2, "an encoder-decoder shaped like T5-LARGE"),
}
"""Sized for some minutes each on two idle cores."""

TARGETS = {
    # name -> (model, what, limit, whether at most)
    "ours plain / peft + Trainer": ("smollm2-135m", "plain", 0.65, True),
    "ours plain / peft + Trainer, Gemma-shaped": ("gemma-3-270m-shaped", "plain", 0.40, True),
    "FPT-CR whole run / peft + Trainer": ("smollm2-135m", "fpt_run", 0.42, True),
    "stage time ratio − FLOPs ratio, worst stage": ("smollm2-135m", "stage_excess", 0.03, True),
    "bare forward + backward / our step": ("smollm2-135m", "bare_share", 0.95, False),
    "achieved / matmul peak": ("smollm2-135m", "utilisation", 0.60, False),
}

PROMPT = 20


class FakeTokenizer:
    """As much of a tokenizer as a padding collator asks for: the config-built models have none."""

    pad_token_id, eos_token_id, padding_side, model_input_names = 0, 1, "right", ("input_ids", "attention_mask")

    def pad(self, rows: Any, **_: Any) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in rows)
        batch = {
            "input_ids": [r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows],
            "attention_mask": [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows],
        }
        if "labels" in rows[0]:
            batch["labels"] = [list(r["labels"]) for r in rows]
        return {k: torch.tensor(v) for k, v in batch.items()}


def news_rows(tokenizer: Any, count: int, longest: int, seed: int) -> list[dict[str, list[int]]]:
    """Paragraphs of BBC articles with their topic as target: news text of naturally mixed length."""
    from fast_prompt_tuning.data import readers as examples
    from fast_prompt_tuning.data import task_files

    articles = examples.load_examples(task_files.load_task("bbc_topics"), "train", decoder=True)
    rows = []
    for row in articles:
        for paragraph in row["input"].split("\n")[1:-1]:
            ids = tokenizer(paragraph)["input_ids"][:longest]
            target = [*tokenizer(row["target"])["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= 8:
                rows.append({"input_ids": ids + target, "labels": [-100] * len(ids) + target})
        if len(rows) > 20 * count:
            break
    random.Random(seed).shuffle(rows)
    return rows[:count]


def random_rows(vocab: int, count: int, longest: int, seed: int, encoder_decoder: bool) -> list[dict[str, list[int]]]:
    """Random tokens of mixed length, for models without weights."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(4, vocab) for _ in range(rng.randint(longest // 6, longest))]
        target = [rng.randrange(4, vocab), 1]
        if encoder_decoder:
            rows.append({"input_ids": ids, "labels": target})
        else:
            rows.append({"input_ids": ids + target, "labels": [-100] * len(ids) + target})
    return rows


def build(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """`(PLM, tokenizer)` of a model by name."""
    if name == "smollm2-135m":
        return load_plm(name, dtype=str(dtype).removeprefix("torch.")), load_tokenizer(name)
    configs: dict[str, Callable[[], Any]] = {
        "t5-large": lambda: paper_config("large"),
        "gpt2": lambda: GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        "gemma-3-270m-shaped": lambda: Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
            max_position_embeddings=32768,
        ),
    }
    plm = random_plm(configs[name](), dtype=dtype)
    return plm.requires_grad_(False), FakeTokenizer()


class TimedPLM(PartialPLM):
    """Notes the seconds that growths took: making a stage's narrow copies, not stepping in and out of a stage."""

    growth = 0.0

    def _set_size(self, *args: Any) -> None:
        copies, start = len(self._narrow), time.perf_counter()
        super()._set_size(*args)
        if len(self._narrow) > copies:
            self.growth += time.perf_counter() - start


class Clock(TrainerCallback):
    """Seconds from the first step to the end of training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def settings(steps: int, batch: int, folder: str) -> Any:
    """One recipe for the loop and the Trainer, so that they share every argument."""
    return load_recipe(
        {
            "model": {"path": "-"},
            "data": {"task": "-"},
            "method": "pt",
            "train": {"steps": steps, "batch_size": batch, "log_every": 10},
            "output": folder,
        }
    )


def run_loop(
    model: Any, rows: Any, collator: Any, batch: int, schedule: Schedule, partial: PartialPLM | None = None
) -> tuple[float, float]:
    """Seconds of one pass over `rows` in the loop of `fpt train`, and those of them in forward and backward passes."""
    inside = 0.0
    clock = Clock()
    cost = CostModel.from_model(model)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(-(-len(rows) // batch), batch, folder)
        batches = Batches(rows, collator, config.train)
        loop = Loop(
            prompted_of(model), batches, config, schedule=schedule, cost=cost, partial=partial, callbacks=[clock]
        )
        own_gradient = loop.gradient

        def gradient(*given: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return own_gradient(*given)
            finally:
                inside += time.perf_counter() - start

        loop.gradient = gradient  # type: ignore[method-assign]
        loop.run()
    return clock.seconds, inside


def run_peer(model: Any, rows: Any, collator: Any, batch: int) -> float:
    """Seconds of one pass over `rows` in a stock Trainer with the settings of `run_loop`."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(-(-len(rows) // batch), batch, folder)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.train.steps,
            per_device_train_batch_size=batch,
            max_grad_norm=config.optim.max_grad_norm,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=config.train.log_every,
            logging_first_step=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            optimizers=make_optimizer([prompt_parameter(model)], config.optim, config.train.steps),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.seconds


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the fastest of a few large products."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    work = MODELS[name]
    batch, count, longest = work.batch, work.batch * (args.steps or work.steps), work.longest
    kind = LlamaConfig(hidden_size=576, intermediate_size=1536)  # SmolLM2's sizes
    dtype = choose_dtype(args.dtype, torch.device("cpu"), kind)
    plm, tokenizer = build(name, dtype)
    encoder_decoder = plm.config.is_encoder_decoder
    if name == "smollm2-135m":
        listed = news_rows(tokenizer, count, longest, seed=0)
    else:
        listed = random_rows(plm.config.vocab_size, count, longest, 0, encoder_decoder)
    rows = datasets.Dataset.from_list(listed)
    task_type = TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM
    prompt = PromptTuningConfig(task_type=task_type, num_virtual_tokens=PROMPT, num_transformer_submodules=1)
    model = get_peft_model(plm, prompt)
    torch.nn.init.normal_(prompt_parameter(model), std=0.02)
    cost = CostModel.from_model(model)
    collate = Collator(tokenizer, decoder=not encoder_decoder)
    partial = TimedPLM(model, keep_neurons="first")
    stages = Schedule.preset("cr", cost.full_stage, total_steps=100).stages

    outside: list[float] = []
    growths: dict[str, list[float]] = {str(s): [] for s in stages[:-1]}

    def ours(stage: Any) -> float:
        schedule = Schedule.constant(stage, -(-count // batch))
        cut = not stage.is_full(cost.full_stage)
        partial.growth = 0.0
        seconds, inside = run_loop(model, rows, collate, batch, schedule, partial if cut else None)
        if cut:
            growths[str(stage)].append(partial.growth)
        else:
            outside.append(1 - inside / seconds)
        return seconds - partial.growth

    batches = [
        collate([listed[i] for i in picked])
        for picked in LengthBatchSampler([len(r["input_ids"]) for r in listed], batch, seed=0)
    ]

    def bare() -> float:
        model.train()
        start = time.perf_counter()
        for inputs in batches:
            label_loss(model, inputs).backward()
            model.zero_grad()
        return time.perf_counter() - start

    default_attention = plm.config._attn_implementation

    def peer() -> float:
        plm.set_attn_implementation(default_attention)  # what from_pretrained gives
        seconds = run_peer(model, rows, DataCollatorForSeq2Seq(tokenizer), batch)
        choose_attention(plm, PROMPT + longest + 2)
        return seconds

    choose_attention(plm, PROMPT + longest + 2)
    variants: dict[str, Callable[[], float]] = {
        "peer": peer,
        "plain": lambda: ours(cost.full_stage),
        **{f"stage {i}": (lambda s=s: ours(s)) for i, s in enumerate(stages[:-1], start=1)},
        "bare": bare,
    }
    samples: dict[str, list[float]] = {v: [] for v in variants}
    peaks = []
    for done in range(args.rounds + 1):
        order = list(variants) if done % 2 == 0 else list(reversed(variants))
        for variant in order:
            seconds = variants[variant]()
            if done:  # the first round warms up
                samples[variant].append(seconds / len(batches))
        peaks.append(matmul_peak(dtype))
        print(f"{name}: round {done} of {args.rounds}", file=sys.stderr, flush=True)
    peak = max(peaks)
    shapes = [batch_shape(b, PROMPT, decoder=not encoder_decoder) for b in batches]
    flops = [sum(step_flops(cost, s, shape) for shape in shapes) / len(shapes) for s in stages]

    def ratio(part: str, whole: str) -> dict[str, float]:
        return spread([p / w for p, w in zip(samples[part], samples[whole], strict=True)])

    grown = sum(statistics.median(found[1:]) for found in growths.values())
    fpt_run = [
        (20 * (a + b + c) + 40 * d + grown) / (100 * peer)
        for a, b, c, d, peer in zip(
            *(samples[v] for v in ("stage 1", "stage 2", "stage 3", "plain", "peer")), strict=True
        )
    ]
    stage_rows = []
    for i, stage in enumerate(stages[:-1], start=1):
        found = ratio(f"stage {i}", "plain")
        share = flops[i - 1] / flops[-1]
        growth = statistics.median(growths[str(stage)][1:])
        excess = found["median"] - share
        stage_rows.append({"stage": str(stage), "time": found, "flops": share, "excess": excess, "growth": growth})
    plain = statistics.median(samples["plain"])
    return {
        "model": name,
        "title": work.title,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "quick": args.quick,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "steps_per_round": len(batches),
        "text_tokens": spread([float(len(r["input_ids"])) for r in listed]),
        "seconds_per_step": {v: spread(s) for v, s in samples.items()},
        "samples": samples,
        "plain": ratio("plain", "peer"),
        "fpt_run": spread(fpt_run),
        "stages": stage_rows,
        "stage_excess": {"median": max(s["excess"] for s in stage_rows)},
        "bare_share": ratio("bare", "plain"),
        "loop": spread(outside[1:]),
        "flops_per_step": flops[-1],
        "matmul_peak": peak,
        "utilisation": {"median": flops[-1] / plain / peak},
    }


def time_demo() -> dict[str, Any]:
    """Seconds of the whole command `fpt demo`, from its start to its end, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fast_prompt_tuning", "demo", "--output", f"{folder}/demo"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        runs = json.loads(Path(folder, "demo", "result.json").read_text(encoding="utf-8"))["runs"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "seconds": seconds,
        "training_seconds": {name: run["seconds"] for name, run in runs.items() if run["seconds"]},
    }


def show(record: dict[str, Any]) -> None:
    """The committed numbers: every model, then the rows that README and docs quote."""
    results = record["results"]
    for r in results:
        print(
            f"\n{r['model']}, {r['dtype']}, batches of {r['batch']}, {r['text_tokens']['low']:.0f} to "
            f"{r['text_tokens']['high']:.0f} tokens; matmul peak {r['matmul_peak'] / 1e9:.0f} GFLOP/s; "
            f"{r['machine']['processor']}, {r['date']}{', quick' if r['quick'] else ''}"
        )
        for name, s in r["seconds_per_step"].items():
            print(f"  {name:8} {s['median']:8.3f} s/step   ({s['low']:.3f} – {s['high']:.3f})")
        print(f"  ours plain / peft + Trainer   {r['plain']['median']:.3f}")
        print(f"  FPT-CR run / peft + Trainer   {r['fpt_run']['median']:.3f}")
        for s in r["stages"]:
            print(
                f"  {s['stage']:32} time {s['time']['median']:.3f}  FLOPs {s['flops']:.3f}  {s['excess']:+.3f}  "
                f"growth {s['growth']:.2f} s"
            )
        print(
            f"  bare / ours {r['bare_share']['median']:.3f}; loop {r['loop']['median']:.3f}; utilisation "
            f"{r['utilisation']['median']:.3f}"
        )
    if demo := record.get("demo"):
        print(f"\nfpt demo: {demo['seconds']:.0f} s, of which training {demo['training_seconds']}")
    print("\n| | plain prompt tuning | a whole FPT-CR run |\n| --- | --- | --- |")
    for r in results:
        print(f"| {r['title']} | {r['plain']['median']:.2f} | {r['fpt_run']['median']:.2f} |")


def target_rows(results: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """A table row for every target whose model was measured, and what is to be said where it is missed."""
    by_name = {r["model"]: r for r in results}
    rows: list[tuple[str, str | None]] = []
    for what, (model, key, limit, at_most) in TARGETS.items():
        if model not in by_name:
            continue
        value = by_name[model][key]["median"]
        met = value <= limit if at_most else value >= limit
        words = f"{'at most' if at_most else 'at least'} {limit:.2f} | {value:.2f} | {'met' if met else 'missed'}"
        rows.append((f"| {what} | {words} |", None if met else f"{what}: {value:.3f}"))
    return rows


def stage_rows(results: list[dict[str, Any]]) -> list[str]:
    """A table row for every partial stage."""
    return [
        f"| {r['model']}, {s['stage']} | {s['flops']:.2f} | {s['time']['median']:.2f} "
        f"({s['time']['low']:.2f}–{s['time']['high']:.2f}) | "
        f"{s['growth'] / r['seconds_per_step']['plain']['median']:.2f} |"
        for r in results
        for s in r["stages"]
    ]


def machine() -> dict[str, Any]:
    """What the seconds depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def load_record(path: Path) -> dict[str, Any]:
    """What was measured before; a new record where there is nothing."""
    return json.loads(path.read_text()) if path.is_file() else {"benchmark": "step_time", "results": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of these, and demo")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; one more warms up")
    parser.add_argument("--steps", type=int, help="batches in a round; default by model")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--quick", action="store_true", help="the two models with targets, 1 round of 2 batches")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--summary", action="store_true", help="print what --out holds; measure nothing")
    parser.add_argument("--out", type=Path, default=COMMITTED, help="JSON to add to; --quick writes none by default")
    args = parser.parse_args()
    out = None if args.quick and args.out == COMMITTED else args.out
    if args.quick:
        args.models, args.rounds, args.steps = "smollm2-135m,gemma-3-270m-shaped", 1, 2
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    record = load_record(out) if out else {"benchmark": "step_time", "results": []}
    for name in [] if args.summary else args.models.split(","):
        if name == "demo":
            record["demo"] = time_demo()
        else:
            found = measure(name, args)
            kept = {r["model"]: r for r in record["results"]} | {name: found}
            record["results"] = [kept[m] for m in MODELS if m in kept]
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    show(record)
    print("\n| stage | FLOPs of a full step | time of a full step | growth, in full steps |")
    print("| --- | --- | --- | --- |")
    print("\n".join(stage_rows(record["results"])))
    targets = target_rows(record["results"])
    print("\n| target | wanted | measured | |\n| --- | --- | --- | --- |")
    print("\n".join(row for row, _ in targets))
    missed = [shortfall for _, shortfall in targets if shortfall]
    if args.check and missed:
        print(f"missed: {'; '.join(missed)}")
        return 1
    return 0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line] \
        if info.is_file() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
