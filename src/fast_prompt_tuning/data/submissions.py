"""Answer files in the formats of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from .tasks import Task


def check_submission(task: Task) -> None:
    """Raise where a task's benchmark has no submission format of ours.

    Raises:
        ConfigError: the task's source is neither GLUE with labels nor SQuAD.
    """
    if task.source.format != "squad" and not (task.source.format == "glue_tsv" and task.labels):
        raise ConfigError(
            f"task {task.name!r} has no submission format (source.format={task.source.format!r}); "
            "it must be glue_tsv with labels, or squad"
        )


def write_submission(task: Task, path: str | Path, ids: Sequence[str], predictions: Sequence[str]) -> None:
    r"""Predictions on a test split in the benchmark's format: GLUE TSV (`index\tprediction`) or SQuAD JSON.

    Args:
        task: a task whose `source.format` is `glue_tsv` or `squad`.
        path: new file; an existing one is never overwritten.
        ids: the examples' ids.
        predictions: label words (GLUE; written as the benchmark spells them) or answers (SQuAD; "" for none).

    Raises:
        ConfigError: the task has no submission format.
        DataError: lengths differ, an id repeats, a prediction is no label, or the file exists or cannot be written.
    """
    check_submission(task)
    if len(ids) != len(predictions):
        raise DataError(f"{len(ids)} ids but {len(predictions)} predictions; give one id per prediction")
    if len(set(ids)) != len(ids):
        raise DataError("an id occurs twice; write one test split at a time")
    if task.source.format == "squad":
        answers = dict(zip(ids, map(task.postprocess, predictions), strict=True))
        text = json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
    else:
        spelling = {word: key for key, word in reversed((task.labels or {}).items())}
        text = "index\tprediction\n"
        for row_id, prediction in zip(ids, predictions, strict=True):
            word = task.postprocess(prediction)
            if word not in spelling:
                raise DataError(f"prediction {prediction!r} for id {row_id!r} is no label; expected {list(spelling)}")
            text += f"{row_id}\t{spelling[word]}\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
    except FileExistsError:
        raise DataError("the file exists; choose another name", file=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot write the file: {error.strerror}", file=str(path)) from None
