"""What the harness and the test suite both check: kills, resumption, several processes. Tiny models, real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE)]

import ranks  # noqa: E402
import torch  # noqa: E402
from toy import toy  # noqa: E402

from fast_prompt_tuning.prompt.soft_prompt import load_prompt  # noqa: E402
from fast_prompt_tuning.recipe import load  # noqa: E402
from fast_prompt_tuning.run import run  # noqa: E402
from fast_prompt_tuning.run.results import load_result  # noqa: E402
from fast_prompt_tuning.scores.neurons import NeuronScores  # noqa: E402
from fast_prompt_tuning.train import checkpoint, loop  # noqa: E402

ADAFACTOR = {"optim__optimizer": "adafactor", "optim__lr": 0.3}


def recipe(output: Path, **changes: Any) -> Any:
    """A run of a second on a tiny model (`tests/toy.py`)."""
    return load(toy().recipe(output, **changes))


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def forked() -> Any:
    """A way to start processes that have everything imported already: forked from one that did nothing else."""
    context = multiprocessing.get_context("forkserver")
    # That one looks for modules in PYTHONPATH only.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*sys.path[:2], *filter(None, sys.path)]))
    context.set_forkserver_preload(["scenarios"])
    return context


def _child(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    config = load(settings)
    run.train(config, resume=(Path(config.output) / "config.yaml").is_file())


def kills(folder: Path, number: int, seed: int = 0, steps: int = 24) -> dict[str, Any]:
    """Kill a real run with SIGKILL at random moments, again and again, resuming it in between, `number` times.

    After every kill the folder must hold no corrupt file, and no checkpoint that was there may be gone; every run
    that came to its end must be the one that was never killed, bit by bit.

    Returns:
        `tried`, `survived`, `runs` that were finished, `where` the kills fell.
    """
    context = forked()
    settings = {"method": "cr", "train__steps": steps, "train__save_every": 1, "train__eval_every": 4}
    whole = run.train(recipe(folder / "whole", **settings))
    draw = random.Random(seed)
    where = {"before the first checkpoint": 0, "while training": 0}
    tried = survived = finished = 0
    length = 0.0
    while tried < number:
        place = folder / f"run-{finished}"
        config = recipe(place, **settings)
        reached = 0
        while True:
            process = context.Process(target=_child, args=(config.model_dump(mode="json"),))
            start = time.monotonic()
            process.start()
            if tried < number:
                # The first lives show how long one lasts; later ones end somewhere within it.
                process.join(draw.uniform(0, length) if finished > 1 else None)
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    tried += 1
                    now = intact(place)
                    where["while training" if now else "before the first checkpoint"] += 1
                    survived += now >= reached
                    reached = now
                    continue
            process.join()
            lasted = time.monotonic() - start  # the first also waits for the imports of all that follow
            length = min(length or lasted, lasted)
            if process.exitcode != 0:
                raise RuntimeError(f"a resumed run failed with exit code {process.exitcode}; {place}")
            break
        same_run(load_result(place), whole)
        finished += 1
        shutil.rmtree(place)
    return {"tried": tried, "survived": survived, "runs": finished, "where": where}


def intact(place: Path) -> int:
    """The last checkpoint's step, 0 for none; raises where any file under a final name is not whole."""
    if (place / "config.yaml").exists():
        load(place / "config.yaml")
    if (place / "result.json").exists():
        load_result(place)
    if (place / "prompt").exists():
        load_prompt(place / "prompt")
    if (place / "scores.safetensors").exists():
        NeuronScores.load(place / "scores.safetensors")
    places = place / "checkpoints"
    for kind in ("checkpoint", "best"):
        for step in checkpoint.steps_of(places, kind):
            checkpoint.verify(places / f"{kind}-{step}")
    return max(checkpoint.steps_of(places), default=0)


def same_run(one: Any, two: Any) -> None:
    """Raise unless two results are bit-equal in losses, metrics, compute and prompt."""
    for name in ("losses", "metrics", "best_step", "boundaries"):
        if getattr(one, name) != getattr(two, name):
            raise RuntimeError(f"{name} differ: {getattr(one, name)} and {getattr(two, name)}")
    if one.flops["train"] != two.flops["train"]:
        raise RuntimeError("training FLOPs differ")
    if not torch.equal(load_prompt(one.prompt_folder), load_prompt(two.prompt_folder)):
        raise RuntimeError("the prompts differ")


# -- resuming ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "pt": {"method": "pt"},
    "ld": {"method": "ld"},
    "fr": {"method": "fr"},
    "cr": {"method": "cr"},
    "cr, T5, Adafactor": {"method": "cr", **ADAFACTOR, "model__path": "t5"},
    "cr, prompt after the text": {"method": "cr", "prompt__placement": "suffix"},
    "cr, prompt within the text": {"method": "cr", "prompt__placement": "infix"},
    "auto": {"method": "auto"},
}


