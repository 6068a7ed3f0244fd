"""Cancellation at every suspension point of what a pool does, found by counting them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import asyncpg
import pytest
from fault_world import LIFETIME, PATIENCE, World, interrupt_everywhere

import asyncpool_creds
from asyncpool_creds import CredentialPool

pytestmark = pytest.mark.anyio

Run: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
Pool: TypeAlias = CredentialPool[asyncpg.Record]


# What is interrupted.


async def acquire(pool: Pool, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - asyncpg's argument
    return await pool.acquire(timeout=timeout)


async def use(pool: Pool) -> int:
    async with pool.acquire() as connection, connection.transaction():
        return await connection.fetchval("SELECT 1")


async def initialise(pool: Pool) -> Pool:
    return await pool


async def open_and_close(pool: Pool) -> None:
    async with pool:
        await pool.fetchval("SELECT 1")


# The state it is in.


async def warm(world: World, **arguments: Any) -> Pool:
    """Return a pool whose connections are all open and idle."""
    return await world.pool(min_size=2, **arguments)


async def turn_over(world: World, pool: Pool) -> None:
    """Rotate the credential."""
    assert pool.manager is not None
    await pool.manager.refresh()


async def busy_with_a_spare(world: World, **arguments: Any) -> tuple[Pool, list[Any]]:
    """Return a pool whose connections are all in use and superseded, while a replacement stands ready."""
    pool = await warm(world, **arguments)
    held = [await pool.acquire() for _ in range(2)]
    await turn_over(world, pool)
    await world.until(lambda: pool.stats().spare == 1)
    return pool, held


async def come_to_rest(world: World, pool: Pool, *held: Any) -> None:
    """Give back what is held, and check that the pool is whole and can be closed."""
    for connection in held:
        if connection is not None:
            await pool.release(connection)
    await world.assert_serves(pool)
    await world.assert_closes(pool)
    for manager in world.managers:
        await manager.aclose()
    world.managers.clear()


async def two_tries(connection: Any) -> bool:
    await connection.execute("SELECT 1")
    await asyncio.sleep(0)
    return True


def every_other() -> Callable[[Any], Awaitable[bool]]:
    answers = iter([False, True] * 100)

    async def approve(connection: Any) -> bool:
        await asyncio.sleep(0)
        return next(answers)

    return approve


async def talk(connection: Any) -> None:
    await connection.execute("SET search_path TO public")


# Acquire.


async def acquire_from_a_cold_pool(world: World, run: Run) -> None:
    pool = await world.pool()
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_from_a_warm_pool(world: World, run: Run) -> None:
    pool = await warm(world)
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_with_a_timeout_from_a_cold_pool(world: World, run: Run) -> None:
    pool = await world.pool()
    await come_to_rest(world, pool, await run(acquire(pool, timeout=PATIENCE)))


async def acquire_with_a_timeout_from_a_warm_pool(world: World, run: Run) -> None:
    pool = await warm(world)
    await come_to_rest(world, pool, await run(acquire(pool, timeout=PATIENCE)))


async def acquire_with_a_stale_credential(world: World, run: Run) -> None:
    pool = await world.pool()
    await (await pool.acquire()).close()
    world.clock.advance(LIFETIME * 0.9)
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_when_everything_has_expired(world: World, run: Run) -> None:
    pool = await warm(world, retire_when="expired")
    world.clock.advance(LIFETIME)
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_when_the_credential_is_refused(world: World, run: Run) -> None:
    pool = await world.pool()
    await (await pool.acquire()).close()
    world.revoke_all()
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_from_an_expired_pool(world: World, run: Run) -> None:
    pool = await warm(world)
    await pool.expire_connections()
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_during_a_rotation(world: World, run: Run) -> None:
    pool = await warm(world)
    await turn_over(world, pool)
    await come_to_rest(world, pool, await run(acquire(pool)))


async def wait_for_a_busy_pool_with_a_spare(world: World, run: Run) -> None:
    pool, held = await busy_with_a_spare(world)
    release = asyncio.ensure_future(pool.release(held.pop()))
    acquired = await run(acquire(pool))
    await release
    await come_to_rest(world, pool, acquired, *held)


async def wait_with_a_timeout_for_a_busy_pool(world: World, run: Run) -> None:
    pool = await warm(world)
    held = [await pool.acquire() for _ in range(2)]
    release = asyncio.ensure_future(pool.release(held.pop()))
    acquired = await run(acquire(pool, timeout=PATIENCE))
    await release
    await come_to_rest(world, pool, acquired, *held)


async def acquire_after_the_busy_connection_died_with_a_spare_standing(world: World, run: Run) -> None:
    pool, held = await busy_with_a_spare(world)
    await held.pop().close()
    await come_to_rest(world, pool, await run(acquire(pool)), *held)


async def acquire_with_hooks(world: World, run: Run) -> None:
    pool = await world.pool(before_acquire=two_tries, setup=talk, init=talk)
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_with_a_hook_that_turns_down(world: World, run: Run) -> None:
    pool = await warm(world, before_acquire=every_other())
    await come_to_rest(world, pool, await run(acquire(pool)))


async def acquire_and_use(world: World, run: Run) -> None:
    pool = await warm(world)
    await run(use(pool))
    await come_to_rest(world, pool)


async def query_through_the_pool_during_a_rotation(world: World, run: Run) -> None:
    pool = await warm(world)
    await turn_over(world, pool)
    await run(pool.fetchval("SELECT 1"))
    await come_to_rest(world, pool)


# Release.


async def release_of_a_warm_connection(world: World, run: Run) -> None:
    pool = await warm(world)
    connection = await pool.acquire()
    await run(pool.release(connection))
    await come_to_rest(world, pool)


async def release_with_a_timeout(world: World, run: Run) -> None:
    pool = await warm(world)
    connection = await pool.acquire()
    await run(pool.release(connection, timeout=PATIENCE))
    await come_to_rest(world, pool)


async def release_of_a_superseded_connection_with_a_spare(world: World, run: Run) -> None:
    pool, held = await busy_with_a_spare(world)
    await run(pool.release(held.pop()))
    await come_to_rest(world, pool, *held)


async def release_of_an_expired_connection(world: World, run: Run) -> None:
    pool = await warm(world, retire_when="expired")
    connection = await pool.acquire()
    world.clock.advance(LIFETIME)
    await run(pool.release(connection))
    await come_to_rest(world, pool)


async def release_of_a_drained_connection(world: World, run: Run) -> None:
    pool = await warm(world)
    connection = await pool.acquire()
    await pool.drain()
    await run(pool.release(connection))
    await come_to_rest(world, pool)


async def release_with_a_hook(world: World, run: Run) -> None:
    pool = await warm(world, after_release=two_tries)
    connection = await pool.acquire()
    await run(pool.release(connection))
    await come_to_rest(world, pool)


async def release_with_a_hook_that_turns_down(world: World, run: Run) -> None:
    pool = await warm(world, after_release=every_other())
    connection = await pool.acquire()
    await run(pool.release(connection))
    await come_to_rest(world, pool)


async def release_with_a_reset_of_the_users_own(world: World, run: Run) -> None:
    pool = await warm(world, reset=talk)
    connection = await pool.acquire()
    await run(pool.release(connection))
    await come_to_rest(world, pool)


async def release_in_the_middle_of_a_transaction(world: World, run: Run) -> None:
    pool = await warm(world)
    connection = await pool.acquire()
    await connection.execute("BEGIN")
    await run(pool.release(connection))
    await come_to_rest(world, pool)


# The rest of a pool's life.


async def drain_of_an_idle_pool(world: World, run: Run) -> None:
    pool = await warm(world)
    await run(pool.drain())
    await come_to_rest(world, pool)


async def drain_of_a_busy_pool_with_a_spare(world: World, run: Run) -> None:
    pool, held = await busy_with_a_spare(world)
    await run(pool.drain())
    await come_to_rest(world, pool, *held)


async def expiring_the_connections(world: World, run: Run) -> None:
    pool = await warm(world)
    await run(pool.expire_connections())
    await come_to_rest(world, pool)


async def close_of_an_idle_pool(world: World, run: Run) -> None:
    pool = await warm(world)
    await run(pool.close())
    await world.assert_closes(pool)


async def close_of_a_busy_pool_with_a_spare(world: World, run: Run) -> None:
    pool, held = await busy_with_a_spare(world)
    releases = [asyncio.ensure_future(pool.release(connection)) for connection in held]
    await run(pool.close())
    await asyncio.gather(*releases, return_exceptions=True)
    await world.assert_closes(pool)


async def close_in_the_middle_of_a_rotation(world: World, run: Run) -> None:
    pool = await warm(world)
    await turn_over(world, pool)
    await asyncio.sleep(0)
    await run(pool.close())
    await world.assert_closes(pool)


async def close_of_a_pool_that_owns_its_manager(world: World, run: Run) -> None:
    pool = await world.pool(world.mint, min_size=2)
    await run(pool.close())
    await world.assert_closes(pool)
    assert pool.manager is not None
    with pytest.raises(asyncpool_creds.ManagerClosed):
        await pool.manager.get()


async def initialising(world: World, run: Run) -> None:
    pool = world.pool(min_size=2)
    await run(initialise(pool))
    await world.assert_closes(pool)


async def initialising_a_pool_that_owns_its_manager(world: World, run: Run) -> None:
    pool = world.pool(world.mint, min_size=2, init=talk)
    await run(initialise(pool))
    await world.assert_closes(pool)


async def life_as_a_context_manager(world: World, run: Run) -> None:
    pool = world.pool(world.mint, min_size=1)
    await run(open_and_close(pool))
    await world.assert_closes(pool)


async def a_single_connect(world: World, run: Run) -> None:
    dsn = world.door.dsn(sslmode="disable")
    connection = await run(asyncpool_creds.connect(dsn, credentials=world.mint, on_event=world.observer))
    if connection is not None:
        await connection.close()
    await world.assert_nothing_left()


async def a_single_connect_from_a_manager(world: World, run: Run) -> None:
    manager = world.manager()
    dsn = world.door.dsn(sslmode="disable")
    connection = await run(asyncpool_creds.connect(dsn, credentials=manager))
    if connection is not None:
        await connection.close()
    await world.assert_nothing_left()
    assert await manager.get() is manager.current


async def a_single_connect_that_is_refused_at_first(world: World, run: Run) -> None:
    manager = world.manager()
    await manager.get()
    world.revoke_all()
    dsn = world.door.dsn(sslmode="disable")
    connection = await run(asyncpool_creds.connect(dsn, credentials=manager))
    if connection is not None:
        await connection.close()
    await world.assert_nothing_left()


ACQUIRE = [
    acquire_from_a_cold_pool,
    acquire_from_a_warm_pool,
    acquire_with_a_timeout_from_a_cold_pool,
    acquire_with_a_timeout_from_a_warm_pool,
    acquire_with_a_stale_credential,
    acquire_when_everything_has_expired,
    acquire_when_the_credential_is_refused,
    acquire_from_an_expired_pool,
    acquire_during_a_rotation,
    wait_for_a_busy_pool_with_a_spare,
    wait_with_a_timeout_for_a_busy_pool,
    acquire_after_the_busy_connection_died_with_a_spare_standing,
    acquire_with_hooks,
    acquire_with_a_hook_that_turns_down,
    acquire_and_use,
    query_through_the_pool_during_a_rotation,
]
RELEASE = [
    release_of_a_warm_connection,
    release_with_a_timeout,
    release_of_a_superseded_connection_with_a_spare,
    release_of_an_expired_connection,
    release_of_a_drained_connection,
    release_with_a_hook,
    release_with_a_hook_that_turns_down,
    release_with_a_reset_of_the_users_own,
    release_in_the_middle_of_a_transaction,
]
LIFE = [
    drain_of_an_idle_pool,
    drain_of_a_busy_pool_with_a_spare,
    expiring_the_connections,
    close_of_an_idle_pool,
    close_of_a_busy_pool_with_a_spare,
    close_in_the_middle_of_a_rotation,
    close_of_a_pool_that_owns_its_manager,
    initialising,
    initialising_a_pool_that_owns_its_manager,
    life_as_a_context_manager,
    a_single_connect,
    a_single_connect_from_a_manager,
    a_single_connect_that_is_refused_at_first,
]


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
@pytest.mark.parametrize("attempt", [*ACQUIRE, *RELEASE, *LIFE], ids=lambda attempt: attempt.__name__)
async def test_cancelling_anywhere_loses_nothing(world: World, attempt: Any, how: str) -> None:
    async def once(run: Run) -> None:
        await attempt(world, run)
        world.assert_no_complaints()

    await interrupt_everywhere(once, how)


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
async def test_the_harness_finds_every_suspension(how: str) -> None:
    reached: list[list[int]] = []

    async def operation() -> None:
        reached.append([])
        for number in range(5):
            reached[-1].append(number)
            await asyncio.sleep(0.001 * (number % 2))

    async def once(run: Run) -> None:
        await run(operation())

    assert await interrupt_everywhere(once, how) == 5
    assert [len(numbers) for numbers in reached] == [1, 2, 3, 4, 5, 5]
