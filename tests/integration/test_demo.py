"""The demo as users run it: a process with options, signals, a terminal or none, and an exit status."""

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest

import asyncpool_creds
from asyncpool_creds.cli import demo, workload
from asyncpool_creds.testing.issuer import TokenIssuer

TIMEOUT = 60.0
ANNOUNCEMENT = re.compile(r"\(process (\d+), (\S+)\) and the token issuer \(http://([\d.]+):(\d+)\)")
KEYS = {
    "queries",
    "failed_queries",
    "rotations",
    "token_fetches",
    "refused_connects",
    "retired",
    "acquire_ms",
    "acquires_that_waited_for_a_connect",
}


@pytest.fixture
def place():
    """A directory for all that the demo writes, which has to be empty in the end."""
    directory = tempfile.mkdtemp(prefix="demo-")
    Path(directory).chmod(0o755)  # the server may run as somebody else
    yield directory
    left = list(Path(directory).iterdir())
    shutil.rmtree(directory)
    assert left == []


def start(*options, place, **streams):
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return subprocess.Popen(
        # As the tests themselves: what is not closed in time is an error.
        [sys.executable, "-W", "error", "-m", "asyncpool_creds", "demo", *options],
        env={**environment, "TMPDIR": place, "TERM": "xterm-256color"},
        start_new_session=True,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams},
    )


def assert_nothing_is_left(announcement):
    """Check that the server's process and directory and the issuer's port are gone."""
    pid, directory, host, port = ANNOUNCEMENT.search(announcement).groups()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert not Path(directory).exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_through_several_tokens_ours_loses_nothing_and_the_baseline_does(place):
    options = "--duration 8 --token-lifetime 3 --workers 8 --pool-size 4 --json".split()  # noqa: SIM905
    process = start(*options, place=place)
    output, progress = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 0, progress
    result = json.loads(output)
    ours, baseline = result.pop("ours"), result.pop("baseline")
    assert set(ours) == set(baseline) == KEYS
    assert set(result) == {"duration_s", "token_lifetime_s", "postgres_version", "asyncpg_version", "python_version"}
    assert (ours["failed_queries"], ours["refused_connects"], ours["acquires_that_waited_for_a_connect"]) == (0, 0, 0)
    assert ours["rotations"] >= 2
    assert ours["token_fetches"] == ours["rotations"] + 1
    assert ours["retired"] >= 8
    assert ours["queries"] > baseline["queries"] > 0
    assert 0 <= ours["acquire_ms"]["p50"] <= ours["acquire_ms"]["p99"] <= ours["acquire_ms"]["max"]
    assert baseline["failed_queries"] > 0
    assert baseline["refused_connects"] > 0
    assert baseline["acquires_that_waited_for_a_connect"] > 0
    assert (baseline["rotations"], baseline["token_fetches"]) == (0, 1)
    assert 8 <= result["duration_s"] < 14

    lines = progress.splitlines()
    assert "\x1b" not in progress
    assert "Traceback" not in progress
    assert len([line for line in lines if "asyncpool_creds: token " in line and "plain asyncpg: token 1 " in line]) >= 2
    assert_nothing_is_left(progress)


def test_without_baseline_and_json_there_is_a_summary_of_ours_alone(place):
    options = "--duration 2 --token-lifetime 1 --workers 3 --pool-size 2 --no-baseline".split()  # noqa: SIM905
    process = start(*options, place=place)
    output, progress = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 0, progress
    assert "no failed query" in output
    assert "plain asyncpg" not in output + progress
    assert_nothing_is_left(progress)


