"""The sources of AWS against moto, the emulator: roles, web identities, instances, secrets and clusters."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import boto3
import httpx
import pytest
from aws_stub import REGION, environment
from moto.server import ThreadedMotoServer
from moto.sts.models import sts_backends
from processes import fork
from support import secret

from asyncpool_creds import ProviderError, TokenManager
from asyncpool_creds.providers.aws import RDSIAM, AuroraDSQL, Redshift, SecretsManager
from asyncpool_creds.testing.sigv4 import SigV4Verifier

pytestmark = pytest.mark.anyio

ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/app"
HOST = f"db.abc123.{REGION}.rds.amazonaws.com"
CLUSTER = f"abc123.dsql.{REGION}.on.aws"
KEY = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": secret("key")}


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def url(moto):
    """Where moto is, with nothing in it."""
    httpx.post(f"{moto}/moto-api/reset").raise_for_status()
    return moto


@pytest.fixture
def administrator(url):
    """Make clients for who sets things up; what they send and receive is none of our logs' business."""
    for name in ("botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.INFO)
    with contextlib.ExitStack() as clients:

        def client(service):
            made = boto3.client(
                service,
                region_name=REGION,
                endpoint_url=url,
                aws_access_key_id="AKIAADMIN",
                aws_secret_access_key=secret("admin"),
            )
            clients.callback(made.close)
            return made

        yield client
    for name in ("botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def verifier_of_roles(service="rds-db"):
    """Return a verifier that knows the temporary credentials which moto's STS has given out."""
    verifier = SigV4Verifier(service, region=REGION)
    for role in sts_backends[ACCOUNT]["aws"].assumed_roles:
        ends = datetime.fromisoformat(str(role.expiration))
        verifier.add_key(
            role.access_key_id,
            role.secret_access_key,
            session_token=role.session_token,
            expires_at=ends if ends.tzinfo else ends.replace(tzinfo=UTC),
        )
    return verifier


@pytest.mark.parametrize("provider", [RDSIAM(HOST, user="app"), AuroraDSQL(CLUSTER, "app")], ids=["RDS", "DSQL"])
async def test_a_role_that_a_profile_assumes_signs_tokens(url, provider):
    config = f"""
[profile base]
aws_access_key_id = AKIABASE
aws_secret_access_key = {secret("base")}
[profile app]
role_arn = {ROLE}
source_profile = base
"""
    with environment(AWS_PROFILE="app", AWS_ENDPOINT_URL_STS=url) as directory:
        (directory / "config").write_text(config, encoding="utf-8")
        credential = await provider.fetch()

    verifier = verifier_of_roles("rds-db" if isinstance(provider, RDSIAM) else "dsql")
    assert verifier.verify("app", credential.password) is None


async def test_a_role_that_lives_for_a_quarter_of_an_hour_signs_tokens_that_do_not_outlive_it(url):
    config = f"""
[profile app]
role_arn = {ROLE}
credential_source = Environment
duration_seconds = 900
"""
    with environment(AWS_ENDPOINT_URL_STS=url, **KEY) as directory:
        (directory / "config").write_text(config, encoding="utf-8")
        # A profile that is named comes before the keys in the environment.
        credential = await AuroraDSQL(CLUSTER, "app", token_lifetime=3600, profile="app").fetch()

    assert timedelta(seconds=890) < credential.expires_at - datetime.now(UTC) <= timedelta(seconds=901)
    assert verifier_of_roles("dsql").verify("app", credential.password) is None


async def test_a_web_identity_signs_tokens(url):
    with environment(AWS_ENDPOINT_URL_STS=url, AWS_ROLE_ARN=ROLE) as directory:
        token = directory / "token"
        token.write_text(secret("identity"), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
            credential = await RDSIAM(HOST, user="app").fetch()

    assert verifier_of_roles().verify("app", credential.password) is None


async def test_an_instance_signs_tokens(url):
    verifier = SigV4Verifier(region=REGION)
    verifier.add_key("test-key", "test-secret-key", session_token="test-session-token")
    with environment(AWS_EC2_METADATA_SERVICE_ENDPOINT=url, AWS_EC2_METADATA_DISABLED="false"):
        credential = await RDSIAM(HOST, user="app").fetch()

    assert verifier.verify("app", credential.password) is None


async def test_a_secret_is_rotated(url, administrator):
    secrets = administrator("secretsmanager")

    def text(number):
        return json.dumps({"username": "app", "password": secret(str(number))})

    first = secrets.create_secret(Name="rotated", SecretString=text(1))
    with environment(AWS_ENDPOINT_URL=url, **KEY):
        provider = SecretsManager(first["ARN"])
        async with TokenManager(provider, background=False, on_event=[]) as manager:
            before = await manager.get()
            await manager.refresh()
            assert manager.stats().rotations == 0

            second = secrets.put_secret_value(SecretId="rotated", SecretString=text(2))
            # What is being prepared is not yet current.
            secrets.put_secret_value(SecretId="rotated", SecretString=text(3), VersionStages=["AWSPENDING"])
            after = await manager.refresh()

    assert (before.password, before.version) == (secret("1"), first["VersionId"])
    assert (after.password, after.version) == (secret("2"), second["VersionId"])
    assert manager.stats().rotations == 1


def test_a_forked_child_asks_by_itself_and_leaves_the_connections_of_its_parent_alone(url, administrator):
    administrator("secretsmanager").create_secret(Name="forked", SecretString=secret())

    async def fetch_as_a_child(provider):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            credential = await provider.fetch()
            await provider.aclose()
            gc.collect()
        return credential.password == secret() and not caught

    with environment(AWS_ENDPOINT_URL=url, **KEY), asyncio.Runner() as loop:
        provider = SecretsManager("forked", region=REGION)
        loop.run(provider.fetch())
        child = fork()
        if child == 0:
            status = 1
            try:
                status = 0 if asyncio.run(fetch_as_a_child(provider)) else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        again = loop.run(provider.fetch())
        loop.run(provider.aclose())

    assert os.waitstatus_to_exitcode(status) == 0
    assert again.password == secret()


async def test_a_secret_may_be_binary_or_missing_or_about_to_be_deleted(url, administrator):
    secrets = administrator("secretsmanager")
    secrets.create_secret(Name="binary", SecretBinary=b"\0\1")
    secrets.create_secret(Name="deleted", SecretString=secret())
    secrets.delete_secret(SecretId="deleted")
    for name, message in (
        ("binary", "it is binary"),
        ("missing", "ResourceNotFoundException"),
        ("deleted", "InvalidRequestException"),
    ):
        with environment(AWS_ENDPOINT_URL=url, **KEY):
            provider = SecretsManager(name, region=REGION)
            with pytest.raises(ProviderError, match=message) as caught:
                await provider.fetch()
            await provider.aclose()

        assert caught.value.retryable is False


async def test_a_cluster_of_redshift_gives_passwords(url, administrator):
    administrator("redshift").create_cluster(
        ClusterIdentifier="sales", NodeType="ra3.large", MasterUsername="root", MasterUserPassword=secret("Root1")
    )
    with environment(AWS_ENDPOINT_URL=url, **KEY):
        provider = Redshift("sales", user="app", region=REGION)
        first, second = await provider.fetch(), await provider.fetch()
        await provider.aclose()

    assert (first.user, second.user) == ("IAM:app", "IAM:app")
    assert first.password != second.password
    assert timedelta(seconds=890) < first.expires_at - datetime.now(UTC) <= timedelta(seconds=900)


async def test_a_cluster_of_redshift_may_be_missing(url):
    with environment(AWS_ENDPOINT_URL=url, **KEY):
        provider = Redshift("missing", user="app", region=REGION)
        with pytest.raises(ProviderError, match="ClusterNotFound") as caught:
            await provider.fetch()
        await provider.aclose()

    assert caught.value.retryable is False
