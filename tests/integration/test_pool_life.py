"""A pool from its arguments to its end, and what it leaves behind: nothing."""

import asyncio
import dataclasses
import gc
import os
import weakref

import asyncpg
import pytest
from support import secret

from asyncpool_creds import (
    ConnectionOpened,
    CredentialExpired,
    CredentialPool,
    CredentialRefreshed,
    ManagerClosed,
    ProviderError,
    create_pool,
)
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio

PID = "SELECT pg_backend_pid()"


def tasks_of_ours():
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("asyncpool_creds: ")]


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"retire_when": "sometimes"}, ValueError, "retire_when must be"),
        ({"retire_when": None}, ValueError, "retire_when must be"),
        ({"max_lifetime": -1}, ValueError, "max_lifetime must be"),
        ({"max_lifetime": 0}, ValueError, "max_lifetime must be"),
        ({"max_lifetime": float("nan")}, ValueError, "max_lifetime must be"),
        ({"max_lifetime": "1h"}, ValueError, "max_lifetime must be"),
        ({"max_reconnects_per_second": 0}, ValueError, "max_reconnects_per_second must be"),
        ({"max_reconnects_per_second": -5}, ValueError, "max_reconnects_per_second must be"),
        ({"max_reconnects_per_second": "many"}, ValueError, "max_reconnects_per_second must be"),
        ({"max_reconnects_per_second": None}, ValueError, "max_reconnects_per_second must be"),
        ({"require_tls": "yes"}, ValueError, "require_tls must be"),
        ({"require_tls": 0}, ValueError, "require_tls must be"),
        ({"before_acquire": True}, TypeError, "before_acquire must be"),
        ({"after_release": "check"}, TypeError, "after_release must be"),
        ({"is_refusal": "28000"}, TypeError, "is_refusal must be"),
        ({"on_event": 5}, TypeError, "on_event"),
        ({"on_event": [print, 5]}, TypeError, "on_event"),
        ({"credentials": 5}, TypeError, "credentials"),
        ({"credentials": "token"}, TypeError, "credentials"),
        ({"credentials": ScriptedProvider}, TypeError, "credentials: got the class ScriptedProvider"),
        ({"min_size": 3, "max_size": 2}, ValueError, "min_size"),
        ({"max_size": 0}, ValueError, "max_size"),
        ({"max_queries": 0}, ValueError, "max_queries"),
        ({"connection_class": int}, TypeError, "connection_class"),
        ({"port": "no number"}, (ValueError, asyncpg.ClientConfigurationError, asyncpg.InterfaceError), "."),
        ({"ssl": "maybe"}, (ValueError, asyncpg.ClientConfigurationError), "sslmode"),
        ({"target_session_attrs": "best"}, (ValueError, asyncpg.ClientConfigurationError), "target_session_attrs"),
    ],
)
async def test_a_bad_argument_is_named_and_nothing_is_opened(cloud, arguments, kind, message):
    dsn = f"postgresql://app@127.0.0.1:{cloud.door.port}/postgres"

    with pytest.raises(kind, match=message):
        create_pool(dsn, **{"credentials": cloud.provider, **arguments})

    assert (cloud.door.attempts, cloud.provider.calls, tasks_of_ours()) == (0, 0, [])


async def test_arguments_that_fail_leave_no_subscription_with_a_shared_manager(cloud):
    manager = cloud.manager()
    seen = RecordingObserver()

    with pytest.raises(ValueError, match="exclude each other"):
        create_pool(cloud.dsn(), credentials=manager, password=secret(), on_event=seen)
    await manager.refresh()

    assert seen.events == []


async def test_an_argument_asyncpg_does_not_know_is_an_error_before_anything_is_asked(cloud):
    with pytest.raises(TypeError, match="keyword argument 'pasword'; did you mean 'password'"):
        create_pool(cloud.dsn(), credentials=cloud.provider, pasword=secret())

    assert (cloud.door.attempts, cloud.provider.calls, cloud.provider.closed) == (0, 0, 0)


# Beginning.


