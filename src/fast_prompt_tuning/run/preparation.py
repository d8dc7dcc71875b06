"""What a recipe trains, and the partial PLM it asks for: scored, cut and checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import nn

from ..cost.flops import forward_flops
from ..cost.ledger import FlopsLedger
from ..data.batches import Collator
from ..data.splits import examples_fingerprint, train_calibration
from ..errors import ConfigError, ScoreError, shown
from ..plm.configs import full_stage, load_config
from ..plm.loading import locate
from ..plm.partial import PartialPLM
from ..prompt.front import batch_shape
from ..prompt.places import prompted_of, tune
from ..prompt.prediction import batches_by_length
from ..prompt.prompted import PromptedPLM, placement_named
from ..prompt.soft_prompt import init_soft_prompt, load_prompt
from ..recipe import RunConfig
from ..schedule.auto import AutoSchedule
from ..schedule.stages import Schedule, Stage
from ..scores.layers import LAYER_KINDS, LayerScores, block_influence, greedy_removal
from ..scores.neurons import NeuronScores, Scores, activation_scores
from ..train import parallel
from .session import Evaluation, Session, evaluate

AnyScores = TypeVar("AnyScores", NeuronScores, LayerScores)


def full_size(config: RunConfig) -> Stage:
    """The full size of a recipe's model, from its config alone."""
    return full_stage(load_config(locate(config.model.path)))


def trainable(session: Session) -> PromptedPLM:
    """What is trained: the PLM with a new soft prompt, or without one and with all weights for `full`."""
    config = session.config
    if config.method == "full":
        session.plm.requires_grad_(True)
        return prompted_of(session.plm)
    kind = placement_named(config.prompt.placement)
    cache = session.texts if kind.spec().keeps_texts else None
    prompted = tune(session.plm, config.prompt.tokens, config.prompt.placement, cache)
    init_soft_prompt(
        prompted.module,
        config.prompt.init,
        seed=config.train.seed,
        tokenizer=session.tokenizer,
        text=config.prompt.text,
        path=config.prompt.path,
    )
    return prompted


def check_rate(config: RunConfig, dtype: torch.dtype) -> None:
    """Raise where the optimizer could not multiply values of `dtype` by the learning rate of the recipe.

    Raises:
        ConfigError: it is too large or too small for the dtype of what is trained.
    """
    limits = torch.finfo(dtype)
    if not limits.tiny <= config.optim.lr <= limits.max:
        raise ConfigError(
            f"optim.lr={config.optim.lr} is no number that {str(dtype).removeprefix('torch.')} can hold, in which this "
            f"run trains: {limits.tiny:.1e} to {limits.max:.1e}; the usual rates are 0.001 to 1"
        )


@dataclass(frozen=True)
class Needed:
    """What stages need: a partial PLM at all, scores of its neurons and layers, and those made before.

    `down_to`: the fewest layers of each stack that needs layer scores.
    """

    partial: bool
    scores: bool
    neurons: NeuronScores | None
    down_to: dict[str, int]
    layers: LayerScores | None


def checked_schedule(session: Session, model: nn.Module) -> tuple[Schedule | AutoSchedule, Needed]:
    """The schedule, checked against the model, and what it needs; nothing is computed or written yet."""
    bare = PartialPLM(model, keep_neurons="first")
    schedule = session.config.schedule(bare.full_stage, session.task.stacks)
    for stage in schedule.candidates:
        bare.check(stage)
    return schedule, needed_by(schedule.candidates, session.config, model, bare.full_stage)


def needed_by(stages: Sequence[Stage], config: RunConfig, model: nn.Module, full: Stage) -> Needed:
    """What stages that fit the model need, as the recipe's `scoring` chooses layers and neurons.

    Raises:
        ConfigError, ScoreError: `scoring.path` or `scoring.layer_path` holds scores of another model, kind or rule.
    """
    # A stage that only trains on part of each batch goes the same way as one of part of the model.
    partial = any(not s.is_full(full) or s.cuts_batch for s in stages)
    widths = any(stage.ffn_in(s) not in (None, full.ffn_in(s)) for stage in stages for s in stage.stacks)
    scores = widths and config.scoring.keep_neurons == "activation"
    neurons = NeuronScores.load(config.scoring.path) if scores and config.scoring.path else None
    if neurons is not None:
        PartialPLM(model, neuron_scores=neurons)  # scores of another model are refused here
        _check_kind("scoring.path", neurons.metadata, "scoring.kind", config.scoring.kind)
        if neurons.pooled:
            raise ConfigError(
                f"scoring.path={config.scoring.path!r} holds scores averaged over pooled tokens, an earlier rule that "
                "ranks neurons differently; score again: fpt score"
            )
    down_to = fewest_layers(stages, full) if config.scoring.keep_layers in LAYER_KINDS else {}
    layers = LayerScores.load(config.scoring.layer_path) if down_to and config.scoring.layer_path else None
    if layers is not None:
        PartialPLM(model, keep_layers="score", layer_scores=layers)
        _check_kind("scoring.layer_path", layers.metadata, "scoring.keep_layers", config.scoring.keep_layers)
    return Needed(partial, scores, neurons, down_to, layers)


