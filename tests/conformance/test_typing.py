"""The files that both strict checkers read use everything that is public."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import asyncpool_creds
import asyncpool_creds.providers
import asyncpool_creds.storage
import asyncpool_creds.testing
import asyncpool_creds.testing.sigv4

FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (Path(__file__).parent / "typing").glob("*.py")}
SOURCES = [
    importlib.import_module(f"{package.__name__}.{module.name}")
    for package in (asyncpool_creds.providers, asyncpool_creds.storage)
    for module in pkgutil.iter_modules(package.__path__)
    if not module.name.startswith("_")
]


def names_used() -> set[str]:
    nodes = [node for tree in FILES.values() for node in ast.walk(tree)]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in nodes if isinstance(node, ast.Name)}


@pytest.mark.parametrize(
    "module",
    [asyncpool_creds, asyncpool_creds.storage, asyncpool_creds.testing, asyncpool_creds.testing.sigv4, *SOURCES],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_used_under_the_type_checkers(module: object) -> None:
    exported: list[str] = module.__all__

    assert set(exported) - names_used() == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_file_is_valid_python(path: Path) -> None:
    compile(FILES[path], path.name, "exec")
