"""An outage of the source ends when it ends: with a caller or without one, after no pause longer than needed."""

from __future__ import annotations

import asyncio
import traceback
from datetime import timedelta

import pytest
from support import assert_no_secret

from asyncpool_creds import (
    ClockSkewDetected,
    CredentialExpired,
    CredentialUnavailable,
    ProviderError,
    RefreshFailed,
    TokenManager,
)

pytestmark = pytest.mark.anyio

DOWN = ProviderError("down")
REFUSED = ProviderError("access denied", retryable=False)


@pytest.mark.parametrize(("error", "longest"), [(DOWN, 5), (REFUSED, 30)], ids=["down", "refused"])
async def test_a_source_that_is_back_is_noticed_without_a_caller(new_manager, provider, clock, error, longest):
    provider.play(60, error)
    manager = await new_manager().start()
    await asyncio.sleep(3600)
    assert manager.current is None

    provider.play(60)
    await asyncio.sleep(longest)

    assert manager.current is provider.credentials[1]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("error", [DOWN, REFUSED], ids=["down", "refused"])
async def test_a_caller_is_served_a_second_after_the_source_is_back(new_manager, provider, clock, background, error):
    provider.play(60, error)
    manager = await new_manager(background=background).start()
    for _ in range(600):
        await asyncio.sleep(1)
        with_error = await asyncio.gather(manager.get(), return_exceptions=True)
    assert isinstance(with_error[0], CredentialExpired)

    provider.play(60)
    await asyncio.sleep(1)

    assert await manager.get() is provider.credentials[1]


async def test_retry_after_is_honoured_for_a_minute_while_nothing_is_valid(new_manager, provider, clock):
    provider.play(ProviderError("slow down", retry_after=3600), 60)
    manager = new_manager()

    for _ in range(59):
        with pytest.raises(CredentialUnavailable):
            await manager.get()
        await asyncio.sleep(1)
    assert provider.calls == 1
    await asyncio.sleep(1)

    assert await manager.get() is provider.credentials[0]


@pytest.mark.parametrize("lifetime", [3, 10, 60, 900, 3600])
@pytest.mark.parametrize(
    "error",
    [REFUSED, ProviderError("slow down", retry_after=120), DOWN],
    ids=["403", "429", "down"],
)
async def test_one_failure_of_a_refresh_costs_nothing(new_manager, provider, clock, observer, lifetime, error):
    provider.play(lifetime, error, lifetime)
    manager = await new_manager().start()

    while len(provider.credentials) < 2:
        assert await manager.get()
        await asyncio.sleep(lifetime / 1000)

    (failure,) = observer.of(RefreshFailed)
    assert failure.retry_in <= failure.valid_for / 3 + 0.001 or failure.retry_in == pytest.approx(0.1)
    left = (provider.credentials[0].expires_at - clock.now()) / timedelta(seconds=1)
    assert left > failure.valid_for * 0.6  # time to replace connections


async def test_a_caller_with_patience_waits_for_the_source_to_be_back(new_manager, provider, clock):
    provider.play(DOWN)
    manager = new_manager(patience=10)
    callers = [asyncio.create_task(manager.get()) for _ in range(5)]
    await asyncio.sleep(4)
    assert not any(caller.done() for caller in callers)

    provider.play(60)

    async with asyncio.timeout(1.01):
        assert set(await asyncio.gather(*callers)) == {provider.credentials[0]}


async def test_the_patience_of_a_start_ends(new_manager, provider, clock):
    provider.play(DOWN)

    with pytest.raises(CredentialUnavailable):
        await new_manager(patience=timedelta(seconds=10)).start()

    assert clock.monotonic() == pytest.approx(10, abs=0.01)
    assert 3 <= provider.calls <= 20


async def test_a_deadline_of_the_caller_comes_before_the_patience(new_manager, provider, clock):
    provider.play(DOWN)
    manager = new_manager(patience=60)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await manager.get()

    assert clock.monotonic() == 2
    assert not manager._waiters


async def test_closing_ends_the_patience_of_callers(new_manager, provider, clock):
    provider.play(DOWN)
    manager = new_manager(patience=60)
    caller = asyncio.create_task(manager.get())
    await asyncio.sleep(2.5)

    await manager.aclose()

    with pytest.raises(Exception, match="is closed"):
        await caller
    assert clock.monotonic() == 2.5


@pytest.mark.parametrize("patience", [-1, float("nan"), "long", True])
def test_a_patience_that_makes_no_sense_is_told(provider, patience):
    with pytest.raises(ValueError, match="patience"):
        TokenManager(provider, patience=patience)


async def test_the_error_of_a_source_that_never_gave_any_says_so(new_manager, provider):
    provider.play(DOWN)

    with pytest.raises(CredentialUnavailable, match="never gave one") as caught:
        await new_manager().get()

    assert isinstance(caught.value, CredentialExpired)
    assert caught.value.__cause__ is DOWN


async def test_only_the_first_caller_gets_all_that_led_to_a_failure(new_manager, provider, clock):
    def broken() -> None:
        raise KeyError("access_token")

    provider.play(broken)
    manager = new_manager()
    errors = await asyncio.gather(*(manager.get() for _ in range(100)), return_exceptions=True)

    first, *others = ("".join(traceback.format_exception(error)) for error in errors)
    assert "KeyError" in first
    assert "in broken" in first
    assert all("Traceback" not in "".join(traceback.format_exception(error.__cause__)) for error in errors[1:])
    assert all("failure 1 of ScriptedProvider" in other for other in others)
    assert all("raised KeyError at test_manager_outages.py" in str(error) for error in errors)
    assert all(error.__cause__.retryable for error in errors)
    assert_no_secret(*errors)


async def test_the_next_failure_is_shown_again(new_manager, provider, clock):
    first, second = ProviderError("down"), ProviderError("still down")
    provider.play(first, second)
    manager = new_manager(background=False)
    causes = []
    for _ in range(4):
        with pytest.raises(CredentialUnavailable) as caught:
            await manager.get()
        causes.append(caught.value.__cause__)
        clock.advance(0.5)

    assert causes[0] is first
    assert causes[2] is second
    assert str(causes[1]).startswith("failure 1 of")
    assert str(causes[3]).startswith("failure 2 of")


async def test_a_skew_that_was_learned_shortens_every_life(new_manager, provider, clock, observer, no_jitter):
    provider.play(20)
    manager = await new_manager().start()
    refused = await manager.stamp()

    manager.learn_skew(refused, 8.0)
    manager.learn_skew(refused, 8.0)
    manager.learn_skew(refused, 9.5)

    (event,) = observer.of(ClockSkewDetected)
    assert (event.provider, event.skew, event.lifetime) == ("ScriptedProvider", 8.0, pytest.approx(20))
    assert manager.stats().seconds_left == pytest.approx(10.5)
    await asyncio.sleep(60)
    gaps = [later - earlier for earlier, later in zip(provider.called_at, provider.called_at[1:], strict=False)]
    assert all(gap <= timedelta(seconds=10.5 * 4 / 5 + 0.1) for gap in gaps)


async def test_a_credential_that_had_long_to_live_was_not_refused_for_a_skew(new_manager, provider, clock, observer):
    manager = await new_manager().start()
    before = manager.stats().seconds_left

    manager.learn_skew(await manager.stamp(), before)

    assert manager.stats().seconds_left == before
    assert observer.of(ClockSkewDetected) == []
