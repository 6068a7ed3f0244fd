"""What all sources over HTTP have in common: which way secrets go, what is read of answers, what failures show."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import threading
import time
import tracemalloc
import zlib

import anyio
import httpx
import pytest
from http_script import ScriptedServer, always, and_no_more, endlessly, head
from shown_locals import assert_no_secret_in_locals
from support import FakeClock, assert_no_secret, secret

from asyncpool_creds import (
    CredentialError,
    CredentialExpired,
    ProviderError,
    ProviderTimeout,
    RefreshFailed,
    RevocationFailed,
    TokenManager,
)
from asyncpool_creds.providers import _http
from asyncpool_creds.providers.chain import Chain
from asyncpool_creds.providers.command import Command
from asyncpool_creds.providers.env import Environment
from asyncpool_creds.providers.file import File
from asyncpool_creds.providers.globus import Globus
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.providers.vault import AppRoleAuth, VaultDatabase, VaultKV, VaultStaticRole

pytestmark = pytest.mark.anyio

MEGABYTE = 1 << 20
RESOURCE = "db.example.com"
TOKEN = secret("token")
# An answer to whatever is asked: of an issuer, of Globus Auth, of Vault at a login or for a secret of any kind.
EVERYTHING = {
    "access_token": TOKEN,
    "expires_in": 60,
    "resource_server": RESOURCE,
    "auth": {"client_token": secret("vault"), "lease_duration": 600, "renewable": True},
    "data": {"data": {"username": "app", "password": TOKEN}, "username": "app", "password": TOKEN, "ttl": 60},
    "lease_id": "database/creds/app/1",
    "lease_duration": 60,
}


def _globus(url, **options):
    scopes = {RESOURCE: "all"}
    return Globus("client", client_secret=secret("client"), scopes=scopes, url=url, **options).resource(RESOURCE)


# What makes a source of each kind that speaks HTTP.
# This process knows every refresh token that it has sent, and sends none again.
_numbers = itertools.count(1)

SOURCES = {
    "OAuth2 password": lambda url, **options: OAuth2(
        token_url=f"{url}/token",
        client_id="app",
        client_secret=secret("client"),
        username="ann",
        password=secret("ann"),
        extra={"otp": secret("otp")},
        **options,
    ),
    "OAuth2 client": lambda url, **options: OAuth2(
        token_url=f"{url}/token", client_id="app", client_secret=secret("client"), client_auth="post", **options
    ),
    "OAuth2 refresh token": lambda url, **options: OAuth2(
        token_url=f"{url}/token", client_id="app", refresh_token=secret(f"refresh {next(_numbers)}"), **options
    ),
    "OAuth2 assertion": lambda url, **options: OAuth2(
        token_url=f"{url}/token", assertion=lambda: secret("assertion"), **options
    ),
    "OAuth2 discovery": lambda url, **options: OAuth2(url, client_id="app", client_secret=secret("client"), **options),
    "Globus": _globus,
    "Vault token": lambda url, **options: VaultKV("db", address=url, auth=secret("vault"), **options),
    "Vault AppRole": lambda url, **options: VaultDatabase(
        "app", address=url, auth=AppRoleAuth(secret("role"), secret_id=secret("id")), **options
    ),
    "Vault static role": lambda url, **options: VaultStaticRole("app", address=url, auth=secret("vault"), **options),
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


async def close(source):
    with contextlib.suppress(CredentialError):
        await source.aclose()


async def refusal(source):
    with pytest.raises(ProviderError) as caught:
        await source.fetch()
    await close(source)
    return caught.value


# Which way


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def _explicit(proxy):
    return lambda: httpx.AsyncClient(proxy=proxy)


def _explicit_transport(proxy):
    return lambda: httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(proxy=proxy))


def _explicit_mount(proxy):
    return lambda: httpx.AsyncClient(mounts={"http://": httpx.AsyncHTTPTransport(proxy=proxy)})


@pytest.mark.parametrize(
    ("variable", "http_client"),
    [
        *((variable, None) for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")),
        ("HTTP_PROXY", lambda _: httpx.AsyncClient),
        ("ALL_PROXY", lambda _: httpx.AsyncClient),
        (None, _explicit),
        (None, _explicit_transport),
        (None, _explicit_mount),
    ],
    ids=str,
)
@every_source
async def test_plain_http_to_loopback_never_goes_through_a_proxy(make, variable, http_client, no_proxies, monkeypatch):
    async with ScriptedServer(always(EVERYTHING)) as proxy, ScriptedServer(always(EVERYTHING)) as server:
        if variable is not None:
            monkeypatch.setenv(variable, proxy.url)
        options = {} if http_client is None else {"http_client": http_client(proxy.url)}
        source = make(server.url, timeout=5.0, **options)

        with contextlib.suppress(ProviderError):  # what it says is no metadata of an issuer
            await source.fetch()
        await close(source)

        assert proxy.requests == []
        assert server.requests != []


async def test_plain_http_to_localhost_by_name_is_direct(no_proxies, monkeypatch):
    async with ScriptedServer(always(EVERYTHING)) as proxy, ScriptedServer(always(EVERYTHING)) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        source = SOURCES["OAuth2 password"](server.url.replace("127.0.0.1", "localhost"))

        assert (await source.fetch()).password == TOKEN
        await source.aclose()

        assert proxy.requests == []


@pytest.mark.parametrize("http_client", [None, httpx.AsyncClient])
async def test_https_honours_the_proxy_of_the_environment(http_client, no_proxies, monkeypatch):
    async with ScriptedServer(always({}, "502 Bad Gateway")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        source = SOURCES["OAuth2 password"]("https://login.example.com", http_client=http_client)

        await refusal(source)

        assert [request.partition(b" HTTP")[0] for request in proxy.requests] == [b"CONNECT login.example.com:443"]


async def test_a_transport_of_the_callers_own_is_left_in_place(no_proxies, monkeypatch):
    """A Vault agent that listens on a Unix socket has an address of plain http as well."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    seen = []

    def answer(request):
        seen.append(str(request.url))
        return httpx.Response(200, json=EVERYTHING)

    transport = httpx.MockTransport(answer)
    source = SOURCES["Vault token"]("http://localhost", http_client=lambda: httpx.AsyncClient(transport=transport))

    await source.fetch()
    await source.aclose()

    assert "http://localhost/v1/secret/data/db" in seen


