"""Whole runs on tiny models: what they leave behind, how they stop, and that resuming changes nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import pkgutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from peft import PeftModel
from settings import BY_NAME
from toy import At, Broken, articles, raises, recipe, tokenizer, toy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainerCallback

from fast_prompt_tuning.cost.work import Work
from fast_prompt_tuning.data import metrics
from fast_prompt_tuning.data.task_files import load_task
from fast_prompt_tuning.errors import ConfigError, DataError, FptError, ModelError, ScoreError, TrainingStopped
from fast_prompt_tuning.plm import loading as models
from fast_prompt_tuning.prompt import front
from fast_prompt_tuning.prompt.prediction import Prediction
from fast_prompt_tuning.prompt.prompted import PromptedPLM
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, prompt_parameter
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import finish, run
from fast_prompt_tuning.run.best import Best
from fast_prompt_tuning.run.folder import read_log
from fast_prompt_tuning.run.preparation import partial_of, score_neurons
from fast_prompt_tuning.run.results import RunResult, load_result
from fast_prompt_tuning.run.session import evaluate, open_session
from fast_prompt_tuning.scores.layers import LayerScores
from fast_prompt_tuning.scores.neurons import NeuronScores
from fast_prompt_tuning.train import loop

ADAFACTOR = {"optim__optimizer": "adafactor", "optim__lr": 0.3, "optim__weight_decay": 1e-5}


class Batches(TrainerCallback):
    """Records every batch the trainer's model is given."""

    def __init__(self):
        self.seen = []


@pytest.fixture
def slow(monkeypatch):
    """Lets each call of a function take 1000 s of the clock; gives the calls so far."""
    real, calls = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: real() + 1000 * len(calls))

    def slowed(path: str) -> list[str]:
        where, _, name = f"fast_prompt_tuning.{path}".rpartition(".")
        place = pkgutil.resolve_name(where)
        fast = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **options: (calls.append(name), fast(*args, **options))[1])
        return calls

    return slowed


@pytest.mark.parametrize(
    ("method", "part"), [("cr", "run.preparation.activation_scores"), ("auto", "train.loop.work_flops")]
)
def test_the_seconds_of_training_are_of_all_that_its_flops_are_of(tmp_path, slow, method, part):
    # In front of the text, `auto` tries smaller batches first, and probes whether they still teach.
    calls, settings = slow(part), {"method": method, "train__steps": 20, "prompt__placement": "prefix"}
    result = run.train(recipe(tmp_path / "run", **settings))
    log = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line or "probe_loss" in line]
    assert (method == "auto") == any("probe_loss" in line for line in log)
    assert calls
    assert 1000 * len(calls) < result.train_seconds < 1000 * len(calls) + 100
    assert all(a["train_seconds"] < b["train_seconds"] for a, b in pairwise(log) if "probe_loss" in b)


def test_scores_that_a_broken_run_has_made_count_in_the_run_that_goes_on(tmp_path, slow):
    calls, config = slow("run.preparation.activation_scores"), recipe(tmp_path / "run", method="cr")
    with pytest.raises(Broken):
        run.train(config, callbacks=[At(1, raises)])
    resumed = run.train(config, resume=True)
    assert calls == ["activation_scores"]
    assert 1000 < resumed.train_seconds < 1100


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", ["pt", "ld", "fr", "cr"])
def test_a_run_and_what_it_leaves(tmp_path, name, method):
    out = tmp_path / "run"
    changes = ADAFACTOR if name == "t5" else {}
    config = recipe(out, method=method, model__path=str(toy().model(name)), **changes)
    result = run.train(config)
    assert load_result(out) == result == RunResult.model_validate_json((out / "result.json").read_text())
    assert (result.status, result.steps, result.examples, result.method) == ("finished", 10, 12, method)
    assert [p.step for p in result.curve] == [5, 10]
    assert [s for s, _ in result.losses] == list(range(1, 11))
    assert max(p.metrics["accuracy"] for p in result.curve) == result.metrics["accuracy"]
    assert result.best_step in (5, 10)
    flops = [p.train_flops for p in result.curve]
    assert 0 < flops[0] < flops[1] == result.flops["train"]
    assert result.flops["eval"] > 0
    assert (result.flops["score"] > 0) == (method in ("fr", "cr")) == (out / "scores.safetensors").is_file()
    assert result.boundaries == ([0] if method == "pt" else [0, 2, 4, 6])
    assert sum(s["steps"] for s in result.schedule) == 10
    assert 0 < result.train_seconds < result.total_seconds
    assert set(result.fingerprints) == {"model", "train", "validation", "tokens"}
    assert {"torch", "transformers", "peft", "device", "fast-prompt-tuning"} <= set(result.environment)
    assert load(out / "config.yaml") == config
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    right = sum(r["prediction"] in r["gold"] for r in rows)
    assert 100 * right / 12 == pytest.approx(result.metrics["accuracy"])
    # the saved prompt is a stock adapter
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(toy().model(name), dtype=torch.float32), out / "prompt")
    session = open_session(config, ("validation",))
    again = evaluate(session, session.prompted(prompt_parameter(model).detach()))
    assert again.result.values == result.metrics
    assert [p.text for p in again.predictions] == [r["prediction"] for r in rows]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["influence", "greedy"])
