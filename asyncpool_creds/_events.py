"""What happened: immutable facts for observers, none of which carries a secret."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from asyncpool_creds._event_log import Entry, EventLog, Sentence, duration, quoted

__all__ = [
    "ClockSkewDetected",
    "ConnectFailed",
    "ConnectionOpened",
    "ConnectionRetired",
    "CredentialInvalidated",
    "CredentialRefreshed",
    "CredentialRefused",
    "Event",
    "ExpiredSessionsServed",
    "Observer",
    "PoolReady",
    "RefreshFailed",
    "RefreshTokenExpiring",
    "ReplacementFailed",
    "RetireReason",
    "RevocationFailed",
    "StorageFailed",
    "ThresholdReduced",
    "TlsState",
    "log_event",
]

_logger = logging.getLogger("asyncpool_creds")

RetireReason: TypeAlias = Literal[
    "rotated", "expired", "max_lifetime", "drained", "before_acquire", "after_release", "reset_failed"
]

TlsState: TypeAlias = Literal["verified", "unverified", "none", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Args:
        at: When, as an aware UTC datetime.
    """

    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRefreshed(Event):
    """The source answered.

    Args:
        provider: Name of the source.
        fingerprint: Of the credential that is current now.
        generation: Its number; grows by one with every rotation.
        rotated: True if the secret is a new one; False if it is the one we had.
        expires_at: When it expires; None: never.
        refresh_at: When it will be refreshed; None: not on its own.
        duration: Seconds the source took.
    """

    provider: str
    fingerprint: str
    generation: int
    rotated: bool
    expires_at: datetime | None
    refresh_at: datetime | None
    duration: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshFailed(Event):
    """The source gave nothing usable.

    Args:
        provider: Name of the source.
        error: The exception; the source's own is its cause. None of its frames holds a secret.
        message: Its text, on one line.
        retryable: False if it refused for good.
        attempt: 1 for the first failure since the last success.
        retry_in: Seconds until the next attempt of the manager's own; None: only when asked.
        still_valid: True if a valid credential is being served meanwhile.
        valid_for: Seconds until callers fail: what is left of that credential; None: it has no end, or there is none.
    """

    provider: str
    # Not shown: the text of what is none of ours may quote a request.
    error: BaseException = field(repr=False)
    message: str
    retryable: bool
    attempt: int
    retry_in: float | None
    still_valid: bool
    valid_for: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialInvalidated(Event):
    """The current credential was reported as refused; it is not handed out until the source was asked again.

    Args:
        provider: Name of the source.
        fingerprint: Of the refused credential.
        generation: Its number.
    """

    provider: str
    fingerprint: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSkewDetected(Event):
    """A server refused a credential that had time left: its clock is ahead, so credentials are used for less long.

    Args:
        provider: Name of the source.
        skew: Seconds by which the server's clock is taken to be ahead, from now on.
        lifetime: Seconds the refused credential lives by what it says itself.
    """

    provider: str
    skew: float
    lifetime: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdReduced(Event):
    """A credential does not outlive the refresh threshold (or minimum validity) asked for: a part of its life is used.

    Args:
        provider: Name of the source.
        setting: The argument that was too long.
        requested: Seconds asked for.
        used: Seconds used instead.
        lifetime: Seconds the credential lives.
    """

    provider: str
    setting: Literal["refresh_threshold", "min_validity"]
    requested: float
    used: float
    lifetime: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageFailed(Event):
    """A token storage did not do what it was asked; what is in memory goes on being used.

    Args:
        provider: Name of the source.
        action: What was asked of the storage.
        error: The exception.
        message: What went wrong, and what hangs on it.
    """

    provider: str
    action: Literal["load", "save", "lock"]
    # Not shown: the text of what is none of ours may quote a request.
    error: BaseException = field(repr=False)
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshTokenExpiring(Event):
    """A refresh token, or whatever else credentials hang on, is about to expire, and only a new login helps.

    Args:
        provider: Name of the source.
        expires_at: When the issuer will refuse it.
        advice: What has to be done, and by whom.
    """

    provider: str
    expires_at: datetime
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationFailed(Event):
    """A superseded credential that nobody uses any more could not be revoked; it lives until its own end.

    Args:
        provider: Name of the source.
        error: The exception.
        message: What the source said, in our words.
    """

    provider: str
    # Not shown: the text of what is none of ours may quote a request.
    error: BaseException = field(repr=False)
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRefused(Event):
    """A server refused a credential at connect.

    Args:
        fingerprint: Of the refused credential.
        generation: Its number.
        sqlstate: The server's code, such as 28P01; None if the refusal came without one.
        retrying: True if a newer credential is being tried.
        error: The exception.
        message: Its text.
    """

    fingerprint: str
    generation: int
    sqlstate: str | None
    retrying: bool
    # Not shown: the text of what is none of ours may quote a request.
    error: BaseException = field(repr=False)
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReady(Event):
    """A pool has been initialised.

    Args:
        name: Where it leads, as ``user@host:port/database``; without a password.
        provider: Name of the source of its credentials; None in a pool without credentials.
        lifetime: Seconds that the credential of its first connection lives; None: it has no end, or there is none yet.
        tls: "verified": encrypted, and the server's certificate is checked for its name. "unverified": encrypted,
            for whoever answers. "none": in plain text over TCP. "local": a Unix socket.
        size: Connections that are open.
    """

    name: str
    provider: str | None
    lifetime: float | None
    tls: TlsState
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOpened(Event):
    """A pool opened a connection.

    Args:
        generation: Of the credential it was opened with; None in a pool without credentials.
        replacement: True if it was opened in the background to take another's place.
        duration: Seconds from the first byte to a usable session.
    """

    generation: int | None
    replacement: bool
    duration: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectFailed(Event):
    """A connect that acquires wait for failed in a way that passes, and is tried again (`connect_patience`).

    Args:
        error: The exception.
        message: Its class, and its SQLSTATE if it has one.
        waiting: How many acquires are waiting for it.
        retry_in: Seconds until the next attempt.
    """

    # Not shown: the text of what is none of ours may quote a request.
    error: BaseException = field(repr=False)
    message: str
    waiting: int
    retry_in: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRetired(Event):
    """A pool stopped handing a connection out, and closes it.

    Args:
        generation: Of the credential it was opened with; None in a pool without credentials.
        reason: Why.
        age: Seconds it lived.
    """

    generation: int | None
    reason: RetireReason
    age: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiredSessionsServed(Event):
    """A pool hands out sessions whose credential has ended, because no replacement can be had; or no longer does.

    Args:
        connections: How many sessions are past their end; 0: the last of them has been replaced, or closed.
        since: When the first of them came to its end, as an aware UTC datetime.
        error: Why they could not be replaced; None if that took too long, or at the end.
    """

    connections: int
    since: datetime
    error: BaseException | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacementFailed(Event):
    """A background replacement could not connect; the old connection serves on until its own end.

    Args:
        error: The exception.
        message: Its class, and its SQLSTATE if it has one.
        retry_in: Seconds until the next attempt.
    """

    # Not shown: the text of what is none of ours may quote a request.
    error: BaseException = field(repr=False)
    message: str
    retry_in: float