@pytest.mark.parametrize("made", ["a string", None, lambda: None], ids=repr)
async def test_what_is_no_client_is_told(made):
    error = await refusal(SOURCES["Vault token"]("https://vault.example.com", http_client=lambda: made))

    assert "http_client must make an httpx.AsyncClient, not " in str(error)
    assert not error.retryable


@pytest.mark.parametrize("host", ["127.0.0.1%25.example.com", "[::1%25.example.com]", "127.0.0.1%.example.com"])
@every_source
def test_an_address_with_a_scope_is_not_loopback(make, host):
    with pytest.raises(ValueError, match="plain http is for loopback addresses only"):
        make(f"http://{host}:8200")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("follows", [False, True])
@every_source
async def test_no_redirect_carries_a_secret(make, status, follows):
    async with ScriptedServer(always(EVERYTHING)) as other:
        redirect = always({}, f"{status} Elsewhere", Location=f"{other.url}/token")
        async with ScriptedServer(redirect) as server:
            source = make(server.url, http_client=lambda: httpx.AsyncClient(follow_redirects=follows))

            error = await refusal(source)

    assert other.requests == []
    assert len(server.requests) == 1
    assert "redirects" in str(error) or "sends us elsewhere" in str(error)
    assert_no_secret(error)


# What is read


def _json_of(size):
    return b'{"access_token": "' + b"x" * size + b'"}'


def _bomb(size, depth=1):
    data = b" " * size
    for _ in range(depth):
        data = gzip.compress(data, 9)
    return data


CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
TOO_LONG = {
    "stated": and_no_more(head(Content_Length=MEGABYTE + 1)),
    "stated beyond all numbers": and_no_more(head(Content_Length="9" * 19)),
    "of its length": always(_json_of(MEGABYTE)),
    "without an end": endlessly(head(), b" " * 0x10000),
    "in chunks without an end": endlessly(head(Transfer_Encoding="chunked"), CHUNK),
    "compressed": always(_bomb(300 * MEGABYTE), Content_Encoding="gzip"),
    "compressed by zlib": always(zlib.compress(b" " * (2 * MEGABYTE)), Content_Encoding="deflate"),
    # Empty blocks: nothing comes out, however much goes in.
    "compressed nothing without an end": endlessly(
        head(Content_Encoding="gzip") + gzip.compress(b"")[:10], b"\0\0\0\xff\xff" * 10_000
    ),
}


@pytest.mark.parametrize("answer", TOO_LONG.values(), ids=TOO_LONG)
@every_source
async def test_an_answer_over_a_megabyte_is_an_error_at_once(make, answer):
    async with ScriptedServer(answer) as server:
        started = time.monotonic()

        error = await refusal(make(server.url, timeout=30.0))

        assert time.monotonic() - started < 10.0
    assert type(error) is ProviderError
    assert "more than 1048576 bytes" in str(error) or "answer to a refresh was lost" in str(error)
    assert_no_secret(error)