def _check_kind(path: str, metadata: Mapping[str, str], setting: str, wanted: str) -> None:
    kind = metadata.get("kind", wanted)
    if kind != wanted:
        raise ConfigError(f"{path} holds {kind} scores, but {setting}={wanted!r}; set {setting}={kind}, or score again")


def fewest_layers(stages: Iterable[Stage], full: Stage) -> dict[str, int]:
    """For each stack that a stage leaves layers out of, the fewest it ever has."""
    fewest: dict[str, int] = {}
    for stage in stages:
        for stack in stage.stacks:
            layers = stage.layers_in(stack)
            if layers is not None and layers != full.layers_in(stack):
                fewest[stack] = min(layers, fewest.get(stack, layers))
    return fewest


def scored_partial(
    session: Session,
    model: nn.Module,
    schedule: Schedule | AutoSchedule,
    needed: Needed,
    folder: Path,
    ledger: FlopsLedger,
) -> tuple[PartialPLM | None, float]:
    """The partial PLM where a stage needs one, and the seconds that the run's scores took to make, now or before."""
    if not needed.partial:
        return None, 0.0
    scores, layers, seconds = needed.neurons, needed.layers, 0.0
    if needed.scores and scores is None:
        batches = calibration_batches(session, session.config.scoring.examples)
        ledger.add("score", sum(score_flops(session, batch) for batch in batches))
        file = folder / "scores.safetensors"
        scores = _scores_of_run(file, NeuronScores, lambda: _score(session, model, batches))
        seconds += _cost_of(scores, "seconds", file)
    if needed.down_to and layers is None:
        file, kind = folder / "layers.safetensors", session.config.scoring.keep_layers
        layers = _scores_of_run(file, LayerScores, lambda: score_layers(session, model, kind, needed.down_to))
        ledger.add("score", _cost_of(layers, "flops", file))
        seconds += _cost_of(layers, "seconds", file)
    partial = cut_by(session.config, model, scores, layers)
    for stage in schedule.candidates:
        partial.check(stage)
    return partial, seconds


def cut_by(config: RunConfig, model: nn.Module, neurons: NeuronScores | None, layers: LayerScores | None) -> PartialPLM:
    """The partial PLM as a recipe's `scoring` chooses layers and neurons."""
    scoring = config.scoring
    by = "score" if scoring.keep_layers in LAYER_KINDS else scoring.keep_layers
    return PartialPLM(
        model, neuron_scores=neurons, layer_scores=layers, keep_layers=by, keep_neurons=scoring.keep_neurons
    )


def _scores_of_run(file: Path, kind: type[AnyScores], make: Callable[[], AnyScores]) -> AnyScores:
    """The scores in a run's folder, made where there are none; the same on every process."""
    if not parallel.on_main(file.is_file):  # a resumed run takes the scores it began with, whatever the prompt is now
        begun = time.perf_counter()
        made = parallel.computed(make)
        seconds = f"{time.perf_counter() - begun:.3f}"
        parallel.on_main(lambda: replace(made, metadata={**made.metadata, "seconds": seconds}).save(file))
    return parallel.on_main(lambda: kind.load(file))


def _cost_of(scores: Scores, what: str, file: Path) -> float:
    """A cost that scores of a run's folder say of themselves, `flops` or `seconds`."""
    try:
        cost = float(scores.metadata.get(what, "0" if what == "seconds" else "nan"))  # older files hold no seconds
    except ValueError:
        cost = math.nan
    if not 0 <= cost < math.inf:
        raise ScoreError(f"{str(file)!r}: {what}={shown(scores.metadata.get(what))} is no cost; use --overwrite")
    return cost


def _score(session: Session, model: nn.Module, batches: list[dict[str, Any]]) -> NeuronScores:
    return activation_scores(model, batches, kind=session.config.scoring.kind, metadata=_provenance(session))


