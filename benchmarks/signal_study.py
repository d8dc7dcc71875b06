"""Does the signal predict what a stage saves? Signals along whole runs, beside what those runs taught the full PLM.

    python benchmarks/signal_study.py --squad squad2-dev.json
    python benchmarks/signal_study.py --summary       # the tables, from the committed JSON alone

Runs are those of `quality/run.py`, with the rate tuned there. Plain prompt tuning and every method start from the same
prompt and see the same batches. What a stage taught is read off held-out loss per target token: the FLOPs that plain
prompt tuning needs for the same fall, for each FLOP of the stage. The signal predicts that ratio; it is measured at
prompts of the run itself, and of the plain run. One JSON file a model and task; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent / "quality"))
import run as grid

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.data.splits import train_split
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.plm.objective import IGNORED
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt.prediction import batches_by_length
from fast_prompt_tuning.prompt.prompted import PromptedPLM
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.run import preparation, run
from fast_prompt_tuning.run.session import Session, open_session
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.scores.signal import Signal, measure, signals
from fast_prompt_tuning.train.batches import make_collator

RESULTS = Path(__file__).parent / "results" / "signal_study"
INFLUENCE = {"scoring": {"keep_layers": "influence"}}
METHODS: dict[str, Any] = {
    # name -> what the run sets, given model and task; layers `evenly` unless it says otherwise, neurons by `activation`
    "pt": grid.METHODS["pt"],
    "ld": grid.METHODS["ld"],
    "ld-influence": lambda model, task: {"method": "ld", **INFLUENCE},
    "fr": grid.METHODS["fr"],
    "cr": grid.METHODS["cr"],
    "cr-influence": lambda model, task: {"method": "cr", **INFLUENCE},
    "batch": grid.METHODS["batch"],
}
ALONG = (0.0, 0.02, 0.1, 0.5, 1.0)
"""Parts of the plain run at whose prompts every stage is asked."""

OWN = (0.02, 0.3, 0.5)
"""Parts of a method's run at whose prompts the stage of that step is asked."""

EXAMPLES = 24
"""Training examples that a signal is measured on."""

HELD_OUT = 48
"""Examples of the test split that the loss is measured on."""


