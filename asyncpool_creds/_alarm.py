"""Timers that no clock makes late: an event loop's own, and one look a minute that serves all of them."""

from __future__ import annotations

import asyncio
import contextvars
import random
import weakref
from collections.abc import Callable
from typing import Final

from asyncpool_creds._clock import Clock

__all__ = ["Alarm"]

# A clock that got ahead is noticed so often, and alarms then ring within so long: together a minute. Not all at
# once, because a thousand credentials may have expired while the process was suspended.
_LOOK_INTERVAL: Final = 50.0
_SPREAD: Final = 10.0
# Seconds by which NTP may have slewed a clock before that is news.
_TOLERANCE: Final = 1.0
# A rounding error before the moment, a timer that is due at once would come round at once for ever.
_GRAIN: Final = 0.001


class Alarm:
    """Calls `callback` once, in `seconds`, or earlier if a clock gets ahead of the event loop's.

    The loop's timers run on the monotonic clock, which stands still in a suspended process and does not
    see the wall clock being stepped. Within a minute of either, all alarms ring, so whoever is called
    looks whether his time has come, and sets another alarm if not. It rings in a context of its own:
    what whoever set it had in his is not kept alive by it.

    Args:
        loop: The event loop that calls.
        clock: The clocks that decide whether the time has come.
        seconds: From now.
        callback: What to call.
    """

    __slots__ = ("_callback", "_timer", "_watch")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, seconds: float, callback: Callable[[], None]
    ) -> None:
        self._callback = callback
        self._watch = _watch_on(loop, clock)
        self._watch.join(self)
        self._timer: asyncio.TimerHandle | None = None
        self._start(seconds)

    def hurry(self, seconds: float) -> None:
        """Ring in `seconds`, if not before; on a loop that is closed, nothing rings any more."""
        loop = self._watch.loop
        if self._timer is not None and not loop.is_closed() and self._timer.when() > loop.time() + seconds:
            self._timer.cancel()
            self._start(seconds)

    def cancel(self) -> None:
        """Do not ring any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._watch.leave(self)

    def _start(self, seconds: float) -> None:
        self._timer = _call_later(self._watch.loop, max(seconds, _GRAIN), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._watch.leave(self)
        self._callback()


class _Watch:
    """Looks, for all alarms of one event loop, whether a clock has got ahead of it."""

    __slots__ = ("__weakref__", "_alarms", "_clock", "_leads", "_timer", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.loop = loop
        self._clock = clock
        self._leads = self._measure()
        self._alarms: set[Alarm] = set()
        self._timer: asyncio.TimerHandle | None = None

    def join(self, alarm: Alarm) -> None:
        """Watch for `alarm`, which knows what the clocks show now; the others hear if that is news."""
        self._compare()
        self._alarms.add(alarm)
        if self._timer is None:
            self._timer = _call_later(self.loop, _LOOK_INTERVAL, self._look)

    def leave(self, alarm: Alarm) -> None:
        """Watch for `alarm` no more."""
        self._alarms.discard(alarm)
        if not self._alarms and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = _call_later(self.loop, _LOOK_INTERVAL, self._look)
        self._compare()

    def _compare(self) -> None:
        leads = self._measure()
        if any(abs(lead - before) > _TOLERANCE for lead, before in zip(leads, self._leads, strict=True)):
            # Back is news too: ahead again from there, a clock would else be where it was.
            self._leads = leads
            for alarm in self._alarms:
                alarm.hurry(random.random() * _SPREAD)  # noqa: S311 - jitter

    def _measure(self) -> tuple[float, float]:
        now = self.loop.time()
        return self._clock.time() - now, self._clock.monotonic() - now


def _call_later(loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
    return loop.call_later(seconds, callback, context=contextvars.Context())


def _watch_on(loop: asyncio.AbstractEventLoop, clock: Clock) -> _Watch:
    # By identity: no other loop or clock has that of one which a watch still holds.
    key = id(loop), id(clock)
    watch = _watches.get(key)
    if watch is None:
        watch = _watches[key] = _Watch(loop, clock)
    return watch


# A watch lives as long as one of its alarms, or its timer.
_watches: Final[weakref.WeakValueDictionary[tuple[int, int], _Watch]] = weakref.WeakValueDictionary()
