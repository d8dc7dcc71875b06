"""The soft prompt is a stock PEFT adapter, whatever its family, initialisation and dtype."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from settings import BY_NAME, HIDDEN, VOCAB
from toy import tokenizer
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, T5Tokenizer

from fast_prompt_tuning.errors import ConfigError, ModelError
from fast_prompt_tuning.prompt.soft_prompt import (
    init_soft_prompt,
    load_prompt,
    prompt_parameter,
    prompt_similarity,
    similarity_matrix,
    soft_prompt_config,
)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def words(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer: one token per word, its length as the id."""
    return {"input_ids": [len(w) for w in text.split()] + [2] * add_special_tokens}


def table(model) -> torch.Tensor:
    """What the embedding module gives for every token."""
    with torch.no_grad():
        return model.get_base_model().get_input_embeddings()(torch.arange(VOCAB))


def tokens_of(values: torch.Tensor, embeddings: torch.Tensor) -> list[int]:
    """The token whose embedding each row is, bit for bit; fails where there is none."""
    equal = (values[:, None] == embeddings[None]).all(-1)
    assert equal.any(1).all()
    return equal.int().argmax(1).tolist()


def set_prompt(model, init: str, **options) -> torch.Tensor:
    init_soft_prompt(model, init, **options)
    return prompt_parameter(model).detach().clone()


# -- the config -------------------------------------------------------------------------------------------------------


def test_the_config_is_a_stock_one(family, tmp_path):
    plm = family.plm()
    config = soft_prompt_config(plm, num_virtual_tokens=5)
    assert type(config) is PromptTuningConfig
    assert config.num_virtual_tokens == 5
    assert config.num_transformer_submodules == 1
    assert config.task_type == (TaskType.SEQ_2_SEQ_LM if family.encoder_decoder else TaskType.CAUSAL_LM)
    assert soft_prompt_config(plm).num_virtual_tokens == 20
    model = get_peft_model(plm, config)
    assert prompt_parameter(model).shape == (5, HIDDEN)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(saved, PromptTuningConfig)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("head", "task_type"),
    [
        (BertForSequenceClassification, TaskType.SEQ_CLS),
        (BertForTokenClassification, TaskType.TOKEN_CLS),
        (BertForMaskedLM, TaskType.FEATURE_EXTRACTION),
    ],
)
def test_the_task_type_follows_the_head(head, task_type):
    config = BY_NAME["bert"].config()
    config.is_decoder = False
    plm = head(config)
    assert soft_prompt_config(plm, 3).task_type == task_type
    inputs = {k: v for k, v in BY_NAME["bert"].batch().items() if k != "labels"}
    assert torch.isfinite(logits(get_peft_model(plm, soft_prompt_config(plm, 3)).eval(), inputs)).all()


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5", "bart", "mbart", "pegasus"])
def test_an_encoder_decoders_prompt_lengthens_the_encoder_only(name):
    family = BY_NAME[name]
    model, batch = family.peft(prompt=5), family.batch()
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    length, target = batch["input_ids"].shape[1], batch["labels"].shape[1]
    assert {h.shape[1] for h in out.encoder_hidden_states} == {length + 5}
    assert {h.shape[1] for h in out.decoder_hidden_states} == {target}
    assert out.logits.shape[:2] == batch["labels"].shape
    prompt = prompt_parameter(model)
    model(**batch).loss.backward()
    assert (prompt.grad.abs().sum(1) > 0).all()  # no part of the prompt is dead


# -- initialisation ---------------------------------------------------------------------------------------------------


def test_uniform_is_within_the_papers_bounds(family):
    values = set_prompt(family.peft(prompt=40), "uniform")
    bound = 1 / math.sqrt(HIDDEN)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.95 * bound
    assert values.mean().abs() < 0.1 * bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_vocab_is_embeddings_as_the_model_scales_them(family):
    model = family.peft(prompt=7)
    values = set_prompt(model, "vocab")
    tokens = tokens_of(values, table(model))
    assert len(set(tokens)) > 1
    if "gemma" in family.name:
        raw = model.get_base_model().get_input_embeddings().weight
        torch.testing.assert_close(values, raw[tokens].detach() * HIDDEN**0.5, rtol=1e-2, atol=1e-3)