async def test_a_pool_is_awaitable_a_context_manager_and_an_asyncpg_pool(cloud):
    pool = create_pool(cloud.dsn(), credentials=cloud.provider, min_size=1, max_size=1)
    assert isinstance(pool, CredentialPool)
    assert isinstance(pool, asyncpg.Pool)

    assert await pool is pool
    assert await pool is pool
    async with pool:
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_failed_first_connect_leaves_nothing(cloud):
    cloud.door.refuse_with("3D000", 'database "gone" does not exist')
    pool = create_pool(cloud.dsn(), credentials=cloud.provider, min_size=3, max_size=3)

    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await pool

    assert (cloud.door.attempts, cloud.door.live, cloud.provider.closed) == (1, 0, 1)
    assert tasks_of_ours() == []
    with pytest.raises(asyncpg.InterfaceError):
        await pool.fetchval("SELECT 1")


async def test_a_failed_later_connect_of_the_first_fill_leaves_nothing(cloud):
    cloud.door.max_connections = 2

    with pytest.raises(asyncpg.TooManyConnectionsError):
        await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=6, max_size=6)

    await cloud.door.until(lambda: cloud.door.live == 0)
    assert cloud.provider.closed == 1
    assert tasks_of_ours() == []


async def test_connects_that_outlive_a_failed_first_fill_are_closed(cloud):
    async def connect(*arguments, **keywords):
        connects.append(None)
        if len(connects) == 2:
            raise LookupError("the second one fails")
        return await asyncpg.connect(*arguments, **keywords)

    connects = []
    pool = create_pool(cloud.dsn(), credentials=cloud.provider, min_size=4, max_size=4, connect=connect)
    cloud.door.hang_at(Stage.BACKEND_CONNECT)
    opening = asyncio.ensure_future(pool)
    await cloud.door.reached(Stage.BACKEND_CONNECT)
    cloud.door.clear_faults()

    with pytest.raises(LookupError, match="the second one fails"):
        await opening

    await cloud.until(lambda: cloud.door.attempts == 3)
    await cloud.door.until(lambda: cloud.door.live == 0)
    assert tasks_of_ours() == []


async def test_a_cancelled_first_fill_leaves_nothing(cloud):
    cloud.door.hang_at(Stage.VERIFY)
    opening = asyncio.ensure_future(create_pool(cloud.dsn(), credentials=cloud.provider, min_size=1, max_size=1))
    await cloud.door.reached(Stage.VERIFY)

    opening.cancel()

    with pytest.raises(asyncio.CancelledError):
        await opening
    assert (cloud.door.live, cloud.provider.closed, tasks_of_ours()) == (0, 1, [])


async def test_a_failing_init_of_the_first_fill_leaves_nothing(cloud):
    async def init(connection):
        raise LookupError("no such type")

    with pytest.raises(LookupError, match="no such type"):
        await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=1, max_size=1, init=init)

    await cloud.door.until(lambda: cloud.door.live == 0)
    assert (cloud.provider.closed, tasks_of_ours()) == (1, [])


async def test_a_pool_that_was_never_opened_and_is_closed_closes_its_manager(cloud):
    pool = create_pool(cloud.dsn(), credentials=cloud.provider)

    with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
        await pool.close()

    assert (cloud.door.attempts, cloud.provider.closed, tasks_of_ours()) == (0, 1, [])


async def test_a_pool_that_was_never_opened_may_be_dropped(cloud):
    manager = cloud.manager()
    create_pool(cloud.dsn(), credentials=manager)
    create_pool(cloud.dsn(), credentials=cloud.provider)

    gc.collect()

    assert (cloud.door.attempts, cloud.provider.calls, tasks_of_ours()) == (0, 0, [])


# Managers.


async def test_a_pool_closes_the_manager_it_built(cloud):
    async with create_pool(cloud.dsn(), credentials=cloud.provider, min_size=1, max_size=1) as pool:
        manager = pool.manager
        assert cloud.provider.closed == 0

    assert cloud.provider.closed == 1
    with pytest.raises(ManagerClosed):
        await manager.get()


async def test_several_pools_share_a_manager_that_none_of_them_closes(cloud):
    manager = cloud.manager()
    async with cloud.pool(credentials=manager, retire_when="rotated") as first:
        async with cloud.pool(credentials=manager, retire_when="rotated") as second:
            assert first.manager is second.manager is manager
            assert (cloud.provider.calls, cloud.presented) == (1, [1] * 4)
            await manager.refresh()
            await cloud.door.until(lambda: cloud.presented == [1] * 4 + [2] * 4)
        await manager.refresh()
        await cloud.door.until(lambda: cloud.presented == [1] * 4 + [2] * 4 + [3] * 2)

    assert cloud.provider.closed == 0
    assert (await manager.get()).password == cloud.provider.credentials[-1].password


