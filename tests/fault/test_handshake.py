"""A door that hangs, kills or refuses at each stage of the handshake."""

from __future__ import annotations

import asyncio

import anyio
import asyncpg
import pytest
from fault_world import LIFETIME, PATIENCE, World
from support import assert_no_secret

import asyncpool_creds
from asyncpool_creds import ConnectionOpened, ReplacementFailed
from asyncpool_creds.testing.door import Stage, TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

TLS_STAGES = {Stage.TLS_REQUEST, Stage.TLS_HANDSHAKE}
# How long the acquire under test may take; the fault never ends by itself, so this is not a race.
SHORT = 0.05


@pytest.fixture(params=Stage, ids=lambda stage: stage.name.lower())
def stage(request):
    return request.param


@pytest.fixture(params=["serve", "refuse"])
async def world(server: PostgresServer, stage, request):
    world = World(server, expired_sessions=request.param)
    if stage in TLS_STAGES:
        world.door = TokenDoor(server, world.verify, tls=True)
        world.sslmode = "require"
    async with world:
        yield world


async def recovers(world, pool):
    world.door.clear_faults()
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def use(pool):
    # A door that hangs once the client may ask is noticed by the query.
    async with pool.acquire(timeout=SHORT) as connection:
        await connection.fetchval("SELECT 1", timeout=SHORT)


async def test_acquire_times_out_at_a_door_that_hangs_and_the_pool_recovers(world, stage):
    pool = await world.pool()
    world.door.hang_at(stage)

    with anyio.fail_after(PATIENCE), pytest.raises(TimeoutError):
        await use(pool)

    # The one that hung has let go of its slot and of the door.
    assert pool.get_size() == 0
    await recovers(world, pool)


async def test_more_acquires_than_there_are_slots_time_out_at_a_door_that_hangs(world, stage):
    pool = await world.pool()
    world.door.hang_at(stage)

    with anyio.fail_after(PATIENCE):
        outcomes = await asyncio.gather(*(use(pool) for _ in range(5)), return_exceptions=True)

    assert [type(one) for one in outcomes] == [TimeoutError] * 5
    await recovers(world, pool)


async def test_acquire_is_cancelled_at_a_door_that_hangs_and_the_pool_recovers(world, stage):
    pool = await world.pool()
    world.door.hang_at(stage)
    waiting = asyncio.ensure_future(pool.acquire())
    await world.door.reached(stage)

    waiting.cancel()
    await asyncio.wait([waiting])

    assert waiting.cancelled()
    await recovers(world, pool)


async def test_acquire_fails_at_a_door_that_kills_and_the_pool_recovers(world, stage):
    pool = await world.pool()
    world.door.kill_at(stage)

    with anyio.fail_after(PATIENCE), pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
        async with pool.acquire() as connection:
            await connection.execute("SELECT 1")

    await recovers(world, pool)


async def test_a_kill_while_acquire_waits_is_an_error_and_not_a_hang(world, stage):
    pool = await world.pool()
    world.door.hang_at(stage)
    waiting = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await world.door.reached(stage)

    world.door.kill_connections()

    with anyio.fail_after(PATIENCE), pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
        await waiting
    await recovers(world, pool)


async def test_a_first_fill_that_fails_leaves_nothing_open(world, stage):
    world.door.kill_at(stage, times=10)
    pool = world.pool(min_size=2)

    with anyio.fail_after(PATIENCE):
        try:
            await pool
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            assert_no_secret(error)

    world.door.clear_faults()
    await world.assert_closes(pool)


async def test_a_rotation_at_a_door_that_kills_serves_on_with_the_old_connections(world, stage):
    pool = await world.pool(min_size=2)
    world.door.kill_at(stage)

    await pool.manager.refresh()
    with anyio.fail_after(PATIENCE):
        # Where the door says that all is well and hangs up then, the connect has succeeded.
        if stage is not Stage.READY:
            await world.observer.seen(ReplacementFailed)
            assert await pool.fetchval("SELECT 1") == 1

    await recovers(world, pool)


async def test_close_does_not_wait_for_a_replacement_that_hangs(world, stage):
    pool = await world.pool(min_size=2)
    world.door.hang_at(stage)
    await pool.manager.refresh()
    await world.door.reached(stage)

    await world.assert_closes(pool)


# Once the client may ask, the handshake is over, and what hangs is a connection like any other.
@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.READY], ids=lambda one: one.name)
async def test_queries_go_on_while_a_replacement_hangs(world, stage):
    pool = await world.pool(min_size=2)
    world.door.hang_at(stage, times=1)
    await pool.manager.refresh()
    await world.door.reached(stage)

    for _ in range(5):
        assert await pool.fetchval("SELECT 1") == 1

    await recovers(world, pool)


async def test_a_replacement_that_hung_goes_on_once_the_door_does(world, stage):
    pool = await world.pool(min_size=2)
    world.door.hang_at(stage, times=1)
    await pool.manager.refresh()
    await world.door.reached(stage)

    world.door.clear_faults()
    with anyio.fail_after(PATIENCE):
        await world.until(lambda: pool.stats().by_generation == {2: 2})

    assert [event.replacement for event in world.observer.of(ConnectionOpened)] == [False, False, True, True]
    assert world.door.peak_live <= 3
    await recovers(world, pool)


async def test_the_credential_may_rotate_while_the_handshake_hangs(world, stage):
    pool = await world.pool()
    world.door.hang_at(stage, times=1)
    acquiring = asyncio.ensure_future(pool.acquire())
    await world.door.reached(stage)

    await pool.manager.refresh()
    world.door.clear_faults()
    connection = await acquiring

    # The stamp tells the truth: opened with the first credential, so it is one to be replaced.
    assert pool.stats().by_generation == {1: 1}
    await pool.release(connection)
    await world.until(lambda: 1 not in pool.stats().by_generation)
    await recovers(world, pool)


@pytest.mark.parametrize(
    "stage", [stage for stage in Stage if stage is not Stage.READY], ids=lambda stage: stage.name.lower()
)
async def test_a_single_connect_times_out_and_leaves_nothing(world, stage):
    world.door.hang_at(stage)

    with anyio.fail_after(PATIENCE), pytest.raises(TimeoutError):
        await asyncpool_creds.connect(
            world.door.dsn(sslmode=world.sslmode), credentials=world.mint, timeout=SHORT, on_event=world.observer
        )

    await world.assert_nothing_left()


async def test_connections_that_expire_during_the_handshake_are_not_handed_out(world, stage):
    pool = await world.pool(retire_when="expired")
    world.door.hang_at(stage, times=1)
    acquiring = asyncio.ensure_future(pool.acquire())
    await world.door.reached(stage)

    world.clock.advance(LIFETIME)
    world.door.clear_faults()
    connection = await acquiring

    assert await connection.fetchval("SELECT 1") == 1
    assert pool.stats().by_generation == {2: 1}
    await pool.release(connection)
    await recovers(world, pool)
