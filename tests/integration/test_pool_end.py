"""What those see who want a connection of a pool that is closing, and what a pool says that was never opened."""

import asyncio
import subprocess
import sys

import asyncpg
import pytest

from asyncpool_creds import ManagerClosed, create_pool
from asyncpool_creds.testing import ScriptedProvider
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio

HOW = pytest.mark.parametrize("how", ["close", "terminate"])
WITHIN = pytest.mark.parametrize("seconds", [None, 5.0])


async def end(pool, how):
    if how == "close":
        await pool.close()
    else:
        pool.terminate()


async def outcome(acquiring):
    (answer,) = await asyncio.gather(acquiring, return_exceptions=True)
    return type(answer), str(answer)


IS_CLOSING = (asyncpg.InterfaceError, "pool is closing")
IS_CLOSED = (asyncpg.InterfaceError, "pool is closed")


@HOW
@WITHIN
async def test_an_acquire_that_waits_for_a_credential_hears_that_the_pool_is_closing(cloud, how, seconds):
    cloud.provider.play(ScriptedProvider.HANG)
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=0, max_size=2)
    acquiring = asyncio.ensure_future(pool.acquire(timeout=seconds))
    await cloud.provider.called()

    await end(pool, how)

    assert await outcome(acquiring) == IS_CLOSING
    assert await outcome(pool.acquire(timeout=seconds)) == IS_CLOSED
    assert cloud.door.attempts == 0
    await pool.close()  # after terminate, what that left to do


@HOW
async def test_a_call_of_the_pool_that_waits_for_a_credential_hears_that_it_is_closing(cloud, how):
    cloud.provider.play(ScriptedProvider.HANG)
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=0, max_size=2)
    calling = asyncio.ensure_future(pool.fetchval("SELECT 1"))
    await cloud.provider.called()

    await end(pool, how)

    assert await outcome(calling) == IS_CLOSING
    await pool.close()  # after terminate, what that left to do


@HOW
@WITHIN
async def test_an_acquire_that_connects_hears_that_the_pool_is_closing(cloud, how, seconds):
    pool = await create_pool(cloud.dsn(), credentials=cloud.provider, min_size=0, max_size=2)
    cloud.door.hang_at(Stage.VERIFY)
    acquiring = asyncio.ensure_future(pool.acquire(timeout=seconds))
    await cloud.door.reached(Stage.VERIFY)

    await end(pool, how)
    cloud.door.clear_faults()

    assert await outcome(acquiring) == IS_CLOSING
    await pool.close()


@HOW
@WITHIN
@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("with_credentials", [True, False])
async def test_those_who_wait_for_a_connection_hear_that_the_pool_is_closing(
    cloud, server, how, seconds, fair, with_credentials
):
    dsn, credentials = (cloud.dsn(), cloud.provider) if with_credentials else (server.dsn(), None)
    pool = await create_pool(dsn, credentials=credentials, min_size=1, max_size=2, fair=fair)
    held = [await pool.acquire() for _ in range(2)]
    waiting = [asyncio.ensure_future(pool.acquire(timeout=seconds)) for _ in range(5)]
    for _ in range(3):
        await asyncio.sleep(0)

    ending = asyncio.ensure_future(end(pool, how))

    # They need not wait for the connections that are in use.
    assert [await outcome(one) for one in waiting] == [IS_CLOSING] * 5
    for connection in held:
        if how == "close":
            assert await connection.fetchval("SELECT 1") == 1
            await pool.release(connection)
    await ending
    assert await outcome(pool.acquire(timeout=seconds)) == IS_CLOSED
    await pool.close()


@WITHIN
async def test_one_who_comes_while_close_waits_for_a_replacement_hears_that_the_pool_is_closing(cloud, seconds):
    pool = await cloud.pool(retire_when="rotated")
    cloud.door.hang_at(Stage.VERIFY)
    await pool.manager.refresh()
    await cloud.door.reached(Stage.VERIFY)

    closing = asyncio.ensure_future(pool.close())
    await asyncio.sleep(0)
    assert await outcome(pool.acquire(timeout=seconds)) == IS_CLOSING
    await closing

    assert await outcome(pool.acquire(timeout=seconds)) == IS_CLOSED


