"""What steps cost on a CUDA GPU in bfloat16: seconds against FLOPs, memory, and the share of the GPU's peak in use.

Of T5 v1.1 it times `paper_cost.py`'s partial PLMs, at the paper's batch shapes. Of a decoder of Llama 3.2 1B's shape it
times plain prompt tuning, the stages of FPT-CR, each with and without `train.compile`'s layers, and a prompt after
texts that are kept. Weights are random.

Model-FLOPs utilisation is the training FLOPs of a step (`flops.py`, convention `all`) over its seconds and the
processor's measured peak: the fastest large product in the same dtype in the same run, not the data sheet's figure.
Peak memory of a decoder's step holds the kept texts of the last row, too.

    python benchmarks/gpu_cost.py --plm large --out benchmarks/results/gpu_cost_large.json
    python benchmarks/gpu_cost.py --plm xl --batch 16 --out benchmarks/results/gpu_cost_xl.json
    python benchmarks/gpu_cost.py --plm llama-1b --batch 16 --out benchmarks/results/gpu_cost_llama-1b.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paper_cost
import torch
from step_time import spread
from transformers import LlamaConfig

from fast_prompt_tuning import PartialPLM, Schedule, Stage, TextCache
from fast_prompt_tuning.cost.flops import work_flops
from fast_prompt_tuning.cost.shapes import BatchShape, CostModel
from fast_prompt_tuning.cost.timing import random_batch, random_plm
from fast_prompt_tuning.plm.objective import choose_attention
from fast_prompt_tuning.prompt.places import tune
from fast_prompt_tuning.prompt.prompted import PromptedPLM
from fast_prompt_tuning.train.compiled import CompiledLayers

DECODERS = {
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
}
TEXT, TARGET, LONG_TARGET, PROMPT = 492, 16, 200, 20
"""Tokens of an example: the paper's texts, a label's target of a decoder, and T5's second, longer target."""

CACHE_MIB = 16384


@dataclass
class Job:
    """A step that is timed."""

    name: str
    prompted: PromptedPLM
    stage: Stage
    compiled: CompiledLayers | None = None
    flops: float = 0.0
    memory: int = 0
    seconds: list[float] = field(default_factory=list)


def synchronize(device: str) -> None:
    """Wait for what a GPU still does."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_peak(device: str, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """FLOP/s of the fastest of a few runs of a square product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - start))
    return best


def measure_t5(args: argparse.Namespace) -> dict[str, Any]:
    """`paper_cost.measure` with each row's utilisation."""
    options = {"plm": args.plm, "batch": args.batch, "rounds": args.rounds, "device": args.device}
    options |= {"dtype": args.dtype, "input-tokens": TEXT, "long-target": LONG_TARGET}
    report = paper_cost.measure(paper_cost.parse_args([f"--{name}={value}" for name, value in options.items()]))
    report["full"]["utilisation"] = report["full"]["flops"] / report["full"]["seconds"] / args.peak
    for row in report["rows"]:
        flops = row["flops_all"] / 100 * report["full"]["flops"]
        row["utilisation"] = flops / row["seconds"] / args.peak
    return report


def show_t5(report: dict[str, Any]) -> None:
    """Print `paper_cost`'s table, memory and utilisation."""
    paper_cost.show(report)
    if memory := report.get("peak_memory_bytes"):
        print(f"  peak memory {memory / 2**30:.1f} GiB")
    print(f"  full model: {report['full']['utilisation']:.0%} of the fastest product")


