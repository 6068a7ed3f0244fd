"""A thousand managers and two hundred pools in one process: what each takes, at rest, at a refresh and to begin."""

from __future__ import annotations

import asyncio
import bisect
import gc
import time
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeAlias

import asyncpg

import asyncpool_creds
from asyncpool_creds import Credential, TokenManager, TokenManagers
from asyncpool_creds.testing import VirtualClock
from benchmarks.figures import Figure, Metrics, Row, ratios, series
from benchmarks.pools import OURS, PASSWORD, PLAIN, ROLE, AnyPool, hour_long
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

__all__ = ["CELLS"]

_MANAGERS: Final = 1_000
_POOLS: Final = 200
_POOLS_WITH_A_CONNECTION: Final = 20
_MINUTE: Final = 60.0
_HOUR: Final = 3600.0
_DAY: Final = 86_400.0
# What many services do instead, and the least that a background refresh takes: a task that fetches and sleeps.
_SLEEPER: Final = "task that sleeps"
# When that one fetches again: five minutes before the end, or a fifth of the life.
_MARGIN: Final = 300.0

# Real seconds in which a server that has anything to say says it.
_PATIENCE: Final = 0.01
# One a minute serves all that wait on an event loop.
_LOOKS: Final = 75

_Keeper: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
"""Keeps something open for as long as a block lasts."""


def _rounds(effort: Effort) -> int:
    return effort.herds


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _sleep_and_fetch(fetch: Callable[[], Credential], lifetime: float) -> None:
    while True:
        _credential = fetch()
        await asyncio.sleep(lifetime - min(_MARGIN, lifetime / 5))


# -- memory


@asynccontextmanager
async def _idle_managers() -> AsyncGenerator[None]:
    managers = [TokenManager(lambda: hour_long(PASSWORD)) for _ in range(_MANAGERS)]
    for manager in managers:
        await manager.start()
    yield
    for manager in managers:
        await manager.aclose()


@asynccontextmanager
async def _idle_sleepers() -> AsyncGenerator[None]:
    tasks = [asyncio.create_task(_sleep_and_fetch(lambda: hour_long(PASSWORD), _HOUR)) for _ in range(_MANAGERS)]
    await asyncio.sleep(0)
    yield
    await _cancel(tasks)


@asynccontextmanager
async def _idle_pools(make: Callable[[], Awaitable[AnyPool]]) -> AsyncGenerator[None]:
    pools = [await make() for _ in range(_POOLS)]
    yield
    for pool in pools:
        await pool.close()


def _bytes_each(keeper: _Keeper, count: int) -> Measurement:
    async def measure() -> Metrics:
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            async with keeper():
                gc.collect()
                after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return {"bytes": (after - before) / count}

    return measure


async def _measure_managers(conditions: Conditions) -> tuple[Row, ...]:
    contenders = {
        _SLEEPER: _bytes_each(_idle_sleepers, _MANAGERS),
        OURS: _bytes_each(_idle_managers, _MANAGERS),
    }
    return await _measure_bytes(conditions, contenders, _SLEEPER, at_most=1.5)


async def _measure_pools(conditions: Conditions) -> tuple[Row, ...]:
    dsn = conditions.server.dsn(user=ROLE)
    async with TokenManager(lambda: hour_long(PASSWORD)) as manager:
        contenders: Mapping[str, Callable[[], Awaitable[AnyPool]]] = {
            PLAIN: partial(asyncpg.create_pool, dsn, password=PASSWORD, min_size=0),
            OURS: partial(asyncpool_creds.create_pool, dsn, credentials=manager, min_size=0),
        }
        measurements = {name: _bytes_each(partial(_idle_pools, make), _POOLS) for name, make in contenders.items()}
        return await _measure_bytes(conditions, measurements, PLAIN, at_most=1.75)


