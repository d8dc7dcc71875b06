"""Which layers and which FFN neurons a partial PLM keeps. Pure functions over numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ScheduleError


def _check(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ScheduleError(f"k={k} must be between 1 and n={n}")


def evenly(k: int, n: int) -> list[int]:
    """`k` of `n` indices spread evenly, first and last always kept: the paper's layer dropping (Section 3.2).

    The k − 1 gaps between kept indices are g = (n − k) // (k − 1) + 1 wide, the last (n − k) mod (k − 1) of them one
    wider. `evenly(6, 24) == [0, 4, 8, 13, 18, 23]`; a single layer is the first.

    Raises:
        ScheduleError: `k` outside 1…`n`.
    """
    _check(k, n)
    if k == 1:
        return [0]
    gap, wider = divmod(n - k, k - 1)
    indices = [0]
    for i in range(k - 1):
        indices.append(indices[-1] + gap + 1 + (i >= k - 1 - wider))
    return indices


def first(k: int, n: int) -> list[int]:
    """The first `k` of `n` indices."""
    _check(k, n)
    return list(range(k))


def top(k: int, scores: Sequence[float], always: Sequence[int] = ()) -> list[int]:
    """Indices of the `k` highest `scores`, ascending; ties go to the lower index.

    Args:
        always: indices kept whatever their score (T5's first layer owns the position bias of all).

    Raises:
        ScheduleError: `k` outside 1…len(scores), or fewer than `always` needs.
    """
    _check(k, len(scores))
    required = set(always)
    if len(required) > k:
        raise ScheduleError(f"k={k} is fewer than the {len(required)} indices {sorted(required)} that must be kept")
    ranked = sorted(range(len(scores)), key=lambda i: (i not in required, -scores[i], i))
    return sorted(ranked[:k])