async def test_a_bomb_takes_no_memory():
    async with ScriptedServer(TOO_LONG["compressed"]) as server:
        source = SOURCES["OAuth2 password"](server.url)
        with contextlib.suppress(ProviderError):
            await source.fetch()  # what is imported and cached
        tracemalloc.start()
        try:
            await refusal(source)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert peak < 6 * MEGABYTE


async def test_the_connection_is_cut_where_the_rest_is_not_wanted():
    async with ScriptedServer(TOO_LONG["in chunks without an end"]) as server:
        await refusal(SOURCES["OAuth2 password"](server.url))

        with anyio.fail_after(5.0):
            await server.cut_off.wait()


@pytest.mark.parametrize("compress", [None, gzip.compress, zlib.compress])
async def test_an_answer_that_fits_is_read_however_it_comes(compress):
    body = json.dumps({"access_token": TOKEN, "padding": "x" * (MEGABYTE - 200)}).encode()
    coding = {} if compress is None else {"Content_Encoding": "gzip" if compress is gzip.compress else "deflate"}
    body = body if compress is None else compress(body)
    async with ScriptedServer(always(body, **coding)) as server:
        source = SOURCES["OAuth2 password"](server.url)

        assert (await source.fetch()).password == TOKEN
        await source.aclose()

    assert b"Accept-Encoding: identity" in server.requests[0]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("br", b"x"),
        ("gzip, gzip", _bomb(MEGABYTE, depth=2)),
        ("gzip", b"this is not compressed"),
        ("gzip", gzip.compress(_json_of(100))[:-9]),
    ],
)
@every_source
async def test_what_cannot_be_decompressed_is_told(make, coding, body):
    async with ScriptedServer(always(body, Content_Encoding=coding)) as server:
        error = await refusal(make(server.url))

    assert "Content-Encoding" in str(error) or "compressed data" in str(error) or "refresh was lost" in str(error)
    assert error.retryable or "refresh was lost" in str(error)


async def test_a_page_of_any_length_behind_a_refusal_leaves_the_refusal():
    """A gateway's error page is no reason to take a refresh token for spent."""
    answer = always(b"<html>" + b" " * (2 * MEGABYTE), "503 Service Unavailable", Retry_After="7")
    async with ScriptedServer(answer) as server:
        error = await refusal(SOURCES["OAuth2 refresh token"](server.url))

    assert "HTTP 503" in str(error)
    assert error.retry_after == 7.0
    assert error.retryable


async def test_a_hook_that_reads_the_answer_changes_nothing():
    async def read(response):
        await response.aread()

    def client():
        return httpx.AsyncClient(event_hooks={"response": [read]})

    async with ScriptedServer(always(EVERYTHING)) as server:
        source = SOURCES["OAuth2 password"](server.url, http_client=client)
        assert (await source.fetch()).password == TOKEN
        await source.aclose()
    async with ScriptedServer(always(_json_of(MEGABYTE))) as server:
        error = await refusal(SOURCES["OAuth2 password"](server.url, http_client=client))
        assert "more than 1048576 bytes" in str(error)


@pytest.mark.parametrize(("size", "is_on_the_loop"), [(1000, True), (100_000, False)])
async def test_a_long_document_is_read_off_the_event_loop(size, is_on_the_loop, monkeypatch):
    threads = []

    def parse(text, original=_http.parse_object):
        threads.append(threading.current_thread())
        return original(text)

    monkeypatch.setattr(_http, "parse_object", parse)
    async with ScriptedServer(always({"access_token": TOKEN, "padding": "x" * size})) as server:
        source = SOURCES["OAuth2 client"](server.url)
        await source.fetch()
        await source.aclose()

    assert [thread is threading.current_thread() for thread in threads] == [is_on_the_loop]


@pytest.mark.parametrize(
    "flawed",
    [
        {**EVERYTHING, "access_token": "x" * 70_000, "data": {"username": "app", "password": "x" * 70_000, "ttl": 9}},
        {**EVERYTHING, "access_token": "a\0b", "data": {"username": "app", "password": "a\0b", "ttl": 9}},
    ],
)
@pytest.mark.parametrize("name", ["OAuth2 client", "Globus", "Vault AppRole", "Vault static role"])
async def test_what_cannot_be_a_password_is_refused_with_the_reason(name, flawed):
    async with ScriptedServer(always(flawed)) as server:
        error = await refusal(SOURCES[name](server.url))

    assert not error.retryable
    assert "PG_MAX_AUTH_TOKEN_LENGTH" in str(error) or "a server would accept" in str(error) or "a NUL" in str(error)


