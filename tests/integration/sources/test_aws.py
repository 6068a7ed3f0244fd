"""Tokens for RDS and Aurora DSQL, with every kind of credentials that botocore finds, checked as the server does."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import re
import sys
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from aiobotocore.session import AioSession
from aws_stub import REGION, AwsStub, Refusal, environment, static_key, web_identity
from botocore import exceptions
from lag_probe import watch, watch_cold
from processes import fork
from support import assert_no_secret, secret

from asyncpool_creds import (
    BindableProvider,
    CredentialProvider,
    ProviderError,
    ProviderTimeout,
    Target,
    TokenManager,
    create_pool,
)
from asyncpool_creds._tracebacks import ForeignError
from asyncpool_creds.providers.aws import RDSIAM, AuroraDSQL
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.sigv4 import SigV4Verifier

pytestmark = pytest.mark.anyio

HOST = f"db.abc123.{REGION}.rds.amazonaws.com"
CLUSTER = f"abc123.dsql.{REGION}.on.aws"


@pytest.fixture
def verifier():
    return SigV4Verifier(region=REGION, host=HOST, port=5432)


@pytest.fixture
async def stub(verifier):
    stub = AwsStub(verifier, lifetime=3600)
    async with stub.running():
        yield stub


@pytest.fixture
def key(verifier):
    """Sign with a long-lived key that the verifier knows."""
    with environment(**static_key(verifier)) as directory:
        yield directory


def rds():
    return RDSIAM(HOST, user="app")


def left(credential):
    return credential.expires_at - datetime.now(UTC)


def is_about(seconds, credential):
    # A signature is made in whole seconds.
    return timedelta(seconds=seconds - 3) < left(credential) <= timedelta(seconds=seconds)


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


# For whom a token is


async def test_they_are_providers_that_can_be_bound(key):
    for provider in (RDSIAM(), AuroraDSQL()):
        assert isinstance(provider, CredentialProvider)
        assert isinstance(provider, BindableProvider)


async def test_host_port_and_user_come_from_the_dsn(key, verifier):
    verifier.port = 6432

    credential = await RDSIAM().bind(Target(HOST, 6432, "app", "db")).fetch()

    assert credential.user == "app"
    assert verifier.verify("app", credential.password) is None


async def test_what_is_given_comes_before_the_dsn(key, verifier):
    through_a_tunnel = Target("127.0.0.1", 15432, "me", "db")

    credential = await RDSIAM(HOST, 5432, "app").bind(through_a_tunnel).fetch()

    assert credential.user == "app"
    assert verifier.verify("app", credential.password) is None


async def test_nothing_needs_to_be_bound_where_host_and_user_are_given(key, verifier):
    assert verifier.verify("app", (await rds().fetch()).password) is None


async def test_what_names_neither_host_nor_user_says_what_to_do(key):
    for provider, missing in ((RDSIAM(user="app"), "host"), (RDSIAM(HOST), "user"), (AuroraDSQL(CLUSTER), "user")):
        error = await refusal(provider)

        assert f"not known for which {missing}" in str(error)
        assert error.retryable is False


async def test_a_socket_has_no_name_that_a_token_could_carry(key, verifier):
    target = Target("/var/run/postgresql", 5432, "app", "db")

    with pytest.raises(ValueError, match="is a Unix socket; pass host"):
        RDSIAM().bind(target)

    assert verifier.verify("app", (await RDSIAM(HOST).bind(target).fetch()).password) is None


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("db.abc123.us-east-1.rds.amazonaws.com", "us-east-1"),
        ("db.abc123.us-east-1.rds.amazonaws.com.", "us-east-1"),
        ("DB.abc123.US-EAST-1.RDS.amazonaws.com", "us-east-1"),
        ("aurora.cluster-abc123.ap-southeast-2.rds.amazonaws.com", "ap-southeast-2"),
        ("aurora.cluster-ro-abc123.ap-southeast-2.rds.amazonaws.com", "ap-southeast-2"),
        ("mine.cluster-custom-abc123.ap-southeast-2.rds.amazonaws.com", "ap-southeast-2"),
        ("pool.proxy-abc123.il-central-1.rds.amazonaws.com", "il-central-1"),
        ("reader.endpoint.proxy-abc123.il-central-1.rds.amazonaws.com", "il-central-1"),
        ("db.abc123.cn-north-1.rds.amazonaws.com.cn", "cn-north-1"),
        ("db.abc123.rds.cn-northwest-1.amazonaws.com.cn", "cn-northwest-1"),
        ("db.abc123.rds.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("db.abc123.us-gov-east-1.rds.amazonaws.com", "us-gov-east-1"),
        ("db.abc123.rds.us-iso-east-1.c2s.ic.gov", "us-iso-east-1"),
        ("db.abc123.eusc-de-east-1.rds.amazonaws.eu", "eusc-de-east-1"),
    ],
)
async def test_the_region_comes_from_the_name_of_an_rds_host(key, verifier, host, region):
    verifier.host, verifier.region = host.removesuffix("."), region

    assert verifier.verify("app", (await RDSIAM(host, user="app").fetch()).password) is None


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("abc123.dsql.us-west-2.on.aws", "us-west-2"),
        ("abc123.dsql-fnh4.us-west-2.on.aws", "us-west-2"),
    ],
)
async def test_the_region_comes_from_the_name_of_a_dsql_host(key, verifier, host, region):
    verifier.service, verifier.host, verifier.region = "dsql", host, region

    assert verifier.verify("app", (await AuroraDSQL(host, "app").fetch()).password) is None


@pytest.mark.parametrize(
    "host", ["db.example.com", "us-east-1.rds.amazonaws.com.example.com", "db.us-east-1.redshift.amazonaws.com"]
)
async def test_a_name_of_your_own_tells_no_region(key, host):
    error = await refusal(RDSIAM(host, user="app"))

    assert f"no token for {host}:5432: the region is not known" in str(error)
    assert "pass region" in str(error)
    assert error.retryable is False


async def test_a_name_of_your_own_needs_a_region_given_or_configured(key, verifier):
    verifier.host = "db.example.com"
    given = await RDSIAM("db.example.com", user="app", region=REGION).fetch()
    (key / "config").write_text(f"[default]\nregion = {REGION}\n", encoding="utf-8")

    configured = await RDSIAM("db.example.com", user="app").fetch()

    assert verifier.verify("app", given.password) is None
    assert verifier.verify("app", configured.password) is None


async def test_the_given_region_comes_before_the_name_and_the_name_before_the_configuration(key, verifier):
    (key / "config").write_text("[default]\nregion = sa-east-1\n", encoding="utf-8")
    named = await rds().fetch()
    assert verifier.verify("app", named.password) is None

    verifier.region = "af-south-1"

    assert verifier.verify("app", (await RDSIAM(HOST, user="app", region="af-south-1").fetch()).password) is None


async def test_several_hosts_in_a_dsn_get_a_token_each(server):
    verifiers = [SigV4Verifier(region=REGION, host="127.0.0.1") for _ in range(2)]
    with environment(**static_key(*verifiers)):
        async with TokenDoor(server, verifiers[0].verify) as first, TokenDoor(server, verifiers[1].verify) as second:
            verifiers[0].port, verifiers[1].port = first.port, second.port
            hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
            # Neither is one, so both are logged in to.
            dsn = f"postgresql://app@{hosts}/postgres?sslmode=disable&target_session_attrs=prefer-standby"
            async with create_pool(dsn, credentials=RDSIAM(region=REGION), min_size=1, max_size=1) as pool:
                assert await pool.fetchval("SELECT 1") == 1

            assert (first.refusals, second.refusals) == ([], [])
            assert min(first.accepted, second.accepted) >= 1


# When a token ends


async def test_a_token_is_good_for_a_quarter_of_an_hour(key):
    assert is_about(900, await rds().fetch())
    assert is_about(900, await AuroraDSQL(CLUSTER, "app").fetch())


async def test_a_token_ends_with_the_credentials_that_signed_it(stub, verifier):
    stub.lifetime = 120
    with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
        credential = await rds().fetch()

    assert is_about(120, credential)
    assert verifier.verify("app", credential.password) is None


async def test_credentials_with_less_than_a_token_left_are_renewed_before_they_sign(stub):
    stub.lifetimes = [840]
    with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
        credential = await rds().fetch()

    assert stub.operations() == ["Container", "Container"]
    assert is_about(900, credential)


async def test_a_source_that_is_down_does_not_matter_while_its_credentials_have_ten_minutes_left(stub):
    stub.lifetime = 840
    with web_identity(stub):
        provider = rds()
        await provider.fetch()
        await stub.fail()

        assert is_about(840, await provider.fetch())


async def test_credentials_of_the_environment_that_say_when_they_end_are_believed(verifier):
    ends = datetime.now(UTC) + timedelta(minutes=12)
    verifier.add_key("ASIAEXAMPLE", secret("key"), session_token=secret("session"), expires_at=ends)
    variables = {
        "AWS_ACCESS_KEY_ID": "ASIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": secret("key"),
        "AWS_SESSION_TOKEN": secret("session"),
        "AWS_CREDENTIAL_EXPIRATION": ends.isoformat(),
    }
    with environment(**variables):
        credential = await rds().fetch()

    assert credential.expires_at == ends
    assert verifier.verify("app", credential.password) is None


async def test_credentials_that_have_expired_and_are_not_renewed_make_no_token():
    variables = {
        "AWS_ACCESS_KEY_ID": "ASIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": secret("key"),
        "AWS_SESSION_TOKEN": secret("session"),
        "AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z",
    }
    with environment(**variables):
        error = await refusal(rds())

    assert "refreshed credentials are still expired" in str(error)
    assert error.retryable is True


async def test_what_an_instance_says_of_the_end_of_its_credentials_is_doubted_when_botocore_makes_it_up(stub):
    variables = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": stub.url, "AWS_EC2_METADATA_DISABLED": "false"}
    with environment(**variables):
        stub.lifetime = 6 * 3600
        assert is_about(900, await rds().fetch())

        # botocore says that these end in 17 to 25 minutes.
        stub.lifetime = 360
        assert is_about(300, await rds().fetch())


async def test_a_pool_outlives_tokens_that_are_never_asked_for_twice(server, clock, observer, monkeypatch):
    """A connector in another language kept the first token for ever, and failed after a quarter of an hour."""
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: clock.now().replace(tzinfo=None))
    verifier = SigV4Verifier(region=REGION, host="127.0.0.1", clock=clock)
    with environment(**static_key(verifier)):
        async with TokenDoor(server, verifier.verify) as door:
            verifier.port = door.port
            provider = RDSIAM("127.0.0.1", door.port, "app", region=REGION, clock=clock)
            async with TokenManager(provider, clock=clock, on_event=observer) as manager:
                dsn = door.dsn(sslmode="disable")
                async with create_pool(dsn, credentials=manager, min_size=1, max_size=1, on_event=observer) as pool:
                    for _ in range(3):
                        clock.advance(901)

                        assert await pool.fetchval("SELECT 1") == 1

            assert door.accepted == 4
            assert door.refusals == []


# Aurora DSQL


async def test_a_token_is_for_the_administrator_or_for_the_others(key, verifier):
    verifier.service, verifier.host = "dsql", CLUSTER
    provider = AuroraDSQL()

    admin = await provider.bind(Target(CLUSTER, 5432, "admin", "postgres")).fetch()
    other = await provider.bind(Target(CLUSTER, 5432, "app", "postgres")).fetch()

    assert (admin.user, other.user) == ("admin", "app")
    assert verifier.verify("admin", admin.password) is None
    assert verifier.verify("app", other.password) is None
    assert verifier.verify("admin", other.password) is not None
    assert verifier.verify("app", admin.password) is not None


async def test_which_of_the_two_can_be_said(key, verifier):
    verifier.service, verifier.host = "dsql", CLUSTER

    admin = await AuroraDSQL(CLUSTER, "app", admin=True).fetch()
    other = await AuroraDSQL(CLUSTER, "admin", admin=False).fetch()

    assert verifier.verify("admin", admin.password) is None
    assert verifier.verify("app", other.password) is None


async def test_the_life_of_a_dsql_token_can_be_chosen(key, verifier):
    verifier.service, verifier.host = "dsql", CLUSTER
    provider = AuroraDSQL(token_lifetime=timedelta(hours=12)).bind(Target(CLUSTER, 5432, "app", "postgres"))

    credential = await provider.fetch()

    assert is_about(12 * 3600, credential)
    assert verifier.verify("app", credential.password) is None


async def test_a_long_dsql_token_ends_with_the_credentials_that_signed_it(stub):
    with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
        credential = await AuroraDSQL(CLUSTER, "app", token_lifetime=86400).fetch()

    assert is_about(3600, credential)


async def test_a_pool_replaces_connections_before_dsql_ends_their_sessions_after_an_hour(server, clock, observer):
    verifier = SigV4Verifier("dsql")
    with environment(**static_key(verifier)):
        async with TokenDoor(server, verifier.verify) as door:
            provider = AuroraDSQL("127.0.0.1", "app", region=REGION, token_lifetime=86400, clock=clock)
            async with TokenManager(provider, clock=clock, on_event=observer) as manager:
                dsn = door.dsn(sslmode="disable")
                async with create_pool(dsn, credentials=manager, min_size=1, max_size=1) as pool:
                    (connection,) = pool.stats().connections
                    clock.advance(3300)

                    assert await pool.fetchval("SELECT 1") == 1

                    # Whoever is handed a connection at its end has five minutes left; a transaction may take that long.
                    assert 3200 < connection.seconds_left <= 3300
                    assert pool.stats().retired == {"max_lifetime": 1}


# Who signs


async def test_static_keys_of_a_profile(key, verifier):
    text = f"[app]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = {secret('profile')}\n"
    (key / "credentials").write_text(text, encoding="utf-8")
    verifier.revoke_key("AKIAEXAMPLE")
    verifier.add_key("AKIAPROFILE", secret("profile"))

    credential = await RDSIAM(HOST, user="app", profile="app").fetch()

    assert verifier.verify("app", credential.password) is None


async def test_a_role_that_a_profile_assumes(stub, verifier):
    config = f"""
