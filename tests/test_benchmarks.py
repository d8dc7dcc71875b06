"""The tables of the harnesses: of quality on made-up results, of step times on the committed ones."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, T5Config

from fast_prompt_tuning import EmaCallback

ROOT = Path(__file__).parents[1]


def script(path: Path) -> Iterator[Any]:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.fixture(scope="module")
def suffix_step_time(step_time) -> Iterator[Any]:
    yield from script(ROOT / "benchmarks" / "suffix_step_time.py")


@pytest.fixture(scope="module")
def paper_cost() -> Iterator[Any]:
    yield from script(ROOT / "benchmarks" / "paper_cost.py")


@pytest.fixture(scope="module")
def gpu_cost(paper_cost, step_time) -> Iterator[Any]:
    yield from script(ROOT / "benchmarks" / "gpu_cost.py")


@pytest.fixture(scope="module")
def quality() -> Iterator[Any]:
    yield from script(ROOT / "benchmarks" / "quality" / "run.py")


@pytest.fixture(scope="module")
def running_mean(quality) -> Iterator[Any]:
    yield from script(ROOT / "benchmarks" / "running_mean.py")


@pytest.fixture(scope="module")
def step_time() -> Iterator[Any]:
    yield from script(ROOT / "benchmarks" / "step_time.py")


def test_the_docs_step_times_are_the_committed_ones(step_time):
    results = step_time.load_record(step_time.COMMITTED)["results"]
    page = (ROOT / "docs" / "fast_step.md").read_text(encoding="utf-8").splitlines()
    rows = [row for row, _ in step_time.target_rows(results)] + step_time.stage_rows(results)
    assert len(rows) == len(step_time.TARGETS) + 3 * len(step_time.MODELS)
    assert [row for row in rows if row not in page] == []


def test_the_guides_points_are_the_committed_ones(quality):
    by = {(r["model"], r["task"], r["method"]): r for r in quality.summary(quality.HERE / "results")}
    page = (ROOT / "docs" / "guides" / "schedule.md").read_text(encoding="utf-8").replace("−", "-")
    for model, name in (("gemma", "Gemma 3 270M, base"), ("smollm2", "SmolLM2-135M-Instruct")):
        for method in ("ld", "fr", "cr"):
            rows = [by[model, task, method] for task in ("topics", "headlines", "squad")]
            low, high = min(r["flops"] for r in rows), max(r["flops"] for r in rows)
            points = " | ".join(f"{r['final'] - r['plain_final']:.1f}" for r in rows)
            assert f"| {name} | `{method}` | {100 * low:.0f} to {100 * high:.0f}% | {points} |" in page


def test_the_docs_suffix_step_times_are_the_committed_ones(suffix_step_time):
    results = json.loads(suffix_step_time.COMMITTED.read_text(encoding="utf-8"))["results"]
    page = (ROOT / "docs" / "methods" / "suffix_prompts.md").read_text(encoding="utf-8").splitlines()
    assert {r["text_tokens"] for r in results} == set(suffix_step_time.TARGETS)
    assert [row for row in suffix_step_time.table_rows(results) if row not in page] == []


def test_the_docs_quality_table_is_the_summary_of_the_committed_cells(quality):
    methods, lengths = quality.split_rows(quality.summary(ROOT / "benchmarks" / "quality" / "results"))
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    for text in (quality.table(methods), quality.length_table(lengths)):
        assert len(text.splitlines()) > 2
        assert text in page
    assert quality.init_table(ROOT / "benchmarks" / "quality" / "results") in page


def test_the_docs_running_means_are_the_committed_ones(running_mean):
    rows = running_mean.table(json.loads(running_mean.RESULTS.read_text(encoding="utf-8"))).splitlines()
    assert len(rows) > 2
    assert "\n".join(rows) in (ROOT / "docs" / "methods" / "running_mean.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_running_mean_measured_is_the_callbacks(running_mean, decay):
    prompt = torch.nn.Parameter(torch.zeros(2, 3))
    model, optimizer = SimpleNamespace(soft_prompt=prompt), torch.optim.SGD([prompt], lr=0.1)
    callback, trained = EmaCallback(decay), [prompt.detach().clone()]
    callback.on_train_begin(SimpleNamespace(), None, None, model=model)
    for step in range(1, 30):
        state = SimpleNamespace(global_step=step - 1)
        callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)
        prompt.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        trained.append(prompt.detach().clone())
        callback.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        torch.testing.assert_close(prompt.detach(), running_mean.mean_after(trained, step, decay))
    assert torch.equal(prompt, trained[-1]) == (decay == 0)


def on_a_cpu(gpu_cost: Any, plm: str, out: Path) -> dict[str, Any]:
    options = ["--plm", plm, "--device", "cpu", "--dtype", "float32", "--quick", "--out", str(out)]
    assert gpu_cost.main(options) == 0
    return json.loads(out.read_text())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # as in tests/plm/test_compile.py
def test_the_gpus_decoder_runs_to_the_last_line_on_a_cpu(gpu_cost, tmp_path, monkeypatch, capsys):
    tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=128)  # fmt: skip
    monkeypatch.setitem(gpu_cost.DECODERS, "llama-1b", tiny)
    monkeypatch.setattr(gpu_cost, "TEXT", 100)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # C++ takes minutes
    torch._dynamo.reset()
    report = on_a_cpu(gpu_cost, "llama-1b", tmp_path / "gpu.json")
    torch._dynamo.reset()
    rows = {row["name"]: row for row in report["rows"]}
    cut = [f"cr {size}%" for size in (25, 50, 75)]
    assert list(rows) == ["plain", *cut, *(f"{name}, compiled" for name in ("plain", *cut)), "after the text, kept"]
    assert all(len(row["samples"]) == 2 and row["utilisation"] > 0 for row in rows.values())
    shares = [rows[name]["flops_of_plain"] for name in (*cut, "plain")]
    assert shares == sorted(shares)
    assert shares == [rows[f"{name}, compiled"]["flops_of_plain"] for name in (*cut, "plain")]
    assert rows["after the text, kept"]["flops_of_plain"] < 0.5
    said = capsys.readouterr().out
    assert all(name in said for name in rows)


def test_the_gpus_t5_runs_to_the_last_line_on_a_cpu(gpu_cost, tmp_path, monkeypatch, capsys):
    thin = T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=2816, num_layers=24, num_decoder_layers=24, vocab_size=32,
                    decoder_start_token_id=0)  # fmt: skip
    monkeypatch.setattr("fast_prompt_tuning.paper.reproduce.paper_config", lambda plm: thin)
    monkeypatch.setattr(gpu_cost, "TEXT", 12)
    monkeypatch.setattr(gpu_cost, "LONG_TARGET", 12)
    report = on_a_cpu(gpu_cost, "large", tmp_path / "gpu.json")
    assert len(report["rows"]) == 9
    assert all(row["utilisation"] > 0 for row in (report["full"], *report["rows"]))
    assert "fastest product" in capsys.readouterr().out


def cell(
    model: str, task: str, method: str, seed: int, points: list[tuple[float, float]], rate: float = 0.01
) -> dict[str, Any]:
    return {
        "model": model,
        "task": task,
        "method": method,
        "seed": seed,
        "rate": rate,
        "metric": "accuracy",
        "environment": {"dtype": "float32", "processor": f"machine of seed {seed}"},
        "curve": [
            {"step": i, "metric": m, "flops": f, "cpu_seconds": 2 * f} for i, (f, m) in enumerate(points, start=1)
        ],
    }


def write(folder: Path, cells: list[dict[str, Any]]) -> None:
    (folder / "grid").mkdir()
    for c in cells:
        path = folder / "grid" / f"{c['model']}-{c['task']}-{c['method']}-{c['seed']}.json"
        path.write_text(json.dumps(c))


PLAIN = [(25.0, 50.0), (50.0, 70.0), (75.0, 80.0), (100.0, 82.0)]  # settled: 81
FAST = [(10.0, 40.0), (20.0, 80.0), (30.0, 84.0), (55.0, 84.0)]


def test_what_a_method_saves(quality, tmp_path):
    cells = [cell("gemma", "topics", m, s, p) for s in (0, 1, 2) for m, p in (("pt", PLAIN), ("batch", FAST))]
    write(tmp_path, cells)
    rows = {r["method"]: r for r in quality.summary(tmp_path)}
    fast = rows["batch"]
    assert fast["final"] == 84
    assert fast["plain_final"] == 81
    assert fast["flops"] == 0.55
    assert fast["flops_to_plain"] == pytest.approx(0.225)
    assert fast["improve"] == pytest.approx(84 - 72)  # plain at 55: between 70 and 80
    assert fast["seconds"] == 0.55
    assert rows["pt"]["flops_to_plain"] == pytest.approx(0.875)
    text = quality.table(list(rows.values()))
    assert "| gemma | topics | batch | 3 | 84.0 | 0.0 | 55% | 22% | 55% | +12.0 |" in text


def test_a_method_that_never_gets_there_and_unequal_seeds(quality, tmp_path):
    cells = [cell("gemma", "topics", "pt", s, PLAIN) for s in (0, 1)]
    cells += [cell("gemma", "topics", "cr", 0, [(20.0, 30.0), (60.0, 40.0)])]
    cells += [cell("gemma", "topics", "auto", s, FAST) for s in (0, 7)]  # plain has no seed 7: not comparable
    write(tmp_path, cells)
    rows = {r["method"]: r for r in quality.summary(tmp_path)}
    assert rows["cr"]["seeds"] == 1
    assert rows["cr"]["flops_to_plain"] is None
    assert "auto" not in rows
    assert "never" in quality.table(list(rows.values()))


def test_targets_are_missed_until_they_are_shown(quality, tmp_path):
    tasks = ("topics", "headlines", "squad")
    write(tmp_path, [cell("gemma", t, m, s, p) for t in tasks for s in (0, 1, 2)
                     for m, p in (("pt", PLAIN), ("batch", FAST), ("auto", FAST))])  # fmt: skip
    missed = quality.shortfalls(quality.summary(tmp_path))
    assert missed[:-1] == [f"smollm2 {t}: auto at most 105%: no 3 seeds yet" for t in tasks]
    assert missed[-1].endswith("on two of three tasks: none")
    for t in tasks:
        for method in ("batch", "auto"):
            (tmp_path / "grid" / f"gemma-{t}-{method}-2.json").unlink()
    assert any("gemma topics: no method" in m for m in quality.shortfalls(quality.summary(tmp_path)))


def test_where_the_prompt_stands_is_judged_by_flops_and_seconds(quality, tmp_path):
    """Cheap on two tasks; on headlines it takes 30% of the FLOPs."""
    dear = [(30.0, 84.0), (55.0, 84.0)]
    cheap = [(10.0, 40.0), (20.0, 84.0), (21.0, 84.0)]
    cells = []
    for task, method, points in (("topics", "suffix", cheap), ("headlines", "suffix", dear), ("squad", "infix", cheap)):
        cells += [
            cell("smollm2", f"{task}-256", m, s, p) for s in (0, 1, 2) for m, p in (("pt", PLAIN), (method, points))
        ]
    write(tmp_path, cells)
    rows = quality.summary(tmp_path)
    assert not any("two of three" in m for m in quality.shortfalls(rows))
    methods, lengths = quality.split_rows(rows)
    assert (len(methods), len(lengths)) == (0, 6)
    text = quality.length_table(lengths)
    assert "| smollm2 | topics-256 | suffix | float32 | 3 | 0.01 | 84.0 | 0.0 | 21% | 21% | 19% | 19% |" in text
    assert "| smollm2 | headlines-256 | suffix | float32 | 3 | 0.01 | 84.0 | 0.0 | 55% | 55% | 30% | 30% |" in text
    for path in (tmp_path / "grid").glob("*squad*infix*"):  # run elsewhere: seconds are not to be compared
        path.write_text(json.dumps({**json.loads(path.read_text()), "environment": {"dtype": "bfloat16"}}))
    rows = quality.summary(tmp_path)
    assert "on two of three tasks: topics-256" in quality.shortfalls(rows)[-1]
    assert "| infix | bfloat16 | 3 | 0.01 | 84.0 | 0.0 | 21% | – | 19% | – |" in quality.length_table(
        quality.split_rows(rows)[1]
    )


def test_a_task_may_take_the_rates_of_another(quality, tmp_path):
    for rate, final in ((0.01, 50.0), (0.03, 60.0), (0.1, 55.0)):
        tuning_cell(quality, tmp_path, rate, final)
    assert quality.best_rate(quality.tried_rates(tmp_path, "gemma", "topics-256", "pt")) == 0.03
    args = SimpleNamespace(models=["gemma"], tasks=["topics-256"], methods=["pt"], seeds=[0], results=tmp_path)
    (tmp_path / "grid").mkdir()
    assert [c.path.stem for c in quality.cells_of(args)] == ["gemma-topics-256-pt-0"]
    assert {quality.placement(m) for m in quality.METHODS} == set(quality.PLACES)


def tuning_cell(quality: Any, folder: Path, rate: float, final: float) -> None:
    made = quality.Cell("gemma", "topics", "pt", quality.TUNE_SEED, rate)
    found = cell("gemma", "topics", "pt", quality.TUNE_SEED, [(1.0, final), (2.0, final)])
    (folder / made.path).parent.mkdir(exist_ok=True)
    (folder / made.path).write_text(json.dumps(found))


@pytest.mark.parametrize("best", [0.001, 0.003, 0.01, 0.03, 0.1, 1.0])
def test_the_learning_rate_is_tuned_until_the_best_has_worse_neighbours(quality, tmp_path, best):
    quality_of = {r: 90.0 - abs(quality.RATES.index(r) - quality.RATES.index(best)) for r in quality.RATES}
    for _ in quality.RATES:
        tried = quality.tried_rates(tmp_path, "gemma", "topics", "batch")
        assert tried == {r: quality_of[r] for r in tried}
        if (rate := quality.next_rate(tried)) is None:
            break
        tuning_cell(quality, tmp_path, rate, quality_of[rate])
    assert max(tried, key=tried.get) == best
    at = quality.RATES.index(best)
    assert set(quality.RATES[max(at - 1, 0) : at + 2]) <= set(tried)
    assert quality.tried_rates(tmp_path, "gemma", "topics", "suffix") == {}


def test_initialisations_are_compared_on_the_tuning_split_at_the_tuned_rate(quality, tmp_path):
    (tmp_path / "tuning").mkdir()
    for rate, value in ((0.01, 50.0), (0.03, 60.0), (0.1, 55.0)):
        found = cell("smollm2", "topics", "pt", 100, [(1, value), (2, value)], rate)
        (tmp_path / "tuning" / f"smollm2-topics-pt-lr{rate:g}.json").write_text(json.dumps(found))
    args = SimpleNamespace(models=["smollm2"], tasks=["topics"], methods=["uniform"], seeds=[0], results=tmp_path)
    (missing,) = quality.cells_of(args)
    assert (missing.method, missing.seed, missing.rate) == ("uniform", 100, 0.03)
    found = cell("smollm2", "topics", "uniform", 100, [(1, 40.0), (2, 44.0)], 0.03)
    (tmp_path / missing.path).write_text(json.dumps(found))
    assert list(quality.cells_of(args)) == []
    assert quality.init_table(tmp_path).splitlines()[2:] == ["| smollm2 | topics | 0.03 | 60.0 | 42.0 |"]
    assert "uniform" not in quality.rate_table(tmp_path)


def test_missing_cells_begin_with_tuning_and_are_not_run_twice(quality, tmp_path):
    import argparse

    args = argparse.Namespace(
        models=["gemma"], tasks=["topics"], methods=["pt", "batch"], seeds=[0, 1], results=tmp_path
    )
    write(tmp_path, [cell("gemma", "topics", "pt", 0, PLAIN, 0.03), cell("gemma", "topics", "batch", 0, FAST, 0.01)])
    named = []
    for missing in quality.cells_of(args):
        named.append(missing.path.stem)
        if missing.rate is not None:
            tuning_cell(quality, tmp_path, missing.rate, 50 - 100 * abs(missing.rate - 0.03))
    tuning = [n for n in named if "-lr" in n]
    assert (
        tuning == named[: len(tuning)] == ["gemma-topics-pt-lr0.01", "gemma-topics-pt-lr0.03", "gemma-topics-pt-lr0.1"]
    )
    assert named[3:] == ["gemma-topics-batch-0", "gemma-topics-pt-1", "gemma-topics-batch-1"]


def test_squad_keeps_the_sentence_that_holds_the_answer(quality, tmp_path):
    text = 'It rained. In 1066 the Normans won (see below). "Later they lost." The end'

    def asked(word, no=False):
        answers = [{"text": word, "answer_start": text.index(word)}]
        return {
            "id": word,
            "question": f"{word}?",
            "is_impossible": no,
            "answers": [] if no else answers,
        }

    made = {
        "context": text,
        "qas": [asked("1066"), asked("lost"), asked("rained. In"), asked("end"), asked("won", True)],
    }
    articles = [{"title": str(i), "paragraphs": [made] if i == 0 else []} for i in range(16)]
    (tmp_path / "all.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    files = quality.squad_files(tmp_path / "all.json", tmp_path)
    found = [p for a in json.loads(Path(files["train"]).read_text())["data"] for p in a["paragraphs"]]
    assert [p["context"] for p in found] == ["In 1066 the Normans won (see below).", '"Later they lost."', "The end"]
    for p in found:
        answer = p["qas"][0]["answers"][0]
        assert p["context"][answer["answer_start"] :].startswith(answer["text"])

    files = quality.squad_files(tmp_path / "all.json", tmp_path, whole=True)
    found = [p for a in json.loads(Path(files["train"]).read_text())["data"] for p in a["paragraphs"]]
    assert [(p["context"], p["qas"][0]["id"]) for p in found] == [
        (text, w) for w in ("1066", "lost", "rained. In", "end")
    ]


def test_every_method_is_a_valid_recipe(quality):
    from fast_prompt_tuning import recipe as config

    for name, settings in quality.METHODS.items():
        task = quality.TASKS["topics"]
        for model in quality.MODELS:
            base = {"model": {"path": "x"}, "data": {"task": "bbc_topics"}, "output": "y",
                    "train": {"steps": task.steps, "batch_size": task.batch}, **settings(model, task)}  # fmt: skip
            assert config.load(base).train.steps == task.steps, name


def test_a_model_four_times_as_large_as_a_processs_limit_trained_in_parts():
    found = json.loads((ROOT / "benchmarks" / "results" / "shard_memory.json").read_text())
    assert found["limit_bytes"] == found["model_bytes"] // 4
    assert len(found["own_bytes"]) == found["processes"]
    assert max(found["own_bytes"]) + found["part_bytes"] <= found["limit_bytes"]
    assert len(found["losses"]) == 3
