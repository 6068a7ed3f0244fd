"""The surroundings of a fault test: what can go wrong in them, and what must be true afterwards."""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import anyio
import asyncpg
from support import assert_no_secret, secret

from asyncpool_creds import Credential, CredentialPool, TokenManager, create_pool
from asyncpool_creds._rotation import ExpiredSessions
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

# Long enough for a machine that is busy with something else; nothing waits for it unless it has failed.
PATIENCE = 10.0
LIFETIME = 1000.0

_ASYNCPGS_OWN: tuple[str, ...] = (
    # A transaction was left open on release, which is a fault of the test's making.
    "Resetting connection with an active transaction",
    # Pool.release() forgets its shielded task when it is cancelled; the connection may die before that has ended.
    r"Task exception was never retrieved: .* coro=<[\w.]*release\w*\(\) done",
    # asyncpg.connect forgets the future of the server's answer about TLS when it is cancelled while it waits for that.
    r"Future exception was never retrieved: ConnectionError\('unexpected connection_lost\(\) call'\)",
)
if not hasattr(asyncpg.Pool, "get_init_size"):
    # Before 0.32 asyncpg.connect forgets a future of its own when it is cancelled during the login,
    # and is surprised by an answer to its wish for TLS that comes after the cancellation.
    _ASYNCPGS_OWN += (
        r"Future exception was never retrieved: ConnectionDoesNotExistError\('connection was closed in",
        r"Fatal error: protocol.data_received\(\) call failed.: InvalidStateError",
    )


