"""Short stable hashes that tell one model, data set or file from another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.utils import align_module_device
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

_BLOCK = 1 << 20  # values hashed at once: what they take as float32 stays small beside any model
_TRAINED_COPY = ".modules_to_save."
_SAMPLED = 16  # hex digits of a fingerprint by the versions that looked at 64 values of each tensor

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

_remembered: Any = WeakTensorKeyDictionary()
"""Hashes of live tensors, with what tells whether one was written to since."""


def of_model(model: torch.nn.Module) -> str:
    """Hash (32 hex digits) of a PLM's weights: names, shapes and every value of parameters and persistent buffers.

    The same values give the same hash in any float dtype that holds them; a checkpoint rounded to another dtype is
    another model. Weights of accelerate's offloading are brought in module by module. Those that have no values at all
    (on the meta device) count by name and shape alone. Where weights are sharded over processes, all must call this.
    Pass the base model: a soft prompt on top would change the hash at every step.
    """
    hashes: dict[str, bytes] = {}
    with torch.no_grad():
        for path, module in model.named_modules():
            with align_module_device(module):
                tensors: dict[str, Any] = {}
                module._save_to_state_dict(tensors, f"{path}." if path else "", keep_vars=True)
                for name, tensor in tensors.items():
                    # PEFT's own, trained copy of a classification head is no part of the PLM; it renames the head.
                    if isinstance(tensor, torch.Tensor) and _TRAINED_COPY not in name:
                        name = name.replace(".original_module.", ".")
                        hashes[name] = str(tuple(tensor.shape)).encode() + _hash(tensor)
    digest = xxhash.xxh3_128()
    for name, one in sorted(hashes.items()):
        digest.update(name.encode() + one)
    return digest.hexdigest()


def mismatch(recorded: str | None, its: str) -> str | None:
    """How a fingerprint that was recorded differs from a model's; None where it does not, or where there is none."""
    if recorded is None or recorded == its:
        return None
    return f"fingerprint was {recorded!r}, is {its!r}{by_earlier_version(recorded)}"


def by_earlier_version(recorded: Any) -> str:
    """What to say of a model's fingerprint that looked at a sample of the weights; nothing of one that saw them all."""
    sampled = isinstance(recorded, str) and len(recorded) == _SAMPLED
    return " (an earlier version took it from a sample of the weights, so it cannot be told)" if sampled else ""


def _hash(tensor: torch.Tensor) -> bytes:
    if tensor.device.type == "meta":
        return b""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # The sum sees what is written through `.data`, which the version does not; the version sees values that move.
    mark = (None if tensor.is_inference() else tensor._version, local.data_ptr(), _sum(local))
    known: tuple[Any, bytes] | None = _remembered.get(tensor)
    if known is None or known[0] != mark:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        known = _remembered[tensor] = mark, _hash_values(whole.cpu())
    return known[1]


def _sum(tensor: torch.Tensor) -> int:
    """Sum of a tensor's bytes taken as integers, 64 bits each where they can be: by far the quickest."""
    flat = tensor.detach().reshape(-1)
    ends = flat.nbytes, flat.storage_offset() * flat.element_size()
    size = next(size for size in _INTEGERS if not any(end % size for end in ends))
    return int(flat.view(_INTEGERS[size]).sum())


def _hash_values(tensor: torch.Tensor) -> bytes:
    digest = xxhash.xxh3_128(b"" if tensor.is_floating_point() else str(tensor.dtype).encode())
    for block in tensor.detach().reshape(-1).split(_BLOCK):
        if block.is_floating_point():
            single = block.float()  # holds every value of the narrower dtypes
            block = single if block.dtype != torch.float64 or torch.equal(single.double(), block) else block
        # Of a copy: NumPy holds on to the memory it sees, which FSDP frees between two passes.
        digest.update(block.clone().view(torch.uint8).numpy())
    return digest.digest()


def of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
