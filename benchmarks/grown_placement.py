"""A prompt after the text that grows to the front: is the second, dear stage worth its FLOPs?

    python benchmarks/grown_placement.py
    python benchmarks/grown_placement.py --summary       # the table, from the committed JSON alone

First the prompt after the text alone, the instruction in front of it constant, texts kept. Then the embeddings of the
instruction are trained too, from the same loss, in steps that cost what plain prompt tuning's do. Beside it: plain
prompt tuning of a prompt that begins as the instruction, with all of its steps and with as many as both stages cost;
and the prompt after the text for twice its steps. Loss per target token on 48 test examples. One JSON file a task and
seed; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from signal_study import HELD_OUT, Watch, in_batches, labels_of, token_loss
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parent / "quality"))
import held_out as study
import run as grid

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.cost.flops import step_flops
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.plm.objective import IGNORED, label_loss
from fast_prompt_tuning.prompt.front import batch_shape
from fast_prompt_tuning.prompt.passes import split_batch
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import Session, open_session
from fast_prompt_tuning.train.batches import Batches, make_collator
from fast_prompt_tuning.train.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results" / "grown_placement"
TASKS = {"headlines": "headlines-128", "headlines-64": "headlines-128", "squad-64": "squad-paragraphs"}
"""Tasks of `quality/run.py`, with texts of 32 and 64 tokens → those of `held_out.py` whose instruction they take."""

GROWN_STEPS = 24
RATES = (0.003, 0.01, 0.03)
FRONT_RATE = 0.03
"""The tuned rate of a prompt in front on all of these tasks (`quality/results/held_out/smollm2-*-tuning.json`)."""


@dataclass
class Grown:
    """A PLM with a prompt in front of the text, `front (F, H)`, and one after it, `back (P, H)`.

    The front prompt stands in place of the first F tokens of each text: the instruction's.
    """

    plm: Any
    front: nn.Parameter
    back: nn.Parameter
    within: bool
    """The back prompt stands before what the template asks about a text."""

    def loss(self, batch: Mapping[str, torch.Tensor], labels: int) -> torch.Tensor:
        """Summed cross-entropy of a batch, divided by a number of labels."""
        parts, embed = split_batch(self.plm, batch, tails=self.within), self.plm.get_input_embeddings()
        rows, targets = [], []
        skipped = len(self.front) + len(self.back)
        for text, target, label in zip(parts.texts, parts.targets, parts.labels, strict=True):
            rest = embed(torch.tensor(text[len(self.front) :], dtype=torch.long))
            rows.append(torch.cat([self.front, rest, self.back, embed(target)]))
            targets.append(torch.cat([label.new_full((skipped + len(rest),), IGNORED), label]))
        given = {
            "inputs_embeds": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }
        return label_loss(self.plm, given, num_items=labels)


def grow(
    session: Session, back: torch.Tensor, instruction: list[int], rate: float, held_out: list[dict[str, torch.Tensor]]
) -> list[list[float]]:
    """[step, FLOPs, held-out loss] of `GROWN_STEPS` steps in which both prompts are trained."""
    plm, settings = session.plm, session.config.train
    set_seed(settings.seed)
    within = session.config.prompt.placement == "infix"
    front = plm.get_input_embeddings()(torch.tensor(instruction)).detach()
    model = Grown(plm, nn.Parameter(front.clone()), nn.Parameter(back.clone()), within)
    optimizer, rates = make_optimizer([model.front, model.back], config.OptimConfig(lr=rate), GROWN_STEPS)
    collate = make_collator(session.tokenizer, plm, tails=True)
    batches = Batches(session.encoded["train"], collate, settings)

    def point(step: int, flops: float) -> list[float]:
        count = labels_of(held_out)
        with torch.no_grad():
            return [step, flops, sum(float(model.loss(batch, count)) for batch in held_out)]

    curve, flops = [point(0, 0.0)], 0.0
    for step in range(GROWN_STEPS):
        for batch in batches.of(settings.steps + step):  # the examples that follow those of the first stage
            model.loss(batch, labels_of([batch])).backward()
            flops += step_flops(session.cost, None, batch_shape(batch, len(back), decoder=True))
        nn.utils.clip_grad_norm_([model.front, model.back], 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % 12 == 0:
            curve.append(point(step + 1, flops))
    return curve


def one(task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    started, tuning, named = time.time(), seed == grid.TUNE_SEED, TASKS[task]
    instruction = study.INSTRUCTIONS[named]
    study.TASKS[named] = grid.TASKS[named] = grid.TASKS[task]
    steps = grid.TASKS[task].steps
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fpt-grown-") as folder:

        def recipe_of(variant: str, name: str, **changes: Any) -> config.RunConfig:
            settings = study.settings_of("smollm2", named, variant, FRONT_RATE, seed, args, Path(folder) / name)
            for section, values in changes.items():
                settings[section] = {**settings[section], **values}
            return config.load(settings)

        sessions: dict[str, tuple[Session, list[dict[str, torch.Tensor]]]] = {}

        def tuned(name: str, variant: str, **changes: Any) -> tuple[Session, Watch, list[dict[str, torch.Tensor]]]:
            (Path(folder) / name).mkdir()
            recipe = recipe_of(variant, name, **changes)
            place = recipe.prompt.placement
            if place not in sessions:
                session = open_session(recipe, ("train", "validation"))
                sessions[place] = session, in_batches(session, session.encoded["validation"])
                for rows in (session.examples, session.encoded):
                    rows["validation"] = rows["validation"].select(range(2))  # what `run.train` itself scores
            session, held_out = sessions[place]
            session.config = recipe
            end = recipe.train.steps
            watch = Watch(session, held_out, {end // 2, end})
            result = run.train(recipe, session=session, callbacks=[watch])
            curve = [[step, watch.flops[step], loss] for step, loss in sorted(watch.losses.items())]
            runs[name] = {"curve": curve, "seconds": result.train_seconds}
            runs["environment"] = result.environment
            print(task, seed, name, curve[-1], flush=True)
            return session, watch, held_out

        def of(steps: int, **more: Any) -> dict[str, Any]:
            return {"train": {"steps": steps}, "data": {"validation_limit": HELD_OUT}, **more}

        session, watch, held_out = tuned("after", "after-prodigy", **of(steps))
        ids = session.tokenizer(instruction, add_special_tokens=False)["input_ids"]
        if any(row[: len(ids)] != ids for row in session.encoded["train"]["input_ids"]):
            raise SystemExit(f"the rows do not begin with the instruction's tokens: {instruction!r}")
        before = token_loss(session.prompted(watch.prompts[steps]), held_out)
        rates = RATES if tuning else [best_rate(args.out, task)]
        grown = {str(rate): grow(session, watch.prompts[steps], ids, rate, held_out) for rate in rates}
        for rate, curve in grown.items():
            if abs(curve[0][2] - before) > 1e-3:
                raise SystemExit(f"the loss before the growth is {before}, after it {curve[0][2]}")
            print(task, seed, "grown", rate, curve, flush=True)
        if not tuning:
            session._texts = None  # every run pays for the texts that it keeps
            tuned("after-twice", "after-prodigy", **of(2 * steps))
            words = {"prompt": {"init": "text", "text": instruction}}
            tuned("pt-words", "pt", **of(steps, **words))
            spent = runs["after"]["curve"][-1][1] + next(iter(grown.values()))[-1][1]
            fewer = round(steps * spent / runs["pt-words"]["curve"][-1][1])
            tuned("pt-words-short", "pt", **of(fewer, **words))
    environment = runs.pop("environment")
    return {
        **{"model": "smollm2", "task": task, "seed": seed, "steps": steps, "runs": runs, "grown": grown},
        "minutes": (time.time() - started) / 60,
        "environment": {**environment, "processor": grid.machine()["processor"]},
    }


def tuned_on(task: str) -> str:
    """The task that a task's rates are tuned on."""
    return grid.TASKS[task].tuned or task


