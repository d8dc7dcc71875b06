"""What each of several devices holds and sends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings import BY_NAME
from transformers import LlamaConfig

from fast_prompt_tuning.cost.devices import GATHERED, WAYS, divides, fewest, share
from fast_prompt_tuning.cost.shapes import BatchShape, CostModel

SHAPE = BatchShape(batch=4, input_tokens=100, prompt_tokens=20, target_tokens=5)
COSTS = {name: CostModel.from_config(BY_NAME[name].config()) for name in ("llama", "t5")}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("way", WAYS)
def test_one_device_holds_all_of_it(name, way):
    alone = share(COSTS[name], way, 1, SHAPE, texts=1000)
    assert (alone.weights, alone.texts, alone.received) == (2 * COSTS[name].params, 1000, 0)


@pytest.mark.parametrize("name", COSTS)
@given(devices=st.integers(2, 64))
def test_more_devices_hold_less_each(name, devices):
    few, more = (share(COSTS[name], "shard", n, SHAPE, texts=1000) for n in (devices, devices + 1))
    assert more.weights < few.weights
    assert more.texts < few.texts
    assert few.weights < 2 * COSTS[name].params + GATHERED * 2 * COSTS[name].stacks["decoder"].layer_params
    parts = [share(COSTS[name], "tensor", n, SHAPE) for n in (devices, devices + 1)]
    assert parts[1].weights < parts[0].weights < share(COSTS[name], "data", devices, SHAPE).weights
    assert parts[1].activations <= parts[0].activations


def test_what_is_received_by_hand():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100,
    )  # fmt: skip
    cost = CostModel.from_config(config)
    prompt = 4 * 20 * 64
    layers = 2 * 3 * cost.stacks["decoder"].layer_params
    assert share(cost, "data", 2, SHAPE).received == prompt  # 2n(D−1)/D
    assert share(cost, "shard", 2, SHAPE).received == prompt + 2 * layers / 2
    assert share(cost, "tensor", 2, SHAPE).received == 3 * 4 * 2 * 4 * 125 * 64  # layers, reductions, bytes, (B, T, H)
    assert [divides(cost, n) for n in (1, 2, 3, 4)] == [True, True, False, False]


def test_the_fewest_devices_that_hold_a_run():
    cost = CostModel.from_config(LLAMA_70B)
    whole = share(cost, "data", 1, SHAPE).memory
    assert fewest(cost, "data", 2 * whole, 8, SHAPE).devices == 1
    assert fewest(cost, "data", whole, 8, SHAPE) is None
    found = fewest(cost, "shard", whole, 8, SHAPE)
    assert found is not None
    assert found.devices > 1
    assert found.memory <= 0.9 * whole < share(cost, "shard", found.devices - 1, SHAPE).memory


LLAMA_70B = LlamaConfig(
    architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


def test_a_plan_for_70_billion_weights(fpt, tmp_path):
    LLAMA_70B.save_pretrained(tmp_path)
    line = ["plan", "--model", tmp_path, "--batch-size", 8, "--devices", 8, "--device-memory"]
    rows = json.loads(fpt("--json", *line, "24GiB")[0])["devices"]
    assert {way: row["fits"] for way, row in rows.items()} == {"data": False, "shard": False, "tensor": True}
    assert 131 < rows["data"]["weights"] / 2**30 < 132  # 70.6 billion parameters of two bytes
    command = "torchrun --nproc-per-node 8 -m fast_prompt_tuning train -c RECIPE --set train.parallel=tensor"
    assert command in fpt(*line, "80GiB")[0]
    assert "it does not fit: give more devices" in fpt(*line, "2GiB")[0]


def test_a_plan_names_no_way_that_a_run_would_refuse(fpt, tmp_path):
    """FFN reduction needs whole layers; transformers has no tensor-parallel plan for T5."""

    def possible(config, *options):
        config.save_pretrained(tmp_path)
        line = ["--json", "plan", "--model", tmp_path, "--devices", 2, "--device-memory", "24GiB", *options]
        return {way for way, row in json.loads(fpt(*line)[0])["devices"].items() if row["possible"]}

    assert possible(LLAMA_70B, "--method", "ld") == {"data", "shard", "tensor"}
    assert possible(LLAMA_70B, "--method", "cr") == {"data"}
    assert possible(BY_NAME["t5"].config(), "--method", "ld") == {"data", "shard"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--devices", "8"], "a plan for devices needs both"),
        (["--device-memory", "24GiB"], "a plan for devices needs both"),
        (["--devices", "8", "--device-memory", "much"], "--device-memory 'much' is no size"),
        (["--devices", "8", "--device-memory", "0GiB"], "--device-memory '0GiB' is no size"),
        (["--devices", "8", "--device-memory", "1GiB", "--compare", "pt,ld"], "--compare has no --stages"),
    ],
)
def test_a_plan_for_devices_names_what_it_lacks(fpt, tmp_path, options, says):
    LLAMA_70B.save_pretrained(tmp_path)
    assert says in fpt("plan", "--model", tmp_path, *options, code=2)[1]
