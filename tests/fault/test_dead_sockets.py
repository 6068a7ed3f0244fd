"""A network that forgets connections and tells neither end: no query, reset or goodbye on them is answered any more."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

import asyncpool_creds
from asyncpool_creds import ConnectionRetired, Credential, TokenManager, _slots, _watchdog, create_pool
from asyncpool_creds._events import Observers
from asyncpool_creds.testing import RecordingObserver
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

PID = "SELECT pg_backend_pid()"
PACKAGES = tuple(os.path.dirname(package.__file__) + os.sep for package in (asyncpg, asyncpool_creds))  # noqa: PTH120
# What a caller gives a query, and what may be left behind by it when its time is up.
DEADLINE = 0.1
BEHIND = 1.0
# For what would take for ever.
FOR_EVER = 8.0

WAYS = {
    "as it comes": {},
    "wait_for_reset": {"wait_for_reset": True},
    "asyncpg's way": {"fast_path": False},
    "without credentials": {"credentials": None},
}


class ForgetfulNetwork:
    """Passes bytes on both ways, until it forgets a connection: from then on it swallows them, and closes nothing.

    Attributes:
        forgets_new_ones: Swallow everything on connections that come from now on.
        forgets_at: What a client's message begins with that is swallowed, and with it all that comes later.
        has_forgotten: Whether anything has been forgotten yet.
        opened: How many connections there were.
    """

    def __init__(self, server: PostgresServer) -> None:
        self.forgets_new_ones = False
        self.forgets_at: bytes | None = None
        self.has_forgotten = False
        self.opened = 0
        self.ends: list[End] = []
        self._path = f"{server.socket_directory}/.s.PGSQL.{server.port}"

    async def __aenter__(self):
        self._listener = await asyncio.get_running_loop().create_server(self._client, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._listener.close()
        self.kill()

    def forget(self):
        """Forget every connection there is."""
        self.has_forgotten = True
        for end in self.ends:
            end.is_forgotten = True

    def kill(self):
        """Reset every connection there is."""
        for end in self.ends:
            if end.transport is not None:
                end.transport.abort()

    def _client(self):
        self.opened += 1
        client, server = End(self), End(self)
        client.other, server.other = server, client
        self.ends += [client, server]
        client.is_forgotten = self.forgets_new_ones
        if not client.is_forgotten:
            connecting = asyncio.get_running_loop().create_unix_connection(lambda: server, self._path)
            client.connecting = asyncio.ensure_future(connecting)
        return client


class End(asyncio.Protocol):
    """One end of a connection through the network."""

    def __init__(self, network):
        self.network = network
        self.other = self.transport = self.connecting = None
        self.is_forgotten = False
        self._waiting = []

    def connection_made(self, transport):
        self.transport = transport
        for data in self._waiting:
            transport.write(data)

    def data_received(self, data):
        if self.network.forgets_at is not None and data.startswith(self.network.forgets_at):
            self.network.forgets_at = None
            self.network.forget()
        if not self.is_forgotten:
            self.other.write(data)

    def write(self, data):
        if self.transport is None:
            self._waiting.append(data)
        else:
            self.transport.write(data)

    def connection_lost(self, _error):
        if not self.is_forgotten and self.other.transport is not None:
            self.other.transport.close()


@pytest.fixture
async def network(server) -> AsyncIterator[ForgetfulNetwork]:
    async with ForgetfulNetwork(server) as network:
        yield network


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A fifth of a second instead of a whole one."""
    monkeypatch.setattr(_watchdog, "_TICK", 0.02)
    monkeypatch.setattr(_watchdog, "_GOODBYE", 0.18)
    monkeypatch.setattr(_watchdog, "ANSWER_OF_OWN", 20)
    monkeypatch.setattr(_slots, "ANSWER_OF_OWN", 20)
    _watchdog.answer_to_reset.cache_clear()
    yield
    _watchdog.answer_to_reset.cache_clear()


