"""Several processes share a storage, and some of them are killed."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import ExitStack, contextmanager

import pytest
from redis import Redis
from redis_server import RedisServer
from storages import KEY, Place
from support import secret

from asyncpool_creds.storage import StoredTokens

PATIENCE = 30.0


@pytest.fixture(scope="module")
def redis():
    with RedisServer(password=secret("redis")) as server:
        yield server


@pytest.fixture(params=["file", "keyring", "redis"])
def place(request, tmp_path, redis):
    return Place(request.param, str(tmp_path), redis.url())


@contextmanager
def process(place, what, argument=""):
    """Another process, which does not outlive the test."""
    with place.process(what, argument) as child:
        try:
            yield child
        finally:
            child.kill()


def run(place, job):
    """Return what ``job(storage)`` returns, with a storage of its own."""

    async def opened():
        async with asyncio.timeout(PATIENCE), place.opened() as storage:
            return await job(storage)

    return asyncio.run(opened())


def save(place, token):
    run(place, lambda storage: storage.save(KEY, StoredTokens(refresh_token=token)))


def load(place):
    return run(place, lambda storage: storage.load(KEY))


def load_under_the_lock(place):
    async def load(storage):
        async with storage.lock(KEY):
            return await storage.load(KEY)

    return run(place, load)


def test_four_processes_never_use_a_token_twice(place):
    save(place, "0")

    with ExitStack() as stack:
        children = [stack.enter_context(process(place, "exchange", 25)) for _ in range(4)]
        used = [child.communicate(timeout=PATIENCE)[0].split() for child in children]

    assert [child.returncode for child in children] == [0, 0, 0, 0]
    assert sorted(int(token) for tokens in used for token in tokens) == list(range(100))
    assert load(place) == StoredTokens(refresh_token="100")


def test_the_lock_of_a_killed_holder_is_free_and_what_it_saved_is_there(place):
    save(place, "0")

    with process(place, "hold", "1") as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGKILL)
        child.wait(PATIENCE)

        assert load_under_the_lock(place) == StoredTokens(refresh_token="1", is_being_spent=True)


def test_a_holder_that_is_alive_keeps_the_lock_for_longer_than_its_life(place):
    # The lock of a file has no life that could be over.
    patience = 2 * place.lock_lifetime if place.kind == "redis" else 0.2

    async def is_free(storage):
        try:
            async with asyncio.timeout(patience), storage.lock(KEY):
                return True
        except TimeoutError:
            return False

    with process(place, "hold", "1") as child:
        assert child.stdout.readline() == "held\n"

        assert not run(place, is_free)
        answer, _ = child.communicate("\n", timeout=PATIENCE)

    assert answer == "saved\n"
    assert load(place) == StoredTokens(refresh_token="1, later")


@pytest.mark.parametrize("place", ["file", "keyring"], indirect=True)
def test_a_holder_that_is_stopped_keeps_the_lock_of_a_file(place):
    async def is_free(storage):
        try:
            async with asyncio.timeout(0.2), storage.lock(KEY):
                return True
        except TimeoutError:
            return False

    with process(place, "hold", "1") as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGSTOP)

        assert not run(place, is_free)


@pytest.mark.parametrize("place", ["redis"], indirect=True)
def test_a_holder_that_was_stopped_cannot_save_over_those_who_came_after_it(place):
    with process(place, "hold", "1") as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGSTOP)
        assert load_under_the_lock(place).refresh_token == "1"
        save(place, "2")

        child.send_signal(signal.SIGCONT)
        answer, _ = child.communicate("\n", timeout=PATIENCE)

    assert answer.startswith("the lock was lost")
    assert load(place) == StoredTokens(refresh_token="2")


@pytest.mark.parametrize("place", ["redis"], indirect=True)
def test_a_holder_that_was_stopped_loses_nothing_if_nobody_came_after_it(place):
    def wait_for_its_end():
        with Redis.from_url(place.url) as client:
            while client.exists(f"{place.directory}:{{{KEY}}}:lock"):
                time.sleep(0.01)

    with process(place, "hold", "1") as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGSTOP)
        wait_for_its_end()

        child.send_signal(signal.SIGCONT)
        answer, _ = child.communicate("\n", timeout=PATIENCE)

    assert answer == "saved\n"
    assert load(place) == StoredTokens(refresh_token="1, later")


# A file with every line; the others, which are slower, with as many as there is time for.
@pytest.mark.parametrize(
    ("kind", "step"),
    [("file", 1), ("keyring", 7), ("keyring in parts", 23), ("redis", 7)],
    ids=str,
)
def test_whoever_is_killed_while_saving_leaves_the_old_tokens_or_the_new_ones(kind, step, tmp_path, redis):
    place = Place(kind, str(tmp_path), redis.url())

    with process(place, "die saving", step) as child:
        output, _ = child.communicate(timeout=60)

    assert child.returncode == 0
    found = [json.loads(line) for line in output.splitlines()]
    tokens = [token for token, *_ in found]
    assert len(found) > 10
    assert set(tokens) == {"old", "new"}
    assert tokens == sorted(tokens, reverse=True)  # the further it came
    assert all(keys == [KEY] for _, keys, _ in found)
    # What was left half-written is gone with the next one.
    left = [[name for name in files if name.endswith(".tmp")] for *_, files in found]
    assert max(map(len, left)) == (1 if kind == "file" else 0)
    assert left[-1] == []
