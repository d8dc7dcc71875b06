"""The map of the source: who imports whom, and what the source never does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fast_prompt_tuning

SOURCE = Path(fast_prompt_tuning.__file__).parent
FOR_ALL = {"errors", "files", "paths", "placements", "yaml_text"}
ARROWS = {  # a package imports only from itself, from these and from `FOR_ALL`
    "errors": "",
    "files": "",
    "paths": "",
    "placements": "",
    "yaml_text": "",
    "schedule": "",
    "recipe": "schedule",
    "plm": "schedule",
    "cost": "schedule plm",
    "data": "schedule plm",
    "prompt": "schedule plm cost data",
    "scores": "schedule plm cost data prompt",
    "train": "recipe schedule plm cost data prompt scores",
    "run": "recipe schedule plm cost data prompt scores train",
    "engines": "recipe data plm prompt run",
    "report": "recipe schedule plm cost data prompt run",
    "paper": "recipe schedule plm cost data prompt scores train run report",
    "cli": "recipe schedule plm cost data prompt scores train run report paper",
}
FILES = {p.relative_to(SOURCE).with_suffix("").as_posix(): p for p in sorted(SOURCE.rglob("*.py"))}
APART = {"__init__", "__main__"}  # the package's face and `python -m`
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def package(name: str) -> str:
    return name.split("/")[0]


def imported(tree: ast.AST, name: str) -> set[str]:
    """The packages that the module `name` imports from anywhere, inside functions too."""
    found: set[str] = set()
    here = ["fast_prompt_tuning", *name.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            paths = [[*base, a.name] for a in node.names]
        else:
            continue
        found |= {path[1] for path in paths if path[0] == "fast_prompt_tuning" and len(path) > 1}
    return found & set(ARROWS)


def test_every_module_has_its_place():
    assert {package(name) for name in FILES} - APART == set(ARROWS)


def test_arrows_make_no_circle():
    seen: set[str] = set()
    for name, above in ARROWS.items():
        assert set(above.split()) <= seen, name
        seen.add(name)


@pytest.mark.parametrize("name", sorted(set(FILES) - APART))
def test_imports_go_one_way(name):
    own = package(name)
    wrong = imported(TREES[name], name) - set(ARROWS[own].split()) - {own, *FOR_ALL}
    assert not wrong, f"{name}.py imports from {', '.join(sorted(wrong))}, which {own} may not"


def test_the_check_sees_imports():
    lines = (
        "from . import a\nfrom ..data import b\nfrom ..cli.app import c\ndef f():\n    import fast_prompt_tuning.cost.x"
    )
    assert imported(ast.parse(lines), "run/y") == {"run", "data", "cli", "cost"}
    assert imported(ast.parse("from .plm import a\nfrom fast_prompt_tuning.run import b"), "z") == {"plm", "run"}


PURE = [
    "errors",
    "files",
    "paths",
    "placements",
    "recipe/settings",
    "recipe/reading",
    "schedule/stages",
    "schedule/auto",
    "plm/selection",
    "plm/families",
]
PURE += ["plm/configs", "cost/shapes", "cost/flops", "cost/memory", "cost/plan"]


@pytest.mark.parametrize("name", PURE)
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


@pytest.mark.parametrize("name", sorted(set(FILES) - {"plm/families"}))
def test_families_are_told_apart_in_one_place(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Compare):
            assert "model_type" not in ast.unparse(node), f"{name}.py:{node.lineno}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_one_thing(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


PLACED = {"SuffixPromptModel", "Front", "AfterText", "WithinText"}


@pytest.mark.parametrize("name", sorted(n for n in set(FILES) - APART if package(n) != "prompt"))
def test_placements_are_told_apart_in_one_package(name):
    found = {n.id for n in ast.walk(TREES[name]) if isinstance(n, ast.Name)} & PLACED
    assert not found, f"{name}.py knows {', '.join(sorted(found))}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_private_parts_of_the_trainer(name):
    """Neither the call stack nor a Trainer's private methods."""
    assert "_getframe" not in FILES[name].read_text(encoding="utf-8")
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
            assert not bases & {"Trainer", "Seq2SeqTrainer"}, f"{name}.py:{node.lineno}"


def test_the_package_exports_what_it_says():
    assert sorted(fast_prompt_tuning.__all__) == sorted(fast_prompt_tuning._EXPORTS)
    for name in fast_prompt_tuning.__all__:
        assert getattr(fast_prompt_tuning, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast_prompt_tuning.nothing
