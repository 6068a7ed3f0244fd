"""Entra: the real azure-identity against metadata endpoints and an authority on loopback."""

from __future__ import annotations

import asyncio
import json
import pickle
import ssl
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import NamedTuple

import anyio.to_thread
import azure.identity
import pytest
import trustme
from azure.identity import CredentialUnavailableError
from azure.identity.aio import (
    ChainedTokenCredential,
    ClientSecretCredential,
    DefaultAzureCredential,
    ManagedIdentityCredential,
    WorkloadIdentityCredential,
)
from lag_probe import watch_cold
from metadata_stubs import Answer, MetadataStub, app_service, azure_environment, virtual_machine
from processes import in_forked_child
from support import assert_no_secret, secret

import asyncpool_creds
from asyncpool_creds import CredentialInvalidated, ProviderError, ProviderTimeout, TokenManager
from asyncpool_creds.providers.azure import DATABASE_SCOPE, Entra
from asyncpool_creds.testing import RecordingObserver
from asyncpool_creds.testing.door import TokenDoor

pytestmark = pytest.mark.anyio

IN_AN_HOUR = "in an hour, as a date"
RESOURCE = "https://ossrdbms-aad.database.windows.net"
IDENTITY = "/subscriptions/1/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/orders-api"


@pytest.fixture
def stub():
    with MetadataStub() as stub, azure_environment(**app_service(stub)):
        yield stub


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def login(authority, tmp_path):
    """Where Entra itself would be: over TLS, because azure-identity takes nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with MetadataStub(tls=context) as stub, azure_environment():
        stub.ca = str(tmp_path / "ca.pem")
        yield stub


@pytest.fixture
async def make():
    made = []

    def make(*arguments, **options):
        provider = Entra(*arguments, **{"close_credential": True, **options})
        made.append(provider)
        return provider

    yield make
    for provider in made:
        await provider.aclose()


def client_secret(login, **options):
    return ClientSecretCredential(
        "tenant", "client", secret("client"), authority=login.url, connection_verify=login.ca, **options
    )


class Info(NamedTuple):
    token: str
    expires_on: int
    refresh_on: int | None = None


class Scripted:
    """A credential as somebody else might write one: it answers with what it is given, in order."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.asked = []
        self.closed = 0

    async def get_token_info(self, *scopes, options=None):
        self.asked.append(options)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self):
        self.closed += 1


def good(number=0, *, life=3600, refresh_in=None):
    now = int(time.time())
    return Info(secret(f"token{number}"), now + life, None if refresh_in is None else now + refresh_in)


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


# Credentials of every kind


async def test_without_a_credential_the_default_one_is_made(make, stub):
    credential = await make().fetch()

    assert stub.verify("", credential.password) is None
    assert credential.expires_at == datetime.fromtimestamp(int(stub.issued[credential.password]), UTC)
    (asked,) = stub.asked
    assert asked.parameters["resource"] == RESOURCE
    assert asked.headers["X-IDENTITY-HEADER"] == "header"


async def test_the_identity_of_a_virtual_machine(make):
    with MetadataStub() as stub, azure_environment(**virtual_machine(stub)):
        credential = await make(ManagedIdentityCredential(client_id="mine")).fetch()

    assert credential.password in stub.issued
    assert stub.asked[0].parameters["resource"] == RESOURCE
    assert stub.asked[0].parameters["client_id"] == "mine"


async def test_a_client_secret(make, login):
    credential = await make(client_secret(login)).fetch()

    assert credential.password in login.issued
    (asked,) = login.asked
    assert asked.path == "/tenant/oauth2/v2.0/token"
    assert asked.parameters["scope"] == DATABASE_SCOPE
    assert asked.parameters["client_secret"] == secret("client")


async def test_a_workload_identity(make, login, tmp_path):
    (tmp_path / "token").write_text(secret("assertion"))
    workload = WorkloadIdentityCredential(
        tenant_id="tenant",
        client_id="client",
        token_file_path=str(tmp_path / "token"),
        authority=login.url,
        connection_verify=login.ca,
    )

    credential = await make(workload).fetch()

    assert credential.password in login.issued
    assert login.asked[0].parameters["client_assertion"] == secret("assertion")


