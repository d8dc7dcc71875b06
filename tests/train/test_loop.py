"""The loop of `fpt train` as a callback meets it, and what it does without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import Broken, recipe
from transformers import TrainerCallback, TrainerControl, TrainerState

from fast_prompt_tuning.errors import TrainingStopped
from fast_prompt_tuning.prompt import front
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.recipe import RunConfig
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.folder import read_log
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.train import checkpoint, loop


class Recorder(TrainerCallback):
    """Every event: its name, the step, and what came with it."""

    def __init__(self):
        self.told = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, **more: Any) -> None:
            assert isinstance(args, RunConfig)
            assert isinstance(state, TrainerState)
            assert isinstance(control, TrainerControl)
            assert prompt_parameter(more["model"]) in more["optimizer"].param_groups[0]["params"]
            self.told.append((name, state.global_step))

        return record


def test_a_callback_is_told_of_these_events_in_this_order(tmp_path):
    recorder = Recorder()
    run.train(recipe(tmp_path / "run", method="ld", train__steps=4, train__eval_every=4), callbacks=[recorder])
    a_step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    at_the_end = ["on_log", "on_evaluate", "on_save", "on_train_end"]
    assert [name for name, _ in recorder.told] == ["on_train_begin", *(a_step * 4), *at_the_end]
    assert {name for name, _ in recorder.told} == set(loop.EVENTS)
    assert [s for name, s in recorder.told if name == "on_step_end"] == [1, 2, 3, 4]


def test_a_callback_may_ask_for_a_log_a_checkpoint_an_evaluation_and_the_end(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = control.should_evaluate = control.should_save = state.global_step == 3
            control.should_training_stop = state.global_step == 5

    result = run.train(recipe(tmp_path / "run", method="pt"), callbacks=[Ask()])
    assert (result.status, result.steps) == ("finished", 5)
    assert [p.step for p in result.curve] == [3, 5]  # what a run ends with is always evaluated
    assert [s for s, _ in result.losses] == [3]
    assert checkpoint.steps_of(tmp_path / "run" / "checkpoints") == [3]


def test_the_model_is_the_full_one_whenever_a_callback_looks(tmp_path, monkeypatch):
    sizes, inside = set(), []

    class Look(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("on_"):
                return super().__getattribute__(name)
            return lambda args, state, control, model, **more: sizes.add(model.config.num_hidden_layers)

    inner = front.Front.loss

    def loss(self, *given):
        inside.append(self.plm.config.num_hidden_layers)
        return inner(self, *given)

    monkeypatch.setattr(front.Front, "loss", loss)
    run.train(recipe(tmp_path / "run", method="ld"), callbacks=[Look()])
    assert sizes == {5}
    assert inside == [1, 1, 3, 3, 4, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_an_error_in_a_step_leaves_the_full_model(tmp_path, monkeypatch, error):
    seen = []

    def loss(self, *given):
        seen.append((self, self.plm.config.num_hidden_layers))
        raise error

    monkeypatch.setattr(front.Front, "loss", loss)
    with pytest.raises(error):
        run.train(recipe(tmp_path / "run", method="ld", train__gradient_checkpointing=True))
    ((prompted, layers),) = seen
    assert (layers, prompted.plm.config.num_hidden_layers) == (1, 5)
    assert not prompted.plm.is_gradient_checkpointing


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_the_mean_loss_over_all_labels_of_its_batches(tmp_path, monkeypatch, accumulate):
    taken = []
    inner = loop.Loop.gradient

    def gradient(self, batches, labels, stage):
        loss, work = inner(self, batches, labels, stage)
        with torch.no_grad():
            sums = [self.prompted.loss(batch, 1).value for batch in batches]
        taken.append((float(loss), float(sum(sums)) / labels, sum(int((b["labels"] >= 0).sum()) for b in batches)))
        assert labels == taken[-1][2]
        return loss, work

    monkeypatch.setattr(loop.Loop, "gradient", gradient)
    result = run.train(recipe(tmp_path / "run", method="pt", train__accumulate=accumulate, train__steps=5))
    for logged, (loss, by_hand, _) in zip([v for _, v in result.losses], taken, strict=True):
        assert logged == loss == pytest.approx(by_hand, rel=1e-5)
    log = read_log(tmp_path / "run" / "log.jsonl")
    an_epoch = -(-10 // accumulate)  # ten batches
    assert [r["epoch"] for r in log if "loss" in r] == pytest.approx([s / an_epoch for s in range(1, 6)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_full_fine_tuning_is_cut_into_parts_where_memory_ends(tmp_path, monkeypatch, accumulate, caplog):
    options = {"method": "full", "optim__lr": 0.01, "train__steps": 4, "train__accumulate": accumulate}
    whole = run.train(recipe(tmp_path / "whole", **options))
    inner = front.label_loss

    def limited(model, batch, **more):
        if len(batch["input_ids"]) > 1 and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(model, batch, **more)

    monkeypatch.setattr(front, "label_loss", limited)
    parts = run.train(recipe(tmp_path / "parts", **options))
    assert "4 parts of at most 1 examples" in caplog.text
    assert dict(parts.losses) == pytest.approx(dict(whole.losses), rel=1e-4)


def test_a_process_with_a_part_of_the_weights_does_not_cut_its_batch(tmp_path, monkeypatch):
    def spent(model, batch, **_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    session = open_session(recipe(tmp_path / "run", method="pt"), ("train", "validation"))
    monkeypatch.setattr(front, "label_loss", spent)
    monkeypatch.setattr(loop.parallel, "in_parts", lambda: "shard")
    with pytest.raises(TrainingStopped, match=r"out of memory at step 0 .* lower train.batch_size"):
        run.train(session.config, session=session)


@pytest.mark.parametrize(
    ("lr_schedule", "rates"),
    [
        ("constant", [0.0, 0.04, 0.08, 0.08, 0.08, 0.08]),
        ("linear", [0.0, 0.04, 0.08, 0.06, 0.04, 0.02]),
        ("cosine", [0.0, 0.04, 0.08, 0.0683, 0.04, 0.0117]),
    ],
)
def test_rates_rise_and_then_stay_or_fall_to_the_end_of_the_run(lr_schedule, rates, tmp_path):
    optim = {"optim__lr": 0.08, "optim__warmup_steps": 2, "optim__lr_schedule": lr_schedule}
    run.train(recipe(tmp_path, **optim, method="pt", train__steps=6, train__log_every=1))
    logged = [r["learning_rate"] for r in read_log(tmp_path / "log.jsonl") if "learning_rate" in r]
    assert logged == pytest.approx(rates, abs=1e-4)


def test_a_run_resumed_with_more_steps_falls_to_its_new_end(tmp_path):
    settings = {"optim__lr": 0.08, "optim__lr_schedule": "linear", "method": "pt", "train__log_every": 1}
    run.train(recipe(tmp_path, **settings, train__steps=4))
    run.train(recipe(tmp_path, **settings, train__steps=8), resume=True, allow_changed=True)
    logged = [r["learning_rate"] for r in read_log(tmp_path / "log.jsonl") if "learning_rate" in r]
    assert logged == pytest.approx([0.08, 0.06, 0.04, 0.02, 0.04, 0.03, 0.02, 0.01])
