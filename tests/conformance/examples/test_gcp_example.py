"""examples/gcp_cloud_sql.py runs, on a virtual machine with a service account, and with a key file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from metadata_stubs import MetadataStub, google_environment, key_of_service_account
from processes import run_example

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("where", ["virtual machine", "key file"])
async def test_the_gcp_example_runs(where: str, tmp_path: Path) -> None:
    with MetadataStub() as stub, google_environment(stub):
        environment = dict(os.environ)
        if where == "key file":
            (tmp_path / "key.json").write_text(json.dumps(key_of_service_account(stub)))
            environment["GOOGLE_APPLICATION_CREDENTIALS"] = str(tmp_path / "key.json")
        async with PostgresServer() as server, TokenDoor(server, stub.verify) as door:
            await server.create_role("app@project.iam")
            environment["DATABASE_URL"] = door.dsn().replace("app@", "")
            done = await run_example("gcp_cloud_sql.py", environment)

    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "connected as app@project.iam"
    assert 0 < int(second.rpartition(" ")[2]) <= 300
