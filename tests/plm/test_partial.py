"""The promises of a partial PLM, checked on every family."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from settings import BY_NAME, FAMILIES, FFN, LAYERS, Settings
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification, LlamaConfig, MambaConfig, MambaForCausalLM

from fast_prompt_tuning.errors import ModelError, ScheduleError, ScoreError, UnknownFamilyError
from fast_prompt_tuning.plm import families
from fast_prompt_tuning.plm import partial as partial_plm
from fast_prompt_tuning.plm.partial import PartialPLM
from fast_prompt_tuning.plm.stacks import find_stacks
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter, soft_prompt_config
from fast_prompt_tuning.schedule.stages import Stage
from fast_prompt_tuning.scores.neurons import activation_scores

STAGES = [(LAYERS, FFN), (3, FFN), (LAYERS, 10), (3, 10), (1, 1)]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def random_scores(family: Settings) -> dict[str, torch.Tensor]:
    return {s: torch.rand(LAYERS, FFN) for s in family.stacks}


def test_full_size_changes_nothing(family):
    model, batch = family.peft(), family.batch()
    before, modules = logits(model, batch), dict(model.named_modules())
    own_dicts = {name: dict(m.__dict__) for name, m in modules.items()}
    config = copy.deepcopy(model.get_base_model().config.to_dict())
    partial = PartialPLM(model, neuron_scores=random_scores(family))
    assert partial.full_stage == Stage(LAYERS, FFN, stacks=family.stacks)
    partial.resize(partial.full_stage)
    assert torch.equal(logits(model, batch), before)
    for layers, ffn in STAGES[1:]:
        partial.resize(family.stage(layers, ffn))
        assert not torch.equal(logits(model, batch), before)
    partial.restore()
    partial.restore()
    assert torch.equal(logits(model, batch), before)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert model.get_base_model().config.to_dict() == config
    for name, module in modules.items():  # nothing of ours is left hanging on any module
        assert set(module.__dict__) == set(own_dicts[name]), name


@pytest.mark.parametrize("selection", ["evenly", "first", "score"])
def test_keeping_layers_equals_a_model_of_those_layers(family, selection):
    model, batch = family.plm(), family.batch()
    layer_scores = {s: [0.1, 0.5, 0.3, 0.9, 0.2] for s in family.stacks} if selection == "score" else None
    partial = PartialPLM(model, keep_layers=selection, layer_scores=layer_scores)
    stage = family.stage(3, FFN)
    kept = partial.kept_layers(stage)

    built = copy.deepcopy(model)
    for name, stack in find_stacks(built).items():
        stack.parent._modules[stack.attribute] = torch.nn.ModuleList(stack.layers[i] for i in kept[name])
        for config in {id(c): c for c in (built.config, stack.parent.config)}.values():
            for field in (
                *stack.spec.count_fields,
                *(stack.spec.own_count_fields if config is not built.config else ()),
            ):
                setattr(config, field, 3)
            if getattr(config, "layer_types", None):
                config.layer_types = [model.config.layer_types[i] for i in kept[name]]
        for i, layer in enumerate(stack.parent._modules[stack.attribute]):
            for module in layer.modules():
                if isinstance(module.__dict__.get("layer_idx"), int):
                    module.layer_idx = i

    partial.resize(stage)
    assert torch.equal(logits(model, batch), logits(built, batch))


def test_keeping_neurons_equals_zeroing_the_others(family):
    model, batch = family.plm().double(), family.batch()
    scores = random_scores(family)
    partial = PartialPLM(model, neuron_scores=scores)
    zeroed = copy.deepcopy(model)
    for name, stack in find_stacks(zeroed).items():
        for i, out in enumerate(stack.ffn_out):
            kept = partial.kept_neurons(name, i, 10)
            assert set(kept.tolist()) == set(scores[name][i].topk(10).indices.tolist())
            gate = torch.zeros(FFN, dtype=torch.float64)
            gate[kept] = 1
            out.register_forward_pre_hook(lambda _m, args, gate=gate: (args[0] * gate,))
    partial.resize(family.stage(LAYERS, 10))
    torch.testing.assert_close(logits(model, batch), logits(zeroed, batch))


def test_a_cut_really_saves_work(family):
    model, batch = family.plm(), family.batch()
    partial = PartialPLM(model, keep_neurons="first")

    def cost() -> int:
        with FlopCounterMode(display=False) as counter:
            logits(model, batch)
        return counter.get_total_flops()

    full = cost()
    costs = []
    for layers, ffn in STAGES[1:4]:
        partial.resize(family.stage(layers, ffn))
        costs.append(cost())
    assert costs[2] < min(costs[:2]) < max(costs[:2]) < full


def test_only_the_prompt_has_a_gradient_and_it_stays_the_same_parameter(family):
    model, batch = family.peft(), family.batch()
    prompt = prompt_parameter(model)
    partial = PartialPLM(model, neuron_scores=random_scores(family))
    for layers, ffn in STAGES:
        partial.resize(family.stage(layers, ffn))
        model.zero_grad()
        model(**batch).loss.backward()
        assert prompt_parameter(model) is prompt
        with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
        assert len(with_gradient) == 1
        assert prompt.grad.abs().sum() > 0


def test_what_is_left_out_stays_registered_and_follows_the_model(family):
    model, batch = family.peft(), family.batch()
    partial = PartialPLM(model, neuron_scores=random_scores(family))
    names = list(model.get_base_model().state_dict())
    before = {k: v.clone() for k, v in model.get_base_model().state_dict().items()}
    partial.resize(family.stage(3, 10))
    at_stage = model.get_base_model().state_dict()
    assert list(at_stage) == names
    assert all(torch.equal(at_stage[k], before[k]) for k in names)
    single = logits(model, batch)
    model.get_base_model().double()
    assert {p.dtype for p in model.get_base_model().parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model, batch).float(), single, atol=1e-4, rtol=1e-4)
    model.get_base_model().float()
    partial.restore()
    assert all(torch.equal(v, before[k]) for k, v in model.get_base_model().state_dict().items())


def test_new_weights_reach_the_narrowed_ffn(family):
    model, batch = family.plm(), family.batch()
    partial = PartialPLM(model, keep_neurons="first")
    stage = family.stage(LAYERS, 10)
    partial.resize(stage)
    model.load_state_dict(family.plm(seed=1).state_dict())
    changed = logits(model, batch)
    other = family.plm(seed=1)
    PartialPLM(other, keep_neurons="first").resize(stage)
    assert torch.equal(changed, logits(other, batch))


# PEFT's own generate ignores position ids and says so; our evaluation does not go through it.
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("bert", "roberta")], ids=lambda s: s.name)
@pytest.mark.parametrize("size", [(3, 10), (1, FFN), (LAYERS, FFN)])
def test_cached_generation_equals_uncached(family, size):
    model, batch = family.peft(), family.batch()
    partial = PartialPLM(model, neuron_scores=random_scores(family))
    partial.resize(family.stage(*size))
    inputs = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, uncached = (model.generate(**inputs, **options, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5"])
@pytest.mark.parametrize("selection", ["evenly", "first", "score"])
def test_t5_keeps_the_layer_that_owns_the_position_bias(name, selection):
    family = BY_NAME[name]
    scores = {s: [0.0, 1, 2, 3, 4] for s in family.stacks} if selection == "score" else None
    partial = PartialPLM(family.plm(), keep_layers=selection, layer_scores=scores)
    for layers in range(1, LAYERS + 1):
        assert all(kept[0] == 0 for kept in partial.kept_layers(family.stage(layers, FFN)).values())


def test_one_stack_of_two_can_be_cut():
    family = BY_NAME["t5"]
    model, batch = family.plm(), family.batch()
    partial = PartialPLM(model, neuron_scores={"encoder": torch.rand(LAYERS, FFN)})
    partial.resize(Stage(2, 10, stacks=("encoder",)))
    assert partial.kept_layers(partial.stage) == {"encoder": [0, 4], "decoder": [0, 1, 2, 3, 4]}
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (2, LAYERS)
    partial.resize(Stage({"encoder": 2, "decoder": 4}, FFN, stacks=family.stacks))
    assert model.config.num_decoder_layers == 4
    logits(model, batch)
    with pytest.raises(ScoreError, match="lacks the decoder"):
        partial.resize(family.stage(3, 10))


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5", "bart"])
@pytest.mark.parametrize("cut", ["encoder", "decoder"])
def test_generation_with_one_stack_cut(name, cut):
    family = BY_NAME[name]
    model, batch = family.peft(), family.batch()
    PartialPLM(model).resize(Stage(2, FFN, stacks=(cut,)))
    inputs = {k: batch[k][:1] for k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, uncached = (model.generate(**inputs, **options, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)


def test_full_block_comes_back_to_the_stage_even_after_an_error():
    family = BY_NAME["llama"]
    model, batch = family.peft(), family.batch()
    whole = logits(model, batch)
    partial = PartialPLM(model, keep_neurons="first")
    partial.resize(family.stage(3, 10))
    part = logits(model, batch)
    with partial.full():
        assert torch.equal(logits(model, batch), whole)

    def broken() -> None:
        with partial.full():
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        broken()
    assert torch.equal(logits(model, batch), part)
    assert partial.stage.same_size(family.stage(3, 10))


@pytest.mark.parametrize("fails_at", [0, 4, 9])
def test_a_resize_that_is_broken_off_leaves_the_full_model(monkeypatch, fails_at):
    family = BY_NAME["llama"]
    model, batch = family.peft(), family.batch()
    whole = logits(model, batch)
    partial = PartialPLM(model, keep_neurons="first")
    made = []
    real = partial_plm.NarrowProjection

    def runs_out(*args, **kwargs):
        made.append(1)
        if len(made) == fails_at + 1:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(partial_plm, "NarrowProjection", runs_out)
    with pytest.raises(MemoryError):
        partial.resize(family.stage(4, 10))
    assert torch.equal(logits(model, batch), whole)
    assert partial.stage == partial.full_stage
    partial.resize(family.stage(4, 10))  # and it can be tried again
    assert not torch.equal(logits(model, batch), whole)
    partial.restore()
    assert torch.equal(logits(model, batch), whole)


def test_gradient_checkpointing_works_at_every_stage():
    family = BY_NAME["llama"]
    model, batch = family.peft().train(), family.batch()
    partial = PartialPLM(model, keep_neurons="first")

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**batch).loss.backward()
        return prompt_parameter(model).grad.clone()

    plain = {}
    for size in STAGES:
        partial.resize(family.stage(*size))
        plain[size] = gradient()
    partial.resize(family.stage(*STAGES[-1]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for size in STAGES:
        partial.resize(family.stage(*size))
        torch.testing.assert_close(gradient(), plain[size])


def test_outputs_of_hidden_layers_follow_the_stage():
    family = BY_NAME["llama"]
    model = family.plm()
    partial = PartialPLM(model)
    partial.resize(family.stage(3, FFN))
    out = model(**family.batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 4


def test_memory_stays_within_one_narrowed_copy_of_the_ffns():
    family = BY_NAME["llama"]
    model = family.plm()
    partial = PartialPLM(model, keep_neurons="first")
    ffns = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and FFN in m.weight.shape)
    for layers, ffn in [(2, 6), (3, 12), (4, 18)]:
        partial.resize(family.stage(layers, ffn))
        held = sum(n.weight.numel() for n in partial._narrow.values())
        assert held == ffns * layers * ffn // (LAYERS * FFN)
    partial.resize(partial.full_stage)
    assert not partial._narrow


def test_the_saved_prompt_loads_with_plain_peft(family, tmp_path):
    model, batch = family.peft(), family.batch()
    prompt_parameter(model).data.normal_()
    partial = PartialPLM(model, neuron_scores=random_scores(family))
    partial.resize(family.stage(3, 10))
    model.save_pretrained(tmp_path)  # at a partial stage: what is saved does not depend on it
    partial.restore()
    loaded = PeftModel.from_pretrained(family.plm(), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_sequence_classification_of_bert():
    config = BY_NAME["bert"].config()
    config.is_decoder, config.num_labels = False, 3
    plm = BertForSequenceClassification(config)
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    partial = PartialPLM(model, keep_neurons="first")
    partial.resize(Stage(2, 10, stacks=("encoder",)))
    batch = {**BY_NAME["bert"].batch(), "labels": torch.tensor([0, 1, 2])}
    model(**batch).loss.backward()
    assert prompt_parameter(model).grad.abs().sum() > 0


def test_base_weights_that_are_trained_still_get_gradients():
    family = BY_NAME["llama"]
    model, batch = family.plm(), family.batch()
    PartialPLM(model, keep_neurons="first").resize(family.stage(LAYERS, 10))
    model(**batch).loss.backward()
    grad = model.model.layers[0].mlp.up_proj.weight.grad
    assert grad[:10].abs().sum() > 0
    assert grad[10:].abs().sum() == 0


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_family_says_how_to_register_one_and_registering_works():
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, state_size=4, pad_token_id=0)
    )
    with pytest.raises(UnknownFamilyError, match=r"model_type='mamba'.*register\(Family") as error:
        PartialPLM(mamba)
    code = re.search(r"from \S+ import [\w, ]+", str(error.value))
    exec(code[0], {})  # the message names what is there

    class OddConfig(LlamaConfig):
        model_type = "odd_llama"

    from transformers import LlamaForCausalLM

    class OddLlama(LlamaForCausalLM):
        config_class = OddConfig

    config = BY_NAME["llama"].config()
    odd = OddLlama(OddConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"}))
    with pytest.raises(UnknownFamilyError):
        PartialPLM(odd)
    families.register(
        families.Family(
            name="odd_llama",
            stacks={
                "decoder": families.StackSpec(
                    layers="layers", ffn_in=(("mlp.gate_proj", "mlp.up_proj"),), ffn_out="mlp.down_proj"
                )
            },
        )
    )
    try:
        PartialPLM(odd, keep_neurons="first").resize(Stage(3, 10))
    finally:
        families.REGISTRY.pop("odd_llama")


def test_every_family_has_its_row_of_settings():
    built_in = {model_type for family in families._BUILT_IN for model_type in (family.name, *family.peers)}
    assert built_in == {settings.config().model_type for settings in BY_NAME.values()}


def test_sizes_outside_the_model_are_refused_and_change_nothing():
    family = BY_NAME["llama"]
    model, batch = family.plm(), family.batch()
    before = logits(model, batch)
    partial = PartialPLM(model)
    with pytest.raises(ScheduleError, match=r"layers=6 does not fit.*has 5; choose 1 to 5"):
        partial.resize(Stage(6, FFN))
    with pytest.raises(ScheduleError, match="ffn=25 does not fit"):
        partial.resize(Stage(3, 25))
    with pytest.raises(ScheduleError, match="names the encoder"):
        partial.resize(Stage(3, 10, stacks=("encoder",)))
    with pytest.raises(ScoreError, match="activation_scores"):
        partial.resize(Stage(3, 10))
    assert torch.equal(logits(model, batch), before)
    with pytest.raises(ScheduleError, match="keep_layers='odd'"):
        PartialPLM(model, keep_layers="odd")
    with pytest.raises(ScoreError, match="one score per layer"):
        PartialPLM(model, keep_layers="score").check(BY_NAME["llama"].stage(3, FFN))
    with pytest.raises(ScoreError, match="needs"):
        PartialPLM(model, neuron_scores={"decoder": torch.rand(LAYERS, FFN + 1)})


def test_an_ffn_that_is_not_plain_is_refused_for_neurons_but_not_for_layers():
    class Packed(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    family = BY_NAME["llama"]
    model = family.plm()
    model.model.layers[2].mlp.up_proj = Packed(16, FFN, bias=False)
    partial = PartialPLM(model, keep_neurons="first")
    with pytest.raises(ModelError, match="Packed, not a plain linear"):
        partial.resize(family.stage(3, 10))
    partial.resize(family.stage(3, FFN))
    logits(model, family.batch())


@pytest.mark.parametrize("sizes", [(3, FFN), (LAYERS, 10)], ids=["layers", "neurons"])
def test_a_model_that_is_shrunk_already_is_refused(sizes):
    family = BY_NAME["llama"]
    model = family.peft()
    PartialPLM(model, keep_neurons="first").resize(family.stage(*sizes))
    with pytest.raises(ModelError, match="shrunk by a PartialPLM"):
        PartialPLM(model)
    with pytest.raises(ModelError, match="shrunk by a PartialPLM"):
        activation_scores(model, [family.batch()])
