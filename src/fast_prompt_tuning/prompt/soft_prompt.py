"""The soft prompt: a stock PEFT prompt-tuning adapter, and its initialisations."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ConfigError, ModelError, is_whole, shown
from ..files import new_file, write_atomic
from ..placements import PLACEMENTS
from ..plm.stacks import get_plm

logger = logging.getLogger(__name__)

INITS = ("uniform", "vocab", "text", "prompt")

_TASK_TYPES = (  # ending of the class name -> PEFT task type
    ("ForSequenceClassification", TaskType.SEQ_CLS),
    ("ForTokenClassification", TaskType.TOKEN_CLS),
    ("ForQuestionAnswering", TaskType.QUESTION_ANS),
)


def context_length(plm: Any) -> int | None:
    """Positions the model has; None where positions are relative (T5)."""
    return getattr(plm.config, "max_position_embeddings", None)


def check_prompt_tokens(plm: Any, num_virtual_tokens: Any) -> None:
    """Raise unless a prompt can have this length.

    Raises:
        ConfigError: fewer than one virtual token, or at least as many as the model has positions.
    """
    limit = context_length(plm)
    if not is_whole(num_virtual_tokens, 1):
        raise ConfigError(f"num_virtual_tokens={num_virtual_tokens!r} must be a whole number of at least 1")
    if limit is not None and num_virtual_tokens >= limit:
        raise ConfigError(
            f"num_virtual_tokens={num_virtual_tokens} leaves no room for text: this model has {limit} positions"
        )


def soft_prompt_config(plm: Any, num_virtual_tokens: int = 20) -> PromptTuningConfig:
    """A stock `PromptTuningConfig` for any supported PLM: P virtual tokens in front of the (encoder) input.

    Encoder-decoders get one prompt, in front of the encoder only (paper, Section 4.1): with PEFT's own default of two
    submodules, half of the prompt would never be used. The initialisation is a sample of the vocabulary's embeddings
    (Lester et al. 2021); PEFT's own random one is N(0, 1), far off the scale of embeddings. `init_soft_prompt` gives
    others.

    Raises:
        ConfigError: fewer than one virtual token, or at least as many as the model has positions.
    """
    check_prompt_tokens(plm, num_virtual_tokens)
    name = type(plm).__name__
    task_type = next((t for ending, t in _TASK_TYPES if name.endswith(ending)), None)
    if task_type is None:
        if plm.config.is_encoder_decoder:
            task_type = TaskType.SEQ_2_SEQ_LM
        else:
            task_type = TaskType.CAUSAL_LM if plm.can_generate() else TaskType.FEATURE_EXTRACTION
    return PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=num_virtual_tokens,
        num_transformer_submodules=1,
        prompt_tuning_init="SAMPLE_VOCAB",
    )


def prompt_parameter(model: Any) -> nn.Parameter:
    """The soft prompt `(P, H)` of a PEFT model, or of a `SuffixPromptModel`: the one trained `Parameter`.

    Raises:
        ModelError: the model has no soft prompt.
    """
    if isinstance(after_text := getattr(model, "soft_prompt", None), nn.Parameter):  # a prompt after the text
        return after_text
    encoder = getattr(model, "prompt_encoder", None)
    if not isinstance(encoder, nn.ModuleDict) or model.active_adapter not in encoder:
        raise ModelError(
            "the model has no soft prompt; wrap it: get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=20))"
        )
    prompt: Any = encoder[model.active_adapter]
    return prompt.embedding.weight


def prompt_length(model: Any) -> int:
    """Virtual tokens in front of a model's inputs; 0 where it has no soft prompt."""
    encoder = getattr(model, "prompt_encoder", None)
    return len(prompt_parameter(model)) if isinstance(encoder, nn.ModuleDict) else 0


