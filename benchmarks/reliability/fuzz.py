"""Mutated files for everything that reads one: each case works or ends in one of our typed errors.

    python benchmarks/reliability/fuzz.py --cases 2000                # all targets, random mutations
    python benchmarks/reliability/fuzz.py --coverage --seconds 60     # coverage-guided; needs `pip install atheris`

A crash is any other exception, or a case that takes over ten seconds. Crashing inputs are printed.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE)]

COVERAGE = "--one" in sys.argv
if COVERAGE:  # before our own code is imported, so that it can be watched
    import atheris

    with atheris.instrument_imports(include=["fast_prompt_tuning"]):
        pass

import datasets  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from toy import toy  # noqa: E402

from fast_prompt_tuning import recipe as config  # noqa: E402
from fast_prompt_tuning.data import readers as examples  # noqa: E402
from fast_prompt_tuning.data import tasks  # noqa: E402
from fast_prompt_tuning.errors import FptError  # noqa: E402
from fast_prompt_tuning.prompt import soft_prompt  # noqa: E402
from fast_prompt_tuning.run import results  # noqa: E402
from fast_prompt_tuning.scores.layers import LayerScores  # noqa: E402
from fast_prompt_tuning.scores.neurons import NeuronScores  # noqa: E402
from fast_prompt_tuning.train import checkpoint  # noqa: E402

SLOW = 10.0
"""Seconds after which a case counts as hanging."""


@dataclass(frozen=True)
class Target:
    """Something that reads bytes: `read(bytes)` works or raises; `seeds` are valid inputs."""

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], object]


# -- what reads -------------------------------------------------------------------------------------------------------

DATA = HERE.parents[1] / "tests" / "files"
SPLITS = {  # task, its files
    "mnli": ["mnli_train.tsv"],
    "qqp": ["qqp_train.tsv"],
    "sst2": ["sst2_dev.tsv"],
    "squad2": ["squad2.json"],
    "record": ["record.jsonl"],
    "boolq": ["boolq.jsonl"],
    "xsum": ["xsum.jsonl"],
    "topics": ["topics.csv", "topics.tsv"],
}


def targets(folder: Path) -> Iterator[Target]:
    """Everything of the package that reads a user's file or text."""
    recipe = toy().recipe(folder / "run")
    stages = [{"layers": 2, "ffn": {"decoder": 8}, "steps": 4, "batch": 2}, {"layers": 5, "ffn": 24, "steps": 6}]
    recipes = [recipe, {**recipe, "stages": stages}, {**recipe, "method": "auto"}]
    yield Target("recipe", [yaml.safe_dump(r).encode() for r in recipes], _file(folder / "a.yaml", config.load))
    yield Target(
        "--set",
        [b"train.steps=100", b"data.files={train: a.jsonl}", b"stages=[{layers: 2, ffn: 8, steps: 10}]"],
        lambda b: config.load(recipe, [b.decode("utf-8", "surrogateescape")]),
    )
    own = [toy().topics.read_bytes(), toy().words.read_bytes()]
    built_in = [tasks._folder().joinpath(f"{n}.yaml").read_bytes() for n in tasks.task_names()]
    yield Target("task", own + built_in, _file(folder / "task.yaml", lambda p: _use_task(tasks.load_task(str(p)))))
    for name, files in SPLITS.items():
        task = tasks.load_task(str(toy().topics) if name == "topics" else name)
        for file in files:
            seed = (DATA / file).read_bytes()
            read = _file(folder / f"x{Path(file).suffix}", lambda p, task=task: _read_rows(task, p))
            yield Target(f"data: {file}", [seed], read)
    neurons, layers = folder / "n.safetensors", folder / "l.safetensors"
    meta = {"model_fingerprint": "0" * 16, "kind": "mean", "model": "x"}
    NeuronScores({"decoder": torch.rand(2, 4)}, meta).save(neurons)
    yield Target("neuron scores", [neurons.read_bytes()], _file(folder / "s.safetensors", NeuronScores.load))
    LayerScores({"decoder": torch.rand(3)}, {**meta, "kind": "influence", "flops": "1"}).save(layers)
    yield Target("layer scores", [layers.read_bytes()], _file(folder / "t.safetensors", LayerScores.load))
    yield from _checkpoints(folder)
    yield from _prompts(folder)


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return run


