"""`fpt compare --with`: LoRA and prefix tuning as a run was trained."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from peft import PeftModel
from toy import raises, recipe, toy
from transformers import AutoModelForCausalLM

from fast_prompt_tuning.run import adapters, run
from fast_prompt_tuning.run.results import load_result
from fast_prompt_tuning.train.loop import Loop


def test_adapters_are_trained_beside_a_run_once(tmp_path, fpt, monkeypatch):
    folder = tmp_path / "plain"
    run.train(recipe(folder, method="pt", train__steps=6))
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out, err = fpt("compare", folder, "--with", "lora,prefix", "--json")
    rows = {row["name"]: row for row in json.loads(out)["runs"]}
    assert list(rows) == ["plain", "plain-lora", "plain-prefix"]
    assert "lora, as plain was trained" in err
    for kind in ("lora", "prefix"):
        row, result = rows[f"plain-{kind}"], load_result(tmp_path / f"plain-{kind}")
        assert row["method"] == result.method == kind
        assert result.steps == 6
        assert [p.step for p in result.curve] == [5, 6]
        assert result.fingerprints["validation"] == load_result(folder).fingerprints["validation"]
        assert 0.5 < row["relative_flops"] < 2  # LoRA's matrices are as large as the toy's own
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    monkeypatch.setattr(adapters, "train_adapter", raises)
    every = json.loads(fpt("compare", tmp_path / "plain-lora", folder, "--with", "lora", "--json")[0])["runs"]
    assert {row["name"] for row in every} == {"plain", "plain-lora"}
    again = json.loads(fpt("compare", folder, "--with", "lora,prefix", "--json")[0])
    assert again["runs"] == list(rows.values())
    for name in ("plain", "plain-lora"):
        (tmp_path / name).rename(tmp_path / name.replace("plain", "moved"))
    assert "moved-lora" not in fpt("compare", tmp_path / "moved", "--with", "lora")[1]
    for name in ("plain", "plain-lora"):
        (tmp_path / name.replace("plain", "moved")).rename(tmp_path / name)
    (tmp_path / "plain-lora" / "result.json").unlink()  # what a killed comparison leaves behind is made anew
    assert adapters.earlier(adapters.recipe_for(load_result(folder), tmp_path / "plain-lora", "lora")) is None


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_the_saved_adapter_is_pefts(tmp_path, fpt, kind):
    folder = tmp_path / "run"
    run.train(recipe(folder, method="pt", train__steps=4, data__task=str(toy().words)))
    fpt("compare", folder, "--with", kind)
    saved = tmp_path / f"run-{kind}"
    assert {path.name for path in (saved / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    bare = AutoModelForCausalLM.from_pretrained(toy().llama).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = bare(input_ids=ids).logits
        after = PeftModel.from_pretrained(bare, saved / "adapter").eval()(input_ids=ids).logits
    assert not torch.allclose(before, after)


def test_adapters_of_a_model_in_half_precision(tmp_path, fpt):
    run.train(recipe(tmp_path / "run", method="pt", train__steps=3, model__dtype="bfloat16"))
    fpt("compare", tmp_path / "run", "--with", "lora,prefix")
    for kind in ("lora", "prefix"):
        assert load_result(tmp_path / f"run-{kind}").environment["dtype"].startswith("bfloat16")


def test_lora_of_an_encoder_decoder(tmp_path, fpt):
    run.train(recipe(tmp_path / "run", method="pt", train__steps=3, model__path=str(toy().t5)))
    assert "run-lora" in fpt("compare", tmp_path / "run", "--with", "lora")[0]
    _, err = fpt("compare", tmp_path / "run", "--with", "prefix", code=2)
    assert "decoder-only" in err


def test_what_is_not_ours_is_left_alone(tmp_path, fpt):
    run.train(recipe(tmp_path / "run", method="pt", train__steps=3))
    _, err = fpt("compare", tmp_path / "run", "--with", "dora", code=2)
    assert "choose from lora, prefix" in err
    (tmp_path / "run-lora").mkdir()
    (tmp_path / "run-lora" / "notes.txt").write_text("mine")
    _, err = fpt("compare", tmp_path / "run", "--with", "lora", code=2)
    assert "move it away" in err
    assert [path.name for path in (tmp_path / "run-lora").iterdir()] == ["notes.txt"]


def test_a_run_of_other_steps_is_not_mistaken(tmp_path, fpt):
    folder = tmp_path / "run"
    run.train(recipe(folder, method="pt", train__steps=3))
    fpt("compare", folder, "--with", "lora")
    run.train(recipe(folder, method="pt", train__steps=4), overwrite=True)
    _, err = fpt("compare", folder, "--with", "lora", code=2)
    assert "another recipe" in err


def test_an_interrupted_comparison_is_made_anew(tmp_path, fpt, monkeypatch):
    folder = tmp_path / "run"
    run.train(recipe(folder, method="pt", train__steps=6))
    step = Loop._step

    def interrupted(self):
        step(self)
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", interrupted)
        assert "the same command trains it again" in fpt("compare", folder, "--with", "lora", code=130)[0]
    assert load_result(tmp_path / "run-lora").status == "interrupted"
    fpt("compare", folder, "--with", "lora")
    assert load_result(tmp_path / "run-lora").status == "finished"
