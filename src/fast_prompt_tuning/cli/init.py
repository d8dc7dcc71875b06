"""The command that makes a recipe from somebody's file: `fpt init`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..errors import ConfigError, DataError
from .console import emit, people, quiet_libraries, say, wants_json

LOOKED_AT = 2000
"""Rows from which fields, labels and lengths are guessed."""
PASSES, BATCH = 4, 8
FEWEST_STEPS, MOST_STEPS = 100, 2000
LONGEST = 512


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Your rows: CSV, TSV, JSON, JSONL or Parquet.")],
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
    from ..data.guesses import guess, identifiers
    from ..files import new_folder
    from ..plm.loading import load_tokenizer

    rows = _rows(file)
    found = guess(rows[:LOOKED_AT], answer)
    used = (found.text, *found.asked, found.answer)
    names = identifiers(used[:-1])
    names[found.answer] = "label" if found.labels else identifiers(used)[found.answer]
    kept = [made for row in rows if (made := _renamed(row, names, found.labels)) is not None]
    if validation is None:
        random.Random(0).shuffle(kept)
        number = min(300, len(kept) // 10)
        held, kept = kept[:number], kept[number:]
    else:
        held = [made for row in _rows(validation) if (made := _renamed(row, names, found.labels)) is not None]
    if not (held and kept):
        raise DataError(
            f"{len(kept)} rows to train on and {len(held)} to evaluate on have all of {', '.join(map(repr, used))}; "
            "give a larger file",
            file=str(file),
        )
    data: dict[str, Any] = {
        "input_template": _template([names[name] for name in used[:-1]], used),
        "target_template": f" {{{{ {names[found.answer]} }}}}",
        **({"labels": list(found.labels)} if found.labels else {}),
        "files": {"train": "train.jsonl", "validation": "validation.jsonl"},
    }
    tokenizer = load_tokenizer(model)
    sample = kept[:LOOKED_AT]
    lengths = sorted(len(tokenizer(" ".join(row.values()))["input_ids"]) for row in sample)
    data["max_input_tokens"] = min(LONGEST, -(-(lengths[len(lengths) * 95 // 100] + 8) // 16) * 16)
    longest = max(len(tokenizer(f" {row[names[found.answer]]}")["input_ids"]) for row in sample)
    data["max_target_tokens"] = min(LONGEST, longest + 2)
    steps = min(MOST_STEPS, max(FEWEST_STEPS, -(-PASSES * len(kept) // BATCH)))
    recipe = {"model": {"path": model}, "data": data, "train": {"steps": steps, "batch_size": BATCH}, "output": "run"}
    with new_folder(output) as work:
        for name, part in (("train", kept), ("validation", held)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (work / "recipe.yaml").write_text(_yaml(recipe, file), encoding="utf-8")
    _show(output, recipe, found, len(rows) - len(kept) - (0 if validation else len(held)))


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; the first that cannot be read is an error."""
    from ..data.formats import rows_of

    if not file.is_file():
        raise DataError("there is no such file", file=str(file))
    found: list[dict[str, Any]] = []
    for row in rows_of(file, None):
        if isinstance(row, DataError):
            raise row
        found.append(row.fields)
    if not found:
        raise DataError("it has no rows", file=str(file))
    return found


def _renamed(row: dict[str, Any], names: dict[str, str], labels: tuple[str, ...] | None) -> dict[str, str] | None:
    """The fields in use, by the names that templates have for them; None where one is missing."""
    made = {plain: str(row[name]).strip() for name, plain in names.items() if row.get(name) is not None}
    if len(made) < len(names) or not all(made.values()) or (labels and made["label"] not in labels):
        return None
    return made


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
    head = f"# A first guess, made from {file.name}. Look at the templates; then: fpt train -c recipe.yaml\n"
    return head + yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _show(output: Path, recipe: dict[str, Any], found: Any, left_out: int) -> None:
    """What was guessed, on three examples, and what to type next."""
    from ..data.readers import load_examples
    from ..recipe import load
    from ..run.session import task_of
    from .catalog import print_examples, shown_of

    task = task_of(load(output / "recipe.yaml"))
    examples = load_examples(task, "train", decoder=True, limit=3)
    shown = shown_of(examples)
    if wants_json():
        emit({"recipe": str(output / "recipe.yaml"), **recipe, "examples": shown, "left_out": left_out})
        return
    kind = f"one of {len(found.labels)} labels" if found.labels else "a text that is written"
    say(f"text: {found.text!r}; answer: {found.answer!r}, {kind}")
    if left_out:
        say(f"{left_out} rows lack a field and were left out")
    print_examples(people(), "train", shown)
    say(f"next: fpt train -c {output / 'recipe.yaml'}")
