"""Connections are replaced before they are retired, and nobody waits for it."""

import asyncio
import contextlib
import inspect
import time
from datetime import UTC, datetime

import asyncpg
import pytest
from support import secret

from asyncpool_creds import (
    ConnectionOpened,
    ConnectionRetired,
    Credential,
    CredentialExpired,
    ProviderError,
    ReplacementFailed,
    create_pool,
)
from asyncpool_creds.testing import ScriptedProvider
from asyncpool_creds.testing.door import Stage, TokenDoor

pytestmark = pytest.mark.anyio

PID = "SELECT pg_backend_pid()"
RESTORES_FLOOR = "init_size" in inspect.signature(asyncpg.create_pool).parameters


def replacements(observer):
    return [event for event in observer.of(ConnectionOpened) if event.replacement]


async def rotate(cloud, pool, *, retired):
    """Refresh, and wait until so many connections have been retired in all."""
    await pool.manager.refresh()
    await cloud.observer.seen(ConnectionRetired, retired)


# Make before break.


@pytest.mark.parametrize("retire_when", ["rotated", "expired"])
async def test_every_idle_connection_is_replaced_before_it_is_closed(cloud, retire_when):
    live = []
    async with cloud.pool(
        max_size=4,
        retire_when=retire_when,
        on_event=[
            cloud.observer,
            lambda event: live.append(cloud.door.live) if type(event) is ConnectionRetired else 0,
        ],
    ) as pool:
        # The time that is left is what replacements are spread over.
        cloud.clock.advance(599.5)
        await rotate(cloud, pool, retired=4)
        await cloud.door.until(lambda: cloud.door.live == 4)

        # When an old one is retired, the new one stands and the old one is still open.
        assert live == [5] * 4
        assert cloud.door.peak_live == 5
        assert cloud.presented == [1] * 4 + [2] * 4
        stats = pool.stats()
        assert (stats.by_generation, stats.replaced, stats.retired, stats.waits) == ({2: 4}, 4, {"rotated": 4}, 0)


async def test_a_replacement_is_usable_and_initialised_before_the_old_one_goes(cloud):
    order = []

    async def init(connection):
        await connection.fetchval("SELECT 1")
        order.append("init")

    def observe(event):
        if isinstance(event, ConnectionRetired):
            order.append("retired")

    async with cloud.pool(max_size=2, retire_when="rotated", init=init, on_event=[cloud.observer, observe]) as pool:
        await rotate(cloud, pool, retired=2)

    assert order == ["init", "init", "init", "retired", "init", "retired"]


async def test_nobody_waits_for_a_replacement_that_takes_its_time(cloud):
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        cloud.door.hang_at(Stage.VERIFY)
        await pool.manager.refresh()
        await cloud.door.reached(Stage.VERIFY)

        async with pool.acquire() as one, pool.acquire() as other:
            assert await one.fetchval("SELECT 1") == await other.fetchval("SELECT 1") == 1
        assert (pool.stats().by_generation, pool.stats().waits) == ({1: 2}, 0)
        cloud.door.clear_faults()
        await cloud.observer.seen(ConnectionRetired, 2)

        assert pool.stats().waits == 0


async def test_whoever_comes_while_connections_are_replaced_is_served_as_fast_as_at_rest(cloud, monkeypatch):
    looked_at = []
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        cloud.door.hang_at(Stage.VERIFY)
        await pool.manager.refresh()
        await cloud.door.reached(Stage.VERIFY)

        with monkeypatch.context() as patch:
            patch.setattr(pool, "end_of", looked_at.append)
            assert await pool.fetchval("SELECT 1") == 1
        assert looked_at == []
        cloud.door.clear_faults()
        await cloud.observer.seen(ConnectionRetired, 2)


