from __future__ import annotations

import collections
import math
import re
import string

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_prompt_tuning import register_metric
from fast_prompt_tuning.data import metrics
from fast_prompt_tuning.errors import ConfigError, DataError

WORDS = st.sampled_from(["the", "A", "an", "cat", "Cat!", "dog", "1907", "...", "river Wye", "the-end", "", "  ", "é"])
TEXT = st.lists(WORDS, max_size=5).map(" ".join)
PAIRS = st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=3)), min_size=1, max_size=12)


def means(metric, predictions, references):
    return {name: np.mean(values) for name, values in metrics.METRICS[metric](predictions, references).items()}


def squad_means(predictions, references):
    """With the counts that the official script gives."""
    scores = metrics.METRICS["squad_v2"](predictions, references)
    counts = {f"{subset}_total": len(scores.get(f"{subset}_em", ())) for subset in ("has_ans", "no_ans")}
    return {**means("squad_v2", predictions, references), **counts, "total": len(scores["em"])}


# The official SQuAD 2.0 script's algorithm, written out again step by step.


def official_normalize(s):
    s = s.lower()
    s = "".join(ch for ch in s if ch not in set(string.punctuation))
    s = re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s)
    return " ".join(s.split())


def official_f1(gold, pred):
    gold_toks = official_normalize(gold).split() if gold else []
    pred_toks = official_normalize(pred).split() if pred else []
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(pred_toks), 1.0 * same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def official_squad(predictions, references):
    exact, f1 = {}, {}
    for i, (pred, answers) in enumerate(zip(predictions, references, strict=True)):
        golds = [a for a in answers if official_normalize(a)]
        if not golds:
            golds = [""]
        exact[i] = max(int(official_normalize(a) == official_normalize(pred)) for a in golds)
        f1[i] = max(official_f1(a, pred) for a in golds)
    out = {"em": 100.0 * sum(exact.values()) / len(exact), "f1": 100.0 * sum(f1.values()) / len(f1)}
    for name, wanted in (("has_ans", True), ("no_ans", False)):
        ids = [i for i, answers in enumerate(references) if bool(answers) is wanted]
        if ids:
            out[f"{name}_em"] = 100.0 * sum(exact[i] for i in ids) / len(ids)
            out[f"{name}_f1"] = 100.0 * sum(f1[i] for i in ids) / len(ids)
        out[f"{name}_total"] = len(ids)
    return {**out, "total": len(predictions)}


@settings(deadline=None, max_examples=300)
@given(PAIRS)
def test_squad_is_the_official_algorithm(pairs):
    predictions, references = [p for p, _ in pairs], [g for _, g in pairs]
    assert squad_means(predictions, references) == pytest.approx(official_squad(predictions, references))


@settings(deadline=None)
@given(TEXT, TEXT)
def test_squad_scores_are_bounded_and_symmetric(a, b):
    # "x" keeps both sides answerable: an answer that normalises to nothing is dropped, which is not symmetric
    one, other = (means("squad_v2", [p + " x"], [[g + " x"]]) for p, g in ((a, b), (b, a)))
    assert one == pytest.approx(other)
    assert 0 <= one["em"] <= one["f1"] <= 100


def test_squad_by_hand():
    predictions = ["The 1907!", "built in 1907", "", "something", ""]
    references = [["1907"], ["in 1907", "1907"], [], [], ["the"]]
    found = squad_means(predictions, references)
    assert found["em"] == pytest.approx(60)  # the last gold answer is only an article: nothing is left of it
    assert found["f1"] == pytest.approx(100 * (1 + 0.8 + 1 + 0 + 1) / 5)
    assert (found["has_ans_total"], found["no_ans_total"], found["total"]) == (3, 2, 5)
    assert found["has_ans_em"] == pytest.approx(200 / 3)
    assert found["no_ans_em"] == found["no_ans_f1"] == 50
    assert "no_ans_em" not in means("squad_v2", ["a"], [["a"]])


def test_record_takes_the_best_answer_and_scores_two_empty_answers_as_superglue_does():
    assert means("record", ["omar khan", "Lee"], [["Anna Lee", "Omar Khan"], ["Anna Lee"]]) == pytest.approx(
        {"em": 50, "f1": 100 * (1 + 2 / 3) / 2}
    )
    assert means("record", ["the"], [["a"]]) == {"em": 100, "f1": 0}


def test_accuracy_is_exact_but_for_outer_space():
    assert means("accuracy", [" yes\n", "Yes", "no"], [["yes"], ["yes"], ["maybe", "no"]])["accuracy"] == pytest.approx(
        200 / 3
    )


LABELS = st.sampled_from(["sport", "tech", "art"])
LABELLED = st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=30)


