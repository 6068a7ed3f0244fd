"""The slots of asyncpg's pool: where connections are checked on their way out and in, and swapped.

This is the one file that reaches into asyncpg's `PoolConnectionHolder`. The attributes it
uses have been the same from asyncpg 0.29 to 0.32.
"""

# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import inspect
import math
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionHolder, PoolConnectionProxy

from asyncpool_creds._clock import Clock
from asyncpool_creds._connector import AnyConnection
from asyncpool_creds._events import RetireReason
from asyncpool_creds._watchdog import ANSWER_OF_OWN, answer_to_reset, no_reset, part_from, watchdog_of

__all__ = ["AnyProxy", "Calm", "ConnectionHook", "Slot", "SlotOwner"]

if TYPE_CHECKING:

    class _Holder(PoolConnectionHolder[Any]):
        """What is used of it that the stubs leave out."""

        def _release(self) -> None: ...

        def _release_on_close(self) -> None: ...

else:
    _Holder = PoolConnectionHolder

AnyProxy: TypeAlias = "PoolConnectionProxy[Any]"
ConnectionHook: TypeAlias = Callable[[AnyProxy], "bool | Awaitable[bool]"]

# Seconds for the cancellation of a query on a connection that no watchdog looks after.
_CANCELLATION_TIMEOUT: Final = 10.0


# Called by its name: on the way that every acquire takes, super() costs as much as what it finds.
_acquire: Final = _Holder.acquire


class Calm:
    """Until when there is nothing to look at on the way out or in: no hook, no end, no rotation.

    Attributes:
        monotonic: Reads the monotonic clock.
        time: Reads the wall clock.
        until: The moment on the monotonic clock.
        until_wall: The moment on the wall clock; whichever comes first counts.
    """

    __slots__ = ("monotonic", "time", "until", "until_wall")

    def __init__(self, clock: Clock) -> None:
        self.monotonic: Callable[[], float] = clock.monotonic
        self.time: Callable[[], float] = clock.time
        self.until: float = -math.inf
        self.until_wall: float = -math.inf


class IdleTimer:
    """The inactivity timer of a slot.

    asyncpg's is set and cancelled with every use of a connection, which is much of what a release costs. This one is
    set once, and sees when its time is up whether the connection has been used meanwhile.

    Args:
        loop: The event loop.
        lifetime: Seconds of rest after which a connection is closed.
        slot: The slot.
    """

    __slots__ = ("_handle", "_lifetime", "_loop", "_since", "_slot")

    def __init__(self, loop: asyncio.AbstractEventLoop, lifetime: float, slot: Slot) -> None:
        self._loop = loop
        self._lifetime = lifetime
        self._slot = slot
        self._since: float = loop.time()
        self._handle: asyncio.TimerHandle | None = loop.call_later(lifetime, self._look)

    def start(self) -> None:
        """The connection is at rest from now on."""
        self._since = self._loop.time()
        if self._handle is None:
            self._handle = self._loop.call_later(self._lifetime, self._look)

    def cancel(self) -> None:
        """Forget it: what asyncpg calls."""
        if self._handle is not None:
            self._handle.cancel()

    def _look(self) -> None:
        self._handle = None
        if self._slot.is_in_use:
            return  # the next start sets it again
        left = self._since + self._lifetime - self._loop.time()
        if left > 0:
            self._handle = self._loop.call_later(left, self._look)
        else:
            self._slot.deactivate()


class SlotOwner(Protocol):
    """What a slot asks of its pool."""

    calm: Calm
    before_acquire: ConnectionHook | None
    after_release: ConnectionHook | None
    connecting: set[Slot]

    def end_of(self, connection: AnyConnection) -> RetireReason | None:
        """Return why `connection` must not be handed out any more, or None."""
        ...

    def is_irreplaceable(self, connection: AnyConnection) -> bool:
        """Return whether `connection` is served past the end of its credential, and no other can be had."""
        ...

    def is_worth_replacing(self, connection: AnyConnection) -> bool:
        """Return whether `connection` is past the end of its credential, and a better one may be had."""
        ...

    async def wait_for_replacement(self, slot: Slot) -> None:
        """Wait until the connection of `slot` has been replaced, or until that is given up."""
        ...

    def is_making_room(self) -> bool:
        """Return whether a connection that comes back may have to be closed, because of one that takes its place."""
        ...

    def claim_on(self, connection: AnyConnection) -> RetireReason | None:
        """Return why `connection`, which comes back, must not go to the next acquirer, or None."""
        ...

    def retire(self, connection: AnyConnection, reason: RetireReason) -> None:
        """Count and report that `connection` is retired; somebody else closes it."""
        ...

    def close_later(self, connection: AnyConnection) -> asyncio.Task[None]:
        """Close `connection` in a task of the pool's."""
        ...

    def about_to_connect(self) -> None:
        """A slot is about to connect, for an acquirer or for the floor of asyncpg 0.32."""
        ...

    def connected(self, slot: Slot) -> None:
        """`slot` has a new connection, or has failed to get one."""
        ...

    def released(self, slot: Slot, /) -> None:
        """The connection of `slot` has come back."""
        ...

    def get_max_size(self) -> int:
        """Return how many slots there are."""
        ...