def test_layers_are_chosen_by_their_scores(tmp_path, name, kind):
    changes = {**(ADAFACTOR if name == "t5" else {}), "model__path": str(toy().model(name)), "method": "ld"}
    out = tmp_path / "run"
    result = run.train(recipe(out, scoring__keep_layers=kind, scoring__layer_examples=6, **changes))
    scores = LayerScores.load(out / "layers.safetensors")
    assert (scores.metadata["kind"], scores.metadata["data"], scores.metadata["examples"]) == (kind, "topics", "6")
    assert result.flops["score"] == pytest.approx(float(scores.metadata["flops"]))
    for small, large in pairwise(result.kept_layers):
        assert all(set(small[stack]) < set(large[stack]) for stack in small)
    # made before: they cost nothing again, and the run is the same
    given = recipe(
        tmp_path / "b", scoring__keep_layers=kind, scoring__layer_path=str(out / "layers.safetensors"), **changes
    )
    again = run.train(given)
    assert (again.flops["score"], again.kept_layers, again.losses) == (0, result.kept_layers, result.losses)
    if name == "t5":
        assert result.kept_layers[0] == {"encoder": [0], "decoder": [0]}
    session = open_session(recipe(out, scoring__keep_layers=kind, **changes), ("validation",))
    with partial_of(session, "3x24", out) as partial:
        assert partial.kept_layers(partial.stage)["decoder"] == result.kept_layers[1]["decoder"]


@pytest.mark.parametrize("place", ["prefix", "suffix"])
def test_a_prompt_has_the_card_of_its_run(tmp_path, place):
    result = run.train(recipe(tmp_path / "run", method="pt", prompt__placement=place, train__steps=2))
    card = (tmp_path / "run" / "prompt" / "README.md").read_text(encoding="utf-8")
    assert "# Soft prompt for topics on llama" in card
    assert f"| accuracy | {result.metrics['accuracy']:.2f} |" in card
    assert ("load_soft_prompt" in card) == (place == "suffix")
    assert "More Information Needed" not in card
    assert str(tmp_path) not in card


def test_scores_of_labels_and_a_metric_of_ones_own_choose_the_prompt(tmp_path):
    metrics.register_metric(
        "mine:right", lambda p, r: {"right": [100.0 * (a == b[0]) for a, b in zip(p, r, strict=True)]}, scores=["right"]
    )
    for metric, primary in (("macro_f1", "macro_f1"), ("matthews", "matthews"), ("mine:right", "right")):
        task = yaml.safe_load(toy().topics.read_text()) | {"metric": metric, "primary": primary}
        task["source"]["files"] = {k: str(toy().folder / v) for k, v in task["source"]["files"].items()}
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
        changes = {"method": "pt", "train__steps": 4, "train__eval_every": 2, "data__task": str(tmp_path / "task.yaml")}
        result = run.train(recipe(tmp_path / primary, **changes))
        assert result.primary == primary
        assert result.metrics[primary] == max(p.metrics[primary] for p in result.curve)
        assert result.intervals[primary][0] <= result.metrics[primary] <= result.intervals[primary][1]


@pytest.mark.parametrize(("examples", "warned"), [(1, False), (60, True)])
def test_scoring_that_costs_what_the_stages_save_is_said(tmp_path, caplog, examples, warned):
    changes = {"train__steps": 5, "train__eval_every": 5, "scoring__examples": examples}
    result = run.train(recipe(tmp_path / "fr", method="fr", **changes))
    plain = run.train(recipe(tmp_path / "pt", method="pt", **changes))
    assert (result.flops["train"] + result.flops["score"] >= plain.flops["train"]) == warned
    assert ("nothing is saved" in caplog.text) == warned


def test_a_resumed_run_keeps_the_layers_it_began_with(tmp_path):
    changes = {"method": "ld", "scoring__keep_layers": "greedy", "scoring__layer_examples": 4}
    whole = run.train(recipe(tmp_path / "whole", **changes))
    with pytest.raises(Broken):
        run.train(recipe(tmp_path / "cut", **changes), callbacks=[At(6, raises)])
    before = (tmp_path / "cut" / "layers.safetensors").read_bytes()
    resumed = run.train(recipe(tmp_path / "cut", **changes), resume=True)
    assert (tmp_path / "cut" / "layers.safetensors").read_bytes() == before
    assert (resumed.kept_layers, resumed.losses, resumed.flops["score"]) == (
        *(whole.kept_layers, whole.losses, whole.flops["score"]),
    )


def test_scores_of_layers_are_made_only_where_layers_are_left_out(tmp_path):
    result = run.train(recipe(tmp_path / "run", method="fr", scoring__keep_layers="greedy"))
    assert not (tmp_path / "run" / "layers.safetensors").exists()
    assert result.status == "finished"


