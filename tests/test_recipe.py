from __future__ import annotations

import copy
import os
import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fast_prompt_tuning.errors import ConfigError, ScheduleError
from fast_prompt_tuning.paths import built_in
from fast_prompt_tuning.recipe import RunConfig, load, override
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.yaml_text import fields_at

MINIMAL = {"model": {"path": "m"}, "data": {"task": "t"}, "train": {"steps": 100}, "output": "o"}
FULL = {
    **MINIMAL,
    "name": "naïve – 試",
    "model": {"path": "m", "revision": "main", "dtype": "bfloat16", "device": "cpu"},
    "data": {"task": "t", "files": {"train": "a.jsonl"}, "train_limit": 5, "on_bad_row": "skip"},
    "method": "cr",
    "stages": [
        {"layers": 2, "ffn": 8, "steps": 40, "stacks": ["decoder"]},
        {"layers": {"encoder": 1, "decoder": 2}, "ffn": {"encoder": 3, "decoder": 4}, "steps": 60},
    ],
    "stacks": ["decoder"],
    "prompt": {"tokens": 7, "init": "text", "text": "hello"},
    "optim": {"lr": 1e-3},
}


@pytest.mark.parametrize("data", [MINIMAL, FULL, *built_in("recipes")], ids=lambda d: d if isinstance(d, str) else None)
def test_round_trip(tmp_path, data):
    first = load(data)
    (tmp_path / "r.yaml").write_text(first.to_yaml(), encoding="utf-8")
    assert load(tmp_path / "r.yaml") == first
    assert load(str(tmp_path / "r.yaml")).to_yaml() == first.to_yaml()
    assert load(yaml.safe_load(first.to_yaml())) == first


def test_recipes_that_come_with_the_package():
    assert {"bbc_topics_smollm2", "t5_paper_large", "t5_paper_xl"} <= set(built_in("recipes"))
    paper = load("t5_paper_large")
    assert (paper.optim.optimizer, paper.optim.lr, paper.prompt.tokens) == ("adafactor", 0.3, 20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metod": "cr"}, "metod is not a setting; did you mean 'method'"),
        ({"train": {"steps": 1, "batchsize": 2}}, "train.batchsize is not a setting; did you mean 'batch_size'"),
        ({"model": {"pth": "m"}}, "model.path is missing.*model.pth is not a setting; did you mean 'path'"),
        ({"optim": {"learning": 1}}, "optim.learning is not a setting; valid: optimizer, lr, "),
        (
            {"stages": [{"layer": 1, "ffn": 2, "steps": 100}]},
            r"stages\.0\.layer is not a setting; did you mean 'layers'",
        ),
        ({"zzzzzz": 1}, "zzzzzz is not a setting; valid: name, model, "),
        ({"eval": {"beams": 2}}, "did you mean 'num_beams'"),
        ({"prompt": {"token": 2}}, "did you mean 'tokens'"),
        ({"scoring": {"exmples": 2}}, "did you mean 'examples'"),
        ({"data": {"task": "t", "max_inputs_tokens": 2}}, "did you mean 'max_input_tokens'"),
    ],
)
def test_unknown_keys_name_the_nearest(changes, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load({**MINIMAL, **changes})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", "train.steps='many'"),
        ("train.steps=0", "train.steps=0"),
        ("train.steps=1.5", r"train\.steps=1\.5"),
        ("method=xx", "method='xx'"),
        ("model.dtype=int8", "model.dtype='int8'"),
        ("model=5", "model=5"),
        ("model.path=", "model.path=None"),
        ("output=''", "output=''"),
        ("output=!!binary AQ==", "output=.*valid string"),
        ("optim.lr=-1", "optim.lr=-1"),
        ("optim.lr=.nan", "optim.lr=nan"),
        ("optim.lr=.inf", "optim.lr=inf"),
        ("optim.max_grad_norm=.inf", "optim.max_grad_norm=inf"),
        ("stages=[1]", r"stages\.0"),
        ("data.labels=[yes, no]", r"data\.labels\.0=True: .*quote it: 'yes'"),
        ("data.labels=[1, 2]", r"data\.labels\.1=2: .*quote it: '2'"),
        ("stages=[]", "stages"),
        ("stacks=[middle]", r"stacks\.0"),
        ("prompt.init=text", "prompt: init='text' needs prompt.text"),
        ("prompt.init=prompt", "prompt: init='prompt' needs prompt.path"),
        ("train.keep=worst", "train.keep='worst'"),
        ("train.dropout=on", "train.dropout=True: Input should be 'off' or 'model'"),
        ("eval.labels=words", "eval.labels='words'"),
        ("cache.dtype=int8", r"cache: dtype='int8' is gone.*leave it out"),
    ],
)
def test_wrong_values(override, said):
    with pytest.raises(ConfigError, match=said) as error:
        load(MINIMAL, [override])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_setting_that_was_cut_may_have_its_default():
    saved = {**MINIMAL, "cache": {"tier": "disk", "dtype": "model"}}
    assert load(saved) == load({**MINIMAL, "cache": {"tier": "disk"}})
    assert saved["cache"]["dtype"] == "model"


