"""A manager feeds whatever takes a function for a password: asyncpg, psycopg's pool, SQLAlchemy's engine."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

pytestmark = pytest.mark.anyio


async def test_asyncpg_takes_a_manager_for_a_password(cloud):
    manager = cloud.manager()
    connection = await asyncpg.connect(cloud.dsn(), password=manager)
    await connection.close()
    await manager.refresh()
    async with asyncpg.create_pool(cloud.dsn(), password=manager, min_size=1, max_size=1) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert cloud.presented == [1, 2]


async def test_psycopg_pool_takes_a_function_for_its_arguments(cloud):
    manager = cloud.manager()

    async def arguments() -> dict[str, Any]:
        return {"password": await manager()}

    async with AsyncConnectionPool(cloud.dsn(), kwargs=arguments, min_size=1, max_size=1, open=False) as pool:
        async with pool.connection() as connection:
            await connection.execute("SELECT 1")
        await manager.refresh()
        async with pool.connection() as connection:
            await connection.close()
        async with pool.connection() as connection:
            await connection.execute("SELECT 1")

    assert cloud.presented[0] == 1
    assert cloud.presented[-1] == 2


async def test_sqlalchemy_takes_a_manager_among_its_connect_arguments(cloud):
    manager = cloud.manager()
    url = f"postgresql+asyncpg://app@{cloud.door.host}:{cloud.door.port}/postgres"
    engine = create_async_engine(url, connect_args={"password": manager, "ssl": False})
    try:
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
            await connection.invalidate()
        await manager.refresh()
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
    finally:
        await engine.dispose()

    assert cloud.presented == [1, 2]
