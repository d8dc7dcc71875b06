"""Where the parts of a live model are: its layers, feed-forward and attention projections, as its family says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError
from . import families
from .families import StackSpec
from .narrow import narrowed_to

_SHRUNK = "this model is shrunk by a PartialPLM; call its restore() first"


def get_plm(model: Any) -> Any:
    """The PLM under a PEFT wrapper; the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def resolve(module: Any, path: str) -> Any:
    """The submodule at a dotted `path` in which numbers (also negative) index module lists; None if there is none."""
    for part in path.split("."):
        if part.lstrip("-").isdigit():
            if not isinstance(module, nn.ModuleList) or not -len(module) <= int(part) < len(module):
                return None
            module = module[int(part)]
        else:
            child = getattr(module, part, None)
            if not isinstance(child, nn.Module):
                return None
            module = child
    return module


def layer_list(plm: Any, spec: StackSpec) -> tuple[Any, str]:
    """The module that a stack's layers hang on, None where the model has none, and their attribute's name.

    `parent._modules[attribute]` is the whole list also where a partial PLM shadows it; `getattr` gives what runs now.
    """
    parent_path, _, attribute = spec.layers.rpartition(".")
    base = getattr(plm, "base_model", plm)
    return resolve(base, parent_path) if parent_path else base, attribute


def ffn_projections(layer: nn.Module, spec: StackSpec) -> tuple[tuple[nn.Module, ...], nn.Module | None]:
    """A layer's FFN input projections and its output projection; empty and None where it has none of that shape."""
    choices = (tuple(resolve(layer, path) for path in paths) for paths in spec.ffn_in)
    inputs = next((modules for modules in choices if all(m is not None for m in modules)), ())
    return inputs, resolve(layer, spec.ffn_out)


@dataclass
class StackModules:
    """The modules of one stack of a live model.

    Args:
        parent, attribute: where the module list hangs.
        layers: the full module list (L layers).
        width: FFN width F.
        ffn_in, ffn_out: for every layer the FFN input projections and the output projection; empty or None where a
            layer has no FFN of the registered shape.
    """

    name: str
    spec: StackSpec
    parent: nn.Module
    attribute: str
    layers: nn.ModuleList
    width: int
    ffn_in: list[tuple[nn.Module, ...]]
    ffn_out: list[nn.Module | None]


def find_stacks(plm: Any) -> dict[str, StackModules]:
    """The stacks of a PLM at its full size, as its family declares them.

    Raises:
        UnknownFamilyError: the architecture is not registered.
        ModelError: the model's modules are not where its family says, or it is shrunk already.
    """
    config = plm.config
    stacks = {}
    for name, spec in families.of(config).stacks.items():
        parent, attribute = layer_list(plm, spec)
        if parent is not None and attribute in parent.__dict__:
            raise ModelError(_SHRUNK)
        layers = parent._modules.get(attribute) if parent is not None else None
        count = families.layer_count(config, spec)
        if not isinstance(layers, nn.ModuleList) or len(layers) != count:
            described = "no module list" if layers is None else f"{len(layers)} layers"
            raise ModelError(
                f"{type(plm).__name__} (model_type={config.model_type!r}) has {described} at {spec.layers!r}, but its "
                f"config counts {count}; if it is a variant of the family, register it with its own paths"
            )
        ffn_in: list[tuple[nn.Module, ...]] = []
        ffn_out = []
        for layer in layers:
            ins, out = ffn_projections(layer, spec)
            ffn_in.append(ins)
            ffn_out.append(out)
            if any(narrowed_to(module) for module in (*ins, out)):
                raise ModelError(_SHRUNK)
        width = families.ffn_width(config, spec)
        stacks[name] = StackModules(name, spec, parent, attribute, layers, width, ffn_in, ffn_out)
    return stacks
