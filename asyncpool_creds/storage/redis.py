"""Tokens kept in Redis, for processes on many machines."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from operator import methodcaller
from types import TracebackType
from typing import Any, Final, NoReturn, Protocol, Self, cast

import anyio
import anyio.to_thread

try:
    from redis.asyncio import Redis
    from redis.asyncio.connection import SSLConnection, parse_url
    from redis.exceptions import AuthenticationError, InvalidResponse, ReadOnlyError, RedisError
    from redis.exceptions import ConnectionError as RedisConnectionError
    from redis.exceptions import TimeoutError as RedisTimeoutError
except ImportError as _missing:  # pragma: no cover
    raise ImportError("tokens in Redis need redis: pip install 'asyncpool-creds[redis]'") from _missing

from asyncpool_creds import _policy
from asyncpool_creds.storage import FORMAT, LaterFormatError, StoredTokens
from asyncpool_creds.storage._frames import quotes, without_locals
from asyncpool_creds.storage._turns import Turns, pauses, to_the_end

__all__ = ["RedisStorage"]

# Seconds between two attempts while somebody waits: one short script each. A blocking pop or a subscription
# would hold a connection for each who waits, and lose wake-ups with the connection.
_LONGEST_PAUSE: Final = 0.25
_ATTEMPTS: Final = 3
# For how long it is remembered who was the last to get a lock: a process may be stopped, and go on.
_REMEMBERED: Final = timedelta(days=1)
# What a script returns that has found tokens of a later version.
_LATER: Final = 2
# For how long tokens are kept after their end: whoever finds them can tell that they have expired.
_MARGIN: Final = timedelta(days=1)

# KEYS[1] says that the lock is held, and ends by itself; KEYS[2] is who was the last to get it, which is what
# everything else is decided by: he still has it if nobody got it after him, be it that its life is over.
_ACQUIRE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
return 1
"""
_EXTEND: Final = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
return 1
"""
_RELEASE: Final = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1], KEYS[2])
"""
# What a later version has written stays, unless it is deleted.
_WRITE: Final = """
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if ARGV[4] ~= '' then
  local is_json, old = pcall(cjson.decode, redis.pcall('GET', KEYS[1]) or '')
  if is_json and type(old) == 'table' and type(old.format) == 'number' and old.format > tonumber(ARGV[4]) then
    return 2
  end
end
if ARGV[2] == '' then redis.call('DEL', KEYS[1])
elseif ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
"""


