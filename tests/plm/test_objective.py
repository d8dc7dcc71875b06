"""The loss at the labelled positions is the model's own loss, for less work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import BY_NAME, FFN, LAYERS, VOCAB, Settings
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertLMHeadModel

from fast_prompt_tuning.errors import ModelError
from fast_prompt_tuning.plm import families
from fast_prompt_tuning.plm.objective import EAGER_TOKENS, choose_attention, label_loss, labelled_logits, selected_rows
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter

EXACT = {"atol": 1e-10, "rtol": 1e-10}
SINGLE = {"atol": 1e-6, "rtol": 1e-3, "check_dtype": False}
PADDINGS = ["right", "left"]


def padded(family: Settings, side: str) -> dict[str, torch.Tensor]:
    """The family's batch, padded on one side."""
    batch = family.batch()
    if side == "right":
        return batch
    text = ["input_ids", "attention_mask"] + ([] if family.encoder_decoder else ["labels"])
    rows = batch["attention_mask"].sum(1).tolist()
    moved = {k: torch.stack([r.roll(r.shape[0] - n) for r, n in zip(batch[k], rows, strict=True)]) for k in text}
    assert moved["attention_mask"][-1, 0] == 0
    return {**batch, **moved}


def gradient_tolerance(model) -> dict[str, float]:
    """Root-mean-square norms compute in float32 whatever the model's dtype, and so do their gradients."""
    rounds = any("RMSNorm" in type(m).__name__ or "T5LayerNorm" in type(m).__name__ for m in model.modules())
    return SINGLE if rounds else EXACT


def plain_loss(model, family: Settings, batch) -> torch.Tensor:
    """The mean cross-entropy from all logits, in float64; decoders' own losses round the logits to float32."""
    own = model(**batch)
    if family.encoder_decoder:
        return own.loss
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = batch["labels"]
    logits = logits[:, logits.shape[1] - labels.shape[1] :][:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(own.loss, loss, **SINGLE)  # so this is what the model itself computes
    return loss


@pytest.mark.parametrize("side", PADDINGS)
def test_loss_and_prompt_gradient_are_the_models_own(family, side):
    model, batch = family.peft().double(), padded(family, side)
    prompt = prompt_parameter(model)
    partial = PartialPLM(model, keep_neurons="first")
    labelled = labelled_logits(model, batch)[1].numel()
    for layers, ffn in [(LAYERS, FFN), (3, 10)]:
        partial.resize(family.stage(layers, ffn))
        own = plain_loss(model, family, batch)
        torch.testing.assert_close(
            torch.autograd.grad(model(**batch).loss, prompt),
            torch.autograd.grad(own, prompt, retain_graph=True),
            **SINGLE,
        )
        (own_gradient,) = torch.autograd.grad(own, prompt)
        loss = label_loss(model, batch)
        (gradient,) = torch.autograd.grad(loss, prompt)
        assert own_gradient.abs().sum() > 0
        torch.testing.assert_close(loss, own, **EXACT)
        torch.testing.assert_close(gradient, own_gradient, **gradient_tolerance(model))
        summed = label_loss(model, batch, num_items=7)
        torch.testing.assert_close(summed, own * labelled / 7, **EXACT)
        torch.testing.assert_close(label_loss(model, batch, num_items=torch.tensor(7)), summed, **EXACT)
        (gradient,) = torch.autograd.grad(summed, prompt)
        torch.testing.assert_close(gradient, own_gradient * labelled / 7, **gradient_tolerance(model))


@pytest.mark.parametrize("side", PADDINGS)
def test_loss_and_gradients_of_the_bare_model_are_its_own(family, side):
    if (family.name, side) == ("gemma2", "left"):
        pytest.skip("transformers' own Gemma 2 gives NaN here: its float64 mask overflows its float32 softmax")
    model, batch = family.plm().double(), padded(family, side)
    partial = PartialPLM(model, keep_neurons="first")
    weights = [p for p in model.parameters() if p.requires_grad]
    for layers, ffn in [(LAYERS, FFN), (3, 10)]:
        partial.resize(family.stage(layers, ffn))
        own = plain_loss(model, family, batch)
        loss = label_loss(model, batch)
        torch.testing.assert_close(loss, own, **EXACT)
        wanted = torch.autograd.grad(own, weights, allow_unused=True)
        for got, want in zip(torch.autograd.grad(loss, weights, allow_unused=True), wanted, strict=True):
            if want is None:
                assert got is None
            else:
                torch.testing.assert_close(got, want, **gradient_tolerance(model))


def test_bfloat16_is_close_and_its_loss_is_float32(family):
    model, batch = family.peft(), family.batch()
    exact = label_loss(model, batch).item()
    model.get_base_model().to(torch.bfloat16)
    loss = label_loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.1)
    loss.backward()
    assert prompt_parameter(model).grad.dtype == torch.float32
    assert torch.isfinite(prompt_parameter(model).grad).all()


