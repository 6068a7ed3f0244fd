"""The token manager: keeps one good credential at hand, whatever its source does."""

# Stamps are made, renewed and refused by managers only, so their setters are private to this module.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import math
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final, Literal, Self

import anyio

from asyncpool_creds import _fork, _policy
from asyncpool_creds._alarm import Alarm
from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import (
    CredentialExpired,
    CredentialUnavailable,
    ManagerClosed,
    ProviderError,
    ProviderTimeout,
)
from asyncpool_creds._events import (
    ClockSkewDetected,
    CredentialInvalidated,
    CredentialRefreshed,
    Event,
    Observer,
    Observers,
    RefreshFailed,
    RevocationFailed,
    ThresholdReduced,
)
from asyncpool_creds._provider import (
    CredentialFunction,
    CredentialProvider,
    as_provider,
    ask,
    close_provider,
    foreign_error,
    invalidate_at,
    let_report,
    provider_name,
    revoke_at,
    session_lifetime_of,
)
from asyncpool_creds._tracebacks import clear_frames

__all__ = ["ManagerStats", "Stamp", "TokenManager"]

# anyio imports what it runs on with its first use, which would hold up the event loop for 10 ms and more.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")

# A credential that was refused is fetched anew on the next call, or so many seconds later if none comes.
_REFUSED_FOR: Final = 60.0
# Timers are early by a rounding error, uvloop's by half a millisecond: to wait for the rest would take another one.
_TIMER_GRAIN: Final = 0.001
_NEVER: Final = -math.inf

# Every `get` asks it, and is spared the look into asyncio.
_get_running_loop: Final = asyncio.get_running_loop


class Stamp:
    """A credential as a manager holds it: what a connection is marked with.

    A renewal (the same secret with a later expiry) moves the deadlines of the stamp that
    is already out there, so every connection opened with the secret lives longer too.

    Attributes:
        credential: The credential.
        generation: 1 for the manager's first secret, one more with every rotation.
        obtained_at: When the manager got it, as an aware UTC datetime.
        is_superseded: True once the manager holds a newer secret.
    """

    __slots__ = (
        "__weakref__",
        "_connections",
        "_expires",
        "_is_lent",
        "_mono",
        "_refresh",
        "_refused",
        "_stale_mono",
        "_stale_wall",
        "_unused",
        "_usable",
        "_wall",
        "credential",
        "generation",
        "is_superseded",
        "obtained_at",
    )

    def __init__(self, generation: int, unused: Callable[[Stamp], None]) -> None:
        self.generation: int = generation
        self.is_superseded: bool = False
        self._refused = False
        self._connections = 0
        self._is_lent = False  # to somebody who does not say when he is done
        self._unused = unused

    def _renew(self, credential: Credential, plan: _policy.RefreshPlan, wall: float, mono: float) -> None:
        self.credential: Credential = credential
        self.obtained_at: datetime = datetime.fromtimestamp(wall, UTC)
        self._wall, self._mono = wall, mono
        self._replan(plan)

    def _replan(self, plan: _policy.RefreshPlan) -> None:
        # Each moment is seconds since `obtained_at`: it has come when either clock says so.
        self._refresh = _or_never(plan.refresh_in)  # always before `_usable`
        self._usable = _or_never(plan.usable_for)
        self._expires = _or_never(plan.expires_in)
        self._stale_wall, self._stale_mono = self._wall + self._refresh, self._mono + self._refresh

    def _age(self, clock: Clock) -> float:
        return max(clock.monotonic() - self._mono, clock.time() - self._wall)

    @property
    def expires_at(self) -> datetime | None:
        """When the server will refuse it, as an aware UTC datetime; None: never."""
        return self.credential.expires_at or self._after(self._expires)

    @property
    def refresh_at(self) -> datetime | None:
        """When the manager will ask for a newer one, as an aware UTC datetime; None: not on its own."""
        return self._after(self._refresh)

    def _after(self, seconds: float) -> datetime | None:
        try:
            return self.obtained_at + timedelta(seconds=seconds)
        except OverflowError:  # never, or after the year 9999
            return None

    def is_stale(self, clock: Clock) -> bool:
        """Return whether it is time to refresh: it was refused, or its time has come."""
        return self._refused or clock.monotonic() >= self._stale_mono or clock.time() >= self._stale_wall

    def seconds_until_stale(self, clock: Clock) -> float:
        """Return the seconds until it is time to refresh: not positive once it is, infinity if that never comes."""
        return 0.0 if self._refused else self._refresh - self._age(clock)

    def is_usable(self, clock: Clock) -> bool:
        """Return whether it may be handed out: not refused, and valid for the minimum validity yet."""
        return not self._refused and self._age(clock) < self._usable

    def is_valid(self, clock: Clock) -> bool:
        """Return whether the server would take it: not refused, and not expired."""
        return not self._refused and self._age(clock) < self._expires

    def seconds_left(self, clock: Clock) -> float:
        """Return the seconds until neither it nor a session opened with it is used any more; infinity: never.

        That is its expiry, or nine tenths of its life if the server ends its sessions with it.
        """
        return self._expires - self._age(clock)

    def hold(self) -> None:
        """Count a connection that is being opened with it."""
        self._connections += 1

    def let_go(self) -> None:
        """Count a connection as gone."""
        self._connections -= 1
        if self._connections == 0:
            self._unused(self)

    def __repr__(self) -> str:
        return f"<Stamp generation={self.generation} {self.credential!r}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerStats:
    """Counters of a manager since it was made.

    Args:
        fetches: Requests made to the source.
        failures: Requests that gave nothing usable.
        rotations: Times the secret changed; the first one does not count.
        generation: Of the current secret; 0 before the first.
        seconds_left: Until the current credential expires; None if there is none, or it never does.
    """

    fetches: int
    failures: int
    rotations: int
    generation: int
    seconds_left: float | None


