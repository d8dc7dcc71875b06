"""The template language of tasks and its regular expressions: what it can say, and that it cannot run away."""

from __future__ import annotations

import time

import pytest

from fast_prompt_tuning.data import patterns, templates
from fast_prompt_tuning.data.patterns import substitute
from fast_prompt_tuning.data.readers import load_examples, render_rows
from fast_prompt_tuning.data.task_files import task_from_templates
from fast_prompt_tuning.data.tasks import Replace, Source, Task
from fast_prompt_tuning.data.templates import compiled, render
from fast_prompt_tuning.errors import ConfigError, DataError

ROW = {
    "text": " A text. And more",
    "title": "Rain",
    "items": ["b", "a", "b"],
    "answers": [{"text": "x"}, {"text": "y"}],
    "n": 3,
    "meta": {"who": "Ann"},
    "empty": "",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ text }}\n", " A text. And more\n"),
        ("{{ text | trim | upper }}", "A TEXT. AND MORE"),
        ("{{ text.strip().split('.')[0] }}", "A text"),
        ("{{ text[:3] }}|{{ text[-4:] }}", " A |more"),
        ("{{ title ~ ': ' ~ n }} {{ title + '!' }} {{ n + 1 }} {{ n - 1 }}", "Rain: 3 Rain! 4 2"),
        ("{{ items | join(', ') }}; {{ items | unique | sort | join }}", "b, a, b; ab"),
        ("{{ answers | map(attribute='text') | join('/') }} {{ answers | join('/', attribute='text') }}", "x/y x/y"),
        ("{{ items | map('upper') | list }}", "['B', 'A', 'B']"),
        (
            "{% for i in items %}{{ loop.index }}. {{ i }}{% if not loop.last %}, {% endif %}{% endfor %}",
            "1. b, 2. a, 3. b",
        ),
        ("{% for i in items if i == 'b' %}{{ i }}{% else %}none{% endfor %}", "bb"),
        ("{% for k, v in meta.items() %}{{ k }}={{ v }}{% endfor %}", "who=Ann"),
        ("{{ meta.who }} {{ meta['who'] }} {{ meta.get('x', '?') }}", "Ann Ann ?"),
        ("{{ 'many' if n > 2 else 'few' }} {{ n is odd }} {{ 'a' in items }}", "many True True"),
        ("{{ title | replace('R', 'P') | truncate(3, True, '', 0) }}", "Pai"),
        ("{{ 2.345 | round(1) }} {{ text | wordcount }} {{ meta | tojson }}", '2.3 4 {"who": "Ann"}'),
        ("{% raw %}{{ x }}{% endraw %}{# no #}", "{{ x }}"),
        ("{% if other %}{{ other }}{% else %}-{% endif %}{{ other or 'x' }}{{ other | default('y') }}", "-xy"),
        ("{% if empty %}a{% elif title and not other %}b{% endif %}", "b"),
        ("{% if other is defined %}a{% endif %}{% if meta.other %}b{% endif %}c", "c"),
    ],
)
def test_what_a_template_can_say(template, text):
    assert render(template, ROW) == text


@pytest.mark.parametrize(
    "template", ["{{ other }}", "{{ other ~ 'x' }}", "{% for x in other %}{% endfor %}", "{{ other.x }}"]
)
def test_a_missing_field_that_is_shown_is_an_error(template):
    with pytest.raises(DataError, match="field 'other' is missing or null"):
        render(template, ROW)


def test_a_condition_on_a_field_that_rows_lack(tmp_path):
    template = "{% if title %}{{ title }}: {% endif %}{{ text }}"
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"title": "T", "text": "a"}\n{"title": null, "text": "b"}\n{"text": "c"}\n{"title": "", "text": "d"}\n'
    )
    table = tmp_path / "rows.csv"
    table.write_text("title,text\nT,a\n,b\n")
    files = {"train": str(file), "test": str(table)}
    task = Task(
        name="custom",
        version=1,
        source=Source(files=files),
        input_template=template,
        target_template="x",
        truncate="text",
        metric="rouge",
        primary="rougeL",
        max_target_tokens=64,
    )
    found = load_examples(task, "train", decoder=True)
    assert found["input"][:] == ["T: a", "b", "c", "d"]
    assert found["cut_start"][:] == [3, 0, 0, 0]
    assert load_examples(task, "test", decoder=True)["input"][:] == ["T: a", "b"]


def test_labels_are_scored_by_the_label_alone():
    task = task_from_templates(
        files={}, input_template="{{ q }}", target_template="{% if q %}{{ label }}{% endif %}", labels=["a", "b"]
    )
    with pytest.raises(ConfigError, match="must need `label` only"):
        task.choices(decoder=True)


