"""What the SDKs of vendors send for us, and where to; what they read; and what of it shows when it fails."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import ssl
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import rich.console
import rich.traceback
import trustme
from aiobotocore.parsers import AioJSONParser
from aws_stub import REGION, environment
from azure.identity.aio import (
    ChainedTokenCredential,
    ClientSecretCredential,
    ManagedIdentityCredential,
    WorkloadIdentityCredential,
)
from google.auth import compute_engine, identity_pool
from google.auth.compute_engine import _metadata
from google.oauth2 import credentials as user_credentials
from google.oauth2 import service_account
from metadata_stubs import azure_environment, google_environment, key_of_service_account
from raw_server import RawServer, echo, endless, http
from support import assert_no_secret, find_secret, secret

from asyncpool_creds import CredentialExpired, ProviderError, TokenManager
from asyncpool_creds.providers.aws import RDSIAM, Redshift, SecretsManager
from asyncpool_creds.providers.azure import Entra
from asyncpool_creds.providers.gcp import CloudSQLIAM

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Source:
    """A provider in surroundings in which it asks a server for something, and sends a secret with that.

    Args:
        make: Makes the provider, in a directory for files.
        environment: The variables it finds.
        is_over_tls: Whether it asks nobody who has no certificate.
        is_metadata: Whether it is a metadata service of a host that it asks.
    """

    make: Callable[[str, str], object]
    environment: Callable[[str], dict[str, str]] = lambda _: {}
    is_over_tls: bool = False
    is_metadata: bool = False


def keys(url):
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": secret("key"),
        "AWS_SESSION_TOKEN": secret("session"),
    }


def rds(url, directory):
    return RDSIAM("db.example.com", user="app", region=REGION)


def web_identity(url):
    role = "arn:aws:iam::123456789012:role/app"
    return {"AWS_ENDPOINT_URL": url, "AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": "identity"}


def managed_identity(url):
    return {"IDENTITY_ENDPOINT": f"{url}/msi/token", "IDENTITY_HEADER": secret("header")}


def client_secret(url, ca):
    return ClientSecretCredential(
        "tenant", "client", secret("client"), authority=url, connection_verify=ca, retry_total=0
    )


def workload(url, ca):
    return WorkloadIdentityCredential(
        tenant_id="tenant",
        client_id="client",
        token_file_path="identity",
        authority=url,
        connection_verify=ca,
        retry_total=0,
    )


def person(url, directory):
    return user_credentials.Credentials(
        None,
        refresh_token=secret("refresh"),
        token_uri=f"{url}/token",
        client_id="client",
        client_secret=secret("client"),
    )


def pool(url, directory):
    return identity_pool.Credentials(
        audience="//iam.googleapis.com/pool",
        subject_token_type="urn:ietf:params:oauth:token-type:jwt",
        token_url=f"{url}/sts",
        credential_source={"file": "identity"},
    )


@dataclass(frozen=True)
class _Url:
    url: str


def account(url, directory):
    return service_account.Credentials.from_service_account_info(key_of_service_account(_Url(url)))


def entra(make, **options):
    return lambda url, ca: Entra(make(url, ca), close_credential=True, timeout=8, **options)


def google(make):
    return lambda url, directory: CloudSQLIAM(make(url, directory), timeout=8)


SOURCES = {
    "AWS container": Source(
        rds,
        lambda url: {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/container",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": secret("container"),
        },
        is_metadata=True,
    ),
    "AWS instance": Source(
        rds,
        lambda url: {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AWS_EC2_METADATA_DISABLED": "false"},
        is_metadata=True,
    ),
    "AWS web identity": Source(rds, web_identity),
    "AWS Secrets Manager": Source(lambda url, directory: SecretsManager("db", region=REGION), keys),
    "AWS Redshift": Source(lambda url, directory: Redshift("sales", user="app", region=REGION), keys),
    "Azure App Service": Source(
        entra(lambda url, ca: ManagedIdentityCredential(retry_total=0)), managed_identity, is_metadata=True
    ),
    "Azure by default": Source(lambda url, ca: Entra(timeout=8), managed_identity, is_metadata=True),
    "Azure client secret": Source(entra(client_secret), is_over_tls=True),
    "Azure chain": Source(entra(lambda url, ca: ChainedTokenCredential(client_secret(url, ca))), is_over_tls=True),
    "Azure workload": Source(entra(workload), is_over_tls=True),
    "Google metadata": Source(google(lambda url, directory: compute_engine.Credentials()), is_metadata=True),
    "Google person": Source(google(person)),
    "Google workload": Source(google(pool)),
    "Google account": Source(google(account)),
}
every_source = pytest.mark.parametrize("name", SOURCES)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@contextlib.asynccontextmanager
async def asking(name, authority, directory, monkeypatch, answer):
    """Yield a provider, and the server that it asks."""
    source = SOURCES[name]
    tls = None
    ca = directory / "ca.pem"
    if source.is_over_tls:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(tls)
        authority.cert_pem.write_to_path(str(ca))
    (directory / "identity").write_text(secret("identity"))
    monkeypatch.chdir(directory)
    async with RawServer(answer, tls) as server:
        variables = source.environment(server.url)
        monkeypatch.setattr(_metadata, "_GCE_METADATA_HOST", server.url.partition("//")[2])
        with environment(**variables), azure_environment(**variables), google_environment():
            provider = source.make(server.url, str(ca))
            try:
                yield provider, server
            finally:
                if hasattr(provider, "aclose"):
                    await provider.aclose()


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


# How much is read


@every_source
async def test_no_more_than_a_megabyte_is_read(name, authority, tmp_path, monkeypatch):
    async with asking(name, authority, tmp_path, monkeypatch, endless) as (provider, server):
        error = await refusal(provider)

    assert "answered with more than " in str(error)
    assert error.retryable
    # Two megabytes are in the buffers of sockets and event loops.
    assert server.sent < 8 << 20


@every_source
async def test_a_compressed_answer_is_refused_before_it_is_read(name, authority, tmp_path, monkeypatch):
    bomb = http(200, gzip.compress(b"[" * (64 << 20)), headers="Content-Encoding: gzip\r\n")

    async with asking(name, authority, tmp_path, monkeypatch, bomb) as (provider, server):
        error = await refusal(provider)

    assert "compresses its answer" in str(error)
    assert all(b"identity" in asked for asked in server.asked)


async def test_a_secret_that_takes_long_to_parse_is_parsed_elsewhere(authority, tmp_path, monkeypatch):
    threads = []
    parse = AioJSONParser.parse

    async def watched(self, *arguments):
        threads.append(threading.current_thread())
        return await parse(self, *arguments)

    monkeypatch.setattr(AioJSONParser, "parse", watched)
    password = secret("long" + "g" * 60_000)
    document = json.dumps({"password": password, "more": '"' * 4000})
    answer = http(200, json.dumps({"SecretString": document, "VersionId": "1"}))

    async with asking("AWS Secrets Manager", authority, tmp_path, monkeypatch, answer) as (provider, _):
        assert (await provider.fetch()).password == password

    assert threads != []
    assert threading.main_thread() not in threads


# Where it is sent to


@every_source
@pytest.mark.parametrize("status", [302, 307, 308])
async def test_no_redirect_is_followed(name, status, authority, tmp_path, monkeypatch):
    async with RawServer(http(200, "{}")) as elsewhere:
        answer = http(status, "{}", headers=f"Location: {elsewhere.url}/elsewhere\r\n")
        async with asking(name, authority, tmp_path, monkeypatch, answer) as (provider, _):
            error = await refusal(provider)

    assert elsewhere.asked == []
    assert f"points to another address (HTTP {status}), which is not followed" in str(error)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if not source.is_over_tls])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "all_proxy"])
async def test_no_proxy_sees_what_stays_on_this_host(name, variable, authority, tmp_path, monkeypatch):
    for other in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    async with RawServer(http(200, "{}")) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        async with asking(name, authority, tmp_path, monkeypatch, http(403, "{}")) as (provider, server):
            await refusal(provider)

    assert proxy.asked == []
    assert server.asked != []


# What shows of it


def shown_by(error):
    """Return what those show who log locals, and what error trackers take along."""
    yield "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    console = rich.console.Console(file=io.StringIO(), width=300)
    console.print(
        rich.traceback.Traceback.from_exception(
            type(error), error, error.__traceback__, show_locals=True, locals_max_string=None, locals_max_length=None
        )
    )
    yield console.file.getvalue()


TROUBLES = {
    "a page": echo(200, "@", "text/html"),
    "a document": echo(200, '{"error_description": "@", "x": ["@"]}'),
    "half a token": echo(200, '{"access_token": ["@"], "AccessKeyId": 3, "expires_in": "@", "Expiration": "@"}'),
    "a refusal": echo(400, '{"error": "invalid_client", "error_description": "@", "__type": "No", "message": "@"}'),
    "a code": echo(400, '{"error": "@", "__type": "@"}'),
    "a refusal in XML": echo(403, "<R><Error><Code>AccessDenied</Code><Message>@</Message></Error></R>", "text/xml"),
    "trouble": echo(500, "@", "text/plain"),
    "no HTTP": lambda asked: [b"what? ", asked],
    "nothing": lambda asked: [],
}
TROUBLES["the beginning"] = lambda asked: [next(iter(http(200, asked)(asked)))[:-5]]


@every_source
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_no_error_shows_what_was_sent(name, trouble, authority, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    async with asking(name, authority, tmp_path, monkeypatch, TROUBLES[trouble]) as (provider, server):
        error = await refusal(provider)
        with pytest.raises(CredentialExpired) as caught:
            async with TokenManager(provider, on_event=[]):
                pass

    assert server.asked != []
    assert_no_secret(error, caught.value, *caplog.records)
    # The frames of this test know the secret, and are not looked at.
    for one in (error, caught.value.__cause__):
        assert find_secret(list(shown_by(one.with_traceback(one.__traceback__.tb_next)))) is None
    # What botocore and google-auth say is not ours to tell: each of ours has its own words for it.
    assert "fetch() raised" not in str(error)
    assert "mistake in the provider" not in str(error)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.is_metadata])
@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        "7",
        "null",
        "<html>",
        "[" * 50_000,
        '{"access_token": "x", "expires_in": ' + "9" * 5000 + "}",
        '{"access_token": "x", "expires_in": NaN, "expires_on": NaN, "AccessKeyId": 1}',
        '{"access_token": "x", "expires_on": -1e99, "AccessKeyId": "a", "SecretAccessKey": "b", "Expiration": 7}',
        '{"access_token": 7, "expires_in": 60, "resource": "r", "Expiration": "2026-13-45T00:00:00Z"}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_garbage_of_a_metadata_service_reads_as_that(name, body, authority, tmp_path, monkeypatch):
    async with asking(name, authority, tmp_path, monkeypatch, http(200, body)) as (provider, _):
        error = await refusal(provider)

    assert "the metadata service 127.0.0.1 answered with something that is no " in str(error)
    assert error.retryable


async def test_a_warning_of_azure_identity_does_not_quote_an_odd_answer(authority, tmp_path, monkeypatch, caplog):
    answer = http(200, json.dumps({"token": "odd answer", "expires_in": 60}))

    async with asking("Azure by default", authority, tmp_path, monkeypatch, answer) as (provider, _):
        await refusal(provider)

    warnings = [record for record in caplog.records if record.name.startswith("azure.")]
    assert any(record.levelno == logging.WARNING for record in warnings)
    assert "odd answer" not in caplog.text


async def test_what_others_do_with_azure_identity_is_logged_as_ever(caplog):
    caplog.set_level(logging.DEBUG)

    logging.getLogger("azure.identity.aio._credentials.chained").debug("somebody else's: %s", ValueError("text"))

    assert "somebody else's: text" in caplog.text


async def test_a_metadata_service_that_falls_silent_is_asked_again(authority, tmp_path, monkeypatch):
    def answer(asked):
        return http(200, "token")(asked) if asked.startswith(b"PUT") else []

    async with asking("AWS instance", authority, tmp_path, monkeypatch, answer) as (provider, _):
        error = await refusal(provider)

    assert "the metadata service 127.0.0.1 does not answer" in str(error)
    assert error.retryable


async def test_credentials_of_azure_that_were_used_before_are_watched_too(authority, tmp_path, monkeypatch):
    good = {"access_token": "opaque", "expires_in": 60, "resource": "r"}
    async with asking("Azure App Service", authority, tmp_path, monkeypatch, http(200, json.dumps(good))) as (
        _,
        server,
    ):
        credential = ManagedIdentityCredential(retry_total=0)
        await credential.get_token("https://example.com/.default")
        server.answer = endless

        error = await refusal(Entra(credential, timeout=8))
        server.answer = http(200, json.dumps(good))
        # It goes on working for whoever had it before.
        token = await credential.get_token("https://example.com/.default", claims="{}")
        await credential.close()

    assert "answered with more than 64 KiB" in str(error)
    assert token.token == "opaque"


async def test_a_credential_of_azure_that_is_closed_stays_closed(authority, tmp_path, monkeypatch):
    async with asking("Azure App Service", authority, tmp_path, monkeypatch, http(200, "{}")) as (_, server):
        credential = ManagedIdentityCredential(retry_total=0)
        async with credential:
            await refusal(Entra(credential))
        asked = len(server.asked)

        with pytest.raises(ValueError, match="already been closed"):
            await Entra(credential).fetch()

    assert len(server.asked) == asked
