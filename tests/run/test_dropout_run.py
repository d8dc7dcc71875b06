"""Runs train without dropout, unless the recipe asks for the model's or all weights are trained."""

from __future__ import annotations

import pytest
import yaml
from settings import BY_NAME
from toy import recipe, tokenizer

from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run

DROPOUT = {"t5-gated": {"dropout_rate": 0.5}, "llama": {"attention_dropout": 0.5}}


def losses(folder, family: str, rate: float, **changes) -> list[float]:
    """Training losses of a run on one model, whose config says this dropout."""
    place = folder / f"{family}-{rate}"
    if not place.exists():
        BY_NAME[family].plm(**dict.fromkeys(DROPOUT[family], rate)).save_pretrained(place)
        tokenizer(eos=family != "llama").save_pretrained(place)
    run_folder = folder / f"run-{len(list(folder.iterdir()))}"
    config = recipe(run_folder, model__path=str(place), train__steps=4, train__eval_every=2, **changes)
    return [loss for _, loss in run.train(config).losses]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("t5-gated", {"method": "cr"}),
        ("t5-gated", {"method": "pt", "prompt__placement": "suffix"}),
        ("t5-gated", {"method": "pt", "train__gradient_checkpointing": True}),
        ("llama", {"method": "auto"}),
        ("llama", {"method": "pt", "prompt__placement": "infix"}),
    ],
)
def test_a_frozen_model_trains_without_dropout(tmp_path, family, changes):
    wanted = losses(tmp_path, family, 0.0, **changes)
    assert losses(tmp_path, family, 0.5, **changes) == wanted
    assert losses(tmp_path, family, 0.5, **changes, train__dropout="model") != wanted


def test_full_fine_tuning_has_the_models_own(tmp_path):
    common = {"family": "t5-gated", "method": "full", "optim__lr": 1e-4}
    wanted = losses(tmp_path, rate=0.0, **common)
    assert losses(tmp_path, rate=0.5, **common) != wanted
    assert losses(tmp_path, rate=0.5, **common, train__dropout="off") == wanted


def test_yaml_may_read_off_as_false(tmp_path):
    written = "model: {path: m}\ndata: {task: t}\ntrain: {steps: 9, dropout: off}\noutput: o\n"
    (tmp_path / "recipe.yaml").write_text(written)
    assert yaml.safe_load(written)["train"]["dropout"] is False
    found = load(tmp_path / "recipe.yaml")
    assert found.train.dropout == "off"
    (tmp_path / "saved.yaml").write_text(found.to_yaml())
    assert load(tmp_path / "saved.yaml") == found
    assert load(tmp_path / "saved.yaml", ["train.dropout=off"]) == found