def test_with_a_tokenizer_vocab_is_its_ordinary_tokens():
    """T5's has 32,000 pieces: padding, end and unknown first, 100 sentinels behind; its embeddings 32,128 rows."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), *((f"▁w{i}", -3.0 - i) for i in range(9))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=5)
    tokenizer.add_tokens(["<html>"])
    assert len(tokenizer) == 18 < VOCAB
    model = BY_NAME["t5"].peft(prompt=63)
    tokens = tokens_of(set_prompt(model, "vocab", tokenizer=tokenizer), table(model))
    assert set(tokens) == set(range(3, 12))
    assert not set(tokens_of(set_prompt(model, "vocab"), table(model))) <= set(range(3, 12))


def test_peft_itself_starts_from_embeddings_on_their_own_scale(family):
    model = family.peft(prompt=7)
    assert len(set(tokens_of(prompt_parameter(model), table(model)))) > 1


def test_text_is_repeated_or_cut(family):
    model = family.peft(prompt=5)
    values = set_prompt(model, "text", tokenizer=words, text="classify the news")
    assert torch.equal(values, table(model)[[8, 3, 4, 8, 3]])
    values = set_prompt(model, "text", tokenizer=words, text="say in one word what this news is about")
    assert torch.equal(values, table(model)[[3, 2, 3, 4, 4]])


@pytest.mark.parametrize(("text", "warned"), [("x y z", True), ("x sport", False)])
def test_a_text_of_unknown_tokens_only_is_said(caplog, text, warned):
    set_prompt(BY_NAME["llama"].peft(), "text", tokenizer=tokenizer(eos=False), text=text)
    assert ("prompt.text='x y z' has only tokens that the tokenizer does not know" in caplog.text) == warned


def test_a_saved_prompt_is_taken_over(family, tmp_path):
    first, second = family.peft(seed=0), family.peft(seed=0)
    set_prompt(first, "uniform", seed=5)
    first.save_pretrained(tmp_path)
    assert torch.equal(load_prompt(tmp_path), prompt_parameter(first))
    assert torch.equal(set_prompt(second, "prompt", path=str(tmp_path)), prompt_parameter(first))


@pytest.mark.parametrize("init", ["uniform", "vocab"])
def test_the_seed_decides_and_the_global_random_state_is_untouched(init):
    model = BY_NAME["llama"].peft()
    state = torch.get_rng_state()
    one, same, other = (set_prompt(model, init, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(set_prompt(model, init, seed=3), one)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_parameter_stays_the_same_object():
    model = BY_NAME["llama"].peft()
    prompt = prompt_parameter(model)
    optimizer = torch.optim.SGD([prompt], lr=1.0)
    init_soft_prompt(model, "uniform")
    assert prompt_parameter(model) is prompt
    assert prompt.requires_grad
    model(**BY_NAME["llama"].batch()).loss.backward()
    before = prompt.detach().clone()
    optimizer.step()
    assert not torch.equal(prompt, before)


# -- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_prompt_is_float32_whatever_the_models_dtype(family, dtype, tmp_path):
    plm, batch = family.plm().to(dtype), family.batch()
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3)).eval()
    assert prompt_parameter(model).dtype == torch.float32  # also without any call of ours after PEFT's own
    for init, options in [("uniform", {}), ("vocab", {}), ("text", {"tokenizer": words, "text": "a word"})]:
        values = set_prompt(model, init, **options)
        assert values.dtype == prompt_parameter(model).dtype == torch.float32
        assert torch.isfinite(values).all()
    assert {p.dtype for p in plm.parameters()} == {dtype}
    if dtype == torch.bfloat16:
        model(**batch).loss.backward()
        assert prompt_parameter(model).grad.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert load_prompt(tmp_path).dtype == torch.float32


def test_a_prompt_cast_with_the_model_is_brought_back_to_float32():
    model = BY_NAME["llama"].peft().to(torch.bfloat16)
    assert set_prompt(model, "uniform").dtype == torch.float32
    assert prompt_parameter(model).dtype == torch.float32
    model(**BY_NAME["llama"].batch()).loss.backward()


# -- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_prompt_gives_bit_equal_logits_with_plain_peft(family, dtype, tmp_path):
    plm, batch = family.plm().to(dtype), family.batch()
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3)).eval()
    init_soft_prompt(model, "uniform", seed=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.plm().to(dtype), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_refused():
    plm = BY_NAME["llama"].plm()
    for wrong in (0, -1, 2.0, True, "20", None):
        with pytest.raises(ConfigError, match=f"num_virtual_tokens={wrong!r} must be a whole number of at least 1"):
            soft_prompt_config(plm, num_virtual_tokens=wrong)
    for wrong in (64, 65):
        with pytest.raises(ConfigError, match=f"num_virtual_tokens={wrong} leaves no room for text: .* 64 positions"):
            soft_prompt_config(plm, num_virtual_tokens=wrong)
    assert soft_prompt_config(plm, num_virtual_tokens=63).num_virtual_tokens == 63
    assert soft_prompt_config(BY_NAME["t5"].plm(), num_virtual_tokens=500).num_virtual_tokens == 500


def test_bad_initialisations_are_refused_and_change_nothing(tmp_path):
    model = BY_NAME["llama"].peft()
    before = prompt_parameter(model).detach().clone()
    refused = [
        ("zeros", {}, "prompt.init='zeros' is unknown; choose one of uniform, vocab, text, prompt"),
        ("text", {}, "needs a tokenizer and a text, got text=None"),
        ("text", {"tokenizer": words}, "needs a tokenizer and a text"),
        ("text", {"text": "a"}, "needs a tokenizer"),
        ("text", {"tokenizer": words, "text": "  "}, "prompt.text='  ' has no tokens"),
        ("text", {"tokenizer": lambda *_, **__: {"input_ids": [999]}, "text": "a"}, "has the token id 999"),
        ("prompt", {}, "needs prompt.path"),
        ("prompt", {"path": tmp_path / "nothing"}, "is not a saved soft prompt"),
        ("prompt", {"path": tmp_path}, "is not a saved soft prompt"),
    ]
    for init, options, message in refused:
        with pytest.raises(ConfigError, match=message):
            init_soft_prompt(model, init, **options)
    assert torch.equal(prompt_parameter(model), before)


def test_a_saved_prompt_of_another_shape_is_refused(tmp_path):
    family = BY_NAME["llama"]
    family.peft(prompt=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"shape \(4, 16\), this model needs \(3, 16\); set prompt.tokens to 4"):
        init_soft_prompt(family.peft(prompt=3), "prompt", path=tmp_path)


def test_files_that_are_no_soft_prompt_are_refused(tmp_path):
    family = BY_NAME["llama"]
    lora = get_peft_model(family.plm(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="is not a saved soft prompt"):
        load_prompt(tmp_path / "lora")
    with pytest.raises(ModelError, match="the model has no soft prompt; wrap it: get_peft_model"):
        prompt_parameter(lora)
    with pytest.raises(ModelError, match="has no soft prompt"):
        init_soft_prompt(family.plm(), "uniform")

    good = tmp_path / "good"
    family.peft().save_pretrained(good)
    weights, config = good / "adapter_model.safetensors", good / "adapter_config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", b"no tensors at all"):
        weights.write_bytes(broken)
        with pytest.raises(ConfigError, match="is not a saved soft prompt"):
            load_prompt(good)
    weights.write_bytes(whole)
    for broken in ("", "{", "[]", "null"):
        config.write_text(broken)
        with pytest.raises(ConfigError, match="is not a saved soft prompt"):
            load_prompt(good)
    config.write_text(json.dumps({**json.loads(settings), "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="'PREFIX_TUNING', not a soft prompt"):
        load_prompt(good)
    config.write_text(settings)
    assert load_prompt(good).shape == (3, HIDDEN)


def test_similarity_is_cosine_token_by_token():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 5, generator=generator).unbind()
    by_token = prompt_similarity(a, b)
    for i in range(3):
        dot = sum(float(x) * float(y) for x, y in zip(a[i], b[i], strict=True))
        assert float(by_token[i]) == pytest.approx(dot / float(a[i].norm() * b[i].norm()), rel=1e-5)
    torch.testing.assert_close(prompt_similarity(a, 3 * a), torch.ones(3).double())
    torch.testing.assert_close(prompt_similarity(a, -a), -torch.ones(3).double())
    matrix = similarity_matrix([a, b, a.bfloat16()])
    assert matrix.shape == (3, 3)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3).double())
    assert float(matrix[0, 1]) == pytest.approx(float(by_token.mean()))
    for wrong in (a[:2], torch.randn(3, 4)):
        with pytest.raises(ConfigError, match="must have one shape"):
            prompt_similarity(a, wrong)
        with pytest.raises(ConfigError, match="must have one shape"):
            similarity_matrix([a, wrong])


def test_an_adapter_with_vectors_for_the_decoder_too_is_what_peft_uses_of_it(tmp_path):
    plm = BY_NAME["t5"].plm()
    stock = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    assert stock.num_transformer_submodules is None  # PEFT then makes it two
    model = get_peft_model(plm, stock)
    model.save_pretrained(tmp_path)
    found = load_prompt(tmp_path)
    assert found.shape[0] == 4
    assert torch.equal(found, model.get_prompt(batch_size=1)[0, :4])


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_a_prompt_of_pefts_p_tuning_is_what_its_encoder_makes(name, tmp_path):
    plm = BY_NAME[name].plm()
    kind = TaskType.SEQ_2_SEQ_LM if plm.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config = PromptEncoderConfig(
        task_type=kind, num_virtual_tokens=4, encoder_hidden_size=8, num_transformer_submodules=1
    )
    model = get_peft_model(plm, config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        made = model.get_prompt(batch_size=1)[0]
    assert torch.equal(load_prompt(tmp_path), made)
    other = get_peft_model(BY_NAME[name].plm(), soft_prompt_config(plm, num_virtual_tokens=4))
    init_soft_prompt(other, "prompt", path=tmp_path)
    assert torch.equal(prompt_parameter(other).detach(), made.float())


def multitask(name, tasks, **options):
    plm = BY_NAME[name].plm()
    kind = TaskType.SEQ_2_SEQ_LM if plm.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config = MultitaskPromptTuningConfig(
        task_type=kind, num_virtual_tokens=4, num_tasks=tasks, num_ranks=2, prompt_tuning_init="RANDOM", **options
    )
    model = get_peft_model(plm, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].prefix_task_cols.normal_()
        model.prompt_encoder["default"].prefix_task_rows.normal_()
    return model


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_a_multitask_prompt_of_one_task_is_folded(name, tmp_path):
    model = multitask(name, 1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        made = model.get_prompt(batch_size=1, task_ids=torch.tensor([0]))[0]
    assert torch.allclose(load_prompt(tmp_path), made[:4].float())


def test_a_multitask_prompt_of_several_tasks_is_refused(tmp_path):
    multitask("llama", 3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds the prompts of 3 tasks; save one task's by PEFT first"):
        load_prompt(tmp_path)
    # … as the message says
    source = str(tmp_path / "adapter_model.safetensors")
    one = MultitaskPromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=4,
        num_tasks=1,
        num_ranks=2,
        prompt_tuning_init="EXACT_SOURCE_TASK",
        prompt_tuning_init_task=2,
        prompt_tuning_init_state_dict_path=source,
    )
    get_peft_model(BY_NAME["llama"].plm(), one).save_pretrained(tmp_path / "one")
    tensors = load_file(source)
    factors = tensors["prefix_task_cols"][2].float() @ tensors["prefix_task_rows"][2].float()
    assert torch.allclose(load_prompt(tmp_path / "one"), tensors["prompt_embeddings"].float() * factors)


@pytest.mark.parametrize(
    "wrong", [{"prefix_task_cols": (1, 4)}, {"prefix_task_rows": (1, 3, HIDDEN)}, {"prefix_task_cols": None}]
)
def test_broken_factors_of_a_task_are_refused(wrong, tmp_path):
    multitask("llama", 1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, shape in wrong.items():
        del tensors[key]
        tensors |= {} if shape is None else {key: torch.zeros(shape)}
    save_file(tensors, file)
    with pytest.raises(ConfigError):
        load_prompt(tmp_path)
