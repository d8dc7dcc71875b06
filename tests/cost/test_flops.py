"""Analytic FLOPs against what PyTorch counts on real forward and backward passes of tiny models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from fast_prompt_tuning.cost.flops import (
    forward_flops,
    generation_flops,
    relative_flops,
    schedule_flops,
    step_flops,
    text_flops,
)
from fast_prompt_tuning.cost.ledger import FlopsLedger
from fast_prompt_tuning.cost.memory import activation_bytes, text_bytes, weight_bytes
from fast_prompt_tuning.cost.shapes import BatchShape, CostModel
from fast_prompt_tuning.errors import ConfigError, ScheduleError, UnknownFamilyError
from fast_prompt_tuning.plm import families
from fast_prompt_tuning.plm.objective import IGNORED, label_loss
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt.suffix_model import SuffixPromptModel, suffix_loss
from fast_prompt_tuning.prompt.text_cache import TextCache
from fast_prompt_tuning.prompt.text_states import text_states
from fast_prompt_tuning.schedule.stages import Schedule, Stage

# PEFT asks a model for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VOCAB, PROMPT = 61, 5


def tiny_config(model_type: str, *, layers=2, heads=2, head_dim=16, ffn=48, kv_heads=1, **more):
    """A config of any registered family, all sizes small; `layers`, `ffn` of the decoder differ where they can."""
    d_model = heads * head_dim
    if model_type in ("t5", "mt5"):
        d_model += 16  # T5's inner width is its own
        fields = {
            "d_model": d_model,
            "d_kv": head_dim,
            "d_ff": ffn,
            "num_heads": heads,
            "num_layers": layers,
            "num_decoder_layers": layers + 1,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        }
    elif model_type in ("bart", "mbart", "pegasus"):
        fields = {
            "d_model": d_model,
            "encoder_layers": layers,
            "decoder_layers": layers + 1,
            "encoder_ffn_dim": ffn,
            "decoder_ffn_dim": ffn + 16,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "forced_eos_token_id": None,
            "decoder_start_token_id": 2,
        }
    elif model_type == "gpt2":
        fields = {"n_embd": d_model, "n_layer": layers, "n_head": heads, "n_inner": ffn, "n_positions": 128}
    elif model_type == "opt":
        fields = {
            "hidden_size": d_model,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": ffn,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": d_model,
        }
    else:
        fields = {
            "hidden_size": d_model,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": ffn,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if model_type in ("bert", "roberta"):
            fields["is_decoder"] = True
        elif model_type != "gpt_neox":
            fields["num_key_value_heads"] = kv_heads
            if model_type.startswith(("gemma", "qwen3")):
                fields["head_dim"] = head_dim * 2  # wider than d_model / heads
    return AutoConfig.for_model(model_type, vocab_size=VOCAB, **{**fields, **more})


def build(config, prompt_tokens=PROMPT):
    """A PEFT prompt-tuned model of random weights, with eager attention so that every product is seen."""
    torch.manual_seed(0)
    seq2seq = config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    plm = auto.from_config(config, attn_implementation="eager")
    task = TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM
    prompt = PromptTuningConfig(task_type=task, num_virtual_tokens=prompt_tokens, num_transformer_submodules=1)
    return get_peft_model(plm, prompt)


def batch_of(shape: BatchShape, seq2seq: bool):
    length = shape.input_tokens if seq2seq else shape.input_tokens + shape.target_tokens
    ids = torch.randint(4, VOCAB, (shape.batch, length))
    labels = torch.randint(4, VOCAB, (shape.batch, shape.target_tokens)) if seq2seq else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measured(model, shape: BatchShape) -> tuple[float, float]:
    """FLOPs `(forward, forward + backward)` that PyTorch counts."""
    batch = batch_of(shape, model.config.is_encoder_decoder)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = model(**batch).loss
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def full_shape(batch, input_tokens, target_tokens):
    return BatchShape(
        batch=batch, input_tokens=input_tokens, prompt_tokens=PROMPT, target_tokens=target_tokens, full_logits=True
    )


def partial_stages(cost: CostModel) -> list[Stage]:
    full = cost.full_stage
    fewer = dict.fromkeys(cost.stacks, 1)
    narrow = {n: s.ffn // 2 for n, s in cost.stacks.items()}
    layers, ffn = {n: s.layers for n, s in cost.stacks.items()}, {n: s.ffn for n, s in cost.stacks.items()}
    stages = [Stage(a, b, stacks=full.stacks) for a, b in ((fewer, ffn), (layers, narrow), (fewer, narrow))]
    if len(cost.stacks) > 1:
        stages.append(Stage(1, cost.stacks["encoder"].ffn // 2, stacks=("encoder",)))
        stages.append(Stage(1, cost.stacks["decoder"].ffn // 2, stacks=("decoder",)))
    return stages


CASES = [(name, {}) for name in families.names()] + [("t5", {"feed_forward_proj": "gated-gelu"})]


@pytest.mark.parametrize(("model_type", "more"), CASES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    sizes=st.fixed_dictionaries(
        {
            "layers": st.integers(2, 3),
            "heads": st.sampled_from([2, 4]),
            "head_dim": st.sampled_from([16, 32]),
            "ffn": st.sampled_from([48, 96, 160]),
            "kv_heads": st.sampled_from([1, 2]),
        }
    ),
    shape=st.builds(full_shape, st.integers(1, 2), st.integers(3, 30), st.integers(2, 16)),
)
def test_equals_pytorch_count_at_every_stage(model_type, more, sizes, shape):
    config = tiny_config(model_type, **sizes, **more)
    cost = CostModel.from_config(config)
    model = build(config)
    assert CostModel.from_model(model) == cost
    assert cost.params == sum(p.numel() for p in model.get_base_model().parameters())
    partial = PartialPLM(model, keep_neurons="first")
    for stage in (None, *partial_stages(cost)):
        partial.resize(stage or partial.full_stage)
        forward, both = measured(model, shape)
        assert forward_flops(cost, stage, shape) == pytest.approx(forward, rel=0.01)
        assert step_flops(cost, stage, shape) == pytest.approx(both, rel=0.01)
    assert CostModel.from_model(model) == cost  # also while the model is shrunk
    partial.restore()


SUFFIX_CASES = [c for c in CASES if c[0] not in ("bert", "roberta")]


@pytest.mark.parametrize(
    ("model_type", "more", "cross"),
    [(*c, False) for c in SUFFIX_CASES] + [("t5", {}, True), ("bart", {}, True)],
)
def test_a_prompt_after_the_text_costs_what_pytorch_counts(model_type, more, cross):
    config = tiny_config(model_type, heads=4, head_dim=32, ffn=160, **more)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    cost, plm = CostModel.from_config(config), auto.from_config(config, attn_implementation="eager")
    shape = BatchShape(
        batch=2, input_tokens=19, prompt_tokens=PROMPT, target_tokens=4, text_apart=True, kept_cross=cross
    )
    ids = torch.randint(4, VOCAB, (2, 23))
    labels = ids.clone()
    labels[:, :19] = IGNORED
    if config.is_encoder_decoder:
        ids, labels = ids[:, :19], ids[:, 19:]
    cache = TextCache(plm, cross_attention=cross)
    model = SuffixPromptModel(plm, PROMPT, cache=cache)
    partial = PartialPLM(model, keep_neurons="first")
    for stage in (None, partial_stages(cost)[2]):
        partial.resize(stage or partial.full_stage)
        for examples in (2, 0):
            with FlopCounterMode(display=False) as counter:
                loss = suffix_loss(model, {"input_ids": ids, "labels": labels})
            forward = counter.get_total_flops()
            with counter:
                loss.backward()
            now = replace(shape, text_examples=examples)
            assert forward_flops(cost, stage, now) == pytest.approx(forward, rel=0.01)
            assert step_flops(cost, stage, now) == pytest.approx(forward + counter.get_total_flops(), rel=0.01)
    partial.restore()
    if not config.is_encoder_decoder:  # what stands between prompt and target costs what the prompt does
        within = SuffixPromptModel(plm, PROMPT, placement="infix")
        with FlopCounterMode(display=False) as counter:
            suffix_loss(within, {"input_ids": ids, "labels": labels, "n_after": torch.tensor([6, 6])}).backward()
        now = replace(shape, text_examples=2).apart(tail=6, kept=False)
        assert step_flops(cost, None, now) == pytest.approx(counter.get_total_flops(), rel=0.01)
    kept = text_states(plm, [[5] * 19], cache).states
    assert kept.numel() * 2 == text_bytes(cost, None, 19, dtype_bytes=2, kept_cross=cross)
    texts, new = [[5] * 19, [6] * 19], 6
    with FlopCounterMode(display=False) as counter:
        model.generate(torch.tensor(texts), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None)
    # The first new token comes out of reading the prompt: one step fewer than is counted.
    wanted = generation_flops(cost, replace(shape, target_tokens=new, text_examples=1))
    assert wanted == pytest.approx(counter.get_total_flops(), rel=0.35)
    assert wanted < generation_flops(cost, replace(shape, target_tokens=new, text_apart=False))


def test_a_prompt_after_the_text_saves_with_the_length_of_the_text():
    cost = CostModel.from_config(tiny_config("llama", layers=4, heads=4, head_dim=32))
    ratios = []
    for tokens in (16, 64, 256):
        plain = BatchShape(batch=4, input_tokens=tokens, target_tokens=2)
        fresh, warm = (plain.apart(kept=kept) for kept in (False, True))
        ratios.append(step_flops(cost, None, warm) / step_flops(cost, None, plain))
        assert step_flops(cost, None, warm) < step_flops(cost, None, fresh) < step_flops(cost, None, plain)
        assert activation_bytes(cost, None, warm) < activation_bytes(cost, None, plain)
        assert step_flops(cost, None, fresh) - step_flops(cost, None, warm) == text_flops(cost, None, 4, tokens)
    assert ratios == sorted(ratios, reverse=True)
    with pytest.raises(ConfigError, match="prompt_tokens=0 leaves no prompt"):
        BatchShape(prompt_tokens=0, text_apart=True)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_linear_convention_is_the_linear_layers_alone(model_type):
    config = tiny_config(model_type)
    model, cost, shape = build(config), CostModel.from_config(config), full_shape(2, 11, 4)
    seen = 0

    def count(module, inputs, output):
        nonlocal seen
        seen += 2 * inputs[0].numel() * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(**batch_of(shape, config.is_encoder_decoder))
    assert forward_flops(cost, None, shape, convention="linear") == seen


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_label_tokens_cut_the_head_and_a_decoders_last_layer(model_type):
    cost = CostModel.from_config(tiny_config(model_type))
    few, every = (BatchShape(batch=2, target_tokens=8, label_tokens=n) for n in (3, None))
    last = sum(s.token_wise + s.neuron * s.ffn for s in cost.stacks.values()) if model_type == "llama" else 0
    assert step_flops(cost, None, every) - step_flops(cost, None, few) == 2 * 2 * 2 * 5 * (cost.head + last)
    full = BatchShape(batch=2, target_tokens=8, full_logits=True)
    unlabelled = 512 if model_type == "llama" else 0
    assert step_flops(cost, None, full) - step_flops(cost, None, every) == 2 * 2 * 2 * unlabelled * (cost.head + last)
    shape = BatchShape(batch=2, target_tokens=8)
    saved = forward_flops(cost, None, shape, whole_last_layer=True) - forward_flops(cost, None, shape)
    assert saved == 2 * 2 * unlabelled * last


@pytest.mark.parametrize("model_type", [n for n in families.names() if n not in ("mbart", "pegasus", "mt5")])
def test_label_loss_costs_the_labelled_positions(model_type):
    config = tiny_config(model_type)
    model, cost = build(config), CostModel.from_config(config)
    shape = BatchShape(batch=3, input_tokens=12, prompt_tokens=PROMPT, target_tokens=8, label_tokens=2)
    batch = batch_of(shape, config.is_encoder_decoder)
    width = batch["labels"].shape[1]
    batch["labels"][:, : width - 2] = IGNORED
    with FlopCounterMode(display=False) as counter:
        label_loss(model, batch).backward()
    assert step_flops(cost, None, shape) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_schedule_adds_its_stages_up():
    cost, shape = CostModel.from_config(tiny_config("t5", layers=4)), BatchShape(batch=1, input_tokens=9)
    schedule = Schedule.preset("cr", cost.full_stage, total_steps=10)
    assert schedule_flops(cost, schedule, shape) == sum(s.steps * step_flops(cost, s, shape) for s in schedule.stages)
    plain = Schedule.preset("pt", cost.full_stage, total_steps=10)
    assert schedule_flops(cost, plain, shape) == pytest.approx(10 * step_flops(cost, None, shape))


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2"])
def test_generation_close_to_measured(model_type):
    # transformers sizes T5's cache by `num_layers`, so both stacks have to be as deep for it to generate at all.
    same = {"t5": {"num_decoder_layers": 2}, "bart": {"decoder_layers": 2}}.get(model_type, {})
    config = tiny_config(model_type, layers=2, **same)
    model = build(config).get_base_model()
    shape = BatchShape(batch=2, input_tokens=20, prompt_tokens=0, target_tokens=6)
    ids = torch.randint(4, VOCAB, (2, 20))
    with FlopCounterMode(display=False) as counter:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
    assert generation_flops(CostModel.from_config(config), shape) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_memory_estimates():
    config = tiny_config("llama", layers=4, heads=4, head_dim=32, ffn=256)
    model, cost = build(config), CostModel.from_config(config)
    half = Stage(2, 128)
    assert weight_bytes(cost, None, dtype_bytes=4) == 4 * cost.params
    assert weight_bytes(cost, half) - weight_bytes(cost, None) == 2 * 2 * 128 * cost.stacks["decoder"].neuron_params
    shape = BatchShape(batch=2, input_tokens=60, prompt_tokens=PROMPT, target_tokens=20, full_logits=True)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch_of(shape, False)).loss
    assert loss.requires_grad
    estimate = activation_bytes(cost, None, shape, dtype_bytes=4, keep_scores=True)
    assert math.log2(estimate / sum(kept.values())) == pytest.approx(0, abs=0.6)
    assert activation_bytes(cost, half, shape) < activation_bytes(cost, None, shape)


def test_big_config_needs_no_weights():
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    cost = CostModel.from_config(config)
    assert cost.params == 70_553_706_496
    # 2 FLOPs per weight and token forward, as much again backward (Kaplan et al. 2020), scores on top.
    shape = BatchShape(batch=1, input_tokens=100, prompt_tokens=20, target_tokens=8, full_logits=True)
    active = cost.params - 128256 * 8192
    assert step_flops(cost, None, shape, convention="linear") == pytest.approx(4 * active * 128, rel=1e-3)


def test_ledger_is_never_gross():
    ledger = FlopsLedger()
    ledger.add("train", 10)
    ledger.add("score", 2)
    ledger.add("train", 1)
    assert ledger["train"] == 11
    assert ledger.total == 13
    assert ledger.to_dict() == {"train": 11, "score": 2, "probe": 0, "eval": 0, "total": 13}
    assert FlopsLedger(ledger.to_dict()).to_dict() == ledger.to_dict()
    with pytest.raises(ConfigError, match="tax"):
        ledger.add("tax", 1)
    with pytest.raises(ConfigError, match="at least 0"):
        ledger.add("train", float("nan"))


def test_relative_flops_is_the_ratio_of_sums():
    assert relative_flops([(1, 2), (3, 6), (1, 1)]) == pytest.approx(5 / 9)


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"target_tokens": 1.5}, {"input_tokens": -1}, {"label_tokens": 11, "target_tokens": 10}]
)
def test_bad_shapes_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BatchShape(**wrong)


def test_refusals_name_the_field():
    cost = CostModel.from_config(T5Config(d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, vocab_size=50))
    with pytest.raises(ScheduleError, match="layers=3"):
        step_flops(cost, Stage(3, 32, stacks=("encoder",)), BatchShape())
    with pytest.raises(ConfigError, match="convention='odd'"):
        step_flops(cost, None, BatchShape(), convention="odd")
    with pytest.raises(UnknownFamilyError, match="model_type"):
        CostModel.from_config(AutoConfig.for_model("vit"))
