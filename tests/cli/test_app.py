"""The command `fpt`, end to end on tiny models: what it prints, its exit codes, its refusals."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from toy import articles, toy
from transformers import AutoModelForCausalLM

from fast_prompt_tuning import Schedule
from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.cli import catalog, console, demo
from fast_prompt_tuning.cli.progress import ProgressReporter, reporting
from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run.session import input_ids_of, open_session


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def only_json(out: str):
    (line,) = out.splitlines()
    return json.loads(line)


def refused(fpt, *arguments) -> str:
    """The one line a refusal prints."""
    out, err = fpt(*arguments, code=2)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in out + err
    assert "a bug" not in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of the tiny Llama on each task, and the recipes."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("topics", "words"):
        recipe = toy().write_recipe(folder / f"{name}.yaml", folder / name, data__task=str(getattr(toy(), name)))
        with pytest.raises(SystemExit) as stop:
            cli.main(["-q", "train", "--config", str(recipe)])
        assert stop.value.code == 0
    console.state.update(debug=False, quiet=False)
    return folder


# -- the way through ---------------------------------------------------------------------------------------------------


def test_train(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    out, _ = fpt("train", "--config", recipe, "--set", "train.steps=5", "--set", "train.log_every=5")
    for said in ("step 0: tuning on", "growing to the full model", "accuracy", "5/5", "of plain"):
        assert said in out
    out, err = fpt("train", "--config", recipe, "--set", "train.steps=5", "--overwrite", "--json")
    record = only_json(out)
    assert record["output"] == str(tmp_path / "run")
    assert record["metric"] == "accuracy"
    assert os.path.isdir(record["prompt_folder"])
    assert "tuning on" in err
    out, _ = fpt("--quiet", "train", "--config", recipe, "--set", "train.steps=5", "--resume")
    assert "tuning on" not in out
    assert "accuracy" in out
    out, err = fpt("--quiet", "train", "--config", recipe, "--set", "train.steps=5", "--overwrite", "--json")
    assert only_json(out)["metric"] == "accuracy"
    assert "accuracy" not in err


def test_quiet_commands_still_answer(fpt, made):
    for command in (["eval", made / "topics"], ["compare", made / "topics"], ["ls", "tasks"]):
        out, _ = fpt("--quiet", *command)
        assert "topics" in out


def test_eval_of_all_weights_is_of_them_alone(fpt, made, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "full", method="full")
    fpt("-q", "train", "--config", recipe, "--set", "train.steps=4")
    for more in (["--zero-shot"], [made / "topics"]):
        _, err = fpt("eval", tmp_path / "full", *more, code=2)
        assert "score it by itself" in err


def test_eval_says_where_a_prompt_is_another_models(fpt, made, tmp_path, caplog):
    changed = tmp_path / "model"
    plm = AutoModelForCausalLM.from_pretrained(toy().llama)
    with torch.no_grad():
        plm.model.layers[0].mlp.up_proj.weight.mul_(2)
    plm.save_pretrained(changed)
    for file in toy().llama.glob("tokenizer*"):
        shutil.copy(file, changed)
    fpt("eval", made / "topics", "--set", f"model.path={changed}")
    assert "was tuned on another model than" in caplog.text
    caplog.clear()
    fpt("eval", made / "topics")
    assert "another model" not in caplog.text


def test_a_submission_is_nothing_else(fpt, made, tmp_path):
    for more in (["--zero-shot"], ["--partial", "3x12"], ["--output", tmp_path / "p.jsonl"]):
        _, err = fpt("eval", made / "topics", "--submission", tmp_path / "s.tsv", *more, code=2)
        assert "leave out --output, --zero-shot and --partial" in err


def test_eval_on_a_partial_model_finds_the_scores_it_was_given(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    fpt("score", "--config", recipe, "--output", tmp_path / "s.safetensors")
    fpt("-q", "train", "--config", recipe, "--set", f"scoring.path={tmp_path / 's.safetensors'}")
    out, _ = fpt("eval", tmp_path / "run", "--partial", "3x12", "--json")
    assert only_json(out)["partial"] == "3x12"


def test_templates_on_the_command_line(fpt, tmp_path):
    """The template's end stays, whatever is cut; any character may stand in it."""
    files = {s: str(toy().folder / f"{s}.jsonl") for s in ("train", "validation")}
    data = {"files": files, "labels": ["sport", "business"], "max_input_tokens": 8, "max_target_tokens": 4}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**toy().recipe(tmp_path / "run", method="pt"), "data": data}))
    fpt("-q", "train", "-c", recipe, "--input-template", "😀 {{ text }}\\nTopic:", "--target-template", " {{ label }}")
    found = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["input"].startswith("😀 ") for row in found)
    settings = load(tmp_path / "run" / "config.yaml")
    session = open_session(settings, ("train",))
    ends = {tuple(ids[-2:]) for ids in input_ids_of(session, session.encoded["train"])}
    assert ends == {tuple(session.tokenizer("Topic:")["input_ids"])}


