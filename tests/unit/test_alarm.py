"""Alarms: on time, early where a clock got ahead, and one look a minute for all of them."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Callable

import pytest
from support import CountingClock

from asyncpool_creds._alarm import Alarm

pytestmark = pytest.mark.anyio

HOUR = 3600.0


@pytest.fixture
def clock() -> CountingClock:
    return CountingClock()


@pytest.fixture
def rung() -> list[float]:
    """When an alarm rang, on the monotonic clock."""
    return []


@pytest.fixture
def set_alarm(clock: CountingClock, rung: list[float]) -> Callable[[float], Alarm]:
    def set_one(seconds: float) -> Alarm:
        return Alarm(asyncio.get_running_loop(), clock, seconds, lambda: rung.append(clock.monotonic()))

    return set_one


async def test_it_rings_once_and_on_time(set_alarm, rung):
    set_alarm(1.5 * HOUR)

    await asyncio.sleep(4 * HOUR)

    assert rung == [1.5 * HOUR]


@pytest.mark.parametrize("seconds", [0.0, -5.0])
async def test_one_that_is_due_rings_in_a_moment_and_not_at_once(set_alarm, rung, seconds):
    set_alarm(seconds)
    assert rung == []

    await asyncio.sleep(0.01)

    assert rung == [0.001]


async def test_a_cancelled_one_does_not_ring_and_may_be_cancelled_again(set_alarm, rung):
    alarm = set_alarm(60)

    alarm.cancel()
    alarm.cancel()
    await asyncio.sleep(HOUR)

    assert rung == []


async def test_it_can_be_hurried_but_not_put_off(set_alarm, rung):
    alarm = set_alarm(HOUR)

    alarm.hurry(20)
    alarm.hurry(2 * HOUR)
    await asyncio.sleep(3 * HOUR)

    assert rung == [20]


async def test_one_that_has_rung_cannot_be_hurried_or_cancelled(set_alarm, rung):
    alarm = set_alarm(1)
    await asyncio.sleep(2)

    alarm.hurry(1)
    alarm.cancel()
    await asyncio.sleep(HOUR)

    assert rung == [1]


@pytest.mark.parametrize("move", ["suspend", "step"])
async def test_all_ring_within_a_minute_of_a_leap_of_a_clock_and_not_together(set_alarm, rung, clock, move):
    for _ in range(1000):
        set_alarm(2 * HOUR)
    await asyncio.sleep(25)

    getattr(clock, move)(HOUR)
    await asyncio.sleep(60)

    assert len(rung) == 1000
    assert len(set(rung)) > 900  # two may share a moment by chance
    assert rung[-1] - rung[0] > 9


async def test_one_that_is_about_to_ring_is_not_put_off_by_a_leap(set_alarm, rung, clock):
    set_alarm(51)
    clock.suspend(HOUR)

    await asyncio.sleep(52)

    assert len(rung) == 1


async def test_a_clock_that_was_set_back_and_forward_again_is_noticed(set_alarm, rung, clock):
    set_alarm(HOUR)
    clock.step(-HOUR)
    alarm = set_alarm(HOUR)  # whoever sets it has just seen the clock an hour back
    clock.step(HOUR)

    await asyncio.sleep(60)

    assert len(rung) == 2
    alarm.cancel()


async def test_a_clock_that_is_slewed_is_no_news_before_it_is_a_second_ahead(set_alarm, rung, clock):
    set_alarm(HOUR)

    for _ in range(20):
        clock.step(0.03)
        await asyncio.sleep(60)
    assert rung == []

    for _ in range(20):
        clock.step(0.03)
        await asyncio.sleep(60)
    assert len(rung) == 1


async def test_one_look_a_minute_serves_all(set_alarm, clock):
    alarms = [set_alarm(2 * HOUR) for _ in range(1000)]

    clock.wakeups = 0
    await asyncio.sleep(HOUR)

    assert 60 <= clock.wakeups <= 75
    for alarm in alarms:
        alarm.cancel()


async def test_nobody_looks_where_no_alarm_is_set(set_alarm, clock):
    set_alarm(1)
    set_alarm(HOUR).cancel()
    await asyncio.sleep(2)

    clock.wakeups = 0
    await asyncio.sleep(HOUR)

    assert clock.wakeups == 1


async def test_what_was_in_the_context_of_whoever_set_it_is_not_kept_alive(set_alarm):
    class Request:
        pass

    variable: contextvars.ContextVar[Request] = contextvars.ContextVar("request")

    def handle() -> weakref.ref[Request]:
        request = Request()
        variable.set(request)
        alarms.append(set_alarm(HOUR))
        return weakref.ref(request)

    alarms: list[Alarm] = []
    request = contextvars.copy_context().run(handle)
    gc.collect()

    assert request() is None
    alarms[0].cancel()


def test_an_alarm_that_nobody_cancelled_does_not_keep_its_closed_loop(clock):
    async def main() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.get_running_loop()
        Alarm(loop, clock, HOUR, lambda: None)
        return weakref.ref(loop)

    loop = clock.run(main())
    gc.collect()

    assert loop() is None
