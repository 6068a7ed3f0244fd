"""Sessions past the end of their credential: replaced if a newer one can be had, and served on if not."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest
from support import secret

from asyncpool_creds import (
    ConnectionOpened,
    Credential,
    CredentialExpired,
    CredentialUnavailable,
    ExpiredSessionsServed,
    ProviderError,
    ReplacementFailed,
    create_pool,
)
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio
PID = "SELECT pg_backend_pid()"
DOWN = ProviderError("down")
REFUSED = ProviderError("access denied", retryable=False)


async def pids_of(pool, count):
    """Return the servers' process ids of `count` connections, each in use while the others are."""
    proxies = [await pool.acquire() for _ in range(count)]
    pids = [await proxy.fetchval(PID) for proxy in proxies]
    for proxy in proxies:
        await pool.release(proxy)
    return pids


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("error", [DOWN, REFUSED], ids=["down", "refused"])
async def test_an_outage_of_the_source_is_none_of_the_database(cloud, background, error):
    cloud.provider.play(600, error)
    async with cloud.pool(credentials=cloud.manager(background=background)) as pool:
        old = set(await pids_of(pool, 2))
        cloud.clock.advance(700)

        for _ in range(50):
            assert await pool.fetchval(PID) in old
        assert set(await pids_of(pool, 2)) == old

        stats = pool.stats()
        assert stats.past_end == 2
        assert stats.past_end_since == cloud.provider.credentials[0].expires_at
        (served, *more) = cloud.observer.of(ExpiredSessionsServed)
        assert (served.connections, served.since, more) == (2, stats.past_end_since, [])
        assert stats.retired == {}


async def test_an_outage_costs_only_its_first_acquire_an_attempt(cloud):
    cloud.provider.play(600, DOWN)
    async with cloud.pool(credentials=cloud.manager(background=False)) as pool:
        cloud.clock.advance(700)
        for _ in range(50):
            assert await pool.fetchval("SELECT 1") == 1

        assert cloud.provider.calls == 2
        assert pool.stats().waits == 1


@pytest.mark.parametrize("background", [True, False])
async def test_what_was_served_past_its_end_is_replaced_when_the_outage_ends(cloud, background):
    cloud.provider.play(600, DOWN)
    async with cloud.pool(credentials=cloud.manager(background=background)) as pool:
        old = set(await pids_of(pool, 2))
        cloud.clock.advance(700)
        assert set(await pids_of(pool, 2)) == old

        cloud.provider.play(600)
        if background:
            await pool.manager.refresh()
        else:
            cloud.clock.advance(1)  # then a call asks again

        while set(pool.stats().by_generation) != {2}:
            assert await pool.fetchval("SELECT 1") == 1
        assert pool.stats().retired == {"expired": 2}
        assert pool.stats().past_end == 0
        assert cloud.observer.of(ExpiredSessionsServed)[-1].connections == 0
        assert cloud.door.peak_live <= 3


async def test_a_source_that_hangs_costs_an_acquire_a_second_and_no_more(cloud):
    cloud.provider.play(600, cloud.provider.HANG)
    loop = asyncio.get_running_loop()
    async with cloud.pool(credentials=cloud.manager(background=False)) as pool:
        cloud.clock.advance(700)
        started = loop.time()
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20))) == [1] * 20
        assert loop.time() - started < 3

        started = loop.time()
        for _ in range(20):
            assert await pool.fetchval("SELECT 1") == 1
        assert loop.time() - started < 1
        cloud.provider.release()


@pytest.mark.parametrize("fault", ["starting_up", "down", "too_many_connections"])
async def test_a_server_that_takes_no_connects_is_asked_on_while_the_old_ones_serve(cloud, fault):
    async with cloud.pool() as pool:
        old = set(await pids_of(pool, 2))
        setattr(cloud.door, fault, True)
        cloud.clock.advance(700)
        for _ in range(20):
            assert await pool.fetchval(PID) in old
        failure = await cloud.observer.seen(ReplacementFailed, 2)
        assert failure.retry_in <= 5

        cloud.door.clear_faults()
        await cloud.until(lambda: pool.stats().past_end == 0)

        assert not old & set(await pids_of(pool, 2))


async def test_a_connect_that_hangs_costs_an_acquire_a_second_and_no_more(cloud):
    loop = asyncio.get_running_loop()
    async with cloud.pool() as pool:
        old = await pids_of(pool, 2)
        cloud.door.hang_at(Stage.VERIFY)
        cloud.clock.advance(700)
        started = loop.time()
        for _ in range(20):
            assert await pool.fetchval(PID) in old
        assert loop.time() - started < 3
        cloud.door.clear_faults()
        await cloud.until(lambda: pool.stats().past_end == 0)


