"""Scores of whole layers, by which layer dropping chooses what to keep.

Sources: block influence is Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect", Section 3.2. Greedy removal by calibration loss is backward elimination; on layers of a language model: Kim et
al. 2024, "Shortened LLaMA", Section 3.2 (perplexity, one shot), and Song et al. 2024, "SLEB", Section 4 (repeated).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..cost.flops import forward_flops
from ..cost.shapes import BatchShape, CostModel
from ..errors import ScoreError, is_whole
from ..plm.modes import evaluating
from ..plm.objective import IGNORED, labelled_logits
from ..plm.partial import PartialPLM
from ..plm.stacks import StackModules, find_stacks, get_plm
from ..prompt.places import prompted_of
from ..prompt.soft_prompt import prompt_length
from ..schedule.stages import Size, Stage
from .neurons import NO_BATCHES, Scores, check_finite, describe, on_device, real_masks, real_rows, run_stacks

LAYER_KINDS = ("influence", "greedy")


class LayerScores(Scores):
    """One score per layer: `scores[stack]` is `(L,)`; layer dropping keeps the highest.

    One order per stack serves every size, so partial PLMs are nested: growing only ever adds layers.
    """

    what, maker, dimensions = "layer_scores", "block_influence", 1


def block_influence(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, metadata: Mapping[str, Any] | None = None
) -> LayerScores:
    """1 − the mean cosine similarity between a layer's input and output hidden states, over the real positions.

    One forward pass of the full model for each batch. The result does not depend on how examples are batched.

    Args:
        model: PEFT model with its soft prompt (prepended as in training), or the bare PLM; as `activation_scores`.
        batches: dicts of tensors as the model's forward takes them: `input_ids (B, T)`, `attention_mask (B, T)`,
            `labels`. Use *training* examples.
        metadata: more to keep with the scores (data set, seed), as strings.

    Raises:
        ScoreError: no batch, or hidden states that are not finite.
        UnknownFamilyError, ModelError: as `PartialPLM`.
    """
    model, plm = prompted_of(model).calibrated, get_plm(model)
    stacks = find_stacks(plm)
    totals = {name: torch.zeros(len(s.layers), dtype=torch.float64) for name, s in stacks.items()}
    counts = dict.fromkeys(stacks, 0)
    examples = 0
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            batch = on_device(batch, plm)
            states = _run_and_keep(model, batch, stacks, {n: range(len(s.layers)) for n, s in stacks.items()})
            for name, mask in real_masks(plm, batch, stacks).items():
                for layer, (before, after) in states[name].items():
                    moved = _distance(before, after, mask)
                    totals[name][layer] += moved.sum(dtype=torch.float64).cpu()
                counts[name] += len(moved)
            examples += len(batch["input_ids"])
    if not examples:
        raise ScoreError(NO_BATCHES)
    scores = {name: (total / max(counts[name], 1)).float() for name, total in totals.items()}
    check_finite(scores, "hidden states")
    return LayerScores(scores, describe(plm, metadata, kind="influence", examples=examples))


def greedy_removal(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    down_to: Mapping[str, int],
    candidates: int | None = 4,
    text_loss: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> LayerScores:
    """Drop one layer after another, each time the one whose removal raises the calibration loss least.

    Stacks take turns, the one with the larger part of its layers left first. A layer's score is the round it was
    dropped in; layers that were never dropped stand above, by their influence in the last round.

    Hidden states in front of a candidate are the same for every candidate, so they are computed once a round; a
    candidate costs the layers behind it. `metadata["flops"]` is what all of it cost.

    Args:
        model: as `block_influence`.
        batches: as `block_influence`; they are held in memory, a handful of examples is enough.
        down_to: for every stack to order, the smallest number of layers a schedule needs.
        candidates: try this many layers a round, those of least influence in what is left by then; None: all.
        text_loss: a decoder-only model's loss is that of every text token, which is more to go by than the labels;
            otherwise, and in an encoder-decoder always, that of the labels.

    Raises:
        ScoreError: no batch, fewer than one candidate, a size the model does not have, a loss that is not finite.
        UnknownFamilyError, ModelError: as `PartialPLM` and `label_loss`.
    """
    if candidates is not None and not is_whole(candidates, 1):
        raise ScoreError(f"candidates={candidates!r} must be at least 1, or None for all layers")
    model, plm = prompted_of(model).calibrated, get_plm(model)
    stacks = find_stacks(plm)
    for name, size in down_to.items():
        if name not in stacks or not max(1, len(stacks[name].spec.always_kept)) <= size <= len(stacks[name].layers):
            layer_counts = {n: len(s.layers) for n, s in stacks.items()}
            raise ScoreError(f"down_to={dict(down_to)} does not fit this model, which has layers {layer_counts}")
    held = [on_device(batch, plm) for batch in batches]
    if not held:
        raise ScoreError(NO_BATCHES)
    if any(batch.get("labels") is None for batch in held):
        raise ScoreError("greedy removal needs labels in the calibration batches")
    if text_loss and not plm.config.is_encoder_decoder:
        held = [{**batch, "labels": text_labels(batch)} for batch in held]
    search = _Search(model, stacks, held)
    dropped: dict[str, list[int]] = {name: [] for name in stacks}
    with torch.no_grad(), evaluating(model):
        influence = search.start_round()
        while open_ := [n for n, size in down_to.items() if len(search.left[n]) > size]:
            name = max(open_, key=lambda n: len(search.left[n]) / len(stacks[n].layers))
            free = [i for i in search.left[name] if i not in stacks[name].spec.always_kept]
            tried = sorted(free, key=lambda i: (influence[name][i], i))[:candidates]
            losses = {i: search.loss_without(name, i) for i in sorted(tried)}
            best = min(losses, key=losses.__getitem__)
            if not losses[best] < float("inf"):
                raise ScoreError(f"the calibration loss without any layer of {sorted(tried)} is not finite")
            search.left[name].remove(best)
            dropped[name].append(best)
            influence = search.start_round()
    scores = {}
    for name, stack in stacks.items():
        scores[name] = torch.zeros(len(stack.layers))
        for turn, layer in enumerate(dropped[name]):
            scores[name][layer] = turn
        for layer in search.left[name]:  # an influence is at most 2: 1 − cos
            scores[name][layer] = len(dropped[name]) + influence[name][layer]
    check_finite(scores, "hidden states")
    examples = sum(len(batch["input_ids"]) for batch in held)
    facts = {"kind": "greedy", "examples": examples, "candidates": candidates, "flops": search.flops}
    return LayerScores(scores, describe(plm, metadata, **facts, down_to=dict(down_to)))


def text_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Labels `(B, T)` of plain language modelling: every real token of a decoder-only batch."""
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, IGNORED)


