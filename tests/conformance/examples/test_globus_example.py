"""examples/globus_resources.py runs, for a person and for a client by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from globus_auth import CLIENT, DATABASE, DATABASE_SCOPE, GROUPS, GROUPS_SCOPE, TRANSFER, GlobusAuth
from processes import run_example
from support import secret

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("who", ["person", "client"])
async def test_the_globus_example_runs(who: str, tmp_path: Path) -> None:
    async with PostgresServer() as server, GlobusAuth(clients={"service": secret()}) as auth:
        await server.create_role("app")
        if who == "client":
            settings = {"GLOBUS_CLIENT_ID": "service", "GLOBUS_CLIENT_SECRET": secret()}
        else:
            tokens = tmp_path / "tokens.json"
            tokens.write_text(json.dumps(auth.log_in(DATABASE_SCOPE, GROUPS_SCOPE, access_lifetime=0)))
            settings = {"GLOBUS_CLIENT_ID": CLIENT, "GLOBUS_TOKENS": str(tokens)}
        async with TokenDoor(server, auth.verifier(DATABASE)) as door:
            settings |= {"GLOBUS_AUTH": auth.url, "GLOBUS_DATABASE": DATABASE, "DATABASE_URL": door.dsn(user="app")}
            done = await run_example("globus_resources.py", os.environ | settings)

    assert done.stderr == ""
    *tokens_of, last = done.stdout.splitlines()
    assert [line.split()[0] for line in tokens_of] == [DATABASE, TRANSFER if who == "client" else GROUPS]
    assert last == "connected as app"
    assert auth.requests == ({"client_credentials": 1} if who == "client" else {"refresh_token": 2})