@pytest.mark.parametrize("header", ["9" * 400, "-5", "nan", "1e3", "Fri, 31 Dec 9999 23:59:59 -2359", "", "٣٤"])
async def test_a_retry_after_that_makes_no_sense_is_no_reason_to_wait_for_ever(header):
    async def answer(writer, _):
        writer.write(head("429 Slow", Content_Length=2, Retry_After=header.encode().decode("latin-1")) + b"{}")

    async with ScriptedServer(answer) as server:
        error = await refusal(SOURCES["OAuth2 client"](server.url))

    assert error.retryable
    assert error.retry_after is None or 0.0 <= error.retry_after <= 366 * 86_400.0


# What failures show


def _quoting(status):
    """Answer with all that was sent, as text and as an error of OAuth 2.0 and of Vault."""

    async def answer(writer, request):
        said = request.decode("latin-1")
        await always({"error": "invalid_request", "error_description": said, "errors": [said]}, status)(writer, request)

    return answer


async def _echo(writer, request):
    writer.write(request)


FAILURES = {
    "refused and quoted": _quoting("400 Bad Request"),
    "in trouble and quoted": _quoting("503 Unavailable"),
    "sent back as it is": _echo,
    "no JSON": always(b"<html>"),
    "cut off": always(b"", Content_Encoding="identity", Transfer_Encoding="chunked"),
    "without an end": endlessly(head(), b" " * 0x10000),
    "never answered": and_no_more(),
}
every_failure = pytest.mark.parametrize("answer", FAILURES.values(), ids=FAILURES)


@every_failure
@every_source
async def test_a_failing_fetch_leaves_no_secret_in_locals_text_or_attributes(make, answer):
    async with ScriptedServer(answer) as server:
        error = await refusal(make(server.url, timeout=0.3))

    assert_no_secret(error)
    assert_no_secret_in_locals(error, of_tests=__file__)


@every_source
async def test_a_source_that_cannot_be_reached_leaves_no_secret_in_locals(make):
    error = await refusal(make("http://127.0.0.1:1"))

    assert_no_secret(error)
    assert_no_secret_in_locals(error, of_tests=__file__)


@pytest.mark.parametrize("call", ["get", "refresh", "start"])
@every_source
async def test_what_a_manager_raises_leaves_no_secret_in_locals(make, call, observer):
    async with ScriptedServer(FAILURES["refused and quoted"]) as server:
        manager = TokenManager(make(server.url), on_event=observer)
        for _ in range(2):  # the second time, the error is one that was kept
            with pytest.raises((CredentialExpired, ProviderError)) as caught:
                await getattr(manager, call)()
            assert_no_secret_in_locals(caught.value, of_tests=__file__)
        await manager.aclose()

    for event in observer.of(RefreshFailed):
        assert_no_secret_in_locals(event.error, of_tests=__file__)


@every_source
async def test_a_cancelled_fetch_leaves_no_secret_in_locals(make):
    async with ScriptedServer(and_no_more()) as server:
        source = make(server.url)
        fetch = asyncio.create_task(source.fetch())
        await server.reached.wait()
        fetch.cancel()
        try:
            await fetch
        except asyncio.CancelledError as error:
            assert_no_secret_in_locals(error, of_tests=__file__)
        else:
            pytest.fail("it was not cancelled")


async def test_what_a_chain_says_of_its_members_has_no_secret_in_locals():
    async with ScriptedServer(FAILURES["refused and quoted"]) as server:
        chain = Chain(*(make(server.url) for make in SOURCES.values()))

        error = await refusal(chain)

    assert isinstance(error.__cause__, ExceptionGroup)
    assert len(error.__cause__.exceptions) == len(SOURCES)
    assert_no_secret(error)
    assert_no_secret_in_locals(error, of_tests=__file__)


class _RefusesToRevoke:
    """Vault that gives leases, and fails where one is revoked."""

    def __init__(self):
        self.failing = _quoting("500 Broken")

    async def __call__(self, writer, request):
        path = request.split(b" ")[1]
        await (self.failing if b"revoke" in path else always(EVERYTHING))(writer, request)


async def test_a_lease_that_cannot_be_revoked_leaves_no_secret_in_locals(observer):
    async with ScriptedServer(_RefusesToRevoke()) as server:
        source = SOURCES["Vault AppRole"](server.url)
        source.report_to(observer)
        credential = await source.fetch()
        with pytest.raises(ProviderError) as caught:
            await source.revoke(credential)
        await source.aclose()

    assert_no_secret_in_locals(caught.value, of_tests=__file__)
    events = observer.of(RevocationFailed)
    assert events
    for event in events:
        assert_no_secret_in_locals(event.error, of_tests=__file__)


