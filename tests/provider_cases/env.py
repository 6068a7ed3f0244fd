"""An environment variable that changes while the process runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support import secret

from asyncpool_creds.providers.env import Environment
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer
from provider_cases import Life


@asynccontextmanager
async def environment_life() -> AsyncIterator[Life]:
    good: list[str] = []

    async def turn() -> None:
        good.append(f"{secret()}-{len(good)}")
        environment.setenv("DATABASE_PASSWORD", good[-1])

    def verify(user: str, password: str) -> str | None:
        return None if password in good[-2:] else "not of today"

    with pytest.MonkeyPatch.context() as environment:
        await turn()
        async with PostgresServer() as server:
            await server.create_role("ada")
            async with TokenDoor(server, verify) as door:
                yield Life(door.dsn(user="ada"), Environment("DATABASE_PASSWORD"), turn=turn)


LIVES = {"Environment": environment_life}
