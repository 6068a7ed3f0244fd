"""In every place of an asyncpg pool: the same signature, and without credentials the same behaviour."""

import asyncio
import functools
import inspect

import anyio
import asyncpg
import pytest

import asyncpool_creds
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

OURS = {
    "credentials",
    "retire_when",
    "max_lifetime",
    "before_acquire",
    "after_release",
    "max_reconnects_per_second",
    "require_tls",
    "wait_for_reset",
    "fair",
    "fast_path",
    "expired_sessions",
    "connect_patience",
    "is_refusal",
    "on_event",
}
THEIRS = inspect.signature(asyncpg.create_pool).parameters
PARAMETERS = inspect.signature(asyncpool_creds.create_pool).parameters
PID = "SELECT pg_backend_pid()"


@pytest.fixture(scope="module")
def server():
    with PostgresServer() as server:
        yield server


# Signatures.


@pytest.mark.parametrize("name", THEIRS)
async def test_a_parameter_of_asyncpgs_create_pool_has_the_same_name_kind_and_default(name):
    theirs, ours = THEIRS[name], PARAMETERS.get(name)
    if theirs.kind is inspect.Parameter.VAR_KEYWORD:
        assert [one.kind for one in PARAMETERS.values()][-1] is inspect.Parameter.VAR_KEYWORD
        return

    assert ours is not None
    assert (ours.kind, ours.default) == (theirs.kind, theirs.default)


async def test_parameters_of_our_own_are_keyword_only_and_have_defaults():
    added = {name: one for name, one in PARAMETERS.items() if name not in THEIRS}

    # 0.30 and 0.31 have no init_size.
    assert OURS <= set(added) <= {*OURS, "init_size", "connect_kwargs"}
    assert all(
        one.kind is inspect.Parameter.KEYWORD_ONLY and one.default is not inspect.Parameter.empty
        for name, one in added.items()
        if name != "connect_kwargs"
    )


async def test_the_pool_has_every_public_name_of_asyncpgs_with_the_same_signature():
    for name, member in inspect.getmembers(asyncpg.Pool):
        if not name.startswith("_"):
            ours = getattr(asyncpool_creds.CredentialPool, name)
            if inspect.isfunction(member):
                assert inspect.signature(ours).parameters.keys() == inspect.signature(member).parameters.keys(), name
                assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(member), name


async def test_create_pool_is_a_plain_function_and_its_pool_an_asyncpg_pool(server):
    pool = asyncpool_creds.create_pool(server.dsn())

    assert isinstance(pool, asyncpg.Pool)
    assert not inspect.iscoroutinefunction(asyncpool_creds.create_pool)


async def test_every_parameter_of_asyncpgs_connect_reaches_it(server):
    taken = set()

    async def connect(dsn, **keywords):
        taken.update(keywords)
        return await asyncpg.connect(dsn, **{**keywords, "passfile": None})

    chosen = {
        "server_settings": {"application_name": "passed on"},
        "command_timeout": 7,
        "statement_cache_size": 11,
        "timeout": 13,
        "passfile": "/nowhere",
        "max_cached_statement_lifetime": 17,
        "max_cacheable_statement_size": 19,
        "direct_tls": None,
        "target_session_attrs": "any",
    }
    async with asyncpool_creds.create_pool(server.dsn(), connect=connect, min_size=1, max_size=1, **chosen) as pool:
        assert await pool.fetchval("SHOW application_name") == "passed on"

    assert taken == {*chosen, "loop", "connection_class", "record_class"}


async def test_init_size_on_an_asyncpg_without_it_is_an_error_that_says_so(server):
    if "init_size" in THEIRS:
        async with asyncpool_creds.create_pool(server.dsn(), init_size=2, min_size=1, max_size=3) as pool:
            assert (pool.get_size(), pool.get_init_size(), pool.get_min_size()) == (2, 2, 1)
    else:
        with pytest.raises(TypeError, match=r"init_size needs asyncpg 0\.32"):
            asyncpool_creds.create_pool(server.dsn(), init_size=2)


# Behaviour: each scenario runs on both, and what it reports must be equal.