async def open_pool(network, **arguments):
    """Open a pool of two connections, which have been in use."""
    arguments = {
        "credentials": lambda: Credential("not looked at"),
        "on_event": RecordingObserver(),
        "min_size": 2,
        "max_size": 2,
        "timeout": 5,
        **arguments,
    }
    pool = await create_pool(f"postgresql://app@127.0.0.1:{network.port}/postgres", **arguments)
    await asyncio.gather(*(pool.fetchval(PID) for _ in range(4)))
    await until(lambda: pool.get_idle_size() == pool.get_max_size())
    return pool


@contextlib.asynccontextmanager
async def pool_behind(network, **arguments):
    """Open such a pool; on the way out, it must serve unless it is closed, and close, whatever happened."""
    pool = await open_pool(network, **arguments)
    try:
        yield pool
        if not pool._closed:
            await assert_serves(pool)
    finally:
        assert await seconds(pool.close()) < BEHIND


async def assert_serves(pool):
    """Whatever was dead is replaced by now, and nobody who comes has to wait for long."""
    assert await seconds(asyncio.gather(*(pool.fetchval(PID) for _ in range(10)))) < BEHIND
    await until(lambda: pool.get_idle_size() == pool.get_size())


async def until(condition):
    async with asyncio.timeout(FOR_EVER):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


