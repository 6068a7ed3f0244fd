"""The pool: asyncpg's own, with a password that never goes stale."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import socket
import ssl
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NoReturn, TypeAlias, TypeVar

import anyio
import asyncpg
from asyncpg.pool import PoolConnectionHolder

from asyncpool_creds import _fork, _policy
from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._connect_errors import class_and_code, is_passing, is_refusal
from asyncpool_creds._connect_line import ConnectLine
from asyncpool_creds._connector import AnyConnection, ConnectFunction, Connector, check_arguments
from asyncpool_creds._errors import ManagerClosed
from asyncpool_creds._events import (
    ClockSkewDetected,
    ConnectFailed,
    ConnectionOpened,
    ConnectionRetired,
    CredentialRefreshed,
    Event,
    Observer,
    Observers,
    PoolReady,
    RetireReason,
    TlsState,
)
from asyncpool_creds._fastpath import FastPath, is_supported, watch, whole_call
from asyncpool_creds._keywords import check_keywords
from asyncpool_creds._manager import ManagerStats, Stamp, TokenManager
from asyncpool_creds._provider import BindableProvider, CredentialFunction, CredentialProvider, Target
from asyncpool_creds._queue import SlotQueue
from asyncpool_creds._rotation import ExpiredSessions, RetireWhen, Rotation, Session
from asyncpool_creds._slots import AnyProxy, Calm, ConnectionHook, Slot
from asyncpool_creds._target import RequireTls, Route, read_route, routing_arguments
from asyncpool_creds._watchdog import guard, part_from, watchdog_of

__all__ = ["ConnectionInfo", "CredentialPool", "Credentials", "PoolStats", "connect", "create_pool"]

_logger = logging.getLogger("asyncpool_creds")

Credentials: TypeAlias = TokenManager | CredentialProvider | BindableProvider | CredentialFunction
if TYPE_CHECKING:
    import typing_extensions

    RecordT = typing_extensions.TypeVar("RecordT", bound=asyncpg.Record, default=asyncpg.Record)
else:  # a default takes Python 3.13
    RecordT = TypeVar("RecordT", bound=asyncpg.Record)

# A pool of a hundred is replaced in four seconds at this rate; Aurora DSQL's token bucket refills
# with ten a second in its first, and a hundred a second in its present, documentation.
DEFAULT_RECONNECTS_PER_SECOND: Final = 25.0
# A drain waits so long for connections that are being reset.
_RESET_TIMEOUT: Final = 10.0

if TYPE_CHECKING:

    class _Pool(asyncpg.Pool[RecordT]):
        """What is used of asyncpg's pool beyond its public names; the same from 0.29 to 0.32."""

        _loop: asyncio.AbstractEventLoop
        _holders: list[PoolConnectionHolder[Any]]
        _connect_args: Sequence[str | None]
        _connect_kwargs: dict[str, object]
        _closed: bool
        _closing: bool
        _queue: Any
        _initialized: bool
        _initializing: bool

        def _check_init(self) -> None: ...
        async def _initialize(self) -> None: ...
        async def _acquire(self, timeout: float | None) -> AnyProxy: ...  # noqa: ASYNC109
        async def _get_new_connection(self) -> AnyConnection: ...