class Scenarios:
    """Named pieces of use; each returns what a caller can observe."""

    async def acquire_and_release(self, create):
        async with create(max_size=2) as pool:
            connection = await pool.acquire()
            report = [type(connection).__name__, pool.get_size(), pool.get_idle_size(), pool.get_min_size()]
            await pool.release(connection)
            return [
                *report,
                pool.get_size(),
                pool.get_idle_size(),
                pool.get_max_size(),
                await pool.fetchval("SELECT 1"),
            ]

    async def release_twice(self, create):
        async with create() as pool:
            connection = await pool.acquire()
            await pool.release(connection)
            return await outcome(pool.release(connection))

    async def use_after_release(self, create):
        async with create() as pool:
            connection = await pool.acquire()
            await pool.release(connection)
            return await outcome(lambda: connection.fetchval("SELECT 1")), repr(connection).split()[1]

    async def release_of_what_is_no_pooled_connection(self, create):
        async with create() as pool:
            return await outcome(pool.release(5)), await outcome(pool.release(None))

    async def release_to_another_pool(self, create):
        async with create() as one, create() as other:
            connection = await one.acquire()
            result = await outcome(other.release(connection))
            await one.release(connection)
            return result

    async def release_of_a_bare_connection(self, create):
        async with create() as pool, pool.acquire() as connection:
            return await outcome(pool.release(connection._con))

    async def acquire_times_out(self, create):
        async with create() as pool, pool.acquire():
            return await outcome(pool.acquire(timeout=0.02)), pool.get_size(), pool.get_idle_size()

    async def acquire_in_a_closed_pool(self, create):
        pool = await create()
        await pool.close()
        return await outcome(pool.acquire()), await outcome(pool.fetchval("SELECT 1")), pool.is_closing()

    async def use_before_initialisation(self, create):
        pool = create()
        uses = (pool.acquire, pool.close, pool.terminate, pool.expire_connections, lambda: pool.fetch("SELECT 1"))
        return [await outcome(use) for use in uses], pool.get_size(), pool.get_idle_size(), pool.is_closing()

    async def use_while_initialising(self, create):
        inside, go = asyncio.Event(), asyncio.Event()

        async def init(_connection):
            inside.set()
            await go.wait()

        pool = create(init=init)
        opening = asyncio.ensure_future(pool)
        await inside.wait()
        results = [await outcome(pool.acquire()), await outcome(pool)]
        go.set()
        await opening
        results.append(await pool.fetchval("SELECT 1"))
        await pool.close()
        return results

    async def await_twice_and_enter(self, create):
        pool = create()
        same = [await pool is pool, await pool is pool]
        async with pool as entered:
            same.append(entered is pool)
        return same, await outcome(pool.close()), await outcome(pool.acquire())

    async def acquire_context_twice(self, create):
        async with create(max_size=2) as pool:
            context = pool.acquire()
            async with context:
                first = await outcome(context.__aenter__())
            return first, await outcome(context.__aenter__())

    async def iterate_over_a_pool(self, create):
        async with create() as pool:

            async def misuse():
                async for _ in pool:
                    pass

            def misuse_more():
                with pool:
                    pass

            return await outcome(misuse()), await outcome(misuse_more), await outcome(lambda: list(pool))

    async def close_waits_and_rejects(self, create):
        pool = await create(max_size=2)
        connection = await pool.acquire()
        closing = asyncio.create_task(pool.close())
        await until(pool.is_closing)
        results = [await outcome(pool.acquire()), closing.done(), await connection.fetchval("SELECT 1")]
        await pool.release(connection)
        await closing
        return results, pool.get_size(), pool.get_idle_size()

    async def close_is_cancelled(self, create):
        pool = await create()
        connection = await pool.acquire()
        result = await outcome(asyncio.wait_for(pool.close(), 0.02))
        return result, await outcome(lambda: connection.fetchval("SELECT 1")), await outcome(pool.acquire())

    async def terminate(self, create):
        pool = await create(max_size=2)
        connection = await pool.acquire()
        pool.terminate()
        pool.terminate()
        return (
            await outcome(lambda: connection.fetchval("SELECT 1")),
            await outcome(pool.release(connection)),
            await outcome(pool.acquire()),
            await outcome(pool.close()),
            pool.get_size(),
        )

    async def expire_connections(self, create):
        async with create(max_size=2) as pool:
            old = await pool.fetchval(PID)
            busy = await pool.acquire()
            pid = await busy.fetchval(PID)
            await pool.expire_connections()
            results = [await busy.fetchval(PID) == pid]
            await pool.release(busy)
            async with pool.acquire() as one, pool.acquire() as other:
                pids = {await one.fetchval(PID), await other.fetchval(PID)}
            return [*results, old in pids, pid in pids, len(pids), pool.get_size()]

    async def max_queries(self, create):
        async with create(max_queries=3) as pool:
            pids = [await pool.fetchval(PID) for _ in range(6)]
            return [pids.index(pid) for pid in pids], pool.get_size()

    async def inactive_lifetime(self, create):
        async with create(min_size=0, max_size=2, max_inactive_connection_lifetime=0.05) as pool:
            async with pool.acquire(), pool.acquire():
                sizes = [pool.get_size(), pool.get_idle_size()]
            sizes += [pool.get_size(), pool.get_idle_size()]
            await until(lambda: pool.get_size() == 0)
            return sizes, await pool.fetchval("SELECT 1")

    async def init_and_setup_and_reset(self, create):
        calls = []

        async def init(connection):
            calls.append(("init", type(connection).__name__))

        async def setup(connection):
            calls.append(("setup", type(connection).__name__))

        async def reset(connection):
            calls.append(("reset", type(connection).__name__))

        async with create(init=init, setup=setup, reset=reset) as pool:
            await pool.fetchval("SELECT 1")
            async with pool.acquire():
                pass
        return calls

    async def failing_init(self, create):
        async def init(_connection):
            raise LookupError("init")

        return await outcome(create(init=init)), await outcome(use(create(init=init, min_size=0)))

    async def failing_setup(self, create):
        errors = [LookupError("setup")]

        async def setup(_connection):
            if errors:
                raise errors.pop()

        async with create(setup=setup) as pool:
            return await outcome(pool.acquire()), await pool.fetchval("SELECT 1"), pool.get_size()

    async def failing_reset(self, create):
        errors = [LookupError("reset")]

        async def reset(_connection):
            if errors:
                raise errors.pop()

        async with create(reset=reset) as pool:
            old = await pool.acquire()
            pid = await old.fetchval(PID)
            return await outcome(pool.release(old)), await pool.fetchval(PID) == pid, pool.get_size()

    async def failing_connect(self, create):
        async def connect(*_arguments, **_keywords):
            raise LookupError("connect")

        return await outcome(create(connect=connect)), await outcome(use(create(connect=connect, min_size=0)))

    async def connect_that_returns_no_connection(self, create):
        async def connect(*_arguments, **_keywords):
            return 5

        return await outcome(create(connect=connect))

    async def connection_of_the_users_own_class(self, create):
        class Connection(asyncpg.Connection):
            def shout(self):
                return "hey"

        class Record(asyncpg.Record):
            pass

        async with create(connection_class=Connection, record_class=Record) as pool, pool.acquire() as connection:
            return connection.shout(), type(await connection.fetchrow("SELECT 1")).__name__

    async def bad_arguments(self, create):
        impossible = (
            {"min_size": -1},
            {"min_size": 3, "max_size": 2},
            {"max_size": 0},
            {"max_queries": 0},
            {"max_inactive_connection_lifetime": -1},
            {"connection_class": int},
            {"record_class": int},
        )
        results = [await outcome(lambda arguments=arguments: create(**arguments)) for arguments in impossible]
        # Ours is raised by the call already.
        results.append((await outcome(lambda: create(nonsense=5)))[0])
        results.append(await outcome(create(port="no port", dsn=None)))
        results.append(await outcome(create(ssl="maybe")))
        return results

    async def no_such_database(self, create):
        return await outcome(create(database="gone"))

    async def set_connect_args(self, create):
        async with create(server_settings={"application_name": "before"}) as pool:
            names = [await pool.fetchval("SHOW application_name")]
            pool.set_connect_args(create.dsn, server_settings={"application_name": "after"})
            names.append(await pool.fetchval("SHOW application_name"))
            await pool.expire_connections()
            return [*names, await pool.fetchval("SHOW application_name")]

    async def session_state(self, create):
        async with create() as pool:
            await pool.execute(
                "SET search_path TO elsewhere; SELECT pg_advisory_lock(1); CREATE TEMP TABLE kept (x int)"
            )
            return [
                await pool.fetchval("SHOW search_path"),
                await pool.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"),
                await outcome(pool.fetchval("SELECT count(*) FROM kept")),
            ]

    async def transaction_left_open(self, create):
        async with create() as pool:
            async with pool.acquire() as connection:
                await connection.execute("BEGIN")
            async with pool.acquire() as connection:
                return connection.is_in_transaction()

    async def listener_left_behind(self, create):
        async with create() as pool:
            connection = await pool.acquire()
            await connection.add_listener("news", print)
            with pytest.warns(asyncpg.InterfaceWarning) as warnings:
                await pool.release(connection)
            return [str(warning.message).split(">")[-1] for warning in warnings]

    async def cursor_and_statement_after_release(self, create):
        async with create() as pool:
            async with pool.acquire() as connection:
                statement = await connection.prepare("SELECT 1")
            return await outcome(statement.fetch)

    async def cancelled_acquire(self, create):
        async with create() as pool:
            async with pool.acquire():
                waiting = asyncio.ensure_future(pool.acquire())
                await asyncio.sleep(0.005)
                waiting.cancel()
                result = await outcome(waiting)
            return result, await pool.fetchval("SELECT 1"), pool.get_idle_size()

    async def query_that_times_out(self, create):
        async with create() as pool:
            return await outcome(pool.fetchval("SELECT pg_sleep(60)", timeout=0.02)), await pool.fetchval("SELECT 1")

    async def connection_closed_in_use(self, create):
        async with create() as pool:
            connection = await pool.acquire()
            await connection.close()
            results = [await outcome(lambda: connection.fetchval("SELECT 1")), await outcome(pool.release(connection))]
            return [*results, await pool.fetchval("SELECT 1"), pool.get_size()]

    async def connection_killed_in_use(self, create):
        async with create() as pool:
            connection = await pool.acquire()
            killed = await outcome(connection.execute("SELECT pg_terminate_backend(pg_backend_pid())"))
            await outcome(pool.release(connection))
            return killed, await pool.fetchval("SELECT 1"), pool.get_size()

    async def every_shortcut(self, create):
        async with create() as pool:
            await pool.execute("CREATE TEMP TABLE t (x int)")
            await pool.executemany("INSERT INTO t VALUES ($1)", [(1,), (2,), (3,)])
            await pool.copy_records_to_table("t", records=[(4,)])
            return [
                await pool.fetchval("SELECT sum(x) FROM t"),
                tuple(await pool.fetchrow("SELECT min(x), max(x) FROM t")),
                [row["x"] for row in await pool.fetch("SELECT x FROM t ORDER BY x")],
                await pool.copy_from_query("SELECT 1", output=discard),
                await pool.copy_from_table("t", output=discard),
            ]

    async def many_tasks(self, create):
        async with create(max_size=3) as pool:
            answers = await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(50)))
            return answers, pool.get_size(), pool.get_idle_size()

    async def concurrent_close(self, create):
        pool = await create(max_size=2)
        results = await asyncio.gather(pool.close(), pool.close(), return_exceptions=True)
        return [type(result).__name__ for result in results], await outcome(pool.acquire())

    async def cancelled_initialisation(self, create):
        inside = asyncio.Event()

        async def init(_connection):
            inside.set()
            await asyncio.Event().wait()

        pool = create(init=init)
        opening = asyncio.ensure_future(pool)
        await inside.wait()
        opening.cancel()
        return (await outcome(opening))[0], pool.get_size(), pool.get_idle_size()

    async def connect_that_is_cancelled_inside(self, create):
        async def connect(*_arguments, **_keywords):
            raise asyncio.CancelledError

        async with create(min_size=0, connect=connect) as pool:
            return (await outcome(pool.acquire()))[0], pool.get_size()

    async def hanging_reset_and_release_timeout(self, create):
        hangs = True

        async def reset(_connection):
            if hangs:
                await asyncio.Event().wait()

        async with create(reset=reset) as pool:
            connection = await pool.acquire()
            results = [await outcome(pool.release(connection, timeout=0.02))]
            connection = await pool.acquire(timeout=0.5)
            results.append(await outcome(pool.release(connection)))
            hangs = False
            return [*results, await pool.fetchval("SELECT 1"), pool.get_size()]

    async def hanging_setup_and_acquire_timeout(self, create):
        hangs = True

        async def setup(_connection):
            if hangs:
                await asyncio.Event().wait()

        async with create(setup=setup) as pool:
            result = await outcome(pool.acquire(timeout=0.02))
            hangs = False
            return result, await pool.fetchval("SELECT 1"), pool.get_size()

    async def order_of_reuse(self, create):
        async with create(max_size=3, min_size=3) as pool:
            held = [await pool.acquire() for _ in range(3)]
            pids = [await connection.fetchval(PID) for connection in held]
            for connection in held:
                await pool.release(connection)
            return [pids.index(await pool.fetchval(PID)) for _ in range(3)]

    async def error_in_the_block(self, create):
        async def fail(pool):
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("CREATE TABLE never (x int)")
                raise LookupError("in the block")

        async with create() as pool:
            result = await outcome(fail(pool))
            return result, await pool.fetchval("SELECT to_regclass('never')"), pool.get_idle_size()

    async def release_is_cancelled(self, create):
        inside, go = asyncio.Event(), asyncio.Event()

        async def reset(_connection):
            inside.set()
            await go.wait()

        async with create(reset=reset) as pool:
            connection = await pool.acquire()
            pid = await connection.fetchval(PID)
            releasing = asyncio.create_task(pool.release(connection))
            await inside.wait()
            releasing.cancel()
            result = await outcome(releasing)
            go.set()
            return result, await pool.fetchval(PID) == pid

    async def release_while_a_query_runs(self, create):
        async with create() as pool:
            connection = await pool.acquire()
            running = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0.01)
            result = await outcome(pool.release(connection))
            running.cancel()
            return result[0], (await outcome(running))[0], await pool.fetchval("SELECT 1")

    async def reload_schema_state(self, create):
        async with create() as pool, pool.acquire() as connection:
            return await outcome(connection.reload_schema_state())


