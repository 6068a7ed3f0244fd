"""Those who wait for a server: one attempt at a time, in order of arrival, each within its own patience."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from asyncpool_creds._connect_line import ConnectLine

pytestmark = pytest.mark.anyio


class Server:
    """Takes connections when it is up; remembers who asked when, and how many at once."""

    def __init__(self, *, error: Exception | None = None, duration: float = 0.0) -> None:
        self.error = error
        self.duration = duration
        self.attempts: list[tuple[float, str]] = []
        self.open = self.peak = 0

    def connect(self, name: str):
        async def connect() -> str:
            self.attempts.append((asyncio.get_running_loop().time(), name))
            self.open += 1
            self.peak = max(self.peak, self.open)
            try:
                await asyncio.sleep(self.duration)
            finally:
                self.open -= 1
            if self.error is not None:
                raise self.error
            return name

        return connect


def new_line(patience: float = 10.0, reports: list[tuple[Exception, int, float]] | None = None) -> ConnectLine:
    told: list[tuple[Exception, int, float]] = [] if reports is None else reports
    return ConnectLine(
        asyncio.get_running_loop(),
        patience=patience,
        passes=lambda error: isinstance(error, ConnectionError),
        report=lambda *report: told.append(report),
    )


def start(line: ConnectLine, server: Server, *names: str) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(line.open(server.connect(name))) for name in names]


async def test_a_connect_that_succeeds_waits_for_nobody(clock):
    line, server = new_line(), Server(duration=1)

    assert await asyncio.gather(*start(line, server, "a", "b", "c")) == ["a", "b", "c"]

    assert (server.peak, clock.monotonic()) == (3, 1)


async def test_without_patience_an_error_is_raised_at_once(clock):
    server = Server(error=ConnectionRefusedError())

    with pytest.raises(ConnectionRefusedError):
        await new_line(0).open(server.connect("a"))

    assert len(server.attempts) == 1


async def test_an_error_that_does_not_pass_is_raised_at_once(clock):
    server = Server(error=LookupError("no such database"))

    with pytest.raises(LookupError):
        await new_line().open(server.connect("a"))

    assert len(server.attempts) == 1


async def test_one_attempt_is_made_at_a_time_for_all_who_wait(clock):
    line, server = new_line(), Server(error=ConnectionRefusedError(), duration=0.1)
    tasks = start(line, server, *"abcdefgh")
    await asyncio.sleep(5)
    first = len("abcdefgh")  # nobody knew that it was down
    server.peak = 0
    attempts = len(server.attempts)
    await asyncio.sleep(2)

    assert server.peak == 1
    assert 2 <= len(server.attempts) - attempts <= 4
    assert attempts - first < 15
    server.error = None
    assert await asyncio.gather(*tasks) == list("abcdefgh")


async def test_callers_are_served_in_order_when_the_server_is_back(clock):
    line, server = new_line(), Server(error=ConnectionRefusedError(), duration=0.1)
    order: list[str] = []
    for name in "abcd":
        (task,) = start(line, server, name)
        task.add_done_callback(lambda task: order.append(task.result()))
        await asyncio.sleep(0.2)
    server.error = None

    (late,) = start(line, server, "e")
    late.add_done_callback(lambda task: order.append(task.result()))
    await late

    assert order == list("abcde")
    assert server.peak == 1


async def test_a_caller_gives_up_when_its_patience_has_ended(clock):
    line, server = new_line(3), Server(error=ConnectionRefusedError(111, "refused"))
    tasks = start(line, server, "a", "b")

    errors = await asyncio.gather(*tasks, return_exceptions=True)

    assert clock.monotonic() == pytest.approx(3)
    assert [type(error) for error in errors] == [ConnectionRefusedError] * 2
    assert len({id(error) for error in errors}) == 2
    assert all("connect_patience=3 s" in note for error in errors for note in error.__notes__)


async def test_each_failed_attempt_is_reported_with_how_many_wait(clock):
    reports: list[tuple[Exception, int, float]] = []
    error = ConnectionRefusedError()
    line, server = new_line(2, reports), Server(error=error)

    await asyncio.gather(*start(line, server, "a", "b", "c"), return_exceptions=True)

    assert {report[0] for report in reports} == {error}
    assert reports[-1][1] == 3
    assert all(0 < report[2] <= 1 for report in reports)


async def test_an_error_that_cannot_be_copied_is_raised_itself(clock):
    class OddError(ConnectionError):
        def __init__(self, *, needed: int) -> None:
            super().__init__()

    line, server = new_line(1), Server(error=OddError(needed=1))

    with pytest.raises(OddError):
        await line.open(server.connect("a"))


async def test_cancelling_the_first_in_line_passes_the_turn_on(clock):
    line, server = new_line(), Server(error=ConnectionRefusedError())
    first, second = start(line, server, "a", "b")
    await asyncio.sleep(1)
    first.cancel()
    server.error = None

    assert await second == "b"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_cancelling_the_first_in_its_attempt_passes_the_turn_on(clock):
    line, server = new_line(), Server(error=ConnectionRefusedError(), duration=0.5)
    first, second = start(line, server, "a", "b")
    while server.open != 1 or len(server.attempts) < 3:  # noqa: ASYNC110 - on virtual time
        await asyncio.sleep(0.01)
    first.cancel()
    server.error = None

    assert await second == "b"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_an_error_that_does_not_pass_is_no_reason_for_the_next_to_wait(clock):
    line, server = new_line(), Server(error=ConnectionRefusedError())
    first, second = start(line, server, "a", "b")
    await asyncio.sleep(1)
    server.error = LookupError("dropped")

    with pytest.raises(LookupError):
        await first
    server.error = None
    assert await second == "b"


async def test_closing_sends_everybody_away_at_once(clock):
    line, server = new_line(), Server(error=ConnectionRefusedError())
    tasks = start(line, server, "a", "b", "c")
    await asyncio.sleep(1)
    now = clock.monotonic()

    line.close()

    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert clock.monotonic() == now
    assert [(type(error), str(error)) for error in errors] == [(asyncpg.InterfaceError, "pool is closing")] * 3


async def test_a_connection_of_somebody_else_is_a_reason_to_try_at_once(clock):
    line, server = new_line(60), Server(error=ConnectionRefusedError())
    (task,) = start(line, server, "a")
    await asyncio.sleep(20.2)
    server.error = None
    now = clock.monotonic()

    line.recovered()

    assert await task == "a"
    assert clock.monotonic() == now
