"""The signal of a stage: exact gradients, unbiased estimates, and what a full-sized stage must be."""

from __future__ import annotations

import math

import pytest
import torch
from settings import BY_NAME, FFN, LAYERS

from fast_prompt_tuning.cost.flops import work_flops
from fast_prompt_tuning.cost.shapes import CostModel
from fast_prompt_tuning.errors import ScheduleError, ScoreError
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt.places import place, tune
from fast_prompt_tuning.prompt.text_cache import TextCache
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.scores.signal import (
    Measured,
    example_gradients,
    jackknife,
    mean_product,
    measure,
    signals,
    step_signal,
    total_variance,
)

PLACES = [("llama", "prefix"), ("llama", "suffix"), ("llama", "infix"), ("gemma3", "prefix")]
PLACES += [("t5-gated", "prefix"), ("bart", "suffix")]


def setting(name: str, placement: str = "prefix", *, size: int = 4, number: int = 3, alike: bool = True):
    """A prompted tiny PLM, the PLM as it can be cut, and batches; alike, so that the gradients have a mean to tell."""
    family = BY_NAME[name]
    plm = family.plm()
    prompted = tune(plm, 3, placement, TextCache(plm) if placement != "prefix" else None)
    with torch.no_grad():
        prompted.parameter.normal_(generator=torch.Generator().manual_seed(1))
    batches = [family.batch(seed=0 if alike else i, size=size) for i in range(number)]
    if placement == "infix":
        batches = [{**b, "labels": b["labels"].index_fill(1, torch.arange(4), -100)} for b in batches]
    batches = [{**b, "n_tail": torch.tensor([1, 0, 1, 1])[:size]} for b in batches]
    return prompted, PartialPLM(prompted.module, keep_neurons="first"), batches


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "placement"), PLACES)
def test_gradients_are_those_of_each_example_alone(name, placement):
    prompted, partial, (batch, *_) = setting(name, placement)
    before = prompted.parameter.detach().clone()
    for stage in (partial.full_stage, BY_NAME[name].stage(2, 9)):
        with partial.at(stage):
            found, _ = example_gradients(prompted, batch)
            assert found.shape == (4, prompted.parameter.numel())
            cost = CostModel.from_config(BY_NAME[name].config())
            # The second pass finds what texts leave behind, so it costs what the same step then does.
            assert work_flops(cost, example_gradients(prompted, batch)[1]) == pytest.approx(
                work_flops(cost, prompted.loss(batch).work)
            )
            for i, row in enumerate(found):
                one = {key: value[i : i + 1] for key, value in batch.items()}
                (wanted,) = torch.autograd.grad(prompted.loss(one, 1).value, prompted.parameter)
                torch.testing.assert_close(row, wanted.flatten(), rtol=1e-3, atol=1e-5)
    assert prompted.parameter.grad is None
    assert torch.equal(prompted.parameter, before)


def test_what_has_no_gradient_is_refused():
    prompted, partial, batches = setting("llama")
    plm = prompted.plm
    with pytest.raises(ScoreError, match="must be one soft prompt"):
        example_gradients(place(plm, None), batches[0])
    with pytest.raises(ScheduleError, match="does not fit"):
        measure(prompted, partial, [Stage(LAYERS + 1, FFN)], batches)
    with torch.no_grad():
        prompted.parameter.fill_(math.inf)
    with pytest.raises(ScoreError, match="not finite"):
        example_gradients(prompted, batches[0])


# -- the signal of stages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "placement"), PLACES)
def test_a_stage_of_the_full_size_is_the_full_plm(name, placement):
    prompted, partial, batches = setting(name, placement)
    full = partial.full_stage
    spelled = Stage(LAYERS, FFN, steps=7, stacks=(full.stacks[-1],))
    stages = {"whole": full, "spelled": spelled, "half": Stage(LAYERS, FFN, stacks=full.stacks, batch=2)}
    stages |= {"small": Stage(2, 9, stacks=full.stacks), "short": Stage(LAYERS, FFN, stacks=full.stacks, length=1)}
    found = signals(stages, measure(prompted, partial, list(stages.values()), batches), full)
    for name in ("whole", "spelled"):
        signal = found[name]
        assert signal.full
        assert signal.cosine.value == pytest.approx(1)
        for one in (signal.signal, signal.per_flop, signal.per_second, signal.per_batch):
            assert (one.value, one.low, one.high) == pytest.approx((1, 1, 1))
        assert (signal.flops, signal.seconds, signal.saves) == (1, 1, False)
    assert found["half"].full
    assert found["half"].cosine.value == pytest.approx(1)
    assert found["half"].flops == pytest.approx(0.5, abs=0.1)
    assert found["half"].batch == 2
    for name in ("small", "short"):
        assert not found[name].full
        assert found[name].flops < 1
        assert found[name].cosine.value != pytest.approx(1)
    assert partial.stage == full


def test_stages_that_differ_in_their_batch_share_gradients():
    prompted, partial, batches = setting("llama")
    stages = [Stage(2, 9, batch=2), Stage(2, 9, batch=1), Stage(2, 9)]
    found, *_ = measure(prompted, partial, stages, batches)
    assert [stage for stage, one in found.items() if one.gradients is not None] == [partial.full_stage, Stage(2, 9)]
    assert found[Stage(2, 9, batch=1)].flops < found[Stage(2, 9, batch=2)].flops < found[Stage(2, 9)].flops
    assert all(one.spent >= one.flops and one.seconds > 0 for one in found.values())
    made = signals({"mix": stages[0], "size": stages[2]}, [found, found], partial.full_stage, passes=2)
    assert (made["mix"].batch, made["size"].batch) == (4, 8)
    assert made["mix"].noise == made["size"].noise
    assert made["mix"].signal != made["size"].signal