def test_the_head_runs_on_labelled_positions_only(family):
    model, batch = family.peft(), family.batch()
    labels = batch["labels"] if family.encoder_decoder else batch["labels"][:, 1:]
    count = int((labels != -100).sum())
    shapes = []
    head = model.get_base_model().get_output_embeddings()
    # Always called, so after the pre-hook that selects positions.
    head.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)), always_call=True)
    logits, targets, sequence = labelled_logits(model, batch)
    assert shapes == [(count, head.weight.shape[1])]
    assert logits.shape == (count, VOCAB)
    assert targets.tolist() == labels[labels != -100].tolist()
    assert sequence.tolist() == (labels != -100).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("layers", [LAYERS, 2])
def test_the_flops_of_the_head_and_the_last_layer_are_saved(layers):
    family = BY_NAME["llama"]
    model, batch = family.peft(), family.batch()

    def cost(run) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    inputs = {k: v for k, v in batch.items() if k != "labels"}
    positions = batch["labels"].shape[0] * (batch["labels"].shape[1] + 3)  # the soft prompt's too
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    width, heads = model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim
    partial = PartialPLM(model, keep_neurons="first")
    partial.resize(family.stage(layers, 10))
    head, last = width * VOCAB, 2 * width * heads + 3 * width * 10
    whole = cost(lambda: model(**inputs))
    assert whole - cost(lambda: label_loss(model, batch)) == 2 * (positions - labelled) * (head + last)
    assert whole - cost(lambda: label_loss(model, batch, whole_last_layer=True)) == 2 * (positions - labelled) * head


@pytest.mark.parametrize("name", list(BY_NAME))
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), labelled=st.floats(0.05, 1), sizes=st.sampled_from([(LAYERS, FFN), (3, 10), (1, 5)]))
def test_the_fast_path_is_the_plain_path_whatever_is_labelled(name, seed, labelled, sizes):
    family = BY_NAME[name]
    model, batch = family.peft(seed).double().train(), family.batch(seed, size=4, length=9)
    generator = torch.Generator().manual_seed(seed)
    batch["labels"][torch.rand(batch["labels"].shape, generator=generator) > labelled] = -100
    batch["labels"][:, 2] = 5  # at least one in every row: BART looks for the last
    PartialPLM(model, keep_neurons="first").resize(family.stage(*sizes))
    prompt = prompt_parameter(model)
    own, fast = plain_loss(model, family, batch), label_loss(model, batch)
    torch.testing.assert_close(fast, own, **EXACT)
    (wanted,), (got,) = (torch.autograd.grad(loss, prompt) for loss in (own, fast))
    torch.testing.assert_close(got, wanted, **gradient_tolerance(model))


def test_the_last_layer_runs_whole_where_layers_run_again_later():
    family = BY_NAME["llama"]
    model, batch = family.peft().double().train(), family.batch()
    (wanted,) = torch.autograd.grad(label_loss(model, batch), prompt_parameter(model))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().enable_input_require_grads()
    (got,) = torch.autograd.grad(label_loss(model, batch), prompt_parameter(model))
    torch.testing.assert_close(got, wanted, **SINGLE)