async def test_a_credential_that_has_get_token_only(make):
    class Old:
        async def get_token(self, *scopes, claims=None):
            asked.append((scopes, claims is not None))
            return good(1 if claims else 0)

        async def close(self):
            pass

    asked = []
    provider = make(Old())

    first = await provider.fetch()
    provider.invalidate(first)
    second = await provider.fetch()

    assert first.refresh_at is None
    assert first.expires_at is not None
    assert second.password != first.password
    assert asked == [((DATABASE_SCOPE,), False), ((DATABASE_SCOPE,), False), ((DATABASE_SCOPE,), True)]


async def test_another_cloud_has_another_scope(make, stub):
    await make(scope="https://ossrdbms-aad.database.chinacloudapi.cn/.default").fetch()

    assert stub.asked[0].parameters["resource"] == "https://ossrdbms-aad.database.chinacloudapi.cn"


# Times


async def test_the_source_says_when_it_wants_to_be_asked_again(make, stub):
    stub.members["refresh_in"] = 60
    before = datetime.now(UTC)

    credential = await make().fetch()

    assert before + timedelta(seconds=58) < credential.refresh_at <= datetime.now(UTC) + timedelta(seconds=60)


async def test_a_day_long_token_is_refreshed_at_half_its_life(make, stub):
    stub.lifetime = 86_400

    credential = await make().fetch()

    assert abs(credential.expires_at - credential.refresh_at - timedelta(hours=12)) < timedelta(seconds=3)


async def test_a_host_whose_clock_is_behind_does_not_overrate_a_token(make):
    class Behind:
        def time(self):
            return time.time() - 3000

        monotonic = time

    now = int(time.time())
    with MetadataStub(claims={"iat": now}) as stub, azure_environment(**app_service(stub)):
        credential = await make(clock=Behind()).fetch()

    assert credential.expires_at < datetime.fromtimestamp(now, UTC) - timedelta(seconds=2600)


# The user


@pytest.mark.parametrize(
    ("claims", "user"),
    [
        ({"xms_mirid": IDENTITY, "upn": "x"}, "orders-api"),
        ({"xms_mirid": IDENTITY.lower()}, "orders-api"),
        ({"xms_mirid": "/subscriptions/1/resourcegroups/g/providers/Microsoft.Compute/virtualMachines/vm"}, None),
        ({"upn": "ann@example.com", "preferred_username": "x"}, "ann@example.com"),
        ({"preferred_username": "ann@example.com", "unique_name": "x"}, "ann@example.com"),
        ({"unique_name": "ann@example.com"}, "ann@example.com"),
        ({"appid": "5a8e", "azp": "5a8e"}, None),
        ({"upn": "", "unique_name": 7}, None),
        (None, None),
    ],
)
async def test_the_user_is_whom_the_token_names(make, stub, claims, user):
    stub.claims = claims

    assert (await make().fetch()).user == user


@pytest.mark.parametrize("token", ["a.b.c", "a.!!!!.c", "a.W10.c", "..", "a.//79.c"])
async def test_a_token_that_only_looks_like_one_with_claims_names_nobody(make, token):
    credential = await make(Scripted(Info(token, int(time.time()) + 600))).fetch()

    assert credential.user is None
    assert credential.password == token


async def test_the_user_that_was_given_comes_first(make, stub):
    stub.claims = {"upn": "ann@example.com"}

    assert (await make(user="Prod DB Readonly").fetch()).user == "Prod DB Readonly"


# The cache of azure-identity


async def test_a_fresh_token_comes_from_the_cache(make, stub):
    stub.lifetime = 3600
    provider = make()

    assert (await provider.fetch()).password == (await provider.fetch()).password
    assert len(stub.asked) == 1


async def test_a_token_that_is_due_is_asked_for_past_the_cache(make, stub):
    stub.lifetime = 60  # azure-identity waits 30 s between two requests, and takes this one for due at once
    provider = make()

    passwords = [(await provider.fetch()).password for _ in range(3)]

    assert passwords == list(stub.issued)


