"""What `method: auto` chooses of what a recipe leaves open: where the prompt stands, and its optimizer.

Measured on two decoders and three tasks, three seeds each (benchmarks/quality/held_out.py): tuned by Prodigy, a prompt
behind the text costs 23 to 34% of the FLOPs of one in front with a tuned rate. Its held-out loss ends lower, or within
0.3%.
"""

from __future__ import annotations

import re
from typing import Any

from ..data.tasks import Task
from ..errors import FptError
from ..placements import FRONT
from ..recipe import RunConfig, load, override
from ..schedule.auto import decisions


def chosen(config: RunConfig, task: Task, plm: Any) -> RunConfig:
    """The recipe with what `auto` chooses for it; what the recipe sets stays. Idempotent.

    A prompt goes behind the text of a decoder: within the input where the template asks something of its own about each
    text, else at its end. The rate is then Prodigy's to find. Each choice is logged in one line.
    """
    open_ = left_open(config)
    changes, placement = [], config.prompt.placement
    if ("prompt", "placement") in open_ and (place := _cheapest(config, task, plm)) != FRONT:
        placement = place
        changes.append(override("prompt.placement", place))
        where = "after each text" if place == "suffix" else "between each text and what the template asks about it"
        decisions.info(
            "auto: the prompt stands %s, so that the model reads a text once (prompt.placement=%s; for a stock PEFT "
            "adapter set prompt.placement=%s)",
            where,
            place,
            FRONT,
        )
    if ("optim", "lr") in open_ and placement != FRONT:
        changes += [override("optim.optimizer", "prodigy"), override("optim.lr", 1.0)]
        decisions.info("auto: Prodigy finds the learning rate (optim.optimizer=prodigy; set optim.lr to choose one)")
    return load(config.model_dump(mode="json"), changes) if changes else config


def left_open(config: RunConfig) -> list[tuple[str, str]]:
    """What `auto` may choose: (section, name) of settings that the recipe does not have."""
    if config.method != "auto":
        return []
    found = [] if "placement" in config.prompt.model_fields_set else [("prompt", "placement")]
    if not {"optimizer", "lr"} & config.optim.model_fields_set:
        found += [("optim", "optimizer"), ("optim", "lr")]
    return found


def placed_by_auto(config: RunConfig, *, decoder: bool, asks: bool) -> RunConfig:
    """The recipe with the placement that `auto` chooses, as far as a plan knows it: for a model's kind alone.

    Args:
        asks: whether the task's template asks something about each text.
    """
    if ("prompt", "placement") not in left_open(config):
        return config
    return load(config.model_dump(mode="json"), [override("prompt.placement", _wanted(config, decoder, asks))])


def _wanted(config: RunConfig, decoder: bool, asks: bool) -> str:
    reads_anew = config.stages or config.train.compile or config.train.gradient_checkpointing
    tuned_in_front = config.prompt.init == "prompt"  # a saved prompt was tuned for its place
    if not decoder or reads_anew or tuned_in_front or config.cache.tier == "none":
        return FRONT
    return "infix" if asks else "suffix"


def _cheapest(config: RunConfig, task: Task, plm: Any) -> str:
    """The placement that keeps texts, where model, recipe and task have one; else in front."""
    from ..prompt.prompted import placement_named  # a plan asks for no model, and must not wait for its code

    place = _wanted(config, not plm.config.is_encoder_decoder, asks_about_text(task))
    if place == FRONT:
        return FRONT
    try:
        placement_named(place).check(plm)
    except FptError as error:
        decisions.info("auto: the prompt stands in front: %s", error)
        return FRONT
    return place


def asks_about_text(task: Task) -> bool:
    """Whether a decoder's input template shows a field behind the one that may be shortened."""
    template, field = task.templates(decoder=True)[0], task.truncate
    if field is None:
        return False
    behind = re.split(r"\{\{-?\s*" + re.escape(field) + r"\s*-?\}\}", template)[-1]
    return behind != template and "{{" in behind
