"""The command that answers new texts: `fpt predict`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError
from .console import Sets, emit, quiet_libraries, wants_json

if TYPE_CHECKING:
    from datasets import Dataset

    from ..prompt.prediction import Prediction
    from ..prompt.prompted import PromptedPLM
    from ..run.session import Session

logger = logging.getLogger(__name__)


def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]…", help="Texts; none: one per line on standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read inputs from this file, one per line.")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Another run of the model that answers, too; repeatable.")
    ] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Answer new texts with a saved prompt, one line each; empty lines are passed over.

    A line that is a JSON object gives the task's fields by name. With --also every run answers every text: `RUN`, a tab
    and the answer. A text that prompts within it share is read once.
    """
    from ..prompt.soft_prompt import load_prompt
    from ..recipe import settings_of
    from ..run.session import beside, open_session
    from ..run.together import fronts, predict_together
    from .run_folder import check_one_model

    if texts and file is not None:
        raise ConfigError(f"--file {str(file)!r} and {len(texts)} texts on the line exclude each other; give one")
    quiet_libraries()
    settings = settings_of(folder, sets)
    others = {run: settings_of(run, sets) for run in also or ()}
    for run, its in others.items():
        check_one_model("--also", folder, settings, run, its)
        if "full" in (settings.method, its.method):
            raise ConfigError("--also is for prompts; a run of all weights has a model of its own: ask it by itself")
    prompts = {run: None if settings.method == "full" else load_prompt(run) for run in (folder, *others)}
    first = open_session(settings, ())
    sessions = {folder: first} | {run: beside(first, its) for run, its in others.items()}
    asked = [_Asked(str(run), session, session.prompted(prompts[run])) for run, session in sessions.items()]

    apart: list[int] = []

    def answer_batch(batch: list[str]) -> None:
        encoded = [each.encoded(batch) for each in asked]
        if others:
            before = (fronts(a.name, a.session, a.prompted, rows) for a, rows in zip(asked, encoded, strict=True))
            apart.append(sum(len(set(of_text)) > 1 for of_text in zip(*before, strict=True)))
        found = predict_together([a.session for a in asked], [a.prompted for a in asked], encoded)
        lines = [a.lines(batch, *each, named=bool(others)) for a, each in zip(asked, found, strict=True)]
        for of_text in zip(*lines, strict=True):
            for line in of_text:
                emit(line) if isinstance(line, dict) else sys.stdout.write(line + "\n")
        sys.stdout.flush()
        first.texts.forget()  # the next texts are others, and need the room

    # Typed at a terminal, every line is answered at once; piped in, in batches.
    size = 1 if sys.stdin.isatty() and not (texts or file) else settings.eval.batch_size
    inputs = (line for line in texts or _lines(file) if line.strip())
    batch = list(islice(inputs, size))
    if not batch:
        raise DataError("there is no text to answer; give it as an argument, with --file, or on standard input")
    while batch:
        answer_batch(batch)
        batch = list(islice(inputs, size))
    if any(apart):
        logger.warning(
            "%d texts were read more than once: what stands before the prompts differs. To share texts, train with "
            "prompt.placement=infix, templates that begin alike, and room for the whole text",
            sum(apart),
        )


@dataclass
class _Asked:
    """A run that answers."""

    name: str
    session: Session
    prompted: PromptedPLM

    def encoded(self, batch: list[str]) -> Dataset:
        from ..data.readers import render_rows
        from ..run.session import encode_for

        task, decoder = self.session.task, self.session.decoder
        rows = [_fields(task, text, decoder) for text in batch]
        return encode_for(self.session, render_rows(task, rows, decoder=decoder, tokenizer=self.session.tokenizer))

    def lines(
        self, batch: list[str], predictions: list[Prediction], answers: list[str], *, named: bool
    ) -> list[str | dict[str, Any]]:
        """An answer to each text, as a line or, under --json, as a record."""
        if not wants_json():
            return [f"{self.name}\t{answer}" if named else answer for answer in answers]
        run = {"run": self.name} if named else {}
        return [
            {**run, "input": text, "prediction": answer, "score": prediction.score}
            | ({"probabilities": shares} if (shares := prediction.probabilities) else {})
            for text, prediction, answer in zip(batch, predictions, answers, strict=True)
        ]


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
    if task.chat is not None:
        return {task.chat: [{"role": "user", "content": text}]}
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
