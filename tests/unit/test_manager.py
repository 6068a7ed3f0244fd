"""The life of a credential: fresh, stale, expired, renewed, rotated."""

from __future__ import annotations

import asyncio
import contextvars
import math
from datetime import UTC, datetime, timedelta

import pytest
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import (
    Credential,
    CredentialExpired,
    CredentialRefreshed,
    ProviderError,
    RefreshFailed,
    ThresholdReduced,
    TokenManager,
)
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider

pytestmark = pytest.mark.anyio


def immediately(coroutine) -> object:
    """Run a coroutine that must not suspend, and return its result."""
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    return finished.value.value


@pytest.mark.parametrize("argument", ["refresh_threshold", "fetch_timeout", "min_validity", "default_lifetime"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "soon", True, timedelta(seconds=-1)], ids=str)
async def test_nonsense_for_a_duration_is_refused_by_name(argument, value, provider):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        TokenManager(provider, **{argument: value})

    assert not tasks_of_ours()


@pytest.mark.parametrize("argument", ["refresh_threshold", "fetch_timeout", "default_lifetime"])
async def test_zero_is_no_duration(argument, provider):
    with pytest.raises(ValueError, match=f"{argument} must be more than zero"):
        TokenManager(provider, **{argument: 0})


async def test_a_source_that_is_none_is_refused():
    with pytest.raises(TypeError, match="credentials: expected"):
        TokenManager(secret())


async def test_an_observer_that_is_none_is_refused(provider):
    with pytest.raises(TypeError, match="on_event takes"):
        TokenManager(provider, on_event=[5])


async def test_nothing_is_fetched_before_it_is_asked_for(new_manager, provider, clock):
    manager = new_manager()

    await asyncio.sleep(60)

    assert manager.current is None
    assert provider.calls == 0
    assert manager.stats().seconds_left is None


async def test_starting_fetches_the_first_credential(new_manager, provider, clock, observer):
    manager = await new_manager().start()

    assert manager.current is provider.credentials[0]
    (event,) = observer.events
    assert event == CredentialRefreshed(
        at=clock.now(),
        provider="ScriptedProvider",
        fingerprint=manager.current.fingerprint,
        generation=1,
        rotated=False,
        expires_at=clock.now() + timedelta(hours=1),
        refresh_at=event.refresh_at,
        duration=0.0,
    )
    assert clock.now() + timedelta(minutes=55) <= event.refresh_at < clock.now() + timedelta(minutes=56)


async def test_a_fresh_credential_is_returned_without_suspending(new_manager, provider):
    manager = await new_manager().start()

    assert immediately(manager.get()) is manager.current
    assert provider.calls == 1


async def test_a_stale_credential_is_returned_at_once_while_it_is_refreshed(new_manager, provider, clock):
    manager = await new_manager(background=False).start()
    provider.play(ScriptedProvider.HANG)
    clock.advance(3500)

    assert immediately(manager.get()) is provider.credentials[0]
    await provider.called(2)
    assert immediately(manager.get()) is provider.credentials[0]
    provider.release()
    await clock.settle()

    assert immediately(manager.get()) is provider.credentials[1]
    assert provider.calls == 2


async def test_an_expired_credential_is_never_handed_out(new_manager, provider, clock):
    manager = await new_manager(background=False).start()
    clock.advance(3600)

    assert manager.current is None
    credential = await manager.get()

    assert credential is provider.credentials[1]
    assert credential.expires_at > clock.now()


async def test_a_credential_has_some_life_left_when_it_is_handed_out(new_manager, provider, clock):
    manager = await new_manager(background=False, min_validity=60).start()
    clock.advance(3541)

    credential = await manager.get()

    assert credential is provider.credentials[1]


async def test_a_minimum_validity_of_zero_allows_the_last_second(new_manager, provider, clock):
    manager = await new_manager(background=False, min_validity=0).start()
    clock.advance(3599.5)

    assert immediately(manager.get()) is provider.credentials[0]


async def test_in_the_background_a_credential_is_refreshed_before_anyone_asks(new_manager, provider, clock):
    manager = await new_manager().start()
    started = clock.now()

    await asyncio.sleep(24 * 3600)

    assert provider.peak_in_flight == 1
    assert 24 <= manager.stats().generation == provider.calls <= 28
    assert all(
        55 * 60 <= (later - earlier).total_seconds() < 56 * 60
        for earlier, later in zip([started, *provider.called_at[1:]], provider.called_at[1:], strict=False)
    )


async def test_no_caller_waits_while_a_background_manager_rotates(new_manager, provider, clock):
    provider.play(60)
    manager = await new_manager().start()

    for _ in range(600):
        immediately(manager.get())
        await asyncio.sleep(1)

    assert manager.stats().rotations >= 10