def _distance(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """1 − cosine similarity `(N,)` of hidden states `(B, T, H)` at the N real positions."""
    near = F.cosine_similarity(before.float(), after.float(), dim=-1)
    return 1 - real_rows(near.unsqueeze(-1), mask).squeeze(-1)


class _Search:
    """The state of a greedy removal: layers kept so far, and their input hidden states on every batch."""

    def __init__(self, model: nn.Module, stacks: Mapping[str, StackModules], batches: list[dict[str, Any]]):
        self.model, self.stacks, self.batches = model, stacks, batches
        self.partial = PartialPLM(model)
        self.cost, self.prompt = CostModel.from_model(model), prompt_length(model)
        self.left = {name: list(range(len(stack.layers))) for name, stack in stacks.items()}
        self.states: list[dict[str, dict[int, torch.Tensor]]] = []
        self.flops = 0.0

    def start_round(self) -> dict[str, dict[int, float]]:
        """Run what is left once; its inputs are kept. Returns each layer's influence."""
        self.states = []
        far = {name: dict.fromkeys(indices, 0.0) for name, indices in self.left.items()}
        with self.partial.keeping(self.left):
            for batch in self.batches:
                states = _run_and_keep(self.model, batch, self.stacks, self.left)
                for name, mask in real_masks(self.partial.plm, batch, self.stacks).items():
                    for layer, (before, after) in states[name].items():
                        far[name][layer] += float(_distance(before, after, mask).mean()) / len(self.batches)
                self.states.append({n: {i: before for i, (before, _) in s.items()} for n, s in states.items()})
                self._book(batch, self.left, labelled=0)
        return far

    def loss_without(self, stack: str, layer: int) -> float:
        """Calibration loss, in nats per labelled token, of what is left without one more layer."""
        run, entries = self._shortest(stack, layer)
        total, count = 0.0, 0
        with self.partial.keeping(run):
            for batch, states in zip(self.batches, self.states, strict=True):
                with ExitStack() as hooks:
                    for name, entry in entries.items():
                        hooks.enter_context(_input(self.stacks[name].layers[entry], states[name][entry]))
                    logits, targets, _ = labelled_logits(self.model, batch, whole_last_layer=True)
                total += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
                count += len(targets)
                self._book(batch, run, len(targets))
        return total / count

    def _shortest(self, stack: str, layer: int) -> tuple[dict[str, list[int]], dict[str, int]]:
        """The layers that have to run to leave out `layer`, and the ones among them that are given their inputs.

        Runs start at the layer in front of the one left out; a stack in front of the cut one runs its last layer. The
        layers that must be kept (T5's first makes the position bias of all) run in any case.
        """
        run, entries = {}, {}
        names = list(self.stacks)
        for name, indices in self.left.items():
            remaining = [i for i in indices if (name, i) != (stack, layer)]
            if names.index(name) < names.index(stack):
                entry: int | None = remaining[-1]
            elif name == stack:
                entry = max((i for i in remaining if i < layer), default=None)
            else:
                entry = None  # behind the cut stack, everything changes
            if entry is not None:
                entries[name] = entry
                must = self.stacks[name].spec.always_kept
                remaining = [i for i in remaining if i >= entry or i in must]
            run[name] = remaining
        return run, entries

    def _book(self, batch: Mapping[str, Any], run: Mapping[str, Any], labelled: int) -> None:
        size, length = batch["input_ids"].shape
        both = len(self.stacks) > 1
        target = batch["labels"].shape[1] if both else 1
        shape = BatchShape(
            batch=size,
            input_tokens=length if both else length - 1,
            prompt_tokens=self.prompt,
            target_tokens=target,
            label_tokens=0,
        )
        stage = Stage.of({name: Size(len(layers), self.stacks[name].width) for name, layers in run.items()})
        self.flops += forward_flops(self.cost, stage, shape, whole_last_layer=True) + 2 * labelled * self.cost.head


def _run_and_keep(
    model: nn.Module,
    batch: Mapping[str, Any],
    stacks: Mapping[str, StackModules],
    layers: Mapping[str, Iterable[int]],
) -> dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Hidden states `(B, P + T, H)` in front of and behind each of `layers`, by stack and layer."""
    before: dict[tuple[str, int], torch.Tensor] = {}
    states: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {name: {} for name in stacks}

    def entering(key: tuple[str, int]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leaving(name: str, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            states[name][layer] = before[name, layer], after

        return hook

    with ExitStack() as hooks:
        for name, indices in layers.items():
            for layer in indices:
                module = stacks[name].layers[layer]
                hooks.callback(module.register_forward_pre_hook(entering((name, layer)), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leaving(name, layer)).remove)
        run_stacks(model, batch)
    return states


@contextmanager
def _input(module: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Give a layer these input hidden states in place of its own."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield
