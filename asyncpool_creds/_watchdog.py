"""Servers that owe an answer and say nothing: their connections are hung up on, and their slots are free at once.

A firewall or a load balancer that forgets a connection tells neither end. asyncpg then waits for the acknowledgement
of a cancelled query, or of a reset, for as long as it takes: the timeout of a call bounds its query, and not what
comes after it. Here, whoever waits for such an acknowledgement is noted down, and one timer for each event loop, which
runs only while something is noted, looks whose time is up.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import weakref
from collections.abc import Generator, Hashable
from typing import Any, Final

import asyncpg
from asyncpg.transaction import Transaction

from asyncpool_creds._connector import AnyConnection

__all__ = [
    "ANSWER",
    "ANSWER_OF_OWN",
    "Watchdog",
    "answer_to_reset",
    "guard",
    "look_like",
    "no_reset",
    "part_from",
    "watchdog_of",
]

_logger = logging.getLogger("asyncpool_creds")

# Time is counted in turns of the timer, not on a clock: after a moment in which the event loop stood still, answers
# that came meanwhile are read before anybody's time is up.
_TICK: Final = 0.1
# Nine tenths of a second: what is left behind a caller's deadline is over within the second.
ANSWER: Final = 9
# Ten seconds where users have statements of their own run between a release and the next acquire.
ANSWER_OF_OWN: Final = 100
# A server that has not ended a connection by then is hung up on: it has been told, and nothing is lost.
_GOODBYE: Final = ANSWER * _TICK

# asyncpg before 0.32 leaves those waiting who wait for the cancellation of a query on a connection that dies meanwhile.
_LEAVES_WAITING: Final = "_pool_holder" not in asyncpg.Connection.__slots__


class Watchdog:
    """Hangs up on connections whose servers owe an answer for too long. One for each event loop: see `watchdog_of`."""

    __slots__ = ("__weakref__", "_cancellations", "_given_up", "_now", "_owing", "_timer")

    def __init__(self) -> None:
        self._now = 0
        self._timer: asyncio.TimerHandle | None = None
        # Until when an answer must be there.
        self._owing: dict[AnyConnection, int] = {}
        # The same for cancellations, with the futures that say that the request was sent, and acknowledged.
        self._cancellations: dict[AnyConnection, tuple[int, asyncio.Future[None], asyncio.Future[None]]] = {}
        self._given_up: weakref.WeakSet[AnyConnection] = weakref.WeakSet()

    def expect(self, connection: AnyConnection, ticks: int = ANSWER) -> None:
        """Hang up on `connection` unless `answered` is called within so many tenths of a second."""
        self._owing[connection] = self._now + ticks
        if self._timer is None:
            self._set_timer(connection)

    def answered(self, connection: AnyConnection) -> None:
        """The server has said what was expected, or there is nothing to wait for any more."""
        self._owing.pop(connection, None)

    @contextlib.contextmanager
    def expecting(self, connection: AnyConnection, ticks: int = ANSWER) -> Generator[None, None, None]:
        """Expect an answer within a block; what was expected before it goes on afterwards."""
        before = self._owing.get(connection)
        self.expect(connection, ticks)
        try:
            yield
        finally:
            if before is None:
                self.answered(connection)
            else:
                self._owing[connection] = before

    def expect_cancellation(
        self, connection: AnyConnection, sent: asyncio.Future[None], acknowledged: asyncio.Future[None]
    ) -> None:
        """Hang up on `connection` unless the request to cancel its query is soon sent, and acknowledged."""
        self._cancellations[connection] = self._now + ANSWER, sent, acknowledged
        if self._timer is None:
            self._set_timer(connection)

    def ended(self, connection: AnyConnection) -> None:
        """Let those go on who wait for a cancellation on `connection`, which is closed: nothing comes any more."""
        cancellation = self._cancellations.pop(connection, None)
        if cancellation is None:
            return
        _, sent, acknowledged = cancellation
        if not sent.done():
            sent.set_result(None)
        if not acknowledged.done():
            acknowledged.set_exception(asyncpg.InterfaceError("cannot perform operation: connection is closed"))
            acknowledged.exception()  # perhaps nobody waits

    def has_given_up(self, connection: AnyConnection) -> bool:
        """Return whether `connection` was hung up on here."""
        return connection in self._given_up

    def _set_timer(self, connection: Any) -> None:
        loop: asyncio.AbstractEventLoop = connection._loop
        self._timer = loop.call_later(_TICK, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._now += 1
        overdue = [one for one, due in self._owing.items() if due <= self._now]
        for one, (due, sent, acknowledged) in tuple(self._cancellations.items()):
            if sent.done() and _is_over(acknowledged, one):
                del self._cancellations[one]
            elif due <= self._now:
                overdue.append(one)
        for one in overdue:
            self._given_up.add(one)
            _hang_up(one)
            self._owing.pop(one, None)
            self._cancellations.pop(one, None)
        if self._timer is None and (self._owing or self._cancellations):
            self._timer = loop.call_later(_TICK, self._look, loop)


_watchdogs: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Watchdog]] = weakref.WeakKeyDictionary()


def watchdog_of(loop: asyncio.AbstractEventLoop) -> Watchdog:
    """Return the watchdog of an event loop."""
    watchdog = _watchdogs.get(loop)
    if watchdog is None:
        watchdog = _watchdogs[loop] = Watchdog()
    return watchdog


def _hang_up(connection: Any) -> None:
    """Terminate `connection`, one that is in the midst of being closed too."""
    connection.terminate()
    # asyncpg before 0.32 takes one that is being closed for closed.
    transport: asyncio.Transport = connection._transport
    if not transport.is_closing():
        transport.abort()


async def part_from(connection: AnyConnection, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as asyncpg's
    """Close `connection`, and hang up on a server that says nothing to it for a second.

    Raises:
        TimeoutError: The server was not given a second, but `timeout`, and that is over.
    """
    patience = _GOODBYE if timeout is None else min(timeout, _GOODBYE)
    try:
        await connection.close(timeout=patience)
    except TimeoutError:
        _hang_up(connection)
        if patience == timeout:
            raise


@functools.cache
def answer_to_reset(kind: Hashable) -> int:
    """Return how long the reset of a connection of this class may take: longer if it is its author's own."""
    own = any(getattr(kind, name) is not getattr(asyncpg.Connection, name) for name in ("reset", "get_reset_query"))
    return ANSWER_OF_OWN if own else ANSWER