async def test_a_close_that_is_cancelled_early_leaves_a_closed_pool(cloud):
    pool = await cloud.pool(retire_when="rotated")
    cloud.door.hang_at(Stage.VERIFY)
    await pool.manager.refresh()
    await cloud.door.reached(Stage.VERIFY)
    closing = asyncio.ensure_future(pool.close())
    await asyncio.sleep(0)

    closing.cancel()

    assert (await outcome(closing))[0] is asyncio.CancelledError
    assert await outcome(pool.acquire()) == IS_CLOSED
    await pool.close()


async def test_a_pool_that_is_terminated_while_it_closes_is_closed(cloud):
    pool = await cloud.pool(retire_when="rotated")
    cloud.door.hang_at(Stage.VERIFY)
    await pool.manager.refresh()
    await cloud.door.reached(Stage.VERIFY)
    closing = asyncio.ensure_future(pool.close())
    await asyncio.sleep(0)

    pool.terminate()

    await closing
    assert await outcome(pool.acquire()) == IS_CLOSED


async def test_a_manager_of_the_users_own_that_is_closed_too_early_is_named(cloud):
    manager = cloud.manager()
    async with cloud.pool(credentials=manager, min_size=0) as pool:
        await manager.aclose()

        assert (await outcome(pool.acquire()))[0] is ManagerClosed


# Pools that are made where no loop runs.

SETUP = """
import asyncio, asyncpg, asyncpool_creds

class Source:
    closed = 0

    async def fetch(self):
        return asyncpool_creds.Credential("token")

    async def aclose(self):
        Source.closed += 1

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
"""
POOL = 'pool = asyncpool_creds.create_pool("postgresql://app@127.0.0.1:1/db", credentials=Source(), min_size={size})\n'


def run(program, *options):
    """Return the output of `program` and of the interpreter as it ends."""
    command = [sys.executable, *options, "-c", SETUP + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), ("-W", "error"), ("-X", "dev", "-W", "error")], ids=" ".join)
@pytest.mark.parametrize(
    "made",
    [
        POOL.format(size=1),
        "manager = asyncpool_creds.TokenManager(Source())\n",
        "manager = asyncpool_creds.TokenManager(Source())\n" + POOL.format(size=1).replace("Source()", "manager"),
        "managers = asyncpool_creds.TokenManagers(lambda name: Source())\nmanagers.manager('one')\n",
        "async def of(name): return Source()\nmanagers = asyncpool_creds.TokenManagers(of)\nmanagers.manager('one')\n",
    ],
    ids=["pool", "manager", "pool with a manager", "managers", "managers of an async function"],
)
def test_what_is_made_and_never_used_says_nothing_at_exit(made, options):
    assert run(made + "loop.close()\n", *options) == ""


@pytest.mark.parametrize("size", [0, 1])
def test_a_pool_that_is_opened_in_another_loop_says_so_and_nothing_at_exit(size):
    opened = """
try:
    asyncio.run(pool._async__init__())
except RuntimeError as error:
    print(str(error).partition("; ")[2], Source.closed)
loop.close()
"""
    expected = (
        "make it where its loop runs: in the coroutine that is given to asyncio.run, not when a module is imported 1"
    )
    assert run(POOL.format(size=size) + opened, "-X", "dev", "-W", "error") == expected + "\n"


def test_a_pool_that_is_closed_in_another_loop_closes_its_manager_and_says_nothing_at_exit():
    closed = """
try:
    asyncio.run(pool.close())
except asyncpg.InterfaceError as error:
    print(error, Source.closed)
loop.close()
"""

    assert run(POOL.format(size=1) + closed, "-X", "dev", "-W", "error") == "pool is not initialized 1\n"