def measure_decoder(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of a decoder in interleaved rounds, each after one that is not timed."""
    config, dtype = DECODERS[args.plm], getattr(torch, args.dtype)
    shape = BatchShape(batch=args.batch, input_tokens=TEXT, prompt_tokens=PROMPT, target_tokens=TARGET)
    plm, cost = random_plm(config, dtype=dtype, device=args.device), CostModel.from_config(config)
    choose_attention(plm, TEXT + TARGET + PROMPT)
    batch = random_batch(config, shape, device=args.device)
    front = tune(plm, PROMPT)
    after = tune(plm, PROMPT, "suffix", TextCache(plm, budget_mib=CACHE_MIB))
    partial = PartialPLM(front.module, keep_neurons="first")
    sizes = {"plain": partial.full_stage}
    for stage in Schedule.preset("cr", partial.full_stage, total_steps=4).stages[:-1]:
        sizes[f"cr {round(100 * stage.layers_in('decoder') / config.num_hidden_layers)}%"] = stage
    compiled = CompiledLayers(plm)
    jobs = [Job(name, front, stage) for name, stage in sizes.items()]
    jobs += [Job(f"{name}, compiled", front, stage, compiled) for name, stage in sizes.items()]
    jobs.append(Job("after the text, kept", after, partial.full_stage))
    optimizers = {id(p): torch.optim.Adam(p.trained, lr=1e-3) for p in (front, after)}

    def step(job: Job) -> None:
        with job.compiled.used() if job.compiled else nullcontext():
            loss = job.prompted.loss(batch)
            loss.value.backward()
        optimizers[id(job.prompted)].step()
        optimizers[id(job.prompted)].zero_grad()
        synchronize(args.device)
        job.flops = work_flops(cost, loss.work, job.stage)

    for done in range(args.rounds):
        for job in jobs if done % 2 == 0 else reversed(jobs):
            partial.resize(job.stage)
            step(job)
            if args.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            step(job)
            job.seconds.append(time.perf_counter() - begun)
            if args.on_gpu:
                job.memory = max(job.memory, torch.cuda.max_memory_allocated())
        print(f"round {done + 1} of {args.rounds}", file=sys.stderr)
    partial.restore()
    plain = jobs[0]

    def row(job: Job) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(job.seconds, plain.seconds, strict=True)]
        seconds = statistics.median(job.seconds)
        return {
            "name": job.name,
            "flops": job.flops,
            "flops_of_plain": job.flops / plain.flops,
            "seconds": seconds,
            "seconds_of_plain": spread(ratios),
            "utilisation": job.flops / seconds / args.peak,
            "peak_memory_bytes": job.memory or None,
            "samples": job.seconds,
        }

    return {
        "plm": args.plm,
        "weights": "random",
        "dtype": args.dtype,
        "shape": asdict(shape),
        "attention": plm.config._attn_implementation,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": paper_cost.machine(args.device),
        "rounds": args.rounds,
        "rows": [row(job) for job in jobs],
    }


def show_decoder(report: dict[str, Any]) -> None:
    """Print the table; shares are of plain prompt tuning."""
    print(
        f"{report['plm']}, {report['dtype']}, batches of {report['shape']['batch']}, on {report['machine']['device']}"
    )
    print(f"{'':24} {'seconds':>8} {'FLOPs':>6} {'clock':>6} {'min–max':>9} {'of peak':>7} {'GiB':>6}")
    for row in report["rows"]:
        clock, memory = row["seconds_of_plain"], row["peak_memory_bytes"]
        between = f"{100 * clock['low']:.0f}–{100 * clock['high']:.0f}%"
        print(
            f"{row['name']:24} {row['seconds']:8.3f} {row['flops_of_plain']:6.0%} {clock['median']:6.0%} {between:>9} "
            f"{row['utilisation']:7.0%} {'–' if memory is None else f'{memory / 2**30:.1f}':>6}"
        )


def decoder_shortfalls(report: dict[str, Any]) -> list[str]:
    """The steps whose share of plain's seconds lies more than `ALLOWED_POINTS` above that of its FLOPs."""
    above = {r["name"]: 100 * (r["seconds_of_plain"]["median"] - r["flops_of_plain"]) for r in report["rows"]}
    return [f"{name}: {points:.1f} points" for name, points in above.items() if points > paper_cost.ALLOWED_POINTS]


KINDS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., None], Callable[..., list[str]]]] = {
    **dict.fromkeys(("large", "xl"), (measure_t5, show_t5, paper_cost.shortfalls)),
    **dict.fromkeys(DECODERS, (measure_decoder, show_decoder, decoder_shortfalls)),
}
"""PLM → what measures it, what prints the table, and what of it `--check` refuses."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plm", choices=KINDS, default="large")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="2 rounds of batch 2")
    parser.add_argument("--check", action="store_true", help="exit 1 if a wall clock lies too far above its FLOPs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.on_gpu = args.device.startswith("cuda")
    if args.on_gpu and not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU; benchmarks/paper_cost.py is the one for a CPU", file=sys.stderr)
        return 2
    if args.quick:
        args.batch, args.rounds = 2, 2
    args.peak = matmul_peak(args.device, getattr(torch, args.dtype), 8192 if args.on_gpu else 512)
    measure, show, shortfalls = KINDS[args.plm]
    report = measure(args) | {"benchmark": "gpu_cost", "quick": args.quick, "matmul_peak_flops_per_second": args.peak}
    if args.on_gpu:
        report["peak_memory_bytes"] = max(
            torch.cuda.max_memory_allocated(), *(r.get("peak_memory_bytes", 0) for r in report["rows"])
        )
    show(report)
    print(f"fastest product: {args.peak / 1e12:.3g} TFLOP/s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = shortfalls(report)
    if args.check and failed:
        print(f"more than {paper_cost.ALLOWED_POINTS:g} points above FLOPs: {'; '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
