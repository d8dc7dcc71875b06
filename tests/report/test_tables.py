from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from rich.progress import Progress
from toy import FULL, result

from fast_prompt_tuning.cli import progress
from fast_prompt_tuning.errors import DataError
from fast_prompt_tuning.report.figures import save
from fast_prompt_tuning.report.pictures import quality
from fast_prompt_tuning.report.tables import comparison_table, table_rows
from fast_prompt_tuning.run.results import load_result, save_result
from fast_prompt_tuning.schedule.stages import Schedule


def test_costs_are_relative_to_plain():
    zero = result("zero-shot", "none", 0.0, 0.0, curve=False)
    rows = table_rows([zero, result(), result("fpt", "cr", 1e12, 60.0, score=1e11)])
    assert [r["flops"] for r in rows] == [0.0, 2e12, 1.1e12]  # scoring counts, evaluation does not
    assert [r["relative_flops"] for r in rows] == [None, 1.0, pytest.approx(0.55)]
    assert [r["relative_seconds"] for r in rows] == [None, 1.0, 0.6]
    assert rows[1]["interval"] == [45.0, 55.0]
    json.dumps(rows)
    alone = table_rows([result("fpt", "cr")])[0]
    assert (alone["relative_flops"], alone["relative_seconds"]) == (None, None)


def test_a_run_is_compared_with_its_own_models_plain_run_on_its_own_data():
    def of(model, data, **changes):
        config = {"model": {"path": model}, "data": {"files": {"validation": f"{data}.jsonl"}}}
        return result(config=config, fingerprints={"validation": data}, **changes)

    runs = [
        of("llama", "a"),
        of("t5", "a", train=1e12),
        of("llama", "b", train=4e12),
        of("t5", "a", name="fpt", method="cr", train=5e11),
        of("llama", "a", name="fpt", method="cr", train=5e11),
        of("t5", "b", name="fpt", method="cr", train=5e11),
    ]
    rows = table_rows(runs)
    assert [r["relative_flops"] for r in rows] == [1.0, 1.0, 1.0, 0.5, 0.25, None]
    one, other = (of(path, "a", method=m) for path, m in (("llama", "pt"), ("./llama/", "cr")))
    for found in (one, other):
        found.fingerprints["model"] = "123"  # one model by two names
    assert table_rows([one, other])[1]["relative_flops"] == 1.0
    assert [r["task"] for r in rows[:3]] == ["own data a", "own data a", "own data b"]


def test_a_prompt_after_the_text_is_compared_with_plain_in_front_of_it():
    def placed(place, *args, **changes):
        return result(*args, config={"prompt": {"placement": place}} if place else {}, **changes)

    after, front, other = placed("suffix", "after", train=1e12), placed("prefix"), placed(None, "seed 1", train=4e12)
    grown = placed("suffix", "grown", "cr", train=5e11)
    rows = table_rows([after, front, other, grown])
    assert [row["relative_flops"] for row in rows] == [0.5, 1.0, 2.0, 0.25]
    assert [row["improve"] for row in rows] == [5.0, None, None, 5.0]  # plain had 45 for half and for a quarter
    rows = table_rows([after, grown])  # plain in front was not run: the same placement's is the next best
    assert [(row["relative_flops"], row["improve"]) for row in rows] == [(1.0, None), (0.5, 5.0)]


def test_table():
    console = Console(width=160, record=True, file=io.StringIO())
    runs = [result("zero-shot", "none", 0.0, 0.0, curve=False), result(), result("f[p]t", "cr", 1e12, 60.0)]
    runs.append(result("broken", "cr", 1e12, 60.0, status="stopped"))
    console.print(comparison_table(runs, "Title"))
    text = console.export_text()
    for said in ("Title", "accuracy %", "45.0–55.0", "TFLOPs", "50%", "60%", "none", "f[p]t", "broken (stopped)"):
        assert said in text


@pytest.mark.parametrize(("name", "starts"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
@pytest.mark.parametrize("against", ["flops", "seconds"])
def test_picture(tmp_path, name, starts, against):
    runs = [result("zero-shot", "none", 0.0, 0.0, curve=False), result(), result("fpt", "cr", 1e12, 60.0)]
    path = save(quality(runs, against), tmp_path / name)
    content = path.read_bytes()
    assert content.startswith(starts)
    assert len(content) > 5000


def test_picture_of_many_runs_of_one_point_and_of_none(tmp_path):
    one = [p for p in result().curve if p.step == 10]
    many = [result(f"run {i}", "cr", curve=True) for i in range(9)]
    save(quality([*many, result("one", "cr").model_copy(update={"curve": one})]), tmp_path / "many.png")
    save(quality([result("zero-shot", "none", 0.0, 0.0, curve=False)]), tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 5000


def test_results_are_read_back_and_others_refused(tmp_path):
    saved = result()
    assert load_result(save_result(saved, tmp_path)) == load_result(tmp_path) == saved
    for content, said in (
        ("{", "not a run's result"),
        ("{}", "not a run's result: name"),
        ("[]", "not a run's result"),
    ):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(DataError, match=said):
            load_result(tmp_path)
    with pytest.raises(DataError, match="no result of a run"):
        load_result(tmp_path / "nowhere")


# -- progress ----------------------------------------------------------------------------------------------------------


class State:
    is_world_process_zero = True
    max_steps = 10
    global_step = 0


def go_through(console) -> progress.ProgressReporter:
    schedule = Schedule.preset("cr", FULL, total_steps=10)
    reporter = progress.ProgressReporter(console, "title", schedule, FULL, lambda stage: stage.layers / FULL.layers)
    state = State()
    reporter.on_train_begin(None, state, None)
    for step in range(10):
        state.global_step = step
        reporter.on_step_begin(None, state, None)
        state.global_step = step + 1
        reporter.on_step_end(None, state, None)
        reporter.on_log(None, state, None, logs={"loss": 2.5, "grad_norm": 1.0})
    reporter.on_evaluate(None, state, None, metrics={"eval_accuracy": 61.25, "eval_runtime": 1.0})
    reporter.on_train_end(None, state, None)
    return reporter


def test_progress_in_lines():
    console = Console(width=160, record=True, file=io.StringIO())
    reporter = go_through(console)
    text = console.export_text()
    assert text.count("growing to") == 3
    assert "step 0: tuning on" in text
    assert "growing to the full model" in text
    assert "step 10/10  stage 4/4  loss 2.500" in text
    assert "accuracy 61.2% on the full model" in text
    assert reporter._work_left(0) == pytest.approx(2 * 0.25 + 2 * 0.5 + 2 * 0.75 + 4)
    assert reporter._work_left(9) == 1
    assert reporter._work_left(10) == 0


def test_progress_in_a_terminal():
    console = Console(width=160, force_terminal=True, file=io.StringIO())
    reporter = go_through(console)
    assert reporter.bar is None
    reporter.on_train_begin(None, State(), None)
    assert isinstance(reporter.bar, Progress)
    reporter.close()
    reporter.close()
