"""The contenders that are asyncpg pools: plain, the same once more, and ours; all opened alike, on the same role."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, Generic, TypeAlias, TypeVar

import asyncpg

import asyncpool_creds
from asyncpool_creds import Credential, TokenManager
from asyncpool_creds.testing.postgres import PostgresServer

__all__ = [
    "CONTROL",
    "OURS",
    "PASSWORD",
    "PLAIN",
    "POOLS",
    "ROLE",
    "UNRESET",
    "WAITING",
    "AnyContender",
    "AnyPool",
    "Contender",
    "Operation",
    "Reset",
    "TimedOperation",
    "asyncpg_pool",
    "hour_long",
    "our_pool",
]

AnyPool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Reset: TypeAlias = "Callable[[asyncpg.Connection[asyncpg.Record]], Coroutine[Any, Any, None]] | None"
PoolT = TypeVar("PoolT")
Operation: TypeAlias = Callable[[PoolT, Iterator[int]], Coroutine[Any, Any, None]]
"""Works on a pool: does one operation for each turn it gets; several workers share the turns."""
TimedOperation: TypeAlias = Callable[[PoolT, Iterator[int], list[float]], Coroutine[Any, Any, None]]
"""The same, and notes how many seconds each acquire took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender(Generic[PoolT]):
    """Whoever takes part, in his own words.

    Args:
        open: Opens a pool of so many connections.
        operations: What can be done with it, by name. It takes part in the cells of these.
        waiting: Acquire, ``SELECT 1``, release; None: nobody waits for a connection here.
    """

    open: Callable[[PostgresServer, int], AbstractAsyncContextManager[PoolT]]
    operations: Mapping[str, Operation[PoolT]]
    waiting: TimedOperation[PoolT] | None = None


AnyContender: TypeAlias = Contender[Any]

PLAIN: Final = "asyncpg"
# Measured like a contender of its own: how far from 1 it comes out is the noise.
CONTROL: Final = "asyncpg again"
OURS: Final = "asyncpool_creds"
# A release is done when the server has acknowledged the reset, as asyncpg's is.
WAITING: Final = "asyncpool_creds, wait_for_reset"
# Nothing is reset, as in psycopg_pool: for work that leaves nothing behind in its session.
UNRESET: Final = "asyncpool_creds, reset=False"

ROLE: Final = "bench"
PASSWORD: Final = "benchmark-token"


def hour_long(password: str) -> Credential:
    """Return a credential that goes through every check there is and passes for an hour."""
    return Credential(password, expires_at=datetime.now(UTC) + timedelta(hours=1))


# What is done with them


async def _acquire(pool: AnyPool, turns: Iterator[int]) -> None:
    for _ in turns:
        async with pool.acquire():
            pass


async def _select(pool: AnyPool, turns: Iterator[int]) -> None:
    for _ in turns:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")


async def _fetchval(pool: AnyPool, turns: Iterator[int]) -> None:
    for _ in turns:
        await pool.fetchval("SELECT 1")


async def _waiting(pool: AnyPool, turns: Iterator[int], waits: list[float]) -> None:
    for _ in turns:
        asked = time.perf_counter()
        async with pool.acquire() as connection:
            waits.append(time.perf_counter() - asked)
            await connection.fetchval("SELECT 1")


# How they are opened


@asynccontextmanager
async def asyncpg_pool(server: PostgresServer, size: int, *, reset: Reset = None) -> AsyncGenerator[AnyPool]:
    """Open a plain pool of asyncpg."""
    dsn = server.dsn(user=ROLE, password=PASSWORD)
    async with asyncpg.create_pool(dsn, min_size=size, max_size=size, max_queries=2**31, reset=reset) as pool:
        yield pool


@asynccontextmanager
async def our_pool(server: PostgresServer, size: int, **settings: Any) -> AsyncGenerator[AnyPool]:  # create_pool's own
    """Open one of ours, with a token that ends in an hour and what else is set."""
    async with TokenManager(lambda: hour_long(PASSWORD)) as manager:
        pool: AnyPool = asyncpool_creds.create_pool(
            server.dsn(user=ROLE), credentials=manager, min_size=size, max_size=size, max_queries=2**31, **settings
        )
        async with pool:
            yield pool


def _contender(open_pool: Callable[[PostgresServer, int], AbstractAsyncContextManager[AnyPool]]) -> Contender[AnyPool]:
    operations = {"acquire": _acquire, "select": _select, "fetchval": _fetchval}
    return Contender(open=open_pool, operations=operations, waiting=_waiting)


POOLS: Final[Mapping[str, Contender[AnyPool]]] = {
    PLAIN: _contender(asyncpg_pool),
    CONTROL: _contender(asyncpg_pool),
    OURS: _contender(our_pool),
    WAITING: _contender(partial(our_pool, wait_for_reset=True)),
    UNRESET: _contender(partial(our_pool, reset=False)),
}
