"""Static roles, key/value secrets, and every refusal there is, at a real OpenBao."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from openbao import Line, Vault, started
from support import secret

from asyncpool_creds import (
    CredentialPool,
    CredentialRefused,
    ProviderError,
    ProviderTimeout,
    TokenManager,
    create_pool,
)
from asyncpool_creds.providers.vault import VaultDatabase, VaultKV, VaultStaticRole
from asyncpool_creds.testing import VirtualClock

pytestmark = pytest.mark.anyio

STATIC = "database/static-creds/static"
SECONDS_LATE = timedelta(seconds=1)
VAULTS_INTERVAL = timedelta(seconds=5)


@pytest.fixture
async def vault(anyio_backend: object) -> AsyncIterator[Vault]:
    vault = await started()
    yield vault
    await vault.bao.unseal()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def arguments(vault: Vault, line: Line, clock: VirtualClock) -> dict[str, Any]:
    """What all three providers take: a token that never ends, the tapped line and the virtual clock."""
    return {"address": vault.url, "auth": vault.bao.root_token, "http_client": line.client, "clock": clock}


@pytest.fixture
async def static(arguments: dict[str, Any]) -> AsyncIterator[VaultStaticRole]:
    provider = VaultStaticRole("static", **arguments)
    yield provider
    await provider.aclose()


@pytest.fixture
async def kv(arguments: dict[str, Any]) -> AsyncIterator[Callable[..., VaultKV]]:
    made: list[VaultKV] = []

    def make(path: str, **more: Any) -> VaultKV:
        made.append(VaultKV(path, **{**arguments, **more}))
        return made[-1]

    yield make
    for provider in made:
        await provider.aclose()


def of_static_role(password: str, ttl: int) -> dict[str, object]:
    return {"data": {"username": "static", "password": password, "ttl": ttl}}


# Static roles


async def test_a_static_role_gives_the_password_of_the_moment(vault, static):
    before = await static.fetch()
    await vault.bao.ask("POST", "database/rotate-role/static")
    after = await static.fetch()

    assert before.user == after.user == "static"
    assert not after.is_same_secret(before)
    connection = await asyncpg.connect(vault.dsn(), user=after.user, password=after.password)
    await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(vault.dsn(), user=before.user, password=before.password)


async def test_a_static_role_is_due_just_after_its_ttl_and_its_sessions_live_on(vault, static, clock, line):
    await vault.bao.ask("POST", "database/rotate-role/static")

    credential = await static.fetch()

    assert not credential.ends_session
    assert timedelta(seconds=3595) < credential.refresh_at - clock.now() <= timedelta(hours=1) + SECONDS_LATE
    assert credential.expires_at == credential.refresh_at - SECONDS_LATE + timedelta(seconds=30)


@pytest.mark.parametrize("ttl", [0, 1, 5, 60, 600, 86_400, 30 * 86_400])
async def test_a_manager_never_asks_for_a_static_role_before_its_ttl(static, clock, line, ttl):
    line.answer(STATIC, 200, of_static_role(secret("static"), ttl))

    async with TokenManager(static, clock=clock, background=False, on_event=[]) as manager:
        stamp = await manager.stamp()

        assert stamp.refresh_at is not None
        seconds = (stamp.refresh_at - clock.now()).total_seconds()
        # Nor sooner than Vault looks itself. A tenth of what is left of the half minute is the jitter.
        assert max(ttl + 1, 5) <= seconds <= max(ttl + 1, 5) + 3


def test_a_manager_asks_for_an_overdue_password_every_few_seconds_and_never_calls_it_expired(clock):
    line = Line()
    line.answer(STATIC, 200, of_static_role(secret("static"), 0))
    line.answer("auth/token/lookup-self", 200, {"data": {"ttl": 0, "expire_time": None}})
    static = VaultStaticRole(
        "static", address="http://127.0.0.1:1", auth=secret("token"), http_client=line.client, clock=clock
    )

    async def wait_two_minutes() -> None:
        async with TokenManager(static, clock=clock, on_event=[]) as manager:
            for _ in range(120):
                await asyncio.sleep(1)
                assert manager.current is not None

    clock.run(wait_two_minutes())

    assert 120 / 10 <= line.count(STATIC) <= 120 / 5


async def test_the_rotation_after_the_next_is_not_mistaken_for_the_next(static, clock, line):
    # So does Vault with a schedule, until the password is really changed.
    line.answer(STATIC, 200, of_static_role(secret("old"), 10))
    first = await static.fetch()
    clock.advance(11)
    line.answer(STATIC, 200, of_static_role(secret("old"), 3599))

    overdue = await static.fetch()
    line.answer(STATIC, 200, of_static_role(secret("new"), 3598))
    rotated = await static.fetch()

    assert first.refresh_at == clock.now()
    assert overdue.refresh_at == clock.now() + VAULTS_INTERVAL
    assert overdue.expires_at == clock.now() + timedelta(seconds=30)
    assert rotated.refresh_at == clock.now() + timedelta(seconds=3598) + SECONDS_LATE


async def test_a_schedule_that_was_changed_is_believed_after_a_while(static, clock, line):
    line.answer(STATIC, 200, of_static_role(secret("old"), 10))
    await static.fetch()
    clock.advance(41)
    line.answer(STATIC, 200, of_static_role(secret("old"), 3599))

    credential = await static.fetch()

    assert credential.refresh_at == clock.now() + timedelta(seconds=3599) + SECONDS_LATE


async def test_a_login_that_meets_the_rotation_gets_the_new_password_at_once(vault, arguments, observer):
    source = VaultStaticRole("static", **{**arguments, "clock": None})
    pool: CredentialPool[asyncpg.Record] = create_pool(
        vault.dsn(), credentials=source, min_size=1, max_size=2, on_event=observer
    )
    async with pool, pool.acquire() as first:
        await vault.bao.ask("POST", "database/rotate-role/static")

        async with pool.acquire() as second:
            assert await second.fetchval("SELECT current_user") == "static"

        # The session of the old password lives on.
        assert await first.fetchval("SELECT current_user") == "static"
    assert [event.retrying for event in observer.of(CredentialRefused)] == [True]


@pytest.mark.parametrize("data", [{}, {"username": "a", "password": "b"}, {"username": "a", "ttl": 5}, None])
async def test_what_is_no_static_role_is_an_error_for_good(static, line, data):
    line.answer(STATIC, 200, {"data": data})

    with pytest.raises(ProviderError, match="is that a static role") as caught:
        await static.fetch()

    assert not caught.value.retryable


# Key/value secrets


async def test_a_kv_secret_has_the_users_and_passwords_of_its_latest_version(vault, kv, clock):
    provider = kv("team/db")
    await vault.bao.ask("DELETE", "secret/metadata/team/db")
    await vault.bao.ask("POST", "secret/data/team/db", {"data": {"username": "app", "password": secret("one")}})

    first = await provider.fetch()
    same = await provider.fetch()
    await vault.bao.ask("POST", "secret/data/team/db", {"data": {"username": "app", "password": secret("two")}})
    second = await provider.fetch()

    assert (first.user, first.password) == ("app", secret("one"))
    assert first.expires_at is None
    assert first.refresh_at == clock.now() + timedelta(minutes=5)
    assert first.version.startswith("1 of 20")
    assert same.is_same_secret(first)
    assert second.password == secret("two")
    assert second.version.startswith("2 of ")
    assert not second.is_same_secret(first)


async def test_a_kv_secret_that_was_deleted_and_made_anew_is_another_one(vault, kv):
    provider = kv("anew")
    ask = vault.bao.ask
    await ask("POST", "secret/data/anew", {"data": {"username": "app", "password": secret("one")}})
    first = await provider.fetch()

    await ask("DELETE", "secret/metadata/anew")
    await ask("POST", "secret/data/anew", {"data": {"username": "app", "password": secret("two")}})
    second = await provider.fetch()

    assert second.version.startswith("1 of ")
    assert not second.is_same_secret(first)


async def test_a_kv_secret_whose_version_is_not_told_is_known_by_its_password(kv, line):
    provider = kv("plain")
    for password in (secret("one"), secret("two")):
        line.answer("secret/data/plain", 200, {"data": {"data": {"username": "app", "password": password}}})
        credential = await provider.fetch()

        assert credential.version is None
        assert credential.password == password


async def test_a_kv_secret_of_version_1_is_looked_at_as_often_as_it_says_itself(vault, kv, clock, line):
    await vault.bao.ask("POST", "old/db", {"username": "app", "password": secret("one"), "ttl": "2m"})

    credential = await kv("db", mount="old", kv_version=1).fetch()
    oftener = await kv("db", mount="old", kv_version=1, refresh_every=60).fetch()
    line.answer("old/db", 200, {"lease_duration": 0, "data": {"username": "app", "password": secret("one")}})
    silent = await kv("db", mount="old", kv_version=1).fetch()

    assert credential.password == secret("one")
    assert credential.version is None
    assert credential.refresh_at == clock.now() + timedelta(minutes=2)
    assert oftener.refresh_at == clock.now() + timedelta(minutes=1)
    assert silent.refresh_at == clock.now() + timedelta(minutes=5)


async def test_the_fields_can_have_any_name_and_the_user_be_the_connections_own(vault, kv):
    await vault.bao.ask("POST", "secret/data/named", {"data": {"PGUSER": "app", "PGPASSWORD": secret("one")}})

    named = await kv("named", username_field="PGUSER", password_field="PGPASSWORD").fetch()
    unnamed = await kv("named", username_field=None, password_field="PGPASSWORD").fetch()

    assert (named.user, named.password) == ("app", secret("one"))
    assert (unnamed.user, unnamed.password) == (None, secret("one"))


async def test_a_secret_is_looked_at_as_often_as_is_wanted_or_never(vault, kv, clock):
    await vault.bao.ask("POST", "secret/data/often", {"data": {"username": "app", "password": secret("one")}})

    assert (await kv("often", refresh_every=timedelta(hours=1)).fetch()).refresh_at == clock.now() + timedelta(hours=1)
    assert (await kv("often", refresh_every=None).fetch()).refresh_at is None


@pytest.mark.parametrize(
    ("secret_data", "complaint"),
    [
        ({"user": "app", "password": "x"}, "field 'username' of secret/data/odd is not there, or empty"),
        ({"username": "app"}, "field 'password' of secret/data/odd is not there, or empty"),
        ({"username": "app", "password": ""}, "field 'password' of secret/data/odd is not there, or empty"),
        ({"username": "app", "password": 12345}, "field 'password' of secret/data/odd is no text"),
        ({"username": "app", "password": "a\0b"}, "holds characters that no server accepts"),
    ],
)
async def test_a_secret_without_what_is_needed_is_an_error_for_good(vault, kv, secret_data, complaint):
    await vault.bao.ask("POST", "secret/data/odd", {"data": secret_data})

    with pytest.raises(ProviderError, match=complaint) as caught:
        await kv("odd").fetch()

    assert not caught.value.retryable


async def test_a_secret_that_is_not_there_or_was_deleted_or_lies_in_the_other_kind_of_store_is_told_apart(vault, kv):
    await vault.bao.ask("POST", "secret/data/gone", {"data": {"username": "app", "password": secret("one")}})
    await vault.bao.ask("DELETE", "secret/data/gone")
    await vault.bao.ask("POST", "old/db", {"username": "app", "password": secret("one")})
    cases = [
        (kv("nothing"), r"no secret/data/nothing \(HTTP 404\); check path, mount and kv_version"),
        (kv("gone"), "its latest version was deleted at 20"),
        (kv("gone", kv_version=1), "Invalid path for a versioned K/V secrets engine"),
        (kv("db", mount="old"), r"no old/data/db \(HTTP 404\); check path, mount and kv_version"),
        (kv("db", mount="nowhere"), 'no handler for route "nowhere/data/db"'),
    ]

    for provider, complaint in cases:
        with pytest.raises(ProviderError, match=complaint) as caught:
            await provider.fetch()

        assert not caught.value.retryable


# Refusals


@pytest.mark.parametrize(
    ("status", "said", "retryable", "complaint"),
    [
        (307, None, True, "sends us elsewhere .*use the address of the active server"),
        (400, "unknown role: hour", False, r"was refused \(HTTP 400: unknown role: hour\); check role and mount"),
        (404, None, False, r"there is no database/creds/hour \(HTTP 404\); check role and mount, and the namespace"),
        (405, "unsupported operation", False, "unsupported operation.; check role and mount"),
        (412, "required index state not present", True, "has not seen our last write yet"),
        (429, "request path: rate limit quota exceeded", True, "is asked too often, by a quota .*rate limit quota"),
        (472, None, True, "a standby for disasters; use the address of the primary"),
        (473, None, True, "a standby for performance .*use the address of the active server"),
        (500, "failed to connect: dial tcp: refused", True, "dial tcp: refused"),
        (502, None, True, "the database behind it is in trouble"),
        (503, "Vault is sealed", True, "is sealed, or starting; .*have it unsealed"),
        (200, None, False, "gave no lease of a user and password"),
    ],
)
async def test_every_refusal_has_its_kind_and_its_advice(arguments, line, status, said, retryable, complaint):
    provider = VaultDatabase("hour", **arguments)
    line.answer("database/creds/hour", status, {"errors": [said] if said else []})

    with pytest.raises(ProviderError, match=complaint) as caught:
        await provider.fetch()

    assert caught.value.retryable is retryable
    await provider.aclose()


async def test_the_server_says_when_to_come_back(arguments, line):
    provider = VaultDatabase("hour", **arguments)
    line.answer("database/creds/hour", 429, {"errors": []}, headers={"Retry-After": "17"})

    with pytest.raises(ProviderError) as caught:
        await provider.fetch()

    assert caught.value.retry_after == 17


async def test_a_quota_of_the_real_server_is_asked_again_when_it_says_so(vault, arguments):
    quota = {"path": "database/creds/hour", "rate": 1, "interval": "30s"}
    await vault.bao.ask("POST", "sys/quotas/rate-limit/few", quota)
    await vault.bao.ask("POST", "sys/quotas/config", {"enable_rate_limit_response_headers": True})
    provider = VaultDatabase("hour", **{**arguments, "clock": None})
    try:
        provider.invalidate(await provider.fetch())
        with pytest.raises(ProviderError, match=r"is asked too often, .*rate limit quota exceeded") as caught:
            await provider.fetch()
    finally:
        await vault.bao.ask("DELETE", "sys/quotas/rate-limit/few")

    assert caught.value.retryable
    assert 0 < caught.value.retry_after <= 30
    await provider.aclose()


async def test_a_role_that_the_real_server_does_not_know_is_an_error_for_good(arguments):
    for provider in (VaultDatabase("nobody", **arguments), VaultStaticRole("nobody", **arguments)):
        with pytest.raises(ProviderError, match=r"HTTP 400: unknown role: nobody\); check role and mount") as caught:
            await provider.fetch()

        assert not caught.value.retryable


async def test_a_mount_that_the_real_server_does_not_know_is_an_error_for_good(arguments):
    with pytest.raises(ProviderError, match="there is no nowhere/creds/hour") as caught:
        await VaultDatabase("hour", mount="nowhere", **arguments).fetch()

    assert not caught.value.retryable


async def test_a_static_role_taken_for_a_dynamic_one_is_told(arguments, vault):
    with pytest.raises(ProviderError, match="unknown role: static"):
        await VaultDatabase("static", **arguments).fetch()


async def test_a_database_that_is_down_is_asked_again(vault, arguments):
    connection = {
        "plugin_name": "postgresql-database-plugin",
        "allowed_roles": "*",
        "connection_url": "postgresql://{{username}}:{{password}}@127.0.0.1:1/postgres?sslmode=disable",
        "username": "openbao",
        "password": secret("down"),
        "verify_connection": False,
    }
    await vault.bao.ask("POST", "database/config/down", connection)
    role = {"db_name": "down", "creation_statements": ["SELECT 1"], "default_ttl": "1h"}
    await vault.bao.ask("POST", "database/roles/down", role)

    with pytest.raises(ProviderError, match=r"or what is behind it is in trouble;.*connection refused") as caught:
        await VaultDatabase("down", **arguments).fetch()

    assert caught.value.retryable


async def test_a_sealed_server_says_so_and_is_asked_again(vault, kv):
    await vault.bao.ask("POST", "secret/data/sealed", {"data": {"username": "app", "password": secret("one")}})
    provider = kv("sealed")
    await vault.bao.seal()

    with pytest.raises(ProviderError, match=r"is sealed, or starting; .*HTTP 503: Vault is sealed") as caught:
        await provider.fetch()

    assert caught.value.retryable
    await vault.bao.unseal()
    assert (await provider.fetch()).user == "app"


async def test_a_server_that_does_not_answer_is_a_timeout(kv, line):
    line.hang()

    with pytest.raises(ProviderTimeout, match=r"did not answer within 0.1 s") as caught:
        await kv("any", timeout=0.1).fetch()

    assert caught.value.retryable
    line.heal()


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b"[]"])
async def test_what_is_no_vault_is_told(kv, line, content):
    class Portal(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=content)

    with pytest.raises(ProviderError, match=r"answered with no JSON object .*is http://127.0.0.1:.* Vault"):
        await kv("any", http_client=lambda: httpx.AsyncClient(transport=Portal())).fetch()


async def test_a_long_story_of_the_server_is_cut(kv, line):
    line.answer("secret/data/any", 500, {"errors": ["very " * 200]})

    with pytest.raises(ProviderError) as caught:
        await kv("any").fetch()

    assert len(str(caught.value)) < 600
