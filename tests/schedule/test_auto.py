"""`method: auto`: it grows when the full model's held-out loss says so, the same after a resume, at a bounded cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from settings import BY_NAME
from toy import FILLER, toy
from trainers import Rows, arguments
from transformers import Trainer

from fast_prompt_tuning import PartialPLM, soft_prompt_config
from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cost.flops import step_flops
from fast_prompt_tuning.errors import ConfigError, DataError, ScheduleError
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.run import pricing, run
from fast_prompt_tuning.run.folder import read_log
from fast_prompt_tuning.run.preparation import checked_schedule, trainable
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.schedule.auto import PROBE, WINDOWS, AutoSchedule, best_case, default_ladder, probe_examples
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.train.callback import AutoCallback
from fast_prompt_tuning.train.loop import Loop
from fast_prompt_tuning.train.running_mean import EmaCallback

FULL = Stage(12, 64)
LADDER = (dataclasses.replace(FULL, batch=4), dataclasses.replace(FULL, batch=8), FULL)


@given(st.integers(1, 5000), st.integers(1, 256))
def test_probes_cost_a_small_part_of_any_run_that_is_not_tiny(steps, examples):
    size = probe_examples(steps, examples)
    assert 4 <= size <= 16
    assert probe_examples(steps, 2 * examples) >= size
    schedule = AutoSchedule((dataclasses.replace(FULL, batch=1), FULL), steps)
    loss, probes = 1.0, 0
    for step in range(steps):
        if schedule.wants_probe(step):
            schedule.tell(step, loss := loss * 0.9)
            probes += 1
    if size > 4 and steps >= 10 * WINDOWS:  # in shorter runs windows are rounded
        assert probes * size / 2 <= 0.045 * steps * examples


def played(schedule: AutoSchedule, losses: Any) -> list[tuple[int, str]]:
    """Run a schedule to its end on a stream of probe values; the steps at which it grew, and how."""
    stream, decisions, step = iter(losses), [], 0
    while True:
        if schedule.wants_probe(step):
            decision = schedule.tell(step, next(stream))
            assert not schedule.wants_probe(step)
            decisions += [(step, decision)] if decision else []
        if step >= schedule.total_steps:
            return decisions
        step += 1


def falling(rate: float, start: float = 8.0) -> Any:
    return (start * rate**i for i in itertools.count())


def test_a_stage_that_keeps_lowering_the_loss_lasts_to_the_papers_last_growth():
    schedule = AutoSchedule(LADDER, 120)
    assert played(schedule, falling(0.9)) == [(72, "grow")]
    assert [(s.batch, s.steps) for s in schedule.now.stages] == [(4, 72), (None, 48)]


def test_two_windows_without_progress_end_a_stage():
    schedule = AutoSchedule(LADDER, 120)
    assert schedule.window == 10
    losses = [8, 4, 3, 2.99, 3.01, 2, 2.5, 2.5, 1]  # ends at 40; the next stage goes on from 3.01, ends at 70
    assert played(schedule, losses) == [(40, "grow"), (70, "grow")]
    assert [(s.batch, s.steps) for s in schedule.now.stages] == [(4, 40), (8, 30), (None, 50)]


@pytest.mark.parametrize("second", [8.0, 9.0, 7.95, math.nan, math.inf])
def test_a_first_window_that_teaches_nothing_is_given_up_and_given_back(second):
    schedule = AutoSchedule(LADDER, 120)
    assert played(schedule, [8.0, second]) == [(10, "abandon")]
    assert [(s.batch, s.steps) for s in schedule.now.stages] == [(4, 10), (None, 120)]
    assert schedule.total_steps == 130


def test_a_later_stage_can_be_given_up_too():
    schedule = AutoSchedule(LADDER, 120)
    assert played(schedule, [8, 4, 4, 4, 5]) == [(30, "grow"), (40, "abandon")]
    assert [(s.batch, s.steps) for s in schedule.now.stages] == [(4, 30), (8, 10), (None, 90)]


COSTS = (0.25, 0.5, 1.0)


def test_what_was_saved_is_spent_while_the_loss_falls():
    schedule = AutoSchedule(LADDER, 120, COSTS)
    assert played(schedule, falling(0.9))[:3] == [(72, "grow"), (120, "go on"), (130, "go on")]
    assert [(s.batch, s.steps) for s in schedule.now.stages] == [
        (4, 72),
        (None, 48 + 54),
    ]  # 72 steps at a quarter save 54
    assert schedule.total_steps == schedule.most_steps
    schedule = AutoSchedule(LADDER, 120, COSTS, probe_cost=0.5)
    probes = len(played(schedule, falling(0.9))) + 9 + 2  # 9 until it grows, 2 in the last stage before its end
    spent = 72 * 0.25 + schedule.now.stages[-1].steps + 0.5 * probes
    assert 117 < spent <= 120


def test_a_run_whose_loss_has_stopped_falling_ends_as_asked():
    schedule = AutoSchedule(LADDER, 120, COSTS)
    small = [8 * 0.9**i for i in range(9)]  # at 0, 10 … 70, 72
    assert played(schedule, [*small, 3.0, 2.99, 3.01]) == [(72, "grow")]  # probed at 100, 110 and 120
    assert schedule.total_steps == 120
    schedule = AutoSchedule(LADDER, 120, COSTS)
    assert played(schedule, [*small, 3.0, 3.2, 2.9, 2.9, 2.9]) == [(72, "grow"), (120, "go on"), (130, "go on")]
    assert schedule.total_steps == 140


def test_nothing_is_added_where_a_first_stage_was_given_up():
    schedule = AutoSchedule(LADDER, 120, COSTS)
    assert played(schedule, [8.0, 9.0]) == [(10, "abandon")]
    assert schedule.total_steps == 130


def test_short_runs_and_one_rung_are_plain():
    for schedule in (AutoSchedule(LADDER, WINDOWS - 1), AutoSchedule((FULL,), 100)):
        assert not any(schedule.wants_probe(step) for step in range(101))
        assert [s.batch for s in schedule.now.stages] == [None]
        assert schedule.total_steps == schedule.asked


@given(st.integers(1, 400), st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=20, max_size=20),
       st.integers(1, 4), st.booleans())  # fmt: skip
def test_whatever_the_probes_say(steps, losses, rungs, priced):
    """It is a schedule at every moment, costs at most a window more than asked, and a replay decides the same."""
    ladder = (*(dataclasses.replace(FULL, batch=b) for b in range(1, rungs)), FULL)
    costs = [0.2 * b for b in range(1, rungs)] + [1.0] if priced else None
    schedule = AutoSchedule(ladder, steps, costs, probe_cost=0.1 if priced else 0.0)
    log: list[dict[str, Any]] = []
    stream = iter([*losses, *itertools.repeat(1.0, 100)])
    step = 0
    while step < schedule.total_steps:
        if schedule.wants_probe(step):
            value = next(stream)
            schedule.tell(step, value)
            log.append({"step": step, PROBE: value})
        assert schedule.now.total_steps == schedule.total_steps  # raises if a stage had no steps
        step += 1
    assert len(log) <= WINDOWS * (2 if priced else 1)
    assert schedule.now.stages[-1].batch is None
    assert schedule.total_steps <= schedule.most_steps <= steps + max(schedule.window, 0.6 * steps + 1 if priced else 0)
    cost = sum(s.steps * (0.2 * s.batch if s.batch and priced else 1.0) for s in schedule.now.stages)
    lost = schedule.window + 0.2 if schedule.given_back else 0.2  # a first window is given up, or of a single step
    assert cost + 0.1 * priced * len(log) <= steps + lost
    again = AutoSchedule(ladder, steps, costs, schedule.probe_cost)
    again.replay([{"step": 0, "loss": 1.0}, *json.loads(json.dumps(log))])
    assert again.now == schedule.now


def test_the_default_ladder_and_what_is_refused():
    assert default_ladder(FULL, 16) == (dataclasses.replace(FULL, batch=4), FULL)
    assert default_ladder(FULL, 3) == (FULL,)
    cut = dataclasses.replace(FULL, layers=9, batch=4)
    assert default_ladder(FULL, 16, 1000) == (cut, dataclasses.replace(FULL, batch=4), FULL)
    assert default_ladder(Stage(1, 64), 16, 1000) == (Stage(1, 64, batch=4), Stage(1, 64))
    with pytest.raises(ScheduleError, match="ladder"):
        AutoSchedule((), 10)
    with pytest.raises(ScheduleError, match="total_steps"):
        AutoSchedule(LADDER, 0)
    for costs in ([0.5, 1.0], [0.0, 0.5, 1.0], [0.5, 2.0, 1.0]):
        with pytest.raises(ScheduleError, match=r"costs=.* must be 3 numbers above 0 and at most 1"):
            AutoSchedule(LADDER, 120, costs)
    with pytest.raises(ScheduleError, match=r"ask_costs=.* must be 3 numbers of at least 0"):
        AutoSchedule(LADDER, 120, ask_costs=[1.0])
    base = {"model": {"path": "x"}, "data": {"task": "bbc_topics"}, "method": "auto", "train": {"steps": 24},
            "output": "y"}  # fmt: skip
    with pytest.raises(ConfigError, match=r"stages\[0\].steps=3 with method='auto'; leave it out"):
        config.load({**base, "stages": [{"steps": 3, "batch": 2}]})
    with pytest.raises(ConfigError, match=r"stages\[0\].steps=None with method='cr'; set it"):
        config.load({**base, "method": "cr", "stages": [{"batch": 2}]})


def test_the_plan_of_auto_is_its_cheapest():
    assert [(s.batch, s.steps) for s in best_case(LADDER, 120).stages] == [(4, 72), (None, 48)]
    assert [(s.batch, s.steps) for s in best_case(LADDER, 5).stages] == [(None, 5)]


def recipe(folder: Path, kind: str = "llama", **train: Any) -> config.RunConfig:
    made = toy()
    return config.load(
        {
            "model": {"path": str(getattr(made, kind)), "dtype": "float32"},
            "data": {"task": str(made.topics), "validation_limit": 8, "max_input_tokens": 20},
            "prompt": {"tokens": 3, "placement": "prefix"},
            "method": "auto",
            "optim": {"lr": 0.05},
            "train": {"steps": 24, "batch_size": 8, "log_every": 1, "eval_every": 8, **train},
            "output": str(folder),
        }
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_whole_run(kind, tmp_path):
    found = run.train(recipe(tmp_path / "run", kind))
    log = read_log(tmp_path / "run" / "log.jsonl")
    probes = [r for r in log if PROBE in r]
    assert probes[0]["step"] == 0
    assert found.flops["probe"] > 0
    assert found.flops["total"] == pytest.approx(sum(v for k, v in found.flops.items() if k != "total"))
    assert sum(s["steps"] for s in found.schedule) == found.steps
    assert found.schedule[0]["batch"] == 2
    assert "batch" not in found.schedule[-1]
    assert 24 <= found.steps <= 31  # more, while the loss falls, until the run has cost what a plain one does


def losses_of(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_log(folder / "log.jsonl") if "loss" in r}


def resumed_from(whole: config.RunConfig, reached: int) -> tuple[config.RunConfig, run.RunResult]:
    """A finished run once more, as if it had been killed after the checkpoint of a step."""
    folder = Path(f"{whole.output}-cut-{reached}")
    shutil.copytree(whole.output, folder)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > reached:
            shutil.rmtree(checkpoint)
    again = config.load(whole.model_dump(mode="json"), [f"output={folder}"])
    return again, run.train(again, resume=True)


@pytest.mark.parametrize("ema", [None, 0.8])
@pytest.mark.parametrize("lr", [0.05, 1e-6], ids=["grows", "abandons"])
def test_resumed_anywhere_it_decides_as_it_did(lr, ema, tmp_path):
    """Before, at and after a growth; with a rate too low to teach anything the first window is given up."""
    whole = recipe(tmp_path / "whole", save_every=1, keep_checkpoints=40, eval_every=24)
    whole = config.load(whole.model_dump(mode="json"), [f"optim.lr={lr}", config.override("optim.ema_decay", ema)])
    first = run.train(whole)
    assert first.steps == (26 if lr < 0.01 else 24)
    for reached in (1, 2, 3, 15):
        again, found = resumed_from(whole, reached)
        assert found.schedule == first.schedule
        assert losses_of(Path(again.output)) == losses_of(tmp_path / "whole")
        assert found.flops["train"] == first.flops["train"]
        assert found.flops["probe"] == first.flops["probe"]


def falling_with_steps(self: Any, *probe: Any) -> float:
    """In place of a probe's loss, as `Loop` and `AutoCallback` measure it: always lower than before."""
    if not probe:
        return float(8 * 0.9**self._trainer.state.global_step)
    measured(self, *probe)
    return float(8 * 0.9**self.state.global_step)


