"""The quality columns of the paper's Tables 1 and 2, for whoever has the weights and the data.

Every cell is an ordinary run of the paper's recipe in a folder of its own: what is finished is not run again, what was
interrupted goes on, so that one command, given often enough, fills a table.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_atomic
from ..recipe import RunConfig, load, override
from ..report.tables import spent_flops, stopped_at
from ..run import run
from ..run.folder import changes_from
from ..run.preparation import evaluate_partial, full_size
from ..run.results import RunResult, load_result
from ..run.session import open_session
from ..schedule.stages import part_of
from .costs import PAPER_TABLE2, PAPER_TASKS, paper_rows


def files_of(data: str | Path | None, task: str) -> dict[str, str]:
    """Local files of a task: `DATA/<task>/train.*` and `validation.*`; none where `data` is None (then from the Hub).

    Raises:
        ConfigError: a split has no file there, or more than one.
    """
    if data is None:
        return {}
    files = {}
    for split in ("train", "validation"):
        of_split = sorted((Path(data) / task).glob(f"{split}.*"))
        if len(of_split) != 1:
            raise ConfigError(
                f"--data {str(data)!r} needs exactly one file {task}/{split}.* in the benchmark's official format, "
                f"found {len(of_split)}"
            )
        files[split] = str(of_split[0])
    return files


def table_runs(table: str, plm: str) -> dict[str, dict[str, Any]]:
    """Row name -> what its runs set: plain prompt tuning, then Table 1's nine partial PLMs or Table 2's methods.

    A Table 1 row's sizes are given as parts of the paper's model, so that they fit a model of any size.
    """
    runs: dict[str, dict[str, Any]] = {"pt": {"method": "pt"}}
    if table == "table2":
        return runs | {method: {"method": method} for method in PAPER_TABLE2[plm]}
    full_layers, full_ffn = 24, max(row.ffn for row in paper_rows(plm))
    for row in paper_rows(plm):
        sizes = {"layers": row.layers / full_layers, "ffn": row.ffn / full_ffn}
        runs[f"{row.method}-{row.layers}-{row.ffn}"] = {"method": row.method, "part": sizes}
    return runs


def run_table(
    table: str,
    *,
    plm: str,
    model: str,
    data: str | Path | None,
    output: str | Path,
    tasks: Sequence[str] = tuple(PAPER_TASKS),
    overrides: Iterable[str] = (),
    on_run: Callable[[str, str, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing of a table and give its rows.

    Args:
        plm: `large` or `xl`: whose recipe and schedule.
        model: hub id or folder of the weights.
        data: folder with `<task>/train.*` and `<task>/validation.*`; None loads from the Hub.
        output: folder for the runs, `<table>/<task>/<row>` each.
        overrides: `key=value` settings on top of the paper's recipe.
        on_run: called with `(task, row, "running" | "done")`.

    Returns:
        One record per row: the paper's metric of every task (Table 1: of the partial PLM itself; Table 2: of the full
        one), `average`, `flops` and `wall_clock` relative to `pt` in percent, and for Table 2 `improve`: the average
        gain over plain prompt tuning stopped at the same FLOPs.

    Raises:
        FptError: as `run.train`; runs that are done stay.
    """
    if unknown := sorted(set(tasks) - set(PAPER_TASKS)):
        raise ConfigError(f"--tasks {unknown} are not the paper's; choose from {', '.join(PAPER_TASKS)}")
    results: dict[str, dict[str, RunResult]] = {}
    values: dict[str, dict[str, float]] = {}
    for task in tasks:
        for row, settings in table_runs(table, plm).items():
            folder = Path(output) / table / task / row
            config = _config(plm, model, task, files_of(data, task), folder, settings, overrides)
            if on_run:
                on_run(task, row, "done" if (folder / "quality.json").is_file() else "running")
            results.setdefault(row, {})[task], values.setdefault(row, {})[task] = _cell(config, folder, settings)
    return [_row(row, results, values, tasks, table) for row in results]


def _config(
    plm: str,
    model: str,
    task: str,
    files: dict[str, str],
    folder: Path,
    settings: dict[str, Any],
    overrides: Iterable[str],
) -> RunConfig:
    values = {
        "model.path": model,
        "data.task": task,
        "data.files": files,
        "method": settings["method"],
        "output": str(folder),
        "name": f"{task} {folder.name}",
    }
    config = load(f"t5_paper_{plm}", [*(override(k, v) for k, v in values.items()), *overrides])
    part = settings.get("part")
    if part is None:
        return config
    # A partial-only run: one stage for all steps, at the row's share of this model's layers and neurons.
    full = full_size(config)
    _, stacks = PAPER_TASKS[task]
    stage = {
        "layers": {s: part_of(full.layers_in(s) or 1, part["layers"]) for s in stacks},
        "ffn": {s: part_of(full.ffn_in(s) or 1, part["ffn"]) for s in stacks},
        "steps": config.train.steps,
        "stacks": list(stacks),
    }
    # The full PLM, on which a run's best prompt is chosen, says nothing of one that is scored on the partial PLM.
    return load(config.model_dump(mode="json"), [override("stages", [stage]), "train.keep=last"])


def _cell(config: RunConfig, folder: Path, settings: dict[str, Any]) -> tuple[RunResult, float]:
    """The result of one run and the metric its table reports, from disk where it is done."""
    record = folder / "quality.json"
    if record.is_file():
        result = load_result(folder)
        if changed := changes_from(result.config, config):
            raise ConfigError(f"{str(folder)!r} was run otherwise: {'; '.join(changed)}; choose another --output")
        return result, float(json.loads(record.read_text(encoding="utf-8"))["value"])
    resume = (folder / "config.yaml").is_file()
    session = open_session(config, ("train", "validation"), resume=resume)
    result = run.train(config, resume=resume, session=session)
    if result.status != "finished":
        # A signal ended the run: the table ends with it, and goes on with the next command.
        number = int((result.reason or "signal 2").split()[-1])
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    metrics = evaluate_partial(session, folder).result.values if "part" in settings else result.metrics
    value = metrics[result.primary]
    write_atomic(record, json.dumps({"metric": result.primary, "value": value}) + "\n")
    return result, value


def _row(
    row: str,
    results: dict[str, dict[str, RunResult]],
    values: dict[str, dict[str, float]],
    tasks: Sequence[str],
    table: str,
) -> dict[str, Any]:
    mine, plain = results[row], results["pt"]
    spent = sum(spent_flops(r) for r in mine.values())
    entry: dict[str, Any] = {"method": row, **values[row]}
    entry["average"] = sum(values[row].values()) / len(tasks)
    entry["flops"] = 100 * spent / sum(r.flops["train"] for r in plain.values())
    seconds, of_plain = (sum(r.train_seconds for r in each.values()) for each in (mine, plain))
    entry["wall_clock"] = 100 * seconds / of_plain
    if table == "table2":
        gains = [values[row][t] - stopped_at(plain[t], spent_flops(mine[t]), plain[t].primary) for t in tasks]
        entry["improve"] = None if row == "pt" else sum(gains) / len(gains)
    return entry
