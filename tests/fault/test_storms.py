"""Everything at once, in a random order that a seed repeats."""

from __future__ import annotations

import asyncio
import random

import anyio
import asyncpg
import pytest
from fault_world import LIFETIME, PATIENCE, World
from support import assert_no_secret

from asyncpool_creds import CredentialExpired

pytestmark = pytest.mark.anyio

ITERATIONS = 150
# InternalClientError is what asyncpg says of a connection that was killed while its user was being cancelled;
# its own pool fares no better in this storm.
TROUBLES = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    CredentialExpired,
)
# Before 0.32 it leaves a future behind now and then if a connection is killed while a query on it is being cancelled,
# and its close(), if cancelled while it waits for a query, leaves the timer of that query running.
SURVIVES_KILLS = hasattr(asyncpg.Pool, "get_init_size")


async def ticks(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def caller(pool, chance, *, patient=False):
    """Use the pool in one of the ways there are; the patient cancel no query."""
    way = chance.choice([1, 3]) if patient else chance.randrange(6)
    timeout = chance.choice([None, None, 0.001, PATIENCE])
    if way == 0:
        await pool.fetchval("SELECT 1", timeout=timeout)
    elif way == 1:
        async with pool.acquire(timeout=timeout) as connection, connection.transaction():
            await connection.execute("SELECT 1")
            await ticks(chance.randrange(10))
    elif way == 2:
        connection = await pool.acquire(timeout=timeout)
        try:
            await connection.execute("SELECT pg_sleep(0.001)")
        finally:
            await pool.release(connection)
    elif way == 3:
        async with pool.acquire(timeout=timeout) as connection:
            await connection.close()
    elif way == 4:
        async with asyncio.timeout(0.002), pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
    else:
        with anyio.move_on_after(0.001 * chance.random()):
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT 1")


async def disturb(world, pool, chance, callers):
    """Do one of the things that happen to a pool."""
    what = chance.randrange(10)
    if what in (0, 1) and not SURVIVES_KILLS:
        await asyncio.wait(callers)
        # One who was cancelled has left its release behind.
        await world.until(lambda: pool.stats().in_use == 0)
    if what == 0:
        world.door.kill_connections()
    elif what == 1:
        world.door.close_connections()
    elif what in (2, 3, 4):
        await pool.manager.refresh()
    elif what == 5:
        await pool.expire_connections()
    elif what == 6:
        await pool.drain()
    elif what == 7:
        world.clock.advance(LIFETIME * chance.choice([0.1, 0.5, 0.9, 1.0]))
    elif what == 8:
        world.revoke_all()
    else:
        world.clock.step(chance.choice([-3600.0, 3600.0]))


@pytest.mark.parametrize("retire_when", ["expired", "rotated"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_a_storm_loses_no_slot_and_duplicates_none(world: World, retire_when, seed):
    chance = random.Random(seed)
    pool = await world.pool(
        min_size=chance.choice([0, 1, 3]),
        max_size=3,
        retire_when=retire_when,
        max_lifetime=chance.choice([None, LIFETIME / 2]),
        max_inactive_connection_lifetime=chance.choice([0.002, 300.0]),
    )
    for iteration in range(ITERATIONS):
        callers = [asyncio.ensure_future(caller(pool, chance)) for _ in range(chance.randrange(1, 8))]
        await ticks(chance.randrange(30))
        disturbance = asyncio.ensure_future(disturb(world, pool, chance, callers))
        await ticks(chance.randrange(10))
        for task in chance.sample(callers, k=chance.randrange(len(callers) + 1)):
            task.cancel()
            await ticks(chance.randrange(3))
        with anyio.fail_after(PATIENCE):
            outcomes = await asyncio.gather(*callers, disturbance, return_exceptions=True)

        unexpected = [one for one in outcomes if isinstance(one, Exception) and not isinstance(one, TROUBLES)]
        assert not unexpected
        assert_no_secret(*(one for one in outcomes if isinstance(one, Exception)))
        if iteration % 10 == 9:
            # A last credential may still be refused, and a connection have been killed unnoticed.
            await calm(world, pool)
            await world.assert_serves(pool)
            world.assert_no_complaints()

    await calm(world, pool)
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def calm(world, pool):
    """Let the pool find out what has happened to its connections and its credential."""
    world.clock.advance(100.0)
    await pool.manager.refresh()
    await pool.expire_connections()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_closing_in_the_middle_of_a_storm_leaves_nothing(world: World, seed):
    chance = random.Random(seed)
    for _ in range(25):
        pool = await world.pool(world.mint, min_size=chance.choice([0, 2]))
        callers = [asyncio.ensure_future(caller(pool, chance, patient=not SURVIVES_KILLS)) for _ in range(4)]
        await ticks(chance.randrange(40))
        refresh = asyncio.ensure_future(pool.manager.refresh())
        await ticks(chance.randrange(40))
        closing = asyncio.ensure_future(pool.close())
        if chance.random() < 0.5 and SURVIVES_KILLS:
            await ticks(chance.randrange(20))
            closing.cancel()
        elif chance.random() < 0.5:
            await ticks(chance.randrange(20))
            pool.terminate()

        with anyio.fail_after(PATIENCE):
            await asyncio.gather(*callers, refresh, closing, return_exceptions=True)

        await world.assert_closes(pool)


async def test_an_event_loop_that_ends_with_a_pool_in_use_says_nothing(world: World):
    """What asyncio.run() does at its end: cancel everything that is left."""
    pool = await world.pool(min_size=2)
    held = await pool.acquire()
    waiting = [asyncio.ensure_future(pool.acquire()) for _ in range(5)]
    world.provider.play(world.source().HANG)
    refreshing = asyncio.ensure_future(pool.manager.refresh())
    await world.provider.called(2)
    await ticks(5)

    for task in world.tasks():
        task.cancel()
    with anyio.fail_after(PATIENCE):
        await asyncio.gather(*waiting, refreshing, return_exceptions=True)

    world.provider.play(world.mint)
    for task in waiting:
        if not task.cancelled() and task.exception() is None:
            await pool.release(task.result())
    await pool.release(held)
    world.clock.advance(10.0)
    await world.assert_serves(pool)
    await world.assert_closes(pool)
