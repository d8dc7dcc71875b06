"""The signal of a recipe's candidates: what is asked, at which prompts, by how many processes, and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import recipe, toy

from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.run import signal
from fast_prompt_tuning.run.preparation import score_neurons, trainable
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.scores.neurons import NeuronScores

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "reliability"))

import scenarios

INPUTS = ("input_ids", "attention_mask")
PAPERS = [f"{method} {part}%" for method in ("ld", "fr", "cr") for part in (25, 50, 75)]


def reported(folder, examples=8, after=2, **changes):
    return signal.report(open_session(recipe(folder / "run", **changes), ("train",)), examples=examples, after=after)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__path": str(toy().t5), "optim__optimizer": "adafactor", "optim__lr": 0.3},
        {"prompt__placement": "suffix", "scoring__keep_layers": "influence", "scoring__layer_examples": 4},
        {"prompt__placement": "infix", "scoring__keep_layers": "greedy", "scoring__layer_examples": 4},
    ],
    ids=["prefix", "t5", "suffix", "infix"],
)
def test_a_report(tmp_path, changes):
    record = reported(tmp_path, **changes)
    json.dumps(record)
    first, second = record["prompts"]
    assert (first["step"], second["step"], second["moved"] > 0) == (0, 2, True)
    for prompt in (first, second):
        assert list(prompt["rows"]) == [*PAPERS, "a batch of 2", "a batch of 1"]
        for name, row in prompt["rows"].items():
            assert row["full"] == name.startswith("a batch")
            assert 0 < row["flops"] < 1
            assert row["seconds"] > 0
        assert prompt["rows"]["a batch of 1"]["flops"] == pytest.approx(0.25, abs=0.06)
        assert prompt["rows"]["ld 25%"]["stage"]["layers"] == 1
    assert (record["examples"], record["batch"]) == (8, 4)
    assert all(flops > 0 for flops in record["flops"].values())
    assert record["verdict"].startswith("On this model and task ")


def test_stages_of_ones_own(tmp_path):
    stages = [{"layers": 3, "length": 4, "batch": 2, "steps": 4}, {"ffn": 10, "steps": 3}, {"steps": 3}]
    record = reported(tmp_path, after=0, stages=stages, scoring__keep_neurons="first")
    (prompt,) = record["prompts"]
    names = ["3 layers × 24 neurons, 2 examples, 4 tokens", "5 layers × 10 neurons"]
    assert list(prompt["rows"]) == [*names, "a batch of 2", "a batch of 1"]
    assert prompt["rows"][names[0]]["batch"] == 2
    assert record["flops"]["score"] == record["flops"]["steps"] == 0


def test_scores_that_a_run_refuses_are_refused(tmp_path):
    made = score_neurons(open_session(recipe(tmp_path / "run"), ("train",)))
    metadata = {k: v for k, v in made.metadata.items() if k != "averaged"}
    NeuronScores(made.scores, metadata).save(tmp_path / "earlier.safetensors")
    with pytest.raises(ConfigError, match=r"scoring\.path=.*earlier rule.*score again"):
        reported(tmp_path, scoring__path=str(tmp_path / "earlier.safetensors"))
    made.save(tmp_path / "scores.safetensors")
    with pytest.raises(ConfigError, match=r"scoring\.path holds .* scores, but scoring\.kind='max'"):
        reported(tmp_path, scoring__path=str(tmp_path / "scores.safetensors"), scoring__kind="max")


def test_the_steps_between_train_on_other_examples(tmp_path, monkeypatch):
    asked, trained = [], []

    def measure(prompted, partial, stages, batches):
        for batch in batches:
            asked.extend(
                tuple(ids[mask.bool()].tolist()) for ids, mask in zip(*(batch[k] for k in INPUTS), strict=True)
            )
        return measured(prompted, partial, stages, batches)

    def plain_steps(session, prompted, rows, steps):
        trained.extend(map(tuple, rows["input_ids"]))
        return prompted.parameter.detach() + 1, 1.0

    measured = signal.measure
    monkeypatch.setattr(signal, "measure", measure)
    monkeypatch.setattr(signal, "_plain_steps", plain_steps)
    session = open_session(recipe(tmp_path / "run"), ("train",))
    signal.report(session, examples=7)
    assert sorted(asked[:8]) == sorted(asked[8:])  # the same at both prompts, in whole batches
    assert sorted([*asked[:8], *trained]) == sorted(map(tuple, session.encoded["train"]["input_ids"]))


def test_a_saved_prompt(tmp_path):
    session = open_session(recipe(tmp_path / "run"), ("train",))
    prompted = trainable(session)
    with torch.no_grad():
        prompted.parameter.add_(1)
    prompted.save(tmp_path / "saved")
    record = signal.report(session, examples=8, at=tmp_path / "saved")
    assert [p["step"] for p in record["prompts"]] == [0]
    assert record["at"] == str(tmp_path / "saved")
    assert record["flops"]["steps"] == 0
    after = open_session(recipe(tmp_path / "run", prompt__placement="suffix"), ("train",))
    with pytest.raises(ConfigError, match="holds a prompt of placement 'prefix', the recipe's is 'suffix'"):
        signal.report(after, examples=8, at=tmp_path / "saved")
    with pytest.raises(ConfigError, match="must leave some to train on"):
        signal.report(session, examples=40)


PROCESS = """
import json, sys
from pathlib import Path
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.run.signal import report
from fast_prompt_tuning.train import parallel
found = [report(open_session(load(each), ("train",)), examples=8, after=2) for each in json.loads(sys.argv[1])]
if parallel.rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(found))
parallel.stop()
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    kinds = [{"prompt__tokens": 2}, {"prompt__placement": "suffix", "train__accumulate": 2}]
    wanted = [reported(tmp_path, **kind) for kind in kinds]
    halves = [toy().recipe(tmp_path / "two", train__batch_size=2, **kind) for kind in kinds]
    command = [sys.executable, "-c", PROCESS, json.dumps(halves), str(tmp_path / "found.json")]
    port = scenarios.free_port()
    children = [subprocess.Popen(command, env=scenarios.environment(rank, 2, port)) for rank in range(2)]
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    for one, two in zip(wanted, json.loads((tmp_path / "found.json").read_text()), strict=True):
        assert (one["examples"], one["batch"]) == (two["examples"], two["batch"])
        assert len(two["prompts"]) == 2
        for a, b in zip(one["prompts"], two["prompts"], strict=True):
            assert a["noise"] == pytest.approx(b["noise"], rel=1e-3)
            for name in PAPERS:
                for key in ("cosine", "signal"):
                    numbers = [pytest.approx(v, rel=1e-3, abs=1e-4, nan_ok=True) for v in a["rows"][name][key].values()]
                    assert list(b["rows"][name][key].values()) == numbers


