"""Checkpoints that somebody has forged, manifest and all: one clear error before anything is computed."""

from __future__ import annotations

import contextlib
import json
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import At, Broken, raises, recipe

from fast_prompt_tuning.errors import CheckpointError, ConfigError, FptError
from fast_prompt_tuning.run import run
from fast_prompt_tuning.train import checkpoint, trainer

SETTINGS = {"method": "pt", "train__steps": 8, "train__save_every": 2, "train__eval_every": 2}


@pytest.fixture(scope="module", params=["pt", "full"])
def broken_off(request, tmp_path_factory):
    """A run of all its kind, broken off after step 5: (its folder, its settings)."""
    folder = tmp_path_factory.mktemp("forged") / "run"
    settings = {**SETTINGS, "method": request.param}
    with contextlib.suppress(Broken):
        run.train(recipe(folder, **settings), callbacks=[At(5, raises)])
    return folder, settings


def forge(place, name, change):
    """Change a JSON file of a checkpoint and write a manifest that fits."""
    manifest = json.loads((place / "manifest.json").read_text())
    if name == "manifest.json":
        record = change(manifest["record"])
        manifest["record"] = manifest["record"] if record is None else record
    elif change is not None:
        content = json.loads((place / name).read_text())
        changed = change(content)
        (place / name).write_text(json.dumps(content if changed is None else changed))
    (place / "manifest.json").unlink()
    checkpoint.seal(place, manifest["step"], {})
    record, sealed = manifest["record"], json.loads((place / "manifest.json").read_text())
    content = {**{k: v for k, v in sealed.items() if k != "sha256"}, "record": record}
    (place / "manifest.json").write_text(json.dumps({**content, "sha256": checkpoint._digest(content)}))


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def state(key, value):
    """A value of a saved state (`checkpoint.save_state`) at its top."""

    def change(content):
        for pair in content["dict"]:
            if pair[0] == key:
                pair[1] = value

    return change


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]