async def test_workers_see_no_error_and_no_wait_through_many_rotations(cloud):
    done = 0

    async def work():
        nonlocal done
        while not stop.is_set():
            async with pool.acquire() as connection, connection.transaction():
                assert await connection.fetchval("SELECT $1::int", done) is not None
            done += 1

    stop = asyncio.Event()
    async with cloud.pool(max_size=4, retire_when="rotated", max_reconnects_per_second=1000) as pool:
        workers = [asyncio.create_task(work()) for _ in range(12)]
        for rotation in range(1, 5):
            await rotate(cloud, pool, retired=4 * rotation)
        stop.set()
        await asyncio.gather(*workers)

        stats = pool.stats()
        assert done > 100
        assert (stats.waits, stats.replacement_failures, stats.retired) == (0, 0, {"rotated": 16})
        assert cloud.door.peak_live <= 5
        assert cloud.presented == sorted(cloud.presented)


async def test_a_rotation_overtaken_by_the_next_ends_with_the_newest_credential(cloud):
    async with cloud.pool(max_size=3, retire_when="rotated") as pool:
        cloud.door.hang_at(Stage.VERIFY, times=1)
        await pool.manager.refresh()
        await cloud.door.reached(Stage.VERIFY)
        await pool.manager.refresh()
        cloud.door.clear_faults()

        await cloud.until(lambda: pool.stats().by_generation == {3: 3})
        await cloud.door.until(lambda: cloud.door.live == 3)
        assert cloud.door.peak_live <= 4


async def test_replacements_are_not_made_faster_than_the_cap(cloud):
    started = []

    async def connect(*arguments, **keywords):
        started.append(time.monotonic())
        return await asyncpg.connect(*arguments, **keywords)

    async with cloud.pool(max_size=4, retire_when="rotated", connect=connect, max_reconnects_per_second=10) as pool:
        await rotate(cloud, pool, retired=4)

    # One that begins late is followed by the next a little sooner.
    assert started[-1] - started[4] > 0.2


async def test_replacements_are_spread_over_the_time_that_is_left(cloud):
    """Four in the 1.2 seconds before their end: not at once."""
    async with cloud.pool(max_size=4, max_reconnects_per_second=1000) as pool:
        cloud.clock.advance(598.8)
        began = time.monotonic()
        await rotate(cloud, pool, retired=4)
        took = time.monotonic() - began

    assert took > 0.3


async def test_pools_that_share_a_manager_do_not_all_connect_at_once(cloud):
    manager = cloud.manager()
    began = []

    async def connect(*arguments, **keywords):
        began.append(time.monotonic())
        return await asyncpg.connect(*arguments, **keywords)

    async with contextlib.AsyncExitStack() as pools:
        for _ in range(6):
            pool = cloud.pool(credentials=manager, max_size=1, connect=connect, max_reconnects_per_second=20)
            await pools.enter_async_context(pool)
        began.clear()
        refreshed = time.monotonic()
        await manager.refresh()
        await cloud.observer.seen(ConnectionRetired, 6)

    # The first one at once; the others, whose timers may be late but never early, a twentieth of a second apart.
    assert len(began) == 6
    assert all(moment - refreshed > 0.95 * number / 20 for number, moment in enumerate(began))


async def test_pools_that_share_a_manager_are_in_time_though_they_wait_for_each_other(cloud):
    manager = cloud.manager()
    async with contextlib.AsyncExitStack() as opened:
        pools = [
            await opened.enter_async_context(
                cloud.pool(credentials=manager, max_size=1, max_reconnects_per_second=0.1, retire_when="expired")
            )
            for _ in range(4)
        ]
        cloud.clock.advance(599)
        await manager.refresh()
        await cloud.observer.seen(ConnectionRetired, 4)

        assert [pool.stats().retired for pool in pools] == [{"rotated": 1}] * 4


async def test_the_next_replacement_waits_until_the_old_connection_is_gone(cloud):
    leave = asyncio.Event()

    class Reluctant(asyncpg.Connection):
        async def close(self, *, timeout=None):  # noqa: ASYNC109 - asyncpg's signature
            await leave.wait()
            await super().close(timeout=timeout)

    async with cloud.pool(
        max_size=3, retire_when="rotated", connection_class=Reluctant, max_reconnects_per_second=1000
    ) as pool:
        await rotate(cloud, pool, retired=1)
        await asyncio.sleep(0.1)
        assert (cloud.door.attempts, cloud.door.live) == (4, 4)

        leave.set()
        await cloud.observer.seen(ConnectionRetired, 3)

        assert cloud.door.peak_live == 4


