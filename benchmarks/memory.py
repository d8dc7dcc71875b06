"""Peak memory of a process that tunes a prompt through every FPT stage, against one that tunes it on the full model.

    python benchmarks/memory.py --check --out benchmarks/results/memory.json

Every method runs in a process of its own, which reads the kernel's high-water mark of its resident memory
(`VmHWM`), set back before each stage. On one short text activations are small and weights are what is measured: a
stage may need the full model's memory, plus one narrowed copy of the kept FFN neurons: that is what `--check` looks at.
On whole batches activations are on top, and a partial model needs fewer of them. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from step_time import MODELS, PROMPT, build, machine

from fast_prompt_tuning import PartialPLM, Schedule, Stage, soft_prompt_config
from fast_prompt_tuning.plm.objective import choose_attention, label_loss
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter

SLACK = 0.02
"""What a stage may need beyond weights and narrowed copies, of the full model's weights: allocator and activations."""


def resident(field: str) -> int:
    """A line of the kernel's account of this process, in bytes: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def highest(work: Any) -> int:
    """The most memory the process has while `work` runs, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the kernel
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return resident("VmHWM")


def narrowed_bytes(partial: PartialPLM, stage: Stage) -> int:
    """Size of the kept FFN neurons' weights: what a stage may hold beside the full model."""
    if stage.same_size(partial.full_stage):
        return 0
    (name,), plm = partial.full_stage.stacks, partial.plm
    kept, width, whole = stage.layers_in(name), stage.ffn_in(name), partial.full_stage.ffn_in(name)
    if width is None or width == whole:
        return 0
    ffn = 3 if getattr(plm.config, "hidden_act", None) else 2  # gate, up and down; two projections without a gate
    layers = kept if kept is not None else partial.full_stage.layers_in(name)
    return int(ffn * layers * width * plm.config.hidden_size * plm.dtype.itemsize)


def child(name: str, method: str, batch: int, tokens: int) -> dict[str, Any]:
    """Two steps at every stage of a method, in this process."""
    plm, _ = build(name, torch.float32)
    choose_attention(plm, PROMPT + tokens)
    model = get_peft_model(plm, soft_prompt_config(plm, PROMPT))
    torch.nn.init.normal_(prompt_parameter(model), std=0.02)
    partial = PartialPLM(model, keep_neurons="first")
    ids = torch.randint(4, plm.config.vocab_size, (batch, tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step() -> None:
        label_loss(model, inputs).backward()
        model.zero_grad()

    with torch.no_grad():
        label_loss(model, inputs)  # every weight has been read, so the mapped file is resident
    weights = sum(p.numel() * p.element_size() for p in plm.parameters())
    loaded = resident("VmRSS")
    stages = []
    for stage in Schedule.preset(method, partial.full_stage, total_steps=100).stages:
        partial.restore()  # as the Trainer's callback does when a stage begins

        def work(stage: Stage = stage) -> None:
            with partial.at(stage):
                step()
                step()

        stages.append({"stage": str(stage), "narrowed": narrowed_bytes(partial, stage), "peak": highest(work)})
    return {"method": method, "batch": batch, "tokens": tokens, "weights": weights, "loaded": loaded, "stages": stages}


def excess(run: dict[str, Any], plain: dict[str, Any]) -> float:
    """The most that a stage needs beyond plain tuning's peak and its narrowed copy, of the full model's weights."""
    whole = plain["stages"][-1]["peak"] - plain["loaded"]
    beyond = [s["peak"] - run["loaded"] - whole - s["narrowed"] for s in run["stages"]]
    return float(max(beyond) / run["weights"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", choices=[m for m in MODELS if m != "t5-large"])
    parser.add_argument("--check", action="store_true", help="exit 1 where a stage needs more than promised")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "BATCH", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        method, batch, tokens = args.child
        print(json.dumps(child(args.model, method, int(batch), int(tokens))))
        return 0
    runs = []
    for batch, tokens in ((1, 8), (8, 96)):
        for method in ("pt", "ld", "fr", "cr"):
            command = [sys.executable, __file__, "--model", args.model, "--child", method, str(batch), str(tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    mib, worst = 2**20, 0.0
    for run in runs:
        plain = next(r for r in runs if r["method"] == "pt" and r["batch"] == run["batch"])
        run["excess"] = excess(run, plain)
        worst = max(worst, run["excess"] if run["batch"] == 1 else 0.0)
        above = ", ".join(f"{(stage['peak'] - run['loaded']) / mib:.0f}" for stage in run["stages"])
        print(
            f"{run['method']:3} {run['batch']} x {run['tokens']} tokens: weights {run['weights'] / mib:.0f} MiB; "
            f"by stage {above} MiB above the loaded model; beyond plain tuning and the narrowed copy at most "
            f"{100 * run['excess']:+.1f}% of the weights"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"benchmark": "memory", "model": args.model, "machine": machine(), "slack": SLACK, "runs": runs}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.check and worst > SLACK:
        print(f"missed: a stage needs {100 * worst:.1f}% of the weights more than promised, wanted {100 * SLACK:.0f}%")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
