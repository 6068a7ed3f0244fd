"""Make before break: idle connections are replaced one by one before their credential ends."""

from __future__ import annotations

import asyncio
import math
import random
import weakref
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol, TypeAlias

import anyio
import asyncpg

from asyncpool_creds import _policy
from asyncpool_creds._alarm import Alarm
from asyncpool_creds._clock import Clock, utc_now
from asyncpool_creds._connect_errors import class_and_code
from asyncpool_creds._connect_line import CONNECT_GRACE
from asyncpool_creds._connector import AnyConnection
from asyncpool_creds._events import ExpiredSessionsServed, Observers, ReplacementFailed, RetireReason
from asyncpool_creds._manager import Stamp
from asyncpool_creds._slots import Calm, Slot

__all__ = ["ExpiredSessions", "RetireWhen", "Rotation", "RotationHost", "Session"]

RetireWhen: TypeAlias = Literal["expired", "rotated", "never"]
ExpiredSessions: TypeAlias = Literal["serve", "refuse"]

# A replacement that waits for its place looks at the clocks this often; so long a pause follows a bug.
_WATCH_INTERVAL: Final = 60.0
# By so much the clocks may have moved on while something was computed from them.
_CLOCK_GRAIN: Final = 0.001
# Seconds that an acquire waits for the replacement of a connection past its end, where one may be had. No longer: the
# server takes the old session, and whoever waits longer pays for somebody else's outage.
_REPLACEMENT_GRACE: Final = 1.0


class Session:
    """What a pool knows about one of its connections.

    Attributes:
        stamp: Of the credential it was opened with; None in a pool without credentials.
        opened: When its connect began, on the monotonic clock.
        epoch: How often the pool had been drained by then.
        outlives_credential: Whether it may be served past the end of its credential while nothing better can be had.
    """

    __slots__ = ("_due", "_end", "epoch", "opened", "outlives_credential", "stamp")

    def __init__(
        self,
        stamp: Stamp | None,
        opened: float,
        epoch: int,
        max_lifetime: float | None,
        *,
        expired_sessions: ExpiredSessions,
    ) -> None:
        self.stamp: Stamp | None = stamp
        self.outlives_credential: bool = (
            expired_sessions == "serve" and stamp is not None and not stamp.credential.ends_session
        )
        self.opened: float = opened
        self.epoch: int = epoch
        due, end = _policy.session_deadlines(max_lifetime, chance=random.random())  # noqa: S311 - jitter
        self._due = math.inf if due is None else opened + due
        self._end = math.inf if end is None else opened + end

    def ended(self, clock: Clock, retire_when: RetireWhen, epoch: int) -> RetireReason | None:
        """Return why it must not be handed out any more, or None."""
        if self.epoch != epoch:
            return "drained"
        if clock.monotonic() >= self._end:
            return "max_lifetime"
        if not self.outlives_credential and self._is_past_credential(clock, retire_when):
            return "expired"
        return None

    def is_overdue(self, clock: Clock, retire_when: RetireWhen) -> bool:
        """Return whether its credential has ended, and it may be handed out while nothing better can be had."""
        return self.outlives_credential and self._is_past_credential(clock, retire_when)

    def _is_past_credential(self, clock: Clock, retire_when: RetireWhen) -> bool:
        return retire_when != "never" and self.stamp is not None and self.stamp.seconds_left(clock) <= 0

    def due(self, clock: Clock, retire_when: RetireWhen, epoch: int) -> RetireReason | None:
        """Return why it wants replacing now, or None; it may be handed out until it has ended."""
        reason = self.ended(clock, retire_when, epoch)
        if reason is not None:
            return reason
        if clock.monotonic() >= self._due:
            return "max_lifetime"
        if self.is_overdue(clock, retire_when):
            return "expired"
        stamp = self.stamp
        if stamp is None or not stamp.is_superseded or retire_when == "never":
            return None
        return "rotated" if retire_when == "rotated" or stamp.seconds_left(clock) < math.inf else None

    def seconds_left(self, clock: Clock, retire_when: RetireWhen, epoch: int) -> float:
        """Return the seconds until its end, not positive once that has come; infinity if no end is known."""
        if self.epoch != epoch:
            return 0.0
        left = self._end - clock.monotonic()
        if retire_when == "never" or self.stamp is None:
            return left
        return min(left, self.stamp.seconds_left(clock))

    def seconds_until_due(self, clock: Clock, retire_when: RetireWhen, epoch: int) -> float:
        """Return the seconds until `due` has something to say, as far as the clock alone decides."""
        if self.due(clock, retire_when, epoch) is not None:
            return 0.0
        return min(self._due - clock.monotonic(), self.seconds_left(clock, retire_when, epoch))


