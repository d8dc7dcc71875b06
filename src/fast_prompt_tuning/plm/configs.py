"""A model's config, and the full size it describes; no weight is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..paths import is_path
from ..schedule.stages import Stage
from . import families


def load_config(path_or_id: str | os.PathLike[str]) -> Any:
    """The `transformers` config of a model; its weights are neither needed nor read.

    Args:
        path_or_id: a model folder, a folder or file with just a `config.json`, or a hub id. Code that comes with a
            model is never run.

    Raises:
        ModelError: nothing is found there, or it is not a config (a GGUF file has none).
        UnknownFamilyError: a config of an architecture that no family is registered for.
    """
    from transformers import AutoConfig

    path = Path(path_or_id).expanduser()
    where = f"model={str(path_or_id)!r}"
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf"))):
        raise ModelError(
            f"{where} is GGUF, which holds no config; pass the folder or hub id of the model it was made from, or a "
            "config.json of it"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{where} is a folder without a config.json; pass the folder the model was saved in")
    if not path.exists() and is_path(str(path_or_id)):
        raise ModelError(f"{where} does not exist; pass a model folder, a config.json or a hub id")
    try:
        config = AutoConfig.from_pretrained(str(path if path.exists() else path_or_id), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{where} gives no config: {reason} (pass a model folder, a config.json or a hub id)"
        ) from error
    families.of(config)
    return config


def model_class(config: Any) -> Any:
    """The `transformers` auto class of a config's language models."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def full_stage(config: Any) -> Stage:
    """The full size of the model a config describes.

    Raises:
        UnknownFamilyError: the architecture is not registered.
    """
    return Stage.of(families.full_sizes(config))