@pytest.mark.parametrize("threshold", [600, 600.0, timedelta(minutes=10)])
async def test_the_threshold_counts_from_the_expiry(new_manager, provider, clock, threshold, no_jitter):
    manager = await new_manager(refresh_threshold=threshold).start()

    await asyncio.sleep(3601 - 600)

    assert provider.called_at[1] - provider.called_at[0] == timedelta(minutes=50)
    assert manager.stats().generation == 2


async def test_a_threshold_longer_than_the_life_is_cut_with_one_warning_and_no_loop(new_manager, provider, observer):
    provider.play(60)
    await new_manager(refresh_threshold=3600).start()

    await asyncio.sleep(600)

    (event,) = observer.of(ThresholdReduced)
    assert (event.setting, event.requested, event.lifetime) == ("refresh_threshold", 3600, 60)
    assert 0 < event.used < 60
    assert 10 <= provider.calls <= 14


async def test_a_threshold_a_little_shorter_than_the_life_is_no_refresh_loop_either(new_manager, provider, no_jitter):
    provider.play(60)
    await new_manager(refresh_threshold=59.9).start()

    await asyncio.sleep(600)

    assert provider.calls <= 200


async def test_a_short_threshold_makes_nobody_wait(new_manager, provider, clock):
    provider.play(*[lambda: asyncio.sleep(0.5, provider.mint(3600))])
    manager = await new_manager(refresh_threshold=5).start()

    await asyncio.sleep(3580)
    for _ in range(40):
        immediately(manager.get())
        await asyncio.sleep(0.5)

    assert manager.stats().generation == 2


async def test_a_minimum_validity_longer_than_the_life_is_cut_with_one_warning(new_manager, provider, observer):
    provider.play(5)
    manager = await new_manager(min_validity=60).start()

    await asyncio.sleep(60)

    (event,) = observer.of(ThresholdReduced)
    assert event.setting == "min_validity"
    assert immediately(manager.get()) is provider.credentials[-1]


async def test_a_hint_of_the_source_comes_first(new_manager, provider, clock, no_jitter):
    provider.play(
        lambda: Credential(
            secret(), expires_at=clock.now() + timedelta(hours=1), refresh_at=clock.now() + timedelta(minutes=7)
        ),
        3600,
    )
    await new_manager(refresh_threshold=600).start()

    await asyncio.sleep(7 * 60 + 1)

    assert provider.called_at[1] - provider.called_at[0] == timedelta(minutes=7)


async def test_a_credential_without_end_is_never_stale(new_manager, provider, clock, observer):
    provider.play(None)
    manager = await new_manager().start()

    await asyncio.sleep(10 * 365 * 86_400)

    assert immediately(manager.get()) is provider.credentials[0]
    assert provider.calls == 1
    assert observer.events[0].expires_at is observer.events[0].refresh_at is None
    assert manager.stats().seconds_left is None


async def test_a_credential_without_end_is_refreshed_where_its_source_asks_for_it(new_manager, provider, clock):
    provider.play(lambda: Credential(secret(), refresh_at=clock.now() + timedelta(hours=1)), None)
    manager = await new_manager().start()

    await asyncio.sleep(3700)

    assert manager.stats().generation == 2


async def test_a_source_that_always_wants_to_be_asked_again_is_not_asked_without_pause(new_manager, provider, clock):
    def impatient() -> Credential | None:
        if provider.calls > 50:
            return None  # ends what would never end: time stands still meanwhile
        return Credential(secret(str(provider.calls)), refresh_at=clock.now() - timedelta(seconds=1))

    provider.play(impatient)
    await new_manager().start()

    await asyncio.sleep(10)

    assert provider.calls <= 12


@pytest.mark.parametrize("lifetime", [900, timedelta(minutes=15)])
async def test_a_credential_that_says_nothing_lives_as_long_as_the_caller_says(new_manager, provider, clock, lifetime):
    provider.play(None)
    manager = await new_manager(default_lifetime=lifetime).start()

    assert manager.stats().seconds_left == 900
    clock.advance(900)

    assert manager.current is None


@pytest.mark.parametrize(
    ("expires_at", "options"),
    [
        (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), {}),
        (datetime.max.replace(tzinfo=UTC), {}),
        (None, {"default_lifetime": timedelta.max}),
        (None, {"default_lifetime": 1e300}),
    ],
    ids=["end of time", "last microsecond", "longest timedelta", "eternity"],
)
async def test_a_life_may_be_longer_than_the_calendar(provider, clock, expires_at, options):
    clock.advance(0.123456)
    provider.play(Credential(secret(), expires_at=expires_at))

    async with TokenManager(provider, clock=clock, **options) as manager:
        await asyncio.sleep(86_400)

        assert immediately(manager.get()).password == secret()
        assert provider.calls == 1


