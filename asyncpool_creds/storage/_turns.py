"""Waiting for one's turn: in this process first, and then, one for all of them, with the other processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

__all__ = ["Turns", "in_thread", "pauses", "to_the_end"]

_T = TypeVar("_T")
_FIRST_PAUSE: Final = 0.005
_GROWTH: Final = 1.5


class Turns:
    """A lock for each key and event loop; it is gone with its last user."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], asyncio.Lock] = WeakValueDictionary()

    def of(self, key: str) -> asyncio.Lock:
        """Return the lock of `key`."""
        place = (asyncio.get_running_loop(), key)
        lock = self._locks.get(place)
        if lock is None:
            lock = self._locks[place] = asyncio.Lock()
        return lock


def pauses(longest: float) -> Iterator[float]:
    """Yield seconds to wait before one attempt and the next: short ones first, each with jitter, at most `longest`."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.75, 1.0)  # noqa: S311 - nobody gains by guessing it
        pause = min(pause * _GROWTH, longest)


async def in_thread(job: Callable[[], _T], limiter: anyio.CapacityLimiter) -> _T:
    """Run `job` in a thread; a cancellation is raised once it has ended.

    What a thread does cannot be stopped: whoever released a lock before would have it done later, to the next holder.
    """
    return await to_the_end(anyio.to_thread.run_sync(job, limiter=limiter))


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`; a cancellation is raised once it has ended."""
    task = asyncio.create_task(work, name="asyncpool_creds: storage")
    cancelled: asyncio.CancelledError | None = None
    # The shield keeps a cancelled scope from cancelling again with every turn of the loop.
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is None:
        return task.result()
    if task.cancelled():
        raise cancelled
    raise cancelled from task.exception()