@pytest.mark.parametrize("command", ["score", "similarity", "export"])
def test_folders_that_are_not_there_are_made(fpt, made, tmp_path, command):
    target = tmp_path / "no" / "such" / ("p.safetensors" if command == "export" else "p.png")
    fpt(
        *{
            "score": [
                "score",
                "-c",
                made / "topics.yaml",
                "--fidelity",
                "evenly",
                "--sizes",
                "50",
                "--picture",
                target,
            ],
            "similarity": ["similarity", made / "topics", made / "topics", "--picture", target],
            "export": ["export", made / "topics", target],
        }[command]
    )
    assert target.is_file()


def test_a_stopped_run_leaves_no_bar_behind(made, monkeypatch):
    closed = []
    monkeypatch.setattr(ProgressReporter, "close", lambda self: closed.append(self.bar is not None))
    session = open_session(load(made / "topics.yaml"), ("train",))
    terminal = Console(force_terminal=True, file=io.StringIO())

    def broken_off():
        with reporting(terminal, "a run", session) as (callbacks, hook):
            hook(Schedule.constant(session.cost.full_stage, 4), session.cost.full_stage)
            callbacks[0].on_train_begin(None, SimpleNamespace(max_steps=4), None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert closed == [True]


@pytest.mark.parametrize("name", ["topics", "words"])
def test_eval(fpt, made, tmp_path, name):
    out, _ = fpt("eval", made / name)
    assert "accuracy" in out or "rougeL" in out
    predictions = tmp_path / "p.jsonl"
    out, _ = fpt("eval", made / name, "--zero-shot", "--split", "validation", "--output", predictions, "--json")
    record = only_json(out)
    assert record["split"] == "validation"
    assert set(record["results"]) == {"zero-shot", str(made / name)}
    tuned = record["results"][str(made / name)]
    saved = json.loads((made / name / "result.json").read_text())
    assert tuned["metrics"] == saved["metrics"]
    assert predictions.read_text() == (made / name / "predictions.jsonl").read_text()
    assert "exists already" in refused(fpt, "eval", made / name, "--output", predictions)


def test_eval_of_several_prompts_side_by_side(fpt, made):
    out, _ = fpt("eval", made / "topics", made / "words" / "prompt", "--json")
    assert set(only_json(out)["results"]) == {str(made / "topics"), str(made / "words" / "prompt")}


@pytest.mark.parametrize("voting", ["probabilities", "votes"])
def test_eval_of_an_ensemble(fpt, made, tmp_path, voting):
    fpt("train", "--config", toy().write_recipe(tmp_path / "r.yaml", tmp_path / "other", train__seed=5))
    out, _ = fpt("eval", made / "topics", tmp_path / "other", "--ensemble", voting, "--json")
    results = only_json(out)["results"]
    assert set(results) == {str(made / "topics"), str(tmp_path / "other"), f"ensemble ({voting})"}
    alone, _ = fpt("eval", made / "topics", "--json")
    assert results[str(made / "topics")]["metrics"] == only_json(alone)["results"][str(made / "topics")]["metrics"]
    twice, _ = fpt("eval", made / "topics", made / "topics" / "prompt", "--ensemble", voting, "--json")
    results = only_json(twice)["results"]  # a prompt agrees with itself
    assert results[f"ensemble ({voting})"]["metrics"] == results[str(made / "topics")]["metrics"]
    assert "at least two prompts" in refused(fpt, "eval", made / "topics", "--ensemble", voting)
    assert "--ensemble 'odd'" in refused(fpt, "eval", made / "topics", tmp_path / "other", "--ensemble", "odd")


def test_eval_on_a_partial_plm(fpt, made):
    full, _ = fpt("eval", made / "topics", "--partial", "5x24", "--json")
    plain, _ = fpt("eval", made / "topics", "--json")
    name = str(made / "topics")
    assert only_json(full)["results"][name]["metrics"] == only_json(plain)["results"][name]["metrics"]
    part, _ = fpt("eval", made / "topics", "--partial", "2x10", "--json")
    assert only_json(part)["partial"] == "2x10"
    assert "not LAYERSxFFN" in refused(fpt, "eval", made / "topics", "--partial", "half")
    assert "layers=9 does not fit" in refused(fpt, "eval", made / "topics", "--partial", "9x24")


def test_a_submission_needs_no_labels(fpt, tmp_path):
    rows = articles(6, seed=9)
    train = tmp_path / "train.tsv"
    train.write_text("sentence\tlabel\n" + "".join(f"{r['text']}\t{int(r['label'] == 'sport')}\n" for r in rows))
    test = tmp_path / "test.tsv"
    test.write_text("index\tsentence\n" + "".join(f"{i}\t{r['text']}\n" for i, r in enumerate(rows)))
    files = {"train": str(train), "validation": str(train), "test": str(test)}
    recipe = toy().write_recipe(
        tmp_path / "r.yaml", tmp_path / "run", data__task="sst2", data__files=files, data__max_input_tokens=30
    )
    fpt("train", "--config", recipe, "--set", "method=pt", "--set", "train.steps=2")
    out = tmp_path / "SST-2.tsv"
    fpt("eval", tmp_path / "run", "--split", "test", "--submission", out)
    header, *lines = out.read_text().splitlines()
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(6)]
    assert {line.split("\t")[1] for line in lines} <= {"0", "1"}
    assert "exists already" in refused(fpt, "eval", tmp_path / "run", "--split", "test", "--submission", out)


