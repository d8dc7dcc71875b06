"""The loss at the labelled positions only: nothing is computed for tokens that no label needs.

In prompt tuning a handful of target tokens carry labels, while the LM head's product with the whole vocabulary for
every position of the padded sequence is a large part of a step. A pre-hook on the output embedding hands it the
labelled positions' hidden states alone; the model's own forward does everything before and after (soft-capping,
scaling, biases), so loss and gradients are those of the model's own loss. In the last layer of a causal model hooks do
the same to the queries, the attention output and the FFN; keys and values are needed everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import ModelError, UnknownFamilyError
from . import families
from .modes import recomputes
from .stacks import ffn_projections, get_plm, layer_list, resolve

IGNORED = -100
"""Label of positions that carry none, as everywhere in `transformers`."""


@contextmanager
def selected_rows(plm: Any, rows: Any) -> Iterator[None]:
    """Run the LM head on some positions only: its logits are then `(N, V)` instead of `(B, T, V)`.

    Args:
        rows: `(B, T) shape → (N,)` function giving the positions in row-major order.

    Raises:
        ModelError: the model has no LM head.
    """
    head = plm.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(plm).__name__} has no LM head; use a …ForCausalLM or …ForConditionalGeneration model")

    def select(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        # Flattened to two dimensions: a 3-D product with the vocabulary matrix would copy the matrix on CPU.
        index = rows(hidden.shape[:2]).to(hidden.device)
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), *args[1:])

    with head.register_forward_pre_hook(select):
        yield


def _token_wise_parts(plm: Any, layer: nn.Module) -> list[tuple[Sequence[nn.Module], nn.Module]]:
    """Parts of a layer that treat every token by itself: `(modules it enters by, module it leaves by)`."""
    (spec,) = families.of(plm.config).stacks.values()
    parts: list[tuple[Sequence[nn.Module], nn.Module]] = []
    for path in spec.token_wise:
        module = resolve(layer, path)
        if module is not None:
            parts.append(((module,), module))
    if getattr(plm.config, "chunk_size_feed_forward", 0):
        return parts  # the FFN is given a few positions at a time
    ins, out = ffn_projections(layer, spec)
    return parts if out is None or not ins else [*parts, (ins, out)]


@contextmanager
def last_layer_rows(plm: Any, rows: Callable[[torch.Size], torch.Tensor]) -> Iterator[None]:
    """Run the queries, attention output and FFN of a causal stack's last layer on some positions only.

    A hook takes their rows out before each such part, another puts the results back among zeros, so that the layer's
    own forward meets the shapes it expects. Hidden states at the other positions come out wrong: nothing may read
    them. Without effect where there is nothing to leave out or it cannot be told: encoder-decoders (every decoder
    position has a label), unregistered families, gradient checkpointing (by `transformers` or PyTorch's wrapper), which
    runs layers again later, and compiled layers, which hooks would have compiled once more.

    Args:
        rows: `(B, T) shape → (N,)` function giving the positions in row-major order.
    """
    config = plm.config
    layer = None
    if not config.is_encoder_decoder:
        try:
            (spec,) = families.of(config).stacks.values()
            parent, attribute = layer_list(plm, spec)
            layer = None if parent is None else getattr(parent, attribute)[-1]
        except UnknownFamilyError:
            pass
    if layer is None or recomputes(layer) or layer._compiled_call_impl is not None:
        yield
        return
    index: torch.Tensor | None = None

    def begin(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal index
        hidden = args[0] if args else kwargs["hidden_states"]
        index = rows(hidden.shape[:2]).to(hidden.device)

    def enter(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x, *rest), taken = args, index
        # (B, T, H), or (B·T, H) where a layer flattens its tokens
        return (x.reshape(-1, x.shape[-1]).index_select(0, taken), *rest)  # type: ignore[arg-type]

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for ins, out in _token_wise_parts(plm, layer):
            whole: list[torch.Size] = []

            def remember(_m: nn.Module, args: tuple[torch.Tensor, ...], whole: list[torch.Size] = whole) -> None:
                whole[:] = [args[0].shape]

            def leave(
                _m: nn.Module, _args: Any, labelled: torch.Tensor, whole: list[torch.Size] = whole
            ) -> torch.Tensor:
                (shape,) = whole
                empty = labelled.new_zeros(shape[:-1].numel(), labelled.shape[-1])
                return empty.index_copy(0, index, labelled).view(*shape[:-1], -1)  # type: ignore[arg-type]

            hooks.callback(ins[0].register_forward_pre_hook(remember).remove)
            for module in ins:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(out.register_forward_hook(leave).remove)
        yield


def forward_inputs(plm: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a forward takes it without labels; they give an encoder-decoder the decoder input that it lacks."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels, decoder_inputs = batch.get("labels"), ("decoder_input_ids", "decoder_inputs_embeds")
    if plm.config.is_encoder_decoder and labels is not None and all(inputs.get(n) is None for n in decoder_inputs):
        inputs["decoder_input_ids"] = plm.prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs


def labelled_logits(
    model: nn.Module, batch: Mapping[str, Any], *, whole_last_layer: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at the labelled positions of a batch.

    Args:
        model: PEFT model or bare `transformers` model with an LM head, causal or encoder-decoder, possibly wrapped
            for data parallelism.
        batch: what the model's forward takes, with `labels` `(B, T)`: unshifted for causal models, decoder targets
            for encoder-decoders; `IGNORED` where there is none.
        whole_last_layer: compute the last layer at every position, for whoever reads its activations.

    Returns:
        `(logits (N, V), targets (N,), sequence (N,))`; `sequence` is each row's index in the batch.

    Raises:
        ModelError: no LM head, or no labels in the batch.
    """
    if batch.get("labels") is None:
        raise ModelError("batch['labels'] is missing: the loss needs labels")
    plm = get_plm(getattr(model, "module", model))
    labels = batch["labels"]
    causal = not plm.config.is_encoder_decoder
    if causal and plm.get_output_embeddings() is not None and not plm.can_generate():
        raise ModelError(
            f"{type(plm).__name__} does not predict the next token, so its labels are not those of a language model; "
            "use a …ForCausalLM or …ForConditionalGeneration model, or the model's own loss"
        )
    # A causal model predicts token t at position t − 1; a soft prompt in front moves every position back by P.
    labelled: dict[str, torch.Tensor] = {}

    def rows(shape: torch.Size) -> torch.Tensor:
        length = shape[1]
        if causal:
            padded = F.pad(labels, (length - labels.shape[1], 0), value=IGNORED)
            targets = F.pad(padded[:, 1:], (0, 1), value=IGNORED)
        else:
            targets = labels
        index = (targets.reshape(-1) != IGNORED).nonzero(as_tuple=True)[0]
        labelled["targets"] = targets.reshape(-1).index_select(0, index)
        labelled["sequence"] = torch.div(index, length, rounding_mode="floor")
        return index

    with ExitStack() as stack:
        stack.enter_context(selected_rows(plm, rows))
        if causal and not whole_last_layer:
            stack.enter_context(last_layer_rows(plm, rows))
        logits = model(**forward_inputs(plm, batch), use_cache=False).logits
    return logits, labelled["targets"].to(logits.device), labelled["sequence"].to(logits.device)


def label_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    num_items: torch.Tensor | int | None = None,
    whole_last_layer: bool = False,
) -> torch.Tensor:
    """Cross-entropy at the labelled positions, as the model's own loss would be.

    Args:
        num_items: divisor of the summed loss; default the labelled positions of this batch (their mean). Under
            gradient accumulation pass the number in the whole accumulated batch.
        whole_last_layer: as `labelled_logits`.

    Raises:
        ModelError: as `labelled_logits`.
    """
    logits, targets, _ = labelled_logits(model, batch, whole_last_layer=whole_last_layer)
    return loss_of(logits, targets, num_items)


