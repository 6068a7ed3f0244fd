"""What callers feel while the role's password changes: acquire latency in the second from the rotation on."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import asyncpg

import asyncpool_creds
from asyncpool_creds import Credential, CredentialPool, TokenManager
from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks.figures import Figure, Metrics, Round, Row, moments, percentile, ratios, series
from benchmarks.pools import OURS, AnyPool, hour_long
from benchmarks.rounds import Cell, Conditions, play
from benchmarks.tls_front import secured

__all__ = ["CELLS"]

_CONNECTIONS: Final = 20
_WORKERS: Final = 50
# What a worker does with an answer before it asks again.
_THINK: Final = 0.010
# The pools fill and the workers fall out of step before anything counts.
_WARM_UP: Final = 0.3
_WINDOW: Final = 1.0
# A pool that has not replaced its connections by then is not going to.
_PATIENCE: Final = 30.0
# Seconds of a course that are taken together.
_STRETCH: Final = 0.05
# p99 in the second after a rotation, against what it was before.
_FLOOR: Final = 1.3

_NONE: Final = "asyncpg, keeping its connections"
_EXPIRE: Final = "asyncpg, expire_connections()"
_NAIVE: Final = "asyncpg, close and reconnect"

_ROLE: Final = "bench_rotation"

AnyProxy: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
AnyConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class _Password:
    """The password of the role: each change is real, and the server refuses the one before from then on."""

    def __init__(self, administrator: AnyConnection) -> None:
        self._administrator = administrator
        self.value = ""
        self.version = 0

    async def change(self) -> str:
        value = secrets.token_hex(16)
        # ALTER ROLE takes no parameters; sixteen random bytes in hex need no quoting.
        await self._administrator.execute(f"ALTER ROLE {_ROLE} PASSWORD '{value}'")
        self.value, self.version = value, self.version + 1
        return value


class _Opened:
    """When connections were opened, by the process that serves them."""

    def __init__(self, password: _Password) -> None:
        self._password = password
        self._versions: dict[int, int] = {}
        self.at: list[float] = []

    async def init(self, connection: AnyConnection) -> None:
        self._versions[connection.get_server_pid()] = self._password.version
        self.at.append(time.perf_counter())

    def is_stale(self, connection: AnyProxy) -> bool:
        return self._versions[connection.get_server_pid()] != self._password.version


@dataclass(frozen=True, slots=True)
class _Strategy:
    """A pool, and what is done with it when the password changes.

    Args:
        acquire: Acquires a connection.
        release: Gives it back.
        rotate: Changes the password, and tells the pool if it has to be told.
        waited: How many acquires have waited for a connect so far; None: nobody counts them.
    """

    acquire: Callable[[], Awaitable[AnyProxy]]
    release: Callable[[AnyProxy], Awaitable[None]]
    rotate: Callable[[], Awaitable[object]]
    waited: Callable[[], int] | None = None


_Open: TypeAlias = Callable[[str, _Password, _Opened], AbstractAsyncContextManager[_Strategy]]
"""Opens a pool by its DSN."""
_Way: TypeAlias = Callable[[PostgresServer], AbstractAsyncContextManager[str]]
"""Opens a way to the server, and gives the DSN of it."""


@asynccontextmanager
async def _asyncpg_pool(dsn: str, password: _Password, opened: _Opened) -> AsyncGenerator[AnyPool]:
    await password.change()
    async with asyncpg.create_pool(
        dsn,
        password=lambda: password.value,
        min_size=_CONNECTIONS,
        max_size=_CONNECTIONS,
        init=opened.init,
    ) as pool:
        yield pool


@asynccontextmanager
async def _none(dsn: str, password: _Password, opened: _Opened) -> AsyncGenerator[_Strategy]:
    async with _asyncpg_pool(dsn, password, opened) as pool:
        yield _Strategy(pool.acquire, pool.release, password.change)


@asynccontextmanager
async def _expire(dsn: str, password: _Password, opened: _Opened) -> AsyncGenerator[_Strategy]:
    async with _asyncpg_pool(dsn, password, opened) as pool:

        async def rotate() -> None:
            await password.change()
            await pool.expire_connections()

        yield _Strategy(pool.acquire, pool.release, rotate)


@asynccontextmanager
async def _naive(dsn: str, password: _Password, opened: _Opened) -> AsyncGenerator[_Strategy]:
    async with _asyncpg_pool(dsn, password, opened) as pool:

        async def acquire() -> AnyProxy:
            while True:
                connection = await pool.acquire()
                if not opened.is_stale(connection):
                    return connection
                await connection.close()
                await pool.release(connection)

        yield _Strategy(acquire, pool.release, password.change)


@asynccontextmanager
async def _ours(dsn: str, password: _Password, opened: _Opened) -> AsyncGenerator[_Strategy]:
    async def fetch() -> Credential:
        return hour_long(await password.change())

    async with TokenManager(fetch) as manager:
        pool: CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
            dsn,
            credentials=manager,
            # Replace at once and not over the last minutes of the token: all of the work falls into the window.
            retire_when="rotated",
            min_size=_CONNECTIONS,
            max_size=_CONNECTIONS,
            init=opened.init,
        )
        async with pool:
            yield _Strategy(pool.acquire, pool.release, manager.refresh, lambda: pool.stats().waits)


_CONTENDERS: Final[Mapping[str, _Open]] = {_NONE: _none, OURS: _ours, _EXPIRE: _expire, _NAIVE: _naive}


class _Contest:
    """One contender, rotation after rotation, and what callers felt around all of them.

    Args:
        open_pool: Opens its pool.
        dsn: Where.
        administrator: Changes the password.
        steady: Seconds before a rotation.
        replaces: Whether connections are replaced at all.
    """

    def __init__(
        self, open_pool: _Open, dsn: str, administrator: AnyConnection, steady: float, *, replaces: bool
    ) -> None:
        self._open_pool = open_pool
        self._dsn = dsn
        self._administrator = administrator
        self._steady = steady
        self._replaces = replaces
        self.around: list[tuple[float, float]] = []

    async def measure(self) -> Metrics:
        """Rotate once."""
        password = _Password(self._administrator)
        opened = _Opened(password)
        async with self._open_pool(self._dsn, password, opened) as strategy:
            waits: list[tuple[float, float]] = []
            tasks = [asyncio.create_task(_work(strategy, waits), name=f"worker {n}") for n in range(_WORKERS)]
            try:
                await asyncio.sleep(_WARM_UP)
                began = time.perf_counter()
                await asyncio.sleep(self._steady)
                waited = 0 if strategy.waited is None else strategy.waited()
                rotation = time.perf_counter()
                await strategy.rotate()
                await asyncio.sleep(max(0.0, rotation + _WINDOW - time.perf_counter()))
                replaced = await _until_replaced(opened, rotation) if self._replaces else rotation + _WINDOW
                waited = 0 if strategy.waited is None else strategy.waited() - waited
            finally:
                for task in tasks:
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            failed = [outcome for outcome in outcomes if not isinstance(outcome, asyncio.CancelledError)]
        until = max(replaced, rotation + _WINDOW)
        self.around += [
            (start - rotation, end - start)
            for start, end in waits
            if -self._steady <= start - rotation and start < until
        ]
        return {
            **_latency("steady", [end - start for start, end in waits if began <= start and end < rotation]),
            **_latency(
                "rotating", [end - start for start, end in waits if end >= rotation and start < rotation + _WINDOW]
            ),
            **_latency("replacing", [end - start for start, end in waits if end >= rotation and start < replaced]),
            "replaced": replaced - rotation,
            "waited": waited,
            "failed": len(failed),
        }


async def _work(strategy: _Strategy, waits: list[tuple[float, float]]) -> None:
    while True:
        start = time.perf_counter()
        connection = await strategy.acquire()
        waits.append((start, time.perf_counter()))
        try:
            await connection.fetchval("SELECT 1")
        finally:
            await strategy.release(connection)
        await asyncio.sleep(_THINK)


async def _until_replaced(opened: _Opened, rotation: float) -> float:
    """Return when as many connections as the pool holds had been opened since the rotation.

    Raises:
        RuntimeError: That takes for ever, and the figures would mean nothing.
    """
    deadline = rotation + _PATIENCE
    while True:
        newer = [moment for moment in opened.at if moment >= rotation]
        if len(newer) >= _CONNECTIONS:
            return newer[_CONNECTIONS - 1]
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{len(newer)} of {_CONNECTIONS} connections replaced in {_PATIENCE:.0f} s")
        await asyncio.sleep(0.02)


def _latency(name: str, waits: list[float]) -> dict[str, float]:
    return {
        f"{name} p50": percentile(waits, 0.50),
        f"{name} p99": percentile(waits, 0.99),
        f"{name} max": max(waits),
    }


async def _measure(conditions: Conditions, way: _Way) -> tuple[Row, ...]:
    server, effort = conditions.server, conditions.effort
    await server.create_role(_ROLE)
    administrator: asyncpg.Connection[Any] = await asyncpg.connect(server.dsn())
    try:
        async with way(server) as dsn:
            contests = {
                name: _Contest(open_pool, dsn, administrator, effort.steady, replaces=name != _NONE)
                for name, open_pool in _CONTENDERS.items()
            }
            turns = {name: contest.measure for name, contest in contests.items()}
            rounds = await play(turns, effort.rotations, conditions)
    finally:
        await administrator.close()
    return tuple(
        Row(name, _figures(rounds, name), moments(contest.around, _STRETCH)) for name, contest in contests.items()
    )


def _figures(rounds: list[Round], name: str) -> tuple[Figure, ...]:
    figures = [
        Figure(f"{when} {what} ms", series(rounds, name, f"{when} {what}", 1e3))
        for when in ("steady", "rotating")
        for what in ("p50", "p99", "max")
    ]
    against_steady = tuple(one[name]["rotating p99"] / one[name]["steady p99"] for one in rounds)
    floor = _FLOOR if name == OURS else None
    figures.append(Figure("p99, own steady = 1", against_steady, at_most=floor, better="lower"))
    if name != _NONE:
        against_untouched = ratios(rounds, name, _NONE, "rotating p99")
        figures.append(Figure("p99, asyncpg untouched = 1", against_untouched, better="lower"))
        figures.append(Figure("ms until all are replaced", series(rounds, name, "replaced", 1e3)))
        figures.append(Figure("p99 until then ms", series(rounds, name, "replacing p99", 1e3)))
    if name == OURS:
        figures.append(Figure("acquires that waited for a connect", series(rounds, name, "waited"), at_most=0))
    figures.append(Figure("failed workers", series(rounds, name, "failed"), at_most=0 if name == OURS else None))
    return tuple(figures)


@asynccontextmanager
async def _in_the_clear(server: PostgresServer) -> AsyncGenerator[str]:
    yield server.dsn(user=_ROLE)


def _cell(name: str, how: str, way: _Way) -> Cell:
    return Cell(
        name=name,
        group="rotation",
        meaning=(
            f"{_WORKERS} workers on {_CONNECTIONS} connections, {how}, the role's password changed by ALTER ROLE: "
            "time to acquire before, and in the second from then on"
        ),
        rounds=lambda effort: effort.rotations,
        measure=lambda conditions: _measure(conditions, way),
    )


CELLS: Final = (
    _cell("rotation", "SCRAM", _in_the_clear),
    _cell("rotation-tls", "SCRAM under TLS with verify-full", lambda server: secured(server, _ROLE)),
)
