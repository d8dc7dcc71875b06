"""The partial PLM: the model a user already has, run with fewer layers and fewer FFN neurons.

Nothing is copied out of the model and nothing is taken from its registries: a kept-layers list *shadows* the full
module list as an instance attribute, so that the stack's own forward iterates the kept layers while `state_dict()`,
`.to()` and `named_parameters()` still walk the full one. An FFN is narrowed by a forward on its projections that
reads a contiguous copy of the kept rows or columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, ScheduleError, ScoreError
from ..schedule.stages import Size, Stage
from . import families, selection
from .narrow import NarrowProjection, check_projection, narrowed_to
from .stacks import StackModules, find_stacks, get_plm, layer_list, resolve

LAYER_SELECTIONS = ("evenly", "first", "score")
NEURON_SELECTIONS = ("activation", "first")


def cut_key(plm: Any, stack: str) -> str:
    """What of a stack the PLM runs now, as a short text: kept layers and neurons, attention kernel and dtypes.

    Two equal keys of one PLM mean the same computation; at its full size, in one dtype and with one attention kernel
    the key is always the same.
    """
    spec = families.of(plm.config).stacks[stack]
    parent, attribute = layer_list(plm, spec)
    order = {module: i for i, module in enumerate(parent._modules[attribute])}
    kind = plm.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else ""
    digest = hashlib.sha256(f"{plm.dtype}{autocast}{plm.config._attn_implementation}".encode())
    for layer in getattr(parent, attribute):
        narrow = narrowed_to(resolve(layer, spec.ffn_out))
        digest.update(f"{order[layer]}:{narrow.neurons_key if narrow else ''},".encode())
    return digest.hexdigest()[:16]


class PartialPLM:
    """A PLM that can be run at the size of any stage, in place and reversibly.

    The soft prompt is untouched: it stays the same `Parameter` at every stage. The state dict of the model is the
    same at every stage.

    Args:
        model: a PEFT model with a soft prompt, or a bare `transformers` model. Make the PEFT model first: PEFT reads
            the live config.
        neuron_scores: FFN neuron scores by stack, `(L, F)` each (`activation_scores`); needed for stages with fewer
            neurons under `keep_neurons="activation"`.
        layer_scores: one score per layer by stack, `(L,)` each, higher is kept longer (`block_influence`,
            `greedy_removal`, or your own); needed for stages with fewer layers under `keep_layers="score"`.
        keep_layers: `evenly` (the paper's), `first` or `score`.
        keep_neurons: `activation` (the paper's: the highest scores) or `first`.

    Raises:
        UnknownFamilyError: the architecture is not registered.
        ModelError: modules not found, or already shrunk by another `PartialPLM`.
        ScoreError: scores of the wrong shape, or of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        neuron_scores: Any = None,
        layer_scores: Any = None,
        keep_layers: str = "evenly",
        keep_neurons: str = "activation",
    ):
        self.model, self.plm = model, get_plm(model)
        if keep_layers not in LAYER_SELECTIONS:
            raise ScheduleError(f"keep_layers={keep_layers!r} is unknown; choose one of {', '.join(LAYER_SELECTIONS)}")
        if keep_neurons not in NEURON_SELECTIONS:
            raise ScheduleError(
                f"keep_neurons={keep_neurons!r} is unknown; choose one of {', '.join(NEURON_SELECTIONS)}"
            )
        self._stacks = find_stacks(self.plm)
        self._keep_layers, self._keep_neurons = keep_layers, keep_neurons
        self._neuron_scores = self._checked("neuron_scores", neuron_scores, lambda s: (len(s.layers), s.width))
        self._layer_scores = self._checked("layer_scores", layer_scores, lambda s: (len(s.layers),))
        if self._layer_scores and (missing := set(self._stacks) - set(self._layer_scores)):
            raise ScoreError(f"layer_scores lacks the stacks {sorted(missing)}; score every stack")
        self.full_stage = Stage.of({n: Size(len(s.layers), s.width) for n, s in self._stacks.items()})
        self._stage = self.full_stage
        self._narrow: dict[nn.Module, NarrowProjection] = {}
        self._full_forward: dict[nn.Module, Any] = {}
        self._layer_idx = {
            name: [
                [(m, m.__dict__["layer_idx"]) for m in layer.modules() if type(m.__dict__.get("layer_idx")) is int]
                for layer in stack.layers
            ]
            for name, stack in self._stacks.items()
        }
        self._configs = self._find_configs()

    # -- what is kept ---------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The size the model has now."""
        return self._stage

    def kept_layers(self, stage: Stage) -> dict[str, list[int]]:
        """Indices of the layers each stack keeps at `stage`."""
        return {name: self._kept_layers(stack, stage.layers_in(name)) for name, stack in self._stacks.items()}

    def _kept_layers(self, stack: StackModules, k: int | None) -> list[int]:
        n = len(stack.layers)
        if k is None or k == n:
            return list(range(n))
        if self._keep_layers == "score":
            if stack.name not in self._layer_scores:
                raise ScoreError(
                    f"layer_scores lacks the {stack.name}, but a stage leaves out layers there; pass one score per "
                    "layer: layer_scores=block_influence(model, calibration_batches), or greedy_removal(…)"
                )
            return selection.top(k, self._layer_scores[stack.name].tolist(), stack.spec.always_kept)
        return (selection.evenly if self._keep_layers == "evenly" else selection.first)(k, n)

    def kept_neurons(self, stack: str, layer: int, k: int) -> torch.Tensor:
        """Ascending indices `(k,)` of the neurons that layer `layer` of `stack` keeps."""
        if self._keep_neurons == "first":
            return torch.arange(k)
        if stack not in self._neuron_scores:
            raise ScoreError(
                f"neuron_scores lacks the {stack}, but a stage leaves out FFN neurons there; pass neuron_scores="
                "activation_scores(model, calibration_batches), or keep_neurons='first'"
            )
        # A stable sort makes ties deterministic: the lower index wins, as everywhere in selection.py.
        order = torch.sort(self._neuron_scores[stack][layer], descending=True, stable=True).indices
        return order[:k].sort().values

    def _checked(
        self, what: str, scores: Any, shape_in: Callable[[StackModules], tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """Scores by stack, float64; refused where they are another model's, of another shape or no numbers."""
        if hasattr(scores, "check_model"):
            scores.check_model(self.plm)
            scores = scores.scores
        checked = {}
        for name, values in dict(scores or {}).items():
            if name not in self._stacks:
                raise ScoreError(f"{what} names the stack {name!r}; this model has {list(self._stacks)}")
            tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
            if tuple(tensor.shape) != (shape := shape_in(self._stacks[name])):
                raise ScoreError(
                    f"{what}[{name!r}] has shape {tuple(tensor.shape)}, this model needs {shape}: the scores are "
                    "another model's"
                )
            if not torch.isfinite(tensor).all():
                raise ScoreError(f"{what}[{name!r}] holds NaN or infinity; score the model again")
            checked[name] = tensor
        return checked

    # -- resizing -------------------------------------------------------------------------------------------------

    def check(self, stage: Stage) -> None:
        """Raise unless the model can be run at `stage`; nothing is changed and no compute is spent.

        Raises:
            ScheduleError: a size the model does not have.
            ScoreError: neurons to leave out, but no scores to choose them by.
            ModelError: an FFN that cannot be cut (quantized, sharded, offloaded, or not a plain FFN).
        """
        stage.check_fits(self.full_stage)
        for name, stack in self._stacks.items():
            k = stage.ffn_in(name)
            self._kept_layers(stack, stage.layers_in(name))
            if k is None or k == stack.width:
                continue
            self.kept_neurons(name, 0, k)
            for i, (ins, out) in enumerate(zip(stack.ffn_in, stack.ffn_out, strict=True)):
                where = f"layer {i} of the {name}"
                if not ins or out is None:
                    raise ModelError(
                        f"{where} has no feed-forward layer that neurons can be left out of; use method ld"
                    )
                for module in ins:
                    check_projection(module, (stack.spec.fused * stack.width, 0), f"an FFN input of {where}")
                check_projection(out, (0, stack.width), f"the FFN output of {where}")

    def resize(self, stage: Stage) -> None:
        """Give the model the size of `stage`. Idempotent; cheap where the size does not change.

        Raises:
            ScheduleError, ScoreError, ModelError: as `check`; the model then keeps the size it had. After any other
        exception (out of memory, Ctrl-C) it is the full model.
        """
        self._apply(stage)
        self._drop_copies(keep=set(self._full_forward))

    @contextmanager
    def at(self, stage: Stage) -> Iterator[PartialPLM]:
        """Run a block at `stage`, then give the model back the size it had, whatever happens in the block.

        The narrowed FFN copies of the surrounding partial stage are kept, so that going back costs nothing.
        """
        before = self._stage
        self._apply(stage)
        try:
            yield self
        finally:
            self._apply(before)

    @contextmanager
    def keeping(self, layers: Mapping[str, Sequence[int]]) -> Iterator[PartialPLM]:
        """Run a block on exactly these layers at full width, then give the model back the size it had.

        Args:
            layers: ascending indices by stack; a stack that is not named stays whole.

        Raises:
            ScheduleError: a stack or layer that the model lacks, no layer, or T5's first one left out.
        """
        indices_of = {name: list(range(len(stack.layers))) for name, stack in self._stacks.items()}
        for name, indices in layers.items():
            if name not in indices_of:
                raise ScheduleError(f"layers name the stack {name!r}; this model has {list(indices_of)}")
            must = set(self._stacks[name].spec.always_kept)
            if not indices or sorted(set(indices) & set(indices_of[name])) != list(indices) or must - set(indices):
                raise ScheduleError(
                    f"layers[{name!r}]={list(indices)} must be ascending, of 0 to {len(indices_of[name]) - 1}"
                    + (f", with {sorted(must)} among them" if must else "")
                )
            indices_of[name] = list(indices)
        before = self._stage
        stage = Stage.of({name: Size(len(kept), self._stacks[name].width) for name, kept in indices_of.items()})
        try:
            self._set_size(stage, indices_of)
            yield self
        finally:
            self._set_size(before)

    def full(self) -> Any:
        """`with partial.full():` runs a block on the full PLM: evaluation, saving, generation."""
        return self.at(self.full_stage)

    def restore(self) -> None:
        """The full model again, with nothing of this object left in it. Idempotent."""
        self._apply(self.full_stage)
        self._drop_copies(keep=set())

    def _apply(self, stage: Stage) -> None:
        if stage.same_size(self._stage):
            return
        self.check(stage)
        try:
            self._set_size(stage)
        except BaseException:  # out of memory for a narrowed copy, Ctrl-C: never leave a model half cut
            self._set_size(self.full_stage)
            raise

    def _set_size(self, stage: Stage, layers: Mapping[str, list[int]] | None = None) -> None:
        for name, stack in self._stacks.items():
            indices = self._kept_layers(stack, stage.layers_in(name)) if layers is None else layers[name]
            self._shadow_layers(stack, indices)
            self._set_counts(name, indices)
            for i, (ins, out) in enumerate(zip(stack.ffn_in, stack.ffn_out, strict=True)):
                self._narrow_layer(name, i, ins, out, stage.ffn_in(name) if i in indices else None)
        self._stage = stage

    def _shadow_layers(self, stack: StackModules, indices: list[int]) -> None:
        if len(indices) == len(stack.layers):
            stack.parent.__dict__.pop(stack.attribute, None)
        else:
            # An instance attribute wins over a registered module of the same name in attribute look-up, and only there.
            stack.parent.__dict__[stack.attribute] = nn.ModuleList(stack.layers[i] for i in indices)
        for i, modules in enumerate(self._layer_idx[stack.name]):
            for module, full_index in modules:
                module.__dict__["layer_idx"] = indices.index(i) if i in indices else full_index

    def _narrow_layer(
        self, stack: str, layer: int, ins: tuple[nn.Module, ...], out: nn.Module | None, k: int | None
    ) -> None:
        width = self._stacks[stack].width
        if k is None or k == width or out is None:
            for module in (*ins, *([out] if out is not None else [])):
                if module in self._full_forward:
                    if (forward := self._full_forward.pop(module)) is None:
                        del module.__dict__["forward"]
                    else:
                        module.__dict__["forward"] = forward
            return
        if (ready := self._narrow.get(out)) is None or len(ready.neurons) != k:
            for module in (*ins, out):
                self._narrow.pop(module, None)  # freed before the new copy is made: at most one copy at any time
            neurons = self.kept_neurons(stack, layer, k)
            rows = torch.cat([neurons + part * width for part in range(self._stacks[stack].spec.fused)])
            projections = {module: NarrowProjection(module, rows, dim=0, keep_bias=False) for module in ins}
            projections[out] = NarrowProjection(out, neurons, dim=1, keep_bias=True)
            self._narrow.update(projections)
        for module in (*ins, out):
            if module not in self._full_forward:
                self._full_forward[module] = module.__dict__.get("forward")
            module.__dict__["forward"] = self._narrow[module].forward

    def _drop_copies(self, keep: set[nn.Module]) -> None:
        for module in [m for m in self._narrow if m not in keep]:
            del self._narrow[module]

    def _find_configs(self) -> list[tuple[str, Any, str, Any]]:
        """`(stack, config object, field, full value)` for every count or per-layer list that follows the stage."""
        fields_of_stage, seen = [], set()
        for name, stack in self._stacks.items():
            stack_config = getattr(stack.parent, "config", self.plm.config)
            fields = stack.spec.own_count_fields or stack.spec.count_fields
            live = stack.spec.count_fields if stack.spec.live_fields is None else stack.spec.live_fields
            pairs = [(self.plm.config, f) for f in (*live, *stack.spec.per_layer_fields)]
            if stack_config is not self.plm.config:
                pairs += [(stack_config, f) for f in (*fields, *stack.spec.per_layer_fields)]
            for config, field in pairs:
                value = getattr(config, field, None)
                if value is not None and (id(config), field) not in seen:
                    seen.add((id(config), field))
                    fields_of_stage.append((name, config, field, value))
        return fields_of_stage

    def _set_counts(self, stack: str, indices: list[int]) -> None:
        for name, config, field, full in self._configs:
            if name == stack:
                whole = len(indices) == len(self._stacks[stack].layers)
                value = (
                    full if whole else [full[i] for i in indices] if isinstance(full, (list, tuple)) else len(indices)
                )
                setattr(config, field, value)