def test_stages_and_steps():
    stages = [{"layers": 2, "ffn": 8, "steps": 10}, {"layers": 4, "ffn": 16, "steps": 20}]
    with pytest.raises(ConfigError, match=r"stages add up to 30 steps, but train\.steps=100"):
        load({**MINIMAL, "stages": stages})
    for method in ("pt", "full"):
        with pytest.raises(ConfigError, match=f"stages cannot be set with method='{method}'"):
            load({**MINIMAL, "stages": stages, "method": method})
    assert load({**MINIMAL, "stages": stages}, ["train.steps=30"]).stages[1].layers == 4
    with pytest.raises(ConfigError, match=r"stages\.0\.rate is not a setting"):
        load({**MINIMAL, "stages": [{"rate": 0.5, "steps": 30}]}, ["train.steps=30"])


def test_overrides():
    found = load(
        MINIMAL,
        ["train.steps=7", "optim.lr=1e-3", "name=a=b", "data.files={train: x.csv}", "stacks=[decoder]", " method = pt"],
    )
    assert (found.train.steps, found.optim.lr, found.name, found.method) == (7, 1e-3, "a=b", "pt")
    assert (found.data.files, found.stacks) == ({"train": os.path.abspath("x.csv")}, ["decoder"])
    assert load(MINIMAL, ["data.files.test=y.csv"]).data.files == {"test": os.path.abspath("y.csv")}
    assert load(MINIMAL, ["train.steps=7", "train.steps=8"]).train.steps == 8
    assert load(FULL, ["stages=null"]).stages is None


def test_overrides_leave_the_mapping_alone():
    before = copy.deepcopy(FULL)
    load(FULL, ["model.path=other", "prompt.tokens=3", "data.files.train=z"])
    assert before == FULL


@pytest.mark.parametrize("text", ["", "train.steps", "=5", "  =5", "train.steps=[", "train..steps=1", "a.b.c=1", ".=1"])
def test_overrides_that_are_none(text):
    with pytest.raises(ConfigError):
        load(MINIMAL, [text])