async def _measure_bytes(
    conditions: Conditions, contenders: Mapping[str, Measurement], baseline: str, *, at_most: float
) -> tuple[Row, ...]:
    for measurement in contenders.values():
        await measurement()  # what stays for good is there from now on
    rounds = await play(contenders, _rounds(conditions.effort), conditions)
    rows: list[Row] = []
    for name in contenders:
        figures = [Figure("bytes each", series(rounds, name, "bytes"))]
        if name != baseline:
            share = ratios(rounds, name, baseline, "bytes")
            figures.append(Figure(f"bytes, {baseline} = 1", share, at_most=at_most))
        rows.append(Row(name, tuple(figures)))
    return tuple(rows)


# -- hours that pass at once


class _CountingClock(VirtualClock):
    """Counts how often its loop is woken by a timer, and for how long it was busy then, in real seconds."""

    def __init__(self, *, autojump_threshold: float = 0.0) -> None:
        super().__init__(autojump_threshold=autojump_threshold)
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.wakeups = 0
        self.longest = 0.0
        self._woken_at = time.perf_counter()

    def advance(self, seconds: float) -> None:
        # The loop has nothing to do: it would sleep now until a timer is due.
        self.longest = max(self.longest, time.perf_counter() - self._woken_at)
        self.wakeups += 1
        super().advance(seconds)
        self._woken_at = time.perf_counter()


async def _live(clock: VirtualClock, main: Callable[[], Coroutine[Any, Any, Metrics]]) -> Metrics:
    gc.disable()
    try:
        return await asyncio.to_thread(lambda: clock.run(main()))
    finally:
        gc.enable()


class _Source:
    """Gives a new token each time, and remembers when."""

    def __init__(self, clock: VirtualClock, lifetime: float) -> None:
        self._clock = clock
        self.lifetime = lifetime
        self.asked_at: list[float] = []

    def fetch(self) -> Credential:
        self.asked_at.append(self._clock.monotonic())
        expires_at = self._clock.now() + timedelta(seconds=self.lifetime)
        return Credential(f"{PASSWORD}-{len(self.asked_at)}", expires_at=expires_at)


_Contender: TypeAlias = Callable[[_Source, VirtualClock], AbstractAsyncContextManager[object]]
"""Keeps one token of a source fresh for as long as a block lasts."""


def _manager(source: _Source, clock: VirtualClock) -> AbstractAsyncContextManager[object]:
    return TokenManager(source.fetch, clock=clock)


@asynccontextmanager
async def _sleeper(source: _Source, _: VirtualClock) -> AsyncGenerator[None]:
    task = asyncio.create_task(_sleep_and_fetch(source.fetch, source.lifetime))
    await asyncio.sleep(0)
    yield
    await _cancel([task])


_CONTENDERS: Final[Mapping[str, _Contender]] = {_SLEEPER: _sleeper, OURS: _manager}


def _idle_hour(contender: _Contender, lifetime: float) -> Measurement:
    async def measure() -> Metrics:
        clock = _CountingClock()
        source = _Source(clock, lifetime)

        async def hour() -> Metrics:
            async with AsyncExitStack() as opened:
                for _ in range(_MANAGERS):
                    await opened.enter_async_context(contender(source, clock))
                    await asyncio.sleep(_MINUTE / _MANAGERS)  # or all would be woken together
                source.asked_at.clear()
                clock.begin()
                await asyncio.sleep(_HOUR)
                # The last time was for us.
                return {"wake-ups": clock.wakeups - 1, "fetches": len(source.asked_at)}

        return await _live(clock, hour)

    return measure


