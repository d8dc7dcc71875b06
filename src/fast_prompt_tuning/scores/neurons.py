"""Scores of FFN neurons, by which FFN reduction chooses what to keep.

Source: Huang et al. 2022 (Findings of EMNLP), Section 3.2, and the authors' code: the activation score of a neuron is
its mean absolute activation over an example's non-padding tokens, the soft prompt prepended, averaged over examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import ScoreError, is_whole
from ..files import new_file
from ..plm import fingerprint
from ..plm.modes import evaluating
from ..plm.objective import IGNORED, forward_inputs, label_loss, selected_rows
from ..plm.stacks import StackModules, find_stacks, get_plm
from ..prompt.places import prompted_of

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS = ("mean", "max", "integrated_gradients")
AVERAGED = "tokens of each example, then examples"
"""The rule by which scores are averaged, in their metadata: every example counts the same, however long it is."""

NO_BATCHES = "calibration_batches is empty; give at least one batch of training examples"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Scores by stack, float32. `metadata` says of what and how; see `NeuronScores`, `LayerScores`.

    Raises:
        ScoreError: from `check_model` and `load`.
    """

    scores: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    what: ClassVar[str]
    maker: ClassVar[str]
    dimensions: ClassVar[int]

    def check_model(self, plm: Any) -> None:
        """Raise `ScoreError` unless these are the scores of `plm`'s own weights."""
        if wrong := fingerprint.mismatch(self.metadata.get("model_fingerprint"), fingerprint.of_model(plm)):
            raise ScoreError(
                f"{self.what} are of the model {self.metadata.get('model', '?')!r}, not of this one ({wrong}); score "
                f"this model: {self.maker}(model, calibration_batches)"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            ScoreError: the file exists already, another process wrote it meanwhile, or it cannot be written.
        """
        path = Path(path)
        taken = ScoreError(f"{str(path)!r} exists already; remove it or choose another name")
        if path.exists():
            raise taken
        try:
            with new_file(path, replace=False) as work:  # a torn file would stop every resume
                save_file({k: v.contiguous() for k, v in self.scores.items()}, work, metadata=dict(self.metadata))
        except (OSError, SafetensorError) as error:
            if isinstance(error, FileExistsError) and path.exists():
                raise taken from None
            raise ScoreError(
                f"{str(path)!r} cannot be written: {error}; make room, or choose another folder"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`.

        Raises:
            ScoreError: it cannot be read, or holds other things than finite scores of a model.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ScoreError(f"{str(path)!r} is not a readable score file: {error}") from error
        if "model_fingerprint" not in metadata or any(t.ndim != cls.dimensions for t in scores.values()):
            raise ScoreError(
                f"{str(path)!r} was not written by {cls.__name__}.save: no model fingerprint in it, or other scores"
            )
        for name, values in scores.items():
            if not values.is_floating_point() or not values.numel() or not torch.isfinite(values).all():
                raise ScoreError(f"{str(path)!r}: the scores of {name!r} are no finite numbers; score the model again")
        return cls(scores, metadata)


class NeuronScores(Scores):
    """One score per FFN neuron: `scores[stack]` is `(L, F)`; FFN reduction keeps the highest."""

    what, maker, dimensions = "neuron_scores", "activation_scores", 2

    @property
    def pooled(self) -> bool:
        """Whether they were made before `AVERAGED` was the rule: a mean over the tokens of all examples at once."""
        return self.metadata.get("kind", "max") != "max" and self.metadata.get("averaged") != AVERAGED

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """As `Scores.load`; warns where scores were made by an earlier rule, and may rank neurons differently."""
        scores = super().load(path)
        if scores.pooled:
            logger.warning("%s holds scores averaged over pooled tokens, an earlier rule; better score again", path)
        return scores


def describe(plm: Any, metadata: Mapping[str, Any] | None, **facts: Any) -> dict[str, str]:
    """Metadata of scores: which model, which version, and what the caller adds. safetensors keeps strings only."""
    from .. import __version__

    common = {
        "model": plm.config.name_or_path or plm.config.model_type,
        "model_fingerprint": fingerprint.of_model(plm),
        "version": __version__,
    }
    return {k: str(v) for k, v in {**facts, **common, **(metadata or {})}.items()}


def activation_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    kind: str = "mean",
    gradient_steps: int = 8,
    metadata: Mapping[str, Any] | None = None,
) -> NeuronScores:
    """Score every FFN neuron on calibration batches, streamed: memory does not grow with their number.

    Padding positions do not count, every example counts the same, and the result does not depend on how examples are
    batched. The model is run at its full size, in evaluation mode, and left as it was.

    Args:
        model: PEFT model with its soft prompt (prepended as in training), or the bare PLM; a `SuffixPromptModel`
            stands for its PLM, since a prompt after the text leaves the text as it is without one.
        batches: dicts of tensors as the model's forward takes them: `input_ids (B, T)`, `attention_mask (B, T)`,
            `labels`. Use *training* examples.
        kind: `mean`: mean |a| (the paper's); `max`: largest |a|; `integrated_gradients`: mean |a ∫ ∂loss/∂a| along
            the path that scales all FFN activations from 0 to a (Sundararajan et al. 2017), needs labels.
        gradient_steps: points of that integral (midpoint rule).
        metadata: more to keep with the scores (data set, seed), as strings.

    Raises:
        ScoreError: unknown kind, fewer than one gradient step, no batch, or activations that are not finite.
        UnknownFamilyError, ModelError: as `PartialPLM`.
    """
    if kind not in KINDS:
        raise ScoreError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if not is_whole(gradient_steps, 1):
        raise ScoreError(f"gradient_steps={gradient_steps!r} must be a whole number of at least 1")
    model, plm = prompted_of(model).calibrated, get_plm(model)
    stacks = find_stacks(plm)
    totals = {n: torch.zeros(len(s.layers), s.width, dtype=torch.float64) for n, s in stacks.items()}
    tokens, counted = dict.fromkeys(stacks, 0), dict.fromkeys(stacks, 0)
    examples = 0
    with evaluating(model):
        for batch in batches:
            batch = on_device(batch, plm)
            size = len(next(iter(batch.values())))
            masks = real_masks(plm, batch, stacks)
            values = _integrated(model, batch, stacks, gradient_steps) if kind == "integrated_gradients" else None
            lengths: dict[str, torch.Tensor] = {}
            for name, layer, activation in values if values is not None else _activations(model, batch, stacks):
                rows = real_rows(activation.float().abs(), masks[name])
                lengths[name] = length = real_lengths(activation, masks[name], size)
                share = (1 / length).repeat_interleave(length)[:, None]  # of each token in its example's mean
                if kind == "max":
                    totals[name][layer] = torch.maximum(totals[name][layer], rows.amax(0).cpu())
                else:
                    totals[name][layer] += (rows * share).sum(0, dtype=torch.float64).cpu()
            for name, length in lengths.items():
                tokens[name] += int(length.sum())
                counted[name] += int((length > 0).sum())
            examples += size
    if not examples:
        raise ScoreError(NO_BATCHES)
    scores = {n: (t if kind == "max" else t / max(counted[n], 1)).float() for n, t in totals.items()}
    check_finite(scores, "activations")
    facts = {"kind": kind, "examples": examples, "tokens": sum(tokens.values())}
    return NeuronScores(scores, describe(plm, metadata, **facts, **({} if kind == "max" else {"averaged": AVERAGED})))


def check_finite(scores: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise `ScoreError` where the scores of a stack, made of `what`, are no numbers."""
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise ScoreError(f"{what} of the {name} are not finite; score in bfloat16 or float32 (T5 overflows fp16)")


def on_device(batch: Mapping[str, Any], plm: Any) -> dict[str, Any]:
    """The batch on the PLM's device."""
    return {k: v.to(plm.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def real_masks(plm: Any, batch: Mapping[str, Any], stacks: Mapping[str, StackModules]) -> dict[str, Any]:
    """For each stack the mask `(B, T)` of its real tokens; None where all are."""
    text, labels = batch.get("attention_mask"), batch.get("labels")
    if not plm.config.is_encoder_decoder:
        return dict.fromkeys(stacks, text)
    target = batch.get("decoder_attention_mask")
    if target is None and labels is not None:
        target = labels != IGNORED  # the decoder input is the labels moved by one: as many real tokens
    return {"encoder": text, "decoder": target}


def real_rows(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Values `(N, F)` of the N real positions; those in front of the mask's (the soft prompt) are real."""
    flat = values.reshape(-1, values.shape[-1])
    if mask is None:
        return flat
    extra = flat.shape[0] // mask.shape[0] - mask.shape[1]
    return flat[nn.functional.pad(mask.bool(), (extra, 0), value=True).reshape(-1)]


def real_lengths(values: torch.Tensor, mask: torch.Tensor | None, size: int) -> torch.Tensor:
    """How many of `real_rows` each of `size` examples has, in their order `(B,)`."""
    positions = values.shape[:-1].numel() // size
    if mask is None:
        return torch.full((size,), positions, device=values.device)
    return mask.bool().sum(1) + positions - mask.shape[1]


def run_stacks(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Run the stacks; the LM head, if any, on one position: its logits are not used."""
    plm = get_plm(model)
    head = plm.get_output_embeddings() is not None
    with selected_rows(plm, lambda shape: torch.zeros(1, dtype=torch.long)) if head else nullcontext():
        model(**forward_inputs(plm, batch))


def _hook_outputs(
    stacks: Mapping[str, StackModules], hook: Callable[[str, int, torch.Tensor], torch.Tensor | None]
) -> ExitStack:
    """Call `hook(stack, layer, activation)` on the input of every FFN output projection; a result replaces it."""
    outputs: list[tuple[str, int, nn.Module]] = []
    for name, stack in stacks.items():
        for i, module in enumerate(stack.ffn_out):
            if module is None:
                raise ScoreError(f"layer {i} of the {name} has no feed-forward layer to score; use method ld")
            outputs.append((name, i, module))
    handles = ExitStack()
    for name, i, module in outputs:

        def pre_hook(_m: nn.Module, args: tuple[torch.Tensor, ...], key: tuple[str, int] = (name, i)) -> Any:
            replaced = hook(*key, args[0])
            return None if replaced is None else (replaced, *args[1:])

        handles.callback(module.register_forward_pre_hook(pre_hook).remove)
    return handles


def _activations(
    model: nn.Module, batch: Mapping[str, Any], stacks: Mapping[str, StackModules]
) -> list[tuple[str, int, torch.Tensor]]:
    activations: list[tuple[str, int, torch.Tensor]] = []
    with torch.no_grad(), _hook_outputs(stacks, lambda n, i, a: activations.append((n, i, a))):
        run_stacks(model, batch)
    return activations


def _integrated(
    model: nn.Module, batch: Mapping[str, Any], stacks: Mapping[str, StackModules], steps: int
) -> list[tuple[str, int, torch.Tensor]]:
    """`a · mean over the path of ∂(summed loss)/∂a`: summed, so that an example's share ignores its batch mates."""
    if batch.get("labels") is None:
        raise ScoreError("kind='integrated_gradients' needs labels in the calibration batches")
    activations = _activations(model, batch, stacks)
    gradients = [torch.zeros_like(a, dtype=torch.float32) for _, _, a in activations]
    for step in range(steps):
        alpha = (step + 0.5) / steps
        leaves = {(n, i): (alpha * a).detach().requires_grad_() for n, i, a in activations}

        def scaled(name: str, layer: int, _a: torch.Tensor, leaves: dict[Any, Any] = leaves) -> torch.Tensor:
            return leaves[name, layer]

        with _hook_outputs(stacks, scaled), torch.enable_grad():
            loss = label_loss(model, batch, num_items=1, whole_last_layer=True)
        for total, grad in zip(gradients, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total += grad / steps
    return [(n, i, a.float() * g) for (n, i, a), g in zip(activations, gradients, strict=True)]