class World:
    """A token source and a door that agree on what time it is, and on which tokens are good.

    Time stands still unless a test moves `clock`; timers and I/O take real time.
    """

    def __init__(self, server: PostgresServer, *, expired_sessions: ExpiredSessions) -> None:
        self.server = server
        self.expired_sessions = expired_sessions
        self.clock = VirtualClock()
        self.observer = RecordingObserver()
        self.provider = self.source(self.mint)
        self.door = TokenDoor(server, self.verify)
        self.sslmode = "disable"
        self.revoked: set[str] = set()
        # What the loop complains about: exceptions nobody retrieved, tasks that were destroyed.
        self.complaints: list[str] = []
        self.managers: list[TokenManager] = []
        self._credentials: dict[str, Credential] = {}
        self._numbers = itertools.count(1)
        self._stack = AsyncExitStack()
        self._tasks_before: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        previous = loop.get_exception_handler()
        loop.set_exception_handler(self._complain)
        self._stack.callback(loop.set_exception_handler, previous)
        gc.freeze()  # the collection at the end is for what comes from here on, and takes a tenth of the time
        await self._stack.enter_async_context(self.door)
        self._tasks_before = asyncio.all_tasks()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async with self._stack:
            if error is None:
                for manager in self.managers:
                    await manager.aclose()
                await self.assert_nothing_left()
                # What is part of a cycle complains only when it is collected.
                gc.collect()
                await asyncio.sleep(0)
                self.assert_no_complaints()

    # Tokens.

    def source(self, *script: Any, **options: Any) -> ScriptedProvider:
        """Return a source on the world's clock, whose own tokens nobody knows."""
        return ScriptedProvider(*script, clock=self.clock, prefix=secret("token"), **options)

    async def mint(self, lifetime: float | None = LIFETIME, **details: Any) -> Credential:
        """Return a token that the door lets in while it lives."""
        # A source that is not asleep yet suspends: a waiter for it can be cancelled.
        await asyncio.sleep(0)
        return self.mint_now(lifetime, **details)

    def mint_now(self, lifetime: float | None = LIFETIME, **details: Any) -> Credential:
        credential = Credential(
            secret(f"{next(self._numbers)}."),
            expires_at=None if lifetime is None else self.clock.now() + timedelta(seconds=lifetime),
            **details,
        )
        self._credentials[credential.password] = credential
        return credential

    def verify(self, user: str, password: str) -> str | None:
        credential = self._credentials.get(password)
        if credential is None:
            return "unknown"
        if password in self.revoked:
            return "revoked"
        return "expired" if credential.expires_at is not None and credential.expires_at <= self.clock.now() else None

    def revoke_all(self) -> None:
        """Refuse every token there is now."""
        self.revoked.update(self._credentials)

    # Pools.

    def manager(self, provider: Any = None, **arguments: Any) -> TokenManager:
        """Return a manager that is closed with the world."""
        arguments = {"clock": self.clock, "on_event": self.observer, **arguments}
        if provider is None:
            # A manager closes its source with itself, so each has its own.
            provider = self.provider = self.source(self.mint)
        manager = TokenManager(provider, **arguments)
        self.managers.append(manager)
        return manager

    def pool(self, credentials: Any = None, **arguments: Any) -> CredentialPool[asyncpg.Record]:
        """Return a pool of up to two connections that replaces them as fast as it can."""
        arguments = {
            "min_size": 0,
            "max_size": 2,
            "retire_when": "rotated",
            "max_reconnects_per_second": 10_000,
            "on_event": self.observer,
            "timeout": PATIENCE,
            "expired_sessions": self.expired_sessions,
            **arguments,
        }
        return create_pool(
            self.door.dsn(sslmode=self.sslmode),
            credentials=self.manager() if credentials is None else credentials,
            **arguments,
        )

    def asyncpg_pool(self, **arguments: Any) -> asyncpg.Pool[asyncpg.Record]:
        """Return asyncpg's own, for comparison."""

        async def password() -> str:
            return (await self.provider.fetch()).password

        arguments = {"min_size": 0, "max_size": 2, "timeout": PATIENCE, **arguments}
        return asyncpg.create_pool(self.door.dsn(sslmode=self.sslmode), password=password, **arguments)

    # What must hold.

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds, which may depend on things that announce nothing."""
        with anyio.fail_after(PATIENCE):
            while not condition():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.0005)

    async def assert_serves(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        """Every slot of the pool can be had at once, none twice, and no connection is open but those of its slots."""
        size = pool.get_max_size()
        with anyio.fail_after(PATIENCE):
            connections = await asyncio.gather(*(pool.acquire() for _ in range(size)))
            pids = await asyncio.gather(*(one.fetchval("SELECT pg_backend_pid()") for one in connections))
            one_too_many = asyncio.ensure_future(pool.acquire())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not one_too_many.done(), "more connections can be had than the pool has"
            one_too_many.cancel()
            await asyncio.wait([one_too_many])
            await asyncio.gather(*(pool.release(one) for one in connections))
        assert len(set(pids)) == size, "two callers had the same connection"
        await self.until(lambda: self.door.live == self.known(pool))
        assert_no_secret(pool, *self.managers)

    def known(self, pool: asyncpg.Pool[asyncpg.Record]) -> int:
        """Return how many connections the pool has open, by its own account."""
        if not isinstance(pool, CredentialPool):
            return pool.get_size()
        stats = pool.stats()
        assert_no_secret(stats)
        return stats.in_use + stats.idle + stats.spare

    async def assert_closes(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        """The pool can be closed, and nothing is left of it."""
        with anyio.fail_after(PATIENCE):
            await pool.close()
        if isinstance(pool, CredentialPool):
            stats = pool.stats()
            assert (stats.in_use, stats.idle, stats.spare) == (0, 0, 0)
        await self.assert_nothing_left()

    async def assert_nothing_left(self) -> None:
        """No connection at the door, and no task but the test's own."""
        await self.until(lambda: self.door.live == 0)
        try:
            await self.until(lambda: not self.tasks())
        except TimeoutError:
            names = [task.get_name() for task in self.tasks()]
            raise AssertionError(f"left over: {names or 'tasks'}") from None

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that were not there at the beginning, the door's own aside."""
        tasks = asyncio.all_tasks() - self._tasks_before
        assert_no_secret(*map(repr, tasks))
        return [task for task in tasks if not _is_of_the_surroundings(task)]

    def assert_no_complaints(self) -> None:
        complaints = [
            one for one in self.complaints if not any(re.match(known, one, re.DOTALL) for known in _ASYNCPGS_OWN)
        ]
        self.complaints.clear()
        assert not complaints, complaints

    def _complain(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        assert_no_secret(context)
        culprit = context.get("future", context.get("task"))
        self.complaints.append(f"{context['message']}: {context.get('exception')!r} {culprit!r}")


class Interruption(Coroutine[Any, Any, Any]):
    """A coroutine that is cancelled at its `at`-th suspension, and counts them.

    The task cancels itself from inside, the moment it is about to wait, so that no timing is involved.

    Args:
        operation: What to interrupt.
        at: At which suspension, from 0.
        how: "waiting": while it waits. "ready": when what it waits for has come, and before it runs again, where
            a careless pool loses what it was just given. "twice": while it waits, and again at the
            next suspension, in the midst of its cleaning up.
    """

    def __init__(self, operation: Coroutine[Any, Any, Any], at: int, how: str) -> None:
        self._operation = operation
        self._at = at
        self._how = how
        self.suspensions = 0
        self.fired = False

    def send(self, value: Any) -> Any:
        return self._suspended(self._operation.send(value))

    def throw(self, *error: Any) -> Any:
        return self._suspended(self._operation.throw(*error))

    def close(self) -> None:
        self._operation.close()

    def __await__(self) -> Any:
        return self

    def _suspended(self, waited_for: Any) -> Any:
        count, self.suspensions = self.suspensions, self.suspensions + 1
        task = asyncio.current_task()
        assert task is not None
        if count == self._at and self._how == "ready" and waited_for is not None:
            waited_for.add_done_callback(lambda _: self._fire(task))
        elif count == self._at or (count == self._at + 1 and self._how == "twice"):
            self._fire(task)
        return waited_for

    def _fire(self, task: asyncio.Task[Any]) -> None:
        self.fired = True
        task.cancel()


async def interrupt_everywhere(
    attempt: Callable[[Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]], Awaitable[None]], how: str
) -> int:
    """Call `attempt` with a function that runs a coroutine and cancels it, at another suspension each time.

    That function returns the coroutine's result, or None if it was cancelled. Ends with the first attempt
    in which the coroutine came to its end before its turn; returns how many suspensions it had until then.
    """
    for at in itertools.count():
        fired = ran = False

        async def interrupted(operation: Coroutine[Any, Any, Any], at: int = at) -> Any:
            nonlocal fired, ran
            ran = True
            interruption = Interruption(operation, at, how)
            task = asyncio.get_running_loop().create_task(interruption, name=f"the operation, cancelled at {at}")
            with anyio.fail_after(PATIENCE):
                await asyncio.wait([task])
            fired = interruption.fired
            return None if task.cancelled() else task.result()

        try:
            await attempt(interrupted)
        except BaseException as error:
            error.add_note(f"cancelled at suspension {at} ({how})")
            raise
        assert ran, "the attempt did not run the operation"
        if not fired:
            return at
    raise AssertionError


def _is_of_the_surroundings(task: asyncio.Task[Any]) -> bool:
    # anyio's plugin runs tests and fixtures in a task of its own.
    coroutine = getattr(task.get_coro(), "__qualname__", "")
    return (
        task is asyncio.current_task()
        or coroutine.startswith("TestRunner.")
        or task.get_name().startswith("asyncpool_creds.testing")
    )