async def test_a_shared_manager_stays_open_when_a_pool_fails_to_open(cloud):
    manager = cloud.manager()
    cloud.door.refuse_with("3D000", 'database "gone" does not exist')
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await cloud.pool(credentials=manager)

    assert cloud.provider.closed == 0
    await manager.get()


async def test_a_closed_manager_is_a_typed_error_of_the_next_connect(cloud):
    manager = cloud.manager()
    async with cloud.pool(credentials=manager, min_size=1) as pool:
        await manager.aclose()

        assert await pool.fetchval("SELECT 1") == 1
        async with pool.acquire():
            with pytest.raises(ManagerClosed):
                await pool.acquire()


async def test_a_provider_that_fails_to_close_is_an_error_of_close_after_everything_is_closed(cloud):
    class Stubborn:
        fetch = cloud.provider.fetch

        async def aclose(self):
            raise LookupError("cannot let go")

    pool = await create_pool(cloud.dsn(), credentials=Stubborn(), min_size=1, max_size=1)

    with pytest.raises(LookupError, match="cannot let go"):
        await pool.close()

    assert (cloud.door.live, tasks_of_ours()) == (0, [])


# Events and statistics.


async def test_one_observer_hears_of_the_manager_and_of_the_pool(cloud, observer):
    async with create_pool(cloud.dsn(), credentials=cloud.provider, min_size=1, max_size=1, on_event=observer):
        assert len(observer.of(CredentialRefreshed)) == 1
        (opened,) = observer.of(ConnectionOpened)
        assert (opened.generation, opened.replacement) == (1, False)


async def test_several_observers_hear_the_same_and_a_broken_one_disturbs_nobody(cloud, observer):
    def broken(event):
        raise LookupError("a bug")

    second = RecordingObserver()
    async with cloud.pool(on_event=[observer, broken, second]) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert observer.events == second.events
    assert len(observer.of(ConnectionOpened)) == 2


async def test_an_observer_of_a_shared_managers_pool_hears_of_the_manager_until_the_pool_is_closed(cloud, observer):
    manager = cloud.manager()
    async with cloud.pool(credentials=manager, min_size=0):
        await manager.refresh()
        assert len(observer.of(CredentialRefreshed)) == 1
    await manager.refresh()

    assert len(observer.of(CredentialRefreshed)) == 1


async def test_stats_are_a_snapshot_that_nobody_can_change(cloud):
    async with cloud.pool(max_size=3, min_size=2, wait_for_reset=True) as pool:
        before = pool.stats()
        async with pool.acquire():
            during = pool.stats()
        after = pool.stats()

        assert (before.in_use, before.idle, before.opened, before.spare) == (0, 2, 2, 0)
        assert sorted(one.state for one in before.connections) == ["closed", "idle", "idle"]
        assert (during.in_use, during.idle) == (1, 1)
        assert (after.in_use, after.idle, after.by_generation, after.retired) == (0, 2, {1: 2}, {})
        assert (after.manager.fetches, after.manager.generation, after.manager.seconds_left) == (1, 1, 600)
        assert {one.generation for one in after.connections} == {1, None}
        with pytest.raises(dataclasses.FrozenInstanceError):
            after.idle = 5
        with pytest.raises(TypeError):
            after.retired["drained"] = 5
        with pytest.raises(TypeError):
            after.by_generation[1] = 5


async def test_stats_count_the_acquires_that_waited_for_a_connect(cloud):
    async with cloud.pool(min_size=1) as pool:
        async with pool.acquire():
            assert pool.stats().waits == 0
            async with pool.acquire():
                assert pool.stats().waits == 1
        await pool.fetchval("SELECT 1")

        assert pool.stats().waits == 1


async def test_stats_without_credentials(server):
    async with create_pool(server.dsn(), min_size=1, max_size=2) as pool:
        stats = pool.stats()

    assert (stats.idle, stats.by_generation, stats.manager, pool.manager) == (1, {}, None, None)