@dataclass(slots=True)
class _Failure:
    """The last request to the source gave nothing usable.

    Args:
        error: What it said.
        number: Of all failures of this manager.
        attempt: 1 for the first failure since the last success.
        at: When.
        retry_at: When the source may be asked again on the manager's own account, on the monotonic clock.
        shared_until: Until when callers are given the same error, on the monotonic clock.
        is_shown: True once a caller has been given the error with all that led to it.
    """

    error: ProviderError
    number: int
    attempt: int
    at: datetime
    retry_at: float
    shared_until: float
    is_shown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """What a manager was told about durations, in seconds."""

    fetch_timeout: float
    default_lifetime: float | None
    patience: float


class TokenManager:
    """Keep a credential fresh: one fetch at a time, in the background, shared by all callers.

    Use it as an async context manager, or call `start` and `aclose`. It binds to the event
    loop of its first use. After a fork, the child starts afresh with the credential it inherited.

    Args:
        provider: The source: a provider, or a function that returns a `Credential` or a token; one
            that is not async is called in a thread. The manager closes it with itself.
        refresh_threshold: Seconds (or a timedelta) before expiry at which a refresh is
            due; default: the smaller of five minutes and a fifth of the life. A threshold
            that is not shorter than a credential's life is cut to a fifth of it. A
            `Credential.refresh_at` comes first. Refreshes are jittered: up to a tenth of
            the time that is left to expiry later.
        background: False: no timer and no task between calls (serverless); staleness is
            noticed, and refreshed, on the next call.
        fetch_timeout: Seconds a single fetch may take.
        min_validity: Seconds for which a credential is still good when it is handed out;
            default: the smaller of ten seconds and a twentieth of the life.
        default_lifetime: Seconds (or a timedelta) that a credential is taken to live if it
            does not say so itself; default: for ever.
        patience: Seconds (or a timedelta) for which a caller who would get an error waits for the next
            attempts instead, at the start too; default: none. A deadline of the caller's own ends it sooner.
        on_event: An observer, or several; default: `log_event`.
        clock: Where the time comes from, for tests.

    Raises:
        TypeError: `provider` or `on_event` is not what it should be.
        ValueError: A duration is negative, not finite or not a number.
    """

    def __init__(
        self,
        provider: CredentialProvider | CredentialFunction,
        *,
        refresh_threshold: float | timedelta | None = None,
        background: bool = True,
        fetch_timeout: float | timedelta = 30.0,
        min_validity: float | timedelta | None = None,
        default_lifetime: float | timedelta | None = None,
        patience: float | timedelta = 0.0,
        on_event: Observer | Iterable[Observer] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._policy = _policy.RefreshPolicy(
            None if refresh_threshold is None else _policy.parse_seconds("refresh_threshold", refresh_threshold),
            None if min_validity is None else _policy.parse_seconds("min_validity", min_validity, zero=True),
        )
        # In one object, because an instance of more than thirty attributes takes twice the memory in CPython.
        self._times = _Times(
            fetch_timeout=_policy.parse_seconds("fetch_timeout", fetch_timeout),
            default_lifetime=(
                None if default_lifetime is None else _policy.parse_seconds("default_lifetime", default_lifetime)
            ),
            patience=_policy.parse_seconds("patience", patience, zero=True),
        )
        self._clock = clock
        self._provider = as_provider(provider, clock)
        self._name = provider_name(self._provider)
        self._background = background
        self._observers = Observers(on_event)

        self._stamp: Stamp | None = None
        self._failure: _Failure | None = None
        self._not_before = _NEVER  # the source had nothing newer: no sooner than this again
        self._answered_at = _NEVER  # when the source last gave a credential, on the monotonic clock
        self._invalidations = 0
        self._invalidated_until = _NEVER  # until then, another invalidation is ignored
        self._asked_at = _NEVER  # when the source was last asked, on the monotonic clock
        self._skew = 0.0  # seconds by which the server's clock is ahead, as far as its refusals tell
        self._warned_of: tuple[str, ...] = ()
        self._fetches = self._failures = self._rotations = self._generation = 0

        self._loop: asyncio.AbstractEventLoop | None = None
        self._flight: asyncio.Task[ProviderError | None] | None = None
        self._fetching: anyio.CancelScope | None = None
        self._waiters: dict[asyncio.Future[ProviderError | None], None] = {}  # in order of arrival
        self._alarm: Alarm | None = None
        self._revocations: tuple[asyncio.Task[None], ...] = ()
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        let_report(self._provider, self._observers)
        _fork.watch(self)

    # -- what callers use

    async def start(self) -> Self:
        """Fetch the first credential, so that a broken source shows now and not at the first connect.

        Raises:
            CredentialUnavailable: The source gave nothing within `patience`; it may be tried again.
            ManagerClosed: The manager is closed.
            RuntimeError: The manager belongs to another event loop.
        """
        await self.stamp()  # not `get`, which lends it
        return self

    def prefetch(self) -> None:
        """Begin to fetch the first credential, without waiting for it, unless nothing may happen between calls.

        A failure is an event, and the source is asked on in the background.

        Raises:
            ManagerClosed: The manager is closed.
            RuntimeError: The manager belongs to another event loop, or none is running.
        """
        loop = self._running_loop()
        if self._background and self._stamp is None and self._flight is None and self._may_retry():
            self._take_off(loop)

    async def get(self) -> Credential:
        """Return a credential that is valid now.

        A fresh one is returned without suspending, a stale one too, while it is refreshed
        behind your back. Otherwise this waits for the fetch that all callers share;
        cancelling one of them changes nothing for the others. An error is shared for a second at most, unless the
        source asked for more with Retry-After (a minute at most): then the next call asks the source again.

        Raises:
            CredentialExpired: Nothing valid is held and the source is failing; its error is the cause. The first
                caller gets that with all that led to it, the others in one line.
            CredentialUnavailable: The same, where the source has never given a credential.
            ManagerClosed: The manager is closed.
            RuntimeError: The manager belongs to another event loop.
        """
        stamp, clock = self._stamp, self._clock
        if (
            stamp is None
            # `is_stale`, without a call: some ask on every request of their own.
            or clock.monotonic() >= stamp._stale_mono
            or clock.time() >= stamp._stale_wall
            or stamp._refused
            or self._loop is not _get_running_loop()
            or self._closed
        ):
            stamp = await self.stamp()
        stamp._is_lent = True
        return stamp.credential

    async def __call__(self) -> str:
        """Return the password that `get` returns: for whoever takes a function as one.

        ``asyncpg.create_pool(password=manager)`` is one; SQLAlchemy's ``connect_args`` are another.
        """
        return (await self.get()).password

    async def stamp(self) -> Stamp:
        """Return what `get` returns, with its generation and deadlines: what a pool marks a connection with."""
        give_up_at = self._monotonic() + self._times.patience
        while True:
            loop = self._running_loop()
            stamp = self._stamp
            if stamp is not None and stamp.is_usable(self._clock):
                if self._flight is None and stamp.is_stale(self._clock) and self._may_retry():
                    self._take_off(loop)
                return stamp
            if stamp is not None and self._is_all_there_is(stamp):
                return stamp
            failure = self._failure
            if self._flight is not None or failure is None or not self._is_error_shared(failure):
                error = await self._land(loop)
                self._running_loop()  # a close in between is the better explanation
                failure = self._failure
                if error is None or failure is None:
                    continue
            stamp = self._stamp
            if stamp is not None and stamp.seconds_left(self._clock) > 0:
                stamp._refused = False  # nothing better is to be had
                return stamp
            now = self._monotonic()
            if now >= give_up_at:
                raise self._nothing_valid(failure)
            await self._pause(loop, min(failure.shared_until, give_up_at) - now)

    def _is_all_there_is(self, stamp: Stamp) -> bool:
        """Return whether `stamp`, though short of its minimum validity, is what the source has just confirmed."""
        return self._flight is None and self._monotonic() < self._not_before and stamp.is_valid(self._clock)

    def _nothing_valid(self, failure: _Failure) -> CredentialExpired:
        """Return the error for a caller; the first one who meets a failure is shown all that led to it."""
        stamp = self._stamp
        kind = CredentialUnavailable if stamp is None else CredentialExpired
        last = "never gave one" if stamp is None else f"gave the last one at {stamp.obtained_at:%H:%M:%S} UTC"
        message = f"no valid credential: {self._name} {last}, and the latest request failed: {failure.error}"
        cause = failure.error
        if failure.is_shown:
            # A thousand callers would log the same chain a thousand times.
            message += f" (failure {failure.number}, at {failure.at:%H:%M:%S} UTC)"
            cause = ProviderError(
                f"failure {failure.number} of {self._name}; its first caller was given all that led to it",
                retryable=failure.error.retryable,
                retry_after=failure.error.retry_after,
            )
        error = kind(message)
        error.__cause__ = cause
        failure.is_shown = True
        return error

    async def _pause(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Wait for so long, or until a fetch has ended."""
        waiter: asyncio.Future[ProviderError | None] = loop.create_future()
        self._waiters[waiter] = None
        timer = loop.call_later(max(seconds, _TIMER_GRAIN), _settle, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)

    @property
    def current(self) -> Credential | None:
        """The credential that `get` would return without waiting; None if it would wait."""
        stamp = self._stamp
        if stamp is None or not (stamp.is_usable(self._clock) or self._is_all_there_is(stamp)):
            return None
        stamp._is_lent = True
        return stamp.credential

    async def refresh(self) -> Credential:
        """Fetch now, or share the fetch that is under way, and return the credential that is current then.

        Raises:
            ProviderError: The source gave nothing. What was current before still is.
            ManagerClosed: The manager is closed.
            RuntimeError: The manager belongs to another event loop.
        """
        error = await self._land(self._running_loop())
        if error is not None:
            self._running_loop()  # a close in between is the better explanation
            raise error.with_traceback(None)  # it is shared: each waiter would add its own frames
        return await self.get()

    def invalidate(self, credential: Credential) -> None:
        """Report that a server refused `credential`; it is not handed out again until the source was asked.

        Nothing happens if it is no longer the current one. Where new credentials are refused
        time after time (a wrong role is not a stale token), calls are ignored for a while that
        doubles up to a minute. If the source cannot be reached, the credential stays in use
        until it expires: it may be good elsewhere.
        """
        stamp, now = self._stamp, self._monotonic()
        if self._closed or stamp is None or stamp._refused or not stamp.credential.is_same_secret(credential):
            return
        if now < self._invalidated_until:
            return
        # In a row: what the source gave after the one before was refused, is refused as well.
        left = max(stamp.seconds_left(self._clock), 0.0)
        backoff = _policy.invalidation_backoff(self._invalidations, remaining=left)
        in_a_row = now - self._answered_at < 2 * backoff + _policy.UNAVAILABLE_RETRY_CAP
        self._invalidations = self._invalidations + 1 if in_a_row else 1
        self._invalidated_until = now + _policy.invalidation_backoff(self._invalidations, remaining=left)
        stamp._refused = True
        if self._alarm is not None:
            self._alarm.hurry(_REFUSED_FOR)
        invalidate_at(self._provider, stamp.credential)
        self._emit(
            CredentialInvalidated(
                at=utc_now(self._clock),
                provider=self._name,
                fingerprint=stamp.credential.fingerprint,
                generation=stamp.generation,
            )
        )

    def learn_skew(self, refused: Stamp, seconds_left: float) -> None:
        """Note that a server refused `refused` with `seconds_left`, and took a newer credential.

        Its clock is ahead by that much at least, so credentials are refreshed, and no longer handed out, earlier by it.
        """
        skew = _policy.plausible_skew(seconds_left)
        if skew <= self._skew or self._closed:
            return
        is_news = self._skew == 0.0
        self._skew = skew
        stamp = self._stamp
        if stamp is not None and stamp.credential.expires_at is not None:
            _, _, plan = self._plan(stamp.credential, stamp._wall)
            stamp._replan(plan)
            self._stop_alarm()
            if self._flight is None:
                self._arm()
        if is_news:
            expires_at = refused.credential.expires_at
            life = 0.0 if expires_at is None else (expires_at - refused.obtained_at).total_seconds()
            self._emit(ClockSkewDetected(at=utc_now(self._clock), provider=self._name, skew=skew, lifetime=life))

    def subscribe(self, callback: Observer) -> Callable[[], None]:
        """Call `callback` with every event from now on; return a function that ends that."""
        return self._observers.subscribe(callback)

    @property
    def background(self) -> bool:
        """Whether it refreshes, and lets pools replace connections, between calls."""
        return self._background

    @property
    def is_failing(self) -> bool:
        """Whether nothing valid is held, and the source has just failed or does not answer."""
        if self._stamp is not None and self._stamp.is_usable(self._clock):
            return False
        if self._flight is not None and self._monotonic() - self._asked_at >= _policy.ERROR_CACHE_TTL:
            return True
        return self._failure is not None and (self._flight is not None or self._is_error_shared(self._failure))

    def _is_error_shared(self, failure: _Failure) -> bool:
        return self._monotonic() < failure.shared_until

    @property
    def session_lifetime(self) -> float | None:
        """Seconds after which the server ends any session, as far as the provider knows."""
        return session_lifetime_of(self._provider)

    @property
    def clock(self) -> Clock:
        """Where this manager takes the time from."""
        return self._clock

    @property
    def name(self) -> str:
        """The name of the source, for messages."""
        return self._name

    def stats(self) -> ManagerStats:
        """Return the counters as they stand."""
        left = None if self._stamp is None else self._stamp.seconds_left(self._clock)
        return ManagerStats(
            fetches=self._fetches,
            failures=self._failures,
            rotations=self._rotations,
            generation=self._generation,
            seconds_left=None if left is None or math.isinf(left) else left,
        )

    async def aclose(self) -> None:
        """Stop refreshing, wake everyone who waits with `ManagerClosed`, and close the provider.

        May be called again, and from several tasks: all wait for the same end. If the caller
        is cancelled, closing goes on by itself.
        """
        if self._closing is None:
            loop = asyncio.get_running_loop()
            if self._loop is not None and self._loop is not loop:
                if not self._loop.is_closed():
                    raise self._wrong_loop(loop)
                self._leave_loop()
            self._closed = True
            self._stop_alarm()
            self._wake(None)
            self._closing = loop.create_task(self._shut_down(), name=f"asyncpool_creds: close {self._name}")
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:
            await self.aclose()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        if self._closed:
            state = "closed"
        elif self._stamp is None:
            state = "empty"
        else:
            usable = self._stamp.is_usable(self._clock)
            stale = self._stamp.is_stale(self._clock)
            state = f"{self._stamp.credential!r} " + ("expired" if not usable else "stale" if stale else "fresh")
        return f"<TokenManager {self._name} generation={self._generation} {state}>"

    # -- the single flight

    async def _land(self, loop: asyncio.AbstractEventLoop) -> ProviderError | None:
        """Wait for the flight that is under way, or a new one; return its error.

        Every waiter has a future of its own, so no cancellation passes between it and the flight.
        """
        if self._flight is None:
            self._take_off(loop)
        waiter: asyncio.Future[ProviderError | None] = loop.create_future()
        self._waiters[waiter] = None
        try:
            return await waiter
        finally:
            self._waiters.pop(waiter, None)

    def _take_off(self, loop: asyncio.AbstractEventLoop) -> None:
        self._stop_alarm()
        # An empty context: the flight serves everyone, so the first caller's trace or request is not its own.
        context = contextvars.Context()
        self._flight = loop.create_task(
            self._fly(), name=f"asyncpool_creds: refresh from {self._name}", context=context
        )
        self._flight.add_done_callback(self._landed, context=context)

    async def _fly(self) -> ProviderError | None:
        self._fetches += 1
        started = self._asked_at = self._monotonic()
        credential: Credential | None = None
        try:
            # A scope and not a task cancellation: a provider that swallows one is cancelled again. Made in
            # the task: in the callback of a timer, anyio cannot tell what loop it is on.
            with anyio.move_on_after(self._times.fetch_timeout) as self._fetching:
                credential = await ask(self._provider)
            if credential is None:
                raise ProviderTimeout(
                    f"{self._name}: no answer within fetch_timeout ({self._times.fetch_timeout:g} s); "
                    "check that this host can reach the source, or allow more time"
                )
            self._adopt(credential, self._monotonic() - started)
        except ProviderError as error:
            return error
        return None

    def _landed(self, flight: asyncio.Task[ProviderError | None]) -> None:
        self._flight = self._fetching = None
        if self._closed:
            if not flight.cancelled():
                flight.exception()
            return
        error: ProviderError | None
        if flight.cancelled():
            error = ProviderError(f"{self._name}: the fetch was cancelled by the provider, or by a loop that is ending")
        elif (bug := flight.exception()) is not None:
            error = ProviderError(f"{self._name}: {foreign_error(bug)}")
            error.__cause__ = bug
        else:
            error = flight.result()
        if error is not None:
            self._fail(error)
        self._wake(error)
        self._arm()

    def _adopt(self, credential: Credential, duration: float) -> None:
        wall, mono = self._clock.time(), self._monotonic()
        if credential.expires_at is not None and (late := wall - credential.expires_at.timestamp()) >= 0:
            raise ProviderError(
                f"{self._name}: handed out a credential that expired {late:.0f} s ago; "
                "either the source caches too long, or this host's clock is ahead"
            )
        lifetime, hint, plan = self._plan(credential, wall)
        stamp = self._stamp
        self._failure = None
        self._answered_at = mono
        if stamp is not None and stamp.credential.is_same_secret(credential):
            rotated = False
            stamp._refused = False
            if _says_more(credential, stamp.credential):
                stamp._renew(credential, plan, wall, mono)
            self._not_before = mono + _policy.same_secret_delay(remaining=lifetime, hint=hint)
        else:
            rotated = stamp is not None
            if stamp is not None:
                stamp.is_superseded = True
                self._rotations += 1
            self._generation += 1
            superseded = stamp
            self._stamp = stamp = Stamp(self._generation, self._revoke_if_unused)
            stamp._renew(credential, plan, wall, mono)
            if superseded is not None:
                self._revoke_if_unused(superseded)
            self._not_before = _NEVER
            self._warn_of_cuts(plan)
        self._emit(
            CredentialRefreshed(
                at=utc_now(self._clock),
                provider=self._name,
                fingerprint=credential.fingerprint,
                generation=stamp.generation,
                rotated=rotated,
                expires_at=stamp.expires_at,
                refresh_at=stamp.refresh_at,
                duration=duration,
            )
        )

    def _plan(self, credential: Credential, wall: float) -> tuple[float | None, float | None, _policy.RefreshPlan]:
        """Return the life of a credential obtained at `wall`, its hint, and the plan made of both, all in seconds."""
        lifetime = self._times.default_lifetime
        if credential.expires_at is not None:
            lifetime = _policy.shortened(credential.expires_at.timestamp() - wall, skew=self._skew)
        if lifetime is not None and credential.ends_session:
            lifetime *= _policy.ENDS_SESSION_SHARE
        hint = None if credential.refresh_at is None else credential.refresh_at.timestamp() - wall
        plan = self._policy.plan(lifetime=lifetime, hint=hint, chance=random.random())  # noqa: S311 - jitter
        return lifetime, hint, plan

    def _fail(self, error: ProviderError) -> None:
        now, stamp = self._monotonic(), self._stamp
        self._failures += 1
        attempt = 1 if self._failure is None else self._failure.attempt + 1
        if stamp is not None:
            stamp._refused = False  # nothing better is to be had
        still_valid = stamp is not None and stamp.is_valid(self._clock)
        remaining = stamp.seconds_left(self._clock) if stamp is not None and still_valid else None
        delay = _policy.retry_delay(
            attempt,
            remaining=remaining,
            retry_after=error.retry_after,
            retryable=error.retryable,
            chance=random.random(),  # noqa: S311 - jitter
        )
        ttl = _policy.error_cache_ttl(retry_after=error.retry_after)
        self._failure = _Failure(error, self._failures, attempt, utc_now(self._clock), now + delay, now + ttl)
        self._emit(
            RefreshFailed(
                at=utc_now(self._clock),
                provider=self._name,
                error=error,
                message=" ".join(str(error).split()),
                retryable=error.retryable,
                attempt=attempt,
                retry_in=delay if self._background else None,
                still_valid=still_valid,
                valid_for=None if remaining is None or math.isinf(remaining) else remaining,
            )
        )

    def _wake(self, error: ProviderError | None) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(error)

    # -- the end of what is superseded

    def _revoke_if_unused(self, stamp: Stamp) -> None:
        if not stamp.is_superseded or stamp._connections or stamp._is_lent or self._closed or self._loop is None:
            return
        revocation = revoke_at(self._provider, stamp.credential)
        if revocation is not None:
            stamp._is_lent = True  # once is enough
            task = self._loop.create_task(self._revoke(revocation), name=f"asyncpool_creds: revoke at {self._name}")
            self._revocations += (task,)
            task.add_done_callback(self._revoked)

    def _revoked(self, task: asyncio.Task[None]) -> None:
        self._revocations = tuple(one for one in self._revocations if one is not task)

    async def _revoke(self, revocation: Coroutine[None, None, None]) -> None:
        try:
            await revocation
        except ProviderError as error:
            self._report_revocation(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the credential ends by itself
            failure = ProviderError(f"{self._name}: revoke() raised {type(error).__name__}; see the cause")
            failure.__cause__ = error
            self._report_revocation(failure)

    def _report_revocation(self, error: ProviderError) -> None:
        clear_frames(error)
        self._emit(RevocationFailed(at=utc_now(self._clock), provider=self._name, error=error, message=str(error)))

    # -- the alarm

    def _may_retry(self) -> bool:
        retry_at = _NEVER if self._failure is None else self._failure.retry_at
        return self._monotonic() >= max(self._not_before, retry_at)

    def _arm(self) -> None:
        """Set the alarm for the next refresh or retry."""
        failure = self._failure
        if not self._background or self._closed or self._loop is None:
            return
        now = self._monotonic()
        due = _NEVER if failure is None else max(failure.retry_at, self._not_before)
        if self._stamp is not None and self._stamp.is_usable(self._clock):
            due = max(due, self._not_before, now + self._stamp.seconds_until_stale(self._clock))
        if not math.isinf(due):
            self._alarm = Alarm(self._loop, self._clock, due - now, self._rung)

    def _rung(self) -> None:
        self._alarm = None
        is_due = self._stamp is None or self._stamp.seconds_until_stale(self._clock) <= _TIMER_GRAIN
        if is_due and self._may_retry():
            self._take_off(asyncio.get_running_loop())
        else:
            self._arm()

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    # -- loops, forks and the end

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise ManagerClosed(f"the token manager of {self._name} is closed; make a new one")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                if not self._loop.is_closed():
                    raise self._wrong_loop(loop)
                self._leave_loop()
            self._loop = loop
            self._arm()
        return loop

    def _wrong_loop(self, loop: asyncio.AbstractEventLoop) -> RuntimeError:
        return RuntimeError(
            f"the token manager of {self._name} belongs to event loop {self._loop!r} and was used from {loop!r}; "
            "make one manager per event loop (inside each asyncio.run)"
        )

    def _forked(self) -> None:
        self._leave_loop()

    def _leave_loop(self) -> None:
        """Forget a loop that is gone: closed, or the parent's after a fork. The credential stays."""
        # Its task and alarm are kept, because a pending task that is collected complains, and closing it
        # would run the provider's clean-up, in a child on the parent's sockets.
        _left_behind.append((self._flight, self._alarm, self._closing, self._waiters, self._revocations))
        self._loop = self._flight = self._alarm = self._closing = None
        self._waiters, self._revocations = {}, ()

    async def _shut_down(self) -> None:
        if self._flight is not None and self._fetching is not None:
            self._fetching.cancel()  # of this flight: its task took its first step before this one
            await asyncio.wait((self._flight,))
        if self._revocations:
            await asyncio.wait(self._revocations)
        try:
            await close_provider(self._provider)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Else whoever waits for the end would take itself for cancelled.
            raise RuntimeError(f"{self._name}: aclose() let the cancellation of a task of its own through") from error

    # -- small change

    def _monotonic(self) -> float:
        return self._clock.monotonic()

    def _emit(self, event: Event) -> None:
        self._observers(event)

    def _warn_of_cuts(self, plan: _policy.RefreshPlan) -> None:
        cuts: tuple[tuple[Literal["refresh_threshold", "min_validity"], float | None, float | None], ...] = (
            ("refresh_threshold", self._policy.threshold, plan.threshold_cut),
            ("min_validity", self._policy.min_validity, plan.min_validity_cut),
        )
        for setting, requested, used in cuts:
            if used is None or requested is None or plan.expires_in is None or setting in self._warned_of:
                continue
            self._warned_of += (setting,)
            self._emit(
                ThresholdReduced(
                    at=utc_now(self._clock),
                    provider=self._name,
                    setting=setting,
                    requested=requested,
                    used=used,
                    lifetime=plan.expires_in,
                )
            )


def _settle(waiter: asyncio.Future[ProviderError | None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _says_more(answer: Credential, held: Credential) -> bool:
    """Return whether the same secret came with news: with other times, or, if it states none, as a confirmation."""
    return answer.expires_at is None or (answer.expires_at, answer.refresh_at) != (held.expires_at, held.refresh_at)


_left_behind: list[object] = []