def by_definition(pairs):
    """Macro-F1 over the gold labels and Matthews correlation, from the definitions of scikit-learn's user guide."""
    f1 = []
    for label in {gold for _, gold in pairs}:
        hits = sum(p == g == label for p, g in pairs)
        f1.append(2 * hits / (sum(p == label for p, _ in pairs) + sum(g == label for _, g in pairs)))
    n, hits = len(pairs), sum(p == g for p, g in pairs)
    answered, gold = (collections.Counter(side) for side in zip(*pairs, strict=True))
    spread = [n * n - sum(c * c for c in counter.values()) for counter in (answered, gold)]
    above = hits * n - sum(answered[label] * gold[label] for label in gold)
    return 100 * sum(f1) / len(f1), 100 * above / math.sqrt(math.prod(spread)) if all(spread) else 0.0


@settings(deadline=None)
@given(LABELLED)
def test_scores_of_labels_are_those_of_their_definitions(pairs):
    predictions, references = [f" {p}\n" for p, _ in pairs], [[g] for _, g in pairs]
    for name, value in zip(("macro_f1", "matthews"), by_definition(pairs), strict=True):
        found = metrics.evaluate(name, predictions, references)
        assert found.primary == name
        assert found.values[name] == pytest.approx(value)
        assert found.intervals[name][0] <= found.values[name] <= found.intervals[name][1]
        assert found.values["accuracy"] == pytest.approx(100 * sum(p == g for p, g in pairs) / len(pairs))


@settings(deadline=None, max_examples=30)
@given(LABELLED)
def test_scores_of_labels_are_scikit_learns(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, gold = zip(*pairs, strict=True)
    references = [[g] for g in gold]
    f1 = sklearn.f1_score(gold, predictions, labels=sorted(set(gold)), average="macro", zero_division=0)
    assert metrics.evaluate("macro_f1", predictions, references).values["macro_f1"] == pytest.approx(100 * f1)
    if len(set(gold)) > 1:
        correlation = sklearn.matthews_corrcoef(gold, predictions)
        found = metrics.evaluate("matthews", predictions, references).values["matthews"]
        assert found == pytest.approx(100 * correlation, abs=1e-9)


def test_an_answer_that_is_no_label_is_a_miss_and_no_label_of_its_own():
    found = metrics.evaluate("macro_f1", ["sport", "ball", "goal"], [["sport"], ["sport"], ["tech"]])
    assert found.values["macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert metrics.evaluate("matthews", ["", ""], [["a"], ["b"]]).values["matthews"] == 0


def test_the_interval_of_a_score_of_counts_is_that_of_examples_drawn_anew():
    generator = np.random.default_rng(0)
    gold = generator.choice(["a", "b", "c"], 200, p=[0.6, 0.3, 0.1])
    answers = np.where(generator.random(200) < 0.7, gold, "a")
    found = metrics.evaluate("macro_f1", list(answers), [[g] for g in gold]).intervals["macro_f1"]
    drawn = [generator.integers(200, size=200) for _ in range(400)]
    slow = [by_definition(list(zip(answers[i], gold[i], strict=True)))[0] for i in drawn]
    assert found == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=1.5)


@pytest.fixture
def own_metrics(monkeypatch):
    """Metrics that a test registers are gone after it."""
    registered = dict(metrics.METRICS)
    monkeypatch.setattr(metrics, "_registry", registered)
    monkeypatch.setattr(metrics, "METRICS", registered)


def test_a_metric_of_ones_own(own_metrics):
    def length(predictions, references):
        return {"shorter": [100 * (len(p) < len(g[0])) for p, g in zip(predictions, references, strict=True)]}

    register_metric("mine:length", length, scores=["shorter"])
    found = metrics.evaluate("mine:length", ["a", "abc"], [["ab"], ["a"]])
    assert (found.primary, found.values, found.n) == ("shorter", {"shorter": 50.0}, 2)
    register_metric("mine:length", lambda p, r: {"longer": np.zeros(len(p))}, scores=("longer",))
    assert metrics.evaluate("mine:length", ["a"], [["ab"]]).values == {"longer": 0.0}
    with pytest.raises(ConfigError, match="'accuracy' is built in"):
        register_metric("accuracy", length, scores=["shorter"])
    for scores in ([], "shorter"):
        with pytest.raises(ConfigError, match="at least one name"):
            register_metric("mine", length, scores=scores)


@pytest.mark.parametrize("gave", [{}, {"s": [1.0]}, {"s": [1.0, math.nan]}, {"s": ["high", "low"]}, 0.5])
def test_a_metric_that_gives_something_else_is_named(own_metrics, gave):
    register_metric("mine", lambda predictions, references: gave, scores=["s"])
    with pytest.raises(DataError, match="metric 'mine' must give"):
        metrics.evaluate("mine", ["a", "b"], [["a"], ["b"]])


def test_rouge_by_hand():
    found = means("rouge", ["the cats sat"], [["a dog", "the cat sat down"]])
    assert found["rouge1"] == pytest.approx(100 * 2 * 1 * 0.75 / 1.75)  # "cats" and "cat" have one stem
    assert found["rouge2"] == pytest.approx(100 * 2 * 1 * (2 / 3) / (5 / 3))
    assert found["rougeL"] == found["rouge1"]


def test_rouge_counts_empty_predictions():
    assert means("rouge", ["a cat", ""], [["a cat"], ["a cat"]])["rougeL"] == 50


def test_rouge_lsum_takes_sentences_of_one_line_as_lines():
    reference = "The cat sat.\nThe dog ran."
    swapped = means("rouge", ["The dog ran. The cat sat."], [[reference]])
    assert swapped["rougeLsum"] == 100
    assert swapped["rougeL"] < 100
    assert means("rouge", ["The dog ran.\nThe cat sat."], [[reference]]) == swapped


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(0, 5))
def test_interval_contains_the_mean_and_repeats(scores, seed):
    low, high = metrics.bootstrap_interval(scores, seed=seed)
    assert low <= np.mean(scores) <= high
    assert min(scores) - 1e-9 <= low
    assert high <= max(scores) + 1e-9
    assert (low, high) == metrics.bootstrap_interval(scores, seed=seed)