async def test_stats_of_a_pool_before_it_is_open_and_after_it_is_closed(cloud):
    pool = cloud.pool()
    assert pool.stats().connections == ()
    async with pool:
        pass

    assert [one.state for one in pool.stats().connections] == ["closed", "closed"]


# What callers do with a pool.


async def test_transactions_cursors_copy_and_prepared_statements_work(cloud, tmp_path):
    async with cloud.pool(max_size=1) as pool, pool.acquire() as connection:
        await connection.execute("CREATE TEMP TABLE item (id int, name text)")
        await connection.copy_records_to_table("item", records=[(n, f"name {n}") for n in range(100)])
        assert await connection.fetchval("SELECT count(*) FROM item") == 100
        await connection.copy_from_query("SELECT * FROM item ORDER BY id", output=tmp_path / "items", format="csv")
        assert (tmp_path / "items").read_text().splitlines()[:2] == ["0,name 0", "1,name 1"]
        await connection.copy_to_table("item", source=tmp_path / "items", format="csv")

        async with connection.transaction():
            names = [row["name"] async for row in connection.cursor("SELECT name FROM item ORDER BY id", prefetch=7)]
        assert len(names) == 200
        statement = await connection.prepare("SELECT name FROM item WHERE id = $1 LIMIT 1")
        assert await statement.fetchval(7) == "name 7"

        with pytest.raises(ZeroDivisionError):
            async with connection.transaction():
                await connection.execute("DELETE FROM item")
                raise ZeroDivisionError
        assert await connection.fetchval("SELECT count(*) FROM item") == 200
        await connection.executemany("INSERT INTO item VALUES ($1, $2)", [(1, "a"), (2, "b")])
        assert await connection.fetchrow("SELECT max(id) AS m FROM item") == (99,)


async def test_listen_and_notify_work(cloud):
    heard = asyncio.get_running_loop().create_future()
    async with cloud.pool() as pool, pool.acquire() as listening:

        def hear(*arguments):
            heard.set_result(arguments[2:])

        await listening.add_listener("news", hear)
        await pool.execute("NOTIFY news, 'hello'")

        assert await heard == ("news", "hello")
        await listening.remove_listener("news", hear)


async def test_nothing_of_a_session_is_left_for_the_next(cloud):
    async with cloud.pool(max_size=1) as pool:
        await pool.execute("SET search_path TO elsewhere; SELECT pg_advisory_lock(7)")

        assert await pool.fetchval("SHOW search_path") != "elsewhere"
        assert await pool.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_a_users_own_hooks_and_classes_compose(cloud):
    calls = []

    class Connection(asyncpg.Connection):
        pass

    class Record(asyncpg.Record):
        pass

    async def connect(dsn, **keywords):
        calls.append(("connect", sorted(set(keywords) & {"connection_class", "password", "record_class", "user"})))
        assert callable(keywords["password"])
        return await asyncpg.connect(dsn, **keywords)

    async def init(connection):
        calls.append(("init", isinstance(connection, Connection)))

    async def setup(connection):
        calls.append(("setup", isinstance(connection._con, Connection)))

    async def reset(connection):
        calls.append(("reset", isinstance(connection, Connection)))

    async with cloud.pool(
        max_size=1,
        connect=connect,
        init=init,
        setup=setup,
        reset=reset,
        connection_class=Connection,
        record_class=Record,
    ) as pool:
        assert type(await pool.fetchrow("SELECT 1")) is Record

    assert calls == [
        ("connect", ["connection_class", "password", "record_class"]),
        ("init", True),
        ("setup", True),
        ("reset", True),
    ]


async def test_a_users_connect_gets_the_user_that_comes_with_the_credential(cloud):
    users = []
    cloud.provider = ScriptedProvider(60, clock=cloud.clock, user="reporter", prefix=secret())

    async def connect(dsn, **keywords):
        users.append((keywords["user"], keywords["password"]() == cloud.provider.credentials[0].password))
        return await asyncpg.connect(dsn, **keywords)

    async with cloud.pool(max_size=1, connect=connect) as pool:
        assert await pool.fetchval("SELECT current_user") == "reporter"

    assert users == [("reporter", True)]


