"""The source of credentials is down: for less, and for more, than the credential has left to live."""

from __future__ import annotations

import asyncio
import traceback

import anyio
import asyncpg
import pytest
from fault_world import LIFETIME, PATIENCE, World
from support import assert_no_secret, secret

from asyncpool_creds import (
    CredentialExpired,
    CredentialRefreshed,
    ProviderError,
    RefreshFailed,
    TokenManager,
    create_pool,
)
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.storage import MemoryStorage
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer

pytestmark = pytest.mark.anyio

OUTAGES = {
    "refuses connections": lambda issuer: issuer.go_down("refuse"),
    "resets connections": lambda issuer: issuer.go_down("reset"),
    "answers 503": lambda issuer: _now(issuer.fail_next(times=None)),
    "answers 500 with an OAuth error": lambda issuer: _now(issuer.fail_next("server_error", status=500, times=None)),
    "answers 429": lambda issuer: _now(issuer.fail_next(status=429, times=None)),
    "answers garbage": lambda issuer: _now(setattr(issuer, "garbage", True)),
}


async def _now(_: object) -> None:
    """Make a coroutine of what is done already."""


class Issued:
    """A pool whose tokens come from a real issuer over HTTP, on a clock of the test's own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock: VirtualClock = world.clock
        self.observer: RecordingObserver = world.observer
        self.issuer = TokenIssuer({"app": secret("login")}, access_lifetime=LIFETIME, clock=world.clock)
        world.door.verify = self.issuer.verify
        self.door: TokenDoor = world.door

    async def pool(self, **arguments):
        self.source = OAuth2(
            token_url=self.issuer.token_url,
            client_id="pool",
            username="app",
            password=secret("login"),
            clock=self.clock,
            timeout=PATIENCE,
        )
        manager = self.world.manager(self.source, **arguments)
        return await self.world.pool(manager, min_size=2, retire_when="expired")

    async def heal(self) -> None:
        await self.issuer.come_up()
        self.issuer.heal()


@pytest.fixture
async def issued(world):
    issued = Issued(world)
    async with issued.issuer:
        yield issued
        for manager in world.managers:
            await manager.aclose()


@pytest.fixture(params=OUTAGES, ids=lambda name: name.replace(" ", "_"))
def outage(request):
    return OUTAGES[request.param]


async def test_an_outage_shorter_than_the_remaining_life_is_not_felt(issued, outage):
    pool = await issued.pool()
    await outage(issued.issuer)

    issued.clock.advance(LIFETIME * 0.9)
    assert await pool.fetchval("SELECT 1") == 1
    # What has to connect asks for the credential, and so starts the refresh.
    held = [await pool.acquire() for _ in range(2)]
    for connection in held:
        await connection.close()
    assert await pool.fetchval("SELECT 1") == 1
    failure = await issued.observer.seen(RefreshFailed)

    assert failure.still_valid
    assert failure.retryable
    await issued.heal()
    issued.clock.advance(LIFETIME * 0.05)
    await pool.manager.refresh()
    assert pool.manager.stats().rotations == 1
    await issued.world.assert_serves(pool)
    await issued.world.assert_closes(pool)


@pytest.mark.parametrize("world", ["refuse"], indirect=True)
async def test_an_outage_longer_than_the_remaining_life_is_one_typed_error_and_ends_with_the_outage(issued, outage):
    pool = await issued.pool()
    await outage(issued.issuer)
    issued.clock.advance(LIFETIME)
    before = pool.manager.stats().fetches

    with anyio.fail_after(PATIENCE):
        outcomes = await asyncio.gather(*(pool.acquire() for _ in range(20)), return_exceptions=True)

    assert {type(one) for one in outcomes} == {CredentialExpired}
    assert all(isinstance(one.__cause__, ProviderError) for one in outcomes)
    assert_no_secret(*outcomes)
    # A negative cache: the time stands still, and a dead source is not asked once for each caller.
    assert pool.manager.stats().fetches == before + 1
    assert not issued.observer.of(RefreshFailed)[-1].still_valid
    await issued.heal()
    issued.clock.advance(400.0)
    await issued.world.assert_serves(pool)
    assert pool.stats().by_generation == {2: 2}
    await issued.world.assert_closes(pool)


@pytest.mark.parametrize("world", ["refuse"], indirect=True)
async def test_an_outage_is_told_at_length_once_and_in_short_to_the_others(issued, outage):
    pool = await issued.pool()
    await outage(issued.issuer)
    issued.clock.advance(LIFETIME)
    outcomes = await asyncio.gather(*(pool.acquire() for _ in range(20)), return_exceptions=True)

    first, *others = (len("".join(traceback.format_exception(one)).splitlines()) for one in outcomes)

    assert first < 120
    assert max(others) < 70
    await issued.heal()
    await issued.world.assert_closes(pool)


@pytest.mark.parametrize("world", ["serve"], indirect=True)
async def test_an_outage_longer_than_the_remaining_life_is_not_felt_where_sessions_are_served_on(issued, outage):
    pool = await issued.pool()
    await outage(issued.issuer)
    issued.clock.advance(LIFETIME)

    with anyio.fail_after(PATIENCE):
        assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20))) == [1] * 20
        assert pool.stats().past_end == 2
        await issued.heal()
        issued.clock.advance(61.0)  # longer than a Retry-After is heeded
        await pool.manager.refresh()
        await issued.world.until(lambda: pool.stats().by_generation == {2: 2})

    await issued.world.assert_serves(pool)
    await issued.world.assert_closes(pool)


async def test_the_first_fill_with_the_source_down_is_the_typed_error_and_leaves_nothing(issued, outage):
    await outage(issued.issuer)

    with anyio.fail_after(PATIENCE), pytest.raises(CredentialExpired) as expired:
        await issued.pool()

    assert isinstance(expired.value.__cause__, ProviderError)
    assert issued.door.attempts == 0
    await issued.heal()


@pytest.mark.parametrize("world", ["refuse"], indirect=True)
async def test_a_source_that_refuses_for_good_is_not_asked_in_a_loop(issued):
    pool = await issued.pool()
    issued.issuer.users.disable("app")
    issued.clock.advance(LIFETIME)
    before = issued.issuer.fetches

    for _ in range(20):
        with pytest.raises(CredentialExpired) as expired:
            await pool.fetchval("SELECT 1")

    cause = expired.value.__cause__
    assert isinstance(cause, ProviderError)
    assert not cause.retryable
    # One with the refresh token, one with the original grant.
    assert issued.issuer.fetches - before <= 2
    issued.issuer.users.enable("app")
    issued.clock.advance(60.0)
    await issued.world.assert_serves(pool)
    await issued.world.assert_closes(pool)


@pytest.mark.parametrize("world", ["refuse"], indirect=True)
async def test_a_request_for_patience_is_heeded(issued):
    pool = await issued.pool()
    issued.issuer.fail_next(status=429, retry_after=120, times=None)
    issued.clock.advance(LIFETIME)
    with pytest.raises(CredentialExpired):
        await pool.fetchval("SELECT 1")
    before = issued.issuer.fetches
    issued.issuer.heal()

    issued.clock.advance(50.0)
    with pytest.raises(CredentialExpired):
        await pool.fetchval("SELECT 1")
    assert issued.issuer.fetches == before

    issued.clock.advance(11.0)  # more than a minute is not heeded with nothing valid left
    assert await pool.fetchval("SELECT 1") == 1
    await issued.world.assert_closes(pool)


@pytest.mark.parametrize("world", ["refuse"], indirect=True)
async def test_a_source_that_hangs_is_bounded_and_the_pool_closes(issued):
    pool = await issued.pool(fetch_timeout=1.0)
    issued.issuer.hang()
    issued.clock.advance(LIFETIME)

    with anyio.fail_after(PATIENCE), pytest.raises(CredentialExpired) as expired:
        await pool.fetchval("SELECT 1")

    assert isinstance(expired.value.__cause__, TimeoutError)
    issued.issuer.resume()
    issued.clock.advance(10.0)
    await issued.world.assert_serves(pool)
    await issued.world.assert_closes(pool)


async def test_a_caller_does_not_wait_longer_for_a_source_that_hangs_than_it_said(issued):
    pool = await issued.pool()
    issued.issuer.hang()
    issued.clock.advance(LIFETIME)

    with anyio.fail_after(PATIENCE), pytest.raises(TimeoutError):
        await pool.acquire(timeout=0.05)

    # The fetch goes on for the others.
    issued.issuer.resume()
    assert await pool.fetchval("SELECT 1") == 1
    assert pool.manager.stats().fetches == 2
    await issued.world.assert_closes(pool)


async def test_a_pool_is_closed_while_its_source_hangs(world):
    source = world.source(100.0, world.mint)
    source.play(world.mint, source.HANG)
    pool = await world.pool(source, min_size=1)
    refreshing = asyncio.ensure_future(pool.manager.refresh())
    await source.called(2)

    await world.assert_closes(pool)

    with pytest.raises(Exception, match="closed"):
        await refreshing
    assert source.closed == 1


async def test_a_consumed_refresh_token_is_never_sent_again(issued):
    pool = await issued.pool()
    for _ in range(5):
        issued.clock.advance(LIFETIME)
        await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20)))
        # Where sessions are served on, the answer may still be under way: the clock goes on once it is there.
        assert await pool.manager.get() is not None

    assert issued.issuer.requests == {"password": 1, "refresh_token": 5}
    assert (issued.issuer.replays, issued.issuer.revoked_families) == (0, 0)
    await issued.world.assert_closes(pool)


async def test_a_lost_answer_to_a_refresh_costs_a_login_and_no_replay(issued):
    pool = await issued.pool()
    issued.issuer.lose_response()
    issued.clock.advance(LIFETIME)

    with anyio.fail_after(PATIENCE):
        while True:
            try:
                assert await pool.fetchval("SELECT 1") == 1
            except CredentialExpired:
                issued.clock.advance(10.0)
            else:
                break

    assert (issued.issuer.replays, issued.issuer.revoked_families) == (0, 0)
    await issued.world.assert_closes(pool)


async def test_callers_cancelled_during_an_exchange_spend_no_refresh_token_twice(issued):
    pool = await issued.pool()
    for _ in range(3):
        issued.clock.advance(LIFETIME)
        issued.issuer.hang(after_exchange=True)
        callers = [asyncio.ensure_future(pool.fetchval("SELECT 1")) for _ in range(5)]
        await issued.issuer.reached()
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        issued.issuer.resume()

        # Before the clock goes on: an answer that is under way while a whole life passes brings a token that is over.
        assert await pool.manager.get() is not None
        assert await pool.fetchval("SELECT 1") == 1

    assert (issued.issuer.replays, issued.issuer.revoked_families) == (0, 0)
    await issued.world.assert_closes(pool)


async def test_a_storage_that_fails_after_the_exchange_keeps_serving_and_loses_no_token(issued):
    class Full(MemoryStorage):
        full = False

        async def save(self, key, tokens):
            if self.full:
                raise OSError(28, "No space left on device")
            await super().save(key, tokens)

    storage = Full()
    source = OAuth2(
        token_url=issued.issuer.token_url,
        client_id="pool",
        username="app",
        password=secret("login"),
        clock=issued.clock,
        storage=storage,
    )
    pool = await issued.world.pool(issued.world.manager(source), min_size=1, retire_when="expired")
    storage.full = True
    for _ in range(3):
        issued.clock.advance(LIFETIME)
        assert await pool.fetchval("SELECT 1") == 1
        assert await pool.manager.get() is not None
    storage.full = False
    issued.clock.advance(LIFETIME)
    assert await pool.fetchval("SELECT 1") == 1

    assert (issued.issuer.replays, issued.issuer.revoked_families) == (0, 0)
    await issued.world.assert_closes(pool)


def test_retries_come_before_the_credential_ends_however_long_the_outage(clock, observer):
    async def main():
        source = ScriptedProvider(300.0, *([ProviderError("down")] * 40), 300.0, clock=clock)
        start = clock.time()
        async with TokenManager(source, clock=clock, on_event=observer):
            # litellm sleeps 600 s after a failure with 180 s left. Here many attempts fit into the minute that is left.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(299.0 - (clock.time() - start)):
                    await observer.seen(CredentialRefreshed, 2)
            attempts = [at for at in source.called_at if at.timestamp() - start < 300]
            assert len(attempts) >= 4
            delays = [event.retry_in for event in observer.of(RefreshFailed)]
            assert all(delay is not None and delay < 60 for delay in delays)
            await observer.seen(CredentialRefreshed, 2)

    clock.run(main())


async def test_a_door_that_is_down_is_not_a_reason_to_ask_the_source(world):
    pool = await world.pool()
    await pool.fetchval("SELECT 1")
    world.door.down = True
    world.door.kill_connections()

    for _ in range(10):
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await pool.fetchval("SELECT 1")

    assert pool.manager.stats().fetches == 1
    world.door.clear_faults()
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def test_too_many_connections_is_not_a_refusal_and_replacement_goes_one_for_one(world):
    pool = await world.pool(min_size=2)
    world.door.max_connections = 2

    await pool.manager.refresh()
    await world.until(lambda: pool.stats().by_generation == {2: 2})

    assert pool.manager.stats().fetches == 2
    assert world.door.peak_live == 2
    await world.assert_serves(pool)
    await world.assert_closes(pool)


async def test_a_wrong_role_is_not_a_stale_token(world):
    world.door.refuse_with("28000", 'role "app" is not permitted to log in')
    manager = world.manager()

    for _ in range(10):
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as refusal:
            await create_pool(world.door.dsn(sslmode="disable"), credentials=manager, min_size=1)
        assert_no_secret(refusal.value)

    assert manager.stats().fetches == 1


async def test_a_token_that_is_refused_whatever_it_is_does_not_hammer_the_source(world):
    world.door.verify = lambda user, password: "never"
    pool = await world.pool()

    for _ in range(20):
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match="PAM") as refusal:
            await pool.fetchval("SELECT 1")
        assert_no_secret(refusal.value)

    assert pool.manager.stats().fetches <= 3
    assert world.door.refused <= 40
    world.door.verify = world.verify
    await world.assert_serves(pool)
    await world.assert_closes(pool)