def test_growing_costs_less_and_batches_are_the_same(tmp_path, monkeypatch):
    seen = {}
    results = {}
    inner = front.Front.loss
    for method in ("pt", "cr"):
        batches = seen[method] = []

        def record(self, inputs, *args, batches=batches):
            batches.append({k: v.clone() for k, v in inputs.items()})
            return inner(self, inputs, *args)

        monkeypatch.setattr(front.Front, "loss", record)
        # 12 steps over 40 examples by 4: into the second epoch
        results[method] = run.train(recipe(tmp_path / method, method=method, train__steps=12))
    assert len(seen["pt"]) == len(seen["cr"]) == 12
    for one, two in zip(seen["pt"], seen["cr"], strict=True):
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(seen["pt"][0]["input_ids"], seen["pt"][10]["input_ids"])  # another order each epoch
    assert results["cr"].flops["train"] < results["pt"].flops["train"]
    assert results["cr"].fingerprints == results["pt"].fingerprints


def test_one_session_serves_several_runs(tmp_path):
    config = recipe(tmp_path / "a")
    session = open_session(config, ("train", "validation"))
    before = run.zero_shot(session)
    shared = [run.train(recipe(tmp_path / n, method=m), session=session) for n, m in (("a", "cr"), ("b", "pt"))]
    alone = [run.train(recipe(tmp_path / (n + "2"), method=m)) for n, m in (("a", "cr"), ("b", "pt"))]
    assert [r.losses for r in shared] == [r.losses for r in alone]
    assert run.zero_shot(session).metrics == before.metrics
    assert before.flops["train"] == 0 < before.flops["eval"]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_task(tmp_path, name):
    result = run.train(recipe(tmp_path / "run", data__task=str(toy().words), model__path=str(toy().model(name))))
    assert result.primary == "rougeL"
    assert set(result.metrics) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_accumulated_batches_are_one_large_batch(tmp_path):
    task = {"train__steps": 5, "train__eval_every": 5, "scoring__keep_neurons": "first"}
    calls = []
    result = run.train(recipe(tmp_path / "a", train__accumulate=2, **task), callbacks=[At(1, lambda: calls.append(1))])
    assert (result.steps, calls) == (5, [1])
    assert result.flops["score"] == 0
    small = run.train(recipe(tmp_path / "b", **task))
    assert result.flops["train"] > 1.5 * small.flops["train"]


# -- full fine-tuning --------------------------------------------------------------------------------------------------


def test_full_fine_tuning(tmp_path):
    out = tmp_path / "run"
    result = run.train(recipe(out, method="full", optim__lr=0.02))
    assert result.losses[-1][1] < result.losses[0][1] / 2
    assert result.prompt_folder is None
    assert not (out / "prompt").exists()
    assert result.flops["train"] > run.train(recipe(tmp_path / "pt", method="pt")).flops["train"]
    session = open_session(recipe(tmp_path / "x", model__path=str(out / "model")), ("validation",))
    assert evaluate(session, session.prompted(None)).result.values == result.metrics


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_full_fine_tuning_resumes_and_ends_with_its_best_weights(tmp_path, name, monkeypatch):
    changes = {"method": "full", "optim__lr": 0.01, "model__path": str(toy().model(name)), "train__eval_every": 2}
    values = iter([10.0, 90.0, 50.0, 40.0, 30.0] * 3)  # the best is at step 4
    offer = Best.offer
    monkeypatch.setattr(Best, "offer", lambda self, step, value: offer(self, step, next(values)))
    whole = run.train(recipe(tmp_path / "whole", **changes))
    assert whole.best_step == 4
    values = iter([10.0, 90.0, 50.0])
    with pytest.raises(Broken):
        run.train(recipe(tmp_path / "broken", **changes), callbacks=[At(7, raises)])
    values = iter([40.0, 30.0])
    resumed = run.train(recipe(tmp_path / "broken", **changes), resume=True)
    assert (resumed.best_step, resumed.losses[6:]) == (4, whole.losses[6:])
    assert resumed.metrics == whole.metrics
    left, right = (
        (AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM).from_pretrained(tmp_path / n / "model")
        for n in ("whole", "broken")
    )
    assert all(torch.equal(v, right.state_dict()[k]) for k, v in left.state_dict().items())


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_inits(tmp_path):
    first = run.train(recipe(tmp_path / "first", train__steps=2, method="pt"))
    starts = {}
    for init, more in {
        "uniform": {},
        "vocab": {},
        "text": {"prompt__text": "sport news today"},
        "prompt": {"prompt__path": first.prompt_folder},
    }.items():
        config = recipe(tmp_path / init, prompt__init=init, train__steps=1, method="pt", optim__lr=1e-9, **more)
        starts[init] = load_prompt(run.train(config).prompt_folder)
    assert starts["uniform"].abs().max() <= 0.25 + 1e-6
    assert torch.allclose(starts["prompt"], load_prompt(first.prompt_folder), atol=1e-7)
    embeddings = AutoModelForCausalLM.from_pretrained(toy().llama).get_input_embeddings().weight
    for init in ("vocab", "text"):
        assert torch.cdist(starts[init], embeddings).min(1).values.max() < 1e-3
    assert len({float(v.sum()) for v in starts.values()}) == 4