FORGED = [
    ("manifest.json", lambda r: {}),
    ("manifest.json", put("flops", value=[1])),
    ("manifest.json", put("flops", value={"probe": "x"})),
    ("manifest.json", put("flops", value={"eval": NAN})),
    ("manifest.json", put("flops", value={"eval": -1})),
    ("manifest.json", put("flops", value={"eval": HUGE})),
    ("manifest.json", put("train_seconds", value="1")),
    ("manifest.json", put("train_seconds", value=INF)),
    ("manifest.json", put("total_seconds", value=None)),
    ("manifest.json", drop("train_seconds")),
    ("manifest.json", put("config", "optim", value=3)),
    ("manifest.json", put("config", "optim", "optimizer", value=["adam"])),
    ("manifest.json", put("fingerprints", value=5)),
    ("trainer_state.json", lambda s: []),
    ("trainer_state.json", lambda s: DEEP),
    ("trainer_state.json", put("global_step", value="4")),
    ("trainer_state.json", put("global_step", value=3)),
    ("trainer_state.json", put("global_step", value=4.5)),
    ("trainer_state.json", put("total_flos", value="much")),
    ("trainer_state.json", put("total_flos", value=NAN)),
    ("trainer_state.json", put("epoch", value=[])),
    ("trainer_state.json", put("log_history", value={"step": 1})),
    ("trainer_state.json", put("log_history", value=[5])),
    ("trainer_state.json", put("log_history", value=[{"loss": 1.0}])),
    ("trainer_state.json", put("log_history", value=[{"step": 1, "loss": "low"}])),
    ("trainer_state.json", put("log_history", value=[{"step": 1, "probe_loss": None}])),
    ("trainer_state.json", put("log_history", value=[{"step": 1, "eval_accuracy": 1.0}])),
    (
        "trainer_state.json",
        put("log_history", value=[{"step": 1, "eval_accuracy": "1", "train_flops": 1, "train_seconds": 1}]),
    ),
    ("trainer_state.json", put("log_history", value=[{"step": -1, "loss": 1.0}])),
    ("trainer_state.json", put("log_history", value=[{"step": HUGE, "loss": 1.0}])),
    ("trainer_state.json", put("stateful_callbacks", value=[1])),
    *(("trainer_state.json", put(f"{name}_steps", value=v)) for name in ("logging", "eval", "save") for v in (None, 0)),
    ("trainer_state.json", put("train_batch_size", value="x")),
    ("trainer_state.json", put("surprise", value=1)),
    ("trainer_state.json", drop("global_step")),
    ("counts.json", lambda c: 5),
    ("counts.json", lambda c: {"tuple": []}),
    ("counts.json", lambda c: {"tensor": "9"}),
    ("counts.json", state("parts", 0)),
    ("counts.json", state("parts", 1.5)),
    ("counts.json", state("skipped", "1")),
    ("counts.json", state("logged", HUGE)),
    ("counts.json", state("_lost", None)),
    ("process_0.json", lambda c: {"dict": []}),
    ("process_0.json", state("loss", NAN)),
    ("process_0.json", state("loss", "x")),
    ("process_0.json", state("random", 3)),
    ("process_0.json", state("random", {"dict": []})),
    ("process_0.json", state("random", {"dict": [["python", 1], ["numpy", 2]]})),
    ("scheduler.json", lambda c: []),
    ("scheduler.json", state("base_lrs", [])),
    ("scheduler.json", state("last_epoch", "x")),
    ("scheduler.json", state("last_epoch", NAN)),
    ("scheduler.json", lambda c: c["dict"].append(["step", 1])),
    ("optimizer.json", lambda c: {"dict": []}),
    ("optimizer.json", state("param_groups", [])),
    ("optimizer.json", state("param_groups", 1)),
    ("optimizer.json", state("state", [])),
    ("optimizer.json", state("state", {"dict": [[7, {"dict": []}]]})),
    ("optimizer.json", state("state", {"dict": [[0, {"dict": []}]]})),
    ("optimizer.json", state("state", {"dict": [[0, {"dict": [["step", "x"], ["exp_avg", 1], ["exp_avg_sq", 1]]}]]})),
    ("optimizer.json", lambda c: {"surprise": 1}),
]  # fmt: skip


def resumed(folder, settings):
    """Resume, and raise where a step was made."""
    with mock.patch.object(trainer.PromptTrainer, "training_step", side_effect=RuntimeError("a step was made")):
        run.train(recipe(folder, **settings), resume=True)


def copied(broken_off, tmp_path):
    folder, settings = broken_off
    shutil.copytree(folder, tmp_path / "run")
    places = tmp_path / "run" / "checkpoints"
    last = places / f"checkpoint-{checkpoint.steps_of(places)[-1]}"
    return tmp_path / "run", last, {**settings}


@pytest.mark.parametrize(("name", "change"), FORGED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(FORGED)])
@pytest.mark.parametrize("broken_off", ["pt"], indirect=True)
def test_a_forged_part_is_an_error_before_any_step(broken_off, tmp_path, name, change):
    folder, last, settings = copied(broken_off, tmp_path)
    forge(last, name, change)
    assert checkpoint.verify(last).step == 4
    with pytest.raises(FptError) as caught:
        resumed(folder, settings)
    assert len(str(caught.value)) < 1500