@pytest.mark.parametrize(
    ("dtype", "tokens", "wanted"),
    [
        (torch.float32, 100, "sdpa"),  # the fused kernel is the faster one
        (torch.bfloat16, EAGER_TOKENS, "eager"),
        (torch.bfloat16, EAGER_TOKENS + 1, "sdpa"),  # eager attention would keep large score matrices
    ],
)
def test_attention_is_eager_for_short_inputs_in_half_precision(dtype, tokens, wanted):
    plm = BY_NAME["llama"].plm().to(dtype)
    plm.set_attn_implementation("sdpa")
    assert choose_attention(plm, tokens) == wanted
    assert plm.config._attn_implementation == wanted


def test_a_family_that_is_not_registered_has_its_loss(monkeypatch):
    family = BY_NAME["llama"]
    model, batch = family.peft().double(), family.batch()
    usual = label_loss(model, batch)
    monkeypatch.setattr(families, "REGISTRY", {})
    torch.testing.assert_close(label_loss(model, batch), usual, **EXACT)


def test_the_rows_of_the_loss_are_told_apart_by_sequence():
    for name in ("llama", "t5"):
        family = BY_NAME[name]
        model, batch = family.peft().double(), family.batch()
        logits, targets, sequence = labelled_logits(model, batch)
        each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        for row in range(3):
            own = plain_loss(model, family, {k: v[row : row + 1] for k, v in batch.items()})
            torch.testing.assert_close(each[sequence == row].mean(), own, **EXACT)


def test_a_wrapper_for_data_parallelism_is_looked_through(family):
    class Parallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    batch = family.batch()
    for model in (family.peft(), family.plm()):
        assert torch.equal(label_loss(Parallel(model), batch), label_loss(model, batch))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_given_decoder_inputs_are_used(name):
    family = BY_NAME[name]
    model, batch = family.peft().double(), family.batch()
    usual = label_loss(model, batch)
    given = {**batch, "decoder_input_ids": batch["labels"].clamp(min=0)}
    torch.testing.assert_close(label_loss(model, given), model(**given).loss, **EXACT)
    assert label_loss(model, given) != usual


def test_the_models_own_forward_is_untouched_afterwards(family):
    model, batch = family.peft(), family.batch()
    head = model.get_base_model().get_output_embeddings()
    before = model(**batch).logits
    label_loss(model, batch)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(**batch).logits, before)
    boom = head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        label_loss(model, batch)
    boom.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(**batch).logits, before)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    family = BY_NAME["llama"]
    model, batch = family.peft(), family.batch()
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    for nothing in (unlabelled, {**unlabelled, "labels": None}):
        with pytest.raises(ModelError, match=r"batch\['labels'\] is missing"):
            label_loss(model, nothing)
    with pytest.raises(ModelError, match="every label is -100"):
        label_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_models_that_do_not_predict_the_next_token_are_refused():
    config = BY_NAME["bert"].config()
    config.is_decoder = False
    batch = BY_NAME["bert"].batch()
    with pytest.raises(ModelError, match="BertForSequenceClassification has no LM head"):
        label_loss(BertForSequenceClassification(config), batch)
    with pytest.raises(ModelError, match="BertForMaskedLM does not predict the next token"):
        label_loss(BertForMaskedLM(config), batch)
    headless = SimpleNamespace(get_output_embeddings=lambda: None)
    with pytest.raises(ModelError, match="has no LM head; use a"), selected_rows(headless, lambda shape: None):
        pass


def test_layers_that_pytorch_runs_again_are_left_whole():
    """As FSDP checkpoints activations: a wrapper around each layer."""
    family = BY_NAME["llama"]
    model, batch = family.peft(), padded(family, "right")
    wanted = label_loss(model, batch)
    layer = type(model.get_base_model().model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    found = label_loss(model, batch)
    found.backward()
    assert torch.equal(found, wanted)


def test_a_feed_forward_layer_in_chunks():
    torch.manual_seed(0)
    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, is_decoder=True, chunk_size_feed_forward=3,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(4, VOCAB, (2, 6))
    labels = ids.clone()
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    torch.testing.assert_close(label_loss(bert, batch), bert(**batch).loss)
