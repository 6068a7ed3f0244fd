"""The contenders: plain asyncpg, the same once more, and ours; each opened alike on the same role."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
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
    "WAITING",
    "AnyPool",
    "Contender",
    "Reset",
    "Worker",
    "hour_long",
    "workers",
]

AnyPool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Worker: TypeAlias = Callable[[Iterator[int]], Coroutine[Any, Any, None]]
"""Does one operation for each turn it gets; several of them share the turns."""
Reset: TypeAlias = "Callable[[asyncpg.Connection[asyncpg.Record]], Coroutine[Any, Any, None]] | None"
Contender: TypeAlias = Callable[[PostgresServer, int, Reset], AbstractAsyncContextManager[AnyPool]]
"""Opens a pool of so many connections."""

PLAIN: Final = "asyncpg"
# Measured like a contender of its own: how far from 1 it comes out is the noise.
CONTROL: Final = "asyncpg again"
OURS: Final = "asyncpool_creds"
# A release is done when the server has acknowledged the reset, as asyncpg's is.
WAITING: Final = "asyncpool_creds, wait_for_reset"

ROLE: Final = "bench"
PASSWORD: Final = "benchmark-token"


def hour_long(password: str) -> Credential:
    """Return a credential that goes through every check there is and passes for an hour."""
    return Credential(password, expires_at=datetime.now(UTC) + timedelta(hours=1))


def workers(pool: AnyPool) -> dict[str, Worker]:
    """Return those who use `pool`, by the name of what they do."""

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
async def _plain(server: PostgresServer, size: int, reset: Reset) -> AsyncGenerator[AnyPool]:
    dsn = server.dsn(user=ROLE, password=PASSWORD)
    async with asyncpg.create_pool(dsn, min_size=size, max_size=size, max_queries=2**31, reset=reset) as pool:
        yield pool


async def _of_ours(server: PostgresServer, size: int, reset: Reset, *, wait: bool) -> AsyncGenerator[AnyPool]:
    async with TokenManager(lambda: hour_long(PASSWORD)) as manager:
        pool: AnyPool = asyncpool_creds.create_pool(
            server.dsn(user=ROLE),
            credentials=manager,
            min_size=size,
            max_size=size,
            max_queries=2**31,
            reset=reset,
            wait_for_reset=wait,
        )
        async with pool:
            yield pool


_ours: Final = asynccontextmanager(partial(_of_ours, wait=False))
_waiting: Final = asynccontextmanager(partial(_of_ours, wait=True))

CONTENDERS: Final[Mapping[str, Contender]] = {PLAIN: _plain, CONTROL: _plain, OURS: _ours, WAITING: _waiting}
