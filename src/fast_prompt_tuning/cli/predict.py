"""The command that answers new texts: `fpt predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, DataError
from .console import Sets, emit, quiet_libraries, wants_json


def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]…", help="Texts; none: one per line on standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read inputs from this file, one per line.")] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Answer new texts with a saved prompt, one line each; empty lines are passed over.

    A line that is a JSON object gives the task's fields by name.
    """
    from ..data.readers import render_rows
    from ..prompt.soft_prompt import load_prompt
    from ..recipe import settings_of
    from ..run.session import encode_for, open_session
    from ..run.session import predict as answers_to

    if texts and file is not None:
        raise ConfigError(f"--file {str(file)!r} and {len(texts)} texts on the line exclude each other; give one")
    quiet_libraries()
    settings = settings_of(folder, sets)
    prompt = None if settings.method == "full" else load_prompt(folder)
    session = open_session(settings, ())

    def answer_batch(batch: list[str]) -> None:
        rows = [_fields(session.task, text, session.decoder) for text in batch]
        encoded = encode_for(session, render_rows(session.task, rows, decoder=session.decoder))
        predictions, answers, _ = answers_to(session, session.prompted(prompt), encoded)
        for text, prediction, answer in zip(batch, predictions, answers, strict=True):
            if wants_json():
                record = {"input": text, "prediction": answer, "score": prediction.score}
                emit(record | ({"probabilities": shares} if (shares := prediction.probabilities) else {}))
            else:
                sys.stdout.write(answer + "\n")
        sys.stdout.flush()

    # Typed at a terminal, every line is answered at once; piped in, in batches.
    size = 1 if sys.stdin.isatty() and not (texts or file) else settings.eval.batch_size
    inputs = (line for line in texts or _lines(file) if line.strip())
    batch = list(islice(inputs, size))
    if not batch:
        raise DataError("there is no text to answer; give it as an argument, with --file, or on standard input")
    while batch:
        answer_batch(batch)
        batch = list(islice(inputs, size))


def _lines(file: Path | None) -> Iterator[str]:
    """The lines of a file, or of standard input."""
    from ..data.formats import text_lines

    try:
        with file.open("rb") if file else nullcontext(sys.stdin.buffer) as lines:
            yield from text_lines(lines, str(file or "standard input"))
    except OSError as error:
        raise DataError(f"cannot be read: {error}", file=str(file or "standard input")) from error


def _fields(task: Any, text: str, decoder: bool) -> dict[str, Any]:
    """The task's fields from one line: a JSON object, or the text of the one field a plain line can mean."""
    if text.lstrip().startswith("{"):
        try:
            row = json.loads(text)
            if isinstance(row, dict):
                return row
        except (ValueError, RecursionError):
            pass
    fields = sorted(task.input_fields(decoder=decoder))
    if not fields:
        raise DataError(f"task {task.name!r} has an input template without a field: there is nothing to answer to")
    row = {task.truncate or fields[0]: text}
    try:
        task.render(row, split="test", decoder=decoder)
    except DataError:  # other fields are needed, too
        if len(fields) == 1:
            raise
        raise DataError(
            f"task {task.name!r} has the fields {', '.join(fields)}; give each input as a JSON object, e.g. "
            + json.dumps(dict.fromkeys(fields, "…"), ensure_ascii=False)
        ) from None
    return row