# -- the sentence ------------------------------------------------------------------------------------------------------


def said(saving: dict[str, tuple[float, float]], *more: dict[str, tuple[float, float]]) -> str:
    """The verdict where these candidates save, each with its signal per second, and per batch of its cost."""
    full = Stage(4, 8)
    found = [signal.Candidate(m, f"{m} {p}%", Stage(2, 8)) for m in ("ld", "fr", "cr") for p in (25, 50)]
    found += [signal.Candidate(signal.BATCH, f"a batch of {n}", full) for n in (8, 4)]
    prompts = [
        {
            c.name: {
                "saves": c.name in each,
                "per_second": {"value": each.get(c.name, (0, 0))[0]},
                "per_batch": {"low": each.get(c.name, (0, 0))[1]},
            }
            for c in found
        }
        for each in (saving, *more)
    ]
    return signal.verdict(found, prompts)


def test_the_verdict():
    batches = {"a batch of 8": (1.5, 1.0), "a batch of 4": (2.0, 1.0)}
    assert said(batches) == "On this model and task ld, fr and cr would save nothing; a batch of 4 would."
    worse = {**batches, "a batch of 4": (1.2, 1.0)}  # at the second prompt
    assert said(batches, worse) == "On this model and task ld, fr and cr would save nothing; a batch of 8 would."
    assert said({}) == "On this model and task ld, fr and cr would save nothing; nor would a smaller batch."
    assert said({"fr 50%": (3.0, 1.2), **batches}) == (
        "On this model and task ld and cr would save nothing; fr 50% would save; a batch of 4 would."
    )
    assert said({"fr 50%": (3.0, 0.9), **batches}) == (
        "On this model and task ld and cr would save nothing; fr 50% would save, though not surely more than a smaller "
        "batch; a batch of 4 would."
    )
    assert said({"fr 50%": (3.0, 1.2)}, {}) == said({})
