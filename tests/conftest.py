from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets
import pytest
import torch
from settings import FAMILIES, Settings

from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.cli import console


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """The cache folder of `datasets`, also of commands that tests start."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(params=FAMILIES, ids=lambda s: s.name)
def family(request) -> Settings:
    return request.param


@pytest.fixture
def fpt(capsys):
    """The command line, called in this process: `fpt("train", …, code=0)` gives what it says on `(stdout, stderr)`."""

    def call(*arguments, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert stop.value.code == code, err or out
        return out, err

    yield call
    console.state.update(debug=False, quiet=False, json=False)
