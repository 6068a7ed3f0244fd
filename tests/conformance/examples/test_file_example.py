"""examples/kubernetes_file.py runs, on the volume of a pod and on the JSON of RDS."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import anyio
import pytest
from support import secret

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parents[3] / "examples" / "kubernetes_file.py"


def verify(user: str, password: str) -> str | None:
    return None if (user, password) == ("ada", secret()) else "somebody else's"


@pytest.mark.parametrize("shape", ["two files", "JSON"])
async def test_the_file_example_runs(shape: str, tmp_path: Path) -> None:
    files = {"PASSWORD_FILE": str(tmp_path / "password")}
    if shape == "JSON":
        (tmp_path / "password").write_text(json.dumps({"username": "ada", "password": secret()}))
    else:
        (tmp_path / "..data").mkdir()
        for name, content in {"password": secret(), "username": "ada"}.items():
            (tmp_path / "..data" / name).write_text(content)
            (tmp_path / name).symlink_to(f"..data/{name}")
        files["USER_FILE"] = str(tmp_path / "username")
    async with PostgresServer() as server, TokenDoor(server, verify) as door:
        await server.create_role("ada")
        done = await anyio.run_process(
            [sys.executable, "-W", "error", EXAMPLE],
            env={**os.environ, "DATABASE_URL": door.dsn().replace("app@", ""), **files},
            check=False,
        )

    assert done.stderr == b""
    assert done.stdout == b"connected as ada\n"