Observer: TypeAlias = Callable[[Event], None]


# What is said about each event: to add one, register a function for it.


@functools.singledispatch
def _entry_of(event: Event) -> Entry:
    return Entry(level=logging.DEBUG, sentences=(("%s", repr(event)),))


@_entry_of.register
def _(event: PoolReady) -> Entry:
    source = "no credentials of ours"
    if event.provider is not None:
        source = f"credentials of {quoted(event.provider)}"
        if event.lifetime is not None:
            source += f" that live for {duration(event.lifetime)}"
    tls = {
        "verified": "TLS, and the server is verified",
        "unverified": "TLS, but the server is not verified",
        "none": "no TLS",
        "local": "a Unix socket",
    }[event.tls]
    size = "1 connection" if event.size == 1 else f"{event.size} connections"
    what = "Pool %s is ready: %s, %s, %s."
    return Entry(level=logging.INFO, sentences=((what, quoted(event.name), size, source, tls),))


@_entry_of.register
def _(event: CredentialRefreshed) -> Entry:
    is_new = event.rotated or event.generation == 1
    what = "%s gave a new credential" if is_new else "%s gave the same credential again"
    life = "no end"
    if event.expires_at is not None:
        life = f"valid for {duration((event.expires_at - event.at).total_seconds())}"
    name = quoted(event.provider)
    return Entry(
        level=logging.DEBUG,
        sentences=((f"{what}: %s, generation %s, %s.", name, event.fingerprint, str(event.generation), life),),
        recoveries=((("refresh", event.provider), ("%s gives credentials again", name)),),
    )


@_entry_of.register
def _(event: RefreshFailed) -> Entry:
    what = "%s gives no new credential: %s." if event.still_valid else "%s gives no credential: %s."
    until = "Callers fail, since none is left that is valid."
    values: tuple[str, ...] = ()
    if event.still_valid:
        until = "Callers are served: the one in hand has no end."
        if event.valid_for is not None:
            until, values = "Callers fail in %s.", (duration(event.valid_for),)
    sentences: list[Sentence] = [(what, *_told(event.provider, event.message)), (until, *values)]
    if not event.retryable:
        sentences.append(("This is a refusal, and lasts until somebody changes something.",))
    if event.retry_in is None:
        sentences.append(("It is asked again when somebody needs a credential.",))
    else:
        sentences.append(("Next attempt in %s.", duration(event.retry_in)))
    return Entry(
        level=logging.WARNING if event.still_valid else logging.ERROR,
        sentences=tuple(sentences),
        failure=("refresh", event.provider),
        severity=0 if event.still_valid else 1,
        error=event.error,
    )