[profile base]
aws_access_key_id = AKIABASE
aws_secret_access_key = {secret("base")}
[profile app]
role_arn = arn:aws:iam::123456789012:role/app
source_profile = base
external_id = 42
"""
    with environment(AWS_PROFILE="app", AWS_ENDPOINT_URL_STS=stub.url) as directory:
        (directory / "config").write_text(config, encoding="utf-8")
        credential = await rds().fetch()

    (asked,) = stub.asked
    assert asked.operation == "AssumeRole"
    assert asked.parameters["ExternalId"] == "42"
    # The role is assumed in the region of the host, where there is no other.
    assert f"/{REGION}/sts/" in asked.headers["Authorization"]
    assert verifier.verify("app", credential.password) is None


async def test_a_web_identity(stub, verifier):
    with web_identity(stub):
        credential = await rds().fetch()

    assert [asked.parameters["WebIdentityToken"] for asked in stub.asked] == [secret("identity")]
    assert verifier.verify("app", credential.password) is None


async def test_a_container(stub, verifier):
    variables = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{stub.url}/container",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": secret("container"),
    }
    with environment(**variables):
        credential = await rds().fetch()

    assert stub.asked[0].headers["Authorization"] == secret("container")
    assert verifier.verify("app", credential.password) is None


async def test_an_instance(stub, verifier):
    variables = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": stub.url, "AWS_EC2_METADATA_DISABLED": "false"}
    with environment(**variables):
        credential = await rds().fetch()

    assert stub.asked[0].headers["x-aws-ec2-metadata-token"] == "metadata-token"
    assert verifier.verify("app", credential.password) is None


async def test_a_credential_process(key, verifier):
    document = {"Version": 1, "AccessKeyId": "AKIAPROCESS", "SecretAccessKey": secret("process")}
    (key / "keys.json").write_text(json.dumps(document), encoding="utf-8")
    code = f"print(open('{key}/keys.json').read())"
    text = f'[profile app]\ncredential_process = {sys.executable} -c "{code}"\n'
    (key / "config").write_text(text, encoding="utf-8")
    verifier.add_key("AKIAPROCESS", secret("process"))

    credential = await RDSIAM(HOST, user="app", profile="app").fetch()

    assert verifier.verify("app", credential.password) is None


async def test_after_a_refusal_other_credentials_are_looked_for(stub, verifier):
    with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
        provider = rds()
        first = await provider.fetch()
        verifier.revoke_key("ASIAEXAMPLE1")
        assert "unknown access key" in verifier.verify("app", (await provider.fetch()).password)

        provider.invalidate(first)

        assert verifier.verify("app", (await provider.fetch()).password) is None


async def test_a_pool_whose_signing_credentials_were_revoked_logs_in_with_others(server, observer):
    verifier = SigV4Verifier(region=REGION, host="127.0.0.1")
    stub = AwsStub(verifier, lifetime=3600)
    async with stub.running(), TokenDoor(server, verifier.verify) as door:
        verifier.port = door.port
        with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
            dsn = door.dsn(sslmode="disable")
            async with create_pool(
                dsn, credentials=RDSIAM(region=REGION), min_size=1, max_size=1, on_event=observer
            ) as pool:
                verifier.revoke_key("ASIAEXAMPLE1")
                await pool.drain()

                assert await pool.fetchval("SELECT 1") == 1

        assert door.refusals == ["unknown access key"]
    assert stub.operations() == ["Container", "Container"]


async def test_keys_that_sts_refuses_are_looked_for_again(stub, verifier):
    def profile(key):
        return f"""
