"""What happened: immutable facts for observers, none of which carries a secret."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Literal, TypeAlias

__all__ = [
    "ClockSkewDetected",
    "ConnectionOpened",
    "ConnectionRetired",
    "CredentialInvalidated",
    "CredentialRefreshed",
    "CredentialRefused",
    "Event",
    "ExpiredSessionsServed",
    "Observer",
    "RefreshFailed",
    "RefreshTokenExpiring",
    "ReplacementFailed",
    "RetireReason",
    "RevocationFailed",
    "StorageFailed",
    "ThresholdReduced",
    "log_event",
]

_logger = logging.getLogger("asyncpool_creds")

RetireReason: TypeAlias = Literal[
    "rotated", "expired", "max_lifetime", "drained", "before_acquire", "after_release", "reset_failed"
]


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


def log_event(event: Event) -> None:
    """Log `event` to the logger ``asyncpool_creds``: the observer that is used where none is given.

    Failures are warnings while something valid is served and errors once nothing is, or
    if only memory keeps what a storage should; all else is at DEBUG. The event is attached
    to the record as ``record.event``.
    """
    level = logging.DEBUG
    match event:
        case RefreshFailed(still_valid=False) | StorageFailed():
            level = logging.ERROR
        case (
            RefreshFailed()
            | RefreshTokenExpiring()
            | ReplacementFailed()
            | ExpiredSessionsServed()
            | ClockSkewDetected()
            | RevocationFailed()
            | ThresholdReduced()
            | CredentialRefused()
        ):
            level = logging.WARNING
        case _:
            pass
    if _logger.isEnabledFor(level):
        details = " ".join(
            f"{f.name}={getattr(event, f.name)!s}" for f in fields(event) if f.name not in ("at", "error")
        )
        _logger.log(level, "%s %s", type(event).__name__, details, extra={"event": event})


class Observers:
    """The callbacks an owner of events calls, in the order in which they came."""

    __slots__ = ("_callbacks",)

    def __init__(self, on_event: Observer | Iterable[Observer] | None) -> None:
        if on_event is None:
            on_event = log_event
        self._callbacks: list[Observer] = []
        if callable(on_event):
            on_event = (on_event,)
        elif not isinstance(on_event, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _not_an_observer(on_event)
        for callback in on_event:
            _check(callback)
            self._callbacks.append(callback)

    def subscribe(self, callback: Observer) -> Callable[[], None]:
        """Call `callback` with every event from now on; return a function that ends that."""
        _check(callback)
        # Its own entry, so that ending this subscription twice does not end another one of the same callback.
        entry = _Subscription(callback)
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
