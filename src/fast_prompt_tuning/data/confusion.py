"""Scores of a whole labelled split, as functions of how often each label is answered by which. No torch.

Source of the correlation of several labels: Gorodkin 2004. They are written on counts, and not taken from scikit-learn,
so that a bootstrap is one draw of counts for all resamples at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError


def label_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """How often each of the K labels that occur as references (row) is answered by each (column): `(K, K + 1)`.

    The last column is every answer that is none of these labels.

    Raises:
        DataError: an example has no reference, or several.
    """
    golds = [{gold.strip() for gold in each} for each in references]
    for i, each in enumerate(golds):
        if len(each) != 1:
            raise DataError(f"example {i} has {len(each)} references; this metric needs exactly one, its label")
    labels = [label for (label,) in golds]
    places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    counts = np.zeros((len(places), len(places) + 1), dtype=np.int64)
    answered = [places.get(p.strip(), len(places)) for p in predictions]
    np.add.at(counts, ([places[label] for label in labels], answered), 1)
    return counts


def _hits(counts: np.ndarray) -> np.ndarray:
    return np.diagonal(counts, axis1=-2, axis2=-1)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Macro-averaged F1 in percent: the mean over the labels that occur as references.

    Args:
        counts: `(..., K, K + 1)`, as `label_counts` gives them.
    """
    gold, answered = counts.sum(-1), counts[..., :-1].sum(-2)
    f1 = np.divide(2 * _hits(counts), gold + answered, out=np.zeros(gold.shape), where=gold > 0)
    return 100 * f1.sum(-1) / (gold > 0).sum(-1)


def matthews(counts: np.ndarray) -> np.ndarray:
    """Matthews correlation in percent, of any number of labels; 0 where all references, or all answers, are one.

    Args:
        counts: `(..., K, K + 1)`, as `label_counts` gives them.
    """
    gold, answered, n = counts.sum(-1), counts.sum(-2), counts.sum((-2, -1))
    covariance = n * _hits(counts).sum(-1) - (gold * answered[..., :-1]).sum(-1)
    variance = np.sqrt(1.0 * (n**2 - (gold**2).sum(-1)) * (n**2 - (answered**2).sum(-1)))
    return 100 * np.divide(covariance, variance, out=np.zeros(variance.shape), where=variance > 0)