async def test_a_users_connect_that_returns_no_connection_is_asyncpgs_error(cloud):
    async def connect(dsn, **keywords):
        return 5

    with pytest.raises(asyncpg.InterfaceError, match="expected pool connect callback to return an instance"):
        await cloud.pool(connect=connect)


async def test_an_error_of_a_users_connect_is_the_callers_and_the_slot_stays_usable(cloud):
    fails = True

    async def connect(dsn, **keywords):
        if fails:
            raise LookupError("directory of hosts is down")
        return await asyncpg.connect(dsn, **keywords)

    async with cloud.pool(min_size=0, connect=connect) as pool:
        with pytest.raises(LookupError, match="directory of hosts is down"):
            await pool.fetchval("SELECT 1")
        fails = False

        assert await pool.fetchval("SELECT 1") == 1


async def test_a_failing_setup_closes_the_connection_and_the_slot_stays_usable(cloud):
    errors = [LookupError("setup")]

    async def setup(connection):
        if errors:
            raise errors.pop()

    async with cloud.pool(max_size=1, setup=setup) as pool:
        with pytest.raises(LookupError, match="setup"):
            await pool.fetchval("SELECT 1")

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.presented == [1, 1]


async def test_a_cancelled_query_leaves_the_pool_usable(cloud):
    async with cloud.pool(max_size=1) as pool:
        with pytest.raises(TimeoutError):
            await pool.execute("SELECT pg_sleep(600)", timeout=0.05)

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.door.cancel_requests == 1


async def test_connections_that_are_killed_in_use_are_replaced(cloud):
    async with cloud.pool() as pool:
        async with pool.acquire() as connection:
            cloud.door.kill_connections()
            with pytest.raises((asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError, OSError)):
                await connection.fetchval("SELECT 1")

        assert await pool.fetchval("SELECT 1") == 1


async def test_an_acquire_that_times_out_in_its_connect_leaves_the_slot_usable(cloud):
    async with cloud.pool(min_size=0, max_size=1) as pool:
        cloud.door.hang_at(Stage.VERIFY)
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.05)
        cloud.door.clear_faults()

        assert await pool.fetchval("SELECT 1") == 1
        await cloud.door.until(lambda: cloud.door.live == 1)


# The end.


async def test_close_waits_for_connections_in_use(cloud):
    pool = await cloud.pool()
    connection = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await cloud.until(pool.is_closing)

    assert await connection.fetchval("SELECT 1") == 1
    with pytest.raises(asyncpg.InterfaceError, match="closing"):
        await pool.acquire()
    assert not closing.done()
    await pool.release(connection)
    await closing

    assert (cloud.door.live, tasks_of_ours()) == (0, [])


async def test_close_twice_is_harmless_one_after_the_other_and_at_once(cloud):
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=2, max_size=2)

    await asyncio.gather(pool.close(), pool.close())
    await pool.close()

    assert (cloud.door.live, cloud.provider.closed, tasks_of_ours()) == (0, 1, [])


async def test_close_while_an_acquire_connects_leaves_nothing(cloud):
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=0, max_size=2)
    cloud.door.hang_at(Stage.VERIFY)
    acquiring = asyncio.ensure_future(pool.acquire())
    await cloud.door.reached(Stage.VERIFY)

    await pool.close()
    cloud.door.clear_faults()

    with pytest.raises(asyncpg.InterfaceError, match="pool is closing"):
        await acquiring
    await cloud.door.until(lambda: cloud.door.live == 0)
    assert (cloud.provider.closed, tasks_of_ours()) == (1, [])


