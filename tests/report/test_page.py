"""`fpt compare` and `fpt report`: the numbers, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from toy import result, toy

from fast_prompt_tuning.errors import DataError
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.report.page import figures, find_runs, render, samples
from fast_prompt_tuning.report.pictures import losses, quality, schedules
from fast_prompt_tuning.report.tables import average_rows, by_task, improvement, stopped_at, table_rows
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.results import Point, save_result

VOID = {"meta", "link", "br", "img", "hr", "input"}
PICTURES = ("quality-flops", "quality-seconds", "loss", "schedule", "similarity")
NASTY = "<script>alert('x')</script> $a & _b"


class Page(HTMLParser):
    """The elements of a page; raises where one is not closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of the tiny Llama, one with a name that is no good HTML."""
    folder = tmp_path_factory.mktemp("runs")
    for method, name in (("pt", "plain"), ("cr", NASTY)):
        run.train(load(toy().recipe(folder / method, method=method, name=name)))
    return folder


def check_page(text: str) -> Page:
    """A whole page that asks nobody for anything: no address, no script, ids that are one element's."""
    page = Page(text)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert not page.count("script")
    assert not page.count("iframe")
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not re.match(r"\s*(https?:|//|javascript:)", value or ""), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src"):
                assert value.startswith(("#", "data:")), (tag, value)
                assert not value.startswith("#") or value[1:] in ids, value
        for used in re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in attributes.values())):
            assert used in ids
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    return page


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_improve_is_the_gain_over_plain_stopped_at_the_same_flops():
    plain = result()  # 45 at 1 TFLOP, 50 at 2
    assert [stopped_at(plain, f, "accuracy") for f in (0.5e12, 1e12, 1.9e12, 9e12)] == [45.0, 45.0, 45.0, 50.0]
    fast = result("fpt", "cr", 1e12, 60.0, score=1e11)  # ends at 50, spends 1.1 T
    assert improvement(fast, plain) == 5.0
    assert improvement(plain, plain) is None
    assert improvement(fast, None) is None
    assert improvement(result("zero", "none", 0.0, 0.0, curve=False), plain) is None
    other = plain.model_copy(update={"curve": [p.model_copy(update={"metrics": {"em": 1.0}}) for p in plain.curve]})
    assert improvement(fast, other) is None


def of(task: str, name: str, method: str, **changes):
    return result(f"{task} {name}", method, config={"data": {"task": task}}, **changes)


def test_costs_are_compared_within_a_task_and_averaged_over_tasks():
    found = [
        of("a", "pt", "pt", train=2e12),
        of("a", "cr", "cr", train=1e12),
        of("b", "pt", "pt", train=8e12, metrics={"accuracy": 70.0}),
        of("b", "cr", "cr", train=2e12, metrics={"accuracy": 60.0}),
        of("b", "ld", "ld", train=4e12),
    ]
    assert [r["relative_flops"] for r in table_rows(found)] == [1.0, 0.5, 1.0, 0.25, 0.5]
    pt, cr, ld = average_rows(found)
    assert (pt["name"], pt["values"], pt["average"], pt["improve"]) == ("pt", {"a": 50.0, "b": 70.0}, 60.0, None)
    assert (cr["average"], cr["relative_flops"], cr["improve"]) == (55.0, 0.375, 5.0)
    assert (ld["values"], ld["average"], ld["relative_flops"]) == ({"b": 50.0}, None, None)  # not the same tasks
    named = [result(f"{m}-{t}", config={"data": {"task": t}}) for m in ("plain", "fast") for t in ("a", "b")]
    assert [(row["name"], row["average"]) for row in average_rows(named)] == [("plain", 50.0), ("fast", 50.0)]


def test_runs_of_other_data_or_another_metric_are_another_table():
    def own(folder, **changes):
        return result(config={"data": {"task": None, "files": {"validation": f"{folder}/dev.csv"}}}, **changes)

    graded = {"metrics": {"rougeL": 50.0}, "intervals": {"rougeL": (40.0, 60.0)}, "primary": "rougeL"}
    found = [own("x/tickets"), own("x/mails"), own("x/mails", **graded)]
    assert by_task(found) == {
        "own data tickets/dev": found[:1],
        "own data mails/dev, accuracy": found[1:2],
        "own data mails/dev, rougeL": found[2:],
    }


def test_runs_are_found(runs, tmp_path):
    names = ["plain", NASTY]
    assert [r.result.name for r in find_runs([runs])] == names  # plain prompt tuning first
    assert [r.result.name for r in find_runs([runs / "cr" / "result.json", runs / "pt"])] == names[::-1]
    for paths, said in (
        ([tmp_path], "no result of a run"),
        ([runs, runs / "pt"], "named twice"),
        ([], "no run is named"),
    ):
        with pytest.raises(DataError, match=said):
            find_runs(paths)