@pytest.mark.parametrize("background", [True, False])
async def test_a_connection_past_its_end_is_replaced_within_the_acquire(cloud, background):
    async with cloud.pool(credentials=cloud.manager(background=background)) as pool:
        old = set(await pids_of(pool, 2))
        cloud.clock.advance(700)

        assert not old & set(await pids_of(pool, 2))

        assert pool.stats().retired == {"expired": 2}
        assert cloud.observer.of(ExpiredSessionsServed) == []
        assert cloud.door.peak_live == 3


async def test_a_connection_that_ends_in_use_is_kept_until_its_replacement_stands(cloud):
    async with cloud.pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            old = await connection.fetchval(PID)
            cloud.clock.advance(700)
            assert await connection.fetchval(PID) == old

        assert await pool.fetchval(PID) != old
        assert pool.stats().retired == {"expired": 1}


@pytest.mark.parametrize("how", ["drained", "max_lifetime", "ends_session", "refuse"])
async def test_what_is_past_a_real_end_is_never_served(cloud, how):
    arguments = {"max_lifetime": 650} if how == "max_lifetime" else {}
    if how == "refuse":
        arguments["expired_sessions"] = "refuse"
    if how == "ends_session":
        end = cloud.clock.now() + timedelta(seconds=600)
        cloud.provider.play(Credential(secret(), expires_at=end, ends_session=True), DOWN)
    else:
        cloud.provider.play(600, DOWN)
    async with cloud.pool(credentials=cloud.manager(background=False), **arguments) as pool:
        await pids_of(pool, 2)
        cloud.clock.advance(700)
        if how == "drained":
            assert await pool.fetchval("SELECT 1") == 1
            await pool.drain()

        with pytest.raises(CredentialExpired):
            await pool.fetchval("SELECT 1")


async def test_closing_while_an_acquire_waits_for_a_replacement_ends_both(cloud):
    cloud.provider.play(600, cloud.provider.HANG)
    pool = await cloud.pool(max_size=1)
    cloud.clock.advance(700)
    asking = asyncio.create_task(pool.fetchval("SELECT 1"))
    await cloud.provider.called(2)

    async with asyncio.timeout(5):
        await pool.close()
        assert await asking == 1
    with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
        await pool.fetchval("SELECT 1")


async def test_a_cancelled_acquire_leaves_its_connection_in_place(cloud):
    cloud.provider.play(600, cloud.provider.HANG)
    async with cloud.pool(max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(700)
        asking = asyncio.create_task(pool.fetchval(PID))
        await cloud.provider.called(2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

        assert await pool.fetchval(PID) == old
        cloud.provider.release()


async def test_a_deadline_of_the_caller_comes_before_the_replacement(cloud):
    cloud.provider.play(600, cloud.provider.HANG)
    async with cloud.pool(max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(700)
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.1)

        assert await pool.fetchval(PID) == old
        cloud.provider.release()


@pytest.mark.parametrize("value", ["always", None, True, ""])
def test_a_setting_that_does_not_exist_is_told(value):
    with pytest.raises(ValueError, match='expired_sessions must be "serve" or "refuse", not'):
        create_pool("postgresql://app@localhost/app", expired_sessions=value)


async def test_a_credential_that_is_outlived_by_its_connect_is_replaced_at_once(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        first = await pool.fetchval(PID)
        cloud.door.hang_at(Stage.BACKEND_CONNECT)
        await pool.manager.refresh()
        await cloud.door.reached(Stage.BACKEND_CONNECT)
        await pool.manager.refresh()
        cloud.door.clear_faults()

        # The replacement was superseded before it stood, and takes its place all the same.
        await cloud.until(lambda: pool.stats().by_generation == {3: 1})
        assert await pool.fetchval(PID) != first
        generations = [event.generation for event in cloud.observer.of(ConnectionOpened)]
        assert generations == [1, 2, 3]


async def test_a_pool_without_a_session_fails_with_its_source(cloud):
    cloud.provider.play(DOWN)
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(CredentialUnavailable):
            await pool.fetchval("SELECT 1")
        assert pool.stats().past_end == 0
        assert pool.stats().past_end_since is None


async def test_a_session_that_cannot_be_replaced_is_not_closed_for_being_idle(cloud):
    cloud.provider.play(600, DOWN)
    async with cloud.pool(max_inactive_connection_lifetime=0.2) as pool:
        old = set(await pids_of(pool, 2))
        cloud.clock.advance(700)
        assert set(await pids_of(pool, 2)) == old
        await asyncio.sleep(0.5)
        assert set(await pids_of(pool, 2)) == old

        cloud.provider.play(600)
        await pool.manager.refresh()
        await cloud.until(lambda: pool.stats().past_end == 0)
        assert not old & set(await pids_of(pool, 2))


async def test_a_credential_that_is_renewed_past_its_end_saves_its_connections(cloud):
    secret_of_all = secret()

    def renewed():
        return Credential(secret_of_all, expires_at=cloud.clock.now() + timedelta(seconds=600))

    cloud.provider.play(renewed)
    async with cloud.pool(credentials=cloud.manager(background=False), max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(700)

        assert await pool.fetchval(PID) == old
        assert pool.stats().by_generation == {1: 1}
