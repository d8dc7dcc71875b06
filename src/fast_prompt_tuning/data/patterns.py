"""Regular expressions of task files, which may come from anybody: matched in bounded time and memory."""

from __future__ import annotations

import math
import re
import warnings
from functools import lru_cache
from typing import Any

import regex

from ..errors import DataError, shown

SECONDS = 5.0
"""Time that one replacement of one field may take."""
LONGEST_PATTERN, LONGEST_BY = 500, 100
"""Characters of a pattern and of what replaces its matches."""
MOST_COPIES = 100_000
"""Copies of a part that compiling may make: `regex` writes `(a+)+` out as `aa*(aa*)*`, and `a{9}` nine times."""
LONGEST_TEXT = 5_000_000
"""Characters that replacing may make."""


@lru_cache(maxsize=256)
def pattern_of(pattern: str) -> Any:
    """The compiled pattern: what Python's `re` takes, matched by `regex`, which knows a time limit.

    Raises:
        ValueError: it is no regular expression, or too long.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, and may have {LONGEST_PATTERN}")
    counts = [int(number) for braces in re.findall(r"\{([\d,]*)\}", pattern) for number in braces.split(",") if number]
    if 2 ** pattern.count("+") * math.prod(max(count, 1) for count in counts) > MOST_COPIES:
        raise ValueError("it repeats too much: use fewer + and smaller {n}")
    if re.search(r"(?<![\\N])\{(?!\d*,?\d*\})", pattern):  # `regex` matches `(?:foo){e}` approximately, `re` does not
        raise ValueError("it has a { that begins no {n} or {n,m}; write \\{")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as `[[`, which may come to mean something else
            re.compile(pattern)
            return regex.compile(pattern)
    except (re.error, regex.error, Warning, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None


def substitute(pattern: str, by: str, text: str) -> str:
    r"""`text` with every match replaced; `by` may name groups (`\1`).

    Raises:
        DataError: it takes too long on this text, or makes too much of it.
    """
    length = 0

    def put(match: Any) -> str:
        nonlocal length
        piece = str(match.expand(by))
        length += len(piece)
        if length > LONGEST_TEXT:
            raise DataError(
                f"replacing {shown(pattern)} makes more than {LONGEST_TEXT} characters; use another pattern"
            )
        return piece

    try:
        return str(pattern_of(pattern).sub(put, text, timeout=SECONDS))
    except TimeoutError:
        raise DataError(
            f"replacing {shown(pattern)} takes over {SECONDS:.0f} seconds on this text; use a simpler pattern"
        ) from None