measured = Loop.probe


def test_a_rate_that_falls_does_so_again_over_steps_that_are_added(tmp_path, monkeypatch):
    """It is at zero where the run would end as far as is known, and a resumed run has the same rates."""
    monkeypatch.setattr(Loop, "probe", falling_with_steps)
    whole = recipe(tmp_path / "whole", save_every=1, keep_checkpoints=60, eval_every=48, log_every=1)
    whole = config.load(whole.model_dump(mode="json"), ["optim.lr_schedule=linear", "optim.lr=0.24"])
    assert run.train(whole).steps == 30
    rates = rates_of(tmp_path / "whole")
    assert rates[:24] == pytest.approx([0.01 * left for left in range(24, 0, -1)])
    assert rates[24:] == pytest.approx([0.24 * left / total for total in (26, 28, 30) for left in (2, 1)])
    for reached in (14, 24, 25, 26, 29):
        again, _ = resumed_from(whole, reached)
        assert rates_of(Path(again.output)) == rates
        assert losses_of(Path(again.output)) == losses_of(tmp_path / "whole")


def rates_of(folder: Path) -> list[float]:
    return [r["learning_rate"] for r in read_log(folder / "log.jsonl") if "learning_rate" in r]


def test_a_run_that_goes_on_costs_no_more_than_plain_and_resumes(tmp_path, monkeypatch):
    """Every probe is lower than the one before: what the small stage has saved is spent, and nothing else."""
    monkeypatch.setattr(Loop, "probe", falling_with_steps)
    plain = run.train(config.load(recipe(tmp_path / "plain").model_dump(mode="json"), ["method=pt"]))
    whole = recipe(tmp_path / "whole", save_every=1, keep_checkpoints=60, eval_every=48)
    first = run.train(whole)
    assert [s["steps"] for s in first.schedule] == [14, 10 + 6]
    # Every eighth batch of the plain run is half a batch; those of the other are whole, since it holds 4 rows out.
    assert 0.9 < (first.flops["train"] + first.flops["probe"]) / plain.flops["train"] / (8 / 7.5) < 1.02
    assert (tmp_path / "whole" / "checkpoints" / "checkpoint-30").is_dir()
    evaluated = [r["step"] for r in read_log(tmp_path / "whole" / "log.jsonl") if "eval_accuracy" in r]
    assert evaluated == [30]  # once
    for reached in (14, 24, 25, 29, 30):
        again, found = resumed_from(whole, reached)
        assert (found.steps, found.schedule, found.metrics) == (30, first.schedule, first.metrics)
        assert losses_of(Path(again.output)) == losses_of(tmp_path / "whole")
        assert found.flops["train"] == first.flops["train"]


