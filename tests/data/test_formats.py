"""Local files as people have them: gzipped, JSON arrays, semicolons, open quotes, other encodings."""

from __future__ import annotations

import gzip
import io
import json

import datasets
import pyarrow as pa
import pytest

from fast_prompt_tuning.data import formats
from fast_prompt_tuning.data.formats import text_lines
from fast_prompt_tuning.data.readers import load_examples
from fast_prompt_tuning.data.task_files import load_task, task_from_templates, with_source
from fast_prompt_tuning.errors import DataError

ROWS = [{"text": "a; b", "label": "x"}, {"text": "c, d", "label": "y"}]


def read(file, **options):
    task = task_from_templates(files={"train": str(file)}, input_template="{{ text }}", target_template="{{ label }}")
    found = load_examples(task, "train", decoder=False, **options)
    return list(zip(found["input"], found["target"], strict=True))


CONTENTS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.json": json.dumps(ROWS, indent=1),
    "rows.csv": 'text,label\na; b,x\n"c, d",y\n',
    "semicolons.csv": 'text;label\r\n"a; b";x\r\nc, d;y\r\n',
    "rows.tsv": "text\tlabel\na; b\tx\nc, d\ty\n",
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "marked"])
def test_one_table_in_every_form(tmp_path, name, zipped, mark):
    content = (mark + CONTENTS[name]).encode()
    file = tmp_path / (name + ".gz" if zipped else name)
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert read(file) == [("a; b", "x"), ("c, d", "y")]


def test_lines_of_objects_in_a_json_file(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(CONTENTS["rows.jsonl"])
    assert len(read(file)) == 2


def test_bad_elements_of_an_array_are_bad_rows(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"text": "a", "label": "x"},\n 5, {"label": "y"}]')
    bad: list[DataError] = []
    assert read(file, on_bad_row="skip", bad_rows=bad) == [("a", "x")]
    assert [error.line for error in bad] == [2, 3]
    assert "a JSON int" in str(bad[0])
    file.write_text('[{"text": "a",\n]')
    with pytest.raises(DataError, match=r"rows.json:2: not valid JSON"):
        read(file)


def test_squad_may_be_gzipped(tmp_path):
    data = {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}
    file = tmp_path / "train.json.gz"
    file.write_bytes(gzip.compress(json.dumps(data).encode()))
    rows = load_examples(load_task("squad2"), "train", decoder=True, files={"train": str(file)})
    assert rows["target"][:] == [" no answer"]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-9], lambda c: b"text,label\na,b\n", lambda c: c[:20] + b"\xff" * 9 + c[29:], lambda c: c[:3]],
)
def test_a_damaged_gzip_file_is_an_error(tmp_path, damage):
    file = tmp_path / "rows.csv.gz"
    file.write_bytes(damage(gzip.compress(b"text,label\n" + bytes(range(48, 58)) * 9 + b",b\n")))
    with pytest.raises(DataError, match=r"rows.csv.gz: cannot read the file"):
        read(file)


def test_a_small_file_that_unfolds_to_much_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    line = tmp_path / "rows.jsonl.gz"
    line.write_bytes(gzip.compress(b"{" + b" " * 10**6))
    array = tmp_path / "rows.json.gz"
    array.write_bytes(gzip.compress(b"[\n" + b" \n" * 10**5))
    for file in (line, array):
        with pytest.raises(DataError, match="1000 bytes"):
            read(file)


OPEN = {
    "to the end": ('"open,x\nc,y\nd,z\n', 4),
    "to a quoted cell": ('"open,x\nc,y\n"d, e",z\nf,y\n', 4),
    "after a cell of two lines": ('"two\nlines","open\nc,y\nd,z\n', 5),
    "with doubled quotes": ('"he said ""no"" and\n""yes"",x\nc,y\n', 4),
}


@pytest.mark.parametrize(("text", "line"), OPEN.values(), ids=OPEN)
def test_an_open_quote_is_named_by_the_line_it_opens_on(tmp_path, text, line):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,x\nb,y\n" + text)
    with pytest.raises(DataError, match="a quote that opens here swallows the rows after it") as caught:
        read(file, on_bad_row="skip")
    assert caught.value.line == line


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_that_is_not_utf_8_is_named_as_such(tmp_path, name, encoding):
    file = tmp_path / name
    file.write_bytes(CONTENTS[name].replace("c, d", "ça, d").encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8.*convert it to UTF-8"):
        read(file)


def test_lines_of_an_open_file():
    lines = text_lines(io.BytesIO(b"\xef\xbb\xbfa\r\nb\rc\n\nd"), "standard input")
    assert list(lines) == ["a", "b\rc", "", "d"]
    with pytest.raises(DataError, match="standard input:2: not UTF-8"):
        list(text_lines(io.BytesIO(b"a\n\xff\xfe\n"), "standard input"))


FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
LABELLED = datasets.Dataset.from_list(
    [{"text": "a; b", "label": 0}, {"text": "c, d", "label": 1}, {"text": "e", "label": -1}], features=FEATURES
)


def feather(path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, LABELLED.data.schema) as writer:
        writer.write_table(LABELLED.data.table)


def stream(path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, LABELLED.data.schema) as writer:
        writer.write_table(LABELLED.data.table)


WRITERS = {
    "rows.parquet": LABELLED.to_parquet,
    "rows.arrow": stream,
    "rows.feather": feather,
    "folder": LABELLED.save_to_disk,
}


@pytest.mark.parametrize("name", WRITERS)
def test_columns_of_labels_give_their_names(tmp_path, name):
    WRITERS[name](tmp_path / name)
    bad: list[DataError] = []
    assert read(tmp_path / name, on_bad_row="skip", bad_rows=bad) == [("a; b", "x"), ("c, d", "y")]
    assert len(bad) == 1
    assert "field 'label' is missing or null" in str(bad[0])


def test_a_saved_data_set_of_several_splits(tmp_path):
    datasets.DatasetDict({"train": LABELLED, "held": LABELLED.select([1])}).save_to_disk(tmp_path / "all")
    task = task_from_templates(files={"train": "x"}, input_template="{{ text }}", target_template="{{ label }}")
    ours = with_source(task, str(tmp_path / "all"), None, {"validation": "held"})
    assert load_examples(ours, "validation", decoder=False)["target"][:] == ["y"]
    with pytest.raises(DataError, match="no split 'test'; choose from train, held"):
        load_examples(ours, "test", decoder=False)
    assert read(tmp_path / "all" / "held") == [("c, d", "y")]
    with pytest.raises(DataError, match="neither a file nor a saved split"):
        read(tmp_path / "all")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.feather"])
@pytest.mark.parametrize(
    "content", [b"ARROW1 and no more", b"nothing of the kind", b"\xff\xff\xff\xff\x10\x00\x00\x00"]
)
def test_what_is_no_arrow_file_is_said_to_be_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="not a readable"):
        read(tmp_path / name)
