"""Thousands of callers who all find nothing: how often the source is asked, and how long until all are served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

import asyncpg

import asyncpool_creds
from asyncpool_creds import Credential, TokenManager
from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks.figures import Figure, Metrics, Round, Row, ratios, series
from benchmarks.pools import OURS, PASSWORD, PLAIN, ROLE, AnyPool, hour_long
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

__all__ = ["CELLS"]

_CALLERS: Final = 1_000
_MANY_CALLERS: Final = 10_000
_CONNECTIONS: Final = 10
# What a contender is called by the size of its herd.
_SIZES: Final[Mapping[str, int]] = {"": _CALLERS, f", {_MANY_CALLERS:,} callers": _MANY_CALLERS}
# A caller among ten times as many takes no longer, but for what caches of the processor hold.
_LINEAR: Final = 1.5
_SHARED_FUTURE: Final = "shared future"


def _rounds(effort: Effort) -> int:
    return effort.herds


class _Source:
    """Answers once all callers are there, and counts how often it is asked."""

    def __init__(self, callers: int) -> None:
        self.missing = callers
        self._all_there = asyncio.Event()
        self.fetches = 0

    def arrive(self) -> None:
        self.missing -= 1
        if self.missing == 0:
            self._all_there.set()

    async def fetch(self) -> Credential:
        self.fetches += 1
        await self._all_there.wait()
        return hour_long(PASSWORD)


async def _serve(caller: Callable[[], Awaitable[object]], source: _Source) -> Metrics:
    callers = source.missing

    async def call() -> None:
        source.arrive()
        await caller()

    async def herd() -> None:
        await asyncio.gather(*(call() for _ in range(callers)))

    wall, _ = await timed(herd)
    return {"wall": wall, "each": wall / callers, "fetches": source.fetches}


_Herd: TypeAlias = Callable[[_Source], Awaitable[Metrics]]


# -- the manager alone


async def _manager_herd(source: _Source) -> Metrics:
    manager = TokenManager(source.fetch)
    try:
        return await _serve(manager.get, source)
    finally:
        await manager.aclose()


async def _future_herd(source: _Source) -> Metrics:
    fetch = asyncio.ensure_future(source.fetch())

    async def wait() -> Credential:
        return await asyncio.shield(fetch)

    return await _serve(wait, source)


async def _measure_manager(conditions: Conditions) -> tuple[Row, ...]:
    return await _measure(conditions, {_SHARED_FUTURE: _future_herd, OURS: _manager_herd}, _SHARED_FUTURE)


# -- a pool


async def _pool_herd(pool: AnyPool, source: _Source) -> Metrics:
    async with pool:
        return await _serve(lambda: pool.fetchval("SELECT 1"), source)


def _our_pool(server: PostgresServer) -> _Herd:
    async def measure(source: _Source) -> Metrics:
        pool: AnyPool = asyncpool_creds.create_pool(
            server.dsn(user=ROLE), credentials=source.fetch, min_size=0, max_size=_CONNECTIONS
        )
        return await _pool_herd(pool, source)

    return measure


def _plain_pool(server: PostgresServer) -> _Herd:
    async def measure(source: _Source) -> Metrics:
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
    return await _measure(conditions, {PLAIN: _plain_pool(server), OURS: _our_pool(server)}, PLAIN)


# -- both


async def _measure(conditions: Conditions, herds: Mapping[str, _Herd], baseline: str) -> tuple[Row, ...]:
    def turn(herd: _Herd, callers: int) -> Measurement:
        return lambda: herd(_Source(callers))

    turns = {name + suffix: turn(herd, size) for suffix, size in _SIZES.items() for name, herd in herds.items()}
    for measurement in turns.values():
        await measurement()  # warms up
    rounds = await play(turns, conditions.effort.herds, conditions)
    return tuple(_row(rounds, name, baseline, suffix) for suffix in _SIZES for name in herds)


def _row(rounds: list[Round], name: str, baseline: str, suffix: str) -> Row:
    contender = name + suffix
    figures = [
        Figure("fetches", series(rounds, contender, "fetches"), at_most=1 if name == OURS else None),
        Figure("ms until all are served", series(rounds, contender, "wall", 1e3)),
        Figure("µs each", series(rounds, contender, "each", 1e6)),
    ]
    if name != baseline:
        speed = ratios(rounds, baseline + suffix, contender, "wall")
        figures.append(Figure(f"speed, {baseline} = 1", speed, better="higher"))
    if suffix:
        growth = ratios(rounds, contender, name, "each")
        at_most = _LINEAR if name == OURS else None
        figures.append(Figure(f"time each, among {_CALLERS:,} = 1", growth, at_most=at_most, better="lower"))
    return Row(contender, tuple(figures))


CELLS: Final = (
    Cell(
        name="herd-manager",
        group="herd of the manager",
        meaning=f"{_CALLERS:,} tasks, and {_MANY_CALLERS:,}, call TokenManager.get() before there is a token, "
        "against one future they share",
        rounds=_rounds,
        measure=_measure_manager,
    ),
    Cell(
        name="herd-pool",
        group="herd of the pool",
        meaning=f"{_CALLERS:,} tasks, and {_MANY_CALLERS:,}, call fetchval on an empty pool of {_CONNECTIONS}; "
        "asyncpg has password=function",
        rounds=_rounds,
        measure=_measure_pool,
    ),
)
