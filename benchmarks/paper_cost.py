"""Wall clock of the paper's partial PLMs against their FLOPs (Table 1 of Huang et al. 2022), measured on this machine.

T5 v1.1 LARGE (or XL) is built from its config with random weights, and real prompt-tuning steps (forward with the loss
at the labels, backward, optimizer) of the full model and the nine partial PLMs are timed in interleaved rounds. Two
batch shapes stand for the paper's tasks: a short target, where the encoder alone is reduced (MNLI, QQP), and a long
one, where both stacks are (SQuAD 2.0, ReCoRD, XSum). Costs are summed over both, then taken relative to the full
model's sum; FLOPs are those of the very shapes that were timed.

The frozen weights are float32 on a CPU and bfloat16 on a GPU unless told otherwise. On a CPU with bfloat16 matrix units
(AMX) bfloat16 makes the products several times faster and leaves norms, residuals and attention as they are; those
do not shrink with the FFN, so FFN reduction then saves less time than FLOPs.

Threads of one step wait for each other: on a machine that others use too, pass --threads 1.

    python benchmarks/paper_cost.py --out benchmarks/results/paper_cost_large.json
    python benchmarks/paper_cost.py --quick --check
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from fast_prompt_tuning.paper.reproduce import measure_partial_plms

ALLOWED_POINTS = 3.0
"""How far the wall clock of a partial PLM may lie above its FLOPs, in points of the full model's cost."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plm", choices=("large", "xl"), default="large")
    parser.add_argument("--batch", type=int, default=6, help="examples per batch")
    parser.add_argument("--input-tokens", type=int, default=44, help="input tokens, besides the prompt's 20")
    parser.add_argument("--short-target", type=int, default=10, help="target tokens where the encoder alone is reduced")
    parser.add_argument("--long-target", type=int, default=32, help="target tokens where both stacks are reduced")
    parser.add_argument("--rounds", type=int, default=4, help="interleaved rounds")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the frozen weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default PyTorch's")
    parser.add_argument("--quick", action="store_true", help="small batches and 2 rounds: a smoke test, not a result")
    parser.add_argument("--check", action="store_true", help="exit 1 if a wall clock lies too far above its FLOPs")
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.quick:
        args.batch, args.long_target, args.rounds = 2, 16, 2
    return args


def machine(device: str) -> dict[str, Any]:
    """What the measurement ran on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every partial PLM; everything measured and computed, in plain JSON types."""
    begun = time.perf_counter()

    def progress(done: int) -> None:
        print(f"round {done} of {args.rounds}, {time.perf_counter() - begun:.0f} s", file=sys.stderr)

    report = measure_partial_plms(
        args.plm,
        batch=args.batch,
        input_tokens=args.input_tokens,
        short_target=args.short_target,
        long_target=args.long_target,
        dtype=args.dtype,
        device=args.device,
        rounds=args.rounds,
        on_round=progress,
    )
    return {
        "benchmark": "paper_cost",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(args.device),
        "quick": args.quick,
        **report,
    }


def show(report: dict[str, Any]) -> None:
    """Print the table, percentages of the full model."""
    full, where = report["full"], report["machine"]
    print(
        f"{report['plm']}, {report['dtype']}, on {where['device']} ({where['threads']} threads), torch {where['torch']}"
    )
    for s in report["shapes"]:
        print(
            f"  batch {s['batch']}: {s['prompt_tokens']} prompt + {s['input_tokens']} input tokens, "
            f"{s['target_tokens']} target tokens, reducing {' and '.join(s['reduced'])}"
        )
    speed = full["flops"] / full["seconds"] / 1e12
    print(f"  full model: {full['seconds']:.3f} s for a step of each, {speed:.2f} TFLOP/s")
    print(
        f"{'':4} {'layers':>6} {'d_ff':>5} | {'FLOPs':>6} {'linear':>6} {'clock':>6} {'best':>6} {'min–max':>13} "
        f"{'above':>6} | {'paper FLOPs':>11} {'clock':>6}"
    )
    for r in report["rows"]:
        spread = f"{r['wall_clock_low']:.1f}–{r['wall_clock_high']:.1f}"
        print(
            f"{r['method']:4} {r['layers']:6} {r['ffn']:5} | {r['flops_all']:6.1f} {r['flops_linear']:6.1f} "
            f"{r['wall_clock']:6.1f} {r['wall_clock_best']:6.1f} {spread:>13} {r['above_flops']:+6.1f} | "
            f"{r['paper_flops'] or '–':>11} {r['paper_wall_clock'] or '–':>6}"
        )


def shortfalls(report: dict[str, Any]) -> list[str]:
    """The partial PLMs whose wall clock lies more than `ALLOWED_POINTS` above their FLOPs."""
    return [
        f"{r['method']} {r['layers']}/{r['ffn']}: {r['above_flops']:.1f} points"
        for r in report["rows"]
        if r["above_flops"] > ALLOWED_POINTS
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = measure(args)
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = shortfalls(report)
    if args.check and failed:
        print(f"more than {ALLOWED_POINTS:g} points above FLOPs: {'; '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