def test_an_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"output"):
        load(MINIMAL, ["output.folder=x"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must hold settings .* found NoneType"),
        (b"- a\n- b\n", "found list"),
        (b"just text", "found str"),
        (b"1: 2\n", "must hold settings"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"a: 2001-99-99", "not valid YAML"),
        (b"? [a]\n: 1\n", "not valid YAML|must hold"),
        (b"[" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, said):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        load(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean the recipe 'bbc_topics_smollm2'"):
        load("bbc_topic_smollm2")
    with pytest.raises(ConfigError, match=r"recipes: .*t5_paper_large"):
        load("zzzzzzzzz")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    for name in ("", "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(name)


# -- schedules ---------------------------------------------------------------------------------------------------------

DECODER = Stage(8, 16, stacks=("decoder",))
BOTH = Stage(8, 16, stacks=("encoder", "decoder"))


def test_schedule_takes_the_tasks_stacks_then_the_recipes():
    cut = {**MINIMAL, "method": "cr"}
    assert load(cut).schedule(BOTH, ["encoder"]).stages[0].stacks == ("encoder",)
    assert load(cut).schedule(BOTH, None).stages[0].stacks == ("encoder", "decoder")
    assert load(cut).schedule(DECODER, ["encoder"]).stages[0].stacks == ("decoder",)  # it has no encoder
    assert load(cut, ["stacks=[decoder]"]).schedule(BOTH, ["encoder"]).stages[0].stacks == ("decoder",)
    with pytest.raises(ScheduleError, match="encoder"):
        load(cut, ["stacks=[encoder]"]).schedule(DECODER, None)


@pytest.mark.parametrize("name", ["t5_paper_large", "t5_paper_xl"])
def test_the_papers_rate_is_constant_whatever_the_default_is(name):
    assert "lr_schedule: constant" in built_in("recipes")[name].read_text()
    assert load(name).optim.lr_schedule == "constant"


def test_a_running_mean_needs_a_prompt_and_a_decay():
    assert load({**MINIMAL, "optim": {"ema_decay": 0.9}}).optim.ema_decay == 0.9
    assert load(MINIMAL).optim.ema_decay is None
    with pytest.raises(ConfigError, match=r"optim\.ema_decay=0\.9 averages the prompt, and method='full' has none"):
        load({**MINIMAL, "optim": {"ema_decay": 0.9}, "method": "full"})
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"optim\.ema_decay"):
            load({**MINIMAL, "optim": {"ema_decay": bad}})


def test_a_schedule_of_ones_own_needs_no_method():
    steps = [{"layers": 2, "steps": 40}, {"steps": 60}]
    assert load({**MINIMAL, "stages": steps}).method == "cr"
    assert load({**MINIMAL, "stages": [{"layers": 2}]}).method == load(MINIMAL).method == "auto"
    with pytest.raises(ConfigError, match="method='auto'; leave it out"):
        load({**MINIMAL, "method": "auto", "stages": steps})


def test_schedules_of_methods():
    cr = load({**MINIMAL, "method": "cr"}).schedule(DECODER)
    assert [(s.layers, s.ffn, s.steps) for s in cr.stages] == [(2, 4, 20), (4, 8, 20), (6, 12, 20), (8, 16, 40)]
    for method in ("pt", "full"):
        schedule = load({**MINIMAL, "method": method}).schedule(DECODER)
        assert len(schedule.stages) == 1
        assert schedule.stages[0].is_full(DECODER)


def test_schedule_of_stages():
    schedule = load(FULL, ["stacks=null"]).schedule(BOTH)
    assert schedule.boundaries == (0, 40)
    assert schedule.stages[0].layers_in("decoder") == 2
    assert schedule.stages[1].ffn_in("encoder") == 3
    with pytest.raises(ScheduleError, match="9"):
        load({**MINIMAL, "stages": [{"layers": 9, "ffn": 16, "steps": 100}]}).schedule(DECODER)


# -- anything else is a ConfigError ------------------------------------------------------------------------------------

KEYS = [*RunConfig.model_fields, "path", "steps", "layers", "ffn", "stacks", "files", "train", "tokens", "lr", "init"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text(max_size=6),
    st.dates(),
    st.binary(max_size=3),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
FAST = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])


def loads_or_refuses(*args):
    try:
        found = load(*args)
    except ConfigError:
        return
    assert load(yaml.safe_load(found.to_yaml())) == found


@FAST
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES, max_size=5))
def test_any_mapping(data):
    loads_or_refuses({**MINIMAL, **data})


@FAST
@given(st.data())
def test_one_value_changed(data):
    recipe = copy.deepcopy(FULL)
    place = recipe
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(VALUES)
        break
    loads_or_refuses(recipe)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


TEXT = load(FULL).to_yaml()


@FAST
@given(st.integers(0, len(TEXT)), st.integers(0, 12), st.text(string.printable, max_size=5))
def test_any_text(file, at, cut, added):
    file.write_text(TEXT[:at] + added + TEXT[at + cut :], encoding="utf-8")
    loads_or_refuses(file)


@FAST
@given(st.text(string.ascii_letters + "._=[]{}:'\"- 0123456789&*!#\n\t", max_size=20))
def test_any_override(text):
    loads_or_refuses(MINIMAL, [text])
    loads_or_refuses(MINIMAL, [f"train.steps={text}"])


