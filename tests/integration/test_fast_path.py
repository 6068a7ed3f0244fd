"""The fast path against asyncpg's own way: random programs through both, and everything a caller and the server see."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import warnings

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import asyncpool_creds
from asyncpool_creds import ConnectionRetired, ReplacementFailed, _fastpath
from asyncpool_creds.testing import RecordingObserver

pytestmark = pytest.mark.anyio

PID = "SELECT pg_backend_pid()"
# What one user of a connection could leave to the next.
STATE = """
SELECT current_setting('application_name') AS name,
       current_setting('work_mem') AS work_mem,
       (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks,
       (SELECT count(*) FROM pg_listening_channels()) AS channels,
       (SELECT count(*) FROM pg_cursors WHERE name = 'held') AS cursors,
       to_regclass('pg_temp.scratch') IS NOT NULL AS scratch
"""


class Programs:
    """What a user may do with a connection; each returns what he sees."""

    async def select(self, connection):
        return await connection.fetchval("SELECT 1")

    async def set(self, connection):
        return await connection.execute("SET application_name = 'left'; SET work_mem = '1MB'")

    async def set_by_copy(self, connection):
        return await connection.copy_from_query("SELECT set_config('work_mem', '2MB', false)", output=discard)

    async def lock(self, connection):
        return await connection.fetchval("SELECT pg_advisory_lock(7)")

    async def listen(self, connection):
        return await connection.add_listener("news", print)

    async def listen_behind_its_back(self, connection):
        return await connection.execute("LISTEN news")

    async def hold_a_cursor(self, connection):
        return await connection.execute("BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; COMMIT")

    async def begin(self, connection):
        return await connection.execute("BEGIN; SET LOCAL work_mem = '3MB'")

    async def transaction(self, connection):
        async with connection.transaction():
            return await connection.fetchval("SELECT set_config('work_mem', '4MB', true)")

    async def left_transaction(self, connection):
        return await connection.transaction().start()

    async def iterate(self, connection):
        async with connection.transaction():
            return [row[0] async for row in connection.cursor("SELECT generate_series(1, 3)")]

    async def prepare(self, connection):
        return await (await connection.prepare("SELECT $1::int")).fetchval(5)

    async def temporary(self, connection):
        return await connection.execute("CREATE TEMP TABLE IF NOT EXISTS scratch (x int)")

    async def copy(self, connection):
        await connection.execute("CREATE TEMP TABLE IF NOT EXISTS scratch (x int)")
        return await connection.copy_records_to_table("scratch", records=[(1,), (2,)])

    async def fail(self, connection):
        return await connection.fetchval("SELECT 1/0")

    async def fail_in_a_transaction(self, connection):
        async with connection.transaction():
            return await connection.fetchval("SELECT 1/0")

    async def nonsense(self, connection):
        return await connection.execute("NONSENSE")

    async def time_out(self, connection):
        return await connection.fetchval("SELECT pg_sleep(60)", timeout=0.005)

    async def be_cancelled(self, connection):
        query = asyncio.ensure_future(connection.fetchval("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.002)
        query.cancel()
        return await query

    async def log_queries(self, connection):
        return connection.add_query_logger(discard)

    async def log_messages(self, connection):
        return connection.add_log_listener(print)

    async def close(self, connection):
        return await connection.close()

    async def terminate(self, connection):
        return connection.terminate()

    async def nothing(self, _connection):
        return None


# After these, asyncpg keeps the connection or not, as it happens; so it has the temporary tables, or not. Before 0.32,
# it may even let the cancellation of its own clean-up out.
RACES = {"time_out", "be_cancelled"}
LEFT_OUT = set() if "_pool_holder" in asyncpg.Connection.__slots__ else RACES
PROGRAMS = [name for name in vars(Programs) if not name.startswith("_") and name not in LEFT_OUT]
WAYS_OUT = ["release", "block", "twice", "with a timeout"]
checkouts = st.lists(
    st.tuples(st.lists(st.sampled_from(PROGRAMS), max_size=3), st.sampled_from(WAYS_OUT)), min_size=1, max_size=4
)


async def discard(_anything):
    """Take what COPY gives, and what loggers are told."""


async def run(create_pool, dsn, script):
    """Return what a user sees who checks out and gives back again and again, and what the next one is left with."""
    seen = []
    async with create_pool(dsn, min_size=1, max_size=1) as pool:
        for number, (programs, way_out) in enumerate(script):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                if way_out == "block":
                    async with pool.acquire() as connection:
                        seen += [await outcome(getattr(Programs(), name), connection) for name in programs]
                else:
                    connection = await pool.acquire(timeout=5 if way_out == "with a timeout" else None)
                    seen += [await outcome(getattr(Programs(), name), connection) for name in programs]
                    seen.append(await outcome(pool.release, connection))
                    if way_out == "twice":
                        seen.append(await outcome(pool.release, connection))
                seen.append(await outcome(connection.fetchval, "SELECT 1"))
                # Those who release look like this, whoever warned of what in between.
                seen.append(sorted({str(one.message).rpartition("> ")[2] for one in warned}))
            async with pool.acquire() as connection:
                state = dict(await connection.fetchrow(STATE))
                if any(RACES & set(earlier) for earlier, _ in script[: number + 1]):
                    del state["scratch"]
                seen.append((number, state, connection.is_in_transaction()))
        seen.append((pool.get_size(), pool.get_max_size()))
    return seen


async def outcome(use, *arguments):
    try:
        return "returned", await use(*arguments)
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
            raise
        return type(error).__name__, " ".join(word for word in str(error).split() if "0x" not in word)


@pytest.fixture
async def quiet():
    """Keep to ourselves what asyncpg says of transactions left open."""
    loop = asyncio.get_running_loop()
    before, said = loop.get_exception_handler(), []
    loop.set_exception_handler(lambda _loop, context: said.append(context["message"]))
    yield said
    loop.set_exception_handler(before)


@pytest.mark.parametrize("wait_for_reset", [True, False])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checkouts)
@example([([name], "release") for name in PROGRAMS])
@example([([name, name], "block") for name in PROGRAMS])
async def test_a_random_program_cannot_tell_it_from_asyncpgs_way(server, quiet, wait_for_reset, script):
    ours = functools.partial(asyncpool_creds.create_pool, wait_for_reset=wait_for_reset)

    assert await run(ours, server.dsn(), script) == await run(asyncpg.create_pool, server.dsn(), script)


@pytest.fixture
def resets(monkeypatch):
    """Count the resets that took the fast path."""
    taken = []
    release = _fastpath.FastPath.release

    def counted(self, slot):
        done = release(self, slot)
        taken.append(done is not None)
        return done

    monkeypatch.setattr(_fastpath.FastPath, "release", counted)
    return taken


async def test_an_ordinary_release_takes_the_fast_path(server, resets):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1) as pool:
        await pool.fetchval("SELECT 1")

    assert resets == [True]


async def test_a_rotation_under_way_changes_nothing_of_it(cloud, resets):
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        cloud.door.starting_up = True  # so that it stays under way
        await pool.manager.refresh()
        await cloud.observer.seen(ReplacementFailed)

        assert await pool.fetchval("SELECT 1") == 1
        assert resets == [True]


async def test_what_has_ended_in_use_is_closed_and_not_reset_first(cloud, resets):
    async with cloud.pool(max_size=1, expired_sessions="refuse") as pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            cloud.clock.advance(700)

        assert (await cloud.observer.seen(ConnectionRetired)).reason == "expired"
        assert resets == [False]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("execute", ["SELECT 1"]),
        ("executemany", ["SELECT $1::int", [(1,), (2,)]]),
        ("fetch", ["SELECT 1 AS x"]),
        ("fetchmany", ["SELECT $1::int AS x", [(1,), (2,)]]),
        ("fetchrow", ["SELECT 1 AS x"]),
        ("fetchval", ["SELECT 1"]),
    ],
)
async def test_whole_calls_do_what_asyncpgs_do_and_give_the_connection_back(server, resets, name, arguments):
    theirs = getattr(asyncpg.Pool, name)
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1) as pool:
        ours = getattr(pool, name)
        assert inspect.signature(ours) == inspect.signature(functools.partial(theirs, pool))
        assert ours.__doc__ == theirs.__doc__

        assert await ours(*arguments) == await theirs(pool, *arguments)
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await ours("NONSENSE", *arguments[1:])
        with pytest.raises(TypeError):
            await ours()
        assert resets == [True] * 4  # nobody has taken it with him
        assert await pool.fetchval("SELECT 1") == 1


async def test_where_nothing_was_sent_nothing_is_reset(server):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, wait_for_reset=True) as pool:
        counts = []
        for use in (Programs().nothing, Programs().nothing, Programs().select, Programs().nothing, Programs().nothing):
            async with pool.acquire() as connection:
                await use(connection)
            counts.append(pool.slots()[0].connection._protocol.queries_count)

    # A connection that was just opened may have been through init; a query is one, and its reset another.
    assert [count - counts[0] for count in counts] == [0, 0, 2, 2, 2]


async def test_a_connection_looks_like_one_of_its_class(server):
    class Own(asyncpg.Connection):
        """Its own."""

    for kind in (asyncpg.Connection, Own):
        async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, connection_class=kind) as pool:
            found = type(pool.slots()[0].connection)
            assert issubclass(found, kind)
            assert (found.__name__, found.__qualname__, found.__module__, found.__doc__) == (
                *(kind.__name__, kind.__qualname__, kind.__module__, kind.__doc__),
            )


class OwnReset(asyncpg.Connection):
    async def reset(self, *, timeout=None):  # noqa: ASYNC109 - asyncpg's signature
        await super().reset(timeout=timeout)


@pytest.mark.parametrize(
    "arguments", [{"connection_class": OwnReset}, {"max_queries": 1}], ids=["own reset", "used up"]
)
async def test_what_is_out_of_the_ordinary_takes_asyncpgs_way(server, resets, arguments):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, **arguments) as pool:
        await pool.fetchval("SELECT 1")

    assert resets == [False]


async def test_the_switch_turns_it_off(server, resets):
    async def reset(_connection):
        pass

    for arguments in ({"fast_path": False}, {"reset": reset}):
        async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, **arguments) as pool:
            await pool.fetchval("SELECT 1")

    assert resets == []


@pytest.mark.parametrize("arguments", [{}, {"fast_path": False}, {"wait_for_reset": True}])
async def test_without_a_reset_a_session_stays_as_it_is_but_for_open_transactions(server, quiet, arguments):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, reset=False, **arguments) as pool:
        pid = await pool.fetchval(PID)
        await pool.execute("SET work_mem = '1MB'; SELECT pg_advisory_lock(1)")
        connection = await pool.acquire()
        await connection.execute("BEGIN; SET LOCAL work_mem = '3MB'")
        await pool.release(connection)

        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval(PID) == pid
            assert await connection.fetchval("SHOW work_mem") == "1MB"
            assert (await connection.fetchrow(STATE))["locks"] == 1


async def test_without_a_reset_nothing_is_sent_after_a_query(server, resets):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, reset=False) as pool:
        counts = []
        for _ in range(3):
            await pool.fetchval("SELECT 1")
            counts.append(pool.slots()[0].connection._protocol.queries_count)

    assert [count - counts[0] for count in counts] == [0, 1, 2]
    assert resets == [True] * 3


@pytest.mark.parametrize("reset", [True, 0, "DISCARD ALL"])
def test_a_reset_that_is_none_is_refused_before_anything_is_opened(reset):
    with pytest.raises(TypeError, match="reset must be"):
        asyncpool_creds.create_pool("postgresql://nowhere", reset=reset)


async def test_an_asyncpg_without_what_it_needs_is_said_once_and_served_all_the_same(server, monkeypatch, caplog):
    monkeypatch.setattr(_fastpath, "_NEEDED", ((asyncpg.Connection, ("_what_is_no_more",)),))

    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert "has no Connection._what_is_no_more" in caplog.text


async def test_a_connection_goes_to_the_next_one_only_when_the_server_has_reset_it(server):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1) as pool:
        for _ in range(50):
            await pool.execute("SET work_mem = '1MB'; SELECT pg_advisory_lock(1)")
            assert await pool.fetchval("SHOW work_mem") != "1MB"


@pytest.mark.parametrize("wait_for_reset", [True, False])
async def test_a_connection_that_is_still_at_work_is_not_passed_on(server, wait_for_reset):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, wait_for_reset=wait_for_reset) as pool:
        await pool.fetchval("SELECT 1")
        connection = await pool.acquire()
        preparing = asyncio.ensure_future(connection.prepare("SELECT 2"))
        await asyncio.sleep(0)

        # asyncpg's own answer, unless the server is quick enough.
        with contextlib.suppress(asyncpg.InterfaceError):
            await pool.release(connection)

        assert await pool.fetchval("SELECT 1") == 1
        await asyncio.wait([preparing])
        assert preparing.exception() is None or isinstance(preparing.exception(), asyncpg.PostgresError | OSError)


class BrokenReset(asyncpg.Connection):
    def get_reset_query(self):
        return "SELECT 1/0"


async def test_a_reset_that_fails_after_release_retires_the_connection_and_is_an_event(server):
    observer = RecordingObserver()
    arguments = {"min_size": 1, "max_size": 1, "connection_class": BrokenReset, "on_event": observer}
    async with asyncpool_creds.create_pool(server.dsn(), **arguments) as pool:
        pid = await pool.fetchval(PID)

        assert (await observer.seen(ConnectionRetired)).reason == "reset_failed"
        assert await pool.fetchval(PID) != pid
        assert pool.stats().retired["reset_failed"] >= 1


async def test_waiting_for_the_reset_its_failure_reaches_the_one_who_releases(server):
    arguments = {"min_size": 1, "max_size": 1, "connection_class": BrokenReset, "wait_for_reset": True}
    async with asyncpool_creds.create_pool(server.dsn(), **arguments) as pool:
        connection = await pool.acquire()
        pid = await connection.fetchval(PID)

        with pytest.raises(asyncpg.DivisionByZeroError):
            await pool.release(connection)

        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval(PID) != pid
            await connection.close()


@pytest.mark.parametrize("wait_for_reset", [True, False])
async def test_a_release_that_is_cancelled_resets_all_the_same(server, wait_for_reset):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=1, wait_for_reset=wait_for_reset) as pool:
        connection = await pool.acquire()
        pid = await connection.fetchval(PID)
        await connection.execute("SET work_mem = '1MB'")
        releasing = asyncio.create_task(pool.release(connection))
        await asyncio.sleep(0)
        releasing.cancel()
        await asyncio.wait([releasing])

        assert await pool.fetchval(PID) == pid
        assert await pool.fetchval("SHOW work_mem") != "1MB"


@pytest.mark.parametrize("ending", ["close", "terminate", "drain", "expire_connections"])
async def test_the_pool_may_end_while_a_reset_is_under_way(server, ending):
    pool = await asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=2)
    connection = await pool.acquire()
    pid = await connection.fetchval(PID)
    await pool.release(connection)

    outcome = getattr(pool, ending)()
    if outcome is not None:
        await outcome

    if ending in ("close", "terminate"):
        with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
            await pool.acquire()
    else:
        assert await pool.fetchval(PID) != pid
        await pool.close()


async def test_one_user_after_the_other_does_not_make_the_pool_grow(server):
    async with asyncpool_creds.create_pool(server.dsn(), min_size=1, max_size=5) as pool:
        pids = {await pool.fetchval(PID) for _ in range(30)}

    assert len(pids) == 1
