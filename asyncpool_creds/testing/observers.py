"""An observer that remembers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from asyncpool_creds import Event

__all__ = ["RecordingObserver"]

_Event = TypeVar("_Event", bound="Event")


class RecordingObserver:
    """Keeps every event it is called with, in order, in `events`.

    ::

        observer = RecordingObserver()
        pool = await create_pool(dsn, credentials=provider, on_event=observer)
        await observer.seen(CredentialRefreshed, count=2)
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._recorded = asyncio.Event()

    def __call__(self, event: Event) -> None:
        """Record `event` and wake those who wait for it."""
        self.events.append(event)
        # Wakes those who wait now; the next ones wait for the next event, perhaps on another loop.
        self._recorded.set()
        self._recorded = asyncio.Event()

    def of(self, kind: type[_Event]) -> list[_Event]:
        """Return the events of this kind, oldest first."""
        return [event for event in self.events if isinstance(event, kind)]

    async def seen(self, kind: type[_Event], count: int = 1) -> _Event:
        """Return the `count`-th event of this kind since the start or `clear`, as soon as it is there.

        Has no time limit of its own; where the event may never come, use `anyio.fail_after`.
        """
        while len(found := self.of(kind)) < count:
            await self._recorded.wait()
        return found[count - 1]

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self.events.clear()