def test_result_files_in_one_folder_are_runs_of_their_own(runs, tmp_path):
    for name in ("pt", "cr"):
        shutil.copy(runs / name / "result.json", tmp_path / f"{name}.json")
    write_predictions(tmp_path, ("sport", "sport", "sport"))  # whose?
    found = find_runs([tmp_path / "pt.json", tmp_path / "cr.json"])
    assert [r.result.name for r in found] == ["plain", NASTY]
    assert samples(found) == []
    with pytest.raises(DataError, match="named twice"):
        find_runs([tmp_path / "pt.json", tmp_path / "pt.json"])


def test_examples_of_a_score_of_the_whole_split_are_right_or_wrong(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, answers in zip(folders, (("sport", "tech", "tech"), ("tech", "tech", "tech")), strict=True):
        scores = {"metrics": {"macro_f1": 50.0}, "intervals": {"macro_f1": (40.0, 60.0)}, "primary": "macro_f1"}
        curve = [Point(step=10, metrics=scores["metrics"], train_flops=2e12, train_seconds=100.0)]
        save_result(result(folder.name, **scores).model_copy(update={"curve": curve}), folder)
        write_predictions(folder, answers)
    (heading, examples), *_ = samples(find_runs(folders))
    assert heading == "Where the runs differ"
    assert [answer["score"] for answer in examples[0]["answers"]] == [100.0, 0.0]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_says_everything(runs):
    text = render(find_runs([runs]))
    page = check_page(text)
    assert page.count("svg") == 5
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "svg")
    assert NASTY not in text
    assert "http:" not in text
    assert "https:" not in text
    assert len(text) < 400_000
    said = " ".join(page.text)
    record = json.loads((runs / "cr" / "result.json").read_text())
    for wanted in (
        NASTY,
        f"{record['metrics']['accuracy']:.1f}",
        record["environment"]["torch"],
        record["fingerprints"]["model"],
        "method: cr",
        "Wrong",
        "gold:",
        f"{record['examples']} validation examples",
    ):
        assert wanted in said
    for sizes in ("prefers-color-scheme: dark", "width=device-width"):
        assert sizes in text
    assert render(find_runs([runs])) == text


def test_a_page_of_several_tasks_and_of_no_training(runs, tmp_path):
    save_result(result("zero-shot", "none", 0.0, 0.0, curve=False), tmp_path / "zero")
    page = check_page(render(find_runs([tmp_path / "zero"])))
    assert page.count("svg") == 0
    save_result(of("b", "cr", "cr", status="stopped", steps=3), tmp_path / "b")
    page = check_page(render(find_runs([runs, tmp_path / "zero", tmp_path / "b"])))
    assert "Averages over tasks" in page.text
    assert "(stopped)" in " ".join(page.text)


def write_predictions(folder, answers, golds=("sport", "sport", "business")):
    rows = [
        {"id": str(i), "input": f"text {i}", "gold": [gold], "prediction": answer, "score": 0.0}
        for i, (gold, answer) in enumerate(zip(golds, answers, strict=True))
    ]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_samples_show_where_runs_differ_and_what_is_right_and_wrong(tmp_path):
    for name, answers in (("a", ("sport", "sport", "sport")), ("b", ("sport", "business", "sport"))):
        save_result(result(name), tmp_path / name)
        write_predictions(tmp_path / name, answers)
    found = dict(samples(find_runs([tmp_path])))
    assert {heading: [e["input"] for e in examples] for heading, examples in found.items()} == {
        "Where the runs differ": ["text 1"],
        "Right": ["text 0"],
        "Wrong": ["text 2"],
    }
    (differ,) = found["Where the runs differ"]
    assert [(a["run"], a["text"], a["score"]) for a in differ["answers"]] == [
        ("a", "sport", 100.0),
        ("b", "business", 0.0),
    ]
    other = (tmp_path / "b" / "predictions.jsonl").read_text().replace("text 0", "another text")
    (tmp_path / "b" / "predictions.jsonl").write_text(other)  # numbered alike
    assert "Right" not in dict(samples(find_runs([tmp_path])))
    (tmp_path / "a" / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match="not a run's predictions"):
        samples(find_runs([tmp_path]))


def test_graded_samples_are_better_or_worse(tmp_path):
    scores = {"metrics": {"rougeL": 50.0}, "intervals": {"rougeL": (40.0, 60.0)}}
    save_result(result(primary="rougeL", **scores, curve=False), tmp_path)
    write_predictions(tmp_path, ("a b c", "a b", "z"), golds=("a b c", "a c", "b"))
    found = samples(find_runs([tmp_path]))
    assert [heading for heading, _ in found] == ["Best"]  # three examples fit under one heading
    assert [e["answers"][0]["score"] for e in found[0][1]] == [100.0, pytest.approx(50.0), 0.0]


