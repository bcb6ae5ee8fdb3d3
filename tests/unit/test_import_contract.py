"""Rules about imports and calls that import-linter does not see: the standard library, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import parckpt

pytestmark = pytest.mark.fast

PACKAGE = Path(parckpt.__file__).parent

CALLS_OF_STORAGE = {"open", "fsync", "fdatasync", "rename", "replace", "unlink", "pwrite", "pwritev", "link"}
"""Functions of `os` that only the storage layer calls; tests stand in for it to break them."""

ONLY_IN = {
    "signal": {"signals.py", "testing/"},
    "ctypes": {"storage/"},
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
}
"""Module of the standard library -> where it may be imported. Nothing is ever unpickled."""


def _modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def _allowed(module: str, places: set[str]) -> bool:
    return any(module == place or (place.endswith("/") and module.startswith(place)) for place in places)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _os_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", _modules())
def test_layers_of_the_standard_library(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    for name in set(_imported(tree)) & set(ONLY_IN):
        assert _allowed(module, ONLY_IN[name]), f"{module} imports {name}"
    if not module.startswith(("storage/", "testing/")):
        assert not set(_os_calls(tree)) & CALLS_OF_STORAGE, f"{module} does storage's work"


@pytest.mark.parametrize("module", [name for name in _modules() if name.startswith("core/")])
def test_core_is_pure(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    impure = {"os", "time", "threading", "socket", "subprocess", "asyncio", "multiprocessing", "random", "secrets"}
    assert not set(_imported(tree)) & impure


def test_importing_parckpt_is_light() -> None:
    """Importing initialises no MPI, and loads nothing that only some uses need."""
    code = "import sys, parckpt; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "parckpt" in loaded
    heavy = {"mpi4py", "mpi4py.MPI", "h5py", "gmssl", "torch", "mindspore", "safetensors", "typer", "rich"}
    assert not loaded & heavy
