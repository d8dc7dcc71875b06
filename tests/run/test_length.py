"""How long a run is: passes over its examples, and an end where nothing gets better."""

from __future__ import annotations

import logging

import pytest
from toy import recipe

from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run

BY_EPOCHS = {"train__steps": 0, "method": "pt"}


@pytest.mark.parametrize(("epochs", "accumulate", "steps"), [(1, 1, 10), (1.5, 1, 15), (2, 3, 8), (0.01, 1, 1)])
def test_epochs_are_passes_over_the_training_examples(epochs, accumulate, steps, tmp_path):
    more = {"train__epochs": epochs, "train__accumulate": accumulate, **BY_EPOCHS}
    found = run.train(recipe(tmp_path / "run", **more))  # 40 examples in batches of 4
    assert found.steps == steps
    saved = load(tmp_path / "run" / "config.yaml")
    assert (saved.train.steps, saved.train.epochs) == (steps, None)


def test_a_run_of_epochs_resumes_as_one_of_steps_does(tmp_path):
    by_epochs = {"train__epochs": 1, "train__save_every": 5, "train__keep_checkpoints": 9, **BY_EPOCHS}
    whole = run.train(recipe(tmp_path / "run", **by_epochs))
    again = run.train(recipe(tmp_path / "run", **by_epochs), resume=True)
    assert again.losses == whole.losses
    with pytest.raises(ConfigError, match="method was 'pt', is 'ld'"):
        run.train(recipe(tmp_path / "run", **{**by_epochs, "method": "ld"}), resume=True)


def test_a_run_needs_one_length(tmp_path):
    with pytest.raises(ConfigError, match=r"set train\.steps or train\.epochs"):
        recipe(tmp_path, train__steps=0)
    with pytest.raises(ConfigError, match=r"steps=10 and epochs=2\.0 are both a length"):
        recipe(tmp_path, train__epochs=2)
    stages = [{"layers": 2, "steps": 4}, {"steps": 6}]
    with pytest.raises(ConfigError, match=r"train\.epochs=1\.0 cannot be set"):
        recipe(tmp_path, train__epochs=1, train__steps=0, stages=stages)


def test_patience_ends_a_run_that_gets_no_better_and_keeps_its_best(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    # A rate of almost nothing: the first evaluation stays the best.
    found = run.train(recipe(tmp_path / "run", method="pt", optim__lr=1e-30, train__steps=40, train__patience=2))
    assert (found.status, found.steps, found.best_step) == ("finished", 15, 5)
    assert "step 15: no better accuracy since step 5, so the run ends here (train.patience=2)" in caplog.text
    plain = run.train(recipe(tmp_path / "plain", method="pt", optim__lr=1e-30, train__steps=40))
    assert plain.steps == 40


def test_a_plan_of_epochs_asks_for_steps(tmp_path, fpt):
    (tmp_path / "r.yaml").write_text(recipe(tmp_path / "run", train__epochs=1, **BY_EPOCHS).to_yaml())
    assert "give --steps" in fpt("plan", "-c", tmp_path / "r.yaml", code=2)[1]
    fpt("plan", "-c", tmp_path / "r.yaml", "--steps", 10)
