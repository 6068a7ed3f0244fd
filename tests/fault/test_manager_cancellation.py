"""Cancellation at every suspension point of what a token manager does, found by counting them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import anyio
import pytest
from fault_world import LIFETIME, PATIENCE, World, interrupt_everywhere

from asyncpool_creds import CredentialExpired, ManagerClosed, ProviderError, TokenManager

pytestmark = pytest.mark.anyio

Run: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]

OPERATIONS: dict[str, Callable[[TokenManager], Coroutine[Any, Any, Any]]] = {
    "get": TokenManager.get,
    "stamp": TokenManager.stamp,
    "refresh": TokenManager.refresh,
    "start": TokenManager.start,
}
STATES: dict[str, Callable[[World], None]] = {
    "empty": lambda world: None,
    "fresh": lambda world: None,
    "stale": lambda world: world.clock.advance(LIFETIME * 0.9),
    "expired": lambda world: world.clock.advance(LIFETIME),
    "suspended": lambda world: world.clock.suspend(LIFETIME),
}


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_cancelling_one_waiter_anywhere_changes_nothing_for_the_others(world, operation, state, how):
    async def once(run: Run) -> None:
        manager = world.manager()
        if state != "empty":
            await manager.get()
        STATES[state](world)
        before = manager.stats().fetches
        other = asyncio.ensure_future(OPERATIONS[operation](manager))
        await run(OPERATIONS[operation](manager))

        with anyio.fail_after(PATIENCE):
            await other
            assert await manager.get() is manager.current
        assert world.provider.cancelled == 0
        assert world.provider.peak_in_flight == 1
        assert manager.stats().fetches <= before + 2
        await finish(world, manager)

    await interrupt_everywhere(once, how)


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
async def test_cancelling_anyone_who_waits_for_a_source_that_fails_leaves_the_error_typed(world, how):
    async def fail():
        await asyncio.sleep(0)
        raise ProviderError("down")

    async def get(manager):
        try:
            await manager.get()
        except CredentialExpired as expired:
            return expired

    async def once(run: Run) -> None:
        manager = world.manager(world.source(fail))
        other = asyncio.ensure_future(get(manager))
        await run(get(manager))

        with anyio.fail_after(PATIENCE):
            assert isinstance((await other).__cause__, ProviderError)
        assert manager.stats().fetches == 1
        await finish(world, manager)

    await interrupt_everywhere(once, how)


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
@pytest.mark.parametrize("state", ["fresh", "in flight", "hanging"])
async def test_cancelling_aclose_anywhere_does_not_stop_the_closing(world, state, how):
    async def once(run: Run) -> None:
        source = world.source(world.mint)
        manager = world.manager(source)
        await manager.get()
        if state == "hanging":
            source.play(source.HANG)
        waiting = []
        if state != "fresh":
            waiting = [asyncio.ensure_future(manager.refresh()) for _ in range(2)]
            await source.called(2)
        await run(manager.aclose())

        with anyio.fail_after(PATIENCE):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            await manager.aclose()
        assert {type(one) for one in outcomes} <= {ManagerClosed}
        assert source.closed == 1
        with pytest.raises(ManagerClosed):
            await manager.get()
        await finish(world, manager)

    await interrupt_everywhere(once, how)


@pytest.mark.parametrize("how", ["waiting", "ready", "twice"])
async def test_cancelling_the_life_of_a_manager_anywhere_leaves_nothing(world, how):
    async def once(run: Run) -> None:
        manager = world.manager()

        async def live():
            async with manager:
                await manager.refresh()

        await run(live())
        await finish(world, manager)

    await interrupt_everywhere(once, how)


async def finish(world: World, manager: TokenManager) -> None:
    with anyio.fail_after(PATIENCE):
        await manager.aclose()
    world.managers.clear()
    await world.assert_nothing_left()
    world.assert_no_complaints()
