"""Short stable hashes that tell one model, data set or file from another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

_SAMPLES = 64  # values hashed per tensor: enough to tell models apart, cheap for any size
_TRAINED_COPY = ".modules_to_save."


def of_model(model: torch.nn.Module) -> str:
    """Hash (16 hex digits) of a PLM's weights: names, shapes and an even sample of each tensor's values.

    Values are compared in bfloat16, so that the same checkpoint gives the same hash whether it is loaded in bfloat16,
    float32 or float64. (float16 rounds otherwise: a checkpoint kept in another dtype has another hash in it.)
    Pass the base model: a soft prompt on top would change the hash at every step.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        # PEFT's own, trained copy of a classification head is no part of the PLM; it renames the head it stands for.
        own = {n.replace(".original_module.", "."): p for n, p in model.named_parameters() if _TRAINED_COPY not in n}
        for name, tensor in sorted(own.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            if tensor.device.type == "meta":
                continue
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
            digest.update(picked.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
