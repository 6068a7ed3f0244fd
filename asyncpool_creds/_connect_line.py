"""Those who wait for a connection: served in order by the first there is, a new one or one that comes back."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import random
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import asyncpg

from asyncpool_creds import _policy

__all__ = ["CONNECT_GRACE", "ConnectLine"]

ConnectionT = TypeVar("ConnectionT")

# A connect that is cancelled while the server's answer about TLS arrives ends in an InvalidStateError in asyncpg's
# protocol (0.30 to 0.32), for the loop's exception handler; so a close gives a quick one the time to finish.
CONNECT_GRACE: Final = 0.5


class ConnectLine(Generic[ConnectionT]):
    """Opens connections in tasks of its own while somebody waits, and goes on where that fails in a way that passes.

    As long as connects succeed, there is one for each who waits; while they fail, there is one at a time for all. The
    pauses between those end when they end, whoever waits by then: a caller who waits for the whole of its patience
    sees at least one attempt.

    Args:
        loop: The event loop.
        connect: Opens a connection.
        patience: Seconds for which a caller goes on where connects fail. A connect that has not failed by then is
            waited for.
        passes: Decides whether the error of a connect passes by itself.
        report: Called with the error of each failed attempt, how many are waiting, and the seconds until the next.
        discard: Called with a connection that nobody waits for any more.
        is_waiting: Called with True when somebody begins to wait, and with False when nobody does any more.
    """

    __slots__ = (
        "_attempts",
        "_connect",
        "_discard",
        "_error",
        "_failures",
        "_is_closed",
        "_is_in_use",
        "_is_waiting",
        "_line",
        "_loop",
        "_next_attempt",
        "_out_of_patience",
        "_passes",
        "_patience",
        "_pause",
        "_report",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        connect: Callable[[], Awaitable[ConnectionT]],
        patience: float,
        passes: Callable[[BaseException], bool],
        report: Callable[[Exception, int, float], None],
        discard: Callable[[ConnectionT], object],
        is_waiting: Callable[[bool], None],
    ) -> None:
        self._loop: Final = loop
        self._connect: Final = connect
        self._patience: Final = patience
        self._passes: Final = passes
        self._report: Final = report
        self._discard: Final = discard
        self._is_waiting: Final = is_waiting
        self._line: Final[list[asyncio.Future[ConnectionT]]] = []
        self._attempts: Final[set[asyncio.Task[None]]] = set()
        self._pause: asyncio.Future[None] | None = None
        self._next_attempt = 0.0  # on the loop's clock; counts while connects fail
        self._out_of_patience: Final[set[asyncio.Future[ConnectionT]]] = set()
        self._failures = 0
        self._error: Exception = asyncpg.InterfaceError("no connect has been tried yet")
        self._is_in_use = False
        self._is_closed = False

    async def open(self) -> ConnectionT:
        """Return a connection, once there is one.

        Cancelling this leaves the attempts as they are: they are for all who wait.

        Raises:
            Exception: Of the last attempt, when the patience has ended; one that does not pass, at once.
            asyncpg.InterfaceError: The pool is closing.
        """
        if self._is_closed:
            raise _closing()
        turn: asyncio.Future[ConnectionT] = self._loop.create_future()
        self._line.append(turn)
        if not self._is_in_use:
            self._is_in_use = True
            self._is_waiting(True)
        self._start_attempts()
        timer = self._loop.call_later(self._patience, self._give_up, turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on(turn.result())
            raise
        finally:
            timer.cancel()
            self._out_of_patience.discard(turn)
            if turn in self._line:
                self._line.remove(turn)
                self._see_who_is_left()

    def give(self, connection: ConnectionT) -> bool:
        """Hand a connection that is at rest to whoever waits longest; return False if nobody waits."""
        turn = self._next()
        if turn is None:
            return False
        turn.set_result(connection)
        return True

    def recovered(self) -> None:
        """Try again at once: the server has taken a connection."""
        self._next_attempt = 0.0
        self._end_pause()

    def close(self) -> None:
        """Send everybody away, and begin no more attempts."""
        self._is_closed = True
        while (turn := self._next()) is not None:
            turn.set_exception(_closing())

    async def wait_closed(self) -> None:
        """Wait for the end of the attempts that were under way; those that take long are cancelled."""
        if self._attempts:
            await asyncio.wait(tuple(self._attempts), timeout=CONNECT_GRACE)
        self.abandon()
        if self._attempts:
            await asyncio.wait(tuple(self._attempts))

    def abandon(self) -> None:
        """Close, and cancel the attempts that are under way."""
        self.close()
        for attempt in self._attempts:
            attempt.cancel()

    # -- the attempts

    def _start_attempts(self) -> None:
        wanted = 0 if self._is_closed else min(len(self._line), 1) if self._failures else len(self._line)
        while len(self._attempts) < wanted:
            # An empty context: it serves everyone, so the first caller's trace or request is not its own.
            context = contextvars.Context()
            name = "asyncpool_creds: connect for those who wait"
            attempt = self._loop.create_task(self._try(), name=name, context=context)
            self._attempts.add(attempt)
            attempt.add_done_callback(self._ended, context=context)

    async def _try(self) -> None:
        while self._line and not self._is_closed:
            if self._failures:
                if len(self._attempts) > 1:
                    return  # one at a time
                await self._wait()
                if not self._line or self._is_closed:
                    return
            failures = self._failures
            try:
                connection = await self._connect()
            except Exception as error:  # noqa: BLE001 - handed on
                if not self._passes(error):
                    self._refuse_first(error)
                    return
                self._error = error
                if self._failures == failures:  # else others that began with it have failed as well
                    self._failures += 1
                    delay = self._delay()
                    self._next_attempt = self._loop.time() + delay
                    self._report(error, len(self._line), delay)
                for turn in self._out_of_patience:
                    self._give_up(turn)
            else:
                self._failures = 0
                self._pass_on(connection)
                return

    def _delay(self) -> float:
        delay = _policy.reconnect_delay(self._failures, chance=random.random())  # noqa: S311 - jitter
        # What comes within the pause must have time for an attempt of its own.
        return min(delay, self._patience / 2)

    async def _wait(self) -> None:
        if self._next_attempt <= self._loop.time():
            return
        self._pause = self._loop.create_future()
        timer = self._loop.call_at(self._next_attempt, self._end_pause)
        try:
            await self._pause
        finally:
            timer.cancel()
            self._pause = None

    def _end_pause(self) -> None:
        if self._pause is not None and not self._pause.done():
            self._pause.set_result(None)

    def _ended(self, attempt: asyncio.Task[None]) -> None:
        self._attempts.discard(attempt)
        if not attempt.cancelled() and (bug := attempt.exception()) is not None:
            # Such as an init= that raises what is no Exception: whoever waits is not left waiting for it.
            turn = self._next()
            if turn is None:
                self._loop.call_exception_handler({"message": "connecting failed", "exception": bug})
            else:
                turn.set_exception(bug)
        self._start_attempts()

    # -- those who wait

    def _next(self) -> asyncio.Future[ConnectionT] | None:
        """Return the turn of whoever waits longest, and take it out of the line; None: nobody waits."""
        while self._line:
            turn = self._line.pop(0)
            if not turn.done():
                self._see_who_is_left()
                return turn
        self._see_who_is_left()
        return None

    def _see_who_is_left(self) -> None:
        if not self._line and self._is_in_use:
            self._is_in_use = False
            self._is_waiting(False)
            self._end_pause()  # what pauses sees that nobody waits

    def _refuse_first(self, error: Exception) -> None:
        self._failures = 0
        turn = self._next()
        if turn is not None:
            turn.set_exception(error)

    def _give_up(self, turn: asyncio.Future[ConnectionT]) -> None:
        if turn.done():
            return
        if self._failures:
            turn.set_exception(self._last_error())
        else:
            self._out_of_patience.add(turn)

    def _pass_on(self, connection: ConnectionT) -> None:
        if not self.give(connection):
            self._discard(connection)

    def _last_error(self) -> Exception:
        # A copy, because it is raised to several, and each adds frames of its own.
        try:
            error = copy.copy(self._error)
        except Exception:  # noqa: BLE001 - of a class that cannot be copied
            return self._error.with_traceback(None)
        note = (
            f"asyncpool_creds: given up after connect_patience={self._patience:g} s, with {self._failures} failed "
            "attempts in a row"
        )
        error.__cause__ = self._error.__cause__
        error.__notes__ = [*getattr(self._error, "__notes__", ()), note]
        return error


def _closing() -> asyncpg.InterfaceError:
    return asyncpg.InterfaceError("pool is closing")
