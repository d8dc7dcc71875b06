"""Fidelity: the full PLM agrees with itself, and the numbers are those of a computation over whole logits."""

from __future__ import annotations

import pytest
import torch
from settings import BY_NAME, FFN, LAYERS
from toy import toy

from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run.fidelity import candidate_stage, fidelity, parse_selections, report
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.schedule.stages import Schedule, Stage


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_fidelity_is_the_definition(name):
    family = BY_NAME[name]
    model = family.peft()
    partial = PartialPLM(model, keep_neurons="first")
    batches = [family.batch(seed=1), family.batch(seed=2, size=2)]
    full, small = partial.full_stage, family.stage(2, 9)
    loss, found = fidelity(model, batches, [(partial, full), (partial, small)])
    assert found[0] == (pytest.approx(loss), 1.0, pytest.approx(0, abs=1e-6))

    def of(batch):
        with torch.no_grad():
            logits = model(**batch).logits
        labels = batch["labels"]
        if not family.encoder_decoder:  # every text token, each predicted one position before
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            logits = logits[:, logits.shape[1] - labels.shape[1] - 1 : -1]
        return logits[labels != -100].log_softmax(-1), labels[labels != -100]

    wanted = torch.zeros(3)
    tokens = 0
    for batch in batches:
        reference, targets = of(batch)
        with partial.at(small):
            other, _ = of(batch)
        picked = torch.arange(len(targets)), targets
        wanted += torch.stack(
            [
                -other[picked].sum(),
                (other.argmax(-1) == reference.argmax(-1)).sum(),
                (reference.exp() * (reference - other)).sum(),
            ]
        )
        tokens += len(targets)
    torch.testing.assert_close(torch.tensor(found[1]), wanted / tokens, rtol=1e-4, atol=1e-5)
    assert partial.stage == full


def test_sizes_are_those_of_the_presets():
    full = Stage(30, 1536)
    for stage, part in zip(Schedule.preset("cr", full, total_steps=100).stages, (0.25, 0.5, 0.75, 1), strict=True):
        assert candidate_stage(full, part, ("decoder",), layers=True, neurons=True).same_size(stage)
    only = candidate_stage(Stage(5, 24, stacks=("encoder", "decoder")), 0.5, ("encoder",), layers=True, neurons=False)
    assert only == Stage(3, 24, stacks=("encoder",))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_report(tmp_path, name):
    config = load(toy().recipe(tmp_path / "run", model__path=str(toy().model(name)), scoring__layer_examples=4))
    session = open_session(config, ("train",))
    chosen = parse_selections("evenly, influence,greedy,activation,greedy+activation")
    record = report(session, chosen, (1.0, 0.6), examples=8)
    assert record["examples"] == 8
    assert [r["selection"] for r in record["rows"]] == [name for name in chosen for _ in range(2)]
    for row in record["rows"][::2]:  # all of it
        assert (row["relative_flops"], row["agreement"]) == (1.0, 1.0)
        assert row["loss"] == pytest.approx(record["full_loss"])
    for row in record["rows"][1::2]:
        assert 0 < row["relative_flops"] < 1
        assert row["divergence"] > 0
        assert row["stage"]["layers"] == (LAYERS if row["selection"] == "activation" else 3)
        assert row["stage"]["ffn"] == (14 if "activation" in row["selection"] else FFN)
    assert record["score_flops"]["greedy"] > 0


def test_selections_that_are_none():
    assert parse_selections("evenly,first+activation") == {
        "evenly": ("evenly", None),
        "first+activation": ("first", "activation"),
    }
    for wrong in ("odd", "evenly+first", "activation+activation", "evenly+", "", ","):
        with pytest.raises(ConfigError, match="selection"):
            parse_selections(wrong)
