"""An environment variable that changes while the process runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support import secret

from asyncpool_creds.providers.env import Environment
from asyncpool_creds.testing.door import TokenDoor
from provider_cases import Case, Life, database


@asynccontextmanager
async def environment_case() -> AsyncIterator[Case]:
    with pytest.MonkeyPatch.context() as environment:

        async def heal() -> None:
            environment.setenv("DATABASE_PASSWORD", secret())

        async def fail() -> None:
            environment.delenv("DATABASE_PASSWORD")

        async def hangs() -> None:
            """Return at once: nothing is waited for, so there is nothing that could hang."""

        await heal()
        source = Environment("DATABASE_PASSWORD")
        yield Case(source, fail, lambda: None, hangs, heal, lives_for_ever=True, fails_for_good=True)


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
        server = database()
        await server.create_role("ada")
        async with TokenDoor(server, verify) as door:
            yield Life(door.dsn(user="ada"), Environment("DATABASE_PASSWORD"), turn=turn)


CASES = {"Environment": environment_case}
LIVES = {"Environment": environment_life}
