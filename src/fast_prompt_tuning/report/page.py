"""`fpt report`: runs as one HTML page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pydantic import BaseModel, Field

from ..cost.units import human_flops, human_seconds
from ..data.metrics import METRICS
from ..errors import DataError
from ..prompt.soft_prompt import load_prompt, place_of, similarity_matrix
from ..run.results import Real, RunResult, legible, load_result
from ..schedule.stages import size_text
from . import pictures
from .figures import inline_svg
from .tables import average_rows, by_task, number, percent, signed, table_rows

SAMPLES = 3
"""Sample predictions of each kind: where runs differ, right ones, wrong ones."""
LONG = 280
"""Characters of an input that are shown before it is unfolded."""


@dataclass(frozen=True)
class Run:
    """A run's result and the folder it lies in; of a result file by another name that file, since what lies beside may
    be another run's.
    """

    folder: Path
    result: RunResult


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs that `paths` name: folders of runs, result files, or folders that hold folders of runs.

    Raises:
        DataError: a path with no run, or the same run twice.
    """
    named: list[Run] = []
    for path in map(Path, paths):
        inside = sorted(p.parent for p in path.glob("*/result.json")) if path.is_dir() else []
        try:
            runs = [Run(path.parent if path.name == "result.json" else path, load_result(path))]
        except DataError:
            if not inside:
                raise
            runs = sorted((Run(p, load_result(p)) for p in inside), key=_first)
        named += runs
    seen: set[Path] = set()
    for run in named:
        if run.folder.resolve() in seen:
            raise DataError("the run is named twice; name every run once", file=str(run.folder))
        seen.add(run.folder.resolve())
    if not named:
        raise DataError("no run is named; give at least one folder of a run")
    return named


def _first(run: Run) -> int:
    """What others are compared with comes first: no prompt, then plain prompt tuning."""
    return {"none": 0, "pt": 1}.get(run.result.method, 2)


def figures(runs: Sequence[Run]) -> dict[str, tuple[str, Figure]]:
    """Every picture of the runs: file stem -> (what it shows, figure)."""
    drawn: dict[str, tuple[str, Figure | None]] = {}
    for n, (task, results) in enumerate(by_task([run.result for run in runs]).items()):
        suffix = f"-{n + 1}" if n else ""
        if any(r.curve and r.steps for r in results):
            for against, what in (("flops", "training compute"), ("seconds", "training time")):
                label = f"Quality ({results[0].primary}) on {task} against {what}"
                drawn[f"quality-{against}{suffix}"] = (label, pictures.quality(results, against))
        drawn[f"loss{suffix}"] = (f"Training loss on {task}", pictures.losses(results))
    drawn["schedule"] = ("Layers and widths over steps", pictures.schedules([r.result for r in runs]))
    for n, (names, matrix) in enumerate(_similarities(runs)):
        label = "Mean cosine similarity of the runs' prompts, token by token"
        drawn[f"similarity{f'-{n + 1}' if n else ''}"] = (label, pictures.heat_map(names, matrix, "cosine similarity"))
    for n, (name, record) in enumerate(_fidelities(runs)):
        label = f"How faithful partial models are to the full one, measured for {name}"
        drawn[f"fidelity{f'-{n + 1}' if n else ''}"] = (label, pictures.fidelity(record["rows"], record["full_loss"]))
    return {name: (label, figure) for name, (label, figure) in drawn.items() if figure is not None}