async def seconds(awaitable, error=None):
    """Return how long it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(FOR_EVER):
        if error is None:
            await awaitable
        else:
            with pytest.raises(error):
                await awaitable
    return loop.time() - began


def test_the_wait_for_an_answer_is_over_within_a_second(monkeypatch):
    monkeypatch.undo()

    assert 0.5 < _watchdog.ANSWER * _watchdog._TICK < BEHIND
    assert _watchdog._GOODBYE < BEHIND


# What callers do when their connection has been forgotten.


async def query_with_a_timeout(pool):
    await pool.fetchval("SELECT 1", timeout=DEADLINE)


async def new_query_with_a_timeout(pool):
    await pool.fetchval("SELECT 2", timeout=DEADLINE)


async def call_under_a_deadline(pool):
    async with asyncio.timeout(DEADLINE):
        await pool.fetchval("SELECT 1")


async def block_with_a_timeout(pool):
    async with pool.acquire() as connection:
        await connection.execute("SELECT 1", timeout=DEADLINE)


async def block_under_a_deadline(pool):
    async with asyncio.timeout(DEADLINE), pool.acquire() as connection:
        await connection.fetchval("SELECT 1")


async def transaction_with_a_timeout(pool):
    async with pool.acquire() as connection, connection.transaction():
        pool.network.forget()
        await connection.fetchval("SELECT 1", timeout=DEADLINE)


async def nested_transaction_with_a_timeout(pool):
    async with pool.acquire() as connection, connection.transaction(), connection.transaction():
        pool.network.forget()
        await connection.fetchval("SELECT 1", timeout=DEADLINE)


async def transaction_under_a_deadline(pool):
    async with asyncio.timeout(DEADLINE), pool.acquire() as connection, connection.transaction():
        pool.network.forget()
        await connection.fetchval("SELECT 1")


async def transaction_that_waits_for_something_else(pool):
    async with asyncio.timeout(DEADLINE), pool.acquire() as connection, connection.transaction():
        pool.network.forget()
        await asyncio.sleep(FOR_EVER)


async def transaction_that_begins_under_a_deadline(pool):
    async with asyncio.timeout(DEADLINE), pool.acquire() as connection, connection.transaction():
        pytest.fail("it began")


async def transaction_that_commits_under_a_deadline(pool):
    async with asyncio.timeout(DEADLINE), pool.acquire() as connection, connection.transaction():
        pool.network.forget()


async def cursor_with_a_timeout(pool):
    async with pool.acquire() as connection, connection.transaction():
        pool.network.forget()
        async for _ in connection.cursor("SELECT generate_series(1, 9)", timeout=DEADLINE):
            pytest.fail("it was answered")


async def copy_with_a_timeout(pool):
    async with pool.acquire() as connection:
        await connection.copy_from_query("SELECT 1", output=discard, timeout=DEADLINE)


async def copy_records_with_a_timeout(pool):
    async with pool.acquire() as connection:
        await connection.execute("CREATE TEMP TABLE IF NOT EXISTS scratch (x int)")

        async def records():
            # Not sooner: asyncpg asks first what columns there are, without a timeout.
            pool.network.forget()
            yield (1,)

        await connection.copy_records_to_table("scratch", records=records(), timeout=DEADLINE)


async def close_under_a_deadline(pool):
    connection = await pool.acquire()
    try:
        async with asyncio.timeout(DEADLINE):
            await connection.close()
    finally:
        await pool.release(connection)


async def close_while_its_query_is_cancelled(pool):
    async with pool.acquire() as connection:
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT 1", timeout=DEADLINE)
        await connection.close()
    raise TimeoutError


async def discard(_data):
    """Take what COPY gives."""


# In the others, it has been forgotten before.
FORGOTTEN_ON_THE_WAY = [
    transaction_with_a_timeout,
    nested_transaction_with_a_timeout,
    transaction_under_a_deadline,
    transaction_that_waits_for_something_else,
    transaction_that_commits_under_a_deadline,
    cursor_with_a_timeout,
    copy_records_with_a_timeout,
]
CALLS = [
    query_with_a_timeout,
    new_query_with_a_timeout,
    call_under_a_deadline,
    block_with_a_timeout,
    block_under_a_deadline,
    transaction_that_begins_under_a_deadline,
    copy_with_a_timeout,
    close_under_a_deadline,
    close_while_its_query_is_cancelled,
    *FORGOTTEN_ON_THE_WAY,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
async def test_a_call_ends_when_its_time_is_up(network, call, way):
    async with pool_behind(network, **WAYS[way]) as pool:
        pool.network = network
        if call not in FORGOTTEN_ON_THE_WAY:
            network.forget()

        assert await seconds(call(pool), TimeoutError) < DEADLINE + BEHIND
        if call in FORGOTTEN_ON_THE_WAY:
            await until(lambda: pool.get_idle_size() >= 1)
        assert await seconds(query_with_a_timeout(pool), TimeoutError) < DEADLINE + BEHIND


async def test_who_waits_for_a_connection_gets_a_new_one(network):
    async with pool_behind(network) as pool:
        network.forget()
        opened = network.opened
        dead = [asyncio.ensure_future(query_with_a_timeout(pool)) for _ in range(2)]
        await asyncio.sleep(0)

        assert await seconds(asyncio.gather(*(pool.fetchval(PID) for _ in range(10)))) < DEADLINE + BEHIND

        outcomes = await asyncio.gather(*dead, return_exceptions=True)
        assert [type(one) for one in outcomes] == [TimeoutError, TimeoutError]
        assert network.opened == opened + 2 + 2  # two connections, and the requests to cancel the two queries


async def test_an_unanswered_cancellation_is_an_event(network):
    async with pool_behind(network) as pool:
        observer = RecordingObserver()
        pool._events = Observers(observer)
        network.forget()

        await seconds(asyncio.gather(query_with_a_timeout(pool), query_with_a_timeout(pool)), TimeoutError)

        assert (await observer.seen(ConnectionRetired, 2)).reason == "unanswered"
        assert pool.stats().retired == {"unanswered": 2}


# Resets.


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("wait_for_reset", "asyncpg's way")])
async def test_a_reset_that_nobody_waits_for_frees_its_slot_all_the_same(network, way):
    async with pool_behind(network, **WAYS[way]) as pool:
        connections = [await pool.acquire() for _ in range(2)]
        for connection in connections:
            await connection.execute("SET work_mem = '1MB'")
        network.forget()

        assert await seconds(asyncio.gather(*map(pool.release, connections))) < DEADLINE
        assert await seconds(asyncio.gather(*(pool.fetchval(PID) for _ in range(10)))) < BEHIND
        assert pool.stats().retired == {"unanswered": 2}


@pytest.mark.parametrize("way", ["wait_for_reset", "asyncpg's way"])
async def test_a_reset_that_is_waited_for_is_a_timeout(network, way):
    async with pool_behind(network, **WAYS[way]) as pool:
        connection = await pool.acquire()
        await connection.execute("SET work_mem = '1MB'")
        network.forget()

        assert await seconds(pool.release(connection), TimeoutError) < BEHIND
        assert await seconds(query_with_a_timeout(pool), TimeoutError) < DEADLINE + BEHIND


async def own_reset(connection):
    await connection.execute("RESET ALL")


class OwnReset(asyncpg.Connection):
    def get_reset_query(self):
        return "DISCARD SEQUENCES"


@pytest.mark.parametrize("way", ["as it comes", "wait_for_reset", "asyncpg's way"])
@pytest.mark.parametrize("own", [{"reset": own_reset}, {"connection_class": OwnReset}], ids=["function", "class"])
async def test_a_reset_of_the_users_own_has_longer(network, own, way):
    async with pool_behind(network, **own, **WAYS[way]) as pool:
        connections = [await pool.acquire() for _ in range(2)]
        for connection in connections:
            await connection.execute("SET work_mem = '1MB'")
        network.forget()

        began = asyncio.get_running_loop().time()
        await asyncio.gather(*map(pool.release, connections), return_exceptions=True)
        await until(lambda: pool.stats().in_use == 0)

        # Twice as long here, ten times otherwise.
        assert 1.5 * _watchdog._GOODBYE < asyncio.get_running_loop().time() - began < BEHIND


async def test_a_reset_that_rolls_back_is_bounded_too(network):
    async with pool_behind(network) as pool:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # asyncpg complains of the open transaction
        connections = [await pool.acquire() for _ in range(2)]
        for connection in connections:
            await connection.execute("BEGIN")
        network.forget()

        assert await seconds(pool.release(connections[0]), TimeoutError) < BEHIND
        assert await seconds(pool.release(connections[1]), TimeoutError) < BEHIND


async def test_a_hook_after_release_that_asks_a_dead_server_is_bounded(network):
    async def still_there(connection):
        return await connection.fetchval("SELECT true")

    async with pool_behind(network, after_release=still_there) as pool:
        connections = [await pool.acquire() for _ in range(2)]
        network.forget()

        for connection in connections:
            assert await seconds(pool.release(connection), asyncpg.PostgresConnectionError) < BEHIND


# Timeouts of acquire and release.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("timeout", [0.05, 60.0])
async def test_the_timeout_of_an_acquire_holds_for_its_release(network, way, timeout):  # noqa: ASYNC109 - a parameter
    async with pool_behind(network, **WAYS[way]) as pool:
        connections = [await pool.acquire(timeout=timeout) for _ in range(2)]
        network.forget()

        for connection in connections:
            assert await seconds(pool.release(connection), TimeoutError) < BEHIND


@pytest.mark.parametrize("way", WAYS)
async def test_the_timeout_of_a_release_is_kept(network, way):
    async with pool_behind(network, **WAYS[way]) as pool:
        connections = [await pool.acquire() for _ in range(2)]
        network.forget()
        with pytest.raises(TimeoutError):
            await connections[0].fetchval("SELECT 1", timeout=DEADLINE)

        for connection in connections:
            assert await seconds(pool.release(connection, timeout=0.05), TimeoutError) < 0.15


# Cancellations that are acknowledged, and requests that never arrive.


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancellation_that_is_acknowledged_keeps_its_connection(network, way):
    async with pool_behind(network, min_size=1, max_size=1, **WAYS[way]) as pool:
        pid = await pool.fetchval(PID)

        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(60)", timeout=DEADLINE)
        async with pool.acquire() as connection:
            with pytest.raises(TimeoutError):
                await connection.fetchval("SELECT pg_sleep(60)", timeout=DEADLINE)
            # Whoever keeps it for other work meanwhile does not lose it.
            await asyncio.sleep(2 * _watchdog._GOODBYE)
            assert await connection.fetchval(PID) == pid

        assert await pool.fetchval(PID) == pid
        assert pool.stats().retired == {}


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_to_cancel_that_hangs_costs_the_connection_and_no_more_time(network, way):
    async with pool_behind(network, min_size=1, max_size=1, **WAYS[way]) as pool:
        pid = await pool.fetchval(PID)
        network.forgets_new_ones = True
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(60)", timeout=DEADLINE)
        assert asyncio.get_running_loop().time() - began < DEADLINE + BEHIND

        network.forgets_new_ones = False
        assert await pool.fetchval(PID) != pid


@pytest.mark.parametrize("way", WAYS)
async def test_a_connection_that_is_killed_while_its_query_is_cancelled_is_let_go_at_once(network, way):
    async with pool_behind(network, min_size=1, max_size=1, **WAYS[way]) as pool:
        network.forgets_new_ones = True
        connection = await pool.acquire()
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT pg_sleep(60)", timeout=DEADLINE)
        releasing = asyncio.ensure_future(pool.release(connection))
        await asyncio.sleep(0.02)
        network.forgets_new_ones = False
        network.kill()

        assert await seconds(releasing) < _watchdog._GOODBYE / 2


async def test_a_release_leaves_alone_what_has_taken_its_slot_meanwhile(network):
    async with pool_behind(network, min_size=1, max_size=1) as pool:
        connection = await pool.acquire()
        network.forget()
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT 1", timeout=DEADLINE)
        releasing = asyncio.ensure_future(pool.release(connection))
        await asyncio.sleep(0)
        replacement = await pool.open_replacement()
        (slot,) = pool.slots()

        # All in one moment: it dies, a replacement that stands ready takes its slot, and somebody has it.
        slot.connection.terminate()
        slot.settle(replacement)
        next_one = pool._slot_queue.check_out()
        await releasing

        assert slot.is_in_use
        assert await next_one.fetchval("SELECT 1") == 1
        await pool.release(next_one)


# What asyncpg does between two queries.


async def test_statements_that_nobody_needs_any_more_do_not_outlive_a_timeout(network):
    async with pool_behind(network, min_size=1, max_size=1) as pool:
        async with pool.acquire() as connection:
            await connection.prepare("SELECT 3")  # and let go of: it is closed with the next one
            network.forgets_at = b"C"

            asking = connection.fetchval("SELECT 4", timeout=DEADLINE)
            assert await seconds(asking, asyncpg.PostgresConnectionError) < DEADLINE + BEHIND
        assert network.has_forgotten


async def test_a_rollback_that_is_never_answered_is_not_waited_for_past_the_deadline(network):
    async with pool_behind(network, min_size=1, max_size=1) as pool:
        pid = await pool.fetchval(PID)
        network.forgets_at = b"Q\x00\x00\x00\x0eROLLBACK;"

        async def block():
            async with asyncio.timeout(DEADLINE), pool.acquire() as connection, connection.transaction():
                await asyncio.sleep(FOR_EVER)

        assert await seconds(block(), TimeoutError) < DEADLINE + BEHIND
        assert await pool.fetchval(PID) != pid


async def test_a_transaction_that_fails_on_a_good_connection_is_rolled_back_as_ever(network):
    async with pool_behind(network, min_size=1, max_size=1) as pool:
        pid = await pool.fetchval(PID)
        async with pool.acquire() as connection:
            for error in (TimeoutError, ValueError):
                with pytest.raises(error):
                    async with connection.transaction():
                        await connection.execute("SET LOCAL work_mem = '1MB'")
                        raise error
                assert not connection.is_in_transaction()
                assert await connection.fetchval("SHOW work_mem") != "1MB"
        assert await pool.fetchval(PID) == pid


# The end of a pool.


async def test_a_pool_with_dead_connections_at_rest_closes(network):
    async with pool_behind(network) as pool:
        network.forget()

        assert await seconds(pool.close()) < BEHIND
        await assert_nothing_left()


@pytest.mark.parametrize("way", WAYS)
async def test_a_pool_with_dead_connections_on_their_way_back_closes(network, way):
    pool = await open_pool(network, **WAYS[way])
    connections = [await pool.acquire() for _ in range(2)]
    network.forget()
    with pytest.raises(TimeoutError):
        await connections[0].fetchval("SELECT 1", timeout=DEADLINE)
    releasing = asyncio.gather(*map(pool.release, connections), return_exceptions=True)

    assert await seconds(pool.close()) < 2 * BEHIND
    await releasing
    await assert_nothing_left()


async def test_draining_a_pool_of_dead_connections_ends(network):
    async with pool_behind(network) as pool:
        network.forget()

        assert await seconds(pool.drain()) < BEHIND


async def test_a_replacement_that_hangs_in_its_connect_stands_in_nobodys_way(network):
    numbers = itertools.count()
    async with (
        TokenManager(lambda: Credential(f"not looked at {next(numbers)}")) as manager,
        pool_behind(network, credentials=manager, retire_when="rotated", timeout=60) as pool,
    ):
        network.forgets_new_ones = True
        opened = network.opened
        await manager.refresh()
        await until(lambda: network.opened > opened)

        await assert_serves(pool)
        assert await seconds(pool.close()) < 2 * BEHIND
        await assert_nothing_left()


async def assert_nothing_left():
    """No task of asyncpg's or ours, and no connection that the client has open."""
    await until(lambda: not any(map(runs_in_a_package, asyncio.all_tasks())))


