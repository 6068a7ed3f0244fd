"""Many token managers under names: made when asked for, apart from each other, closed together."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta

import pytest
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import (
    Credential,
    CredentialExpired,
    CredentialRefreshed,
    ManagerClosed,
    ProviderError,
    RefreshFailed,
    TokenManager,
    TokenManagers,
)
from asyncpool_creds.testing import ScriptedProvider

pytestmark = pytest.mark.anyio


class Tenants:
    """A scripted source for every name that is asked for."""

    def __init__(self, clock):
        self._clock = clock
        self.sources = {}
        self.asked_for = []

    def __call__(self, name):
        self.asked_for.append(name)
        return self[name]

    def __getitem__(self, name):
        if name not in self.sources:
            self.sources[name] = ScriptedProvider(clock=self._clock, prefix=secret(name))
        return self.sources[name]


@pytest.fixture
def tenants(clock):
    return Tenants(clock)


@pytest.fixture
async def new(tenants, clock, observer, anyio_backend):
    """Make managers of the tenants; they are closed after the test, and must leave no task behind."""
    made = []

    def new(provider_of=tenants, **options):
        made.append(TokenManagers(provider_of, **({"clock": clock, "on_event": observer} | options)))
        return made[-1]

    yield new
    for managers in made:
        await managers.aclose()
        assert_no_secret(managers)
    await clock.settle()
    assert not tasks_of_ours()


@pytest.fixture
def managers(new):
    return new()


class Stubborn(ScriptedProvider):
    """Ends only when it may, and with an error if it is given one."""

    def __init__(self, clock, error=None):
        super().__init__(clock=clock, prefix=secret())
        self.may_close = asyncio.Event()
        self.error = error
        self.is_closed = False

    async def aclose(self):
        await self.may_close.wait()
        self.is_closed = True
        if self.error is not None:
            raise self.error


async def test_nothing_is_made_before_it_is_asked_for(managers, tenants):
    await asyncio.sleep(60)

    assert managers.names() == ()
    assert tenants.asked_for == []


async def test_a_manager_is_made_once_for_each_name(managers, tenants):
    first, other = managers.manager("a"), managers.manager("b")

    assert isinstance(first, TokenManager)
    assert managers.manager("a") is first is not other
    assert tenants.asked_for == ["a", "b"]
    assert managers.names() == ("a", "b")


async def test_each_name_gets_the_credential_of_its_own_source(managers, tenants):
    a, b = await managers.get("a"), await managers.get("b")

    assert a is tenants["a"].credentials[0]
    assert b is tenants["b"].credentials[0]
    assert await managers.get("a") is a
    assert tenants["a"].calls == 1


async def test_a_source_may_be_a_function_that_returns_a_token(new):
    managers = new(lambda name: lambda: secret(name))

    assert (await managers.get("a")).password == secret("a")


async def test_the_arguments_are_those_of_each_manager(new, tenants, observer, monkeypatch):
    monkeypatch.setattr("random.random", lambda: 0.0)
    await new(refresh_threshold=timedelta(minutes=20)).start("a", "b")

    await asyncio.sleep(40 * 60 + 1)

    assert tenants["a"].calls == tenants["b"].calls == 2


async def test_without_background_nothing_is_refreshed_between_calls(new, tenants, clock):
    managers = await new(background=False).start("a")

    await asyncio.sleep(7200)

    assert tenants["a"].calls == 1
    assert await managers.get("a") is tenants["a"].credentials[1]


async def test_a_source_that_does_not_state_a_lifetime_is_given_one(new, clock):
    calls = []
    managers = new(lambda name: lambda: calls.append(name) or secret(str(len(calls))), default_lifetime=60)
    await managers.start("a")

    await asyncio.sleep(3600)

    assert 60 <= len(calls) <= 80


async def test_the_minimum_validity_is_that_of_each_manager(new, tenants):
    managers = await new(background=False, refresh_threshold=1, min_validity=600).start("a")
    await asyncio.sleep(3001)

    assert await managers.get("a") is tenants["a"].credentials[1]


async def test_in_the_background_all_are_refreshed(managers, tenants):
    await managers.start("a", "b", "c")

    await asyncio.sleep(24 * 3600)

    assert all(24 <= tenants[name].calls <= 28 for name in "abc")


@pytest.mark.parametrize("argument", ["refresh_threshold", "fetch_timeout", "min_validity", "default_lifetime"])
async def test_nonsense_for_a_duration_is_refused_before_the_first_name(argument, tenants):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        TokenManagers(tenants, **{argument: math.nan})


async def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="provider_of must be a function"):
        TokenManagers({"a": secret})


async def test_an_observer_that_is_none_is_refused(tenants):
    with pytest.raises(TypeError, match="on_event takes"):
        TokenManagers(tenants, on_event=[5])


async def test_a_name_that_is_none_is_refused(managers, tenants):
    with pytest.raises(TypeError, match="a name must be a str, not int"):
        managers.manager(5)

    assert tenants.asked_for == []


async def test_a_name_that_has_no_source_is_none(new):
    def provider_of(name):
        raise LookupError(f"no tenant {name}")

    managers = new(provider_of)

    with pytest.raises(LookupError, match="no tenant a"):
        await managers.get("a")
    assert managers.names() == ()


async def test_what_is_no_source_is_refused(new):
    managers = new(lambda name: name)

    with pytest.raises(TypeError, match="credentials: expected"):
        managers.manager("a")
    assert managers.names() == ()


# -- events


async def test_events_say_which_name_they_are_about(managers, tenants, observer):
    tenants["b"].play(ProviderError("down"))

    await managers.get("a")
    with pytest.raises(CredentialExpired, match="ScriptedProvider 'b' never gave one"):
        await managers.get("b")

    (refreshed,), (failed,) = observer.of(CredentialRefreshed), observer.of(RefreshFailed)
    assert refreshed.provider == "ScriptedProvider 'a'"
    assert failed.provider == "ScriptedProvider 'b'"


async def test_whoever_subscribes_hears_of_all_names_until_he_has_enough(managers):
    heard = []
    await managers.get("a")

    enough = managers.subscribe(heard.append)
    await managers.manager("a").refresh()
    await managers.get("b")
    enough()
    await managers.get("c")

    assert [event.provider for event in heard] == ["ScriptedProvider 'a'", "ScriptedProvider 'b'"]


async def test_a_source_may_report_events_of_its_own(new, observer, clock):
    event = CredentialRefreshed(
        at=clock.now(), provider="x", fingerprint="", generation=1, rotated=False, expires_at=None, refresh_at=None,
        duration=0,
    )  # fmt: skip

    class Source(ScriptedProvider):
        def report_to(self, observer):
            observer(event)

    new(lambda name: Source(clock=clock)).manager("a")

    assert observer.events == [event]


# -- starting


async def test_starting_fetches_all_at_once(managers, tenants):
    tenants["a"].play(ScriptedProvider.HANG)
    tenants["b"].play(ScriptedProvider.HANG)
    starting = asyncio.create_task(managers.start("a", "b"))

    await tenants["a"].called()
    await tenants["b"].called()
    tenants["a"].release()
    tenants["b"].release()

    assert await starting is managers
    assert managers.manager("a").current is tenants["a"].credentials[0]
    assert managers.manager("b").current is tenants["b"].credentials[0]


async def test_a_single_failure_is_raised_as_it_is_and_the_others_are_started(managers, tenants):
    error = ProviderError("no such tenant", retryable=False)
    tenants["b"].play(error)

    with pytest.raises(CredentialExpired, match=r"'b' never gave one.*no such tenant") as caught:
        await managers.start("a", "b", "c")

    assert caught.value.__cause__ is error
    assert managers.manager("a").current is tenants["a"].credentials[0]
    assert managers.manager("c").current is tenants["c"].credentials[0]


async def test_several_failures_are_one_error_that_tells_of_all(managers, tenants):
    tenants["a"].play(ProviderError("down"))
    tenants["c"].play(ProviderError("gone"))

    with pytest.raises(CredentialExpired, match=r"2 of 3 .*'a'.*down; .*'c'.*gone") as caught:
        await managers.start("a", "b", "c")

    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert [str(error.__cause__) for error in caught.value.__cause__.exceptions] == ["down", "gone"]


async def test_closing_while_names_are_started_is_one_of_their_errors(managers, tenants, clock):
    tenants["a"].play(ProviderError("down"))
    tenants["b"].play(ScriptedProvider.HANG)
    starting = asyncio.create_task(managers.start("a", "b"))
    await tenants["b"].called()

    await managers.aclose()

    with pytest.raises(CredentialExpired, match=r"2 of 2 .*down; .* is closed"):
        await starting


async def test_a_mistake_of_the_caller_is_raised_as_it_is(new, tenants):
    managers = new(background=False)
    other = asyncio.new_event_loop()
    await asyncio.to_thread(other.run_until_complete, managers.get("b"))

    with pytest.raises(RuntimeError, match="make one manager per event loop"):
        await managers.start("a", "b")
    other.close()


async def test_cancelling_the_start_leaves_no_task_and_fetches_go_on(managers, tenants, clock):
    tenants["a"].play(ScriptedProvider.HANG)
    starting = asyncio.create_task(managers.start("a"))
    await tenants["a"].called()

    starting.cancel()
    await asyncio.wait([starting])

    assert starting.cancelled()
    assert {task.get_name() for task in tasks_of_ours()} == {"asyncpool_creds: refresh from ScriptedProvider 'a'"}
    tenants["a"].release()
    assert await managers.get("a") is tenants["a"].credentials[0]


async def test_starting_nothing_is_nothing(managers):
    assert await managers.start() is managers


# -- one name and the others


async def test_a_failing_name_does_not_disturb_the_others(managers, tenants):
    await managers.start("a", "b")
    tenants["a"].play(ProviderError("revoked", retryable=False))

    await asyncio.sleep(6 * 3600)

    with pytest.raises(CredentialExpired, match="revoked"):
        await managers.get("a")
    assert managers.manager("b").current is tenants["b"].credentials[-1]
    assert tenants["b"].calls >= 6


async def test_a_discarded_name_is_closed_and_a_new_one_when_asked_for_again(managers, tenants, clock):
    source = tenants.sources["a"] = Stubborn(clock)
    source.may_close.set()
    old = managers.manager("a")
    await old.get()

    await managers.discard("a")

    assert source.is_closed
    assert managers.names() == ()
    with pytest.raises(ManagerClosed):
        await old.get()
    assert managers.manager("a") is not old
    assert (await managers.get("a")).password


async def test_discarding_what_there_is_not_is_nothing(managers):
    await managers.discard("a")

    assert managers.names() == ()


async def test_a_cancelled_discard_goes_on(managers, tenants, clock):
    source = tenants.sources["a"] = Stubborn(clock)
    await managers.get("a")
    discarding = asyncio.create_task(managers.discard("a"))
    await clock.settle()

    discarding.cancel()
    await asyncio.wait([discarding])
    source.may_close.set()
    await clock.settle()

    assert discarding.cancelled()
    assert source.is_closed


# -- closing


async def test_closing_closes_all(tenants, clock, observer):
    for name in "ab":
        tenants.sources[name] = Stubborn(clock)
        tenants[name].may_close.set()
    async with TokenManagers(tenants, clock=clock, on_event=observer) as managers:
        await managers.start("a", "b")

    assert tenants["a"].is_closed
    assert tenants["b"].is_closed
    assert repr(managers) == "<TokenManagers closed names=2>"
    for use in (managers.get, managers.start):
        with pytest.raises(ManagerClosed):
            await use("a")
        with pytest.raises(ManagerClosed, match="make new ones"):
            await use("c")


async def test_closing_twice_is_closing(managers):
    await managers.get("a")

    await managers.aclose()
    await managers.aclose()


async def test_those_that_close_do_not_wait_for_each_other(managers, tenants, clock):
    for name in "ab":
        tenants.sources[name] = Stubborn(clock)
    await managers.start("a", "b")
    closing = asyncio.create_task(managers.aclose())

    tenants["b"].may_close.set()
    await clock.settle()

    assert tenants["b"].is_closed
    assert not closing.done()
    tenants["a"].may_close.set()
    await closing


async def test_an_error_of_one_does_not_keep_the_others_open(managers, tenants, clock):
    tenants.sources |= {"a": Stubborn(clock, OSError("a")), "b": Stubborn(clock)}
    await managers.start("a", "b")
    for name in "ab":
        tenants[name].may_close.set()

    with pytest.raises(OSError, match=r"^a$"):
        await managers.aclose()

    assert tenants["b"].is_closed
    tenants.sources["a"].error = None
    await _ended(managers)


async def test_the_errors_of_several_come_together(managers, tenants, clock):
    tenants.sources |= {name: Stubborn(clock, OSError(name)) for name in "ab"} | {"c": Stubborn(clock)}
    await managers.start("a", "b", "c")
    for name in "abc":
        tenants[name].may_close.set()

    with pytest.raises(ExceptionGroup, match="2 of 3 token managers could not be closed") as caught:
        await managers.aclose()

    assert [str(error) for error in caught.value.exceptions] == ["a", "b"]
    await _ended(managers)


async def _ended(managers):
    """Discard what could not be closed, which the end of the test would stumble over."""
    for name in managers.names():
        try:
            await managers.discard(name)
        except OSError:
            continue


async def test_a_cancelled_close_goes_on(managers, tenants, clock):
    for name in "ab":
        tenants.sources[name] = Stubborn(clock)
    await managers.start("a", "b")
    closing = asyncio.create_task(managers.aclose())
    await clock.settle()

    closing.cancel()
    await asyncio.wait([closing])
    for name in "ab":
        tenants[name].may_close.set()
    await clock.settle()

    assert closing.cancelled()
    assert tenants["a"].is_closed
    assert tenants["b"].is_closed


async def test_a_close_that_is_cancelled_at_once_goes_on(managers, tenants, clock):
    tenants.sources["a"] = Stubborn(clock)
    tenants["a"].may_close.set()
    await managers.start("a")

    with pytest.raises(asyncio.CancelledError):
        asyncio.current_task().cancel()
        await managers.aclose()
    asyncio.current_task().uncancel()
    await clock.settle()

    assert tenants["a"].is_closed


def test_an_event_loop_that_ends_ends_what_is_being_closed(caplog):
    source = Stubborn(None)
    managers = TokenManagers(lambda name: source, on_event=[])

    async def main():
        await managers.get("a")
        closing = asyncio.create_task(managers.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done()

    asyncio.run(main())

    assert not source.is_closed
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_closing_waits_for_what_is_being_discarded(managers, tenants, clock):
    source = tenants.sources["a"] = Stubborn(clock)
    await managers.start("a")
    discarding = asyncio.create_task(managers.discard("a"))
    await clock.settle()
    closing = asyncio.create_task(managers.aclose())
    await clock.settle()

    assert not closing.done()
    source.may_close.set()
    await closing
    await discarding


async def test_it_shows_no_names_and_no_secrets(managers):
    await managers.get("a")

    assert repr(managers) == "<TokenManagers open names=1>"


# -- sources that have to be awaited


async def test_a_source_may_have_to_be_awaited(new, tenants):
    async def look_up(name):
        await asyncio.sleep(1)
        return tenants(name)

    managers = new(look_up)
    first, second = await asyncio.gather(managers.get("a"), managers.get("a"))

    assert first is second is tenants["a"].credentials[0]
    assert tenants.asked_for == ["a"]


async def test_what_is_awaited_may_be_a_function(new):
    async def look_up(name):
        return lambda: secret(name)

    assert (await new(look_up).get("a")).password == secret("a")


async def test_what_could_not_be_looked_up_is_looked_up_again(new, tenants, observer):
    async def look_up(name):
        tenants.asked_for.append(name)
        if len(tenants.asked_for) < 3:
            raise ConnectionError("down")
        return tenants[name]

    managers = new(look_up)
    with pytest.raises(CredentialExpired, match="ConnectionError"):
        await managers.get("a")
    await asyncio.sleep(60)

    assert (await managers.get("a")) is tenants["a"].credentials[0]
    assert tenants.asked_for == ["a"] * 3
    assert observer.of(RefreshFailed)[0].provider.endswith("look_up 'a'")


async def test_what_is_looked_up_again_need_not_be_awaited(new, tenants):
    async def out_of_order():
        raise ConnectionError("down")

    def look_up(name):
        source = tenants(name)
        return source if tenants.asked_for == ["a", "a"] else out_of_order()

    managers = new(look_up)
    with pytest.raises(CredentialExpired, match="ConnectionError"):
        await managers.get("a")
    await asyncio.sleep(60)

    assert (await managers.get("a")) is tenants["a"].credentials[0]


async def test_what_is_looked_up_too_long_is_given_up(new, tenants):
    async def look_up(name):
        tenants.asked_for.append(name)
        await asyncio.Event().wait()

    managers = new(look_up, fetch_timeout=5, background=False)

    with pytest.raises(CredentialExpired, match=r"no answer within fetch_timeout \(5 s\)"):
        await managers.get("a")


async def test_a_source_that_was_awaited_is_told_what_any_source_is(new, observer, clock):
    told = []

    class Source(ScriptedProvider):
        session_lifetime = 3600.0

        def report_to(self, observer):
            told.append("report_to")

        def invalidate(self, credential):
            told.append("invalidate")

        async def revoke(self, credential):
            told.append("revoke")

        async def aclose(self):
            told.append("aclose")

    async def look_up(name):
        return Source(clock=clock)

    managers = new(look_up)
    manager = managers.manager("a")
    assert manager.session_lifetime is None
    stamp = await manager.stamp()
    manager.invalidate(stamp.credential)
    renewed = await manager.stamp()
    await clock.settle()
    await managers.aclose()

    assert manager.session_lifetime == 3600.0
    assert renewed is not stamp
    assert told == ["report_to", "invalidate", "revoke", "aclose"]


async def test_a_source_that_was_awaited_need_not_have_what_providers_may_have(new, clock):
    class Bare:
        async def fetch(self):
            return Credential(secret(str(clock.time())))

    async def look_up(name):
        return Bare()

    managers = new(look_up)
    manager = managers.manager("a")
    stamp = await manager.stamp()
    clock.advance(1)
    manager.invalidate(stamp.credential)

    assert (await manager.stamp()) is not stamp
    assert manager.session_lifetime is None


async def test_a_source_that_nobody_awaited_is_closed_in_silence(new, tenants):
    async def look_up(name):
        return tenants(name)

    managers = new(look_up)
    managers.manager("a").invalidate(Credential(secret()))

    await managers.aclose()

    assert tenants.asked_for == []