def no_reset() -> TimeoutError:
    """Return what a release raises whose reset was given up."""
    return TimeoutError("the server did not acknowledge the reset of a connection, which was terminated")


def guard(connection: AnyConnection) -> None:
    """Have cancellations on `connection` noted down, and what else asyncpg waits for behind a caller's deadline."""
    try:
        connection.__class__ = _guarded(type(connection))
    except TypeError:
        _logger.debug("cancellations on a %s are waited for as long as they take", type(connection).__qualname__)


@functools.cache
def _guarded(kind: type[Any]) -> type[Any]:
    class Guarded(kind):  # type: ignore[misc]  # pyright: ignore[reportUntypedBaseClass]
        __slots__ = ()

        def _cancel_current_command(self, sent: asyncio.Future[None], *acknowledged: asyncio.Future[None]) -> None:
            watchdog_of(self._loop).expect_cancellation(
                self, sent, acknowledged[0] if acknowledged else _acknowledgement(self._protocol)
            )
            kind._cancel_current_command(self, sent, *acknowledged)

        async def _cleanup_stmts(self) -> None:
            # asyncpg has it take as long as it takes, within whatever timeout.
            with watchdog_of(self._loop).expecting(self):
                await kind._cleanup_stmts(self)

        def transaction(self, *arguments: Any, **keywords: Any) -> Any:
            transaction = kind.transaction(self, *arguments, **keywords)
            if type(transaction) is Transaction:
                transaction.__class__ = _GuardedTransaction
            return transaction

    look_like(Guarded, kind)
    return _leaving_nobody_waiting(Guarded) if _LEAVES_WAITING else Guarded


def _leaving_nobody_waiting(kind: type[Any]) -> type[Any]:
    """Return `kind` with what asyncpg 0.32 does when a cancellation fails, or its connection ends."""

    class Completing(kind):  # type: ignore[misc]  # pyright: ignore[reportUntypedBaseClass]
        __slots__ = ()

        async def _cancel(self, sent: asyncio.Future[None]) -> None:
            outcome: asyncio.Future[None] = self._loop.create_future()
            await kind._cancel(self, outcome)
            # Some servers reset the connection that carries the request. If it could not be sent, nobody knows what
            # the connection of the query will say next.
            if outcome.exception() is not None and not isinstance(outcome.exception(), ConnectionResetError):
                self.terminate()
            if not sent.done():
                sent.set_result(None)

        async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's signature
            try:
                await kind.close(self, timeout=timeout)
            except asyncpg.InterfaceError:
                # It waited for a cancellation that never came, and the connection is closed now.
                if not watchdog_of(self._loop).has_given_up(self):
                    raise

        def _cleanup(self) -> None:
            kind._cleanup(self)
            if self._aborted and not self._transport.is_closing():
                self._transport.abort()  # asyncpg forgets it when a close is cancelled
            watchdog_of(self._loop).ended(self)

    look_like(Completing, kind)
    return Completing


def look_like(dressed: type[Any], kind: type[Any]) -> None:
    """Have `dressed`, which a connection's class was changed to, look like its own class to whoever asks."""
    dressed.__name__, dressed.__qualname__ = kind.__name__, kind.__qualname__
    dressed.__module__, dressed.__doc__ = kind.__module__, kind.__doc__


class _GuardedTransaction(Transaction):
    """A transaction whose ROLLBACK is not waited for any longer than the server is given for any answer.

    That is so where a caller's time is up. The server rolls back too if the connection is gone.
    """

    __slots__ = ()

    _connection: Any

    async def __aexit__(self, extype: object, ex: object, tb: object) -> None:
        if not isinstance(ex, asyncio.CancelledError | TimeoutError):
            await super().__aexit__(extype, ex, tb)
            return
        watchdog = watchdog_of(self._connection._loop)
        try:
            with watchdog.expecting(self._connection):
                await super().__aexit__(extype, ex, tb)
        except (asyncpg.InterfaceError, asyncpg.PostgresConnectionError):
            # What ended the block is what the caller wants to know.
            if not watchdog.has_given_up(self._connection):
                raise


look_like(_GuardedTransaction, Transaction)


def _is_over(acknowledged: asyncio.Future[None], connection: Any) -> bool:
    """Return whether a cancellation is acknowledged."""
    if not acknowledged.cancelled():
        return acknowledged.done()
    # Before 0.32, a query that waited for it was cancelled itself, and the future with it.
    if connection._protocol is None:
        return True
    waiting = connection._protocol._wait_for_cancellation()
    try:
        waiting.send(None)
    except StopIteration:
        return True
    except asyncio.CancelledError:
        return False
    finally:
        waiting.close()
    return False


def _acknowledgement(protocol: Any) -> asyncio.Future[None]:
    """Return what a query would wait for now: asyncpg before 0.32 shows it to nobody else."""
    query = protocol.query("", None)
    acknowledged: Any = query.send(None)
    acknowledged._asyncio_future_blocking = False
    query.close()
    future: asyncio.Future[None] = acknowledged
    return future