def test_interval_has_the_width_theory_gives():
    scores = [0.0, 100.0] * 200
    low, high = metrics.bootstrap_interval(scores, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * 50 / np.sqrt(400), rel=0.1)
    assert metrics.bootstrap_interval(scores, seed=2) != (low, high)


def test_interval_is_the_same_however_it_is_chunked(monkeypatch):
    whole = metrics.bootstrap_interval([1.0, 2.0, 7.0])
    monkeypatch.setattr(metrics, "_CHUNK", 30)
    assert metrics.bootstrap_interval([1.0, 2.0, 7.0]) == whole


def test_evaluate():
    result = metrics.evaluate("squad_v2", ["a cat", "dog", ""], [["cat"], ["cat"], []], primary="f1")
    assert (result.name, result.primary, result.n) == ("squad_v2", "f1", 3)
    assert result.values["em"] == pytest.approx(200 / 3)
    assert result.values["no_ans_em"] == 100
    assert (
        set(result.intervals)
        == set(result.values)
        == {"em", "f1", "has_ans_em", "has_ans_f1", "no_ans_em", "no_ans_f1"}
    )
    for name, (low, high) in result.intervals.items():
        assert low <= result.values[name] <= high


def test_evaluate_scores_a_group_once_against_all_its_references():
    result = metrics.evaluate("record", ["Leeds", "Leeds", "York"], [["York"], ["Leeds"], ["Hull"]], ["q1", "q1", "q2"])
    assert result.n == 2
    assert result.values["em"] == 50


def test_evaluate_takes_columns_of_a_data_set():
    rows = Dataset.from_dict({"prediction": ["a"], "references": [["a"]], "group": ["g"]})
    assert metrics.evaluate("accuracy", rows["prediction"], rows["references"], rows["group"]).values["accuracy"] == 100


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_gives_the_scores_it_promises(name):
    metric = metrics.METRICS[name]
    found = metric(["a cat", "dog"], [["cat"], ["dog"]])
    assert set(metric.scores) <= set(found) | set(metric.of_counts)  # a score of a split has no value per example
    assert all(len(found[score]) == 2 for score in metric.scores if score not in metric.of_counts)
    assert metrics.evaluate(name, ["a cat", "dog"], [["cat"], ["dog"]]).primary == metric.scores[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: means("accuracy", ["a"], []), "1 predictions but 0 references"),
        (lambda: means("squad_v2", [], []), "no predictions"),
        (lambda: means("accuracy", ["a", "b"], [["a"], []]), "example 1 has no reference"),
        (lambda: means("rouge", ["a"], [[]]), "example 0 has no reference"),
        (lambda: metrics.evaluate("matthews", ["a"], [["a", "b"]]), "example 0 has 2 references"),
        (lambda: means("accuracy", ["a"], ["a"]), "is a string"),
        (lambda: metrics.evaluate("record", ["a"], [["a"]], ["g", "h"]), "2 groups but 1 predictions"),
        (lambda: metrics.bootstrap_interval([]), "no scores"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_unknown_metric_or_score():
    with pytest.raises(ConfigError, match=r"bleu.*accuracy"):
        metrics.evaluate("bleu", ["a"], [["a"]])
    with pytest.raises(ConfigError, match="primary='em'"):
        metrics.evaluate("accuracy", ["a"], [["a"]], primary="em")
