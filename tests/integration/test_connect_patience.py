"""`connect_patience`: an acquire that has to connect waits for a server that will take connections again."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from asyncpool_creds import ConnectFailed, create_pool
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio
PID = "SELECT pg_backend_pid()"
FAULTS = ["down", "starting_up", "too_many_connections"]


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_acquire_waits_until_the_server_takes_connections_again(cloud, fault):
    async with cloud.pool(max_size=4, min_size=0, connect_patience=10) as pool:
        setattr(cloud.door, fault, True)
        asking = [asyncio.create_task(pool.fetchval("SELECT 1")) for _ in range(20)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in asking)

        cloud.door.clear_faults()

        assert await asyncio.gather(*asking) == [1] * 20


async def test_all_who_wait_make_one_attempt_at_a_time(cloud):
    async with cloud.pool(max_size=10, min_size=0, connect_patience=10) as pool:
        cloud.door.starting_up = True
        asking = [asyncio.create_task(pool.fetchval("SELECT 1")) for _ in range(20)]
        await cloud.door.until(lambda: cloud.door.attempts >= 10)
        before = cloud.door.attempts
        await asyncio.sleep(1)
        assert cloud.door.attempts - before <= 12
        cloud.door.clear_faults()
        await asyncio.gather(*asking)


@pytest.mark.parametrize("patience", [0, 0.3])
async def test_the_error_is_asyncpgs_own_when_the_patience_has_ended(cloud, patience):
    async with cloud.pool(max_size=1, min_size=0, connect_patience=timedelta(seconds=patience)) as pool:
        cloud.door.starting_up = True
        with pytest.raises(asyncpg.CannotConnectNowError) as caught:
            await pool.fetchval("SELECT 1")

    assert ("connect_patience" in str(caught.value.__notes__)) == bool(patience)


async def test_a_deadline_of_the_caller_ends_it_sooner(cloud):
    async with cloud.pool(max_size=1, min_size=0, connect_patience=60) as pool:
        cloud.door.starting_up = True
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.2)
        cloud.door.clear_faults()

        assert await pool.fetchval("SELECT 1", timeout=5) == 1


async def test_a_credential_that_was_never_accepted_is_no_reason_to_wait(cloud):
    async with cloud.pool(max_size=1, min_size=0, connect_patience=60) as pool:
        cloud.refuses_all = True
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await pool.fetchval("SELECT 1")


async def test_a_refusal_passes_where_credentials_were_accepted_before(cloud):
    async with cloud.pool(max_size=1, min_size=1, connect_patience=60) as pool:
        cloud.refuses_all = True
        cloud.door.kill_connections()
        await cloud.until(lambda: pool.get_size() == 0)
        asking = asyncio.create_task(pool.fetchval("SELECT 1"))
        await cloud.observer.seen(ConnectFailed)
        cloud.refuses_all = False

        assert await asking == 1


@pytest.mark.parametrize("fast_path", [True, False])
async def test_whoever_waits_is_served_by_a_connection_that_comes_back(cloud, fast_path):
    async with cloud.pool(max_size=2, min_size=0, connect_patience=60, fast_path=fast_path) as pool:
        held = await pool.acquire()
        pid = await held.fetchval(PID)
        cloud.door.starting_up = True
        asking = [asyncio.create_task(pool.fetchval(PID)) for _ in range(4)]
        await cloud.observer.seen(ConnectFailed)
        await pool.release(held)

        assert await asyncio.gather(*asking) == [pid] * 4
        assert pool.get_size() == 1
        assert cloud.door.accepted == 1


async def test_a_connection_that_comes_too_late_for_its_caller_is_kept(cloud):
    async with cloud.pool(max_size=2, min_size=0, connect_patience=60) as pool:
        held = await pool.acquire()
        cloud.door.hang_at(Stage.VERIFY)
        asking = asyncio.create_task(pool.fetchval("SELECT 1"))
        await cloud.door.reached(Stage.VERIFY)
        await pool.release(held)
        assert await asking == 1

        cloud.door.clear_faults()
        await cloud.until(lambda: pool.get_size() == 2)
        assert pool.stats().idle == 2


async def test_closing_the_pool_sends_those_away_who_wait(cloud):
    pool = await cloud.pool(max_size=2, min_size=0, connect_patience=60)
    cloud.door.starting_up = True
    asking = [asyncio.create_task(pool.fetchval("SELECT 1")) for _ in range(2)]
    await cloud.door.until(lambda: cloud.door.attempts >= 2)

    async with asyncio.timeout(5):
        await pool.close()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)

    assert [(type(error), str(error)) for error in outcomes] == [(asyncpg.InterfaceError, "pool is closing")] * 2


async def test_the_first_fill_does_not_wait(cloud):
    cloud.door.starting_up = True
    with pytest.raises(asyncpg.CannotConnectNowError):
        await cloud.pool(min_size=1, connect_patience=60)


async def test_a_pool_without_credentials_waits_too(cloud):
    async with create_pool(cloud.server.dsn(), min_size=0, max_size=1, connect_patience=10) as pool:
        assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("value", [-1, float("inf"), "long", None])
def test_a_patience_that_makes_no_sense_is_told(value):
    with pytest.raises(ValueError, match="connect_patience"):
        create_pool("postgresql://app@localhost/app", connect_patience=value)