def best_rate(out: Path, task: str) -> float:
    """The rate of the growth that ended lowest on another split and seed."""
    grown = json.loads((out / f"{tuned_on(task)}-tuning.json").read_text(encoding="utf-8"))["grown"]
    return float(min(grown, key=lambda rate: grown[rate][-1][2]))


def summary(out: Path) -> str:
    lines = ["| task | run | final loss, each seed | mean | FLOPs, of pt-words |", "|" + " --- |" * 5]
    for task in TASKS:
        cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"{task}-[0-9].json"))]
        rows: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            whole = cell["runs"]["pt-words"]["curve"][-1][1]
            after = cell["runs"]["after"]["curve"][-1][1]
            (grown,) = cell["grown"].values()
            ends = {name: one["curve"][-1] for name, one in cell["runs"].items()}
            ends["grown"] = [0, after + grown[-1][1], grown[-1][2]]
            for name, (_, flops, loss) in ends.items():
                rows.setdefault(name, []).append((loss, flops / whole))
        for name, values in rows.items():
            losses = [loss for loss, _ in values]
            each = ", ".join(f"{loss:.3f}" for loss in losses)
            cost = statistics.fmean(flops for _, flops in values)
            lines.append(f"| {task} | {name} | {each} | {statistics.fmean(losses):.3f} | {cost:.0%} |")
    return "\n".join(lines)


def cells(
    doc: str | None,
    tasks: list[str],
    seeds: list[int],
    out: Path,
    one: Callable[..., Any],
    table: Callable[[Path], str],
) -> None:
    """The command of a benchmark whose cells are tasks and seeds: make those that are missing, print the table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=tasks)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=seeds)
    parser.add_argument("--squad", type=Path, help="SQuAD 2.0 in the official JSON format, for tasks of it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--summary", action="store_true", help="print the table of the results and end")
    args = parser.parse_args()
    args.reviews = None
    if not args.summary:
        quiet_libraries()
        args.out.mkdir(parents=True, exist_ok=True)
        for task in args.tasks:
            for seed in args.seeds:
                tuning = seed == grid.TUNE_SEED
                name = tuned_on(task) if tuning else task
                path = args.out / f"{name}-{'tuning' if tuning else seed}.json"
                if not path.is_file():
                    write_atomic(path, json.dumps(one(name, seed, args), indent=1) + "\n")
    print(table(args.out))


if __name__ == "__main__":
    cells(__doc__, ["headlines-64"], [grid.TUNE_SEED, 0, 1], RESULTS, one, summary)
