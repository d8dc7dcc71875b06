"""PLMs with an adapter: PEFT's own loss and answers, and what they cost."""

from __future__ import annotations

import pytest
import torch
from settings import BY_NAME, FAMILIES, HIDDEN
from torch.utils.flop_counter import FlopCounterMode
from toy import tokenizer

from fast_prompt_tuning.cost.flops import work_flops
from fast_prompt_tuning.cost.shapes import CostModel
from fast_prompt_tuning.errors import ConfigError
from fast_prompt_tuning.prompt.adapted import ADAPTERS, adapt, check_adapter
from fast_prompt_tuning.prompt.generation import GenerationOptions
from fast_prompt_tuning.prompt.places import place
from fast_prompt_tuning.prompt.prompted import Input

DECODERS = [settings for settings in FAMILIES if not settings.encoder_decoder]
PAIRS = [(kind, s) for kind in ADAPTERS for s in FAMILIES if kind == "lora" or not s.encoder_decoder]


def adapted_of(settings, kind, seed=0):
    plm = settings.plm(seed)
    cost = CostModel.from_model(plm)
    adapted = adapt(plm, kind, torch.randn(3, HIDDEN), cost)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # LoRA's second matrix starts at zero: the adapter would change nothing
        for parameter in adapted.trained:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.module.eval()
    return adapted, cost


@pytest.mark.parametrize(("kind", "settings"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_the_loss_is_pefts_own(kind, settings):
    adapted, _ = adapted_of(settings, kind)
    batch = settings.batch()
    loss = adapted.loss(batch)
    loss.value.backward()
    grads = [p.grad.clone() for p in adapted.trained]
    adapted.module.zero_grad()
    expected = adapted.module(**batch).loss
    expected.backward()
    assert torch.allclose(loss.value, expected, atol=1e-5)
    for grad, parameter in zip(grads, adapted.trained, strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-4)
    assert not any(p.requires_grad for name, p in adapted.plm.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("settings", [BY_NAME["llama"], BY_NAME["gpt2"]], ids=lambda s: s.name)
def test_a_prefix_answers_as_in_peft(settings):
    adapted, _ = adapted_of(settings, "prefix")
    texts = [[5, 6, 7, 8], [9, 10]]
    options = GenerationOptions(max_new_tokens=4, num_beams=1, batch_size=2, stop_at_newline=False)
    found, _ = adapted.generate([Input(ids) for ids in texts], tokenizer(eos=False), options)
    for ids, prediction in zip(texts, found, strict=True):
        out = adapted.module.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        new = tokenizer(eos=False).batch_decode(out[:, len(ids) :], skip_special_tokens=True)[0].strip()
        assert prediction.text == new


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_scores_are_of_the_adapted_model(kind, name):
    adapted, _ = adapted_of(BY_NAME[name], kind)
    inputs, labels = [Input([5, 6, 7, 8]), Input([9, 10])], {"one": [11], "two": [12]}
    together, _ = adapted.score(inputs, labels)
    for row, prediction in zip(inputs, together, strict=True):
        with torch.no_grad():
            logits = adapted.module(
                input_ids=torch.tensor([row.ids]), attention_mask=torch.ones(1, len(row.ids))
            ).logits
        best = "one" if logits[0, -1, 11] > logits[0, -1, 12] else "two"
        assert prediction.text == best
    longer, _ = adapted.score(inputs, {"one": [11, 13], "two": [12, 14]})
    assert {p.text for p in longer} <= {"one", "two"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_flops_are_those_that_ran(kind):
    adapted, cost = adapted_of(BY_NAME["llama"], kind)
    adapted.plm.set_attn_implementation("eager")  # the counter does not know the fused CPU kernel
    batch = {"input_ids": torch.randint(3, 60, (4, 24)), "attention_mask": torch.ones(4, 24, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(24) < 20, -100)
    with FlopCounterMode(display=False) as counter:
        loss = adapted.loss(batch)
        loss.value.backward()
    counted = work_flops(cost, loss.work)
    # What is left out of the last layer, and of the first layer's backward pass, differs a little.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.12)
    with torch.no_grad():
        assert adapted.loss(batch).work.added < loss.work.added


@pytest.mark.parametrize("settings", DECODERS, ids=lambda s: s.name)
def test_a_prefix_starts_as_a_soft_prompt(settings):
    plm, batch = settings.plm(), settings.batch()
    start = plm.get_input_embeddings().weight[5:8].detach().clone()
    with torch.no_grad():
        expected = place(plm, start).loss(batch).value
        found = adapt(plm, "prefix", start, CostModel.from_model(plm)).loss(batch).value
    assert torch.allclose(found, expected, atol=1e-4)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ConfigError, match=r"--with 'dora' is unknown; choose from lora, prefix"):
        check_adapter("dora", decoder=True)
    with pytest.raises(ConfigError, match="decoder-only"):
        adapt(BY_NAME["t5"].plm(), "prefix", torch.randn(3, HIDDEN), CostModel.from_model(BY_NAME["t5"].plm()))
