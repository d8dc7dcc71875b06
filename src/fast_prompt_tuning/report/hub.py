"""Sharing a tuned prompt on the Hugging Face Hub, with a card that says what it is and what it cost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ConfigError
from ..paths import is_path
from ..prompt.soft_prompt import PLACES, SUFFIX_FILES, load_prompt, placement_of
from ..run.results import RunResult, load_result
from .tables import human_flops, human_seconds, size_text

PROMPT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def hub_id(path: str) -> str | None:
    """A model's hub id; None for a local folder, file or packaged model."""
    return path if path.count("/") == 1 and not is_path(path) and not Path(path).exists() else None


def model_card(result: RunResult) -> str:
    """The card (Markdown with YAML front matter) of a run's prompt."""
    config = result.config
    named, task = hub_id(config["model"]["path"]), config["data"]["task"] or "custom"
    base = named or Path(config["model"]["path"]).name  # the path is this machine's own
    place = config["prompt"].get("placement", "prefix")
    data = ModelCardData(
        base_model=named,
        library_name="peft" if place == "prefix" else "fast-prompt-tuning",
        tags=["prompt-tuning", "soft-prompt", "fast-prompt-tuning", f"task:{Path(task).stem}"],
    )
    metrics = "\n".join(
        f"| {name} | {value:.2f} | {result.intervals[name][0]:.2f} – {result.intervals[name][1]:.2f} |"
        for name, value in result.metrics.items()
    )
    stages = "\n".join(
        f"| {i} | {size_text(s['layers'])} | {size_text(s['ffn'])} | {s.get('batch') or 'all'} | {s['steps']} |"
        for i, s in enumerate(result.schedule, 1)
    )
    loading = (
        """from fast_prompt_tuning import load_soft_prompt

model = load_soft_prompt(base_model, "folder of this repository")"""
        if place != "prefix"
        else """from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this repository")"""
    )
    versions = ", ".join(f"{k} {v}" for k, v in result.environment.items() if k not in ("platform", "threads"))
    return f"""---
{data.to_yaml()}
---

# Soft prompt for {Path(task).stem} on {base.split("/")[-1]}

{config["prompt"]["tokens"]} virtual tokens for `{base}` (revision {config["model"]["revision"] or "default"}), to stand
{PLACES[place]}; tuned with the method `{result.method}` of fast-prompt-tuning. The model's
weights are unchanged.

```python
{loading}
```

## Quality on {result.examples} {result.split} examples, full model

| metric | % | 95% interval |
| --- | --- | --- |
{metrics}

## Training

{result.steps} steps, {human_flops(result.flops["train"])} of training and
{human_flops(result.flops["score"] + result.flops["probe"])} of scoring and probing,
{human_seconds(result.train_seconds)} of training steps.

| stage | layers | FFN neurons | examples of a batch | steps |
| --- | --- | --- | --- | --- |
{stages}

Model fingerprint {result.fingerprints.get("model", "?")}. Versions: {versions}.
"""


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
            after = placement_of(folder / "prompt") != "prefix"
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
