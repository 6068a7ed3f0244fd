"""A thousand managers in one event loop: what they cost while nobody calls, and ten thousand callers of one."""

from __future__ import annotations

import asyncio
import bisect
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from support import CountingClock

from asyncpool_creds import TokenManager
from asyncpool_creds.testing import ScriptedProvider

pytestmark = pytest.mark.anyio

HOUR = 3600.0


@pytest.fixture
def clock() -> CountingClock:
    return CountingClock()


@pytest.fixture
async def start(provider: ScriptedProvider, clock: CountingClock) -> AsyncIterator[Callable[[int], object]]:
    """Start so many managers, which nobody observes; they are closed after the test."""
    async with AsyncExitStack() as opened:

        async def start_some(count: int, *, apart: float = 0.0) -> None:
            for _ in range(count):
                await opened.enter_async_context(TokenManager(provider, clock=clock, on_event=()))
                await asyncio.sleep(apart)

        yield start_some


def most_within_a_second(provider: ScriptedProvider) -> int:
    """Return the peak of the fetches after the first thousand."""
    moments = [moment.timestamp() for moment in provider.called_at[1000:]]
    assert len(moments) == 1000
    return max(bisect.bisect_left(moments, moment + 1) - index for index, moment in enumerate(moments))


@pytest.mark.parametrize(("lifetime", "fetches"), [(HOUR, 1), (HOUR / 4, 4)])
async def test_a_thousand_idle_managers_wake_the_process_to_fetch_and_once_a_minute(
    start, provider, clock, lifetime, fetches
):
    provider.play(lifetime)
    await start(1000, apart=0.06)  # else their timers would be one

    begun = provider.calls
    clock.wakeups = 0
    await asyncio.sleep(HOUR)

    fetched = provider.calls - begun
    assert fetched >= fetches * 1000
    assert clock.wakeups <= fetched + 75


async def test_managers_without_an_end_in_sight_never_wake_the_process(start, provider, clock):
    provider.play(None)
    await start(100)

    clock.wakeups = 0
    await asyncio.sleep(HOUR)

    assert clock.wakeups == 1


@pytest.mark.parametrize("lifetime", [HOUR, HOUR / 4])
async def test_a_thousand_tokens_of_the_same_moment_are_not_fetched_anew_in_the_same(start, provider, lifetime):
    provider.play(lifetime)
    await start(1000)
    assert len(set(provider.called_at)) == 1

    await asyncio.sleep(lifetime)

    assert most_within_a_second(provider) <= 100


async def test_after_a_suspension_a_thousand_managers_do_not_fetch_at_once(start, provider, clock):
    await start(1000)

    clock.suspend(2 * HOUR)
    await asyncio.sleep(60)

    assert most_within_a_second(provider) <= 200


async def test_ten_thousand_callers_who_find_nothing_make_one_fetch_and_are_served_in_order(new_manager, provider):
    provider.play(ScriptedProvider.HANG)
    manager = new_manager()
    served: list[int] = []

    async def call(number: int) -> None:
        await manager.get()
        served.append(number)

    callers = [asyncio.create_task(call(number)) for number in range(10_000)]
    await provider.called()
    provider.release()
    await asyncio.gather(*callers)

    assert provider.calls == 1
    assert served == list(range(10_000))


async def test_the_request_of_the_first_caller_is_not_kept_alive(new_manager, clock):
    class Request:
        pass

    variable: contextvars.ContextVar[Request] = contextvars.ContextVar("request")
    manager = new_manager()

    async def handle() -> weakref.ref[Request]:
        request = Request()
        variable.set(request)
        await manager.get()
        return weakref.ref(request)

    request = await asyncio.create_task(handle())
    await clock.settle()
    gc.collect()

    assert request() is None


async def test_a_refused_credential_is_fetched_anew_within_a_minute_though_nobody_calls(new_manager, provider):
    manager = await new_manager().start()

    manager.invalidate(manager.current)
    await asyncio.sleep(61)

    assert provider.calls == 2