def init_soft_prompt(
    model: nn.Module,
    init: str,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    text: str | None = None,
    path: str | Path | None = None,
) -> None:
    """Set the soft prompt's values in place, in fp32, without touching the global random state.

    Args:
        init: `uniform`: U(−1/√H, 1/√H) (paper, Section 4.1); `vocab`: embeddings of random tokens; `text`: embeddings
            of `text`'s tokens, repeated or cut to P (needs `tokenizer`); `prompt`: that of the folder, or run, `path`.
        tokenizer: with it, `vocab` draws no special or added tokens and no rows that stand for no token: for T5 ids 3
            to 31,999, as the authors' code does. Without it any row may be drawn.

    Raises:
        ConfigError: unknown `init`, or what it needs is missing or does not fit.
    """
    weight = prompt_parameter(model)
    size, width = weight.shape
    generator = torch.Generator().manual_seed(seed)
    if init == "uniform":
        bound = 1 / math.sqrt(width)
        values = torch.empty(size, width).uniform_(-bound, bound, generator=generator)
    elif init in ("vocab", "text"):
        # Called, not indexed: some models (Gemma) scale inside their embedding module.
        embed = get_plm(model).get_input_embeddings()
        if init == "vocab":
            drawn = _ordinary_ids(tokenizer, embed.num_embeddings)
            ids = drawn[torch.randint(len(drawn), (size,), generator=generator)]
        else:
            if tokenizer is None or not text:
                raise ConfigError(f"prompt.init='text' needs a tokenizer and a text, got text={text!r}")
            text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not text_ids:
                raise ConfigError(f"prompt.text={text!r} has no tokens; choose a longer text")
            if max(text_ids) >= embed.num_embeddings:
                raise ConfigError(
                    f"prompt.text={text!r} has the token id {max(text_ids)}, and the model {embed.num_embeddings} "
                    "embeddings: its tokenizer is another model's; choose another text"
                )
            if set(text_ids) == {getattr(tokenizer, "unk_token_id", None)}:
                logger.warning(
                    "prompt.text=%r has only tokens that the tokenizer does not know: every vector is the same; choose "
                    "words it knows",
                    text,
                )
            ids = torch.tensor((text_ids * math.ceil(size / len(text_ids)))[:size])
        with torch.no_grad():
            values = embed(ids.to(embed.weight.device))
    elif init == "prompt":
        if path is None:
            raise ConfigError("prompt.init='prompt' needs prompt.path: the folder of a saved prompt")
        values = load_prompt(path)
        if tuple(values.shape) != (size, width):
            raise ConfigError(
                f"prompt.path={str(path)!r} holds a prompt of shape {tuple(values.shape)}, this model needs "
                f"({size}, {width}); set prompt.tokens to {values.shape[0]} or use another prompt"
            )
    else:
        raise ConfigError(f"prompt.init={init!r} is unknown; choose one of {', '.join(INITS)}")
    with torch.no_grad():
        weight.data = weight.data.float()
        weight.copy_(values)


def _ordinary_ids(tokenizer: Any, rows: int) -> torch.Tensor:
    """Ids `(N,)` of tokens that text is made of, among the first `rows`; all rows where there is no tokenizer."""
    if tokenizer is None:
        return torch.arange(rows)
    others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return torch.tensor(sorted(i for i in set(tokenizer.get_vocab().values()) - others if i < rows))


SUFFIX_FILES = ("adapter_config.json", "soft_prompt.json", "soft_prompt.safetensors")
"""What a saved prompt after the text consists of; the first one is only there to tell PEFT's users what it is."""

_FOR_PEFT = (
    "SOFT PROMPT AFTER OR WITHIN THE TEXT: PEFT cannot place it; load it with "
    "fast_prompt_tuning.load_soft_prompt(model, folder)"
)