TENSORS = {
    "good": lambda t: {"0": torch.full_like(t["0"], NAN)},
    "good of another size": lambda t: {"0": t["0"][:1]},
    "optimizer": lambda t: {k: v[:1] if v.ndim else v for k, v in t.items()},
    "optimizer of whole numbers": lambda t: {k: v.int() for k, v in t.items()},
    "optimizer that is not finite": lambda t: {k: v * INF for k, v in t.items()},
    "optimizer that lacks some": lambda t: {"0": t["0"]},
    "process_0": lambda t: {k: v[:3] for k, v in t.items()},
    "adapter_model": lambda t: {k: v.int() for k, v in t.items()},
    "adapter_model of three dimensions": lambda t: {k: v[None] for k, v in t.items()},
    "adapter_model that is not finite": lambda t: {k: v * NAN for k, v in t.items()},
    "adapter_model of another name": lambda t: {f"x.{k}": v for k, v in t.items()},
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("broken_off", ["pt"], indirect=True)
def test_forged_tensors_are_an_error_before_any_step(broken_off, tmp_path, name):
    folder, last, settings = copied(broken_off, tmp_path)
    file = last / f"{name.split()[0]}.safetensors"
    save_file({k: v.contiguous() for k, v in TENSORS[name](load_file(file)).items()}, file, metadata={"format": "pt"})
    forge(last, file.name, None)
    with pytest.raises(FptError):
        resumed(folder, settings)


@pytest.mark.parametrize("value", ["high", None, [], {}])
@pytest.mark.parametrize("broken_off", ["pt"], indirect=True)
def test_a_forged_best_is_an_error_before_any_step(broken_off, tmp_path, value):
    folder, _, settings = copied(broken_off, tmp_path)
    (best,) = (folder / "checkpoints").glob("best-*")
    forge(best, "manifest.json", put("value", value=value))
    with pytest.raises(CheckpointError, match="value"):
        resumed(folder, settings)


@pytest.mark.parametrize("broken_off", ["pt"], indirect=True)
def test_a_best_prompt_of_another_length_is_an_error_before_any_step(broken_off, tmp_path):
    folder, _, settings = copied(broken_off, tmp_path)
    (best,) = (folder / "checkpoints").glob("best-*")
    file = best / "adapter_model.safetensors"
    save_file({k: v[:2].contiguous() for k, v in load_file(file).items()}, file)
    forge(best, "adapter_config.json", put("num_virtual_tokens", value=2))
    with pytest.raises(CheckpointError, match=r"holds a prompt"):
        resumed(folder, settings)


@pytest.mark.parametrize("broken_off", ["full"], indirect=True)
def test_a_whole_models_checkpoint_is_never_unpickled(broken_off, tmp_path):
    folder, last, settings = copied(broken_off, tmp_path)
    weights = last / "model.safetensors"
    torch.save(load_file(weights), last / "pytorch_model.bin")
    weights.unlink()
    forge(last, "x", None)
    before = last.with_name("checkpoint-2")
    with mock.patch.object(torch, "load", side_effect=AssertionError("torch.load")):
        assert checkpoint.latest(last.parent).folder == before
        (last / "pytorch_model.bin").unlink()
        forge(last, "x", None)
        with pytest.raises(CheckpointError, match=r"lacks the weights"):
            resumed(folder, settings)


WEIGHTS = {
    "another shape": lambda t: {k: v[:1] for k, v in t.items()},
    "another name": lambda t: {**t, "surprise": torch.zeros(1)},
}


@pytest.mark.parametrize("kind", ["checkpoint", "best"])
@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("broken_off", ["full"], indirect=True)
def test_a_whole_models_weights_must_be_its_own(broken_off, tmp_path, change, kind):
    folder, last, settings = copied(broken_off, tmp_path)
    last = checkpoint.latest(last.parent, kind).folder
    weights = last / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(weights)).items()}, weights, metadata={"format": "pt"})
    forge(last, "x", None)
    with pytest.raises(CheckpointError, match="this model's is"):
        resumed(folder, settings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("model.safetensors", "x"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'),
    ],
)
@pytest.mark.parametrize("broken_off", ["full"], indirect=True)
def test_a_whole_models_other_files_are_checked(broken_off, tmp_path, name, content):
    folder, last, settings = copied(broken_off, tmp_path)
    (last / name).write_text(content)
    forge(last, "x", None)
    with pytest.raises(CheckpointError):
        resumed(folder, settings)


def test_what_is_not_forged_goes_on(broken_off, tmp_path):
    folder, last, settings = copied(broken_off, tmp_path)
    forge(last, "manifest.json", lambda r: None)
    assert run.train(recipe(folder, **settings), resume=True).status == "finished"
    with pytest.raises(ConfigError):
        resumed(tmp_path / "nowhere", settings)