class RedisStorage:
    """A `TokenStorage` in Redis 6 or later, or Valkey, shared by all who use the same server and prefix.

    A lock has a bounded life, so that a holder who is killed or cut off does not keep it, and is extended while its
    holder lives. Whoever was stopped for longer than that, and got the lock taken away, cannot save over the
    tokens of those who came after him: that is an error.

    It works in one event loop after another, and in a forked child, if it is made from a URL; not if it is
    made from a client, which belongs to the loop and the process of its first use.

    Args:
        client: A ``redis.asyncio.Redis`` of your own, or a URL: ``rediss://user:password@host:6379/0`` (with TLS),
            ``redis://``, or ``unix://``.
        prefix: What the names of all entries begin with.
        lock_lifetime: Seconds, or a timedelta, after which the lock of a holder who is gone is free. Less than the
            ``fetch_timeout`` of those who wait for it, or they give up first.
        timeout: Seconds, or a timedelta, that Redis may take for an answer, retries included.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The URL is none, or a duration is not more than zero and finite.
    """

    def __init__(
        self,
        client: Redis | str,
        *,
        prefix: str = "asyncpool_creds:",
        lock_lifetime: float | timedelta = 15.0,
        timeout: float | timedelta = 5.0,
    ) -> None:
        if not isinstance(client, (Redis, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"RedisStorage: client must be a redis.asyncio.Redis or a URL, not {type(client).__name__}")
        if not isinstance(prefix, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"RedisStorage: prefix must be a str, not {type(prefix).__name__}")
        if isinstance(client, str):
            _check_url(client)
        self._source: Final = client
        self._prefix: Final = prefix
        self._lifetime: Final = _policy.parse_seconds("lock_lifetime", lock_lifetime)
        self._timeout: Final = _policy.parse_seconds("timeout", timeout)
        self._turns: Final = Turns()
        # Who holds a lock here, by loop and key.
        self._holders: Final[dict[tuple[asyncio.AbstractEventLoop, str], str]] = {}
        self._client: Redis | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None

    async def load(self, key: str) -> StoredTokens | None:
        """Return what was saved last under `key`.

        Raises:
            OSError: Redis cannot be reached, or refuses.
            ValueError: The entry is damaged, or of a later version.
            RuntimeError: The client belongs to another event loop or process.
        """
        with without_locals():
            text = await self._ask(lambda client: client.get(self._name(key, "tokens")))
            return None if text is None else StoredTokens.from_json(cast("str | bytes", text))

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there, until a day after their end if that is known.

        Raises:
            OSError: Redis cannot be reached, or refuses, or somebody else got the lock that this caller had.
            RuntimeError: The client belongs to another event loop or process.
            ValueError: A later version has written what is there, which still is.
        """
        with without_locals():
            await self._write(key, "tokens", tokens.to_json(), _milliseconds_to_keep(tokens))

    async def delete(self, key: str) -> None:
        """Forget what was saved under `key`.

        Raises:
            OSError: Redis cannot be reached, or refuses, or somebody else got the lock that this caller had.
            RuntimeError: The client belongs to another event loop or process.
        """
        await self._write(key, "tokens", "")

    async def load_mark(self, key: str) -> str | None:
        """Return the mark of `key`, which is an entry of its own; None: there is none.

        Raises:
            OSError: Redis cannot be reached, or refuses.
            RuntimeError: The client belongs to another event loop or process.
        """
        mark = cast("str | bytes | None", await self._ask(lambda client: client.get(self._name(key, "spent"))))
        return mark.decode(errors="replace") if isinstance(mark, bytes) else mark

    async def save_mark(self, key: str, mark: str | None) -> None:
        """Keep `mark` in place of what was there, without an end; or nothing if it is None.

        Raises:
            OSError: Redis cannot be reached, or refuses, or somebody else got the lock that this caller had.
            RuntimeError: The client belongs to another event loop or process.
        """
        await self._write(key, "spent", mark or "")

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that something is saved under and that begin with `prefix`, sorted.

        The whole database is gone through, step by step.

        Raises:
            OSError: Redis cannot be reached, or refuses.
            RuntimeError: The client belongs to another event loop or process.
        """
        start, end = f"{self._prefix}{{", "}:tokens"
        pattern = f"{_escape(start + prefix)}*{end}"
        keys: set[str] = set()
        cursor = 0
        while True:
            step = methodcaller("scan", cursor, match=pattern, count=1000)
            cursor, names = cast("tuple[int, list[str | bytes]]", await self._ask(step))
            texts = (name.decode() if isinstance(name, bytes) else name for name in names)
            keys.update(text[len(start) : -len(end)] for text in texts)
            if cursor == 0:
                return sorted(keys)

    @asynccontextmanager
    async def lock(self, key: str) -> AsyncGenerator[None]:
        """Hold the lock of `key`.

        Raises:
            OSError: Redis cannot be reached, or refuses.
            RuntimeError: The client belongs to another event loop or process.
        """
        place = (asyncio.get_running_loop(), key)
        async with self._turns.of(key):
            holder = secrets.token_hex(16)
            try:
                await self._acquire(holder, key)
            except asyncio.CancelledError:
                # The request may have got there.
                await to_the_end(self._release(holder, key))
                raise
            self._holders[place], end = holder, asyncio.Event()
            keeper = asyncio.create_task(self._keep(holder, key, end), name="asyncpool_creds: lock in redis")
            try:
                yield
            finally:
                del self._holders[place]
                end.set()
                await to_the_end(self._release(holder, key, keeper))

    async def aclose(self) -> None:
        """Close the connections that this event loop has opened; a later use opens new ones.

        A client of your own stays open.
        """
        client, home = self._client, (os.getpid(), asyncio.get_running_loop())
        if client is not None and client is not self._source and self._home == home:
            self._client = None
            await to_the_end(client.aclose())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _acquire(self, holder: str, key: str) -> None:
        for pause in pauses(_LONGEST_PAUSE):
            if await self._run_for(holder, _ACQUIRE, key):
                return
            await asyncio.sleep(pause)

    async def _keep(self, holder: str, key: str, end: asyncio.Event) -> None:
        """Extend the life of a lock until its end, or until it is lost; then its holder is told by the next save."""
        pause = self._lifetime / 3
        while True:
            try:
                async with asyncio.timeout(pause):
                    await end.wait()
            except TimeoutError:
                pause = self._lifetime / 3
            else:
                return
            try:
                if not await self._run_for(holder, _EXTEND, key):
                    return
            except OSError:
                pause = self._lifetime / 10

    async def _release(self, holder: str, key: str, keeper: asyncio.Task[None] | None = None) -> None:
        if keeper is not None:
            await keeper
        try:
            await self._run_for(holder, _RELEASE, key)
        except (OSError, RuntimeError):
            # What was done under the lock is done, and the end of the lock's life will free it.
            return

    async def _write(self, key: str, what: str, text: str, milliseconds: str = "") -> None:
        holder = self._holders.get((asyncio.get_running_loop(), key), "")
        names = (self._name(key, what), self._name(key, "holder"))
        newest = str(FORMAT) if what == "tokens" and text else ""
        outcome = await self._run(_WRITE, names, (holder, text, milliseconds, newest), told=text)
        if outcome == _LATER:
            raise LaterFormatError(f"the entry {names[0]!r} in Redis")
        if outcome != 1:
            raise OSError(
                f"the lock was lost: this process did not reach Redis for {self._lifetime:g} s, and somebody else got "
                f"the lock; nothing was saved"
            )

    async def _run_for(self, holder: str, script: str, key: str) -> bool:
        names = (self._name(key, "lock"), self._name(key, "holder"))
        return await self._run(script, names, (holder, _milliseconds(self._lifetime), _milliseconds(_REMEMBERED))) == 1

    async def _run(self, script: str, names: tuple[str, ...], values: tuple[str, ...], *, told: str = "") -> object:
        return await self._ask(lambda client: client.register_script(script)(names, values), told=told)

    async def _ask(self, question: Callable[[_Commands], Awaitable[object]], *, told: str = "") -> object:
        cause: RedisError | None = None
        try:
            client = cast("_Commands", await self._open())
            return await _within(self._timeout, _insist(question, client))
        except (RedisConnectionError, RedisTimeoutError, AuthenticationError) as error:
            complaint, text = f"Redis cannot be used: {type(error).__name__}", str(error)
            cause = error
        except InvalidResponse as error:
            # It quotes what it could not make sense of, which may be what was asked for.
            complaint, text = f"Redis does not speak its protocol: {type(error).__name__}", ""
        except RedisError as error:
            # "unknown command" goes on with what was sent.
            complaint, text = f"Redis refused: {type(error).__name__}", str(error).partition(", with args")[0]
        if quotes(text, told):
            cause, text = None, ""
        with without_locals():  # those of the client have its password
            raise OSError(f"{complaint}: {text}" if text else complaint) from cause

    async def _open(self) -> Redis:
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            if isinstance(self._source, Redis) and self._home is not None:
                raise RuntimeError(
                    "RedisStorage: its client belongs to another event loop or process; "
                    "make one for each, or give a URL instead of a client"
                )
            if self._client is not None and self._home is not None and self._home[0] != home[0]:
                _inherited.append(self._client)
            # What belongs to another loop can be neither used nor closed from this one.
            self._home, self._client = home, None
        if self._client is None:
            client = self._source if isinstance(self._source, Redis) else await _connect(self._source)
            # Another task may have been faster.
            self._client = self._client or client
        return self._client

    def _name(self, key: str, what: str) -> str:
        # In a cluster, what is in braces decides which server has it: a script needs its names on one.
        return f"{self._prefix}{{{key}}}:{what}"

    def __repr__(self) -> str:
        return f"<RedisStorage prefix={self._prefix!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RedisStorage cannot be pickled: make it where it is needed")


