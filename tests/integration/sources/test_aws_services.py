"""Secrets of Secrets Manager and passwords of Redshift."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import time
from datetime import UTC, datetime, timedelta

import pytest
from aiobotocore.session import AioSession
from aws_stub import REGION, AwsStub, Refusal, environment, static_key
from botocore import exceptions
from lag_probe import watch, watch_cold
from support import assert_no_secret, secret

from asyncpool_creds import (
    BindableProvider,
    CredentialProvider,
    CredentialRefreshed,
    CredentialRefused,
    ProviderError,
    ProviderTimeout,
    Target,
    TokenManager,
    create_pool,
)
from asyncpool_creds.providers.aws import Redshift, SecretsManager
from asyncpool_creds.testing.door import TokenDoor

pytestmark = pytest.mark.anyio

ARN = "arn:aws:secretsmanager:sa-east-1:123456789012:secret:db-a1b2c3"
CLUSTER = f"sales.abc123.{REGION}.redshift.amazonaws.com"
WORKGROUP = "sales.123456789012.us-west-2.redshift-serverless.amazonaws.com"
ALL = [
    pytest.param(SecretsManager, {"secret": "db"}, id="SecretsManager"),
    pytest.param(Redshift, {"cluster": "sales", "user": "app"}, id="Redshift"),
    pytest.param(Redshift, {"workgroup": "sales"}, id="Redshift Serverless"),
]
PERMISSIONS = {
    "GetSecretValue": "secretsmanager:GetSecretValue, and kms:Decrypt with its key",
    "GetClusterCredentials": "redshift:GetClusterCredentials "
    "(with auto_create also redshift:CreateClusterUser, with groups redshift:JoinGroup)",
    "GetCredentials": "redshift-serverless:GetCredentials",
}
REFUSALS = [
    (400, "AccessDeniedException", "allow {permission} for this identity", False),
    (403, "AccessDenied", "allow {permission} for this identity", False),
    (400, "ResourceNotFoundException", "check the name, the region and the account", False),
    (404, "ClusterNotFound", "check the name, the region and the account", False),
    (400, "UnrecognizedClientException", "check the access key and its secret, the region, and the clock", False),
    (403, "InvalidClientTokenId", "check the access key and its secret, the region, and the clock", False),
    (403, "InvalidSignatureException", "check the access key and its secret, the region, and the clock", False),
    (400, "ExpiredTokenException", "the credentials that sign have expired", True),
    (400, "ThrottlingException", "it is asked again later", True),
    (429, "Whatever", "it is asked again later", True),
    (500, "InternalServiceError", "it is asked again later", True),
    (503, "Whatever", "it is asked again later", True),
    (400, "DecryptionFailure", "correct the arguments, or what they name", False),
    (400, "InvalidRequestException", "correct the arguments, or what they name", False),
    (400, "ValidationException", "correct the arguments, or what they name", False),
    (400, "UnsupportedOperation", "correct the arguments, or what they name", False),
]


@pytest.fixture
async def stub():
    stub = AwsStub(lifetime=900)
    async with stub.running():
        with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
            yield stub


@pytest.fixture
async def make(stub):
    """Make providers that are closed after the test."""
    made = []

    def make(kind, *arguments, **options):
        made.append(kind(*arguments, **{"region": REGION, **options}))
        return made[-1]

    yield make
    for provider in made:
        await provider.aclose()


def put(stub, content, version="v1"):
    text = content if isinstance(content, str) else json.dumps(content)
    stub.secret = {"SecretString": text, "VersionId": version}


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


# What is in a secret


async def test_they_are_providers(make):
    assert isinstance(make(SecretsManager, "db"), CredentialProvider)
    assert not isinstance(make(SecretsManager, "db"), BindableProvider)
    assert isinstance(make(Redshift), BindableProvider)


async def test_user_and_password_of_a_secret_that_rds_manages(stub, make):
    put(stub, {"engine": "postgres", "host": "db", "port": 5432, "username": "app", "password": secret()})

    credential = await make(SecretsManager, "db").fetch()

    assert (credential.user, credential.password) == ("app", secret())
    assert credential.version == "v1"
    assert credential.expires_at is None


async def test_keys_of_your_own(stub, make):
    put(stub, {"PGUSER": "app", "PGPASSWORD": secret()})

    credential = await make(SecretsManager, "db", user_key="PGUSER", password_key="PGPASSWORD").fetch()

    assert (credential.user, credential.password) == ("app", secret())


async def test_a_secret_need_not_name_a_user(stub, make):
    put(stub, {"password": secret()})

    assert (await make(SecretsManager, "db").fetch()).user is None
    assert (await make(SecretsManager, "db", user="app").fetch()).user == "app"


async def test_a_given_user_comes_before_the_one_in_the_secret(stub, make):
    put(stub, {"username": "app", "password": secret()})

    assert (await make(SecretsManager, "db", user="reader").fetch()).user == "reader"


async def test_a_plain_string_is_the_password(stub, make):
    provider = make(SecretsManager, "db", user="app")
    for text in (secret(), "12345", '"quoted"', "{broken", '["list"]'):
        put(stub, text)

        credential = await provider.fetch()

        assert (credential.user, credential.password) == ("app", text)


async def test_a_password_may_look_like_json_if_that_is_said(stub, make):
    text = json.dumps({"password": "no"})
    put(stub, text)

    assert (await make(SecretsManager, "db", password_key=None).fetch()).password == text


async def test_a_secret_may_be_of_no_use(stub, make):
    provider = make(SecretsManager, "db")
    for content, message in (
        ({"username": "app", "pass": secret()}, "it has no string under the key 'password'; pass password_key"),
        ({"username": "app", "password": 12345}, "it has no string under the key 'password'"),
        ({"username": 7, "password": secret()}, "what it has under the key 'username' is no user; pass user_key"),
        ({"username": "", "password": secret()}, "what it has under the key 'username' is no user"),
        ({"password": ""}, "its password is empty"),
        ({"password": f"{secret()}\0"}, "or holds characters that no server accepts"),
        (f"{secret()}\0", "or holds characters that no server accepts"),
    ):
        put(stub, content)

        error = await refusal(provider)

        assert "the secret 'db' is of no use" in str(error)
        assert message in str(error)
        assert error.retryable is False
        assert_no_secret(error)


async def test_a_binary_secret_is_refused(stub, make):
    stub.secret = {"SecretBinary": "AAEC", "VersionId": "v1"}

    error = await refusal(make(SecretsManager, "db"))

    assert "it is binary; store it as a string" in str(error)
    assert error.retryable is False


@pytest.mark.parametrize(("kind", "options"), ALL)
async def test_what_is_no_answer_is_no_secret(stub, make, kind, options):
    provider = make(kind, **options)
    for stub.garbage in ("{}", "[]", "null", "<html>", ""):
        error = await refusal(provider)

        assert "proxy" in str(error)
        assert error.retryable is True


async def test_the_current_version_is_asked_for(stub, make):
    put(stub, secret())

    await make(SecretsManager, "db").fetch()

    (asked,) = stub.asked
    assert asked.parameters == {"SecretId": "db", "VersionStage": "AWSCURRENT"}


async def test_the_region_comes_from_the_arn_unless_it_is_given(stub, make):
    put(stub, secret())

    await make(SecretsManager, ARN, region=None).fetch()
    await make(SecretsManager, ARN, region="eu-north-1").fetch()

    regions = [asked.headers["Authorization"].split("/")[2] for asked in stub.asked]
    assert regions == ["sa-east-1", "eu-north-1"]


# Rotation of a secret


async def test_it_is_looked_at_again_after_five_minutes_or_as_often_as_is_said(stub, make, clock):
    put(stub, secret())

    for provider, seconds in (
        (make(SecretsManager, "db", clock=clock), 300),
        (make(SecretsManager, "db", clock=clock, refresh_every=timedelta(hours=1)), 3600),
    ):
        assert (await provider.fetch()).refresh_at == clock.now() + timedelta(seconds=seconds)


async def test_a_secret_that_is_the_same_is_no_rotation(stub, make, clock, observer):
    put(stub, {"username": "app", "password": secret()})
    provider = make(SecretsManager, "db", clock=clock)
    async with TokenManager(provider, clock=clock, background=False, on_event=observer) as manager:
        for _ in range(3):
            clock.advance(301)
            await manager.get()
            await manager.refresh()

        put(stub, {"username": "app", "password": secret("new")}, "v2")
        await manager.refresh()

        assert manager.stats().rotations == 1
        assert [event.rotated for event in observer.of(CredentialRefreshed)].count(True) == 1


async def test_rotation_is_noticed_at_the_next_look(stub, make, clock, observer):
    put(stub, secret("old"))
    provider = make(SecretsManager, "db", clock=clock)
    async with TokenManager(provider, clock=clock, background=False, on_event=observer) as manager:
        put(stub, secret("new"), "v2")
        clock.advance(299)
        assert (await manager.get()).password == secret("old")

        clock.advance(2)
        await manager.get()
        await observer.seen(CredentialRefreshed, count=2)

        assert (await manager.get()).password == secret("new")


async def test_rotation_is_noticed_when_the_server_refuses_the_old_password(stub, make, server, observer):
    put(stub, {"username": "app", "password": secret("old")})
    good = secret("old")
    async with TokenDoor(server, lambda user, password: None if password == good else "old") as door:
        manager = TokenManager(make(SecretsManager, "db"), on_event=observer)
        async with (
            manager,
            create_pool(
                door.dsn(user="nobody", sslmode="disable"),
                credentials=manager,
                min_size=0,
                max_size=1,
                on_event=observer,
            ) as pool,
        ):
            good = secret("new")
            put(stub, {"username": "app", "password": good}, "v2")

            assert await pool.fetchval("SELECT current_user::text") == "app"

        assert door.refusals == ["old"]
        assert [event.retrying for event in observer.of(CredentialRefused)] == [True]
    assert stub.operations() == ["GetSecretValue"] * 2


# Redshift


async def test_the_user_of_redshift_is_the_one_that_comes_back(stub, make):
    credential = await make(Redshift, "sales", user="app", database="dev").fetch()

    assert credential.user == "IAM:app"
    assert stub.verify_password("IAM:app", credential.password) is None
    assert timedelta(seconds=890) < credential.expires_at - datetime.now(UTC) <= timedelta(seconds=900)
    (asked,) = stub.asked
    assert {name: asked.parameters.get(name) for name in ("ClusterIdentifier", "DbUser", "DbName")} == {
        "ClusterIdentifier": "sales",
        "DbUser": "app",
        "DbName": "dev",
    }
    assert "AutoCreate" not in asked.parameters


async def test_a_user_can_be_created_and_join_groups(stub, make):
    provider = make(Redshift, "sales", user="app", auto_create=True, groups=["etl", "bi"], token_lifetime=3600)

    assert (await provider.fetch()).user == "IAMA:app"

    (asked,) = stub.asked
    assert asked.parameters["AutoCreate"] == "true"
    assert asked.parameters["DurationSeconds"] == "3600"
    assert {"etl", "bi"} <= set(asked.parameters.values())


async def test_a_password_ends_no_later_than_was_asked_for_by_our_own_clock(stub, make):
    stub.lifetime = 3600

    credential = await make(Redshift, "sales", user="app").fetch()

    assert credential.expires_at - datetime.now(UTC) <= timedelta(seconds=900)


async def test_serverless_says_when_it_has_a_new_password(stub, make):
    stub.refresh_in = 300
    provider = make(Redshift, workgroup="sales", database="dev")

    credential = await provider.fetch()

    assert credential.user == "IAMR:role"
    assert stub.verify_password("IAMR:role", credential.password) is None
    assert timedelta(seconds=290) < credential.refresh_at - datetime.now(UTC) <= timedelta(seconds=300)
    assert stub.asked[0].parameters == {"workgroupName": "sales", "dbName": "dev", "durationSeconds": 900}


async def test_a_hint_beyond_the_end_is_none(stub, make):
    stub.refresh_in = 5000

    assert (await make(Redshift, workgroup="sales").fetch()).refresh_at is None


async def test_a_cluster_of_redshift_is_known_by_its_endpoint(stub, make):
    provider = make(Redshift, region=None).bind(Target(CLUSTER, 5439, "app", "dev"))

    assert (await provider.fetch()).user == "IAM:app"

    (asked,) = stub.asked
    assert (asked.parameters["ClusterIdentifier"], asked.parameters["DbName"]) == ("sales", "dev")
    assert f"/{REGION}/redshift/" in asked.headers["Authorization"]
    await provider.aclose()


async def test_a_workgroup_of_redshift_is_known_by_its_endpoint(stub, make):
    provider = make(Redshift, region=None).bind(Target(WORKGROUP, 5439, "app", "dev"))

    assert (await provider.fetch()).user == "IAMR:role"

    (asked,) = stub.asked
    assert asked.parameters == {"workgroupName": "sales", "dbName": "dev", "durationSeconds": 900}
    assert "/us-west-2/redshift-serverless/" in asked.headers["Authorization"]
    await provider.aclose()


async def test_what_is_given_of_redshift_comes_before_the_dsn(stub, make):
    provider = make(Redshift, "other", user="etl", database="prod").bind(Target(CLUSTER, 5439, "app", "dev"))

    assert (await provider.fetch()).user == "IAM:etl"

    (asked,) = stub.asked
    assert (asked.parameters["ClusterIdentifier"], asked.parameters["DbName"]) == ("other", "prod")
    await provider.aclose()


async def test_what_redshift_is_meant_may_not_be_known(make):
    for provider, message in (
        (make(Redshift, user="app"), "neither cluster nor workgroup is known"),
        (make(Redshift).bind(Target("db.example.com", 5439, "app", "dev")), "neither cluster nor workgroup is known"),
        (make(Redshift, "sales"), "not known for which user; pass user"),
    ):
        error = await refusal(provider)

        assert message in str(error)
        assert error.retryable is False


# Troubles


@pytest.mark.parametrize(("kind", "options"), ALL)
async def test_what_aws_refuses_is_told_apart(stub, make, kind, options):
    provider = make(kind, **options)
    for status, code, advice, retryable in REFUSALS:
        stub.refusal = Refusal(status, code, "because")
        stub.asked.clear()

        error = await refusal(provider)

        # One attempt: the manager is the one who tries again.
        (operation,) = stub.operations()
        said = f"AWS refused {operation} (HTTP {status}, {code}: because); "
        assert said + advice.format(permission=PERMISSIONS[operation]) in str(error)
        assert error.retryable is retryable, code
        assert str(error.__cause__).endswith(" in _make_api_call")


async def test_botocore_finds_mistakes_before_aws_does(make):
    error = await refusal(make(Redshift, workgroup="w"))

    assert "Invalid length for parameter workgroupName" in str(error)
    assert error.retryable is False


async def test_patience_that_aws_asks_for_is_passed_on(stub, make):
    stub.refusal = Refusal(429, "ThrottlingException", headers={"Retry-After": "17"})

    assert (await refusal(make(SecretsManager, "db"))).retry_after == 17


@pytest.mark.parametrize(("kind", "options"), ALL[:2])
async def test_keys_that_aws_refuses_are_looked_for_again(stub, make, kind, options):
    put(stub, secret())
    with environment(AWS_ENDPOINT_URL=stub.url) as directory:
        provider = make(kind, **options)

        async def ask_with(key):
            text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret(key)}\n"
            (directory / "credentials").write_text(text, encoding="utf-8")
            await provider.fetch()

        await ask_with("AKIAFIRST")
        await ask_with("AKIASECOND")
        for key, code in (("AKIATHIRD", "ExpiredTokenException"), ("AKIAFOURTH", "InvalidClientTokenId")):
            stub.refusal = Refusal(403, code)
            await refusal(provider)
            await stub.heal()
            await ask_with(key)

    keys = [asked.headers["Authorization"].partition("Credential=")[2].partition("/")[0] for asked in stub.asked]
    # A file is read once, as long as what it said is good.
    assert keys == [*["AKIAFIRST"] * 3, *["AKIATHIRD"] * 2, "AKIAFOURTH"]


async def test_those_who_share_refused_keys_share_others_afterwards(stub, make):
    parent = make(Redshift, "sales")
    both = [parent.bind(Target("one", 5439, user, "dev")) for user in ("app", "etl")]
    await asyncio.gather(*(provider.fetch() for provider in both))
    stub.refusal = Refusal(400, "ExpiredToken")
    errors = await asyncio.gather(*(provider.fetch() for provider in both), return_exceptions=True)
    await stub.heal()

    credentials = await asyncio.gather(*(provider.fetch() for provider in both))

    # Whichever was refused first has closed the client of the other.
    assert [(type(error), error.retryable) for error in errors] == [(ProviderError, True)] * 2
    assert [credential.user for credential in credentials] == ["IAM:app", "IAM:etl"]
    for provider in both:
        await provider.aclose()
    gc.collect()


async def test_aws_may_be_out_of_reach(stub, make):
    with environment(AWS_ENDPOINT_URL="http://127.0.0.1:9", **static_key()):
        error = await refusal(make(SecretsManager, "db"))

    assert "the secret 'db' was not read: AWS cannot be reached" in str(error)
    assert error.retryable is True


async def test_aws_may_not_answer_in_time(stub, make, monkeypatch):
    async def fail(self):
        raise exceptions.ReadTimeoutError(endpoint_url=stub.url)

    monkeypatch.setattr(AioSession, "get_credentials", fail)

    assert isinstance(await refusal(make(SecretsManager, "db")), ProviderTimeout)


async def test_without_credentials_no_client_is_made(stub, make):
    with environment(AWS_ENDPOINT_URL=stub.url):
        provider = make(SecretsManager, "db")
        assert "there are no AWS credentials" in str(await refusal(provider))

    with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
        put(stub, secret())
        assert (await provider.fetch()).password == secret()


async def test_a_secret_without_a_region_says_what_to_do(stub, make):
    error = await refusal(make(SecretsManager, "db", region=None))

    assert "the region is not known" in str(error)
    assert error.retryable is False


async def test_nothing_of_a_secret_is_logged_even_at_debug(stub, make, caplog):
    caplog.set_level("DEBUG")
    put(stub, {"username": "app", "password": secret()})

    await make(SecretsManager, "db").fetch()

    assert caplog.records != []
    assert_no_secret(*caplog.records)


# One client, and no waiting


@pytest.fixture
def made(monkeypatch):
    """Return the clients that were made."""
    made = []
    create_client = AioSession.create_client

    def count(self, service, *arguments, **options):
        made.append(service)
        return create_client(self, service, *arguments, **options)

    monkeypatch.setattr(AioSession, "create_client", count)
    return made


async def test_one_client_is_made_for_life(stub, make, made):
    put(stub, secret())
    provider = make(SecretsManager, "db")

    for _ in range(5):
        await provider.fetch()

    assert made == ["secretsmanager"]


async def test_what_was_bound_shares_a_client_until_the_last_one_closes(stub, make, made):
    parent = make(Redshift, "sales")
    first, second = (parent.bind(Target(host, 5439, "app", "dev")) for host in ("one", "two"))
    await first.fetch()
    await second.fetch()
    await parent.aclose()

    await first.aclose()
    await second.fetch()
    assert made == ["redshift"]

    await second.aclose()
    await second.fetch()
    assert made == ["redshift", "redshift"]
    await second.aclose()


async def test_two_that_start_at_once_share_a_client(stub, make):
    parent = make(Redshift, "sales")
    both = [parent.bind(Target("one", 5439, user, "dev")) for user in ("app", "etl")]

    credentials = await asyncio.gather(*(provider.fetch() for provider in both))

    # A client that was left open would be a ResourceWarning, and so an error.
    assert [credential.user for credential in credentials] == ["IAM:app", "IAM:etl"]
    for provider in both:
        await provider.aclose()
    gc.collect()


@pytest.mark.parametrize(("kind", "options"), ALL)
async def test_not_even_the_first_fetch_holds_up_the_loop(kind, options, stub, make):
    put(stub, secret())

    async def refresh():
        async with TokenManager(make(kind, **options), on_event=[]) as manager:
            await manager.refresh()

    probe = await watch(refresh, attempts=8)

    assert probe.steps > 2
    assert probe.blocking == []


@pytest.mark.parametrize(("kind", "options"), ALL[:2])
async def test_the_very_first_fetch_of_a_process_does_not_hold_up_the_loop(kind, options, stub):
    put(stub, secret())

    name = kind.__name__
    probe = await watch_cold(
        f"from asyncpool_creds.providers.aws import {name}", f"{name}(**{options!r}, region={REGION!r})"
    )

    assert probe.steps > 2
    assert probe.blocking == []


async def longest_turn_of_others(fetch):
    """Return the seconds of processor time, of all threads, for which no other task had a turn."""
    gaps = []

    async def spin():
        # What other processes do does not count.
        before = time.process_time()
        while True:
            await asyncio.sleep(0)
            now = time.process_time()
            gaps.append(now - before)
            before = now

    spinning = asyncio.create_task(spin())
    await fetch()
    spinning.cancel()
    return max(gaps)


async def test_loading_the_models_of_the_sdk_leaves_others_their_turn(stub, make):
    """A thread that parses a megabyte of JSON at once keeps the interpreter for itself for 15 ms."""
    put(stub, secret())

    assert min([await longest_turn_of_others(make(SecretsManager, "db").fetch) for _ in range(3)]) < 0.010


async def test_a_fetch_that_is_cancelled_while_a_client_is_made_leaves_nothing_open(stub, make, monkeypatch):
    put(stub, secret())
    loop, making, create_client = asyncio.get_running_loop(), asyncio.Event(), AioSession.create_client

    def tell(self, *arguments, **options):
        loop.call_soon_threadsafe(making.set)
        return create_client(self, *arguments, **options)

    monkeypatch.setattr(AioSession, "create_client", tell)
    provider = make(SecretsManager, "db")
    fetch = asyncio.create_task(provider.fetch())
    await making.wait()

    fetch.cancel()
    await asyncio.wait([fetch])

    assert fetch.cancelled()
    assert (await provider.fetch()).password == secret()
    # What was left open would be a ResourceWarning, and so an error.
    gc.collect()


def test_it_works_in_one_event_loop_after_the_other():
    async def run(provider):
        stub = AwsStub()
        async with stub.running():
            put(stub, secret())
            with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
                credential = await provider.fetch()
                await provider.aclose()
        return credential.password

    provider = SecretsManager("db", region=REGION)

    assert [asyncio.run(run(provider)) for _ in range(2)] == [secret()] * 2


async def test_closing_in_another_loop_is_no_error(stub, make):
    put(stub, secret())
    provider = make(SecretsManager, "db")
    await provider.fetch()

    await asyncio.to_thread(asyncio.run, provider.aclose())

    assert (await provider.fetch()).password == secret()


# Arguments


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: SecretsManager(None), TypeError, "SecretsManager: secret must be a str, not None"),
        (lambda: SecretsManager(""), ValueError, "SecretsManager: secret is empty"),
        (lambda: SecretsManager("db", user_key=None), TypeError, "SecretsManager: user_key must be a str, not None"),
        (lambda: SecretsManager("db", password_key=1), TypeError, "password_key must be a str, not int"),
        (lambda: SecretsManager("db", user=""), ValueError, "SecretsManager: user is empty"),
        (lambda: SecretsManager("db", refresh_every=0), ValueError, "refresh_every must be more than zero"),
        (lambda: SecretsManager("db", refresh_every="1"), TypeError, "refresh_every must be a number of seconds"),
        (lambda: Redshift(7), TypeError, "Redshift: cluster must be a str, not int"),
        (lambda: Redshift("a", workgroup="b"), ValueError, "pass either cluster or workgroup"),
        (lambda: Redshift(workgroup="b", auto_create=True), ValueError, "are for provisioned clusters"),
        (lambda: Redshift(workgroup="b", groups=["g"]), ValueError, "are for provisioned clusters"),
        (lambda: Redshift("a", groups="etl"), TypeError, "groups must be a sequence of names"),
        (lambda: Redshift("a", groups=[""]), TypeError, "groups must be a sequence of names"),
        (lambda: Redshift("a", token_lifetime=899), ValueError, "between 900 and 3600 seconds, not 899"),
        (lambda: Redshift("a", token_lifetime=timedelta(hours=2)), ValueError, "between 900 and 3600 seconds"),
    ],
)
def test_arguments_are_checked(make, kind, message):
    with pytest.raises(kind) as caught:
        make()

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        (SecretsManager(ARN), f"<SecretsManager '{ARN}' region='sa-east-1'>"),
        (Redshift("sales", user="app"), "<Redshift cluster='sales' user='app' region=None>"),
        (Redshift(workgroup="sales"), "<Redshift workgroup='sales' user=None region=None>"),
    ],
    ids=["SecretsManager", "Redshift", "Redshift Serverless"],
)
def test_they_say_what_they_are_and_cannot_be_pickled(provider, text):
    assert repr(provider) == text
    with pytest.raises(TypeError, match="belongs to its process and cannot be pickled"):
        pickle.dumps(provider)
