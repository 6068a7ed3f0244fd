"""CloudSQLIAM: the real google-auth against a metadata server and token endpoints on loopback."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from datetime import UTC, datetime, timedelta

import anyio.to_thread
import google.auth.credentials
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from google.auth import identity_pool, impersonated_credentials
from google.oauth2 import credentials as user_credentials
from google.oauth2 import service_account
from lag_probe import watch_cold
from metadata_stubs import (
    EMAIL,
    Answer,
    MetadataStub,
    compute_engine,
    google_environment,
    key_of_service_account,
    private_key,
)
from processes import in_forked_child
from support import assert_no_secret, secret

import asyncpool_creds
from asyncpool_creds import CredentialRefreshed, ProviderError, ProviderTimeout, TokenManager
from asyncpool_creds.providers.gcp import LOGIN_SCOPE, CloudSQLIAM
from asyncpool_creds.testing.door import TokenDoor

pytestmark = pytest.mark.anyio

KEPT = timedelta(minutes=3, seconds=45)


@pytest.fixture
def stub():
    """The metadata server of this machine, and every token endpoint."""
    with MetadataStub(lifetime=3600) as stub, google_environment(stub):
        yield stub


def account(stub, **options):
    return service_account.Credentials.from_service_account_info(key_of_service_account(stub), **options)


def impersonated(stub, target="other@project.iam.gserviceaccount.com"):
    return impersonated_credentials.Credentials(
        account(stub),
        target,
        ["https://www.googleapis.com/auth/cloud-platform"],
        iam_endpoint_override=f"{stub.url}/v1/projects/-/serviceAccounts/{target}:generateAccessToken",
    )


def person(token_uri, **options):
    return user_credentials.Credentials(
        None,
        refresh_token=secret("refresh"),
        token_uri=token_uri,
        client_id="client",
        client_secret=secret("client"),
        **options,
    )


class Fixed(google.auth.credentials.Credentials):
    """Credentials as somebody else might write them."""

    def __init__(self, token, expiry=None, email=None):
        super().__init__()
        self._fixed = token, expiry
        self.service_account_email = email

    def refresh(self, request):
        self.token, self.expiry = self._fixed


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


# Credentials of every kind


async def test_without_credentials_the_default_ones_are_found(stub):
    credential = await CloudSQLIAM().fetch()

    assert stub.verify("", credential.password) is None
    assert credential.user == "app@project.iam"
    (asked,) = stub.asked
    assert asked.path.startswith("/computeMetadata/v1/instance/service-accounts/")
    assert asked.parameters == {"scopes": LOGIN_SCOPE}


async def test_the_default_credentials_are_looked_for_once(stub):
    provider = CloudSQLIAM()
    await provider.fetch()
    pings = len(stub.pings)

    await provider.fetch()

    assert stub.pings[pings:] == [f"/computeMetadata/v1/instance/service-accounts/{EMAIL}/"]
    assert len(stub.asked) == 2


async def test_a_key_file(stub, tmp_path):
    (tmp_path / "key.json").write_text(json.dumps(key_of_service_account(stub)))
    with google_environment(stub, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "key.json")):
        credential = await CloudSQLIAM().fetch()

    assert credential.user == "app@project.iam"
    assert credential.password in stub.issued
    public_key = serialization.load_pem_private_key(private_key().encode(), None).public_key()
    (asked,) = stub.asked
    claims = jwt.decode(asked.parameters["assertion"], public_key, ["RS256"], options={"verify_aud": False})
    assert claims["scope"] == LOGIN_SCOPE
    assert claims["iss"] == EMAIL


@pytest.mark.parametrize("whose", ["account's", "person's", "somebody else's"])
async def test_credentials_that_are_handed_in_stay_as_they_are(stub, whose):
    scopes = ["https://www.googleapis.com/auth/cloud-platform"]
    make = {
        "account's": lambda: account(stub, scopes=scopes),
        "person's": lambda: person(f"{stub.url}/token", scopes=scopes),
        "somebody else's": lambda: Fixed(secret()),
    }
    credentials = make[whose]()

    await CloudSQLIAM(credentials).fetch()

    assert credentials.token is None
    assert getattr(credentials, "scopes", scopes) == scopes


async def test_an_impersonated_account(stub):
    credential = await CloudSQLIAM(impersonated(stub)).fetch()

    assert credential.user == "other@project.iam"
    assert credential.expires_at <= datetime.fromtimestamp(stub.issued[credential.password], UTC)
    assert [asked.path.rpartition("/")[2] for asked in stub.asked] == [
        "token",
        "other@project.iam.gserviceaccount.com:generateAccessToken",
    ]
    assert stub.asked[1].parameters["scope"] == [LOGIN_SCOPE]


async def test_a_refresh_token_that_is_good_once_is_followed_by_its_successor(stub):
    provider = CloudSQLIAM(person(f"{stub.url}/token"))
    stub.members["refresh_token"] = secret("successor")

    await provider.fetch()
    await provider.fetch()

    assert [asked.parameters["refresh_token"] for asked in stub.asked] == [secret("refresh"), secret("successor")]


async def test_a_persons_login(stub):
    provider = CloudSQLIAM(person(f"{stub.url}/token", scopes=["email"], account="Ann@Example.com"))

    credential = await provider.fetch()

    assert credential.user == "ann@example.com"
    (asked,) = stub.asked
    assert asked.parameters["grant_type"] == "refresh_token"
    assert asked.parameters["scope"] == LOGIN_SCOPE


async def test_a_workload_identity(stub, tmp_path):
    (tmp_path / "subject").write_text(secret("subject"))
    workload = identity_pool.Credentials(
        audience="//iam.googleapis.com/pool",
        subject_token_type="urn:ietf:params:oauth:token-type:jwt",
        token_url=f"{stub.url}/sts",
        credential_source={"file": str(tmp_path / "subject")},
    )

    credential = await CloudSQLIAM(workload).fetch()

    assert credential.user is None
    assert stub.asked[0].parameters["scope"] == LOGIN_SCOPE
    assert stub.asked[0].parameters["subject_token"] == secret("subject")


async def test_alloydb_has_another_scope(stub):
    await CloudSQLIAM(scope="https://www.googleapis.com/auth/alloydb.login").fetch()

    assert stub.asked[0].parameters == {"scopes": "https://www.googleapis.com/auth/alloydb.login"}


# Times


async def test_the_naive_expiry_of_google_auth_is_utc(stub, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        before = datetime.now(UTC)
        credential = await CloudSQLIAM(account(stub)).fetch()
    finally:
        monkeypatch.undo()
        time.tzset()

    assert credential.expires_at.tzinfo is UTC
    assert abs(credential.expires_at - before - timedelta(hours=1)) < timedelta(seconds=5)


async def test_the_life_of_a_token_is_counted_from_the_start_of_the_request(stub):
    class Stopped:
        def time(self):
            return 1_800_000_000.0

        monotonic = time

    credential = await CloudSQLIAM(account(stub), clock=Stopped()).fetch()

    assert 3597 < credential.expires_at.timestamp() - 1_800_000_000 <= 3600


async def test_a_token_without_an_end(stub):
    credential = await CloudSQLIAM(Fixed(secret())).fetch()

    assert credential.expires_at is None
    assert credential.user is None


async def test_a_metadata_server_is_not_asked_before_it_has_a_new_token(stub):
    stub.keeps_until = 240
    events = []
    async with TokenManager(CloudSQLIAM(), refresh_threshold=1800, on_event=events.append) as manager:
        credential = await manager.get()

    assert credential.refresh_at == credential.expires_at - KEPT
    (refreshed,) = [event for event in events if isinstance(event, CredentialRefreshed)]
    assert refreshed.refresh_at >= credential.expires_at - KEPT


async def test_what_a_metadata_server_has_kept_is_no_new_token(stub):
    stub.keeps_until = 240
    provider = CloudSQLIAM()

    first, second = await provider.fetch(), await provider.fetch()

    assert first.is_same_secret(second)
    assert abs(first.expires_at - second.expires_at) < timedelta(seconds=2)


async def test_a_short_token_of_a_metadata_server_has_no_such_time(stub):
    stub.lifetime = 200

    assert (await CloudSQLIAM().fetch()).refresh_at is None


async def test_a_token_endpoint_has_a_new_token_at_any_time(stub):
    provider = CloudSQLIAM(account(stub))

    first, second = await provider.fetch(), await provider.fetch()

    assert first.refresh_at is None
    assert first.password != second.password


# The user


@pytest.mark.parametrize(
    ("email", "user"),
    [
        ("app@project.iam.gserviceaccount.com", "app@project.iam"),
        ("app@project.example.com.iam.gserviceaccount.com", "app@project.example.com.iam"),
        ("123-compute@developer.gserviceaccount.com", "123-compute@developer"),
        ("Ann.Smith@Example.com", "ann.smith@example.com"),
        ("default", None),
        ("", None),
        (None, None),
    ],
)
async def test_the_user_follows_from_the_address(email, user):
    assert (await CloudSQLIAM(Fixed(secret(), email=email)).fetch()).user == user


async def test_the_user_that_was_given_comes_first(stub):
    assert (await CloudSQLIAM(user="readers@example.com").fetch()).user == "readers@example.com"


# What can go wrong

INVALID_GRANT = '{"error": "invalid_grant", "error_description": "Invalid JWT Signature."}'
FORBIDDEN = '{"error": {"code": 403, "status": "PERMISSION_DENIED", "message": "denied"}}'


@pytest.mark.parametrize("source", ["metadata", "key", "impersonation"])
@pytest.mark.parametrize(
    ("answer", "retryable", "retry_after", "says"),
    [
        (Answer(500), True, None, "127.0.0.1 is in trouble (HTTP 500)"),
        (Answer(503, headers={"Retry-After": "7"}), True, 7, "HTTP 503"),
        (Answer(429, headers={"Retry-After": "9"}), True, 9, "HTTP 429"),
        (Answer(400, INVALID_GRANT), False, None, "127.0.0.1 refused (HTTP 400"),
        (Answer(403, FORBIDDEN), False, None, "127.0.0.1 refused (HTTP 403"),
        (Answer(404), False, None, "this host has no service account"),
        (Answer(0), True, None, "127.0.0.1 cannot be reached (ConnectionError)"),
    ],
)
async def test_what_the_source_answers_decides(stub, source, answer, retryable, retry_after, says):
    make = {"metadata": lambda: None, "key": lambda: account(stub), "impersonation": lambda: impersonated(stub)}
    provider = CloudSQLIAM(make[source]())
    stub.answer = answer

    error = await refusal(provider)

    assert error.retryable is retryable
    assert says in str(error)
    assert error.retry_after == retry_after
    assert error.__cause__ is not None


async def test_a_key_that_is_refused_says_why(stub):
    stub.answer = Answer(400, INVALID_GRANT)

    assert "invalid_grant); the key is deleted" in str(await refusal(CloudSQLIAM(account(stub))))


async def test_an_impersonation_that_is_refused_says_what_is_missing(stub):
    provider = CloudSQLIAM(impersonated(stub))
    stub.answer = Answer(403, FORBIDDEN)

    # The account itself is refused first; the words are the same.
    assert "PERMISSION_DENIED); to impersonate" in str(await refusal(provider))


async def test_trouble_that_google_calls_temporary_is_asked_again(stub, monkeypatch):
    monkeypatch.setattr("google.auth._exponential_backoff.time.sleep", lambda _: None)
    stub.answer = Answer(400, '{"error": "temporarily_unavailable"}')

    assert (await refusal(CloudSQLIAM(account(stub)))).retryable


@pytest.mark.parametrize("source", ["metadata", "key"])
@pytest.mark.parametrize("body", ["<html>", "[]", '{"access_token": 7}', f'{{"access_token": "{secret()}"'])
async def test_garbage_may_pass(stub, source, body):
    provider = CloudSQLIAM(account(stub) if source == "key" else None)
    stub.answer = Answer(200, body)

    error = await refusal(provider)

    assert error.retryable
    assert "127.0.0.1" in str(error)


async def test_a_login_that_does_not_include_the_scope_says_what_to_do(stub):
    stub.answer = Answer(400, '{"error": "invalid_scope", "error_description": "Bad Request"}')

    error = await refusal(CloudSQLIAM(person(f"{stub.url}/token")))

    assert not error.retryable
    assert "invalid_scope); the login does not include this scope" in str(error)


async def test_credentials_that_lack_something_are_an_error_for_good():
    error = await refusal(CloudSQLIAM(user_credentials.Credentials("token")))

    assert not error.retryable
    assert "google-auth gave no token (RefreshError)" in str(error)


@pytest.mark.parametrize("content", [None, "{}", "no JSON", '{"type": "service_account"}'])
async def test_a_file_that_is_missing_or_wrong_says_what_to_do(stub, tmp_path, content):
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    with google_environment(stub, GOOGLE_APPLICATION_CREDENTIALS=str(file)):
        error = await refusal(CloudSQLIAM())

    assert not error.retryable
    assert "gcloud auth application-default login" in str(error)
    assert "google.auth.exceptions.DefaultCredentialsError" in str(error.__cause__)
    assert "key.json" in str(error.__cause__) or "token_uri" in str(error.__cause__) or "type" in str(error.__cause__)


async def test_where_there_is_no_metadata_server_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("google.auth._exponential_backoff.time.sleep", lambda _: None)
    with google_environment(GCE_METADATA_IP="127.0.0.1:9"):
        error = await refusal(CloudSQLIAM())

    assert not error.retryable
    assert "attach a service account" in str(error)


async def test_after_a_refusal_for_good_the_default_credentials_are_looked_for_anew(stub, tmp_path):
    file = tmp_path / "key.json"
    file.write_text(json.dumps(key_of_service_account(stub, client_email="old@project.iam.gserviceaccount.com")))
    with google_environment(stub, GOOGLE_APPLICATION_CREDENTIALS=str(file)):
        provider = CloudSQLIAM()
        await provider.fetch()
        file.write_text(json.dumps(key_of_service_account(stub)))
        stub.answer = Answer(400, INVALID_GRANT)
        await refusal(provider)
        stub.answer = None

        assert (await provider.fetch()).user == "app@project.iam"


async def test_no_exception_knows_the_request_with_the_secret():
    provider = CloudSQLIAM(person("http://127.0.0.1:9/token"))

    error = await refusal(provider)

    assert error.retryable
    assert "google.auth.exceptions.TransportError" in str(error.__cause__)
    assert_no_secret(error)


async def test_a_token_that_no_server_accepts_is_an_error():
    error = await refusal(CloudSQLIAM(Fixed("a\0b")))

    assert "characters" in str(error)


# Time limits and cancellation


async def test_a_token_takes_no_longer_than_its_limit(stub):
    stub.hang()
    provider = CloudSQLIAM(account(stub), timeout=timedelta(seconds=0.2))

    with pytest.raises(ProviderTimeout, match=r"no token|does not answer"):
        await provider.fetch()
    stub.heal()
    await provider.fetch()


async def test_a_server_that_does_not_answer_is_left_when_google_auth_would_go_on(stub):
    stub.hang()

    with pytest.raises(ProviderTimeout, match=r"no token within|does not answer"):
        await CloudSQLIAM(timeout=0.2).fetch()


async def test_a_cancelled_fetch_does_not_wait_for_its_thread(stub):
    stub.hang()
    provider = CloudSQLIAM(account(stub))
    fetch = asyncio.create_task(provider.fetch())
    await stub.reached()

    fetch.cancel()
    await asyncio.wait([fetch], timeout=1)

    assert fetch.cancelled()


async def test_a_cancelled_fetch_makes_no_further_request(stub):
    stub.hang()
    provider = CloudSQLIAM()
    fetch = asyncio.create_task(provider.fetch())
    await stub.reached()

    fetch.cancel()
    await asyncio.wait([fetch])
    stub.heal()
    await provider.fetch()

    assert len(stub.asked) == 1


async def test_no_more_than_three_threads_hang(stub):
    stub.hang()
    provider = CloudSQLIAM(account(stub))
    for _ in range(3):
        fetch = asyncio.create_task(provider.fetch())
        await stub.reached()
        stub.hang()
        fetch.cancel()
        await asyncio.wait([fetch])

    with pytest.raises(ProviderTimeout, match="3 requests still hang"):
        await provider.fetch()

    stub.heal()
    while True:
        try:
            await provider.fetch()
        except ProviderTimeout:
            await asyncio.sleep(0.01)
        else:
            break
    assert len(stub.asked) == 4


# Loops and forks


async def test_one_event_loop_after_another(stub):
    provider = CloudSQLIAM()
    await provider.fetch()

    credential = await anyio.to_thread.run_sync(lambda: asyncio.run(provider.fetch()))

    assert credential.password in stub.issued
    await provider.fetch()


async def test_a_forked_child_asks_for_itself(stub):
    provider = CloudSQLIAM(account(stub))
    await provider.fetch()

    async def work():
        return (await provider.fetch()).password

    password = await in_forked_child(work)

    assert stub.verify("", password) is None


# With a pool


async def test_a_pool_survives_that_its_token_is_revoked(server, stub):
    def verify(user, token):
        revoked = len(stub.issued) == 1 and door.accepted >= 1
        return "revoked" if revoked else stub.verify(user, token)

    async with TokenDoor(server, verify) as door:
        credentials = CloudSQLIAM(account(stub), user="app")
        pool = asyncpool_creds.create_pool(door.dsn(), credentials=credentials, min_size=1)
        async with pool, pool.acquire(), pool.acquire() as second:
            assert await second.fetchval("SELECT current_user::text") == "app"

    assert len(stub.issued) == 2


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"credentials": "secret"}, TypeError, r"credentials must be of google-auth, .* not str"),
        ({"credentials": service_account.Credentials}, TypeError, "credentials must be"),
        ({"user": 7}, TypeError, "user must be a str"),
        ({"user": ""}, ValueError, "user is empty"),
        ({"scope": ""}, ValueError, "scope is empty"),
        ({"timeout": "7"}, TypeError, "timeout"),
        ({"timeout": -1}, ValueError, "timeout"),
    ],
)
async def test_a_wrong_argument_is_named(arguments, error, says):
    with pytest.raises(error, match=f"CloudSQLIAM: .*{says}"):
        CloudSQLIAM(**arguments)


async def test_it_shows_what_it_is_and_is_not_pickled(stub):
    provider = CloudSQLIAM(account(stub), user="ann")

    assert repr(provider) == f"<CloudSQLIAM google.oauth2.service_account credentials scope='{LOGIN_SCOPE}' user='ann'>"
    assert "default credentials" in repr(CloudSQLIAM())
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(provider)


# The event loop


async def test_the_very_first_fetch_does_not_hold_up_the_event_loop(stub):
    probe = await watch_cold(
        "from asyncpool_creds.providers.gcp import CloudSQLIAM", "CloudSQLIAM()", compute_engine(stub)
    )

    assert probe.steps > 0
    assert probe.blocking == []
