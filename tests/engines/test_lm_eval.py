"""A run's prompt in lm-evaluation-harness: on the same examples it answers and scores as `fpt` does."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from toy import articles, recipe, toy

from fast_prompt_tuning.engines.lm_eval import PromptedLM
from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.prompt.prompted import Input
from fast_prompt_tuning.prompt.soft_prompt import load_prompt
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.run.session import predict as answers_of

ROWS = articles(12, seed=5)
TASK = {
    "task": "own_topics",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{text}} Topic:",
    "doc_to_choice": ["business", "sport"],
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}],
}


def asked(contexts: list[str], *rest: object) -> list[Instance]:
    return [Instance("x", {}, (context, *rest), 0) for context in contexts]


def tuned(folder: Path, kind: str, placement: str, task: str = "topics") -> Path:
    changes = {"model__path": str(toy().model(kind)), "data__task": str(getattr(toy(), task)), "method": "pt"}
    run.train(recipe(folder / "run", prompt__placement=placement, **changes))
    return folder / "run"


def predicted(folder: Path, rows: list[dict[str, str]]):
    """What `fpt` says of the rows: predictions and answers."""
    from fast_prompt_tuning.data.readers import render_rows
    from fast_prompt_tuning.recipe import settings_of
    from fast_prompt_tuning.run.session import encode_for

    session = open_session(settings_of(folder), ())
    rendered = render_rows(session.task, rows, decoder=session.decoder)
    prompted = session.prompted(load_prompt(folder))
    predictions, answers, _ = answers_of(session, prompted, encode_for(session, rendered))
    return list(rendered["input"]), predictions, answers


@pytest.mark.parametrize(
    ("kind", "placement"),
    [("llama", "prefix"), ("llama", "suffix"), ("llama", "infix"), ("t5", "prefix"), ("t5", "suffix")],
)
def test_log_likelihoods_are_those_of_fpt(kind, placement, tmp_path):
    folder = tuned(tmp_path, kind, placement)
    inputs, predictions, _ = predicted(folder, ROWS)
    tail = (
        {"tail": inputs[0][inputs[0].rindex(ROWS[0]["text"]) + len(ROWS[0]["text"]) :]} if placement == "infix" else {}
    )
    model = PromptedLM(str(folder), batch_size=5, **tail)
    for label in ("business", "sport"):
        target = model.session.task.choices(decoder=model.session.decoder)[label]
        found = model.loglikelihood(asked(inputs, target))
        assert [value for value, _ in found] == pytest.approx([p.label_scores[label] for p in predictions], rel=1e-4)
        single = [model.loglikelihood([each])[0] for each in asked(inputs, target)]
        assert [value for value, _ in single] == pytest.approx([value for value, _ in found], rel=1e-4)


@pytest.mark.parametrize(("kind", "placement"), [("llama", "prefix"), ("llama", "suffix"), ("t5", "prefix")])
def test_greedy_answers_are_those_of_fpt(kind, placement, tmp_path):
    folder = tuned(tmp_path, kind, placement, "words")
    inputs, _, answers = predicted(folder, ROWS)
    model = PromptedLM(str(folder), batch_size=5)
    options = {"until": ["\n"], "max_gen_toks": model.session.max_target_tokens}
    assert model.generate_until(asked(inputs, options)) == answers
    stopped = model.generate_until(asked(inputs, {**options, "until": [answers[0][1:]]}))
    assert stopped[0] == answers[0][:1]


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_the_greedy_target_is_the_likeliest(placement, tmp_path):
    model = PromptedLM(str(tuned(tmp_path, "llama", placement)))
    text, words = [Input([7, 8, 9])], range(model.session.plm.config.vocab_size)
    first = model.prompted.likelihoods(text * len(words), [[w] for w in words], batch_size=64)
    best = max(words, key=lambda w: first[w].value)
    assert [w for w in words if first[w].greedy] == [best]
    second = model.prompted.likelihoods(text * len(words), [[best, w] for w in words], batch_size=64)
    likely = max(words, key=lambda w: second[w].value)
    assert [w for w in words if second[w].greedy] == [likely]
    other = (best + 1) % len(words)
    assert not any(each.greedy for each in model.prompted.likelihoods(text, [[other, likely]]))


def test_a_task_of_local_files_gives_the_accuracy_of_fpt(tmp_path):
    folder = tuned(tmp_path, "llama", "suffix")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    inputs, _, answers = predicted(folder, ROWS)
    task["doc_to_text"] = inputs[0].replace(ROWS[0]["text"], "{{text}}")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate("fpt", f"path={folder}", tasks=["own_topics"], task_manager=manager, bootstrap_iters=0)
    right = sum(answer == row["label"] for answer, row in zip(answers, ROWS, strict=True))
    assert found["results"]["own_topics"]["acc,none"] == pytest.approx(right / len(ROWS))


def test_the_harness_knows_the_model_by_its_command_line():
    command = [sys.executable, "-m", "fast_prompt_tuning.engines.lm_eval", "run", "--model", "fpt", "--model_args"]
    said = subprocess.run([*command, "path=nowhere", "--tasks", "arc_easy"], capture_output=True, text=True)
    assert said.returncode != 0
    assert "this is not the folder of a run" in said.stderr


def test_what_it_cannot_do_is_said(tmp_path):
    model = PromptedLM(str(tuned(tmp_path, "llama", "infix")), tail=" Topic:")
    with pytest.raises(ConfigError, match="is not in the context"):
        model.loglikelihood(asked(["no such words"], " sport"))
    with pytest.raises(ConfigError, match="do_sample: false"):
        model.generate_until(asked(["a Topic:"], {"temperature": 0.7}))
    with pytest.raises(ConfigError, match="perplexity"):
        model.loglikelihood_rolling([])
    with pytest.raises(ConfigError, match="within the text; say with tail"):
        PromptedLM(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="batch_size='auto'"):
        PromptedLM(str(tmp_path / "run"), batch_size="auto")


def test_a_long_context_loses_its_beginning_and_an_empty_one_has_a_start(tmp_path):
    model = PromptedLM(str(tuned(tmp_path, "llama", "prefix")))
    long = " ".join(row["text"] for row in articles(200, seed=1))
    (value, _), (empty, _) = model.loglikelihood([*asked([long], " sport"), *asked([""], " sport")])
    cut = model.loglikelihood(asked([" ".join(long.split()[-(model.room - 1) :])], " sport"))[0]
    assert value == pytest.approx(cut.value if hasattr(cut, "value") else cut[0], rel=1e-4)
    assert empty < 0


def test_the_guides_commands_run(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "lm_eval.md").read_text(encoding="utf-8")
    (task,) = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    (command,) = re.findall(r"^python (-m fast_prompt_tuning.*)$", guide, flags=re.M)
    labels, rows = ("billing", "technical"), articles(6, seed=3)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tickets.yaml").write_text(task)
    lines = (json.dumps({"text": row["text"], "label": labels[i % 2]}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "dev.jsonl").write_text("".join(lines))
    tuned(tmp_path / "runs", "llama", "suffix").rename(tmp_path / "runs" / "mine")
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\|tickets *\|.*\|acc", done.stdout)
