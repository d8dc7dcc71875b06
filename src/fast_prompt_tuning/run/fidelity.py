"""How faithful a partial PLM is: its loss, and how often it says what the full PLM says, at which part of its FLOPs.

What is measured is the model under the *initial* soft prompt. A faithful partial PLM is needed for a prompt to carry
over to the full one; whether it does is for a run to show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..cost.flops import relative_flops, step_flops
from ..data.splits import train_calibration
from ..errors import ConfigError
from ..plm.modes import evaluating
from ..plm.objective import labelled_logits
from ..plm.partial import PartialPLM
from ..plm.stacks import get_plm
from ..prompt.front import batch_shape
from ..prompt.places import prompted_of
from ..schedule.stages import Stage, part_of
from ..scores.layers import LAYER_KINDS, text_labels
from ..scores.neurons import on_device
from .preparation import collated, score_layers, score_neurons, trainable
from .session import Session

LAYERS = ("evenly", "first", *LAYER_KINDS)
NEURONS = ("activation",)
SIZES = (0.90, 0.75, 0.50, 0.25)


@dataclass(frozen=True)
class Fidelity:
    """One partial PLM beside the full PLM, on the same tokens.

    Args:
        selection: how its layers and neurons are chosen, e.g. `greedy` or `greedy+activation`.
        stage: its size, as `Stage.to_dict` gives it.
        loss: cross-entropy in nats per token.
        agreement: part of the tokens where it and the full PLM hold the same next token for likeliest.
        divergence: Kullback-Leibler divergence KL(full ‖ partial) in nats per token.
        relative_flops: FLOPs of a training step relative to the full PLM's.
    """

    selection: str
    stage: Mapping[str, Any]
    loss: float
    agreement: float
    divergence: float
    relative_flops: float


def parse_selections(text: str) -> dict[str, tuple[str | None, str | None]]:
    """`{name: (way of choosing layers, way of choosing neurons)}` from `evenly,greedy+activation`.

    Raises:
        ConfigError: an unknown name, or two of a kind joined.
    """
    selections: dict[str, tuple[str | None, str | None]] = {}
    for name in (part.strip() for part in text.split(",") if part.strip()):
        parts = name.split("+")
        layers, neurons = [p for p in parts if p in LAYERS], [p for p in parts if p in NEURONS]
        if len(layers) + len(neurons) != len(parts) or len(layers) > 1 or len(neurons) > 1:
            raise ConfigError(
                f"selection {name!r} is unknown; choose one of {', '.join((*LAYERS, *NEURONS))}, or one of layers and "
                "one of neurons joined by +, separated by commas"
            )
        selections[name] = (layers[0] if layers else None, neurons[0] if neurons else None)
    if not selections:
        raise ConfigError(f"selections {text!r} name none; choose from {', '.join((*LAYERS, *NEURONS))}")
    return selections


def fidelity(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], sizes: Sequence[tuple[PartialPLM, Stage]]
) -> tuple[float, list[tuple[float, float, float]]]:
    """Measure partial PLMs against the full one, batch by batch, on every text token (encoder-decoder: every label).

    Args:
        model: the model all of `sizes` are cut from, with its soft prompt or bare.
        batches: dicts of tensors as the model's forward takes them, with labels.
        sizes: partial PLMs and the stage to run each at.

    Returns:
        The full PLM's loss, and `(loss, agreement, divergence)` of every size, see `Fidelity`.
    """
    plm = get_plm(model)
    full_loss, tokens = 0.0, 0
    sums = torch.zeros(len(sizes), 3, dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            batch = on_device(batch, plm)
            if not plm.config.is_encoder_decoder:
                batch = {**batch, "labels": text_labels(batch)}
            logits, targets, _ = labelled_logits(model, batch)
            reference = F.log_softmax(logits.float(), dim=-1)
            full_loss += float(F.nll_loss(reference, targets, reduction="sum"))
            tokens += len(targets)
            likeliest = reference.argmax(-1)
            for i, (partial, stage) in enumerate(sizes):
                with partial.at(stage):
                    logits, _, _ = labelled_logits(model, batch)
                partial.restore()  # narrowed copies of many sizes at once would fill the memory
                likelihoods = F.log_softmax(logits.float(), dim=-1)
                sums[i, 0] += float(F.nll_loss(likelihoods, targets, reduction="sum"))
                sums[i, 1] += int((likelihoods.argmax(-1) == likeliest).sum())
                sums[i, 2] += float(F.kl_div(likelihoods, reference, reduction="sum", log_target=True))
    return full_loss / tokens, [(a, b, c) for a, b, c in (sums / tokens).tolist()]


def candidate_stage(full: Stage, part: float, stacks: Sequence[str], *, layers: bool, neurons: bool) -> Stage:
    """The size with `part` of the layers and/or neurons of `stacks`."""
    depth, width = ({s: size(s) or 1 for s in stacks} for size in (full.layers_in, full.ffn_in))
    return Stage(
        {s: part_of(n, part) if layers else n for s, n in depth.items()},
        {s: part_of(n, part) if neurons else n for s, n in width.items()},
        stacks=tuple(stacks),
    )


def report(
    session: Session,
    selections: Mapping[str, tuple[str | None, str | None]],
    sizes: Sequence[float] = SIZES,
    examples: int = 32,
) -> dict[str, Any]:
    """Fidelity of every size under every selection, on training examples other than those the choice was made on.

    Args:
        session: with its training split loaded; `config.scoring` says how scores are made.
        selections: `parse_selections`.
        sizes: parts of the layers and/or neurons to keep.
        examples: training examples to measure on.

    Returns:
        Plain JSON types: `full_loss`, `examples`, `rows` (`Fidelity`), and the FLOPs each scoring took (`score_flops`).
    """
    model = trainable(session).module
    full = PartialPLM(model).full_stage
    stacks = session.config.cut_stacks(full, session.task.stacks)
    neuron_scores = score_neurons(session, model) if any(n for _, n in selections.values()) else None
    smallest = {s: part_of(full.layers_in(s) or 1, min(sizes)) for s in stacks}
    layer_scores = {
        kind: score_layers(session, model, kind, smallest)
        for kind in LAYER_KINDS
        if any(kind == layers for layers, _ in selections.values())
    }
    cuts, names = [], []
    for name, (layers, neurons) in selections.items():
        partial = PartialPLM(
            model,
            neuron_scores=neuron_scores,
            layer_scores=layer_scores.get(layers or ""),
            keep_layers="score" if layers in LAYER_KINDS else layers or "evenly",
        )
        for size in sizes:
            cuts.append(
                (partial, candidate_stage(full, size, stacks, layers=layers is not None, neurons=neurons is not None))
            )
            names.append(name)
    batches = _other_batches(session, examples)
    loss, measured = fidelity(prompted_of(model).calibrated, batches, cuts)
    shapes = [batch_shape(batch, session.config.prompt.tokens, decoder=session.decoder) for batch in batches]

    def relative(stage: Stage) -> float:
        return relative_flops((step_flops(session.cost, stage, s), step_flops(session.cost, None, s)) for s in shapes)

    rows = [
        Fidelity(name, stage.to_dict(), *values, relative_flops=relative(stage))
        for name, (_, stage), values in zip(names, cuts, measured, strict=True)
    ]
    return {
        "model": session.config.model.path,
        "task": session.task.name,
        "seed": session.config.train.seed,
        "examples": sum(len(b["input_ids"]) for b in batches),
        "full_loss": loss,
        "full_step_flops": sum(step_flops(session.cost, None, s) for s in shapes) / len(shapes),
        "score_flops": {kind: float(s.metadata["flops"]) for kind, s in layer_scores.items()},
        "rows": [asdict(row) for row in rows],
    }


def _other_batches(session: Session, examples: int) -> list[dict[str, torch.Tensor]]:
    """Training examples that neither neurons nor layers were scored on, where there are enough."""
    rows, seed, scoring = session.encoded["train"], session.config.train.seed, session.config.scoring
    used = max(scoring.examples, scoring.layer_examples)
    drawn = train_calibration(rows, used + examples, seed)
    if len(drawn) >= used + examples:
        taken = {tuple(ids) for ids in train_calibration(rows, used, seed)["input_ids"]}
        others = [i for i, ids in enumerate(drawn["input_ids"]) if tuple(ids) not in taken]
        drawn = drawn.select(others) if others else drawn  # every text may be there several times
    return collated(session, drawn.select(range(min(examples, len(drawn)))))
