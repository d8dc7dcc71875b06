"""Files that somebody has made to do harm: each is refused at once by one of our errors, or does none.

A case is a function that is given an empty folder. It raises where what it promises does not hold.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from faults import At, demand
from safetensors.torch import load_file, save_file
from scenarios import recipe
from toy import result

from fast_prompt_tuning import recipe as recipes
from fast_prompt_tuning.data import formats
from fast_prompt_tuning.data.patterns import substitute
from fast_prompt_tuning.data.readers import load_examples
from fast_prompt_tuning.data.task_files import load_task, task_from_templates
from fast_prompt_tuning.data.tasks import Replace
from fast_prompt_tuning.data.templates import render
from fast_prompt_tuning.errors import FptError
from fast_prompt_tuning.prompt.soft_prompt import load_prompt
from fast_prompt_tuning.prompt.text_cache import OWN_FOLDER
from fast_prompt_tuning.report.page import find_runs
from fast_prompt_tuning.report.page import render as page_of
from fast_prompt_tuning.report.tables import comparison_table
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.results import load_result
from fast_prompt_tuning.scores.neurons import NeuronScores
from fast_prompt_tuning.train import checkpoint, restored

SECONDS, MEBIBYTES = 15.0, 1000
"""What a hostile file may cost before it is refused: time of this process, and memory beyond what it had."""

HOSTILE: dict[str, Callable[[Path], None]] = {}
"""What somebody has made → the function that meets it."""


def hostile(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a case."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        HOSTILE[name] = function
        return function

    return register


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """The block must end in one of our errors, of a length that can be read, soon and in little memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        yield
    except (FptError, ValueError) as error:
        demand(isinstance(error, FptError) or "validation error" in str(error), f"{what}: {error!r}")
        demand(len(str(error)) < 4000, f"{what}: a message of {len(str(error))} characters")
    else:
        raise RuntimeError(f"{what}: taken")
    seconds = time.process_time() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    demand(seconds < SECONDS, f"{what}: refused after {seconds:.0f} s")
    demand(more < MEBIBYTES, f"{what}: refused after {more:.0f} MiB")


# -- YAML -------------------------------------------------------------------------------------------------------------

