"""Many processes share one login, and some of them are killed: no refresh token is ever sent twice."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from oauth2_worker import client
from redis_server import RedisServer
from storages import Place
from support import secret

from asyncpool_creds import ProviderError
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.issuer import TokenIssuer

pytestmark = pytest.mark.anyio

LOGIN = {"username": "ann", "password": secret("password")}
CLIENT = {"client_id": "app", "client_secret": secret("client")}
PROCESSES = 8
EXPIRIES = 50
# Of the lines of an exchange, each that many-th is one to be killed at: as many as there is time for.
LINES = 11
WORKER = Path(__file__).parents[2] / "oauth2_worker.py"


@pytest.fixture(scope="module")
def redis():
    with RedisServer(password=secret("redis")) as server:
        yield server


@pytest.fixture
def lock_lifetime():
    return 5.0


@pytest.fixture(params=["file", "redis"])
def place(request, tmp_path, redis, lock_lifetime):
    return Place(request.param, str(tmp_path), redis.url(), lock_lifetime=lock_lifetime)


# For who waits for the locks of the dead; nobody else wants those of the living then.
short_locks = pytest.mark.parametrize("lock_lifetime", [0.05])


@pytest.fixture(scope="module")
def mother():
    """The process that all others are forked from, so that what they import is imported once."""
    with subprocess.Popen([sys.executable, str(WORKER)], stdin=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


class Worker:
    """Another process."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer
        self._pid = None

    def tell(self, what):
        self._writer.write(json.dumps(what).encode() + b"\n")

    async def hear(self):
        """Return what it says; None: it is dead."""
        return json.loads(await self._reader.readline() or "null")

    async def fetch(self):
        self.tell("fetch")
        return await self.hear()

    async def listens(self):
        """Return when it has taken note of what it was told; it must not have anything to say about that yet."""
        self.tell("tell the pid")
        self._pid = (await self.hear())["pid"]

    def kill(self):
        os.kill(self._pid, signal.SIGKILL)

    def leave(self):
        self._writer.close()


