"""`eval.labels: text`: a label counts where the model writes exactly it, as in the paper."""

from __future__ import annotations

import pytest
import torch
import yaml
from prompted import generate
from toy import recipe, toy

from fast_prompt_tuning.cost.work import Work
from fast_prompt_tuning.errors import ConfigError, DataError
from fast_prompt_tuning.prompt.prediction import Prediction
from fast_prompt_tuning.prompt.prompted import PromptedPLM
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import evaluate, input_ids_of, open_session


def opened(folder, model="t5", **changes):
    changes = {"model__path": str(toy().model(model)), "eval__labels": "text", **changes}
    return open_session(recipe(folder / "run", **changes), ("validation",))


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_answers_are_what_the_model_writes(tmp_path, model):
    session = opened(tmp_path, model)
    found = evaluate(session, session.prompted(None))
    inputs = input_ids_of(session, session.encoded["validation"])
    texts = generate(session.plm, session.tokenizer, None, inputs, max_new_tokens=4, stop_at_newline=model == "llama")
    assert [p.text for p in found.predictions] == [p.text for p in texts]
    assert all(p.label_scores is None for p in found.predictions)
    other = opened(tmp_path, model, eval__labels="likelihood")
    likely = evaluate(other, other.prompted(None))
    assert set(likely.answers) <= {"sport", "business"}
    assert found.flops != likely.flops


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_label_is_right_where_its_target_or_word_is_written_exactly(tmp_path, model, monkeypatch):
    task = {**yaml.safe_load(toy().topics.read_text()), "target_template": "<extra_id_0> of {{ label }}"}
    task["decoder"]["target_template"] = " of {{ label }}"
    task["source"]["files"] = {k: str(toy().folder / v) for k, v in task["source"]["files"].items()}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    session = opened(tmp_path, model, data__task=str(tmp_path / "task.yaml"))
    labels = session.examples["validation"]["label"]
    right = [f"of {label}" for label in labels]
    written = [*right[:9], labels[9], right[10] + " news", right[11].upper()]
    monkeypatch.setattr(PromptedPLM, "generate", lambda *_: ([Prediction(text, 0.0) for text in written], Work()))
    found = evaluate(session, session.prompted(None))
    assert found.answers == [*labels[:10], right[10] + " news", right[11].upper()]
    assert found.result.values["accuracy"] == pytest.approx(100 * 10 / 12)


def test_a_run_and_what_does_not_go_together(tmp_path):
    result = run.train(recipe(tmp_path / "run", method="pt", eval__labels="text", train__steps=4, train__eval_every=2))
    assert result.config["eval"]["labels"] == "text"
    assert 0 <= result.metrics["accuracy"] <= 100
    with pytest.raises(ConfigError, match="length_normalize=True is not used with labels='text'"):
        recipe(tmp_path / "other", eval__labels="text", eval__length_normalize=True)
    session = opened(tmp_path)
    two = torch.zeros(2, 3, session.plm.config.hidden_size)
    with pytest.raises(DataError, match="needs labels; use votes"):
        evaluate(session, session.prompted(two))


@pytest.mark.parametrize("name", ["t5_paper_large", "t5_paper_xl"])
def test_the_papers_recipes_say_so(name):
    found = load(name)
    assert (found.eval.labels, found.train.dropout) == ("text", "off")
