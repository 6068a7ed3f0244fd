"""When a connection is no longer handed out, and that this hurts nobody."""

import asyncio

import asyncpg
import pytest
from support import secret

from asyncpool_creds import ConnectionOpened, ConnectionRetired, Credential, create_pool
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio

PID = "SELECT pg_backend_pid()"


def on_demand(cloud, **arguments):
    """A manager without background work, so that nothing is replaced before acquire looks at it."""
    return cloud.manager(background=False, **arguments)


# The credential's end.


async def test_an_idle_connection_past_its_credentials_end_is_replaced_within_the_same_acquire(cloud):
    async with cloud.pool(credentials=on_demand(cloud), max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(599)
        assert await pool.fetchval(PID) == old
        cloud.clock.advance(1)

        assert await pool.fetchval(PID) != old
        assert (cloud.presented, pool.get_size()) == ([1, 2], 1)
        assert pool.stats().retired == {"expired": 1}
        assert pool.stats().by_generation == {2: 1}


async def test_a_connection_that_expires_in_use_is_not_interrupted_and_closed_on_release(cloud):
    async with cloud.pool(credentials=on_demand(cloud), max_size=1, expired_sessions="refuse") as pool:
        async with pool.acquire() as connection, connection.transaction():
            old = await connection.fetchval(PID)
            cloud.clock.advance(700)
            assert await connection.fetchval(PID) == old
        await cloud.door.until(lambda: cloud.door.live == 0)
        assert pool.stats().retired == {"expired": 1}

        assert await pool.fetchval(PID) != old
        assert cloud.door.peak_live == 1


async def test_setup_never_sees_a_connection_past_its_end(cloud):
    seen = []

    async def setup(connection):
        seen.append(await connection.fetchval(PID))

    async with cloud.pool(credentials=on_demand(cloud), max_size=1, setup=setup) as pool:
        first = await pool.fetchval(PID)
        cloud.clock.advance(700)
        second = await pool.fetchval(PID)

    assert seen == [first, second]
    assert first != second


@pytest.mark.parametrize("retire_when", ["expired", "rotated"])
async def test_an_expired_connection_is_not_handed_out_when_no_new_one_can_be_opened(cloud, retire_when):
    arguments = {"credentials": on_demand(cloud), "retire_when": retire_when, "expired_sessions": "refuse"}
    async with cloud.pool(max_size=1, **arguments) as pool:
        await pool.fetchval(PID)
        cloud.clock.advance(700)
        cloud.door.starting_up = True

        with pytest.raises(asyncpg.CannotConnectNowError):
            await pool.fetchval(PID)
        cloud.door.clear_faults()

        assert await pool.fetchval("SELECT 1") == 1


async def test_never_leaves_connections_alone_whatever_their_credential(cloud):
    async with cloud.pool(max_size=1, retire_when="never") as pool:
        old = await pool.fetchval(PID)
        await pool.manager.refresh()
        cloud.clock.advance(10_000)

        assert await pool.fetchval(PID) == old
        assert (cloud.presented, pool.stats().retired) == ([1], {})


async def test_rotated_replaces_idle_connections_as_soon_as_there_is_a_newer_credential(cloud):
    cloud.provider.play(None)
    async with cloud.pool(retire_when="rotated") as pool:
        await pool.manager.refresh()
        await cloud.observer.seen(ConnectionRetired, 2)

        assert cloud.presented == [1, 1, 2, 2]
        assert pool.stats().retired == {"rotated": 2}
        assert pool.stats().by_generation == {2: 2}


async def test_rotated_hands_a_superseded_connection_out_until_its_replacement_stands(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        old = await pool.fetchval(PID)
        cloud.door.hang_at(Stage.VERIFY)
        await pool.manager.refresh()
        await cloud.door.reached(Stage.VERIFY)

        assert await pool.fetchval(PID) == old
        cloud.door.clear_faults()
        await cloud.observer.seen(ConnectionRetired)

        assert await pool.fetchval(PID) != old
        assert pool.stats().waits == 0


async def test_expired_does_not_replace_connections_of_a_credential_that_never_expires(cloud):
    cloud.provider.play(None)
    async with cloud.pool(max_size=1) as pool:
        old = await pool.fetchval(PID)
        await pool.manager.refresh()
        cloud.clock.advance(1_000_000)

        assert await pool.fetchval(PID) == old
        assert cloud.presented == [1]


async def test_a_renewed_secret_moves_the_end_of_the_connections_that_were_opened_with_it(cloud):
    ends = [cloud.provider.mint(seconds).expires_at for seconds in (100, 1000)]
    cloud.provider.play(*(Credential(secret("lease"), expires_at=end) for end in ends))
    async with cloud.pool(credentials=on_demand(cloud), max_size=1) as pool:
        old = await pool.fetchval(PID)
        await pool.manager.refresh()
        cloud.clock.advance(500)

        assert await pool.fetchval(PID) == old
        assert pool.stats().by_generation == {1: 1}


async def test_a_credential_that_ends_sessions_ends_them_in_good_time_before_its_expiry(cloud):
    credentials = [
        Credential(secret(str(seconds)), expires_at=cloud.provider.mint(seconds).expires_at, ends_session=True)
        for seconds in (100, 1000)
    ]
    cloud.provider.play(*credentials)
    async with cloud.pool(credentials=on_demand(cloud), max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(89)
        assert await pool.fetchval(PID) == old
        cloud.clock.advance(2)

        assert await pool.fetchval(PID) != old
        assert pool.stats().retired == {"expired": 1}


async def test_a_suspended_process_notices_an_expired_connection_on_the_next_acquire(cloud):
    async with cloud.pool(max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.suspend(3600)

        assert await pool.fetchval(PID) != old


# Stamp first.


async def test_a_rotation_during_the_handshake_counts(cloud):
    async with cloud.pool(min_size=0, max_size=1, retire_when="rotated") as pool:
        cloud.door.hang_at(Stage.VERIFY)
        acquiring = asyncio.ensure_future(pool.acquire())
        await cloud.door.reached(Stage.VERIFY)
        await pool.manager.refresh()
        cloud.door.clear_faults()
        connection = await acquiring

        assert pool.stats().by_generation == {1: 1}
        await pool.release(connection)
        await cloud.observer.seen(ConnectionRetired)
        assert pool.stats().by_generation == {2: 1}
        assert cloud.presented == [1, 2]


@pytest.mark.parametrize("how", ["drain", "expire_connections"])
async def test_a_connection_that_is_being_opened_is_expired_too(cloud, how):
    async with cloud.pool(min_size=0, max_size=1) as pool:
        cloud.door.hang_at(Stage.VERIFY)
        asking = asyncio.create_task(pool.fetchval(PID))
        await cloud.door.reached(Stage.VERIFY)
        await getattr(pool, how)()
        cloud.door.clear_faults()

        pid = await asking

        assert cloud.presented == [1, 1]
        assert pool.stats().retired == {"drained": 1}
        assert await pool.fetchval(PID) == pid


async def test_a_credential_that_expires_during_the_handshake_counts(cloud):
    async with cloud.pool(min_size=0, max_size=1) as pool:
        cloud.door.hang_at(Stage.BACKEND_CONNECT)
        asking = asyncio.create_task(pool.fetchval("SELECT 1"))
        await cloud.door.reached(Stage.BACKEND_CONNECT)
        cloud.clock.advance(601)
        cloud.door.clear_faults()

        assert await asking == 1
        assert cloud.presented == [1, 2]
        assert pool.stats().by_generation == {2: 1}


# Lifetime.


async def test_a_connection_is_retired_at_its_maximal_lifetime_whatever_its_credential(cloud):
    async with cloud.pool(credentials=on_demand(cloud), max_size=1, retire_when="never", max_lifetime=100) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(94)
        assert await pool.fetchval(PID) == old
        cloud.clock.advance(6)

        assert await pool.fetchval(PID) != old
        assert pool.stats().retired == {"max_lifetime": 1}


async def test_a_lifetime_that_ends_in_use_closes_on_release(cloud):
    async with cloud.pool(credentials=on_demand(cloud), max_size=1, max_lifetime=100) as pool:
        async with pool.acquire() as connection:
            old = await connection.fetchval(PID)
            cloud.clock.advance(101)
            assert await connection.fetchval(PID) == old
        assert pool.stats().retired == {"max_lifetime": 1}

        assert await pool.fetchval(PID) != old


async def test_replacement_before_the_maximal_lifetime_is_spread_over_its_last_twentieth(cloud):
    """None is replaced before 95 % of it, some before it is over; nobody waits."""
    async with cloud.pool(
        credentials=cloud.provider, max_size=4, max_lifetime=0.5, max_reconnects_per_second=1000
    ) as pool:
        await cloud.observer.seen(ConnectionRetired, 4)
        retired = cloud.observer.of(ConnectionRetired)[:4]

        assert {event.reason for event in retired} == {"max_lifetime"}
        assert all(event.age >= 0.5 * 0.95 for event in retired)
        assert pool.stats().waits == 0


async def test_the_ends_of_lifetimes_are_jittered(cloud):
    cloud.provider.play(None)
    async with cloud.pool(max_size=8, max_lifetime=1000) as pool:
        ends = {round(one.age + one.seconds_left, 3) for one in pool.stats().connections}

    assert len(ends) > 1
    assert all(950 <= end <= 1000 for end in ends)


async def test_a_lifetime_holds_without_credentials_too(server, observer):
    async with create_pool(server.dsn(), min_size=1, max_size=1, max_lifetime=0.2, on_event=observer) as pool:
        old = await pool.fetchval(PID)

        retired = await observer.seen(ConnectionRetired)

        assert (retired.reason, retired.generation) == ("max_lifetime", None)
        assert await pool.fetchval(PID) != old


# Hooks.


def sync(function):
    return function


def awaited(function):
    async def hook(connection):
        return function(connection)

    return hook


@pytest.mark.parametrize("kind", [sync, awaited])
async def test_before_acquire_sees_each_connection_after_setup_and_lets_it_pass(cloud, kind):
    order = []

    async def setup(connection):
        order.append("setup")

    def approve(connection):
        order.append(type(connection).__name__)
        return True

    async with cloud.pool(max_size=1, setup=setup, before_acquire=kind(approve)) as pool:
        pids = {await pool.fetchval(PID), await pool.fetchval(PID)}

    assert order == ["setup", "PoolConnectionProxy"] * 2
    assert len(pids) == 1


@pytest.mark.parametrize("kind", [sync, awaited])
async def test_before_acquire_turns_a_connection_down_and_acquire_goes_on_with_another(cloud, kind):
    answers = [False, True]
    async with cloud.pool(max_size=1, before_acquire=kind(lambda _: answers.pop(0))) as pool:
        assert await pool.fetchval("SELECT 1") == 1

        assert (cloud.presented, pool.stats().retired) == ([1, 1], {"before_acquire": 1})
        assert answers == []


async def test_before_acquire_that_approves_of_nothing_ends_in_an_error_and_the_slot_is_usable(cloud):
    approves = False
    async with cloud.pool(before_acquire=lambda _: approves) as pool:
        with pytest.raises(asyncpg.InterfaceError, match="before_acquire turned down 3 connections in a row"):
            await pool.acquire()
        approves = True

        async with pool.acquire(), pool.acquire():
            assert pool.get_size() == 2
        await cloud.door.until(lambda: cloud.door.live == 2)


async def test_before_acquire_that_raises_is_the_callers_error_and_the_slot_is_usable(cloud):
    errors = [LookupError("no shard")]

    async def check(connection):
        if errors:
            raise errors.pop()
        return True

    async with cloud.pool(max_size=1, before_acquire=check) as pool:
        with pytest.raises(LookupError, match="no shard"):
            await pool.acquire()

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.presented == [1, 1]


async def test_before_acquire_is_inside_the_acquire_timeout(cloud):
    hangs = True

    async def check(connection):
        if hangs:
            await asyncio.Event().wait()
        return True

    async with cloud.pool(max_size=1, before_acquire=check) as pool:
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.02)
        hangs = False

        assert await pool.fetchval("SELECT 1") == 1


async def test_a_caller_cancelled_in_before_acquire_leaves_the_slot_usable(cloud):
    inside, hangs = asyncio.Event(), True

    async def check(connection):
        if hangs:
            inside.set()
            await asyncio.Event().wait()
        return True

    async with cloud.pool(max_size=1, before_acquire=check) as pool:
        acquiring = asyncio.ensure_future(pool.acquire())
        await inside.wait()
        acquiring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await acquiring
        hangs = False

        assert await pool.fetchval("SELECT 1") == 1


async def test_a_connection_that_before_acquire_itself_closed_is_not_handed_out(cloud):
    closes = [True, False]

    async def check(connection):
        if closes.pop(0):
            await connection.close()
        return True

    async with cloud.pool(max_size=1, before_acquire=check) as pool, pool.acquire() as connection:
        assert await connection.fetchval("SELECT 1") == 1
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.02)


async def test_a_connection_past_its_end_is_not_shown_to_before_acquire(cloud):
    seen = []

    async def check(connection):
        seen.append(await connection.fetchval(PID))
        return True

    async with cloud.pool(credentials=on_demand(cloud), max_size=1, before_acquire=check) as pool:
        first = await pool.fetchval(PID)
        cloud.clock.advance(700)
        second = await pool.fetchval(PID)

    assert seen == [first, second]


@pytest.mark.parametrize("kind", [sync, awaited])
async def test_after_release_lets_a_connection_stay(cloud, kind):
    seen = []
    async with cloud.pool(max_size=1, after_release=kind(lambda con: seen.append(type(con).__name__) or True)) as pool:
        assert await pool.fetchval(PID) == await pool.fetchval(PID)

    assert seen == ["PoolConnectionProxy"] * 2


@pytest.mark.parametrize("kind", [sync, awaited])
async def test_after_release_closes_a_connection_and_the_slot_is_usable(cloud, kind):
    answers = [False, True]
    async with cloud.pool(max_size=1, after_release=kind(lambda _: answers.pop(0))) as pool:
        old = await pool.fetchval(PID)
        assert pool.stats().retired == {"after_release": 1}

        assert await pool.fetchval(PID) != old
        assert cloud.door.peak_live == 1


async def test_after_release_may_look_at_the_session_before_it_is_reset(cloud):
    async def is_clean(connection):
        return await connection.fetchval("SHOW search_path") != "dirty"

    async with cloud.pool(max_size=1, after_release=is_clean) as pool:
        await pool.execute("SET search_path TO dirty")

        assert pool.stats().retired == {"after_release": 1}
        assert await pool.fetchval("SHOW search_path") != "dirty"


async def test_after_release_that_raises_reaches_the_one_who_releases_and_the_slot_is_usable(cloud):
    errors = [LookupError("odd")]

    async def check(connection):
        if errors:
            raise errors.pop()
        return True

    async with cloud.pool(max_size=1, after_release=check) as pool:
        connection = await pool.acquire()
        old = await connection.fetchval(PID)
        with pytest.raises(LookupError, match="odd"):
            await pool.release(connection)

        assert await pool.fetchval(PID) != old
        assert pool.stats().retired == {"after_release": 1}


async def test_a_release_cancelled_in_after_release_is_completed(cloud):
    inside, go = asyncio.Event(), asyncio.Event()

    async def check(connection):
        inside.set()
        await go.wait()
        return True

    async with cloud.pool(max_size=1, after_release=check) as pool:
        connection = await pool.acquire()
        old = await connection.fetchval(PID)
        releasing = asyncio.create_task(pool.release(connection))
        await inside.wait()
        releasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await releasing
        go.set()

        assert await pool.fetchval(PID) == old


async def test_after_release_is_inside_the_release_timeout(cloud):
    hangs = True

    async def check(connection):
        if hangs:
            await asyncio.Event().wait()
        return True

    async with cloud.pool(max_size=1, after_release=check) as pool:
        connection = await pool.acquire()
        with pytest.raises(TimeoutError):
            await pool.release(connection, timeout=0.02)
        hangs = False

        assert await pool.fetchval("SELECT 1") == 1


async def test_a_connection_that_dies_in_after_release_leaves_the_slot_usable(cloud):
    closes = [True]

    async def check(connection):
        if closes:
            closes.pop()
            await connection.close()
        return True

    async with cloud.pool(max_size=1, after_release=check) as pool:
        await pool.fetchval("SELECT 1")

        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
            with pytest.raises(TimeoutError):
                await pool.acquire(timeout=0.02)


@pytest.mark.parametrize("hook", ["before_acquire", "after_release"])
async def test_hooks_work_without_credentials(server, hook):
    answers = [False, True]
    async with create_pool(server.dsn(), min_size=1, max_size=1, **{hook: lambda _: answers.pop(0)}) as pool:
        assert [await pool.fetchval("SELECT 1") for _ in range(2 if hook == "after_release" else 1)]

        assert pool.stats().retired == {hook: 1}


# Drain.


async def test_drain_closes_idle_connections_now_and_busy_ones_on_release(cloud):
    async with cloud.pool(max_size=3) as pool:
        async with pool.acquire() as busy:
            pid = await busy.fetchval(PID)

            await pool.drain()

            assert pool.stats().retired == {"drained": 2}
            await cloud.door.until(lambda: cloud.door.attempts >= 3 and cloud.door.live >= 1)
            assert await busy.fetchval(PID) == pid
        assert pool.stats().retired["drained"] == 3
        assert pid not in {await pool.fetchval(PID) for _ in range(5)}


async def test_drained_idle_connections_are_closed_when_drain_returns(cloud):
    async with cloud.pool(min_size=0, max_size=3) as pool:
        connections = [await pool.acquire() for _ in range(3)]
        for connection in connections:
            await pool.release(connection)
        assert pool.get_size() == 3

        await pool.drain()

        assert (pool.get_size(), cloud.door.live) == (0, 0)
        assert await pool.fetchval("SELECT 1") == 1


async def test_drain_while_others_work_fails_no_query_and_loses_no_slot(cloud):
    async with cloud.pool(max_size=3) as pool:
        stop = False

        async def work():
            done = 0
            while not stop:
                assert await pool.fetchval("SELECT 1") == 1
                done += 1
            return done

        workers = [asyncio.create_task(work()) for _ in range(6)]
        for count in range(1, 6):
            await pool.drain()
            await cloud.observer.seen(ConnectionOpened, 3 * count)
        stop = True

        assert all(await asyncio.gather(*workers))
        async with pool.acquire(), pool.acquire(), pool.acquire():
            assert pool.get_size() == 3


async def test_drain_twice_is_harmless(cloud):
    async with cloud.pool() as pool:
        await asyncio.gather(pool.drain(), pool.drain())

        assert await pool.fetchval("SELECT 1") == 1


async def test_drain_without_credentials(server):
    async with create_pool(server.dsn(), min_size=1, max_size=1) as pool:
        old = await pool.fetchval(PID)
        await pool.drain()

        assert await pool.fetchval(PID) != old


async def test_drain_of_a_pool_that_is_not_open_is_an_error(cloud):
    pool = cloud.pool()
    with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
        await pool.drain()
    async with pool:
        pass

    with pytest.raises(asyncpg.InterfaceError, match="closed"):
        await pool.drain()