def runs_in_a_package(task):
    """Return whether a task runs code of asyncpg's or ours; its name may say anything, and so may the paths in it."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename.startswith(PACKAGES)


# The watchdog.


async def test_an_event_loop_that_stands_still_costs_no_connection(network):
    async with pool_behind(network, min_size=1, max_size=1) as pool:
        pid = await pool.fetchval(PID)
        connection = await pool.acquire()
        await connection.execute("SET work_mem = '1MB'")

        await pool.release(connection)
        time.sleep(2 * _watchdog._GOODBYE)  # noqa: ASYNC251 - that is what somebody does

        assert await pool.fetchval(PID) == pid


async def test_the_timer_runs_only_while_an_answer_is_due(network):
    async with pool_behind(network) as pool:
        watchdog = _watchdog.watchdog_of(asyncio.get_running_loop())
        await pool.fetchval(PID)
        await until(lambda: watchdog._timer is None)

        await asyncio.gather(*(pool.fetchval(PID) for _ in range(100)))
        await until(lambda: watchdog._timer is None)
        assert not watchdog._owing
        assert not watchdog._cancellations


async def test_a_connection_class_that_cannot_be_watched_is_served_as_asyncpg_does(network, monkeypatch, caplog):
    class Rigid(asyncpg.Connection):
        def __init_subclass__(cls):
            raise TypeError("it has no subclasses")

    caplog.set_level("DEBUG")
    monkeypatch.setattr(_slots, "_CANCELLATION_TIMEOUT", 0.2)
    async with pool_behind(network, connection_class=Rigid) as pool:
        network.forget()
        for _ in range(2):
            assert await seconds(query_with_a_timeout(pool), TimeoutError) < DEADLINE + BEHIND
    assert "cancellations on a" in caplog.text
