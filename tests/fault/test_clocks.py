"""Clocks that are stepped, and processes that are suspended, while a pool is in use."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import anyio
import pytest
from fault_world import LIFETIME, PATIENCE, World
from support import secret

from asyncpool_creds import Credential
from asyncpool_creds.testing import VirtualClock

pytestmark = pytest.mark.anyio

HOUR = 3600.0


@pytest.fixture
def true_clock():
    """The time at the server and at the source, whatever this host believes."""
    return VirtualClock()


def server_on(world: World, clock: VirtualClock, lifetime: float):
    """Have the door judge tokens by `clock`; return a source that knows lives, and a list of what it gave."""
    given: dict[str, float] = {}

    async def fetch() -> Credential:
        await asyncio.sleep(0)
        password = secret(f"on-the-true-clock-{len(given) + 1}.")
        given[password] = clock.monotonic() + lifetime
        # As a source does that says expires_in: counted from now, on the clock of this host.
        return Credential(password, expires_at=world.clock.now() + timedelta(seconds=lifetime))

    world.door.verify = lambda _, password: None if clock.monotonic() < given.get(password, 0.0) else "expired"
    return fetch, given


async def reconnect(pool):
    """Force a connect: a query on a connection that stands says nothing about the credential."""
    await pool.expire_connections()
    assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("step", [HOUR, -HOUR], ids=["ahead", "back"])
@pytest.mark.parametrize("retire_when", ["expired", "rotated", "never"])
async def test_a_step_of_this_hosts_clock_fails_no_query(world, true_clock, step, retire_when):
    fetch, given = server_on(world, true_clock, 2 * LIFETIME)
    pool = await world.pool(world.manager(fetch), min_size=2, retire_when=retire_when)
    await reconnect(pool)

    world.clock.step(step)
    for _ in range(8):
        with anyio.fail_after(PATIENCE):
            await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(4)))
            await reconnect(pool)
        for clock in (world.clock, true_clock):
            clock.advance(LIFETIME / 2)

    # 4000 s are two lives; a step ahead looks like one more. Nothing spins.
    assert len(given) <= 5
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def test_a_step_back_does_not_make_an_expired_credential_look_good(world, true_clock):
    fetch, given = server_on(world, true_clock, LIFETIME)
    pool = await world.pool(world.manager(fetch), min_size=1, retire_when="expired")
    for clock in (world.clock, true_clock):
        clock.advance(LIFETIME)

    world.clock.step(-HOUR)
    assert await pool.fetchval("SELECT 1") == 1

    assert world.door.refused == 0
    assert len(given) == 2
    await world.assert_closes(pool)


@pytest.mark.parametrize("retire_when", ["expired", "rotated"])
async def test_a_suspended_process_notices_on_the_next_call(world, retire_when):
    pool = await world.pool(min_size=2, retire_when=retire_when)
    timers = asyncio.get_running_loop().time()

    world.clock.suspend(LIFETIME + 1)
    assert await pool.fetchval("SELECT 1") == 1

    assert pool.manager.stats().generation == 2
    assert world.door.refused == 0
    assert asyncio.get_running_loop().time() - timers < PATIENCE
    await world.until(lambda: set(pool.stats().by_generation) == {2})
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def test_a_short_suspension_leaves_everything_as_it_is(world):
    pool = await world.pool(min_size=2)

    world.clock.suspend(LIFETIME * 0.5)
    assert await pool.fetchval("SELECT 1") == 1

    assert pool.manager.stats().fetches == 1
    assert pool.stats().by_generation == {1: 2}
    await world.assert_closes(pool)


async def test_a_connection_in_use_while_the_process_was_suspended_is_not_interrupted(world):
    pool = await world.pool(min_size=1, retire_when="expired")

    async with pool.acquire() as connection:
        world.clock.suspend(LIFETIME + 1)
        assert await connection.fetchval("SELECT 1") == 1

    assert await pool.fetchval("SELECT 1") == 1
    assert set(pool.stats().by_generation) == {2}
    await world.assert_closes(pool)


async def test_a_pool_without_background_work_notices_too(world):
    pool = await world.pool(world.manager(background=False), min_size=2, retire_when="expired")

    for disturbance in (world.clock.suspend, world.clock.step, world.clock.advance):
        generation = pool.manager.stats().generation
        disturbance(LIFETIME + 1)
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.manager.stats().generation == generation + 1

    assert world.door.refused == 0
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def test_a_source_whose_clock_is_behind_costs_one_refusal_and_no_failed_query(world, true_clock):
    # The source believes that its tokens live longer than the server does.
    fetch, given = server_on(world, true_clock, LIFETIME)
    # With one connect at a time: without a floor, which asyncpg 0.32 would restore beside it, and
    # without a connection that is taken for busy while it is reset, and replaced in advance.
    pool = await world.pool(world.manager(fetch), min_size=0, retire_when="never", wait_for_reset=True)
    assert await pool.fetchval("SELECT 1") == 1

    true_clock.advance(LIFETIME)
    await reconnect(pool)

    assert world.door.refused == 1
    assert len(given) == 2
    await world.assert_closes(pool)
