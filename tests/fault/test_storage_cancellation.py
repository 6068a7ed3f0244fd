"""Cancellation at every suspension point of what a token storage does, found by counting them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import anyio
import pytest
from fault_world import PATIENCE, interrupt_everywhere
from redis_server import RedisServer
from storages import Place
from support import secret, tasks_of_ours

from asyncpool_creds.storage import SpentMarks, StoredTokens

pytestmark = pytest.mark.anyio

Run: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
OLD = StoredTokens(refresh_token=secret("old"))
NEW = StoredTokens(refresh_token=secret("new"))


@pytest.fixture(scope="module")
def redis():
    with RedisServer(password=secret("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", "keyring", "redis"])
def place(request, tmp_path, redis):
    return Place(request.param, str(tmp_path), redis.url(), lock_lifetime=30)


@pytest.fixture
async def storage(place):
    async with place.opened() as storage:
        yield storage


@pytest.fixture
async def others(place, storage):
    """Another process, as far as the storage can tell."""
    if place.kind == "memory":
        yield storage
        return
    async with place.opened() as storage:
        yield storage


async def assert_free(*storages):
    """Both can have the lock, long before a lock that was forgotten would end, and no task is left."""
    with anyio.fail_after(PATIENCE):
        for storage in storages:
            async with storage.lock("key"):
                pass
    assert tasks_of_ours() == set()


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
async def test_cancelling_an_exchange_anywhere_leaves_the_lock_free_and_old_or_new_tokens(storage, others, how):
    async def once(run: Run) -> None:
        await storage.save("key", OLD)
        inside = 0

        async def exchange():
            nonlocal inside
            async with storage.lock("key"):
                inside += 1
                await storage.load("key")
                await asyncio.sleep(0)
                await storage.save("key", NEW)
                return True

        done = await run(exchange())

        assert await others.load("key") in ([NEW] if done else [OLD, NEW])
        await assert_free(others, storage)

    assert await interrupt_everywhere(once, how) >= 1


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
@pytest.mark.parametrize("who", ["another task", "another process"])
async def test_cancelling_one_who_waits_anywhere_leaves_the_lock_to_its_holder(storage, others, who, how):
    async def once(run: Run) -> None:
        holder = others if who == "another process" else storage
        leave, held, inside = asyncio.Event(), asyncio.Event(), []

        async def hold():
            async with holder.lock("key"):
                inside.append("holder")
                held.set()
                await leave.wait()
                assert inside == ["holder"]
                inside.clear()

        async def wait():
            # After a few attempts it is let in.
            asyncio.get_running_loop().call_later(0.02, leave.set)
            async with storage.lock("key"):
                assert inside == []
                inside.append("waiter")
                await asyncio.sleep(0)
                inside.clear()

        holding = asyncio.create_task(hold())
        await held.wait()
        await run(wait())
        leave.set()
        with anyio.fail_after(PATIENCE):
            await holding

        await assert_free(storage, others)

    await interrupt_everywhere(once, how)


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
@pytest.mark.parametrize("what", ["load", "save", "delete", "keys", "load mark", "save mark", "remove mark"])
async def test_cancelling_anything_else_anywhere_leaves_all_or_nothing_of_it(storage, others, what, how):
    if what.endswith("mark") and not isinstance(storage, SpentMarks):
        return  # memory has none

    async def once(run: Run) -> None:
        await storage.save("key", OLD)
        operations = {
            "load": lambda: storage.load("key"),
            "save": lambda: storage.save("key", NEW),
            "delete": lambda: storage.delete("key"),
            "keys": storage.keys,
            "load mark": lambda: storage.load_mark("key"),
            "save mark": lambda: storage.save_mark("key", "a:b"),
            "remove mark": lambda: storage.save_mark("key", None),
        }

        await run(operations[what]())

        found = await others.load("key")
        assert found in {"save": [OLD, NEW], "delete": [OLD, None]}.get(what, [OLD])
        assert await others.keys() == ([] if found is None else ["key"])
        await assert_free(storage, others)

    await interrupt_everywhere(once, how)


async def test_a_scope_that_ends_in_the_midst_of_it_is_no_different(storage, others):
    for number in range(20):
        with anyio.move_on_after(number / 4000):
            async with storage.lock("key"):
                await storage.save("key", NEW)
                await anyio.sleep(PATIENCE)

        await assert_free(others, storage)
