"""The file that both strict checkers read uses everything that is public."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import asyncpool_creds
import asyncpool_creds.providers.oauth2
import asyncpool_creds.storage
import asyncpool_creds.testing

API = ast.parse((Path(__file__).parent / "typing" / "api.py").read_text(encoding="utf-8"))


def names_used() -> set[str]:
    attributes = {node.attr for node in ast.walk(API) if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in ast.walk(API) if isinstance(node, ast.Name)}


@pytest.mark.parametrize(
    "module",
    [asyncpool_creds, asyncpool_creds.providers.oauth2, asyncpool_creds.storage, asyncpool_creds.testing],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_used_under_the_type_checkers(module: object) -> None:
    exported: list[str] = module.__all__

    assert set(exported) - names_used() == set()


def test_the_file_is_valid_python() -> None:
    compile(API, "api.py", "exec")