@pytest.mark.parametrize(
    "changes",
    [
        ["train.batch_tokens=40"],
        ["prompt.placement=suffix"],
        ["prompt.placement=infix"],
        ["train.accumulate=2"],
    ],
    ids=["token budget", "texts of its own", "within the text", "accumulated"],
)
def test_a_run_that_goes_on_knows_what_was_saved(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(Loop, "probe", falling_with_steps)
    settings = recipe(tmp_path / "run", batch_size=8, steps=48).model_dump(mode="json")
    spent = {}
    for method in ("pt", "auto"):
        found = run.train(config.load(settings, [*changes, f"method={method}", f"output={tmp_path / method}"]))
        spent[method] = found.flops["train"]
    assert spent["auto"] <= spent["pt"] * 1.02


@pytest.mark.parametrize("ema", ["none", "first", "last"])
def test_an_abandoned_stage_leaves_no_trace_in_the_prompt(ema, tmp_path):
    plm = BY_NAME["llama"].plm()
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    partial = PartialPLM(model, keep_neurons="first")
    full = partial.full_stage
    schedule = AutoSchedule((dataclasses.replace(full, batch=1), full), 24)
    data = Rows(BY_NAME["llama"].batch(size=6))
    start = prompt_parameter(model).detach().clone()
    seen: dict[int, torch.Tensor] = {}
    sizes = []

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            if not torch.is_grad_enabled():  # a probe: say that nothing has been learned
                return torch.tensor(5.0)
            sizes.append(len(inputs["input_ids"]))
            seen.setdefault(self.state.global_step, prompt_parameter(self.model).detach().clone())
            return super().compute_loss(model, inputs, **kwargs)

    callback = AutoCallback(partial, schedule, data.batch)
    trainer = OwnLoss(
        model=model,
        args=arguments(tmp_path, max_steps=26),
        train_dataset=data,
        callbacks=[
            *([EmaCallback()] if ema == "first" else []),
            callback,
            *([EmaCallback()] if ema == "last" else []),
        ],
    )
    callback.attach(trainer)
    trainer.train()
    assert sizes[:2] == [1, 1]
    assert min(sizes[2:]) > 1
    assert not torch.equal(seen[1], start)
    assert torch.equal(seen[2], start)
    assert trainer.state.global_step == 26


def test_too_few_examples_to_hold_any_out(tmp_path):
    settings = config.load(recipe(tmp_path / "run").model_dump(mode="json"), ["data.train_limit=3"])
    with pytest.raises((ConfigError, DataError), match="held-out"):
        run.train(settings)
    assert not (tmp_path / "run").exists()


def test_with_nothing_to_try_it_is_plain_prompt_tuning(tmp_path, caplog):
    plain = config.load(recipe(tmp_path / "plain", batch_size=2).model_dump(mode="json"), ["method=pt"])
    first = run.train(plain)
    found = run.train(recipe(tmp_path / "auto", batch_size=2))
    assert "nothing to try" in caplog.text
    assert (found.steps, found.flops["train"]) == (24, first.flops["train"])
    assert losses_of(tmp_path / "auto") == losses_of(tmp_path / "plain")


def own_trainer(folder: Path, rate: float, **options: object) -> tuple[Trainer, AutoSchedule]:
    plm = BY_NAME["llama"].plm()
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    partial = PartialPLM(model)
    schedule = AutoSchedule(default_ladder(partial.full_stage, 4), 24)
    rows = BY_NAME["llama"].batch(size=16)
    options = {"per_device_train_batch_size": 4, "learning_rate": rate, **options}
    callback = AutoCallback(partial, schedule, BY_NAME["llama"].batch(seed=9, size=4))
    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=Rows(rows), callbacks=[callback])
    callback.attach(trainer)
    return trainer, schedule