def loss_of(logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Cross-entropy of logits `(N, V)`, summed and divided by `num_items`; None: by N.

    Raises:
        ModelError: neither targets nor a divisor.
    """
    if targets.numel() == 0 and num_items is None:
        raise ModelError("batch['labels'] marks no position: every label is -100, so there is no loss")
    total = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets, reduction="sum")
    return total / (targets.numel() if num_items is None else num_items)


EAGER_TOKENS = 512
"""Up to this length eager attention's (B, heads, T, T) matrices are small beside the other activations."""


def choose_attention(plm: Any, tokens: int) -> str:
    """Set, and return, the attention kernel that trains fastest: eager on a CPU for short inputs in half precision.

    PyTorch's fused CPU kernel is quick forward and slow backward in bfloat16: a training step of SmolLM2-135M (16 × 84
    tokens, matrix units) takes 1.4 times as long with it as with eager attention. In float32 it is the faster one, by a
    tenth (docs/decisions.md). On other devices, and for long inputs, whose score matrices eager attention keeps for the
    backward pass, the model keeps the kernel it has.

    Args:
        plm: the PLM, changed in place.
        tokens: longest sequence, soft prompt included.
    """
    if plm.device.type == "cpu" and tokens <= EAGER_TOKENS and plm.dtype.itemsize == 2:
        plm.set_attn_implementation("eager")
    return str(plm.config._attn_implementation)
