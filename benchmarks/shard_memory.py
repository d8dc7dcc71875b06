"""Does a model train that is four times as large as what each process may hold? Memory under `train.parallel: shard`.

    python benchmarks/shard_memory.py --check --out benchmarks/results/shard_memory.json

A config-built Llama of half a billion weights in float32 is saved, and tuned for a few steps by eight processes (gloo,
on one CPU). Each samples its anonymous memory from before loading to the end. To that its part of the weights is added:
on a CPU these are pages of the file, which count elsewhere. glibc is told to give back what is freed
(`MALLOC_MMAP_THRESHOLD_`); by itself it keeps the layers that a process has gathered. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from memory import resident

sys.path.insert(0, str(Path(__file__).parent / "reliability"))

from scenarios import environment, free_port

PROCESSES, PARTS = 8, 4
"""Each of so many processes may hold one part of so many."""
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


class Peak(threading.Thread):
    """The most anonymous memory that this process has while it runs, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begun = self.most = resident("RssAnon")

    def run(self) -> None:
        while True:
            self.most = max(self.most, resident("RssAnon"))
            time.sleep(0.01)


def one_process(recipe: Path, result: Path) -> None:
    """A process of the run: trains, and says how much memory it took."""
    import torch

    from fast_prompt_tuning.recipe import load
    from fast_prompt_tuning.run import run
    from fast_prompt_tuning.train import parallel

    torch.set_num_threads(1)
    parallel.start("cpu", "shard")
    peak = Peak()
    peak.start()
    found = run.train(load(json.loads(recipe.read_text())))
    memory = parallel.gather(peak.most - peak.begun)
    if parallel.rank() == 0:
        result.write_text(json.dumps({"bytes": memory, "losses": [loss for _, loss in found.losses]}))
    parallel.stop()


def measure(folder: Path, layers: int, steps: int, processes: int) -> dict[str, Any]:
    """Make the model, run the processes, and read what they took."""
    import torch
    from toy import toy
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = json.loads((toy().llama / "config.json").read_text())
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers, "vocab_size": sizes["vocab_size"]})
    torch.manual_seed(0)
    plm = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in plm.parameters())
    plm.save_pretrained(folder / "model", max_shard_size="200MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((toy().llama / name).read_bytes())
    del plm
    changes = {"train__steps": steps, "train__batch_size": 1, "train__eval_every": steps, "train__parallel": "shard"}
    changes |= {"data__validation_limit": processes, "method": "pt", "model__path": str(folder / "model")}
    (folder / "recipe.json").write_text(json.dumps(toy().recipe(folder / "run", **changes)))
    port, frees = free_port(), dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**20))
    command = [sys.executable, __file__, "--process", str(folder / "recipe.json"), str(folder / "found.json")]
    begun = time.perf_counter()
    children = [subprocess.Popen(command, env=environment(r, processes, port) | frees) for r in range(processes)]
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError("a process has failed")
    found = json.loads((folder / "found.json").read_text())
    return {
        "benchmark": "shard_memory",
        "processes": processes,
        "parameters": parameters,
        "model_bytes": 4 * parameters,
        "limit_bytes": 4 * parameters // PARTS,
        "part_bytes": 4 * parameters // processes,
        "own_bytes": found["bytes"],
        "losses": found["losses"],
        "seconds": time.perf_counter() - begun,
        "torch": torch.__version__,
    }


def main() -> int:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a small model and two processes: the script, not a number"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a process holds more than its limit")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--process", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        one_process(*args.process)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        layers, steps, processes = (2, 2, 2) if args.quick else (SIZES["num_hidden_layers"], 3, PROCESSES)
        report = measure(Path(folder), int(layers), steps, processes)
    most = max(report["own_bytes"]) + report["part_bytes"]
    print(
        f"{report['parameters']:,} weights, {report['model_bytes'] / 2**20:.0f} MiB; limit of each of "
        f"{report['processes']} processes {report['limit_bytes'] / 2**20:.0f} MiB, most taken {most / 2**20:.0f} MiB"
    )
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(args.check and most > report["limit_bytes"])


if __name__ == "__main__":
    sys.exit(main())
