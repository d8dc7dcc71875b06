"""The prompt in front of the text: the loss of a prompt's values is that of the trained model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from settings import FAMILIES

from fast_prompt_tuning.prompt.places import place, prompted_of


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_loss_of_values_is_that_of_the_model_they_are_from(family):
    model, batch = family.peft(), family.batch()
    trained = prompted_of(model)
    values = trained.parameter.detach().clone().requires_grad_()
    found, work = place(trained.plm, values).loss(batch)
    wanted, wanted_work = trained.loss(batch)
    assert work == wanted_work
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, values), torch.autograd.grad(wanted, trained.parameter))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_prompt_for_each_row(family):
    model, batch = family.peft(), family.batch()
    prompted = prompted_of(model)
    copies = prompted.parameter.detach() + torch.randn(3, 1, 1) / 10
    together = dataclasses.replace(prompted, prompt=copies, module=None).loss(batch, 1).value
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    each = [place(prompted.plm, copies[i]).loss(row, 1).value for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.stack(each).sum())
