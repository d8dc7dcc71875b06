"""Training steps on compiled layers: the same run, and one compile a stage."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from toy import toy

from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.prompt.soft_prompt import load_prompt
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run

pytestmark = [  # said while torch looks at the attributes of a model, and of the tensors between its layers
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture
def compiles(monkeypatch):
    """Counts what is compiled; the backend runs it as it is."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "stages"), [("ld", 1), ("cr", 4)])
def test_a_compiled_run_is_the_same_run_and_compiles_once_a_stage(tmp_path, compiles, method, stages):
    """Once for padded batches and once for those without a mask. Dropping layers alone compiles nothing anew."""
    plain = run.train(load(toy().recipe(tmp_path / "plain", method=method)))
    assert compiles.frame_count == 0
    fast = run.train(load(toy().recipe(tmp_path / "fast", method=method, train__compile=True)))
    assert stages <= compiles.frame_count <= 2 * stages
    assert [loss for _, loss in fast.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-4)
    prompts = [load_prompt(tmp_path / which / "prompt") for which in ("plain", "fast")]
    torch.testing.assert_close(*prompts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{"prompt__placement": "suffix"}, {"train__gradient_checkpointing": True}])
def test_what_cannot_be_compiled_is_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"train\.compile cannot be used with"):
        load(toy().recipe(tmp_path, train__compile=True, **changes))
