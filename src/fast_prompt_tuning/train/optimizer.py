"""The optimizer of a run, its learning rates, and how both go on in a run that was resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_constant_schedule_with_warmup
from transformers.optimization import Adafactor

from ..recipe import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its learning-rate schedule (constant after a linear warm-up).

    `adafactor` is the paper's (Section 4.1): no relative step, no parameter scaling. `adam` has PyTorch's defaults.
    """
    trained = list(parameters)
    if config.optimizer == "adafactor":
        optimizer: torch.optim.Optimizer = Adafactor(
            trained,
            lr=config.lr,
            weight_decay=config.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    else:
        optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer, get_constant_schedule_with_warmup(optimizer, config.warmup_steps)


def go_on(
    optimizer: torch.optim.Optimizer,
    rates: Any,
    saved: tuple[dict[str, Any], dict[str, Any]],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
) -> None:
    """Give both the state they were saved with.

    Args:
        saved: the state dicts of optimizer and learning rates.
        before, now: the recipe's `optim` section then and today. Where it was changed on purpose today's settings
            hold, with the moments if these mean the same.
    """
    state, steps = saved
    if now == before:
        optimizer.load_state_dict(state)
        rates.load_state_dict(steps)
        return
    if now["optimizer"] == before["optimizer"]:
        optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    position = {key: steps[key] for key in ("last_epoch", "_step_count")}
    rates.load_state_dict({**rates.state_dict(), **position})
    for group, base, factor in zip(optimizer.param_groups, rates.base_lrs, rates.lr_lambdas, strict=True):
        group["lr"] = base * factor(position["last_epoch"])
