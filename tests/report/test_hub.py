"""Uploading a prompt: what leaves the machine, and the card that goes with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from settings import BY_NAME

from fast_prompt_tuning.errors import ConfigError, DataError
from fast_prompt_tuning.prompt.soft_prompt import load_prompt
from fast_prompt_tuning.report import hub
from fast_prompt_tuning.run.results import RunResult, save_result


@pytest.fixture
def run(tmp_path):
    BY_NAME["llama"].peft().save_pretrained(tmp_path / "prompt")
    save_result(
        RunResult(
            name="toy",
            method="cr",
            status="finished",
            config={
                "model": {"path": "some/model", "revision": None},
                "data": {"task": "bbc_topics"},
                "prompt": {"tokens": 3},
            },
            schedule=[{"layers": 2, "ffn": 10, "steps": 4}, {"layers": 5, "ffn": 24, "steps": 6}],
            boundaries=[0, 4],
            steps=10,
            primary="accuracy",
            metrics={"accuracy": 91.25},
            intervals={"accuracy": (88.0, 94.5)},
            examples=200,
            best_step=10,
            curve=[],
            flops={"train": 2e12, "score": 1e9, "probe": 0.0, "eval": 0.0, "total": 2.001e12},
            train_seconds=12.0,
            total_seconds=20.0,
            fingerprints={"model": "abc123"},
            environment={"torch": "2.13.0"},
        ),
        tmp_path,
    )
    (tmp_path / "log.jsonl").write_text("{}\n")
    return tmp_path


@pytest.fixture
def uploads(monkeypatch):
    seen: list[dict] = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **options):
            if repo_id == "no/access":
                raise OSError("403 Forbidden")
            seen.append({"repo": repo_id, **options})

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen.append({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
            return SimpleNamespace(commit_url=f"hub/{repo_id}")

    monkeypatch.setattr(hub, "HfApi", Api)
    return seen


def test_only_prompt_and_card_are_uploaded_and_privately(run, uploads):
    assert hub.push_prompt(run, "me/prompt", token="secret") == "hub/me/prompt"
    assert uploads[0] == {"repo": "me/prompt", "private": True, "exist_ok": True}
    files = uploads[1]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == (run / "prompt" / "adapter_model.safetensors").read_bytes()
    assert not any(b"secret" in content for content in files.values())


def test_the_card_states_base_model_quality_and_cost(run, uploads):
    hub.push_prompt(run, "me/prompt")
    card = uploads[1]["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "some/model"
    assert head["library_name"] == "peft"
    assert "| accuracy | 91.25 | 88.00 – 94.50 |" in card
    assert "| 1 | 2 | 10 | all | 4 |" in card
    assert "2 TFLOPs" in card
    assert "torch 2.13.0" in card


def test_refusals_are_typed(run, uploads, tmp_path):
    with pytest.raises(ConfigError, match=r"repo_id='no/access'.*403 Forbidden"):
        hub.push_prompt(run, "no/access")
    with pytest.raises(DataError, match="no result of a run"):
        hub.push_prompt(tmp_path / "prompt", "me/prompt")
    (run / "prompt" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not a saved soft prompt"):
        hub.push_prompt(run, "me/prompt")


def test_a_prompt_that_was_pushed_can_be_pulled(run, uploads, tmp_path, monkeypatch, fpt):
    hub.push_prompt(run, "me/prompt")
    shared = tmp_path / "shared"
    shared.mkdir()
    for name, content in {**uploads[1], "evil.bin": b"x"}.items():
        (shared / name).write_bytes(content)

    def snapshot(repo_id, allow_patterns, token):
        if repo_id != "me/prompt":
            raise OSError("404 Not Found")
        return str(shared)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert fpt("pull", "me/prompt", tmp_path / "pulled")[0] == f"prompt {tmp_path / 'pulled'}\n"
    assert {p.name for p in (tmp_path / "pulled").iterdir()} == set(uploads[1])
    assert torch.equal(load_prompt(tmp_path / "pulled"), load_prompt(run / "prompt"))
    assert "is there already" in fpt("pull", "me/prompt", tmp_path / "pulled", code=2)[1]
    assert "repo_id='me/none' cannot be read: 404" in fpt("pull", "me/none", tmp_path / "new", code=2)[1]
    (shared / "adapter_model.safetensors").unlink()
    assert "is not a saved soft prompt" in fpt("pull", "me/prompt", tmp_path / "new", code=2)[1]
    assert not (tmp_path / "new").exists()