def render(runs: Sequence[Run]) -> str:
    """The page.

    Texts from runs, predictions among them, are escaped; the only markup taken as it is, is our own pictures'.
    """
    results = [run.result for run in runs]
    inlined = {
        name: {"label": label, "svg": Markup(inline_svg(figure, label, f"{name}-"))}
        for name, (label, figure) in figures(runs).items()
    }
    environment = Environment(
        loader=PackageLoader("fast_prompt_tuning", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "number": number,
        "percent": percent,
        "signed": signed,
        "flops": lambda f: human_flops(f) if f else "none",
        "seconds": lambda s: human_seconds(s) if s else "none",
        "size": size_text,
    }
    environment.filters.update(filters)
    tasks = by_task(results)
    samples_of = {task: samples([run for run in runs if run.result in rs]) for task, rs in tasks.items()}
    return environment.get_template("report.html").render(
        title=f"{' and '.join(_models(results))} on {', '.join(tasks)}",
        tasks={task: {"metric": rs[0].primary, "rows": table_rows(rs)} for task, rs in tasks.items()},
        averages=average_rows(results) if len(tasks) > 1 else [],
        pictures=inlined,
        runs=runs,
        stages=[(r.name, _stages(r)) for r in results if len(r.schedule) > 1],
        samples={task: groups for task, groups in samples_of.items() if groups},
        settings=_settings(results),
        recipes=[(r.name, yaml.safe_dump(r.config, sort_keys=False, allow_unicode=True)) for r in results if r.config],
        versions=_columns([r.environment for r in results]),
        hashes=_columns([r.fingerprints for r in results]),
        long=LONG,
    )


def _similarities(runs: Sequence[Run]) -> list[tuple[list[str], list[list[float]]]]:
    """Names and similarities of the prompts that can be compared: of one model, as long, in one place."""
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for run in runs:
        folder = run.folder / "prompt"
        if folder.is_dir():
            prompt = load_prompt(folder)
            key = (run.result.fingerprints.get("model"), tuple(prompt.shape), place_of(folder))
            groups.setdefault(key, []).append((run.result.name, prompt))
    return [
        ([name for name, _ in prompts], similarity_matrix([prompt for _, prompt in prompts]).tolist())
        for prompts in groups.values()
        if len(prompts) > 1
    ]


class _Row(BaseModel):
    selection: str
    relative_flops: Real
    agreement: Real
    loss: Real


class _Fidelity(BaseModel):
    """What `fpt score --fidelity` prints, as far as it is drawn."""

    rows: list[_Row] = Field(min_length=1)
    full_loss: Real


class _Answered(BaseModel):
    """A line of `predictions.jsonl`, as far as it is shown."""

    id: str | int
    input: str
    prediction: str
    gold: list[str]


def _fidelities(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    """What `fpt score --fidelity … --json > RUN/fidelity.json` has left in runs' folders."""
    records = []
    for run in runs:
        path = run.folder / "fidelity.json"
        if not path.is_file():
            continue
        try:
            record = _Fidelity.model_validate(legible(json.loads(path.read_text(encoding="utf-8")))["fidelity"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"not what fpt score --fidelity prints ({type(error).__name__})", file=str(path)) from error
        records.append((run.result.name, record.model_dump()))
    return records


def _models(results: Sequence[RunResult]) -> list[str]:
    return list(dict.fromkeys(Path(r.config.get("model", {}).get("path", "a model")).name for r in results))


def _stages(result: RunResult) -> list[dict[str, Any]]:
    """Every stage with its first step; whatever a schedule sets beside sizes and steps is named in `more`."""
    usual = ("layers", "ffn", "steps", "stacks")
    return [
        {
            "from": start,
            **{name: stage[name] for name in usual[:3]},
            "more": ", ".join(f"{k} {v}" for k, v in stage.items() if k not in usual and v is not None),
        }
        for start, stage in zip(result.boundaries, result.schedule, strict=True)
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _settings(results: Sequence[RunResult]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, one text per run; where they are and what they are called goes unsaid."""
    flat = [_flat(r.config) for r in results]
    names = [n for n in dict.fromkeys(k for f in flat for k in f) if n not in ("output", "name")]
    rows = [(name, [_text(f.get(name)) for f in flat]) for name in names]
    return [(name, texts) for name, texts in rows if len(set(texts)) > 1]


def _columns(records: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Names with one value per record, or a single value where all agree."""
    rows = [(n, [r.get(n, "–") for r in records]) for n in dict.fromkeys(k for r in records for k in r)]
    return [(name, values[:1] if len(set(values)) == 1 else values) for name, values in rows]


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- sample predictions -----------------------------------------------------------------------------------------------


def samples(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Examples that all runs on a task have answered: where they differ most, right ones and wrong ones.

    Returns:
        (heading, examples) pairs; each example has `input`, `gold` and one answer per run with its score in percent.
    """
    answered = [(run.result, by_id) for run in runs if (by_id := _predictions(run))]
    if not answered:
        return []
    names, tables = [result.name for result, _ in answered], [table for _, table in answered]
    model_paths = [result.config.get("model", {}).get("path") for result, _ in answered]

    def same(i: str, n: int) -> bool:
        """Whether run n has answered example i of the first run, and not one of other data that is numbered alike."""
        one, other = tables[0][i], tables[n].get(i)
        # The input's template is the model family's.
        return other is not None and (
            one["gold"] == other["gold"] and (one["input"] == other["input"] or model_paths[0] != model_paths[n])
        )

    shared = [i for i in tables[0] if all(same(i, n) for n in range(1, len(tables)))]
    examples = [
        {
            "input": tables[0][i]["input"],
            "gold": " / ".join(tables[0][i]["gold"]) or "(no answer)",
            "answers": [
                {"run": name, "text": table[i]["prediction"], "score": table[i]["percent"]}
                for name, table in zip(names, tables, strict=True)
            ],
        }
        for i in shared
    ]
    scores = [[a["score"] for a in e["answers"]] for e in examples]
    order = sorted(range(len(examples)), key=lambda n: min(scores[n]) - max(scores[n]))  # a stable sort: file order
    differ = [n for n in order if max(scores[n]) > min(scores[n])][:SAMPLES]
    rest = sorted((n for n in range(len(examples)) if n not in differ), key=lambda n: -sum(scores[n]))
    graded = any(0 < score < 100 for row in scores for score in row)  # ROUGE: better and worse, not right and wrong
    good = [n for n in rest if graded or min(scores[n]) == 100][:SAMPLES]
    bad = [n for n in reversed(rest) if n not in good and (graded or max(scores[n]) == 0)][:SAMPLES]
    best, worst = ("Best", "Worst") if graded else ("Right", "Wrong")
    groups = (("Where the runs differ", differ), (best, good), (worst, bad))
    return [(heading, [examples[n] for n in picked]) for heading, picked in groups if picked]


def _predictions(run: Run) -> dict[str, dict[str, Any]]:
    """A run's predictions by id, each with its score; none where the run wrote no file that can be used."""
    metric = next((m for m in METRICS.values() if run.result.primary in m.scores), None)
    path = run.folder / "predictions.jsonl"
    if metric is None or not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [_Answered.model_validate(legible(json.loads(line))) for line in lines if line.strip()]
        by_name = metric([r.prediction for r in rows], [r.gold for r in rows])
        scores = by_name.get(run.result.primary) or next(iter(by_name.values()))  # a split's score is no example's
        return {str(row.id): {**row.model_dump(), "percent": score} for row, score in zip(rows, scores, strict=True)}
    except (OSError, ValueError, RecursionError, DataError) as error:
        raise DataError(f"not a run's predictions ({type(error).__name__})", file=str(path)) from error
