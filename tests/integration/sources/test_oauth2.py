"""The OAuth 2.0 provider against the token issuer, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import functools
import logging
import pickle
import runpy
import ssl
import struct
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import anyio.to_thread
import asyncpg
import httpx
import pytest
import trustme
from processes import in_forked_child
from support import FakeClock, secret

import asyncpool_creds
from asyncpool_creds import CredentialProvider, ProviderError, ProviderTimeout, StorageFailed
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.storage import MemoryStorage, StoredTokens
from asyncpool_creds.testing.issuer import TokenIssuer

pytestmark = pytest.mark.anyio

PASSWORD = f"{secret('password')}/ +1"
SECRET = f"{secret('client')}: +"
LOGIN = {"username": "ann", "password": PASSWORD}


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def issuer(clock):
    async with TokenIssuer({"ann": PASSWORD}, clock=clock) as running:
        yield running


@pytest.fixture
async def make(issuer, clock):
    made = []

    def make(*arguments, **options):
        if not arguments:
            options.setdefault("token_url", issuer.token_url)
        provider = OAuth2(*arguments, **{"clock": clock, **options})
        made.append(provider)
        return provider

    yield make
    for provider in made:
        await provider.aclose()


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


async def refresh_token_of(issuer):
    async with httpx.AsyncClient() as http:
        answer = await http.post(issuer.token_url, data={"grant_type": "password", **LOGIN})
    issuer.requests.clear()
    return answer.json()["refresh_token"]


def answering(*responses, **options):
    """Return a provider whose issuer is a script: one response or exception per request, and the requests it saw."""
    seen = []
    script = iter(responses)

    def handle(request):
        seen.append(request)
        response = next(script)
        if isinstance(response, Exception):
            raise response
        return response

    options = {"client_id": "app", "client_secret": SECRET, **options}
    if "issuer" not in options:
        options.setdefault("token_url", "https://login.example.com/token")
    provider = OAuth2(http_client=lambda: httpx.AsyncClient(transport=httpx.MockTransport(handle)), **options)
    return provider, seen


def good(**members):
    return httpx.Response(200, json={"token_type": "Bearer", "access_token": "opaque", **members})


# Grants


async def test_it_is_a_credential_provider(make):
    assert isinstance(make(**LOGIN), CredentialProvider)


async def test_the_password_grant_logs_in_and_then_refreshes(make, issuer):
    provider = make(**LOGIN)

    first, second = await provider.fetch(), await provider.fetch()

    assert issuer.verify("ann", first.password) is None
    assert issuer.verify("ann", second.password) is None
    assert not first.is_same_secret(second)
    assert issuer.requests == {"password": 1, "refresh_token": 1}


async def test_the_client_credentials_grant_asks_anew_each_time(clock):
    async with TokenIssuer(clients={"app": SECRET}, clock=clock) as issuer:
        provider = OAuth2(
            token_url=issuer.token_url, client_id="app", client_secret=SECRET, user_claim="sub", clock=clock
        )
        credentials = [await provider.fetch() for _ in range(3)]
        await provider.aclose()

    assert [credential.user for credential in credentials] == ["app"] * 3
    assert issuer.requests == {"client_credentials": 3}


async def test_the_refresh_token_grant_goes_on_from_a_given_token(make, issuer):
    provider = make(refresh_token=await refresh_token_of(issuer))

    credentials = [await provider.fetch() for _ in range(3)]

    assert [issuer.verify("ann", credential.password) for credential in credentials] == [None] * 3
    assert issuer.requests == {"refresh_token": 3}
    assert issuer.replays == 0


async def test_a_given_refresh_token_spares_the_login(make, issuer):
    provider = make(refresh_token=await refresh_token_of(issuer), **LOGIN)

    await provider.fetch()

    assert issuer.requests == {"refresh_token": 1}


async def test_fifty_exchanges_replay_nothing(make, issuer):
    provider = make(**LOGIN)

    passwords = {(await provider.fetch()).password for _ in range(51)}

    assert len(passwords) == 51
    assert issuer.requests == {"password": 1, "refresh_token": 50}
    assert (issuer.replays, issuer.revoked_families) == (0, 0)


async def test_providers_with_one_storage_share_one_login_and_replay_nothing(make, issuer):
    storage = MemoryStorage()
    providers = [make(**LOGIN, storage=storage) for _ in range(5)]

    await asyncio.gather(*(provider.fetch() for provider in providers for _ in range(3)))
    await asyncio.gather(*(provider.fetch() for provider in providers))

    assert issuer.requests["password"] == 1
    assert issuer.replays == 0


async def test_concurrent_fetches_share_one_exchange(make, issuer):
    provider = make(**LOGIN)

    credentials = await asyncio.gather(*(provider.fetch() for _ in range(100)))

    assert len({credential.password for credential in credentials}) == 1
    assert issuer.fetches == 1


async def test_the_old_refresh_token_is_kept_if_no_new_one_comes(make, issuer):
    issuer.rotate_refresh_tokens = False
    provider = make(**LOGIN)

    for _ in range(3):
        await provider.fetch()

    assert issuer.requests == {"password": 1, "refresh_token": 2}


async def test_without_refresh_tokens_it_logs_in_each_time(make, issuer):
    issuer.answer["refresh_token"] = None
    provider = make(**LOGIN)

    for _ in range(3):
        await provider.fetch()

    assert issuer.requests == {"password": 3}


async def test_parameters_reach_the_issuer():
    provider, seen = answering(
        good(), grant="client_credentials", scope="one two", audience="db", extra={"resource": "r"}
    )

    await provider.fetch()

    assert dict(httpx.QueryParams(seen[0].content.decode())) == {
        "grant_type": "client_credentials",
        "scope": "one two",
        "audience": "db",
        "resource": "r",
    }
    assert seen[0].headers["Accept"] == "application/json"


# Client authentication and discovery


@pytest.mark.parametrize("client_auth", [None, "basic", "post"])
async def test_a_client_authenticates_with_its_secret(client_auth):
    async with TokenIssuer({"ann": PASSWORD}, clients={"a pp": SECRET}) as issuer:
        provider = OAuth2(
            token_url=issuer.token_url, client_id="a pp", client_secret=SECRET, client_auth=client_auth, **LOGIN
        )
        credential = await provider.fetch()
        await provider.aclose()

        assert issuer.verify("ann", credential.password) is None


async def test_a_public_client_names_itself():
    async with TokenIssuer({"ann": PASSWORD}, clients={"app": ""}) as issuer:
        provider = OAuth2(token_url=issuer.token_url, client_id="app", **LOGIN)
        for _ in range(2):
            await provider.fetch()
        await provider.aclose()

        assert issuer.requests == {"password": 1, "refresh_token": 1}


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_discovery_finds_the_endpoint_and_the_method_once(method):
    async with TokenIssuer({"ann": PASSWORD}, clients={"app": SECRET}, auth_methods=[method]) as issuer:
        provider = OAuth2(issuer.url, client_id="app", client_secret=SECRET, **LOGIN)
        for _ in range(3):
            await provider.fetch()
        await provider.aclose()
        await provider.fetch()
        await provider.aclose()

        assert issuer.documents == {"/.well-known/openid-configuration": 1}
        assert issuer.fetches == 4


ISSUER = "https://login.example.com/tenant"


def metadata(**changes):
    return httpx.Response(200, json={"issuer": ISSUER, "token_endpoint": "https://tokens.example.com/t", **changes})


async def test_discovery_falls_back_to_the_address_of_rfc_8414():
    provider, seen = answering(httpx.Response(404), metadata(), good(), issuer=ISSUER)

    await provider.fetch()

    assert [str(request.url) for request in seen] == [
        "https://login.example.com/tenant/.well-known/openid-configuration",
        "https://login.example.com/.well-known/oauth-authorization-server/tenant",
        "https://tokens.example.com/t",
    ]


@pytest.mark.parametrize(
    ("response", "retryable", "says"),
    [
        (metadata(issuer="https://evil.example.com"), False, "says that it is 'https://evil.example.com'"),
        (metadata(token_endpoint="http://tokens.example.com/t"), False, "must be https"),
        (metadata(token_endpoint=None), False, "token_endpoint .* is missing"),
        (httpx.Response(200, text="<html>"), True, "no JSON object"),
        (httpx.Response(200, json=[]), True, "no JSON object"),
        (httpx.Response(403), False, r"HTTP 403\); check the identifier"),
        (httpx.Response(302, headers={"Location": "https://evil.example.com"}), False, "HTTP 302"),
        (httpx.Response(503, headers={"Retry-After": "9"}), True, "HTTP 503"),
        (httpx.ConnectError("no route"), True, "cannot be reached"),
    ],
)
async def test_bad_metadata_is_refused(response, retryable, says):
    provider, seen = answering(response, issuer=ISSUER)

    error = await refusal(provider)

    assert error.retryable is retryable
    assert error.retry_after == (9 if "503" in says else None)
    with pytest.raises(ProviderError, match=says):
        raise error
    assert len(seen) == 1


async def test_unknown_metadata_is_a_refusal_for_good():
    provider, _ = answering(httpx.Response(404), httpx.Response(404), issuer=ISSUER)

    assert not (await refusal(provider)).retryable


async def test_discovery_that_failed_is_tried_again():
    provider, seen = answering(httpx.Response(500), metadata(), good(), issuer=ISSUER)
    await refusal(provider)

    await provider.fetch()

    assert len(seen) == 3


@pytest.mark.parametrize(
    "gone",
    [
        httpx.Response(404),
        httpx.Response(410, text="moved"),
        httpx.Response(308, headers={"Location": "https://elsewhere.example.com/t"}),
        httpx.Response(200, text="<html>"),
    ],
)
async def test_a_token_endpoint_that_has_moved_is_discovered_anew(gone):
    moved = metadata(token_endpoint="https://tokens.example.com/new")
    provider, seen = answering(metadata(), good(), gone, moved, good(), good(), issuer=ISSUER)
    await provider.fetch()

    await refusal(provider)
    for _ in range(2):
        await provider.fetch()

    assert [request.url.path for request in seen] == [
        "/tenant/.well-known/openid-configuration",
        *("/t", "/t"),
        "/tenant/.well-known/openid-configuration",
        *("/new", "/new"),
    ]


@pytest.mark.parametrize("trouble", [httpx.Response(503), httpx.Response(400, json={"error": "invalid_request"})])
async def test_what_an_endpoint_in_place_answers_does_not_have_it_discovered_anew(trouble):
    provider, seen = answering(metadata(), trouble, good(), issuer=ISSUER)
    await refusal(provider)

    await provider.fetch()

    assert len(seen) == 3


async def test_a_private_certificate_authority_is_trusted_through_the_client():
    authority = trustme.CA()
    served, trusted = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(served)
    authority.configure_trust(trusted)
    async with TokenIssuer({"ann": PASSWORD}, ssl_context=served) as issuer:
        trusting = OAuth2(issuer.url, http_client=lambda: httpx.AsyncClient(verify=trusted), **LOGIN)
        doubting = OAuth2(issuer.url, **LOGIN)

        credential, error = await trusting.fetch(), await refusal(doubting)
        await trusting.aclose()
        await doubting.aclose()

        assert issuer.verify("ann", credential.password) is None
        assert "CERTIFICATE_VERIFY_FAILED" in str(error)
        assert error.retryable


# Tokens, users, expiry


async def test_an_id_token_can_be_the_password(make, issuer, clock):
    issuer.answer["expires_in"] = 5  # That of the access token.
    provider = make(**LOGIN, client_id="app", scope="openid", use="id_token", user_claim="sub")

    credential = await provider.fetch()

    assert issuer.verify("ann", credential.password) is None
    assert credential.user == "ann"
    assert credential.expires_at == clock.after(300)


async def test_an_id_token_that_refreshing_does_not_renew_is_fetched_by_a_new_login(make, issuer):
    provider = make(**LOGIN, scope="openid", use="id_token")
    await provider.fetch()
    issuer.answer["id_token"] = None

    error = await refusal(provider)
    issuer.heal()
    await provider.fetch()

    assert not error.retryable
    assert "scope 'openid'" in str(error)
    assert issuer.requests == {"password": 2, "refresh_token": 2}
    assert issuer.replays == 0


async def test_the_user_can_be_fixed(make):
    assert (await make(**LOGIN, user="app_role").fetch()).user == "app_role"


@pytest.mark.parametrize("opaque", [True, False])
async def test_a_claim_that_is_not_there_is_an_error(make, issuer, opaque):
    issuer.opaque_access_tokens = opaque

    error = await refusal(make(**LOGIN, user_claim="email"))

    assert not error.retryable
    assert "no claim 'email'" in str(error)


@pytest.mark.parametrize(
    ("opaque", "expires_in", "seconds"),
    [
        (False, 300, 300),
        (False, 60, 60),
        (False, 86400, 300),
        (False, None, 300),
        (False, "never", 300),
        (True, 60, 60),
        (True, "60", 60),
        (True, 60.5, 60.5),
        (True, 0, 0),
        (True, -1, None),
        (True, None, None),
        (True, "never", None),
        (True, True, None),
        (True, "inf", None),
        (True, 1e12, None),
        (True, {}, None),
    ],
)
async def test_expiry_is_the_earlier_of_what_answer_and_token_say(make, issuer, clock, opaque, expires_in, seconds):
    issuer.opaque_access_tokens = opaque
    issuer.answer["expires_in"] = expires_in

    credential = await make(**LOGIN).fetch()

    assert credential.expires_at == (None if seconds is None else clock.after(seconds))


async def test_expires_in_counts_from_the_start_of_the_request(make, issuer, clock):
    issuer.opaque_access_tokens = True
    issuer.hang()
    asked_at = clock.after(0)
    fetch = asyncio.create_task(make(**LOGIN).fetch())
    await issuer.reached()
    clock.now += 100

    issuer.resume()

    assert (await fetch).expires_at == asked_at + timedelta(seconds=300)


async def test_a_slow_clock_does_not_cut_a_token_short(make, issuer, clock):
    issuer.clock_skew = 3600

    assert (await make(**LOGIN).fetch()).expires_at == clock.after(300)


@pytest.mark.parametrize("token", ["with\0nul", "", None, 5])
async def test_an_unusable_token_is_an_error_without_it(token):
    provider, _ = answering(httpx.Response(200, json={"access_token": token}))

    error = await refusal(provider)

    assert not error.retryable
    assert "with" not in str(error)


# Refresh tokens that are refused, expired or lost


async def test_a_refused_refresh_token_leads_to_one_new_login(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.fail_next("invalid_grant")

    credential = await provider.fetch()

    assert issuer.verify("ann", credential.password) is None
    assert issuer.requests == {"password": 2, "refresh_token": 1}


async def test_a_disabled_user_is_refused_for_good_and_let_in_when_enabled(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.users.disable("ann")

    error = await refusal(provider)
    issuer.users.enable("ann")
    credential = await provider.fetch()

    assert not error.retryable
    assert "invalid_grant" in str(error)
    assert "whether the user may still log in" in str(error)
    assert issuer.verify("ann", credential.password) is None
    assert issuer.replays == 0


async def test_a_refused_refresh_token_without_another_grant_needs_a_login(make, issuer):
    provider = make(refresh_token=await refresh_token_of(issuer))
    await provider.fetch()
    issuer.users.disable("ann")

    error = await refusal(provider)

    assert not error.retryable
    assert "a new login is needed" in str(error)


async def test_an_expired_refresh_token_is_not_even_tried(make, issuer, clock):
    issuer.refresh_lifetime = 600
    provider = make(**LOGIN)
    await provider.fetch()

    clock.now += 600
    await provider.fetch()

    assert issuer.requests == {"password": 2}


@pytest.mark.parametrize("member", ["refresh_expires_in", "refresh_token_expires_in"])
async def test_the_refresh_tokens_life_is_read_from_the_answer(make, issuer, clock, member):
    issuer.answer[member] = 60
    provider = make(**LOGIN)
    await provider.fetch()

    clock.now += 60
    await provider.fetch()

    assert issuer.requests == {"password": 2}


async def test_a_lost_answer_leads_to_a_new_login_and_never_to_a_replay(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.lose_response()

    await provider.fetch()
    await provider.fetch()

    assert issuer.requests == {"password": 2, "refresh_token": 2}
    assert issuer.replays == 0


@pytest.mark.parametrize("trouble", ["lost", "slow", "garbage"])
async def test_a_lost_answer_without_another_grant_needs_a_login_and_asks_no_more(make, issuer, trouble):
    # Long enough for a slow machine to connect in, since only what was sent can be spent.
    provider = make(refresh_token=await refresh_token_of(issuer), timeout=1.5)
    await provider.fetch()
    match trouble:
        case "lost":
            issuer.lose_response()
        case "slow":
            issuer.hang(after_exchange=True)
        case "garbage":
            issuer.garbage = True

    errors = [await refusal(provider)]
    issuer.heal()
    errors.append(await refusal(provider))

    assert [error.retryable for error in errors] == [False, False]
    assert all("was lost" in str(error) and "A new login is needed" in str(error) for error in errors)
    assert errors[0].__cause__ is not None
    assert issuer.requests == {"refresh_token": 2}
    assert issuer.replays == 0


@pytest.mark.parametrize("status", [502, 504])
async def test_a_refresh_token_is_not_sent_again_after_a_gateway_got_no_answer(make, issuer, status):
    provider = make(**LOGIN)
    alone = make(refresh_token=await refresh_token_of(issuer))
    await provider.fetch()
    issuer.fail_next(status=status)
    await provider.fetch()
    issuer.fail_next(status=status)

    error = await refusal(alone)

    assert not error.retryable
    assert f"HTTP {status}" in str(error.__cause__)
    assert issuer.requests == {"password": 2, "refresh_token": 2}


async def test_a_refresh_token_is_not_sent_again_after_the_client_broke_down():
    async def complain(response):
        await response.aread()
        response.raise_for_status()

    responses = iter([good(refresh_token="planted"), httpx.Response(400, json={"error": "invalid_grant"}), good()])
    seen = []

    def handle(request):
        seen.append(httpx.QueryParams(request.content.decode())["grant_type"])
        return next(responses)

    provider = OAuth2(
        token_url="https://login.example.com/token",
        http_client=lambda: httpx.AsyncClient(
            transport=httpx.MockTransport(handle), event_hooks={"response": [complain]}
        ),
        **LOGIN,
    )
    await provider.fetch()

    await provider.fetch()

    assert seen == ["password", "refresh_token", "password"]


@pytest.mark.parametrize("failure", [ValueError("a bug"), httpx.InvalidURL("odd")])
async def test_a_client_that_fails_is_named_and_shows_no_request(failure):
    provider, _ = answering(failure)

    error = await refusal(provider)

    assert error.retryable
    where = f"{type(failure).__name__} at test_oauth2.py:"
    assert f"the http_client failed at https://login.example.com/token ({where}" in str(error)


async def test_a_refresh_token_survives_an_issuer_that_cannot_be_reached(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    await issuer.go_down("refuse")

    error = await refusal(provider)
    await issuer.come_up()
    await provider.fetch()

    assert error.retryable
    assert "cannot be reached" in str(error)
    assert issuer.requests == {"password": 1, "refresh_token": 1}


async def test_a_refresh_token_is_not_sent_again_after_a_reset(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    await issuer.go_down("reset")

    error = await refusal(provider)
    await issuer.come_up()
    await provider.fetch()

    assert error.retryable
    assert "broke before the answer was complete" in str(error)
    assert issuer.requests == {"password": 2}


@pytest.mark.parametrize("code", ["temporarily_unavailable", "slow_down", None])
async def test_a_refresh_token_survives_an_issuer_in_trouble(make, issuer, code):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.fail_next(code, retry_after=3)

    error = await refusal(provider)
    await provider.fetch()

    assert (error.retryable, error.retry_after) == (True, 3)
    assert issuer.requests == {"password": 1, "refresh_token": 2}


async def test_a_refused_refresh_token_is_forgotten_even_if_no_new_one_comes(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.fail_next("invalid_grant")
    issuer.answer["refresh_token"] = None

    await provider.fetch()
    await provider.fetch()

    assert issuer.requests == {"password": 3, "refresh_token": 1}


async def test_a_wrong_client_secret_is_not_cured_by_a_login(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.fail_next("invalid_client")

    error = await refusal(provider)

    assert not error.retryable
    assert issuer.requests == {"password": 1, "refresh_token": 1}


# Errors


@pytest.mark.parametrize(
    ("code", "status", "retryable"),
    [
        ("invalid_client", None, False),
        ("invalid_grant", None, False),
        ("unauthorized_client", None, False),
        ("unsupported_grant_type", None, False),
        ("invalid_scope", None, False),
        ("invalid_request", None, False),
        ("access_denied", None, False),
        ("mfa_required", 403, False),
        ("temporarily_unavailable", None, True),
        ("server_error", None, True),
        ("slow_down", None, True),
        ("too_many_requests", 429, True),
        ("invalid_grant", 503, True),
        (None, 400, False),
        (None, 404, False),
        (None, 408, True),
        (None, 429, True),
        (None, 500, True),
        (None, 503, True),
    ],
)
async def test_refusals_for_good_are_told_from_troubles(make, issuer, code, status, retryable):
    issuer.fail_next(code, status=status, description="as it is")

    error = await refusal(make(**LOGIN))

    assert error.retryable is retryable
    assert issuer.token_url in str(error)
    if code is not None:
        assert f"{code}: as it is" in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        (" 5 ", 5),
        ("Fri, 15 Jan 2027 08:01:40 GMT", 100),
        ("Fri, 15 Jan 2027 08:01:40 -0000", 100),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0),
        ("soon", None),
        ("-1", None),
        ("", None),
        ("Fri, 99 Jan 2027 08:01:40 GMT", None),
        ("²", None),
    ],
)
async def test_retry_after_is_read_in_both_forms(clock, header, seconds):
    response = httpx.Response(429, headers=[(b"Retry-After", header.encode())])
    provider, _ = answering(response, clock=clock)

    assert (await refusal(provider)).retry_after == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"X-Rate-Limit-Reset": "1800000042"}, 42),  # Okta
        ({"X-RateLimit-Reset": "1800000042"}, 42),  # Auth0
        ({"X-RateLimit-Reset": "30"}, 30),  # others
        ({"X-Rate-Limit-Reset": "1799999990"}, 0),
        ({"X-Rate-Limit-Reset": "soon"}, None),
        ({"X-Rate-Limit-Reset": "soon", "X-RateLimit-Reset": "30"}, 30),
        ({"X-Rate-Limit-Reset": "1800000042", "Retry-After": "7"}, 7),
        ({"X-Rate-Limit-Reset": "1800000042", "Retry-After": "0"}, 0),
    ],
)
async def test_the_end_of_a_rate_limit_is_waited_for_where_there_is_no_retry_after(clock, headers, seconds):
    provider, _ = answering(httpx.Response(429, headers=headers), httpx.Response(503, headers=headers), clock=clock)

    assert (await refusal(provider)).retry_after == seconds
    # On other answers it is told how many requests are left, and nobody has to wait.
    assert (await refusal(provider)).retry_after == (headers.get("Retry-After") and seconds)


async def test_an_error_with_status_200_is_an_error():
    provider, _ = answering(httpx.Response(200, json={"error": "access_denied", "access_token": "x"}))

    assert not (await refusal(provider)).retryable


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"\xff", b"[" * 100_000, b'{"error": {"code": 5}}'])
async def test_garbage_is_a_trouble(body):
    provider, _ = answering(httpx.Response(200, content=body))

    error = await refusal(provider)

    assert error.retryable
    assert "no token response" in str(error)


async def test_secrets_do_not_follow_redirects():
    provider, seen = answering(httpx.Response(307, headers={"Location": "https://evil.example.com/token"}))

    error = await refusal(provider)

    assert not error.retryable
    assert "redirects" in str(error)
    assert len(seen) == 1


async def test_an_issuer_that_does_not_answer_is_a_timeout(make, issuer):
    issuer.hang()

    error = await refusal(make(**LOGIN, timeout=timedelta(seconds=0.1)))

    assert isinstance(error, ProviderTimeout)
    assert isinstance(error, TimeoutError)
    assert error.retryable
    assert "did not answer within 0.1 s" in str(error)


async def test_an_issuer_that_drips_is_a_timeout_too():
    class Dripping(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await asyncio.sleep(0.01)
                yield b" "

    provider, _ = answering(httpx.Response(200, stream=Dripping()), timeout=0.1)

    assert isinstance(await refusal(provider), ProviderTimeout)


@pytest.mark.parametrize("error", [httpx.ReadTimeout("late"), httpx.WriteTimeout("late")])
async def test_running_out_of_time_after_sending_does_not(error):
    provider, seen = answering(good(refresh_token="planted"), error, good(), **LOGIN)
    await provider.fetch()

    await provider.fetch()

    assert [httpx.QueryParams(request.content.decode())["grant_type"] for request in seen] == [
        "password",
        "refresh_token",
        "password",
    ]


@pytest.mark.parametrize("token", ["opaque", "a.b.c", "a.bbbb.c", "e30.e30.e30", "e30.W10.e30"])
async def test_a_user_is_read_from_nothing_but_a_token_that_names_one(token):
    provider, _ = answering(good(access_token=token), user_claim="sub")

    assert "no claim 'sub'" in str(await refusal(provider))


@pytest.mark.parametrize("error", [httpx.ConnectTimeout("late"), httpx.PoolTimeout("full")])
async def test_running_out_of_time_before_sending_keeps_the_refresh_token(error):
    provider, seen = answering(good(refresh_token="planted"), error, good(), **LOGIN)
    await provider.fetch()

    assert isinstance(await refusal(provider), ProviderTimeout)
    await provider.fetch()

    assert [httpx.QueryParams(request.content.decode())["grant_type"] for request in seen] == [
        "password",
        "refresh_token",
        "refresh_token",
    ]


# Storage


class BrokenStorage(MemoryStorage):
    """Can be made to refuse what comes of an exchange; the mark before it is taken."""

    broken = False

    async def save(self, key, tokens):
        if self.broken and not tokens.is_being_spent:
            raise OSError("disk full")
        await super().save(key, tokens)


async def test_a_new_refresh_token_is_stored_before_its_access_token_is_handed_out(make):
    events = []

    class WatchedStorage(MemoryStorage):
        async def save(self, key, tokens):
            await asyncio.sleep(0)
            events.append("stored")
            await super().save(key, tokens)

    provider = make(**LOGIN, storage=WatchedStorage())

    for _ in range(3):
        await provider.fetch()
        events.append("handed out")

    # A token that is good once is marked before it is sent.
    marked = "stored"
    assert events == ["stored", "handed out", *[marked, "stored", "handed out"] * 2]


async def test_a_storage_that_fails_to_save_does_not_lose_the_token(make, issuer, observer):
    storage = BrokenStorage()
    provider = make(**LOGIN, storage=storage)
    provider.report_to(observer)
    await provider.fetch()
    storage.broken = True
    for _ in range(3):
        await provider.fetch()
    complaints = observer.of(StorageFailed)
    storage.broken = False

    newest = await provider.fetch()
    shared = await make(**LOGIN, storage=storage).fetch()

    assert {(event.provider, event.action) for event in complaints} == {("oauth2", "save")}
    assert all("disk full" in event.message and "in memory alone" in event.message for event in complaints)
    assert len(complaints) == 3
    assert issuer.requests == {"password": 1, "refresh_token": 4}
    assert issuer.replays == 0
    assert shared.is_same_secret(newest)


async def test_a_storage_that_has_moved_on_comes_before_what_could_not_be_saved(make, issuer):
    storage = BrokenStorage()
    provider = make(**LOGIN, storage=storage, storage_key="key")
    storage.broken = True
    await provider.fetch()
    storage.broken = False
    await storage.save("key", StoredTokens(refresh_token=await refresh_token_of(issuer)))

    await provider.fetch()
    await provider.fetch()

    assert issuer.requests == {"refresh_token": 2}


@pytest.mark.parametrize("storage_key", [None, "service"])
async def test_a_new_login_is_not_shadowed_by_what_was_stored_of_the_last_one(make, issuer, storage_key):
    options = {"storage": MemoryStorage(), "storage_key": storage_key}
    old = make(refresh_token=await refresh_token_of(issuer), **options)
    await old.fetch()
    issuer.lose_response()
    await refusal(old)

    await make(refresh_token=await refresh_token_of(issuer), **options).fetch()

    assert issuer.replays == 0


# Cancellation, closing, forking, loops


class Stepping:
    """Awaits a coroutine and calls `at_step` with the number of each of its suspensions."""

    def __init__(self, coroutine, at_step):
        self._coroutine, self._at_step = coroutine, at_step

    def __await__(self):
        steps = 0
        resume, value = self._coroutine.send, None
        while True:
            try:
                future = resume(value)
            except StopIteration as stop:
                return stop.value
            steps += 1
            self._at_step(steps)
            try:
                value = yield future
                resume = self._coroutine.send
            except BaseException as error:  # noqa: BLE001
                resume, value = self._coroutine.throw, error


async def fetch_with(provider, at_step):
    """Fetch, calling `at_step` at each suspension of the exchange, in whatever task it runs."""
    loop = asyncio.get_running_loop()

    async def stepping(coroutine):
        return await Stepping(coroutine, at_step)

    def factory(loop, coroutine, **options):
        return asyncio.Task(stepping(coroutine), loop=loop, **options)

    async def outer():
        loop.set_task_factory(factory)
        return await provider.fetch()

    fetch = loop.create_task(outer())
    fetch.add_done_callback(lambda _: loop.set_task_factory(None))
    await asyncio.sleep(0)
    loop.set_task_factory(None)
    return fetch


async def count_suspensions(provider):
    steps = []
    await (await fetch_with(provider, steps.append))
    return len(steps)


class SlowStorage(MemoryStorage):
    async def load(self, key):
        await asyncio.sleep(0)
        return await super().load(key)

    async def save(self, key, tokens):
        await asyncio.sleep(0)
        await super().save(key, tokens)
        await asyncio.sleep(0)


async def test_a_fetch_cancelled_at_any_suspension_leaves_the_refresh_token_usable(make, issuer):
    provider = make(**LOGIN, storage=SlowStorage())
    await provider.fetch()
    await provider.aclose()
    suspensions = await count_suspensions(provider)
    cancelled = 0

    for step in range(1, suspensions + 1):
        await provider.aclose()
        victims = []
        fetch = await fetch_with(
            provider, lambda number, step=step, victims=victims: number == step and victims.pop().cancel()
        )
        victims.append(fetch)
        await asyncio.wait([fetch])
        cancelled += fetch.cancelled()
        await provider.fetch()

    assert suspensions > 10
    assert cancelled >= suspensions - 1  # The last one may come too late to matter.
    assert issuer.requests["password"] == 1
    assert issuer.replays == 0


async def test_closing_at_any_suspension_of_a_fetch_leaves_the_refresh_token_usable(make, issuer):
    provider = make(**LOGIN, storage=SlowStorage())
    await provider.fetch()
    await provider.aclose()
    suspensions = await count_suspensions(provider)
    loop = asyncio.get_running_loop()
    outcomes = set()

    for step in range(1, suspensions + 1):
        await provider.aclose()
        closing = []
        fetch = await fetch_with(
            provider,
            lambda number, step=step, closing=closing: (
                number == step and closing.append(loop.create_task(provider.aclose()))
            ),
        )
        await asyncio.wait([fetch])
        outcomes.add(type(fetch.exception()))
        await asyncio.wait(closing)
        await provider.fetch()

    assert suspensions > 10
    assert outcomes == {type(None), ProviderError}
    assert issuer.requests["password"] == 1
    assert issuer.replays == 0


async def test_the_exchange_of_a_cancelled_fetch_is_joined_by_the_next_one(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.hang(after_exchange=True)
    cancelled = asyncio.create_task(provider.fetch())
    await issuer.reached()
    cancelled.cancel()
    await asyncio.wait([cancelled])

    joined = asyncio.create_task(provider.fetch())
    await asyncio.sleep(0)
    issuer.resume()

    assert issuer.verify("ann", (await joined).password) is None
    assert cancelled.cancelled()
    assert issuer.requests == {"password": 1, "refresh_token": 1}


async def test_a_cancelled_fetch_that_fails_later_leaves_no_warning(make, issuer):
    provider = make(**LOGIN)
    issuer.hang(after_exchange=True)
    issuer.garbage = True
    fetch = asyncio.create_task(provider.fetch())
    await issuer.reached()
    fetch.cancel()
    await asyncio.wait([fetch])
    issuer.resume()

    await refusal(provider)


async def test_closing_waits_for_an_exchange_that_spends_a_refresh_token(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.hang(after_exchange=True)
    fetch = asyncio.create_task(provider.fetch())
    await issuer.reached()
    closing = asyncio.create_task(provider.aclose())
    await asyncio.sleep(0)
    assert not closing.done()

    issuer.resume()
    await closing

    assert issuer.verify("ann", (await fetch).password) is None


async def test_closing_cuts_a_login_short(make, issuer):
    provider = make(**LOGIN)
    issuer.hang()
    fetch = asyncio.create_task(provider.fetch())
    await issuer.reached()

    await provider.aclose()

    with pytest.raises(ProviderError, match="closed while it was fetching"):
        await fetch


async def test_it_can_be_used_again_after_closing_and_closed_twice(make, issuer):
    provider = make(**LOGIN)
    await provider.aclose()
    await provider.fetch()
    await provider.aclose()
    await provider.aclose()

    await provider.fetch()

    assert issuer.requests == {"password": 1, "refresh_token": 1}


async def test_one_client_is_made_for_life(make):
    made = []

    def client():
        made.append(httpx.AsyncClient())
        return made[-1]

    provider = make(**LOGIN, http_client=client)
    for _ in range(3):
        await provider.fetch()
    await provider.aclose()
    await provider.fetch()

    assert [used.is_closed for used in made] == [True, False]


async def test_a_forked_child_logs_in_for_itself(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()

    async def work():
        passwords = [(await provider.fetch()).password for _ in range(2)]
        await provider.aclose()
        return passwords

    passwords = await in_forked_child(work)
    await provider.fetch()

    assert [issuer.verify("ann", password) for password in passwords] == [None, None]
    assert issuer.requests == {"password": 2, "refresh_token": 2}
    assert issuer.replays == 0


async def test_a_forked_child_does_not_use_the_parents_only_refresh_token(make, issuer):
    provider = make(refresh_token=await refresh_token_of(issuer))

    async def work():
        try:
            await provider.fetch()
        except ProviderError as error:
            return [error.retryable, str(error)]
        return None

    retryable, message = await in_forked_child(work)
    await provider.fetch()

    assert not retryable
    assert "fork" in message
    assert issuer.requests == {"refresh_token": 1}


async def test_another_event_loop_gets_its_own_client(make, issuer):
    provider = make(**LOGIN)
    await provider.fetch()

    async def elsewhere():
        credential = await provider.fetch()
        await provider.aclose()
        return credential

    credential = await anyio.to_thread.run_sync(lambda: asyncio.run(elsewhere()))
    await provider.aclose()
    await provider.fetch()

    assert issuer.verify("ann", credential.password) is None
    assert issuer.requests == {"password": 1, "refresh_token": 2}


# Secrets


async def test_no_secret_shows_anywhere(make, issuer, caplog):
    caplog.set_level(logging.DEBUG)
    storage = BrokenStorage()
    provider = make(**LOGIN, client_id="app", client_secret=SECRET, storage=storage, storage_key="key")
    secrets, shown = {PASSWORD, SECRET}, []

    async def gather_secrets():
        secrets.add((await provider.fetch()).password)
        secrets.add((await storage.load("key")).refresh_token)

    async def gather_errors():
        error = await refusal(provider)
        shown.extend(traceback.format_exception(error))
        while error is not None:
            shown.extend([str(error), repr(error), repr(error.args)])
            error = error.__cause__ or error.__context__

    await gather_secrets()
    await gather_secrets()
    storage.broken = True
    await provider.fetch()
    storage.broken = False
    await gather_secrets()
    for code in ("invalid_client", "server_error"):
        quoted = " ".join([*secrets, "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ."])
        issuer.fail_next(code, description=quoted, times=1)
        await gather_errors()
        await gather_secrets()
    await issuer.go_down("refuse")
    await gather_errors()
    await issuer.go_down("reset")
    await gather_errors()
    await issuer.come_up()
    issuer.garbage = True
    await gather_errors()
    issuer.heal()
    issuer.users.disable("ann")
    await gather_errors()
    shown.extend([repr(provider), str(provider), repr(storage), caplog.text])
    shown.extend(repr(record.__dict__) for record in caplog.records)

    assert len(secrets) > 8
    text = "\n".join(shown)
    assert "[redacted]" in text
    assert [
        secret for secret in secrets if secret in text or httpx.QueryParams({"s": secret}).__str__()[2:] in text
    ] == []
    assert "eyJ" not in text


async def test_long_descriptions_are_cut():
    provider, _ = answering(httpx.Response(400, json={"error": "access_denied", "error_description": "x\n" * 5000}))

    message = str(await refusal(provider))

    assert len(message) < 600
    assert "\n" not in message


def test_it_cannot_be_pickled():
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(OAuth2("https://login.example.com", **LOGIN))


# Bad arguments

URL = "https://login.example.com/token"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({}, ValueError, "either issuer"),
        ({"issuer": URL, "token_url": URL, **LOGIN}, ValueError, "either issuer"),
        ({"token_url": "http://login.example.com/token", **LOGIN}, ValueError, "token_url must be https"),
        ({"issuer": "http://login.example.com", **LOGIN}, ValueError, "issuer must be https"),
        ({"token_url": "https://me:planted@login.example.com", **LOGIN}, ValueError, "must not contain a user"),
        ({"token_url": "login.example.com/token", **LOGIN}, ValueError, "must be a full URL"),
        ({"token_url": "ftp://login.example.com/token", **LOGIN}, ValueError, "must be a full URL"),
        ({"token_url": "https://login.example.com:port/", **LOGIN}, ValueError, "not a valid URL"),
        ({"token_url": URL + "#here", **LOGIN}, ValueError, "fragment"),
        ({"token_url": URL}, ValueError, "nothing to log in with"),
        ({"token_url": URL, "username": "ann"}, ValueError, "username and password belong together"),
        ({"token_url": URL, "password": "planted"}, ValueError, "username and password belong together"),
        ({"token_url": URL, "username": "ann", "password": ""}, ValueError, "password is empty"),
        ({"token_url": URL, "username": "ann", "password": b"planted"}, TypeError, "password must be a str, not bytes"),
        ({"token_url": URL, "client_secret": "planted"}, ValueError, "client_secret without client_id"),
        ({"token_url": URL, "client_auth": "basic", **LOGIN}, ValueError, "client_auth without client_secret"),
        ({"token_url": URL, "client_auth": "magic", **LOGIN}, ValueError, "client_auth must be"),
        ({"token_url": URL, "grant": "implicit", **LOGIN}, ValueError, "grant must be"),
        ({"token_url": URL, "grant": "password"}, ValueError, "needs username and password"),
        ({"token_url": URL, "grant": "refresh_token"}, ValueError, "needs refresh_token"),
        ({"token_url": URL, "grant": "client_credentials", **LOGIN}, ValueError, "no use for username"),
        ({"token_url": URL, "use": "cookie", **LOGIN}, ValueError, "use must be"),
        ({"token_url": URL, "user": "a", "user_claim": "b", **LOGIN}, ValueError, "either user or user_claim"),
        ({"token_url": URL, "extra": {"scope": "x"}, **LOGIN}, ValueError, "extra may not contain 'scope'"),
        ({"token_url": URL, "extra": {"n": 5}, **LOGIN}, TypeError, "extra must map str to str"),
        ({"token_url": URL, "timeout": 0, **LOGIN}, ValueError, "timeout must be more than zero"),
        ({"token_url": URL, "timeout": float("nan"), **LOGIN}, ValueError, "timeout must be more than zero"),
        ({"token_url": URL, "timeout": "10", **LOGIN}, TypeError, "timeout must be a number"),
        ({"token_url": URL, "storage": {}, **LOGIN}, TypeError, "storage must be a TokenStorage"),
        ({"token_url": URL, "http_client": 5, **LOGIN}, TypeError, "http_client must be a function"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, says):
    with pytest.raises(error, match=says) as caught:
        OAuth2(**arguments)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_plain_http_is_for_loopback(host):
    assert host in repr(OAuth2(token_url=f"http://{host}:8080/token", **LOGIN))


# CockroachDB


async def startup_parameters_of(connect):
    """Return what a client tells a server at startup."""
    told = asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
        length, _ = struct.unpack("!ii", await reader.readexactly(8))
        words = (await reader.readexactly(length - 8)).decode().rstrip("\0").split("\0")
        told.set_result(dict(zip(words[::2], words[1::2], strict=True)))
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await connect(f"postgresql://ann@127.0.0.1:{server.sockets[0].getsockname()[1]}/db?sslmode=disable")
        return await told
    finally:
        server.close()


OPTION = "--crdb:jwt_auth_enabled=true"


@pytest.mark.parametrize(
    ("in_url", "in_settings"), [("", OPTION), (f"&options={OPTION}", None), ("&options=--cluster%3Dx", OPTION)]
)
async def test_the_cockroachdb_option_reaches_the_server(make, in_url, in_settings):
    settings = {} if in_settings is None else {"server_settings": {"options": in_settings}}

    parameters = await startup_parameters_of(
        lambda dsn: asyncpool_creds.connect(dsn + in_url, credentials=make(**LOGIN), **settings)
    )

    assert parameters["options"] == OPTION
    assert parameters["user"] == "ann"


# The page, and the examples


PAGE = Path(__file__).parents[3] / "docs" / "providers" / "oauth2.md"
EXAMPLES = Path(__file__).parents[3] / "examples"


def recipe(heading, **names):
    """Return what the names of a recipe are after it was followed."""
    _, recipes = PAGE.read_text(encoding="utf-8").split("## Recipes\n")
    _, rest = recipes.split(f"### {heading}\n")
    code = rest.split("```python\n")[1].split("```")[0]
    exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
    return names


def vendor(issuer, token_path):
    """Return the function that makes an HTTP client which reaches one issuer alone, and the forms that it is sent."""
    forms = []

    def handle(request):
        if request.method == "POST" and str(request.url) == f"{httpx.URL(issuer).join(token_path)}":
            authorization = request.headers.get("Authorization")
            forms.append({**httpx.QueryParams(request.content.decode()), "Authorization": authorization})
            return good(id_token="identity", expires_in=60)
        if str(request.url) == f"{issuer.rstrip('/')}/.well-known/openid-configuration":
            endpoint = str(httpx.URL(issuer).join(token_path))
            return httpx.Response(200, json={"issuer": issuer, "token_endpoint": endpoint})
        raise AssertionError(request.url)

    return lambda: httpx.AsyncClient(transport=httpx.MockTransport(handle)), forms


OKTA = ("https://acme.okta.com/oauth2/default", "/oauth2/default/v1/token")
BY_OKTA = {
    "grant_type": "password",
    "username": "ann@acme.com",
    "password": "...",
    "Authorization": f"Basic {base64.b64encode(b'0oa1...:...').decode()}",
}
BY_CLIENT = {"grant_type": "client_credentials"}


@pytest.mark.parametrize(
    ("heading", "issuer", "form", "password", "user"),
    [
        ("Okta", OKTA, {**BY_OKTA, "scope": "openid offline_access"}, "opaque", "ann"),
        (
            "Auth0",
            ("https://acme.eu.auth0.com/", "/oauth/token"),
            {**BY_CLIENT, "audience": "https://db.acme.com", "Authorization": "Basic Li4uOi4uLg=="},
            "opaque",
            None,
        ),
        (
            "Keycloak",
            ("https://sso.example.com/realms/acme", "/realms/acme/protocol/openid-connect/token"),
            {**BY_CLIENT, "Authorization": "Basic YXBwOi4uLg=="},
            "opaque",
            "app",
        ),
        ("CockroachDB", OKTA, {**BY_OKTA, "scope": "openid email offline_access"}, "identity", None),
    ],
)
async def test_a_recipe_of_the_page_speaks_with_its_issuer(heading, issuer, form, password, user):
    http_client, forms = vendor(*issuer)
    pools = []

    names = recipe(
        heading,
        OAuth2=functools.partial(OAuth2, http_client=http_client),
        asyncpool_creds=SimpleNamespace(create_pool=lambda *_, **options: pools.append(options)),
    )
    credential = await names["credentials"].fetch()

    assert forms == [form]
    assert (credential.password, credential.user) == (password, user)
    settings = [{"options": "--crdb:jwt_auth_enabled=true"}] if heading == "CockroachDB" else []
    assert [options["server_settings"] for options in pools] == settings


async def test_a_workload_uses_its_own_token_as_the_page_says():
    http_client, forms = vendor("https://login.example.com", "/token")

    names = recipe(
        "A workload's own token",
        OAuth2=functools.partial(OAuth2, http_client=http_client),
        Path=lambda path: SimpleNamespace(read_text=lambda: f"what is in {path}"),
    )
    await names["by_assertion"].fetch()
    await names["by_exchange"].fetch()

    by_assertion, by_exchange = forms
    own = "what is in /var/run/secrets/tokens/issuer"
    assert (by_assertion["client_id"], by_assertion["client_assertion"]) == ("app", own)
    assert (by_exchange["subject_token"], by_exchange["audience"]) == (own, "postgresql")


async def test_the_cockroachdb_example_logs_in_with_an_id_token(monkeypatch):
    main = runpy.run_path(str(EXAMPLES / "cockroachdb_okta.py"))["main"]
    seen = []
    async with TokenIssuer({"ann": PASSWORD}, clients={"app": SECRET}) as issuer:

        async def serve(reader, writer):
            length, _ = struct.unpack("!ii", await reader.readexactly(8))
            startup = (await reader.readexactly(length - 8)).decode()
            writer.write(b"R" + struct.pack("!ii", 8, 3))
            _, length = struct.unpack("!ci", await reader.readexactly(5))
            token = (await reader.readexactly(length - 4)).decode().rstrip("\0")
            seen.append((f"options\0{OPTION}\0" in startup, issuer.verify("ann", token)))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("DATABASE_URL", f"postgresql://ann@127.0.0.1:{port}/defaultdb?sslmode=disable")
        monkeypatch.setenv("OKTA_ISSUER", issuer.url)
        monkeypatch.setenv("OKTA_CLIENT_ID", "app")
        monkeypatch.setenv("OKTA_CLIENT_SECRET", SECRET)
        monkeypatch.setenv("OKTA_USERNAME", "ann")
        monkeypatch.setenv("OKTA_PASSWORD", PASSWORD)
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await main()
        server.close()

    assert seen[0] == (True, None)


async def test_the_jwt_service_example_lives_through_its_tokens():
    main = runpy.run_path(str(EXAMPLES / "jwt_service.py"))["main"]

    counts = await main(lifetime=1.0, tokens=3)

    assert counts["served"] > 0
    assert [name for name in counts if name.startswith("failed")] == []
    assert (counts["logins"], counts["replays"], counts["refused connects"]) == (1, 0, 0)
    assert counts["exchanges"] >= 2
