from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime

import pytest

from asyncpool_creds import (
    ConnectionOpened,
    ConnectionRetired,
    CredentialInvalidated,
    CredentialRefreshed,
    CredentialRefused,
    Event,
    ProviderError,
    RefreshFailed,
    RefreshTokenExpiring,
    ReplacementFailed,
    RevocationFailed,
    StorageFailed,
    ThresholdReduced,
    log_event,
)
from asyncpool_creds._events import Observers
from asyncpool_creds.testing import RecordingObserver

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)
REFRESHED = CredentialRefreshed(
    at=NOON,
    provider="Vault",
    fingerprint="0badcafe",
    generation=2,
    rotated=True,
    expires_at=NOON,
    refresh_at=None,
    duration=0.25,
)
FAILED = RefreshFailed(
    at=NOON,
    provider="Vault",
    error=ProviderError("sealed"),
    message="sealed",
    retryable=True,
    attempt=1,
    retry_in=0.5,
    still_valid=True,
)
FAILED_FOR_ALL = dataclasses.replace(FAILED, still_valid=False)
INVALIDATED = CredentialInvalidated(at=NOON, provider="Vault", fingerprint="0badcafe", generation=2)
REDUCED = ThresholdReduced(
    at=NOON, provider="Vault", setting="refresh_threshold", requested=300.0, used=12.0, lifetime=60.0
)
REFUSED = CredentialRefused(
    at=NOON, fingerprint="0badcafe", generation=2, sqlstate="28P01", retrying=True, error=OSError(), message="refused"
)
OPENED = ConnectionOpened(at=NOON, generation=2, replacement=False, duration=0.01)
RETIRED = ConnectionRetired(at=NOON, generation=1, reason="rotated", age=12.0)
NOT_REPLACED = ReplacementFailed(at=NOON, error=OSError(), message="TooManyConnectionsError 53300", retry_in=1.0)
EXPIRING = RefreshTokenExpiring(at=NOON, provider="OAuth2", expires_at=NOON, advice="log in again")
NOT_STORED = StorageFailed(at=NOON, provider="OAuth2", action="save", error=OSError(), message="OSError")
NOT_REVOKED = RevocationFailed(at=NOON, provider="Vault", error=ProviderError("sealed"), message="sealed")


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (REFRESHED, logging.DEBUG),
        (INVALIDATED, logging.DEBUG),
        (OPENED, logging.DEBUG),
        (RETIRED, logging.DEBUG),
        (FAILED, logging.WARNING),
        (REDUCED, logging.WARNING),
        (REFUSED, logging.WARNING),
        (NOT_REPLACED, logging.WARNING),
        (NOT_REVOKED, logging.WARNING),
        (EXPIRING, logging.WARNING),
        (NOT_STORED, logging.ERROR),
        (FAILED_FOR_ALL, logging.ERROR),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Event) else logging.getLevelName(value),
)
def test_the_log_level_rises_with_the_trouble(event, level, caplog):
    log_event(event)

    (record,) = caplog.records
    assert record.name == "asyncpool_creds"
    assert record.levelno == level
    assert record.event is event


def test_a_log_line_names_the_event_and_all_it_says(caplog):
    log_event(FAILED)

    assert caplog.messages == [
        "RefreshFailed provider=Vault message=sealed retryable=True attempt=1 retry_in=0.5 still_valid=True "
        "valid_for=None"
    ]


def test_nothing_is_formatted_for_a_log_that_is_off(caplog):
    caplog.set_level(logging.WARNING, logger="asyncpool_creds")

    log_event(REFRESHED)

    assert not caplog.records


@pytest.mark.parametrize(
    "event",
    [
        *(REFRESHED, FAILED, INVALIDATED, REDUCED, REFUSED, OPENED, RETIRED, NOT_REPLACED),
        *(EXPIRING, NOT_STORED, NOT_REVOKED),
    ],
)
def test_an_event_cannot_be_changed(event):
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at = NOON


def test_events_are_logged_where_no_observer_is_given(caplog):
    Observers(None)(FAILED)

    assert [record.event for record in caplog.records] == [FAILED]


def test_one_observer_is_called_with_every_event(caplog):
    observer = RecordingObserver()
    observers = Observers(observer)

    observers(FAILED)
    observers(REFRESHED)

    assert observer.events == [FAILED, REFRESHED]
    assert not caplog.records


def test_several_observers_are_called_in_their_order():
    calls = []

    Observers([lambda _: calls.append("first"), lambda _: calls.append("second")])(FAILED)

    assert calls == ["first", "second"]


def test_no_observers_at_all_is_an_empty_list(caplog):
    Observers([])(FAILED_FOR_ALL)

    assert not caplog.records


async def _coroutine_function(_: Event) -> None:
    raise AssertionError


class _CoroutineCallable:
    async def __call__(self, _: Event) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "wrong",
    ["word", 5, [5], [log_event, None], _coroutine_function, [_coroutine_function], _CoroutineCallable()],
    ids=["word", "number", "numbers", "one of two", "coroutine function", "coroutine functions", "async __call__"],
)
def test_what_cannot_observe_is_refused(wrong):
    with pytest.raises(TypeError, match="on_event takes"):
        Observers(wrong)


@pytest.mark.parametrize(
    "wrong", ["word", 5, None, _coroutine_function], ids=["word", "number", "None", "coroutine function"]
)
def test_what_cannot_observe_is_refused_later_too(wrong):
    observers = Observers([])

    with pytest.raises(TypeError, match="on_event takes"):
        observers.subscribe(wrong)


def test_an_observer_that_fails_is_logged_and_stops_nobody(caplog):
    observer = RecordingObserver()

    def broken(event: Event) -> None:
        raise LookupError("my bug")

    Observers([broken, observer])(FAILED)

    assert observer.events == [FAILED]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "broken failed on RefreshFailed" in record.getMessage()
    assert record.exc_info[0] is LookupError


def test_an_observer_may_end_the_program():
    def impatient(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers(impatient)(FAILED)


def test_a_subscription_lasts_until_it_is_ended():
    observer = RecordingObserver()
    observers = Observers([])

    unsubscribe = observers.subscribe(observer)
    observers(FAILED)
    unsubscribe()
    observers(REFRESHED)

    assert observer.events == [FAILED]


def test_ending_a_subscription_again_leaves_the_others_alone():
    observer = RecordingObserver()
    observers = Observers([])
    unsubscribe = observers.subscribe(observer)
    observers.subscribe(observer)

    unsubscribe()
    unsubscribe()
    observers(FAILED)

    assert observer.events == [FAILED]


def test_a_subscription_made_during_an_event_begins_with_the_next():
    late = RecordingObserver()
    observers = Observers([])
    unsubscribe = observers.subscribe(lambda _: observers.subscribe(late))

    observers(FAILED)
    unsubscribe()
    observers(REFRESHED)

    assert late.events == [REFRESHED]


def test_an_observer_may_end_its_own_subscription():
    seen = []
    observers = Observers([])

    def once(event: Event) -> None:
        seen.append(event)
        unsubscribe()

    unsubscribe = observers.subscribe(once)
    after = RecordingObserver()
    observers.subscribe(after)
    observers(FAILED)
    observers(REFRESHED)

    assert seen == [FAILED]
    assert after.events == [FAILED, REFRESHED]
