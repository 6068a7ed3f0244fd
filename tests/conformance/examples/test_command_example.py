"""examples/command_token.py runs, with a tool that logs in at an issuer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest
from support import secret

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[3] / "examples" / "command_token.py"
TOOL = """
import json, os, sys, urllib.request
form = f"grant_type=client_credentials&client_id=app&client_secret={os.environ['SECRET']}".encode()
print(json.load(urllib.request.urlopen(sys.argv[1], form))["access_token"])
"""


async def test_the_command_example_runs(tmp_path: Path) -> None:
    (tmp_path / "a tool.py").write_text(TOOL)
    async with PostgresServer() as server, TokenIssuer(clients={"app": secret("app")}) as issuer:
        await server.create_role("app")
        async with TokenDoor(server, issuer.verify) as door:
            done = await anyio.run_process(
                [sys.executable, "-W", "error", EXAMPLE],
                env={
                    **os.environ,
                    "DATABASE_URL": door.dsn(user="app"),
                    "TOKEN_COMMAND": f"'{sys.executable}' '{tmp_path}/a tool.py' {issuer.token_url}",
                    "SECRET": secret("app"),
                },
                check=False,
            )

    assert done.stderr == b""
    left, user = done.stdout.decode().splitlines()
    assert 200 < int(left.rpartition(" ")[2]) <= 300
    assert user == "connected as app"
