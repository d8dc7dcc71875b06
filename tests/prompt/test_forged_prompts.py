"""Saved prompts that somebody has forged: one clear error each."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from settings import BY_NAME

from fast_prompt_tuning.errors import ConfigError, FptError
from fast_prompt_tuning.prompt.soft_prompt import SUFFIX_FILES, load_prompt, place_of, soft_prompt_config
from fast_prompt_tuning.prompt.suffix_model import load_soft_prompt

ADAPTER = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "num_transformer_submodules": 1, "token_dim": 4}
NOTED = {
    "format": 1,
    "placement": "suffix",
    "base_model": "x",
    "model_fingerprint": "0",
    "prompt_tokens": 3,
    "width": 4,
}
VALUES = {
    "whole numbers": torch.ones(3, 4, dtype=torch.long),
    "three dimensions": torch.ones(1, 3, 4),
    "one dimension": torch.ones(12),
    "no tokens": torch.ones(0, 4),
    "not a number": torch.full((3, 4), float("nan")),
    "infinite": torch.full((3, 4), float("inf")),
}


def forged_prompt(folder, values, *, prefix):
    names = ("adapter_config.json", "adapter_model.safetensors") if prefix else SUFFIX_FILES[1:]
    (folder / names[0]).write_text(json.dumps(ADAPTER if prefix else NOTED))
    save_file({"prompt_embeddings": values}, folder / names[1])
    return folder / names[0]


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "suffix"])
@pytest.mark.parametrize("name", VALUES)
def test_vectors_that_are_none_are_refused(tmp_path, name, prefix):
    forged_prompt(tmp_path, VALUES[name], prefix=prefix)
    with pytest.raises(ConfigError, match="prompt_embeddings"):
        load_prompt(tmp_path)


@pytest.mark.parametrize("tokens", [None, 0, -1, 4, 10**400, True, 2.0, float("nan"), "3", [3], {}])
def test_a_number_of_tokens_that_is_none_is_refused(tmp_path, tokens):
    config = forged_prompt(tmp_path, torch.ones(3, 4), prefix=True)
    assert load_prompt(tmp_path).shape == (3, 4)
    config.write_text(json.dumps({**ADAPTER, "num_virtual_tokens": tokens}))
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        load_prompt(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": 5},
        {"num_transformer_submodules": "x"},
        {"token_dim": []},
        {"peft_type": "LORA"},
        {"token_dim": -1},
    ],
)
def test_an_adapter_that_peft_cannot_load_is_one_error(tmp_path, changes):
    plm = BY_NAME["llama"].plm()
    get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3)).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with contextlib.suppress(FptError):  # what is never used may be anything
        load_soft_prompt(BY_NAME["llama"].plm(), tmp_path)


@pytest.mark.parametrize("name", ["format", "placement", "base_model", "model_fingerprint"])
@pytest.mark.parametrize("value", [None, 5, [], {}, "odd" * 1000])
def test_a_forged_note_of_a_prompt_after_the_text_is_refused(tmp_path, name, value):
    note = forged_prompt(tmp_path, torch.ones(3, 4), prefix=False)
    assert place_of(tmp_path) == "suffix"
    note.write_text(json.dumps({**NOTED, name: value}))
    if isinstance(value, str) and name in ("base_model", "model_fingerprint"):
        return
    with pytest.raises(ConfigError, match=r"soft_prompt\.json") as caught:
        load_prompt(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["format", "placement", "base_model", "model_fingerprint"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_note_that_lacks_a_part_is_refused(tmp_path, name, version):
    note = forged_prompt(tmp_path, torch.ones(3, 4), prefix=False)
    note.write_text(json.dumps({k: v for k, v in {**NOTED, "format": version}.items() if k != name}))
    with pytest.raises(ConfigError, match=r"soft_prompt\.json"):
        place_of(tmp_path)
