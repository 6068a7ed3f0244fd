"""One fetch for everybody; no cancellation passes between those who wait, and none is left waiting at the end."""

from __future__ import annotations

import asyncio

import pytest
from support import assert_no_secret, tasks_of_ours

from asyncpool_creds import CredentialExpired, CredentialUnavailable, ManagerClosed, ProviderError, TokenManager
from asyncpool_creds.testing import ScriptedProvider

pytestmark = pytest.mark.anyio

HANG = ScriptedProvider.HANG


async def test_a_thousand_callers_make_one_fetch(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    callers = [asyncio.create_task(manager.get()) for _ in range(1000)]
    await clock.settle()

    provider.release()

    assert set(await asyncio.gather(*callers)) == {provider.credentials[0]}
    assert provider.calls == provider.peak_in_flight == 1


async def test_a_thousand_callers_share_one_failure(new_manager, provider, clock):
    provider.play(ProviderError("down"))
    manager = new_manager()

    errors = await asyncio.gather(*(manager.get() for _ in range(1000)), return_exceptions=True)

    assert provider.calls == 1
    assert {type(error) for error in errors} == {CredentialUnavailable}
    assert len({id(error) for error in errors}) == 1000
    assert_no_secret(errors[0])


async def test_get_and_refresh_share_the_flight(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    callers = [asyncio.create_task(call()) for call in (manager.get, manager.refresh, manager.start, manager.stamp)]
    await clock.settle()

    provider.release()
    await asyncio.gather(*callers)

    assert provider.calls == 1


async def test_a_cancelled_caller_changes_nothing_for_the_others(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    first, second, third = (asyncio.create_task(manager.get()) for _ in range(3))
    await clock.settle()

    first.cancel()
    third.cancel()
    await clock.settle()
    provider.release()

    assert await second is provider.credentials[0]
    assert first.cancelled()
    assert third.cancelled()
    assert (provider.calls, provider.cancelled) == (1, 0)


async def test_the_flight_lands_even_if_every_caller_was_cancelled(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    callers = [asyncio.create_task(manager.get()) for _ in range(10)]
    await clock.settle()

    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    provider.release()
    await clock.settle()

    assert manager.current is provider.credentials[0]
    assert await manager.get() is provider.credentials[0]
    assert (provider.calls, provider.cancelled) == (1, 0)


async def test_a_caller_who_gives_up_does_not_stop_the_fetch(new_manager, clock):
    slow = ScriptedProvider(3600, clock=clock, delay=5)
    manager = new_manager(slow)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await manager.get()
    credential = await manager.get()

    assert credential is slow.credentials[0]
    assert slow.calls == 1
    assert clock.monotonic() == 5


async def test_a_caller_cancelled_in_the_very_moment_of_landing_hurts_nobody(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    first, second = (asyncio.create_task(manager.get()) for _ in range(2))
    await clock.settle()

    provider.release()
    for _ in range(10):
        first.cancel()
        await asyncio.sleep(0)

    assert await second is provider.credentials[0]
    assert first.done()


async def test_a_caller_cancelled_by_an_observer_of_the_failure_hurts_nobody(new_manager, provider, clock):
    provider.play(ProviderError("down"))
    manager = new_manager()
    first, second = (asyncio.create_task(manager.get()) for _ in range(2))
    manager.subscribe(lambda _: first.cancel())

    with pytest.raises(CredentialExpired):
        await second

    assert first.cancelled()


async def test_a_flight_cancelled_from_outside_does_not_disturb_closing(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    caller = asyncio.create_task(manager.get())
    await provider.called()
    (flight,) = tasks_of_ours()

    flight.cancel()
    await manager.aclose()

    with pytest.raises(ManagerClosed):
        await caller
    assert provider.closed == 1


async def test_a_second_refresh_makes_a_second_fetch(new_manager, provider):
    manager = await new_manager().start()

    await manager.refresh()
    await manager.refresh()

    assert provider.calls == 3
    assert provider.peak_in_flight == 1


async def test_closing_wakes_those_who_wait(new_manager, provider, clock):
    provider.play(HANG)
    manager = new_manager()
    callers = [asyncio.create_task(call()) for call in (manager.get, manager.refresh, manager.start)]
    await clock.settle()

    await manager.aclose()
    errors = await asyncio.gather(*callers, return_exceptions=True)

    assert {type(error) for error in errors} == {ManagerClosed}
    assert (provider.cancelled, provider.closed, provider.in_flight) == (1, 1, 0)
    assert not tasks_of_ours()


async def test_after_closing_nothing_is_handed_out(new_manager, provider):
    manager = await new_manager().start()
    credential = manager.current

    await manager.aclose()

    for call in (manager.get, manager.refresh, manager.start, manager.stamp):
        with pytest.raises(ManagerClosed, match="ScriptedProvider is closed"):
            await call()
    manager.invalidate(credential)
    assert provider.calls == 1


async def test_after_closing_nothing_is_refreshed(new_manager, provider, clock):
    manager = await new_manager().start()

    await manager.aclose()
    await asyncio.sleep(7200)

    assert provider.calls == 1
    assert not tasks_of_ours()


async def test_it_may_be_closed_before_it_was_ever_used(new_manager, provider):
    await new_manager().aclose()

    assert (provider.calls, provider.closed) == (0, 1)


async def test_closing_again_is_harmless(new_manager, provider):
    manager = await new_manager().start()

    await manager.aclose()
    await manager.aclose()

    assert provider.closed == 1


async def test_several_may_close_it_and_all_wait_for_the_end(clock):
    class SlowToClose(ScriptedProvider):
        async def aclose(self) -> None:
            await asyncio.sleep(5)
            await super().aclose()

    slow = SlowToClose(clock=clock)
    manager = await TokenManager(slow, clock=clock).start()

    await asyncio.gather(*(manager.aclose() for _ in range(3)))

    assert slow.closed == 1
    assert clock.monotonic() == 5


async def test_closing_goes_on_if_its_caller_is_cancelled(clock):
    class SlowToClose(ScriptedProvider):
        async def aclose(self) -> None:
            await asyncio.sleep(5)
            await super().aclose()

    slow = SlowToClose(clock=clock)
    manager = await TokenManager(slow, clock=clock).start()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await manager.aclose()
    await manager.aclose()

    assert slow.closed == 1
    assert not tasks_of_ours()


async def test_closing_during_a_background_refresh_waits_for_its_end(new_manager, provider, clock):
    provider.play(60, HANG)
    manager = await new_manager().start()
    await provider.called(2)

    await manager.aclose()

    assert (provider.cancelled, provider.closed) == (1, 1)
    assert not tasks_of_ours()


async def test_closing_before_the_flight_had_its_first_turn_leaves_nothing(new_manager, provider, clock):
    manager = new_manager()
    caller = asyncio.create_task(manager.get())
    await asyncio.sleep(0)

    await manager.aclose()

    with pytest.raises(ManagerClosed):
        await caller
    assert provider.closed == 1
    assert not tasks_of_ours()


async def test_a_block_closes_it(provider, clock):
    async with TokenManager(provider, clock=clock) as manager:
        assert manager.current is not None

    assert provider.closed == 1
    with pytest.raises(ManagerClosed):
        await manager.get()


async def test_a_block_whose_start_fails_closes_the_source(provider, clock):
    provider.play(ProviderError("down"))

    with pytest.raises(CredentialExpired):
        async with TokenManager(provider, clock=clock):
            raise AssertionError

    assert provider.closed == 1
    assert not tasks_of_ours()


async def test_a_block_whose_start_is_cancelled_closes_the_source(provider, clock):
    provider.play(HANG)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5), TokenManager(provider, clock=clock):
            raise AssertionError

    assert (provider.cancelled, provider.closed) == (1, 1)
    assert not tasks_of_ours()


async def test_an_error_of_the_source_while_closing_is_seen(clock):
    class Broken(ScriptedProvider):
        async def aclose(self) -> None:
            raise OSError("socket")

    manager = await TokenManager(Broken(clock=clock), clock=clock).start()

    with pytest.raises(OSError, match="socket"):
        await manager.aclose()
    assert not tasks_of_ours()


@pytest.mark.parametrize("background", [True, False])
async def test_without_a_flight_no_task_lives(new_manager, background):
    manager = await new_manager(background=background).start()

    assert not tasks_of_ours()
    await manager.refresh()
    assert not tasks_of_ours()


async def test_its_tasks_have_names(new_manager, provider, clock):
    provider.play(HANG)
    caller = asyncio.create_task(new_manager().get())
    await clock.settle()

    assert [task.get_name() for task in tasks_of_ours()] == ["asyncpool_creds: refresh from ScriptedProvider"]
    provider.release()
    await caller
