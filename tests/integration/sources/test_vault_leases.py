"""The leases of dynamic database users, at a real OpenBao with a real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from typing import Any

import anyio.to_thread
import asyncpg
import httpx
import pytest
from openbao import Line, Vault, started
from processes import fork
from support import assert_no_secret, secret

from asyncpool_creds import (
    CredentialPool,
    CredentialRefreshed,
    ProviderError,
    RefreshTokenExpiring,
    RevocationFailed,
    TokenManager,
    create_pool,
)
from asyncpool_creds.providers.vault import AppRoleAuth, VaultDatabase, VaultLogin
from asyncpool_creds.testing import RecordingObserver, VirtualClock

pytestmark = pytest.mark.anyio

CREDENTIALS = "database/creds/hour"
RENEW, REVOKE = "sys/leases/renew", "sys/leases/revoke"
RENEW_TOKEN, REVOKE_TOKEN, LOOK_UP = "auth/token/renew-self", "auth/token/revoke-self", "auth/token/lookup-self"
LOG_IN = "auth/approle/login"


@pytest.fixture
async def vault(anyio_backend: object) -> AsyncIterator[Vault]:
    vault = await started()
    yield vault
    await vault.bao.unseal()
    await vault.make_role("hour", "1h", "24h")
    await vault.make_login()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
async def make(
    vault: Vault, line: Line, clock: VirtualClock, observer: RecordingObserver
) -> AsyncIterator[Callable[..., VaultDatabase]]:
    """Makes providers that log in by approle, on the virtual clock and the tapped line."""
    made: list[VaultDatabase] = []

    def make(role: str = "hour", **arguments: Any) -> VaultDatabase:
        defaults = {"address": vault.url, "http_client": line.client, "clock": clock}
        provider = VaultDatabase(role, **{"auth": AppRoleAuth(vault.role_id, vault.secret_id), **defaults, **arguments})
        provider.report_to(observer)
        made.append(provider)
        return provider

    yield make
    line.heal()
    for provider in made:
        await provider.aclose()


async def can_log_in(vault: Vault, user: str | None, password: str) -> bool:
    try:
        connection = await asyncpg.connect(vault.dsn(), user=user, password=password)
    except asyncpg.InvalidPasswordError:
        return False
    await connection.close()
    return True


# Renewal


async def test_a_fetch_gives_a_user_that_can_log_in_and_whose_sessions_end_with_it(vault, make, clock):
    started_at = clock.now()

    credential = await make().fetch()

    assert await can_log_in(vault, credential.user, credential.password)
    assert credential.ends_session
    assert credential.expires_at == started_at + timedelta(hours=1)
    assert credential.version.startswith("database/creds/hour/")


async def test_the_next_fetch_renews_the_lease_and_the_user_stays(make, clock, line):
    provider = make()
    first = await provider.fetch()
    line.take()
    clock.advance(600)

    second = await provider.fetch()

    assert line.take() == [RENEW]
    assert second.is_same_secret(first)
    assert (second.user, second.password) == (first.user, first.password)
    assert second.expires_at == first.expires_at + timedelta(minutes=10)


async def test_the_expiry_is_counted_from_the_start_of_the_request(make, clock, line):
    provider = make()
    started_at = clock.now()

    async def take_a_minute() -> None:
        clock.advance(60)

    line.before(CREDENTIALS, take_a_minute)
    credential = await provider.fetch()
    line.before(RENEW, take_a_minute)
    renewed = await provider.fetch()

    assert credential.expires_at == started_at + timedelta(hours=1)
    assert renewed.expires_at == started_at + timedelta(hours=1, minutes=1)


async def test_to_a_manager_a_renewal_is_no_rotation(make, clock, observer):
    async with TokenManager(make(), clock=clock, on_event=observer) as manager:
        clock.advance(600)

        await manager.refresh()

        assert [event.rotated for event in observer.of(CredentialRefreshed)] == [False, False]
        assert manager.stats().generation == 1
        assert manager.stats().seconds_left == pytest.approx(3600 * 0.9, abs=1)


async def test_a_renewal_that_is_cut_short_leads_to_a_new_user_in_time(vault, make, line):
    provider = make()
    first = await provider.fetch()
    await vault.make_role("hour", "1h", "30m")
    line.take()

    second = await provider.fetch()

    assert line.take() == [RENEW, CREDENTIALS]
    assert not second.is_same_secret(first)
    # What it has, the old one may keep until the pool has replaced its connections.
    assert await can_log_in(vault, first.user, first.password)


async def test_a_lease_that_is_past_its_maximum_is_replaced(vault, make, line):
    provider = make()
    first = await provider.fetch()
    await vault.make_role("hour", "1s", "1s")
    await asyncio.sleep(1.6)  # OpenBao rounds to seconds
    line.take()

    second = await provider.fetch()

    assert line.requests[0] == ("PUT", RENEW, 400)
    assert not second.is_same_secret(first)


async def test_a_lease_that_the_server_has_revoked_is_replaced(vault, make, line):
    provider = make()
    first = await provider.fetch()
    await vault.bao.ask("PUT", REVOKE, {"lease_id": first.version})
    line.take()

    second = await provider.fetch()

    assert line.requests == [("PUT", RENEW, 400), ("GET", CREDENTIALS, 200)]
    assert await can_log_in(vault, second.user, second.password)


async def test_a_user_that_an_administrator_has_dropped_is_replaced(vault, make, line):
    provider = make()
    first = await provider.fetch()
    await vault.postgres.execute(f'DROP ROLE "{first.user}"')
    line.take()

    second = await provider.fetch()

    assert line.take() == [RENEW, CREDENTIALS]
    assert await can_log_in(vault, second.user, second.password)


async def test_a_renewal_that_fails_within_the_server_leads_to_a_new_user(make, line):
    provider = make()
    first = await provider.fetch()
    line.answer(RENEW, 500, {"errors": ["failed to renew entry"]})

    second = await provider.fetch()

    assert not second.is_same_secret(first)


async def test_a_renewal_without_a_term_in_the_answer_leads_to_a_new_user(make, line):
    provider = make()
    first = await provider.fetch()
    line.answer(RENEW, 200, {})

    assert not (await provider.fetch()).is_same_secret(first)


@pytest.mark.parametrize("status", [429, 473, 502, 503])
async def test_a_renewal_that_meets_trouble_which_passes_is_tried_again_later(make, line, status):
    provider = make()
    first = await provider.fetch()
    line.answer(RENEW, status)

    with pytest.raises(ProviderError) as caught:
        await provider.fetch()

    assert caught.value.retryable
    assert line.count(CREDENTIALS) == 1
    line.forget(RENEW)
    assert (await provider.fetch()).is_same_secret(first)


async def test_a_lease_that_is_not_renewable_is_replaced_without_asking(vault, make, line):
    answer = await vault.bao.ask("GET", CREDENTIALS)
    line.answer(CREDENTIALS, 200, {**answer, "renewable": False})
    provider = make()
    await provider.fetch()
    line.take()

    await provider.fetch()

    assert line.take() == [CREDENTIALS]


# Leases end with their token


async def test_a_token_that_would_end_before_the_lease_is_renewed_first(make, clock, line):
    provider = make()
    await provider.fetch()
    clock.advance(1799)
    await provider.fetch()
    assert line.count(RENEW_TOKEN) == 0
    clock.advance(2)
    line.take()

    credential = await provider.fetch()

    assert line.take() == [RENEW_TOKEN, RENEW]
    assert credential.expires_at == clock.now() + timedelta(hours=1)


async def test_a_token_of_which_half_is_over_is_renewed_first(vault, make, clock, line):
    await vault.make_role("short", "5m", "1h")
    provider = make("short")
    await provider.fetch()
    clock.advance(2699)
    await provider.fetch()
    assert line.count(RENEW_TOKEN) == 0
    clock.advance(2)
    line.take()

    await provider.fetch()

    assert line.take() == [RENEW_TOKEN, RENEW]


async def test_a_token_that_its_auth_method_will_not_renew_is_replaced_by_a_login(vault, make, clock, line):
    ask, password = vault.bao.ask, secret("ann")
    await ask("POST", "sys/auth/people", {"type": "userpass"})
    person = {"password": password, "token_policies": ["app"], "token_ttl": "90m"}
    await ask("POST", "auth/people/users/ann", person)

    class Person:
        async def login(self) -> VaultLogin:
            return VaultLogin("auth/people/login/ann", {"password": password})

    try:
        provider = make(auth=Person())
        first = await provider.fetch()
        await ask("POST", "auth/people/users/ann", {**person, "token_policies": ["app", "revoker"]})
        clock.advance(2701)
        line.take()

        second = await provider.fetch()

        # "policies have changed, not renewing"
        assert line.requests[0] == ("POST", RENEW_TOKEN, 500)
        assert line.take() == [RENEW_TOKEN, "auth/people/login/ann", CREDENTIALS]
        assert not second.is_same_secret(first)
        await provider.aclose()
    finally:
        await ask("DELETE", "sys/auth/people")


@pytest.mark.parametrize("status", [429, 503])
async def test_a_token_whose_renewal_meets_trouble_which_passes_is_renewed_later(make, clock, line, status):
    provider = make()
    first = await provider.fetch()
    clock.advance(2701)
    line.answer(RENEW_TOKEN, status)

    with pytest.raises(ProviderError) as caught:
        await provider.fetch()

    assert caught.value.retryable
    assert line.count(LOG_IN) == 1
    line.forget(RENEW_TOKEN)
    assert (await provider.fetch()).is_same_secret(first)


@pytest.mark.parametrize("answer", [{}, {"auth": {"lease_duration": 0, "renewable": True}}])
async def test_a_token_that_is_renewed_by_nothing_is_replaced_by_a_login(make, clock, line, answer):
    provider = make()
    await provider.fetch()
    clock.advance(2701)
    line.answer(RENEW_TOKEN, 200, answer)
    line.take()

    await provider.fetch()

    assert line.take() == [RENEW_TOKEN, LOG_IN, CREDENTIALS]


async def test_where_the_token_cannot_be_renewed_a_login_is_made_and_the_lease_is_replaced_and_not_renewed(
    vault, make, clock, line
):
    provider = make()
    first = await provider.fetch()
    await vault.make_login(token_ttl="20m", token_max_ttl="20m")
    clock.advance(2701)
    line.take()

    second = await provider.fetch()

    assert line.take() == [RENEW_TOKEN, LOG_IN, CREDENTIALS]
    assert not second.is_same_secret(first)
    # The lease of the old token is revoked with the new one.
    await provider.revoke(first)
    assert first.user not in await vault.users()
    assert second.user in await vault.users()


async def test_batch_tokens_are_replaced_by_a_login_and_never_renewed_nor_revoked(vault, make, clock, line):
    await vault.make_login(token_type="batch")
    provider = make()
    first = await provider.fetch()
    clock.advance(2701)

    second = await provider.fetch()
    await provider.aclose()

    assert not second.is_same_secret(first)
    assert line.take() == [LOG_IN, CREDENTIALS, LOG_IN, CREDENTIALS, REVOKE, REVOKE]
    assert await vault.users() & {first.user, second.user} == set()


async def test_a_token_that_was_revoked_is_replaced_by_a_login(vault, make, line):
    provider = make()
    first = await provider.fetch()
    await vault.bao.ask("POST", REVOKE_TOKEN, token=line.seen[-1].headers["X-Vault-Token"])
    line.take()

    second = await provider.fetch()

    assert line.take() == [RENEW, CREDENTIALS, LOG_IN, CREDENTIALS]
    assert await can_log_in(vault, second.user, second.password)
    assert not second.is_same_secret(first)


async def test_after_a_login_a_refusal_is_believed_until_the_next_fetch(vault, make, line):
    await vault.make_login(token_policies=["revoker"])
    provider = make()

    for logins in (1, 2, 3):
        with pytest.raises(ProviderError, match=r"its policies do not let it read database/creds/hour") as caught:
            await provider.fetch()

        assert not caught.value.retryable
        assert line.count(LOG_IN) == logins
    # A token has the policies that its role had at the login.
    await vault.make_login()
    assert (await provider.fetch()).ends_session


@pytest.mark.parametrize("settings", [{"ttl": "10m"}, {"ttl": "10m", "type": "batch"}, {"period": "10m"}])
async def test_no_credential_is_said_to_outlive_the_token(vault, make, clock, settings):
    provider = make(auth=await vault.make_token(**settings))

    credential = await provider.fetch()

    assert timedelta(minutes=9, seconds=55) < credential.expires_at - clock.now() <= timedelta(minutes=10)


async def test_a_renewed_lease_is_not_said_to_outlive_the_token_either(vault, make, clock, line):
    provider = make(auth=await vault.make_token(ttl="1h", renewable=False))
    first = await provider.fetch()
    clock.advance(1200)

    second = await provider.fetch()

    assert line.count(RENEW) == 1
    assert second.expires_at <= first.expires_at


async def test_a_root_token_never_ends_and_is_never_renewed(vault, make, clock, line):
    provider = make(auth=vault.bao.root_token)
    await provider.fetch()
    clock.advance(100_000)

    credential = await provider.fetch()

    assert line.count(RENEW_TOKEN) == 0
    assert credential.expires_at == clock.now() + timedelta(hours=1)


async def test_a_periodic_token_is_renewed_for_ever(vault, make, clock, line):
    provider = make(auth=await vault.make_token(period="10m"))
    first = await provider.fetch()

    for _ in range(5):
        clock.advance(400)
        last = await provider.fetch()

    assert line.count(RENEW_TOKEN) == 5
    assert last.is_same_secret(first)
    assert last.expires_at == clock.now() + timedelta(minutes=10)


async def test_a_given_token_that_cannot_be_renewed_is_used_to_its_end_and_that_is_announced(
    vault, make, clock, line, observer
):
    provider = make(auth=await vault.make_token(ttl="2h"))
    first = await provider.fetch()
    line.answer(RENEW_TOKEN, 400, {"errors": ["lease is not renewable"]})
    line.answer(LOOK_UP, 200, {"data": {"ttl": 900, "creation_ttl": 7200, "expire_time": "soon", "renewable": True}})
    clock.advance(6300)
    line.take()

    for _ in range(3):
        credential = await provider.fetch()

    assert line.take() == [RENEW_TOKEN, LOOK_UP, RENEW] * 3
    assert credential.is_same_secret(first)
    assert credential.expires_at == clock.now() + timedelta(minutes=15)
    (event,) = observer.of(RefreshTokenExpiring)
    assert event.provider == "VaultDatabase"
    assert "pass one" in event.advice


async def test_a_login_that_fails_does_not_stop_a_token_that_is_good_yet(vault, make, clock, line, observer):
    await vault.make_login(token_type="batch")
    provider = make()
    first = await provider.fetch()
    clock.advance(2701)
    line.answer(LOG_IN, 400, {"errors": ["invalid role or secret ID"]})

    second = await provider.fetch()

    assert second.is_same_secret(first)
    (event,) = observer.of(RefreshTokenExpiring)
    assert "secret ids expire" in event.advice


async def test_a_token_that_was_revoked_and_for_which_there_is_no_other_is_an_error_for_good(vault, make):
    token = await vault.make_token()
    provider = make(auth=token)
    await provider.fetch()
    await vault.bao.ask("POST", REVOKE_TOKEN, token=token)

    with pytest.raises(ProviderError, match="wrong, expired or revoked") as caught:
        await provider.fetch()

    assert not caught.value.retryable


async def test_a_token_that_may_not_look_itself_up_is_refused_before_anything_is_taken(vault, make, line):
    provider = make(auth=await vault.make_token(no_default_policy=True))

    with pytest.raises(ProviderError, match="lacks the policy 'default'") as caught:
        await provider.fetch()

    assert not caught.value.retryable
    assert line.count(CREDENTIALS) == 0


async def test_a_token_for_a_number_of_requests_is_refused_before_anything_is_taken(vault, make, line):
    await vault.make_login(token_num_uses=5)

    for provider in (make(), make(auth=await vault.make_token(num_uses=5))):
        with pytest.raises(ProviderError, match="num_uses") as caught:
            await provider.fetch()

        assert not caught.value.retryable
    assert line.count(CREDENTIALS) == 0


# What is not needed any more is revoked


@pytest.mark.parametrize("whose", ["of the pool", "handed to it"])
async def test_a_lease_is_revoked_when_its_last_connection_has_gone(vault, make, observer, whose):
    provider = make(clock=None)
    credentials = provider if whose == "of the pool" else TokenManager(provider, on_event=observer)
    pool: CredentialPool[asyncpg.Record] = create_pool(
        vault.dsn(), credentials=credentials, min_size=2, max_size=2, retire_when="rotated", on_event=observer
    )
    async with AsyncExitStack() as stack:
        if isinstance(credentials, TokenManager):
            await stack.enter_async_context(credentials)
        await stack.enter_async_context(pool)
        async with pool.acquire() as connection:
            first = await connection.fetchval("SELECT current_user")
            await vault.make_role("hour", "1h", "30m")
            assert pool.manager is not None
            await pool.manager.refresh()
            await vault.make_role("hour", "1h", "24h")
            # It is used yet.
            assert await connection.fetchval("SELECT current_user") == first

        await vault.dropped(first)
        second = await pool.fetchval("SELECT current_user")

        assert second != first
        assert second in await vault.users()
    await vault.dropped(second)
    assert observer.of(RevocationFailed) == []


async def test_closing_revokes_every_lease_and_the_token_of_our_own_login(vault, make, line):
    provider = make()
    first = await provider.fetch()
    provider.invalidate(first)
    second = await provider.fetch()
    token = line.seen[-1].headers["X-Vault-Token"]
    line.take()

    await provider.aclose()

    # The leases end with the token.
    assert line.take() == [REVOKE_TOKEN]
    await vault.dropped(str(first.user))
    await vault.dropped(str(second.user))
    with pytest.raises(httpx.HTTPStatusError):
        await vault.bao.ask("GET", LOOK_UP, token=token)


async def test_closing_leaves_a_given_token_alone_and_revokes_its_leases(vault, make, line):
    token = await vault.make_token()
    provider = make(auth=token)
    first = await provider.fetch()
    provider.invalidate(first)
    second = await provider.fetch()
    line.take()

    await provider.aclose()
    await provider.aclose()

    assert line.take() == [REVOKE, REVOKE]
    assert await vault.users() & {first.user, second.user} == set()
    await vault.bao.ask("GET", LOOK_UP, token=token)


async def test_after_closing_a_fetch_logs_in_again_and_takes_a_new_lease(make, line):
    provider = make()
    first = await provider.fetch()
    await provider.aclose()
    line.take()

    second = await provider.fetch()

    assert line.take() == [LOG_IN, CREDENTIALS]
    assert not second.is_same_secret(first)


async def test_nothing_is_revoked_where_that_is_switched_off(vault, make, line):
    provider = make(revoke=False)
    credential = await provider.fetch()
    line.take()

    await provider.revoke(credential)
    await provider.aclose()

    assert line.take() == []
    assert await can_log_in(vault, credential.user, credential.password)


async def test_what_cannot_be_revoked_on_closing_is_reported_and_no_error(vault, make, observer):
    provider = make(auth=await vault.make_token(policies=["app"]))
    await provider.fetch()

    await provider.aclose()

    (event,) = observer.of(RevocationFailed)
    assert event.provider == "VaultDatabase"
    assert "allow the token to 'update' sys/leases/revoke" in event.message


async def test_a_token_that_cannot_be_revoked_is_reported_and_no_error(make, line, observer):
    provider = make()
    await provider.fetch()
    line.cut()

    await provider.aclose()

    assert "cannot be reached" in observer.of(RevocationFailed)[0].message


async def test_closing_takes_no_longer_than_one_request_may(make, line, vault, observer):
    provider = make(auth=await vault.make_token(), timeout=0.2)
    for _ in range(3):
        provider.invalidate(await provider.fetch())
    line.hang()

    with anyio.fail_after(1):
        await provider.aclose()

    assert len(observer.of(RevocationFailed)) == 1


async def test_what_cannot_be_revoked_is_an_error_for_the_manager_to_report_and_tried_again_on_closing(
    vault, make, line
):
    provider = make(auth=await vault.make_token())
    first = await provider.fetch()
    line.answer(REVOKE, 503, {"errors": ["Vault is sealed"]})

    with pytest.raises(ProviderError, match="sealed"):
        await provider.revoke(first)

    line.forget(REVOKE)
    await provider.aclose()
    assert first.user not in await vault.users()


async def test_a_lease_whose_renewal_was_cut_short_is_revoked_even_after_the_end_that_was_announced(vault, make, clock):
    await vault.make_role("hour", "30m", "1h")
    provider = make()
    first = await provider.fetch()
    clock.advance(1700)
    await vault.make_role("hour", "30m", "20m")
    second = await provider.fetch()
    clock.advance(200)
    assert first.expires_at < clock.now()
    await provider.fetch()

    await provider.revoke(first)

    assert first.user not in await vault.users()
    assert second.user in await vault.users()


async def test_revoking_what_was_never_given_or_has_ended_asks_nobody(make, line, clock):
    provider = make()
    first = await provider.fetch()
    provider.invalidate(first)
    clock.advance(3601)
    await provider.fetch()
    line.take()

    await provider.revoke(first)
    await make().revoke(first)

    assert line.take() == []


# Refusals, races and interruptions


async def test_a_refused_user_is_never_renewed_but_replaced(make, line):
    provider = make()
    first = await provider.fetch()
    line.take()

    provider.invalidate(first)
    second = await provider.fetch()

    assert line.take() == [CREDENTIALS]
    assert not second.is_same_secret(first)


async def test_a_user_that_is_refused_while_its_lease_is_renewed_is_replaced(make, line):
    provider = make()
    first = await provider.fetch()

    async def refuse() -> None:
        provider.invalidate(first)

    line.before(RENEW, refuse)
    second = await provider.fetch()

    assert not second.is_same_secret(first)


async def test_the_refusal_of_an_older_user_changes_nothing(make, line):
    provider = make()
    first = await provider.fetch()
    provider.invalidate(first)
    second = await provider.fetch()
    line.take()

    provider.invalidate(first)

    assert (await provider.fetch()).is_same_secret(second)


async def test_a_pool_replaces_a_user_that_was_dropped_behind_its_back(vault, make, observer):
    pool: CredentialPool[asyncpg.Record] = create_pool(
        vault.dsn(), credentials=make(clock=None), min_size=0, max_size=2, on_event=observer
    )
    async with pool:
        async with pool.acquire() as connection:
            first = await connection.fetchval("SELECT current_user")
            await vault.bao.ask("PUT", "sys/leases/revoke-prefix/database/creds/hour")

            second = await pool.fetchval("SELECT current_user")

        assert second != first


async def test_a_pool_goes_on_when_the_token_its_user_was_taken_with_is_revoked(vault, make, line, observer):
    pool: CredentialPool[asyncpg.Record] = create_pool(
        vault.dsn(), credentials=make(clock=None), min_size=0, max_size=2, on_event=observer
    )
    async with pool:
        async with pool.acquire() as connection:
            first = await connection.fetchval("SELECT current_user")
            await vault.bao.ask("POST", REVOKE_TOKEN, token=line.seen[-1].headers["X-Vault-Token"])
            await vault.dropped(first)
            line.take()

            second = await pool.fetchval("SELECT current_user")

        assert line.take() == [CREDENTIALS, LOG_IN, CREDENTIALS]
        assert second in await vault.users()


async def test_connections_are_retired_before_their_user_is_dropped(vault, make, observer):
    await vault.make_role("fleeting", "2s", "2s")
    users: list[str] = []
    pool: CredentialPool[asyncpg.Record] = create_pool(
        vault.dsn(), credentials=make("fleeting", clock=None), min_size=2, max_size=3, on_event=observer
    )

    async with pool:
        async with pool.acquire() as held:
            first = await held.fetchval("SELECT current_user")
            while len(set(users)) < 3:
                # A dropped user still gets an answer to SELECT 1, but not to this.
                users.append(await pool.fetchval("SELECT current_user"))
                await asyncio.sleep(0.01)
            await vault.dropped(first)
            assert await held.fetchval("SELECT 1") == 1
            with pytest.raises(asyncpg.UndefinedObjectError):
                await held.fetchval("SELECT current_user")

        async with pool.acquire() as one, pool.acquire() as other, pool.acquire() as third:
            now = [await connection.fetchval("SELECT current_user") for connection in (one, other, third)]
        assert first not in now

    # Each was dropped once its connections had gone, or by the end of its lease.
    for user in {*users, *now}:
        await vault.dropped(user)


async def test_a_sealed_server_is_asked_again_while_the_user_it_gave_stays_in_use(vault, make, clock, observer):
    async with TokenManager(make(), clock=clock, background=False, on_event=observer) as manager:
        before = await manager.get()
        await vault.bao.seal()

        with pytest.raises(ProviderError, match="is sealed, or starting") as caught:
            await manager.refresh()

        assert caught.value.retryable
        assert await manager.get() == before
        async with create_pool(vault.dsn(), credentials=manager, min_size=1) as pool:
            assert await pool.fetchval("SELECT current_user") == before.user
        await vault.bao.unseal()
        assert (await manager.refresh()).is_same_secret(before)


async def test_cancelling_a_fetch_keeps_what_was_there(make, line):
    provider = make()
    first = await provider.fetch()
    line.hang()
    fetch = asyncio.create_task(provider.fetch())
    await line.hangs()

    fetch.cancel()
    await asyncio.wait([fetch])
    line.heal()

    assert fetch.cancelled()
    assert (await provider.fetch()).is_same_secret(first)


def test_one_event_loop_after_the_other_will_do():
    vault = asyncio.run(started())
    line = Line()
    auth = AppRoleAuth(vault.role_id, vault.secret_id)
    provider = VaultDatabase("hour", address=vault.url, auth=auth, http_client=line.client)

    first = asyncio.run(provider.fetch())
    second = asyncio.run(provider.fetch())
    asyncio.run(provider.aclose())

    assert second.is_same_secret(first)
    assert line.take() == [LOG_IN, CREDENTIALS, RENEW, REVOKE_TOKEN]


async def test_a_forked_child_has_a_lease_of_its_own_and_leaves_its_parents_alone(vault, make):
    provider = make()
    first = await provider.fetch()

    async def in_child() -> bool:
        await provider.revoke(first)
        async with asyncio.timeout(10), aclosing(provider):
            second = await provider.fetch()
        return second.is_same_secret(first)

    child = fork()
    if not child:
        status = 1
        try:
            status = int(asyncio.run(in_child()))
        finally:
            os._exit(status)
    _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert await can_log_in(vault, first.user, first.password)
    assert (await provider.fetch()).is_same_secret(first)


async def test_nothing_shows_a_password_or_a_token(make):
    provider = make(auth=secret("given"))
    with pytest.raises(ProviderError):
        await provider.fetch()
    other = make()
    credential = await other.fetch()

    assert_no_secret(repr(provider), str(provider), provider)
    shown = "".join(map(repr, (other, credential, vars(other), other._vault.__dict__)))
    assert credential.password not in shown