async def test_a_token_that_is_due_is_given_again_if_there_is_no_other(make, stub):
    stub.lifetime = 60
    stub.keeps_until = 0
    provider = make()

    assert (await provider.fetch()).password == (await provider.fetch()).password
    assert len(stub.asked) == 2


async def test_an_outage_is_seen_before_the_last_token_has_expired(make, stub):
    stub.lifetime = 60
    provider = make()
    await provider.fetch()
    stub.answer = Answer(503)

    error = await refusal(provider)

    assert error.retryable
    assert "HTTP 503" in str(error)


async def test_after_a_refusal_entra_is_asked_for_a_token_issued_from_now_on(make, login):
    login.lifetime = 3600
    provider = make(client_secret(login))
    first = await provider.fetch()

    provider.invalidate(first)
    second = await provider.fetch()
    third = await provider.fetch()

    assert second.password != first.password
    assert third.password == second.password
    assert [("claims" in asked.parameters) for asked in login.asked] == [False, True]
    claims = json.loads(login.asked[1].parameters["claims"])
    assert abs(int(claims["access_token"]["nbf"]["value"]) - time.time()) < 5


async def test_after_a_refusal_a_managed_identity_gets_a_new_token(make, stub):
    stub.lifetime = 3600
    provider = make()
    first = await provider.fetch()

    provider.invalidate(first)

    assert (await provider.fetch()).password != first.password


async def test_a_token_that_was_refused_is_given_again_by_one_who_knows_no_claims(make):
    unable = CredentialUnavailableError("Azure CLI cannot do that")
    only = good()
    credential = Scripted(only, only, unable, only)
    provider = make(credential)

    provider.invalidate(await provider.fetch())

    assert (await provider.fetch()).password == only.token
    assert [bool(options) for options in credential.asked] == [False, False, True]


async def test_what_was_refused_earlier_does_not_matter(make):
    credential = Scripted(good(1), good(2))
    provider = make(credential)

    provider.invalidate(await provider.fetch())
    await provider.fetch()

    assert credential.asked == [{}, {}]


async def test_a_pool_survives_that_its_token_is_revoked(server, stub, observer: RecordingObserver):
    stub.lifetime = 3600

    def verify(user, token):
        revoked = len(stub.issued) == 1 and door.accepted >= 1
        return "revoked" if revoked else stub.verify(user, token)

    async with TokenDoor(server, verify) as door:
        pool = asyncpool_creds.create_pool(door.dsn(user="app"), credentials=Entra(), min_size=1, on_event=observer)
        async with pool, pool.acquire(), pool.acquire() as second:
            assert await second.fetchval("SELECT current_user::text") == "app"

    assert len(stub.issued) == 2
    assert [event for event in observer.events if isinstance(event, CredentialInvalidated)]


# What can go wrong


