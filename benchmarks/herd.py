"""A thousand callers who all find nothing: how often the source is asked, and how long until all are served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg

import asyncpool_creds
from asyncpool_creds import Credential, TokenManager
from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks.figures import Figure, Metrics, Round, Row, ratios, series
from benchmarks.pools import OURS, PASSWORD, PLAIN, ROLE, AnyPool, hour_long
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

__all__ = ["CELLS"]

_CALLERS: Final = 1_000
_CONNECTIONS: Final = 10
_SHARED_FUTURE: Final = "shared future"


def _rounds(effort: Effort) -> int:
    return effort.herds


class _Source:
    """Answers once all callers are there, and counts how often it is asked."""

    def __init__(self, callers: int) -> None:
        self._missing = callers
        self._all_there = asyncio.Event()
        self.fetches = 0

    def arrive(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._all_there.set()

    async def fetch(self) -> Credential:
        self.fetches += 1
        await self._all_there.wait()
        return hour_long(PASSWORD)


async def _serve(caller: Callable[[], Awaitable[object]], source: _Source) -> Metrics:
    async def call() -> None:
        source.arrive()
        await caller()

    async def herd() -> None:
        await asyncio.gather(*(call() for _ in range(_CALLERS)))

    wall, _ = await timed(herd)
    return {"wall": wall, "fetches": source.fetches}


# -- the manager alone


async def _manager_herd() -> Metrics:
    source = _Source(_CALLERS)
    manager = TokenManager(source.fetch)
    try:
        return await _serve(manager.get, source)
    finally:
        await manager.aclose()


async def _future_herd() -> Metrics:
    source = _Source(_CALLERS)
    fetch = asyncio.ensure_future(source.fetch())

    async def wait() -> Credential:
        return await asyncio.shield(fetch)

    return await _serve(wait, source)


async def _measure_manager(conditions: Conditions) -> tuple[Row, ...]:
    return await _measure(conditions, {OURS: _manager_herd, _SHARED_FUTURE: _future_herd}, _SHARED_FUTURE)


# -- a pool


async def _pool_herd(pool: AnyPool, source: _Source) -> Metrics:
    async with pool:
        return await _serve(lambda: pool.fetchval("SELECT 1"), source)


def _our_pool(server: PostgresServer) -> Measurement:
    async def measure() -> Metrics:
        source = _Source(_CALLERS)
        pool: AnyPool = asyncpool_creds.create_pool(
            server.dsn(user=ROLE), credentials=source.fetch, min_size=0, max_size=_CONNECTIONS
        )
        return await _pool_herd(pool, source)

    return measure


def _plain_pool(server: PostgresServer) -> Measurement:
    async def measure() -> Metrics:
        source = _Source(_CALLERS)

        async def password() -> str:
            return (await source.fetch()).password

        pool = asyncpg.create_pool(
            server.dsn(user=ROLE),
            password=password,
            min_size=0,
            max_size=_CONNECTIONS,
        )
        return await _pool_herd(pool, source)

    return measure


async def _measure_pool(conditions: Conditions) -> tuple[Row, ...]:
    server = conditions.server
    return await _measure(conditions, {OURS: _our_pool(server), PLAIN: _plain_pool(server)}, PLAIN)


# -- both


async def _measure(conditions: Conditions, contenders: dict[str, Measurement], baseline: str) -> tuple[Row, ...]:
    for measurement in contenders.values():
        await measurement()  # warms up
    rounds = await play(contenders, conditions.effort.herds, conditions)
    return tuple(_row(rounds, name, baseline) for name in contenders)


def _row(rounds: list[Round], name: str, baseline: str) -> Row:
    figures = [
        Figure("fetches", series(rounds, name, "fetches"), at_most=1 if name == OURS else None),
        Figure("ms until all are served", series(rounds, name, "wall", 1e3)),
    ]
    if name != baseline:
        figures.append(Figure(f"speed, {baseline} = 1", ratios(rounds, baseline, name, "wall"), better="higher"))
    return Row(name, tuple(figures))


CELLS: Final = (
    Cell(
        name="herd-manager",
        group="herd of the manager",
        meaning=f"{_CALLERS:,} tasks call TokenManager.get() before there is a token, against one future they share",
        rounds=_rounds,
        measure=_measure_manager,
    ),
    Cell(
        name="herd-pool",
        group="herd of the pool",
        meaning=f"{_CALLERS:,} tasks call fetchval on an empty pool of {_CONNECTIONS}; asyncpg has password=function",
        rounds=_rounds,
        measure=_measure_pool,
    ),
)
