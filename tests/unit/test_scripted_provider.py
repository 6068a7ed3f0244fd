from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from support import assert_no_secret, secret

from asyncpool_creds import Credential, CredentialProvider, ProviderError
from asyncpool_creds.testing import ScriptedProvider, VirtualClock

pytestmark = pytest.mark.anyio


async def test_without_a_script_it_mints_for_ever(clock: VirtualClock):
    provider: CredentialProvider = ScriptedProvider(clock=clock)

    credentials = [await provider.fetch() for _ in range(3)]

    assert [credential.password for credential in credentials] == ["token-1", "token-2", "token-3"]
    assert {credential.expires_at for credential in credentials} == {clock.now() + timedelta(hours=1)}


async def test_without_a_clock_it_uses_the_real_one():
    credential = await ScriptedProvider(60).fetch()

    assert abs(credential.expires_at - (VirtualClock().now() + timedelta(seconds=60))) < timedelta(seconds=2)


async def test_it_answers_in_the_order_of_the_script_and_then_repeats_the_end(clock: VirtualClock):
    fixed = Credential(secret())
    error = ProviderError("down")
    provider = ScriptedProvider(
        60, None, fixed, error, LookupError, lambda: fixed, lambda: asyncio.sleep(5, fixed), clock=clock, user="app"
    )
    started = clock.now()

    first, second, third = await provider.fetch(), await provider.fetch(), await provider.fetch()
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    with pytest.raises(LookupError):
        await provider.fetch()
    rest = [await provider.fetch() for _ in range(3)]

    assert first == Credential("token-1", user="app", expires_at=started + timedelta(minutes=1))
    assert second == Credential("token-2", user="app")
    assert third is fixed
    assert caught.value is error
    assert rest == [fixed, fixed, fixed]
    assert clock.monotonic() == 10


async def test_an_error_at_the_end_is_repeated_with_a_short_traceback(clock: VirtualClock):
    error = ProviderError("down")
    provider = ScriptedProvider(error, clock=clock)
    lengths = []

    for _ in range(3):
        with pytest.raises(ProviderError) as caught:
            await provider.fetch()
        lengths.append(len(caught.traceback))

    assert len(set(lengths)) == 1


async def test_it_returns_what_a_function_returns_even_if_that_is_wrong(clock: VirtualClock):
    assert await ScriptedProvider(lambda: 5, clock=clock).fetch() == 5


async def test_a_new_script_takes_effect_with_the_next_call(clock: VirtualClock):
    provider = ScriptedProvider(60, ProviderError("down"), clock=clock)
    await provider.fetch()

    provider.play(None)

    assert (await provider.fetch()).expires_at is None


async def test_it_hangs_until_it_is_released(clock: VirtualClock):
    provider = ScriptedProvider(ScriptedProvider.HANG, clock=clock)
    first, second = asyncio.create_task(provider.fetch()), asyncio.create_task(provider.fetch())
    await provider.called(2)
    await clock.settle()

    assert not first.done()
    provider.release()

    assert {(await first).password, (await second).password} == {"token-1", "token-2"}


async def test_what_hangs_can_be_released_with_any_answer(clock: VirtualClock):
    provider = ScriptedProvider(ScriptedProvider.HANG, clock=clock)
    task = asyncio.create_task(provider.fetch())
    await clock.settle()

    provider.release(ProviderError("down"))

    with pytest.raises(ProviderError, match="down"):
        await task


async def test_releasing_nobody_is_a_mistake(clock: VirtualClock):
    with pytest.raises(RuntimeError, match="no call of fetch"):
        ScriptedProvider(ScriptedProvider.HANG, clock=clock).release()


async def test_what_hangs_can_be_cancelled(clock: VirtualClock):
    provider = ScriptedProvider(ScriptedProvider.HANG, clock=clock)
    task = asyncio.create_task(provider.fetch())
    await provider.called()
    await clock.settle()

    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert (provider.calls, provider.cancelled, provider.in_flight) == (1, 1, 0)
    with pytest.raises(RuntimeError):
        provider.release()


async def test_it_counts_its_callers(clock: VirtualClock):
    provider = ScriptedProvider(60, clock=clock, delay=5)
    started = clock.now()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(provider.fetch())
        await provider.called(3)
        assert provider.in_flight == 3
    await provider.fetch()

    assert (provider.calls, provider.in_flight, provider.peak_in_flight) == (4, 0, 3)
    assert provider.called_at == [started] * 3 + [started + timedelta(seconds=5)]
    assert [credential.password for credential in provider.credentials] == [f"token-{n}" for n in range(1, 5)]
    assert clock.monotonic() == 10


async def test_one_can_wait_for_a_call_that_is_yet_to_come(clock: VirtualClock):
    provider = ScriptedProvider(60, clock=clock)
    waiting = asyncio.create_task(provider.called(2))

    await provider.fetch()
    await clock.settle()
    assert not waiting.done()
    await provider.fetch()

    await waiting


async def test_a_call_after_closing_is_a_mistake(clock: VirtualClock):
    provider = ScriptedProvider(60, clock=clock)

    await provider.aclose()

    assert provider.closed == 1
    with pytest.raises(RuntimeError, match="after aclose"):
        await provider.fetch()


async def test_its_tokens_can_carry_a_mark(clock: VirtualClock):
    credential = await ScriptedProvider(60, clock=clock, prefix=secret()).fetch()

    assert credential.password == f"{secret()}-1"
    assert_no_secret(credential)
