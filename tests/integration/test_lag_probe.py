"""The watchman himself: what holds the event loop up during a refresh is seen, and what does not is left alone."""

from __future__ import annotations

import asyncio
import time

import anyio.to_thread
import pytest
from lag_probe import LIMIT, LagProbe, watch, watch_cold

from asyncpool_creds import TokenManager

pytestmark = pytest.mark.anyio

_LONG = 10 * LIMIT  # however slow the machine is


async def sleep_in_the_loop():
    time.sleep(_LONG)  # noqa: ASYNC251 - what a blocking SDK does


async def compute():
    until = time.thread_time() + _LONG
    while time.thread_time() < until:
        pass


async def sleep_in_a_task():
    await asyncio.create_task(sleep_in_the_loop())


async def wait():
    await asyncio.sleep(_LONG)


async def sleep_in_a_thread():
    await anyio.to_thread.run_sync(time.sleep, _LONG)


def refresh_that(does):
    async def source():
        await asyncio.sleep(0)
        await does()
        return "token"

    async def refresh():
        async with TokenManager(source) as manager:
            await manager.get()

    return refresh


@pytest.mark.parametrize("blocks", [sleep_in_the_loop, compute, sleep_in_a_task])
async def test_a_source_that_blocks_is_seen(blocks):
    probe = await watch(refresh_that(blocks))

    assert ("sleep_in_the_loop" if blocks is sleep_in_a_task else "TokenManager._fly") in {
        name for name, _, seconds in probe.blocking if seconds > LIMIT
    }


@pytest.mark.parametrize("waits", [wait, sleep_in_a_thread])
async def test_a_source_that_waits_is_not(waits):
    probe = await watch(refresh_that(waits))

    assert probe.steps > 0
    assert probe.blocking == []


async def test_what_others_do_meanwhile_is_their_business():
    started = asyncio.Event()

    async def source():
        started.set()
        await asyncio.sleep(0)
        return "token"

    async def block():
        await started.wait()
        time.sleep(_LONG)  # noqa: ASYNC251 - that is the point

    async def refresh():
        async with asyncio.TaskGroup() as group, TokenManager(source) as manager:
            group.create_task(block())
            await manager.get()

    assert (await watch(refresh)).blocking == []


async def test_every_refresh_is_watched_and_none_after_the_end():
    probe = LagProbe()
    source = refresh_that(sleep_in_the_loop)
    with probe.watching():
        await source()
        await source()
    steps = probe.steps
    await source()

    assert len(probe.blocking) >= 2
    assert probe.steps == steps


async def test_what_blocks_in_the_first_refresh_of_a_process_is_seen():
    source = f"async def block():\n    time.sleep({_LONG})\n    return 'token'"
    probe = await watch_cold(f"import time\n{source}", "block")

    assert probe.blocking


async def test_a_source_that_is_not_async_blocks_nothing_in_the_first_refresh_of_a_process():
    probe = await watch_cold("import time", f"lambda: time.sleep({_LONG}) or 'token'")

    assert probe.blocking == []
