"""A first guess at a task from rows of a file: which field is the text, what is asked, and what the answer is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

ANSWERS = ("label", "labels", "target", "answer", "category", "class", "topic", "team", "sentiment", "summary",
           "headline", "title", "output", "response", "completion")  # fmt: skip
"""Names that say: this is the answer. The first one that a file has is taken."""

MOST_LABELS = 20
REPEATED = 4
"""Rows that a label has on average, at least: else it is no label but a text that is to be written."""


@dataclass(frozen=True)
class Guess:
    """Fields by what they are for.

    Args:
        text: the longest, which may be shortened.
        asked: further words that the answer depends on.
        answer: what is to be learned.
        labels: all its values, where it has few; else None.
    """

    text: str
    asked: tuple[str, ...]
    answer: str
    labels: tuple[str, ...] | None


def guess(rows: Sequence[Mapping[str, Any]], answer: str | None = None) -> Guess:
    """The fields of a task, from its first rows.

    Args:
        answer: the field that holds the answer, where the guess is wrong.

    Raises:
        DataError: no field looks like an answer, or none is left for the text; names the fields there are.
    """
    values = {name: [_words(row.get(name)) for row in rows] for name in dict.fromkeys(k for row in rows for k in row)}
    values = {name: texts for name, texts in values.items() if sum(map(bool, texts)) >= 0.9 * len(texts)}
    names = ", ".join(map(repr, values)) or "none"
    if answer is not None and answer not in values:
        raise DataError(f"--answer {answer!r} is no field that the rows have; choose one of {names}")
    if answer is None:
        known = [name for wanted in ANSWERS for name in values if name.lower() == wanted]
        few = sorted((len(set(texts)), name) for name, texts in values.items() if _labels(texts))
        if not (known or few):
            raise DataError(f"none of the fields {names} looks like an answer; name it with --answer FIELD")
        answer = known[0] if known else few[0][1]
    length = {name: sum(map(len, texts)) / len(texts) for name, texts in values.items() if name != answer}
    wordy = [name for name in length if sum(len(text.split()) > 1 for text in values[name]) >= 0.5 * len(rows)]
    if not wordy:
        raise DataError(f"no field but {answer!r} holds a text; the rows have {names}")
    text = max(wordy, key=length.__getitem__)
    return Guess(text, tuple(name for name in wordy if name != text), answer, _labels(values[answer]))


def identifiers(names: Sequence[str]) -> dict[str, str]:
    """A name that a template can use for each field: `Support team` → `support_team`."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"\W+", "_", name.strip().lower(), flags=re.ASCII).strip("_") or "field"
        plain = f"field_{plain}" if plain[0].isdigit() else plain
        while plain in found.values():
            plain += "_"
        found[name] = plain
    return found


def _words(value: Any) -> str:
    """A value as text; of a nested one or of none, nothing."""
    return "" if value is None or isinstance(value, (list, dict)) else str(value).strip()


def _labels(texts: Sequence[str]) -> tuple[str, ...] | None:
    """The values of a field that takes few, most frequent first."""
    counts = Counter(text for text in texts if text)
    short = all(len(text.split()) <= 5 for text in counts)
    if 2 <= len(counts) <= MOST_LABELS and short and sum(counts.values()) >= REPEATED * len(counts):
        return tuple(name for name, _ in counts.most_common())
    return None
