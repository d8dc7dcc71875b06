"""Faults put into real runs (`benchmarks/reliability`), kills, several processes, and files that are no such files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import At, Broken, raises, recipe

from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import open_session

BENCH = Path(__file__).parents[2] / "benchmarks" / "reliability"
sys.path.insert(0, str(BENCH))

import faults  # noqa: E402
import fuzz  # noqa: E402
import hostile  # noqa: E402
import scenarios  # noqa: E402

spec = importlib.util.spec_from_file_location("reliability_run", BENCH / "run.py")
harness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(harness)


@pytest.mark.parametrize("name", list(faults.FAULTS))
@pytest.mark.filterwarnings("ignore")  # of the libraries about each other, in a script of one's own
def test_a_fault_is_borne(tmp_path, name):
    faults.FAULTS[name](tmp_path)


def test_a_disk_full_from_the_first_step_on_promises_no_checkpoint(tmp_path):
    with faults._no_room() as full, pytest.raises(ConfigError) as error:
        run.train(recipe(tmp_path / "run", method="pt"), callbacks=[At(1, full.start)])
    assert str(tmp_path / "run") in str(error.value)
    assert "no checkpoint" in str(error.value)
    assert "--overwrite" in str(error.value)
    assert not (tmp_path / "run" / "prompt").exists()


@pytest.mark.parametrize("changes", [{}, {"optim__lr": 0.01}])
def test_resuming_on_a_full_disk_names_the_folder(tmp_path, changes):
    with pytest.raises(Broken):
        run.train(recipe(tmp_path / "run", method="pt"), callbacks=[At(6, raises)])
    config = recipe(tmp_path / "run", method="pt", **changes)
    session = open_session(config, ("train", "validation"))
    with faults._no_room() as full:
        full.start()
        with pytest.raises(ConfigError, match="cannot be written") as error:
            run.train(config, resume=True, allow_changed=True, session=session)
        full.stop()
    assert str(tmp_path / "run") in str(error.value)
    assert run.train(config, resume=True, allow_changed=True).status == "finished"


LONG = ("templates", "regular expressions", "YAML", "forged JSON")  # each case is a test of its own beside its code


@pytest.mark.parametrize("name", [name for name in hostile.HOSTILE if not name.startswith(LONG)])
def test_a_hostile_file_does_no_harm(tmp_path, name):
    hostile.HOSTILE[name](tmp_path)


def test_kills_lose_nothing(tmp_path):
    found = scenarios.kills(tmp_path, 4, steps=12)
    assert (found["tried"], found["survived"]) == (4, 4)


def test_two_processes_are_one(tmp_path):
    kinds = ["cr, resumed after step 6", "stages on parts of the batch"]
    kinds += ["cr, prompt after the text", "cr, prompt within the text"]
    kinds += ["ld, sharded, resumed after step 6", "ld, T5, sharded", "auto, sharded", "generated answers, sharded"]
    kinds += ["auto, tensor parallel"]
    for row in scenarios.distributed(tmp_path, kinds).values():
        assert row["largest_relative_difference"] < 1e-5
        assert row["metrics_equal"]


@pytest.mark.parametrize("way", ["data", "shard"])
def test_one_process_killed_ends_all(tmp_path, way):
    found = scenarios.one_process_killed(tmp_path, way)
    assert (found["exit_code"], found["traceback"]) == (1, False)
    assert "another process of this run has ended" in found["said"][0]
    assert found["checkpoint"] >= 2


def test_the_report_meets_every_target_and_the_page_is_made_from_it():
    report = json.loads((BENCH / "report.json").read_text())
    assert harness.missed(report) == []
    assert set(harness.PARTS) <= set(report)
    assert report["kills"]["tried"] >= 50
    assert set(report["faults"]) == set(faults.FAULTS)
    assert set(report["hostile"]) == set(hostile.HOSTILE)
    assert sum(row["cases"] for row in report["coverage"].values()) >= 100_000
    assert (BENCH.parents[1] / "docs" / "reliability.md").read_text() == harness.page(report)


def test_a_missed_target_is_seen():
    bad = {
        "kills": {"tried": 3, "survived": 2},
        "faults": {"x": {"recovered": False, "error": "e"}},
        "hostile": {"x": {"recovered": False, "error": "e"}},
        "resume": {"cr": {"4": {"bit_equal": False}}},
        "distributed": {
            "runs": {"cr": {"largest_relative_difference": float("nan")}},
            "one process killed": {"exit_code": 0, "said": [], "checkpoint": None, "traceback": True},
        },
        "fuzz": {"recipe": {"cases": 1, "crashes": {"TypeError": ""}}},
    }
    assert len(harness.missed(bad)) == 7


# -- files that are no such files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return list(fuzz.targets(tmp_path_factory.mktemp("fuzz")))


def test_every_target_reads_its_seed(targets):
    for target in targets:
        for seed in target.seeds:
            if target.name != "task":
                target.read(seed)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_work_or_are_refused(targets, data):
    target = data.draw(st.sampled_from(targets), label="target")
    content = fuzz.mutate(data.draw(st.randoms(use_true_random=False)), target.seeds)
    wrong = fuzz.attempt(target, content)
    assert wrong is None, (target.name, content)


@pytest.mark.parametrize("content", [b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b'{"data": ' + b"9" * 5000 + b"}"])
def test_deep_nesting_and_huge_numbers_are_refused(targets, content):
    for target in targets:
        assert fuzz.attempt(target, content) is None, target.name