@pytest.mark.parametrize(("keep", "best", "evaluations"), [("last", 5, 2), ("best", 5, 2), ("best", 10, 2)])
def test_the_prompt_that_is_kept_is_not_scored_again(tmp_path, monkeypatch, keep, best, evaluations):
    asked = []
    for module in (run, finish):
        monkeypatch.setattr(module, "evaluate", lambda *args: asked.append(evaluate(*args)) or asked[-1])
    offer = Best.offer
    monkeypatch.setattr(Best, "offer", lambda self, step, value: offer(self, step, -abs(step - best)))
    config = recipe(tmp_path / "run", train__keep=keep, method="pt")
    result = run.train(config)
    assert len(asked) == evaluations
    assert result.flops["eval"] == sum(e.flops for e in asked)
    session = open_session(config, ("validation",))
    again = evaluate(session, session.prompted(load_prompt(result.prompt_folder)))
    assert again.result.values == result.metrics
    written = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [w["prediction"] for w in written] == again.answers


def test_keep_best_or_last(tmp_path, monkeypatch):
    prompts = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            prompts[state.global_step] = prompt_parameter(model).detach().clone()

    offer = Best.offer
    monkeypatch.setattr(Best, "offer", lambda self, step, value: offer(self, step, -step))
    for keep, step in (("best", 5), ("last", 10)):
        result = run.train(recipe(tmp_path / keep, train__keep=keep), callbacks=[Watch()])
        assert result.best_step == step
        assert torch.equal(load_prompt(tmp_path / keep / "prompt"), prompts[step])


def test_the_last_step_is_evaluated_too(tmp_path):
    result = run.train(recipe(tmp_path / "run", train__steps=7))
    assert [p.step for p in result.curve] == [5, 7]


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMED = {"train__steps": 24, "train__eval_every": 6, "train__save_every": 2}  # two epochs and more; stages of 4 or 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {n: run.train(recipe(folder / n, **RESUMED, **_of(n))) for n in ("llama", "t5")}


def _of(name):
    return {"model__path": str(toy().model(name)), **(ADAFACTOR if name == "t5" else {})}


