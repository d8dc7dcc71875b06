"""What a tracker is told of a run, read back with TensorBoard's own reader."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import toy

from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.results import load_result


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tensorboard_reads_the_whole_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    recipe = toy().recipe(tmp_path / "run", model__path=str(toy().model(name)), train__report_to=["tensorboard"])
    run.train(load(recipe))
    result = load_result(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "events" / "fast-prompt-tuning")).Reload()

    def read(tag: str) -> dict[int, float]:
        return {e.step: e.value for e in events.Scalars(tag)}

    assert read("train/loss") == pytest.approx(dict(result.losses), rel=1e-4)
    assert list(read("train/learning_rate").values()) == pytest.approx([0.05 - 0.005 * n for n in range(result.steps)])
    starts = [*result.boundaries, result.steps]
    stages = {step: n for n in range(len(starts) - 1) for step in range(starts[n] + 1, starts[n + 1] + 1)}
    assert read("train/stage") == stages
    stack = result.schedule[0]["stacks"][0]
    for tag, size in ((f"train/{stack}_layers", "layers"), (f"train/{stack}_ffn", "ffn")):
        assert read(tag) == {step: result.schedule[n][size] for step, n in stages.items()}
    assert read("eval/accuracy") == pytest.approx({p.step: p.metrics["accuracy"] for p in result.curve}, rel=1e-4)
    flops = read("train/train_flops")
    assert flops[result.steps] == pytest.approx(result.flops["train"], rel=1e-4)
    assert list(flops.values()) == sorted(flops.values())
    assert list(read("train/flops_score").values()) == pytest.approx([result.flops["score"]] * len(flops), rel=1e-4)
