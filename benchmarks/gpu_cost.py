"""`paper_cost.py` on a CUDA GPU in bfloat16, at the paper's batch shapes, with memory and utilisation.

Model-FLOPs utilisation is the training FLOPs of a step (`flops.py`, convention `all`) over its seconds and the
processor's measured peak: the fastest large bfloat16 product found in the same run, not the data sheet's figure.

    python benchmarks/gpu_cost.py --plm large --out benchmarks/results/gpu_cost_large.json
    python benchmarks/gpu_cost.py --plm xl --batch 16 --out benchmarks/results/gpu_cost_xl.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import paper_cost
import torch


def matmul_peak(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of the fastest of a few runs of a square bfloat16 product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        torch.cuda.synchronize()
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - start))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plm", choices=("large", "xl"), default="large")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds of batch 4")
    parser.add_argument("--check", action="store_true", help="exit 1 if a wall clock lies too far above its FLOPs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU; benchmarks/paper_cost.py is the one for a CPU", file=sys.stderr)
        return 2
    if args.quick:
        args.batch, args.rounds = 4, 2
    peak = matmul_peak()
    torch.cuda.reset_peak_memory_stats()
    options = {"plm": args.plm, "batch": args.batch, "rounds": args.rounds, "device": "cuda"}
    options |= {"input-tokens": 492, "long-target": 200}
    report = paper_cost.measure(paper_cost.parse_args([f"--{name}={value}" for name, value in options.items()]))
    report["benchmark"] = "gpu_cost"
    report["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    report["matmul_peak_flops_per_second"] = peak
    report["full"]["utilisation"] = report["full"]["flops"] / report["full"]["seconds"] / peak
    for row in report["rows"]:
        flops = row["flops_all"] / 100 * report["full"]["flops"]
        row["utilisation"] = flops / row["seconds"] / peak
    paper_cost.show(report)
    print(
        f"peak memory {report['peak_memory_bytes'] / 2**30:.1f} GiB; full model at "
        f"{100 * report['full']['utilisation']:.0f}% of a measured {peak / 1e12:.0f} TFLOP/s"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = paper_cost.shortfalls(report)
    if args.check and failed:
        print(f"more than {paper_cost.ALLOWED_POINTS:g} points above FLOPs: {'; '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