def same_run(one, two):
    assert [s for s, _ in one.losses] == [s for s, _ in two.losses]
    assert [v for _, v in one.losses] == pytest.approx([v for _, v in two.losses], abs=1e-6)
    assert one.metrics == two.metrics
    assert one.best_step == two.best_step
    assert [(p.step, p.metrics, p.train_flops) for p in one.curve] == [
        (p.step, p.metrics, p.train_flops) for p in two.curve
    ]
    assert one.flops == pytest.approx(two.flops)
    assert torch.allclose(load_prompt(one.prompt_folder), load_prompt(two.prompt_folder), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "step"), [("llama", 1), ("llama", 4), ("llama", 5), ("llama", 11), ("llama", 20), ("t5", 9), ("t5", 15)]
)
def test_resuming_after_a_crash_changes_nothing(tmp_path, whole, name, step):
    # growths are after 4, 8 (or 9) and 14; an epoch is 10 steps; checkpoints after every second step
    config = recipe(tmp_path / "run", **RESUMED, **_of(name))
    with pytest.raises(Broken):
        run.train(config, callbacks=[At(step, raises)])
    same_run(run.train(config, resume=True), whole[name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_the_run_goes_on_later(tmp_path, whole, number):
    config = recipe(tmp_path / "run", **RESUMED)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    # between two steps: the next one is still made
    result = run.train(config, callbacks=[At(7, lambda: os.kill(os.getpid(), number))])
    assert (result.status, result.reason, result.steps) == ("interrupted", f"signal {int(number)}", 8)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert torch.isfinite(load_prompt(result.prompt_folder)).all()
    resumed = run.train(config, resume=True)
    same_run(resumed, whole["llama"])
    assert resumed.status == "finished"
    assert resumed.train_seconds > result.train_seconds * 0.9


def test_a_second_signal_interrupts_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.train(recipe(tmp_path / "run"), callbacks=[At(7, twice)])
    assert run.train(recipe(tmp_path / "run"), resume=True).status == "finished"


@pytest.mark.parametrize("steps", [7, 10])
def test_resuming_a_finished_run_changes_nothing(tmp_path, steps):
    config = recipe(tmp_path / "run", train__steps=steps)
    first = run.train(config)
    again = run.train(config, resume=True)
    assert (again.steps, again.losses, again.metrics, again.best_step) == (
        first.steps,
        first.losses,
        first.metrics,
        first.best_step,
    )
    assert torch.equal(load_prompt(again.prompt_folder), load_prompt(first.prompt_folder))


def test_resuming_without_a_checkpoint_starts_over(tmp_path, whole):
    config = recipe(tmp_path / "run", **{**RESUMED, "train__save_every": 24})
    with pytest.raises(Broken):
        run.train(config, callbacks=[At(3, raises)])
    assert run.train(config, resume=True).losses == whole["llama"].losses


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_not_resumed(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run.train(recipe(out))
    with pytest.raises(ConfigError, match=r"recipe has changed.*optim\.lr was 0\.05, is 0\.1"):
        run.train(recipe(out, optim__lr=0.1), resume=True)
    monkeypatch.chdir(tmp_path)
    assert run.train(recipe("run"), resume=True).status == "finished"  # the same folder by another spelling
    (out / "config.yaml").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.yaml' cannot be read"):
        run.train(recipe(out), resume=True)


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_earlier_run_is_never_lost(tmp_path):
    out = tmp_path / "run"
    run.train(recipe(out))
    kept = contents(out)
    with pytest.raises(ConfigError, match="holds a run already"):
        run.train(recipe(out))
    with pytest.raises(ConfigError, match="exclude each other"):
        run.train(recipe(out), overwrite=True, resume=True)
    # neither by --overwrite with a recipe that is refused
    for changes in (
        {"model__path": "/nowhere"},
        {"data__task": "topisc"},
        {"data__files": {"train": "/nowhere.jsonl"}},
        {"prompt__init": "prompt", "prompt__path": "/nowhere"},
        {"scoring__path": "/nowhere.safetensors"},
        {"stages": [{"layers": 99, "ffn": 8, "steps": 10}]},
        {"train__steps": 2},
        {"prompt__tokens": 64},
        {"train__report_to": ["trackio"]},
        {"train__report_to": ["trakio"]},
    ):
        with pytest.raises(FptError):
            run.train(recipe(out, **changes), overwrite=True)
        assert contents(out) == kept
    changed = run.train(recipe(out, train__steps=5), overwrite=True)
    assert changed.steps == 5
    assert [p.step for p in changed.curve] == [5]


def test_a_refused_recipe_leaves_no_folder(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FptError, match="99"):
        run.train(recipe(out, stages=[{"layers": 99, "ffn": 8, "steps": 10}]))
    assert not out.exists()


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not empty and holds no run of ours"):
            run.train(recipe(tmp_path / "thesis"), overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        run.train(recipe(tmp_path / "file"))
    with pytest.raises(ConfigError, match="no run to resume"):
        run.train(recipe(tmp_path / "new"), resume=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        run.train(recipe(tmp_path / "file" / "below"))
    run.train(recipe(tmp_path / "run", train__steps=5))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run.train(recipe(tmp_path / "run", train__steps=5), overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_leftovers_of_others_and_what_lies_behind_links_stay(tmp_path):
    out = tmp_path / "run"
    run.train(recipe(out, train__steps=5))
    mine = [
        out / ".notes-new",
        out / "..-old",
        tmp_path / "disk" / "checkpoint-1",
        tmp_path / "disk" / ".checkpoint-1-new",
    ]
    for folder in mine:
        folder.mkdir(parents=True)
        (folder / "thesis").write_text("mine")
    (out / ".prompt-new").mkdir()
    run.train(recipe(out, train__steps=5), resume=True)
    assert not (out / ".prompt-new").exists()
    for name in ("checkpoints", "prompt"):
        (out / name).rename(tmp_path / name)
        (out / name).symlink_to(tmp_path / "disk")
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=f"has a link called '{name}', behind which nothing is removed"):
                run.train(recipe(out, train__steps=5), **how)
        (out / name).unlink()
        (tmp_path / name).rename(out / name)
    (tmp_path / "alias").symlink_to(out)  # the folder itself may be called as its owner likes
    (out / ".prompt-new").mkdir()
    run.train(recipe(tmp_path / "alias", train__steps=5), overwrite=True)
    assert not (out / ".prompt-new").exists()
    assert all((folder / "thesis").read_text() == "mine" for folder in mine)


def test_bad_data(tmp_path):
    empty, broken, label = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl", tmp_path / "label.jsonl"
    empty.write_text("")
    broken.write_text('{"text": "a", "label": "sport"}\n{"text": \n')
    label.write_text('{"text": "a", "label": "sport"}\n{"text": "b", "label": "politics"}\n')
    field = tmp_path / "field.jsonl"
    field.write_text('{"body": "a", "label": "sport"}\n')
    good = str(toy().folder / "validation.jsonl")
    for file, said in (
        (empty, "empty.jsonl: the file is empty"),
        (broken, "broken.jsonl:2: "),
        (label, "label.jsonl:2: .*politics"),
        (field, "field.jsonl:1: .*text"),
        (tmp_path / "none.jsonl", "no such file"),
    ):
        with pytest.raises(DataError, match=said):
            run.train(recipe(tmp_path / "run", data__files={"train": str(file), "validation": good}))
    result = run.train(
        recipe(tmp_path / "run", data__files={"train": str(label), "validation": good}, data__on_bad_row="skip")
    )
    assert result.status == "finished"


def test_other_refusals(tmp_path):
    with pytest.raises(ConfigError, match="need 70 positions, but this model has 64"):
        open_session(recipe(tmp_path / "x", prompt__tokens=50), ())
    scores = tmp_path / "scores.safetensors"
    session = open_session(recipe(tmp_path / "x", model__path=str(toy().t5)), ("train",))
    score_neurons(session).save(scores)
    with pytest.raises(ScoreError, match=r"another model|of the model"):
        run.train(recipe(tmp_path / "x", scoring__path=str(scores)))
    AutoModelForCausalLM.from_pretrained(toy().llama).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        open_session(recipe(tmp_path / "x", model__path=str(tmp_path / "bare")), ())


def test_scores_made_before_are_used(tmp_path):
    out = tmp_path / "run"
    whole = run.train(recipe(out))
    again = run.train(recipe(tmp_path / "again", scoring__path=str(out / "scores.safetensors")))
    assert again.losses == whole.losses
    assert again.flops["score"] == 0
    assert not (tmp_path / "again" / "scores.safetensors").exists()
    made = NeuronScores.load(out / "scores.safetensors")
    earlier = {k: v for k, v in made.metadata.items() if k != "averaged"}
    NeuronScores(made.scores, earlier).save(tmp_path / "earlier.safetensors")
    with pytest.raises(ConfigError, match=r"scoring\.path=.*earlier rule.*score again"):
        run.train(recipe(tmp_path / "third", scoring__path=str(tmp_path / "earlier.safetensors")))


# -- losses that are not finite ----------------------------------------------------------------------------------------


class Prompts(TrainerCallback):
    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before.append(prompt_parameter(model).detach().clone())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("step", [0, 4])
def test_a_run_of_steps_that_are_not_finite(tmp_path, monkeypatch, where, step):
    bad_loss(monkeypatch, where, range(step, 99))
    prompts = Prompts()
    last = step + loop.MAX_SKIPPED - 1
    with pytest.raises(TrainingStopped, match=rf"{where} is not finite at step {last}, for 5 steps in a row"):
        run.train(recipe(tmp_path / "run"), callbacks=[prompts])
    kept = load_prompt(tmp_path / "run" / "prompt")
    # the last one that a finite loss and gradient were seen with; at the start, the one it began with
    assert torch.equal(kept, prompts.before[max(step - 1, 0)])
    result = load_result(tmp_path / "run")
    assert result.status == "stopped"
    assert "optim.lr" in result.reason


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, monkeypatch, where, accumulate, caplog):
    options = {"train__log_every": 3, "train__accumulate": accumulate, "method": "pt"}
    plain = run.train(recipe(tmp_path / "plain", **{**options, "train__log_every": 1}))
    bad_loss(monkeypatch, where, [4 * accumulate])  # the first batch of the fifth step
    prompts = Prompts()
    result = run.train(recipe(tmp_path / "run", **options), callbacks=[prompts])
    assert (result.status, result.steps, result.skipped_steps) == ("finished", 10, 1)
    assert torch.equal(prompts.before[4], prompts.before[5])
    assert not torch.equal(prompts.before[5], prompts.before[6])
    assert f"the {where} is not finite at step 4, which is left out (1 so far)" in caplog.text
    losses = dict(result.losses)
    first = dict(plain.losses)
    assert losses[1] == first[1]
    assert losses[3] == pytest.approx((first[2] + first[3]) / 2)
    assert all(math.isfinite(v) for v in losses.values())
    assert losses[6] < 3 * first[4]  # the mean of two steps, not of three
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["skipped_steps"] == 1


def bad_loss(monkeypatch, where, calls):
    """Make the loss, or its gradient, not finite in the given calls."""
    inner, count = front.label_loss, itertools.count()

    def bad(*args, **kwargs):
        loss = inner(*args, **kwargs)
        if next(count) not in calls:
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(front, "label_loss", bad)


@pytest.mark.parametrize("step", [0, 4])
def test_with_a_running_mean_bad_steps_leave_the_mean_before_them(tmp_path, monkeypatch, step):
    bad_loss(monkeypatch, "loss", range(step, 99))

    class Means(TrainerCallback):
        found: ClassVar[list[torch.Tensor]] = []

        def on_train_begin(self, args, state, control, model, **kwargs):
            self.found[:] = [prompt_parameter(model).detach().clone()]

        def on_step_end(self, args, state, control, model, **kwargs):
            self.found.append(prompt_parameter(model).detach().clone())

    with pytest.raises(TrainingStopped):
        run.train(recipe(tmp_path / "run", optim__ema_decay=0.5), callbacks=[Means()])
    assert torch.equal(load_prompt(tmp_path / "run" / "prompt"), Means.found[max(step - 1, 0)])


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_killed_among_bad_steps_ends_with_the_prompt_before_them(tmp_path, monkeypatch, ema):
    """Step 4's update spoils the prompt, which the checkpoint of that step cannot know."""
    settings = {"method": "pt", "train__steps": 12, "train__save_every": 1, "optim__ema_decay": ema}
    inner, sizes = front.label_loss, []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            sizes.append(float(prompt_parameter(model).detach().norm()))

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    run.train(recipe(tmp_path / "whole", **settings), callbacks=[Watch()])
    limit = (max(sizes[:4]) + sizes[4]) / 2
    assert sizes[4] > limit

    def spoiled(model, batch, **kwargs):
        bad = model.training and float(prompt_parameter(model).detach().norm()) > limit
        return inner(model, batch, **kwargs) * (math.nan if bad else 1.0)

    monkeypatch.setattr(front, "label_loss", spoiled)
    with pytest.raises(TrainingStopped):
        run.train(recipe(tmp_path / "never", **settings))
    with pytest.raises(KeyboardInterrupt):
        run.train(recipe(tmp_path / "killed", **settings), callbacks=[Kill()])
    with pytest.raises(TrainingStopped):
        run.train(recipe(tmp_path / "killed", **settings), resume=True)
    wanted, found = (load_prompt(tmp_path / name / "prompt") for name in ("never", "killed"))
    assert torch.equal(wanted, found)
    assert float(found.norm()) < limit


def test_a_huge_learning_rate_stops_the_run_and_leaves_a_finite_prompt(tmp_path):
    constant = {"optim__lr": 3.3e37, "optim__lr_schedule": "constant"}
    with pytest.raises(TrainingStopped, match="saved in"):
        run.train(recipe(tmp_path / "run", **constant, method="pt", train__steps=40))
    assert torch.isfinite(load_prompt(tmp_path / "run" / "prompt")).all()
    with pytest.raises(TrainingStopped):
        run.train(recipe(tmp_path / "full", **constant, method="full"))


# -- what must not be mistaken for something else ---------------------------------------------------------------------


def test_ids_that_repeat_in_a_users_file_do_not_merge_its_rows(tmp_path):
    rows = [dict(row, id="same") for row in articles(12, seed=1)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(file), "validation": str(file)}
    config = load(toy().recipe(tmp_path / "run", method="pt", train__steps=2, data__files=files))
    assert run.train(config).examples == 12


def test_a_split_without_labels_is_not_scored(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"id": r["id"], "text": r["text"]}) + "\n" for r in articles(4, seed=1)))
    config = load(toy().recipe(tmp_path / "run", data__files={"test": str(file)}))
    session = open_session(config, ("test",))
    with pytest.raises(DataError, match="without a label"):
        evaluate(session, session.prompted(None), "test")


def test_a_folder_with_a_config_of_its_own_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true\n")
    config = load(toy().recipe(tmp_path))
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="not a run's"):
            run.train(config, **options)
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"