[profile base]
aws_access_key_id = {key}
aws_secret_access_key = {secret(key)}
[profile app]
role_arn = arn:aws:iam::123456789012:role/app
source_profile = base
"""

    with environment(AWS_PROFILE="app", AWS_ENDPOINT_URL_STS=stub.url) as directory:
        (directory / "config").write_text(profile("AKIAOLD"), encoding="utf-8")
        provider = rds()
        stub.refusal = Refusal(403, "InvalidClientTokenId")
        await refusal(provider)
        await stub.heal()
        (directory / "config").write_text(profile("AKIANEW"), encoding="utf-8")

        credential = await provider.fetch()

    assert verifier.verify("app", credential.password) is None
    assert ["AKIANEW/" in asked.headers["Authorization"] for asked in stub.asked] == [False, True]


async def test_a_dsql_token_that_was_refused_is_signed_with_other_credentials_next_time(stub):
    with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
        provider = AuroraDSQL(CLUSTER, "app")
        provider.invalidate(await provider.fetch())
        await provider.fetch()

    assert len(stub.asked) == 2


# One session, and no waiting


@pytest.fixture
def made(monkeypatch):
    """Return what was made of botocore's: sessions and clients."""
    made = []
    init, create_client = AioSession.__init__, AioSession.create_client

    def count_session(self, *arguments, **options):
        made.append("session")
        init(self, *arguments, **options)

    def count_client(self, service, *arguments, **options):
        made.append(service)
        return create_client(self, service, *arguments, **options)

    monkeypatch.setattr(AioSession, "__init__", count_session)
    monkeypatch.setattr(AioSession, "create_client", count_client)
    return made


