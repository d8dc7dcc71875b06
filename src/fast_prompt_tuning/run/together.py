"""Several runs of one model answer the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..prompt.passes import split_texts
from ..prompt.prediction import Prediction
from ..prompt.prompted import Input, PromptedPLM
from ..prompt.together import score_together
from .session import Session, input_ids_of, predict


def predict_together(
    sessions: Sequence[Session], prompted: Sequence[PromptedPLM], rows: Sequence[Dataset]
) -> list[tuple[list[Prediction], list[str]]]:
    """Predictions and answers of each run to its own rows of the same texts.

    Runs whose labels are one token each are scored in the same passes. All others answer by themselves.

    Args:
        sessions: one for each run, on the same loaded PLM (`session.beside`).
        prompted: as `Session.prompted` makes them, of one prompt each.
        rows: of each run, as many and in the same order of texts.
    """
    found: dict[int, tuple[list[Prediction], list[str]]] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (session, each) in enumerate(zip(sessions, prompted, strict=True)):
        groups.setdefault(_kind(session, each) or (i,), []).append(i)
    for members in groups.values():
        if len(members) == 1:
            (i,) = members
            predictions, answers, _ = predict(sessions[i], prompted[i], rows[i])
            found[i] = predictions, answers
            continue
        scored = score_together(
            [prompted[i] for i in members],
            [[Input(*each) for each in zip(input_ids_of(sessions[i], rows[i]), rows[i]["n_tail"], strict=True)]
             for i in members],
            [sessions[i].choices for i in members],
            batch_size=sessions[0].config.eval.batch_size,
        )  # fmt: skip
        found |= {i: (each, [p.text for p in each]) for i, each in zip(members, scored, strict=True)}
    return [found[i] for i in range(len(sessions))]


def fronts(name: str, session: Session, prompted: PromptedPLM, rows: Dataset) -> list[tuple[Any, ...]]:
    """What of each text is read before the prompt, and kept; of a prompt in front nothing that others share.

    Args:
        name: of the run.
    """
    if not prompted.spec().keeps_texts:
        return [(name, i) for i in range(len(rows))]
    found, _ = split_texts(input_ids_of(session, rows), rows["n_tail"] if prompted.spec().needs_tail else None)
    return [tuple(front) for front in found]


def _kind(session: Session, prompted: PromptedPLM) -> tuple[object, ...] | None:
    """What prompts must have in common to be scored in one pass; None of a run that cannot be."""
    one_token = all(len(ids) == 1 for ids in session.choices.values())
    if not (session.choices and one_token and session.decoder and session.config.eval.labels == "likelihood"):
        return None
    return (prompted.placement, *prompted.prompt.shape) if prompted.prompt is not None else None
