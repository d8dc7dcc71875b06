"""Which layers and neurons are kept: the paper's own numbers, and what holds for any size."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_prompt_tuning.errors import ScheduleError
from fast_prompt_tuning.plm.selection import evenly, first, top

sizes = st.integers(1, 120).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        (6, [0, 4, 8, 13, 18, 23]),
        (12, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23]),
        (18, [*range(12), 13, 15, 17, 19, 21, 23]),
        (24, list(range(24))),
        (2, [0, 23]),
        (1, [0]),
    ],
)
def test_evenly_picks_what_the_papers_code_picks(k, kept):
    assert evenly(k, 24) == kept


def test_evenly_on_one_layer():
    assert evenly(1, 1) == [0]


@given(sizes)
def test_evenly_keeps_both_ends_and_gaps_grow_by_at_most_one(size):
    k, n = size
    kept = evenly(k, n)
    assert len(kept) == len(set(kept)) == k
    assert kept == sorted(kept)
    assert kept[0] == 0
    if k > 1:
        assert kept[-1] == n - 1
        gaps = [b - a for a, b in pairwise(kept)]
        assert gaps == sorted(gaps)  # the wider ones last
        assert gaps[-1] - gaps[0] <= 1
        assert gaps[0] == (n - k) // (k - 1) + 1
        assert sum(gap > gaps[0] for gap in gaps) == (n - k) % (k - 1)


@given(sizes)
def test_first(size):
    k, n = size
    assert first(k, n) == list(range(k))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_top_is_the_highest_scores_with_ties_to_the_lower_index(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    must = data.draw(st.sets(st.integers(0, len(scores) - 1), max_size=k))
    kept = top(k, scores, tuple(must))
    assert kept == sorted(set(kept))
    assert len(kept) == k
    assert must <= set(kept)
    # Of the free choices, each beats (or ties from the left with) everything left out.
    for chosen in set(kept) - must:
        for left_out in set(range(len(scores))) - set(kept):
            assert (scores[chosen], -chosen) > (scores[left_out], -left_out)


def test_top_by_example():
    assert top(2, [0.1, 0.9, 0.5, 0.9]) == [1, 3]
    assert top(2, [0.5, 0.9, 0.5, 0.5]) == [0, 1]
    assert top(2, [0.1, 0.9, 0.5, 0.9], always=(0,)) == [0, 1]
    assert top(3, [1.0, 1.0, 1.0]) == [0, 1, 2]


@pytest.mark.parametrize("select", [evenly, first, lambda k, n: top(k, [0.0] * n)], ids=["evenly", "first", "top"])
@pytest.mark.parametrize("k", [0, -1, 6])
def test_sizes_out_of_range_are_refused(select, k):
    with pytest.raises(ScheduleError, match=f"k={k} must be between 1 and n=5"):
        select(k, 5)


def test_top_refuses_fewer_than_must_be_kept():
    with pytest.raises(ScheduleError, match=r"k=1 is fewer than the 2 indices \[0, 3\]"):
        top(1, [1.0] * 5, always=(3, 0))