class RotationHost(Protocol):
    """What the rotation asks of its pool."""

    connecting: set[Slot]

    def slots(self) -> Sequence[Slot]:
        """Return the pool's slots."""
        ...

    def session_of(self, connection: AnyConnection) -> Session | None:
        """Return what is known about `connection`."""
        ...

    async def open_replacement(self) -> AnyConnection:
        """Return a new connection, initialised, that is in no slot."""
        ...

    def retire(self, connection: AnyConnection, reason: RetireReason) -> None:
        """Count and report that `connection` is retired; somebody else closes it."""
        ...

    def close_later(self, connection: AnyConnection) -> asyncio.Task[None]:
        """Close `connection` in a task of the pool's."""
        ...

    def restore_floor(self) -> None:
        """Connect again up to the pool's minimum size, where asyncpg keeps one (0.32)."""
        ...

    def is_source_failing(self) -> bool:
        """Return whether no credential can be had at the moment, as far as is known."""
        ...

    def is_refused(self, error: BaseException) -> bool:
        """Return whether the error of a connect says that the credential was refused."""
        ...


class Rotation:
    """Replace what is due, most urgent first: one connector, spread over the time that is left.

    A task runs only while something is due; between, there is an alarm.

    Attributes:
        calm: Until when no connection has ended, for the slots: until then, none has to be looked at.
        epoch: How often the pool has been drained.
        is_making_room: Whether one that comes back and is due has to be closed, for its replacement to be opened.
        replaced: Connections opened to take another's place.
        failures: Attempts at that which failed.
    """

    __slots__ = (
        "_alarm",
        "_clock",
        "_closing_old",
        "_failure",
        "_has_hooks",
        "_host",
        "_in_background",
        "_is_opening",
        "_late_spare",
        "_loop",
        "_news",
        "_next_try",
        "_observers",
        "_one_for_one",
        "_overdue_since",
        "_pauses_after_failure",
        "_pausing",
        "_per_second",
        "_promise",
        "_retire_when",
        "_room",
        "_running",
        "_serves_overdue",
        "_spare",
        "_task",
        "_waiting",
        "calm",
        "epoch",
        "failures",
        "is_making_room",
        "replaced",
    )

    def __init__(
        self,
        host: RotationHost,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        retire_when: RetireWhen,
        per_second: float,
        has_hooks: bool,
        observers: Observers,
    ) -> None:
        self._host = host
        self._loop = loop
        self._clock = clock
        self._retire_when: RetireWhen = retire_when
        self._per_second = per_second
        self._observers = observers
        self._spare: AnyConnection | None = None
        self._closing_old: asyncio.Task[None] | None = None
        self._one_for_one = False
        self._room: Slot | None = None
        self.is_making_room = False
        self._promise: asyncio.Future[None] | None = None
        self._news: asyncio.Event | None = None  # while the connector waits for some
        self._alarm: Alarm | None = None
        self._task: asyncio.Task[None] | None = None
        self._running = False
        self._in_background = False
        self._is_opening = False
        # Sessions past their end are handed out, because an attempt to replace them failed or took too long.
        self._serves_overdue = False
        self._overdue_since = utc_now(clock)
        self._failure: Exception | None = None  # of the latest attempt to open a replacement
        self._next_try = -math.inf  # of an attempt that only a call begins
        self._waiting: set[asyncio.Future[None]] = set()  # acquires, for the replacement of what they would get
        self._pausing: asyncio.Event | None = None
        self._pauses_after_failure = False
        self._late_spare: AnyConnection | None = None
        self._has_hooks = has_hooks
        self.calm = Calm(clock)
        self.epoch = 0
        self.replaced = 0
        self.failures = 0

    # -- what the pool tells it

    def start(self, *, in_background: bool) -> None:
        """Begin to watch the connections, and to replace them: in the background, or on calls only."""
        self._running, self._in_background = True, in_background
        self.look()

    def look(self) -> None:
        """Look again at what is due: a connection was opened, drained or has died, or a credential has rotated."""
        self._tell()
        self._set_calm()
        self._wake_waiting()
        self._end_of_overdue()
        if self._task is not None:
            return
        moment = min(
            (session.seconds_until_due(self._clock, self._retire_when, self.epoch) for _, session in self._sessions()),
            default=math.inf,
        )
        self._stop_alarm()
        if not self._running or not self._in_background:
            return
        if moment <= 0:
            self._start_task()
        elif moment < math.inf:
            self._wake_in(moment)

    def released(self, slot: Slot) -> None:
        """A connection has come back: if it is due and a replacement stands, they change places here and now."""
        if self._task is None:
            return
        spare = self._usable_spare()
        if slot.is_vacant:
            # Its end came while it was in use, and it is closed already.
            if spare is not None:
                self._settle(spare, slot)
            return
        reason = self._due(slot.connection) if slot.is_at_rest and slot.connection is not None else None
        if reason is not None:
            self._tell()
            if spare is not None:
                self._swap(slot, spare, reason)

    def recovered(self) -> None:
        """Try again at once: there is a newer credential, or the server has taken a connection."""
        self._failure = None
        if self._pausing is not None and self._pauses_after_failure:
            self._pausing.set()

    def expects_replacement(self, session: Session) -> bool:
        """Return whether a connection past the end of its credential is worth replacing before it is handed out.

        Not while that is known to fail: then it is handed out as it is, and replaced as soon as that ends.
        """
        if not session.is_overdue(self._clock, self._retire_when):
            return False
        if self._serves_overdue:
            self._attempt_on_call()
        elif self._failure is not None or self._host.is_source_failing():
            self._serve_overdue(self._failure)
        return not self._serves_overdue

    def serves_on(self, session: Session) -> bool:
        """Return whether a connection is past the end of its credential, and no other can be had."""
        return self._serves_overdue and session.is_overdue(self._clock, self._retire_when)

    async def wait_for_replacement(self, slot: Slot) -> None:
        """Wait until the connection in `slot`, which is past its end, has been replaced, or until that is given up.

        Cancelling this changes nothing for the replacement.
        """
        old = slot.connection
        give_up_at = self._loop.time() + _REPLACEMENT_GRACE
        timer = self._loop.call_at(give_up_at, self._end_grace)
        self.look()
        self._attempt_on_call()
        if self._pausing is not None:
            self._pausing.set()
        try:
            while (
                self._running
                and not self._serves_overdue
                and old is not None
                and slot.connection is old
                and not old.is_closed()  # asyncpg 0.30 and 0.31 leave what has died where it was
                and self._is_overdue(old)  # not if its credential was renewed
                and self._loop.time() < give_up_at - _CLOCK_GRAIN
            ):
                waiter: asyncio.Future[None] = self._loop.create_future()
                self._waiting.add(waiter)
                try:
                    await waiter
                finally:
                    self._waiting.discard(waiter)
        finally:
            timer.cancel()

    def _is_overdue(self, connection: AnyConnection) -> bool:
        session = self._host.session_of(connection)
        return session is not None and session.is_overdue(self._clock, self._retire_when)

    def _end_grace(self) -> None:
        self._serve_overdue(None)
        self._wake_waiting()

    def _attempt_on_call(self) -> None:
        """Begin an attempt where none begins in the background."""
        if self._running and not self._in_background and self._task is None and self._loop.time() >= self._next_try:
            self._start_task()

    def claims(self, connection: AnyConnection) -> RetireReason | None:
        """Return why a connection that comes back must be closed, although it has not ended, or None.

        That is so if it is past the end of its credential and its replacement stands; and on a full server while no
        connection that is due is ever at rest: the one who waits for this slot would have it again before anything
        else can happen.
        """
        if self._is_overdue(connection) and self._usable_spare():
            return "expired"
        reason = self._due(connection) if self.is_making_room else None
        if reason is not None:
            self._make_room(wanted=False)
            self._tell()
        return reason

    async def take_spare(self) -> AnyConnection | None:
        """Return the replacement that has no slot yet, for a slot that would have to connect.

        While one is being opened in a room that was made for it, this waits for it: the server
        would refuse a second one.
        """
        if self._promise is not None:
            await asyncio.wait((self._promise,))
        spare, self._spare = self._spare, None
        if spare is not None:
            self._tell()
            if not self._is_fit(spare):
                self._host.close_later(spare)
                return None
        return spare

    @property
    def has_spare(self) -> bool:
        """Whether a replacement stands that has no slot yet."""
        return self._spare is not None

    async def stop(self) -> None:
        """Replace nothing any more; wait for what is under way to be undone."""
        self._running = False
        if self._task is not None and self._is_opening:
            await asyncio.wait((self._task,), timeout=CONNECT_GRACE)
        self.abandon()
        if self._task is not None:
            await asyncio.wait((self._task,))

    def abandon(self) -> None:
        """Replace nothing any more, without waiting."""
        self._running = False
        self._stop_alarm()
        self._wake_waiting()
        if self._task is not None:
            self._task.cancel()
        spare, self._spare = self._spare, None
        if spare is not None:
            self._host.close_later(spare)

    # -- sessions past the end of their credential

    def _overdue(self) -> list[Session]:
        return [session for _, session in self._sessions() if session.is_overdue(self._clock, self._retire_when)]

    def _serve_overdue(self, error: Exception | None) -> None:
        """Hand out what is past its end, from now on until all of it has been replaced."""
        overdue = self._overdue()
        if self._serves_overdue or not overdue:
            return
        self._serves_overdue = True
        first = min(session.seconds_left(self._clock, self._retire_when, self.epoch) for session in overdue)
        self._overdue_since = utc_now(self._clock) + timedelta(seconds=first)
        self._report_overdue(len(overdue), error)
        self._wake_waiting()

    def _end_of_overdue(self) -> None:
        if self._serves_overdue and not self._overdue():
            self._serves_overdue = False
            self._report_overdue(0, None)

    def _report_overdue(self, connections: int, error: Exception | None) -> None:
        self._observers(
            ExpiredSessionsServed(
                at=utc_now(self._clock), connections=connections, since=self._overdue_since, error=error
            )
        )

    def overdue(self) -> tuple[int, datetime | None]:
        """Return how many sessions are served past their end, and since when."""
        overdue = len(self._overdue()) if self._serves_overdue else 0
        return overdue, self._overdue_since if overdue else None

    def _wake_waiting(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    # -- the connector

    def _start_task(self) -> None:
        self._task = self._loop.create_task(self._run(), name="asyncpool_creds: replace connections")
        self._task.add_done_callback(self._ran)

    async def _run(self) -> None:
        ahead = _at_work.get(self._loop, 0)
        _at_work[self._loop] = ahead + 1
        try:
            if ahead:
                window = _window(self._pending())
                await self._pause(_policy.first_gap(ahead=ahead, window=window, per_second=self._per_second))
            await self._replace()
        finally:
            _at_work[self._loop] -= 1

    async def _replace(self) -> None:
        attempt = 0
        self._one_for_one, self._room = False, None
        while self._running and (pending := self._pending()):
            started = self._loop.time()
            self._is_opening = True
            try:
                spare = await (self._open_in_place(pending) if self._one_for_one else self._host.open_replacement())
            except Exception as error:  # noqa: BLE001 - every failure means: the old ones serve on
                attempt += 1
                if self._running and not await self._go_on_after(error, attempt, pending):
                    return
                continue
            finally:
                self._is_opening = False
            if not self._running:
                if spare is not None:
                    spare.terminate()  # nothing was done on it that a goodbye could lose
                return
            if spare is None:
                self._make_room(wanted=True)
                await self._wait(min((left for left, _, _ in pending if left > 0), default=math.inf))
                self._make_room(wanted=False)
                await asyncio.sleep(1 / self._per_second)
                continue
            attempt = 0
            self._failure = None
            self.replaced += 1
            cost = self._loop.time() - started
            # Superseded before it stood: a connect takes longer than a credential is current. Still the better one.
            self._late_spare = spare if self._due(spare) == "rotated" else None
            await self._find_a_place(spare)
            if not self._in_background and not self._waiting:
                return  # the next call begins the next one
            gap = _policy.replacement_gap(
                pending=len(pending),
                window=_window(pending),
                spread=self._retire_when == "expired",
                cost=cost,
                per_second=self._per_second,
                chance=random.random(),  # noqa: S311 - jitter
            )
            await self._pause(started + gap - self._loop.time())

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not self._running:
            return
        if task.cancelled():  # by nobody of ours
            self._serve_overdue(None)
            self._wake_in(_WATCH_INTERVAL)
            return
        error = task.exception()
        if error is None:
            self._host.restore_floor()
            self.look()
        else:
            # A bug of ours, or of an init= that raises what is no Exception: be loud, and slow.
            self._loop.call_exception_handler({"message": "replacing connections failed", "exception": error})
            self._serve_overdue(None)
            self._wake_in(_WATCH_INTERVAL)

    async def _open_in_place(self, pending: Sequence[tuple[float, Slot, RetireReason]]) -> AnyConnection | None:
        """Close one that is due, and open its replacement in the room that makes; None if all are in use."""
        self._promise = self._loop.create_future()
        try:
            if self._room is None or not self._room.is_vacant:
                at_rest: list[tuple[Slot, RetireReason]] = [
                    (slot, reason) for _, slot, reason in pending if slot.is_at_rest
                ]
                if not at_rest:
                    return None
                self._room, reason = at_rest[0]
                await asyncio.wait((self._retire(self._room.vacate(), reason),))
            return await self._host.open_replacement()
        finally:
            # Those who wait for it run only once what was opened has become the spare.
            self._promise.set_result(None)
            self._promise = None

    async def _go_on_after(
        self, error: Exception, attempt: int, pending: Sequence[tuple[float, Slot, RetireReason]]
    ) -> bool:
        """Report a failure, and wait for the next attempt; return False if there is none before the next call."""
        self.failures += 1
        self._failure = error
        is_full = isinstance(error, asyncpg.TooManyConnectionsError) and not self._one_for_one
        if is_full:
            self._one_for_one = True
            delay = 1 / self._per_second
        else:
            remaining: float | None = min((left for left, _, _ in pending if left > 0), default=math.inf)
            if self._overdue() and not self._host.is_refused(error):
                remaining = None  # the end of the outage is to be noticed soon
            chance = random.random()  # noqa: S311 - jitter
            delay = _policy.retry_delay(attempt, remaining=remaining, retry_after=None, chance=chance)
        self._serve_overdue(error)
        self._observers(
            ReplacementFailed(at=utc_now(self._clock), error=error, message=class_and_code(error), retry_in=delay)
        )
        self._close_ended()
        self._next_try = self._loop.time() + delay
        if not self._in_background and not is_full:
            return False
        await self._pause(delay, after_failure=True)
        return True

    def _close_ended(self) -> None:
        """Close what has ended: it serves nobody, and asyncpg 0.32 would keep it open for ever."""
        for slot, session in self._sessions():
            reason = session.ended(self._clock, self._retire_when, self.epoch)
            if reason is not None and slot.is_at_rest:
                self._retire(slot.vacate(), reason)

    async def _find_a_place(self, spare: AnyConnection) -> None:
        """Put `spare` where a connection is due, at once or when a busy one comes back; then see the old one gone."""
        self._spare = spare
        while not self._place() and self._spare is spare:
            wanted = self._pending() or self._host.connecting
            if not self._is_fit(spare) or not wanted:
                self._spare = None
                self._host.close_later(spare)
                break
            session = self._host.session_of(spare)
            left = math.inf
            if session is not None:
                left = session.seconds_until_due(self._clock, self._retire_when, self.epoch)
            await self._wait(left)
        if self._closing_old is not None:
            # No more than one connection above the pool's size, so the next one waits for this one to be gone.
            await asyncio.wait((self._closing_old,))
            self._closing_old = None

    def _place(self) -> bool:
        spare = self._usable_spare()
        if spare is None:
            return False
        if self._one_for_one:
            # Where room was made; or somebody has come to that slot meanwhile and is about to take it.
            if self._room is not None and self._room.is_vacant:
                self._settle(spare, self._room)
                return True
            if self._host.connecting:
                return False
        for _, slot, reason in self._pending():
            if slot.is_at_rest:
                self._swap(slot, spare, reason)
                return True
        return False

    def _usable_spare(self) -> AnyConnection | None:
        spare = self._spare
        return spare if spare is not None and self._is_fit(spare) else None

    def _is_fit(self, spare: AnyConnection) -> bool:
        """Return whether a replacement is better than what it is to replace."""
        reason = None if spare.is_closed() else self._due(spare)
        return not spare.is_closed() and (reason is None or (reason == "rotated" and spare is self._late_spare))

    def _swap(self, slot: Slot, spare: AnyConnection, reason: RetireReason) -> None:
        self._spare = None
        old = slot.vacate()
        slot.fill(spare)
        self._closing_old = self._retire(old, reason)
        self._wake_waiting()
        self._end_of_overdue()

    def _settle(self, spare: AnyConnection, slot: Slot) -> None:
        self._spare = None
        slot.settle(spare)
        self._tell()

    # -- small change

    def _set_calm(self) -> None:
        if self._has_hooks or self.is_making_room:
            self.calm.until = self.calm.until_wall = -math.inf
            return
        left = min(
            (session.seconds_left(self._clock, self._retire_when, self.epoch) for _, session in self._sessions()),
            default=math.inf,
        )
        left -= _CLOCK_GRAIN
        self.calm.until, self.calm.until_wall = self._clock.monotonic() + left, self._clock.time() + left

    def _make_room(self, *, wanted: bool) -> None:
        self.is_making_room = wanted
        self._set_calm()

    def _wake_in(self, seconds: float) -> None:
        self._alarm = Alarm(self._loop, self._clock, seconds, self.look)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _retire(self, connection: AnyConnection, reason: RetireReason) -> asyncio.Task[None]:
        self._host.retire(connection, reason)
        return self._host.close_later(connection)

    def _sessions(self) -> list[tuple[Slot, Session]]:
        found: list[tuple[Slot, Session]] = []
        for slot in self._host.slots():
            connection = slot.connection
            session = None if connection is None or connection.is_closed() else self._host.session_of(connection)
            if session is not None:
                found.append((slot, session))
        return found

    def _pending(self) -> list[tuple[float, Slot, RetireReason]]:
        """Return what is due as (seconds left, slot, reason), most urgent first."""
        pending: list[tuple[float, Slot, RetireReason]] = []
        for slot, session in self._sessions():
            reason = session.due(self._clock, self._retire_when, self.epoch)
            # What can be handed out waits for its end where nothing happens between calls.
            if reason is not None and (self._in_background or reason == "expired"):
                pending.append((session.seconds_left(self._clock, self._retire_when, self.epoch), slot, reason))
        return sorted(pending, key=lambda one: one[0])

    def _due(self, connection: AnyConnection) -> RetireReason | None:
        session = self._host.session_of(connection)
        return None if session is None else session.due(self._clock, self._retire_when, self.epoch)

    async def _wait(self, seconds: float) -> None:
        """Wait until something has happened, or for so long."""
        self._news = asyncio.Event()
        with anyio.move_on_after(min(max(seconds, _CLOCK_GRAIN), _WATCH_INTERVAL)):
            await self._news.wait()
        self._news = None

    async def _pause(self, seconds: float, *, after_failure: bool = False) -> None:
        """Wait for so long; not if an acquire waits, and after a failure only until there is reason to try again."""
        if seconds <= 0 or (self._waiting and not after_failure):
            return
        self._pausing, self._pauses_after_failure = asyncio.Event(), after_failure
        with anyio.move_on_after(seconds):
            await self._pausing.wait()
        self._pausing = None

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()


def _window(pending: Sequence[tuple[float, Slot, RetireReason]]) -> float | None:
    """Return the seconds until the first of what is `pending` ends; None: no end is known."""
    left = min((left for left, _, _ in pending), default=math.inf)
    return left if left < math.inf else None


# How many pools of an event loop are replacing connections.
_at_work: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, int]] = weakref.WeakKeyDictionary()
