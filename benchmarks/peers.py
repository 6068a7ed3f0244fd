"""The contenders that are no asyncpg pools: psycopg's pool, SQLAlchemy's, and connections held by hand, without any."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import asyncpg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks.pools import PASSWORD, ROLE, AnyContender, Contender

__all__ = ["HELD", "HELD_UNRESET", "PEERS", "PSYCOPG", "PSYCOPG_RESET", "SQLALCHEMY"]

PSYCOPG: Final = "psycopg_pool"
PSYCOPG_RESET: Final = "psycopg_pool, asyncpg's reset"
SQLALCHEMY: Final = "SQLAlchemy on asyncpg"
# What is left when there is no pool: nobody who resets can be faster for long.
HELD: Final = "held by hand, reset"
HELD_UNRESET: Final = "held by hand"

AnyConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PsycopgPool: TypeAlias = "AsyncConnectionPool[AsyncConnection[tuple[Any, ...]]]"


def _dsn(server: PostgresServer) -> str:
    return server.dsn(user=ROLE, password=PASSWORD)


# psycopg_pool


@asynccontextmanager
async def _psycopg(server: PostgresServer, size: int, *, with_reset: bool) -> AsyncGenerator[PsycopgPool]:
    query = (await _reset_query(server)).encode()

    async def reset(connection: AsyncConnection[tuple[Any, ...]]) -> None:
        # Four statements in one message, as asyncpg sends them.
        await connection.execute(query, prepare=False)

    pool: PsycopgPool = AsyncConnectionPool(
        _dsn(server),
        # As asyncpg works: no transaction that nobody asked for.
        kwargs={"autocommit": True},
        min_size=size,
        max_size=size,
        reset=reset if with_reset else None,
        open=False,
    )
    async with pool:
        await pool.wait()
        yield pool


async def _reset_query(server: PostgresServer) -> str:
    connection: AnyConnection = await asyncpg.connect(_dsn(server))
    try:
        return str(connection.get_reset_query())
    finally:
        await connection.close()


async def _psycopg_acquire(pool: PsycopgPool, turns: Iterator[int]) -> None:
    for _ in turns:
        async with pool.connection():
            pass


async def _psycopg_select(pool: PsycopgPool, turns: Iterator[int]) -> None:
    for _ in turns:
        async with pool.connection() as connection:
            cursor = await connection.execute("SELECT 1")
            await cursor.fetchone()


async def _psycopg_waiting(pool: PsycopgPool, turns: Iterator[int], waits: list[float]) -> None:
    for _ in turns:
        asked = time.perf_counter()
        async with pool.connection() as connection:
            waits.append(time.perf_counter() - asked)
            cursor = await connection.execute("SELECT 1")
            await cursor.fetchone()


def _of_psycopg(*, with_reset: bool) -> Contender[PsycopgPool]:
    return Contender(
        open=partial(_psycopg, with_reset=with_reset),
        operations={"acquire": _psycopg_acquire, "select": _psycopg_select},
        waiting=_psycopg_waiting,
    )


# SQLAlchemy


@asynccontextmanager
async def _sqlalchemy(server: PostgresServer, size: int) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(
        make_url(_dsn(server)).set(drivername="postgresql+asyncpg"),
        # No more connections than the others have, and no transaction that nobody asked for.
        pool_size=size,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",
    )
    try:
        async with AsyncExitStack() as connections:
            # Its pool fills on demand; the others' are full when they are open.
            for _ in range(size):
                await connections.enter_async_context(engine.connect())
        yield engine
    finally:
        await engine.dispose()


async def _sqlalchemy_acquire(engine: AsyncEngine, turns: Iterator[int]) -> None:
    for _ in turns:
        async with engine.connect():
            pass


async def _sqlalchemy_select(engine: AsyncEngine, turns: Iterator[int]) -> None:
    for _ in turns:
        async with engine.connect() as connection:
            (await connection.exec_driver_sql("SELECT 1")).scalar()


async def _sqlalchemy_waiting(engine: AsyncEngine, turns: Iterator[int], waits: list[float]) -> None:
    for _ in turns:
        asked = time.perf_counter()
        async with engine.connect() as connection:
            waits.append(time.perf_counter() - asked)
            (await connection.exec_driver_sql("SELECT 1")).scalar()


# No pool


@asynccontextmanager
async def _held(server: PostgresServer, size: int) -> AsyncGenerator[list[AnyConnection]]:
    async with AsyncExitStack() as closing:
        connections: list[AnyConnection] = []
        for _ in range(size):
            connection: AnyConnection = await asyncpg.connect(_dsn(server))
            closing.push_async_callback(connection.close)
            connections.append(connection)
        yield connections


async def _held_select(connections: list[AnyConnection], turns: Iterator[int], *, with_reset: bool) -> None:
    if not connections:
        # As many lanes as connections: who comes later leaves his turns to those who have one.
        return
    connection = connections.pop()
    try:
        for _ in turns:
            await connection.fetchval("SELECT 1")
            if with_reset:
                await connection.reset()
    finally:
        connections.append(connection)


def _by_hand(*, with_reset: bool) -> Contender[list[AnyConnection]]:
    select = partial(_held_select, with_reset=with_reset)
    return Contender(open=_held, operations={"select": select, "fetchval": select})


PEERS: Final[Mapping[str, AnyContender]] = {
    HELD: _by_hand(with_reset=True),
    HELD_UNRESET: _by_hand(with_reset=False),
    PSYCOPG: _of_psycopg(with_reset=False),
    PSYCOPG_RESET: _of_psycopg(with_reset=True),
    SQLALCHEMY: Contender(
        open=_sqlalchemy,
        operations={"acquire": _sqlalchemy_acquire, "select": _sqlalchemy_select},
        waiting=_sqlalchemy_waiting,
    ),
}
