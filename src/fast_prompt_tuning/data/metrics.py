"""Metrics of text predictions, computed per example where they can be, and bootstrapped. No torch.

All scores are in percent. Sources: the official SQuAD 2.0 evaluation script (Rajpurkar et al. 2018); the SuperGLUE
ReCoRD evaluation (Zhang et al. 2018; Wang et al. 2019); ROUGE as implemented by the `rouge-score` package.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .confusion import label_counts, macro_f1, matthews

Scores = dict[str, list[float]]
"""Score name -> one value in percent per example (or per example of a subset, see `squad_v2`)."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_RESAMPLES = 1000  # of a bootstrap
_CHUNK = 1 << 22  # resampled values held at once: 32 MiB


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Args:
        per_example: predictions and references -> `Scores`.
        scores: the names it always gives, the one to choose checkpoints by first.
        of_counts: those of them that are of a split, not of an example, as functions of `label_counts`.
    """

    per_example: Callable[[Sequence[str], Sequence[Sequence[str]]], Scores]
    scores: tuple[str, ...]
    of_counts: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        """What there is per example."""
        _check(predictions, references)
        return self.per_example(predictions, references)


@dataclass(frozen=True)
class MetricResult:
    """What `evaluate` found.

    Args:
        name: metric name, a key of `METRICS`.
        values: score name -> mean over the examples, percent.
        intervals: score name -> 95% bootstrap interval (low, high), percent.
        primary: the score to report first and to choose checkpoints by.
        n: number of examples scored (of groups, where groups were given).
    """

    name: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    primary: str
    n: int


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions but {len(references)} references; give one list per prediction"
        )
    if not predictions:
        raise DataError("no predictions to score; check the split and its limit")
    for i, golds in enumerate(references):
        if isinstance(golds, str):  # a string is a sequence of letters: it would be scored, wrongly
            raise DataError(f"references[{i}] is a string; give a list of acceptable answers")


def _require_references(references: Sequence[Sequence[str]]) -> None:
    for i, golds in enumerate(references):
        if not golds:
            raise DataError(f"example {i} has no reference; this metric needs a labelled split")


# --- accuracy ---


def _accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    _require_references(references)
    hits = (p.strip() in {gold.strip() for gold in golds} for p, golds in zip(predictions, references, strict=True))
    return {"accuracy": [100.0 * hit for hit in hits]}


# --- SQuAD and ReCoRD ---


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces: the official SQuAD normalisation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _token_f1(gold: str, prediction: str, *, both_empty: float) -> float:
    """F1 (0 to 1) of the bags of normalised words; `both_empty` where neither has a word."""
    gold_words, words = normalize_answer(gold).split(), normalize_answer(prediction).split()
    if not gold_words or not words:
        return both_empty if not gold_words and not words else 0.0
    common = sum((Counter(gold_words) & Counter(words)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def _best(golds: Sequence[str], prediction: str, *, both_empty: float) -> tuple[float, float]:
    """Exact match and F1 in percent, each the best over the gold answers."""
    exact = any(normalize_answer(gold) == normalize_answer(prediction) for gold in golds)
    return 100.0 * exact, 100.0 * max(_token_f1(gold, prediction, both_empty=both_empty) for gold in golds)


def _squad_v2(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    scores: Scores = {"em": [], "f1": []}
    for prediction, golds in zip(predictions, references, strict=True):
        # The official script drops golds that normalise to nothing, and scores against "" where none is left.
        answers = [gold for gold in golds if normalize_answer(gold)] or [""]
        subset = "has_ans" if golds else "no_ans"
        for name, value in zip(("em", "f1"), _best(answers, prediction, both_empty=1.0), strict=True):
            scores[name].append(value)
            scores.setdefault(f"{subset}_{name}", []).append(value)
    return scores


def _record(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    _require_references(references)
    # SuperGLUE's F1 is SQuAD 1.1's: two empty answers share no word, so they score 0.
    pairs = [_best(golds, p, both_empty=0.0) for p, golds in zip(predictions, references, strict=True)]
    return {"em": [em for em, _ in pairs], "f1": [f1 for _, f1 in pairs]}


# --- ROUGE ---


@cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer  # imported late: it loads a stemmer that other metrics do not need

    return rouge_scorer.RougeScorer(list(_ROUGE), use_stemmer=True)


def _one_sentence_a_line(text: str) -> str:
    # ROUGE-Lsum takes lines for sentences. T5's tokenizer cannot write a newline, so a text without one is split at
    # sentence ends; rouge1, rouge2 and rougeL see the same words either way.
    return text if "\n" in text.strip() else _SENTENCE_END.sub("\n", text.strip())


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    _require_references(references)
    scores: Scores = {name: [] for name in ("rougeL", "rouge1", "rouge2", "rougeLsum")}
    for prediction, golds in zip(predictions, references, strict=True):
        best = _rouge_scorer().score_multi([_one_sentence_a_line(g) for g in golds], _one_sentence_a_line(prediction))
        for name, values in scores.items():
            values.append(100.0 * float(best[name].fmeasure))
    return scores


_BUILT_IN = {
    "accuracy": Metric(_accuracy, ("accuracy",)),
    "macro_f1": Metric(_accuracy, ("macro_f1", "accuracy"), {"macro_f1": macro_f1}),
    "matthews": Metric(_accuracy, ("matthews", "accuracy"), {"matthews": matthews}),
    "squad_v2": Metric(_squad_v2, ("em", "f1")),
    "record": Metric(_record, ("em", "f1")),
    "rouge": Metric(_rouge, ("rougeL", "rouge1", "rouge2", "rougeLsum")),
}
_registry = dict(_BUILT_IN)
METRICS: Mapping[str, Metric] = MappingProxyType(_registry)
"""Every metric by name; `register_metric` adds one."""


def register_metric(
    name: str,
    per_example: Callable[[Sequence[str], Sequence[Sequence[str]]], Mapping[str, Sequence[float]]],
    *,
    scores: Sequence[str],
) -> None:
    """Make a metric of your own known: tasks loaded later in this process may name it.

    No file can do this, since a metric is code. Registering a name again replaces its metric.

    Args:
        name: what a task's `metric` calls it.
        per_example: predictions (one text per example) and references (a list of acceptable answers per example) ->
            score name -> one finite number per example. Their mean is reported, as percent.
        scores: the names it gives, the one to choose checkpoints by first.

    Raises:
        ConfigError: the name is a built-in metric's, or no score is named.
    """
    if name in _BUILT_IN:
        raise ConfigError(f"metric={name!r} is built in; choose another name")
    names = () if isinstance(scores, str) else tuple(scores)
    if not names:
        raise ConfigError(f"scores={scores!r} of metric {name!r} must list at least one name")

    def checked(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        by_score = per_example(predictions, references)
        try:
            values = {score: np.asarray(by_score[score], dtype=np.float64) for score in names}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"metric {name!r} must give numbers under {', '.join(names)}: {error!r}") from error
        for score, column in values.items():
            if column.shape != (len(predictions),) or not np.isfinite(column).all():
                raise DataError(
                    f"metric {name!r} must give one finite number per example under {score!r}; for "
                    f"{len(predictions)} examples it gave values of shape {column.shape}"
                )
        return {score: column.tolist() for score, column in values.items()}

    _registry[name] = Metric(checked, names)


def _means(scores: Scores) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in scores.items()}


def bootstrap_interval(per_example: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean (Efron 1979), the same for the same seed.

    Args:
        per_example: one score per example, in any unit.
        seed: seed of the resampling.

    Returns:
        (low, high), in the unit of the scores; it always contains their mean.

    Raises:
        DataError: no scores.
    """
    scores = np.asarray(per_example, dtype=np.float64)
    if scores.size == 0:
        raise DataError("no scores to resample")
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(scores.size, size=(rows, scores.size))].mean(axis=1) for rows in _chunks(scores.size)]
    return _interval(means, scores.mean())


