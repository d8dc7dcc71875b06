"""What the line of a command may say: options of every command, runs by their folders, paths, plans of recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy import toy

from fast_prompt_tuning import __version__
from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.report import hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on the tiny Llama."""
    folder = tmp_path_factory.mktemp("line")
    recipe = toy().write_recipe(folder / "r.yaml", folder / "run", method="pt", train__steps=4)
    with pytest.raises(SystemExit) as stop:
        cli.main(["-q", "train", "--config", str(recipe)])
    assert stop.value.code == 0
    return folder / "run"


def said(fpt, *line) -> str:
    """The one line of a refusal."""
    _, err = fpt(*line, code=2)
    (found,) = [text for text in err.splitlines() if text.startswith("error:")]
    return found


# -- options that every command has ------------------------------------------------------------------------------------


def test_the_version(fpt):
    assert fpt("--version")[0] == f"{__version__}\n"


def test_help_waits_for_no_library():
    lines = [["--help"], *([name, "--help"] for name in cli.COMMANDS)]
    code = (
        f"import sys\nfrom fast_prompt_tuning.cli.app import main\nfor line in {lines!r}:\n"
        "    try:\n        main(line)\n    except SystemExit as stop:\n        assert stop.code == 0\n"
        "print(*({'torch', 'transformers', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    for option in ("--debug", "--quiet", "--json"):
        assert done.stdout.count(option) >= len(lines)


def test_options_stand_anywhere(fpt):
    wanted = json.loads(fpt("ls", "tasks", "--json")[0])
    for line in (["--json", "ls", "tasks"], ["ls", "--json", "tasks"], ["-q", "ls", "tasks", "--json"]):
        assert json.loads(fpt(*line)[0]) == wanted
    assert "{" not in fpt("ls", "tasks")[0]  # of one line, not of the next
    for line in (["--debug", "ls", "nothing"], ["ls", "nothing", "--debug"]):
        with pytest.raises(ValueError, match="is unknown"):
            cli.main(line)


def test_quiet_behind_the_command(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", method="pt", train__steps=2)
    out, _ = fpt("train", "-c", recipe, "--quiet")
    assert "step" not in out
    assert "accuracy" in out


def test_json_of_commands_that_had_none(fpt, made, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "push_prompt", lambda folder, repo, private: f"https://hub/{repo}")
    assert json.loads(fpt("push", made, "me/mine", "--upload", "--json")[0]) == {"address": "https://hub/me/mine"}
    found = json.loads(fpt("export", made, tmp_path / "p.safetensors", "--json")[0])
    assert (found["output"], found["shape"]) == (str(tmp_path / "p.safetensors"), [3, 16])
    assert json.loads(fpt("show", "recipe", "t5_paper_large", "--json")[0])["optim"]["optimizer"] == "adafactor"
    found = json.loads(fpt("show", "task", toy().topics, "--json")[0])
    assert len(found["examples"]) == 3
    assert found["counted"] == 60
    assert found["words"]["input"]["5%"] <= found["words"]["input"]["longest"]


# -- runs by their folders ---------------------------------------------------------------------------------------------


def test_a_prompt_is_named_by_its_run(fpt, made, tmp_path):
    runs = []
    for name, path in (("of_run", made), ("of_prompt", made / "prompt")):
        prompt = {"init": "prompt", "path": str(path), "tokens": 3}
        recipe = toy().write_recipe(tmp_path / f"{name}.yaml", tmp_path / name, method="pt", prompt=prompt)
        fpt("-q", "train", "-c", recipe, "--set", "train.steps=1")
        runs.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert runs[0]["losses"] == runs[1]["losses"]
    again = ("train", "-c", tmp_path / "of_run.yaml", "--set", f"prompt.path={tmp_path / 'of_run'}", "--overwrite")
    assert "lies in the run that would be overwritten" in said(fpt, *again)
    assert (tmp_path / "of_run" / "prompt").is_dir()


def test_a_file_and_texts_exclude_each_other(fpt, made, tmp_path):
    (tmp_path / "in.txt").write_text("the ball\n")
    assert "exclude each other" in said(fpt, "predict", made, "the bank", "--file", tmp_path / "in.txt")


def test_an_ensemble_is_checked_before_a_model_is_loaded(fpt, made, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("fast_prompt_tuning.run.session.open_session", never)

    def copy(name, **changes):
        shutil.copytree(made, tmp_path / name)
        (tmp_path / name / "result.json").unlink()
        settings = yaml.safe_load((made / "config.yaml").read_text())
        for section, values in changes.items():
            settings[section] |= values
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path / name

    both = ("--ensemble", "votes")
    assert "--ensemble 'odd' is unknown" in said(fpt, "eval", made, made, "--ensemble", "odd")
    assert "not a saved soft prompt" in said(fpt, "eval", made, tmp_path / "none", *both)
    assert "of one model" in said(fpt, "eval", made, copy("model", model={"path": str(toy().t5)}), *both)
    other = copy("task", data={"task": str(toy().words)})
    assert "of one task" in said(fpt, "eval", made, other / "prompt", *both)
    assert "has none; use votes" in said(fpt, "eval", other, made, "--ensemble", "probabilities")


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A folder with a recipe, its model and its data, all named relative to it."""
    folder = tmp_path / "project"
    shutil.copytree(toy().llama, folder / "models" / "llama")
    for file in ("topics.yaml", "train.jsonl", "validation.jsonl", "test.jsonl"):
        shutil.copy(toy().folder / file, folder / file)
    settings = toy().recipe(Path("runs/one"), method="pt", model__path="models/llama", data__task="topics.yaml")
    settings["train"]["steps"] = 2
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_run_is_found_from_anywhere(fpt, project, tmp_path, monkeypatch):
    monkeypatch.chdir(project.parent)
    fpt("-q", "train", "-c", "project/recipe.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out, _ = fpt("eval", "../project/runs/one", "--json")
    saved = json.loads((project / "runs" / "one" / "result.json").read_text())
    assert json.loads(out)["results"]["../project/runs/one"]["metrics"] == saved["metrics"]
    assert fpt("predict", "../project/runs/one", "the ball")[0].strip() in ("sport", "business")


def test_a_run_whose_things_have_moved_says_which(fpt, project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    fpt("-q", "train", "-c", "recipe.yaml")
    (project / "models").rename(tmp_path / "weights")
    missing = said(fpt, "eval", "runs/one")
    assert f"model.path='{project}/models/llama' does not exist" in missing
    assert "--set model.path=" in missing
    anew = ["--set", "model.path=../weights/llama"]
    (project / "validation.jsonl").rename(tmp_path / "v.jsonl")
    missing = said(fpt, "eval", "runs/one", *anew)
    assert f"{project}/validation.jsonl: no such file" in missing
    assert "--set data.files.validation=" in missing
    anew += ["--set", "data.files.validation=../v.jsonl"]
    assert "accuracy" in fpt("eval", "runs/one", *anew)[0]
    (project / "topics.yaml").rename(tmp_path / "t.yaml")
    missing = said(fpt, "predict", "runs/one", "the ball", *anew)
    assert f"{project}/topics.yaml' cannot be read: No such file" in missing
    assert "--set data.task=" in missing
    assert fpt("predict", "runs/one", "the ball", *anew, "--set", "data.task=../t.yaml")[0]


# -- plans of recipes --------------------------------------------------------------------------------------------------


def test_a_plan_of_a_recipe(fpt, tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    found = json.loads(fpt("plan", "-c", recipe, "--json")[0])
    assert [s["steps"] for s in found["stages"]] == [2, 2, 2, 4]
    options = ["--steps", 10, "--batch-size", 4, "--input-tokens", 16, "--prompt-tokens", 3, "--target-tokens", 4]
    same = ("plan", "--model", toy().llama, "--method", "cr", *options, "--dtype", "float32", "--json")
    assert json.loads(fpt(*same)[0]) == found
    twice = json.loads(fpt("plan", "-c", recipe, "--set", "train.accumulate=2", "--json")[0])
    assert twice["relative_flops"] == found["relative_flops"]
    assert [s["flops"] for s in twice["stages"]] == [2 * s["flops"] for s in found["stages"]]
    other = json.loads(fpt("plan", "-c", recipe, "--method", "pt", "--batch-size", 8, "--json")[0])
    assert [s["steps"] for s in other["stages"]] == [10]
    assert other["stages"][0]["flops_per_step"] == pytest.approx(2 * found["stages"][-1]["flops_per_step"], rel=0.01)
    own = toy().write_recipe(
        tmp_path / "o.yaml", tmp_path / "o", stages=[{"layers": 2, "ffn": 12, "steps": 4}, {"batch": 2, "steps": 6}]
    )
    found = json.loads(fpt("plan", "-c", own, "--json")[0])["stages"]
    assert [(s["layers"], s["ffn"], s.get("batch"), s["steps"]) for s in found] == [(2, 12, None, 4), (5, 24, 2, 6)]
    assert set(json.loads(fpt("plan", "-c", own, "--compare", "pt,auto", "--json")[0])) == {"pt", "auto"}
    assert "auto" in fpt("plan", "-c", own, "--compare", "pt,auto")[0]
    assert "give --model, or a recipe" in said(fpt, "plan")
    assert "method='full'" in said(fpt, "plan", "-c", recipe, "--set", "method=full")


def test_a_plan_has_the_recipes_defaults(fpt, tmp_path):
    settings = {"model": {"path": str(toy().llama)}, "data": {"task": "mnli"}, "train": {"steps": 30000}, "output": "o"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    plain = json.loads(fpt("plan", "--model", toy().llama, "--task", "mnli", "--json")[0])
    assert plain == json.loads(fpt("plan", "-c", tmp_path / "r.yaml", "--json")[0])
    assert "batches of 16 × (20 + 492) tokens" in fpt("plan", "--model", toy().llama)[0]


def test_no_librarys_bar_is_in_a_log():
    script = """
from fast_prompt_tuning.cli.console import command

def bars():
    from tqdm.auto import tqdm
    print(sum(tqdm(range(3))))

command(bars)(debug=False, quiet=False, as_json=False)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("3\n", "")


def test_what_is_logged_goes_to_a_bar_that_stands_in_for_standard_error():
    script = """
import io, logging, sys
from fast_prompt_tuning.cli.console import command

def warns():
    before, sys.stderr = sys.stderr, io.StringIO()
    logging.getLogger("any").warning("careful")
    print(sys.stderr.getvalue(), end="")
    sys.stderr = before

command(warns)(debug=False, quiet=False, as_json=False)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("WARNING careful\n", "")


def test_auto_says_what_it_chose_unless_quiet(fpt, tmp_path):
    settings = {"model": {"path": str(toy().llama)}, "data": {"task": str(toy().topics), "max_input_tokens": 16},
                "train": {"steps": 4, "batch_size": 4}, "output": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    command = [
        sys.executable,
        "-m",
        "fast_prompt_tuning",
        "train",
        "-c",
        str(tmp_path / "r.yaml"),
        "--overwrite",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "INFO auto: the prompt stands after each text" in said
    assert said.count("INFO auto: Prodigy finds the learning rate") == 1
    assert subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=True).stderr == ""


def test_several_runs_answer_a_text_that_is_read_once(fpt, tmp_path, monkeypatch, caplog):
    from fast_prompt_tuning.prompt.text_cache import TextCache

    runs = {}
    kinds = {"a": ("topics", "infix"), "b": ("words", "infix"), "c": ("topics", "suffix"), "d": ("topics", "infix")}
    for seed, (name, (task, place)) in enumerate(kinds.items()):
        runs[name] = tmp_path / name
        changes = {"data__task": str(getattr(toy(), task)), "prompt__placement": place, "method": "pt"}
        changes |= {"train__seed": seed, "train__steps": 40}
        fpt("train", "-c", toy().write_recipe(tmp_path / f"{name}.yaml", runs[name], **changes))
    texts = ["goal match team", "profit market bank shares"]
    alone = {name: fpt("predict", run, *texts)[0].splitlines() for name, run in runs.items()}
    read, put = [], TextCache.put
    monkeypatch.setattr(TextCache, "put", lambda self, *rest: (read.append(1), put(self, *rest)))
    out, _ = fpt("predict", runs["a"], "--also", runs["b"], "--also", runs["d"], *texts)
    assert out.splitlines() == [f"{runs[name]}\t{alone[name][i]}" for i in range(2) for name in "abd"]
    assert len(read) == len(texts)
    assert "read more than once" not in caplog.text
    lines = fpt("predict", runs["a"], "--also", runs["c"], *texts, "--json")[0].splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["prediction"] for r in records] == [alone[name][i] for i in range(2) for name in "ac"]
    assert [r["run"] for r in records] == [str(runs["a"]), str(runs["c"])] * 2
    assert "2 texts were read more than once" in caplog.text
    apart = {name: json.loads(fpt("eval", runs[name], "--json")[0])["results"][str(runs[name])] for name in "ab"}
    read.clear()
    out, err = fpt("eval", runs["a"], "--also", runs["b"], "--json")
    together = json.loads(out)["results"]
    assert [together[str(runs[name])]["task"] for name in "ab"] == ["topics", "words"]
    assert [together[str(runs[name])]["metrics"] for name in "ab"] == [apart[name]["metrics"] for name in "ab"]
    assert len(read) == 12
    assert "24 examples have 12 different texts before their prompts" in err
    assert "leave out --submission, --ensemble" in said(
        fpt, "eval", runs["a"], "--also", runs["b"], "--partial", "2x10"
    )
    other = tmp_path / "other"
    fpt("train", "-c", toy().write_recipe(tmp_path / "o.yaml", other, model__path=str(toy().t5), method="pt"))
    assert "--also needs prompts of one model" in said(fpt, "predict", runs["a"], "--also", other, "goal")
