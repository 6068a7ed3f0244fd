"""The reset of a connection without a task, or none if nothing was sent.

This is the one file that touches asyncpg's private parts for speed. What it does is what `PoolConnectionHolder` and
`Connection.reset` do, in all cases in which nothing of theirs is customised and nothing is out of the ordinary;
all others are left to them.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.protocol import Protocol

from asyncpool_creds._connector import AnyConnection
from asyncpool_creds._handoff import hand_over
from asyncpool_creds._queue import SlotQueue
from asyncpool_creds._slots import AnyProxy, Slot, SlotOwner
from asyncpool_creds._watchdog import answer_to_reset, look_like, no_reset, watchdog_of

__all__ = ["FastPath", "is_supported", "watch", "whole_call"]

_logger = logging.getLogger("asyncpool_creds")

# What must be asyncpg's own in a connection class for its reset to be ours.
_RESET_METHODS: Final = ("reset", "_reset", "execute", "is_closed", "_on_release", "_check_listeners")
_NEEDED: Final = (
    (Protocol, ("query", "queries_count", "is_in_transaction", "_is_cancelling", "_wait_for_cancellation")),
    (
        asyncpg.Connection,
        (
            *("_protocol", "_top_xact", "_listeners", "_log_listeners", "_query_loggers"),
            *("get_reset_query", "_pool_release_ctr", "_copy_in", "_copy_out", "_prepare", "_get_unique_id"),
            *_RESET_METHODS,
        ),
    ),
    (PoolConnectionProxy, ("_detach",)),
)


# What `queries_count` of a connection was when it had been reset, by its id. It counts whatever can change a session
# but COPY, and not before it is sent, which may be after a statement was prepared for it; COPY, and whatever gives a
# statement a name, take an entry out of here. That leaves one without a name which the server does not even parse: it
# changes nothing. A connection that has just been opened is not here either: it may have been through `init`.
_untouched: Final[dict[int, int]] = {}


def watch(connection: AnyConnection) -> None:
    """Have what is not counted on `connection` noticed: without that it is reset whenever it comes back."""
    _untouched.pop(id(connection), None)
    try:
        connection.__class__ = _watched(type(connection))
    except TypeError:
        _logger.debug("not all that is done with a %s is noticed: it is always reset", type(connection).__qualname__)
    else:
        connection.add_termination_listener(_forget)


def _forget(connection: object) -> None:
    _untouched.pop(id(connection), None)


_watched_kinds: Final[set[type[Any]]] = set()


@functools.cache
def _watched(kind: type[Any]) -> type[Any]:
    """Return `kind` with what is not counted noticed; otherwise one cannot be told from the other."""

    class Watched(kind):  # type: ignore[misc]  # pyright: ignore[reportUntypedBaseClass]
        __slots__ = ()

        def _copy_in(self, *arguments: Any, **keywords: Any) -> Any:
            _untouched.pop(id(self), None)
            return kind._copy_in(self, *arguments, **keywords)

        def _copy_out(self, *arguments: Any, **keywords: Any) -> Any:
            _untouched.pop(id(self), None)
            return kind._copy_out(self, *arguments, **keywords)

        def _prepare(self, *arguments: Any, **keywords: Any) -> Any:
            _untouched.pop(id(self), None)
            return kind._prepare(self, *arguments, **keywords)

        def _get_unique_id(self, *arguments: Any) -> Any:
            _untouched.pop(id(self), None)
            return kind._get_unique_id(self, *arguments)

    look_like(Watched, kind)
    _watched_kinds.add(Watched)
    return Watched


def is_supported() -> bool:
    """Return whether the installed asyncpg has what is used of it here; if not, say so in the log."""
    lacking = [f"{owner.__name__}.{name}" for owner, names in _NEEDED for name in names if not hasattr(owner, name)]
    if lacking:
        _logger.warning(
            "asyncpg %s has no %s: pools take asyncpg's own, slower way; update asyncpool_creds",
            *(asyncpg.__version__, ", ".join(lacking)),
        )
    return not lacking


@functools.cache
def _has_asyncpgs_reset(kind: type[AnyConnection]) -> bool:
    return all(getattr(kind, name) is getattr(asyncpg.Connection, name) for name in _RESET_METHODS)


class FastPath:
    """The fast way back into a pool.

    Args:
        owner: The pool.
        queue: Its slots.
        loop: Its event loop.
        wait_for_reset: Whether a release is done when the server has acknowledged the reset, as asyncpg's is, or
            when the reset is on its way.
        resets: False: whatever a session was set to stays for the next one.
    """

    def __init__(
        self,
        owner: SlotOwner,
        queue: SlotQueue,
        *,
        loop: asyncio.AbstractEventLoop,
        wait_for_reset: bool,
        resets: bool,
    ) -> None:
        self._owner: Final = owner
        self._queue: Final = queue
        self._loop: Final = loop
        self._wait_for_reset: Final = wait_for_reset
        self._resets: Final = resets
        self._watchdog: Final = watchdog_of(loop)
        self._done: Final[asyncio.Future[None]] = loop.create_future()
        self._done.set_result(None)

    def release(self, proxy: AnyProxy) -> asyncio.Future[None] | None:
        """Reset the connection of `proxy`, if anything was sent, and free its slot when that is done.

        Returns:
            What a release has to wait for; whoever is cancelled in it leaves the reset as it is. None: nothing has
            happened yet, and asyncpg's way is to be taken.
        """
        if type(proxy) is not PoolConnectionProxy:
            return None
        slot: Any = proxy._holder
        connection: Any = slot._con if slot._proxy is proxy and slot._pool is self._owner else None
        if connection is None or slot._timeout is not None or not self._is_ordinary(slot, connection):
            return None
        calm = self._owner.calm
        if (calm.monotonic() >= calm.until or calm.time() >= calm.until_wall) and (
            self._owner.after_release is not None
            or self._owner.end_of(connection) is not None
            or self._owner.is_making_room()
        ):
            return None
        if not self._resets or _untouched.get(id(connection)) == connection._protocol.queries_count:
            connection._pool_release_ctr += 1
            slot.rejoin()
            return self._done
        query = connection.get_reset_query()
        return self._reset(slot, connection, query) if query else None

    def _is_ordinary(self, slot: Slot, connection: Any) -> bool:
        if slot._in_use is None or not _has_asyncpgs_reset(connection.__class__) or connection.is_closed():
            return False
        protocol = connection._protocol
        return not (
            protocol.queries_count >= slot._max_queries
            or slot._generation != slot._pool._generation
            or connection._query_loggers
            or connection._listeners  # of which asyncpg warns
            or connection._log_listeners
            or connection._top_xact is not None
            or protocol.is_in_transaction()
            or protocol._is_cancelling()
        )

    def _reset(self, slot: Slot, connection: Any, query: str) -> asyncio.Future[None] | None:
        reset: Coroutine[Any, None, str] = connection._protocol.query(query, None)
        try:
            waiter = reset.send(None)  # it is written now
        except Exception:  # noqa: BLE001 - asyncpg's own way meets it again, and knows what to do
            return None
        waiter._asyncio_future_blocking = False
        connection._pool_release_ctr += 1
        self._watchdog.expect(connection, answer_to_reset(connection.__class__))
        if self._wait_for_reset:
            done: asyncio.Future[None] = self._loop.create_future()
            waiter.add_done_callback(functools.partial(self._finish, slot, connection, reset, done))
            return done
        # The slot stays in use, so that nobody takes it and close() waits for it; the caller's proxy is void.
        slot._proxy._detach()
        slot._proxy = None
        self._queue.resetting += 1
        waiter.add_done_callback(functools.partial(self._finish, slot, connection, reset, None))
        return self._done

    def _finish(
        self,
        slot: Slot,
        connection: AnyConnection,
        reset: Coroutine[Any, None, str],
        done: asyncio.Future[None] | None,
        waiter: asyncio.Future[Any],  # noqa: ARG002 - the coroutine looks for itself
    ) -> None:
        self._watchdog.answered(connection)
        error = _end_of(reset)
        is_unanswered = error is not None and self._watchdog.has_given_up(connection)
        if done is None:
            self._queue.resetting -= 1
            if error is not None and not is_unanswered and not slot._pool.is_closing():
                self._owner.retire(connection, "reset_failed")  # nobody else would hear of it
        self._queue.hold()
        try:
            self._put_back(slot, connection, error)
        finally:
            # Nothing is left to do here: those who wait run on from within this callback.
            self._queue.let_go()
        if done is None or done.done():
            return
        if error is None:
            hand_over(done, None)
        elif is_unanswered:
            unanswered = no_reset()
            unanswered.__cause__ = error
            done.set_exception(unanswered)
        else:
            done.set_exception(error)

    def _put_back(self, slot: Slot, connection: AnyConnection, error: BaseException | None) -> None:
        if slot._con is not connection:
            return  # it died meanwhile, and the slot is free
        if error is None and not connection.is_closed():
            if type(connection) in _watched_kinds:
                _untouched[id(connection)] = connection._protocol.queries_count
            slot.rejoin()
            return
        connection.terminate()
        if slot._con is connection:
            # asyncpg 0.30 and 0.31 look for the slot in the proxy, which is gone.
            slot._release_on_close()


def whole_call(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return asyncpg's method `name` of a pool, which does it on a connection of its own, without a detour.

    That is two coroutines and an object less than through a block of `acquire`; and nobody else has the proxy, so the
    method of the connection is called without what the proxy looks at.
    """

    @functools.wraps(getattr(asyncpg.Pool, name))
    async def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        proxy = await self._acquire(None)
        try:
            return await getattr(proxy._con, name)(*arguments, **keywords)
        finally:
            await self.release(proxy)

    return call


def _end_of(reset: Coroutine[Any, None, str]) -> BaseException | None:
    """Have a coroutine look at what it waited for, which is done, and return its error."""
    try:
        reset.send(None)
    except StopIteration:
        return None
    except BaseException as error:  # noqa: BLE001 - handed on
        return error
    reset.close()
    return asyncpg.InternalClientError("a reset went on after its end")