def resume_table(folder: Path, kinds: list[str], points: list[int] | None = None, steps: int = 12) -> dict[str, Any]:
    """Kind of run → step it was resumed from → stage there, place in it, and whether all that follows is bit-equal.

    Every step of the resumed run is compared: batch, size of the model, loss; then the prompt it ends with.
    """
    table = {}
    for kind in kinds:
        settings = dict(KINDS[kind])
        if settings.get("model__path") == "t5":
            settings["model__path"] = str(toy().t5)
        place = folder / kind.replace(" ", "-").replace(",", "")
        every = {"train__save_every": 1, "train__keep_checkpoints": 99, "train__log_every": 3, "train__eval_every": 4}
        config = recipe(place, **every, **settings, train__steps=steps)
        with _watched() as seen:
            whole = run.train(config)
            expected = dict(seen)
        prompt = load_prompt(place / "prompt")
        starts = whole.boundaries
        kept = folder / "kept"
        shutil.move(place / "checkpoints", kept)
        rows = {}
        for point in points or range(1, max(expected) + 1):
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
            shutil.copytree(kept, place / "checkpoints", ignore=_later(point))
            with _watched() as seen:
                again = run.train(config, resume=True)
            equal = dict(seen) == {s: v for s, v in expected.items() if s >= point}
            equal &= (again.losses, again.metrics) == (whole.losses, whole.metrics)
            equal &= torch.equal(load_prompt(place / "prompt"), prompt)
            stage = max(i for i, start in enumerate(starts) if start <= point)
            growths = starts[1:]
            at = (
                "at a growth"
                if point in growths
                else "before a growth"
                if point + 1 in growths
                else "after a growth"
                if point - 1 in growths
                else "within a stage"
            )
            rows[point] = {"stage": stage + 1, "point": at, "bit_equal": bool(equal)}
        table[kind] = rows
        shutil.rmtree(kept)
    return table


def _later(point: int) -> Any:
    return lambda _folder, names: [n for n in names if n.split("-")[0] == "checkpoint" and int(n.split("-")[1]) > point]


class _watched:
    """Step → (batches, stage, loss) of everything the loop computes a gradient of."""

    def __enter__(self) -> dict[int, Any]:
        seen: dict[int, Any] = {}
        self.inner = inner = loop.Loop.gradient

        def gradient(own: Any, batches: Any, labels: int, stage: Any) -> Any:
            loss, work = inner(own, batches, labels, stage)
            seen[own.state.global_step] = ([b["input_ids"].tolist() for b in batches], str(stage), loss.item())
            return loss, work

        loop.Loop.gradient = gradient  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_: Any) -> None:
        loop.Loop.gradient = self.inner  # type: ignore[method-assign]


# -- several processes ------------------------------------------------------------------------------------------------

STAGES = [
    {"layers": 2, "ffn": 24, "steps": 4},
    {"layers": 5, "ffn": 12, "steps": 4},
    {"layers": 5, "ffn": 24, "steps": 4},
]
SHARD, TENSOR = {"train__parallel": "shard"}, {"train__parallel": "tensor"}
DISTRIBUTED: dict[str, dict[str, Any]] = {
    "pt": {"method": "pt"},
    "ld, growth at 2, 5, 7": {"method": "ld"},
    "fr, growth at 2, 5, 7": {"method": "fr"},
    "cr, growth at 2, 5, 7": {"method": "cr"},
    "cr, resumed after step 6": {"method": "cr", "break_at": 7, "train__save_every": 2},
    "cr, batches accumulated": {"method": "cr", "train__accumulate": 2},
    "cr, prompt after the text": {"method": "cr", "prompt__placement": "suffix"},
    "cr, prompt within the text": {"method": "cr", "prompt__placement": "infix"},
    "cr, T5": {"method": "cr", "model__path": "t5", **ADAFACTOR},
    "stages on parts of the batch": {"method": "cr", "stages": STAGES, "part": True},
    "full": {"method": "full", "optim__lr": 0.01},
    "ld, sharded": {"method": "ld", **SHARD},
    "ld, sharded, resumed after step 6": {"method": "ld", "break_at": 7, "train__save_every": 2, **SHARD},
    "ld, T5, sharded": {"method": "ld", "model__path": "t5", **ADAFACTOR, **SHARD},
    "ld, prompt after the text, sharded": {"method": "ld", "prompt__placement": "suffix", **SHARD},
    "prompt within the text, sharded": {"method": "pt", "prompt__placement": "infix", **SHARD},
    "auto, sharded": {"method": "auto", **SHARD},
    "layers chosen by influence, sharded": {"method": "ld", "scoring__keep_layers": "influence", **SHARD},
    "generated answers, sharded": {"method": "pt", "eval__labels": "text", **SHARD},
    "ld, tensor parallel": {"method": "ld", **TENSOR},
    "ld, tensor parallel, resumed after step 6": {"method": "ld", "break_at": 7, "train__save_every": 2, **TENSOR},
    "ld, prompt after the text, tensor parallel": {"method": "ld", "prompt__placement": "suffix", **TENSOR},
    "auto, tensor parallel": {"method": "auto", **TENSOR},
}
"""Each on 41 examples by 4: the last batch of an epoch has one example, so one of two processes has none."""