REFUSED = {
    "power": "{{ 9**9**9 }}",
    "repetition": "{{ 'x' * 1000000000 }}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "formatting method": "{{ '{:1000000000}'.format(1) }}",
    "filter that pads": "{{ text | center(1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "random": "{{ items | random }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "loops in loops": "{% for a in text %}{% for b in text %}x{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in items recursive %}{{ loop(items) }}{% endfor %}",
    "doubling": "{% set a = text %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as x %}",
    "filter block": "{% filter upper %}{{ text }}{% endfilter %}",
    "with": "{% with a = text %}{{ a }}{% endwith %}",
    "replace method": "{{ text.replace('', text) }}",
    "strip by a field": "{{ text.strip(title) }}",
    "starred arguments": "{{ text.split(*items) }}",
    "private filter": "{{ text | _add(text) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep conditions": "{% if n %}" * 500 + "{% endif %}" * 500,
    "deep lists": "{{ " + "[" * 100 + "]" * 100 + " }}",
    "a long sum": "{{ n" + " + n" * 3000 + " }}",
    "many parts": "{{ n }}" * 3000,
    "a long template": "x" * 100_001,
    "a long number": "{{ " + "9" * 5000 + " }}",
    "surely no template": "{{ text ",
}  # fmt: skip


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_what_is_no_part_of_the_language_is_refused_when_a_task_is_loaded(template):
    start = time.process_time()
    with pytest.raises(ConfigError, match="template"):
        task_from_templates(files={}, input_template=template, target_template="x")
    assert time.process_time() - start < 2


BIG = {"text": "'\\\"" * 200_000, "list": ["x"] * 100_000, "nested": [["y" * 1000] * 100] * 100, "q": '"'}
TOO_MUCH = {
    "joined by itself": "{{ list | join(text) }}",
    "replaced by itself": "{{ text | replace('', text) }}",
    "replaced again and again": "{{ q" + ' | replace(\'"\', \'""""""""\')' * 30 + " }}",
    "quoted again and again": "{{ q" + " | tojson" * 30 + " }}",
    "put together": "{{ " + " ~ ".join(["text"] * 500) + " }}",
    "added": "{{ " + " + ".join(["text"] * 20) + " }}",
    "added in pairs": "{{ (text+text+text+text)+(text+text+text+text)+(text+text+text+text) }}",
    "a list of it": "{{ [" + ", ".join(["text"] * 500) + "] }}",
    "shown in a loop": "{% for x in list %}{{ text }}{% endfor %}",
    "mapped": "{{ list | map('replace', 'x', text) | list }}",
    "a filter by name": "{{ list | map('center', 1000000000) | list }}",
    "a generator": "{{ list | map('upper') }}",
    "a method": "{{ text.upper }}",
    "trimmed by a field": "{{ text | trim(text) }}",
    "divided": "{{ q | int | round(1000000000) is divisibleby(0) }}",
    "hidden": "{{ text.__class__.__mro__ }}",
    "a huge number": "{{ ('0x' ~ list | join | replace('x', 'f')) | int(0, 16) }}",
}


@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_row_that_makes_too_much_is_a_bad_row(template):
    start = time.process_time()
    with pytest.raises(DataError):
        render(template, BIG)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in list %}{% if 'zz' in text ~ 'z' %}{% endif %}{% endfor %}",
        "{% for x in list %}{% if text | upper | length == 0 %}{% endif %}{% endfor %}",
        "{{ list | select('in', other) | list | length }}",
    ],
)
def test_a_row_that_takes_too_long_is_a_bad_row(monkeypatch, template):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    start = time.process_time()
    with pytest.raises(DataError, match="seconds"):
        render(template, {**BIG, "other": ["z"] * 100_000})
    assert time.process_time() - start < 3


def test_deep_data_is_a_bad_row_where_it_is_shown():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DataError):
        render("{{ a }}", {"a": deep})


def test_a_text_of_all_private_characters_is_a_bad_row():
    task = task_from_templates(files={}, input_template="{{ text }}", target_template="x")
    with pytest.raises(DataError, match="private use"):
        render_rows(task, [{"text": "".join(map(chr, range(0xE000, 0xF900)))}], decoder=True)


def test_templates_are_compiled_once():
    assert compiled("{{ a }}{{ b }}") is compiled("{{ a }}{{ b }}")
    assert compiled("{{ a }}{% for x in b %}{{ x }}{{ loop.index }}{% endfor %}")[1] == {"a", "b"}


# -- regular expressions ----------------------------------------------------------------------------------------------


def test_a_pattern_replaces_as_pythons_does():
    assert substitute(r"(\w)(\d)?", r"<\1\2>", "a1 b") == "<a1> <b>"
    assert substitute(r"x*", "-", "abxd") == "-a-b--d-"


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"(.*a){25}$", r"^(([a-z])+.)+[A-Z]$"])
def test_a_pattern_that_takes_too_long_is_a_bad_row(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    start = time.process_time()
    with pytest.raises(DataError, match="takes over"):
        substitute(pattern, "", "a" * 5000 + "!")
    assert time.process_time() - start < 2


COPIES = [
    "(?:" * 90 + "a" + ")+" * 90,
    "a{1000000000}",
    "a{" + "9" * 400 + "}",
    "(?:" * 20 + "a" + "){1,10}" * 20,
    "(?:a){e<=3}",
    "[[a]",
]


@pytest.mark.parametrize("pattern", COPIES)
def test_a_pattern_that_cannot_be_compiled_soon_is_refused(pattern):
    start = time.process_time()
    with pytest.raises(ValueError, match="pattern"):
        Replace(field="text", pattern=pattern, by="")
    assert time.process_time() - start < 1


def test_patterns_at_the_bound_are_compiled_soon():
    start = time.process_time()
    for pattern in ("(?:" * 5 + "a" + "){10}" * 5, "(?:" * 16 + "a" + ")+" * 16, r"\d{4}-\d{2}\{x\}", "a{100000}"):
        Replace(field="text", pattern=pattern, by="")
    assert time.process_time() - start < 2


def test_what_replaces_matches_is_bounded():
    with pytest.raises(DataError, match="characters"):
        substitute(r"(?=(.*))", r"\1" * 40, "a" * 100_000)
    for pattern, by in (("a" * 501, ""), ("a", "x" * 101), ("(" * 200, ""), ("(", ""), ("a", r"\2")):
        with pytest.raises(ValueError, match=r"pattern|by"):
            Replace(field="text", pattern=pattern, by=by)
