"""Sharing a tuned prompt on the Hugging Face Hub, with a card that says what it is and what it cost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConfigError
from ..files import new_folder
from ..placements import FRONT
from ..prompt.soft_prompt import SUFFIX_FILES, load_prompt, place_of
from ..run.card import hub_id, model_card
from ..run.results import load_result

PROMPT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def prompt_files(run: str | Path) -> dict[str, bytes]:
    """What of a run is shared: its prompt and a card, as name -> content; no path of this machine is in it.

    Raises:
        ConfigError: no prompt in the folder, or the run has not finished. DataError: no result in the folder.
    """
    folder = Path(run)
    result = load_result(folder)
    if result.status != "finished":
        raise ConfigError(f"the run in {str(folder)!r} is {result.status}, not finished; finish it with --resume")
    load_prompt(folder / "prompt")
    after = place_of(folder / "prompt") != FRONT
    files = {name: (folder / "prompt" / name).read_bytes() for name in (SUFFIX_FILES if after else PROMPT_FILES)}
    # A path of this machine is nobody else's business, and no use to them.
    record, field = (SUFFIX_FILES[1], "base_model") if after else (PROMPT_FILES[0], "base_model_name_or_path")
    settings = {**json.loads(files[record]), field: hub_id(result.config["model"]["path"])}
    card = str(ModelCard(model_card(result)))
    return files | {record: json.dumps(settings, indent=2).encode(), "README.md": card.encode()}


def push_prompt(run: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a run's prompt and its card to the Hub; nothing else of the run leaves the machine.

    Args:
        run: folder of a finished run.
        repo_id: `user/name`.
        token: access token; default the one `huggingface_hub` has stored.

    Returns:
        The address of the upload.

    Raises:
        ConfigError, DataError: as `prompt_files`; the Hub refuses.
    """
    files = prompt_files(run)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            for name, content in files.items():
                (Path(work) / name).write_bytes(content)
            done: Any = api.upload_folder(repo_id=repo_id, folder_path=work, commit_message="Upload soft prompt")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"repo_id={repo_id!r} cannot be written: {_first_line(error)}") from error
    return str(getattr(done, "commit_url", done))


def pull_prompt(repo_id: str, folder: str | Path, *, token: str | None = None) -> Path:
    """Download a prompt and its card into a new folder; no other file of the repository is taken.

    Args:
        repo_id: `user/name`.
        folder: a new one.
        token: as `push_prompt`.

    Returns:
        The folder, which `load_soft_prompt` and `prompt.path` take.

    Raises:
        ConfigError: the folder is there, the Hub refuses, or the repository holds no prompt.
    """
    target = Path(folder)
    if target.exists():
        raise ConfigError(f"{str(target)!r} is there already; name a new folder")
    names = [*PROMPT_FILES, *SUFFIX_FILES, "README.md"]
    try:
        with new_folder(target) as work:
            found = Path(snapshot_download(repo_id, allow_patterns=names, token=token))
            for name in names:
                if (found / name).is_file():
                    (work / name).write_bytes((found / name).read_bytes())
            load_prompt(work)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"repo_id={repo_id!r} cannot be read: {_first_line(error)}") from error
    return target


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
