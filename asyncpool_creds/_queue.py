"""The queue of slots: who waits longest is served first, and nobody connects while a connection is on its way back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Final

import asyncpg

from asyncpool_creds._handoff import hand_over
from asyncpool_creds._slots import AnyProxy, Slot

__all__ = ["SlotQueue"]

# Seconds that somebody waits for a reset before he takes a slot that has to connect: the server's answer is a round
# trip away, a connect several of them.
_PATIENCE: Final = 0.05


class SlotQueue:
    """What a pool puts in the place of asyncpg's queue.

    The last slot that came back is the first to go out again, those with a connection before those without. A slot
    that comes back while somebody waits is handed to him: in asyncpg's queue, a task that takes the next one
    without waiting overtakes him.

    Args:
        fair: False: as in asyncpg's queue.

    Attributes:
        resetting: How many slots are on their way back, as soon as a server has acknowledged a reset.
    """

    def __init__(self, *, fair: bool) -> None:
        self._slots: Final[list[Slot]] = []
        self._waiting: Final[deque[asyncio.Future[Slot | None]]] = deque()
        self._served: Final[list[tuple[asyncio.Future[Slot | None], Slot | None]]] = []
        self._is_held = False
        self._is_closed = False
        self._fair: Final = fair
        self.resetting = 0

    def fill(self, slots: Iterable[Slot]) -> None:
        """Begin with `slots`, the last of them first."""
        self._slots.extend(slots)

    def check_out(self) -> AnyProxy | None:
        """Return the connection that is to go out next, if nobody has to wait for anything; else there is `get`."""
        slots = self._slots
        if not slots or self._waiting:
            return None
        proxy = slots[-1].check_out()
        if proxy is not None:
            slots.pop()
        return proxy

    def _take_last(self, *, connected: bool) -> Slot | None:
        for index in range(len(self._slots) - 1, -1, -1):
            if self._slots[index].is_connected() is connected:
                return self._slots.pop(index)
        return None

    # -- what asyncpg calls

    async def get(self) -> Slot:
        """Return a slot, as soon as it is the caller's turn.

        Raises:
            asyncpg.InterfaceError: The pool is closing.
        """
        slot = self._take()
        while slot is None:
            loop = asyncio.get_running_loop()
            turn: asyncio.Future[Slot | None] = loop.create_future()
            self._waiting.append(turn)
            impatience = loop.call_later(_PATIENCE, self._serve_vacant, turn) if self._slots else None
            try:
                slot = await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on(turn.result())
                else:
                    # If no connection comes back for long, thousands would lie here.
                    with contextlib.suppress(ValueError):
                        self._waiting.remove(turn)
                raise
            finally:
                if impatience is not None:
                    impatience.cancel()
            if self._is_closed:
                self._pass_on(slot)
                raise asyncpg.InterfaceError("pool is closing")
            slot = slot or self._take()
        return slot

    def close(self) -> None:
        """Turn everybody away who waits for a slot: the pool is closing, and nobody is served from it any more.

        Whoever was served a moment ago and has not run since is turned away, too.
        """
        self._is_closed = True
        while self._serve(None):
            pass

    def _take(self) -> Slot | None:
        slot = None if self._fair and self._waiting else self._take_last(connected=True)
        # Each reset that is under way serves one of those who wait.
        if slot is None and self._slots and self.resetting <= len(self._waiting):
            return self._slots.pop()
        return slot

    def put_nowait(self, slot: Slot) -> None:
        """Take `slot` back, or hand it to whoever waits longest."""
        if self._fair and self._serve(slot):
            return
        self._slots.append(slot)
        if not self._fair:
            self._serve(None)

    def _serve(self, slot: Slot | None) -> bool:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # or he was cancelled a moment ago
                if self._is_held:
                    self._served.append((turn, slot))
                else:
                    turn.set_result(slot)
                return True
        return False

    def _pass_on(self, slot: Slot | None) -> None:
        """Find somebody else for what was handed to one who is gone."""
        if slot is not None:
            self.put_nowait(slot)
        elif self._slots:
            self._serve(None)

    def _serve_vacant(self, turn: asyncio.Future[Slot | None]) -> None:
        if self._slots and not turn.done():
            self._waiting.remove(turn)
            hand_over(turn, self._slots.pop())

    def hold(self) -> None:
        """Let nobody go on who is served from now on, until `let_go`."""
        self._is_held = True

    def let_go(self) -> None:
        """Let those go on who have been served meanwhile, at once: for callbacks of the event loop only."""
        self._is_held = False
        while self._served:
            turn, slot = self._served.pop(0)
            if not turn.done():
                hand_over(turn, slot)
            else:  # one who went on before him has cancelled him
                self._pass_on(slot)

    def get_disconnected_nowait(self) -> Slot:
        """Return a slot without a connection, for asyncpg 0.32 to connect.

        Raises:
            asyncio.QueueEmpty: There is none.
        """
        slot = self._take_last(connected=False)
        if slot is None:
            raise asyncio.QueueEmpty
        return slot

    def qsize(self) -> int:
        """Return the number of slots that nobody has."""
        return len(self._slots)
