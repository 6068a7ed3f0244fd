"""Time that moves only when a test says so, or when nothing else is left to do."""

from __future__ import annotations

import asyncio
import selectors
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Executor

__all__ = ["VirtualClock"]

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class VirtualClock:
    """A clock for tests, and event loops that run on it.

    Hours pass in microseconds: as soon as every task of such a loop waits, the clock
    jumps to the next timer (after trio's ``MockClock(autojump_threshold=0)``). Results
    repeat from run to run, because no timer ever depends on the speed of the machine.

    With anyio's pytest plugin, whole test modules run on it::

        @pytest.fixture
        def clock() -> VirtualClock:
            return VirtualClock()


        @pytest.fixture
        def anyio_backend(clock: VirtualClock) -> tuple[str, dict[str, object]]:
            return "asyncio", {"loop_factory": clock.new_event_loop}


        @pytest.mark.anyio
        async def test_an_hour_passes_at_once(clock: VirtualClock) -> None:
            await asyncio.sleep(3600)

    Without a plugin there is `run`. Give the same clock to whatever measures time:
    ``TokenManager(provider, clock=clock)``.

    I/O and threads take real time, of which a virtual clock knows nothing. What is
    ready is always served before the clock jumps, and it stands still while a call of
    ``loop.run_in_executor`` (`asyncio.to_thread`, name resolution) runs; but an answer
    that is still on its way does not hold it. Where timers guard such I/O, set
    `autojump_threshold`.

    Not thread-safe: move it from the thread of its loop.

    Args:
        start: What the wall clock shows at first, as an aware datetime; the real time,
            cut to a whole second, if not given.
        autojump_threshold: Real seconds for which nothing must happen before it jumps.

    Raises:
        ValueError: `start` is naive, or `autojump_threshold` is negative.
    """

    def __init__(self, start: datetime | None = None, *, autojump_threshold: float = 0.0) -> None:
        if start is not None and start.utcoffset() is None:
            raise ValueError("start is a naive datetime; give it a time zone, as in datetime.now(timezone.utc)")
        if not autojump_threshold >= 0:
            raise ValueError(f"autojump_threshold must be zero or more seconds, not {autojump_threshold!r}")
        self._monotonic = 0.0
        # The wall clock is kept as a distance, so that many small steps do not add up to a rounding error.
        self._wall_at_zero = float(int(time.time())) if start is None else start.timestamp()
        self._autojump_threshold = autojump_threshold

    def time(self) -> float:
        """Return the seconds since 1970-01-01 UTC that the wall clock shows."""
        return self._wall_at_zero + self._monotonic

    def monotonic(self) -> float:
        """Return the seconds that passed since the clock was made, suspensions not counted."""
        return self._monotonic

    def now(self) -> datetime:
        """Return what the wall clock shows, as an aware UTC datetime."""
        return datetime.fromtimestamp(self.time(), UTC)

    def advance(self, seconds: float) -> None:
        """Move both clocks forward, as if the process had been busy for so long.

        Timers that are due run at the next opportunity, all at the new time. To let each
        run at its own time, `asyncio.sleep` instead.
        """
        if not seconds >= 0:
            raise ValueError(f"time does not run backwards: advance() takes zero or more seconds, not {seconds!r}")
        self._monotonic += seconds

    def step(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an administrator or NTP does; monotonic time takes no notice."""
        self._wall_at_zero += seconds

    def suspend(self, seconds: float) -> None:
        """Let `seconds` go by while the process does not run: a closed laptop, a frozen function.

        The wall clock has moved when it wakes up; the monotonic clock has not, and neither
        have timers, since on Linux both stand still meanwhile.
        """
        if not seconds >= 0:
            raise ValueError(f"suspend() takes zero or more seconds, not {seconds!r}")
        self._wall_at_zero += seconds

    async def settle(self) -> None:
        """Return once every other task of this loop waits for a timer, for I/O or for another task.

        Time does not move meanwhile.

        Raises:
            RuntimeError: The running loop does not run on this clock.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(loop, _VirtualLoop) or loop.clock is not self:
            raise RuntimeError("settle() works on an event loop made by this clock's new_event_loop()")
        await loop.idle()

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """Return a new event loop that runs on this clock; several may share it."""
        return _VirtualLoop(self, self._autojump_threshold)

    def run(self, main: Coroutine[object, object, _Result]) -> _Result:
        """Run `main` on a new loop of this clock and return its result, as `asyncio.run` does."""
        with asyncio.Runner(loop_factory=self.new_event_loop) as runner:
            return runner.run(main)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: VirtualClock, autojump_threshold: float) -> None:
        self.clock = clock
        self._waiting_for_idle: list[asyncio.Future[None]] = []
        self._threads_at_work = 0
        super().__init__(_Selector(self, autojump_threshold))
        # asyncio compares with a nanosecond, which is lost in the rounding after half a year:
        # a timer that is due this very moment would then wait for ever.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self.clock.monotonic()

    async def idle(self) -> None:
        future = self.create_future()
        self._waiting_for_idle.append(future)
        await future

    def announce_idle(self) -> bool:
        """Wake those who wait for this moment; return whether there were any."""
        waiting = [future for future in self._waiting_for_idle if not future.done()]
        self._waiting_for_idle.clear()
        for future in waiting:
            future.set_result(None)
        return bool(waiting)

    @property
    def has_threads_at_work(self) -> bool:
        return self._threads_at_work > 0

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Arguments], _Result], *args: *_Arguments
    ) -> asyncio.Future[_Result]:
        future = super().run_in_executor(executor, func, *args)
        self._threads_at_work += 1
        future.add_done_callback(self._thread_has_finished)
        return future

    def _thread_has_finished(self, _: asyncio.Future[_Result]) -> None:
        self._threads_at_work -= 1

    async def shutdown_default_executor(self, *args: float | None, **kwargs: float | None) -> None:
        # From 3.12 on it takes a timeout, and joins threads, in real time, under a timer of ours.
        self._threads_at_work += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._threads_at_work -= 1


class _Selector(selectors.DefaultSelector):
    """Serves I/O that is ready; where the loop would sleep, moves its clock instead."""

    def __init__(self, loop: _VirtualLoop, autojump_threshold: float) -> None:
        super().__init__()
        self._loop = loop
        self._autojump_threshold = autojump_threshold

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop asks with a timeout of 0 while callbacks are ready, so any other means that all tasks wait.
        ready = super().select(0)
        if ready or timeout == 0 or self._loop.announce_idle():
            return ready
        if timeout is None or self._loop.has_threads_at_work:
            return super().select(None)
        if self._autojump_threshold and (ready := super().select(self._autojump_threshold)):
            return ready
        self._loop.clock.advance(timeout)
        return []