def save_suffix_prompt(
    folder: str | Path, values: torch.Tensor, *, placement: str, base_model: str, model_fingerprint: str
) -> None:
    """Save a prompt `(P, H)` that stands after the text: safetensors, a JSON file that says so, and a note to PEFT.

    A stock adapter could not say where the prompt stands, and PEFT would put it in front: its `from_pretrained` fails
    on this folder with a message that names `load_soft_prompt`.

    Raises:
        ConfigError: the folder holds a stock adapter, which would be overwritten.
    """
    place = Path(folder)
    if (place / "adapter_model.safetensors").exists():
        raise ConfigError(f"{str(place)!r} holds a PEFT adapter already; choose another folder")
    record = {
        "format": 1,
        "placement": placement,
        "prompt_tokens": values.shape[0],
        "width": values.shape[1],
        "base_model": base_model,
        "model_fingerprint": model_fingerprint,
    }
    tensors = {"prompt_embeddings": values.detach().cpu().contiguous()}
    with new_file(place / SUFFIX_FILES[2]) as work:
        save_file(tensors, work, metadata={"placement": placement})
    for name, content in ((SUFFIX_FILES[0], {"peft_type": _FOR_PEFT}), (SUFFIX_FILES[1], record)):
        write_atomic(place / name, json.dumps(content, indent=2) + "\n")


def prompt_folder(path: str | Path) -> Path:
    """Where the prompt lies that a path names: the folder itself, or `prompt/` in the folder of a run."""
    folder = Path(path)
    return folder / "prompt" if (folder / "prompt").is_dir() else folder


