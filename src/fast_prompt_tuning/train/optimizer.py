"""The optimizer of a run, its learning rates, and how both go on in a run that was resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from ..recipe import OptimConfig

_NAMES = {"constant": "constant_with_warmup"}
"""Where the library's name of a schedule is not the recipe's."""


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its learning rates for a run of so many steps.

    `adafactor` is the paper's (Section 4.1): no relative step, no parameter scaling. `adam` has PyTorch's defaults,
    `prodigy` its own (Mishchenko and Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner").
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
    elif config.optimizer == "prodigy":
        # A finite number in place of infinity, which no checkpoint's JSON holds.
        optimizer = Prodigy(trained, lr=config.lr, weight_decay=config.weight_decay, growth_rate=1e30)
    else:
        optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer, _rates(optimizer, config, total_steps)


def _rates(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> Any:
    name = _NAMES.get(config.lr_schedule, config.lr_schedule)
    return get_scheduler(name, optimizer, config.warmup_steps, total_steps)


def reaching(rates: Any, config: OptimConfig, total_steps: int) -> Any:
    """Learning rates like `rates`, at the same step, of a run that has another number of steps."""
    anew = _rates(rates.optimizer, config, total_steps)
    _place(anew, rates.state_dict())
    return anew


def _place(rates: Any, steps: Mapping[str, Any]) -> None:
    """Put learning rates at the step of another's state."""
    at = {key: steps[key] for key in ("last_epoch", "_step_count")}
    now = [base * factor(at["last_epoch"]) for base, factor in zip(rates.base_lrs, rates.lr_lambdas, strict=True)]
    rates.load_state_dict({**rates.state_dict(), **at, "_last_lr": now})
    for group, rate in zip(rates.optimizer.param_groups, now, strict=True):
        group["lr"] = rate


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
    elif now["optimizer"] == before["optimizer"]:
        optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    _place(rates, steps)