def test_a_task_from_templates_on_the_command_line(fpt, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in articles(12, seed=3)) + "not json\n")
    files = {"train": str(data), "validation": str(data)}
    data_settings = {"data__files": files, "data__labels": ["sport", "business"], "data__max_target_tokens": 4}
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", **data_settings)
    templates = ["--input-template", r"{{ text }}\nTopic:", "--target-template", " {{ label }}"]
    said = refused(fpt, "train", "--config", recipe, *templates, "--set", "train.steps=4")
    assert f"{data}:13" in said
    out, _ = fpt("train", "--config", recipe, *templates, "--set", "train.steps=4", "--on-bad-row", "skip")
    assert "accuracy" in out
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert first["input"].endswith("\nTopic:")
    assert "needs a task" in refused(fpt, "train", "--config", recipe, "--input-template", "{{ text }}")
    assert "of its own" in refused(fpt, "train", "--config", recipe)


def test_push(fpt, made, monkeypatch):
    from fast_prompt_tuning.report import hub

    monkeypatch.setattr(hub, "push_prompt", lambda folder, repo, private: f"{folder} {repo} {private}")
    sent = ("push", made / "topics", "me/prompt", "--upload")
    assert fpt(*sent)[0] == f"{made / 'topics'} me/prompt True\n"
    assert fpt(*sent, "--public")[0] == f"{made / 'topics'} me/prompt False\n"
    monkeypatch.setattr(hub, "push_prompt", None)
    out, _ = fpt("push", made / "topics", "me/prompt")
    for said in ("adapter_model.safetensors: ", "library_name: peft", "nothing was uploaded; add --upload"):
        assert said in out
    assert set(only_json(fpt("push", made / "topics", "me/prompt", "--json")[0])["files"]) >= {"README.md"}


def test_predict(fpt, made, tmp_path, monkeypatch):
    rows = articles(5, 9)
    texts = [row["text"] for row in rows]
    out, _ = fpt("predict", made / "topics", *texts)
    answers = out.splitlines()
    assert len(answers) == 5
    assert set(answers) <= {"sport", "business"}
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n\n")
    assert fpt("predict", made / "topics", "--file", tmp_path / "in.txt")[0].splitlines() == answers
    piped = "\r\n".join(json.dumps({"text": t}) for t in texts)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    out, _ = fpt("predict", made / "topics", "--json", "--set", "eval.batch_size=2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prediction"] for line in lines] == answers
    assert all(line["score"] < 0 for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\r\n \r\n")))
    assert "no text to answer" in refused(fpt, "predict", made / "topics")
    assert "text" in refused(fpt, "predict", made / "topics", '{"body": "x"}')
    assert "cannot be read" in refused(fpt, "predict", made / "topics", "--file", tmp_path / "none.txt")
    assert len(fpt("predict", made / "words", *texts)[0].splitlines()) == 5


def test_predict_renders_what_training_rendered(fpt, made, tmp_path):
    """A field that a line does not give is missing, as it is in a row without it; it is no empty text."""
    run = tmp_path / "run"
    shutil.copytree(made / "topics", run)
    task = yaml.safe_load(toy().topics.read_text())

    def scores(template, *lines, code=0):
        task["decoder"]["input_template"] = template
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
        said = fpt("predict", run, "--json", "--set", f"data.task={tmp_path / 'task.yaml'}", *lines, code=code)
        return said[1] if code else [json.loads(line)["score"] for line in said[0].splitlines()]

    guarded = "{% if title is defined %}story: {{ title }} {% endif %}{{ text }}\nTopic:"
    plain, named, empty = scores(guarded, "the ball", '{"text": "the ball"}', '{"text": "the ball", "title": ""}')
    assert plain == pytest.approx(named) == pytest.approx(scores("{{ text }}\nTopic:", "the ball")[0])
    assert plain != pytest.approx(empty)
    said = scores("{{ title }}\n{{ text }}\nTopic:", "the ball", code=2)
    assert "has the fields text, title; give each input as a JSON object" in said


def test_predict_says_how_probable_each_label_is(fpt, made):
    out, _ = fpt("predict", made / "topics", "--json", "goal match", "bank profit")
    for line in map(json.loads, out.splitlines()):
        assert set(line["probabilities"]) == {"sport", "business"}
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert max(line["probabilities"], key=line["probabilities"].get) == line["prediction"]
    out, _ = fpt("predict", made / "words", "--json", "goal match")
    assert "probabilities" not in json.loads(out)  # of generated answers there is no closed set


def test_predict_refuses_what_is_not_text(fpt, made, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"the ball\n\xff\xfe\n"), encoding="latin-1")  # whatever the locale says
    monkeypatch.setattr(sys, "stdin", stream)
    assert "standard input:2: not UTF-8" in refused(fpt, "predict", made / "topics")