def _chunks(size: int) -> Iterator[int]:
    """Resamples of `size` values to draw at once, so that memory does not grow with the split."""
    rows = max(1, _CHUNK // size)
    return (min(rows, _RESAMPLES - done) for done in range(0, _RESAMPLES, rows))


def _interval(resampled: Sequence[np.ndarray], value: Any) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate(resampled), (0.025, 0.975))
    return float(min(low, value)), float(max(high, value))  # rounding, or a rare event, may leave it just outside


def _counted_interval(score: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> tuple[float, float]:
    """The same interval of a function of counts: drawing examples anew is drawing counts from a multinomial."""
    rng = np.random.default_rng(0)
    n, flat = counts.sum(), counts.reshape(-1)
    drawn = (rng.multinomial(n, flat / n, size=rows) for rows in _chunks(flat.size))
    return _interval([score(each.reshape(-1, *counts.shape)) for each in drawn], score(counts))


def evaluate(
    metric_name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[Hashable] | None = None,
    *,
    primary: str | None = None,
) -> MetricResult:
    """Scores with 95% bootstrap intervals.

    Args:
        metric_name: key of `METRICS`.
        predictions: one text per example.
        references: acceptable answers of each example.
        groups: optional id per example. Examples with one id are one question (ReCoRD has a training example per
            answer): the first prediction is scored against all their references.
        primary: score to report first; default: the metric's own choice.

    Raises:
        ConfigError: unknown metric, or a `primary` it does not give.
        DataError: lengths differ, nothing to score, or a reference that the metric needs is missing.
    """
    if metric_name not in METRICS:
        raise ConfigError(f"metric={metric_name!r} is unknown; choose one of {', '.join(METRICS)}")
    metric = METRICS[metric_name]
    _check(predictions, references)
    if groups is not None:
        predictions, references = _merge_groups(predictions, references, groups)
    scores = metric(predictions, references)
    primary = primary or metric.scores[0]
    if primary not in (known := [*metric.of_counts, *scores]):
        raise ConfigError(f"primary={primary!r} is not a score of {metric_name}; choose one of {', '.join(known)}")
    values, intervals = {}, {}
    counts = label_counts(predictions, references) if metric.of_counts else np.zeros(0)
    for name, score in metric.of_counts.items():
        values[name], intervals[name] = float(score(counts)), _counted_interval(score, counts)
    values.update(_means(scores))
    intervals.update({name: bootstrap_interval(each) for name, each in scores.items()})
    return MetricResult(metric_name, values, intervals, primary, len(predictions))


def _merge_groups(
    predictions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[Hashable]
) -> tuple[list[str], list[list[str]]]:
    if len(groups) != len(predictions):
        raise DataError(f"{len(groups)} groups but {len(predictions)} predictions; give one group id per prediction")
    first: dict[Hashable, str] = {}
    golds: dict[Hashable, dict[str, None]] = {}  # a dict keeps order where a set would not
    for group, prediction, answers in zip(groups, predictions, references, strict=True):
        first.setdefault(group, prediction)
        golds.setdefault(group, {}).update(dict.fromkeys(answers))
    return list(first.values()), [list(answers) for answers in golds.values()]
