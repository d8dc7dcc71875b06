"""The command that makes a recipe from somebody's file: `fpt init`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..data.guesses import Guess, identifiers
from ..errors import ConfigError, DataError
from .console import emit, people, quiet_libraries, say, wants_json

LOOKED_AT = 2000
"""Rows from which fields, labels and lengths are guessed."""
PASSES, BATCH = 4, 8
FEWEST_STEPS, MOST_STEPS = 100, 2000
LONGEST = 512
CHAT = "messages"
"""The field that says: these rows are conversations."""


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Your rows: CSV, TSV, JSON, JSONL, Parquet or Arrow.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the recipe and its rows.")],
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file of the model.")] = "smollm2-135m",
    answer: Annotated[str | None, typer.Option(help="The field to be learned, where the guess is wrong.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Rows to evaluate on; default a tenth of FILE, at most 300.")
    ] = None,
) -> None:
    """Make a recipe from a file of your own: a first guess at templates, labels and lengths. Next: `fpt train`."""
    if output.exists():
        raise ConfigError(f"--output {str(output)!r} is there already; name a new folder")
    quiet_libraries()
    from ..data.guesses import guess
    from ..files import new_folder
    from ..plm.loading import load_tokenizer

    rows = _rows(file)
    tokenizer = load_tokenizer(model)
    if all(CHAT in row for row in rows):
        read, asked, said = _conversations(tokenizer), {"task": "chat"}, "conversations; the last answer is learned"
    else:
        read, asked, said = _fields(guess(rows[:LOOKED_AT], answer))
    kept = [made for row in rows if (made := read(row)) is not None]
    lacking = len(rows) - len(kept)
    if validation is None:
        random.Random(0).shuffle(kept)
        number = min(300, len(kept) // 10)
        held, kept = kept[:number], kept[number:]
    else:
        held = [made for row in _rows(validation) if (made := read(row)) is not None]
    if not (held and kept):
        raise DataError(
            f"{len(kept)} rows to train on and {len(held)} to evaluate on have all that is needed ({said}); give a "
            "larger file",
            file=str(file),
        )
    sample = kept[:LOOKED_AT]
    lengths = sorted(len(tokenizer(made.text)["input_ids"]) for made in sample)
    longest = max(len(tokenizer(f" {made.answer}")["input_ids"]) for made in sample)
    data: dict[str, Any] = {
        **asked,
        "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "max_input_tokens": min(LONGEST, -(-(lengths[len(lengths) * 95 // 100] + 8) // 16) * 16),
        "max_target_tokens": min(LONGEST, longest + 2),
    }
    steps = min(MOST_STEPS, max(FEWEST_STEPS, -(-PASSES * len(kept) // BATCH)))
    recipe = {"model": {"path": model}, "data": data, "train": {"steps": steps, "batch_size": BATCH}, "output": "run"}
    with new_folder(output) as work:
        for name, part in (("train", kept), ("validation", held)):
            lines = (json.dumps(made.row, ensure_ascii=False) + "\n" for made in part)
            (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (work / "recipe.yaml").write_text(_yaml(recipe, file), encoding="utf-8")
    _show(output, recipe, said, lacking, tokenizer)


@dataclass(frozen=True)
class _Made:
    """A row as the recipe reads it, all of its words that are input, and its answer."""

    row: dict[str, Any]
    text: str
    answer: str


Read = Callable[[dict[str, Any]], _Made | None]
"""A row of the file; None where it lacks something."""


def _fields(found: Guess) -> tuple[Read, dict[str, Any], str]:
    """How rows of fields are read, their part of the recipe, and what was guessed."""
    used = (found.text, *found.asked, found.answer)
    names = identifiers(used[:-1])
    names[found.answer] = "label" if found.labels else identifiers(used)[found.answer]

    def read(row: dict[str, Any]) -> _Made | None:
        made = {plain: str(row[name]).strip() for name, plain in names.items() if row.get(name) is not None}
        if len(made) < len(names) or not all(made.values()) or (found.labels and made["label"] not in found.labels):
            return None
        return _Made(made, " ".join(made.values()), made[names[found.answer]])

    data = {
        "input_template": _template([names[name] for name in used[:-1]], used),
        "target_template": f" {{{{ {names[found.answer]} }}}}",
        **({"labels": list(found.labels)} if found.labels else {}),
    }
    kind = f"one of {len(found.labels)} labels" if found.labels else "a text that is written"
    return read, data, f"text: {found.text!r}; answer: {found.answer!r}, {kind}"


def _conversations(tokenizer: Any) -> Read:
    from ..data.chat import turns

    def read(row: dict[str, Any]) -> _Made | None:
        try:
            found = turns(row[CHAT], tokenizer)
        except DataError:
            return None
        if "assistant" not in found:
            return None
        text = found["before"] + found["user"] + found["after"]
        return _Made({CHAT: row[CHAT]}, text, found["assistant"])

    return read


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; the first that cannot be read is an error."""
    from ..data.arrow_files import is_saved
    from ..data.formats import rows_of

    if not (file.is_file() or is_saved(file)):
        raise DataError("there is no such file", file=str(file))
    found: list[dict[str, Any]] = []
    for row in rows_of(file, None):
        if isinstance(row, DataError):
            raise row
        found.append(row.fields)
    if not found:
        raise DataError("it has no rows", file=str(file))
    return found


def _template(names: list[str], titles: tuple[str, ...]) -> str:
    """The text, what is asked about it, and the answer's name: `{{ text }}\\nQuestion: {{ question }}\\nAnswer:`."""
    *shown, answer = (title.strip().capitalize() for title in titles)
    asked = [f"{title}: {{{{ {name} }}}}" for name, title in zip(names[1:], shown[1:], strict=True)]
    return "\n".join([f"{{{{ {names[0]} }}}}", *asked, f"{answer}:"])


class _Dumper(yaml.SafeDumper):
    """Lines of a template stay one string, with `\\n` in it."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _yaml(recipe: dict[str, Any], file: Path) -> str:
    head = (
        f"# A first guess, made from {file.name}. Look at the templates; then: fpt train -c recipe.yaml\n"
        "# A smaller data.max_input_tokens trains faster, where the beginning of a text says enough.\n"
    )
    return head + yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _show(output: Path, recipe: dict[str, Any], said: str, lacking: int, tokenizer: Any) -> None:
    """What was guessed, on three examples, and what to type next."""
    from ..data.readers import load_examples
    from ..recipe import load
    from ..run.session import task_of
    from .catalog import print_examples, shown_of

    config = load(output / "recipe.yaml")
    examples = load_examples(
        task_of(config), "train", decoder=True, files=config.data.files, limit=3, tokenizer=tokenizer
    )
    shown = shown_of(examples)
    if wants_json():
        emit({"recipe": str(output / "recipe.yaml"), **recipe, "examples": shown, "left_out": lacking})
        return
    say(said)
    if lacking:
        say(f"{lacking} rows lack what is needed and were left out")
    print_examples(people(), "train", shown)
    say(f"next: fpt train -c {output / 'recipe.yaml'}")
