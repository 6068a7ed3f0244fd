from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime, timedelta

import pytest

from asyncpool_creds import (
    ConnectionOpened,
    ConnectionRetired,
    CredentialInvalidated,
    CredentialRefreshed,
    CredentialRefused,
    Event,
    PoolReady,
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
READY = PoolReady(
    at=NOON, name="app@db.example.com:5432/shop", provider="OAuth2", lifetime=899.8, tls="verified", size=10
)
NOT_REVOKED = RevocationFailed(at=NOON, provider="Vault", error=ProviderError("sealed"), message="sealed")


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (REFRESHED, logging.DEBUG),
        (INVALIDATED, logging.DEBUG),
        (OPENED, logging.DEBUG),
        (RETIRED, logging.DEBUG),
        (READY, logging.INFO),
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
    Observers(None)(event)

    (record,) = caplog.records
    assert record.name == "asyncpool_creds"
    assert record.levelno == level
    assert record.event is event


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (REFRESHED, '"Vault" gave a new credential: 0badcafe, generation 2, valid for 0 s.'),
        (
            dataclasses.replace(REFRESHED, rotated=False, expires_at=None),
            '"Vault" gave the same credential again: 0badcafe, generation 2, no end.',
        ),
        (
            dataclasses.replace(FAILED, valid_for=250.2, retry_in=0.3729),
            '"Vault" gives no new credential: "sealed". Callers fail in 4 min 10 s. Next attempt in 0.4 s.',
        ),
        (
            FAILED,
            (
                '"Vault" gives no new credential: "sealed". Callers are served: the one in hand has no end. '
                "Next attempt in 0.5 s."
            ),
        ),
        (
            FAILED_FOR_ALL,
            (
                '"Vault" gives no credential: "sealed". Callers fail, since none is left that is valid. '
                "Next attempt in 0.5 s."
            ),
        ),
        (
            dataclasses.replace(FAILED_FOR_ALL, retryable=False, retry_in=None),
            (
                '"Vault" gives no credential: "sealed". Callers fail, since none is left that is valid. '
                "This is a refusal, and lasts until somebody changes something. "
                "It is asked again when somebody needs a credential."
            ),
        ),
        (
            dataclasses.replace(FAILED, message="Vault: fetch() raised KeyError at t.py:9 in parse; see the cause"),
            (
                '"Vault" gives no new credential: "fetch() raised KeyError at t.py:9 in parse". '
                "Callers are served: the one in hand has no end. Next attempt in 0.5 s."
            ),
        ),
        (
            INVALIDATED,
            'A server refused the credential of "Vault", which is asked for another: 0badcafe, generation 2.',
        ),
        (
            REDUCED,
            'The credentials of "Vault" live for 1 min, which is too short for "refresh_threshold=300": 12 s are used.',
        ),
        (
            REFUSED,
            'The server refused credential 0badcafe, generation 2: "refused" (SQLSTATE 28P01). A newer one is tried.',
        ),
        (
            dataclasses.replace(REFUSED, sqlstate=None, retrying=False),
            (
                'The server refused credential 0badcafe, generation 2: "refused" (no SQLSTATE). '
                "There is no newer one to try, so the connect fails."
            ),
        ),
        (OPENED, "Opened a connection of generation 2 in 0.01 s."),
        (
            dataclasses.replace(OPENED, generation=None, replacement=True),
            "Opened a connection in 0.01 s, to take another's place.",
        ),
        (RETIRED, 'Retired a connection of generation 1 after 12 s: "rotated".'),
        (
            NOT_REPLACED,
            (
                'A connection could not be replaced: "TooManyConnectionsError 53300"; the old one serves on. '
                "Next attempt in 1 s."
            ),
        ),
        (
            dataclasses.replace(EXPIRING, expires_at=NOON + timedelta(days=2, hours=3)),
            'What the credentials of "OAuth2" hang on ends in 2 d 3 h, at 2026-03-31 15:00 UTC: "log in again".',
        ),
        (NOT_STORED, 'The token storage of "OAuth2" could not be written: "OSError".'),
        (dataclasses.replace(NOT_STORED, action="load"), 'The token storage of "OAuth2" could not be read: "OSError".'),
        (
            NOT_REVOKED,
            'A superseded credential of "Vault" could not be revoked, and lives until its own end: "sealed".',
        ),
        (
            READY,
            (
                'Pool "app@db.example.com:5432/shop" is ready: 10 connections, credentials of "OAuth2" that live for '
                "15 min, TLS, and the server is verified."
            ),
        ),
        (
            dataclasses.replace(READY, provider=None, lifetime=None, tls="local", size=1),
            'Pool "app@db.example.com:5432/shop" is ready: 1 connection, no credentials of ours, a Unix socket.',
        ),
        (
            dataclasses.replace(READY, lifetime=None, tls="unverified"),
            (
                'Pool "app@db.example.com:5432/shop" is ready: 10 connections, credentials of "OAuth2", TLS, but the '
                "server is not verified."
            ),
        ),
    ],
)
def test_a_log_line_is_a_sentence_with_quoted_values_and_rounded_numbers(event, line, caplog):
    caplog.set_level(logging.DEBUG, logger="asyncpool_creds")

    Observers(None)(event)

    assert caplog.messages == [line]


def test_an_event_of_the_users_own_is_logged_as_it_is(caplog):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Deployed(Event):
        version: str

    caplog.set_level(logging.DEBUG, logger="asyncpool_creds")
    log_event(Deployed(at=NOON, version="7"))

    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "version='7'" in record.getMessage()


def test_a_failure_is_logged_with_its_exception(caplog):
    Observers(None)(FAILED)

    (record,) = caplog.records
    assert record.exc_info[:2] == (ProviderError, FAILED.error)


def test_nothing_is_formatted_for_a_log_that_is_off(caplog):
    caplog.set_level(logging.WARNING, logger="asyncpool_creds")

    log_event(REFRESHED)
    log_event(READY)

    assert not caplog.records


@pytest.mark.parametrize(
    "event",
    [
        *(REFRESHED, FAILED, INVALIDATED, REDUCED, REFUSED, OPENED, RETIRED, NOT_REPLACED),
        *(EXPIRING, NOT_STORED, NOT_REVOKED, READY),
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


@pytest.mark.parametrize("how", ["None", "log_event", "subscribe"])
def test_owners_with_sources_of_the_same_name_do_not_hide_each_others_lines(how, caplog):
    owners = [Observers({"None": None, "log_event": [log_event], "subscribe": []}[how]) for _ in range(2)]
    if how == "subscribe":
        for one in owners:
            one.subscribe(log_event)

    for one in owners:
        one(FAILED)
    owners[1](REFRESHED)
    owners[0](dataclasses.replace(FAILED, attempt=2))

    levels = [record.levelname for record in caplog.records if record.levelno > logging.DEBUG]
    assert levels == ["WARNING", "WARNING", "INFO"]


def test_owners_that_live_for_a_moment_share_one_memory(caplog):
    for _ in range(50):
        Observers(None, is_short_lived=True)(dataclasses.replace(FAILED, provider="asked for each connect"))

    assert [record.levelname for record in caplog.records if record.levelno > logging.DEBUG] == ["WARNING"]
