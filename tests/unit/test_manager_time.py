"""Suspended processes, stepped clocks, and managers that only live during calls."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from support import tasks_of_ours

from asyncpool_creds import Credential, CredentialExpired, ProviderError
from asyncpool_creds.testing import ScriptedProvider

pytestmark = pytest.mark.anyio

HOUR = 3600.0


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("move", ["suspend", "step"])
async def test_an_hour_that_was_slept_through_is_noticed_on_the_next_call(
    new_manager, provider, clock, background, move
):
    provider.play(0.5 * HOUR)
    manager = await new_manager(background=background).start()

    getattr(clock, move)(HOUR)

    assert manager.current is None
    credential = await manager.get()
    assert credential is provider.credentials[1]
    assert credential.expires_at > clock.now()


@pytest.mark.parametrize("move", ["suspend", "step"])
async def test_an_hour_that_was_slept_through_is_noticed_in_the_background_within_a_minute(
    new_manager, provider, clock, move
):
    provider.play(1.5 * HOUR)
    manager = await new_manager().start()
    await asyncio.sleep(600)

    getattr(clock, move)(1.3 * HOUR)
    await asyncio.sleep(61)

    assert manager.current is provider.credentials[1]


async def test_an_hour_back_does_not_lengthen_a_life(new_manager, provider, clock):
    provider.play(0.5 * HOUR)
    manager = await new_manager(background=False).start()

    clock.step(-HOUR)
    clock.advance(0.5 * HOUR)

    assert manager.current is None


async def test_an_hour_back_does_not_delay_a_refresh(new_manager, provider, clock):
    provider.play(0.5 * HOUR)
    manager = await new_manager().start()

    clock.step(-HOUR)
    await asyncio.sleep(0.5 * HOUR)

    assert manager.stats().generation == 2


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_a_clock_that_is_stepped_to_and_fro_makes_no_refresh_loop(new_manager, provider, clock, seconds):
    manager = await new_manager().start()

    for _ in range(10):
        clock.step(seconds)
        await asyncio.sleep(5)
        clock.step(-seconds)
        await asyncio.sleep(5)

    assert provider.calls <= 12
    assert manager.current is not None


async def test_a_token_from_before_the_step_is_judged_by_the_clock_after_it(new_manager, provider, clock):
    provider.play(Credential("token", expires_at=clock.now() + timedelta(minutes=10)))
    clock.step(HOUR)

    with pytest.raises(CredentialExpired, match="this host's clock is ahead"):
        await new_manager().get()


async def test_a_suspension_during_the_flight_is_counted_against_what_it_brings(new_manager, provider, clock):
    credential = provider.mint(600)

    def late() -> Credential:
        clock.suspend(601)
        return credential

    provider.play(late)

    with pytest.raises(CredentialExpired, match="expired 1 s ago"):
        await new_manager().get()


async def test_a_suspension_does_not_cut_the_wait_for_a_retry_short(new_manager, provider, clock):
    provider.play(ProviderError("slow down", retry_after=20), 60)
    manager = new_manager(background=False)
    with pytest.raises(CredentialExpired):
        await manager.get()

    clock.step(-HOUR)
    clock.advance(21)

    assert await manager.get() is provider.credentials[0]


async def test_without_background_nothing_happens_between_calls(new_manager, provider, clock):
    manager = await new_manager(background=False).start()

    await asyncio.sleep(7 * 86_400)

    assert provider.calls == 1
    assert not tasks_of_ours()
    assert manager.background is False


async def test_without_background_a_stale_credential_is_served_and_refreshed(new_manager, provider, clock):
    manager = await new_manager(background=False).start()
    await asyncio.sleep(3500)

    old = await manager.get()
    await clock.settle()
    new = await manager.get()

    assert (old, new) == (provider.credentials[0], provider.credentials[1])
    assert provider.calls == 2


async def test_without_background_an_expired_one_is_fetched_once_for_all(new_manager, provider, clock):
    manager = await new_manager(background=False).start()
    await asyncio.sleep(3600)

    callers = await asyncio.gather(*(manager.get() for _ in range(100)))

    assert set(callers) == {provider.credentials[1]}
    assert provider.calls == 2


async def test_without_background_failures_back_off_too(new_manager, provider, clock, observer):
    provider.play(HOUR, ProviderError("down"))
    manager = await new_manager(background=False).start()
    clock.advance(HOUR - 280)

    for _ in range(2600):
        await manager.get()
        await asyncio.sleep(0.1)

    assert 3 <= provider.calls <= 40
    assert all(event.retry_in is None for event in observer.events[1:])


async def test_without_background_a_flight_cut_off_by_a_freeze_is_finished_after_it(new_manager, provider, clock):
    provider.play(ScriptedProvider.HANG)
    manager = new_manager(background=False, fetch_timeout=30)
    caller = asyncio.create_task(manager.get())
    await provider.called()

    clock.suspend(HOUR)
    provider.release()

    assert (await caller).expires_at > clock.now()