def test_a_run_is_not_overwritten_while_it_is_used(tmp_path):
    config = load(toy().recipe(tmp_path / "run", method="pt", train__steps=2))
    run.train(config)
    prompt = str(tmp_path / "run" / "prompt")
    again = load(config.model_dump(mode="json"), ["prompt.init=prompt", f"prompt.path={prompt}"])
    with pytest.raises(ConfigError, match=r"prompt\.path=.* lies in the run that would be overwritten"):
        run.train(again, overwrite=True)
    assert (tmp_path / "run" / "prompt" / "adapter_model.safetensors").is_file()


def test_the_test_split_has_a_limit_of_its_own(tmp_path):
    config = load(toy().recipe(tmp_path / "run", data__validation_limit=3, data__test_limit=5))
    session = open_session(config, ("validation", "test"))
    assert {k: len(v) for k, v in session.encoded.items()} == {"validation": 3, "test": 5}


def test_a_prompt_of_another_model_is_refused(tmp_path):
    session = open_session(load(toy().recipe(tmp_path / "run")), ("validation",))
    with pytest.raises(ConfigError, match="another model's prompt"):
        evaluate(session, session.prompted(torch.zeros(3, 7)))


def test_a_resumed_run_keeps_the_dtype_it_measured(tmp_path, monkeypatch):
    faster = {"probe": {torch.float32: 1.0, torch.bfloat16: 0.5}}
    monkeypatch.setattr(models, "probe_seconds", lambda *_: faster["probe"])
    config = load(toy().recipe(tmp_path / "run", model__dtype="auto", method="pt", train__steps=4))
    result = run.train(config)
    assert result.environment["dtype"].startswith("bfloat16 (auto; probe: ")
    faster["probe"] = {torch.float32: 0.5, torch.bfloat16: 1.0}
    assert open_session(config, (), resume=True).plm.dtype is torch.bfloat16
    assert open_session(config, ()).plm.dtype is torch.float32


