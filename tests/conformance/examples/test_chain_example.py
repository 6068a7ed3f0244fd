"""examples/chain_local_and_cloud.py runs wherever there is a credential."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest
from support import secret

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[3] / "examples" / "chain_local_and_cloud.py"


@pytest.mark.parametrize("where", ["File", "Command", "Environment"])
async def test_the_chain_example_runs(where: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TOKEN_FILE": str(tmp_path / "token"),
        "TOKEN_COMMAND": "printenv TOKEN" if where == "Command" else "no-such-tool",
        "TOKEN": secret("Command"),
        "PGPASSWORD": secret("Environment"),
    }
    if where == "File":
        (tmp_path / "token").write_text(secret("File"))

    def verify(user: str, password: str) -> str | None:
        return None if password == secret(where) else "not from there"

    async with PostgresServer() as server, TokenDoor(server, verify) as door:
        await server.create_role("app")
        done = await anyio.run_process(
            [sys.executable, "-W", "error", EXAMPLE],
            env={**environment, "DATABASE_URL": door.dsn(user="app")},
            check=False,
        )

    warning = "PGPASSWORD is set, and not used: credentials= comes first; unset it, unless a source of yours reads it\n"
    assert done.stderr.decode() == ("" if where == "Environment" else warning)
    assert done.stdout.decode().splitlines() == ["connected as app", f"by {where}"]