@pytest.mark.parametrize("provider", [RDSIAM, AuroraDSQL])
async def test_one_session_and_no_client_is_made_for_all_hosts_for_life(key, made, provider):
    parent = provider(region=REGION)
    bound = [parent.bind(Target(f"host{number}", 5432, "app", None)) for number in range(3)]

    for source in bound * 3:
        await source.fetch()

    assert made == ["session"]


async def test_the_source_of_signing_credentials_is_asked_once_for_many_tokens(stub):
    with web_identity(stub):
        provider = rds()
        for _ in range(5):
            await provider.fetch()

    assert stub.operations() == ["AssumeRoleWithWebIdentity"]


@pytest.mark.parametrize("source", ["environment", "web identity", "container", "instance"])
async def test_not_even_the_first_fetch_holds_up_the_loop(source, stub):
    variables = {
        "environment": static_key(),
        "container": {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{stub.url}/container"},
        "instance": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": stub.url, "AWS_EC2_METADATA_DISABLED": "false"},
    }

    async def refresh():
        async with TokenManager(rds(), on_event=[]) as manager:
            await manager.refresh()

    with web_identity(stub) if source == "web identity" else environment(**variables[source]):
        probe = await watch(refresh, attempts=8)

    assert probe.steps > 2
    assert probe.blocking == []


async def test_the_very_first_fetch_of_a_process_does_not_hold_up_the_loop(stub):
    with web_identity(stub):
        probe = await watch_cold("from asyncpool_creds.providers.aws import RDSIAM", f"RDSIAM('{HOST}', user='app')")

    assert probe.steps > 2
    assert probe.blocking == []


# Troubles


async def test_there_may_be_no_credentials_at_all():
    with environment():
        error = await refusal(rds())

    assert "there are no AWS credentials" in str(error)
    assert error.retryable is False


async def test_a_profile_may_be_missing(key):
    error = await refusal(RDSIAM(HOST, user="app", profile="nobody"))

    assert "the configuration of AWS is wrong (The config profile (nobody) could not be found)" in str(error)
    assert error.retryable is False


async def test_half_a_key_is_a_mistake():
    with environment(AWS_ACCESS_KEY_ID="AKIAEXAMPLE"):
        error = await refusal(rds())

    assert "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY" in str(error)
    assert error.retryable is False


async def test_the_file_of_a_web_identity_may_come_later(stub):
    with web_identity(stub):
        provider = rds()
        path = anyio.Path(os.environ["AWS_WEB_IDENTITY_TOKEN_FILE"])
        later = await path.rename(path.with_name("later"))

        error = await refusal(provider)

        assert f"(No such file or directory: {path})" in str(error)
        assert error.retryable is True
        await later.rename(path)
        assert (await provider.fetch()).password


@pytest.mark.parametrize(
    ("status", "code", "advice", "retryable"),
    [
        (403, "AccessDenied", "allow sts:AssumeRoleWithWebIdentity for this identity", False),
        (400, "InvalidIdentityToken", "correct the arguments", False),
        (400, "ExpiredTokenException", "the credentials that sign have expired", True),
        (400, "IDPCommunicationError", "it is asked again later", True),
        (400, "Throttling", "it is asked again later", True),
        (503, "ServiceUnavailable", "it is asked again later", True),
    ],
)
async def test_what_sts_refuses_is_told_apart(stub, status, code, advice, retryable):
    stub.refusal = Refusal(status, code, "because")
    with web_identity(stub):
        error = await refusal(rds())

    assert f"AWS refused AssumeRoleWithWebIdentity (HTTP {status}, {code}: because); {advice}" in str(error)
    assert error.retryable is retryable
    assert error.__cause__ is not None


async def test_sts_may_be_out_of_reach(stub):
    stub.port = 9
    with web_identity(stub):
        error = await refusal(rds())

    assert 'AWS cannot be reached (Could not connect to the endpoint URL: "http://127.0.0.1:9/")' in str(error)
    assert error.retryable is True


@pytest.mark.parametrize(
    ("error", "text", "retryable"),
    [
        (exceptions.SSOTokenLoadError(error_msg="no file"), "a login is needed", False),
        (exceptions.UnauthorizedSSOTokenError(), "run 'aws sso login'", False),
        (exceptions.TokenRetrievalError(provider="sso", error_msg="expired"), "a login is needed", False),
        (exceptions.RefreshWithMFAUnsupportedError(), "the configuration of AWS is wrong", False),
        (exceptions.InfiniteLoopConfigError(source_profile="a", visited_profiles=[]), "is wrong", False),
        (exceptions.CredentialRetrievalError(provider="custom-process", error_msg="no"), "could not be had", True),
        (exceptions.ReadTimeoutError(endpoint_url="https://sts"), "did not answer within 10 s", True),
        (exceptions.ConnectTimeoutError(endpoint_url="https://sts"), "did not answer within 10 s", True),
        (exceptions.SSLError(endpoint_url="https://sts", error="untrusted"), "check network, proxy and cert", True),
        (exceptions.ProxyConnectionError(proxy_url="http://proxy"), "check network, proxy and cert", True),
        (json.JSONDecodeError("no", secret("document"), 0), "the credentials that sign make no sense", True),
        (KeyError("AccessKeyId"), "the credentials that sign make no sense", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_what_botocore_cannot_do_is_told_apart(key, monkeypatch, error, text, retryable):
    async def fail(self):
        raise error

    monkeypatch.setattr(AioSession, "get_credentials", fail)

    caught = await refusal(rds())

    assert str(caught).startswith(f"RDSIAM: no token for {HOST}:5432: ")
    assert text in str(caught)
    assert caught.retryable is retryable
    assert isinstance(caught, ProviderTimeout) is ("did not answer" in text)
    # What stands for it has nothing but its class and its place.
    assert isinstance(caught.__cause__, ForeignError)
    assert re.fullmatch(rf"\S+\.{type(error).__name__} at test_aws\.py:\d+ in fail", str(caught.__cause__))


async def test_an_error_keeps_no_request_and_no_document(key, monkeypatch):
    async def fail(self):
        request = {"headers": {"X-Amz-Security-Token": secret("session")}}
        cause = exceptions.ConnectionClosedError(request=request, endpoint_url="http://127.0.0.1")
        raise exceptions.MetadataRetrievalError(error_msg="no") from cause

    monkeypatch.setattr(AioSession, "get_credentials", fail)

    assert_no_secret(await refusal(rds()))


async def test_garbage_instead_of_credentials_is_not_quoted(stub):
    stub.garbage = secret("garbage")
    with web_identity(stub):
        error = await refusal(rds())

    assert "127.0.0.1 answered with something that makes no sense (HTTP 200)" in str(error)
    assert error.retryable is True
    assert_no_secret(error)


async def test_garbage_of_a_credential_process_is_not_quoted(key):
    (key / "config").write_text(f"[profile app]\ncredential_process = echo {secret()}\n", encoding="utf-8")

    error = await refusal(RDSIAM(HOST, user="app", profile="app"))

    assert "the credentials that sign make no sense; look at where" in str(error)
    assert_no_secret(error)


async def test_what_a_refused_signature_should_have_been_is_not_quoted(stub):
    message = f"The signature does not match.\n\nThe canonical string was x-amz-security-token:{secret('session')}"
    stub.refusal = Refusal(403, "SignatureDoesNotMatch", message)
    with web_identity(stub):
        error = await refusal(rds())

    assert "SignatureDoesNotMatch: The signature does not match.); check the access key" in str(error)
    assert_no_secret(error)


async def test_a_jwt_in_what_aws_says_is_not_quoted(stub):
    stub.refusal = Refusal(400, "InvalidIdentityToken", f"bad token eyJhbGciOiJub25lIn0.{secret()}.x" + "y" * 500)
    with web_identity(stub):
        error = await refusal(rds())

    assert "bad token [redacted]" in str(error)
    assert_no_secret(error)


async def test_the_sdk_logs_nothing_of_what_it_sends_and_receives_for_us_even_at_debug(stub, caplog):
    caplog.set_level(logging.DEBUG)
    with web_identity(stub):
        await rds().fetch()

    ours = [record for record in caplog.records if record.name.startswith(("botocore", "aiobotocore"))]
    assert {record.name for record in ours if record.levelno == logging.DEBUG} & {
        "botocore.auth",
        "botocore.endpoint",
        "botocore.parsers",
    } == set()
    assert_no_secret(*ours)


async def test_what_others_do_with_the_sdk_is_logged_as_ever(caplog):
    caplog.set_level(logging.DEBUG)

    logging.getLogger("botocore.auth").debug("somebody else's")

    assert "somebody else's" in caplog.text


# Life


async def test_a_fetch_that_is_cancelled_leaves_nothing_behind(stub):
    stub.hang()
    before = asyncio.all_tasks()
    with web_identity(stub):
        provider = rds()
        fetch = asyncio.create_task(provider.fetch())
        await stub.hangs()

        fetch.cancel()
        await asyncio.wait([fetch])

        assert fetch.cancelled()
        await stub.heal()
        assert (await provider.fetch()).password
    with anyio.fail_after(5):
        while asyncio.all_tasks() - before:  # noqa: ASYNC110 - connections of the stub, which have no event
            await asyncio.sleep(0.01)


async def test_a_fetch_that_is_cancelled_while_files_are_read_is_cancelled_at_once(key, verifier):
    provider = rds()
    fetch = asyncio.create_task(provider.fetch())
    await asyncio.sleep(0)

    fetch.cancel()
    await asyncio.wait([fetch])

    assert fetch.cancelled()
    assert verifier.verify("app", (await provider.fetch()).password) is None


def test_it_works_in_one_event_loop_after_the_other(verifier):
    with environment(**static_key(verifier)):
        provider = rds()

        tokens = [asyncio.run(provider.fetch()).password for _ in range(2)]

    assert [verifier.verify("app", token) for token in tokens] == [None, None]


def test_a_forked_child_makes_its_own_tokens(verifier):
    reader, writer = os.pipe()
    with environment(**static_key(verifier)):
        provider = rds()
        asyncio.run(provider.fetch())
        child = fork()
        if child == 0:
            status = 1
            try:
                os.write(writer, asyncio.run(provider.fetch()).password.encode())
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)

    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        token = pipe.read()
    assert os.waitstatus_to_exitcode(status) == 0
    assert verifier.verify("app", token) is None


# Arguments


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: RDSIAM(5), TypeError, "RDSIAM: host must be a str, not int"),
        (lambda: RDSIAM(""), ValueError, "RDSIAM: host is empty"),
        (lambda: RDSIAM("db:5432"), ValueError, "host must be the name of a host and nothing else, not 'db:5432'"),
        (lambda: RDSIAM("https://db"), ValueError, "host must be the name of a host"),
        (lambda: RDSIAM("/tmp"), ValueError, "'/tmp' is a Unix socket; pass host"),
        (lambda: RDSIAM(port="5432"), TypeError, "RDSIAM: port must be an int, not str"),
        (lambda: RDSIAM(port=True), TypeError, "RDSIAM: port must be an int, not bool"),
        (lambda: RDSIAM(port=65536), ValueError, "port must be between 1 and 65535, not 65536"),
        (lambda: RDSIAM(user=""), ValueError, "RDSIAM: user is empty"),
        (lambda: RDSIAM(region=""), ValueError, "RDSIAM: region is empty"),
        (lambda: RDSIAM(profile=b"app"), TypeError, "RDSIAM: profile must be a str, not bytes"),
        (lambda: AuroraDSQL(admin="yes"), TypeError, "AuroraDSQL: admin must be a bool or None, not str"),
        (lambda: AuroraDSQL(token_lifetime=0.5), ValueError, "between 1 and 604800 seconds, not 0.5"),
        (lambda: AuroraDSQL(token_lifetime=604_801), ValueError, "between 1 and 604800 seconds, not 604801"),
        (lambda: AuroraDSQL(token_lifetime="900"), TypeError, "token_lifetime must be a number of seconds"),
        (lambda: AuroraDSQL("db/path"), ValueError, "AuroraDSQL: host must be the name of a host"),
    ],
)
def test_arguments_are_checked(make, kind, message):
    with pytest.raises(kind) as caught:
        make()

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        (RDSIAM(HOST, 5432, "app"), f"<RDSIAM host='{HOST}' port=5432 user='app' region=None>"),
        (AuroraDSQL(CLUSTER, "app", region=REGION), f"<AuroraDSQL host='{CLUSTER}' user='app' region='{REGION}'>"),
    ],
    ids=["RDS", "DSQL"],
)
def test_they_say_what_they_are_and_cannot_be_pickled(provider, text):
    assert repr(provider) == text
    with pytest.raises(TypeError, match="belongs to its process and cannot be pickled"):
        pickle.dumps(provider)