@_entry_of.register
def _(event: CredentialInvalidated) -> Entry:
    what = "A server refused the credential of %s, which is asked for another: %s, generation %s."
    values = (quoted(event.provider), event.fingerprint, str(event.generation))
    return Entry(level=logging.DEBUG, sentences=((what, *values),))


@_entry_of.register
def _(event: ThresholdReduced) -> Entry:
    what = "The credentials of %s live for %s, which is too short for %s: %s are used."
    asked = quoted(f"{event.setting}={event.requested:g}")
    values = (quoted(event.provider), duration(event.lifetime), asked, duration(event.used))
    return Entry(
        level=logging.WARNING,
        sentences=((what, *values),),
        failure=("threshold", event.provider, event.setting),
    )


@_entry_of.register
def _(event: StorageFailed) -> Entry:
    what = {
        "load": "The token storage of %s could not be read: %s.",
        "save": "The token storage of %s could not be written: %s.",
        "lock": "The token storage of %s could not be locked: %s.",
    }[event.action]
    return Entry(
        level=logging.ERROR,  # what only memory has is lost with the process
        sentences=((what, *_told(event.provider, event.message)),),
        failure=("storage", event.provider, event.action),
        error=event.error,
    )


@_entry_of.register
def _(event: RefreshTokenExpiring) -> Entry:
    what = "What the credentials of %s hang on ends in %s, at %s UTC: %s."
    left = duration((event.expires_at - event.at).total_seconds())
    moment = f"{event.expires_at.astimezone(UTC):%Y-%m-%d %H:%M}"
    return Entry(
        level=logging.WARNING,
        sentences=((what, quoted(event.provider), left, moment, quoted(event.advice)),),
        failure=("login", event.provider),
    )


@_entry_of.register
def _(event: RevocationFailed) -> Entry:
    what = "A superseded credential of %s could not be revoked, and lives until its own end: %s."
    return Entry(
        level=logging.WARNING,
        sentences=((what, *_told(event.provider, event.message)),),
        failure=("revocation", event.provider),
        error=event.error,
    )


@_entry_of.register
def _(event: CredentialRefused) -> Entry:
    code = "no SQLSTATE" if event.sqlstate is None else f"SQLSTATE {event.sqlstate}"
    what = "The server refused credential %s, generation %s: %s (%s)."
    values = (event.fingerprint, str(event.generation), quoted(event.message), code)
    outcome = "A newer one is tried." if event.retrying else "There is no newer one to try, so the connect fails."
    return Entry(
        level=logging.WARNING,
        sentences=((what, *values), (outcome,)),
        failure="refusal",
        severity=0 if event.retrying else 1,
        error=event.error,
    )


@_entry_of.register
def _(event: ConnectionOpened) -> Entry:
    what = (
        "Opened a connection%s in %s, to take another's place." if event.replacement else "Opened a connection%s in %s."
    )
    recoveries: tuple[tuple[str, Sentence], ...] = (
        ("refusal", ("The server accepts credentials again",)),
        ("connect", ("The server takes connections again",)),
    )
    if event.replacement:
        recoveries += (("replacement", ("Connections are replaced again",)),)
    return Entry(
        level=logging.DEBUG,
        sentences=((what, _of_generation(event.generation), duration(event.duration)),),
        recoveries=recoveries,
    )


@_entry_of.register
def _(event: ConnectionRetired) -> Entry:
    values = (_of_generation(event.generation), duration(event.age), quoted(event.reason))
    return Entry(level=logging.DEBUG, sentences=(("Retired a connection%s after %s: %s.", *values),))


@_entry_of.register
def _(event: ConnectFailed) -> Entry:
    waiting = "1 acquire is" if event.waiting == 1 else f"{event.waiting} acquires are"
    return Entry(
        level=logging.WARNING,
        sentences=(
            ("No connection can be opened: %s; %s waiting for one.", quoted(event.message), waiting),
            ("Next attempt in %s.", duration(event.retry_in)),
        ),
        failure="connect",
        error=event.error,
    )