async def test_a_replacement_that_is_being_opened_when_the_pool_closes_is_let_finish(cloud):
    outcomes = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def connect(*arguments, **keywords):
        if outcomes:
            begun.set()
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                outcomes.append("cancelled")
                raise
        outcomes.append("connected")
        return await asyncpg.connect(*arguments, **keywords)

    pool = await cloud.pool(max_size=1, retire_when="rotated", connect=connect)
    await pool.manager.refresh()
    await begun.wait()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing

    assert outcomes == ["connected", "connected"]
    await cloud.door.until(lambda: cloud.door.live == 0)


async def test_an_empty_pool_opens_nothing_at_a_rotation(cloud):
    async with cloud.pool(min_size=0, retire_when="rotated") as pool:
        for _ in range(3):
            await pool.manager.refresh()
        await asyncio.sleep(0.02)

        assert cloud.door.attempts == 0
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_pool_without_a_floor_replaces_what_it_has_and_no_more(cloud):
    async with cloud.pool(min_size=0, max_size=4, retire_when="rotated") as pool:
        async with pool.acquire(), pool.acquire():
            pass
        await rotate(cloud, pool, retired=2)

        assert (pool.get_size(), pool.stats().by_generation) == (2, {2: 2})
        assert cloud.presented == [1, 1, 2, 2]


async def test_a_connection_that_was_swapped_in_ends_of_inactivity_as_others_do(cloud):
    # One, because the next would be replaced half a second later, and be gone by then.
    async with cloud.pool(min_size=0, max_size=1, retire_when="rotated", max_inactive_connection_lifetime=0.3) as pool:
        assert await pool.fetchval("SELECT 1") == 1
        await rotate(cloud, pool, retired=1)

        await cloud.door.until(lambda: cloud.door.live == 0)
        assert pool.get_size() == 0
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_swapped_in_connection_that_dies_while_idle_is_noticed(cloud):
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        await rotate(cloud, pool, retired=2)
        await cloud.door.until(lambda: cloud.door.live == 2)
        cloud.door.kill_connections()
        await cloud.until(lambda: pool.get_size() == 0 or len(cloud.presented) > 4)
        if RESTORES_FLOOR:
            await cloud.door.until(lambda: cloud.door.live == 2)

        async with pool.acquire() as one, pool.acquire() as other:
            assert await one.fetchval("SELECT 1") == await other.fetchval("SELECT 1") == 1
        assert pool.get_size() == 2


async def test_a_pool_made_with_background_off_replaces_on_acquire_only(cloud):
    async with cloud.pool(credentials=cloud.manager(background=False), retire_when="rotated") as pool:
        await pool.manager.refresh()
        await asyncio.sleep(0.02)

        assert cloud.presented == [1, 1]


# Busy pools.


async def test_a_pool_that_is_wholly_busy_loses_nothing_and_swaps_as_connections_come_back(cloud):
    async with cloud.pool(max_size=3, retire_when="rotated") as pool:
        held = [await pool.acquire() for _ in range(3)]
        await pool.manager.refresh()
        await cloud.until(lambda: pool.stats().spare == 1)
        assert cloud.door.live == 4

        for number, connection in enumerate(held, 1):
            assert await connection.fetchval("SELECT 1") == 1
            await pool.release(connection)
            await cloud.observer.seen(ConnectionRetired, number)
            await cloud.until(lambda left=3 - number: pool.stats().spare == min(1, left))

        stats = pool.stats()
        assert (stats.by_generation, stats.retired, stats.waits) == ({2: 3}, {"rotated": 3}, 0)
        assert cloud.door.peak_live == 4