@pytest.mark.parametrize(
    ("answer", "retryable", "retry_after", "says"),
    [
        (Answer(500), True, None, "127.0.0.1 is in trouble (HTTP 500)"),
        (Answer(429, headers={"Retry-After": "7"}), True, 7, "HTTP 429"),
        (Answer(503, headers={"Retry-After": IN_AN_HOUR}), True, 3600, ""),
        (Answer(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 -0000"}), True, 0, "HTTP 503"),
        (Answer(404), True, None, "HTTP 404"),
        (Answer(410), True, None, "HTTP 410"),
        (Answer(400, '{"error": "invalid_request"}'), False, None, "refused (HTTP 400); no identity"),
        (Answer(403), False, None, "refused (HTTP 403); no identity"),
        (Answer(200, "<html>", content_type="text/html"), True, None, "no token (HTTP 200)"),
        (Answer(200), True, None, "no token (HTTP 200)"),
        (Answer(0), True, None, "cannot be reached ("),
    ],
)
@pytest.mark.parametrize("when", ["at first", "later", "handed in"])
async def test_what_the_metadata_endpoint_answers_decides(make, stub, when, answer, retryable, retry_after, says):
    provider = make(ManagedIdentityCredential(retry_total=0) if when == "handed in" else None)
    if when == "later":
        stub.lifetime = 60
        await provider.fetch()
    if answer.headers.get("Retry-After") == IN_AN_HOUR:
        date = format_datetime(datetime.now(UTC) + timedelta(hours=1))
        answer = replace(answer, headers={"Retry-After": date})
    stub.answer = answer

    error = await refusal(provider)

    assert error.retryable is retryable
    assert says in str(error)
    assert error.__cause__ is not None
    assert error.retry_after == (None if retry_after is None else pytest.approx(retry_after, abs=30))


@pytest.mark.parametrize(
    ("status", "code", "retryable", "says"),
    [
        (401, 7000215, False, "localhost refused (HTTP 401, AADSTS7000215); wrong client secret"),
        (400, 700016, False, "no such application"),
        (401, 700024, False, "is the token file still being renewed"),
        (400, 99999, False, "AADSTS99999); see Microsoft's list"),
        (400, 90033, True, "localhost is in trouble (HTTP 400, AADSTS90033)"),
        (500, 90033, True, "HTTP 500"),
    ],
)
async def test_what_entra_answers_decides(make, login, status, code, retryable, says):
    description = f"AADSTS{code}: what {secret('client')} is about"
    login.answer = Answer(status, json.dumps({"error": "invalid_client", "error_description": description}))
    login.answer.headers.update({"Retry-After": "3"})

    error = await refusal(make(client_secret(login, retry_total=0)))

    assert error.retryable is retryable
    assert says in str(error)
    assert error.retry_after == (3 if retryable else None)


async def test_an_authority_that_cannot_be_reached_is_asked_again(make):
    variables = {"AZURE_CLIENT_ID": "client", "AZURE_CLIENT_SECRET": "secret", "AZURE_TENANT_ID": "tenant"}
    with azure_environment(**variables, AZURE_AUTHORITY_HOST="https://127.0.0.1:9"):
        error = await refusal(make())

    assert error.retryable
    assert "127.0.0.1 cannot be reached" in str(error)


async def test_where_there_is_no_identity_it_says_what_to_do(make):
    with azure_environment(AZURE_TOKEN_CREDENTIALS="EnvironmentCredential"):
        error = await refusal(make())

    assert not error.retryable
    assert "az login" in str(error)
    assert "EnvironmentCredential authentication unavailable" in str(error.__cause__)


async def test_an_environment_that_contradicts_itself_is_an_error_for_good(make):
    with azure_environment(AZURE_TOKEN_CREDENTIALS="nonsense"):
        error = await refusal(make())

    assert not error.retryable
    assert "AZURE_* variables" in str(error)


async def test_a_chain_that_was_handed_in_tells_what_it_was_answered(make, stub):
    stub.answer = Answer(500)

    error = await refusal(make(ChainedTokenCredential(ManagedIdentityCredential(retry_total=0))))

    assert error.retryable
    assert "127.0.0.1 is in trouble (HTTP 500)" in str(error)


async def test_a_token_that_no_server_accepts_is_an_error(make):
    error = await refusal(make(Scripted(Info("a\0b", int(time.time()) + 60))))

    assert "characters" in str(error)
    assert_no_secret(error)


# Time limits and cancellation


async def test_a_token_takes_no_longer_than_its_limit(make, stub):
    stub.hang()
    provider = make(timeout=0.2)

    with pytest.raises(ProviderTimeout, match=r"no token within 0\.2 s; 127\.0\.0\.1 has not answered"):
        await provider.fetch()
    stub.heal()
    await provider.fetch()


async def test_the_retries_of_azure_identity_have_a_limit_too(make):
    with MetadataStub() as stub, azure_environment(**virtual_machine(stub)):
        stub.answer = Answer(500)  # azure-identity would go on for 24 s
        with pytest.raises(ProviderTimeout, match=r"within 0\.3 s"):
            await make(ManagedIdentityCredential(), timeout=timedelta(seconds=0.3)).fetch()

    assert len(stub.asked) == 2


async def test_our_own_credential_leaves_retries_to_the_manager(make, stub):
    stub.answer = Answer(500)

    await refusal(make())

    assert len(stub.asked) == 1


# Closing, loops and forks


async def test_a_credential_of_its_own_is_closed_and_made_anew(stub):
    stub.lifetime = 3600
    provider = Entra()
    await provider.aclose()

    first = await provider.fetch()
    await provider.aclose()
    await provider.aclose()
    second = await provider.fetch()
    await provider.aclose()

    assert first.password != second.password


async def test_a_credential_that_was_handed_in_stays_open(make):
    credential = Scripted(good())
    provider = make(credential, close_credential=False)

    async with TokenManager(provider) as manager:
        await manager.get()

    assert credential.closed == 0
    assert (await provider.fetch()).password


async def test_a_credential_that_was_handed_over_is_closed_once(make):
    credential = Scripted(good())
    provider = make(credential)

    async with TokenManager(provider) as manager:
        await manager.get()
    await provider.aclose()

    assert credential.closed == 1
    assert "aclose" in str(await refusal(provider))


async def test_one_event_loop_after_another_gets_its_own_credential(stub):
    provider = Entra()

    async def use():
        credential = await provider.fetch()
        await provider.aclose()
        return credential.password

    passwords = [await anyio.to_thread.run_sync(lambda: asyncio.run(use())) for _ in range(2)]
    passwords.append(await use())

    assert passwords == list(stub.issued)


async def test_a_loop_that_is_not_the_credentials_own_does_not_close_it(make, stub):
    provider = make()
    await provider.fetch()

    await anyio.to_thread.run_sync(lambda: asyncio.run(provider.aclose()))

    assert (await provider.fetch()).password


async def test_in_another_event_loop_a_credential_that_was_handed_in_says_what_to_do(make, stub):
    provider = make(DefaultAzureCredential())
    await provider.fetch()

    error = await anyio.to_thread.run_sync(lambda: asyncio.run(refusal(provider)))

    assert not error.retryable
    assert "event loop" in str(error)
    await provider.fetch()


async def test_a_forked_child_makes_its_own_credential(make, stub):
    stub.lifetime = 60
    provider = make()
    await provider.fetch()

    async def work():
        password = (await provider.fetch()).password
        await provider.aclose()
        return password

    password = await in_forked_child(work)

    assert stub.verify("", password) is None
    assert (await provider.fetch()).password != password


# Arguments


@pytest.mark.parametrize("name", ["DefaultAzureCredential", "ManagedIdentityCredential", "AzureCliCredential"])
async def test_a_blocking_credential_is_refused(stub, name):
    credential = getattr(azure.identity, name)()

    with pytest.raises(TypeError, match=rf"{name} would block.*azure\.identity\.aio"):
        Entra(credential)
    credential.close()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"credential": "secret"}, TypeError, r"credential must be one of azure\.identity\.aio"),
        ({"credential": DefaultAzureCredential}, TypeError, "the class DefaultAzureCredential"),
        ({"user": 7}, TypeError, "user must be a str"),
        ({"user": ""}, ValueError, "user is empty"),
        ({"scope": ""}, ValueError, "scope is empty"),
        ({"scope": 7}, TypeError, "scope must be a str"),
        ({"timeout": "7"}, TypeError, "timeout"),
        ({"timeout": 0}, ValueError, "timeout"),
    ],
)
async def test_a_wrong_argument_is_named(arguments, error, says):
    with pytest.raises(error, match=f"Entra: .*{says}"):
        Entra(**arguments)


async def test_it_shows_what_it_is_and_is_not_pickled(make):
    provider = make(Scripted(good()), user="ann")

    assert repr(provider) == f"<Entra Scripted scope='{DATABASE_SCOPE}' user='ann'>"
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(provider)


# The event loop


async def test_the_very_first_fetch_does_not_hold_up_the_event_loop(stub):
    probe = await watch_cold("from asyncpool_creds.providers.azure import Entra", "Entra()")

    assert probe.steps > 0
    assert probe.blocking == []