async def test_the_same_token_again_is_neither_a_rotation_nor_a_hot_loop(new_manager, provider, clock, observer):
    provider.play(provider.mint(60))
    manager = await new_manager().start()

    await asyncio.sleep(56)

    assert immediately(manager.get()) is provider.credentials[0]
    assert 2 <= provider.calls <= 8
    assert (manager.stats().generation, manager.stats().rotations) == (1, 0)
    assert not any(event.rotated for event in observer.of(CredentialRefreshed))
    assert not observer.of(ThresholdReduced)


async def test_the_last_seconds_of_the_only_token_there_is_are_used(new_manager, provider, clock):
    provider.play(provider.mint(60))
    manager = await new_manager(background=False, min_validity=20).start()
    clock.advance(41)

    credentials = {await manager.get() for _ in range(10)}

    assert credentials == {provider.credentials[0]} == {manager.current}
    assert provider.calls == 2


async def test_the_same_token_until_its_end_is_an_error_after_it(new_manager, provider, clock):
    provider.play(provider.mint(60))
    manager = await new_manager().start()

    await asyncio.sleep(61)

    with pytest.raises(CredentialExpired) as caught:
        await manager.get()
    assert isinstance(caught.value.__cause__, ProviderError)
    assert provider.calls < 60


async def test_callers_of_a_stale_credential_do_not_hammer_a_source_that_has_no_newer(new_manager, provider, clock):
    provider.play(provider.mint(3600))
    manager = await new_manager(background=False).start()
    clock.advance(3400)

    for _ in range(150):
        immediately(manager.get())
        await asyncio.sleep(1)

    assert provider.calls <= 1 + 150 / 30 + 2


async def test_a_later_expiry_of_the_same_secret_is_a_renewal(new_manager, provider, clock, observer):
    provider.play(*(lambda: Credential(secret(), expires_at=clock.now() + timedelta(hours=1)),))
    manager = await new_manager().start()

    await asyncio.sleep(5 * 3600)

    assert provider.calls >= 5
    assert manager.stats().generation == 1
    assert manager.stats().seconds_left > 0
    assert not any(event.rotated for event in observer.of(CredentialRefreshed))


async def test_a_new_user_with_the_same_password_is_a_rotation(new_manager, provider):
    provider.play(Credential(secret(), user="one"), Credential(secret(), user="two"))
    manager = await new_manager().start()

    await manager.refresh()

    assert manager.stats().rotations == 1


async def test_a_token_that_is_already_expired_is_an_error(new_manager, provider, clock, observer):
    provider.play(Credential(secret(), expires_at=clock.now() - timedelta(seconds=30)))
    manager = new_manager()

    with pytest.raises(CredentialExpired, match="expired 30 s ago"):
        await manager.get()

    assert manager.current is None
    assert observer.of(RefreshFailed)


async def test_a_token_that_expires_this_moment_is_an_error(new_manager, provider, clock):
    provider.play(Credential(secret(), expires_at=clock.now()))

    with pytest.raises(CredentialExpired, match="expired 0 s ago"):
        await new_manager().get()


async def test_a_refresh_fetches_even_if_nothing_is_stale(new_manager, provider, observer):
    manager = await new_manager().start()

    credential = await manager.refresh()

    assert credential is manager.current is provider.credentials[1]
    assert [event.rotated for event in observer.of(CredentialRefreshed)] == [False, True]


async def test_the_first_use_may_be_a_refresh(new_manager, provider):
    assert (await new_manager().refresh()) is provider.credentials[0]


async def test_a_refresh_that_fails_says_why_and_changes_nothing(new_manager, provider):
    provider.play(3600, ProviderError("down"))
    manager = await new_manager().start()

    with pytest.raises(ProviderError, match=r"^down$"):
        await manager.refresh()

    assert immediately(manager.get()) is provider.credentials[0]


async def test_the_time_a_source_takes_is_told(new_manager, clock, observer):
    slow = ScriptedProvider(60, clock=clock, delay=2.5)

    await new_manager(slow).start()

    assert observer.events[0].duration == 2.5


async def test_the_flight_does_not_run_in_the_context_of_the_caller_who_happened_to_be_first(new_manager, provider):
    request = contextvars.ContextVar("request", default="none")
    seen = []

    def fetch() -> Credential:
        seen.append(request.get())
        return provider.mint(60)

    provider.play(fetch)
    request.set("of a user")

    await new_manager().start()

    assert seen == ["none"]


async def test_subscribers_hear_events_until_they_leave(new_manager):
    manager, late = new_manager(), RecordingObserver()
    unsubscribe = manager.subscribe(late)

    await manager.start()
    unsubscribe()
    await manager.refresh()

    assert len(late.of(CredentialRefreshed)) == 1


