"""Plans from configs alone, and the paper's cost columns."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, T5Config

from fast_prompt_tuning.cost import timing
from fast_prompt_tuning.cost.flops import step_flops
from fast_prompt_tuning.cost.plan import compare, make_plan
from fast_prompt_tuning.cost.shapes import BatchShape, CostModel
from fast_prompt_tuning.cost.timing import Timing, measure_stages, random_batch, random_plm, time_steps, tuned_model
from fast_prompt_tuning.errors import ConfigError, ModelError, ScheduleError, UnknownFamilyError
from fast_prompt_tuning.paper.costs import (
    PAPER_TABLE1,
    PAPER_TABLE2,
    over_tasks,
    paper_config,
    paper_rows,
    paper_table1_flops,
    paper_table2_flops,
)
from fast_prompt_tuning.plm.configs import full_stage, load_config
from fast_prompt_tuning.schedule.stages import Schedule, Stage

TINY_LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    pad_token_id=0,
)
TINY_T5 = T5Config(
    d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=4, vocab_size=97, decoder_start_token_id=0, dropout_rate=0.0
)
SHAPE = BatchShape(batch=2, input_tokens=12, prompt_tokens=4, target_tokens=5)


def test_paper_table1_flops_within_a_point_and_a_half():
    ours = paper_table1_flops("large", convention="linear")
    for row, value in zip(PAPER_TABLE1, ours, strict=True):
        assert 100 * value == pytest.approx(row.flops, abs=1.5), row


def test_paper_table2_flops_of_large_within_a_point_and_a_half():
    ours = paper_table2_flops("large", convention="linear")
    for method, (flops, _) in PAPER_TABLE2["large"].items():
        assert 100 * ours[method] == pytest.approx(flops, abs=1.5), method


def test_mean_of_the_tasks_ratios_fits_the_paper_too():
    cost = CostModel.from_config(paper_config("large"))
    for row in PAPER_TABLE1:
        ratios = []

        def keep(shape, stacks, row=row, ratios=ratios):
            part = step_flops(cost, row.stage(stacks), shape, convention="linear")
            whole = step_flops(cost, None, shape, convention="linear")
            ratios.append(part / whole)
            return part, whole

        over_tasks(keep)
        assert 100 * sum(ratios) / 5 == pytest.approx(row.flops, abs=1.5)


def test_counting_attention_makes_ffn_reduction_dearer():
    linear, every = (paper_table1_flops("large", convention=c) for c in ("linear", "all"))
    for row, a, b in zip(PAPER_TABLE1, linear, every, strict=True):
        if row.method == "fr":
            assert 0.01 < b - a < 0.05


def test_xl_has_the_papers_widths_and_no_figures():
    rows = paper_rows("xl")
    assert [r.ffn for r in rows[3:6]] == [1280, 2560, 3840]
    assert all(r.flops is None for r in rows)
    assert CostModel.from_config(paper_config("xl")).stacks["encoder"].ffn == 5120
    with pytest.raises(ConfigError, match="plm='base'"):
        paper_config("base")


def test_plan_adds_up_and_prints_the_promised_json():
    schedule = Schedule.preset("cr", full_stage(TINY_LLAMA), total_steps=10)
    plan = make_plan(TINY_LLAMA, schedule, SHAPE)
    out = json.loads(json.dumps(plan.to_dict()))
    assert set(out) == {"relative_flops", "stages"}
    assert {"layers", "ffn", "steps", "flops_per_step", "relative_flops", "flops"} <= set(out["stages"][0])
    assert "seconds" not in out["stages"][0]
    assert [s["layers"] for s in out["stages"]] == [1, 2, 3, 4]
    assert out["stages"][-1]["relative_flops"] == 1
    assert out["relative_flops"] == pytest.approx(sum(s["steps"] * s["relative_flops"] for s in out["stages"]) / 10)
    timed = plan.with_timing(Timing(stages=(1.0, 2.0, 3.0, 4.0), full=4.0, samples=()))
    assert timed.seconds == 2 * 1 + 2 * 2 + 2 * 3 + 4 * 4
    assert timed.relative_seconds == pytest.approx(28 / 40)
    assert json.loads(json.dumps(timed.to_dict()))["stages"][1]["seconds"] == 4
    assert plan.relative_seconds is None
    with pytest.raises(ScheduleError, match="stages"):
        plan.with_timing(Timing(stages=(1.0,), full=1.0, samples=()))


def test_stages_that_cut_stacks_differently_keep_them_apart():
    stage = Stage({"encoder": 2, "decoder": 4}, 32, 3, ("encoder", "decoder"))
    row = make_plan(TINY_T5, Schedule([stage]), SHAPE).to_dict()["stages"][0]
    assert row["layers"] == {"encoder": 2, "decoder": 4}
    assert row["relative_flops"] < 1


def test_compare_puts_methods_side_by_side():
    plans = compare(TINY_T5, ["pt", "ld", "fr", "cr"], SHAPE, total_steps=20)
    assert list(plans) == ["pt", "ld", "fr", "cr"]
    assert plans["pt"].relative_flops == pytest.approx(1)
    assert plans["cr"].relative_flops < min(plans["ld"].relative_flops, plans["fr"].relative_flops)
    encoder = compare(TINY_T5, ["cr"], SHAPE, total_steps=20, stacks=["encoder"])["cr"]
    assert encoder.relative_flops > plans["cr"].relative_flops
    with pytest.raises(ScheduleError, match="'xx'"):
        compare(TINY_T5, ["xx"], SHAPE, total_steps=20)


def test_config_from_folder_and_file(tmp_path):
    TINY_T5.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path / "config.json")):
        config = load_config(path)
        assert full_stage(config) == Stage(4, 64, stacks=("encoder", "decoder"))
    (tmp_path / "only.json").write_text((tmp_path / "config.json").read_text())
    assert load_config(tmp_path / "only.json").d_ff == 64


def test_configs_that_cannot_be_planned(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="without a config"):
        load_config(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ModelError, match="GGUF"):
            load_config(path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(ModelError, match="gives no config"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="gives no config"):
        load_config(tmp_path)
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(UnknownFamilyError, match="vit"):
        load_config(tmp_path)


def test_70b_config_in_seconds_without_weights(tmp_path):
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    code = (
        "import json, resource, sys\n"
        "from fast_prompt_tuning.cost import plan, shapes\n"
        "from fast_prompt_tuning.plm import configs\n"
        "config = configs.load_config(sys.argv[1])\n"
        "print(json.dumps(plan.compare(config, ['pt', 'cr'], shapes.BatchShape(), total_steps=100)['cr'].to_dict()))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    seconds = time.perf_counter() - start
    assert json.loads(done.stdout)["relative_flops"] < 1
    assert int(done.stderr.split()[-1]) < 2_000_000  # kB: a hundredth of the weights
    assert seconds < 30  # about 3 on an idle core, nearly all of it imports; the bound leaves room for a busy one


def test_planning_module_loads_without_torch():
    code = "import sys, fast_prompt_tuning.cost.plan; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_T5], ids=["llama", "t5"])
def test_measuring_takes_real_steps(config):
    schedule = Schedule.preset("cr", full_stage(config), total_steps=10)
    timing = measure_stages(config, schedule, SHAPE, seconds=0.1, dtype="float32", device="cpu")
    assert len(timing.stages) == 4
    assert len(timing.samples) == 5
    assert all(t > 0 for t in (*timing.stages, timing.full))


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_T5], ids=["llama", "t5"])
def test_random_model_trains_its_prompt_only_and_is_left_whole(config):
    model = tuned_model(random_plm(config, dtype=torch.bfloat16), 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [(tuple(p.shape), p.dtype) for p in trained] == [((4, 32), torch.float32)]
    before = trained[0].detach().clone()
    batch = random_batch(config, BatchShape(batch=2, input_tokens=12, target_tokens=5, label_tokens=2))
    assert (batch["labels"] != -100).sum() == 4
    full = full_stage(config)
    small = Stage(2, 32, stacks=full.stacks)
    seen: list[int] = []
    samples = time_steps(model, [(small, batch), (full, batch)], rounds=3, on_round=seen.append)
    assert [len(s) for s in samples] == [3, 3]
    assert seen == [1, 2, 3]
    assert not torch.equal(before, trained[0])
    assert math.isfinite(trained[0].detach().sum())
    assert full_stage(model.get_base_model().config) == full
    assert config.dtype is None  # the caller's config is not written to


def test_measuring_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(timing, "available_bytes", lambda device: 1000)
    schedule = Schedule.preset("pt", full_stage(TINY_LLAMA), total_steps=1)
    with pytest.raises(ModelError, match="batch_size"):
        measure_stages(TINY_LLAMA, schedule, SHAPE, device="cpu")
    with pytest.raises(ConfigError, match="dtype='int3'"):
        measure_stages(TINY_LLAMA, schedule, SHAPE, dtype="int3")
    assert timing.available_bytes("cpu") >= 0