def test_a_token_budget_bounds_batches_and_survives_a_stop(tmp_path):
    short = recipe(tmp_path / "tight", train__batch_tokens=5)
    with pytest.raises(ConfigError, match=r"train\.batch_tokens=5 has no room for the longest example"):
        run.train(short)
    assert not (tmp_path / "tight").exists()
    changes = {"train__batch_tokens": 32, "train__batch_size": 8, "train__steps": 26, "train__eval_every": 13}
    whole = run.train(recipe(tmp_path / "whole", **changes))
    parts = recipe(tmp_path / "parts", **changes)
    run.train(parts, callbacks=[At(20, lambda: os.kill(os.getpid(), signal.SIGINT))])
    resumed = run.train(parts, resume=True)
    assert resumed.losses[-1] == whole.losses[-1]
    assert torch.equal(load_prompt(tmp_path / "parts" / "prompt"), load_prompt(tmp_path / "whole" / "prompt"))


def own_task(tmp_path, base: str = "topics", **changes):
    task = {**yaml.safe_load(getattr(toy(), base).read_text()), **changes}
    files = {split: str(toy().folder / name) for split, name in task["source"]["files"].items()}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({**task, "source": {"files": files}}))
    return str(path)


def test_a_label_that_begins_with_another_can_win(tmp_path):
    labels = {"sport": "sport ball", "business": "sport"}
    session = open_session(recipe(tmp_path / "run", data__task=own_task(tmp_path, labels=labels)), ("validation",))
    eos = session.tokenizer.eos_token_id
    assert [ids[-1] for ids in session.choices.values()] == [eos, eos]
    plain = open_session(recipe(tmp_path / "run"), ("validation",))
    assert all(eos not in ids for ids in plain.choices.values())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_are_scored_by_the_tokens_they_are_trained_on(tmp_path, name):
    session = open_session(recipe(tmp_path / "run", model__path=str(toy().model(name))), ("train",))
    rows = session.encoded["train"]
    trained = {tuple(i for i in row if i >= 0) for row in rows["labels"]}
    end = [] if name == "t5" else [session.tokenizer.eos_token_id]
    assert {(*ids, *end) for ids in session.choices.values()} == trained