async def _measure_idle(conditions: Conditions) -> tuple[Row, ...]:
    contenders = {
        f"{name}, {lifetime / _MINUTE:.0f} min": _idle_hour(contender, lifetime)
        for lifetime in (_HOUR, _HOUR / 4)
        for name, contender in _CONTENDERS.items()
    }
    rounds = await play(contenders, _rounds(conditions.effort), conditions)
    rows: list[Row] = []
    for name in contenders:
        wakeups, fetches = series(rounds, name, "wake-ups"), series(rounds, name, "fetches")
        shares = tuple(one / other for one, other in zip(wakeups, fetches, strict=True))
        at_most = 1.1 if name.startswith(OURS) else None
        figures = (Figure("wake-ups an hour", wakeups), Figure("fetches an hour", fetches))
        rows.append(Row(name, (*figures, Figure("wake-ups a fetch", shares, at_most=at_most))))
    return tuple(rows)


_OpenPool: TypeAlias = Callable[[str, VirtualClock], AbstractAsyncContextManager[AnyPool]]
# The virtual clock may jump while a server takes its time: no connect may end by that. And no timer of asyncpg's own.
_KEPT: Final[Mapping[str, Any]] = {
    "min_size": 0,
    "timeout": _DAY,
    "max_inactive_connection_lifetime": 0,
    "max_cached_statement_lifetime": 0,
}


def _plain_pool(dsn: str, _: VirtualClock) -> AbstractAsyncContextManager[AnyPool]:
    return asyncpg.create_pool(dsn, password=PASSWORD, **_KEPT)


@asynccontextmanager
async def _pool_and_manager(dsn: str, clock: VirtualClock) -> AsyncGenerator[AnyPool]:
    def fetch() -> Credential:
        return Credential(PASSWORD, expires_at=clock.now() + timedelta(seconds=_DAY))

    async with TokenManager(fetch, clock=clock) as manager:
        await asyncio.sleep(1)  # or the pool would be woken together with it
        async with asyncpool_creds.create_pool(dsn, credentials=manager, **_KEPT) as pool:
            yield pool


def _idle_hour_of_pools(dsn: str, open_pool: _OpenPool) -> Measurement:
    async def measure() -> Metrics:
        clock = _CountingClock(autojump_threshold=_PATIENCE)

        async def hour() -> Metrics:
            async with AsyncExitStack() as opened:
                for _ in range(_POOLS_WITH_A_CONNECTION):
                    pool = await opened.enter_async_context(open_pool(dsn, clock))
                    await pool.fetchval("SELECT 1")
                    await asyncio.sleep(_MINUTE / _POOLS_WITH_A_CONNECTION)
                clock.begin()
                await asyncio.sleep(_HOUR)
                return {"wake-ups": clock.wakeups - 1}  # see above

        return await _live(clock, hour)

    return measure


async def _measure_idle_pools(conditions: Conditions) -> tuple[Row, ...]:
    dsn = conditions.server.dsn(user=ROLE)
    openers: Mapping[str, _OpenPool] = {PLAIN: _plain_pool, OURS: _pool_and_manager}
    contenders = {name: _idle_hour_of_pools(dsn, open_pool) for name, open_pool in openers.items()}
    rounds = await play(contenders, _rounds(conditions.effort), conditions)
    demands = {PLAIN: None, OURS: _LOOKS}
    return tuple(
        Row(name, (Figure("wake-ups an hour", series(rounds, name, "wake-ups"), at_most=demands[name]),))
        for name in contenders
    )


# -- a refresh of all at once


def _refresh_together(contender: _Contender) -> Measurement:
    async def measure() -> Metrics:
        clock = _CountingClock()
        source = _Source(clock, _HOUR)

        async def refresh() -> Metrics:
            async with AsyncExitStack() as opened:
                for _ in range(_MANAGERS):
                    await opened.enter_async_context(contender(source, clock))
                source.asked_at.clear()
                clock.begin()
                await asyncio.sleep(_HOUR)
                asked_at = source.asked_at
                return {
                    "fetches": len(asked_at),
                    "peak": _most_within_a_second(asked_at),
                    "spread": asked_at[-1] - asked_at[0],
                    "longest": clock.longest,
                }

        return await _live(clock, refresh)

    return measure