# Clients inherited by a forked child: closing their sockets is the parent's business, so they are only kept.
_inherited: Final[list[Redis]] = []


class _Connections(Protocol):
    def disconnect(self, inuse_connections: bool = True) -> Awaitable[None]: ...


class _Commands(Protocol):
    """What is used of a client, whose own types are incomplete."""

    def get(self, name: str) -> Awaitable[object]: ...
    def scan(self, cursor: int, *, match: str, count: int) -> Awaitable[object]: ...
    @property
    def connection_pool(self) -> _Connections: ...
    def register_script(self, script: str) -> Callable[[tuple[str, ...], tuple[str, ...]], Awaitable[object]]: ...


class _SharedContext(SSLConnection):
    """A connection that does not read the certificate authorities for itself, which takes 20 ms."""

    def __init__(self, *, shared_context: ssl.SSLContext, **arguments: Any) -> None:
        super().__init__(**arguments)  # pyright: ignore[reportUnknownMemberType] - some of its many arguments
        self.ssl_context.context = shared_context


async def _insist(question: Callable[[_Commands], Awaitable[object]], client: _Commands) -> object:
    """Return the answer to `question`, which is asked again if the connection breaks.

    That is what becomes of one that was idle for minutes. It is also asked again, with a new connection, where the
    other end has become a replica: after a failover the address leads to the new primary, and open connections to the
    old one. Every question may be asked twice: it would change nothing.
    """
    for pause in islice(pauses(_LONGEST_PAUSE), _ATTEMPTS - 1):
        try:
            return await question(client)
        except AuthenticationError:
            raise
        except ReadOnlyError:
            await client.connection_pool.disconnect(inuse_connections=False)
        except RedisConnectionError:
            await asyncio.sleep(pause)
    return await question(client)