@pytest.mark.parametrize("how", ["close", "terminate"])
async def test_the_end_of_a_pool_while_a_new_connection_is_initialised_leaves_nothing(cloud, how):
    """asyncpg 0.30 and 0.31 would hand the connection out and never close it."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def init(connection):
        inside.set()
        await go.wait()

    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=0, max_size=2, init=init)
    acquiring = asyncio.ensure_future(pool.acquire())
    await inside.wait()

    if how == "close":
        await pool.close()
    else:
        pool.terminate()
    go.set()

    with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
        await acquiring
    await cloud.door.until(lambda: cloud.door.live == 0)
    await cloud.until(lambda: tasks_of_ours() == [])
    assert cloud.provider.closed == 1


async def test_close_while_an_acquire_waits_for_a_credential_leaves_nothing(cloud):
    cloud.provider.play(ScriptedProvider.HANG)
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=0, max_size=2)
    acquiring = asyncio.ensure_future(pool.acquire())
    await cloud.provider.called()

    await pool.close()

    with pytest.raises(asyncpg.InterfaceError, match="pool is closing"):
        await acquiring
    assert (cloud.door.attempts, cloud.provider.closed, tasks_of_ours()) == (0, 1, [])


async def test_a_cancelled_close_terminates_everything(cloud):
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=2, max_size=2)
    connection = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await cloud.until(pool.is_closing)

    closing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
        await connection.fetchval("SELECT 1")
    await cloud.door.until(lambda: cloud.door.live == 0)
    await cloud.until(lambda: tasks_of_ours() == [])
    assert cloud.provider.closed == 1


async def test_terminate_leaves_nothing(cloud):
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=2, max_size=2)
    connection = await pool.acquire()

    pool.terminate()
    pool.terminate()

    await cloud.door.until(lambda: cloud.door.live == 0)
    await cloud.until(lambda: tasks_of_ours() == [])
    assert cloud.provider.closed == 1
    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
        await connection.fetchval("SELECT 1")
    with pytest.raises(asyncpg.InterfaceError, match="closed"):
        await pool.fetchval("SELECT 1")


async def test_close_after_terminate_waits_for_what_terminate_left_to_do(cloud):
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=2, max_size=2)

    pool.terminate()
    await pool.close()

    assert (cloud.provider.closed, tasks_of_ours()) == (1, [])


@pytest.mark.parametrize("how", ["close", "terminate"])
async def test_the_end_of_a_pool_in_the_middle_of_a_replacement_leaves_nothing(cloud, how):
    pool = await cloud.pool(retire_when="rotated")
    cloud.door.hang_at(Stage.VERIFY)
    await pool.manager.refresh()
    await cloud.door.reached(Stage.VERIFY)

    if how == "close":
        await pool.close()
    else:
        pool.terminate()

    await cloud.door.until(lambda: cloud.door.live == 0)
    await cloud.until(lambda: tasks_of_ours() == [])


async def test_the_end_of_a_pool_with_a_replacement_that_waits_leaves_nothing(cloud):
    pool = await cloud.pool(max_size=1, retire_when="rotated")
    connection = await pool.acquire()
    await pool.manager.refresh()
    await cloud.until(lambda: pool.stats().spare == 1)
    closing = asyncio.create_task(pool.close())
    await cloud.until(pool.is_closing)
    await pool.release(connection)
    await closing

    assert (cloud.door.live, tasks_of_ours()) == (0, [])


async def test_a_pool_that_is_dropped_after_its_end_is_collected(cloud):
    manager = cloud.manager()

    async def use():
        # asyncpg 0.30 and 0.31 leave the timers of idle connections running.
        async with cloud.pool(credentials=manager, max_inactive_connection_lifetime=0) as pool:
            await pool.fetchval("SELECT 1")
            return weakref.ref(pool)

    pool = await use()
    await asyncio.sleep(0)
    gc.collect()

    assert pool() is None


async def test_a_forked_child_gets_a_clear_error(cloud):
    async with cloud.pool() as pool:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            answer = "no error"
            try:
                pool.acquire().__await__().send(None)
            except BaseException as error:  # noqa: BLE001 - the parent looks at it
                answer = f"{type(error).__name__}: {error}"
            # What a careful child does on its way out must not reach the parent's connections.
            pool.terminate()
            os.write(writer, answer.encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)  # noqa: ASYNC222 - it has nothing to wait for
        with os.fdopen(reader) as pipe:
            answer = pipe.read()

        assert answer.startswith("InterfaceError: this pool was made ")
        assert "make a pool in each process, after the fork" in answer
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.stats().opened == pool.get_size()


async def test_a_source_that_recovers_is_enough_for_the_pool_to_work_again(cloud):
    cloud.provider.play(ProviderError("down"))
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(CredentialExpired, match="down"):
            await pool.fetchval("SELECT 1")
        cloud.provider.play(600)
        cloud.clock.advance(10)

        assert await pool.fetchval("SELECT 1") == 1
