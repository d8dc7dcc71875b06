"""Hold the metric `squad_v2` to an independent re-computation on thousands of perturbed predictions.

The other side is written from the description of the official SQuAD 2.0 evaluation, sharing no code with the package.

    python benchmarks/squad_metrics.py dev-v2.0.json --out benchmarks/results/squad_metrics.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from fast_prompt_tuning.data.metrics import METRICS

PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def words(text: str) -> list[str]:
    """Normalised words: lower case, no punctuation, no articles."""
    kept = "".join(c for c in text.lower() if c not in PUNCTUATION)
    out, token = [], ""
    for c in kept:  # an article is a whole word by regular-expression boundaries: runs of word characters
        if c.isalnum() or c == "_":
            token += c
        else:
            out += [" " if token in ("a", "an", "the") else token, c]
            token = ""
    out.append(" " if token in ("a", "an", "the") else token)
    return "".join(out).split()


def score(prediction: str, golds: list[str]) -> tuple[int, float]:
    """Exact match and F1 of one answer: the best over the gold answers."""
    golds = [g for g in golds if words(g)] or [""]
    best_em, best_f1 = 0, 0.0
    said = words(prediction)
    for gold in golds:
        want = words(gold)
        best_em = max(best_em, int(said == want))
        if not said or not want:
            f1 = float(said == want)
        else:
            left, common = list(want), 0
            for w in said:
                if w in left:
                    left.remove(w)
                    common += 1
            f1 = 0.0 if not common else 2 * common / (len(said) + len(want))
        best_f1 = max(best_f1, f1)
    return best_em, best_f1


def perturb(answer: str, rng: random.Random) -> str:
    """An answer as a model might give it."""
    tokens = answer.split()
    kind = rng.randrange(9)
    if kind == 0:
        return ""
    if kind == 1:
        return answer.upper() + "."
    if kind == 2:
        return "the " + answer
    if kind == 3:
        return " ".join(tokens[: max(1, len(tokens) // 2)])
    if kind == 4:
        return answer + " and " + rng.choice(["an hour", "a", "Théâtre", "U.S.", "the-end", "１２"])
    if kind == 5:
        rng.shuffle(tokens)
        return " ".join(tokens)
    if kind == 6:
        return rng.choice(["a", "The", "...", "an the a", " ", "no answer"])
    if kind == 7:
        return " ".join(tokens + tokens)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="SQuAD 2.0 in its official JSON format")
    parser.add_argument("--rounds", type=int, default=5, help="perturbations of every question")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    questions = [
        [a["text"] for a in qa["answers"]]
        for article in json.loads(args.data.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    rng, squad_v2 = random.Random(0), METRICS["squad_v2"]
    compared, worst, single = 0, 0.0, 0
    for _ in range(args.rounds):
        predictions = [perturb(rng.choice(golds) if golds else "an answer", rng) for golds in questions]
        mine = [score(p, g) for p, g in zip(predictions, questions, strict=True)]
        theirs = squad_v2(predictions, questions)
        for name, index in (("em", 0), ("f1", 1)):
            worst = max(worst, abs(sum(theirs[name]) - 100 * sum(m[index] for m in mine)) / len(mine))
        for p, g, (em, f1) in zip(predictions, questions, mine, strict=True):  # one by one: errors cannot cancel
            one = squad_v2([p], [g])
            single += one["em"] != [100 * em] or abs(one["f1"][0] - 100 * f1) > 1e-9
        compared += len(predictions)
    report = {"questions": len(questions), "predictions": compared, "differing": single}
    report["largest_mean_difference"] = worst
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if single or worst > 1e-9 else 0


if __name__ == "__main__":
    sys.exit(main())
