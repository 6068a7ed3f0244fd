"""Every example runs, and what the documents show can be written like that."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import ModuleType

import anyio
import anyio.to_thread
import httpx
import pytest
from support import secret

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def load(example: Path) -> ModuleType:
    """Import an example without running it."""
    spec = importlib.util.spec_from_file_location(f"example_{example.stem}", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
async def settings(anyio_backend: object) -> AsyncIterator[Mapping[str, str]]:
    """A database that takes an issuer's tokens, as environment variables."""
    async with PostgresServer() as server, TokenIssuer(clients={"app": secret("app")}) as issuer:
        await server.create_role("app")
        async with TokenDoor(server, issuer.verify) as door:
            yield {
                "DATABASE_URL": door.dsn(user="app"),
                "OIDC_ISSUER": issuer.url,
                "OIDC_CLIENT_ID": "app",
                "OIDC_CLIENT_SECRET": secret("app"),
            }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_does_nothing_when_it_is_imported(
    example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})

    module = load(example)

    assert module.__doc__
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_listed(example: Path) -> None:
    assert f"({example.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


async def test_plain_asyncio_runs_as_a_program(settings: Mapping[str, str]) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", str(ROOT / "examples" / "plain_asyncio.py")],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = await anyio.to_thread.run_sync(run)

    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == ["connected as app", "tokens fetched: 1"]


async def test_the_fastapi_service_answers(settings: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    app = load(ROOT / "examples" / "fastapi_service.py").app

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        user = await client.get("/whoami")
        health = await client.get("/health")

    assert user.json() == "app"
    assert health.status_code == 200
    assert 0 < health.json()["seconds_left"] <= 300


@pytest.mark.parametrize("path", [*EXAMPLES, *DOCUMENTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_database_that_is_shown_is_verified(path: Path) -> None:
    shown = re.findall(r"postgres(?:ql)?://[^\s\"'`]+", path.read_text(encoding="utf-8"))

    local = re.compile(r"//(?:[^/@]*@)?(?:localhost|127\.0\.0\.1|/|\{)")
    assert [dsn for dsn in shown if not local.search(dsn) and "sslmode=verify-full" not in dsn] == []


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_shows_is_python_and_names_what_there_is(document: Path) -> None:
    for block in blocks(document):
        code = compile(block, str(document), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(code):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("asyncpool_creds"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "asyncpool_creds":
                assert hasattr(importlib.import_module("asyncpool_creds"), node.attr)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_link_in_a_document_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))

    assert [link for link in links if not (document.parent / link).exists()] == []


def test_what_the_readme_tests_its_readers_with_holds() -> None:
    (block,) = [block for block in blocks(ROOT / "README.md") if "VirtualClock" in block]

    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def shown_in(document: Path) -> dict[str, object]:
    names: dict[str, object] = {}
    for block in blocks(document):
        exec(compile(block, document.name, "exec"), names)
    return names


def test_what_the_page_on_testing_shows_of_time_holds() -> None:
    shown_in(ROOT / "docs" / "testing.md")["test_a_token_is_refreshed_before_it_ends"]()  # type: ignore[operator]


async def test_what_the_page_on_testing_shows_of_servers_holds() -> None:
    await shown_in(ROOT / "docs" / "testing.md")["test_my_service_survives_a_rotation"]()  # type: ignore[operator]
