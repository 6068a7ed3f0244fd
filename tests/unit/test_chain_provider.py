"""A chain of sources: which one is asked, and what they are told."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta

import pytest
from support import secret

from asyncpool_creds import (
    BindableProvider,
    Credential,
    CredentialProvider,
    CredentialRefreshed,
    ProviderError,
    ProviderTimeout,
    Target,
    TokenManager,
)
from asyncpool_creds.providers.chain import Chain
from asyncpool_creds.providers.env import Environment
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock

pytestmark = pytest.mark.anyio

TARGET = Target("db.example.com", 5432, "ada", "app")
DOWN = ConnectionError("down")


def minting(clock: VirtualClock, name: str) -> ScriptedProvider:
    return ScriptedProvider(600, clock=clock, prefix=secret(name))


class Hooked(ScriptedProvider):
    """A source with everything a source may have, which remembers what it is told."""

    def __init__(self, clock: VirtualClock, name: str, lifetime: float | None = None) -> None:
        super().__init__(600, clock=clock, prefix=secret(name))
        self.session_lifetime = lifetime
        self.told: list[tuple[str, object]] = []

    def invalidate(self, credential: Credential) -> None:
        self.told.append(("invalidate", credential))

    async def revoke(self, credential: Credential) -> None:
        await asyncio.sleep(1)
        self.told.append(("revoke", credential))

    def report_to(self, observer: object) -> None:
        self.told.append(("report_to", observer))


class PerServer:
    """A source that cannot be asked before it is bound."""

    session_lifetime = 900.0

    def __init__(self, clock: VirtualClock) -> None:
        self.bound = minting(clock, "bound")
        self.targets: list[Target] = []

    def bind(self, target: Target) -> CredentialProvider:
        self.targets.append(target)
        return self.bound


class PerServerAtLast(PerServer):
    """One that can be, too."""

    async def fetch(self) -> Credential:
        return Credential(secret("unbound"))


async def failure(chain: Chain) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await chain.fetch()
    return caught.value


# Who is asked


async def test_the_first_that_works_is_asked_first_from_then_on(clock: VirtualClock) -> None:
    broken, works, last = ScriptedProvider(DOWN), minting(clock, "works"), minting(clock, "last")
    chain = Chain(broken, works, last)
    assert chain.in_use is None

    credentials = [await chain.fetch() for _ in range(3)]

    assert credentials == works.credentials
    assert (broken.calls, works.calls, last.calls) == (1, 3, 0)
    assert chain.in_use == "ScriptedProvider"


async def test_when_it_stops_working_the_others_are_asked_in_order(clock: VirtualClock) -> None:
    first, second, third = ScriptedProvider(DOWN), minting(clock, "second"), minting(clock, "third")
    chain = Chain(first, second, third)
    await chain.fetch()
    second.play(DOWN)

    assert await chain.fetch() == third.credentials[-1]
    assert (first.calls, second.calls) == (2, 2)
    assert await chain.fetch() == third.credentials[-1]
    assert (first.calls, second.calls) == (2, 2)

    third.play(DOWN)
    first.play(600)
    assert await chain.fetch() == first.credentials[-1]
    assert (second.calls, third.calls) == (2, 3)


async def test_functions_are_sources_too() -> None:
    async def broken() -> str:
        raise DOWN

    chain = Chain(broken, secret)

    assert (await chain.fetch()).password == secret()
    assert chain.in_use == "secret"


async def test_a_credential_that_has_expired_is_none(clock: VirtualClock) -> None:
    stale = Credential(secret("stale"), expires_at=clock.now() - timedelta(seconds=5))
    chain = Chain(ScriptedProvider(stale), minting(clock, "fresh"), clock=clock)

    assert (await chain.fetch()).password == f"{secret('fresh')}-1"
    assert "gave a credential that expired 5 s ago" in str(await failure(Chain(ScriptedProvider(stale), clock=clock)))


async def test_one_that_hangs_leaves_time_for_the_next(clock: VirtualClock) -> None:
    hangs = ScriptedProvider(ScriptedProvider.HANG)
    chain = Chain(hangs, minting(clock, "works"), timeout=timedelta(seconds=3))
    before = clock.monotonic()

    assert (await chain.fetch()).password == f"{secret('works')}-1"
    assert clock.monotonic() - before == 3
    assert hangs.cancelled == 1


async def test_the_time_limit_is_an_error_like_others() -> None:
    error = await failure(Chain(ScriptedProvider(ScriptedProvider.HANG)))

    assert "ScriptedProvider: no answer within the chain's timeout (10 s)" in str(error)
    assert error.retryable
    assert isinstance(error.__cause__, ExceptionGroup)
    assert isinstance(error.__cause__.exceptions[0], ProviderTimeout)


async def test_there_may_be_no_time_limit(clock: VirtualClock) -> None:
    hangs = ScriptedProvider(ScriptedProvider.HANG, clock=clock, prefix=secret())
    fetch = asyncio.create_task(Chain(hangs, timeout=None).fetch())

    await asyncio.sleep(1000)

    assert not fetch.done()
    hangs.release()
    assert await fetch == hangs.credentials[-1]


async def test_cancelling_it_is_not_a_reason_to_ask_the_next(clock: VirtualClock) -> None:
    hangs, unasked = ScriptedProvider(ScriptedProvider.HANG), minting(clock, "unasked")
    fetch = asyncio.create_task(Chain(hangs, unasked).fetch())
    await hangs.called()

    fetch.cancel()
    await asyncio.wait((fetch,))

    assert fetch.cancelled()
    assert (hangs.cancelled, unasked.calls) == (1, 0)


async def test_chains_can_be_links(clock: VirtualClock) -> None:
    quick = Chain(ScriptedProvider(ScriptedProvider.HANG), timeout=1)
    before = clock.monotonic()

    assert (await Chain(quick, minting(clock, "slow"), timeout=60).fetch()).password == f"{secret('slow')}-1"
    assert clock.monotonic() - before == 1


# What goes wrong


async def test_the_errors_of_all_are_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PASSWORD", raising=False)
    refused = ScriptedProvider(ProviderError("vault: permission denied", retryable=False))

    error = await failure(Chain(Environment("PASSWORD"), refused, ScriptedProvider(DOWN)))

    said = re.sub(r" at \S+:\d+ in \w+", " at PLACE", str(error))
    assert said == (
        "chain: no source gave a credential: "
        "1. Environment: environment: PASSWORD is not set; set it before this process is started; "
        "2. ScriptedProvider: vault: permission denied; "
        "3. ScriptedProvider: fetch() raised ConnectionError at PLACE; see the cause"
    )
    assert isinstance(error.__cause__, ExceptionGroup)
    assert [type(one.__cause__) for one in error.__cause__.exceptions] == [KeyError, type(None), ConnectionError]


async def test_they_are_told_in_the_order_of_the_chain_whoever_was_asked_first(clock: VirtualClock) -> None:
    first, second = ScriptedProvider(DOWN), minting(clock, "second")
    chain = Chain(first, second)
    await chain.fetch()
    first.play(ProviderError("first"))
    second.play(ProviderError("second"))

    said = str(await failure(chain))

    assert said.endswith("1. ScriptedProvider: first; 2. ScriptedProvider: second")


@pytest.mark.parametrize(("of_second", "of_chain"), [(True, True), (False, False)])
async def test_it_may_be_asked_again_if_one_of_them_may(of_second: bool, of_chain: bool) -> None:
    first = ScriptedProvider(ProviderError("no", retryable=False))
    second = ScriptedProvider(ProviderError("not now", retryable=of_second))

    assert (await failure(Chain(first, second))).retryable is of_chain


async def test_the_shortest_wait_that_was_asked_for_is_passed_on() -> None:
    waits = [ScriptedProvider(ProviderError("busy", retry_after=wait)) for wait in (7.0, None, 5.0)]

    assert (await failure(Chain(*waits))).retry_after == 5
    assert (await failure(Chain(waits[1]))).retry_after is None


def test_no_sources_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one provider"):
        Chain()


@pytest.mark.parametrize(
    ("source", "message"),
    [(Environment, "got the class Environment"), (PerServer, "got the class PerServer"), ("password", "not str")],
)
def test_what_is_no_source_is_a_mistake(source, message) -> None:
    with pytest.raises(TypeError, match=f"Chain: credentials: .*{message}"):
        Chain(source)


@pytest.mark.parametrize(("timeout", "error"), [(0, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_the_time_limit_is_checked(timeout, error) -> None:
    with pytest.raises(error, match="Chain: timeout must be"):
        Chain(Environment(), timeout=timeout)


def test_it_names_its_sources() -> None:
    assert repr(Chain(Environment(), ScriptedProvider())) == "<Chain of Environment, ScriptedProvider; in use: None>"


# What is passed on


async def test_what_is_said_about_a_credential_goes_to_whom_it_came_from(clock: VirtualClock) -> None:
    first, second = Hooked(clock, "first"), Hooked(clock, "second")
    chain = Chain(first, second)
    older = await chain.fetch()
    first.play(DOWN)
    newer = await chain.fetch()

    chain.invalidate(newer)
    await chain.revoke(older)

    assert first.told == [("revoke", older)]
    assert second.told == [("invalidate", newer)]


async def test_a_renewed_credential_is_still_that_of_its_source(clock: VirtualClock) -> None:
    source = Hooked(clock, "source")
    source.play(*(Credential(secret(), expires_at=clock.now() + timedelta(hours=hours)) for hours in (1, 2)))
    chain = Chain(source)
    first = await chain.fetch()
    await chain.fetch()

    chain.invalidate(first)

    assert source.told == [("invalidate", first)]


async def test_what_nobody_gave_is_nobodys_concern(clock: VirtualClock) -> None:
    source = Hooked(clock, "source")
    chain = Chain(source, secret)

    chain.invalidate(Credential(secret("of somebody else")))
    await chain.revoke(Credential(secret("of somebody else")))

    assert source.told == []


async def test_sources_that_do_not_care_are_not_bothered(clock: VirtualClock) -> None:
    chain = Chain(minting(clock, "source"))
    credential = await chain.fetch()

    chain.invalidate(credential)
    await chain.revoke(credential)


async def test_old_credentials_are_forgotten(clock: VirtualClock) -> None:
    source = Hooked(clock, "source")
    chain = Chain(source)
    credentials = [await chain.fetch() for _ in range(66)]

    for credential in credentials:
        chain.invalidate(credential)

    assert len(source.told) == 64


async def test_a_manager_reaches_the_sources_through_it(clock: VirtualClock, observer: RecordingObserver) -> None:
    first, second = Hooked(clock, "first"), Hooked(clock, "second")
    manager = TokenManager(Chain(first, second), clock=clock, on_event=observer)
    stamp = await manager.stamp()
    manager.invalidate(stamp.credential)
    await manager.stamp()
    await asyncio.sleep(2)
    await manager.aclose()

    told = [what for what, _ in first.told]
    assert told == ["report_to", "invalidate", "revoke"]
    assert [what for what, _ in second.told] == ["report_to"]
    assert [event.provider for event in observer.events if isinstance(event, CredentialRefreshed)] == ["Chain"] * 2


async def test_closing_it_closes_all_even_if_one_refuses() -> None:
    class Stubborn(ScriptedProvider):
        async def aclose(self) -> None:
            raise OSError("no")

    first, second, third = ScriptedProvider(), Stubborn(), ScriptedProvider()

    with pytest.raises(OSError, match="no"):
        await Chain(first, second, third, secret).aclose()

    assert (first.closed, third.closed) == (1, 1)


async def test_the_life_of_sessions_is_that_of_the_source_in_use(clock: VirtualClock) -> None:
    short, long = Hooked(clock, "short", 600), Hooked(clock, "long", 3600)
    short.play(DOWN)
    chain = Chain(short, long, minting(clock, "unknown"))

    assert chain.session_lifetime == 600
    await chain.fetch()
    assert chain.session_lifetime == 3600
    long.play(DOWN)
    await chain.fetch()
    assert chain.session_lifetime is None
    assert Chain(Environment()).session_lifetime is None
    assert Chain(Environment(), PerServer(clock)).session_lifetime == 900


# Sources that want to know their server


def test_it_can_be_bound_if_one_of_its_sources_can(clock: VirtualClock) -> None:
    assert isinstance(Chain(Environment(), PerServer(clock)), BindableProvider)
    assert isinstance(Chain(Chain(PerServer(clock))), BindableProvider)
    assert not isinstance(Chain(Environment(), ScriptedProvider()), BindableProvider)


async def test_binding_it_binds_those_that_can_be(clock: VirtualClock) -> None:
    per_server, other = PerServer(clock), minting(clock, "other")
    chain = Chain(per_server, other, timeout=7)
    assert isinstance(chain, BindableProvider)

    bound = chain.bind(TARGET)

    assert per_server.targets == [TARGET]
    assert not isinstance(bound, BindableProvider)
    assert (await bound.fetch()).password == f"{secret('bound')}-1"
    per_server.bound.play(DOWN)
    assert (await bound.fetch()).password == f"{secret('other')}-1"
    assert chain.in_use is None


async def test_a_bound_chain_has_the_time_limit_of_the_other(clock: VirtualClock) -> None:
    per_server = PerServer(clock)
    per_server.bound.play(ScriptedProvider.HANG)
    chain = Chain(per_server, timeout=7)
    assert isinstance(chain, BindableProvider)

    with pytest.raises(ProviderError, match="timeout \\(7 s\\)"):
        await chain.bind(TARGET).fetch()


async def test_a_source_that_was_not_bound_is_passed_over(clock: VirtualClock) -> None:
    chain = Chain(PerServer(clock), minting(clock, "other"))

    assert (await chain.fetch()).password == f"{secret('other')}-1"
    error = await failure(Chain(PerServer(clock)))
    assert "give the chain to create_pool()" in str(error)
    assert not error.retryable


async def test_a_source_that_can_do_without_is_asked(clock: VirtualClock) -> None:
    assert (await Chain(PerServerAtLast(clock)).fetch()).password == secret("unbound")
