"""One fair attempt at the paper's regime: a prompt that moves slowly, many steps, partial PLMs that are repaired.

    python benchmarks/slow_prompt.py --squad squad2-dev.json
    python benchmarks/slow_prompt.py --summary       # the table, from the committed JSON alone

Plain prompt tuning against `ld` and `fr`, as they are and with linear maps in place of what was left out: behind every
gap x + n(x) W + b, n(x) the RMS-normalised state, fitted front to back by ridge regression on the partial PLM's states,
the full PLM's for targets, around the prompt at that growth. Fitting is not counted, the maps' FLOPs are. Every run
starts from the same prompt and sees the same batches; its rate is a part of the tuned one. The signal is measured at
the start and in the middle of each stage. One JSON file a model, task and rate; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from signal_study import HELD_OUT, plain_flops, token_loss
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "quality"))
import run as grid

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cli.console import quiet_libraries
from fast_prompt_tuning.cost.flops import work_flops
from fast_prompt_tuning.cost.shapes import CostModel
from fast_prompt_tuning.data.batches import Collator
from fast_prompt_tuning.data.splits import train_split
from fast_prompt_tuning.files import write_atomic
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.run import preparation
from fast_prompt_tuning.run.session import Session, open_session
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.scores.signal import Measured, example_gradients, signals

RESULTS = Path(__file__).parent / "results" / "slow_prompt"
VARIANTS = ("pt", "ld", "ld-maps", "fr", "fr-maps")
FITTED_ON = 32
"""Training examples that maps are fitted on; as many others measure the signal."""

RIDGE = 1e-3
"""Of the mean diagonal of the normal equations."""


# -- maps in place of what a stage leaves out --------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """x + n(x) W + b, before a module of the decoder."""

    before: nn.Module
    weight: torch.Tensor
    """(H + 1, H), the last row is b"""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + normalised(x) @ self.weight.to(x)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """(…, H) → (…, H + 1): RMS-normalised, and a one."""
    n = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x)
    return torch.cat([n, torch.ones_like(n[..., :1])], -1)


@contextmanager
def mapped(maps: Sequence[Map]) -> Iterator[None]:
    """Run a block with the maps in place."""
    with ExitStack() as stack:
        for one in maps:
            stack.callback(one.before.register_forward_pre_hook(_first_argument(one), with_kwargs=True).remove)
        yield


def _first_argument(change: Any) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


@contextmanager
def seen(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """States `(B, T, H)` that enter modules in a block."""
    states: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}

    def keep(module: nn.Module) -> Any:
        def note(x: torch.Tensor) -> torch.Tensor:
            states[module].append(x.detach())
            return x

        return _first_argument(note)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(keep(module), with_kwargs=True).remove)
        yield states


def boundaries(plm: Any, partial: PartialPLM, stage: Stage) -> list[tuple[int, int]]:
    """Where a map stands: before which layer of the full PLM (its count: the last norm), and of the partial one."""
    kept = [*partial.kept_layers(stage)["decoder"], len(plm.model.layers)]
    narrowed = stage.ffn_in("decoder") not in (None, partial.full_stage.ffn_in("decoder"))
    return [(layer, i) for i, layer in enumerate(kept) if layer and (narrowed or layer - 1 not in kept)]


def fit(session: Session, prompt: torch.Tensor, partial: PartialPLM, stage: Stage, batches: Any) -> list[Map]:
    plm, prompted = session.plm, session.prompted(prompt.detach())
    full = [*plm.model.layers, plm.model.norm]
    places = boundaries(plm, partial, stage)
    real = torch.cat([torch.cat([torch.ones(len(b["input_ids"]), len(prompt)), b["attention_mask"]], 1).flatten().bool()
                      for b in batches]).to(plm.device)  # fmt: skip

    def states(modules: Sequence[nn.Module]) -> dict[nn.Module, torch.Tensor]:
        with seen(modules) as found, torch.no_grad():
            for batch in batches:
                prompted.loss(batch, 1)
        return {m: torch.cat([x.flatten(0, 1) for x in each])[real].float() for m, each in found.items()}

    wanted = states([full[layer] for layer, _ in places])
    maps: list[Map] = []
    with partial.at(stage):
        modules = [*plm.model.layers, plm.model.norm]
        for layer, i in places:
            with mapped(maps):
                x = states([modules[i]])[modules[i]]
            target = wanted[full[layer]]
            weight = 1 / target.norm(dim=-1, keepdim=True)
            a, y = (normalised(x) * weight).double(), ((target - x) * weight).double()
            gram = a.T @ a
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            maps.append(Map(modules[i], torch.linalg.solve(gram, a.T @ y).float()))
    return maps


# -- runs --------------------------------------------------------------------------------------------------------------


def study(model: str, task_name: str, part: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    tuned = grid.best_rate(grid.tried_rates(args.grid, model, task_name, "pt"))
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="fpt-slow-") as work:
        plain = grid.settings_of(model, task_name, "pt", tuned * part, seed, args, Path(work), tuning=False)
        plain["train"] |= {"steps": args.steps, "eval_every": args.steps, "save_every": args.steps}
        plain["data"]["validation_limit"] = HELD_OUT
        session = open_session(config.load(plain), ("train", "validation"))
        held_out = preparation.collated(session, session.encoded["validation"])
        rows = session.encoded["train"]
        picked, _ = train_split(rows, 2 * FITTED_ON, seed)
        fitted_on = preparation.collated(session, picked.select(range(FITTED_ON)))
        asked_on = preparation.collated(session, picked.select(range(FITTED_ON, 2 * FITTED_ON)))
        collate = Collator(session.tokenizer, decoder=session.decoder)
        order = torch.Generator().manual_seed(seed)
        size = session.config.train.batch_size
        batches = [collate([rows[i] for i in torch.randperm(len(rows), generator=order)[:size].tolist()])
                   for _ in range(args.steps)]  # fmt: skip
        start = preparation.trainable(session).prompt.detach().clone()  # type: ignore[union-attr]
        session = open_session(config.load(plain), ("train",))  # without the adapter that made the prompt
        runs = {}
        for variant in args.variants:
            method, _, repaired = variant.partition("-")
            settings = {**plain, "method": method, "scoring": {"examples": 64, "keep_layers": "influence"}}
            settings["output"] = f"{work}/{variant}"
            session.config = config.load(settings)
            runs[variant] = tuned_prompt(session, start, batches, held_out, fitted_on, asked_on, bool(repaired))
            print(f"{model} {task_name} {part} {variant}: {runs[variant]['curve'][-1]}", flush=True)
    return {
        **{"model": model, "task": task_name, "part": part, "rate": tuned * part, "seed": seed, "steps": args.steps},
        **{"runs": runs, "minutes": (time.time() - started) / 60, "dtype": args.dtype, "machine": grid.machine()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def tuned_prompt(
    session: Session, start: torch.Tensor, batches: Any, held_out: Any, fitted_on: Any, asked_on: Any, repaired: bool
) -> dict[str, Any]:
    plm = session.plm
    schedule, needed = preparation.checked_schedule(session, plm)
    ledger = preparation.FlopsLedger()
    partial = preparation.scored_partial(session, plm, schedule, needed, Path(session.config.output), ledger)
    stages = schedule.now.stages
    cost = CostModel.from_model(plm)
    prompt = nn.Parameter(start.clone().float())
    optimizer = torch.optim.Adam([prompt], lr=session.config.optim.lr)
    spent, step, curve, asked = 0.0, 0, [], []
    every = max(1, len(batches) // 30)
    for number, stage in enumerate(stages):
        maps: list[Map] = []
        if partial is not None and repaired and not stage.is_full(partial.full_stage):
            maps = fit(session, prompt, partial, stage, fitted_on)
        width = start.shape[-1]
        middle = step + stage.steps // 2
        end = step + stage.steps
        while step < end:
            if step % every == 0:
                curve.append([step, spent, token_loss(session.prompted(prompt.detach()), held_out)])
            if partial is not None and not stage.is_full(partial.full_stage) and step in (end - stage.steps, middle):
                asked.append(
                    {"step": step, "stage": number, **signal_of(session, prompt, partial, stage, maps, asked_on)}
                )
            batch = batches[step]
            labels = int((batch["labels"] != -100).sum())
            with ExitStack() as stack:
                if partial is not None:
                    stack.enter_context(partial.at(stage))
                stack.enter_context(mapped(maps))
                loss, work = session.prompted(prompt).loss(batch, labels)
                (prompt.grad,) = torch.autograd.grad(loss, [prompt])
            optimizer.step()
            tokens = batch["input_ids"].numel() + len(start) * len(batch["input_ids"])
            # A map and its gradient are one product of (tokens, H) and (H, H) each; a multiplication and an addition.
            spent += work_flops(cost, work, stage) + len(maps) * 2 * 2 * tokens * width * width
            step += 1
    curve.append([step, spent, token_loss(session.prompted(prompt.detach()), held_out)])
    if partial is not None:
        partial.restore()
    moved = float((prompt.detach() - start).norm() / start.norm())
    return {"curve": curve, "asked": asked, "moved": moved, "stages": [stage.to_dict() for stage in stages]}


def signal_of(
    session: Session, prompt: torch.Tensor, partial: PartialPLM, stage: Stage, maps: list[Map], batches: Any
) -> dict[str, Any]:
    """The signal of a stage with its maps, beside the full PLM; their cost is left out of `per_flop`."""
    prompted, cost = session.prompted(prompt.detach()), CostModel.from_model(session.plm)
    full, step = replace(partial.full_stage, steps=0), replace(stage, steps=0)
    found = []
    for batch in batches:
        both = {}
        for size in (full, step):
            with partial.at(size), mapped(maps if size == step else []):
                gradients, work = example_gradients(prompted, batch)
            flops = work_flops(cost, work, size)
            both[size] = Measured(gradients, flops, 1.0, flops)
        found.append(both)
    one = signals({"stage": step}, found, partial.full_stage)["stage"]
    return {name: list(asdict(getattr(one, name)).values()) for name in ("cosine", "per_flop", "per_batch")}


def summary(cells: list[dict[str, Any]]) -> str:
    lines = ["| model, task, part of the tuned rate | run | FLOPs | final loss | plain's FLOPs for it | prompt moved | "
             "signal per FLOP, start and middle of each stage |", "|" + " --- |" * 7]  # fmt: skip
    for cell in cells:
        plain = cell["runs"]["pt"]["curve"]
        for name, found in cell["runs"].items():
            _, flops, loss = found["curve"][-1]
            said = ", ".join(f"{asked['per_flop'][0]:.2f}" for asked in found["asked"]) or "–"
            lines.append(
                f"| {cell['model']}, {cell['task']}, {cell['part']:.2f} | {name} | {flops / plain[-1][1]:.0%} | "
                f"{loss:.2f} | {plain_flops(plain, loss) / plain[-1][1]:.0%} | {found['moved']:.2f} | {said} |"
            )
    asked = [a for cell in cells for found in cell["runs"].values() for a in found["asked"]]
    certain = sum(a["per_flop"][1] > 1 for a in asked)
    return "\n".join([*lines, "", f"{certain} of {len(asked)} questions found a partial stage certainly above plain"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=several, default=["gemma", "smollm2"])
    parser.add_argument("--tasks", type=several, default=["headlines", "squad"])
    parser.add_argument("--parts", type=lambda text: [float(p) for p in text.split(",")], default=[0.33, 0.1])
    parser.add_argument("--variants", type=several, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--squad", type=Path, help="SQuAD 2.0 in the official JSON format")
    parser.add_argument("--reviews", type=Path, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("--grid", type=Path, default=grid.HERE / "results", help="where the tuned rates are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--summary", action="store_true", help="print the table of the results and end")
    args = parser.parse_args()
    if not args.summary:
        quiet_libraries()
        args.out.mkdir(parents=True, exist_ok=True)
        for model in args.models:
            for task in args.tasks:
                for part in args.parts:
                    path = args.out / f"{model}-{task}-{part}.json"
                    if not path.is_file():
                        found = study(model, task, part, args.seed, args)
                        write_atomic(path, json.dumps(found, indent=1) + "\n")
    print(summary([json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.out.glob("*.json"))]))


if __name__ == "__main__":
    main()
