"""`fpt init`: from a file of somebody's own to a recipe that trains."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from toy import FILLER, TOPICS, articles, toy

from fast_prompt_tuning.data.guesses import guess, identifiers
from fast_prompt_tuning.errors import DataError

ROWS = articles(60, seed=3)


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_csv_becomes_a_recipe_that_trains(fpt, tmp_path):
    rows = [{"Ticket": i, "Message text": row["text"], "Support team": row["label"]} for i, row in enumerate(ROWS)]
    made = tmp_path / "made"
    out, _ = fpt("init", table(tmp_path / "tickets.csv", rows), "-o", made, "--model", toy().llama)
    assert "text: 'Message text'; answer: 'Support team', one of 2 labels" in out
    assert f"next: fpt train -c {made / 'recipe.yaml'}" in out
    recipe = yaml.safe_load((made / "recipe.yaml").read_text())
    assert recipe["data"]["input_template"] == "{{ message_text }}\nSupport team:"
    assert sorted(recipe["data"]["labels"]) == sorted(TOPICS)
    parts = [
        [json.loads(line) for line in (made / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "validation")
    ]
    assert (len(parts[0]), len(parts[1])) == (54, 6)
    assert {r["message_text"] for part in parts for r in part} == {r["text"] for r in ROWS}
    fpt("train", "-c", made / "recipe.yaml", "--set", "train.steps=3", "--set", "model.dtype=float32")
    assert (made / "run" / "result.json").is_file()


def test_an_answer_that_is_written_and_a_question_about_the_text(fpt, tmp_path):
    chosen = random.Random(0)
    rows = [
        {"context": row["text"] + " " + " ".join(FILLER[:9]), "question": f"what is number {i}", "answer": f"it is {i}"}
        for i, row in enumerate(chosen.sample(ROWS, 40))
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[:5]), tmp_path / "dev.parquet")
    line = ("init", tmp_path / "rows.parquet", "-o", tmp_path / "made", "--model", toy().llama)
    found = json.loads(fpt(*line, "--validation", tmp_path / "dev.parquet", "--json")[0])
    assert found["data"]["input_template"] == "{{ context }}\nQuestion: {{ question }}\nAnswer:"
    assert found["data"]["target_template"] == " {{ answer }}"
    assert "labels" not in found["data"]
    assert found["left_out"] == 0
    assert len((tmp_path / "made" / "validation.jsonl").read_text().splitlines()) == 5
    assert len(found["examples"]) == 3


def test_what_cannot_be_guessed_is_said_and_nothing_is_made(fpt, tmp_path):
    file = table(tmp_path / "a.csv", [{"left": f"some words {i}", "right": f"other words {i}"} for i in range(20)])
    (tmp_path / "mine").mkdir()
    for line, said in (
        ((file, "-o", tmp_path / "x"), "none of the fields 'left', 'right' looks like an answer"),
        ((file, "-o", tmp_path / "x", "--answer", "middle"), "--answer 'middle' is no field"),
        ((file, "-o", tmp_path / "mine"), "is there already; name a new folder"),
        ((tmp_path / "none.csv", "-o", tmp_path / "x"), "there is no such file"),
    ):
        assert said in fpt("init", *line, code=2)[1]
    assert not (tmp_path / "x").exists()
    assert list((tmp_path / "mine").iterdir()) == []
    fpt("init", file, "-o", tmp_path / "x", "--answer", "right", "--model", toy().llama)


def test_rows_that_lack_a_field_are_left_out(fpt, tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[7]["label"] = ""
    out, _ = fpt("init", table(tmp_path / "a.csv", rows), "-o", tmp_path / "x", "--model", toy().llama)
    assert "1 rows lack what is needed and were left out" in out


names = st.text(min_size=1, max_size=12).filter(str.strip)


@given(st.lists(names, min_size=1, max_size=8, unique=True))
def test_every_field_gets_a_name_of_its_own_for_templates(fields):
    found = identifiers(fields)
    assert list(found) == fields
    assert len(set(found.values())) == len(fields)
    assert all(name.isidentifier() for name in found.values())


cells = st.one_of(st.none(), st.integers(), st.text(max_size=20), st.lists(st.integers(), max_size=2))


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "label", "text"]), cells), max_size=20))
def test_any_rows_give_a_guess_or_one_error(rows):
    try:
        found = guess(rows)
    except DataError:
        return
    assert found.answer not in (found.text, *found.asked)
    assert found.labels is None or 2 <= len(found.labels) <= 20


def test_the_column_of_few_values_is_the_answer():
    rows = [{"body": f"words and words {i}", "kind": "ab"[i % 2], "id": i} for i in range(20)]
    assert guess(rows).answer == "kind"
    assert guess(rows).labels == ("a", "b")
    with pytest.raises(DataError, match="no field but 'kind' holds a text"):
        guess([{"kind": "ab"[i % 2]} for i in range(20)])
