"""Functions as sources, and the scripted provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from support import secret

from asyncpool_creds import Credential
from asyncpool_creds.testing import ScriptedProvider
from provider_cases import Case


@asynccontextmanager
async def function_case() -> AsyncIterator[Case]:
    answer = "good"
    hanging = asyncio.Event()

    async def source() -> Credential:
        if answer == "bad":
            raise ConnectionError("down")
        if answer == "hang":
            hanging.set()
            await asyncio.Event().wait()
        return Credential(secret(), expires_at=datetime.now(UTC) + timedelta(minutes=5))

    def become(what: str) -> None:
        nonlocal answer
        answer = what

    async def fail() -> None:
        become("bad")

    async def heal() -> None:
        become("good")

    async def hangs() -> None:
        await hanging.wait()

    yield Case(source, fail, lambda: become("hang"), hangs, heal)


@asynccontextmanager
async def scripted_case() -> AsyncIterator[Case]:
    source = ScriptedProvider(300, prefix=secret())

    async def fail() -> None:
        source.play(ConnectionError("down"))

    async def heal() -> None:
        source.play(300)

    async def hangs() -> None:
        while not source.in_flight:
            await source.called(source.calls + 1)

    yield Case(source, fail, lambda: source.play(ScriptedProvider.HANG), hangs, heal)


CASES = {"function": function_case, "ScriptedProvider": scripted_case}