def _most_within_a_second(moments: list[float]) -> int:
    return max(bisect.bisect_left(moments, moment + 1) - index for index, moment in enumerate(moments))


async def _measure_refresh(conditions: Conditions) -> tuple[Row, ...]:
    contenders = {name: _refresh_together(contender) for name, contender in _CONTENDERS.items()}
    rounds = await play(contenders, _rounds(conditions.effort), conditions)
    return tuple(
        Row(
            name,
            (
                Figure("fetches", series(rounds, name, "fetches")),
                Figure("spread over s", series(rounds, name, "spread")),
                Figure("in one second", series(rounds, name, "peak"), at_most=_MANAGERS / 10 if name == OURS else None),
                Figure("loop busy ms, longest", series(rounds, name, "longest", 1e3)),
            ),
        )
        for name in contenders
    )


# -- beginning and end


async def _all_managers() -> None:
    async with TokenManagers(lambda _: lambda: hour_long(PASSWORD)) as managers:
        await managers.start(*map(str, range(_MANAGERS)))


async def _all_sleepers() -> None:
    async with _idle_sleepers():
        pass


async def _measure_life(conditions: Conditions) -> tuple[Row, ...]:
    def turn(work: Callable[[], Awaitable[None]]) -> Measurement:
        async def measure() -> Metrics:
            wall, cpu = await timed(work)
            return {"wall": wall / _MANAGERS, "cpu": cpu / _MANAGERS}

        return measure

    contenders = {_SLEEPER: turn(_all_sleepers), OURS: turn(_all_managers)}
    for measurement in contenders.values():
        await measurement()
    rounds = await play(contenders, _rounds(conditions.effort), conditions)
    rows: list[Row] = []
    for name in contenders:
        figures = [
            Figure("µs each", series(rounds, name, "wall", 1e6)),
            Figure("CPU µs each", series(rounds, name, "cpu", 1e6)),
        ]
        if name != _SLEEPER:
            figures.append(Figure(f"CPU, {_SLEEPER} = 1", ratios(rounds, name, _SLEEPER, "cpu")))
        rows.append(Row(name, tuple(figures)))
    return tuple(rows)


CELLS: Final = (
    Cell(
        name="scale-memory",
        group="scale: memory",
        meaning=f"what tracemalloc finds of each of {_MANAGERS:,} managers that have their token, "
        "against a task that fetches one and sleeps",
        rounds=_rounds,
        measure=_measure_managers,
    ),
    Cell(
        name="scale-memory-pool",
        group="scale: memory of pools",
        meaning=f"the same of each of {_POOLS} open pools of 10 without a connection, one manager for all",
        rounds=_rounds,
        measure=_measure_pools,
    ),
    Cell(
        name="scale-idle",
        group="scale: idle hour",
        meaning=f"how often an hour of the virtual clock wakes a process with {_MANAGERS:,} "
        "managers that nobody calls, by the life of their tokens; a fetch takes one",
        rounds=_rounds,
        measure=_measure_idle,
        only_loop="virtual",
    ),
    Cell(
        name="scale-idle-pool",
        group="scale: idle hour of pools",
        meaning=f"the same with {_POOLS_WITH_A_CONNECTION} pools with one connection each, and a manager each "
        "whose token lives for a day",
        rounds=_rounds,
        measure=_measure_idle_pools,
        only_loop="virtual",
    ),
    Cell(
        name="scale-refresh",
        group="scale: refresh",
        meaning=f"{_MANAGERS:,} managers whose tokens came at the same moment fetch the next: how far apart "
        "(on the virtual clock), and how long the loop is busy at a stretch (on the real one)",
        rounds=_rounds,
        measure=_measure_refresh,
        only_loop="virtual",
    ),
    Cell(
        name="scale-life",
        group="scale: start and close",
        meaning=f"TokenManagers with {_MANAGERS:,} names: start, and close",
        rounds=_rounds,
        measure=_measure_life,
    ),
)
