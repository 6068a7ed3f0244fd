"""A source that fails, hangs, lies or is refused by the server."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import anyio
import pytest
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import (
    Credential,
    CredentialExpired,
    CredentialInvalidated,
    CredentialRefreshed,
    ProviderError,
    ProviderTimeout,
    RefreshFailed,
    TokenManager,
)
from asyncpool_creds.testing import ScriptedProvider

pytestmark = pytest.mark.anyio

HANG = ScriptedProvider.HANG


async def test_while_the_old_one_is_valid_a_failure_is_nobodys_business(new_manager, provider, clock, observer):
    provider.play(60, ProviderError("down"))
    manager = await new_manager().start()

    for _ in range(56):
        assert await manager.get() is provider.credentials[0]
        await asyncio.sleep(1)

    failures = observer.of(RefreshFailed)
    assert failures
    assert all(failure.still_valid for failure in failures)
    assert [failure.attempt for failure in failures] == list(range(1, len(failures) + 1))
    assert {(failure.provider, failure.message) for failure in failures} == {("ScriptedProvider", "down")}


async def test_every_retry_comes_before_the_end_of_the_old_one(new_manager, provider, clock, observer):
    provider.play(3600, ProviderError("down"))
    manager = await new_manager().start()
    expires_at = manager.current.expires_at

    await asyncio.sleep(3590)

    failures = [failure for failure in observer.of(RefreshFailed) if failure.still_valid]
    assert len(failures) >= 5
    for failure in failures:
        left = (expires_at - failure.at).total_seconds()
        assert 0 < failure.retry_in <= max(left / 3 * 1.0001, 0.1)
        assert failure.valid_for == pytest.approx(left, abs=0.01)
    assert provider.calls < 60


async def test_a_source_that_comes_back_in_time_is_noticed_in_time(new_manager, provider, clock):
    provider.play(300, ProviderError("down"))
    manager = await new_manager().start()
    await asyncio.sleep(270)

    provider.play(300)
    await asyncio.sleep(25)

    assert manager.current is provider.credentials[1]
    assert manager.stats().rotations == 1


async def test_a_source_that_comes_back_too_late_is_noticed_without_a_caller(new_manager, provider, clock):
    provider.play(60, ProviderError("down"))
    manager = await new_manager().start()
    await asyncio.sleep(600)
    assert manager.current is None

    provider.play(3600)
    await asyncio.sleep(61)

    assert manager.current is provider.credentials[1]


async def test_once_expired_callers_get_one_typed_error_with_its_cause(new_manager, provider, clock, observer):
    error = ProviderError("vault: sealed")
    provider.play(60, error)
    manager = await new_manager(background=False).start()
    clock.advance(60)

    with pytest.raises(CredentialExpired, match=r"ScriptedProvider gave the last one at .* vault: sealed") as caught:
        await manager.get()

    assert caught.value.__cause__ is error
    assert observer.of(RefreshFailed)[0].still_valid is False
    assert_no_secret(caught.value)


async def test_a_source_that_never_gave_any_is_said_to_have_given_none(new_manager, provider):
    provider.play(ProviderError("down"))

    with pytest.raises(CredentialExpired, match="never gave one"):
        await new_manager().get()


async def test_callers_fail_fast_for_a_second_before_the_source_is_asked_again(new_manager, provider, clock):
    provider.play(ProviderError("down"))
    manager = new_manager(background=False)
    for _ in range(100):
        with pytest.raises(CredentialExpired):
            await manager.get()
    assert provider.calls == 1

    clock.advance(1)
    with pytest.raises(CredentialExpired):
        await manager.get()

    assert provider.calls == 2


async def test_a_crowd_of_callers_does_not_hammer_a_source_that_is_down(new_manager, provider, clock):
    provider.play(ProviderError("down"))
    manager = new_manager()

    for _ in range(600):
        with pytest.raises(CredentialExpired):
            await manager.get()
        await asyncio.sleep(0.1)

    # On demand; and on the manager's own account, after 2.5 s on average: chance does not make that twice as many.
    assert provider.calls <= 60 / 1 + 2 * 60 / 2.5


async def test_the_error_is_forgotten_when_the_source_is_back(new_manager, provider, clock):
    provider.play(ProviderError("down"), 60)
    manager = new_manager(background=False)
    with pytest.raises(CredentialExpired):
        await manager.get()

    clock.advance(60)

    assert await manager.get() is provider.credentials[0]


@pytest.mark.parametrize("background", [True, False])
async def test_retry_after_is_honoured_while_the_old_one_is_valid(new_manager, provider, clock, background):
    provider.play(3600, ProviderError("slow down", retry_after=60), 3600)
    manager = await new_manager(background=background).start()

    for _ in range(3590):
        await manager.get()
        await asyncio.sleep(1)

    assert provider.called_at[2] - provider.called_at[1] >= timedelta(seconds=60)
    assert provider.called_at[2] - provider.called_at[1] < timedelta(seconds=120)


async def test_retry_after_is_honoured_when_nothing_is_valid(new_manager, provider, clock):
    provider.play(ProviderError("slow down", retry_after=20), 60)
    manager = new_manager()

    for _ in range(19):
        with pytest.raises(CredentialExpired):
            await manager.get()
        await asyncio.sleep(1)
    assert provider.calls == 1
    await asyncio.sleep(2)

    assert await manager.get() is provider.credentials[0]


async def test_a_refusal_for_good_is_rarely_repeated_while_the_old_one_is_valid(new_manager, provider, clock, observer):
    provider.play(3600, ProviderError("invalid_grant", retryable=False))
    manager = await new_manager().start()

    for _ in range(358):
        await manager.get()
        await asyncio.sleep(10)

    (first, *_) = failures = [failure for failure in observer.of(RefreshFailed) if failure.valid_for > 10]
    assert first.retry_in == 30
    assert not first.retryable
    assert len(failures) <= 300 / 30 + 6


async def test_a_refusal_for_good_that_was_lifted_is_noticed_before_the_old_one_expires(new_manager, provider, clock):
    provider.play(3600, ProviderError("invalid_grant", retryable=False), 3600)
    manager = await new_manager().start()

    for _ in range(358):
        await manager.get()
        await asyncio.sleep(10)

    assert await manager.get() is provider.credentials[-1] is not provider.credentials[0]
    assert provider.calls == 3


async def test_a_refusal_for_good_is_repeated_every_half_minute_without_a_caller(new_manager, provider, clock):
    provider.play(60, ProviderError("invalid_grant", retryable=False))
    await new_manager().start()

    await asyncio.sleep(3600)

    assert 3540 / 30 - 1 <= provider.calls <= 3540 / 30 + 15  # more often just before the end


async def test_a_source_that_does_not_answer_is_given_up(new_manager, provider, clock, observer):
    provider.play(HANG)
    manager = new_manager(fetch_timeout=5)

    with pytest.raises(CredentialExpired, match="fetch_timeout") as caught:
        await manager.get()

    assert isinstance(caught.value.__cause__, ProviderTimeout)
    assert clock.monotonic() == 5
    assert provider.cancelled == 1
    assert observer.of(RefreshFailed)[0].retryable


async def test_a_refresh_that_does_not_end_is_a_timeout(new_manager, provider):
    provider.play(60, HANG)
    manager = await new_manager(fetch_timeout=timedelta(seconds=5)).start()

    with pytest.raises(TimeoutError) as caught:
        await manager.refresh()

    assert isinstance(caught.value, ProviderTimeout)


async def test_a_source_that_hangs_delays_nobody_while_the_old_one_is_valid(new_manager, provider, clock):
    provider.play(60, HANG)
    manager = await new_manager(fetch_timeout=3).start()

    for _ in range(56):
        before = clock.monotonic()
        assert await manager.get() is provider.credentials[0]
        assert clock.monotonic() == before
        await asyncio.sleep(1)

    assert provider.calls >= 3
    assert provider.peak_in_flight == 1


async def test_a_timeout_inside_the_source_is_an_error_like_any_other(new_manager, provider):
    provider.play(TimeoutError("socket"))

    with pytest.raises(CredentialExpired, match="raised TimeoutError") as caught:
        await new_manager().get()

    assert not isinstance(caught.value, TimeoutError)


async def test_a_cancellation_raised_by_the_source_reaches_no_caller(new_manager, provider, clock):
    provider.play(asyncio.CancelledError, 60)
    manager = new_manager()

    with pytest.raises(CredentialExpired, match="cancelled by the provider") as caught:
        await manager.get()
    await asyncio.sleep(2)

    assert isinstance(caught.value.__cause__, ProviderError)
    assert await manager.get() is provider.credentials[0]


async def test_a_flight_cancelled_from_outside_is_an_error_and_not_the_end(new_manager, provider, clock):
    provider.play(HANG, 60)
    manager = new_manager()
    caller = asyncio.create_task(manager.get())
    await clock.settle()

    for task in tasks_of_ours():
        task.cancel()
    with pytest.raises(CredentialExpired):
        await caller
    await asyncio.sleep(2)

    assert await manager.get() is provider.credentials[0]


async def test_a_source_that_ignores_its_cancellation_may_still_answer(new_manager, provider, clock):
    async def stubborn() -> Credential:
        for _ in range(3):
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                continue
        return provider.mint(3600)

    provider.play(stubborn)

    credential = await new_manager(fetch_timeout=5).get()

    assert credential is provider.credentials[0]
    assert clock.monotonic() == 5


async def test_a_source_that_turns_its_cancellation_into_an_error_is_believed(new_manager, provider, clock):
    async def translating() -> Credential:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            raise OSError("interrupted") from None
        raise AssertionError

    provider.play(translating)

    with pytest.raises(CredentialExpired, match="raised OSError"):
        await new_manager(fetch_timeout=5).get()


async def test_a_source_with_timeouts_of_its_own_is_left_alone(new_manager, provider, clock):
    async def careful() -> Credential:
        with anyio.move_on_after(1):
            await anyio.sleep_forever()
        return provider.mint(60)

    provider.play(careful)

    assert await new_manager(fetch_timeout=5).get() is provider.credentials[0]
    assert clock.monotonic() == 1


@pytest.mark.parametrize("answer", [None, 5, b"token", Credential], ids=["None", "number", "bytes", "class"])
async def test_a_wrong_answer_is_named_by_its_type(new_manager, answer):
    def tokens() -> object:
        return answer

    with pytest.raises(CredentialExpired, match=f"expected a Credential .* got {type(answer).__name__}"):
        await new_manager(tokens).get()


async def test_what_a_source_quotes_is_not_repeated(new_manager, provider, observer):
    provider.play(OSError("POST /token password=hunter2"))

    with pytest.raises(CredentialExpired) as caught:
        await new_manager().get()

    assert "hunter2" not in str(caught.value) + repr(observer.events)


class TestInvalidate:
    async def test_a_refused_credential_is_not_handed_out_again(self, new_manager, provider, clock, observer):
        manager = await new_manager().start()
        refused = manager.current

        manager.invalidate(refused)

        assert manager.current is None
        assert await manager.get() is provider.credentials[1]
        assert observer.of(CredentialInvalidated) == [
            CredentialInvalidated(
                at=clock.now(), provider="ScriptedProvider", fingerprint=refused.fingerprint, generation=1
            )
        ]

    async def test_a_thousand_reports_make_one_fetch(self, new_manager, provider, observer):
        manager = await new_manager().start()
        refused = manager.current

        for _ in range(1000):
            manager.invalidate(refused)
        await asyncio.gather(*(manager.get() for _ in range(1000)))
        for _ in range(1000):
            manager.invalidate(refused)

        assert provider.calls == 2
        assert len(observer.of(CredentialInvalidated)) == 1

    async def test_a_superseded_credential_cannot_be_invalidated(self, new_manager, provider):
        manager = await new_manager().start()
        old = manager.current
        new = await manager.refresh()

        manager.invalidate(old)

        assert manager.current is new

    async def test_a_stranger_cannot_be_invalidated(self, new_manager, provider):
        manager = await new_manager().start()

        manager.invalidate(Credential(secret("stranger")))

        assert manager.current is provider.credentials[0]

    async def test_before_the_first_credential_there_is_nothing_to_invalidate(self, new_manager, observer):
        new_manager().invalidate(Credential(secret()))

        assert not observer.events

    async def test_the_same_token_again_is_used_for_want_of_a_better_one(self, new_manager, provider):
        provider.play(provider.mint(3600))
        manager = await new_manager().start()

        manager.invalidate(manager.current)

        assert await manager.get() is provider.credentials[0]
        assert provider.calls == 2

    async def test_new_credentials_refused_time_after_time_are_not_fetched_in_a_loop(self, new_manager, provider):
        manager = await new_manager().start()

        for _ in range(600):
            manager.invalidate(await manager.get())
            await asyncio.sleep(0.1)

        assert provider.calls <= 1 + 7

    async def test_while_reports_are_held_back_the_credential_is_handed_out(self, new_manager, provider, clock):
        manager = await new_manager().start()
        manager.invalidate(await manager.get())
        second = await manager.get()

        manager.invalidate(second)

        assert manager.current is second
        assert provider.calls == 2

    async def test_after_a_quiet_time_a_report_is_heard_at_once(self, new_manager, provider):
        provider.play(None)
        manager = await new_manager().start()
        for _ in range(100):
            manager.invalidate(await manager.get())
            await asyncio.sleep(0.5)
        await asyncio.sleep(600)
        manager.invalidate(await manager.get())
        await manager.get()
        calls = provider.calls

        await asyncio.sleep(1.5)
        manager.invalidate(await manager.get())
        await manager.get()

        assert provider.calls == calls + 1

    async def test_a_server_that_rotates_all_the_time_is_believed_every_time(self, new_manager, provider):
        provider.play(None)
        manager = await new_manager().start()

        for rotation in range(2, 30):
            await asyncio.sleep(50)
            manager.invalidate(await manager.get())
            provider.play(None)
            await manager.get()

            assert manager.stats().generation == rotation

    async def test_a_refused_credential_stays_in_use_where_the_source_cannot_be_reached(self, new_manager, provider):
        provider.play(3600, ProviderError("down"))
        manager = await new_manager().start()

        manager.invalidate(manager.current)

        assert await manager.get() is provider.credentials[0]

    @pytest.mark.parametrize("retryable", [True, False])
    async def test_it_stays_in_use_where_the_source_has_just_failed(self, new_manager, provider, retryable):
        provider.play(3600, ProviderError("down", retryable=retryable))
        manager = await new_manager().start()
        with pytest.raises(ProviderError):
            await manager.refresh()

        manager.invalidate(manager.current)

        assert await manager.get() is provider.credentials[0]

    async def test_a_report_during_the_flight_is_answered_by_that_flight(self, new_manager, provider, clock):
        provider.play(3600, HANG)
        manager = await new_manager().start()
        refresh = asyncio.create_task(manager.refresh())
        await provider.called(2)

        manager.invalidate(manager.current)
        caller = asyncio.create_task(manager.get())
        await clock.settle()
        provider.release()

        assert await caller is await refresh is provider.credentials[1]
        assert provider.calls == 2


async def test_events_and_errors_of_a_long_bad_day_show_no_secret(provider, clock, observer):
    provider.play(60, ProviderError("down"), 60, HANG, 60, ProviderError("no", retryable=False), 60)
    errors: list[BaseException] = []
    async with TokenManager(provider, clock=clock, on_event=observer, fetch_timeout=5) as manager:
        for _ in range(900):
            try:
                await manager.get()
            except CredentialExpired as error:
                errors.append(error)
            await asyncio.sleep(1)

    assert_no_secret(*errors, *observer.events, manager)
    assert observer.of(CredentialRefreshed)
