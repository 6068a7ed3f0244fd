"""The contenders: plain asyncpg, the same once more, and ours; each opened alike on the same role."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

import asyncpg

import asyncpool_creds
from asyncpool_creds import Credential, TokenManager
from asyncpool_creds.testing.postgres import PostgresServer

__all__ = [
    "CONTENDERS",
    "CONTROL",
    "OURS",
    "PASSWORD",
    "PLAIN",
    "ROLE",
    "AnyPool",
    "Contender",
    "Reset",
    "Worker",
    "hour_long",
]

AnyPool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Worker: TypeAlias = Callable[[Iterator[int]], Coroutine[Any, Any, None]]
"""Does one operation for each turn it gets; several of them share the turns."""
Reset: TypeAlias = "Callable[[asyncpg.Connection[asyncpg.Record]], Coroutine[Any, Any, None]] | None"
Contender: TypeAlias = Callable[[PostgresServer, int, Reset], AbstractAsyncContextManager[Mapping[str, Worker]]]
"""Opens a pool of so many connections and gives its workers by the name of what they do."""

PLAIN: Final = "asyncpg"
# Measured like a contender of its own: how far from 1 it comes out is the noise.
CONTROL: Final = "asyncpg again"
OURS: Final = "asyncpool_creds"

ROLE: Final = "bench"
PASSWORD: Final = "benchmark-token"


def hour_long(password: str) -> Credential:
    """Return a credential that goes through every check there is and passes for an hour."""
    return Credential(password, expires_at=datetime.now(UTC) + timedelta(hours=1))


def _workers(pool: AnyPool) -> dict[str, Worker]:
    async def acquire(turns: Iterator[int]) -> None:
        for _ in turns:
            async with pool.acquire():
                pass

    async def select(turns: Iterator[int]) -> None:
        for _ in turns:
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT 1")

    async def fetchval(turns: Iterator[int]) -> None:
        for _ in turns:
            await pool.fetchval("SELECT 1")

    return {"acquire": acquire, "select": select, "fetchval": fetchval}


@asynccontextmanager
async def _plain(server: PostgresServer, size: int, reset: Reset) -> AsyncGenerator[Mapping[str, Worker]]:
    dsn = server.dsn(user=ROLE, password=PASSWORD)
    async with asyncpg.create_pool(dsn, min_size=size, max_size=size, max_queries=2**31, reset=reset) as pool:
        yield _workers(pool)


@asynccontextmanager
async def _ours(server: PostgresServer, size: int, reset: Reset) -> AsyncGenerator[Mapping[str, Worker]]:
    async with TokenManager(lambda: hour_long(PASSWORD)) as manager:
        pool: AnyPool = asyncpool_creds.create_pool(
            server.dsn(user=ROLE),
            credentials=manager,
            min_size=size,
            max_size=size,
            max_queries=2**31,
            reset=reset,
        )
        async with pool:
            yield _workers(pool)


CONTENDERS: Final[Mapping[str, Contender]] = {PLAIN: _plain, CONTROL: _plain, OURS: _ours}
