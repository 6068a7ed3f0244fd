"""A pool on a real PostgreSQL lives through the lifetimes of every source's credentials, under load."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from lag_probe import LagProbe
from provider_cases import all_lives

from asyncpool_creds import BindableProvider, CredentialPool, CredentialRefreshed, Event, TokenManager, create_pool
from asyncpool_creds.testing import RecordingObserver

pytestmark = pytest.mark.anyio

LIVES = all_lives()
LIFETIMES = 3
WORKERS = 6


class _Lifetimes:
    """Counts the answers of the source that gave the database's credential a new secret or a later end."""

    def __init__(self) -> None:
        self.lived = 0
        self.turned = asyncio.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, CredentialRefreshed):
            self.lived += 1
            self.turned.set()

    async def next(self) -> None:
        await self.turned.wait()
        self.turned.clear()


@pytest.mark.parametrize("name", LIVES)
async def test_a_pool_lives_through_three_lifetimes_under_load(name: str, observer: RecordingObserver) -> None:
    lifetimes, probe, stop = _Lifetimes(), LagProbe(), asyncio.Event()
    failures: list[BaseException] = []
    served = 0

    async def work(pool: CredentialPool[Any]) -> None:
        nonlocal served
        while not stop.is_set():
            try:
                async with pool.acquire() as connection, connection.transaction():
                    assert await connection.fetchval("SELECT 1") == 1
            except Exception as error:  # noqa: BLE001 - every failure counts
                failures.append(error)
                return
            served += 1

    with probe.watching():
        async with AsyncExitStack() as stack:
            life = await stack.enter_async_context(LIVES[name]())
            credentials = life.credentials
            if not isinstance(credentials, BindableProvider):
                arguments: Any = {"on_event": observer, **life.manager_arguments}
                credentials = await stack.enter_async_context(TokenManager(credentials, **arguments))
            pool: CredentialPool[Any] = create_pool(
                life.dsn,
                credentials=credentials,
                min_size=3,
                max_size=3,
                on_event=[observer, lifetimes],
                **dict[str, Any](life.pool_arguments),
            )
            await stack.enter_async_context(pool)
            assert pool.manager is not None
            tasks = [asyncio.create_task(work(pool)) for _ in range(WORKERS)]
            try:
                lifetimes.lived = 0
                while lifetimes.lived < LIFETIMES and not any(task.done() for task in tasks):
                    if life.turn is not None:
                        await life.turn()
                        await pool.manager.refresh()
                    turned = asyncio.create_task(lifetimes.next())
                    await asyncio.wait({turned, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                    turned.cancel()
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    assert failures == []
    assert lifetimes.lived >= LIFETIMES
    assert served > 0
    assert probe.steps > 0
    # A source that blocks does so in every life.
    assert len(probe.blocking) < LIFETIMES
