"""What each way of starting small saves: quality against training FLOPs on real models and real tasks.

    python benchmarks/quality/run.py --squad squad2-dev.json --reviews vaderSentiment-3.3.2.tar.gz
    python benchmarks/quality/run.py --summary        # the tables, from the committed JSON alone
    python benchmarks/quality/run.py --check          # exit 1 where a target is missed

Every cell (model × task × method × seed) is one ordinary `fpt train` run and one JSON file under `results/`: what is
there is not run again, so the command resumes, and `--models`, `--tasks`, `--methods`, `--seeds` and `--minutes` run
any part of the grid. The learning rate of every placement of the prompt is tuned first, with plain prompt tuning and a
seed of its own, on examples that are neither trained nor tested on, higher and lower until neither neighbour of the
best one is better; every method then has that rate. Tuning runs have all the steps: in runs of half of them a rate won
that a whole run does not bear. Curves and tables are of the *test* split, on the full PLM, with the prompt of the last
step.

FLOPs count scoring and probing. Seconds are CPU seconds of training steps (user and system time of the process): wall
clock would count whatever else the machine does.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from base_model import base_model
from step_time import machine

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.folder import read_log
from fast_prompt_tuning.run.session import Session, open_session
from fast_prompt_tuning.schedule.auto import PROBE

HERE = Path(__file__).parent
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = (0.01, 0.03)
TUNE_SEED = 100
PLACES = {"pt": "in front", "suffix": "after the text", "infix": "within"}
"""Methods that the rate of each placement of the prompt is tuned with."""


@dataclass(frozen=True)
class Task:
    """What a run of a task reads and how long it is; sized for minutes on a CPU core.

    `tuned` names the task whose learning rates it takes, where it has no search of its own.
    """

    task: str
    input_tokens: int
    target_tokens: int
    batch: int
    steps: int
    train: int = 256
    examples: int = 100
    evaluations: int = 6
    tuned: str | None = None


def of_length(task: str, tokens: int, target_tokens: int, tuned: str | None) -> Task:
    """One of the tasks that differ in the length of their texts only: 128 training examples, read 3.75 times."""
    return Task(task, tokens, target_tokens, 8, 60, train=128, tuned=tuned)


TASKS = {
    "topics": Task("bbc_topics", 32, 8, 8, 96),
    "headlines": Task("bbc_headlines", 32, 20, 8, 60, evaluations=5),
    "squad": Task("squad2", 64, 12, 8, 60, evaluations=5),
    "sentiment": Task("sentiment", 40, 8, 8, 96),
    # The same at several lengths, and more passes over fewer texts: where keeping what is computed of them pays.
    "topics-64": of_length("bbc_topics", 64, 8, "topics"),
    "topics-256": of_length("bbc_topics", 256, 8, "topics"),
    "topics-512": of_length("bbc_topics", 512, 8, "topics"),
    "headlines-64": of_length("bbc_headlines", 64, 20, "headlines"),
    "headlines-256": of_length("bbc_headlines", 256, 20, "headlines"),
    "headlines-512": of_length("bbc_headlines", 512, 20, "headlines"),
    "squad-64": of_length("squad2", 64, 12, "squad"),  # the sentence that holds the answer
    "squad-256": of_length("squad2", 256, 12, None),  # whole paragraphs
}

MODELS = {"smollm2": lambda: "smollm2-135m", "gemma": base_model}
"""SmolLM2-135M-Instruct, and the base model Gemma 3 270M."""


def small_batch(task: Task) -> list[dict[str, Any]]:
    early = round(0.6 * task.steps)
    return [{"batch": task.batch // 4, "steps": early}, {"steps": task.steps - early}]


def most_layers(model: str, task: Task) -> list[dict[str, Any]]:
    early = round(0.6 * task.steps)
    return [{"layers": THREE_QUARTERS[model], "steps": early}, {"steps": task.steps - early}]


THREE_QUARTERS = {"smollm2": 22, "gemma": 14}
"""Of 30 and of 18 layers."""

GREEDY = {"keep_layers": "greedy", "layer_examples": 4}
"""In runs this short, choosing on the 16 examples of the default costs as much as the layers it leaves out save."""

METHODS: dict[str, Any] = {
    # name -> what the run sets, given model and task
    "pt": lambda model, task: {"method": "pt"},
    "uniform": lambda model, task: {"method": "pt", "prompt": {"init": "uniform"}},
    "ld": lambda model, task: {"method": "ld"},
    "fr": lambda model, task: {"method": "fr"},
    "cr": lambda model, task: {"method": "cr"},
    "ld-greedy": lambda model, task: {"method": "ld", "scoring": GREEDY},
    "ld-mild": lambda model, task: {"stages": most_layers(model, task), "scoring": GREEDY},
    "batch": lambda model, task: {"stages": small_batch(task)},
    "small": lambda model, task: {"stages": [{"batch": task.batch // 4, "steps": task.steps}]},
    "auto": lambda model, task: {"method": "auto"},
    "suffix": lambda model, task: {"method": "pt", "prompt": {"placement": "suffix"}},
    "suffix-batch": lambda model, task: {"stages": small_batch(task), "prompt": {"placement": "suffix"}},
    "suffix-cr": lambda model, task: {"method": "cr", "prompt": {"placement": "suffix"}},
    "infix": lambda model, task: {"method": "pt", "prompt": {"placement": "infix"}},
}

CUT = {"batch-rate": "batch", "auto-half-rate": "auto", "suffix-int8": "suffix"}
"""Methods of the committed results that can no longer be run → the one whose row theirs follows."""

GROWING = ("ld", "fr", "cr", "ld-greedy", "ld-mild", "batch", "batch-rate", "auto", "auto-half-rate")
"""Methods of the grid that grow with the prompt in front of the text."""

INITS = ("uniform",)
"""Other initialisations of plain prompt tuning, compared with `pt` on the tuning split, at the rate tuned for it."""

SENTIMENT = {
    "name": "sentiment",
    "version": 1,
    "description": "Is a movie review snippet positive or negative?",
    "source": {"format": "jsonl"},
    "input_template": "{{ text }}",
    "target_template": "<extra_id_0> {{ label }}",
    "decoder": {"input_template": "{{ text }}\nSentiment:", "target_template": " {{ label }}"},
    "truncate": "text",
    "label_field": "label",
    "labels": {"positive": "positive", "negative": "negative"},
    "metric": "accuracy",
    "primary": "accuracy",
    "max_target_tokens": 10,
}


# -- data -------------------------------------------------------------------------------------------------------------


def squad_files(path: Path, folder: Path, whole: bool = False) -> dict[str, str]:
    """Answerable questions of a SQuAD 2.0 file, split by article: 9 to train, 3 to tune on, the rest to test on.

    Of the paragraph, the sentence that holds the answer is kept, whole paragraphs being several times as long; with
    `whole`, paragraphs of at most 900 characters are kept as they are.
    """
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    for article in articles:
        asked = [(p, q) for p in article["paragraphs"] for q in p["qas"] if not q["is_impossible"]]
        if whole:
            article["paragraphs"] = [{**p, "qas": [q]} for p, q in asked if len(p["context"]) <= 900]
        else:
            article["paragraphs"] = [s for p, q in asked if (s := _sentence_of(p, q))]
    parts = {"train": articles[:9], "tune": articles[9:12], "test": articles[12:]}
    return _written({k: json.dumps({"version": "v2.0", "data": v}) for k, v in parts.items()}, folder, "squad", "json")


def _sentence_of(paragraph: dict[str, Any], question: dict[str, Any]) -> dict[str, Any] | None:
    """A paragraph of one sentence and one answerable question; None where no answer lies within one sentence."""
    text, first = paragraph["context"], question["answers"][0]["answer_start"]
    breaks = [m.end() for m in re.finditer(r"[.!?][\"')]?\s+(?=[A-Z\"'(])", text)]
    start = max((b for b in breaks if b <= first), default=0)
    end = min((b for b in breaks if b > first), default=len(text))
    answers = [
        {**a, "answer_start": a["answer_start"] - start}
        for a in question["answers"]
        if start <= a["answer_start"] and a["answer_start"] + len(a["text"]) <= end
    ]
    return {"context": text[start:end].rstrip(), "qas": [{**question, "answers": answers}]} if answers else None


def review_files(path: Path, folder: Path) -> dict[str, str]:
    """Movie-review snippets of vaderSentiment's source distribution, by their mean rating; ties are left out."""
    inner = _member(path.read_bytes(), "hutto_ICWSM_2014.tar.gz")
    text = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace")
    rows = []
    for line in io.StringIO(text):
        number, rating, snippet = line.rstrip("\n").split("\t")
        if abs(float(rating)) >= 0.5:
            label = "positive" if float(rating) > 0 else "negative"
            rows.append({"id": number, "text": snippet.strip(), "label": label})
    order = np.random.default_rng(0).permutation(len(rows))
    picked = {"test": order[:1000], "tune": order[1000:2000], "train": order[2000:]}
    return _written(
        {k: "".join(json.dumps(rows[i]) + "\n" for i in sorted(v)) for k, v in picked.items()},
        folder,
        "sentiment",
        "jsonl",
    )


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(next(n for n in tar.getnames() if n.endswith(name)))
        return file.read() if file else b""