@pytest.mark.parametrize("call", ["log_in", "delete"])
async def test_what_globus_auth_refuses_leaves_no_secret_in_locals(call):
    async def answer(writer, request):
        await (FAILURES["refused and quoted"] if call == "log_in" or b"revoke" in request else always(EVERYTHING))(
            writer, request
        )

    async with (
        ScriptedServer(answer) as server,
        Globus("client", client_secret=secret("client"), scopes={RESOURCE: "all"}, url=server.url) as globus,
    ):
        if call == "delete":
            await globus.resource(RESOURCE).fetch()
        with pytest.raises(ProviderError) as caught:
            await (globus.log_in() if call == "log_in" else globus.delete(RESOURCE, revoke=True))

    assert_no_secret(caught.value)
    assert_no_secret_in_locals(caught.value, of_tests=__file__)


async def test_a_token_response_that_is_refused_is_not_in_locals():
    globus = Globus("client")
    with pytest.raises(ValueError, match="no token response") as caught:
        await globus.store({"access_token": TOKEN})

    assert_no_secret_in_locals(caught.value, of_tests=__file__)


async def test_a_stale_globus_token_is_given_with_an_event_without_locals(observer):
    async with ScriptedServer(FAILURES["refused and quoted"]) as server:
        clock = FakeClock()
        globus = Globus("client", url=server.url, clock=clock)
        await globus.store({**EVERYTHING, "refresh_token": secret("refresh")})
        clock.now += 55.0
        resource = globus.resource(RESOURCE)
        resource.report_to(observer)

        assert (await resource.fetch()).password == TOKEN
        await globus.aclose()

    (event,) = observer.of(RefreshFailed)
    assert_no_secret_in_locals(event.error, of_tests=__file__)


@pytest.mark.parametrize(
    "arguments",
    [
        ["/nonexistent/program"],
        ["sh", "-c", 'echo "got $ISSUER_KEY" >&2; exit 1'],
        ["sh", "-c", 'printf "%s" "$ISSUER_KEY" | base64 >&2; exit 1'],
        ["sh", "-c", 'printf "{%s" "$ISSUER_KEY"'],
        ["sh", "-c", "sleep 60"],
    ],
)
async def test_a_command_that_fails_shows_nothing_of_its_environment(arguments):
    source = Command(arguments, env={"ISSUER_KEY": secret("key")}, timeout=0.5)
    with pytest.raises(ProviderError) as caught:
        await source.fetch()

    assert_no_secret(caught.value)
    assert_no_secret_in_locals(caught.value, of_tests=__file__)


@pytest.mark.parametrize("content", [f'{{"passwd": "{TOKEN}"}}', f"{TOKEN}\0", f'{{"password": "{TOKEN}'])
async def test_a_file_that_makes_no_sense_shows_nothing_of_it(content, tmp_path):
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(ProviderError) as caught:
        await File(path).fetch()

    assert_no_secret(caught.value)
    assert_no_secret_in_locals(caught.value, of_tests=__file__)


async def test_a_variable_that_makes_no_sense_shows_nothing_of_it(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", TOKEN * 4000)
    with pytest.raises(ProviderError, match="more than 65535 bytes") as caught:
        await Environment().fetch()

    assert_no_secret(caught.value)
    assert_no_secret_in_locals(caught.value, of_tests=__file__)


@pytest.mark.parametrize("error", [httpx.HTTPStatusError, httpx.ReadError, httpx.RemoteProtocolError])
@every_source
async def test_an_exception_that_carries_the_request_is_replaced_by_a_summary(make, error):
    def fail(request):
        message = f"{request.headers} {request.content!r}"
        if error is httpx.HTTPStatusError:
            raise error(message, request=request, response=httpx.Response(500, request=request))
        raise error(message, request=request)

    source = make("https://example.com", http_client=lambda: httpx.AsyncClient(transport=httpx.MockTransport(fail)))

    failure = await refusal(source)

    assert_no_secret(failure)
    causes = []
    cause = failure.__cause__
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__
    assert causes[-1] == "ForeignError"
    assert_no_secret_in_locals(failure, of_tests=__file__)


async def test_a_timeout_leaves_no_secret_in_locals_of_its_causes():
    async with ScriptedServer(and_no_more()) as server:
        error = await refusal(SOURCES["OAuth2 password"](server.url, timeout=0.1))

    assert isinstance(error, ProviderTimeout)
    assert isinstance(error.__cause__, TimeoutError)
    assert_no_secret_in_locals(error, of_tests=__file__)
