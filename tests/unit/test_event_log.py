"""What fails is written when it begins, once a minute while it lasts, and when it works again; the rest is counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from asyncpool_creds import (
    ConnectionOpened,
    CredentialExpired,
    CredentialRefreshed,
    CredentialRefused,
    Event,
    ProviderError,
    RefreshFailed,
    ReplacementFailed,
    RevocationFailed,
    StorageFailed,
    TokenManager,
    log_event,
)
from asyncpool_creds._event_log import Entry, EventLog, _guard, duration, quoted
from asyncpool_creds._events import Observers

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)


def after(seconds):
    return NOON + timedelta(seconds=seconds)


def sealed():
    error = ProviderError("Vault: sealed")
    error.__cause__ = ConnectionRefusedError("port 8200")
    return error


def failed(seconds, *, valid_for=None, provider="Vault", error=None):
    return RefreshFailed(
        at=after(seconds),
        provider=provider,
        error=error or sealed(),
        message="Vault: sealed",
        retryable=True,
        attempt=1,
        retry_in=1.0,
        still_valid=valid_for is not None,
        valid_for=valid_for,
    )


def refreshed(seconds, provider="Vault"):
    return CredentialRefreshed(
        at=after(seconds),
        provider=provider,
        fingerprint="0badcafe",
        generation=2,
        rotated=True,
        expires_at=after(seconds + 900),
        refresh_at=None,
        duration=0.1,
    )


def opened(seconds, *, replacement=False):
    return ConnectionOpened(at=after(seconds), generation=2, replacement=replacement, duration=0.01)


def refused(seconds, *, retrying=False):
    return CredentialRefused(
        at=after(seconds),
        fingerprint="0badcafe",
        generation=2,
        sqlstate="28P01",
        retrying=retrying,
        error=OSError("no"),
        message="no",
    )


def not_replaced(seconds):
    return ReplacementFailed(at=after(seconds), error=OSError("no"), message="OSError", retry_in=1.0)


def not_stored(seconds):
    return StorageFailed(at=after(seconds), provider="OAuth2", action="save", error=OSError("full"), message="OSError")


def not_revoked(seconds):
    return RevocationFailed(at=after(seconds), provider="Vault", error=sealed(), message="sealed")


@pytest.fixture
def log():
    return Observers(None)


@pytest.fixture
def told(caplog):
    """Return the level and the text of what was written above DEBUG, and forget it."""
    caplog.set_level(logging.DEBUG, logger="asyncpool_creds")

    def lines():
        found = [(one.levelname, one.getMessage()) for one in caplog.records if one.levelno > logging.DEBUG]
        caplog.clear()
        return found

    return lines


def test_an_outage_is_a_line_when_it_begins_one_a_minute_and_one_when_it_ends(log, told):
    for second in range(150):
        log(failed(second, valid_for=300.0 - second))
    log(refreshed(150))
    log(refreshed(151))

    assert told() == [
        ("WARNING", '"Vault" gives no new credential: "sealed". Callers fail in 5 min. Next attempt in 1 s.'),
        (
            "WARNING",
            (
                '"Vault" gives no new credential: "sealed". Callers fail in 4 min. Next attempt in 1 s. '
                "It has failed 61 times in 1 min. The traceback is with the line of 12:00:00 UTC."
            ),
        ),
        (
            "WARNING",
            (
                '"Vault" gives no new credential: "sealed". Callers fail in 3 min. Next attempt in 1 s. '
                "It has failed 121 times in 2 min. The traceback is with the line of 12:00:00 UTC."
            ),
        ),
        ("INFO", '"Vault" gives credentials again, after 2 min 30 s and 150 failed attempts.'),
    ]


def test_the_moment_from_which_callers_fail_is_told_at_once(log, told):
    for second in range(10):
        log(failed(second, valid_for=5.5 - second if second < 6 else None))

    assert [(level, text.partition(" Next")[0]) for level, text in told()] == [
        ("WARNING", '"Vault" gives no new credential: "sealed". Callers fail in 5.5 s.'),
        ("ERROR", '"Vault" gives no credential: "sealed". Callers fail, since none is left that is valid.'),
    ]


def test_the_exception_is_with_the_first_line_and_with_the_first_that_is_an_error(log, caplog):
    for second in range(200):
        log(failed(second, valid_for=100.0 - second if second < 100 else None))

    lines = [one for one in caplog.records if one.levelno > logging.DEBUG]
    assert [(one.levelname, one.exc_info is not None) for one in lines] == [
        ("WARNING", True),
        ("WARNING", False),
        ("ERROR", True),
        ("ERROR", False),
    ]
    assert isinstance(lines[2].exc_info[1].__cause__, ConnectionRefusedError)
    assert lines[3].getMessage().endswith("The traceback is with the line of 12:01:40 UTC.")


def test_what_is_only_counted_is_at_debug_with_its_event(log, caplog):
    caplog.set_level(logging.DEBUG, logger="asyncpool_creds")
    first, second = failed(0), failed(1)

    log(first)
    log(second)

    assert [(one.levelname, one.event, one.exc_info is None) for one in caplog.records] == [
        ("ERROR", first, False),
        ("DEBUG", second, True),
    ]


@pytest.mark.parametrize(
    ("event", "recovery", "text"),
    [
        (failed, refreshed, '"Vault" gives credentials again, after 9 s and 9 failed attempts.'),
        (refused, opened, "The server accepts credentials again, after 9 s and 9 failed attempts."),
        (
            not_replaced,
            lambda at: opened(at, replacement=True),
            "Connections are replaced again, after 9 s and 9 failed attempts.",
        ),
        (not_stored, None, None),
        (not_revoked, None, None),
    ],
    ids=["RefreshFailed", "CredentialRefused", "ReplacementFailed", "StorageFailed", "RevocationFailed"],
)
def test_whatever_can_repeat_is_coalesced(event, recovery, text, log, told):
    for second in range(9):
        log(event(second))
    assert len(told()) == 1

    if recovery is not None:
        log(recovery(9))
        assert told() == [("INFO", text)]
    log(event(600 + 9 + 601))
    (line,) = told()
    assert "times" not in line[1]


def test_a_connection_for_a_caller_says_nothing_about_replacements(log, told):
    log(not_replaced(0))
    log(opened(1))

    assert [level for level, _ in told()] == ["WARNING"]


def test_a_refusal_that_a_newer_credential_does_not_mend_is_told_at_once(log, told):
    log(refused(0, retrying=True))
    log(refused(0.1))
    log(refused(0.2))

    assert [text.partition(". ")[2].partition(" It has")[0] for _, text in told()] == [
        "A newer one is tried.",
        "There is no newer one to try, so the connect fails.",
    ]


def test_a_source_that_comes_and_goes_has_a_few_lines_and_then_one_a_minute(log, told):
    hour = 3600
    for second in range(0, hour, 2):
        log(failed(second, valid_for=1.0))
        log(refreshed(second + 1))

    lines = told()
    assert lines[:2] == [
        ("WARNING", '"Vault" gives no new credential: "sealed". Callers fail in 1 s. Next attempt in 1 s.'),
        ("INFO", '"Vault" gives credentials again, after 1 s and 1 failed attempt.'),
    ]
    assert len(lines) <= 2 * (60 + 6)
    assert sum(second == ("WARNING", lines[0][1]) for second in lines) >= 60


def test_a_recovery_of_what_nobody_heard_of_is_not_told(log, told):
    log(refreshed(0))
    log(opened(0))

    assert told() == []


def test_sources_do_not_answer_for_each_other(log, told):
    log(failed(0, provider="Vault"))
    log(failed(0, provider="OAuth2"))
    log(refreshed(1, provider="OAuth2"))

    assert [(level, text.partition(" ")[0]) for level, text in told()] == [
        ("ERROR", '"Vault"'),
        ("ERROR", '"OAuth2"'),
        ("INFO", '"OAuth2"'),
    ]


def test_a_clock_that_is_set_back_takes_no_line_away_and_adds_none(log, told):
    for second in range(90):
        log(failed(second))
    for second in range(90):
        log(failed(second - 3600))
    log(refreshed(90 - 3600))

    lines = told()
    assert [level for level, _ in lines] == ["ERROR", "ERROR", "ERROR", "INFO"]
    assert lines[-1][1].endswith("after 2 min 59 s and 180 failed attempts.")


def test_a_clock_that_is_set_forward_costs_a_line(log, told):
    log(failed(0))
    log(failed(1))
    log(failed(86400))
    log(failed(86401))

    assert len(told()) == 2


def test_events_that_come_out_of_order_are_counted(log, told):
    for second in (5, 3, 4, 1, 2):
        log(failed(second))
    log(refreshed(0))

    assert [level for level, _ in told()] == ["ERROR", "INFO"]


def test_the_function_remembers_by_the_name_of_the_source(told):
    for second in range(30):
        log_event(failed(second, provider="asked for by name"))
    log_event(refreshed(30, provider="asked for by name"))

    assert [level for level, _ in told()] == ["ERROR", "INFO"]


def test_an_observer_that_is_shared_by_several_managers_writes_for_all_of_them(told):
    shared = EventLog(_entry)
    for number in range(3):
        for _ in range(10):
            shared(Tick(at=NOON, name=str(number)))

    assert told() == [("WARNING", "0 fails"), ("WARNING", "1 fails"), ("WARNING", "2 fails")]


@dataclass(frozen=True)
class Tick:
    at: datetime
    name: str
    error: BaseException | None = None


def _entry(event):
    return Entry(
        level=logging.WARNING,
        sentences=(("%s fails", event.name),),
        failure=event.name,
        error=event.error,
    )


def test_memory_is_bounded(told):
    log = EventLog(_entry)
    for number in range(5000):
        log(Tick(NOON, str(number)))

    assert len(log._failures) == 1000
    told()
    log(Tick(NOON, "4999"))
    assert told() == []


def test_a_hundred_sources_that_fail_together_do_not_all_show_a_traceback(caplog):
    log = EventLog(_entry)
    for number in range(100):
        log(Tick(NOON, str(number), OSError("down")))

    assert sum(one.exc_info is not None for one in caplog.records) == 20
    assert len(caplog.records) == 100


def test_threads_write_one_line_and_count_together(told):
    log = Observers(None)
    begin = threading.Barrier(8)
    events = [failed(0, valid_for=60.0)] * 500

    def run():
        begin.wait()
        for event in events:
            log(event)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    log(refreshed(1))

    assert [level for level, _ in told()] == ["WARNING", "INFO"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_child_that_is_forked_while_a_thread_writes_can_write():
    held, done = threading.Event(), threading.Event()

    def entry(event):
        return _entry(event)

    log = EventLog(entry)

    def hold():
        with _guard.lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        log(Tick(NOON, "child"))
        os._exit(0)
    done.set()
    thread.join()

    assert os.waitpid(child, 0)[1] == 0


def test_a_handler_that_logs_an_event_of_its_own_holds_nobody_up(told):
    log = Observers(None)

    class Handler(logging.Handler):
        def emit(self, record):
            if record.event.provider == "Vault":
                log(failed(0, provider="OAuth2"))

    handler = Handler()
    logger = logging.getLogger("asyncpool_creds")
    logger.addHandler(handler)
    try:
        log(failed(0))
    finally:
        logger.removeHandler(handler)

    assert len(told()) == 2


def test_lines_of_one_kind_have_one_template_for_error_trackers(log, caplog):
    log(failed(0, valid_for=10.0))
    Observers(None)(failed(0, valid_for=200.0, provider="OAuth2"))

    assert len({record.msg for record in caplog.records}) == 1


@pytest.mark.parametrize("raises", [True, False])
def test_every_line_can_be_formatted(raises, log, monkeypatch, capsys):
    monkeypatch.setattr(logging, "raiseExceptions", raises)
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.getLogger("asyncpool_creds")
    logger.addHandler(handler)
    try:
        log(failed(0, provider="100 % {of} %s"))
        log(failed(61, provider="100 % {of} %s"))
        log(refreshed(62, provider="100 % {of} %s"))
    finally:
        logger.removeHandler(handler)

    out, err = capsys.readouterr()
    assert err == ""
    assert out.count('"100 % {of} %s" gives') == 3
    assert out.count("ConnectionRefusedError: port 8200") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (0.004, "0 s"),
        (0.0149, "0.01 s"),
        (0.3729, "0.4 s"),
        (0.96, "1 s"),
        (3.0, "3 s"),
        (9.96, "10 s"),
        (12.4, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (250.2, "4 min 10 s"),
        (899.8, "15 min"),
        (3569, "59 min 29 s"),
        (3599, "1 h"),
        (3900, "1 h 5 min"),
        (86399, "1 d"),
        (180000, "2 d 2 h"),
        (float("inf"), "more than 30 years"),
        (float("nan"), "more than 30 years"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", '""'),
        ("two\r\nlines\tand  spaces", '"two lines and spaces"'),
        ("\x1b[31mred", '"\\x1b[31mred"'),
        ("\udc80 ä 漢", '"\\udc80 ä 漢"'),
        ("x" * 5000, '"' + "x" * 499 + '…"'),
    ],
)
def test_somebody_elses_text_stays_on_one_line_and_has_an_end(text, line):
    assert quoted(text) == line


def test_an_event_has_at_least_a_moment():
    log_event(Event(at=NOON))


@pytest.mark.anyio
async def test_an_outage_of_a_minute_with_callers_all_the_time_is_a_handful_of_lines(clock, provider, caplog):
    caplog.set_level(logging.INFO, logger="asyncpool_creds")
    provider.play(20)
    async with TokenManager(provider, clock=clock) as manager:
        provider.play(ProviderError("down"))
        begun, refused = clock.monotonic(), 0
        while clock.monotonic() < begun + 70:
            try:
                await manager.get()
            except CredentialExpired:
                refused += 1
            await asyncio.sleep(0.1)
        provider.play(20)
        while caplog.records[-1].levelno != logging.INFO:
            await asyncio.sleep(1)
            with contextlib.suppress(CredentialExpired):
                await manager.get()

    assert refused > 100
    assert [one.levelname for one in caplog.records] == ["WARNING", "ERROR", "INFO"]
    assert [one.exc_info is not None for one in caplog.records] == [True, True, False]
