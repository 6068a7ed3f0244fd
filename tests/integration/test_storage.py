"""The contract that every token storage fulfils."""

from __future__ import annotations

import asyncio
import os
import warnings
from datetime import UTC, datetime, timedelta, timezone

import anyio.to_thread
import pytest

from asyncpool_creds.storage import MemoryStorage, StoredTokens, TokenStorage

pytestmark = pytest.mark.anyio

FIRST = StoredTokens(refresh_token="planted-first", expires_at=datetime(2030, 1, 1, tzinfo=UTC))
SECOND = StoredTokens(refresh_token="planted-second")


@pytest.fixture(params=[MemoryStorage])
def storage(request):
    return request.param()


async def test_it_is_a_token_storage(storage):
    assert isinstance(storage, TokenStorage)


async def test_loading_what_was_never_saved_gives_none(storage):
    assert await storage.load("key") is None


async def test_what_was_saved_last_is_loaded(storage):
    await storage.save("key", FIRST)
    await storage.save("key", SECOND)

    assert await storage.load("key") == SECOND


async def test_keys_do_not_mix(storage):
    await storage.save("one", FIRST)
    await storage.save("two", SECOND)

    assert await storage.load("one") == FIRST
    assert await storage.load("two") == SECOND


async def test_the_mark_of_a_lost_token_is_kept_apart_from_nothing(storage):
    await storage.save("key", StoredTokens(refresh_token=None))

    assert await storage.load("key") == StoredTokens(refresh_token=None)


async def test_no_secret_shows_in_a_repr(storage):
    await storage.save("key", FIRST)

    assert "planted" not in repr(storage) + repr(await storage.load("key")) + str(FIRST)


async def test_one_holder_of_a_lock_at_a_time(storage):
    inside, most = 0, 0

    async def work():
        nonlocal inside, most
        async with storage.lock("key"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(work() for _ in range(20)))

    assert most == 1


async def test_locks_of_different_keys_do_not_wait_for_each_other(storage):
    async with storage.lock("one"), asyncio.timeout(5), storage.lock("two"):
        pass


async def test_a_failure_under_the_lock_releases_it(storage):
    with pytest.raises(LookupError):
        async with storage.lock("key"):
            raise LookupError

    async with asyncio.timeout(5), storage.lock("key"):
        pass


async def test_cancelling_one_who_waits_takes_nothing_from_the_others(storage):
    entered = []

    async def work(name):
        async with storage.lock("key"):
            entered.append(name)

    async with storage.lock("key"):
        first, second = asyncio.create_task(work("first")), asyncio.create_task(work("second"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([first, second])

    assert first.cancelled()
    assert entered == ["second"]


async def test_read_exchange_save_under_the_lock_never_uses_a_token_twice(storage):
    await storage.save("key", StoredTokens(refresh_token="0"))
    spent = []

    async def exchange():
        async with storage.lock("key"):
            token = (await storage.load("key")).refresh_token
            await asyncio.sleep(0)
            spent.append(token)
            await storage.save("key", StoredTokens(refresh_token=str(int(token) + 1)))

    await asyncio.gather(*(exchange() for _ in range(50)))

    assert spent == [str(number) for number in range(50)]


def test_a_lock_can_be_used_from_one_loop_after_another(storage):
    async def contend():
        async def work():
            async with storage.lock("key"):
                await asyncio.sleep(0)

        await asyncio.gather(work(), work())

    asyncio.run(contend())
    asyncio.run(contend())


async def test_memory_is_empty_and_unlocked_after_a_fork():
    storage = MemoryStorage()
    await storage.save("key", FIRST)

    async def in_child():
        async with asyncio.timeout(5), storage.lock("key"):
            return await storage.load("key")

    async with storage.lock("key"):
        with warnings.catch_warnings():
            # 3.12 and later warn of threads; the child does not touch any.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            status = 1
            try:
                status = 0 if asyncio.run(in_child()) is None else 1
            finally:
                os._exit(status)
        _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert await storage.load("key") == FIRST


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"refresh_token": 5}, TypeError, "refresh_token must be a str or None, not int"),
        ({"refresh_token": ""}, ValueError, "refresh_token is empty"),
        ({"refresh_token": "x", "expires_at": "tomorrow"}, TypeError, "expires_at must be a datetime"),
        ({"refresh_token": "x", "expires_at": datetime(2030, 1, 1)}, ValueError, "expires_at is naive"),  # noqa: DTZ001
    ],
)
def test_wrong_stored_tokens_are_refused(arguments, error, names):
    with pytest.raises(error, match=names):
        StoredTokens(**arguments)


def test_expiry_is_kept_in_utc():
    tokens = StoredTokens(refresh_token="x", expires_at=datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))))

    assert tokens.expires_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert tokens.expires_at.tzinfo is UTC