@pytest.fixture
async def workers(mother, place):
    """Start processes with a provider that is made with the given arguments; they end with the test."""
    arrivals = asyncio.Queue()
    server = await asyncio.start_server(lambda *streams: arrivals.put_nowait(streams), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = []

    async def start(number=1, **arguments):
        for _ in range(number):
            print(json.dumps([port, asdict(place), arguments]), file=mother.stdin, flush=True)
        for _ in range(number):
            started.append(worker := Worker(*await arrivals.get()))
            await worker.listens()
        return started[-number:]

    yield start
    for worker in started:
        worker.leave()
    server.close()


@pytest.fixture
async def issuer():
    async with TokenIssuer({"ann": secret("password")}, clients={"app": secret("client")}) as running:
        yield running


@pytest.fixture
async def log_in(issuer):
    """Return arguments of a provider that has a refresh token and nothing else."""
    async with client() as http:

        async def log_in():
            answer = await http.post(issuer.token_url, data={"grant_type": "password", **CLIENT, **LOGIN})
            issuer.requests.clear()
            refresh_token = answer.json()["refresh_token"]
            return {"issuer": issuer.url, **CLIENT, "refresh_token": refresh_token, "storage_key": "service"}

        yield log_in


@pytest.fixture
async def login(log_in):
    return await log_in()


@asynccontextmanager
async def survivor(place, arguments):
    async with place.opened() as storage:
        provider = OAuth2(storage=storage, http_client=client, **arguments)
        yield provider
        await provider.aclose()


# Eight processes, and fifty tokens that expire


async def test_eight_processes_make_one_exchange_for_each_of_fifty_expiries(workers, issuer, login):
    processes = await workers(PROCESSES, **login)

    tokens = []
    for _ in range(EXPIRIES):
        answers = await asyncio.gather(*(process.fetch() for process in processes))
        tokens.append({answer.get("token") for answer in answers})

    assert [len(each) for each in tokens] == [1] * EXPIRIES
    assert len(set.union(*tokens) - {None}) == EXPIRIES
    assert issuer.requests == {"refresh_token": EXPIRIES}
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


async def test_eight_processes_make_one_fetch_for_each_expiry_where_there_are_no_refresh_tokens(workers, issuer):
    processes = await workers(PROCESSES, issuer=issuer.url, **CLIENT)

    for _ in range(10):
        answers = await asyncio.gather(*(process.fetch() for process in processes))
        assert len({answer["token"] for answer in answers}) == 1

    assert issuer.requests == {"client_credentials": 10}


async def test_managers_of_eight_processes_share_each_token_for_the_most_of_its_life(workers, issuer, login):
    life = issuer.access_lifetime = 1.0
    processes = await workers(PROCESSES, **login)
    start = time.monotonic()

    async def tokens_of(process):
        process.tell("manage")
        tokens = [(await process.hear())["token"] for _ in range(3)]
        process.tell("stop managing")
        while "token" in (last := await process.hear()):
            tokens.append(last["token"])
        return tokens

    tokens = await asyncio.gather(*(tokens_of(process) for process in processes))
    elapsed = time.monotonic() - start

    # A manager refreshes when four fifths of the life are over; nobody does before, whoever has fetched the token.
    assert issuer.fetches <= elapsed / (0.75 * life) + 1
    assert issuer.fetches == len({token for each in tokens for token in each})
    assert issuer.requests.keys() == {"refresh_token"}
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


# Robbed of what was stored


async def empty(place):
    async with place.opened() as storage:
        for key in await storage.keys():
            await storage.delete(key)


async def test_a_restarted_process_does_not_send_what_was_spent_before(workers, place, issuer, login):
    (before,) = await workers(**login)
    await before.fetch()
    before.leave()
    await empty(place)

    (after,) = await workers(**login)
    answer = await after.fetch()

    assert "was sent before" in answer["error"]
    assert "A new login is needed" in answer["error"]
    assert not answer["retryable"]
    assert issuer.requests == {"refresh_token": 1}


async def test_no_process_of_several_sends_what_another_has_spent(workers, place, issuer, login):
    processes = await workers(3, **login)
    for process in processes:
        await process.fetch()
    await empty(place)

    answers = [await process.fetch() for process in processes]

    assert all("A new login is needed" in answer["error"] for answer in answers)
    assert issuer.requests == {"refresh_token": 1}
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


async def test_a_restarted_process_sends_what_was_not_sent_before(workers, place, issuer, login):
    login = {**login, "issuer": None, "token_url": issuer.token_url}
    (before,) = await workers(**login)
    await issuer.go_down()
    assert "error" in await before.fetch()
    before.leave()
    await issuer.come_up()
    await empty(place)

    (after,) = await workers(**login)

    assert "token" in await after.fetch()


async def test_a_process_that_saw_a_token_superseded_does_not_send_it(workers, place, issuer, login):
    one, other = await workers(2, **login)
    for process in (one, other):
        await process.fetch()
    async with place.opened() as storage:
        (key,) = await storage.keys()
        backup = await storage.load(key)
        for process in (one, other):
            await process.fetch()

        await storage.save(key, backup)
    answers = [await process.fetch() for process in (other, one)]

    assert all("gone back to an older state" in answer["error"] for answer in answers)
    assert issuer.requests == {"refresh_token": 2}
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


# Killed


async def survive(place, login):
    """Go on after somebody was killed, and return whether a login is needed for that."""
    async with survivor(place, login) as provider:
        # What the dead had fetched before is still good.
        await provider.fetch()
        try:
            await provider.fetch()
        except ProviderError as error:
            assert "A new login is needed" in str(error)
            assert not error.retryable
            return True
    return False


@short_locks
async def test_whoever_is_killed_in_an_exchange_leaves_a_token_or_word_that_a_login_is_needed(
    workers, place, issuer, log_in
):
    found = []
    for line in itertools.count(1, LINES):
        login = await log_in()
        (victim,) = await workers(**login)
        await victim.fetch()
        issuer.requests.clear()
        victim.tell(line)
        survived = await victim.fetch() is not None
        exchanges = issuer.fetches
        found.append((exchanges, await survive(place, login)))
        if survived:
            break

    # Before the mark, marked, exchanged, saved: not a line between two of these leaves anything else.
    assert [stage for stage, _ in itertools.groupby(found)] == [(0, False), (0, True), (1, True), (1, False)]
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


@short_locks
@pytest.mark.parametrize("after_exchange", [False, True])
async def test_who_is_killed_while_the_issuer_is_at_work_leaves_word_that_a_login_is_needed(
    workers, place, issuer, login, after_exchange
):
    (victim,) = await workers(**login)
    await victim.fetch()
    issuer.hang(after_exchange=after_exchange)
    victim.tell("fetch")
    await issuer.reached()
    victim.kill()
    issuer.resume()

    assert await survive(place, login)

    async with survivor(place, {**login, **LOGIN}) as provider:
        assert len({(await provider.fetch()).password for _ in range(3)}) == 3
    assert issuer.requests["password"] == 1
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


@pytest.mark.parametrize("lock_lifetime", [0.5])
async def test_those_who_waited_for_one_who_was_killed_go_on(workers, place, issuer, login):
    victim, *others = await workers(3, **login, **LOGIN)
    for process in (victim, *others):
        await process.fetch()
    issuer.hang(after_exchange=True)
    victim.tell("fetch")
    await issuer.reached()
    for process in others:
        process.tell("fetch")
        await process.listens()

    victim.kill()
    issuer.resume()
    tokens = {(await process.hear())["token"] for process in others}

    assert len(tokens) == 1
    assert issuer.requests == {"refresh_token": 2, "password": 1}
    assert (issuer.replays, issuer.revoked_families) == (0, 0)
