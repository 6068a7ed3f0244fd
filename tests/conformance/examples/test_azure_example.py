"""examples/azure_entra.py runs, on a virtual machine with an identity."""

from __future__ import annotations

import os

import pytest
from metadata_stubs import MetadataStub, azure_environment, virtual_machine
from processes import run_example

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("claims", "user"), [({"upn": "ada"}, None), (None, "ada")])
async def test_the_azure_example_runs(claims: dict[str, str] | None, user: str | None) -> None:
    with MetadataStub(claims=claims) as stub, azure_environment(**virtual_machine(stub)):
        async with PostgresServer() as server, TokenDoor(server, stub.verify) as door:
            await server.create_role("ada")
            environment = {**os.environ, "DATABASE_URL": door.dsn().replace("app@", "")} | (
                {"ENTRA_USER": user} if user else {}
            )
            done = await run_example("azure_entra.py", environment)

    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "connected as ada"
    assert 0 < int(second.rpartition(" ")[2]) <= 300