class Watch(TrainerCallback):
    """Prompts, FLOPs and held-out loss of a run, by step."""

    def __init__(self, session: Session, held_out: list[dict[str, torch.Tensor]], losses_at: Iterable[int]):
        self.session, self.held_out, self.losses_at = session, held_out, set(losses_at)
        self.prompts: dict[int, torch.Tensor] = {}
        self.losses: dict[int, float] = {}
        self.flops: dict[int, float] = {0: 0.0}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(state.global_step, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.flops[state.global_step] = logs["train_flops"] + logs["flops_score"] + logs["flops_probe"]

    def _look(self, step: int, model: Any) -> None:
        self.prompts[step] = prompt_parameter(model).detach().clone()
        if step in self.losses_at:
            self.losses[step] = token_loss(self.session.prompted(self.prompts[step]), self.held_out)


def labels_of(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)


def in_batches(session: Session, rows: Any) -> list[dict[str, torch.Tensor]]:
    """Encoded rows in batches of 8 of like length, with what stands behind a prompt within the text."""
    collate = make_collator(session.tokenizer, session.plm, tails=True)
    return [collate([rows[i] for i in picked]) for picked in batches_by_length(rows["input_ids"], 8)]


def token_loss(prompted: PromptedPLM, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss per target token, in nats, over all batches."""
    labels = labels_of(batches)
    with torch.no_grad():
        return float(sum(prompted.loss(batch, labels).value for batch in batches))


def brief(signal: Signal) -> dict[str, Any]:
    spelled = {name: [getattr(signal, name).value, getattr(signal, name).low, getattr(signal, name).high]
               for name in ("cosine", "per_flop", "per_batch")}  # fmt: skip
    return {"flops": signal.flops, "noise": signal.noise, **spelled}


def asked(
    session: Session, prompt: torch.Tensor, cut: dict[str, PartialPLM], stages: dict[str, Stage], rows: Any
) -> dict[str, Any]:
    """The signals of `METHOD/NUMBER → stage` at a prompt, each with its method's choice of layers."""
    prompted = session.prompted(prompt)
    found: dict[str, Any] = {}
    for partial in dict.fromkeys(cut[name.partition("/")[0]] for name in stages):
        mine = {name: stage for name, stage in stages.items() if cut[name.partition("/")[0]] is partial}
        made = signals(mine, measure(prompted, partial, list(mine.values()), rows), partial.full_stage)
        found |= {name: brief(signal) for name, signal in made.items()}
        partial.restore()
    return found


def study(model: str, task_name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    task, started = grid.TASKS[task_name], time.time()
    rate = grid.best_rate(grid.tried_rates(args.grid, model, task_name, "pt"))
    with tempfile.TemporaryDirectory(prefix="fpt-study-") as work:
        plain = grid.settings_of(model, task_name, "pt", rate, seed, args, Path(work), tuning=False)
        del plain["method"]
        plain["train"]["log_every"] = 1
        plain["data"]["validation_limit"] = HELD_OUT

        def recipe_of(method: str) -> config.RunConfig:
            settings = {**plain, "output": f"{work}/{method}"}
            for section, values in METHODS[method](model, task).items():
                settings[section] = {**settings[section], **values} if isinstance(values, dict) else values
            return config.load(settings)

        session = open_session(recipe_of("pt"), ("train", "validation"))
        held_out = preparation.collated(session, session.encoded["validation"])
        for rows in (session.examples, session.encoded):
            rows["validation"] = rows["validation"].select(range(2))  # what `run.train` itself scores
        steps = task.steps
        often = {round(steps * i / 24) for i in range(25)}
        runs: dict[str, Any] = {}
        prompts: dict[str, dict[int, torch.Tensor]] = {}
        cut: dict[str, PartialPLM] = {}
        stages: dict[str, Stage] = {}
        schedules = {}
        for method in args.methods:
            recipe = recipe_of(method)
            watch = Watch(session, held_out, often if method == "pt" else {round(steps * i / 5) for i in range(6)})
            result = run.train(recipe, session=session, callbacks=[watch])
            print(f"{model} {task_name} {method}: {watch.losses[steps]:.3f}", flush=True)
            prompts[method] = watch.prompts
            runs[method] = {
                "curve": [[step, watch.flops[step], loss] for step, loss in sorted(watch.losses.items())],
                "schedule": result.schedule,
                "kept_layers": result.kept_layers,
            }
            partial = preparation.partial_of_run(session, Path(work) / method)
            cut[method] = partial
            schedules[method] = schedule = recipe.schedule(partial.full_stage, session.task.stacks).now
            small = [s for s in schedule.stages if not s.is_full(partial.full_stage) or s.cuts_batch]
            stages |= {f"{method}/{i}": replace(stage, steps=0) for i, stage in enumerate(small)}
        measured_on, _ = train_split(session.encoded["train"], EXAMPLES, seed)
        batches = preparation.collated(session, measured_on)
        along = []
        for part in ALONG:
            step = round(part * steps) or int(part > 0)
            start, here = prompts["pt"][0], prompts["pt"][step]
            along.append({"step": step, "moved": float((here - start).norm() / start.norm()),
                          "signals": asked(session, here, cut, stages, batches)})  # fmt: skip
            print(f"{model} {task_name}: asked at step {step}", flush=True)
        for method in args.methods:
            runs[method]["own"] = own = []
            for part in OWN:
                step = round(part * steps) or int(part > 0)
                name = f"{method}/{schedules[method].index_at(step)}"
                if name in stages and step < steps:
                    one = asked(session, prompts[method][step], cut, {name: stages[name]}, batches)
                    own.append({"step": step, "stage": int(name.partition("/")[2]), **one[name]})
            half, start = round(steps / 2), prompts["pt"][0]
            plain_half, mine = prompts["pt"][half], prompts[method][half]
            runs[method]["prompt_cosine"] = cosine(mine, plain_half)
            runs[method]["moved_cosine"] = cosine(mine - start, plain_half - start)
        return {
            **{"model": model, "task": task_name, "seed": seed, "rate": rate, "steps": steps},
            "runs": runs,
            "along": along,
            "minutes": (time.time() - started) / 60,
            "environment": {**result.environment, "processor": grid.machine()["processor"]},
        }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0))


# -- what the runs say -------------------------------------------------------------------------------------------------


def plain_flops(curve: list[list[float]], loss: float) -> float:
    """FLOPs after which a plain run's best loss so far was `loss`; all of them where it never was."""
    best = [(curve[0][1], curve[0][2])]
    for _, flops, value in curve[1:]:
        if value < best[-1][1]:
            best.append((flops, value))
    if loss >= best[0][1]:
        return best[0][0]
    for (f0, l0), (f1, l1) in pairwise(best):
        if loss >= l1:
            return f0 + (f1 - f0) * (l0 - loss) / (l0 - l1)
    return curve[-1][1]


@dataclass(frozen=True)
class Taught:
    """A small stage of a run: what its signal said, and what it taught, for each FLOP and relative to plain."""

    model: str
    task: str
    method: str
    stage: int
    said: list[float]
    """Signal per FLOP with its interval, the mean over the prompts asked in the stage."""

    saves: bool
    """At every prompt asked the interval lies above 1."""

    taught: float


def taught(cell: dict[str, Any]) -> list[Taught]:
    plain = cell["runs"]["pt"]["curve"]
    rows = []
    for method, found in cell["runs"].items():
        at = {step: (flops, loss) for step, flops, loss in found["curve"]}
        end = 0
        for i, stage in enumerate(found["schedule"]):
            start, end = end, end + stage["steps"]
            own = [o for o in found["own"] if o["stage"] == i]
            first, last = (min(at, key=lambda step, x=x: abs(step - x)) for x in (start, end))
            if not own or last == first:
                continue
            fall = plain_flops(plain, at[last][1]) - plain_flops(plain, at[first][1])
            said = [sum(o["per_flop"][k] for o in own) / len(own) for k in range(3)]
            saves = all(o["per_flop"][1] > 1 for o in own)
            name = (cell["model"], cell["task"], method, i)
            rows.append(Taught(*name, said, saves, fall / (at[last][0] - at[first][0])))
    return rows


def two_by_two(pairs: Iterable[tuple[bool, bool]], what: str) -> list[str]:
    """Rows of a table: predicted, and found."""
    found = Counter(pairs)
    lines = [f"| {what} | it saved | it did not |", "| --- | --- | --- |"]
    for said, name in ((True, "predicted to save"), (False, "predicted to save nothing")):
        lines.append(f"| {name} | {found[said, True]} | {found[said, False]} |")
    return lines


def summary(cells: list[dict[str, Any]]) -> str:
    rows = [row for cell in cells for row in taught(cell)]
    partial = [row for row in rows if row.method != "batch"]
    lines = two_by_two(((row.saves, row.taught > 1) for row in rows), "stages")
    runs = []
    for cell in cells:
        end = cell["runs"]["pt"]["curve"][-1]
        for method in (name for name in cell["runs"] if name != "pt"):
            saves = any(row.saves for row in taught(cell) if row.method == method)
            runs.append((saves, cell["runs"][method]["curve"][-1][2] <= end[2]))
    lines += ["", *two_by_two(runs, "whole runs")]
    best = max(partial, key=lambda row: row.taught)
    middle = statistics.median(row.taught for row in partial)
    lines += [
        "",
        f"{len(partial)} partial stages taught {middle:.2f} of what plain does per FLOP (median), at most "
        f"{best.taught:.2f} ({best.model} {best.task} {best.method}/{best.stage})",
        "",
        "| model, task | run | FLOPs | final loss, plain | final loss | prompts | learned | gradients |",
        "|" + " --- |" * 8,
    ]
    for cell in cells:
        plain = cell["runs"]["pt"]["curve"][-1]
        for method in (name for name in cell["runs"] if name != "pt"):
            found = cell["runs"][method]
            _, flops, loss = found["curve"][-1]
            gradients = ", ".join(f"{o['cosine'][0]:.2f}" for o in found["own"])
            columns = [f"{cell['model']}, {cell['task']}", method, f"{flops / plain[1]:.0%}", f"{plain[2]:.2f}"]
            columns += [f"{loss:.2f}", f"{found['prompt_cosine']:.2f}", f"{found['moved_cosine']:.2f}", gradients]
            lines.append(f"| {' | '.join(columns)} |")
    lines += ["", "| stages | " + " | ".join(f"{part:.0%}" for part in ALONG) + " |", "| --- |" + " --- |" * len(ALONG)]
    for method in METHODS:
        if method != "pt":
            columns = []
            for i in range(len(ALONG)):
                asked = [s for cell in cells for name, s in cell["along"][i]["signals"].items()
                         if name.startswith(f"{method}/")]  # fmt: skip
                columns.append(f"{sum(s['per_flop'][1] > 1 for s in asked)} of {len(asked)}")
            lines.append(f"| {method} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


COLORS = {"ld": "tab:blue", "fr": "tab:orange", "cr": "tab:green", "batch": "tab:red"}


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """What was said against what was taught: one point a stage of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="0.6", lw=1)
    axes.axvline(1, color="0.6", lw=1)
    rows = [row for cell in cells for row in taught(cell)]
    for method in METHODS:
        mine = [row for row in rows if row.method == method]
        if mine:
            base, _, chosen = method.partition("-")
            marks = {"marker": "x" if chosen else "o", "color": COLORS[base], "s": 26, "alpha": 0.8}
            learned = [row.taught for row in mine]
            axes.hlines(
                learned, *zip(*(row.said[1:] for row in mine), strict=True), color=COLORS[base], lw=1, alpha=0.3
            )
            label = f"{base}, {chosen}" if chosen else base
            axes.scatter([row.said[0] for row in mine], learned, label=label, **marks)
    axes.set_xlim(-1.9, 3)
    axes.set_xlabel("signal per FLOP with its 95% interval, relative to plain prompt tuning")
    axes.set_ylabel("fall of held-out loss per FLOP,\nrelative to plain prompt tuning")
    axes.set_title("What the signal said of each stage, and what the stage taught", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=several, default=list(grid.MODELS))
    parser.add_argument("--tasks", type=several, default=["topics", "headlines", "squad"])
    parser.add_argument("--methods", type=several, default=list(METHODS))
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    parser.add_argument("--squad", type=Path, help="SQuAD 2.0 in the official JSON format")
    parser.add_argument("--reviews", type=Path, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("--grid", type=Path, default=grid.HERE / "results", help="where the tuned rates are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--summary", action="store_true", help="print the tables of the results and end")
    parser.add_argument("--picture", type=Path, help="draw the results into this file")
    args = parser.parse_args()
    if not args.summary:
        quiet_libraries()
        args.out.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for task in args.tasks:
                for model in args.models:
                    path = args.out / f"{model}-{task}-{seed}.json"
                    if not path.is_file():
                        write_atomic(path, json.dumps(study(model, task, seed, args), indent=1) + "\n")
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.out.glob("*.json"))]
    print(summary(cells))
    if args.picture:
        draw(cells, args.picture)


if __name__ == "__main__":
    main()
