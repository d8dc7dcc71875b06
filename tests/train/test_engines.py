"""Models that are not plain: quantized, offloaded, sharded over processes; and what launchers ask for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from settings import BY_NAME, FFN
from toy import recipe, toy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fast_prompt_tuning import PartialPLM
from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.errors import ConfigError, ModelError
from fast_prompt_tuning.run import run
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.train import parallel

BENCH = Path(__file__).parents[2] / "benchmarks" / "reliability"
sys.path.insert(0, str(BENCH))

import scenarios  # noqa: E402

HALF = Stage(3, FFN, stacks=("decoder",))
NARROW = Stage(5, FFN // 2, stacks=("decoder",))


@pytest.mark.filterwarnings("ignore")
def test_layers_on_a_disk_are_dropped_where_they_are(tmp_path):
    family = BY_NAME["llama"]
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(5)}
    plm = dispatch_model(family.plm(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert plm.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    other, batch = family.plm(), family.batch()
    partial, plain = (PartialPLM(m, keep_neurons="first") for m in (plm, other))
    with torch.no_grad():
        for stage in (HALF, partial.full_stage, Stage(1, FFN, stacks=("decoder",))):
            with partial.at(stage), plain.at(stage):
                assert torch.equal(plm(**batch).logits, other(**batch).logits)
    with pytest.raises(ModelError, match=r"layer 2 of the decoder is offloaded.*method ld"):
        partial.check(NARROW)


def two_processes(*words: str) -> list[tuple[str, str]]:
    """What Python says, on stdout and stderr, as each of two processes of one run."""
    port, pipes = scenarios.free_port(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *words]
    children = [subprocess.Popen(command, env=scenarios.environment(r, 2, port), **pipes) for r in range(2)]
    return [child.communicate(timeout=200) for child in children]


def test_layers_sharded_by_fsdp_are_dropped_and_their_ffns_refused():
    (output, _), _ = two_processes(str(BENCH / "sharded.py"))
    found = json.loads(output.splitlines()[-1])
    assert found["equal"] == [True] * 4
    assert "is sharded over processes" in found["refused"]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"{name} is set: .* set train.parallel=shard"):
        run.train(recipe(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_neurons_are_not_left_out_of_weights_in_parts(tmp_path):
    made = toy().recipe(tmp_path / "run", method="cr", train__parallel="shard")
    (tmp_path / "recipe.json").write_text(json.dumps(made))
    pairs = two_processes("-m", "fast_prompt_tuning", "train", "-c", str(tmp_path / "recipe.json"))
    said = [err for _, err in pairs]
    assert "is sharded over processes, so its neurons cannot be left out" in " ".join(said[0].split())
    assert "Traceback" not in said[0] + said[1]
    assert not (tmp_path / "run").exists()


GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "large_models.md"


def test_the_guides_three_commands_and_a_checkpoint_of_two_resumes_on_one(tmp_path, fpt):
    runs = tmp_path / "runs" / "large"
    plain = {"method": "pt", "optim__lr_schedule": "constant"}
    made = toy().recipe(runs, **plain)
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    section = GUIDE.read_text(encoding="utf-8").split("## Models larger than one device")[1]
    block = section.split("```sh\n")[1].split("```")[0]
    plan, *others = [line.split() for line in block.replace("recipe.yaml", str(tmp_path / "recipe.yaml")).splitlines()]
    fpt(*plan[1:])
    for program, *words in others:
        assert program == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=200, capture_output=True)
    result = json.loads((runs / "result.json").read_text())
    scored, _ = fpt("--json", "eval", runs)  # by one process, of the whole model
    assert json.loads(scored)["results"][str(runs)]["metrics"] == result["metrics"]
    longer = ["--set", "train.parallel=shard", "--set", "train.steps=14"]
    fpt("train", "-c", tmp_path / "recipe.yaml", *longer, "--resume", "--allow-changed")
    whole = run.train(recipe(tmp_path / "whole", **{**plain, "train__steps": 14, "train__batch_size": 8}))
    resumed = json.loads((runs / "result.json").read_text())["losses"]
    assert [v for _, v in resumed[:10]] == pytest.approx([v for _, v in whole.losses[:10]], rel=1e-5)
    assert [step for step, _ in resumed] == [step for step, _ in whole.losses]


@pytest.mark.parametrize(
    ("way", "changes", "says"),
    [
        ("shard", {"method": "full"}, "method=full does not go with train.parallel=shard: all weights would be"),
        ("shard", {"method": "pt", "train__compile": True}, "train.compile=True does not go with train.parallel=shard"),
        (
            "tensor",
            {"method": "pt", "prompt__placement": "suffix", "cache__tier": "disk"},
            "cache.tier=disk does not go with train.parallel=tensor",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_in_parts(tmp_path, monkeypatch, way, changes, says):
    monkeypatch.setattr(parallel, "in_parts", lambda: way)
    with pytest.raises(ConfigError, match=says):
        run.train(recipe(tmp_path / "run", train__parallel=way, **changes))


def test_alone_everything_is_shared_with_oneself():
    assert (parallel.size(), parallel.rank(), parallel.largest(3)) == (1, 0, 3)
    assert parallel.merge(list(parallel.share([1, 2, 3])), 3) == [1, 2, 3]
    assert parallel.on_main(lambda: 5) == 5
    assert not parallel.is_lost(RuntimeError("Connection closed by peer"))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_drop_layers_and_keep_their_ffns(tmp_path, bits):
    full = BY_NAME["llama"].plm(hidden_size=64, intermediate_size=128, head_dim=16)
    full.save_pretrained(tmp_path / "full")
    chosen = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=BitsAndBytesConfig(**chosen), device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "small")
    for file in toy().llama.glob("tokenizer*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    model = {"model__path": str(tmp_path / "small")}
    assert run.train(recipe(tmp_path / "run", method="ld", **model)).status == "finished"
    with pytest.raises(ModelError, match=rf"is Linear{bits}bit.*so its neurons cannot be left out"):
        run.train(recipe(tmp_path / "refused", method="cr", **model))
    assert not (tmp_path / "refused").exists()


def test_a_token_is_written_nowhere(tmp_path, monkeypatch, capfd, caplog):
    secret = "hf_" + "SecretSecretSecret"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    caplog.set_level("DEBUG")
    (tmp_path / "recipe.yaml").write_text(recipe(tmp_path / "run", method="pt", train__steps=2).to_yaml())
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "-c", str(tmp_path / "recipe.yaml")])
    assert done.value.code == 0
    said = capfd.readouterr()
    assert secret not in said.out + said.err + caplog.text
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()