async def _within(seconds: float, request: Coroutine[Any, Any, object]) -> object:
    """Return the answer to `request`, or raise TimeoutError.

    It is a task of its own because the client can lose a cancellation (``asyncio.wait_for`` of CPython 3.11 does).
    """

    async def stop() -> None:
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=0.1)

    task = asyncio.create_task(request, name="asyncpool_creds: request to redis")
    # Nobody asks for the error of a request that was given up.
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            await to_the_end(stop())
    if task.cancelled():
        raise TimeoutError(f"Redis did not answer within {seconds:g} s")
    return task.result()


async def _connect(url: str) -> Redis:
    client = Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType] - its further arguments
    pool = client.connection_pool
    if pool.connection_class is SSLConnection:

        def read_authorities() -> ssl.SSLContext:
            connection = SSLConnection(**pool.connection_kwargs)
            context = cast("object", connection.ssl_context.get())  # pyright: ignore[reportUnknownMemberType] - untyped
            return cast("ssl.SSLContext", context)

        pool.connection_kwargs["shared_context"] = await anyio.to_thread.run_sync(read_authorities)
        pool.connection_class = _SharedContext
    return client


def _check_url(url: str) -> None:
    try:
        parse_url(url)
    except ValueError:
        pass
    else:
        return
    # What the parser says quotes what is around a misplaced "/" or ":", which may be the password.
    raise ValueError(
        "RedisStorage: this is no URL of a Redis, such as rediss://user:password@host:6379/0; "
        "special characters in a password must be percent-encoded"
    )


def _milliseconds(life: float | timedelta) -> str:
    seconds = life.total_seconds() if isinstance(life, timedelta) else life
    return str(max(int(seconds * 1000), 1))


def _milliseconds_to_keep(tokens: StoredTokens) -> str:
    """Return how long tokens are to be kept; nothing: for ever."""
    ends = [tokens.expires_at]
    if tokens.credential is not None:
        ends.append(tokens.credential.expires_at)
    known = [end for end in ends if end is not None]
    if tokens.expires_at is None or len(known) < len(ends):
        return ""
    return _milliseconds(max(max(known) - datetime.now(UTC), timedelta()) + _MARGIN)


def _escape(text: str) -> str:
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", text)