def test_a_label_whose_end_is_never_trained_is_refused(tmp_path):
    labels = {"sport": "big new sport", "business": "big new business"}
    task = own_task(tmp_path, labels=labels, max_target_tokens=3)
    with pytest.raises(ConfigError, match=r"takes 4 tokens with its end.*raise max_target_tokens"):
        open_session(recipe(tmp_path / "run", data__task=task), ())


def test_targets_of_several_lines(tmp_path, caplog, monkeypatch):
    changes = {"decoder": {"input_template": "{{ text }}\nWord:", "target_template": " {{ first }}\n{{ first }}"}}
    asked = []

    def generate(_self, inputs, _tokenizer, options):
        asked.append(options.stop_at_newline)
        return [Prediction("a", 0.0)] * len(inputs), Work()

    monkeypatch.setattr(PromptedPLM, "generate", generate)
    for one_line in (True, False):
        task = own_task(tmp_path, "words", one_line=one_line, **changes)
        caplog.clear()
        session = open_session(recipe(tmp_path / "run", data__task=task), ("validation",))
        assert ("set one_line: false" in caplog.text) == one_line
        evaluate(session, session.prompted(None))
    assert asked == [True, False]
    assert load_task("cnn_dailymail").one_line is False


def test_positions_are_those_of_each_stack(tmp_path):
    """A prompt after the text stands in the decoder, which has its own positions."""
    folder = tmp_path / "bart"
    BY_NAME["bart"].plm().save_pretrained(folder)
    tokenizer(eos=True).save_pretrained(folder)

    def session(placement, inputs, targets):
        settings = {"data__max_input_tokens": inputs, "data__max_target_tokens": targets, "prompt__tokens": 20}
        return open_session(
            recipe(tmp_path / "run", model__path=str(folder), prompt__placement=placement, **settings), ()
        )

    session("suffix", 60, 40)
    session("prefix", 40, 60)
    with pytest.raises(ConfigError, match=r"prompt.tokens=20 \+ data.max_target_tokens=60 need 80 positions.* 64"):
        session("suffix", 40, 60)
    with pytest.raises(ConfigError, match=r"prompt.tokens=20 \+ data.max_input_tokens=60 need 80 positions"):
        session("prefix", 60, 40)


def own_rows(folder: Path, split: str, targets: list[str]) -> str:
    path = folder / f"{split}.jsonl"
    rows = [{"text": f"news {i}", "answer": target, "label": target} for i, target in enumerate(targets)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_rows_without_an_answer_are_refused_before_any_step(where, tmp_path):
    files = {
        split: own_rows(tmp_path, split, ["ball", "" if split == where else "goal", "match"])
        for split in ("train", "validation")
    }
    data = {"files": files, "input_template": "{{ text }}", "target_template": "{{ answer }}", "max_input_tokens": 16}
    data |= {"max_target_tokens": 4}
    settings = toy().recipe(tmp_path / "run") | {"data": data}
    with pytest.raises(DataError, match=f"the split '{where}' has 1 examples without a target, '1' is the first"):
        run.train(load(settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_that_become_the_same_tokens_are_refused(name, tmp_path):
    files = {split: own_rows(tmp_path, split, ["спорт", "дело"]) for split in ("train", "validation")}
    data = {
        "files": files,
        "input_template": "{{ text }}",
        "target_template": "{{ label }}",
        "labels": ["спорт", "дело"],  # all of it is unknown to the tokenizer
        "max_input_tokens": 16,
        "max_target_tokens": 4,
    }
    settings = toy().recipe(tmp_path / "run", model__path=str(toy().model(name))) | {"data": data}
    with pytest.raises(ConfigError, match="labels 'спорт' and 'дело' become the same tokens"):
        run.train(load(settings))


def test_scores_of_another_kind_than_asked_for_are_refused(tmp_path):
    made = run.train(load(recipe_of(tmp_path / "first", keep_layers="influence")))
    assert made.status == "finished"
    path = tmp_path / "first" / "layers.safetensors"
    for settings, said in (
        (
            {"keep_layers": "greedy", "layer_path": str(path)},
            "scoring.layer_path holds influence scores",
        ),
        ({"layer_path": str(path)}, "layer_path=.* is not used with keep_layers='evenly'"),
        ({"keep_neurons": "first", "path": "x"}, "path='.*x' is not used with keep_neurons='first'"),
    ):
        with pytest.raises(ConfigError, match=said):
            run.train(load(recipe_of(tmp_path / "second", **settings)))
    with pytest.raises(ConfigError, match=r"path='.*x' is not used with init='vocab'"):
        load(toy().recipe(tmp_path / "third", prompt__path="x"))


def recipe_of(output: Path, **scoring: str) -> dict[str, object]:
    return toy().recipe(output, method="ld", **{f"scoring__{key}": value for key, value in scoring.items()})