async def test_observers_that_fail_disturb_nothing(provider, clock, caplog):
    def broken(event: object) -> None:
        raise LookupError("my bug")

    provider.play(60, ProviderError("down"))
    async with TokenManager(provider, clock=clock, on_event=broken) as manager:
        await asyncio.sleep(50)

        assert immediately(manager.get()) is provider.credentials[0]
    assert any("broken failed on RefreshFailed" in message for message in caplog.messages)


async def test_events_are_logged_by_default(provider, clock, caplog):
    async with TokenManager(provider, clock=clock):
        pass

    assert any(message.startswith('"ScriptedProvider" gave a new credential') for message in caplog.messages)


async def test_it_can_be_looked_at(new_manager, provider, clock):
    provider.play(100)
    manager = new_manager(background=False)
    looks = [repr(manager)]

    await manager.start()
    looks.append(repr(manager))
    clock.advance(85)
    looks.append(repr(manager))
    clock.advance(15)
    looks.append(repr(manager))
    await manager.aclose()
    looks.append(repr(manager))

    for look, word in zip(looks, ["empty", "fresh", "stale", "expired", "closed"], strict=True):
        assert look.startswith("<TokenManager ScriptedProvider generation=")
        assert look.endswith(f"{word}>")
    assert_no_secret(looks, manager)


async def test_it_counts(new_manager, provider, clock):
    provider.play(100, ProviderError("down"), 100)
    manager = await new_manager(background=False).start()
    clock.advance(10)

    with pytest.raises(ProviderError):
        await manager.refresh()
    stats = manager.stats()

    assert (stats.fetches, stats.failures, stats.rotations, stats.generation) == (2, 1, 0, 1)
    assert stats.seconds_left == 90


class TestStamp:
    async def test_a_connection_is_marked_with_what_get_returns(self, new_manager, provider, clock):
        provider.play(100)
        manager = new_manager()

        stamp = await manager.stamp()

        assert stamp.credential is await manager.get()
        assert stamp.generation == 1
        assert stamp.obtained_at == clock.now()
        assert stamp.seconds_left(clock) == 100
        assert repr(stamp) == f"<Stamp generation=1 {stamp.credential!r}>"
        assert_no_secret(stamp)

    async def test_a_credential_without_end_leaves_for_ever(self, new_manager, provider, clock):
        provider.play(None)

        stamp = await new_manager().stamp()

        assert stamp.seconds_left(clock) == math.inf
        assert not stamp.is_stale(clock)

    async def test_sessions_that_end_with_the_credential_have_to_go_before_it(self, new_manager, provider, clock):
        provider.play(Credential(secret(), expires_at=clock.now() + timedelta(seconds=100), ends_session=True))

        stamp = await new_manager().stamp()

        assert stamp.seconds_left(clock) == pytest.approx(90)
        assert stamp.expires_at == clock.now() + timedelta(seconds=100)
        assert stamp.refresh_at < clock.now() + timedelta(seconds=90)

    async def test_the_time_left_is_told_by_the_clock_that_shows_less(self, new_manager, provider, clock):
        provider.play(100)
        stamp = await new_manager(background=False).stamp()

        clock.advance(10)
        clock.suspend(20)
        assert stamp.seconds_left(clock) == 70
        clock.step(-3600)

        assert stamp.seconds_left(clock) == 90

    async def test_a_rotation_supersedes_it(self, new_manager, provider):
        manager = new_manager()
        old = await manager.stamp()

        await manager.refresh()
        new = await manager.stamp()

        assert (old.is_superseded, new.is_superseded) == (True, False)
        assert (old.generation, new.generation) == (1, 2)

    async def test_a_renewal_moves_the_deadlines_of_every_connection_that_has_it(self, new_manager, provider, clock):
        provider.play(lambda: Credential(secret(), expires_at=clock.now() + timedelta(seconds=100)))
        manager = new_manager(background=False)
        stamp = await manager.stamp()
        clock.advance(50)

        await manager.refresh()

        assert await manager.stamp() is stamp
        assert stamp.seconds_left(clock) == 100
        assert not stamp.is_superseded

    async def test_the_same_token_again_gives_no_second_life(self, new_manager, provider, clock):
        provider.play(provider.mint(100))
        manager = new_manager(background=False)
        stamp = await manager.stamp()
        clock.advance(50)

        await manager.refresh()

        assert stamp.seconds_left(clock) == 50


async def test_any_function_will_do(new_manager, clock):
    def token() -> str:
        return secret()

    manager = await new_manager(token).start()

    assert immediately(manager.get()) == Credential(secret())
    assert manager.name.endswith("token")
    assert manager.clock is clock