class Slot(_Holder):
    """A holder of asyncpg's that refuses connections which have reached their end.

    asyncpg makes its holders itself, so they are turned into slots by setting their class:
    this one must have no attributes of its own.
    """

    __slots__ = ()

    _pool: Any
    _con: Any
    _proxy: Any
    _in_use: Any
    _generation: Any
    _setup: Any
    _timeout: float | None
    _max_queries: int
    _inactive_callback: IdleTimer | None
    _max_inactive_time: float
    _maybe_cancel_inactive_callback: Callable[[], None]
    _deactivate_inactive_connection: Callable[[], None]

    @property
    def connection(self) -> AnyConnection | None:
        """The connection in this slot, open or not."""
        connection: AnyConnection | None = self._con
        return connection

    @property
    def is_at_rest(self) -> bool:
        """Whether an open connection lies here that nobody uses: the only state in which it may be swapped.

        While `setup` runs there is a proxy already, but no `_in_use` yet.
        """
        return self._con is not None and self._proxy is None and self._in_use is None and not self._con.is_closed()

    @property
    def is_in_use(self) -> bool:
        """Whether somebody has the connection, or it is on its way back."""
        return self._in_use is not None

    @property
    def is_resetting(self) -> bool:
        """Whether a connection is here that comes back as soon as the server has acknowledged its reset."""
        return self._con is not None and self._proxy is None and self._in_use is not None

    @property
    def is_vacant(self) -> bool:
        """Whether there is no connection here and none on its way."""
        owner: SlotOwner = self._pool
        return self._con is None and self._proxy is None and self._in_use is None and self not in owner.connecting

    def vacate(self) -> AnyConnection:
        """Take the connection out of a slot at rest."""
        connection: AnyConnection = self._con
        self._con = None
        return connection

    def fill(self, connection: AnyConnection) -> None:
        """Put `connection` into a vacant slot.

        With no await between `vacate` and this, no acquirer sees the slot empty. The inactivity
        timer is the slot's and goes on: re-armed at every rotation, it would never fire.
        """
        self._con = connection
        self._generation = self._pool._generation
        if hasattr(connection, "_pool_holder"):  # asyncpg 0.32 tells the holder when an idle connection dies
            connection._pool_holder = weakref.ref(self)

    def settle(self, connection: AnyConnection) -> None:
        """Put `connection` into a slot that has been vacant for a while, and start its inactivity timer."""
        self.fill(connection)
        self._maybe_cancel_inactive_callback()
        self._setup_inactive_callback()

    def restart_idle_timer(self) -> None:
        """Put a timer of ours in the place of asyncpg's, in a slot that was a holder until now."""
        self._maybe_cancel_inactive_callback()
        if self._con is not None:
            self._setup_inactive_callback()

    def deactivate(self) -> None:
        """Close a connection that has been at rest for long enough, if another can be had when it is wanted."""
        owner: SlotOwner = self._pool
        if self._con is not None and owner.is_irreplaceable(self._con):
            self._setup_inactive_callback()
        else:
            self._deactivate_inactive_connection()

    def _setup_inactive_callback(self) -> None:
        if self._inactive_callback is not None:
            self._inactive_callback.start()
        elif self._max_inactive_time:
            loop: asyncio.AbstractEventLoop = self._pool._loop
            self._inactive_callback = IdleTimer(loop, self._max_inactive_time, self)

    def check_out(self) -> AnyProxy | None:
        """Do what `acquire` does where there is nothing to await, or return None."""
        connection, pool = self._con, self._pool
        calm: Calm = pool.calm
        if (
            connection is None
            or self._setup is not None
            or self._generation != pool._generation
            or connection.is_closed()
            or (
                (calm.monotonic() >= calm.until or calm.time() >= calm.until_wall)
                and (
                    pool.before_acquire is not None
                    or pool.end_of(connection) is not None
                    or pool.is_worth_replacing(connection)
                )
            )
        ):
            return None
        self._proxy = proxy = PoolConnectionProxy(self, connection)
        self._in_use = pool._loop.create_future()
        self._timeout = None
        return proxy

    # Not a coroutine function, to save one on every acquire; nor is `release`.
    def acquire(self) -> Coroutine[Any, Any, AnyProxy]:  # pyright: ignore[reportIncompatibleMethodOverride]
        owner: SlotOwner = self._pool
        calm = owner.calm
        if calm.monotonic() < calm.until and calm.time() < calm.until_wall:
            return _acquire(self)
        connection = self.connection
        if connection is None or connection.is_closed() or self._close_if_ended(owner):
            return self._acquire_as_it_is(owner)  # which connects, if there is none
        if owner.is_worth_replacing(connection):
            return self._acquire_replaced(owner)
        return self._acquire_as_it_is(owner)

    def _close_if_ended(self, owner: SlotOwner) -> bool:
        """Close the connection here if it must not be handed out any more, and return whether that is so."""
        reason = owner.end_of(self._con)
        if reason is None:
            return False
        owner.retire(self._con, reason)
        owner.close_later(self.vacate())
        return True

    def _acquire_as_it_is(self, owner: SlotOwner) -> Coroutine[Any, Any, AnyProxy]:
        if owner.before_acquire is None:
            return super().acquire()
        return self._acquire_approved(owner, owner.before_acquire)

    async def _acquire_replaced(self, owner: SlotOwner) -> AnyProxy:
        await owner.wait_for_replacement(self)
        if self._con is not None and not self._con.is_closed():
            self._close_if_ended(owner)  # drained meanwhile
        return await self._acquire_as_it_is(owner)

    async def _acquire_approved(self, owner: SlotOwner, hook: ConnectionHook) -> AnyProxy:
        attempts = owner.get_max_size() + 1
        for _ in range(attempts):
            proxy: AnyProxy = await super().acquire()
            # As while asyncpg's `setup` runs: not in use yet, so a connection that dies meanwhile
            # does not put the slot back into the queue under our hands.
            in_use, self._in_use = self._in_use, None
            try:
                approved = await _answer(hook, proxy)
            except BaseException:
                self._take_back(owner)
                raise
            if approved and self._con is not None:
                self._in_use = in_use
                return proxy
            self._take_back(owner)
        raise asyncpg.InterfaceError(
            f"before_acquire turned down {attempts} connections in a row, new ones among them; "
            "it should return True for a connection that can be used"
        )

    def _take_back(self, owner: SlotOwner) -> None:
        """Undo a checkout that nobody has seen yet, and retire its connection."""
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            proxy._detach()
        if self._con is not None:
            owner.retire(self._con, "before_acquire")
            owner.close_later(self.vacate())

    def release(self, timeout: float | None) -> Awaitable[None]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        # What is given back is read now: before the coroutine runs, and whenever it waits, the connection may die,
        # and the slot have another one, for somebody else.
        return self._careful_release(self._con, self._in_use, timeout)

    async def _careful_release(self, connection: Any, in_use: Any, timeout: float | None) -> None:  # noqa: ASYNC109
        if in_use is None:
            raise asyncpg.InternalClientError("PoolConnectionHolder.release() called on a free connection holder")
        owner: SlotOwner = self._pool
        failure: Exception | None = None
        try:
            if self._in_use is in_use and not connection.is_closed():
                failure = await self._end_use(owner, connection, in_use, timeout)
        finally:
            if self._in_use is in_use and connection.is_closed():
                connection.terminate()  # it was aborted, and nothing was cleaned up: its slot would be lost
            owner.released(self)
        if failure is not None:
            raise failure

    async def _end_use(
        self,
        owner: SlotOwner,
        connection: Any,
        in_use: Any,
        timeout: float | None,  # noqa: ASYNC109 - as asyncpg's
    ) -> Exception | None:
        """Close or reset what comes back, and free the slot; return what the hook raised."""
        approved, failure = True, None
        self._timeout = None
        if owner.after_release is not None:
            with watchdog_of(self._pool._loop).expecting(connection, ANSWER_OF_OWN):
                approved, failure = await _verdict(owner.after_release, self._proxy, timeout)
            if self._in_use is not in_use or connection.is_closed():
                return failure
        reason = owner.claim_on(connection) if approved else "after_release"
        if reason is not None:
            owner.retire(connection, reason)
        if (
            reason is not None
            or (connection._protocol.queries_count >= self._max_queries and not owner.is_irreplaceable(connection))
            or self._generation != self._pool._generation
        ):
            await part_from(connection, timeout)
            return failure
        try:
            await self._reset(connection, timeout)
        except BaseException:
            connection.terminate()
            raise
        if self._in_use is in_use and not connection.is_closed():
            self.rejoin()
        return failure

    async def _reset(self, connection: Any, timeout: float | None) -> None:  # noqa: ASYNC109
        loop: asyncio.AbstractEventLoop = self._pool._loop
        if connection._protocol._is_cancelling():
            began = loop.time()
            await _wait_for_cancellation(connection, timeout)
            if connection.is_closed():
                return
            timeout = None if timeout is None else max(0.0, timeout - (loop.time() - began))
        own = self._pool._reset
        watchdog = watchdog_of(loop)
        watchdog.expect(connection, answer_to_reset(connection.__class__) if own is None else ANSWER_OF_OWN)
        try:
            if own is None:
                await connection.reset(timeout=timeout)
            else:
                async with asyncio.timeout(timeout):
                    await connection._reset()
                    await own(connection)
        except Exception as error:
            if watchdog.has_given_up(connection):
                raise no_reset() from error
            raise
        finally:
            watchdog.answered(connection)

    async def close(self) -> None:
        if self._con is not None:
            await part_from(self._con)

    def forget_timeout(self) -> None:
        """Have the release take as long as it takes: no timeout came with the acquire."""
        self._timeout = None

    async def wait_until_reset(self) -> None:
        """Wait for the end of the reset that is under way."""
        await asyncio.shield(self._in_use)

    def rejoin(self) -> None:
        """Free the slot after a reset; a connection that has reached its end meanwhile is not handed out from it."""
        self._release()
        self._setup_inactive_callback()

    def _release(self) -> None:
        in_use = self._in_use
        if in_use is None:
            return
        self._in_use = None
        if not in_use.done():
            in_use.set_result(None)
        if self._proxy is not None:
            self._proxy._detach()
            self._proxy = None
        pool = self._pool
        pool._queue.put_nowait(self)
        # The slot is in the queue, and nobody has seen it there yet: a replacement that waits for it goes in first.
        pool.released(self)

    async def connect(self) -> None:
        owner: SlotOwner = self._pool
        owner.about_to_connect()
        owner.connecting.add(self)
        if self._proxy is not None:
            # asyncpg leaves it here when `setup` fails, and a slot with a proxy never counts as at rest.
            self._proxy._detach()
            self._proxy = None
        try:
            await super().connect()
            if self._close_if_ended(owner):
                # Drained, or its credential expired, during the handshake. Once more and no oftener:
                # a server that is slower than its tokens live would keep us here for ever.
                await super().connect()
            elif owner.is_worth_replacing(self._con):
                await owner.wait_for_replacement(self)
                if self._con is None or self._con.is_closed():
                    self._con = None
                    await super().connect()
        finally:
            owner.connecting.discard(self)
            owner.connected(self)


