"""The commands that hand a prompt on: `fpt export` and `fpt push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..placements import PLACEMENTS
from .console import emit, say, wants_json


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a saved prompt.")],
    output: Annotated[Path, typer.Argument(help="New safetensors file.")],
    kind: Annotated[str, typer.Option("--format", help="prompt-embeds is the only one.")] = "prompt-embeds",
) -> None:
    """Write the prompt's vectors (P, H) as one tensor `prompt_embeds`, as serving engines take them."""
    from ..prompt.soft_prompt import export_prompt, place_of

    if kind != "prompt-embeds":
        raise ConfigError(f"--format {kind!r} is unknown; prompt-embeds is the only one")
    shape = export_prompt(folder, output)
    place = PLACEMENTS[place_of(folder)].where
    if wants_json():
        emit({"output": str(output), "shape": shape, "place": place})
        return
    say(f"{output}: prompt_embeds {shape}, embeddings to stand {place}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub.")],
    upload: Annotated[bool, typer.Option("--upload", help="Do it; else only show what would be uploaded.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; default private.")] = False,
) -> None:
    """Upload a run's prompt and a card with its quality and cost to the Hugging Face Hub; a dry run by default."""
    from ..report.hub import prompt_files, push_prompt

    if upload:
        address = push_prompt(folder, repo_id, private=not public)
        if wants_json():
            emit({"address": address})
        else:
            sys.stdout.write(address + "\n")
        return
    files = prompt_files(folder)
    if wants_json():
        emit({"address": None, "files": {name: len(content) for name, content in files.items()}})
        return
    for name, content in files.items():
        say(f"{name}: {len(content):,} bytes")
    say("\n" + files["README.md"].decode("utf-8"))
    say(f"nothing was uploaded; add --upload to send this to {repo_id} ({'public' if public else 'private'})")


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Download a prompt that `fpt push` has shared. Next: `--set prompt.init=prompt --set prompt.path=FOLDER`."""
    from ..report.hub import pull_prompt

    target = pull_prompt(repo_id, folder)
    if wants_json():
        emit({"folder": str(target)})
    else:
        say(f"prompt {target}")
