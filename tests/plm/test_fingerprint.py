"""Fingerprints of models and files: every value counts, wherever it lies, and is read no oftener than it changes."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from settings import BY_NAME
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fast_prompt_tuning.plm import fingerprint
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.scores.neurons import activation_scores


def wide(seed=0):
    """A model whose matrices have many more values than a sample would take."""
    return BY_NAME["llama"].plm(seed=seed, vocab_size=512, intermediate_size=64)


def another_embedding(plm):
    plm.model.embed_tokens.weight[300] += 1


def rounded(plm):
    for parameter in plm.parameters():
        parameter.copy_((parameter * 64).round() / 64)


def odd_columns(plm):
    plm.model.layers[1].mlp.up_proj.weight[:, 1::2] *= 2


def one_value(plm):
    plm.model.layers[3].self_attn.k_proj.weight[-1, -1].nextafter_(torch.tensor(9.0))


def two_rows_swapped(plm):
    weight = plm.model.embed_tokens.weight
    weight[[7, 8]] = weight[[8, 7]]


def swapped_names(plm):
    one, two = (plm.model.layers[i].mlp for i in (0, 1))
    one.up_proj.weight, two.up_proj.weight = two.up_proj.weight, one.up_proj.weight


def through_data(plm):
    plm.model.embed_tokens.weight.data[300] += 1


def other_storage(plm):
    plm.model.norm.weight.data = plm.model.norm.weight.data * 2


CHANGES = [another_embedding, rounded, odd_columns, one_value, two_rows_swapped, swapped_names]
CHANGES += [through_data, other_storage]


@pytest.mark.parametrize("change", CHANGES)
def test_every_value_counts(change):
    plm = wide()
    before = fingerprint.of_model(plm)
    assert fingerprint.of_model(wide()) == before
    with torch.no_grad():
        change(plm)
    assert fingerprint.of_model(plm) != before


def test_buffers_that_are_saved_count():
    plm = BY_NAME["bart"].plm()
    before = fingerprint.of_model(plm)
    plm.final_logits_bias[0, 3] += 1
    assert fingerprint.of_model(plm) != before


def test_quantized_weights_count_in_the_numbers_they_are_kept_in():
    marks = set()
    for dtype, value in ((torch.int8, 1), (torch.int8, 2), (torch.uint8, 1), (torch.float8_e4m3fn, 1)):
        plm = torch.nn.Linear(3, 3)
        plm.weight = torch.nn.Parameter(torch.full((3, 3), value).to(dtype), requires_grad=False)
        plm.register_buffer("scales", torch.ones(3))
        torch.nn.init.zeros_(plm.bias)
        marks.add(fingerprint.of_model(plm))
    assert len(marks) == 4
    plm.scales[1] = 2
    assert fingerprint.of_model(plm) not in marks


def test_the_same_values_have_one_fingerprint_whatever_their_dtype(family, tmp_path):
    plm = family.plm()
    mark = fingerprint.of_model(plm)
    assert fingerprint.of_model(family.plm().double()) == mark
    assert fingerprint.of_model(family.plm(seed=1)) != mark
    model = family.peft()
    assert fingerprint.of_model(model.get_base_model()) == mark
    PartialPLM(model, keep_neurons="first").resize(family.stage(3, 10))
    assert fingerprint.of_model(model.get_base_model()) == mark  # also while it is shrunk
    for dtype in (torch.bfloat16, torch.float16):
        low = family.plm().to(dtype)
        assert fingerprint.of_model(low) != mark  # rounded
        low.save_pretrained(tmp_path / str(dtype))
        loaded = type(low).from_pretrained(tmp_path / str(dtype), dtype=torch.float32)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert fingerprint.of_model(loaded) == fingerprint.of_model(low)
    PartialPLM(loaded, neuron_scores=activation_scores(low, [family.batch()]))
    exact = family.plm().double()
    with torch.no_grad():
        next(exact.parameters()).view(-1)[0] += 1e-12  # which float32 does not hold
    assert fingerprint.of_model(exact) != mark


@pytest.fixture
def read(monkeypatch):
    """Counts the values that are hashed."""
    counted = []
    real = fingerprint.xxhash.xxh3_128

    class Counting:
        def __init__(self, *start):
            self.own = real(*start)

        def update(self, data):
            counted.append(memoryview(data).nbytes if not isinstance(data, bytes) else 0)
            self.own.update(data)

        def __getattr__(self, name):
            return getattr(self.own, name)

    monkeypatch.setattr(fingerprint.xxhash, "xxh3_128", Counting)
    return lambda: (sum(counted), counted.clear())[0]


def test_weights_are_read_once_while_they_do_not_change(read):
    plm = wide()
    mark = fingerprint.of_model(plm)
    everything = read()
    assert everything == 4 * sum(p.numel() for p in plm.parameters())
    assert fingerprint.of_model(plm) == mark
    assert read() == 0
    weight = plm.model.layers[2].mlp.up_proj.weight
    weight.data.mul_(1.5)
    assert fingerprint.of_model(plm) != mark
    assert read() == 4 * weight.numel()
    with torch.inference_mode():
        fingerprint.of_model(wide())
    assert read() == everything


def test_offloaded_weights_are_read_where_they_are():
    marks = []
    for seed in (0, 1):
        plm = wide(seed)
        marks.append(fingerprint.of_model(plm))
        cpu_offload(plm)
        assert {p.device.type for p in plm.parameters()} == {"meta"}
        assert fingerprint.of_model(plm) == marks[-1]
        assert {p.device.type for p in plm.parameters()} == {"meta"}
    assert marks[0] != marks[1]


def test_a_model_without_values_has_a_fingerprint():
    with torch.device("meta"):
        plm, other = wide(), BY_NAME["llama"].plm()
    assert fingerprint.of_model(plm) == fingerprint.of_model(plm) != fingerprint.of_model(other)


def test_sharded_weights_are_those_of_the_whole_model(read):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plm = wide()
        mark = fingerprint.of_model(plm)
        for layer in plm.model.layers:
            weight = distribute_tensor(layer.mlp.up_proj.weight.data, mesh, [Shard(0)])
            layer.mlp.up_proj.weight = torch.nn.Parameter(weight)
        assert fingerprint.of_model(plm) == mark
        read()
        assert fingerprint.of_model(plm) == mark
        assert read() == 0
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_on_a_gpu_are_those_of_the_cpu(read):
    plm = wide()
    mark = fingerprint.of_model(plm)
    plm.to("cuda")
    assert fingerprint.of_model(plm) == mark
    read()
    assert fingerprint.of_model(plm) == mark
    assert read() == 0
    through_data(plm)
    assert fingerprint.of_model(plm) != mark


def test_what_is_said_of_a_fingerprint_that_differs():
    its = fingerprint.of_model(BY_NAME["llama"].plm())
    assert fingerprint.mismatch(None, its) is fingerprint.mismatch(its, its) is None
    assert fingerprint.mismatch("f" * 32, its) == f"fingerprint was {'f' * 32!r}, is {its!r}"
    assert "an earlier version took it from a sample" in fingerprint.mismatch("f" * 16, its)


def test_the_hash_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fingerprint.of_file(tmp_path / "a") == wanted
