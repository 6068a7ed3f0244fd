"""Those who wait for a connection: served in order by the first there is, each within its own patience."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from asyncpool_creds._connect_line import ConnectLine

pytestmark = pytest.mark.anyio


class Server:
    """Takes connections, numbered, when it is up; remembers when it was asked, and how many asked at once."""

    def __init__(self, *, error: BaseException | None = None, duration: float = 0.0) -> None:
        self.error = error
        self.duration = duration
        self.attempts: list[float] = []
        self.opened = self.under_way = self.peak = 0

    async def connect(self) -> int:
        self.attempts.append(asyncio.get_running_loop().time())
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            await asyncio.sleep(self.duration)
        finally:
            self.under_way -= 1
        if self.error is not None:
            raise self.error
        self.opened += 1
        return self.opened


class Line(ConnectLine[int]):
    """A line at a server, which remembers what it told."""

    def __init__(self, server: Server, patience: float = 10.0) -> None:
        self.reports: list[tuple[Exception, int, float]] = []
        self.discarded: list[int] = []
        self.waiting: list[bool] = []
        super().__init__(
            asyncio.get_running_loop(),
            connect=server.connect,
            patience=patience,
            passes=lambda error: isinstance(error, ConnectionError),
            report=lambda *report: self.reports.append(report),
            discard=self.discarded.append,
            is_waiting=self.waiting.append,
        )


def callers(line: Line, count: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(line.open()) for _ in range(count)]


async def test_connects_that_succeed_wait_for_nobody(clock):
    server = Server(duration=1)

    assert sorted(await asyncio.gather(*callers(Line(server), 3))) == [1, 2, 3]

    assert (server.peak, clock.monotonic()) == (3, 1)


async def test_an_error_that_does_not_pass_is_raised_at_once(clock):
    server = Server(error=LookupError("no such database"))

    with pytest.raises(LookupError):
        await Line(server).open()

    assert (len(server.attempts), clock.monotonic()) == (1, 0)


async def test_while_connects_fail_one_attempt_is_made_at_a_time(clock):
    server = Server(error=ConnectionRefusedError(), duration=0.1)
    tasks = callers(Line(server), 8)
    await asyncio.sleep(5)
    before, server.peak = len(server.attempts), 0
    await asyncio.sleep(2)

    assert server.peak == 1
    assert 1 <= len(server.attempts) - before <= 4
    assert before < 8 + 15
    server.error = None
    assert sorted(await asyncio.gather(*tasks)) == list(range(1, 9))


async def test_callers_are_served_in_order_when_the_server_is_back(clock):
    server = Server(error=ConnectionRefusedError(), duration=0.1)
    line = Line(server)
    tasks = []
    for _ in range(4):
        tasks += callers(line, 1)
        await asyncio.sleep(0.2)
    server.error = None
    tasks += callers(line, 1)

    assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 5]


async def test_a_connection_that_comes_back_goes_to_whoever_waits_longest(clock):
    line = Line(Server(error=ConnectionRefusedError()))
    first, second = callers(line, 2)
    await asyncio.sleep(1)
    now = clock.monotonic()

    assert line.give(77)

    assert await first == 77
    assert clock.monotonic() == now
    assert not second.done()
    line.close()
    with pytest.raises(asyncpg.InterfaceError):
        await second
    assert not line.give(78)
    assert line.waiting == [True, False]


async def test_a_connection_that_nobody_waits_for_any_more_is_discarded(clock):
    line = Line(Server(duration=5))
    (task,) = callers(line, 1)
    await asyncio.sleep(1)
    assert line.give(77)
    assert await task == 77
    await asyncio.sleep(5)

    assert line.discarded == [1]


@pytest.mark.parametrize("patience", [0.01, 0.05, 0.3, 2.0])
async def test_short_patience_still_sees_an_attempt_of_its_own(clock, patience):
    server = Server(error=ConnectionRefusedError())
    line = Line(server, patience)
    for _ in range(20):
        before = len(server.attempts)
        with pytest.raises(ConnectionRefusedError):
            await line.open()
        assert len(server.attempts) > before
        await asyncio.sleep(0.001)  # nobody waits for a moment
    server.error = None

    assert await line.open() == 1


async def test_the_pause_after_a_failure_goes_on_while_nobody_waits(clock):
    server = Server(error=ConnectionRefusedError())
    line = Line(server, 4)
    with pytest.raises(ConnectionRefusedError):
        await line.open()
    server.error = None
    await asyncio.sleep(2)
    now = clock.monotonic()

    assert await line.open() == 1

    assert clock.monotonic() == now


async def test_a_caller_gives_up_when_its_patience_has_ended(clock):
    line = Line(Server(error=ConnectionRefusedError(111, "refused")), 3)

    errors = await asyncio.gather(*callers(line, 2), return_exceptions=True)

    assert clock.monotonic() == pytest.approx(3)
    assert [type(error) for error in errors] == [ConnectionRefusedError] * 2
    assert len({id(error) for error in errors}) == 2
    assert all("connect_patience=3 s" in note for error in errors for note in error.__notes__)


async def test_a_connect_that_has_not_failed_is_waited_for_beyond_the_patience(clock):
    server = Server(duration=5)
    line = Line(server, 1)
    assert await line.open() == 1
    server.error = ConnectionRefusedError()
    with pytest.raises(ConnectionRefusedError):
        await line.open()

    assert clock.monotonic() == 10


async def test_each_failure_is_reported_with_how_many_wait(clock):
    error = ConnectionRefusedError()
    line = Line(Server(error=error), 2)

    await asyncio.gather(*callers(line, 3), return_exceptions=True)

    assert {report[0] for report in line.reports} == {error}
    assert {report[1] for report in line.reports} == {3}
    assert all(0 < report[2] <= 1 for report in line.reports)


async def test_an_error_that_cannot_be_copied_is_raised_itself(clock):
    class OddError(ConnectionError):
        def __init__(self, *, needed: int) -> None:
            super().__init__()

    with pytest.raises(OddError):
        await Line(Server(error=OddError(needed=1)), 1).open()


async def test_cancelling_a_caller_leaves_the_attempt_to_the_others(clock):
    server = Server(error=ConnectionRefusedError(), duration=0.5)
    first, second = callers(Line(server), 2)
    await asyncio.sleep(1)
    first.cancel()
    server.error = None

    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_cancelling_a_caller_in_the_tick_of_its_hand_off_passes_it_on(clock):
    line = Line(Server(error=ConnectionRefusedError()))
    first, second = callers(line, 2)
    await asyncio.sleep(1)
    assert line.give(77)
    first.cancel()

    assert await second == 77
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_an_error_that_does_not_pass_is_no_reason_for_the_next_to_wait(clock):
    server = Server(error=ConnectionRefusedError())
    first, second = callers(Line(server), 2)
    await asyncio.sleep(1.5)
    server.error = LookupError("dropped")

    with pytest.raises(LookupError):
        await first
    server.error = None
    assert await second == 1


async def test_what_is_no_exception_reaches_a_caller_too(clock):
    class Stop(BaseException):
        """Raised by an init= that means it."""

    with pytest.raises(Stop):
        await Line(Server(error=Stop())).open()


async def test_closing_sends_everybody_away_and_ends_the_attempts(clock):
    server = Server(error=ConnectionRefusedError(), duration=60)
    line = Line(server)
    tasks = callers(line, 3)
    await asyncio.sleep(1)

    line.close()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    await line.wait_closed()

    assert clock.monotonic() == 1.5
    assert server.under_way == 0
    assert [(type(error), str(error)) for error in errors] == [(asyncpg.InterfaceError, "pool is closing")] * 3
    with pytest.raises(asyncpg.InterfaceError):
        await line.open()


async def test_a_connection_of_somebody_else_is_a_reason_to_try_at_once(clock):
    server = Server(error=ConnectionRefusedError())
    line = Line(server, 60)
    (task,) = callers(line, 1)
    await asyncio.sleep(20.2)
    server.error = None
    now = clock.monotonic()

    line.recovered()

    assert await task == 1
    assert clock.monotonic() == now