def _provenance(session: Session) -> dict[str, str]:
    return {
        "data": session.task.name,
        "data_fingerprint": examples_fingerprint(session.examples["train"]),
        "seed": str(session.config.train.seed),
    }


def score_layers(session: Session, model: nn.Module, kind: str, down_to: dict[str, int]) -> LayerScores:
    """Layer scores of a kind of `LAYER_KINDS` on a session's training data; `metadata["flops"]` is their cost."""
    scoring = session.config.scoring
    batches = calibration_batches(session, scoring.layer_examples)
    metadata = _provenance(session)
    if kind == "influence":
        flops = sum(_forward_of(session, batch) for batch in batches)
        return block_influence(model, batches, metadata={**metadata, "flops": flops})
    return greedy_removal(model, batches, down_to=down_to, candidates=scoring.layer_candidates, metadata=metadata)


def score_neurons(session: Session, model: nn.Module | None = None) -> NeuronScores:
    """Activation scores on a session's training data, with its prompt as it is initialised where it is in front."""
    model = trainable(session).module if model is None else model
    return _score(session, model, calibration_batches(session, session.config.scoring.examples))


def score_layers_of_run(session: Session) -> LayerScores | None:
    """The layer scores that a session's recipe needs, made likewise; None where it needs none."""
    model = trainable(session).module
    _, needed = checked_schedule(session, model)
    return score_layers(session, model, session.config.scoring.keep_layers, needed.down_to) if needed.down_to else None


def score_flops(session: Session, batch: dict[str, Any]) -> float:
    """FLOPs of scoring one calibration batch: a forward pass, or one and several steps for integrated gradients."""
    once = _forward_of(session, batch)
    return once * (1 + 8 * 2) if session.config.scoring.kind == "integrated_gradients" else once


def _forward_of(session: Session, batch: dict[str, Any]) -> float:
    # Only a prompt in front is there when neurons and layers are scored (`PromptedPLM.calibrated`).
    prompt = session.config.prompt
    shape = batch_shape(batch, prompt.tokens if prompt.placement == "prefix" else 0, decoder=session.decoder)
    return forward_flops(session.cost, None, shape, whole_last_layer=True)


def calibration_batches(session: Session, examples: int) -> list[dict[str, Any]]:
    """Batches of `examples` *training* examples, as the model's forward takes them."""
    rows = train_calibration(session.encoded["train"], examples, session.config.train.seed)
    return collated(session, rows)


def collated(session: Session, rows: Dataset) -> list[dict[str, Any]]:
    """Encoded rows in batches of like length, as the model's forward takes them."""
    collate, size = Collator(session.tokenizer, decoder=session.decoder), session.config.train.batch_size
    return [collate([rows[i] for i in picked]) for picked in batches_by_length(rows["input_ids"], size)]


def partial_of_run(session: Session, folder: Path) -> PartialPLM:
    """The PLM as a run in `folder` cuts it: its way of choosing layers and neurons, and its scores, if it made any."""
    scoring = session.config.scoring

    def file_of(name: str, path: str | None) -> Path | None:
        return folder / name if (folder / name).is_file() else Path(path) if path else None

    neurons = file_of("scores.safetensors", scoring.path)
    layers = file_of("layers.safetensors", scoring.layer_path)
    return cut_by(
        session.config,
        session.plm,
        NeuronScores.load(neurons) if neurons else None,
        LayerScores.load(layers) if layers else None,
    )


def evaluate_partial(session: Session, folder: Path) -> Evaluation:
    """The prompt of a partial-only run on the partial PLM it was tuned on, as in the paper's Table 1."""
    partial = partial_of_run(session, folder)
    schedule = session.config.schedule(partial.full_stage, session.task.stacks)
    with partial.at(schedule.now.stages[-1]):
        return evaluate(session, session.prompted(load_prompt(folder / "prompt")))


def partial_of(session: Session, size: str, folder: Path) -> AbstractContextManager[PartialPLM]:
    """A block that runs on the partial PLM of `LAYERSxFFN`, neurons chosen by the scores of the run in `folder`.

    Raises:
        ConfigError: not of that form. ScheduleError, ScoreError: it does not fit, or the run has scored no neurons.
    """
    layers, _, ffn = size.partition("x")
    if not (layers.isdigit() and ffn.isdigit()):
        raise ConfigError(f"--partial {size!r} is not LAYERSxFFN, for example 15x768")
    partial = partial_of_run(session, folder)
    stacks = session.config.cut_stacks(partial.full_stage, session.task.stacks)
    stage = Stage(int(layers), int(ffn), stacks=stacks)
    partial.check(stage)
    return partial.at(stage)
