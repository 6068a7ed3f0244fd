"""The search for the planted secret finds it: a search that finds nothing proves nothing."""

from __future__ import annotations

import base64
import logging
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from support import assert_no_secret, find_secret, secret

from asyncpool_creds import Credential, Event
from asyncpool_creds._events import Observers


def _caused() -> ValueError:
    error = ValueError("outer")
    error.__cause__ = RuntimeError(secret())
    return error


def _suppressed() -> ValueError:
    error = ValueError("outer")
    error.__context__ = RuntimeError(secret())
    error.__suppress_context__ = True
    return error


def _noted() -> ValueError:
    error = ValueError("outer")
    error.add_note(secret())
    return error


def _with_attribute() -> ValueError:
    error = ValueError("outer")
    error.request = {"password": secret()}
    return error


def _record(**extra: object) -> logging.LogRecord:
    record = logging.LogRecord("name", logging.INFO, __file__, 1, "connecting %s", ("x",), None)
    vars(record).update(extra)
    return record


class _Picklable:
    def __init__(self) -> None:
        self.password = secret()

    def __repr__(self) -> str:
        return "<hidden>"


@pytest.mark.parametrize(
    "leaky",
    [
        secret(),
        secret().encode(),
        [{"deep": (secret(),)}],
        {secret(): 1},
        _caused(),
        _suppressed(),
        _noted(),
        _with_attribute(),
        ExceptionGroup("several", [ValueError(secret())]),
        _record(args=(secret(),)),
        _record(event={"token": secret()}),
        _record(exc_info=(ValueError, _caused(), None)),
        _Picklable(),
        *(base64.b64encode(b"x" * length + secret().encode()) for length in range(3)),
    ],
    ids=lambda leaky: type(leaky).__name__,
)
def test_it_is_found_wherever_it_hides(leaky: object):
    assert find_secret(leaky) is not None


def test_a_credential_gives_nothing_away():
    credential = Credential(secret(), user="app")

    assert_no_secret(credential, [credential], ValueError(credential))


@dataclass(frozen=True, slots=True, kw_only=True)
class _LeakyEvent(Event):
    text: str


def test_a_log_record_with_it_is_noticed_at_any_level(leak_detector):
    logging.getLogger("a.library").debug("connecting with %s", secret())

    assert leak_detector.take_leaks() == ["message of LogRecord"]


def test_an_event_with_it_is_noticed_whoever_listens(leak_detector):
    Observers([])(_LeakyEvent(at=datetime.now(UTC), text=secret()))

    assert leak_detector.take_leaks() == ["repr() of _LeakyEvent"]


def test_an_exception_that_was_expected_is_searched_all_the_same(leak_detector):
    with pytest.raises(ValueError, match="outer"):
        raise _caused()

    assert leak_detector.take_leaks() == ["traceback of ValueError"]


def test_a_credential_that_shows_it_is_noticed(leak_detector, monkeypatch):
    monkeypatch.setattr(Credential, "__repr__", lambda credential: credential.password)

    Credential(secret())

    assert leak_detector.take_leaks() == ["repr() of Credential"]
