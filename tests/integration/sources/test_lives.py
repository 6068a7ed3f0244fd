"""A pool on a real PostgreSQL lives through the lifetimes of every source's credentials, under load."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from contextlib import AsyncExitStack
from typing import Any

import pytest
from lag_probe import watch
from provider_cases import Life, all_lives

from asyncpool_creds import (
    BindableProvider,
    ConnectionOpened,
    CredentialPool,
    CredentialRefreshed,
    Event,
    TokenManager,
    create_pool,
    providers,
)
from asyncpool_creds.testing import RecordingObserver

LIVES = all_lives()
LIFETIMES = 3
CONNECTIONS = 3
WORKERS = 6


class _Lifetimes:
    """Counts the lifetimes that the pool has come through.

    One is over when every connection was opened anew with the secret that comes after it, or when the same secret got
    a later end (a lease was renewed).
    """

    def __init__(self) -> None:
        self.lived = 0
        self.turned = asyncio.Event()
        self._newest: CredentialRefreshed | None = None
        self._opened = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, CredentialRefreshed):
            before, self._newest = self._newest, event
            if event.rotated:
                self._opened = 0
            elif before is not None and before.expires_at != event.expires_at:
                self._count()
        elif isinstance(event, ConnectionOpened) and self._newest and event.generation == self._newest.generation:
            self._opened += 1
            if self._opened == CONNECTIONS:
                self._count()

    def _count(self) -> None:
        self.lived += 1
        self.turned.set()


def test_every_source_has_a_life() -> None:
    modules = [
        importlib.import_module(f"{providers.__name__}.{found.name}")
        for found in pkgutil.iter_modules(providers.__path__)
        if not found.name.startswith("_")
    ]
    sources = {name for module in modules for name in module.__all__ if hasattr(getattr(module, name), "fetch")}

    # Static has one pair for ever.
    assert {name.partition(",")[0] for name in LIVES} == sources - {"Static"}


@pytest.mark.anyio
@pytest.mark.parametrize("name", LIVES)
async def test_a_pool_lives_through_three_lifetimes_under_load(name: str, observer: RecordingObserver) -> None:
    async def live() -> None:
        async with AsyncExitStack() as stack:
            life = await stack.enter_async_context(LIVES[name]())
            await _live(life, stack, observer)

    # A source that blocks does so in every lifetime.
    probe = await watch(live, tolerated=LIFETIMES - 1)

    assert probe.steps > 0
    assert len(probe.blocking) < LIFETIMES


async def _live(life: Life, stack: AsyncExitStack, observer: RecordingObserver) -> None:
    lifetimes, stop = _Lifetimes(), asyncio.Event()
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
            await asyncio.sleep(0.002)  # the load is for the pool, not for the machine

    credentials = life.credentials
    if not isinstance(credentials, BindableProvider):
        credentials = await stack.enter_async_context(TokenManager(credentials, on_event=observer))
    pool: CredentialPool[Any] = create_pool(
        life.dsn,
        credentials=credentials,
        min_size=CONNECTIONS,
        max_size=CONNECTIONS,
        on_event=[observer, lifetimes],
        # What does not end by itself leaves connections as they are, unless its change replaces them.
        retire_when="expired" if life.turn is None else "rotated",
    )
    await stack.enter_async_context(pool)
    assert pool.manager is not None
    tasks = [asyncio.create_task(work(pool)) for _ in range(WORKERS)]
    try:
        lifetimes.lived = 0
        while lifetimes.lived < LIFETIMES and not any(task.done() for task in tasks):
            lifetimes.turned.clear()
            if life.turn is not None:
                await life.turn()
                await pool.manager.refresh()
            turned = asyncio.create_task(lifetimes.turned.wait())
            await asyncio.wait({turned, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            turned.cancel()
    finally:
        stop.set()
        await asyncio.gather(*tasks)

    assert failures == []
    assert lifetimes.lived >= LIFETIMES
    assert served > 0
