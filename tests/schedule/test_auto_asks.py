"""`method: auto` runs a partial PLM only while its signal is certainly above plain's, and asks for little."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from settings import BY_NAME
from toy import toy
from trainers import Rows, arguments
from transformers import AutoModelForCausalLM, Trainer

from fast_prompt_tuning import PartialPLM, soft_prompt_config
from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.folder import read_log
from fast_prompt_tuning.schedule.auto import ASK_SHARE, PROBE, SIGNAL, AutoSchedule
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.train.callback import AutoCallback

FULL = Stage(12, 64)
CUT = dataclasses.replace(FULL, layers=6, batch=4)
LESS_CUT = dataclasses.replace(FULL, layers=9, batch=4)
SMALL = dataclasses.replace(FULL, batch=4)
LADDER = (CUT, LESS_CUT, SMALL, FULL)
COSTS = (0.12, 0.18, 0.25, 1.0)


def played(
    schedule: AutoSchedule, lows: dict[Stage, list[float]]
) -> tuple[list[tuple[int, Stage]], list[dict[str, Any]]]:
    """A run whose loss falls, and whose stages answer with these lower ends in turn: what ran, and its log."""
    log: list[dict[str, Any]] = []
    answers = {stage: iter(values) for stage, values in lows.items()}

    def ask(step: int) -> None:
        while schedule.asks(step):
            log.append({"step": step, f"{SIGNAL}_low": next(answers[schedule.ladder[schedule.rung]]), SIGNAL: 0.0})
            schedule.answer(step, log[-1][f"{SIGNAL}_low"])

    step = 0
    while True:
        ask(step)
        if schedule.wants_probe(step):
            log.append({"step": step, PROBE: 8 * 0.9 ** len(log)})
            schedule.tell(step, log[-1][PROBE])
            ask(step)
        if step >= schedule.total_steps:
            return [(s.steps, dataclasses.replace(s, steps=0)) for s in schedule.now.stages], log
        step += 1


def test_a_stage_that_is_not_certainly_above_plain_makes_no_step():
    schedule = AutoSchedule(LADDER, 120)
    ran, log = played(schedule, {CUT: [0.99], LESS_CUT: [-3.0]})
    assert ran == [(72, SMALL), (48, FULL)]
    assert [entry["step"] for entry in log if SIGNAL in entry] == [0, 0]


def test_it_is_asked_after_every_window_and_left_when_it_is_no_more():
    schedule = AutoSchedule(LADDER, 120)
    ran, log = played(schedule, {CUT: [1.5, 1.2, 0.9], LESS_CUT: [1.1, 1.0]})
    assert ran == [(20, CUT), (10, LESS_CUT), (42, SMALL), (48, FULL)]
    assert [entry["step"] for entry in log if SIGNAL in entry] == [0, 10, 20, 20, 30]


def test_without_money_for_another_question_it_is_left():
    schedule = AutoSchedule((CUT, SMALL, FULL), 120, (0.12, 0.25, 1.0), ask_costs=(1.2, 0.0, 0.0))
    ran, log = played(schedule, {CUT: [2.0] * 9})
    assert ran[:2] == [(30, CUT), (42, SMALL)]  # asked at 0, 10 and 20: 3.6 of 120 steps
    assert schedule.ask_spent == pytest.approx(3.6)
    again = AutoSchedule(schedule.ladder, 120, schedule.costs, ask_costs=schedule.ask_costs)
    again.replay(json.loads(json.dumps(log)))
    assert (again.now, again.answers) == (schedule.now, schedule.answers)


def test_what_pays():
    """A window of 10 steps saves 10 × 0.13 of a full step over the small batch; all questions may cost 3.6."""
    for ask, pays in ((1.2, True), (1.4, False)):
        assert AutoSchedule((CUT, SMALL, FULL), 120, (0.12, 0.25, 1.0), ask_costs=(ask, 0, 0)).pays(0) == pays
    schedule = AutoSchedule((CUT, FULL), 120, (0.12, 1.0), ask_costs=(3.7, 0))
    assert not schedule.pays(0)  # 8.8 saved, but more than 3.6
    assert [AutoSchedule(LADDER, 120).is_cut(rung) for rung in range(4)] == [True, True, False, False]
    short = dataclasses.replace(FULL, length=8)
    assert AutoSchedule((short, FULL), 120).is_cut(0)


@given(st.integers(12, 400), st.floats(0, 4), st.lists(st.floats(-1, 3), min_size=60, max_size=60))
def test_whatever_the_answers_are(steps, ask, lows):
    """Questions keep within their share, only what was certain runs, and a replay decides the same."""
    schedule = AutoSchedule(LADDER, steps, COSTS, 0.1, (ask, ask, 0.0, 0.0))
    ran, log = played(schedule, {CUT: lows[:30], LESS_CUT: lows[30:]})
    assert schedule.ask_spent <= ASK_SHARE * steps
    assert sum(n for n, _ in ran) == schedule.total_steps
    assert ran[-1][1] == FULL
    certain = sum(entry[f"{SIGNAL}_low"] > 1 for entry in log if SIGNAL in entry)
    assert sum(n for n, stage in ran if stage.layers != 12) <= certain * schedule.window
    again = AutoSchedule(LADDER, steps, COSTS, 0.1, schedule.ask_costs)
    again.replay(json.loads(json.dumps(log)))
    assert (again.now, again.answers, again.given_back) == (schedule.now, schedule.answers, schedule.given_back)


# -- real runs ---------------------------------------------------------------------------------------------------------


def changed(folder: Path, factors: dict[int, float]) -> Path:
    """The toy model with outputs of some layers times a factor."""
    shutil.copytree(toy().llama, folder, dirs_exist_ok=True)
    plm = AutoModelForCausalLM.from_pretrained(folder)
    for layer, factor in factors.items():
        scale(plm.model.layers[layer], factor)
    plm.save_pretrained(folder)
    return folder


def scale(layer: Any, factor: float) -> None:
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


@pytest.fixture(scope="module")
def redundant(tmp_path_factory) -> Path:
    """A model whose third layer does nothing."""
    return changed(tmp_path_factory.mktemp("redundant"), {2: 0.0})


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Path:
    """A model whose every layer does much, unlike one that was just initialised."""
    return changed(tmp_path_factory.mktemp("busy"), dict.fromkeys(range(5), 30.0))


def recipe(model: Path, folder: Path, **train: Any) -> config.RunConfig:
    return config.load(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"task": str(toy().topics), "validation_limit": 8, "max_input_tokens": 20},
            "prompt": {"tokens": 3},
            "method": "auto",
            "stages": [{"layers": 4}],
            "scoring": {"keep_layers": "influence", "layer_examples": 4},
            "optim": {"lr": 0.02},
            "train": {"steps": 240, "batch_size": 8, "log_every": 40, "eval_every": 300, **train},
            "output": str(folder),
        }
    )


def layers_run(found: run.RunResult) -> list[int]:
    return [stage["layers"] for stage in found.schedule]


def test_a_redundant_model_is_tuned_without_its_idle_layer_and_resumes(redundant, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole = recipe(redundant, tmp_path / "run", save_every=20, keep_checkpoints=40)
    found = run.train(whole)
    assert layers_run(found) == [4, 5]
    assert found.schedule[0]["steps"] >= 20
    log = read_log(tmp_path / "run" / "log.jsonl")
    asked = [r for r in log if SIGNAL in r]
    assert asked[0]["step"] == 0
    assert min(r[f"{SIGNAL}_low"] for r in asked) > 1  # the same gradient for fewer FLOPs
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("auto, step")]
    assert len(lines) >= len(asked)
    assert "signal of 4 layers" in lines[0]
    assert "of plain's, asking" in lines[0]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for checkpoint in (tmp_path / "cut" / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 20:
            shutil.rmtree(checkpoint)
    again = run.train(config.load(whole.model_dump(mode="json"), [f"output={tmp_path / 'cut'}"]), resume=True)
    assert (again.schedule, again.metrics, again.flops) == (found.schedule, found.metrics, found.flops)


def test_a_model_with_nothing_to_spare_is_never_cut_and_pays_little_for_the_question(busy, tmp_path):
    settings = recipe(busy, tmp_path / "run").model_dump(mode="json")
    found = run.train(config.load(settings, ["stages=[{layers: 1}]", "scoring.keep_layers=first"]))
    assert layers_run(found) == [5]
    asked = [r for r in read_log(tmp_path / "run" / "log.jsonl") if SIGNAL in r]
    assert [r["step"] for r in asked] == [0]
    assert asked[0][f"{SIGNAL}_low"] <= 1
    assert found.flops["probe"] + found.flops["score"] < 0.03 * found.flops["train"]
    assert found.steps == 240


def test_in_a_run_too_short_to_pay_for_it_nothing_is_asked_or_scored(redundant, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = run.train(recipe(redundant, tmp_path / "run", steps=24))
    assert layers_run(found) == [5]
    assert "costs more than it could save" in caplog.text
    assert found.flops["score"] == found.flops["probe"] == 0


@pytest.mark.parametrize("spare", [True, False])
def test_a_trainer_of_ones_own_asks_too(spare, tmp_path):
    plm = BY_NAME["llama"].plm()
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    partial = PartialPLM(model, keep_layers="first")
    full = partial.full_stage
    cut = dataclasses.replace(full, layers=full.layers - 1 if spare else 1)
    for layer in plm.model.layers:
        scale(layer, 30.0)
    if spare:
        scale(plm.model.layers[-1], 0.0)
    schedule = AutoSchedule((cut, full), 24)
    callback = AutoCallback(partial, schedule, BY_NAME["llama"].batch(seed=9, size=4))
    rows = Rows(BY_NAME["llama"].batch(size=16))
    args = arguments(tmp_path, max_steps=30, per_device_train_batch_size=4, learning_rate=0.05)
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback])
    callback.attach(trainer)
    trainer.train()
    assert (schedule.now.stages[0].layers == cut.layers) == spare
    assert any(SIGNAL in entry for entry in trainer.state.log_history)