def test_without_baseline_json_says_null(place):
    process = start("--duration", "1", "--no-baseline", "--json", place=place)
    output, progress = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 0, progress
    assert json.loads(output)["baseline"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workload_and_the_summary_still_comes(place, number):
    process = start("--duration", "600", "--json", place=place)
    announcement = next(line for line in process.stderr if ANNOUNCEMENT.search(line))
    next(line for line in process.stderr if "queries/s" in line)

    process.send_signal(number)
    output, rest = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 128 + number
    assert json.loads(output)["ours"]["queries"] > 0
    assert json.loads(output)["duration_s"] < 60
    assert "Traceback" not in rest
    assert_nothing_is_left(announcement)


def test_a_second_signal_skips_the_summary_and_leaves_nothing_behind_either(place):
    process = start("--duration", "600", place=place)
    announcement = next(line for line in process.stderr if ANNOUNCEMENT.search(line))
    next(line for line in process.stderr if "queries/s" in line)

    # Two of a kind might be taken for one; which of these two arrives first is the kernel's choice.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    output, rest = process.communicate(timeout=TIMEOUT)

    assert process.returncode in {130, 143}
    assert (output, "Traceback" in rest) == ("", False)
    assert_nothing_is_left(announcement)


def test_a_signal_while_things_start_leaves_nothing_behind(place):
    process = start("--duration", "600", place=place)
    next(line for line in process.stderr if line.startswith("Starting PostgreSQL"))

    process.send_signal(signal.SIGINT)
    output, rest = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 130
    assert (output, "Traceback" in rest) == ("", False)


def test_a_terminal_gets_the_live_view_and_then_the_summary(place):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start("--duration", "2", place=place, stdin=terminal, stdout=terminal, stderr=terminal, text=False)
    os.close(terminal)
    written = bytearray()
    # Linux says EIO when the last one has closed the terminal.
    with contextlib.suppress(OSError):
        while block := os.read(controller, 65536):
            written += block
    os.close(controller)

    text = written.decode()
    view, _, after = text.rpartition("\x1b[?1049l")
    assert process.wait(TIMEOUT) == 0
    assert "\x1b[?1049h" in view
    for part in ("token 1", "s left", "10 with token 1", "queries/s", "latest events", "renews tokens"):
        assert part in view
    assert "queries failed" in after


def test_the_exit_status_is_1_when_a_query_of_ours_fails(monkeypatch, capfd):
    class Forgetful(TokenIssuer):
        """Makes good tokens, of which the database accepts two."""

        _verified = 0

        def verify(self, user, token):
            self._verified += 1
            if self._verified <= 2:
                return super().verify(user, token)
            self.fail_next("temporarily_unavailable")
            return "forgotten"

    monkeypatch.setattr(demo, "TokenIssuer", Forgetful)
    # Else its sessions would serve on.
    strict = functools.partial(asyncpool_creds.create_pool, expired_sessions="refuse")
    monkeypatch.setattr(asyncpool_creds, "create_pool", strict)

    status = demo.run(demo.Options(duration=2.5, token_lifetime=1.0, workers=4, pool_size=2, baseline=False, json=True))

    output, errors = capfd.readouterr()
    assert status == 1
    assert json.loads(output)["ours"]["failed_queries"] > 0
    assert "a query failed" in errors


def test_accounts_that_do_not_add_up_count_as_failed_queries(monkeypatch, capfd):
    monkeypatch.setattr(workload, "TOTAL", 1)

    status = demo.run(demo.Options(duration=1.0, workers=2, pool_size=1, baseline=False))

    assert status == 1
    assert "(MoneyLostError: " in capfd.readouterr().out


def broken_server(error):
    class Broken:
        def __init__(self, **_):
            pass

        async def __aenter__(self):
            raise error

        async def __aexit__(self, *_):
            raise AssertionError("it never stood")

    return Broken


def test_a_cancellation_that_no_signal_explains_is_not_hidden(monkeypatch):
    monkeypatch.setattr(demo, "PostgresServer", broken_server(asyncio.CancelledError()))

    with pytest.raises(asyncio.CancelledError):
        demo.run(demo.Options())


def test_a_server_that_does_not_start_is_explained_in_a_line(monkeypatch, capfd):
    failure = RuntimeError("PostgreSQL did not start: no space left on device")
    monkeypatch.setattr(demo, "PostgresServer", broken_server(failure))

    status = demo.run(demo.Options())

    output, errors = capfd.readouterr()
    assert (status, output) == (2, "")
    assert "asyncpool-creds demo: PostgreSQL did not start: no space left on device" in errors
