"""Results, predictions and fidelities that somebody else has written: shown, or one clear error."""

from __future__ import annotations

import json
import warnings

import pytest
from toy import result

from fast_prompt_tuning.errors import DataError
from fast_prompt_tuning.report.page import find_runs, render
from fast_prompt_tuning.report.tables import average_table, comparison_table
from fast_prompt_tuning.run.results import load_result, save_result

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]


def plain() -> dict:
    made = result("grown", "cr", kept_layers=[{"decoder": [0, 1]}] * 4, losses=[(1, 2.0), (5, 1.0)]).model_dump(
        mode="json"
    )
    return {**made, "config": {"model": {"path": "m", "revision": None}, "data": {"task": "t"}}}


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


FORGED = [
    put("schema_version", value="x"),
    put("name", value=5),
    put("method", value=None),
    put("status", value="done"),
    put("config", value=[]),
    put("config", "model", value="m"),
    put("config", "model", value={}),
    put("config", "model", "path", value=5),
    put("config", "model", "path", value=None),
    put("config", "data", value=3),
    put("config", "data", value=None),
    put("config", "model", value=None),
    put("config", "data", "task", value=["t"]),
    put("config", "data", "files", value={"validation": 3}),
    put("config", "prompt", value={"tokens": "3"}),
    put("config", "deep", value=DEEP),
    put("schedule", value={}),
    put("schedule", value=[{}] * 4),
    put("schedule", value=[]),
    put("schedule", 0, "layers", value="all"),
    put("schedule", 0, "layers", value=10**12),
    put("schedule", 0, "layers", value=HUGE),
    put("schedule", 0, "layers", value=-1),
    put("schedule", 0, "layers", value={"encoder": 1}),
    put("schedule", 0, "layers", value=[[1]]),
    put("schedule", 0, "ffn", value=NAN),
    put("schedule", 0, "ffn", value=0),
    put("schedule", 0, "ffn", value=[]),
    put("schedule", 0, "steps", value="many"),
    put("schedule", 0, "steps", value=-5),
    put("schedule", 0, "stacks", value="decoder"),
    put("schedule", 0, "stacks", value=[5]),
    put("boundaries", value=[0]),
    put("boundaries", value=[0, 9, 3, 4]),
    put("boundaries", value=[0, 1, 2, HUGE]),
    put("kept_layers", value=[{"decoder": []}] * 4),
    put("kept_layers", value=[{"decoder": [10**9]}] * 4),
    put("kept_layers", value=[{"decoder": ["x"]}] * 4),
    put("steps", value=HUGE),
    put("steps", value=-1),
    put("primary", value="f1"),
    put("metrics", value={}),
    put("metrics", "accuracy", value=NAN),
    put("metrics", "accuracy", value=1e300),
    put("metrics", "other", value=3.0),
    put("intervals", value={}),
    put("intervals", "accuracy", value=[1]),
    put("intervals", "accuracy", value=[INF, 3]),
    put("curve", value=[3]),
    put("curve", 0, "metrics", value={}),
    put("curve", 0, "metrics", "accuracy", value=INF),
    put("curve", 0, "step", value=HUGE),
    put("curve", 0, "train_flops", value=-1.0),
    put("losses", value=[[1]]),
    put("losses", value=[["x", 1.0]]),
    put("flops", value={}),
    put("flops", "train", value=NAN),
    put("flops", "probe", value="x"),
    put("train_seconds", value=INF),
    put("fingerprints", value={"model": 5}),
    put("environment", value=[]),
    put("surprise", value=1),
    lambda c: c.pop("flops"),
]


@pytest.mark.parametrize("change", FORGED, ids=range(len(FORGED)))
def test_a_forged_result_is_refused(tmp_path, change):
    content = plain()
    (tmp_path / "result.json").write_text(json.dumps(content))
    load_result(tmp_path)
    change(content)
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        load_result(tmp_path)
    assert "result.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{", "[" * 5000, '{"name": ' + "9" * 5000 + "}"])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError):
        load_result(tmp_path)
    with pytest.raises(DataError):
        load_result("/dev/zero")


ODD = "a\x00b\x1b[2J\u009b\x0c\ufffe</script>$x^2$\u202e"


def test_nul_bytes_and_control_characters_are_shown_as_such(tmp_path):
    content = json.loads(json.dumps(plain()).replace('"accuracy"', json.dumps(ODD)))
    content |= {"name": ODD, "environment": {ODD: ODD}, "fingerprints": {ODD: ODD}, "reason": ODD}
    content["config"]["data"]["task"] = f"{ODD}/{ODD}.yaml"
    content["config"][ODD] = [ODD, "\ud800"]
    content["schedule"][0][ODD] = ODD
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**content, "name": name + ODD}))
    runs = find_runs([tmp_path])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = render(runs)
    assert not set(page) & set("\x00\x1b\x0c\u009b\ud800\ufffe")
    assert "</script>" not in page
    page.encode("utf-8")
    for table in (comparison_table([r.result for r in runs], improve=True), average_table([r.result for r in runs])):
        assert "\x1b" not in str(table.columns[0]._cells)


def test_a_folder_whose_name_is_no_text_has_a_page(tmp_path):
    folder = tmp_path / b"\xff".decode("utf-8", "surrogateescape")
    folder.mkdir()
    save_result(result(), folder)
    render(find_runs([folder])).encode("utf-8")


ROW = {"id": "1", "input": "i", "prediction": "p", "gold": ["g"]}


@pytest.mark.parametrize(
    "line",
    [
        *(5, [], "x", {}, DEEP, {**ROW, "prediction": 5}, {**ROW, "gold": "g"}, {**ROW, "gold": [5]}),
        *({**ROW, name: None} for name in ROW),
    ],
)
def test_forged_predictions_are_refused(tmp_path, line):
    save_result(result(), tmp_path)
    (tmp_path / "predictions.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"predictions.jsonl: not a run's predictions"):
        render(find_runs([tmp_path]))


def test_predictions_with_nul_bytes_are_shown(tmp_path):
    save_result(result(), tmp_path)
    (tmp_path / "predictions.jsonl").write_text(json.dumps({**ROW, "input": ODD, "prediction": "a\u2028\x00\x85"}))
    assert "\x00" not in render(find_runs([tmp_path]))


FAITHFUL = {"selection": "s", "relative_flops": 0.5, "agreement": 0.9, "loss": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        *([], {}, {"fidelity": 5}, {"fidelity": {"rows": [], "full_loss": 1.0}}, {"fidelity": DEEP}),
        *(
            {"fidelity": {"rows": [{**FAITHFUL, k: v}], "full_loss": 1.0}}
            for k in FAITHFUL
            for v in (None, [], NAN, HUGE)
        ),
        {"fidelity": {"rows": [FAITHFUL], "full_loss": "much"}},
        {"fidelity": {"rows": [FAITHFUL], "full_loss": INF}},
    ],
)
def test_forged_fidelities_are_refused(tmp_path, content):
    save_result(result(), tmp_path)
    (tmp_path / "fidelity.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"fidelity.json: not what fpt score"):
        render(find_runs([tmp_path]))
