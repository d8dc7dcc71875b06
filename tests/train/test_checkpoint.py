"""Checkpoints: whole or not there, verified, resumed to the run that was never interrupted."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import At, Broken, raises, recipe, toy

from fast_prompt_tuning.errors import CheckpointError, ConfigError
from fast_prompt_tuning.files import new_folder
from fast_prompt_tuning.prompt.soft_prompt import load_prompt
from fast_prompt_tuning.run import run
from fast_prompt_tuning.train import checkpoint, loop

# -- states -----------------------------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.floats(width=32), max_size=3).map(torch.tensor)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"])) | st.integers()
STATES = st.recursive(
    LEAVES, lambda s: st.lists(s) | st.lists(s).map(tuple) | st.dictionaries(KEYS, s, max_size=4), max_leaves=12
)


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one.view(torch.int32), two.view(torch.int32))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(v, two[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@settings(max_examples=150, deadline=None)
@given(state=STATES)
def test_a_state_comes_back_bit_by_bit(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    checkpoint.save_state(folder, "it", state)
    assert same(state, checkpoint.load_state(folder, "it"))


def test_random_generators_go_on(tmp_path):
    checkpoint.save_state(tmp_path, "r", checkpoint.random_state())
    draw = lambda: (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: E731
    first = draw()
    checkpoint.set_random_state(checkpoint.load_state(tmp_path, "r"))
    assert draw() == first
    with pytest.raises(CheckpointError):
        checkpoint.set_random_state({"python": 3})


# -- folders ----------------------------------------------------------------------------------------------------------


def saved(folder, step, text="x", kind="checkpoint"):
    target = folder / f"{kind}-{step}"
    with new_folder(target) as work:
        (work / "state.json").write_text(text)
        checkpoint.seal(work, step, {"said": text})
    return target


def test_the_newest_whole_checkpoint_is_used(tmp_path, caplog):
    folders = [saved(tmp_path, step) for step in (3, 20, 100)]
    assert checkpoint.latest(tmp_path).step == 100
    assert checkpoint.latest(tmp_path, until=99).record == {"said": "x"}
    (folders[2] / "state.json").write_text("y")
    caplog.clear()
    assert checkpoint.latest(tmp_path).folder == folders[1]
    assert "state.json was altered" in caplog.text
    (folders[1] / "state.json").write_text("")
    assert checkpoint.latest(tmp_path).step == 3
    assert "state.json is cut off" in caplog.text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin is missing, or was not saved"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[" * 99999), "manifest.json cannot be read"),
        (lambda f: edit(f / "manifest.json", step=4), "manifest.json was altered"),
        (lambda f: edit(f / "manifest.json", record={"said": "z"}), "manifest.json was altered"),
        (lambda f: edit(f / "manifest.json", format=1), "manifest.json was altered"),
        (lambda f: f.rename(f.with_name("checkpoint-9")), None),
        (lambda f: link(f / "state.json"), "links are not followed"),
        (lambda f: link(f), "no checkpoint's folder"),
        (lambda f: (f / "more").mkdir(), "no plain file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, damage, said, caplog):
    target = saved(tmp_path, 3)
    damage(target)
    assert checkpoint.latest(tmp_path) is None
    assert (said or "manifest.json was altered") in caplog.text


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    config = recipe(tmp_path / "run", method="pt", train__steps=4, train__save_every=1)
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "FORMAT", 1)
        interrupted(config, at=3)
    with pytest.raises(CheckpointError, match=r"another version \(format 1, this one reads 2\).*anew with --overwrite"):
        run.train(config, resume=True)
    assert run.train(config, overwrite=True).status == "finished"


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def link(path):
    outside = path.with_name("." + path.name)
    path.rename(outside)
    path.symlink_to(outside)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_altered_byte_is_found(tmp_path_factory, data):
    target = saved(tmp_path_factory.mktemp("c"), 3, "some text")
    file = target / data.draw(st.sampled_from(["state.json", "manifest.json"]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    before, cut = json.loads(file.read_text()) if file.name == "manifest.json" else None, data.draw(st.booleans())
    content = (
        content[:at]
        if cut
        else content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    )
    file.write_bytes(content)
    try:
        checkpoint.verify(target)
    except CheckpointError:
        return
    assert json.loads(file.read_text()) == before  # white space, say: nothing was changed


def test_what_is_kept(tmp_path):
    for step in (2, 4, 6, 8, 10):
        saved(tmp_path, step)
    for step in (1, 3, 5, 7):
        saved(tmp_path, step, kind="best")
    checkpoint.prune(tmp_path, 2, 8)  # the one of step 10 is of another life of the run: damaged, say
    assert checkpoint.steps_of(tmp_path) == [6, 8, 10]
    assert checkpoint.steps_of(tmp_path, "best") == [5, 7]  # what a run resumed at step 6 has, and one at step 8
    checkpoint.discard_best(tmp_path, after=6)
    assert checkpoint.steps_of(tmp_path, "best") == [5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-5", "checkpoint-10", "checkpoint-6", "checkpoint-8"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    saved(tmp_path, 3, "old")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "checkpoint-3") as work:
        (work / "nowhere" / "state.json").write_text("new")
    assert checkpoint.latest(tmp_path).record == {"said": "old"}
    # killed between the two renames
    target = tmp_path / "checkpoint-3"
    shutil.copytree(target, tmp_path / ".checkpoint-3-new")
    target.rename(tmp_path / ".checkpoint-3-old")
    checkpoint.clear_unfinished(tmp_path)
    assert checkpoint.latest(tmp_path).record == {"said": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    saved(tmp_path, 3, "new")
    assert checkpoint.latest(tmp_path).record == {"said": "new"}


def test_nothing_that_is_not_ours_is_removed_and_nothing_behind_a_link(tmp_path):
    mine = [".notes-new", "..-old", ".checkpoint-x-new"]
    for name in (*mine, ".checkpoint-3-new"):
        (tmp_path / name).mkdir()
    (tmp_path / f".{checkpoint.STAGE_START}-{'a' * 32}").write_text("torn")
    checkpoint.clear_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)
    for name in mine:
        (tmp_path / name).rmdir()
    for step in (2, 4, 6):
        saved(tmp_path / "real", step)
        saved(tmp_path / "real", step, kind="best")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / ".checkpoint-1-new").mkdir()
    before = sorted(p.name for p in (tmp_path / "real").iterdir())
    checkpoint.prune(tmp_path / "linked", 1, 9)
    checkpoint.discard_best(tmp_path / "linked")
    checkpoint.clear_unfinished(tmp_path / "linked")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == before
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "real" / "checkpoint-2")
    saved(tmp_path, 8)
    checkpoint.prune(tmp_path, 1, 9)
    assert (tmp_path / "checkpoint-1").is_symlink()
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == before


# -- one folder, one run ----------------------------------------------------------------------------------------------


def test_two_runs_on_one_folder(tmp_path):
    config = recipe(tmp_path / "run", method="pt", train__steps=4)
    refused = []

    def another():
        with pytest.raises(ConfigError, match="is in use: another run is writing there") as info:
            run.train(config, resume=True)
        refused.append(info)

    assert run.train(config, callbacks=[At(2, another)]).status == "finished"
    assert len(refused) == 1
    run.train(config, overwrite=True)  # let go of


def test_a_killed_process_lets_go(tmp_path):
    code = "import sys, time; from pathlib import Path; from fast_prompt_tuning.train import checkpoint\n"
    code += "with checkpoint.locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match="in use"), checkpoint.locked(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with checkpoint.locked(tmp_path):
        pass


# -- resuming ---------------------------------------------------------------------------------------------------------

EVERY = {"train__save_every": 1, "train__keep_checkpoints": 99, "train__log_every": 3, "train__eval_every": 4}


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", ["pt", "ld", "fr", "cr", "pt ema", "pt linear", "cr cosine"])
def test_resumed_from_any_step_it_is_the_same_run(tmp_path, name, method, monkeypatch):
    """Bit by bit: batches, sizes, losses, prompt. Log lines are of three steps: a window may be cut by the stop."""
    optimizer = {"optim__optimizer": "adafactor", "optim__lr": 0.3, "optim__warmup_steps": 5} if name == "t5" else {}
    method, _, more = method.partition(" ")
    optimizer |= {"": {}, "ema": {"optim__ema_decay": 0.8}}.get(more, {"optim__lr_schedule": more})
    settings = {**EVERY, **optimizer, "method": method, "model__path": str(toy().model(name)), "train__steps": 12}
    config = recipe(tmp_path / "run", **settings)
    seen = watch_steps(monkeypatch)
    whole = run.train(config)
    every, folder = dict(seen), tmp_path / "run"
    assert sorted(every) == list(range(12))
    growths = whole.boundaries[1:]
    points = [5, 11] if method == "pt" else sorted({p for g in growths for p in (g - 1, g, g + 1)})
    shutil.move(folder / "checkpoints", tmp_path / "kept")
    for point in points if (name, method) == ("llama", "cr") else points[1::6]:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "checkpoints").mkdir()
        for step in checkpoint.steps_of(tmp_path / "kept", "best"):
            shutil.copytree(tmp_path / "kept" / f"best-{step}", folder / "checkpoints" / f"best-{step}")
        shutil.copytree(tmp_path / "kept" / f"checkpoint-{point}", folder / "checkpoints" / f"checkpoint-{point}")
        seen.clear()
        again = run.train(config, resume=True)
        assert dict(seen) == {step: every[step] for step in range(point, 12)}
        assert (again.losses, again.metrics, again.best_step) == (whole.losses, whole.metrics, whole.best_step)
        assert again.flops["train"] == whole.flops["train"]
        assert torch.equal(load_prompt(folder / "prompt"), load_prompt(tmp_path / "kept" / f"best-{whole.best_step}"))


def watch_steps(monkeypatch):
    """Step → (the batches, the stage, the loss, the work): what each step of the loop was made of."""
    seen = {}
    inner = loop.Loop.gradient

    def gradient(self, batches, labels, stage):
        loss, work = inner(self, batches, labels, stage)
        ids = [batch["input_ids"].tolist() for batch in batches]
        seen[self.state.global_step] = (ids, str(stage), loss.item(), work)
        return loss, work

    monkeypatch.setattr(loop.Loop, "gradient", gradient)
    return seen


def interrupted(config, at=7):
    with pytest.raises(Broken):
        run.train(config, callbacks=[At(at, raises)])
    return config


@pytest.mark.parametrize("damage", ["cut off", "altered", "link"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, damage, caplog):
    settings = {"train__save_every": 2, "method": "ld"}
    whole = run.train(recipe(tmp_path / "whole", **settings))
    config = interrupted(recipe(tmp_path / "run", **settings))
    file = tmp_path / "run" / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors"
    content = file.read_bytes()
    if damage == "link":
        link(file)
    else:
        file.write_bytes(content[:-4] if damage == "cut off" else content[:-1] + bytes([content[-1] ^ 1]))
    assert run.train(config, resume=True).losses == whole.losses
    assert "the one before it is used" in caplog.text


def test_a_checkpoint_holds_no_pickle_and_what_the_run_was(tmp_path):
    config = recipe(tmp_path / "run", method="cr")
    run.train(config)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}
    record = checkpoint.verify(folder).record
    assert record["config"] == config.model_dump(mode="json")
    assert record["stage"] == 2
    assert min(record["flops"][what] for what in ("train", "score", "eval")) > 0
    assert record["train_seconds"] > 0
    assert record["processes"] == 1


def test_minutes_between_checkpoints(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    saves = []
    inner = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda f, step, r: (saves.append((f.name, step)), inner(f, step, r))[1])
    run.train(recipe(tmp_path / "run", method="pt", train__save_every=9, train__save_minutes=3))
    steps = [step for name, step in saves if "checkpoint" in name]
    assert {9, 10} < set(steps)
    assert len(steps) > 3


# -- changed since ----------------------------------------------------------------------------------------------------


def test_changed_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(toy().llama, folder)
    config = interrupted(recipe(tmp_path / "run", model__path=str(folder)))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"changed since the checkpoint of step 5: fingerprints\.model was .*--allow"):
        run.train(config, resume=True)
    assert run.train(config, resume=True, allow_changed=True).status == "finished"


def test_a_checkpoint_with_an_earlier_fingerprint_says_so_and_goes_on_on_request(tmp_path):
    config = interrupted(recipe(tmp_path / "run"))
    target = checkpoint.latest(tmp_path / "run" / "checkpoints")
    fingerprints = {**target.record["fingerprints"], "model": "0123456789abcdef"}
    (target.folder / "manifest.json").unlink()
    checkpoint.seal(target.folder, target.step, {**target.record, "fingerprints": fingerprints})
    with pytest.raises(
        ConfigError, match=r"fingerprints\.model was .*earlier version .* sample of the weights.*--allow"
    ):
        run.train(config, resume=True)
    assert run.train(config, resume=True, allow_changed=True).status == "finished"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_changed_data_is_refused(tmp_path, split):
    folder = tmp_path / "data"
    shutil.copytree(toy().folder, folder)
    config = interrupted(recipe(tmp_path / "run", data__task=str(folder / "topics.yaml"), method="ld"))
    rows = (folder / f"{split}.jsonl").read_text().splitlines()
    (folder / f"{split}.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    with pytest.raises(ConfigError, match=rf"fingerprints\.{split} was"):
        run.train(config, resume=True)
    assert run.train(config, resume=True, allow_changed=True).status == "finished"


def test_a_changed_recipe_is_taken_on_request(tmp_path):
    constant = {"optim__lr_schedule": "constant"}
    interrupted(recipe(tmp_path / "run", **constant))
    longer = recipe(tmp_path / "run", train__steps=14, optim__lr=0.01, **constant)
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.05, is 0\.01.*--allow-changed"):
        run.train(longer, resume=True)
    result = run.train(longer, resume=True, allow_changed=True)
    assert (result.status, result.steps, result.config["optim"]["lr"]) == ("finished", 14, 0.01)
    rates = [json.loads(r).get("learning_rate") for r in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r for r in rates if r] == [0.05] * 5 + [0.01] * 9
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    other = recipe(tmp_path / "run", train__steps=14, optim__lr=0.01, prompt__tokens=4)
    with pytest.raises(CheckpointError, match=r"needs .*4, 16"):
        run.train(other, resume=True, allow_changed=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before  # its recipe above all


def test_another_optimizer_on_request(tmp_path):
    interrupted(recipe(tmp_path / "run", method="pt"))
    changed = recipe(tmp_path / "run", method="pt", optim__optimizer="adafactor", optim__lr=0.3)
    assert run.train(changed, resume=True, allow_changed=True).status == "finished"
