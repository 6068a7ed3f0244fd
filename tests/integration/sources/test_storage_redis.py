"""Tokens in Redis: what the server, the network and the caller can do wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import re
import ssl
import traceback
import warnings
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
import trustme
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from redis_server import RedisServer
from storages import steps_that_block
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import Credential
from asyncpool_creds.storage import StoredTokens
from asyncpool_creds.storage.redis import RedisStorage

pytestmark = pytest.mark.anyio

TOKENS = StoredTokens(refresh_token=secret("refresh"))
OTHERS = StoredTokens(refresh_token=secret("another"))
DAY = 86_400


@pytest.fixture(scope="module")
def server():
    with RedisServer(password=secret("redis")) as server:
        yield server


@pytest.fixture
async def client(server):
    async with Redis.from_url(server.url()) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def storage(server, client):
    async with RedisStorage(server.url()) as storage:
        yield storage


@asynccontextmanager
async def frozen(server):
    """A server that takes connections and does not answer."""
    os.kill(server.pid, 19)  # SIGSTOP
    try:
        yield
    finally:
        os.kill(server.pid, 18)  # SIGCONT


async def until(condition):
    while not await condition():  # noqa: ASYNC110 - Redis does not announce it
        await asyncio.sleep(0.005)


# What is kept, and for how long.


async def test_nothing_is_left_after_lock_and_delete(storage, client):
    async with storage.lock("key"):
        await storage.save("key", TOKENS)
        assert len(await client.keys()) == 3
        await storage.delete("key")

    assert await client.keys() == []


async def test_everything_begins_with_the_prefix(server, client):
    async with RedisStorage(server.url(), prefix="team [a]*:") as storage, RedisStorage(server.url()) as other:
        await storage.save("key", TOKENS)
        async with storage.lock("key"):
            names = await client.keys()
        await other.save("another", TOKENS)

        assert all(name.startswith(b"team [a]*:{key}:") for name in names)
        assert await storage.keys() == ["key"]
        assert await other.keys() == ["another"]


async def test_keys_are_found_among_many_others(storage, client):
    await client.mset({f"something {number}": "else" for number in range(5000)})
    for number in range(30):
        await storage.save(f"key {number:02}", TOKENS)

    assert await storage.keys() == [f"key {number:02}" for number in range(30)]


@pytest.mark.parametrize(
    ("refresh", "access", "kept"),
    [
        (None, None, None),
        (100, None, 100 + DAY),
        (-5, None, DAY),
        (100, 500, 500 + DAY),
        (500, 100, 500 + DAY),
        (100, "never", None),
        (None, 100, None),
    ],
)
async def test_tokens_are_kept_until_a_day_after_their_end(storage, client, refresh, access, kept):
    def at(seconds):
        return None if seconds in (None, "never") else datetime.now(UTC) + timedelta(seconds=seconds)

    credential = None if access is None else Credential(secret("access"), expires_at=at(access))
    await storage.save("key", TOKENS)
    await storage.save("key", StoredTokens(refresh_token=secret(), expires_at=at(refresh), credential=credential))

    left = await client.ttl("asyncpool_creds:{key}:tokens")
    assert left == -1 if kept is None else left == pytest.approx(kept, abs=20)


async def test_a_damaged_entry_is_an_error_that_shows_nothing(storage, client):
    await client.set("asyncpool_creds:{key}:tokens", secret("no json"))

    with pytest.raises(ValueError, match="damaged") as caught:
        await storage.load("key")
    assert_no_secret(caught.value)


async def test_an_entry_of_a_later_format_is_neither_read_nor_overwritten(storage, client):
    name = "asyncpool_creds:{key}:tokens"
    text = TOKENS.to_json().replace('"format": 1', '"format": 2')
    await client.set(name, text)

    async with storage.lock("key"):
        for question in (storage.load("key"), storage.save("key", OTHERS)):
            with pytest.raises(ValueError, match="was written by a later version of asyncpool_creds") as caught:
                await question
            assert_no_secret(caught.value)

    assert (await client.get(name)).decode() == text
    await storage.delete("key")
    await storage.save("key", OTHERS)
    assert await storage.load("key") == OTHERS


async def test_what_cannot_be_tokens_is_overwritten(storage, client):
    await client.lpush("asyncpool_creds:{key}:tokens", "x")

    await storage.save("key", TOKENS)

    assert await storage.load("key") == TOKENS


@pytest.mark.parametrize("text", ["", "[", "[]", "5", "null", '{"format": "2"}', "\xff", "{}", '{"format": 1}'])
async def test_what_is_no_later_format_is_overwritten(storage, client, text):
    await client.set("asyncpool_creds:{key}:tokens", text)

    await storage.save("key", TOKENS)

    assert await storage.load("key") == TOKENS


async def test_a_mark_has_no_end_and_outlives_the_tokens(storage, client):
    await storage.save("key", StoredTokens(refresh_token=secret(), expires_at=datetime.now(UTC)))
    await storage.save_mark("key", "a:b")
    await client.delete("asyncpool_creds:{key}:tokens")

    assert await storage.load_mark("key") == "a:b"
    assert await client.ttl("asyncpool_creds:{key}:spent") == -1


async def test_a_mark_is_not_saved_by_who_has_lost_the_lock(server, client):
    async with RedisStorage(server.url()) as storage, RedisStorage(server.url()) as other, storage.lock("key"):
        await client.delete("asyncpool_creds:{key}:lock")
        async with other.lock("key"):
            with pytest.raises(OSError, match="the lock was lost"):
                await storage.save_mark("key", "a:b")

        assert await storage.load_mark("key") is None


async def test_an_entry_of_another_kind_is_an_error(storage, client):
    await client.lpush("asyncpool_creds:{key}:tokens", "x")

    with pytest.raises(OSError, match="Redis refused: ResponseError: WRONGTYPE"):
        await storage.load("key")


# The lock.


async def test_the_lock_ends_by_itself_if_nobody_extends_it(server, client):
    async with RedisStorage(server.url()) as storage, storage.lock("key"):
        assert 0 < await client.pttl("asyncpool_creds:{key}:lock") <= 15_000


async def test_the_lock_is_extended_while_it_is_held(server, client):
    name = "asyncpool_creds:{key}:lock"
    async with RedisStorage(server.url(), lock_lifetime=0.3) as storage, storage.lock("key"):
        first = await client.get(name)
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert await client.get(name) == first
        assert "asyncpool_creds: lock in redis" in {task.get_name() for task in tasks_of_ours()}

    assert tasks_of_ours() == set()
    assert await client.get(name) is None


async def test_a_lock_that_somebody_else_got_is_an_error_at_the_next_write_and_no_other(server, client):
    async with RedisStorage(server.url()) as storage, RedisStorage(server.url()) as other:
        async with storage.lock("key"):
            await storage.save("key", TOKENS)
            await client.delete("asyncpool_creds:{key}:lock")  # its life is over
            async with other.lock("key"):
                for write in (storage.save("key", TOKENS), storage.delete("key")):
                    with pytest.raises(
                        OSError, match=r"the lock was lost: .* somebody else got the lock; nothing was saved"
                    ):
                        await write
                await other.save("key", OTHERS)
            with pytest.raises(OSError, match="the lock was lost"):
                await storage.save("key", TOKENS)

        assert await storage.load("key") == OTHERS
        async with asyncio.timeout(5), storage.lock("key"):
            await storage.save("key", TOKENS)


async def test_the_loser_of_a_lock_does_not_release_it(server, client):
    async with RedisStorage(server.url()) as storage, RedisStorage(server.url()) as other:
        async with other.lock("another"):
            pass  # connected
        async with storage.lock("key"):
            await client.delete("asyncpool_creds:{key}:lock")
            held = other.lock("key")
            await held.__aenter__()
        assert await client.exists("asyncpool_creds:{key}:lock")
        await other.save("key", OTHERS)
        await held.__aexit__(None, None, None)

    assert not await client.exists("asyncpool_creds:{key}:lock")


async def test_the_loser_of_a_lock_does_not_extend_it(server, client):
    name = "asyncpool_creds:{key}:lock"
    async with (
        RedisStorage(server.url(), lock_lifetime=0.3) as storage,
        RedisStorage(server.url(), lock_lifetime=60) as other,
        storage.lock("key"),
    ):
        await client.delete(name)
        async with other.lock("key"):
            keeper = {task for task in tasks_of_ours() if task.get_name() == "asyncpool_creds: lock in redis"}
            async with asyncio.timeout(5):
                await asyncio.wait(keeper, return_when=asyncio.FIRST_COMPLETED)

            assert await client.pttl(name) > 50_000


async def test_a_lock_whose_life_is_over_is_still_ones_own_if_nobody_else_got_it(storage, client):
    async with storage.lock("key"):
        await client.delete("asyncpool_creds:{key}:lock")

        await storage.save("key", TOKENS)

    assert await storage.load("key") == TOKENS


async def test_a_lock_of_which_redis_knows_nothing_any_more_is_lost(storage, client):
    async with storage.lock("key"):
        await client.flushall()  # what a failover to an old replica comes to

        with pytest.raises(OSError, match="the lock was lost"):
            await storage.save("key", TOKENS)


async def test_many_processes_that_wait_ask_seldom(server, client):
    async with RedisStorage(server.url()) as holder, RedisStorage(server.url()) as waiters:
        entered = []

        async def wait():
            async with waiters.lock("key"):
                entered.append(True)

        async with holder.lock("key"):
            waiting = [asyncio.create_task(wait()) for _ in range(50)]
            await asyncio.sleep(0.5)  # the first attempts are close together
            before = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"]
            await asyncio.sleep(1)
            asked = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"] - before
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting)

    assert len(entered) == 50
    assert asked <= 8  # all of them together


# Failures.


async def test_a_server_that_is_gone_is_an_error_and_one_that_is_back_is_used_again():
    with RedisServer(password=secret("redis")) as server:
        async with RedisStorage(server.url(), timeout=2) as storage:
            await storage.save("key", TOKENS)
            server.stop()

            for question in (storage.load("key"), storage.save("key", TOKENS), storage.keys()):
                with pytest.raises(OSError, match=r"Redis cannot be used|did not answer within 2 s") as caught:
                    await question
                assert_no_secret(caught.value)
            with pytest.raises(OSError, match=r"Redis cannot be used|did not answer within 2 s"):
                await storage.lock("key").__aenter__()

            server.start()
            async with storage.lock("key"):
                await storage.save("key", OTHERS)
            assert await storage.load("key") == OTHERS


async def test_a_connection_to_what_has_become_a_replica_is_given_up(server, client):
    with RedisServer(password=secret("redis")) as other:
        port = server.port

        async def pass_on(reader, writer):
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)

            async def pump(source, target):
                while data := await source.read(65536):
                    target.write(data)
                target.close()

            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)

        async with (
            await asyncio.start_server(pass_on, "127.0.0.1", 0) as address,
            RedisStorage(server.url(port=address.sockets[0].getsockname()[1])) as storage,
        ):
            await storage.save("key", TOKENS)
            await client.replicaof("127.0.0.1", other.port)
            try:
                with pytest.raises(OSError, match="Redis refused: ReadOnlyError"):
                    await storage.save("key", OTHERS)
                port = other.port
                async with storage.lock("key"):
                    await storage.save("key", OTHERS)
            finally:
                await client.replicaof("NO", "ONE")

            assert await storage.load("key") == OTHERS


async def test_a_server_that_goes_and_comes_back_while_the_lock_is_held_takes_it_away():
    with RedisServer(password=secret("redis")) as server:
        async with RedisStorage(server.url(), lock_lifetime=0.3, timeout=0.5) as storage, storage.lock("key"):
            server.stop()
            server.start()

            with pytest.raises(OSError, match="the lock was lost"):
                await storage.save("key", TOKENS)


async def test_a_server_that_is_gone_at_the_end_of_the_lock_is_no_error():
    with RedisServer(password=secret("redis")) as server:
        async with RedisStorage(server.url(), timeout=0.5) as storage:
            async with storage.lock("key"):
                await storage.save("key", TOKENS)
                server.stop()

            assert tasks_of_ours() == set()


async def test_a_server_that_does_not_answer_is_a_timeout(server, client):
    async with RedisStorage(server.url(), timeout=0.2) as storage:
        await storage.save("key", TOKENS)
        async with frozen(server):
            for question in (storage.load("key"), storage.save("key", OTHERS), storage.keys()):
                with pytest.raises(TimeoutError, match=r"Redis did not answer within 0\.2 s"):
                    await question
            with anyio.move_on_after(0.05) as scope:
                await storage.lock("key").__aenter__()

        assert scope.cancelled_caught
        assert await storage.load("key") is not None
        assert tasks_of_ours() == set()


async def test_a_save_that_was_given_up_is_not_done_after_the_lock_has_passed_on(server, client):
    async with RedisStorage(server.url(), timeout=0.2) as storage, RedisStorage(server.url()) as other:
        async with storage.lock("key"):
            await storage.save("key", TOKENS)
            async with frozen(server):
                with pytest.raises(TimeoutError):
                    await storage.save("key", TOKENS)
            await client.delete("asyncpool_creds:{key}:lock")
            async with other.lock("key"):
                await other.save("key", OTHERS)

        assert await storage.load("key") == OTHERS


async def test_a_wrong_password_is_told_and_not_shown(server):
    async with RedisStorage(server.url(password=secret("wrong"))) as storage:
        for question in (storage.load("key"), storage.save("key", TOKENS), storage.keys(), take(storage)):
            with pytest.raises(OSError, match=r"Redis cannot be used: AuthenticationError") as caught:
                await question
            shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
            assert "redis/asyncio/connection.py" in shown
            assert_no_secret(caught.value, storage, shown)


async def take(storage):
    async with storage.lock("key"):
        pass


async def test_a_server_without_scripts_is_told_of_and_shows_nothing():
    with RedisServer("--rename-command", "EVALSHA", "", password=secret("redis")) as server:
        async with RedisStorage(server.url()) as storage:
            with pytest.raises(OSError, match=r"Redis refused: .*unknown command 'EVALSHA'$") as caught:
                await storage.save("", StoredTokens(refresh_token=secret()))
    assert_no_secret(caught.value)


async def test_a_server_that_speaks_another_language_is_not_quoted():
    async def answer(reader, writer):
        await reader.read(100)
        writer.write(f"{secret('stored by somebody')}\r\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with RedisStorage(f"redis://127.0.0.1:{port}/0", timeout=2) as storage:
            with pytest.raises(OSError, match="Redis") as caught:
                await storage.load("key")
    assert_no_secret(caught.value)


async def test_a_server_that_quotes_what_it_was_given_is_not_repeated(server, client, storage, monkeypatch):
    async def refuse(*_, **__):
        raise ResponseError(f"ERR cannot keep {TOKENS.to_json()[:60]}")

    monkeypatch.setattr(Redis, "evalsha", refuse)
    with pytest.raises(OSError, match=r"^Redis refused: ResponseError$") as caught:
        await storage.save("key", TOKENS)
    assert_no_secret(caught.value)


async def test_the_commands_that_the_page_names_are_enough(server, client):
    page = (Path(__file__).parents[3] / "docs" / "storage.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r"`(~asyncpool_creds:\* .*?)`", page)
    await client.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{secret('app')}", *rules.split())
    await client.execute_command("ACL", "LOG", "RESET")

    url = f"redis://app:{secret('app')}@127.0.0.1:{server.port}/0"
    async with RedisStorage(url, lock_lifetime=0.1) as storage:
        async with storage.lock("key"):
            await storage.save("key", StoredTokens(refresh_token=secret(), expires_at=datetime.now(UTC)))
            await storage.save("key", TOKENS)
            await client.delete("asyncpool_creds:{key}:lock")
            await until(lambda: client.exists("asyncpool_creds:{key}:lock"))  # extended
        assert await storage.load("key") == TOKENS
        assert await storage.keys() == ["key"]
        await storage.save_mark("key", "a:b")
        assert await storage.load_mark("key") == "a:b"
        await storage.delete("key")

    refused = {entry[b"object"] for entry in await client.execute_command("ACL", "LOG")}
    assert refused <= {b"client|setinfo"}  # what the client says of itself


async def test_connections_that_the_server_has_closed_meanwhile_are_replaced(server, client):
    async with RedisStorage(server.url()) as storage, Redis.from_url(server.url()) as own:
        for one in (storage, RedisStorage(own)):
            await asyncio.gather(*(one.save("key", TOKENS) for _ in range(5)))
            await client.client_kill_filter(skipme=True)

            assert await one.load("key") == TOKENS
            await asyncio.gather(*(one.save("key", TOKENS) for _ in range(5)))


# Clients.


async def test_a_client_of_ones_own_is_used_and_left_open(server, client):
    own = Redis.from_url(server.url(), decode_responses=True)
    async with RedisStorage(own) as storage:
        async with storage.lock("key"):
            await storage.save("key", TOKENS)
            await storage.save_mark("key", "a:b")
        assert await storage.load_mark("key") == "a:b"
        assert await storage.load("key") == TOKENS
        assert await storage.keys() == ["key"]

    connections = len(await client.client_list())
    assert await own.ping()
    assert len(await client.client_list()) == connections
    await own.aclose()


async def test_closing_ends_the_connections_and_a_later_use_opens_new_ones(server, client):
    storage = RedisStorage(server.url())
    before = len(await client.client_list())

    for _ in range(2):
        await storage.save("key", TOKENS)
        assert len(await client.client_list()) > before
        await storage.aclose()
        await storage.aclose()
        async with asyncio.timeout(5):
            await until(lambda: has_clients(client, before))


async def has_clients(client, number):
    return len(await client.client_list()) == number


def test_a_client_that_belongs_to_another_loop_is_refused_with_what_to_do(server):
    client = Redis.from_url(server.url())
    storage = RedisStorage(client)

    async def first():
        await storage.save("key", TOKENS)
        await client.aclose()

    asyncio.run(first())

    with pytest.raises(
        RuntimeError, match="belongs to another event loop or process; make one for each, or give a URL"
    ):
        asyncio.run(storage.load("key"))


def test_a_storage_that_was_not_closed_works_in_the_next_loop(server):
    storage = RedisStorage(server.url())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # rightly: it was not closed
        asyncio.run(storage.save("key", TOKENS))

        async def load():
            async with storage:
                return await storage.load("key")

        assert asyncio.run(load()) == TOKENS
        gc.collect()


class TlsDoor:
    """TLS before a server that has none."""

    def __init__(self, server):
        self.authority = trustme.CA()
        self._server = server

    async def __aenter__(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        self._door = await asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=context)
        self.port = self._door.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._door.close()

    async def _pass_on(self, reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._server.port)

        async def pump(source, target):
            while data := await source.read(65536):
                target.write(data)
            target.close()

        with anyio.CancelScope():
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)


async def test_tls_with_an_authority_of_ones_own(server, client, tmp_path):
    async with TlsDoor(server) as door:
        door.authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        url = server.url(port=door.port).replace("redis://", "rediss://")
        async with RedisStorage(f"{url}?ssl_ca_certs={tmp_path / 'ca.pem'}") as storage:
            async with storage.lock("key"):
                await storage.save("key", TOKENS)

            assert await storage.load("key") == TOKENS


async def test_reading_the_authorities_does_not_hold_the_loop_up(server, client):
    async with TlsDoor(server) as door:
        url = server.url(port=door.port).replace("redis://", "rediss://")

        async def use():
            async with (
                RedisStorage(f"{url}?ssl_cert_reqs=none&ssl_check_hostname=false") as storage,
                storage.lock("key"),
            ):
                await storage.save("key", TOKENS)

        assert await steps_that_block(use) == []


async def test_a_server_whose_certificate_is_not_trusted_gets_no_password(server):
    async with TlsDoor(server) as door:
        url = server.url(port=door.port).replace("redis://", "rediss://")
        async with RedisStorage(url, timeout=2) as storage:
            with pytest.raises(
                OSError, match=r"Redis cannot be used: .*certificate verify failed|did not answer"
            ) as caught:
                await storage.load("key")
    assert_no_secret(caught.value)


async def test_a_file_of_authorities_that_is_not_there_is_an_error(server):
    url = server.url().replace("redis://", "rediss://")
    with pytest.raises(OSError, match="No such file"):
        await RedisStorage(f"{url}?ssl_ca_certs=/nowhere/ca.pem").load("key")


# Arguments, and what is shown.


def test_neither_url_nor_password_show_and_it_cannot_be_pickled(server):
    storage = RedisStorage(server.url())

    assert repr(storage) == "<RedisStorage prefix='asyncpool_creds:'>"
    assert_no_secret(storage)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(storage)


@pytest.mark.parametrize(
    "url", ["", "localhost", "http://localhost", f"redis://:{secret()}/x@localhost", f"redis://localhost:{secret()}"]
)
def test_what_is_no_url_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match=r"this is no URL of a Redis, .* must be percent-encoded") as caught:
        RedisStorage(url)
    assert_no_secret(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"client": 5}, TypeError, "client must be a redis.asyncio.Redis or a URL, not int"),
        ({"prefix": b"x"}, TypeError, "prefix must be a str, not bytes"),
        ({"lock_lifetime": 0}, ValueError, "lock_lifetime"),
        ({"lock_lifetime": float("inf")}, ValueError, "lock_lifetime"),
        ({"timeout": -1}, ValueError, "timeout"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, names):
    with pytest.raises(error, match=names):
        RedisStorage(**{"client": "redis://localhost", **arguments})


def test_lifetimes_can_be_timedeltas():
    RedisStorage("rediss://localhost", lock_lifetime=timedelta(minutes=1), timeout=timedelta(seconds=2))
