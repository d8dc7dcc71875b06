"""Schedules and stages: the paper's presets, and what holds for any model and any number of steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_prompt_tuning.errors import FptError, ScheduleError
from fast_prompt_tuning.schedule.stages import METHODS, Schedule, Stage

BOTH = ("encoder", "decoder")
LARGE, XL = Stage(24, 2816, stacks=BOTH), Stage(24, 5120, stacks=BOTH)


def sizes(schedule: Schedule) -> list[tuple]:
    return [(s.layers, s.ffn, s.steps) for s in schedule.stages]


# -- the paper's settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("pt", [(24, 2816, 30_000)]),
        ("ld", [(6, 2816, 6000), (12, 2816, 6000), (18, 2816, 6000), (24, 2816, 12_000)]),
        ("fr", [(24, 704, 6000), (24, 1408, 6000), (24, 2112, 6000), (24, 2816, 12_000)]),
        ("cr", [(6, 704, 6000), (12, 1408, 6000), (18, 2112, 6000), (24, 2816, 12_000)]),
    ],
)
def test_presets_for_t5_large_are_the_papers(method, expected):
    schedule = Schedule.preset(method, LARGE, total_steps=30_000)
    assert sizes(schedule) == expected
    assert all(s.stacks == BOTH for s in schedule.stages)
    assert schedule.total_steps == 30_000
    assert schedule.stages[-1].is_full(LARGE)


def test_presets_for_t5_xl_are_the_papers():
    schedule = Schedule.preset("cr", XL, total_steps=15_000)
    assert sizes(schedule) == [(6, 1280, 3000), (12, 2560, 3000), (18, 3840, 3000), (24, 5120, 6000)]
    assert schedule.boundaries == (0, 3000, 6000, 9000)


def test_only_the_encoder_is_cut_for_short_targets():
    schedule = Schedule.preset("cr", LARGE, total_steps=30_000, stacks=("encoder",))
    assert sizes(schedule) == [(6, 704, 6000), (12, 1408, 6000), (18, 2112, 6000), (24, 2816, 12_000)]
    assert all(s.stacks == ("encoder",) for s in schedule.stages)
    assert schedule.stages[0].layers_in("decoder") is None
    assert schedule.stages[0].ffn_in("decoder") is None
    assert schedule.stages[-1].is_full(LARGE)
    assert not schedule.stages[2].is_full(LARGE)


@pytest.mark.parametrize(
    ("layers", "ffn", "expected"),
    [
        (30, 1536, [(8, 384), (15, 768), (23, 1152), (30, 1536)]),  # 7.5 and 22.5: halves up
        (5, 7, [(1, 2), (3, 4), (4, 5), (5, 7)]),
        (2, 2, [(1, 1), (1, 1), (2, 2), (2, 2)]),
        (2, 3, [(1, 1), (1, 2), (2, 2), (2, 3)]),
    ],
)
def test_odd_depths_are_rounded_halves_up(layers, ffn, expected):
    assert [s[:2] for s in sizes(Schedule.preset("cr", Stage(layers, ffn), total_steps=10))] == expected


def test_stacks_of_different_depths_are_cut_each_by_its_own():
    full = Stage({"encoder": 12, "decoder": 4}, {"encoder": 100, "decoder": 40}, stacks=BOTH)
    first = Schedule.preset("cr", full, total_steps=10).stages[0]
    assert (first.layers_in("encoder"), first.layers_in("decoder")) == (3, 1)
    assert (first.ffn_in("encoder"), first.ffn_in("decoder")) == (25, 10)
    assert str(first) == "3/1 layers × 25/10 neurons"


def test_fewest_steps_give_every_stage_one():
    assert [s.steps for s in Schedule.preset("cr", LARGE, total_steps=4).stages] == [1, 1, 1, 1]
    assert [s.steps for s in Schedule.preset("pt", LARGE, total_steps=1).stages] == [1]


def test_constant_is_a_partial_only_run():
    schedule = Schedule.constant(Stage(6, 704, stacks=BOTH), 30_000)
    assert sizes(schedule) == [(6, 704, 30_000)]
    assert Schedule.constant(LARGE, 30_000) == Schedule.preset("pt", LARGE, total_steps=30_000)


# -- properties -------------------------------------------------------------------------------------------------------

per_stack = st.fixed_dictionaries({"encoder": st.integers(1, 60), "decoder": st.integers(1, 60)})
stages = st.one_of(
    st.builds(
        Stage,
        st.integers(1, 90),
        st.integers(1, 9000),
        st.integers(1, 500),
        st.sampled_from([("encoder",), ("decoder",), BOTH]),
    ),
    st.builds(
        Stage,
        per_stack,
        per_stack,
        st.integers(1, 500),
        st.just(BOTH),
        st.none() | st.integers(1, 64),
        st.none() | st.integers(1, 512),
    ),
)
schedules = st.builds(Schedule, st.lists(stages, min_size=1, max_size=6))


@given(st.sampled_from(sorted(METHODS)), st.integers(2, 120), st.integers(2, 20_000), st.integers(4, 100_000))
def test_presets_add_up_fit_and_never_shrink(method, layers, ffn, steps):
    full = Stage(layers, ffn)
    schedule = Schedule.preset(method, full, total_steps=steps)
    assert schedule.total_steps == steps
    schedule.check_fits(full)
    assert schedule.stages[-1].is_full(full)
    kept = [(s.layers, s.ffn) for s in schedule.stages]
    assert [k[0] for k in kept] == sorted(k[0] for k in kept)
    assert [k[1] for k in kept] == sorted(k[1] for k in kept)
    cut_layers, cut_ffn = METHODS[method]
    assert cut_layers or {k[0] for k in kept} == {layers}
    assert cut_ffn or {k[1] for k in kept} == {ffn}
    if len(kept) == 4:  # rounding moves a boundary by less than a step, but every stage has at least one
        for start, share in zip(schedule.boundaries, (0, 0.2, 0.4, 0.6), strict=True):
            assert abs(start - share * steps) < 1


@given(schedules, st.integers(0, 5000))
def test_every_step_belongs_to_exactly_one_stage(schedule, step):
    starts = (*schedule.boundaries, schedule.total_steps)
    owners = [i for i in range(len(schedule.stages)) if starts[i] <= step < starts[i + 1]]
    assert owners == ([schedule.index_at(step)] if step < schedule.total_steps else [])
    if step >= schedule.total_steps:
        assert schedule.index_at(step) == len(schedule.stages) - 1
    assert schedule.stage_at(step) == schedule.stages[schedule.index_at(step)]


@given(schedules)
def test_each_stage_lasts_its_steps(schedule):
    counts = [0] * len(schedule.stages)
    for step in range(schedule.total_steps):
        counts[schedule.index_at(step)] += 1
    assert counts == [s.steps for s in schedule.stages]


@given(schedules)
def test_round_trips(schedule):
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    for same in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)):
        assert same == schedule
        assert hash(same) == hash(schedule)
        assert same.to_dict() == schedule.to_dict()


@given(stages)
def test_stage_round_trips_and_same_size_ignores_steps(stage):
    assert Stage(**stage.to_dict()) == stage
    longer = dataclasses.replace(stage, steps=stage.steps + 1)
    assert longer != stage
    assert longer.same_size(stage)
    assert stage.is_full(stage)


@given(per_stack, per_stack)
def test_equal_stages_are_equal_however_they_were_written(layers, ffn):
    one = Stage(layers, ffn, 3, BOTH)
    other = Stage(dict(reversed(layers.items())), dict(reversed(ffn.items())), 3, ("decoder", "encoder"))
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other)  # the encoder first, in any order of writing
    assert one.to_dict() == other.to_dict()
    assert list(json.loads(json.dumps(one.to_dict()))["stacks"]) == list(BOTH)
    if layers["encoder"] == layers["decoder"] and ffn["encoder"] == ffn["decoder"]:
        assert one == Stage(layers["encoder"], ffn["encoder"], 3, BOTH)


def test_stages_and_schedules_cannot_be_changed():
    given_sizes = {"encoder": 6, "decoder": 3}
    stage = Stage(given_sizes, 704, 5, BOTH)
    before = hash(stage)
    given_sizes["encoder"] = 1
    assert stage.layers_in("encoder") == 6
    assert hash(stage) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.steps = 1
    with pytest.raises(TypeError):
        stage.layers["encoder"] = 1
    stage.to_dict()["layers"]["encoder"] = 1
    assert stage.layers_in("encoder") == 6
    schedule = Schedule([stage])
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.stages = ()
    assert isinstance(schedule.stages, tuple)
    assert len({stage, copy.copy(stage)}) == 1
    assert len({schedule, Schedule((stage,))}) == 1


def test_printing():
    schedule = Schedule.preset("cr", LARGE, total_steps=30_000)
    assert str(schedule).startswith("6 layers × 704 neurons (6000 steps) → 12 layers × 1408 neurons (6000 steps)")
    assert str(schedule).count("→") == 3


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stage(0, 10), "layers=0 for the decoder must be a whole number of at least 1"),
        (lambda: Stage(-3, 10), "layers=-3"),
        (lambda: Stage(2.5, 10), "layers=2.5"),
        (lambda: Stage(True, 10), "layers=True"),
        (lambda: Stage("6", 10), "layers='6'"),
        (lambda: Stage(None, 10), "layers=None"),
        (lambda: Stage(6, 0), "ffn=0 for the decoder"),
        (lambda: Stage({"encoder": 6}, 10, stacks=BOTH), r"layers=.*must name exactly the stacks \['enc"),
        (lambda: Stage({"encoder": 6, "decoder": 0}, 10, stacks=BOTH), "layers=0 for the decoder"),
        (lambda: Stage(6, {"encoder": 6}), r"ffn=.*must name exactly the stacks \['decoder'\]"),
        (lambda: Stage(6, 10, steps=-1), "steps=-1 must be a whole number of at least 0"),
        (lambda: Stage(6, 10, steps=1.5), "steps=1.5"),
        (lambda: Stage(6, 10, stacks=()), r"stacks=\[\] must be a non-empty choice"),
        (lambda: Stage(6, 10, stacks=("middle",)), r"stacks=\['middle'\].*\['encoder', 'decoder'\]"),
        (lambda: Stage(6, 10, stacks="encoder"), "stacks="),
        (lambda: Stage.from_dict({"layers": 6, "ffn": 3, "rate": 0.5}), "nothing else"),
        (lambda: Stage.from_dict({"layers": 6}), "needs layers and ffn"),
        (lambda: Stage.from_dict({"layers": 6, "ffn": 3, "width": 1}), "nothing else"),
        (lambda: Schedule([]), r"stages=\[\] is empty; a schedule needs at least one stage"),
        (lambda: Schedule([Stage(6, 10, 5), Stage(6, 10)]), r"stages\[1\].steps=0 must be at least 1"),
        (lambda: Schedule.constant(Stage(6, 10), 0), r"stages\[0\].steps=0"),
        (lambda: Schedule([Stage(6, 10, 5)]).stage_at(-1), "step=-1 must be at least 0"),
        (lambda: Schedule.preset("dl", LARGE, total_steps=10), "method='dl' is unknown; choose one of pt, ld, fr, cr"),
        (lambda: Schedule.preset("cr", LARGE, total_steps=3), "total_steps=3 must be a whole .* at least 4 for 'cr'"),
        (lambda: Schedule.preset("pt", LARGE, total_steps=0), "total_steps=0 .* at least 1 for 'pt'"),
        (lambda: Schedule.preset("cr", LARGE, total_steps=10.0), "total_steps=10.0"),
        (lambda: Schedule.preset("cr", LARGE, total_steps=10, stacks=[]), r"stacks=\[\] names no stack to cut"),
        (
            lambda: Schedule.preset("cr", Stage(24, 10), total_steps=10, stacks=("encoder",)),
            r"names the encoder, but this model has only \['decoder'\]",
        ),
        (
            lambda: Stage(25, 704, stacks=BOTH).check_fits(LARGE),
            "layers=25 does not fit: the encoder .* 24; choose 1 to 24",
        ),
        (lambda: Stage(24, 2817).check_fits(LARGE), "ffn=2817 does not fit: the decoder .* 2816; choose 1 to 2816"),
        (lambda: Stage(2, 2, stacks=("encoder",)).check_fits(Stage(24, 10)), "names the encoder"),
        (lambda: Schedule([Stage(6, 10, 5), Stage(99, 10, 5)]).check_fits(LARGE), "layers=99 does not fit"),
    ],
)
def test_refusals_name_the_field_the_value_and_the_fix(build, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        build()
    assert isinstance(caught.value, FptError)
    assert isinstance(caught.value, ValueError)


def test_a_method_that_would_cut_nothing_is_refused():
    with pytest.raises(ScheduleError, match="'ld' would leave out no layers: this model has 1 in each of decoder"):
        Schedule.preset("ld", Stage(1, 64), total_steps=10)
    with pytest.raises(ScheduleError, match="no FFN neurons"):
        Schedule.preset("fr", Stage(4, 1), total_steps=10)
    assert [s.layers for s in Schedule.preset("ld", Stage(2, 64), total_steps=10).stages] == [1, 1, 2, 2]
