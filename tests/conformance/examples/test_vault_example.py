"""examples/vault_database.py runs, at a real OpenBao with a real PostgreSQL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from openbao import started
from processes import run_example

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("login", ["approle", "token"])
async def test_the_vault_example_runs_and_leaves_no_user_behind(login: str, tmp_path: Path) -> None:
    vault = await started()
    path = tmp_path / "secret-id"
    path.write_text(vault.secret_id)
    settings = {"VAULT_ROLE_ID": vault.role_id, "VAULT_SECRET_ID_FILE": str(path)}
    if login == "token":
        settings = {"VAULT_TOKEN": await vault.make_token()}
    settings |= {"DATABASE_URL": vault.dsn(), "VAULT_ADDR": vault.url, "VAULT_DATABASE_ROLE": "hour"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BAO_", "VAULT_"))}

    done = await run_example("vault_database.py", {**inherited, **settings})

    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    user = first.removeprefix("connected as ")
    assert user.startswith(f"v-{login}-hour-")
    assert 3000 < int(second.rpartition(" ")[2]) <= 3240
    await vault.dropped(user)
