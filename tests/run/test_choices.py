"""`method: auto` with nothing set: where the prompt stands, what optimizes it, and that every choice can be fixed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from settings import BY_NAME
from toy import toy

from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.data.task_files import load_task
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.choices import asks_about_text, chosen
from fast_prompt_tuning.run.session import open_session


def recipe(folder: Path, model: str = "llama", **more: Any) -> config.RunConfig:
    """What somebody writes who knows nothing of the project: model, data, length, output."""
    base = {
        "model": {"path": str(toy().model(model))},
        "data": {"task": str(toy().topics), "validation_limit": 8, "max_input_tokens": 20},
        "train": {"steps": 24, "batch_size": 8},
        "output": str(folder),
    }
    return config.load({**base, **more})


def settings(found: config.RunConfig) -> tuple[str, str, float]:
    return found.prompt.placement, found.optim.optimizer, found.optim.lr


def test_a_decoders_prompt_goes_behind_the_text_and_finds_its_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = run.train(recipe(tmp_path / "run"))
    assert found.method == "auto"
    made = config.load(found.config)
    assert settings(made) == ("suffix", "prodigy", 1.0)
    assert "prompt.placement=suffix; for a stock PEFT adapter set prompt.placement=prefix" in caplog.text
    assert "Prodigy finds the learning rate" in caplog.text
    assert [stage.get("batch") for stage in found.schedule] == [None]
    assert "nothing to try" not in caplog.text
    plain = run.train(recipe(tmp_path / "plain", method="pt", optim={"lr": 0.05}))
    assert found.flops["train"] < 0.7 * plain.flops["train"]
    assert found.losses[-1][1] < found.losses[0][1]


def test_an_encoder_decoders_stays_in_front_and_starts_small(tmp_path):
    found = run.train(recipe(tmp_path / "run", model="t5"))
    made = config.load(found.config)
    assert settings(made) == ("prefix", "adam", 0.01)
    assert found.schedule[0]["batch"] == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": {"placement": "prefix"}}, ("prefix", "adam", 0.01)),
        ({"prompt": {"placement": "suffix"}}, ("suffix", "prodigy", 1.0)),
        ({"optim": {"lr": 0.02}}, ("suffix", "adam", 0.02)),
        ({"optim": {"optimizer": "adam"}}, ("suffix", "adam", 0.01)),
        ({"stages": [{"batch": 2}]}, ("prefix", "adam", 0.01)),
        ({"cache": {"tier": "none"}}, ("prefix", "adam", 0.01)),
        ({"prompt": {"init": "prompt", "path": "saved"}}, ("prefix", "adam", 0.01)),
        ({"method": "pt"}, ("prefix", "adam", 0.01)),
        ({"train": {"steps": 24, "batch_size": 8, "gradient_checkpointing": True}}, ("prefix", "adam", 0.01)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_recipe_sets_stays(changes, expected, tmp_path):
    given = recipe(tmp_path / "run", **changes)
    made = chosen(given, load_task(str(toy().topics)), BY_NAME["llama"].plm())
    assert settings(made) == expected
    assert chosen(made, load_task(str(toy().topics)), BY_NAME["llama"].plm()) == made


def test_a_model_whose_texts_cannot_be_kept_has_the_prompt_in_front(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plm = BY_NAME["llama"].plm()
    plm.config.is_decoder_only_in_name = True

    class Other(type(plm)):
        """Of no family that is registered."""

    plm.config.model_type = "unheard-of"
    made = chosen(recipe(tmp_path / "run"), load_task(str(toy().topics)), plm)
    assert settings(made) == ("prefix", "adam", 0.01)
    assert "the prompt stands in front" in caplog.text


@pytest.mark.parametrize(
    ("template", "asks"),
    [
        ("{{ text }}\nTopic:", False),
        ("Q: {{ question }}\n{{ text }}\nA:", False),
        ("{{ text }}\nQuestion: {{ question }}\nAnswer:", True),
        ("{{text}}{% if question is defined %} {{ question }}{% endif %}", True),
    ],
)
def test_a_prompt_goes_within_where_the_template_asks_about_the_text(template, asks, tmp_path):
    spec = yaml.safe_load(toy().topics.read_text())
    spec["decoder"] = {"input_template": template, "target_template": " {{ label }}"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(spec))
    task = load_task(str(tmp_path / "task.yaml"))
    assert asks_about_text(task) == asks
    made = chosen(recipe(tmp_path / "run"), task, BY_NAME["llama"].plm())
    assert made.prompt.placement == ("infix" if asks else "suffix")


def test_a_session_is_of_the_recipe_as_it_was_chosen(tmp_path):
    session = open_session(recipe(tmp_path / "run"), ("train",))
    assert settings(session.config) == ("suffix", "prodigy", 1.0)


def test_prodigy_resumes_where_it_was(tmp_path):
    whole = recipe(tmp_path / "whole", train={"steps": 24, "batch_size": 8, "save_every": 8, "keep_checkpoints": 9})
    first = run.train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (16, 24):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"checkpoint-{step}")
    again = run.train(
        config.load(whole.model_dump(mode="json", exclude_unset=True), [f"output={tmp_path / 'cut'}"]), resume=True
    )
    assert dict(again.losses) == pytest.approx(dict(first.losses))
    assert again.metrics == first.metrics