async def _wait_for_cancellation(connection: Any, timeout: float | None) -> None:  # noqa: ASYNC109
    """Wait until it is acknowledged that a query was cancelled, or the connection is closed.

    Raises:
        TimeoutError: It was not within `timeout`.
    """
    try:
        async with asyncio.timeout(_CANCELLATION_TIMEOUT if timeout is None else timeout):
            await connection._protocol._wait_for_cancellation()
    except TimeoutError:
        if timeout is not None:
            raise
        connection.terminate()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        connection.terminate()  # before 0.32, who is cancelled while waiting for this cancels it for everybody else
    except asyncpg.InterfaceError:
        if not connection.is_closed():
            raise


async def _verdict(
    hook: ConnectionHook,
    proxy: AnyProxy,
    timeout: float | None,  # noqa: ASYNC109 - asyncpg's word for it
) -> tuple[bool, Exception | None]:
    """Return what the hook answers; an exception means no, and is raised once the slot is free."""
    try:
        async with asyncio.timeout(timeout):
            return await _answer(hook, proxy), None
    except asyncio.CancelledError:
        proxy.terminate()  # as asyncpg does when a reset is cancelled; that frees the slot
        raise
    except Exception as error:  # noqa: BLE001
        return False, error


async def _answer(hook: ConnectionHook, proxy: AnyProxy) -> bool:
    answer = hook(proxy)
    return bool(await answer) if inspect.isawaitable(answer) else bool(answer)