def test_epochs_in_place_of_steps(tmp_path):
    trainer, _ = own_trainer(tmp_path, 0.05, max_steps=-1, num_train_epochs=6)
    assert trainer.train().global_step == 24


def test_a_trainer_of_few_steps_ends_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoCallback, "_measure", falling_with_steps)
    for room, steps in ((0, 24), (3, 27), (99, 34)):
        trainer, schedule = own_trainer(tmp_path / str(room), 0.05, max_steps=24 + room)
        schedule.costs = (0.25, 1.0)
        assert trainer.train().global_step == steps
        assert schedule.total_steps >= steps


def test_a_checkpoint_carried_elsewhere_goes_on_and_says_what_is_missing(tmp_path, caplog):
    options = {"max_steps": 26, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1000}
    trainer, first = own_trainer(tmp_path / "a", 1e-9, **options)
    assert trainer.train().global_step == 26
    assert first.given_back
    shutil.copytree(tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1")
    trainer, again = own_trainer(tmp_path / "b", 1e-9, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    assert "stage_start.safetensors is missing" in caplog.text
    assert again.entered == first.entered


def full_disk(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("lr", [0.05, 1e-6], ids=["grows", "abandons"])
def test_a_full_disk_ends_no_run(lr, tmp_path, monkeypatch, caplog):
    settings = recipe(tmp_path / "whole", save_every=24, eval_every=24).model_dump(mode="json")
    whole = run.train(config.load(settings, [f"optim.lr={lr}"]))
    monkeypatch.setattr("fast_prompt_tuning.train.growth.save_file", full_disk)
    found = run.train(config.load(settings, [f"optim.lr={lr}", f"output={tmp_path / 'full'}"]))
    assert "stage_start.safetensors cannot be written" in caplog.text
    assert (found.schedule, found.metrics) == (whole.schedule, whole.metrics)


def test_small_stages_are_a_part_of_the_batches_that_there_are(tmp_path):
    """A budget of tokens leaves room for fewer examples than `batch_size`."""
    found = run.train(recipe(tmp_path / "run", batch_size=16, batch_tokens=60))
    assert [stage.get("batch") for stage in found.schedule] == [1, None]


def test_a_prices_target_is_counted_once(tmp_path):
    """What a stage of short inputs costs: a decoder's rows hold their targets."""
    row = {"text": " ".join(FILLER), "answer": " ".join([*FILLER, "ball"])}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 32)
    settings = recipe(tmp_path / "run").model_dump(mode="json")
    settings["data"] = {
        "files": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")},
        "input_template": "{{ text }}", "target_template": "{{ answer }}", "max_input_tokens": 20,
        "max_target_tokens": 16,
    }  # fmt: skip
    changes = ["stages=[{length: 4}]", "train.steps=600"]  # so many that asking what it teaches pays
    session = open_session(config.load(settings, changes), ("train", "validation"))
    schedule, _ = checked_schedule(session, trainable(session).module)
    priced = pricing.priced(schedule, session, session.encoded["train"], 4)
    usual = pricing.usual_shape(session)  # all rows are alike
    assert (usual.input_tokens, usual.target_tokens) == (10, 12)
    small, full = (step_flops(session.cost, stage, usual) for stage in schedule.ladder)
    assert priced.costs == (pytest.approx(small / full), 1.0)
