"""Users, passwords and secrets from OpenBao."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from openbao import Line, started
from support import secret

from asyncpool_creds.providers.vault import AppRoleAuth, VaultDatabase, VaultKV, VaultStaticRole
from provider_cases import Case, Life

_numbers = itertools.count()


def _case(source: VaultDatabase | VaultKV | VaultStaticRole, line: Line) -> Case:
    async def fail() -> None:
        line.cut()

    async def heal() -> None:
        line.heal()

    return Case(source, fail, line.hang, line.hangs, heal)


@asynccontextmanager
async def database_case() -> AsyncIterator[Case]:
    vault, line = await started(), Line()
    await vault.make_role("minutes", "5m", "1h")
    auth = AppRoleAuth(vault.role_id, vault.secret_id)
    source = VaultDatabase("minutes", address=vault.url, auth=auth, http_client=line.client)
    yield _case(source, line)
    line.heal()
    await source.aclose()


@asynccontextmanager
async def static_role_case() -> AsyncIterator[Case]:
    vault, line = await started(), Line()
    user = f"static-{next(_numbers)}"
    await vault.postgres.create_role(user, password=secret(user))
    # Half a minute more, until which the password is not called expired.
    role = {"db_name": "postgres", "username": user, "rotation_period": "270s"}
    await vault.bao.ask("POST", f"database/static-roles/{user}", role)
    source = VaultStaticRole(user, address=vault.url, auth=vault.bao.root_token, http_client=line.client)
    yield _case(source, line)
    line.heal()
    await source.aclose()


@asynccontextmanager
async def kv_case() -> AsyncIterator[Case]:
    vault, line = await started(), Line()
    await vault.bao.ask("POST", "secret/data/case", {"data": {"username": "app", "password": secret("kv")}})
    source = VaultKV("case", address=vault.url, auth=vault.bao.root_token, http_client=line.client)
    yield replace(_case(source, line), lives_for_ever=True)
    line.heal()
    await source.aclose()


@asynccontextmanager
async def database_life() -> AsyncIterator[Life]:
    vault = await started()
    auth = AppRoleAuth(vault.role_id, vault.secret_id)
    # Renewed once or twice, and then another user.
    yield Life(vault.dsn(), VaultDatabase("seconds", address=vault.url, auth=auth))


@asynccontextmanager
async def static_role_life() -> AsyncIterator[Life]:
    vault = await started()

    async def turn() -> None:
        await vault.bao.ask("POST", "database/rotate-role/static")

    yield Life(vault.dsn(), VaultStaticRole("static", address=vault.url, auth=vault.bao.root_token), turn=turn)


@asynccontextmanager
async def kv_life() -> AsyncIterator[Life]:
    vault, numbers = await started(), itertools.count()

    async def turn() -> None:
        password = secret(f"kv-{next(numbers)}")
        await vault.bao.ask("POST", "secret/data/life", {"data": {"username": "kv-life", "password": password}})
        await vault.postgres.create_role("kv-life", password=password)

    await turn()
    yield Life(vault.dsn(), VaultKV("life", address=vault.url, auth=vault.bao.root_token), turn=turn)


CASES = {"VaultDatabase": database_case, "VaultStaticRole": static_role_case, "VaultKV": kv_case}
LIVES = {"VaultDatabase": database_life, "VaultStaticRole": static_role_life, "VaultKV": kv_life}
