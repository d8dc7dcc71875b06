"""The map of the source: who imports whom, and what the source never does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fast_prompt_tuning

SOURCE = Path(fast_prompt_tuning.__file__).parent
ORDER = [  # a module imports only from modules before it
    "errors",
    "schedule",
    "growth",
    "selection",
    "families",
    "fingerprint",
    "partial_plm",
    "objective",
    "trimming",
    "soft_prompt",
    "text_cache",
    "placement",
    "scoring",
    "flops",
    "layer_scores",
    "plan",
    "metrics",
    "tasks",
    "examples",
    "data",
    "models",
    "evaluation",
    "config",
    "checkpoint",
    "callback",
    "parallel",
    "trainer",
    "results",
    "run_folder",
    "session",
    "preparation",
    "run",
    "fidelity",
    "report",
    "pictures",
    "page",
    "hub",
    "progress",
    "reproduce",
    "quality",
    "demo",
    "console",
    "cli_cost",
    "cli_study",
    "cli_report",
    "cli",
]
FILES = {p.stem: p for p in sorted(SOURCE.glob("*.py"))}
APART = {"__init__", "__main__"}  # the package's face and `python -m`
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Our own modules that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fast_prompt_tuning"):
            found |= set(node.module.split(".")[1:2]) or {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fast_prompt_tuning.")}
    return found & set(FILES)


def test_every_module_has_its_place():
    assert set(ORDER) | APART == set(FILES)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    later = imported(TREES[name]) - set(ORDER[: ORDER.index(name)])
    assert not later, f"{name}.py imports {', '.join(sorted(later))}, which come after it"


def test_the_check_sees_imports():
    tree = ast.parse("from . import run, data\nfrom .cli import app\ndef f():\n    import fast_prompt_tuning.plan")
    assert imported(tree) == {"run", "data", "cli", "plan"}


@pytest.mark.parametrize("name", ["errors", "schedule", "selection", "families", "flops", "config"])
def test_pure_modules_load_without_the_heavy_libraries(name):
    heavy = {"torch", "transformers", "peft", "datasets"}
    top = [n for n in TREES[name].body if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    assert not {m.split(".")[0] for m in modules} & heavy


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_the_source_never_does(name):
    for node in ast.walk(TREES[name]):
        line = getattr(node, "lineno", 0)
        assert not isinstance(node, ast.Assert), f"{name}.py:{line}: an assert is no check: python -O leaves it out"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cPickle", "dill", "joblib", "shelve"} & {m.split(".")[0] for m in modules}, line
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"}, f"{name}.py:{line}"
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"{name}.py:{line}"


@pytest.mark.parametrize("name", sorted(set(FILES) - {"families"}))
def test_families_are_told_apart_in_one_place(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Compare):
            assert "model_type" not in ast.unparse(node), f"{name}.py:{node.lineno}"


def test_the_package_exports_what_it_says():
    assert sorted(fast_prompt_tuning.__all__) == sorted(fast_prompt_tuning._EXPORTS)
    for name in fast_prompt_tuning.__all__:
        assert getattr(fast_prompt_tuning, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast_prompt_tuning.nothing
