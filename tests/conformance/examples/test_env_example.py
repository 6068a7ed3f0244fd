"""examples/environment_migration.py runs before and after the way."""

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

EXAMPLE = Path(__file__).parents[3] / "examples" / "environment_migration.py"


@pytest.mark.parametrize("kind", ["password", "token"])
async def test_the_migration_example_runs(kind: str) -> None:
    async with PostgresServer() as server, TokenIssuer(clients={"app": secret("app")}) as issuer:
        await server.create_role("app")
        environment = {**os.environ, "PGPASSWORD": secret("old")}
        if kind == "token":
            environment |= {
                "OIDC_ISSUER": issuer.url,
                "OIDC_CLIENT_ID": "app",
                "OIDC_CLIENT_SECRET": secret("app"),
            }

        def verify(user: str, password: str) -> str | None:
            # The door takes one of the two only, so that the other would show.
            if kind == "token":
                return issuer.verify(user, password)
            return None if password == secret("old") else "not the password"

        async with TokenDoor(server, verify) as door:
            done = await anyio.run_process(
                [sys.executable, "-W", "error", EXAMPLE],
                env={**environment, "DATABASE_URL": door.dsn(user="app")},
                check=False,
            )

    warning = "PGPASSWORD is set, and not used: credentials= comes first; unset it, unless a source of yours reads it\n"
    assert done.stderr.decode() == ("" if kind == "password" else warning)
    assert done.stdout.decode() == f"connected as app with a {kind}\n"