NINE = range(1, 9)
YAML = {
    "lists": "l0: &l0 [a]\n" + "".join(f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in NINE),
    "merges": "l0: &l0 {a: 1}\n" + "".join(f"l{n}: &l{n}\n  <<: [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in NINE),
    "itself": "a: &a [*a]",
    "long": f"a: &a {'x' * 9000}\nb: [{', '.join(['*a'] * 99)}]",
    "deep": "[" * 50_000,
    "base 60": "a: 1" + ":1" * 50_000,
    "code": "a: !!python/object/apply:os.system [x]",
    "odd tags": 'a: !!int ""',
}


@hostile("YAML aliases that unfold, deep or endless YAML, YAML that names code")
def yaml_files(folder: Path) -> None:
    """Recipes, task files and --set values are refused; so is a file without an end."""
    base = recipe(folder / "run").model_dump(mode="json")
    for name, text in YAML.items():
        for kind, read in (("recipe", recipes.load), ("task", lambda p: load_task(str(p)))):
            (folder / "it.yaml").write_text(text)
            with refused(f"{kind}: {name}"):
                read(folder / "it.yaml")
        with refused(f"--set: {name}"):
            recipes.load(base, [f"name={'[' + text + ']' if chr(10) in text else text}"])
    with refused("/dev/zero"):
        recipes.load("/dev/zero")


# -- templates and regular expressions --------------------------------------------------------------------------------

TEMPLATES = [
    "{{ 9**9**9 }}",
    "{{ 'x' * 1000000000 }}",
    "{{ lipsum(n=100000) }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for a in text %}{% for b in text %}x{% endfor %}{% endfor %}",
    "{% set a = text %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ text.__class__.__mro__[1].__subclasses__() }}",
    "{{ '%1000000000d' % 1 }}",
]
ROWS = [
    "{{ list | join(text) }}",
    "{{ text | replace('', text) }}",
    "{{ list | map('center', 1000000000) | list }}",
    "{{ " + " ~ ".join(["text"] * 500) + " }}",
    "{% for x in list %}{% if text | upper | length == 0 %}{% endif %}{% endfor %}",
    "{{ list | select('in', other) | list | length }}",
    "{{ q" + " | tojson" * 30 + " }}",
]


@hostile("templates that run on, grow or call")
def templates(folder: Path) -> None:
    """Refused when the task is loaded; what only a row makes too long or too large is a bad row."""
    row = {"text": "'\"" * 300_000, "list": ["x"] * 100_000, "other": ["z"] * 100_000, "q": '"'}
    for template in TEMPLATES:
        with refused(template[:60]):
            task_from_templates(files={}, input_template=template, target_template="x")
    for template in ROWS:
        with refused(template[:60]):
            render(template, row)


@hostile("regular expressions that backtrack without end, or unfold")
def regular_expressions(folder: Path) -> None:
    """Refused when the task is loaded, or a bad row after some seconds."""
    for pattern in ("(?:" * 90 + "a" + ")+" * 90, "a{1000000000}", "(" * 200, "a" * 501):
        with refused(pattern[:60]):
            Replace(field="text", pattern=pattern, by="")
    for pattern in (r"(a+)+$", r"(.*a){25}$"):
        with refused(pattern):
            substitute(pattern, "", "a" * 5000 + "!")
    with refused("by"):
        substitute(r"(?=(.*))", r"\1" * 40, "a" * 100_000)


# -- data -------------------------------------------------------------------------------------------------------------


@hostile("data files that unfold, or are another thing than they say")
def data_files(folder: Path) -> None:
    """A gzipped file that is cut, or whose line has no end; another encoding; JSON a thousand deep."""
    whole = gzip.compress(b'{"text": "a"}\n' * 99)
    files = {
        "cut.jsonl.gz": whole[:-9],
        "none.jsonl.gz": b"{}",
        "endless.jsonl.gz": gzip.compress(bytes(formats.LONGEST_LINE + 9), 1),
        "utf16.csv": "text\na\n".encode("utf-16"),
        "deep.json": b"[" * 99_999,
        "number.jsonl": b'{"text": ' + b"9" * 9999 + b"}",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        task = task_from_templates(
            files={"train": str(folder / name)}, input_template="{{ text }}", target_template="x"
        )
        with refused(name):
            load_examples(task, "train", decoder=True)


# -- forged parts of runs ---------------------------------------------------------------------------------------------

NAN, HUGE = float("nan"), 10**400
ODD: tuple[Any, ...] = ("x", None, -1, NAN, HUGE, [], {}, [[[{}]]])


def seal_again(place: Path, record: Any = ...) -> None:
    """A manifest that fits what is there now, as whoever forges a file writes one."""
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    (place / checkpoint.MANIFEST).unlink()
    checkpoint.seal(place, manifest["step"], manifest["record"] if record is ... else record)


def _broken_off(folder: Path, method: str = "pt") -> tuple[Any, Path]:
    config = recipe(folder / "run", method=method, train__save_every=2)

    def stop() -> None:
        raise InterruptedError

    with contextlib.suppress(InterruptedError):
        run.train(config, callbacks=[At({5: stop})])
    return config, folder / "run" / "checkpoints" / "checkpoint-4"


def forgeries(value: Any) -> Iterator[Any]:
    """A JSON value with each of its parts in turn (of a list, the first four) exchanged for each odd value, or gone."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else ()
    for key in keys:
        for part in (*ODD, *forgeries(value[key])):
            changed = copy.copy(value)
            changed[key] = part
            yield changed
        changed = copy.copy(value)
        del changed[key]
        yield changed


def _tally(read: Callable[[Any], object], forged: Iterator[Any], at_least: int) -> None:
    """Every forgery is refused by one of our errors, or harmless."""
    tried = refusals = 0
    for value in forged:
        tried += 1
        try:
            read(value)
        except FptError as error:
            refusals += 1
            demand(len(str(error)) < 4000, f"a message of {len(str(error))} characters")
    demand(tried >= at_least and refusals > tried / 4, f"{refusals} of {tried} refused")


@hostile("forged JSON under a checkpoint's valid manifest")
def forged_checkpoint(folder: Path) -> None:
    """Every field of every JSON file, odd or missing: refused before any step, or without effect."""
    config, place = _broken_off(folder)
    kept = {f.name: f.read_bytes() for f in place.iterdir()}
    trained = [torch.nn.Parameter(load_prompt(place))]
    record = json.loads(kept[checkpoint.MANIFEST])["record"]

    def resume(name: str, value: Any) -> None:
        for file, content in kept.items():
            (place / file).write_bytes(content)
        if name != checkpoint.MANIFEST:
            (place / name).write_text(json.dumps(value))
        seal_again(place, value if name == checkpoint.MANIFEST else ...)
        restored.check(checkpoint.verify(place), SimpleNamespace(trained=trained, whole=False), config.optim)
        checkpoint.set_random_state(checkpoint.load_state(place, "process_0"))

    read = {name: json.loads(kept[name]) for name in ("loop.json", "process_0.json")}
    read |= {name: json.loads(kept[name]) for name in ("optimizer.json", "scheduler.json", "good.json")}
    read[checkpoint.MANIFEST] = {**record, "config": {"optim": record["config"]["optim"]}}
    for name, content in read.items():
        _tally(lambda value, name=name: resume(name, value), forgeries(content), 5)


@hostile("a whole model's checkpoint with a pickled file in place of safetensors")
def pickled(folder: Path) -> None:
    """`torch.load` is never reached: the checkpoint counts as damaged."""
    config, place = _broken_off(folder, "full")
    weights = place / "model.safetensors"
    torch.save(load_file(weights), place / "pytorch_model.bin")
    weights.unlink()
    seal_again(place)
    with mock.patch.object(torch, "load", side_effect=RuntimeError("torch.load was reached")):
        demand(run.train(config, resume=True).status == "finished", "not resumed from the checkpoint before")


@hostile("a forged result.json")
def forged_result(folder: Path) -> None:
    """Every field odd or missing: refused, or shown in the tables."""
    good = result("grown", "cr", kept_layers=[{"decoder": [0, 1]}] * 4, losses=[(1, 2.0)]).model_dump(mode="json")
    good["config"] = {"model": {"path": "m", "revision": None}, "data": {"task": "t"}, "prompt": {"tokens": 3}}

    def read(value: Any) -> None:
        (folder / "result.json").write_text(json.dumps(value))
        comparison_table([load_result(folder), result()], improve=True)

    _tally(read, forgeries(good), 300)


@hostile("NUL bytes and terminal codes in a result")
def nul_bytes(folder: Path) -> None:
    """The page shows replacement characters in their place."""
    odd = "a\x00b\x1b[2J\u009b</script>"
    text = json.dumps(result(odd, config={"model": {"path": odd}}, environment={odd: odd}).model_dump(mode="json"))
    (folder / "result.json").write_text(text.replace('"accuracy"', json.dumps(odd)))
    page = page_of(find_runs([folder]))
    demand(not set(page) & set("\x00\x1b\u009b") and "</script>" not in page, "they are in the page")


@hostile("forged prompts and scores")
def forged_prompts(folder: Path) -> None:
    """Numbers of tokens that are none, vectors that are no finite floats in two dimensions."""
    values = {"prompt_embeddings": torch.ones(3, 4)}
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}

    def read(tensor: torch.Tensor, settings: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
        load_prompt(folder)

    read(values["prompt_embeddings"], config)
    _tally(lambda settings: read(torch.ones(3, 4), settings), forgeries(config), 15)
    bad = [torch.ones(3, 4).long(), torch.ones(1, 3, 4), torch.ones(12), torch.ones(0, 4), torch.ones(3, 4) * NAN]
    for tensor in bad:
        with refused(f"a prompt {tuple(tensor.shape)} of {tensor.dtype}"):
            read(tensor, config)
        save_file({"decoder": tensor}, folder / "scores.safetensors", metadata={"model_fingerprint": "0"})
        with refused(f"scores {tuple(tensor.shape)} of {tensor.dtype}"):
            NeuronScores.load(folder / "scores.safetensors")


# -- folders and links ------------------------------------------------------------------------------------------------


def _elsewhere(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """Somebody's own files, called as ours are."""
    place = folder / "elsewhere"
    for name in ("checkpoint-2/a", "best-2/a", ".notes-new/a", ".notes-old/a", "model/a.safetensors", "keep"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    return place, {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}


def _untouched(place: Path, before: dict[str, bytes], what: str) -> None:
    gone = [name for name, content in before.items() if not (place / name).is_file()]
    demand(not gone, f"{what}: removed {', '.join(gone)}")
    changed = [name for name, content in before.items() if (place / name).read_bytes() != content]
    demand(not changed, f"{what}: changed {', '.join(changed)}")


@hostile("a run's checkpoints/ that is a link to somebody's folder")
def linked_checkpoints(folder: Path) -> None:
    """Whether a run resumes, overwrites or refuses: nothing behind the link is removed or changed."""
    config, _ = _broken_off(folder)
    places = folder / "run" / "checkpoints"
    for options in ({"resume": True}, {"overwrite": True}):
        place, before = _elsewhere(folder)
        if places.is_symlink():
            places.unlink()
        shutil.rmtree(places, ignore_errors=True)
        places.symlink_to(place)
        with contextlib.suppress(FptError):
            run.train(config, **options)  # type: ignore[arg-type]
        _untouched(place, before, str(options))


@hostile("folders in a run that are called as our leftovers are")
def odd_leftovers(folder: Path) -> None:
    """`--resume` ends as it would have, and removes none of them: `.notes-new`, `..-old`, `.-old`."""
    config, place = _broken_off(folder)
    odd = [place.parent / name for name in (".notes-new", "..-old", ".-old", ".notes-old")]
    odd += [folder / "run" / name for name in (".notes-new", "..-old")]
    for path in odd:
        path.mkdir()
        (path / "mine").write_text("mine")
    demand(run.train(config, resume=True).status == "finished", "not finished")
    gone = [str(path.relative_to(folder)) for path in odd if not (path / "mine").is_file()]
    demand(not gone, f"removed {', '.join(gone)}")


@hostile("a link in the folder of kept texts")
def linked_texts(folder: Path) -> None:
    """The cache on disk, out of room, removes nothing behind it."""
    place, before = _elsewhere(folder)
    for file in place.rglob("*"):
        if file.is_file():
            os.utime(file, (1, 1))  # the longest unused of all
    root = folder / "texts" / OWN_FOLDER
    root.mkdir(parents=True)
    for name in ("model", "checkpoint-2"):
        (root / name).symlink_to(place / name)
    settings = {"prompt__placement": "suffix", "cache__tier": "disk", "cache__folder": str(folder / "texts")}
    run.train(recipe(folder / "run", method="pt", cache__budget_mib=0.001, **settings))
    _untouched(place, before, "pruning")