def _use_task(task: tasks.Task) -> None:
    for decoder in (False, True):
        task.input_fields(decoder=decoder)
        task.choices(decoder=decoder)
        fields = {"text": "a b", "label": "sport", "first": "a", "premise": "p", "question": "q", "document": "d"}
        task.render(fields, split="train", decoder=decoder)


def _read_rows(task: tasks.Task, path: Path) -> None:
    files = {"train": str(path)}
    examples.load_examples(task, "train", decoder=True, files=files, on_bad_row="skip")
    examples.load_examples(task, "train", decoder=False, files=files)


def _checkpoints(folder: Path) -> Iterator[Target]:
    place = folder / "checkpoint-3"
    place.mkdir()
    weight = torch.nn.Parameter(torch.rand(3, 4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    checkpoint.save_state(place, "optimizer", optimizer.state_dict())
    checkpoint.save_state(place, "process_0", {"random": checkpoint.random_state(), "loss": 0.5})
    checkpoint.seal(place, 3, {"config": {}})
    kept = {f.name: f.read_bytes() for f in place.iterdir()}

    def restore() -> None:
        for name, content in kept.items():
            (place / name).write_bytes(content)

    for name in ("manifest.json", "optimizer.json", "optimizer.safetensors"):

        def read(content: bytes, name: str = name) -> None:
            restore()
            (place / name).write_bytes(content)
            found = checkpoint.latest(folder)  # passes over what is damaged, whatever the damage
            if found is not None and content != kept[name] and name != "manifest.json":
                raise RuntimeError("a damaged checkpoint was taken for whole")
            checkpoint.load_state(place, "optimizer")  # as if its checksums had been made to fit

        yield Target(f"checkpoint: {name}", [kept[name]], read)

    def read_random(content: bytes) -> None:
        restore()
        (place / "process_0.json").write_bytes(content)
        state = checkpoint.load_state(place, "process_0")
        if isinstance(state, dict) and "random" in state:
            checkpoint.set_random_state(state["random"])

    yield Target("checkpoint: random generators", [kept["process_0.json"]], read_random)


def _prompts(folder: Path) -> Iterator[Target]:
    from peft import get_peft_model
    from settings import BY_NAME

    plm = BY_NAME["llama"].plm()
    stock, suffix = folder / "stock", folder / "suffix"
    suffix.mkdir()
    soft_prompt.save_suffix_prompt(suffix, torch.rand(3, 4), placement="infix", base_model="x", model_fingerprint="0")
    get_peft_model(plm, soft_prompt.soft_prompt_config(plm, num_virtual_tokens=3)).save_pretrained(str(stock))
    for place in (stock, suffix):
        kept = {f.name: f.read_bytes() for f in place.iterdir() if f.suffix in (".json", ".safetensors")}
        for name in kept:

            def read(content: bytes, place: Path = place, kept: dict[str, bytes] = kept, name: str = name) -> None:
                for file, own in kept.items():
                    (place / file).write_bytes(own)
                (place / name).write_bytes(content)
                soft_prompt.load_prompt(place)
                soft_prompt.placement_of(place)

            yield Target(f"prompt: {place.name}/{name}", [kept[name]], read)
    committed = HERE.parents[0] / "results" / "step_time.json"
    result = {
        "schema_version": 1,
        "name": "x",
        "metrics": {"accuracy": 1.0},
        "losses": [[1, 2.0]],
        "status": "finished",
    }
    seeds = [json.dumps(result).encode(), committed.read_bytes()[:4000] if committed.is_file() else b"{}"]
    yield Target("result", seeds, _file(folder / "result.json", results.load_result))


# -- mutations --------------------------------------------------------------------------------------------------------

ODD = [
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b"\t\t", b'"', b"'", b'""""', b"{", b"}", b"[",
    b"]", b":", b"- ", b",", b"? ", b"|\n", b">\n", b"%", b"@", b"`", b"null", b"true", b"-1", b"0", b"-100", b"1e999",
    b"NaN", b".inf", b"9" * 40, b"9" * 5000, b"0x", b"1_000", b"12:30:45", b"2020-01-01", b"&a [*a]", b"*a", b"<<: ",
    b"!!python/object:os.system", b"!!binary x", b"{{ ", b" }}", b"{% for i in range(9**9) %}x{% endfor %}",
    b"{{ ''.__class__.__mro__ }}", b"__class__", b"\\ud800", b"\xf0\x9f\x98\x80", b"\xe2\x80\xa8", b"../../etc/passwd",
    b"/dev/zero", b"(a+)+$", b"[" * 3000, b'{"a":' * 3000,
]  # fmt: skip


def mutate(draw: random.Random, seeds: list[bytes]) -> bytes:
    """One to four changes to a seed: flipped, cut, repeated, moved, exchanged or odd pieces."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice((0, 1, 1, 2, 8, 40, 400)))
        kind = draw.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at:end]
        elif kind == 2:
            content[at:end] = draw.choice(ODD)
        elif kind == 3:
            content[at:at] = content[at:end] * draw.choice((1, 2, 50))
        elif kind == 4:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            content[at:end] = other[start : start + draw.randrange(200)]
        elif kind == 5:
            content[at:] = b""
        else:  # a whole value between two marks
            content = _exchange(draw, content)
    return bytes(content)


def _exchange(draw: random.Random, content: bytearray) -> bytearray:
    marks = [i for i, byte in enumerate(content) if byte in b':,[]{}"\n\t ']
    if len(marks) < 2:
        return content
    i = draw.randrange(len(marks) - 1)
    return content[: marks[i] + 1] + draw.choice(ODD) + content[marks[i + 1] :]


def attempt(target: Target, content: bytes) -> str | None:
    """What went wrong with one case; None where it worked or was refused as it should."""
    start = time.process_time()  # of this process: what else the machine does is no fault of the reader
    try:
        target.read(content)
    except FptError:
        pass
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - start
    return f"took {seconds:.0f} s" if seconds > SLOW else None


def fuzz(cases: int, seed: int = 0, only: str = "") -> dict[str, dict[str, object]]:
    """Target → number of cases, how many worked, and the crashes."""
    _quiet()
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for target in targets(Path(work)):
            if only and only not in target.name:
                continue
            draw = random.Random(f"{seed} {target.name}")
            for valid in target.seeds[:1]:
                target.read(valid) if target.name != "result" else None
            crashes = {}
            for _ in range(cases):
                content = mutate(draw, target.seeds)
                wrong = attempt(target, content)
                if wrong is not None:
                    crashes.setdefault(wrong, base64.b64encode(content).decode()[:4000])
            found[target.name] = {"cases": cases, "crashes": crashes}
    return found


def _quiet() -> None:
    logging.disable(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


# -- coverage-guided --------------------------------------------------------------------------------------------------


def coverage(seconds: int, folder: Path) -> dict[str, dict[str, object]] | None:
    """The same targets, each in a process of its own under atheris; None where it is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None
    with tempfile.TemporaryDirectory() as work:
        names = [(target.name, target.seeds) for target in targets(Path(work))]
    found = {}
    for i, (name, seeds) in enumerate(names):
        corpus = folder / f"corpus-{i}"
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir(parents=True)
        for k, seed in enumerate(seeds):
            (corpus / str(k)).write_bytes(seed)
        command = [sys.executable, str(HERE / "fuzz.py"), "--one", name, "--", str(corpus)]
        command += [
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=0",
            f"-artifact_prefix={folder}/crash-{i}-",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stderr + done.stdout).splitlines()
        cases = max((int(line.split()[0][1:]) for line in lines if line[:1] == "#" and line[1:2].isdigit()), default=0)
        features = [line for line in lines if " cov: " in line]
        covered = int(features[-1].split(" cov: ")[1].split()[0]) if features else 0
        crashed = [] if done.returncode == 0 else lines[-12:]
        found[name] = {"cases": cases, "covered": covered, "corpus": len(list(corpus.iterdir())), "crashes": crashed}
    return found


def _one(name: str) -> None:
    _quiet()
    work = tempfile.mkdtemp()
    target = next(t for t in targets(Path(work)) if t.name == name)

    def test(content: bytes) -> None:
        wrong = attempt(target, content)
        if wrong is not None:
            raise RuntimeError(wrong)

    atheris.Setup([sys.argv[0], *sys.argv[sys.argv.index("--") + 1 :]], test)
    atheris.Fuzz()


def main() -> int:
    """Fuzz, print what crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--seconds", type=int, default=30, help="per target, with --coverage")
    options = parser.parse_args()
    if options.coverage:
        found = coverage(options.seconds, Path(tempfile.mkdtemp()))
    else:
        found = fuzz(options.cases, options.seed, options.only)
    print(json.dumps(found, indent=1))
    return int(found is None or any(one["crashes"] for one in found.values()))


if __name__ == "__main__":
    if COVERAGE:
        _one(sys.argv[sys.argv.index("--one") + 1])
    else:
        sys.exit(main())