async def test_the_next_acquirer_gets_the_replacement_and_not_the_old_connection(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        async with pool.acquire() as connection:
            old = await connection.fetchval(PID)
            waiting = asyncio.create_task(pool.fetchval(PID))
            await pool.manager.refresh()
            await cloud.until(lambda: pool.stats().spare == 1)

        assert await waiting != old
        assert pool.stats().waits == 0


async def test_a_long_transaction_survives_several_rotations(cloud):
    async with cloud.pool(max_size=3, retire_when="rotated") as pool:
        async with pool.acquire() as connection:
            await connection.execute("CREATE TEMP TABLE long (x int)")
            async with connection.transaction():
                for number in range(4):
                    await connection.execute("INSERT INTO long VALUES ($1)", number)
                    await pool.manager.refresh()
                    newest = number + 2
                    await cloud.until(lambda newest=newest: pool.stats().by_generation == {1: 1, newest: 2})
                cloud.clock.advance(10_000)
            assert await connection.fetchval("SELECT count(*) FROM long") == 4

        assert await pool.fetchval("SELECT 1") == 1
        await cloud.until(lambda: pool.stats().by_generation.get(1) is None)
        assert cloud.door.peak_live <= 4


async def test_a_spare_that_is_superseded_while_it_waits_is_replaced_itself(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        async with pool.acquire():
            await pool.manager.refresh()
            await cloud.until(lambda: pool.stats().spare == 1)
            await pool.manager.refresh()
            await cloud.until(lambda: cloud.presented == [1, 2, 3] and pool.stats().spare == 1)
        await cloud.until(lambda: pool.stats().by_generation == {3: 1})
        await cloud.door.until(lambda: cloud.door.live == 1)
        assert cloud.door.peak_live <= 2


async def test_a_spare_that_dies_while_it_waits_is_replaced_itself(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        async with pool.acquire() as busy:
            await pool.manager.refresh()
            await cloud.until(lambda: pool.stats().spare == 1)
            await cloud.server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1",
                await busy.fetchval(PID),
            )
            await cloud.until(lambda: len(cloud.presented) == 3 and pool.stats().spare == 1)

        await cloud.until(lambda: pool.stats().by_generation == {2: 1})
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_connection_that_dies_in_use_takes_the_spare_and_nobody_waits_for_a_connect(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        async with pool.acquire() as connection:
            await pool.manager.refresh()
            await cloud.until(lambda: pool.stats().spare == 1)
            await connection.close()

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.presented == [1, 2]
        assert pool.stats().spare == 0


# A server that refuses.


async def test_a_full_server_makes_it_one_for_one(cloud):
    async with cloud.pool(max_size=3, retire_when="rotated") as pool:
        cloud.door.max_connections = 3
        await rotate(cloud, pool, retired=3)
        await cloud.until(lambda: pool.stats().by_generation == {2: 3})

        assert cloud.door.peak_live == 3
        assert cloud.observer.of(ReplacementFailed)[0].message == "TooManyConnectionsError (53300)"
        assert len(cloud.observer.of(ReplacementFailed)) == 1
        async with pool.acquire(), pool.acquire(), pool.acquire():
            assert pool.get_size() == 3


async def test_an_acquirer_that_comes_while_room_has_been_made_on_a_full_server_is_not_refused(cloud):
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        cloud.door.max_connections = 2
        # A full server refuses before it looks at the token, so this catches the connect for which there is room.
        cloud.door.hang_at(Stage.VERIFY)
        await pool.manager.refresh()
        await cloud.door.reached(Stage.VERIFY)

        asking = [asyncio.create_task(pool.fetchval("SELECT 1 FROM pg_sleep(0.05)")) for _ in range(2)]
        await asyncio.sleep(0.02)
        cloud.door.clear_faults()

        assert await asyncio.gather(*asking) == [1, 1]
        assert cloud.door.peak_live == 2


async def test_a_replacement_that_stands_takes_the_slot_of_a_connection_that_ended_in_use(cloud):
    async with cloud.pool(max_size=1) as pool:
        async with pool.acquire():
            cloud.clock.advance(550)
            await pool.manager.refresh()
            await cloud.until(lambda: pool.stats().spare == 1)
            cloud.clock.advance(60)

        stats = pool.stats()
        assert (stats.by_generation, stats.spare, stats.opened, stats.retired) == ({2: 1}, 0, 2, {"expired": 1})
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.stats().waits == 0


async def test_a_full_server_and_busy_workers_lose_nothing(cloud):
    async def work():
        while not stop.is_set():
            assert await pool.fetchval("SELECT 1") == 1

    stop = asyncio.Event()
    async with cloud.pool(max_size=3, retire_when="rotated", max_reconnects_per_second=1000) as pool:
        cloud.door.max_connections = 3
        workers = [asyncio.create_task(work()) for _ in range(9)]
        for rotation in range(1, 4):
            await pool.manager.refresh()
            await cloud.until(lambda generation=rotation + 1: pool.stats().by_generation == {generation: 3})
        stop.set()
        await asyncio.gather(*workers)

        assert cloud.door.peak_live == 3


async def test_a_full_server_and_a_wholly_busy_pool_wait_for_a_connection_to_come_back(cloud):
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        cloud.door.max_connections = 2
        async with pool.acquire() as one, pool.acquire() as other:
            await pool.manager.refresh()
            await cloud.observer.seen(ReplacementFailed)
            assert await one.fetchval("SELECT 1") == await other.fetchval("SELECT 1") == 1
        await cloud.until(lambda: pool.stats().by_generation == {2: 2})

        assert cloud.door.peak_live == 2


async def test_a_full_server_and_a_pool_that_is_never_at_rest_get_their_turn_too(cloud):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        cloud.door.max_connections = 1
        held = await pool.acquire()
        await pool.manager.refresh()
        await cloud.observer.seen(ReplacementFailed)

        for _ in range(100):
            waiting = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0.05)
            await pool.release(held)
            held = await waiting
            if pool.stats().by_generation == {2: 1}:
                break

        assert pool.stats().by_generation == {2: 1}
        assert cloud.door.peak_live == 1
        await pool.release(held)


@pytest.mark.parametrize("fault", ["starting_up", "down"])
async def test_while_connects_are_refused_the_old_ones_serve_until_their_own_end(cloud, fault):
    async with cloud.pool(max_size=2, expired_sessions="refuse") as pool:
        old = await pool.fetchval(PID)
        setattr(cloud.door, fault, True)
        cloud.clock.advance(550)
        await pool.manager.refresh()
        await cloud.observer.seen(ReplacementFailed, 2)

        assert await pool.fetchval(PID) == old
        assert (pool.stats().by_generation, pool.stats().waits) == ({1: 2}, 0)

        cloud.clock.advance(60)
        with pytest.raises((asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError, OSError)):
            await pool.fetchval(PID)
        await cloud.door.until(lambda: cloud.door.live == 0)
        assert pool.stats().retired == {"expired": 2}

        cloud.door.clear_faults()
        assert await pool.fetchval(PID) != old
        assert set(pool.stats().by_generation) == {2}


async def test_a_replacement_that_is_refused_tells_of_a_wrong_role_and_does_not_hammer(cloud):
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        async with pool.acquire() as one, pool.acquire() as other:
            old = {await one.fetchval(PID), await other.fetchval(PID)}
        cloud.refuses_all = True
        await pool.manager.refresh()
        failure = await cloud.observer.seen(ReplacementFailed)

        assert failure.message == "InvalidAuthorizationSpecificationError (28000)"
        assert await pool.fetchval(PID) in old
        # The first one is refused, and so is the one that was fetched because of it.
        assert (cloud.presented, cloud.provider.calls) == ([1, 1, 2, 3], 3)
        await cloud.observer.seen(ReplacementFailed, 3)
        assert cloud.provider.calls == 3
        assert await pool.fetchval(PID) in old


async def test_replacement_goes_on_when_the_server_accepts_again(cloud):
    async with cloud.pool(max_size=2, retire_when="rotated") as pool:
        cloud.door.starting_up = True
        await pool.manager.refresh()
        await cloud.observer.seen(ReplacementFailed)
        cloud.door.clear_faults()

        await cloud.observer.seen(ConnectionRetired, 2)

        assert (pool.stats().by_generation, pool.stats().waits) == ({2: 2}, 0)
        assert pool.stats().replacement_failures >= 1


async def test_a_failing_init_of_a_replacement_leaves_the_old_connection_in_place(cloud):
    fails = False

    async def init(connection):
        if fails:
            raise LookupError("no such type")

    async with cloud.pool(max_size=1, retire_when="rotated", init=init) as pool:
        old = await pool.fetchval(PID)
        fails = True
        await pool.manager.refresh()
        failure = await cloud.observer.seen(ReplacementFailed)
        assert failure.message == "LookupError"
        assert await pool.fetchval(PID) == old
        fails = False

        await cloud.observer.seen(ConnectionRetired)
        await cloud.door.until(lambda: cloud.door.live == 1)
        assert await pool.fetchval(PID) != old


async def test_the_source_being_down_changes_nothing_for_connections_before_their_end(cloud):
    cloud.provider.play(600, ProviderError("down"))
    async with cloud.pool(max_size=1) as pool:
        old = await pool.fetchval(PID)
        cloud.clock.advance(590)
        with pytest.raises(ProviderError):
            await pool.manager.refresh()

        assert await pool.fetchval(PID) == old
        assert cloud.presented == [1]


async def test_connections_killed_while_the_source_is_down_come_back_when_it_does(cloud):
    """On asyncpg 0.32 the floor is restored in the background; it must survive that there is no credential."""
    cloud.provider.play(600, ProviderError("down"))
    async with cloud.pool(max_size=2) as pool:
        cloud.clock.advance(700)
        cloud.door.kill_connections()
        await cloud.until(lambda: pool.get_size() == 0)
        with pytest.raises(CredentialExpired, match="down"):
            await pool.fetchval("SELECT 1")

        cloud.provider.play(600)
        cloud.clock.advance(30)
        if RESTORES_FLOOR:
            await cloud.door.until(lambda: cloud.door.live == 2)

        assert await pool.fetchval("SELECT 1") == 1
        assert set(cloud.presented) <= {1, 2}


async def test_a_credential_that_ends_sessions_has_its_connections_replaced_in_the_background_in_time(cloud):
    cloud.provider.play(
        *(
            Credential(secret(str(life)), expires_at=cloud.provider.mint(life).expires_at, ends_session=True)
            for life in (100, 1000)
        )
    )
    async with cloud.pool(max_size=2) as pool:
        cloud.clock.advance(89.8)
        await rotate(cloud, pool, retired=2)

        assert pool.stats().retired == {"rotated": 2}
        assert (pool.stats().by_generation, pool.stats().waits) == ({2: 2}, 0)
        assert cloud.door.peak_live == 3


async def test_short_lived_tokens_are_rotated_on_the_real_clock_without_an_error(server):
    """Nobody moves the clock here: refresh, replacement and retirement follow from the tokens' lives alone."""
    provider = ScriptedProvider(1.0, prefix=secret())

    def verify(user, password):
        credential = next(one for one in provider.credentials if one.password == password)
        return None if credential.expires_at > datetime.now(UTC) else "expired"

    async with (
        TokenDoor(server, verify) as door,
        create_pool(door.dsn(sslmode="disable"), credentials=provider, min_size=3, max_size=3) as pool,
    ):
        count, ends = 0, time.monotonic() + 2.5
        while time.monotonic() < ends:
            assert await pool.fetchval("SELECT 1") == 1
            count += 1

        # On a busy machine a replacement may be late, and an acquirer has to connect; nothing fails.
        assert count > 50
        assert pool.stats().manager.rotations >= 2
        assert pool.stats().replaced >= 3
