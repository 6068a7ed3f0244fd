"""The inactivity timer, which is set once and looks back."""

from __future__ import annotations

import asyncio

import pytest

from asyncpool_creds._slots import IdleTimer

pytestmark = pytest.mark.anyio

LIFETIME = 10.0


class Slot:
    """What the timer asks of one; it notes when it was deactivated."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self.is_in_use = False
        self.ended = []

    def deactivate(self):
        self.ended.append(self._loop.time())


@pytest.fixture
async def slot():
    return Slot()


@pytest.fixture
async def timer(slot):
    return IdleTimer(asyncio.get_running_loop(), LIFETIME, slot)


@pytest.fixture
async def elapsed():
    loop = asyncio.get_running_loop()
    began = loop.time()
    return lambda moment: pytest.approx(began + moment)


async def test_a_connection_at_rest_is_closed_when_its_time_is_up(slot, timer, elapsed):
    await asyncio.sleep(3 * LIFETIME)

    assert slot.ended == [elapsed(LIFETIME)]


async def test_its_time_counts_from_its_last_use(slot, timer, elapsed):
    for _ in range(5):
        await asyncio.sleep(LIFETIME - 1)
        timer.start()
    await asyncio.sleep(3 * LIFETIME)

    assert slot.ended == [elapsed(5 * (LIFETIME - 1) + LIFETIME)]


async def test_one_in_use_is_left_alone_and_its_time_counts_from_its_release(slot, timer, elapsed):
    slot.is_in_use = True
    await asyncio.sleep(3 * LIFETIME)
    assert slot.ended == []

    slot.is_in_use = False
    timer.start()
    await asyncio.sleep(3 * LIFETIME)
    assert slot.ended == [elapsed(4 * LIFETIME)]


async def test_a_timer_that_is_forgotten_closes_nothing(slot, timer):
    timer.cancel()
    await asyncio.sleep(3 * LIFETIME)

    assert slot.ended == []
