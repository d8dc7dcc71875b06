"""What is said once of settings and data that are allowed and are mostly mistakes."""

from __future__ import annotations

import json

import pytest
from settings import BY_NAME
from toy import recipe, tokenizer, toy

from fast_prompt_tuning.run import run


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "fast_prompt_tuning.run.advice"]


def test_a_usual_run_is_told_nothing(tmp_path, caplog):
    run.train(recipe(tmp_path / "prefix", train__steps=5))
    cache = {"cache__tier": "disk", "cache__folder": str(tmp_path / "texts")}
    run.train(recipe(tmp_path / "suffix", method="pt", prompt__placement="suffix", train__steps=2, **cache))
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("place", "cache", "unused"),
    [
        ("prefix", {"tier": "none"}, "cache.tier='none'"),
        ("suffix", {"tier": "none", "budget_mib": 5}, "cache.budget_mib=5.0"),
        ("suffix", {"folder": "/tmp/texts"}, "cache.folder='/tmp/texts'"),
    ],
)
def test_cache_settings_that_nothing_reads(tmp_path, caplog, place, cache, unused):
    run.train(recipe(tmp_path, method="pt", prompt__placement=place, train__steps=2, cache=cache))
    (line,) = said(caplog)
    assert line.startswith(f"{unused}: not used with prompt.placement={place!r}")


@pytest.mark.parametrize("template", ["{{ text }}\nTopic:", "{{ body or text }}\nTopic:", "Topic:"])
def test_texts_that_are_all_empty_or_all_the_same(tmp_path, caplog, template):
    rows = [{"text": " ", "body": "", "label": label} for label in ("sport", "business") * 4]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "files": {"train": str(tmp_path / "rows.jsonl"), "validation": str(toy().folder / "validation.jsonl")},
        "input_template": template,
        "target_template": " {{ label }}",
        "labels": ["sport", "business"],
        "max_input_tokens": 16,
        "max_target_tokens": 4,
    }
    if "body" in template:  # only one of the two files has it
        data["files"]["validation"] = data["files"]["train"]
    run.train(recipe(tmp_path / "run", method="pt", data=data, train__steps=2))
    assert "all 8 examples of the split 'train' have an empty text" in said(caplog)[0]
    assert len(said(caplog)) == 1 + ("body" in template or template == "Topic:")


@pytest.mark.parametrize(("window", "stages"), [(2, [1, 2, 3, 4]), (4, [1]), (64, [])])
def test_a_stage_whose_prompt_gets_no_gradient(tmp_path, caplog, window, stages):
    """One layer of window w reaches w − 1 tokens back; inputs have six and more behind the prompt."""
    BY_NAME["mistral"].plm(sliding_window=window).save_pretrained(tmp_path / "model")
    tokenizer(eos=False).save_pretrained(tmp_path / "model")
    run.train(recipe(tmp_path / "run", method="ld", model__path=str(tmp_path / "model")))
    lines = said(caplog)
    assert [int(line.split("stage ")[1].split(":")[0]) for line in lines] == stages
    assert all("the prompt gets no gradient" in line for line in lines)
