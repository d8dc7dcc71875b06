"""Mutated files for everything that reads one: each case works or ends in one of our typed errors.

    python benchmarks/reliability/fuzz.py --cases 2000                # all targets, random mutations
    python benchmarks/reliability/fuzz.py --coverage --seconds 60     # coverage-guided; needs `pip install atheris`

A crash is any other exception, or a case that takes over ten seconds. Crashing inputs are printed.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE)]

COVERAGE = "--guided" in sys.argv
if COVERAGE:  # first of all, so that what is watched is imported under watch
    import atheris

    with atheris.instrument_imports(include=["fast_prompt_tuning", "yaml", "jinja2"]):
        import fast_prompt_tuning.report.page
        import fast_prompt_tuning.run.run  # noqa: F401

import datasets  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from toy import result, toy  # noqa: E402

from fast_prompt_tuning import recipe as config  # noqa: E402
from fast_prompt_tuning.data import patterns, task_files, tasks, templates  # noqa: E402
from fast_prompt_tuning.data import readers as examples  # noqa: E402
from fast_prompt_tuning.errors import FptError  # noqa: E402
from fast_prompt_tuning.paths import built_in  # noqa: E402
from fast_prompt_tuning.prompt import soft_prompt  # noqa: E402
from fast_prompt_tuning.report import pictures  # noqa: E402
from fast_prompt_tuning.report.tables import comparison_table  # noqa: E402
from fast_prompt_tuning.run import results  # noqa: E402
from fast_prompt_tuning.scores.layers import LayerScores  # noqa: E402
from fast_prompt_tuning.scores.neurons import NeuronScores  # noqa: E402
from fast_prompt_tuning.train import checkpoint, optimizer, restored  # noqa: E402

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
    shipped = [path.read_bytes() for path in built_in("tasks").values()]
    yield Target("task", own + shipped, _file(folder / "task.yaml", lambda p: _use_task(task_files.load_task(str(p)))))
    yield from _templates()
    for name, files in SPLITS.items():
        task = task_files.load_task(str(toy().topics) if name == "topics" else name)
        for file in files:
            seed = (DATA / file).read_bytes()
            read = _file(folder / f"x{Path(file).suffix}", lambda p, task=task: _read_rows(task, p))
            yield Target(f"data: {file}", [seed], read)
    rows = [{"text": "the ball", "label": "sport", "id": str(i)} for i in range(3)]
    own_task = task_files.load_task(str(toy().topics))
    for name, content in (
        ("array.json", json.dumps(rows, indent=1).encode()),
        ("semicolons.csv", b'text;label\n"the; ball";sport\nthe goal;sport\n'),
        ("zipped.csv.gz", gzip.compress(b"text,label\nthe ball,sport\n", mtime=0)),
    ):
        yield Target(f"data: {name}", [content], _file(folder / name, lambda p: _read_rows(own_task, p)))
    neurons, layers = folder / "n.safetensors", folder / "l.safetensors"
    meta = {"model_fingerprint": "0" * 16, "kind": "mean", "model": "x"}
    NeuronScores({"decoder": torch.rand(2, 4)}, meta).save(neurons)
    yield Target("neuron scores", [neurons.read_bytes()], _file(folder / "s.safetensors", NeuronScores.load))
    LayerScores({"decoder": torch.rand(3)}, {**meta, "kind": "influence", "flops": "1"}).save(layers)
    yield Target("layer scores", [layers.read_bytes()], _file(folder / "t.safetensors", LayerScores.load))
    yield from _checkpoints(folder)
    yield from _forged(folder / "forged")
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


TEMPLATES = [
    b"{{ text | trim | upper }}\n{% for i in items if i %}{{ loop.index }}. {{ i }}{% else %}-{% endfor %}",
    b"{% if title %}{{ title ~ ': ' }}{% elif n > 2 and n is odd %}{{ text.split('.')[0] }}{% endif %}{{ text[1:-2] }}",
    b"{{ items | map('replace', 'a', text) | unique | sort | join(', ') }} {{ meta.who or other | default('x') }}",
    b"{{ (n + 1) | round(2) }} {{ meta | tojson | truncate(9, True) }} {% raw %}{{ }}{% endraw %}{# #}",
]
PATTERNS = [rb"(\.|\?|\!)\n@highlight\n", rb"(?i)\s+(?=[a-z]*)(\d{2,4})?", rb"(a+)+$", rb"^(\w|\s)*?x{3}"]
ROW = {
    "text": "a text. Ab 1907\n@highlight\naaaaaaaaaaaaaaaaaaaaaaaaaa!",
    "items": ["b", "a"],
    "n": 3,
    "meta": {"who": "Ann"},
}


def _templates() -> Iterator[Target]:
    yield Target("template", TEMPLATES, lambda b: templates.render(b.decode("utf-8", "replace"), ROW))

    def replace(content: bytes) -> None:
        pattern, _, by = content.decode("utf-8", "replace").partition("\x00")
        try:
            rule = tasks.Replace(field="text", pattern=pattern, by=by)
        except ValueError:  # pydantic's, which loading a task makes one of ours
            return
        patterns.substitute(rule.pattern, rule.by, ROW["text"] * 20)

    yield Target("pattern", [p + b"\x00\\1 " for p in PATTERNS], replace)


def _forged(folder: Path) -> Iterator[Target]:
    """Parts of a checkpoint under a manifest that fits: what reaches the checks behind the checksums."""
    place = folder / "checkpoint-3"
    place.mkdir(parents=True)
    weight, optim = torch.nn.Parameter(torch.rand(3, 4)), config.load(toy().recipe(folder / "run")).optim
    adam, rates = optimizer.make_optimizer([weight], optim, 1)
    weight.grad = torch.ones_like(weight)
    adam.step()
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "eval_accuracy": 1.0, "train_flops": 1.0, "train_seconds": 1.0}]
    loop = {"log": log, "losses": [0.5], "parts": 1, "skipped": 0, "skipped_in_a_row": 0}
    states = {"optimizer": adam.state_dict(), "scheduler": rates.state_dict(), "loop": loop}
    states |= {"good": [weight.detach()], "process_0": checkpoint.random_state()}
    for name, state in states.items():
        checkpoint.save_state(place, name, state)
    record = {"config": {"optim": optim.model_dump()}, "flops": {"eval": 1.0}, "train_seconds": 1, "total_seconds": 2}
    kept = {f.name: f.read_bytes() for f in place.iterdir()}

    def read(content: bytes, name: str) -> None:
        for file in place.iterdir():
            file.unlink()
        for file, own in kept.items():
            (place / file).write_bytes(own)
        said = record
        if name == "record":
            try:
                said = json.loads(content)
            except (ValueError, RecursionError):
                return  # no manifest can be made of it
        else:
            (place / name).write_bytes(content)
        try:
            checkpoint.seal(place, 3, said)
        except (ValueError, TypeError, RecursionError):
            return
        restored.check(checkpoint.verify(place), SimpleNamespace(trained=[weight], whole=False), optim)
        checkpoint.set_random_state(checkpoint.load_state(place, "process_0"))

    seeds = {**kept, "record": json.dumps(record).encode()}
    for name, seed in seeds.items():
        yield Target(f"forged: {name}", [seed], lambda content, name=name: read(content, name))


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
                soft_prompt.place_of(place)

            yield Target(f"prompt: {place.name}/{name}", [kept[name]], read)
    grown = result("grown", "cr", kept_layers=[{"decoder": [0, 1]}] * 4, losses=[(1, 2.0)])
    grown = grown.model_copy(
        update={"config": {"model": {"path": "m"}, "data": {"task": "t"}, "prompt": {"tokens": 3}}}
    )

    def read_result(path: Path) -> None:
        found = results.load_result(path)
        comparison_table([found, result()], improve=True)
        pictures.schedules([found])

    seeds = [json.dumps(r.model_dump(mode="json")).encode() for r in (grown, result())]
    yield Target("result", seeds, _file(folder / "result.json", read_result))


# -- mutations --------------------------------------------------------------------------------------------------------

ODD = [
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b"\t\t", b'"', b"'", b'""""', b"{", b"}", b"[",
    b"]", b":", b"- ", b",", b"? ", b"|\n", b">\n", b"%", b"@", b"`", b"null", b"true", b"-1", b"0", b"-100", b"1e999",
    b"NaN", b".inf", b"9" * 40, b"9" * 5000, b"0x", b"1_000", b"12:30:45", b"2020-01-01", b"&a [*a]", b"*a", b"<<: ",
    b"!!python/object:os.system", b"!!binary x", b"{{ ", b" }}", b"{% for i in range(9**9) %}x{% endfor %}",
    b"{{ text | join(text) }}", b"{{ 'x' * 999999999 }}", b"{% set a = text %}", b"~ text", b" | ", b"\\1", b"{9,9}",
    b"(?=", b"!!int ''", b"!!bool x", b"!!timestamp x", b"{**a}", b"[[1]]", b"-1e400", b"1e400", b"[]", b"\x1f\x8b\x08",
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
                target.read(valid)
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


def coverage(seconds: int, folder: Path, only: str = "") -> dict[str, dict[str, object]] | None:
    """The same targets under atheris, seconds each; None where it is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None
    command = [sys.executable, str(HERE / "fuzz.py"), "--guided", str(folder), "--seconds", str(seconds)]
    command += [f"--only={only}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = {}
    for log in sorted(folder.glob("*.log")):
        code, name, *lines = log.read_text(errors="replace").splitlines()
        cases = max((int(line.split()[0][1:]) for line in lines if line[:1] == "#" and line[1:2].isdigit()), default=0)
        features = [line for line in lines if " cov: " in line]
        covered = int(features[-1].split(" cov: ")[1].split()[0]) if features else 0
        corpus = len(list(log.with_suffix("").iterdir()))
        crashed = [] if code == "0" else lines[-12:]
        found[name] = {"cases": cases, "covered": covered, "corpus": corpus, "crashes": crashed}
    return found


def _guided(folder: Path, seconds: int, only: str) -> None:
    """Each target in a fork of this process, whose imports are watched; what it says goes to a file."""
    _quiet()
    work = tempfile.mkdtemp()
    for i, target in enumerate(t for t in targets(Path(work)) if only in t.name):
        corpus, log = folder / f"{i:02}", folder / f"{i:02}.log"
        corpus.mkdir(parents=True)
        for k, seed in enumerate(target.seeds):
            (corpus / str(k)).write_bytes(seed)
        said = folder / "said"
        pid = os.fork()
        if pid == 0:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            _guide(target, corpus, seconds)
        _, status = os.waitpid(pid, 0)
        log.write_text(f"{status}\n{target.name}\n" + said.read_text(errors="replace"))
    shutil.rmtree(work)


def _guide(target: Target, corpus: Path, seconds: int) -> None:
    def test(content: bytes) -> None:
        wrong = attempt(target, content)
        if wrong is not None:
            sys.stderr.write(base64.b64encode(content).decode()[:4000] + "\n")
            raise RuntimeError(wrong)

    def changed(content: bytes, longest: int, seed: int) -> bytes:
        """Half of the time one of our changes, which know the formats; else one of atheris's own."""
        draw = random.Random(seed)
        if draw.random() < 0.5:
            return mutate(draw, [content, *target.seeds])[:longest]
        return bytes(atheris.Mutate(content, longest))

    options = [str(corpus), f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=0", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus.parent}/crash-"], test, custom_mutator=changed)
    atheris.Fuzz()


def main() -> int:
    """Fuzz, print what crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--seconds", type=int, default=30, help="per target, with --coverage")
    parser.add_argument("--guided", type=Path, help=argparse.SUPPRESS)  # how --coverage calls this again
    options = parser.parse_args()
    if options.guided:
        _guided(options.guided, options.seconds, options.only)
        return 0
    if options.coverage:
        found = coverage(options.seconds, Path(tempfile.mkdtemp()), options.only)
    else:
        found = fuzz(options.cases, options.seed, options.only)
    print(json.dumps(found, indent=1))
    return int(found is None or any(one["crashes"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
