from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from asyncpool_creds import CredentialInvalidated, Event, Observer, ReplacementFailed
from asyncpool_creds.testing import RecordingObserver, VirtualClock

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)
INVALIDATED = CredentialInvalidated(at=NOON, provider="Vault", fingerprint="0badcafe", generation=1)
FAILED = ReplacementFailed(at=NOON, error=OSError(), message="OSError", retry_in=1.0)
FAILED_AGAIN = ReplacementFailed(at=NOON, error=OSError(), message="OSError", retry_in=2.0)


def test_it_keeps_every_event_in_order():
    observer = RecordingObserver()
    callback: Observer = observer

    for event in (FAILED, INVALIDATED, FAILED_AGAIN):
        callback(event)

    assert observer.events == [FAILED, INVALIDATED, FAILED_AGAIN]
    assert observer.of(ReplacementFailed) == [FAILED, FAILED_AGAIN]
    assert observer.of(Event) == observer.events


async def test_an_event_that_was_seen_is_there_at_once():
    observer = RecordingObserver()
    observer(FAILED)
    observer(FAILED_AGAIN)

    assert await observer.seen(ReplacementFailed) is FAILED
    assert await observer.seen(ReplacementFailed, count=2) is FAILED_AGAIN


async def test_an_event_that_is_yet_to_come_can_be_waited_for(clock: VirtualClock):
    observer = RecordingObserver()
    waiting = asyncio.create_task(observer.seen(ReplacementFailed, count=2))

    for event in (FAILED, INVALIDATED):
        observer(event)
        await clock.settle()
        assert not waiting.done()
    observer(FAILED_AGAIN)

    assert await waiting is FAILED_AGAIN


async def test_what_was_cleared_does_not_count():
    observer = RecordingObserver()
    observer(FAILED)

    observer.clear()

    assert not observer.events
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(observer.seen(ReplacementFailed), 1)