def test_fidelity_that_was_measured_is_on_the_page(tmp_path):
    save_result(result(), tmp_path)
    rows = [
        {"selection": "evenly", "relative_flops": f, "agreement": f, "loss": 2 - f, "stage": {}} for f in (0.5, 0.75)
    ]
    (tmp_path / "fidelity.json").write_text(json.dumps({"fidelity": {"rows": rows, "full_loss": 1.0}}))
    assert "fidelity" in figures(find_runs([tmp_path]))
    check_page(render(find_runs([tmp_path])))
    for content in ("{", "[]", '{"fidelity": {"rows": [{}], "full_loss": 1}}'):
        (tmp_path / "fidelity.json").write_text(content)
        with pytest.raises(DataError, match="not what fpt score"):
            render(find_runs([tmp_path]))


def test_stages_are_named_only_where_there_is_room():
    slow, quick = result("slow", "cr", seconds=100.0), result("quick", "cr", seconds=5.0)
    figure = quality([slow, quick], "seconds")
    named = {text.get_text() for text in figure.axes[1].texts if text.get_position()[0] < 5.0}
    assert not named  # the quick run's whole strip is narrower than one label
    assert "4×8" in {text.get_text() for text in figure.axes[1].texts}


def test_pictures_of_odd_schedules():
    two = result("two", "none", schedule=[{"layers": {"encoder": 2, "decoder": 4}, "ffn": 8, "steps": 5, "stacks":
        ["encoder", "decoder"]}], boundaries=[0])  # fmt: skip
    assert len(schedules([two]).axes) == 2
    assert len(schedules([result("a"), result("b"), result("c", "cr")]).axes) == 2  # equal schedules once
    assert schedules([result("zero", "none")]) is None
    assert losses([result()]) is None
    assert len(losses([result(losses=[(1, 2.0), (2, 1.0)])]).axes) == 1


# -- the commands ------------------------------------------------------------------------------------------------------


def test_compare(fpt, runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out, _ = fpt("compare", runs / "pt", runs / "cr")
    for said in ("accuracy %", "of plain", "Improve", "100%"):
        assert said in out
    out, _ = fpt("compare", runs, "--json")
    found = json.loads(out)
    assert [r["method"] for r in found["runs"]] == ["pt", "cr"]
    assert found["averages"] == []
    _, err = fpt("compare", runs / "nothing", code=2)
    assert "no result of a run" in err


def test_report_overwrites_nothing_unasked(fpt, runs, tmp_path):
    page = tmp_path / "new" / "r.html"
    out, _ = fpt("report", runs, "-o", page, "--pictures", "png,svg", "--json")
    found = json.loads(out)
    assert found["page"] == str(page)
    check_page(page.read_text())
    names = {f"r-{n}.{k}" for n in PICTURES for k in ("png", "svg")}
    assert {p.name for p in page.parent.iterdir()} == {"r.html", *names}
    assert {str(page.parent / n) for n in names} == set(found["pictures"])
    for other in ((page,), (tmp_path / "new" / "r.htm", "--pictures", "png")):
        _, err = fpt("report", runs, "-o", *other, code=2)
        assert "exists already" in err
    assert not (tmp_path / "new" / "r.htm").exists()
    fpt("report", runs, "-o", page, "--overwrite")
    for arguments, said in (
        (("-o", tmp_path), "is a folder"),
        (("-o", page / "r.html"), "cannot be written"),
        (("--pictures", "gif"), "'gif' is unknown"),
    ):
        _, err = fpt("report", runs, *arguments, code=2)
        assert said in err
        assert "a bug" not in err


# -- a browser ---------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_a_browser_shows_the_page(runs, tmp_path, width, dark):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(render(find_runs([runs])))
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync hide-scrollbars enable-logging=stderr"
    flags += f" window-size={width},2400 screenshot={picture} user-data-dir={tmp_path / 'profile'}"
    flags += " blink-settings=preferredColorScheme=0" if dark else " blink-settings=preferredColorScheme=1"
    done = subprocess.run(
        [CHROMIUM, *(f"--{f}" for f in flags.split()), f"file://{page}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    paper, first = ((20, 23, 28), (111, 165, 224)) if dark else ((255, 255, 255), (68, 119, 170))
    assert tuple(pixels[2, 2]) == paper
    drawn = (np.abs(pixels - first).max(-1) <= 2).any(1)
    assert drawn.sum() > 50, "the first run's curve is not there"