@_entry_of.register
def _(event: ExpiredSessionsServed) -> Entry:
    if event.connections == 0:
        return Entry(
            level=logging.DEBUG,
            sentences=(("No session past its credential's end is served any more.",),),
            recoveries=(("expired sessions", ("Every session past its credential's end has been replaced",)),),
        )
    what = "1 session is" if event.connections == 1 else f"{event.connections} sessions are"
    moment = f"{event.since.astimezone(UTC):%H:%M:%S}"
    return Entry(
        level=logging.WARNING,
        sentences=(
            (
                "%s served past the end of the credential (since %s UTC), because no replacement can be had.",
                what,
                moment,
            ),
        ),
        failure="expired sessions",
    )


@_entry_of.register
def _(event: ClockSkewDetected) -> Entry:
    what = (
        "A server refused a credential of %s that had %s left, and took a newer one: its clock is ahead. "
        "Credentials are used for as much less from now on; set the clocks of both by NTP."
    )
    return Entry(
        level=logging.WARNING,
        sentences=((what, quoted(event.provider), duration(event.skew)),),
        failure=("skew", event.provider),
    )


@_entry_of.register
def _(event: ReplacementFailed) -> Entry:
    return Entry(
        level=logging.WARNING,
        sentences=(
            ("A connection could not be replaced: %s; the old one serves on.", quoted(event.message)),
            ("Next attempt in %s.", duration(event.retry_in)),
        ),
        failure="replacement",
        error=event.error,
    )


def _told(provider: str, message: str) -> tuple[str, str]:
    """Return the name of a source and what it said, without what the line says anyway."""
    return quoted(provider), quoted(message.removeprefix(f"{provider}: ").removesuffix("; see the cause"))


def _of_generation(generation: int | None) -> str:
    return "" if generation is None else f" of generation {generation}"


_shared_log: EventLog[Event] = EventLog(_entry_of)


def log_event(event: Event) -> None:
    """Log `event` to the logger ``asyncpool_creds``, as a sentence: the observer that is used where none is given.

    What fails is a warning when it begins, with the exception as ``exc_info``, and then one line a minute at most, with
    how often it has failed and how long callers are still served; it is an error as soon as callers fail, or if only
    memory keeps what a storage should. A recovery, and a pool that is ready, are at INFO. All else, the failures that
    were only counted included, is at DEBUG. The event is attached to the record as ``record.event``.

    What fails is told apart by the name of the source. Given as (or among) the `on_event` of a manager or a pool, this
    keeps a memory of their own for each, so that two sources of the same name do not answer for each other.
    """
    _shared_log(event)


class Observers:
    """The callbacks an owner of events calls, in the order in which they came.

    Args:
        on_event: The callbacks; None: `log_event`.
        is_short_lived: The owner lives for a moment only, so `log_event` has to remember for it what fails.
    """

    __slots__ = ("_callbacks", "_is_short_lived")

    def __init__(self, on_event: Observer | Iterable[Observer] | None, *, is_short_lived: bool = False) -> None:
        self._is_short_lived = is_short_lived
        if on_event is None:
            on_event = log_event
        self._callbacks: list[Observer] = []
        if callable(on_event):
            on_event = (on_event,)
        elif not isinstance(on_event, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _not_an_observer(on_event)
        for callback in on_event:
            _check(callback)
            self._callbacks.append(self._own(callback))

    def subscribe(self, callback: Observer) -> Callable[[], None]:
        """Call `callback` with every event from now on; return a function that ends that."""
        _check(callback)
        # Its own entry, so that ending this subscription twice does not end another one of the same callback.
        entry = _Subscription(self._own(callback))
        self._callbacks.append(entry)

        def unsubscribe() -> None:
            self._callbacks = [known for known in self._callbacks if known is not entry]

        return unsubscribe

    def __call__(self, event: Event) -> None:
        for callback in tuple(self._callbacks):
            try:
                callback(event)
            except Exception:
                # An observer's bug must not stop a refresh or lose a connection.
                _logger.exception("observer %s failed on %s", _name(callback), type(event).__name__)

    def _own(self, callback: Observer) -> Observer:
        return EventLog(_entry_of) if callback is log_event and not self._is_short_lived else callback


class _Subscription:
    __slots__ = ("__qualname__", "_callback")

    def __init__(self, callback: Observer) -> None:
        self._callback = callback
        self.__qualname__ = _name(callback)

    def __call__(self, event: Event) -> None:
        self._callback(event)


def _check(callback: object) -> None:
    if not callable(callback):
        raise _not_an_observer(callback)
    if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__):
        raise TypeError(
            f"on_event takes plain functions, and {_name(callback)} is a coroutine function, which nobody would await; "
            "let it put the event into a queue"
        )


def _not_an_observer(value: object) -> TypeError:
    return TypeError(f"on_event takes callables that accept an Event, not {type(value).__name__}")


def _name(callback: object) -> str:
    return str(getattr(callback, "__qualname__", type(callback).__qualname__))
