"""The checks of this project, each in an environment of its own: ``nox -l`` lists them, ``.ci/run`` runs them all."""

from __future__ import annotations

import ast
import os
import tarfile
import tomllib
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["lint", "types", "tests", "package"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "uv|virtualenv"  # uv installs in seconds, and is used if it is there

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
ASYNCPG = ["0.30", "0.31", "0.32"]
ALONE = """
import sys
from importlib.metadata import distributions

import asyncpool_creds
from asyncpool_creds import testing

extras = {"httpx", "aiohttp", "jwt", "rich", "trustme", "uvloop"} & set(sys.modules)
assert not extras, f"importing the package imports {extras}"
brought = {found.name.lower().replace("_", "-") for found in distributions()}
assert brought <= {"asyncpool-creds", "asyncpg", "anyio", "idna", "typing-extensions"}, f"the wheel brings {brought}"
print(asyncpool_creds.__version__)
"""


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's linter and formatter."""
    session.install("--group", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types: two strict checkers, and the completeness of what users see."""
    session.install("--group", "types", "-e", ".")
    session.run("mypy")
    session.run("basedpyright")
    session.run("basedpyright", "--verifytypes", "asyncpool_creds", "--ignoreexternal")


@nox.session(python=PYTHONS)
@nox.parametrize("asyncpg", ASYNCPG)
def tests(session: nox.Session, asyncpg: str) -> None:
    """The whole suite, on asyncio; on the other event loop with ``-- --event-loop uvloop``."""
    session.install("--group", "test", "-e", ".", f"asyncpg=={asyncpg}.*")
    session.run("pytest", *session.posargs)


@nox.session
def floors(session: nox.Session) -> None:
    """What needs nothing but the core, with the oldest versions that it says it works with."""
    session.install("-e", ".[demo]", "asyncpg==0.30.0", "anyio==4.4.0", "sniffio", "pytest", "hypothesis", "uvloop")
    # What needs the cloud's SDK, or the pools that ours is measured beside.
    without = ["--ignore=tests/unit/test_sigv4.py", "--ignore=tests/unit/test_benchmarks.py"]
    tests = ["tests/unit", *without, "tests/property", "tests/integration/test_pool_life.py"]
    session.run("pytest", *tests, *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Branch coverage of the whole suite, or of the runs that were measured before; arguments go to the report."""
    session.install("--group", "test", "-e", ".")
    data = Path(".coverage-data").resolve()
    if not list(data.glob("run.*")):
        data.mkdir(exist_ok=True)
        session.run("coverage", "run", f"--data-file={data}/run", "-m", "pytest")
    # One file for each process.
    session.run("coverage", "combine", "--quiet", *map(str, sorted(data.glob("run.*"))))
    session.run("coverage", "report", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """The sdist and the wheel: complete, and importable with asyncpg and anyio alone."""
    session.install("--group", "package", "uv")
    dist = Path(session.create_tmp()).resolve() / "dist"
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(dist))
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")

    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {*_files("asyncpool_creds"), *_files("tests"), *_files("examples"), *_files("benchmarks"), *_files("docs")}
    wanted |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "noxfile.py", ".ci/run", "pyproject.toml"}
    if missing := wanted - packed:
        session.error(f"the sdist lacks {sorted(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    if packed != _files("asyncpool_creds"):
        session.error(f"the wheel differs from the package in {sorted(packed ^ _files('asyncpool_creds'))}")

    empty = dist.parent / "empty"
    python = _empty_environment(session, empty)
    session.run("uv", "pip", "install", "--quiet", "--python", python, str(wheel))
    # Isolated, and from elsewhere: what is found is what was installed.
    session.chdir(dist)
    session.run(python, "-I", "-c", ALONE, external=True)


@nox.session
def extras(session: nox.Session) -> None:
    """Each extra by itself: enough for what it is named after, and for the examples that need no other."""
    session.install("uv")
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    examples: dict[str, list[Path]] = {}
    for example in sorted(Path("examples").glob("*.py")):
        needed = _extras_of(example)
        if len(needed) == 1:
            examples.setdefault(needed.pop(), []).append(example.resolve())
    for extra in project["optional-dependencies"]:
        python = _empty_environment(session, Path(session.create_tmp()).resolve() / extra)
        session.run("uv", "pip", "install", "--quiet", "--python", python, f".[{extra}]")
        modules = [f"asyncpool_creds.{room}.{extra}" for room in ("providers", "storage")]
        code = f"""
import importlib.util, runpy

found = [name for name in {modules} if importlib.util.find_spec(name)]
for name in found:
    importlib.import_module(name)
for example in {[os.fspath(path) for path in examples.get(extra, [])]}:
    runpy.run_path(example)
    found.append(example)
print("{extra}:", *found)
"""
        session.run(python, "-I", "-W", "error", "-c", code, external=True)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Against plain asyncpg in the same run; ``nox -s benchmarks -- --quick`` for a first look."""
    session.install("--group", "benchmarks", "-e", ".")
    session.run("python", "-m", "benchmarks", *session.posargs)


def _empty_environment(session: nox.Session, path: Path) -> str:
    """Make an environment with nothing in it, and return its Python."""
    session.run("uv", "venv", "--quiet", "--clear", "--python", "python", str(path))
    return str(path / "bin" / "python")


def _extras_of(example: Path) -> set[str]:
    """Return the extras that the modules of ours need which an example imports."""
    tree = ast.parse(example.read_text(encoding="utf-8"))
    modules = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name.split(".")[2] for name in modules if name.startswith("asyncpool_creds.") and name.count(".") == 2}
    extras = {"oauth2", "globus", "vault", "aws", "azure", "gcp", "keyring", "redis"} & ours
    foreign = {name.split(".")[0] for name in modules} & {"fastapi", "rich", "uvicorn", "sqlalchemy"}
    return extras | foreign | ({"testing"} if any(".testing" in name for name in modules) else set())


def _files(directory: str) -> set[str]:
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"}
