"""A new placement of the prompt is one class and one row of `placements.PLACEMENTS`: everything else follows."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from settings import BY_NAME
from toy import toy

from fast_prompt_tuning import load_soft_prompt, suffix_loss
from fast_prompt_tuning.placements import PLACEMENTS, Placement


@pytest.fixture(autouse=True)
def _middle(monkeypatch):
    where, code = "in the middle of the text", "middle:Middle"
    row = Placement(name="middle", where=where, code=code, encoder_decoder=(), keeps_texts=False)
    monkeypatch.setitem(PLACEMENTS, "middle", row)


@pytest.mark.parametrize("task", ["topics", "words"])
def test_it_trains_scores_and_generates_by_every_command(fpt, tmp_path, task):
    run, changes = tmp_path / "run", {"optim__lr_schedule": "constant", "data__task": str(getattr(toy(), task))}
    recipe = toy().write_recipe(tmp_path / "recipe.yaml", run, prompt__placement="middle", **changes)
    plan = json.loads(fpt("plan", "-c", recipe, "--json")[0])
    fpt("train", "-c", recipe)
    result = json.loads((run / "result.json").read_text())
    assert 0.4 < result["flops"]["train"] / sum(s["flops"] for s in plan["stages"]) < 1  # of the longest inputs
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert min(losses[-3:]) < losses[0]
    again = json.loads(fpt("eval", run, "--json")[0])["results"][str(run)]
    assert again["metrics"] == pytest.approx(result["metrics"])
    answer = fpt("predict", run, "goal match team")[0].strip()
    assert task == "words" or answer in ("sport", "business")
    fpt("export", run, tmp_path / "prompt.safetensors")
    with safe_open(tmp_path / "prompt.safetensors", "pt") as file:
        assert file.metadata()["place"] == "in the middle of the text"
    assert "in the middle of the text" in (run / "prompt" / "README.md").read_text()


def test_a_saved_one_is_a_module_that_trains_and_generates(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", prompt__placement="middle", method="pt")
    fpt("train", "-c", recipe)
    model = load_soft_prompt(BY_NAME["llama"].plm(), tmp_path / "run")
    batch = BY_NAME["llama"].batch()
    suffix_loss(model, batch).backward()
    assert model.soft_prompt.grad.abs().sum() > 0
    answers = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(answers[:, :-3], batch["input_ids"])
    with torch.no_grad():
        model.soft_prompt.normal_()
    other = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=3, min_new_tokens=3)
    assert not torch.equal(answers, other)


def test_its_name_is_offered_wherever_placements_are(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", prompt__placement="midle")
    err = fpt("train", "-c", recipe, code=2)[1]
    assert "prompt.placement='midle'" in err
    assert "choose one of prefix, suffix, infix, middle" in err
