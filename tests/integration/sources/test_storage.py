"""The contract that every token storage fulfils."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import pprint
import traceback
from dataclasses import asdict, astuple, dataclass, replace
from datetime import UTC, datetime, timedelta, timezone

import anyio.to_thread
import processes
import pytest
from redis_server import RedisServer
from storages import KEY, Place, steps_that_block
from support import assert_no_secret, secret

from asyncpool_creds import Credential
from asyncpool_creds.storage import MemoryStorage, SpentMarks, StoredTokens, TokenStorage

pytestmark = pytest.mark.anyio

FIRST = StoredTokens(refresh_token=secret("first"), expires_at=datetime(2030, 1, 1, tzinfo=UTC))
SECOND = StoredTokens(refresh_token=secret("second"))
EVERYTHING = StoredTokens(
    refresh_token=secret("\N{SNOWMAN} of 'any' \"kind\"\n" + "x" * 3000),
    expires_at=datetime(2030, 1, 1, 12, 30, 15, 123456, tzinfo=UTC),
    credential=Credential(
        secret("password"),
        user="ann",
        expires_at=datetime(2029, 1, 1, tzinfo=UTC),
        refresh_at=datetime(2028, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
        ends_session=True,
        version="v1",
    ),
    obtained_at=datetime(2027, 1, 1, 23, 59, 59, 999999, tzinfo=UTC),
    is_being_spent=True,
    is_reusable=True,
)


@pytest.fixture(scope="module")
def redis():
    with RedisServer(password=secret("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", "keyring", "keyring in parts", "redis"])
def place(request, tmp_path, redis):
    return Place(request.param, str(tmp_path), redis.url())


@pytest.fixture
async def storage(place):
    async with place.opened() as storage:
        yield storage


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
    await storage.save("key", EVERYTHING)

    assert_no_secret(storage, await storage.load("key"))


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


async def test_everything_that_is_known_of_tokens_is_kept(storage):
    await storage.save("key", EVERYTHING)

    loaded = await storage.load("key")
    assert loaded == EVERYTHING
    assert loaded.credential.version == "v1"
    assert loaded.credential.refresh_at == EVERYTHING.credential.refresh_at
    assert loaded.expires_at.tzinfo is UTC


async def test_a_short_one_takes_the_place_of_a_long_one_and_the_other_way_round(storage):
    for tokens in (SECOND, EVERYTHING, SECOND, EVERYTHING, EVERYTHING, SECOND):
        await storage.save("key", tokens)

        assert await storage.load("key") == tokens


async def test_any_text_is_a_key(storage):
    keys = [
        "a/b\\..",
        "../etc",
        "\N{SNOWMAN} ü",
        "x" * 600,
        "tokens a/b",
        "k*y",
        "[a]",
        "{a}",
        "}",
        " ",
        "A",
        "a",
        "a:b",
    ]
    for number, key in enumerate(keys):
        await storage.save(key, StoredTokens(refresh_token=secret(str(number))))

    for number, key in enumerate(keys):
        assert (await storage.load(key)).refresh_token == secret(str(number))
        async with storage.lock(key):
            pass
    assert await storage.keys() == sorted(keys)
    assert await storage.keys("[a") == ["[a]"]
    assert await storage.keys("*") == []


async def test_keys_that_begin_alike_are_listed(storage):
    for key in ("globus/b", "globus/a", "okta/a"):
        await storage.save(key, FIRST)
        await storage.save(key, SECOND)

    assert await storage.keys() == ["globus/a", "globus/b", "okta/a"]
    assert await storage.keys("globus/") == ["globus/a", "globus/b"]
    assert await storage.keys("vault/") == []


async def test_what_was_deleted_is_gone(storage):
    await storage.save("one", EVERYTHING)
    await storage.save("two", SECOND)

    await storage.delete("one")

    assert await storage.load("one") is None
    assert await storage.load("two") == SECOND
    assert await storage.keys() == ["two"]


async def test_deleting_what_was_never_saved_is_no_error(storage):
    await storage.delete("key")

    assert await storage.keys() == []


async def test_saving_and_deleting_under_the_lock(storage):
    async with storage.lock("key"):
        await storage.save("key", FIRST)
        assert await storage.load("key") == FIRST
        await storage.delete("key")

    assert await storage.load("key") is None


async def test_nothing_holds_the_event_loop_up_from_the_first_use_on(place):
    async def use():
        async with place.opened() as storage:
            async with storage.lock("key"):
                await storage.save("key", EVERYTHING)
            await asyncio.gather(*(storage.load("key") for _ in range(5)))
            await storage.keys()
            await storage.delete("key")

    assert await steps_that_block(use) == []


async def test_two_that_were_opened_apart_share_everything(place):
    if place.kind == "memory":
        place = Place("file", place.directory)  # memory is shared with nobody
    async with place.opened() as one, place.opened() as other:
        await one.save("key", FIRST)
        assert await other.load("key") == FIRST
        entered = asyncio.Event()

        async def enter():
            async with other.lock("key"):
                entered.set()

        async with one.lock("key"):
            waiting = asyncio.create_task(enter())
            for _ in range(20):
                await asyncio.sleep(0.002)
            was_let_in = entered.is_set()
        await asyncio.wait_for(waiting, 5)

    assert not was_let_in


def test_a_lock_can_be_used_from_one_loop_after_another(place):
    storage = place.open()

    async def contend():
        async def work():
            async with storage.lock("key"):
                await storage.save("key", FIRST)

        await asyncio.gather(work(), work())
        if hasattr(storage, "aclose"):
            await storage.aclose()

    asyncio.run(contend())
    asyncio.run(contend())


async def test_a_fork_of_a_holder_waits_for_it_and_then_goes_on(place):
    if place.kind == "memory":
        return  # its child starts afresh: see below
    read, write = os.pipe()

    async def in_child(storage):
        async with asyncio.timeout(10):
            os.write(write, b"waiting")
            async with storage.lock(KEY):
                assert await storage.load(KEY) == SECOND
                await storage.save(KEY, FIRST)

    async with place.opened() as storage:
        async with storage.lock(KEY):
            await storage.save(KEY, FIRST)
            child = fork(lambda: asyncio.run(in_child(storage)))
            await anyio.to_thread.run_sync(os.read, read, 7)
            await storage.save(KEY, SECOND)
        status = await wait_for(child)

        assert status == 0
        assert await storage.load(KEY) == FIRST
        async with asyncio.timeout(5), storage.lock(KEY):
            pass
    os.close(read)
    os.close(write)


async def test_memory_is_empty_and_unlocked_after_a_fork():
    storage = MemoryStorage()
    await storage.save("key", FIRST)

    async def in_child():
        async with asyncio.timeout(5), storage.lock("key"):
            assert await storage.load("key") is None

    async with storage.lock("key"):
        status = await wait_for(fork(lambda: asyncio.run(in_child())))

    assert status == 0
    assert await storage.load("key") == FIRST


def fork(job):
    child = processes.fork()
    if child:
        return child
    status = 1
    try:
        job()
        status = 0
    finally:
        os._exit(status)


async def wait_for(child):
    _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"refresh_token": 5}, TypeError, "refresh_token must be a str or None, not int"),
        ({"refresh_token": ""}, ValueError, "refresh_token is empty"),
        ({"credential": "x"}, TypeError, "credential must be a Credential or None, not str"),
        ({"refresh_token": "x", "expires_at": "tomorrow"}, TypeError, "expires_at must be a datetime"),
        ({"refresh_token": "x", "expires_at": datetime(2030, 1, 1)}, ValueError, "expires_at is naive"),  # noqa: DTZ001
    ],
)
def test_wrong_stored_tokens_are_refused(arguments, error, names):
    with pytest.raises(error, match=names):
        StoredTokens(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: [document],
        lambda document: {**document, "format": 0},
        lambda document: {**document, "format": "2"},
        lambda document: {**document, "refresh_token": "x" * 1_048_576},
        lambda document: {**document, "refresh_token": 5},
        lambda document: {**document, "expires_at": "soon"},
        lambda document: {**document, "credential": [document["credential"]]},
        lambda document: {**document, "credential": {}},
        lambda document: {name: value for name, value in document.items() if name != "is_being_spent"},
    ],
)
def test_what_is_no_stored_tokens_is_an_error_that_shows_nothing(change):
    text = json.dumps(change(json.loads(EVERYTHING.to_json())))

    with pytest.raises(ValueError, match="no stored tokens, or damaged ones") as caught:
        StoredTokens.from_json(text)
    assert_no_secret(caught.value)


@pytest.mark.parametrize("number", [2, 10**30])
def test_tokens_of_a_later_format_are_called_that(number):
    text = json.dumps({**json.loads(EVERYTHING.to_json()), "format": number, "refresh_token": [secret("sealed")]})

    for given in (text, text.encode()):
        with pytest.raises(
            ValueError, match="was written by a later version of asyncpool_creds: install that"
        ) as caught:
            StoredTokens.from_json(given)
        assert_no_secret(caught.value)


# What others do with values: none of it shows a secret.


@dataclass
class Holder:
    """What somebody may have tokens in."""

    tokens: StoredTokens


@pytest.mark.parametrize("thing", [EVERYTHING, Holder(EVERYTHING)], ids=["tokens", "holder"])
@pytest.mark.parametrize("look", [asdict, astuple, pickle.dumps, json.dumps, lambda thing: json.dumps(asdict(thing))])
def test_who_takes_tokens_apart_gets_an_error_and_no_secret(thing, look):
    with pytest.raises(TypeError) as caught:
        look(thing)

    assert_no_secret(caught.value)
    if look is not json.dumps:
        assert "to_json()" in str(caught.value)


@pytest.mark.parametrize("method", ["__getstate__", "__reduce__"])
def test_stored_tokens_have_no_state_for_picklers(method):
    with pytest.raises(TypeError, match="cannot be pickled"):
        getattr(EVERYTHING, method)()
    with pytest.raises(TypeError):
        vars(EVERYTHING)


def test_stored_tokens_show_nothing_when_they_are_shown():
    shown = [repr(EVERYTHING), str(EVERYTHING), pprint.pformat(EVERYTHING), json.dumps([EVERYTHING], default=str)]

    assert_no_secret(shown)


def test_a_copy_of_tokens_is_the_tokens_and_replace_changes_them():
    marked = replace(FIRST, is_being_spent=True)

    assert copy.copy(EVERYTHING) is copy.deepcopy(EVERYTHING) is EVERYTHING
    assert copy.deepcopy(Holder(EVERYTHING)).tokens is EVERYTHING
    assert (marked.refresh_token, marked.is_being_spent) == (FIRST.refresh_token, True)
    assert replace(marked, is_being_spent=False) == FIRST
    assert hash(replace(marked, is_being_spent=False)) == hash(FIRST)


# Marks.


async def test_marks_are_kept_apart_from_tokens(storage, place):
    if place.kind == "memory":
        assert not isinstance(storage, SpentMarks)  # a mark would be gone with the tokens
        return
    assert isinstance(storage, SpentMarks)
    assert await storage.load_mark("key") is None
    await storage.save("key", FIRST)
    async with storage.lock("key"):
        await storage.save_mark("key", "a:b")
    await storage.save_mark("another", "c:d")

    assert await storage.load("key") == FIRST
    assert await storage.keys() == ["key"]
    await storage.delete("key")
    assert (await storage.load_mark("key")).strip() == "a:b"

    await storage.save_mark("key", None)
    await storage.save_mark("never", None)
    assert await storage.load_mark("key") is None
    assert (await storage.load_mark("another")).strip() == "c:d"


# Errors.


async def test_no_token_is_in_the_frames_of_an_error(place, tmp_path):
    if place.kind == "memory":
        return  # it has no errors
    if place.kind == "redis":
        place = Place("redis", place.directory, "redis://127.0.0.1:1/0")
    else:
        tmp_path.joinpath("tokens").write_text("")
        tmp_path.joinpath("locks").write_text("")
    async with place.opened() as storage:
        for ask in (storage.save, lambda key, _: storage.load(key)):
            with pytest.raises(OSError) as caught:
                await ask("key", EVERYTHING)

            shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
            assert "storage" in shown
            assert secret("password") not in shown


def test_expiry_is_kept_in_utc():
    tokens = StoredTokens(refresh_token="x", expires_at=datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))))

    assert tokens.expires_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert tokens.expires_at.tzinfo is UTC