def _written(texts: dict[str, str], folder: Path, name: str, suffix: str) -> dict[str, str]:
    found = {}
    for part, text in texts.items():
        path = folder / f"{name}-{part}.{suffix}"
        path.write_text(text, encoding="utf-8")
        found[part] = str(path)
    return found


def data_of(name: str, tuning: bool, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The `data` section of a task's runs: `validation` is the tuning split, or the test split."""
    task, part = TASKS[name], "tune" if tuning else "test"
    limits = {
        "max_input_tokens": task.input_tokens,
        "max_target_tokens": task.target_tokens,
        "train_limit": task.train,
        "validation_limit": task.examples,
    }
    if task.task in ("squad2", "sentiment"):
        path, option = (args.reviews, "--reviews") if name == "sentiment" else (args.squad, "--squad")
        if path is None:
            sys.exit(f"error: the task {name} needs {option} FILE")
        if name == "sentiment":
            files, task_name = review_files(path, folder), str(folder / "sentiment.yaml")
            Path(task_name).write_text(yaml.safe_dump(SENTIMENT), encoding="utf-8")
        else:
            files, task_name = squad_files(path, folder, whole=task.input_tokens > 64), task.task
        return {"task": task_name, "files": {"train": files["train"], "validation": files[part]}, **limits}
    spec = yaml.safe_load((resources.files("fast_prompt_tuning") / "tasks" / f"{task.task}.yaml").read_text("utf-8"))
    spec["splits"] = {"train": "train", "validation": "validation" if tuning else "test"}
    path = folder / f"{task.task}-{part}.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return {"task": str(path), **limits}


# -- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run. `rate` is None in the grid: the tuned one."""

    model: str
    task: str
    method: str
    seed: int
    rate: float | None = None

    @property
    def path(self) -> Path:
        name = f"{self.method}-{self.seed}" if self.rate is None else f"{self.method}-lr{self.rate:g}"
        return Path("grid" if self.rate is None else "tuning") / f"{self.model}-{self.task}-{name}.json"


class CpuSeconds(TrainerCallback):
    """CPU seconds of training steps, at every evaluation."""

    def __init__(self) -> None:
        self.total, self.start = 0.0, 0.0
        self.at: dict[int, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total += time.process_time() - self.start
        self.at[state.global_step] = self.total


def placement(method: str) -> str:
    """The method whose tuned rate a method takes: every placement of the prompt has its own."""
    first = method.partition("-")[0]
    return first if first in PLACES else "pt"


def tried_rates(results: Path, model: str, task: str, method: str) -> dict[float, float]:
    """The quality on the tuning split of every rate that a method's placement has been run with."""
    cells = [Cell(model, TASKS[task].tuned or task, placement(method), TUNE_SEED, rate) for rate in RATES]
    paths = {c.rate: results / c.path for c in cells}
    return {r: settled(json.loads(p.read_text())["curve"]) for r, p in paths.items() if r and p.is_file()}


def best_rate(tried: dict[float, float]) -> float:
    """The rate that all methods of a placement take; of equals the first."""
    return max(tried, key=tried.__getitem__)


def next_rate(tried: dict[float, float]) -> float | None:
    """The rate to try next: both first ones, then neighbours of the best; None once neither is better."""
    for rate in FIRST_RATES:
        if rate not in tried:
            return rate
    best = RATES.index(best_rate(tried))
    around = [RATES[i] for i in (best + 1, best - 1) if 0 <= i < len(RATES)]
    return next((rate for rate in around if rate not in tried), None)


def settled(curve: list[dict[str, float]]) -> float:
    """The quality a run ends with: the mean of its last two evaluations, which are noisy one by one."""
    return statistics.fmean(p["metric"] for p in curve[-2:])


def settings_of(
    model: str, task_name: str, method: str, rate: float, seed: int, args: argparse.Namespace, work: Path, tuning: bool
) -> dict[str, Any]:
    """The recipe of a run; its data and its output lie in `work`."""
    task = TASKS[task_name]
    settings: dict[str, Any] = {
        "model": {"path": MODELS[model](), "dtype": args.dtype},
        "data": data_of(task_name, tuning, args, work),
        "prompt": {"tokens": 20, "init": "vocab", "placement": "prefix"},
        "optim": {"optimizer": "adam", "lr": rate, "lr_schedule": "constant"},
        "cache": {"budget_mib": 4096},
        "scoring": {"examples": 64},
        "train": {
            "steps": task.steps,
            "batch_size": task.batch,
            "eval_every": task.steps,
            "save_every": task.steps,
            "keep": "last",
            "seed": seed,
        },
        "eval": {"batch_size": 50},
        "output": f"{work}/run",
    }
    for section, values in METHODS[method](model, task).items():
        settings[section] = {**settings[section], **values} if isinstance(values, dict) else values
    return settings


def run_cell(cell: Cell, rate: float, args: argparse.Namespace, sessions: dict[Any, Session]) -> dict[str, Any]:
    task = TASKS[cell.task]
    with tempfile.TemporaryDirectory(prefix="fpt-quality-") as work:
        tuning = cell.rate is not None
        settings = settings_of(cell.model, cell.task, cell.method, rate, cell.seed, args, Path(work), tuning=tuning)
        settings["train"]["eval_every"] = task.steps // (2 if tuning else task.evaluations)
        recipe = config.load(settings)
        key = (cell.model, cell.task, tuning, cell.seed)
        if key not in sessions:
            sessions.clear()  # one model in memory at a time
            sessions[key] = open_session(recipe, ("train", "validation"))
        sessions[key]._texts = None  # every cell pays for the texts that it keeps
        clock = CpuSeconds()
        started = time.time()
        result = run.train(recipe, session=sessions[key], callbacks=[clock])
        probes = [[r["step"], r[PROBE]] for r in read_log(Path(work) / "run" / "log.jsonl") if PROBE in r]
    if result.status != "finished":
        sys.exit(f"{result.status} ({result.reason}): the same command begins this cell again")
    flops, here = result.flops, machine()
    overhead = flops["score"] + flops["probe"]
    return {
        **{k: v for k, v in asdict(cell).items() if k != "rate"},
        "rate": rate,
        "sizes": asdict(task),
        "metric": result.primary,
        "curve": [
            {
                "step": p.step,
                "metric": p.metrics[result.primary],
                "flops": p.train_flops + overhead * min(1.0, p.step / max(result.steps, 1) if flops["probe"] else 1.0),
                "cpu_seconds": clock.at.get(p.step, clock.total),
            }
            for p in result.curve
        ],
        "flops": {k: flops[k] for k in ("train", "score", "probe")},
        "steps": result.steps,
        "probes": probes,
        "schedule": result.schedule,
        "kept_layers": result.kept_layers,
        "minutes": (time.time() - started) / 60,
        "environment": {**result.environment, "processor": here["processor"], "capability": here["capability"]},
    }


def cells_of(args: argparse.Namespace) -> Iterator[Cell]:
    """Cells that are missing: tuning first, then whole comparisons, one seed after the other."""
    for model in args.models:
        for task in args.tasks:
            for method in sorted({placement(m) for m in args.methods}):
                while (rate := next_rate(tried_rates(args.results, model, task, method))) is not None:
                    yield Cell(model, TASKS[task].tuned or task, method, TUNE_SEED, rate)
            for method in (m for m in args.methods if m in INITS):
                cell = Cell(model, task, method, TUNE_SEED, best_rate(tried_rates(args.results, model, task, method)))
                if not (args.results / cell.path).is_file():
                    yield cell
    for seed in args.seeds:
        for model in args.models:
            for task in args.tasks:
                for method in (m for m in args.methods if m not in INITS):
                    cell = Cell(model, task, method, seed)
                    if not is_done(args.results, cell):
                        yield cell


def is_done(results: Path, cell: Cell) -> bool:
    """Whether a cell of the grid has been run, with the rate that is the best by now."""
    path = results / cell.path
    tried = tried_rates(results, cell.model, cell.task, cell.method)
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["rate"] == best_rate(tried)


# -- tables -----------------------------------------------------------------------------------------------------------


def load_grid(results: Path) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Finished cells by (model, task, method), seeds in order."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path in sorted((results / "grid").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((cell["model"], cell["task"], cell["method"]), []).append(cell)
    return found


def mean_curve(cells: list[dict[str, Any]], axis: str = "flops") -> list[tuple[float, float]]:
    """`(mean cost, mean metric)` at every evaluation; a seed that has ended stays where it ended."""
    n = max(len(c["curve"]) for c in cells)
    at = [[c["curve"][min(i, len(c["curve"]) - 1)] for c in cells] for i in range(n)]
    return [(statistics.fmean(p[axis] for p in points), statistics.fmean(p["metric"] for p in points)) for points in at]


def cost_to_reach(curve: list[tuple[float, float]], target: float) -> float | None:
    """Cost at which a curve first reaches a quality, between evaluations by a straight line; None if it never does."""
    before: tuple[float, float] | None = None
    for cost, value in curve:
        if value >= target:
            if before is None or value == before[1]:
                return cost
            return before[0] + (cost - before[0]) * (target - before[1]) / (value - before[1])
        before = (cost, value)
    return None


def quality_at(curve: list[tuple[float, float]], cost: float) -> float:
    """Quality of a curve at a cost, between evaluations by a straight line."""
    costs, values = zip(*curve, strict=True)
    return float(np.interp(cost, costs, values))


def conditions(cell: dict[str, Any]) -> dict[str, Any]:
    """Without which a cell's seconds are not to be compared with another's."""
    known = cell.get("environment", {})
    return {k: known.get(k) for k in ("dtype", "threads", "device", "platform", "processor", "capability")}


def summary(results: Path) -> list[dict[str, Any]]:
    """One row per model × task × method with finished seeds, beside plain prompt tuning on the same seeds."""
    grid, rows = load_grid(results), []
    for (model, task, method), cells in grid.items():
        seeds = {c["seed"] for c in cells}
        plain = [c for c in grid.get((model, task, "pt"), []) if c["seed"] in seeds]
        if len(plain) != len(cells):
            continue
        base, curve = mean_curve(plain), mean_curve(cells)
        final = [settled(c["curve"]) for c in cells]
        target = statistics.fmean(settled(c["curve"]) for c in plain)
        whole = base[-1][0]
        seconds = (mean_curve(plain, "cpu_seconds"), mean_curve(cells, "cpu_seconds"))
        alike = all(conditions(a) == conditions(b) for a, b in zip(plain, cells, strict=True))
        reached = cost_to_reach(curve, target)
        own = cost_to_reach(base, target)
        reached_seconds = cost_to_reach(seconds[1], target)
        rows.append(
            {
                "model": model,
                "task": task,
                "method": method,
                "seeds": len(cells),
                "dtypes": sorted({conditions(c)["dtype"] or "" for c in cells}),
                "rate": cells[0]["rate"],
                "metric": cells[0]["metric"],
                "final": statistics.fmean(final),
                "spread": statistics.stdev(final) if len(final) > 1 else None,
                "plain_final": target,
                "flops": curve[-1][0] / whole,
                "seconds": seconds[1][-1][0] / seconds[0][-1][0] if alike else None,
                "flops_to_plain": None if reached is None else reached / whole,
                "seconds_to_plain": reached_seconds / seconds[0][-1][0] if alike and reached_seconds else None,
                "plain_flops_to_plain": None if own is None else own / whole,
                "improve": statistics.fmean(final) - quality_at(base, curve[-1][0]),
            }
        )
    return rows


def share(x: float | None, none: str = "never") -> str:
    return none if x is None else f"{100 * x:.0f}%"


def split_rows(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the methods, and those of where the prompt stands, on texts of several lengths."""
    lengths = [r for r in rows if r["task"] not in ("topics", "headlines", "squad", "sentiment")]
    return [r for r in rows if r not in lengths], lengths


def place(method: str) -> tuple[int, str]:
    """Where a method stands in a table."""
    return list(METHODS).index(CUT.get(method, method)), method


def length_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each placement of the prompt ends with and costs; costs relative to the prompt in front."""
    lines = [
        "| model | task and text tokens | prompt | dtype | seeds | rate | final | spread | FLOPs | CPU seconds | "
        "FLOPs to in front's final | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda r: (r["model"], list(TASKS).index(r["task"]), place(r["method"]))):
        spread = "–" if r["spread"] is None else f"{r['spread']:.1f}"
        seconds = "never" if r["flops_to_plain"] is None else share(r["seconds_to_plain"], "–")
        lines.append(
            f"| {r['model']} | {r['task']} | {r['method']} | {', '.join(r['dtypes'])} | {r['seeds']} | {r['rate']:g} | "
            f"{r['final']:.1f} | {spread} | {share(r['flops'])} | {share(r['seconds'], '–')} | "
            f"{share(r['flops_to_plain'])} | {seconds} |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | task | method | seeds | final | spread | FLOPs | FLOPs to plain's final | CPU seconds | Improve |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda r: (r["model"], r["task"], place(r["method"]))):
        spread = "–" if r["spread"] is None else f"{r['spread']:.1f}"
        improve = "–" if r["method"] == "pt" else f"{r['improve']:+.1f}"
        lines.append(
            f"| {r['model']} | {r['task']} | {r['method']} | {r['seeds']} | {r['final']:.1f} | {spread} | "
            f"{share(r['flops'])} | {share(r['flops_to_plain'])} | {share(r['seconds'], '–')} | {improve} |"
        )
    return "\n".join(lines)


def rate_table(results: Path) -> str:
    """Markdown: the rates tried for each placement, and what a search in shorter runs would have chosen."""
    tried: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for path in sorted((results / "tuning").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["method"] in INITS:
            continue
        key = found["model"], found["task"], PLACES[placement(found["method"])]
        curve = found["curve"]
        tried.setdefault(key, {})[found["rate"]] = [curve[0]["metric"], settled(curve), curve[0]["step"]]
    lines = [
        "| model | task | prompt | rate: mean of the last two | best | best at the first evaluation | points lost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, task, where), rates in sorted(tried.items()):
        best = max(rates, key=lambda r: rates[r][1])
        early = max(rates, key=lambda r: rates[r][0])
        ends = ", ".join(f"{r:g}: {rates[r][1]:.1f}" for r in sorted(rates))
        lost = rates[best][1] - rates[early][1]
        lines.append(
            f"| {model} | {task} | {where} | {ends} | {best:g} | {early:g} (step {rates[early][2]}) | {lost:.1f} |"
        )
    return "\n".join(lines)


def init_table(results: Path) -> str:
    """Markdown: plain prompt tuning from vocabulary embeddings beside other initialisations, on the tuning split."""
    lines = ["| model | task | rate | vocabulary | uniform |", "| --- | --- | --- | --- | --- |"]
    for path in sorted((results / "tuning").glob("*-uniform-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        vocab = tried_rates(results, found["model"], found["task"], "pt")[found["rate"]]
        ends = f"{vocab:.1f} | {settled(found['curve']):.1f}"
        lines.append(f"| {found['model']} | {found['task']} | {found['rate']:g} | {ends} |")
    return "\n".join(lines)


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """Targets that the committed results miss, or cannot show yet."""
    by = {(r["model"], r["task"], r["method"]): r for r in rows if r["seeds"] >= 3}
    missed = []
    for task in ("topics", "headlines", "squad"):
        best = [by[k] for m in GROWING if (k := ("gemma", task, m)) in by]
        good = [r for r in best if (r["flops_to_plain"] or 9) <= 0.6 and r["improve"] >= 1]
        if not good:
            missed.append(f"gemma {task}: no method reaches plain's quality for 60% of its FLOPs with Improve of +1")
        for model in MODELS:
            auto = by.get((model, task, "auto"))
            if auto is None or (auto["flops_to_plain"] or 9) > 1.05:
                missed.append(f"{model} {task}: auto at most 105%: {'no 3 seeds yet' if auto is None else 'missed'}")
    cheap = []
    for task in ("topics-256", "headlines-256", "squad-256"):
        rows_of = [by[k] for m in PLACES if m != "pt" and (k := ("smollm2", task, m)) in by]
        costs = [(r["flops_to_plain"] or 9, r["seconds_to_plain"] or 9) for r in rows_of]
        cheap += [task] if any(flops <= 0.25 and seconds <= 0.3 for flops, seconds in costs) else []
    if len(cheap) < 2:
        missed.append(
            "smollm2: plain's quality for 25% of its FLOPs and 30% of its seconds, the prompt after or within the "
            f"text, on two of three tasks: {' and '.join(cheap) or 'none'}"
        )
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=several, default=list(MODELS))
    parser.add_argument("--tasks", type=several, default=["topics", "headlines", "squad"])
    parser.add_argument("--methods", type=several, default=list(METHODS))
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--squad", type=Path, help="SQuAD 2.0 in the official JSON format")
    parser.add_argument("--reviews", type=Path, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--minutes", type=float, help="begin no cell after this many minutes")
    parser.add_argument("--summary", action="store_true", help="print the tables of the results and end")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    args = parser.parse_args()
    for name, chosen, known in (("models", args.models, MODELS), ("tasks", args.tasks, TASKS),
                                ("methods", args.methods, METHODS)):  # fmt: skip
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name} {','.join(sorted(unknown))}: choose of {','.join(known)}")
    if not (args.summary or args.check):
        quiet_libraries()
        logging.getLogger("fast_prompt_tuning").setLevel(logging.WARNING)
        started, sessions = time.time(), {}
        for cell in cells_of(args):
            if args.minutes is not None and time.time() - started > 60 * args.minutes:
                print("out of time: the same command goes on")
                break
            tried = tried_rates(args.results, cell.model, cell.task, cell.method)
            rate = cell.rate if cell.rate is not None else best_rate(tried)
            record = run_cell(cell, rate, args, sessions)
            path = args.results / cell.path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(record, indent=1) + "\n")
            values = " ".join(f"{p['metric']:.1f}" for p in record["curve"])
            print(f"{cell.path} lr {rate:g}: {values} ({record['minutes']:.1f} min)", flush=True)
    import held_out  # which takes its recipes from here

    print(held_out.tables(args.results / "held_out"), end="\n\n")
    rows = summary(args.results)
    methods, lengths = split_rows(rows)
    print(table(methods))
    print()
    print(length_table(lengths))
    print()
    print(rate_table(args.results))
    print()
    print(init_table(args.results))
    if args.check and (missed := held_out.missed(args.results / "held_out") + shortfalls(rows)):
        print("missed: " + "; ".join(missed))
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