async def discard(_data):
    """Take what COPY gives."""


async def use(pool):
    async with pool:
        return await pool.fetchval("SELECT 1")


async def until(condition):
    while not condition():  # noqa: ASYNC110 - asyncpg's pool has no event to wait for
        await asyncio.sleep(0.001)


async def outcome(use):
    """Return what became of an awaitable or of a call: the type of its result, or type and text of the error."""
    try:
        result = use() if callable(use) else use
        if inspect.isawaitable(result):
            result = await result
    except BaseException as error:  # noqa: BLE001 - errors are what is compared
        text = str(error).replace("asyncpool_creds._pool.CredentialPool", "POOL").replace("asyncpg.pool.Pool", "POOL")
        text = text.replace("CredentialPool", "Pool")
        return type(error).__name__, without_addresses(text)
    return "returned", type(result).__name__


def without_addresses(text):
    return " ".join("0x" if "0x" in word else word for word in text.split())


SCENARIOS = [name for name in vars(Scenarios) if not name.startswith("_")]
# These tell whether a release is done when the reset is, or before.
SEE_THE_RESET = {
    "acquire_and_release",
    "inactive_lifetime",
    "cancelled_acquire",
    "many_tasks",
    "order_of_reuse",
    "error_in_the_block",
}


async def token():
    return "a token that the server does not ask for"