def distributed(folder: Path, kinds: list[str]) -> dict[str, Any]:
    """Kind of run → largest relative difference of its losses between one process and two, same global batches."""
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for i, kind in enumerate(kinds):
        for processes in runs:
            changes = {"train__steps": 12, "data__train_limit": 41, **DISTRIBUTED[kind]}
            together = changes.get("train__parallel") == "tensor"  # two processes compute a batch as one
            changes["train__batch_size"] = 4 if together else 4 // processes
            break_at, part = changes.pop("break_at", None), changes.pop("part", False)
            if part:
                first = {**STAGES[0], "batch": 2 // processes}
                changes["stages"] = [first, *STAGES[1:]]
            if changes.get("model__path") == "t5":
                changes["model__path"] = str(toy().t5)
            made = toy().recipe(folder / f"{i}-{processes}", **changes)
            runs[processes].append({"recipe": made, "break_at": break_at})
    found = {1: [ranks.losses(**one) for one in runs[1]], 2: _launch(folder, 2, runs[2])}
    table = {}
    for kind, one, two in zip(kinds, found[1], found[2], strict=True):
        table[kind] = _against(one, two)
    return table


def _against(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    gaps = [abs(a - b) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True)]
    same = one["metrics"] == other["metrics"]
    return {"steps": len(gaps), "largest_relative_difference": max(gaps), "metrics_equal": same}


MOVED = {"data": (1, 4), "shard": (1, 4), "tensor": (1,)}
"""`train.parallel` → how many processes go on from a checkpoint of two. The toy has two heads of keys and values."""


def moved(folder: Path) -> dict[str, Any]:
    """Two processes are broken off after step 7, and one or four go on from step 6: losses against one process's."""
    folder.mkdir(parents=True, exist_ok=True)

    def recipe(name: str, way: str, processes: int) -> dict[str, Any]:
        size = 4 if way == "tensor" else 4 // processes
        return toy().recipe(
            folder / name, method="ld", train__steps=12, data__train_limit=41, train__save_every=2,
            train__parallel=way, train__batch_size=size,
        )  # fmt: skip

    plain = ranks.losses(recipe("plain", "data", 1))
    table = {}
    for way, numbers in MOVED.items():
        _launch(folder, 2, [{"recipe": recipe(f"{way}-2", way, 2), "break_at": 7, "goes_on": False}])
        for processes in numbers:
            here = folder / f"{way}-{processes}"
            shutil.copytree(folder / f"{way}-2", here)
            one = {"recipe": recipe(here.name, way, processes), "moved": True}
            found = ranks.losses(**one) if processes == 1 else _launch(folder, processes, [one])[0]
            table[f"{way}, two to {processes}"] = _against(plain, found)
    return table


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun sets for a process."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in found.items()}}


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _launch(folder: Path, processes: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    todo, done = folder / f"runs-{processes}.json", folder / f"found-{processes}.json"
    todo.write_text(json.dumps(runs))
    port = free_port()
    command = [sys.executable, str(HERE / "ranks.py"), str(todo), str(done)]
    children = [
        subprocess.Popen(
            command, env=environment(r, processes, port), stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
        )
        for r in range(processes)
    ]
    outputs = [child.communicate(timeout=1200)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        if child.returncode:
            raise RuntimeError(f"a process ended with {child.returncode}:\n{output[-4000:]}")
    return json.loads(done.read_text())  # type: ignore[no-any-return]


def one_process_killed(folder: Path, way: str = "data") -> dict[str, Any]:
    """Two processes train, as `train.parallel`; one is killed.

    The other must end with a clear error, and the checkpoint must be usable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = toy().recipe(
        folder / "run", method="ld", train__steps=4000, train__batch_size=2, train__save_every=2, train__parallel=way
    )
    (folder / "recipe.yaml").write_text(json.dumps(made))
    port = free_port()
    command = [sys.executable, "-m", "fast_prompt_tuning", "train", "-c", str(folder / "recipe.yaml")]
    children = [
        subprocess.Popen(
            command, env=environment(r, 2, port), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for r in range(2)
    ]
    places = folder / "run" / "checkpoints"
    deadline = time.monotonic() + 300
    while not checkpoint.steps_of(places) and time.monotonic() < deadline and all(c.poll() is None for c in children):
        time.sleep(0.1)
    children[1].kill()
    said = children[0].communicate(timeout=120)[1]
    children[1].communicate()
    found = checkpoint.latest(places)
    return {
        "exit_code": children[0].returncode,
        "said": [line for line in said.splitlines() if "error:" in line][-1:],
        "checkpoint": found.step if found else None,
        "traceback": "Traceback" in said,
    }