else:

    class _Pool(asyncpg.Pool, Generic[RecordT]):
        __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionInfo:
    """One slot of a pool.

    Args:
        state: "in_use", "idle", or "closed" for a slot without a connection.
        generation: Of the credential it was opened with; None without credentials, or without a connection.
        age: Seconds since its connect began.
        seconds_left: Until its end, when it is replaced at the latest; None if no end is known.
    """

    state: Literal["in_use", "idle", "closed"]
    generation: int | None = None
    age: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A pool at one moment, and its counters since it was made.

    Args:
        connections: One entry a slot.
        in_use: Connections handed out, or on their way back: being reset.
        idle: Connections at rest.
        spare: Replacements that wait for a busy connection to come back (0 or 1).
        past_end: Connections that serve past the end of their credential, because no replacement can be had.
        past_end_since: When the first of them came to its end, as an aware UTC datetime; None if there is none.
        by_generation: Open connections by the generation of their credential.
        opened: Connections opened.
        replaced: Of these, opened in the background to take another's place.
        replacement_failures: Attempts at that which failed.
        retired: Connections retired, by reason.
        waits: Acquires that had to wait for a connect.
        manager: The counters of the pool's manager; None without credentials.
    """

    connections: tuple[ConnectionInfo, ...]
    in_use: int
    idle: int
    spare: int
    past_end: int
    past_end_since: datetime | None
    by_generation: Mapping[int, int]
    opened: int
    replaced: int
    replacement_failures: int
    retired: Mapping[RetireReason, int]
    waits: int
    manager: ManagerStats | None


class CredentialPool(_Pool[RecordT]):
    """An `asyncpg.Pool` whose connections are opened with the current credential of a manager.

    Made by `create_pool`, which documents the arguments.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        credentials: Credentials | None = None,
        retire_when: RetireWhen = "expired",
        expired_sessions: ExpiredSessions = "serve",
        connect_patience: float | timedelta = 0.0,
        max_lifetime: float | timedelta | None = None,
        before_acquire: ConnectionHook | None = None,
        after_release: ConnectionHook | None = None,
        max_reconnects_per_second: float = DEFAULT_RECONNECTS_PER_SECOND,
        require_tls: RequireTls = None,
        wait_for_reset: bool = False,
        fair: bool = True,
        fast_path: bool = True,
        is_refusal: Callable[[BaseException], bool] = is_refusal,
        on_event: Observer | Iterable[Observer] | None = None,
        connect: ConnectFunction | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        **asyncpg_arguments: Any,  # what asyncpg.create_pool takes, checked by it
    ) -> None:
        _check_choice("retire_when", retire_when, "expired", "rotated", "never")
        _check_choice("expired_sessions", expired_sessions, "serve", "refuse")
        check_arguments(require_tls, is_refusal)
        for_asyncpg = asyncpg_arguments.keys() - _asyncpg_defaults().keys()
        check_keywords(create_pool, for_asyncpg, connect=connect, with_credentials=credentials is not None)
        for name, hook in (("before_acquire", before_acquire), ("after_release", after_release)):
            if hook is not None and not callable(hook):  # pyright: ignore[reportUnnecessaryComparison]
                raise TypeError(f"{name} must be a function that takes a connection, not {type(hook).__name__}")
        self._retire_when: RetireWhen = retire_when
        self._expired_sessions: ExpiredSessions = expired_sessions
        self._max_lifetime = None if max_lifetime is None else _policy.parse_seconds("max_lifetime", max_lifetime)
        patience = _policy.parse_seconds("connect_patience", connect_patience, zero=True)
        per_second = _policy.parse_rate("max_reconnects_per_second", max_reconnects_per_second)
        self._events = Observers(on_event)
        self.before_acquire = before_acquire
        self.after_release = after_release

        arguments: dict[str, Any] = {**_asyncpg_defaults(), **asyncpg_arguments, "loop": loop, "connect": self._open}
        resets = _prepare_hooks(arguments)
        super().__init__(dsn, **arguments)

        self._slot_queue = SlotQueue(fair=fair)
        self._connect_line: ConnectLine[AnyConnection] | None = None
        if patience:
            self._connect_line = ConnectLine(
                self._loop,
                connect=self._new_connection,
                patience=patience,
                passes=self._is_passing,
                report=self._report_connect_failure,
                discard=self._find_a_slot,
                is_waiting=self._somebody_waits,
            )
        # With a reset= of the user's own, too, which is for asyncpg to call.
        self._checks_out_itself = fast_path and is_supported()
        self._fast_path: FastPath | None = None
        if self._checks_out_itself and (not resets or arguments["reset"] is None):
            self._fast_path = FastPath(
                self, self._slot_queue, loop=self._loop, wait_for_reset=wait_for_reset, resets=resets
            )
        self._user_connect = connect
        self._clock: Clock = SYSTEM_CLOCK
        self._is_inherited = False
        _fork.watch(self)
        self._sessions: weakref.WeakKeyDictionary[AnyConnection, Session] = weakref.WeakKeyDictionary()
        self._closings: dict[asyncio.Task[None], AnyConnection] = {}
        self._disposal: asyncio.Task[None] | None = None
        self._opened = self._waits = 0
        self._retired: Counter[RetireReason] = Counter()
        self.connecting: set[Slot] = set()

        self._connector: Connector | None = None
        self._bindable: BindableProvider | None = None
        self._managers: dict[Target | None, TokenManager] = {}
        self._manager: TokenManager | None = None
        self._observer: Observer | None = None
        self._unsubscribe: Callable[[], None] | None = None
        if credentials is not None:
            self._connector = Connector(
                connect,
                manager_of=self._manager_of,
                one_manager_per_host=_is_bindable(credentials),
                require_tls=require_tls,
                is_refusal=is_refusal,
                observers=self._events,
            )
            self._use(credentials, forward=on_event is not None)
        self._rotation = Rotation(
            self,
            loop=self._loop,
            clock=self._clock,
            retire_when=retire_when,
            per_second=per_second,
            has_hooks=before_acquire is not None or after_release is not None,
            observers=self._events,
        )
        # What slots ask on every acquire and release goes straight to the one who knows.
        self.calm: Calm = self._rotation.calm
        self.released: Callable[[Slot], None] = self._rotation.released

    def _use(self, credentials: Credentials, *, forward: bool) -> None:
        # Read now, so that arguments that contradict each other show before anything is opened.
        assert self._connector is not None  # noqa: S101
        target = self._connector.route(self._connect_args[0], self._connect_kwargs)[0].targets[0]
        if isinstance(credentials, TokenManager):
            self._manager = credentials
            self._clock = credentials.clock

            def observe(event: Event) -> None:
                self._on_manager_event(event)
                if forward:
                    self._events(event)

            self._observer = observe
        elif isinstance(credentials, BindableProvider) and not isinstance(credentials, type):
            self._bindable = credentials
            self._manager = self._manager_of(target)
        else:
            self._manager = self._managers[None] = self._make_manager(credentials)
        if self._max_lifetime is None and (lifetime := self._manager.session_lifetime) is not None:
            self._max_lifetime = _policy.parse_seconds("session_lifetime", lifetime)

    # -- beyond asyncpg's pool

    @property
    def manager(self) -> TokenManager | None:
        """The manager of this pool's credentials; None without credentials.

        Where every host has one of its own, that of the first host.
        """
        return self._manager

    def stats(self) -> PoolStats:
        """Return the state and the counters as they stand."""
        connections = tuple(self._describe(slot) for slot in self.slots())
        manager = self.manager
        past_end, past_end_since = self._rotation.overdue()
        return PoolStats(
            connections=connections,
            in_use=sum(one.state == "in_use" for one in connections),
            idle=sum(one.state == "idle" for one in connections),
            spare=int(self._rotation.has_spare),
            past_end=past_end,
            past_end_since=past_end_since,
            by_generation=MappingProxyType(
                Counter(one.generation for one in connections if one.generation is not None)
            ),
            opened=self._opened,
            replaced=self._rotation.replaced,
            replacement_failures=self._rotation.failures,
            retired=MappingProxyType(dict(self._retired)),
            waits=self._waits,
            manager=None if manager is None else manager.stats(),
        )

    async def drain(self) -> None:
        """Retire every connection: those at rest now, those in use when they come back.

        Returns once those at rest are closed. One that is just being opened is retired too.
        """
        self._check_init()
        # What has been released is at rest for its user.
        with anyio.move_on_after(_RESET_TIMEOUT):
            for slot in self.slots():
                if slot.is_resetting:
                    await slot.wait_until_reset()
        await self.expire_connections()
        for slot in self.slots():
            if slot.is_at_rest and slot.connection is not None:
                self.retire(slot.connection, "drained")
                self.close_later(slot.vacate())
        if self._closings:
            await asyncio.wait(tuple(self._closings))
        self.restore_floor()

    # -- asyncpg's own methods, with what credentials add to them

    def set_connect_args(self, dsn: str | None = None, **connect_kwargs: Any) -> None:
        """Set the arguments of every connect from now on, as asyncpg's does.

        Raises:
            TypeError: A keyword is one that no connect will take.
        """
        check_keywords(
            self.set_connect_args,
            connect_kwargs,
            connect=self._user_connect,
            with_credentials=self._connector is not None,
            elsewhere=(create_pool,),
        )
        super().set_connect_args(dsn, **connect_kwargs)

    async def expire_connections(self) -> None:
        """Expire all open connections: each is replaced before it would be handed out again.

        As asyncpg's, and with one that is just being opened counted among them on every version.
        """
        self._rotation.epoch += 1
        await super().expire_connections()
        self._rotation.look()

    async def close(self) -> None:
        """Close the pool as asyncpg does, then the manager, unless that was handed in.

        Those who wait for a connection are answered with asyncpg's ``InterfaceError: pool is closing``, at once and
        on every version; so are those who come while the connections in use are waited for.

        In a forked child this does nothing: the connections are the parent's.
        """
        if self._is_inherited:
            return
        if self._initializing:
            self._check_init()  # which raises, before anything is undone
        if self._connect_line is not None:
            self._connect_line.close()
        try:
            if self._initialized and not self._closed:
                # Now, as asyncpg does with its first step: what is being undone below is not for those who come.
                self._closing = True
                self._slot_queue.close()
            try:
                await self._rotation.stop()
                if self._connect_line is not None:
                    await self._connect_line.wait_closed()
            except BaseException:
                self.terminate()
                raise
            await super().close()
        finally:
            self._closing = False  # closed, that is, though perhaps not by asyncpg's close
            await asyncio.shield(self._dispose_once(asyncio.get_running_loop()))

    def terminate(self) -> None:
        """Terminate all connections without waiting; the manager is closed by a task of the pool's.

        In a forked child this does nothing: the connections are the parent's.
        """
        if self._is_inherited:
            return
        super().terminate()
        if self._connect_line is not None:
            self._connect_line.abandon()
        self._slot_queue.close()
        self._rotation.abandon()
        for connection in tuple(self._closings.values()):
            connection.terminate()
        if self._loop.is_running():
            self._dispose_once(self._loop)

    async def _initialize(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._closed = True  # asyncpg 0.30 and 0.31 would take it for open
            await asyncio.shield(self._dispose_once(loop))
            raise RuntimeError(
                f"this pool was made for event loop {self._loop!r} and is opened in {loop!r}; make it where its loop "
                "runs: in the coroutine that is given to asyncio.run, not when a module is imported"
            )
        if self._manager is not None and self._observer is not None:
            # Not before: a pool that is never opened leaves nothing behind at the manager.
            self._unsubscribe = self._manager.subscribe(self._observer)
        try:
            if self._manager is not None:
                # A pool that opens nothing yet is ready once its source has answered, and not with its first query.
                self._manager.prefetch()
            await super()._initialize()
        except BaseException:
            if self._connector is not None:
                # asyncpg 0.30 and 0.31 leave the connections that did open where they are.
                self._closed = True
                for holder in self._holders:
                    holder.terminate()
                await asyncio.shield(self._dispose_once(loop))
            raise
        for holder in self._holders:
            holder.__class__ = Slot
        for slot in self.slots():
            slot.restart_idle_timer()
        # Nobody has waited yet.
        self._slot_queue.fill(self.slots())
        self._queue = self._slot_queue
        self._rotation.start(in_background=self._manager is None or self._manager.background)
        self._report_ready()

    def _report_ready(self) -> None:
        connections = [slot.connection for slot in self.slots()]
        opened = [one for one in connections if one is not None and not one.is_closed()]
        session = self._sessions.get(opened[0]) if opened else None
        lifetime = None
        if session is not None and session.stamp is not None and session.stamp.expires_at is not None:
            lifetime = (session.stamp.expires_at - session.stamp.obtained_at).total_seconds()
        name, tls = self._destination()
        self._events(
            PoolReady(
                at=utc_now(self._clock),
                name=name,
                provider=None if self._manager is None else self._manager.name,
                lifetime=lifetime,
                # What is had counts for more than what was asked for.
                tls=(_tls_of_connection(opened[0]) if opened else None) or tls,
                size=len(opened),
            )
        )

    def _destination(self) -> tuple[str, TlsState]:
        """Return where the arguments lead, and whether they ask for TLS."""
        dsn = self._connect_args[0]
        try:
            if self._connector is None:
                route, is_forced = read_route(dsn, routing_arguments(self._connect_kwargs)), False
            else:
                route, is_forced = self._connector.route(dsn, self._connect_kwargs)
            return _name_of(route), _tls_of_route(route, is_forced=is_forced)
        except Exception:  # noqa: BLE001 - a report keeps no pool from opening: the first connect meets it again
            return "unknown", "none"

    async def _acquire(self, timeout: float | None) -> AnyProxy:  # noqa: ASYNC109 - asyncpg's signature
        if timeout is not None or not self._checks_out_itself or self._closing:
            return await super()._acquire(timeout)
        self._check_init()
        proxy = self._slot_queue.check_out()
        if proxy is not None:
            return proxy
        slot = await self._slot_queue.get()
        proxy = slot.check_out()
        if proxy is not None:
            return proxy
        try:
            proxy = await slot.acquire()
        except BaseException:
            self._slot_queue.put_nowait(slot)
            self.restore_floor()
            raise
        slot.forget_timeout()
        return proxy

    async def release(self, connection: AnyProxy, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Release a connection back to the pool, as asyncpg's does.

        Done as soon as the reset of its session is on its way, or, with `wait_for_reset`, has been acknowledged.
        Cancelling this leaves the reset as it is. A server that acknowledges neither a cancelled query nor the reset
        within a second (a reset of your own: ten) loses the connection, and the slot is free.

        Raises:
            TimeoutError: The reset that this waits for was not acknowledged in time, or not within `timeout` (by
                default, that of the acquire). The connection is terminated.
        """
        done = None
        if timeout is None and self._fast_path is not None:
            done = self._fast_path.release(connection)
        if done is None:
            await super().release(connection, timeout=timeout)
        elif not done.done():
            await done

    async def _get_new_connection(self) -> AnyConnection:
        spare = await self._rotation.take_spare()
        if spare is not None:
            return spare
        if self._connect_line is None or not self._initialized or self._is_maintaining_floor():
            return await self._new_connection()
        connection = await self._connect_line.open()
        if self.is_closing():  # since it was handed over
            connection.terminate()
            raise asyncpg.InterfaceError("pool is closing")
        return connection

    async def _new_connection(self, *, replacement: bool = False) -> AnyConnection:
        started = self._clock.monotonic()
        try:
            connection = await self._connect_once()
        except ManagerClosed:
            if not self.is_closing():
                raise
            # By the pool itself, most likely, while this waited for a credential.
            raise asyncpg.InterfaceError("pool is closing") from None
        if self.is_closing():
            # asyncpg 0.30 and 0.31 do not look again; nobody would ever close it.
            connection.terminate()
            raise asyncpg.InterfaceError("pool is closing")
        self._opened += 1
        self._rotation.recovered()
        if self._connect_line is not None:
            self._connect_line.recovered()
        session = self._sessions.get(connection)
        self._events(
            ConnectionOpened(
                at=utc_now(self._clock),
                generation=None if session is None or session.stamp is None else session.stamp.generation,
                replacement=replacement,
                duration=self._clock.monotonic() - started,
            )
        )
        return connection

    def _is_passing(self, error: BaseException) -> bool:
        # Of a pool that has been let in before, a refusal may pass too: a clock that is ahead, keys that are rotated.
        return is_passing(error) or (self._opened > 0 and self.is_refused(error))

    def _somebody_waits(self, waiting: bool) -> None:
        self.released = self._released_to_line if waiting else self._rotation.released

    def _released_to_line(self, slot: Slot) -> None:
        """`slot` has come back: its connection changes over to the slot of whoever waits longest for one."""
        connection = slot.connection
        if (
            connection is not None
            and slot.is_at_rest
            and self.end_of(connection) is None
            and self._connect_line is not None
            and self._connect_line.give(connection)
        ):
            slot.vacate()
        else:
            self._rotation.released(slot)

    def _find_a_slot(self, connection: AnyConnection) -> None:
        """Keep a connection that was opened for somebody who has got another meanwhile."""
        vacant = next((slot for slot in self.slots() if slot.is_vacant), None)
        if vacant is None or connection.is_closed() or self.is_closing():
            self.close_later(connection)
        else:
            vacant.settle(connection)

    def _report_connect_failure(self, error: Exception, waiting: int, retry_in: float) -> None:
        message = class_and_code(error)
        self._events(
            ConnectFailed(at=utc_now(self._clock), error=error, message=message, waiting=waiting, retry_in=retry_in)
        )

    async def _connect_once(self) -> AnyConnection:
        try:
            return await super()._get_new_connection()
        except asyncpg.TooManyConnectionsError:
            if not self._closings:
                raise
            # It may be our own retired connections, on their way out, that fill the server.
            await asyncio.wait(tuple(self._closings))
            return await super()._get_new_connection()

    async def _open(self, *arguments: Any, **keywords: Any) -> AnyConnection:
        """Connect: what asyncpg calls for every physical connection."""
        # Taken first: a drain during the handshake counts.
        epoch, opened = self._rotation.epoch, self._clock.monotonic()
        stamp: Stamp | None = None
        if self._connector is None:
            connect: ConnectFunction = self._user_connect or asyncpg.connect
            connection = await connect(*arguments, **keywords)
        else:
            connection, stamp = await self._connector.open(arguments[0] if arguments else None, keywords)
        if not isinstance(connection, asyncpg.Connection):  # pyright: ignore[reportUnnecessaryIsInstance]
            return connection  # asyncpg says what is wrong with it
        guard(connection)
        if self._fast_path is not None:
            watch(connection)
        self._sessions[connection] = Session(
            stamp, opened, epoch, self._max_lifetime, expired_sessions=self._expired_sessions
        )
        reference = weakref.ref(connection)
        connection.add_termination_listener(lambda _: self._has_ended(reference()))
        return connection

    def _has_ended(self, connection: AnyConnection | None) -> None:
        if connection is not None and watchdog_of(self._loop).has_given_up(connection) and not self.is_closing():
            self.retire(connection, "unanswered")
        self._rotation.look()

    # -- what slots and rotation ask for

    def slots(self) -> Sequence[Slot]:
        """Return the pool's slots; none before it is initialised."""
        return [slot for slot in self._holders if isinstance(slot, Slot)]

    def session_of(self, connection: AnyConnection) -> Session | None:
        """Return what is known about `connection`."""
        return self._sessions.get(connection)

    def end_of(self, connection: AnyConnection) -> RetireReason | None:
        """Return why `connection` must not be handed out any more, or None."""
        session = self._sessions.get(connection)
        return None if session is None else session.ended(self._clock, self._retire_when, self._rotation.epoch)

    def is_irreplaceable(self, connection: AnyConnection) -> bool:
        """Return whether `connection` is served past the end of its credential, and no other can be had."""
        session = self._sessions.get(connection)
        return session is not None and self._rotation.serves_on(session)

    def is_worth_replacing(self, connection: AnyConnection) -> bool:
        """Return whether `connection` is past the end of its credential, and a better one may be had."""
        session = self._sessions.get(connection)
        return session is not None and self._rotation.expects_replacement(session)

    async def wait_for_replacement(self, slot: Slot) -> None:
        """Wait until the connection of `slot` has been replaced, or until that is given up."""
        self._waits += 1
        await self._rotation.wait_for_replacement(slot)

    def is_source_failing(self) -> bool:
        """Return whether no credential can be had at the moment, as far as is known."""
        managers = self._managers.values() if self._managers else (self._manager,)
        return all(manager is not None and manager.is_failing for manager in managers)

    def is_refused(self, error: BaseException) -> bool:
        """Return whether the error of a connect says that the credential was refused."""
        return self._connector is not None and self._connector.is_refused(error)

    def is_making_room(self) -> bool:
        """Return whether a connection that comes back may have to be closed, because of one that takes its place."""
        return self._rotation.is_making_room or self._rotation.has_spare

    def claim_on(self, connection: AnyConnection) -> RetireReason | None:
        """Return why `connection`, which comes back, must not go to the next acquirer, or None."""
        return self.end_of(connection) or self._rotation.claims(connection)

    async def open_replacement(self) -> AnyConnection:
        """Return a new connection, initialised, that is in no slot."""
        return await self._new_connection(replacement=True)

    def retire(self, connection: AnyConnection, reason: RetireReason) -> None:
        """Count and report that `connection` is retired; somebody else closes it."""
        self._retired[reason] += 1
        session = self._sessions.pop(connection, None)
        if session is not None:
            self._events(
                ConnectionRetired(
                    at=utc_now(self._clock),
                    generation=None if session.stamp is None else session.stamp.generation,
                    reason=reason,
                    age=self._clock.monotonic() - session.opened,
                )
            )

    def close_later(self, connection: AnyConnection) -> asyncio.Task[None]:
        """Close `connection` in a task of the pool's."""
        task = self._loop.create_task(_close(connection), name="asyncpool_creds: close a retired connection")
        self._closings[task] = connection
        task.add_done_callback(self._closings.pop)
        return task

    def restore_floor(self) -> None:
        """Connect again up to the pool's minimum size, where asyncpg keeps one (0.32)."""
        schedule: Callable[[], None] | None = getattr(self, "_schedule_min_size_maintenance", None)
        if schedule is not None:
            schedule()

    def about_to_connect(self) -> None:
        """Count an acquire that has to wait for a connect: no replacement stands ready."""
        self._waits += not (self._is_maintaining_floor() or self._rotation.has_spare)

    def _is_maintaining_floor(self) -> bool:
        return asyncio.current_task() is getattr(self, "_maintenance_task", None)  # asyncpg 0.32

    def connected(self, slot: Slot) -> None:  # noqa: ARG002 - all are looked at
        """`slot` has a new connection, or has failed to get one."""
        self._rotation.look()

    def _forked(self) -> None:
        async def refuse(timeout: float | None) -> NoReturn:  # noqa: ARG001, ASYNC109 - asyncpg's signature
            raise asyncpg.InterfaceError(
                "this pool was made before the process was forked, and its connections are the parent's; "
                "make a pool in each process, after the fork"
            )

        self._is_inherited = True
        # Only a child pays for it.
        self.__dict__["_acquire"] = refuse

    # -- managers

    def _manager_of(self, target: Target) -> TokenManager:
        if self._bindable is None:
            assert self._manager is not None  # noqa: S101
            return self._manager
        manager = self._managers.get(target)
        if manager is None:
            manager = self._managers[target] = self._make_manager(self._bindable.bind(target))
        return manager

    def _make_manager(self, source: CredentialProvider | CredentialFunction) -> TokenManager:
        return TokenManager(source, on_event=(self._events, self._on_manager_event))

    def _on_manager_event(self, event: Event) -> None:
        if isinstance(event, (CredentialRefreshed, ClockSkewDetected)):
            self._rotation.recovered()
            self._rotation.look()

    # -- small change

    def _dispose_once(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
        # In the loop that runs: that of a pool which was never opened may be another one, and never run.
        if self._disposal is None:
            self._disposal = loop.create_task(self._dispose(), name="asyncpool_creds: dispose of a pool")
        return self._disposal

    async def _dispose(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        if self._closings:
            await asyncio.wait(tuple(self._closings))
        await _close_managers(self._managers.values())

    def _describe(self, slot: Slot) -> ConnectionInfo:
        connection = slot.connection
        if connection is None or connection.is_closed():
            return ConnectionInfo(state="closed")
        state: Literal["in_use", "idle"] = "idle" if slot.is_at_rest else "in_use"
        session = self._sessions.get(connection)
        if session is None:
            return ConnectionInfo(state=state)
        left = session.seconds_left(self._clock, self._retire_when, self._rotation.epoch)
        return ConnectionInfo(
            state=state,
            generation=None if session.stamp is None else session.stamp.generation,
            age=self._clock.monotonic() - session.opened,
            seconds_left=max(left, 0.0) if left < math.inf else None,
        )


for _name in ("execute", "executemany", "fetch", "fetchmany", "fetchrow", "fetchval"):
    setattr(CredentialPool, _name, whole_call(_name))


def _prepare_hooks(arguments: dict[str, Any]) -> bool:
    """Put what the pool makes of ``reset``, ``init`` and ``setup`` into `arguments`; return whether it resets."""
    reset: object = arguments["reset"]
    if reset is not False and reset is not None and not callable(reset):
        raise TypeError(
            f"reset must be a coroutine function that takes a connection, None for asyncpg's reset, or False "
            f"for none; not {reset!r}"
        )
    if reset is False:
        arguments["reset"] = _leave_as_it_is
    for name in ("init", "setup"):
        if arguments[name] is not None:
            arguments[name] = _hanging_up_on_cancellation(arguments[name])
    return reset is not False


def _hanging_up_on_cancellation(hook: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Return `hook`, with the connection terminated at once if it is cancelled.

    asyncpg answers with a graceful close, and 0.30 and 0.31 lose the socket if that is cancelled
    too; anyio's scopes, for one, cancel again at every await.
    """

    async def hook_or_hang_up(connection: AnyConnection | AnyProxy) -> None:
        try:
            await hook(connection)
        except asyncio.CancelledError:
            connection.terminate()
            raise

    return hook_or_hang_up


async def _leave_as_it_is(_connection: AnyConnection) -> None:
    """Reset nothing."""


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")


def _name_of(route: Route) -> str:
    """Return ``user@host:port/database``; every host, if there are several."""
    hosts = ",".join(
        f"[{target.host}]:{target.port}" if ":" in target.host else f"{target.host}:{target.port}"
        for target in route.targets
    )
    first = route.targets[0]
    user = "" if first.user is None else f"{first.user}@"
    return f"{user}{hosts}" + ("" if first.database is None else f"/{first.database}")


def _tls_of_connection(connection: AnyConnection) -> TlsState | None:
    """Return how an open connection is protected; None: it does not show."""
    transport: asyncio.Transport | None = getattr(connection, "_transport", None)
    if transport is None:
        return None
    encryption: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    if encryption is not None:
        return _tls_of_context(encryption.context)
    connected: socket.socket | None = transport.get_extra_info("socket")
    if connected is None:
        return None
    return "local" if connected.family == getattr(socket, "AF_UNIX", None) else "none"


def _tls_of_route(route: Route, *, is_forced: bool) -> TlsState:
    """Return how a connection will be protected at least: ``sslmode=prefer`` may come to nothing."""
    if all(target.host.startswith("/") for target in route.targets):
        return "local"
    if route.tls == "verified":
        return "verified"
    return "unverified" if is_forced or route.tls in ("authority", "unverified") else "none"


def _tls_of_context(context: ssl.SSLContext) -> TlsState:
    # sslmode=verify-ca takes any certificate of the authority, and a public one certifies everybody.
    is_verified = context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    return "verified" if is_verified else "unverified"


def _is_bindable(credentials: Credentials) -> bool:
    return not isinstance(credentials, TokenManager) and isinstance(credentials, BindableProvider)


async def _close_managers(managers: Iterable[TokenManager]) -> None:
    outcomes = await asyncio.gather(*(manager.aclose() for manager in managers), return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


async def _close(connection: AnyConnection) -> None:
    try:
        await part_from(connection)
    except Exception as error:  # noqa: BLE001 - it is leaving, one way or the other
        _logger.debug("closing a retired connection failed (%s); it was terminated", type(error).__name__)
        connection.terminate()


def _asyncpg_defaults() -> dict[str, Any]:
    """Return the defaults of the installed asyncpg's create_pool: `asyncpg.Pool` itself has none."""
    return {
        name: parameter.default
        # Of the module: `asyncpg.create_pool` may be replaced by a tracer's, or by ours.
        for name, parameter in inspect.signature(asyncpg.pool.create_pool).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def create_pool(
    dsn: str | None = None,
    *,
    credentials: Credentials | None = None,
    retire_when: RetireWhen = "expired",
    expired_sessions: ExpiredSessions = "serve",
    connect_patience: float | timedelta = 0.0,
    max_lifetime: float | timedelta | None = None,
    before_acquire: ConnectionHook | None = None,
    after_release: ConnectionHook | None = None,
    max_reconnects_per_second: float = DEFAULT_RECONNECTS_PER_SECOND,
    require_tls: RequireTls = None,
    wait_for_reset: bool = False,
    fair: bool = True,
    fast_path: bool = True,
    is_refusal: Callable[[BaseException], bool] = is_refusal,
    on_event: Observer | Iterable[Observer] | None = None,
    init_size: int | None = None,
    min_size: int = 10,
    max_size: int = 10,
    max_queries: int = 50000,
    max_inactive_connection_lifetime: float = 300.0,
    connect: ConnectFunction | None = None,
    setup: Callable[[AnyProxy], Awaitable[None]] | None = None,
    init: Callable[[AnyConnection], Awaitable[None]] | None = None,
    reset: Callable[[AnyConnection], Awaitable[None]] | Literal[False] | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
    connection_class: type[AnyConnection] = asyncpg.Connection,
    record_class: type[RecordT] = asyncpg.Record,  # type: ignore[assignment]
    **connect_kwargs: object,
) -> CredentialPool[RecordT]:
    """Return a pool like asyncpg's, whose connections are opened with credentials that are always current.

    To be awaited, or used as an async context manager. Every argument of the installed
    `asyncpg.create_pool` means what it means there; without `credentials` this is asyncpg's pool.

    Args:
        dsn: As for asyncpg; without a password, if `credentials` are given.
        credentials: A `TokenManager` (shared: the pool never closes it), a provider, or a function that
            returns a `Credential` or a token. One that is not async is called in a thread, since it may block.
        retire_when: "expired": a connection is replaced between the refresh and the expiry of its
            credential (earlier, if the server ends its sessions).
            "rotated": replaced as soon as a newer credential has been proven by a connect.
            "never": credentials are injected, and connections left alone.
        expired_sessions: What becomes of a session past the end of its credential. "serve": it is replaced before
            it is handed out again, if a newer credential can be had and the server takes it; while the source, or
            the connect, is failing, it is handed out as it is, since servers check a credential at connect only,
            and replaced as soon as that ends. Not so where the server ends its sessions with the credential
            (`Credential.ends_session`), where it was drained, and past `max_lifetime`.
            "refuse": it is never handed out.
        connect_patience: Seconds (or a timedelta) for which an acquire that has to connect goes on trying, where
            connects fail in a way that passes: refused, reset, timed out, a name that is not found, a server that is
            starting (57P03) or full (53300). One attempt at a time is made for all who wait, and they are served in
            order. Then the last error is raised. A deadline of the caller's own ends it sooner. 0: the first error is
            raised, as in asyncpg.
        max_lifetime: Seconds (or a timedelta) after which a connection is retired whatever its
            credential. Its replacement is due up to 5 % earlier, at random.
        before_acquire: Sync or async; called with each connection about to be handed out, after
            `setup`. False retires it, and acquire goes on with another within its timeout.
        after_release: Sync or async; called with each connection that comes back, before its reset.
            False retires it. An exception does too, and reaches the one who releases.
        max_reconnects_per_second: Cap on background replacement connects.
        require_tls: None: a credential leaves for a host that is neither a Unix socket nor loopback
            under TLS only; asyncpg's default ``sslmode=prefer`` then means ``require``, and a warning says if the
            server is not verified. "verified": such a host must be verified as well (``sslmode=verify-full``).
            True: TLS on the way to every host. False: no guard. See docs/security.md.
        wait_for_reset: False: a release is done when the reset of the session is on its way, and the connection
            goes to the next one when the server has acknowledged it. True: a release waits for that,
            as asyncpg's does; for those who rely on session locks being gone when it returns.
        fair: True: those who wait for a connection are served in order of arrival. False: as in
            asyncpg, where whoever comes just as one is free goes before them.
        fast_path: False: checkout and reset are left to asyncpg's own code, as they are where the
            connection class, `reset` or the state of a connection are out of the ordinary.
        is_refusal: Decides whether an error of a connect says that the credential was refused, so that
            it is fetched anew and the connect tried once more; default: `asyncpool_creds.is_refusal`.
        on_event: An observer, or several, called with every event; default: `log_event`.
        init_size: As for asyncpg 0.32.
        min_size: As for asyncpg.
        max_size: As for asyncpg; a replacement may add one connection to it for a moment.
        max_queries: As for asyncpg.
        max_inactive_connection_lifetime: As for asyncpg, in seconds.
        connect: As for asyncpg; is given the current ``user`` and, as a function, ``password``.
        setup: As for asyncpg.
        init: As for asyncpg.
        reset: As for asyncpg. False: a session is left as it is, for work that changes nothing in it: what
            was SET, LISTENed to, locked or prepared by one user of a connection is there for the next. Open
            transactions are rolled back all the same.
        loop: As for asyncpg.
        connection_class: As for asyncpg.
        record_class: As for asyncpg.
        **connect_kwargs: As for asyncpg; checked now, and not by the first connect.

    Raises:
        TypeError: An argument has the wrong type, or a keyword is one that neither this function nor
            `asyncpg.connect` takes (nor `connect`, where it says what it takes).
        ValueError: An argument has an impossible value, or there is a password beside the credentials.
        InsecureTransport: The arguments would send a credential to a remote host without TLS.
    """
    if init_size is not None:
        if "init_size" not in _asyncpg_defaults():
            raise TypeError(f"init_size needs asyncpg 0.32 or later; {asyncpg.__version__} is installed")
        connect_kwargs["init_size"] = init_size
    return CredentialPool(
        dsn,
        credentials=credentials,
        retire_when=retire_when,
        expired_sessions=expired_sessions,
        connect_patience=connect_patience,
        max_lifetime=max_lifetime,
        before_acquire=before_acquire,
        after_release=after_release,
        max_reconnects_per_second=max_reconnects_per_second,
        require_tls=require_tls,
        wait_for_reset=wait_for_reset,
        fair=fair,
        fast_path=fast_path,
        is_refusal=is_refusal,
        on_event=on_event,
        min_size=min_size,
        max_size=max_size,
        max_queries=max_queries,
        max_inactive_connection_lifetime=max_inactive_connection_lifetime,
        connect=connect,
        setup=setup,
        init=init,
        reset=reset,
        loop=loop,
        connection_class=connection_class,
        record_class=record_class,
        **connect_kwargs,
    )


# A program may open a connection for each request, and reads a warning once.
_told_by_connect: Final = set[tuple[str, ...]]()


async def connect(
    dsn: str | None = None,
    *,
    credentials: Credentials | None = None,
    require_tls: RequireTls = None,
    is_refusal: Callable[[BaseException], bool] = is_refusal,
    on_event: Observer | Iterable[Observer] | None = None,
    **connect_kwargs: Any,  # what asyncpg.connect takes, checked by it
) -> AnyConnection:
    """Return a single connection, opened with a current credential; otherwise as `asyncpg.connect`.

    A manager that is handed in stays open. A provider is asked once and closed again.

    Raises:
        TypeError: A keyword is neither an argument of this function nor of `asyncpg.connect`.
        CredentialExpired: The source gave nothing.
        InsecureTransport: A credential would have left for a remote host without TLS.
        ValueError: There is a password beside the credentials.
    """
    check_arguments(require_tls, is_refusal)
    check_keywords(connect, connect_kwargs, with_credentials=credentials is not None, elsewhere=(create_pool,))
    if credentials is None:
        plain: AnyConnection = await asyncpg.connect(dsn, **connect_kwargs)
        return plain
    events = Observers(on_event, is_short_lived=True)
    built: dict[Target, TokenManager] = {}

    def manager_of(target: Target) -> TokenManager:
        if isinstance(credentials, TokenManager):
            return credentials
        if target not in built:
            source = credentials.bind(target) if isinstance(credentials, BindableProvider) else credentials
            built[target] = TokenManager(source, background=False, on_event=events)
        return built[target]

    connector = Connector(
        None,
        manager_of=manager_of,
        one_manager_per_host=_is_bindable(credentials),
        require_tls=require_tls,
        is_refusal=is_refusal,
        observers=events,
        told=_told_by_connect,
    )
    try:
        connection, _ = await connector.open(dsn, connect_kwargs)
    except BaseException:
        await _close_managers(built.values())
        raise
    try:
        await _close_managers(built.values())
    except BaseException:
        connection.terminate()
        raise
    return connection
