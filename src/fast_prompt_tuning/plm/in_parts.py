"""Weights in parts, one on each process: how such a PLM is loaded, and what its processes must do together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers.distributed import DistributedConfig

from ..errors import ModelError
from . import families, fingerprint


def loading_options(config: Any, way: str, processes: int) -> dict[str, Any]:
    """What `from_pretrained` of transformers takes beside the rest: each process then reads its part alone.

    Sharded is each layer by itself. What is outside of them stays whole on each process: it is called by itself.

    Args:
        config: the model's.
        way: `shard` (every process gathers a layer to run it: FSDP2) or `tensor` (it computes its part of the layer).

    Raises:
        ModelError: `tensor` of a family that transformers has no plan for.
    """
    if way == "tensor":
        if not getattr(config, "base_model_tp_plan", None):
            raise ModelError(
                f"train.parallel='tensor': transformers has no plan for model_type={config.model_type!r}; use "
                "train.parallel=shard"
            )
        return {"distributed_config": DistributedConfig(tp_size=processes)}
    alone = copy.deepcopy(config)  # with our layers for a plan: a rule of transformers' names embeddings that T5 ties
    alone.base_model_fsdp_plan = {f"{s.layers}.*": "free_full_weight" for s in families.of(config).stacks.values()}
    return {"config": alone, "distributed_config": DistributedConfig(fsdp_size=processes)}


def begin(plm: Any) -> None:
    """Make a PLM that was loaded in parts ready for use; every process calls it.

    The hashes of all parts are taken and remembered, so that a process can ask for the fingerprint alone. Sharded
    weights run one token first: their modules may be called by themselves only after the whole was.
    """
    if not _is_sharded(plm):
        fingerprint.of_model(plm)
        return
    token = torch.zeros(1, 1, dtype=torch.long, device=plm.device)
    second = {"decoder_input_ids": token} if plm.config.is_encoder_decoder else {}
    with torch.no_grad():
        plm(input_ids=token, **second, use_cache=False)
    for module in plm.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    fingerprint.of_model(plm)
    plm.set_reshard_after_forward(False, recurse=False)
    plm.set_reshard_after_backward(False, recurse=False)
    plm.unshard()


def any_process(plm: Any, needed: bool) -> bool:
    """Whether this process, or with sharded weights any other one, needs a pass: all must then make one together."""
    if not _is_sharded(plm):
        return needed
    one = torch.tensor([int(needed)], device=plm.device)
    distributed.all_reduce(one, op=distributed.ReduceOp.MAX)
    return bool(one.item())


def _is_sharded(plm: Any) -> bool:
    return isinstance(plm, FSDPModule)
