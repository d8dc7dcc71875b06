"""Sharing a tuned prompt on the Hugging Face Hub, with a card that says what it is and what it cost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConfigError
from ..prompt.soft_prompt import SUFFIX_FILES, load_prompt, place_of
from ..run.card import hub_id, model_card
from ..run.results import load_result

PROMPT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def push_prompt(run: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a run's prompt and its card to the Hub; nothing else of the run leaves the machine.

    Args:
        run: folder of a finished run.
        repo_id: `user/name`.
        token: access token; default the one `huggingface_hub` has stored.

    Returns:
        The address of the upload.

    Raises:
        ConfigError: no prompt in the folder, or the Hub refuses.
        DataError: no result in the folder.
    """
    folder = Path(run)
    result = load_result(folder)
    if result.status != "finished":
        raise ConfigError(f"the run in {str(folder)!r} is {result.status}, not finished; finish it with --resume")
    load_prompt(folder / "prompt")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            after = place_of(folder / "prompt") != "prefix"
            for name in SUFFIX_FILES if after else PROMPT_FILES:
                (Path(work) / name).write_bytes((folder / "prompt" / name).read_bytes())
            # A path of this machine is nobody else's business, and no use to them.
            record, field = (SUFFIX_FILES[1], "base_model") if after else (PROMPT_FILES[0], "base_model_name_or_path")
            settings = json.loads((Path(work) / record).read_text(encoding="utf-8"))
            settings[field] = hub_id(result.config["model"]["path"])
            (Path(work) / record).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            ModelCard(model_card(result)).save(Path(work) / "README.md")
            done: Any = api.upload_folder(repo_id=repo_id, folder_path=work, commit_message="Upload soft prompt")
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"repo_id={repo_id!r} cannot be written: {first}") from error
    return str(getattr(done, "commit_url", done))