def test_kept_texts_cost_a_step_nothing():
    prompted, partial, batches = setting("llama", "suffix", alike=False)
    for one in measure(prompted, partial, [Stage(2, 9)], batches):
        assert all(m.flops < m.spent / 2 for m in one.values())


def test_too_few_examples_are_refused():
    prompted, partial, batches = setting("llama", size=2, number=1)
    found = measure(prompted, partial, [], batches)
    with pytest.raises(ScoreError, match="2 examples are too few for the signal of steps of 2; give at least 3"):
        signals({}, found, partial.full_stage)
    with pytest.raises(ScoreError, match="steps of 8; give at least 8"):
        signals({}, [*found, *found], partial.full_stage, passes=4)
    with pytest.raises(ScoreError, match="pass the stage to measure"):
        signals({"other": Stage(2, 9)}, [*found, *found], partial.full_stage)


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_the_full_plm_is_its_own_maximum():
    """Cauchy-Schwarz: with means and variances known and no more noise than the full PLM's, nothing teaches more."""
    draw = torch.Generator().manual_seed(0)
    g, variance = torch.randn(50, generator=draw, dtype=torch.float64), 30.0
    own = step_signal(g @ g, g @ g, variance, 8)
    for _ in range(200):
        h = torch.randn(50, generator=draw, dtype=torch.float64) + torch.rand(1, generator=draw) * g
        h *= g.norm() / h.norm()  # of one length: a signal does not depend on the scale of h and its noise together
        assert step_signal(g @ h, h @ h, variance, 8) < own
    assert step_signal(g @ (3 * g), 9 * g @ g, 9 * variance, 8) == pytest.approx(float(own))
    assert step_signal(-g @ g, g @ g, variance, 8) == -own


def test_estimates_have_no_bias():
    draw = torch.Generator().manual_seed(0)
    g_mean, h_mean = 0.3 * torch.randn(2, 40, generator=draw, dtype=torch.float64)
    products, variances, naive = [], [], []
    for _ in range(2000):
        noise = torch.randn(2, 6, 40, generator=draw, dtype=torch.float64)
        g, h = g_mean + noise[0], h_mean + 0.8 * noise[0] + 0.6 * noise[1]
        products.append(mean_product(g, h)[:2])
        variances.append(total_variance(h)[:2])
        naive.append(g.mean(0) @ h.mean(0))
    for found, wanted in ((products, g_mean @ h_mean), (variances, torch.tensor(40.0))):
        values = torch.stack(found)  # of six examples, and of five of them
        assert (abs(values.mean(0) - wanted) < 4 * values.std(0) / 2000**0.5).all()
    naive = torch.stack(naive)
    assert naive.mean() - g_mean @ h_mean > 20 * naive.std() / 2000**0.5  # what the terms of i = j would add


def test_leaving_one_out_is_computed_from_the_rest():
    g, h = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    products, variances = mean_product(g, h), total_variance(h)
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        torch.testing.assert_close(products[i + 1], mean_product(g[rest], h[rest])[0])
        torch.testing.assert_close(variances[i + 1], total_variance(h[rest])[0])
        assert float(variances[i + 1]) == pytest.approx(float(h[rest].double().var(0).sum()))


def candidate(g: torch.Tensor, h: torch.Tensor, cost: float, full: Stage, small: Stage):
    """The signal of gradients as if they were measured, at a relative cost in FLOPs and seconds."""
    measured = [
        {full: Measured(a, 1.0, 1.0, 1.0), small: Measured(b, cost, cost, cost)}
        for a, b in zip(g.split(16), h.split(16), strict=True)
    ]
    return signals({"small": small}, measured, full)["small"]


def test_only_what_certainly_saves_is_said_to():
    """Gradients of known means: equal signal per FLOP is hardly ever taken for more, twice of it mostly is."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.zeros(2, 30)
    mean[:, 0] = 0.4 * torch.tensor([1.0, 0.7])
    mean[1, 1] = 0.4 * (1 - 0.7**2) ** 0.5
    square, b = 0.16, 16
    true = float(step_signal(0.7 * square, square, 1.0, b) / step_signal(square, square, 1.0, b))
    said, covered = {1.0: 0, 0.4: 0}, 0
    for _ in range(150):
        g, h = mean[:, None] + torch.randn(2, 64, 30, generator=draw) / 30**0.5
        for part in said:
            found = candidate(g, h, true * part, Stage(4, 8), Stage(2, 8))
            said[part] += found.saves
            if part == 1:
                covered += found.per_flop.low <= 1 <= found.per_flop.high
    assert said[1.0] / 150 < 0.06
    assert said[0.4] / 150 > 0.9
    assert covered / 150 > 0.88


def test_pure_noise_saves_nothing():
    draw = torch.Generator().manual_seed(0)
    said = 0
    for _ in range(50):
        g, h = torch.randn(2, 32, 30, generator=draw)
        said += candidate(g, h, 0.3, Stage(4, 8), Stage(2, 8)).saves
    assert said <= 1
    nothing = candidate(torch.zeros(16, 4), torch.zeros(16, 4), 0.3, Stage(4, 8), Stage(2, 8))
    assert math.isnan(nothing.per_flop.value)
    assert not nothing.saves


def test_an_interval_is_that_of_a_mean():
    values = torch.tensor([3.0, 5.0, 1.0, 7.0, 4.0], dtype=torch.float64)
    means = torch.cat([values.mean()[None], (values.sum() - values) / 4])
    error = float(values.std() / 5**0.5)
    assert jackknife(means).value == 4
    assert (jackknife(means).low, jackknife(means).high) == pytest.approx(
        (4 - 1.96 * error, 4 + 1.96 * error), rel=1e-3
    )
