"""YAML of unknown origin: recipes, `--set` values and task files in bounded time and memory."""

from __future__ import annotations

import time

import pytest

from fast_prompt_tuning.data.task_files import load_task
from fast_prompt_tuning.errors import LONGEST_MESSAGE, ConfigError, shown
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.yaml_text import LONGEST, load_yaml

MINIMAL = {"model": {"path": "m"}, "data": {"task": "t"}, "train": {"steps": 100}, "output": "o"}
LAYERS = "".join(f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 9))
MERGES = "".join(f"l{n}: &l{n}\n  <<: [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 9))
HOSTILE = {
    "lists": f"l0: &l0 [a, b]\n{LAYERS}",
    "merges": f"l0: &l0 {{a: 1}}\n{MERGES}",
    "long texts": f"a: &a {'x' * 10_000}\nb: [{', '.join(['*a'] * 100)}]",
    "itself": "a: &a [*a]",
    "itself as a mapping": "a: &a\n  b: *a",
    "a number to base 60": f"a: 1{':1' * 50_000}",
    "a long number": f"a: 0x{'f' * 9000}",
    "too long": f"a: {'x' * LONGEST}",
    "deep": "[" * 50_000,
    "an empty number": 'a: !!int ""',
    "no truth value": "a: !!bool x",
    "no time": "a: !!timestamp x",
    "code": "a: !!python/object/apply:os.system [x]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_is_refused_at_once(tmp_path, text):
    recipe, task = tmp_path / "recipe.yaml", tmp_path / "task.yaml"
    recipe.write_text(text)
    task.write_text(text)
    inline = f"[{text}]" if "\n" in text else text
    for read in (lambda: load(recipe), lambda: load_task(str(task)), lambda: load(MINIMAL, [f"name={inline}"])):
        start = time.process_time()
        with pytest.raises(ConfigError) as caught:
            read()
        assert time.process_time() - start < 3
        assert len(str(caught.value)) < LONGEST_MESSAGE + 10


def test_aliases_and_merges_of_an_honest_size_are_read():
    assert load_yaml("a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: [*a, *a]", "it") == {
        "a": {"x": 1, "y": [2]},
        "b": {"x": 3, "y": [2]},
        "c": [{"x": 1, "y": [2]}] * 2,
    }
    assert load_yaml("", "it") is None


def test_an_endless_file_is_not_read_to_its_end():
    for read in (load, lambda p: load_task(str(p))):
        with pytest.raises(ConfigError):
            read("/dev/zero")


def test_messages_show_little_of_large_values():
    wide = {f"key{i}": ["x" * 1000] * 1000 for i in range(1000)}
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (wide, deep, -(1 << 99_999), "x" * 10**6):
        assert len(shown(value)) <= 401
        with pytest.raises(ConfigError) as caught:
            load({**MINIMAL, "train": {"steps": value}})
        assert "train.steps" in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    with pytest.raises(ConfigError) as caught:
        load({**MINIMAL, **{f"{'k' * 1000}{i}": 1 for i in range(1000)}})
    assert len(str(caught.value)) <= LONGEST_MESSAGE + 10


def test_a_long_message_keeps_its_ends():
    text = str(ConfigError("begin " + "x" * 10_000 + " fix it"))
    assert text.startswith("begin ")
    assert text.endswith(" fix it")
    assert len(text) < LONGEST_MESSAGE + 10


def test_a_text_that_is_not_utf_8_is_named_as_such(tmp_path):
    file = tmp_path / "it.yaml"
    file.write_bytes("name: naïve".encode("latin-1"))
    for read in (load, lambda p: load_task(str(p))):
        with pytest.raises(ConfigError, match="is not UTF-8"):
            read(file)
