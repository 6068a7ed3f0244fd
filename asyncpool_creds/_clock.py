"""The two clocks by which staleness is decided."""

from __future__ import annotations

import time as _time
from datetime import UTC, datetime
from typing import Final, Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock", "utc_now"]


class Clock(Protocol):
    """Where the time comes from.

    Two readings, because neither is enough: the wall clock can be stepped, and the
    monotonic clock stands still while a laptop sleeps or a function is frozen
    (``CLOCK_MONOTONIC``, clock_gettime(2)).
    """

    def time(self) -> float:
        """Return seconds since 1970-01-01 UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds of a clock that never goes backwards."""
        ...


class SystemClock:
    """The machine's own clocks."""

    # Bound straight to the C functions: they are read on every acquire.
    time = staticmethod(_time.time)
    monotonic = staticmethod(_time.monotonic)


SYSTEM_CLOCK: Final = SystemClock()


def utc_now(clock: Clock) -> datetime:
    """Return what the wall clock shows."""
    return datetime.fromtimestamp(clock.time(), UTC)