def suffix_record(path: str | Path) -> dict[str, Any] | None:
    """What is recorded of a saved prompt after the text; None where the folder, or run, holds none.

    Raises:
        ConfigError: the record cannot be read, or is of a later version; the folder holds another prompt as well.
    """
    file = prompt_folder(path) / SUFFIX_FILES[1]
    if not file.is_file():
        return None
    if (file.parent / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"{str(path)!r} holds two prompts: one in front of the text ('adapter_model.safetensors') and one after it "
            f"({file.name!r}); save each in a folder of its own, or remove the one that is not wanted"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version, place = record["format"], record["placement"]
        known = version == 1 and place in PLACEMENTS and place != "prefix"
        for name in ("base_model", "model_fingerprint") if known else ():
            if not isinstance(record[name], str):
                raise TypeError(f"{name} is {shown(record[name])}, not a text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{str(file)!r} cannot be read ({type(error).__name__}: {error}); save the prompt again"
        ) from error
    if not known:
        raise ConfigError(
            f"{str(file)!r} has format={shown(version)}, placement={shown(place)}; this version knows format 1 and the "
            f"placements {', '.join(name for name in PLACEMENTS if name != 'prefix')}"
        )
    return dict(record)


def form_of(path: str | Path) -> tuple[str, int, int]:
    """Where the prompt saved in a folder stands, and its P and H."""
    return place_of(path), *load_prompt(path).shape  # type: ignore[return-value]


def place_of(path: str | Path) -> str:
    """The placement of the prompt saved in a folder."""
    record = suffix_record(path)
    return "prefix" if record is None else str(record["placement"])


FROM_PEFT = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
"""Adapters of stock PEFT that are a prompt in front: of p-tuning PEFT saves what its encoder makes."""


def load_prompt(path: str | Path) -> torch.Tensor:
    """The vectors `(P, H)` of a prompt saved by `model.save_pretrained(path)`, wherever it stands; or of a run.

    Raises:
        ConfigError: no readable prompt there.
    """
    folder = prompt_folder(path)
    if suffix_record(folder) is not None:
        try:
            vectors = load_file(folder / SUFFIX_FILES[2])["prompt_embeddings"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ConfigError(
                f"{str(folder)!r} lacks the vectors of its prompt ({type(error).__name__}: {error}); it needs "
                f"{SUFFIX_FILES[2]} with prompt_embeddings"
            ) from error
        return _vectors(vectors, folder)
    file = folder / "adapter_model.safetensors"
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, tokens = config.get("peft_type"), config.get("num_virtual_tokens")
        tensors = load_file(file)
        several = kind == "MULTITASK_PROMPT_TUNING"
        values = _of_one_task(tensors, folder) if several else tensors["prompt_embeddings"]
    except ConfigError:
        raise
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{str(folder)!r} is not a saved soft prompt ({type(error).__name__}: {error}); it needs "
            "adapter_config.json and adapter_model.safetensors with prompt_embeddings"
        ) from error
    if kind not in FROM_PEFT:
        raise ConfigError(
            f"{str(folder)!r} holds a PEFT adapter of type {shown(kind)}, not a soft prompt ({', '.join(FROM_PEFT)})"
        )
    values = _vectors(values, folder)
    if not is_whole(tokens, 1) or tokens > len(values):
        raise ConfigError(
            f"{str(folder)!r}: num_virtual_tokens={shown(tokens)} in adapter_config.json must be a whole number of 1 "
            f"to {len(values)}, the vectors it has; save the prompt again"
        )
    # PEFT's default for encoder-decoders stores as many vectors again for the decoder, and uses the first half.
    return values[:tokens]


def _of_one_task(tensors: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """The prompt of a multitask prompt's only task: the shared one times the task's factors (Wang et al. 2023).

    Args:
        tensors: the shared prompt `(P, H)`; factors of K tasks, `(K, P, R)` and `(K, R, H)`.
    """
    shared, cols, rows = (tensors[n].float() for n in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
    if len(cols) != 1:
        raise ConfigError(
            f"{str(folder)!r} holds the prompts of {len(cols)} tasks; save one task's by PEFT first "
            "(prompt_tuning_init=EXACT_SOURCE_TASK with num_tasks=1)"
        )
    return shared * (cols @ rows)[0]


def _vectors(values: torch.Tensor, folder: Path) -> torch.Tensor:
    """The values of a saved prompt, refused where they are no vectors `(P, H)` of finite numbers."""
    if values.ndim != 2 or not values.numel() or not values.is_floating_point():
        kind = str(values.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{str(folder)!r}: prompt_embeddings is {tuple(values.shape)} of {kind}, not (tokens, width) of floats"
        )
    if not torch.isfinite(values).all():
        raise ConfigError(f"{str(folder)!r}: prompt_embeddings has values that are no numbers; use another prompt")
    return values


def export_prompt(folder: str | Path, output: str | Path) -> tuple[int, int]:
    """Write a saved prompt's vectors as the tensor `prompt_embeds` `(P, H)` of a new safetensors file.

    The file's metadata says where they stand: in front of the (encoder) input's embeddings, or after them.

    Returns:
        Their shape.

    Raises:
        ConfigError: no prompt there, or the file exists already or cannot be written.
    """
    values, path = load_prompt(folder), Path(output)
    taken = ConfigError(f"output={str(path)!r} exists already; choose another name")
    if path.exists():
        raise taken
    metadata = {"place": PLACEMENTS[place_of(folder)].where}
    try:
        with new_file(path, replace=False) as work:
            save_file({"prompt_embeds": values.contiguous()}, work, metadata=metadata)
    except (OSError, SafetensorError) as error:
        if path.exists():  # by now
            raise taken from None
        raise ConfigError(f"output={str(path)!r} cannot be written: {error}") from error
    return values.shape[0], values.shape[1]


def stack_prompts(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Several prompts as one tensor `(K, P, H)`, for an ensemble.

    Raises:
        ConfigError: they differ in shape.
    """
    shapes = {tuple(p.shape) for p in prompts}
    if len(shapes) != 1:
        raise ConfigError(f"prompts of an ensemble or a comparison must have one shape, got {sorted(shapes)}")
    return torch.stack(list(prompts))


def prompt_similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine similarity `(P,)` of two prompts `(P, H)`, token by token; its mean is the similarity of the prompts.

    Source: Huang et al. 2022 compare prompts learned on partial PLMs with those of the full PLM this way.

    Raises:
        ConfigError: they differ in shape.
    """
    stack_prompts([one, other])
    return nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)


def similarity_matrix(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean token-by-token cosine similarity `(K, K)` of every two of K prompts `(P, H)`.

    Raises:
        ConfigError: they differ in shape.
    """
    stacked = nn.functional.normalize(stack_prompts([p.double() for p in prompts]), dim=-1)
    return torch.einsum("aph,bph->ab", stacked, stacked) / stacked.shape[1]
