"""Conversations: what templates see of them, and a run on them from a file to an answer."""

from __future__ import annotations

import json

import pytest
import toy as toys
import yaml
from toy import articles, toy

from fast_prompt_tuning.data.chat import turns
from fast_prompt_tuning.data.encoding import encode
from fast_prompt_tuning.data.readers import load_examples, render_rows
from fast_prompt_tuning.data.task_files import load_task
from fast_prompt_tuning.errors import ConfigError, DataError
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
STRIPS = PLAIN.replace("m.content", "m.content | trim")
REFUSES = "{{ raise_exception('no system turns here') }}"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chatty(template=PLAIN):
    made = toys.tokenizer(eos=False)
    made.chat_template, made.bos_token = template, "<s>"
    return made


SYSTEM = {"role": "system", "content": "be brief"}
TALK = [SYSTEM, user("the news"), assistant("old"), user(" ball goal "), assistant("sport")]


@pytest.mark.parametrize("template", [PLAIN, STRIPS], ids=["as it is", "stripped"])
def test_a_conversation_is_what_the_chat_template_writes(template):
    found = turns(TALK, chatty(template))
    whole = chatty(template).apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert found["before"] + found["user"] + found["after"] == whole
    assert found["user"].strip() == "ball goal"
    assert found["after"] == (" </s>\n<|assistant|> ")
    assert found["assistant"] == "sport"
    assert "assistant" not in turns(TALK[:-1], chatty(template))


def test_a_turn_that_stands_twice_is_cut_nowhere():
    """A template that repeats what was said: nothing in particular may be shortened, and nothing is lost."""
    twice = PLAIN + "{{ messages[-1].content }}"
    found = turns([user("goal")], chatty(twice))
    assert (found["before"], found["after"]) == ("", "")
    assert found["user"] == "<s><|user|> goal </s>\n<|assistant|> goal"


def test_one_beginning_of_a_text_whoever_adds_it():
    from tokenizers import processors

    made = chatty()
    assert turns([user("goal")], made)["before"].startswith("<s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    assert turns([user("goal")], made)["before"].startswith("<|user|>")
    rows = render_rows(load_task("chat"), [{"messages": [user("goal")]}], decoder=True, tokenizer=made)
    (row,) = encode(rows, made, decoder=True, max_input_tokens=40, max_target_tokens=4)
    assert row["input_ids"].count(made.bos_token_id) == 1


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "a list of turns with role and content, not None"),
        ([], "a list of turns"),
        ([assistant("a")], "ends with a turn of the user"),
        ([user("a"), SYSTEM], "ends with a turn of the user"),
        ([user("a"), assistant("b"), assistant("c")], "ends with a turn of the user"),
        (["hello"], "turn 0 of the conversation is 'hello'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "needs role and content, both texts"),
    ],
)
def test_what_is_no_conversation_is_a_bad_row(messages, said):
    with pytest.raises(DataError, match=said):
        turns(messages, chatty())


def test_what_a_template_refuses_and_a_model_without_one():
    with pytest.raises(DataError, match="refuses the conversation: no system turns here"):
        turns(TALK, chatty(REFUSES))
    with pytest.raises(ConfigError, match="no chat template"):
        turns(TALK, toys.tokenizer(eos=False))
    with pytest.raises(ConfigError, match="name a model with a chat template"):
        render_rows(load_task("chat"), [{"messages": TALK}], decoder=True)


def test_a_long_turn_loses_its_end_and_the_template_nothing():
    made = chatty()
    long = [SYSTEM, user("ball " * 50), assistant("sport")]
    (row,) = encode(
        render_rows(load_task("chat"), [{"messages": long}], decoder=True, split="train", tokenizer=made),
        made,
        decoder=True,
        max_input_tokens=30,
        max_target_tokens=4,
    )
    text = made.decode(row["input_ids"][:30])
    assert len(row["input_ids"]) == 30 + row["n_target"]
    assert text.startswith(made.decode(made("<s><|system|> be brief")["input_ids"]))
    assert text.endswith(made.decode(made("ball </s>\n<|assistant|> ")["input_ids"]))


def write(path, number, seed):
    asked = [{"messages": [SYSTEM, user(row["text"]), assistant(row["label"])]} for row in articles(number, seed=seed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


@pytest.fixture
def model(tmp_path):
    """The toy model with a chat template beside it."""
    from shutil import copytree

    folder = copytree(toy().llama, tmp_path / "model")
    chatty().save_pretrained(folder)
    return folder


def test_from_a_file_of_conversations_to_an_answer(fpt, model, tmp_path):
    file = write(tmp_path / "chats.jsonl", 60, 0)
    out, _ = fpt("init", file, "-o", tmp_path / "made", "--model", model)
    assert "conversations; the last answer is learned" in out
    recipe = yaml.safe_load((tmp_path / "made" / "recipe.yaml").read_text())
    assert recipe["data"]["task"] == "chat"
    assert "input_template" not in recipe["data"]
    assert recipe["data"]["max_target_tokens"] == 3
    changes = [f"--set={each}" for each in ("train.steps=3", "model.dtype=float32", "prompt.tokens=3")]
    fpt("train", "-c", tmp_path / "made" / "recipe.yaml", *changes)
    ran = tmp_path / "made" / "run"
    asked = [user("ball goal"), assistant("sport"), user("bank")]
    lines = ["ball goal team", json.dumps({"messages": asked})]
    out, _ = fpt("predict", ran, *lines, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [row["input"] for row in answers] == lines
    shown, _ = fpt("show", "task", "chat", "--model", model, "--file", file, "--json")
    (first, *_) = json.loads(shown)["examples"]
    assert first["input"].endswith("</s>\n<|assistant|> ")


def test_a_prompt_after_a_conversation_stands_before_the_answer(model, tmp_path):
    """Within the text: between what the user says and the template's own words that follow."""
    file = write(tmp_path / "chats.jsonl", 40, 0)
    data = {"task": "chat", "files": {"train": str(file), "validation": str(file)}, "validation_limit": 8}
    settings = toy().recipe(tmp_path / "run", method="auto", train__steps=3)
    settings["model"]["path"], settings["data"] = str(model), {**data, "max_input_tokens": 32, "max_target_tokens": 4}
    config = load(settings)
    assert run.train(config).examples == 8
    rows = load_examples(load_task("chat"), "train", decoder=True, files=data["files"], tokenizer=chatty())
    (row,) = encode(rows.select([0]), chatty(), decoder=True, max_input_tokens=32, max_target_tokens=4)
    assert row["n_tail"] == len(chatty()(" </s>\n<|assistant|> ")["input_ids"])
