"""The part of a batch that a stage trains on: fewer examples, shorter inputs.

Early steps of prompt tuning need neither large batches nor whole texts. A stage's `batch` and `length` are applied to
the batch the loader gives, inside the step: which examples the loader deals does not depend on the stage, so a run
resumed anywhere sees the batches it would have seen, and growing moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ModelError
from ..plm.objective import IGNORED
from ..schedule.stages import Stage

TAIL = "n_tail"
"""Batch entry `(B,)`: tokens at the end of each input that are never cut (a template's `Topic:`). Models do not take
it; `trim` and the prompted PLM take it out."""

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def trim(
    batch: Mapping[str, Any], stage: Stage, *, decoder: bool, turn: int = 0, keep_tail: bool = False
) -> Mapping[str, Any]:
    """The batch as `stage` trains on it, without padding that no row needs any more.

    Examples are taken at even distances, since a batch may be sorted by length, and others in every turn: a loader that
    deals the same batches in every epoch would else train on the same part of the data all along. An input longer than
    `stage.length` loses tokens from its end, before the last `n_tail` ones where the batch has that entry; targets are
    never cut.

    Args:
        batch: `input_ids`, `attention_mask` `(B, T)` and `labels`, `(B, T)` for a decoder-only model (unlabelled
            positions are the input) or `(B, T_target)`. Padding on either side.
        stage: `batch` and `length` count, its sizes do not.
        decoder: for a decoder-only model.
        turn: the epoch; each takes the rows behind those of the one before.
        keep_tail: for a prompted PLM, which takes `n_tail` out itself.

    Returns:
        The same entries, less `n_tail` unless it is kept; the very same tensors where there is nothing to cut, and the
        batch itself where the stage cuts nothing and `n_tail` is kept or not there.

    Raises:
        ModelError: there is something to cut and no `input_ids`.
    """
    if not stage.cuts_batch and (keep_tail or TAIL not in batch):
        return batch
    trimmed = {name: value for name, value in batch.items() if name != TAIL}
    if not stage.cuts_batch:
        return trimmed
    if "input_ids" not in trimmed:
        raise ModelError(
            f"a stage with batch={stage.batch} and length={stage.length} cuts input_ids, and the batch has only "
            f"{', '.join(trimmed)}; leave batch and length out of the schedule's stages"
        )
    tail = batch.get(TAIL)
    rows = len(trimmed["input_ids"])
    if stage.batch is not None and stage.batch < rows:
        picked = torch.tensor(sorted((i * rows // stage.batch + turn) % rows for i in range(stage.batch)))
        trimmed = {k: v[picked.to(v.device)] if _has_rows(v, rows) else v for k, v in trimmed.items()}
        tail = tail[picked.to(tail.device)] if tail is not None else None
        if not decoder:
            trimmed = _without_empty_targets(trimmed)
    if stage.length is not None or len(trimmed["input_ids"]) < rows:
        trimmed = _shortened(trimmed, stage.length, tail, decoder)
    return {**trimmed, TAIL: tail} if keep_tail and tail is not None else trimmed


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows


def _without_empty_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Encoder-decoder targets without columns that hold no label in any row; they are padded on the right."""
    labels = batch.get("labels")
    if labels is None:
        return batch
    used = (labels != IGNORED).any(0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    return {
        name: value[:, :width] if name in ("labels", "decoder_input_ids", "decoder_attention_mask") else value
        for name, value in batch.items()
    }


def _shortened(batch: dict[str, Any], length: int | None, tail: Any, decoder: bool) -> dict[str, Any]:
    ids, labels = batch["input_ids"], batch.get("labels")
    mask = batch.get("attention_mask")
    per_token = decoder and labels is not None and labels.shape == ids.shape  # a classifier has one label a row
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    keep = real
    if length is not None:
        is_input = real & (labels == IGNORED) if per_token else real
        place = is_input.cumsum(1)  # 1 for a row's first input token
        n_input = is_input.sum(1, keepdim=True)
        ends = torch.zeros_like(n_input) if tail is None else tail.to(ids.device)[:, None].minimum(n_input)
        front = (length - ends).clamp(min=0)  # tokens kept ahead of the tail
        keep = real & (~is_input | (place <= front) | (place > n_input - ends))
    left = bool((~real[:, 0]).any()) and bool(real[:, -1].all())
    # A stable sort brings the kept tokens together, in order, at the side where the padding is not.
    order = torch.argsort((keep if left else ~keep).int(), dim=1, stable=True)
    size = max(int(keep.sum(1).max()), 1)
    order = order[:, -size:] if left else order[:, :size]
    shortened = {
        name: value.gather(1, order) if name in _PER_TOKEN and value.shape == ids.shape else value
        for name, value in batch.items()
        if name != "labels"
    }
    not_padding = keep.gather(1, order)
    if mask is not None:
        shortened["attention_mask"] = not_padding.to(mask.dtype)
    if labels is not None:
        shortened["labels"] = labels.gather(1, order).masked_fill(~not_padding, IGNORED) if per_token else labels
    return shortened