WAYS = {
    "asyncpg's reset": {"fast_path": False},
    "waiting": {"wait_for_reset": True},
    "as it comes": {},
    **{
        f"{word} what has expired": {"wait_for_reset": True, "credentials": token, "expired_sessions": word}
        for word in ("serve", "refuse")
    },
}


@pytest.mark.parametrize(
    ("scenario", "way"),
    [
        (name, way)
        for name in SCENARIOS
        for way in WAYS
        if (way != "as it comes" or name not in SEE_THE_RESET)
        # With credentials, what makes no sense is an error of the call, since it says where they go.
        and ("credentials" not in WAYS[way] or name != "bad_arguments")
    ],
)
async def test_without_credentials_it_behaves_as_asyncpgs(server, scenario, way):
    reports = []
    for create_pool in (asyncpg.create_pool, functools.partial(asyncpool_creds.create_pool, **WAYS[way])):

        def create(*, create_pool=create_pool, **arguments):
            arguments.setdefault("max_size", 1)
            arguments.setdefault("min_size", min(1, arguments["max_size"]))
            return create_pool(arguments.pop("dsn", server.dsn()), **arguments)

        create.dsn = server.dsn()
        with anyio.fail_after(10):
            reports.append(await getattr(Scenarios(), scenario)(create))

    theirs, ours = reports
    assert ours == theirs