def test_export(fpt, made, tmp_path):
    out, _ = fpt("export", made / "topics", tmp_path / "p.safetensors")
    assert "(3, 16)" in out
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert file.get_tensor("prompt_embeds").shape == (3, 16)
    assert "exists already" in refused(fpt, "export", made / "topics", tmp_path / "p.safetensors")
    assert "not a saved soft prompt" in refused(fpt, "export", tmp_path, tmp_path / "q.safetensors")


def test_score_then_train_with_its_scores(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", train__steps=5)
    scores = tmp_path / "s.safetensors"
    out, _ = fpt("score", "--config", recipe, "--output", scores)
    assert "16 examples" in out
    assert "exists already" in refused(fpt, "score", "--config", recipe, "--output", scores)
    fpt("train", "--config", recipe, "--set", f"scoring.path={scores}")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["flops"]["score"] == 0


def test_fidelity(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", scoring__layer_examples=4)
    picture = tmp_path / "fidelity.png"
    common = ("score", "--config", recipe, "--examples", 8, "--sizes", "60,20")
    out, _ = fpt(*common, "--fidelity", "evenly,greedy+activation", "--picture", picture, "--json")
    made = json.loads(out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = made["fidelity"]["rows"]
    assert [(r["selection"], r["stage"]["layers"], r["stage"]["ffn"]) for r in rows] == [
        ("evenly", 3, 24),
        ("evenly", 1, 24),
        ("greedy+activation", 3, 14),
        ("greedy+activation", 1, 5),
    ]
    assert made["fidelity"]["score_flops"].keys() == {"greedy"}
    shown, _ = fpt(*common, "--fidelity", "influence")
    assert "influence" in shown
    assert "nothing to make" in refused(fpt, "score", "--config", recipe)
    assert "selection 'best' is unknown" in refused(fpt, *common, "--fidelity", "best")
    assert "is unknown" in refused(fpt, *common, "--fidelity", "evenly+greedy")
    assert "must be percentages" in refused(fpt, *common[:-1], "0", "--fidelity", "evenly")
    assert "exists already" in refused(fpt, *common, "--fidelity", "evenly", "--picture", picture)
    assert "must end in" in refused(fpt, *common, "--fidelity", "evenly", "--picture", tmp_path / "x.jpg")
    assert "add --fidelity" in refused(fpt, *common, "--picture", tmp_path / "x.png")


def test_signal(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    picture = tmp_path / "signal.svg"
    common = ("score", "--config", recipe, "--signal", "--examples", 8)
    out, err = fpt(*common, "--after", 2, "--picture", picture, "--json")
    record = only_json(out)["signal"]
    assert [p["step"] for p in record["prompts"]] == [0, 2]
    assert record["verdict"] in err
    for said in ("initial prompt", "after 2 steps (the prompt has moved by ", "cr 25%", "a batch of 2", "plain steps."):
        assert said in err
    for said in ("initial prompt", "after 2 steps", "signal per FLOP", "cosine of mean", "FLOPs of a step", "batch"):
        assert said in picture.read_text()
    prompt = toy().write_recipe(tmp_path / "pt.yaml", tmp_path / "pt", method="pt")
    shown, _ = fpt(*common, "--after", 0)
    assert "On this model and task" in shown
    assert "has moved" not in shown
    assert "add --signal" in refused(fpt, "score", "--config", prompt, "--at", tmp_path, "--output", tmp_path / "s")
    assert "one of --fidelity and --signal" in refused(
        fpt, *common, "--fidelity", "evenly", "--picture", tmp_path / "x.png"
    )
    assert "not a saved soft prompt" in refused(fpt, *common, "--at", tmp_path)


def test_similarity(fpt, made, tmp_path):
    picture = tmp_path / "alike.png"
    runs = (made / "topics", made / "topics" / "prompt", made / "words")
    out, _ = fpt("similarity", *runs, "--picture", picture, "--json")
    record = json.loads(out)
    matrix = record["similarity"]
    assert matrix[0][1] == pytest.approx(1)
    assert -1 <= matrix[0][2] == matrix[2][0] < 0.999
    assert len(record["by_token"][0][2]) == 3
    assert sum(record["by_token"][0][2]) / 3 == pytest.approx(matrix[0][2])
    assert [run["metric"] for run in record["runs"]] == ["accuracy", None, "rougeL"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in fpt("similarity", *runs)[0]
    assert "at least two" in refused(fpt, "similarity", runs[0])
    assert "exists already" in refused(fpt, "similarity", *runs, "--picture", picture)
    assert "not a saved soft prompt" in refused(fpt, "similarity", runs[0], tmp_path)


def test_score_layers_then_train_with_their_scores(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", scoring__layer_examples=4)
    neurons, layers = tmp_path / "n.safetensors", tmp_path / "l.safetensors"
    files = ("--output", neurons, "--layers", layers)
    greedy = ("--set", "scoring.keep_layers=greedy")
    assert "chosen by score" in refused(fpt, "score", "--config", recipe, *files)
    assert "leaves out no layers" in refused(fpt, "score", "--config", recipe, *files, *greedy, "--set", "method=fr")
    assert not neurons.exists()
    out, _ = fpt("score", "--config", recipe, *files, *greedy)
    assert "4 examples" in out
    assert "l.safetensors' exists already" in refused(fpt, "score", "--config", recipe, "--output", "x", *files[2:])
    given = [f"--set=scoring.path={neurons}", f"--set=scoring.layer_path={layers}"]
    fpt("train", "--config", recipe, *greedy, *given)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["flops"]["score"] == 0


def test_ls(fpt):
    out, _ = fpt("ls")
    for said in ("recipes", "bbc_topics_smollm2", "squad2", "llama", "compound reduction"):
        assert said in out
    assert set(only_json(fpt("ls", "--json")[0])) == {"recipes", "tasks", "families", "methods"}
    assert set(only_json(fpt("ls", "methods", "--json")[0])["methods"]) == {"pt", "ld", "fr", "cr", "auto", "full"}
    assert "choose one of recipes" in refused(fpt, "ls", "everything")


def test_show(fpt):
    out, _ = fpt("show", "task", toy().topics, "--model", toy().llama, "--limit", "9")
    assert out.count("Topic:") == 3
    assert "input (tokens)" in out
    assert "lengths of 9 examples" in out
    out, _ = fpt("show", "task", toy().topics, "--model", toy().t5, "--split", "test")
    assert out.count("<extra_id_0>") >= 3
    out, _ = fpt("show", "task", toy().words, "--file", toy().folder / "test.jsonl")
    assert "(words)" in out
    out, _ = fpt("show", "recipe", "t5_paper_large")
    assert yaml.safe_load(out)["optim"]["optimizer"] == "adafactor"
    assert "choose task or recipe" in refused(fpt, "show", "model", "x")
    assert "did you mean" in refused(fpt, "show", "task", "squad")


# -- costs -------------------------------------------------------------------------------------------------------------


def test_plan_needs_the_config_only(fpt, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((toy().llama / "config.json").read_bytes())
    arguments = ("plan", "--model", tmp_path / "m", "--steps", "100", "--input-tokens", "32", "--batch-size", "4")
    assert "placement suffix" in fpt(*arguments)[0]
    assert only_json(fpt(*arguments, "--json")[0])["stages"][0]["relative_flops"] < 0.6
    record = only_json(fpt(*arguments, "--method", "cr", "--json")[0])
    assert 0 < record["relative_flops"] < 1
    assert len(record["stages"]) == 4
    out, _ = fpt(*arguments, "--compare", "pt,ld,fr,cr,auto", "--json")
    found = only_json(out)
    assert list(found) == ["pt", "ld", "fr", "cr", "auto"]
    assert [s.get("batch") for s in found["auto"]["stages"]] == [1, None]
    assert found["auto"] == only_json(fpt(*arguments, "--method", "auto", "--placement", "prefix", "--json")[0])
    assert found["pt"]["relative_flops"] == pytest.approx(1)
    assert found["cr"]["relative_flops"] < found["ld"]["relative_flops"] < 1
    assert "Methods side by side" in fpt(*arguments, "--compare", "pt,cr")[0]
    out, _ = fpt(*arguments, "--stages", "2x12:40,5x24:60", "--json")
    assert [s["steps"] for s in only_json(out)["stages"]] == [40, 60]
    batches = (*arguments, "--batch-size", "16")
    out, _ = fpt(*batches, "--stages", "5x24@4:40,5x24@8x30:10,5x24:50", "--json")
    parts = only_json(out)["stages"]
    assert [(s.get("batch"), s.get("length")) for s in parts] == [(4, None), (8, 30), (None, None)]
    assert parts[0]["relative_flops"] < parts[1]["relative_flops"] < parts[2]["relative_flops"] == 1
    assert " 4 " in fpt(*batches, "--method", "auto")[0]
    for wrong in ("2:40", "2x3@:4", "2x3@4x:4", "axb:3"):
        assert "LAYERSxFFN[@BATCH[xTOKENS]]:STEPS" in refused(fpt, *arguments, "--stages", wrong)
    assert "9" in refused(fpt, *arguments, "--stages", "9x24:100")
    assert "--convention" in refused(fpt, *arguments, "--convention", "some")
    assert "--dtype" in refused(fpt, *arguments, "--dtype", "int8")
    for option in ("--batch-size", "--input-tokens", "--steps", "--prompt-tokens"):
        refused(fpt, *arguments, option, "-1")
    refused(fpt, *arguments, "--method", "xx")
    refused(fpt, *arguments, "--compare", "pt,xx")
    refused(fpt, *arguments, "--compare", ",")
    refused(fpt, *arguments, "--target-tokens", "0")
    assert "--compare has no --stages" in refused(fpt, *arguments, "--compare", "pt,cr", "--measure")
    assert "batch=8 is more than train.batch_size=4" in refused(fpt, *arguments, "--stages", "5x24@8:100")
    assert "length=33 is more than data.max_input_tokens=32" in refused(fpt, *arguments, "--stages", "5x24@4x33:100")
    refused(fpt, *arguments, "--stacks", "middle")
    refused(fpt, "plan", "--model", tmp_path / "none")


def test_plan_of_a_prompt_after_the_text(fpt):
    arguments = ("plan", "--model", toy().llama, "--method", "pt", "--steps", "9", "--input-tokens", "32")
    found = only_json(fpt(*arguments, "--placement", "suffix", "--examples", "500", "--json")[0])
    texts = found["text_cache"]
    assert (
        texts["bytes"] == 500 * texts["bytes_per_example"] == 500 * 32 * 5 * 2 * 8 * 2
    )  # layers, k and v, width, bf16
    assert texts["warm"] == pytest.approx(found["relative_flops"])
    assert texts["warm"] < texts["cold"] < 1
    out, _ = fpt(*arguments, "--placement", "suffix")
    assert "MiB an example" in out
    within = only_json(fpt(*arguments, "--placement", "infix", "--after-tokens", "8", "--json")[0])
    assert texts["warm"] < within["text_cache"]["warm"] < within["text_cache"]["cold"] < 1
    assert within["text_cache"]["bytes_per_example"] == texts["bytes_per_example"] * 24 / 32
    steps = [plan["stages"][0] for plan in (within, found)]  # relative to the same step with the prompt in front
    assert len({round(s["flops_per_step"] / s["relative_flops"]) for s in steps}) == 1
    for wrong in (("infix",), ("infix", "--after-tokens", "32"), ("suffix", "--after-tokens", "8")):
        assert "from 1 to 31, below --input-tokens" in refused(fpt, *arguments, "--placement", *wrong)
    t5 = ("plan", "--model", toy().t5, "--method", "pt", "--steps", "9", "--input-tokens", "32")
    assert "decoder-only" in refused(fpt, *t5, "--placement", "infix", "--after-tokens", "8")
    found = only_json(fpt(*t5, "--placement", "suffix", "--json")[0])
    encoder, cross = found["text_cache"], found["text_cache_cross_attention"]
    assert cross["warm"] < encoder["warm"]
    assert cross["bytes"] > 2 * encoder["bytes"]
    assert "with cache.cross_attention: true" in fpt(*t5, "--placement", "suffix")[0]
    assert "cross_attention" not in out
    assert "prompt.placement='behind'" in refused(fpt, *arguments, "--placement", "behind")
    assert "--measure" in refused(fpt, *arguments, "--placement", "suffix", "--measure")
    assert "examples=0" in refused(fpt, *arguments, "--placement", "suffix", "--examples", "0")


def test_prompts_before_and_after_the_text_side_by_side(fpt, tmp_path):
    for placement in ("prefix", "suffix", "infix"):
        recipe = toy().write_recipe(
            tmp_path / f"{placement}.yaml", tmp_path / placement, method="pt", prompt__placement=placement
        )
        fpt("train", "--config", recipe, "--set", "train.steps=4")
    runs = [tmp_path / "prefix", tmp_path / "suffix", tmp_path / "infix"]
    record = only_json(fpt("eval", *runs, "--json")[0])["results"]
    for folder in runs:
        saved = json.loads((folder / "result.json").read_text())
        assert record[str(folder)]["metrics"] == pytest.approx(saved["metrics"])
    assert "stand in one place" in refused(fpt, "eval", *runs, "--ensemble", "votes")
    for folder in runs:
        assert fpt("predict", folder, "goal match team")[0].strip() in ("sport", "business")
    out, _ = fpt("export", runs[1], tmp_path / "after.safetensors")
    assert "after the input" in out


def test_plan_measures(fpt, monkeypatch):
    monkeypatch.setattr("fast_prompt_tuning.cost.timing.time_steps", lambda model, jobs, **_: [[0.1] for _ in jobs])
    out, _ = fpt(
        "plan", "--model", toy().llama, "--steps", "10", "--input-tokens", "8", "--batch-size", "1", "--measure"
    )
    assert "s/step" in out


@pytest.mark.parametrize(
    ("table", "paper"), [("table1", [30, 54, 77, 58, 72, 86, 20, 40, 66]), ("table2", [72, 83, 65])]
)
def test_reproduce(fpt, table, paper):
    rows = only_json(fpt("reproduce", table, "--json")[0])["rows"]
    assert [row["paper_flops"] for row in rows] == paper
    for row in rows:
        assert row["flops_linear"] == pytest.approx(row["paper_flops"], abs=1.5)
    assert "paper flops" in fpt("reproduce", table)[0]


def test_reproduce_refuses(fpt):
    assert "table1 or table2" in refused(fpt, "reproduce", "table3")
    assert "or all" in refused(fpt, "reproduce", "table1", "--columns", "accuracy")
    assert "--model" in refused(fpt, "reproduce", "table1", "--columns", "all")
    assert "large or xl" in refused(fpt, "reproduce", "table1", "--plm", "small")
    assert "--scale" in refused(fpt, "reproduce", "table1", "--columns", "wallclock", "--scale", "big")
    refused(fpt, "reproduce", "table1", "--plm", "small")
    assert "names no task" in refused(
        fpt, "reproduce", "table2", "--columns", "all", "--model", toy().t5, "--tasks", ",", "--data", toy().folder
    )


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path):
    """Spoiled copies of what a run needs."""
    import shutil

    for name, lost in (("weights", ["model.safetensors"]), ("tokenizer", ["tokenizer.json", "tokenizer_config.json"])):
        shutil.copytree(toy().llama, tmp_path / name)
        for file in lost:
            (tmp_path / name / file).unlink()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "sport"}\n{"text": "b" "label"\n')
    (tmp_path / "label.jsonl").write_text('{"text": "a", "label": "weather"}\n')
    (tmp_path / "field.jsonl").write_text('{"body": "a", "label": "sport"}\n')
    (tmp_path / "garbage.yaml").write_text("a: [")
    shutil.copytree(toy().llama, tmp_path / "other_tokenizer")
    table = json.loads((tmp_path / "other_tokenizer" / "tokenizer.json").read_text())
    table["model"]["vocab"] |= {"the": 5000}
    (tmp_path / "other_tokenizer" / "tokenizer.json").write_text(json.dumps(table))
    return tmp_path


BAD = {
    "no weights": ("model.path=weights", "model.safetensors"),
    "no tokenizer": ("model.path=tokenizer", "tokenizer"),
    "no model": ("model.path=none", "none"),
    "empty data": ("data.files.train=empty.jsonl", "empty.jsonl: the file is empty"),
    "malformed data": ("data.files.train=broken.jsonl", "broken.jsonl:2: "),
    "unknown label": ("data.files.train=label.jsonl", "weather"),
    "missing field": ("data.files.train=field.jsonl", "field.jsonl:1: field 'text' is missing"),
    "long prompt": ("prompt.tokens=60", "this model has 64"),
    "unknown key": ("train.step=5", "did you mean 'steps'"),
    "wrong kind": ("train.steps=soon", "train.steps='soon'"),
    "too few steps": ("train.steps=2", "steps"),
    "unknown task": ("data.task=bbc_topic", "bbc_topics"),
    "task file": ("data.task=garbage.yaml", "garbage.yaml"),
    "no scores": ("scoring.path=none.safetensors", "none.safetensors"),
    "no prompt": ("prompt={init: prompt, path: none, tokens: 3}", "not a saved soft prompt"),
    "not key=value": ("train.steps", "is not key=value"),
    "device": ("model.device=abacus", "abacus"),
    "no such GPU": ("model.device=cuda:99", "model.device='cuda:99' cannot be used here"),
    "no folder": ("model.path=./none", "/none' does not exist; give the place of the model with --set model.path"),
    "no hub": ("model.path=nobody/nothing", "model='nobody/nothing' cannot be loaded: We couldn't connect"),
    "ids": ("model.path=other_tokenizer", "its tokenizer makes the id 5000 ('the'), and the model has"),
    "large rate": ("optim.lr=1e39", "optim.lr=1e+39 is no number that float32 can hold"),
    "small rate": ("optim.lr=1e-50", "optim.lr=1e-50 is no number that float32 can hold"),
    "no data": (
        "data.files.train=none.jsonl",
        "none.jsonl: no such file; give the right one with --set data.files",
    ),
    "no task file": ("data.task=none.yaml", "none.yaml' cannot be read: No such file or directory; give the right one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(fpt, bad, monkeypatch, name):
    monkeypatch.chdir(bad)
    override, said = BAD[name]
    good = str(toy().folder / "validation.jsonl")
    recipe = toy().write_recipe(bad / "r.yaml", bad / "run")
    sets = ["--set", f"data.files.validation={good}"] if "files" in override else []
    before = {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()}
    assert said in refused(fpt, "train", "--config", recipe, *sets, "--set", override)
    assert {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()} == before
    assert not (bad / "run").exists()


def test_bad_folders_and_files(fpt, made, tmp_path):
    recipe = made / "topics.yaml"
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert "holds a run already" in refused(fpt, "train", "--config", recipe)
    assert "recipe has changed" in refused(fpt, "train", "--config", recipe, "--resume", "--set", "train.steps=20")
    assert "exclude each other" in refused(fpt, "train", "--config", recipe, "--resume", "--overwrite")
    refused(fpt, "train", "--config", recipe, "--overwrite", "--set", "model.path=/nowhere")
    assert {p: p.read_bytes() for p in made.rglob("*") if p.is_file()} == before
    assert "cannot be read" in refused(fpt, "train", "--config", tmp_path / "none.yaml")
    assert "not the folder of a run" in refused(fpt, "eval", tmp_path)
    assert "not the folder of a run" in refused(fpt, "predict", tmp_path, "text")
    assert "validatoin" in refused(fpt, "eval", made / "topics", "--split", "validatoin")
    inside = recipe / "p.jsonl"  # a file is no folder
    assert "is no folder" in refused(fpt, "eval", made / "topics", "--output", inside)
    assert "is no folder" in refused(fpt, "score", "--config", recipe, "--output", inside)
    assert "no submission format" in refused(fpt, "eval", made / "topics", "--submission", tmp_path / "answers.tsv")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.html").write_text("mine")
    assert "holds a report.html already" in refused(fpt, "demo", "--output", tmp_path / "demo")


def test_a_home_folder_is_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load(toy().recipe(Path("~/run"), model__path="~/model"))
    assert (settings.output, settings.model.path) == (str(tmp_path / "run"), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"cache\.folder=.* lies inside output"):
        load(toy().recipe(Path("~/run"), cache__folder=f"{tmp_path}/run/texts"))


def test_lines_of_a_file_with_a_byte_order_mark(fpt, made, tmp_path):
    line = json.dumps({"text": "the ball"}) + "\n"
    (tmp_path / "lines.jsonl").write_text("\ufeff" + line + line, encoding="utf-8")
    out, _ = fpt("predict", made / "topics", "--file", tmp_path / "lines.jsonl", "--json")
    one, other = map(json.loads, out.splitlines())
    assert one == other


def test_usage(fpt):
    assert "--config" in refused(fpt, "train")
    assert "No such command" in refused(fpt, "trian")
    assert "No such option" in refused(fpt, "ls", "--nothing")
    assert "fpt demo" in fpt("--help")[0]
    out, _ = fpt(code=2)
    assert "Usage" in out


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(fpt, tmp_path, monkeypatch):
    from fast_prompt_tuning.prompt import front

    bad = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(front, "label_loss", lambda *_, **__: bad * 1)
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    _, err = fpt("train", "--config", recipe, code=1)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "lower optim.lr" in line
    assert str(tmp_path / "run" / "prompt") in line
    assert (tmp_path / "run" / "prompt" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(fpt, tmp_path, monkeypatch, number):
    from fast_prompt_tuning.prompt import front

    inner, calls = front.label_loss, []

    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    monkeypatch.setattr(front, "label_loss", loss)
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    out, _ = fpt("train", "--config", recipe, code=128 + number)
    assert "--resume" in out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3
    record = only_json(fpt("train", "--config", recipe, "--resume", "--json")[0])
    assert record["status"] == "finished"


def test_other_ends(fpt, monkeypatch):
    for error, code in ((KeyboardInterrupt(), 130), (RuntimeError("odd [thing]"), 70)):

        def fail(error=error):
            raise error

        monkeypatch.setattr(catalog, "_task_lines", fail)
        _, err = fpt("ls", "tasks", code=code)
        assert ("odd [thing]" in err) == (code == 70)
        assert "Traceback" not in err


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_a_real_process(made):
    command = [sys.executable, "-m", "fast_prompt_tuning", "predict", str(made / "topics")]
    done = subprocess.run(command, input="the ball\nthe bank\n", capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def test_a_real_ctrl_c(tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", train__steps=100_000, train__eval_every=50_000)
    command = [sys.executable, "-m", "fast_prompt_tuning", "train", "--config", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        log = tmp_path / "run" / "log.jsonl"
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not (log.is_file() and log.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume" in out
    assert list((tmp_path / "run" / "checkpoints").iterdir())


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo(fpt, tmp_path, monkeypatch):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "unused", train__steps=5)
    monkeypatch.setattr(demo, "RECIPE", str(recipe))
    out, _ = fpt("demo", "--output", tmp_path / "demo")
    for said in (
        "zero-shot",
        "plain PT",
        "FPT-CR",
        "names no method takes auto",
        "95% range",
        "predicted",
        "prompt ",
    ):
        assert said in out
    record = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert list(record["runs"]) == ["zero_shot", "plain", "cr", "auto"]
    for run in record["runs"].values():
        assert run["metric"] == "accuracy"
        assert {"value", "interval", "flops", "seconds", "flops_eval"} <= set(run)
    assert record["runs"]["plain"]["relative_flops"] == 1
    assert (tmp_path / "demo" / "quality.png").stat().st_size > 5000
    assert "zero-shot" in (tmp_path / "demo" / "report.html").read_text()
    assert os.path.isdir(record["prompt_folder"])
    assert "--overwrite" in refused(fpt, "demo", "--output", tmp_path / "demo")
    out, _ = fpt("demo", "--output", tmp_path / "demo", "--overwrite", "--json")
    assert list(only_json(out)["runs"]) == list(record["runs"])


def test_an_interrupted_demo(fpt, tmp_path, monkeypatch):
    from fast_prompt_tuning.prompt import front

    inner, calls = front.label_loss, []

    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:  # in the second run
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*args, **kwargs)

    monkeypatch.setattr(front, "label_loss", loss)
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "unused", train__steps=5)
    monkeypatch.setattr(demo, "RECIPE", str(recipe))
    out, _ = fpt("demo", "--output", tmp_path / "demo", code=130)
    assert "FPT-CR (interrupted)" in out


def test_a_run_of_all_weights_is_scored_and_answers(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", method="full", optim__lr=0.001)
    out, _ = fpt("train", "--config", recipe, "--set", "train.steps=4")
    assert f"next: fpt eval {tmp_path / 'run'} --zero-shot, or fpt predict {tmp_path / 'run'} 'some text'" in out
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    out, _ = fpt("eval", tmp_path / "run", "--json")
    assert only_json(out)["results"][str(tmp_path / "run")]["metrics"] == saved["metrics"]
    out, _ = fpt("predict", tmp_path / "run", "goal match team")
    assert out.strip() in ("sport", "business")
