"""Bugs that connectors, pools and token caches of this kind have, or had: each by the name of its system."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from datetime import UTC, datetime, timedelta

import anyio
import asyncpg
import pytest
from fault_world import LIFETIME, PATIENCE, World
from support import assert_no_secret, secret

from asyncpool_creds import (
    Credential,
    CredentialExpired,
    CredentialRefreshed,
    ProviderError,
    RefreshFailed,
    TokenManager,
)
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio


def manage(source, clock, observer=None, **arguments):
    return TokenManager(source, clock=clock, on_event=observer or RecordingObserver(), **arguments)


# On the virtual clock.


def test_cloud_sql_a_cancelled_waiter_does_not_kill_the_refresh_for_everyone(clock):
    async def main():
        source = ScriptedProvider(ScriptedProvider.HANG, clock=clock, prefix=secret())
        manager = manage(source, clock)
        waiters = [asyncio.ensure_future(manager.get()) for _ in range(3)]
        await source.called()

        waiters[0].cancel()
        await asyncio.wait(waiters[:1])
        source.release(600.0)

        assert await waiters[1] is await waiters[2]
        assert waiters[0].cancelled()
        assert await manager.get() is manager.current
        assert (source.calls, source.cancelled) == (1, 0)
        await manager.aclose()

    clock.run(main())


def test_cloud_sql_cancelling_every_waiter_leaves_the_refresh_alive(clock):
    async def main():
        source = ScriptedProvider(ScriptedProvider.HANG, clock=clock, prefix=secret())
        manager = manage(source, clock)
        waiters = [asyncio.ensure_future(manager.get()) for _ in range(3)]
        await source.called()

        for waiter in waiters:
            waiter.cancel()
        await asyncio.wait(waiters)
        source.release(600.0)

        await manager.get()
        assert (source.calls, source.cancelled) == (1, 0)
        await manager.aclose()

    clock.run(main())


def test_cloud_sql_a_refresh_that_fails_is_not_repeated_without_a_pause(clock, observer):
    async def main():
        source = ScriptedProvider(600.0, ProviderError("down"), clock=clock, prefix=secret())
        async with manage(source, clock, observer):
            await observer.seen(RefreshFailed, 6)

        times = [at.timestamp() for at in source.called_at[1:]]
        assert all(later - earlier >= 0.09 for earlier, later in itertools.pairwise(times))

    clock.run(main())


def test_vault_the_watcher_does_not_spin_when_the_backoff_is_never_applied(clock, observer):
    async def main():
        source = ScriptedProvider(600.0, ProviderError("sealed"), clock=clock, prefix=secret())
        async with manage(source, clock, observer):
            await asyncio.sleep(599.0)

        # From 480 s on, with full jitter up to a minute and at least a tenth of a second.
        assert 2 <= source.calls <= 60

    clock.run(main())


def test_litellm_the_pause_after_a_failure_is_shorter_than_the_life_that_is_left(clock, observer):
    async def main():
        source = ScriptedProvider(600.0, ProviderError("down"), 600.0, clock=clock, prefix=secret())
        async with manage(source, clock, observer) as manager:
            first = await manager.get()
            await observer.seen(CredentialRefreshed, 2)

            assert clock.now() < first.expires_at
            assert (await manager.get()) is not first

    clock.run(main())


def test_npgsql_a_source_that_gives_its_cached_token_is_asked_again_before_that_token_ends(clock, observer):
    async def main():
        token = Credential(secret("cached"), expires_at=clock.now() + timedelta(seconds=600))
        source = ScriptedProvider(token, token, token, 600.0, clock=clock, prefix=secret("new"))
        async with manage(source, clock, observer) as manager:
            for _ in range(1200):
                credential = await manager.get()
                assert credential.expires_at > clock.now()
                await asyncio.sleep(1.0)

            assert manager.stats().rotations >= 1
            # The same token is neither a rotation nor a reason to hammer.
            assert source.calls <= 8

    clock.run(main())


def test_globus_a_five_minute_token_with_a_five_minute_threshold_is_not_refreshed_for_ever(clock, observer):
    async def main():
        source = ScriptedProvider(300.0, clock=clock, prefix=secret())
        async with manage(source, clock, observer, refresh_threshold=300):
            await asyncio.sleep(3600.0)

        # Twelve lives, each cut short by its refresh.
        assert 12 <= source.calls <= 17

    clock.run(main())


def test_google_auth_a_failed_background_refresh_does_not_make_a_valid_token_an_error(clock, observer):
    async def main():
        source = ScriptedProvider(600.0, ProviderError("down"), clock=clock, prefix=secret())
        async with manage(source, clock, observer) as manager:
            first = await manager.get()
            await observer.seen(RefreshFailed)
            source.play(ScriptedProvider.HANG)

            before = clock.monotonic()
            assert await manager.get() is first
            assert clock.monotonic() == before

    clock.run(main())


def test_pgdog_a_failed_refresh_does_not_evict_a_valid_token(clock, observer):
    async def main():
        source = ScriptedProvider(600.0, ProviderError("denied", retryable=False), clock=clock, prefix=secret())
        async with manage(source, clock, observer) as manager:
            first = await manager.get()
            await observer.seen(RefreshFailed)
            assert manager.current is first
            await asyncio.sleep((first.expires_at - clock.now()).total_seconds() - 40.0)
            assert await manager.get() is first

    clock.run(main())


def test_ttl_store_and_pgdog_a_cold_cache_is_filled_by_one_fetch(clock):
    async def main():
        source = ScriptedProvider(600.0, clock=clock, delay=1.0, prefix=secret())
        manager = manage(source, clock)

        credentials = await asyncio.gather(*(manager.get() for _ in range(1000)))

        assert len(set(map(id, credentials))) == 1
        assert source.calls == 1
        await manager.aclose()

    clock.run(main())


def test_go_db_an_opaque_token_gets_the_default_lifetime(clock, observer):
    async def main():
        calls = []

        def opaque():
            calls.append(clock.now())
            return secret(f"opaque-{len(calls)}")

        async with manage(opaque, clock, observer, default_lifetime=timedelta(minutes=15)):
            await asyncio.sleep(3600.0)

        assert 4 <= len(calls) <= 6

    clock.run(main())


def test_aws_wrapper_local_time_and_the_end_of_summer_time_do_not_prolong_a_token(clock, monkeypatch):
    # Half an hour before the clocks go back in Berlin.
    clock = VirtualClock(datetime(2026, 10, 25, 0, 30, tzinfo=UTC))
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()

    async def main():
        source = ScriptedProvider(900.0, clock=clock, prefix=secret())
        async with manage(source, clock, background=False) as manager:
            first = await manager.get()
            clock.advance(40 * 60)
            assert manager.current is None
            assert await manager.get() is not first

    try:
        clock.run(main())
    finally:
        monkeypatch.undo()
        time.tzset()


def test_azure_core_and_aws_wrapper_no_repr_and_no_log_shows_the_token(clock, observer, caplog):
    async def main():
        source = ScriptedProvider(600.0, ProviderError("down"), clock=clock, prefix=secret())
        async with TokenManager(source, clock=clock) as manager:
            manager.subscribe(observer)
            assert_no_secret(await manager.get(), await manager.stamp(), manager, manager.stats(), manager.current)
            await observer.seen(RefreshFailed)
            manager.invalidate(await manager.get())
            assert_no_secret(manager, *asyncio.all_tasks(), *observer.events)

    caplog.set_level("DEBUG")
    clock.run(main())
    assert caplog.records
    assert_no_secret(*caplog.records)


def test_a_source_that_hangs_is_given_up_and_one_that_swallows_cancellation_too(clock):
    async def main():
        async def stubborn():
            try:
                await asyncio.sleep(1000.0)
            except asyncio.CancelledError:
                await asyncio.sleep(1000.0)
            return secret()

        for source in (ScriptedProvider(ScriptedProvider.HANG, clock=clock), stubborn):
            manager = manage(source, clock, fetch_timeout=5.0)
            before = clock.monotonic()
            with pytest.raises(CredentialExpired) as expired:
                await manager.get()
            assert isinstance(expired.value.__cause__, TimeoutError)
            assert clock.monotonic() - before < 10.0
            await manager.aclose()

    clock.run(main())


def test_botocore_a_token_that_has_expired_already_is_an_error(clock):
    async def main():
        source = ScriptedProvider(-1.0, clock=clock, prefix=secret())
        manager = manage(source, clock)

        with pytest.raises(CredentialExpired, match="expired"):
            await manager.get()

        await manager.aclose()

    clock.run(main())


def test_discord_access_a_manager_from_another_event_loop_is_a_clear_error(clock):
    manager = manage(ScriptedProvider(600.0, clock=clock, prefix=secret()), clock)
    own = clock.new_event_loop()
    own.run_until_complete(_get(manager))

    with pytest.raises(RuntimeError, match="event loop"):
        clock.run(_get(manager))
    own.close()


async def _get(manager):
    return await manager.get()


# On a real server.


async def test_asyncpg_and_hikari_a_rotation_during_the_connect_leaves_no_old_connection_behind(world):
    pool = await world.pool()
    world.door.hang_at(Stage.VERIFY, times=1)
    acquiring = asyncio.ensure_future(pool.acquire())
    await world.door.reached(Stage.VERIFY)
    await pool.manager.refresh()
    world.door.clear_faults()

    await pool.release(await acquiring)

    await world.until(lambda: pool.stats().by_generation == {2: 1})
    await world.assert_closes(pool)


async def test_psycopg_a_drain_during_a_connect_counts(world):
    pool = await world.pool()
    world.door.hang_at(Stage.VERIFY, times=1)
    acquiring = asyncio.ensure_future(pool.acquire())
    await world.door.reached(Stage.VERIFY)
    await pool.drain()
    world.door.clear_faults()

    connection = await acquiring
    await pool.release(connection)

    assert pool.stats().retired["drained"] == 1
    await world.assert_closes(pool)


async def test_asyncpg_expiring_during_a_connect_counts_on_every_version(world):
    pool = await world.pool()
    world.door.hang_at(Stage.VERIFY, times=1)
    acquiring = asyncio.ensure_future(pool.fetchval("SELECT pg_backend_pid()"))
    await world.door.reached(Stage.VERIFY)
    await pool.expire_connections()
    world.door.clear_faults()
    await acquiring

    assert await pool.fetchval("SELECT pg_backend_pid()")
    assert world.door.accepted >= 2
    await world.assert_closes(pool)


async def test_asyncpg_the_floor_survives_a_source_that_is_cancelled_from_inside(world):
    """Its floor task dies of a CancelledError that leaks out of the password callable, and nobody notices."""
    pool = await world.pool(min_size=2)

    def cancelled():
        raise asyncio.CancelledError

    world.provider.play(cancelled, world.mint)
    world.clock.advance(LIFETIME)
    world.door.kill_connections()

    for _ in range(3):
        with anyio.fail_after(PATIENCE):
            try:
                await pool.fetchval("SELECT 1")
            except (CredentialExpired, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                world.clock.advance(10.0)
    await world.assert_serves(pool)
    assert pool.get_size() == 2
    await world.assert_closes(pool)


async def test_asyncpg_stale_connections_at_rest_do_not_stay_open_for_ever(world):
    pool = await world.pool(min_size=2)

    await pool.manager.refresh()

    await world.until(lambda: pool.stats().by_generation == {2: 2})
    await world.door.until(lambda: world.door.live == 2)
    await world.assert_closes(pool)


async def test_a_lazily_opened_connection_is_replaced_in_the_background_before_its_lifetime_ends(world):
    pool = await world.pool(min_size=0, retire_when="never", max_lifetime=0.3, wait_for_reset=True)

    pid = await pool.fetchval("SELECT pg_backend_pid()")
    world.clock.advance(0.295)
    await world.until(lambda: pool.stats().replaced == 1)

    assert await pool.fetchval("SELECT pg_backend_pid()") != pid
    assert pool.stats().waits == 1
    await world.assert_closes(pool)


async def test_asyncpg_twenty_acquires_after_an_expiry_make_one_fetch(world):
    pool = await world.pool(min_size=20, max_size=20, retire_when="expired")
    world.clock.advance(LIFETIME)

    with anyio.fail_after(PATIENCE):
        connections = await asyncio.gather(*(pool.acquire() for _ in range(20)))
        await asyncio.gather(*map(pool.release, connections))

    assert pool.manager.stats().fetches == 2
    await world.assert_closes(pool)


@pytest.mark.parametrize(
    ("sqlstate", "message"),
    [
        ("28000", 'PAM authentication failed for user "{user}"'),
        ("28P01", 'password authentication failed for user "{user}"'),
        ("28000", "The access token has expired"),
        ("08P01", "SASL authentication failed"),
    ],
    ids=["rds", "scram", "entra", "pgbouncer"],
)
async def test_go_db_every_servers_refusal_is_recognised_and_mended_within_the_acquire(world, sqlstate, message):
    world.door.refusal_sqlstate, world.door.refusal_message = sqlstate, message
    pool = await world.pool()
    await (await pool.acquire()).close()
    world.revoke_all()

    assert await pool.fetchval("SELECT 1") == 1

    assert (pool.manager.stats().fetches, world.door.refused) == (2, 1)
    await world.assert_closes(pool)


async def test_go_db_a_token_of_unknown_life_is_not_kept_after_its_refusal(world):
    def opaque():
        return world.mint_now(None).password

    pool = await world.pool(world.manager(opaque))
    for round_ in range(1, 4):
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()
        assert pool.manager.stats().fetches == round_
        world.revoke_all()
        world.clock.advance(300.0)
    await world.assert_closes(pool)


async def test_dbhub_a_rotation_kills_no_healthy_session(world):
    pool = await world.pool(min_size=1)
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("CREATE TEMP TABLE kept (x int) ON COMMIT DROP")
        for _ in range(3):
            await pool.manager.refresh()
            await asyncio.sleep(0)
        world.clock.advance(LIFETIME)
        await connection.execute("INSERT INTO kept VALUES (1)")
        assert await connection.fetchval("SELECT count(*) FROM kept") == 1

    assert await pool.fetchval("SELECT 1") == 1
    await world.assert_closes(pool)


async def test_hikari_user_and_password_change_together(world: World):
    await world.server.create_role("app_v1")
    await world.server.create_role("app_v2")
    users: dict[str, str] = {}

    async def lease():
        user = f"app_v{1 + len(users) % 2}"
        credential = await world.mint(LIFETIME, user=user)
        users[credential.password] = user
        return credential

    world.door.verify = lambda user, password: None if users.get(password) == user else "the halves of two credentials"
    pool = await world.pool(world.manager(lease), min_size=2)

    for _ in range(6):
        await pool.manager.refresh()
        await asyncio.gather(*(pool.fetchval("SELECT current_user") for _ in range(8)))
    await world.until(lambda: set(pool.stats().by_generation) == {7})

    assert await pool.fetchval("SELECT current_user") == "app_v1"
    assert world.door.refused == 0
    await world.assert_closes(pool)


async def test_a_pool_in_a_forked_child_refuses_to_touch_its_parents_connections(world):
    pool = await world.pool(min_size=1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - nothing in here is seen by the parent
        try:
            try:
                pool.acquire().__await__().send(None)
            except asyncpg.InterfaceError as refusal:
                os.write(writing, str(refusal).encode())
            except BaseException as other:  # noqa: BLE001 - told to the parent
                os.write(writing, repr(other).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = await asyncio.to_thread(pipe.read)
    await asyncio.to_thread(os.waitpid, child, 0)

    assert "fork" in answer
    assert_no_secret(answer)
    assert await pool.fetchval("SELECT 1") == 1
    await world.assert_serves(pool)
    await world.assert_closes(pool)
