"""Those who wait for a server to take connections again: one attempt at a time for all, served in order of arrival."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import asyncpg

from asyncpool_creds import _policy

__all__ = ["ConnectLine"]

ConnectionT = TypeVar("ConnectionT")


class _Turn:
    """Somebody's place in the line."""

    __slots__ = ("wakeup",)

    def __init__(self) -> None:
        self.wakeup: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.wakeup is not None and not self.wakeup.done():
            self.wakeup.set_result(None)


class ConnectLine:
    """Goes on trying to connect where that fails in a way that passes.

    Args:
        loop: The event loop.
        patience: Seconds for which a caller goes on trying; 0: not at all, as asyncpg.
        passes: Decides whether the error of a connect passes by itself.
        report: Called with the error of each failed attempt, how many are waiting, and the seconds until the next.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        patience: float,
        passes: Callable[[BaseException], bool],
        report: Callable[[Exception, int, float], None],
    ) -> None:
        self._loop: Final = loop
        self._patience: Final = patience
        self._passes: Final = passes
        self._report: Final = report
        self._line: Final[list[_Turn]] = []
        self._failures = 0
        self._error: Exception = asyncpg.InterfaceError("no connect has been tried yet")
        self._next_attempt_at = 0.0
        self._is_closed = False

    async def open(self, connect: Callable[[], Awaitable[ConnectionT]]) -> ConnectionT:
        """Return what `connect` returns, once it does.

        Cancelling this passes the turn on to the next in line.

        Raises:
            Exception: Of the last attempt, one's own or that of whoever is first in line, when the patience has ended;
                one that does not pass, at once.
            asyncpg.InterfaceError: The pool is closing.
        """
        started = self._loop.time()
        if not self._line:
            try:
                return await connect()
            except Exception as error:
                if self._patience == 0 or not self._passes(error):
                    raise
                self._failed(error)
        turn = _Turn()
        self._line.append(turn)
        try:
            return await self._in_line(turn, connect, started)
        finally:
            self._line.remove(turn)
            if self._line:
                self._line[0].wake()

    def recovered(self) -> None:
        """Try again at once: the server has taken a connection."""
        self._next_attempt_at = 0.0
        if self._line:
            self._line[0].wake()

    def close(self) -> None:
        """Send everybody away."""
        self._is_closed = True
        for turn in self._line:
            turn.wake()

    async def _in_line(self, turn: _Turn, connect: Callable[[], Awaitable[ConnectionT]], started: float) -> ConnectionT:
        give_up_at = started + self._patience
        while True:
            now = self._loop.time()
            if self._is_closed:
                raise asyncpg.InterfaceError("pool is closing")
            if now >= give_up_at:
                raise self._last_error()
            is_first = self._line[0] is turn
            if is_first and now >= self._next_attempt_at:
                try:
                    connection = await connect()
                except Exception as error:
                    if not self._passes(error):
                        raise
                    self._failed(error)
                else:
                    self._failures, self._next_attempt_at = 0, 0.0
                    return connection
            else:
                await self._wait(turn, min(give_up_at, self._next_attempt_at) if is_first else give_up_at)

    async def _wait(self, turn: _Turn, until: float) -> None:
        turn.wakeup = self._loop.create_future()
        timer = self._loop.call_at(until, turn.wake)
        try:
            await turn.wakeup
        finally:
            timer.cancel()

    def _failed(self, error: Exception) -> None:
        self._error = error
        self._failures += 1
        delay = _policy.reconnect_delay(self._failures, chance=random.random())  # noqa: S311 - jitter
        self._next_attempt_at = self._loop.time() + delay
        self._report(error, max(len(self._line), 1), delay)

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