def test_explanations_know_every_section():
    for section in ("model", "data", "prompt", "scoring", "optim", "train", "eval"):
        assert fields_at(RunConfig, (section,))
    assert fields_at(RunConfig, ("stages", 0)) == ["layers", "ffn", "batch", "length", "steps", "stacks"]
    assert fields_at(RunConfig, ("nothing", "at", "all")) == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_an_override_holds_any_text(text):
    found = load({**MINIMAL, "method": "pt"}, [override("name", text)]) if text else None
    assert found is None or found.name == text


# -- paths -------------------------------------------------------------------------------------------------------------


PATHS = {
    "model": {"path": "models/mine"},
    "data": {"task": "task.yaml", "files": {"train": "../a.jsonl", "validation": "/abs/b.jsonl"}},
    "prompt": {"init": "prompt", "path": "runs/one"},
    "cache": {"folder": "texts"},
    "scoring": {"path": "n.safetensors", "keep_layers": "greedy", "layer_path": "l.safetensors"},
    "train": {"steps": 100},
    "output": "out",
}


def paths_of(found):
    files, scoring = found.data.files, found.scoring
    named = (found.model.path, found.data.task, files["train"], files["validation"], found.prompt.path)
    return [*named, found.cache.folder, scoring.path, scoring.layer_path, found.output]


def test_paths_are_taken_from_the_recipes_folder(tmp_path, monkeypatch):
    (tmp_path / "deep" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "deep" / "r.yaml").write_text(yaml.safe_dump(PATHS))
    names = ["models/mine", "task.yaml", "../a.jsonl", "/abs/b.jsonl", "runs/one", "texts"]
    names += ["n.safetensors", "l.safetensors", "out"]
    wanted = [str((tmp_path / "deep" / name).resolve()) for name in names]
    for place, source in (
        (tmp_path, "deep/r.yaml"),
        (tmp_path / "deep", "r.yaml"),
        (tmp_path / "else", "../deep/r.yaml"),
    ):
        monkeypatch.chdir(place)
        found = load(source)
        assert paths_of(found) == wanted
    (tmp_path / "saved.yaml").write_text(found.to_yaml())
    assert load(tmp_path / "saved.yaml") == found
    # What is given beside the recipe is taken from the current folder.
    given = load("../deep/r.yaml", ["output=mine", "data.files.train=t.jsonl", "scoring={path: s}", "data.task=o.yml"])
    assert given.output == str(tmp_path / "else" / "mine")
    assert given.data.files == {"train": str(tmp_path / "else" / "t.jsonl"), "validation": "/abs/b.jsonl"}
    assert (given.scoring.path, given.data.task) == (str(tmp_path / "else" / "s"), str(tmp_path / "else" / "o.yml"))
    assert load(PATHS).output == str(tmp_path / "else" / "out")
    assert load("bbc_topics_smollm2").output == str(tmp_path / "else" / "runs" / "bbc_topics")


def test_names_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "there").mkdir(parents=True)
    (tmp_path / "smollm2-135m").mkdir()  # a run's folder, say
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").touch()
    monkeypatch.setenv("HOME", "/home/me")
    for name, wanted in {
        "org/name": "org/name",
        "gpt2": "gpt2",
        "smollm2-135m": "smollm2-135m",
        "org/there": str(tmp_path / "org" / "there"),
        "saved": str(tmp_path / "saved"),
        "./gpt2": str(tmp_path / "gpt2"),
        "a/b/c": str(tmp_path / "a" / "b" / "c"),
        "m.gguf": str(tmp_path / "m.gguf"),
        "~/m": "/home/me/m",
        "/m": "/m",
    }.items():
        assert load({**MINIMAL, "model": {"path": name}}).model.path == wanted
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "r.yaml").write_text(yaml.safe_dump({**MINIMAL, "model": {"path": "org/there"}}))
    assert load("other/r.yaml").model.path == "org/there"  # only the recipe's folder is looked into
    assert load({**MINIMAL, "data": {"task": "mnli"}}).data.task == "mnli"
