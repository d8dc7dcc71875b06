"""The quality columns of the paper's tables, end to end at toy scale: five tasks in their official formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy import toy

from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.paper import quality
from fast_prompt_tuning.paper.costs import PAPER_TASKS
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run

DATA = Path(__file__).parents[1] / "files"
FILES = {
    "mnli": "mnli_train.tsv",
    "qqp": "qqp_train.tsv",
    "squad2": "squad2.json",
    "record": "record.jsonl",
    "xsum": "xsum.jsonl",
}
SMALL = [
    "model.dtype=float32",
    "model.device=cpu",
    "data.max_input_tokens=24",
    "data.max_target_tokens=5",
    "data.on_bad_row=skip",
    "prompt.tokens=2",
    "scoring.examples=4",
    "optim.lr=0.05",
    "train.steps=5",
    "train.batch_size=2",
    "train.eval_every=2",
]


@pytest.fixture
def data(tmp_path):
    for task, name in FILES.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            shutil.copy(DATA / name, tmp_path / "data" / task / f"{split}{Path(name).suffix}")
    return tmp_path / "data"


def table(which, data, tmp_path, tasks=tuple(FILES), **options):
    return quality.run_table(
        which,
        plm="large",
        model=str(toy().t5),
        data=data,
        output=tmp_path / "runs",
        tasks=tasks,
        overrides=SMALL,
        **options,
    )


def test_table2_over_the_five_tasks(data, tmp_path, monkeypatch):
    seen = []
    rows = table("table2", data, tmp_path, on_run=lambda *what: seen.append(what))
    assert [r["method"] for r in rows] == ["pt", "ld", "fr", "cr"]
    assert len(seen) == 4 * 5
    for row in rows:
        assert row["average"] == pytest.approx(sum(row[t] for t in PAPER_TASKS) / 5)
    plain, *methods = rows
    assert plain["flops"] == pytest.approx(100)
    assert plain["improve"] is None
    assert all(isinstance(m["improve"], float) for m in methods)
    assert methods[0]["flops"] < 100
    # Short targets: the encoder alone is cut; long ones: both stacks.
    for task, stacks in (("mnli", ["encoder"]), ("xsum", ["encoder", "decoder"])):
        record = json.loads((tmp_path / "runs" / "table2" / task / "ld" / "result.json").read_text())
        assert record["schedule"][0]["stacks"] == stacks
    # Again: everything is there, nothing is trained, though settings have come since one run.
    earlier = tmp_path / "runs" / "table2" / "qqp" / "pt" / "result.json"
    record = json.loads(earlier.read_text())
    del record["config"]["cache"]["cross_attention"]
    earlier.write_text(json.dumps(record))
    monkeypatch.setattr(run, "train", lambda *a, **k: pytest.fail("trained again"))
    assert table("table2", data, tmp_path) == rows
    record["config"]["train"]["seed"] = 7
    earlier.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"was run otherwise: train.seed was 7, is 0"):
        table("table2", data, tmp_path)


def test_table1_is_of_the_partial_plms_and_goes_on_after_a_stop(data, tmp_path, monkeypatch):
    real, runs = run.train, []

    def stops(config, **options):
        runs.append(config.name)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return real(config, **options)

    monkeypatch.setattr(run, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        table("table1", data, tmp_path, tasks=("qqp",))
    rows = table("table1", data, tmp_path, tasks=("qqp",))
    assert len(runs) == 3 + 10 - 2  # two were done, the third was not
    assert [r["method"] for r in rows][:4] == ["pt", "ld-6-2816", "ld-12-2816", "ld-18-2816"]
    assert len(rows) == 10
    smallest = json.loads((tmp_path / "runs" / "table1" / "qqp" / "cr-6-704" / "result.json").read_text())
    assert len(smallest["schedule"]) == 1
    assert smallest["schedule"][0]["layers"] == 1  # a quarter of five layers
    assert smallest["schedule"][0]["ffn"] == 6
    costs = {r["method"]: r["flops"] for r in rows}
    assert costs["ld-6-2816"] < costs["ld-12-2816"] < costs["ld-18-2816"] < costs["pt"]
    assert costs["cr-6-704"] > costs["ld-6-2816"]  # at this scale: scoring is counted, and is half of a short run


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("task", [*FILES, "sst2", "boolq"])
def test_every_official_format_trains_and_evaluates(data, tmp_path, name, task):
    file = {"sst2": DATA / "sst2_dev.tsv", "boolq": DATA / "boolq.jsonl"}.get(task, DATA / FILES.get(task, ""))
    files = {"train": str(file), "validation": str(file)}
    recipe = toy().recipe(
        tmp_path / "run",
        method="pt",
        model__path=str(toy().model(name)),
        data__task=task,
        data__files=files,
        data__max_input_tokens=40,
        data__max_target_tokens=5,
        data__on_bad_row="skip",
        train__steps=2,
    )
    result = run.train(load(recipe))
    assert result.status == "finished"
    assert result.steps == 2
    assert result.examples > 0
    assert 0 <= result.metrics[result.primary] <= 100


def test_bad_input_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"--tasks \['sst2'\] are not the paper's"):
        table("table2", data, tmp_path, tasks=("sst2",))
    (data / "mnli" / "train.tsv").unlink()
    with pytest.raises(ConfigError, match=r"exactly one file mnli/train\.\*"):
        table("table2", data, tmp_path, tasks=("mnli",))
