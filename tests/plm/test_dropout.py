"""A PLM that trains as it is evaluated."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from settings import BY_NAME, LAYERS
from trainers import Rows, arguments
from transformers import Trainer

from fast_prompt_tuning import SuffixPromptModel, soft_prompt_config, suffix_loss, without_dropout
from fast_prompt_tuning.errors import ModelError
from fast_prompt_tuning.plm.objective import label_loss
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter

DROPOUT = {
    "t5-gated": {"dropout_rate": 0.5},
    "bart": {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "decoder_layerdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def prompted(name: str, **changes):
    plm = BY_NAME[name].plm(**DROPOUT[name], **changes)
    return get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))


def step(model, batch) -> tuple[float, torch.Tensor]:
    """Loss and prompt gradient of a step, as a Trainer makes it."""
    loss = label_loss(model, batch)
    prompt = prompt_parameter(model)
    prompt.grad = None
    loss.backward()
    return float(loss.detach()), prompt.grad.clone()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DROPOUT)
def test_a_step_is_that_of_evaluation_mode_inside_and_the_models_own_outside(name, attention):
    model, batch = prompted(name, _attn_implementation=attention), BY_NAME[name].batch()
    wanted, gradient = step(model.eval(), batch)
    with without_dropout(model):
        assert step(model.train(), batch)[0] == wanted
        assert torch.equal(step(model.train(), batch)[1], gradient)
        assert model.training
    assert not model.get_base_model().training
    assert float(label_loss(model.train(), batch).detach()) != wanted


@pytest.mark.parametrize("name", DROPOUT)
def test_gradient_checkpointing_goes_on(name):
    model, batch = prompted(name), BY_NAME[name].batch()
    wanted, gradient = step(model.eval(), batch)
    plm = model.get_base_model()
    layers = [m for m in plm.modules() if hasattr(m, "_can_checkpoint_with_cache")]
    runs = []
    norm = next(m for m in layers[-1].modules() if "norm" in type(m).__name__.lower())
    norm.register_forward_hook(lambda *_: runs.append(norm.training))
    plm.gradient_checkpointing_enable({"use_reentrant": False})
    own = [m._gradient_checkpointing_func for m in layers]
    for _ in range(2):  # as often as one likes
        with without_dropout(model):
            for _ in range(2):
                runs.clear()
                loss, found = step(model.train(), batch)
                assert loss == wanted
                torch.testing.assert_close(found, gradient)
                assert runs == [False, False]  # forward, and recomputed
        assert [m._gradient_checkpointing_func for m in layers] == own
    assert len(layers) in (LAYERS, 2 * LAYERS)
    assert float(label_loss(model.train(), batch).detach()) != wanted


def test_modes_are_what_they_were_and_blocks_may_nest():
    model = prompted("gpt2")
    plm = model.get_base_model().train()
    with without_dropout(plm):
        assert not any(m.training for m in plm.modules())  # at once
        with without_dropout(model):
            plm.train()
        plm.train()
        assert not plm.training
    assert all(m.training for m in plm.modules())
    assert "train" not in vars(plm)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["t5-gated", "gpt2"])
def test_a_trainer_of_your_own(name, checkpointing, tmp_path):
    model = prompted(name)
    family = BY_NAME[name]
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=3,
            learning_rate=1e-12,
            gradient_checkpointing=checkpointing,
            **options,
        ),
        train_dataset=Rows(family.batch()),
    )
    with without_dropout(model):
        trainer.train()
    first, *others = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert others == pytest.approx([first] * 2, rel=1e-6)


def test_a_prompt_after_the_text():
    plm, batch = BY_NAME["llama"].plm(**DROPOUT["llama"]), BY_NAME["llama"].batch()
    model = SuffixPromptModel(plm, 3)
    wanted = float(suffix_loss(model.eval(), batch).detach())
    with without_dropout(model):
        assert float(suffix_loss(model.train(), batch).detach()) == wanted
        plm.gradient_checkpointing_enable()
        with pytest.raises(ModelError, match="gradient checkpointing"):
            suffix_loss(model.train(), batch)
    plm.gradient_checkpointing_disable()
    assert float(suffix_loss(model.train(), batch).detach()) != wanted
