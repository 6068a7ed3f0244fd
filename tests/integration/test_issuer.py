"""The token issuer, over real HTTP."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime
from types import MappingProxyType

import httpx
import jwt
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import FakeClock

from asyncpool_creds.testing.issuer import TokenIssuer, UserStore

pytestmark = pytest.mark.anyio

LOGIN = {"grant_type": "password", "username": "ann", "password": "planted-password"}


def pem(private_key):
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return private_key.public_key().public_bytes(encoding, form).decode()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def issuer(clock):
    async with TokenIssuer({"ann": "planted-password"}, clock=clock) as running:
        yield running


@pytest.fixture
async def http():
    async with httpx.AsyncClient() as client:
        yield client


@pytest.fixture
def ask(issuer, http):
    async def ask(**form):
        return await http.post(issuer.token_url, data=form)

    return ask


async def test_a_login_gives_an_access_and_a_refresh_token(issuer, ask):
    answer = (await ask(**LOGIN)).json()

    assert answer["token_type"] == "Bearer"
    assert answer["expires_in"] == 300
    assert issuer.verify("ann", answer["access_token"]) is None
    assert "refresh_token" in answer
    assert "id_token" not in answer


async def test_an_id_token_comes_with_the_openid_scope_and_is_for_the_client(issuer, ask):
    answer = (await ask(**LOGIN, scope="openid offline_access", client_id="app")).json()

    assert answer["scope"] == "openid offline_access"
    assert jwt.decode(answer["id_token"], options={"verify_signature": False})["aud"] == "app"
    assert issuer.verify("ann", answer["id_token"]) is None


async def test_client_credentials_give_an_access_token_only(issuer, ask):
    answer = (await ask(grant_type="client_credentials", client_id="app")).json()

    assert issuer.verify("app", answer["access_token"]) is None
    assert "refresh_token" not in answer


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({}, "invalid_request"),
        ({"grant_type": "magic"}, "unsupported_grant_type"),
        ({"grant_type": "password", "username": "ann"}, "invalid_request"),
        ({**LOGIN, "password": "wrong"}, "invalid_grant"),
        ({**LOGIN, "username": "bob"}, "invalid_grant"),
        ({"grant_type": "refresh_token"}, "invalid_request"),
        ({"grant_type": "urn:ietf:params:oauth:grant-type:device_code"}, "invalid_request"),
        ({"grant_type": "refresh_token", "refresh_token": "junk"}, "invalid_grant"),
        ({"grant_type": "client_credentials"}, "unauthorized_client"),
        ({"grant_type": ["password", "password"]}, "invalid_request"),
    ],
)
async def test_a_wrong_request_is_answered_as_rfc_6749_says(ask, form, error):
    response = await ask(**form)

    assert response.status_code == 400
    assert response.json()["error"] == error
    assert response.headers["Cache-Control"] == "no-store"


async def test_refresh_tokens_are_good_once_and_reuse_revokes_the_family(issuer, ask):
    first = (await ask(**LOGIN)).json()["refresh_token"]
    second = (await ask(grant_type="refresh_token", refresh_token=first)).json()["refresh_token"]

    replay = await ask(grant_type="refresh_token", refresh_token=first)
    successor = await ask(grant_type="refresh_token", refresh_token=second)

    assert replay.json()["error"] == successor.json()["error"] == "invalid_grant"
    assert (issuer.replays, issuer.revoked_families) == (1, 1)


async def test_a_revoked_family_does_not_harm_another_login(issuer, ask):
    spent = (await ask(**LOGIN)).json()["refresh_token"]
    other = (await ask(**LOGIN)).json()["refresh_token"]
    await ask(grant_type="refresh_token", refresh_token=spent)
    await ask(grant_type="refresh_token", refresh_token=spent)

    assert (await ask(grant_type="refresh_token", refresh_token=other)).status_code == 200


async def test_refresh_tokens_can_be_made_reusable(issuer, ask):
    issuer.rotate_refresh_tokens = False
    token = (await ask(**LOGIN)).json()["refresh_token"]

    answers = [(await ask(grant_type="refresh_token", refresh_token=token)).json() for _ in range(3)]

    assert all("access_token" in answer and "refresh_token" not in answer for answer in answers)
    assert issuer.replays == 0


async def test_a_refresh_token_belongs_to_its_client(ask):
    token = (await ask(**LOGIN, client_id="app")).json()["refresh_token"]

    assert (await ask(grant_type="refresh_token", refresh_token=token, client_id="other")).status_code == 400


async def test_a_disabled_user_is_refused_at_login_and_refresh_until_enabled(issuer, ask):
    token = (await ask(**LOGIN)).json()["refresh_token"]

    issuer.users.disable("ann")
    refused = [await ask(**LOGIN), await ask(grant_type="refresh_token", refresh_token=token)]
    issuer.users.enable("ann")
    served = [await ask(grant_type="refresh_token", refresh_token=token), await ask(**LOGIN)]

    assert [response.json()["error"] for response in refused] == ["invalid_grant", "invalid_grant"]
    assert [response.status_code for response in served] == [200, 200]


async def test_an_expired_refresh_token_is_refused(issuer, ask, clock):
    issuer.refresh_lifetime = 60
    token = (await ask(**LOGIN)).json()["refresh_token"]

    clock.now += 60

    assert (await ask(grant_type="refresh_token", refresh_token=token)).json()["error"] == "invalid_grant"


@pytest.mark.parametrize("algorithm", ["ES256", "RS256"])
async def test_tokens_can_be_checked_with_the_published_keys(clock, http, algorithm):
    async with TokenIssuer(clock=clock, algorithm=algorithm) as issuer:
        issuer.rotate_key()
        token = issuer.mint("ann")

        keys = jwt.PyJWKSet.from_dict((await http.get(f"{issuer.url}/jwks.json")).json())
        key = keys[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(
            token, key, algorithms=[algorithm], audience="postgresql", issuer=issuer.url, options={"verify_iat": False}
        )

    assert claims["sub"] == "ann"
    assert len(keys.keys) == 2


@pytest.mark.parametrize("path", ["openid-configuration", "oauth-authorization-server"])
async def test_metadata_names_the_issuer_and_its_endpoint(issuer, http, path):
    metadata = (await http.get(f"{issuer.url}/.well-known/{path}")).json()

    assert metadata["issuer"] == issuer.url
    assert metadata["token_endpoint"] == issuer.token_url
    assert issuer.documents == {f"/.well-known/{path}": 1}


async def test_verify_says_why_a_token_is_no_good(issuer, ask, clock):
    answer = (await ask(**LOGIN)).json()
    good = issuer.mint("ann", lifetime=60)
    revoked = issuer.mint("ann")
    issuer.revoke(revoked)
    signed, _, _ = good.rpartition(".")
    _, _, other_signature = issuer.mint("ann").rpartition(".")
    async with TokenIssuer(clock=clock) as other:
        foreign = other.mint("ann")
    otherwise_signed = jwt.encode({"sub": "ann"}, "k" * 32, headers={"kid": jwt.get_unverified_header(good)["kid"]})

    reasons = {
        token: issuer.verify("ann", token)
        for token in (
            good,
            "junk",
            f"{signed}.A",
            f"{signed}.{other_signature}",
            otherwise_signed,
            answer["refresh_token"],
            foreign,
            issuer.mint("ann", audience="elsewhere"),
            issuer.mint("bob"),
            revoked,
        )
    }
    clock.now += 60

    assert list(reasons.values()) == [
        None,
        "malformed",
        "malformed",
        "signature",
        "malformed",
        "kind",
        "issuer",
        "audience",
        "subject",
        "revoked",
    ]
    assert issuer.verify("ann", good) == "expired"
    assert issuer.verify("ann", issuer.mint("ann", lifetime=-1)) == "expired"


async def test_only_the_issuers_own_tokens_can_be_revoked(issuer):
    with pytest.raises(ValueError, match="not one of this issuer's"):
        issuer.revoke("junk")


async def test_a_rotated_key_leaves_old_tokens_good_unless_it_is_dropped(issuer):
    token = issuer.mint("ann")

    issuer.rotate_key()
    after_rotation = issuer.verify("ann", token)
    issuer.rotate_key(keep_old=False)

    assert after_rotation is None
    assert issuer.verify("ann", token) == "signature"
    assert issuer.verify("ann", issuer.mint("ann")) is None


async def test_a_skewed_clock_makes_tokens_that_the_database_refuses(issuer):
    issuer.clock_skew = -3600

    assert issuer.verify("ann", issuer.mint("ann")) == "expired"


@pytest.mark.parametrize(
    ("clients", "auth", "form", "status"),
    [
        ({"app": "s: ecret+"}, ("app", "s%3A+ecret%2B"), {}, 200),
        ({"app": "secret"}, ("app", "wrong"), {}, 401),
        ({"app": "secret"}, None, {"client_id": "app", "client_secret": "secret"}, 200),
        ({"app": "secret"}, None, {"client_id": "app"}, 401),
        ({"app": "secret"}, None, {}, 401),
        ({"app": ""}, None, {"client_id": "app"}, 200),
        ({"app": "secret"}, ("app", "secret"), {"client_secret": "secret"}, 400),
    ],
)
async def test_clients_authenticate_by_header_or_form(http, clients, auth, form, status):
    async with TokenIssuer({"ann": "planted-password"}, clients=clients) as issuer:
        response = await http.post(issuer.token_url, data={**LOGIN, **form}, auth=auth)

    assert response.status_code == status
    assert ("WWW-Authenticate" in response.headers) is (status == 401 and auth is not None)


# Clients that sign


KEY = ec.generate_private_key(ec.SECP256R1())
CLIENT_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


@pytest.fixture
async def of_signers(clock):
    async with TokenIssuer(client_keys={"app": pem(KEY)}, clock=clock) as running:
        yield running


@pytest.fixture
def ask_signing(of_signers, http, clock):
    """Ask for a client's token with a signed assertion, in a way that is good but for `claims` and `form`."""

    async def ask_signing(*, key=KEY, form=MappingProxyType({}), claims=MappingProxyType({})):
        claims = {"iss": "app", "sub": "app", "aud": of_signers.token_url, "exp": clock.now + 60, "jti": "1", **claims}
        assertion = jwt.encode({name: value for name, value in claims.items() if value is not None}, key, "ES256")
        form = {"client_assertion_type": CLIENT_ASSERTION, "client_assertion": assertion, **form}
        return await http.post(of_signers.token_url, data={"grant_type": "client_credentials", **form})

    return ask_signing


@pytest.mark.parametrize(
    "good", [{}, {"claims": {"jti": None}}, {"form": {"client_id": "app"}}, {"claims": {"nbf": 1_800_000_000}}]
)
async def test_a_client_may_prove_itself_by_signing(ask_signing, good):
    response = await ask_signing(**good)

    assert response.status_code == 200
    assert jwt.decode(response.json()["access_token"], options={"verify_signature": False})["sub"] == "app"


@pytest.mark.parametrize(
    "bad",
    [
        {"key": ec.generate_private_key(ec.SECP256R1())},
        {"claims": {"iss": "other", "sub": "other"}},
        {"claims": {"sub": "other"}},
        {"claims": {"sub": None}},
        {"claims": {"aud": "https://elsewhere.example.com"}},
        {"claims": {"aud": None}},
        {"claims": {"exp": 1_800_000_000}},
        {"claims": {"exp": None}},
        {"claims": {"nbf": 1_800_000_001}},
        {"claims": {"nbf": "soon"}},
        {"form": {"client_assertion_type": "magic"}},
        {"form": {"client_assertion": "junk"}},
        {"form": {"client_id": "other"}},
    ],
)
async def test_a_client_that_signs_wrongly_is_an_invalid_client(ask_signing, bad):
    response = await ask_signing(**bad)

    assert response.status_code == 401
    assert response.json()["error"] == "invalid_client"


async def test_a_clients_assertion_is_good_once_unless_that_is_switched_off(of_signers, ask_signing):
    statuses = [(await ask_signing()).status_code for _ in range(2)]
    of_signers.one_time_assertions = False
    statuses.append((await ask_signing()).status_code)

    assert statuses == [200, 401, 200]


async def test_a_client_proves_itself_in_one_way(ask_signing):
    response = await ask_signing(form={"client_secret": "too"})

    assert response.json()["error"] == "invalid_request"


async def test_a_client_that_should_sign_cannot_do_without(http):
    async with TokenIssuer(client_keys={"app": pem(KEY)}) as issuer:
        response = await http.post(
            issuer.token_url, data={"grant_type": "client_credentials", "client_id": "app", "client_secret": ""}
        )

    assert response.json()["error"] == "invalid_client"


async def test_signing_can_be_disallowed(http, clock):
    methods = ["client_secret_basic"]
    async with TokenIssuer(client_keys={"app": pem(KEY)}, auth_methods=methods, clock=clock) as issuer:
        claims = {"iss": "app", "sub": "app", "aud": issuer.url, "exp": clock.now + 60}
        proof = {"client_assertion_type": CLIENT_ASSERTION, "client_assertion": jwt.encode(claims, KEY, "ES256")}
        response = await http.post(issuer.token_url, data={"grant_type": "client_credentials", **proof})

    assert response.json()["error"] == "invalid_client"


# Devices

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"


@pytest.fixture
def authorize_device(issuer, http):
    async def authorize_device(**form):
        return (await http.post(f"{issuer.url}/device_authorization", data=form)).json()

    return authorize_device


@pytest.fixture
def poll(ask, authorize_device):
    async def poll(device, **form):
        return (await ask(grant_type=DEVICE, device_code=device["device_code"], **form)).json()

    return poll


async def test_a_device_gets_codes(issuer, authorize_device, http):
    answer = await authorize_device(scope="openid")
    metadata = (await http.get(f"{issuer.url}/.well-known/openid-configuration")).json()

    assert metadata["device_authorization_endpoint"] == f"{issuer.url}/device_authorization"
    assert DEVICE in metadata["grant_types_supported"]
    assert (answer["expires_in"], answer["interval"]) == (600, 5)
    assert answer["user_code"] in answer["verification_uri_complete"]
    assert answer["verification_uri_complete"].startswith(answer["verification_uri"])
    assert issuer.documents["/device_authorization"] == 1


async def test_a_device_waits_for_its_user_and_gets_tokens_then(issuer, ask, authorize_device, poll, clock):
    device = await authorize_device(scope="openid")
    pending = await poll(device)
    issuer.approve(device["user_code"], "ann")
    clock.now += 5

    answer = await poll(device)
    refreshed = (await ask(grant_type="refresh_token", refresh_token=answer["refresh_token"])).json()

    assert pending["error"] == "authorization_pending"
    assert issuer.verify("ann", answer["access_token"]) is None
    assert issuer.verify("ann", answer["id_token"]) is None
    assert issuer.verify("ann", refreshed["access_token"]) is None
    assert (await poll(device))["error"] == "invalid_grant"


async def test_a_device_that_asks_too_often_has_to_slow_down(issuer, authorize_device, poll, clock):
    issuer.device_interval = 2
    device = await authorize_device()
    await poll(device)
    issuer.approve(device["user_code"], "ann")

    errors = []
    for seconds in (1.9, 6.9, 12):
        clock.now += seconds
        errors.append((await poll(device)).get("error"))

    assert errors == ["slow_down", "slow_down", None]


async def test_a_login_at_a_device_can_be_denied(issuer, authorize_device, poll):
    device = await authorize_device()

    issuer.deny(device["user_code"])

    assert (await poll(device))["error"] == "access_denied"


async def test_a_code_of_a_device_ends(issuer, authorize_device, poll, clock):
    issuer.device_lifetime = 60
    device = await authorize_device()

    clock.now += 60

    assert (await poll(device))["error"] == "expired_token"
    with pytest.raises(LookupError, match="no device"):
        issuer.approve(device["user_code"], "ann")


async def test_a_code_belongs_to_the_client_it_was_given_to(issuer, authorize_device, poll):
    device = await authorize_device(client_id="app")
    issuer.approve(device["user_code"], "ann")

    assert (await poll(device, client_id="other"))["error"] == "invalid_grant"
    assert "access_token" in await poll(device, client_id="app")


async def test_only_who_may_log_in_is_let_in_at_a_device(issuer, authorize_device):
    device = await authorize_device()

    with pytest.raises(LookupError, match="no user 'bob'"):
        issuer.approve(device["user_code"], "bob")
    with pytest.raises(LookupError, match="no device"):
        issuer.deny("junk")


async def test_only_clients_that_are_known_get_codes_for_devices(http):
    async with TokenIssuer(clients={"app": ""}) as issuer:
        response = await http.post(f"{issuer.url}/device_authorization", data={"client_id": "other"})

    assert response.status_code == 401
    assert response.json()["error"] == "invalid_client"


# Assertions, and tokens in exchange for others

BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"


@pytest.fixture
async def cluster(clock):
    """Somebody whose tokens the trusting issuer takes: a Kubernetes cluster, say."""
    async with TokenIssuer(clock=clock, algorithm="RS256") as running:
        running.rotate_key()  # else it would have the key of every other issuer
        yield running


@pytest.fixture
async def trusting(clock, cluster):
    trusted = {cluster.url: cluster.public_key}
    async with TokenIssuer({"ann": "planted-password"}, trusted_issuers=trusted, clock=clock) as running:
        yield running


@pytest.fixture
def bear(trusting, http):
    async def bear(assertion, **form):
        return (await http.post(trusting.token_url, data={"grant_type": BEARER, "assertion": assertion, **form})).json()

    return bear


@pytest.fixture
def trade(trusting, http):
    async def trade(token, kind="jwt", **form):
        form = {"grant_type": EXCHANGE, "subject_token": token, "subject_token_type": TOKEN_TYPE + kind, **form}
        return (await http.post(trusting.token_url, data=form)).json()

    return trade


async def test_an_assertion_of_somebody_trusted_gives_an_access_token(trusting, cluster, bear):
    answer = await bear(cluster.mint("worker", audience=trusting.url), scope="openid")

    assert trusting.verify("worker", answer["access_token"]) is None
    assert trusting.verify("worker", answer["id_token"]) is None
    assert "refresh_token" not in answer
    assert trusting.requests == {BEARER: 1}


async def test_an_assertion_is_good_once_and_for_its_audience_and_while_it_lasts(trusting, cluster, bear):
    used = cluster.mint("worker", audience=trusting.token_url)
    await bear(used)
    cluster.rotate_key()

    answers = [
        await bear(assertion)
        for assertion in (
            used,
            cluster.mint("worker", audience=trusting.url),  # with a key that is not trusted
            cluster.mint("worker", audience="elsewhere"),
            trusting.mint("worker", audience=trusting.url),
            "junk",
        )
    ]

    assert [answer["error"] for answer in answers] == ["invalid_grant"] * 5


async def test_an_expired_assertion_is_refused(trusting, cluster, bear):
    assert (await bear(cluster.mint("worker", audience=trusting.url, lifetime=-1)))["error"] == "invalid_grant"


async def test_an_assertion_may_be_used_again_if_that_is_switched_on(trusting, cluster, bear):
    trusting.one_time_assertions = False
    assertion = cluster.mint("worker", audience=trusting.url)

    answers = [await bear(assertion) for _ in range(2)]

    assert all("access_token" in answer for answer in answers)


@pytest.mark.parametrize("grant", [BEARER, EXCHANGE])
async def test_the_token_itself_is_required(trusting, http, grant):
    response = await http.post(trusting.token_url, data={"grant_type": grant})

    assert response.json()["error"] == "invalid_request"


async def test_a_disabled_user_is_refused_whoever_speaks_for_him(trusting, cluster, bear, trade):
    trusting.users.disable("ann")
    token = cluster.mint("ann", audience=trusting.url)

    assert (await bear(token))["error"] == "invalid_grant"
    assert (await trade(token))["error"] == "invalid_request"


async def test_a_token_is_exchanged_for_one_with_another_audience(trusting, cluster, trade):
    answer = await trade(cluster.mint("worker"), audience="database")
    claims = jwt.decode(answer["access_token"], options={"verify_signature": False})

    assert answer["issued_token_type"] == f"{TOKEN_TYPE}access_token"
    assert (claims["iss"], claims["sub"], claims["aud"]) == (trusting.url, "worker", "database")
    assert "refresh_token" not in answer


@pytest.mark.parametrize("opaque", [False, True])
async def test_the_issuers_own_tokens_can_be_exchanged(trusting, http, trade, opaque):
    trusting.opaque_access_tokens = opaque
    token = (await http.post(trusting.token_url, data=LOGIN)).json()["access_token"]
    answer = await trade(token, "access_token")

    trusting.revoke(token)

    assert trusting.verify("ann", answer["access_token"]) is None
    assert (await trade(token, "access_token"))["error"] == "invalid_request"


@pytest.mark.parametrize(
    "form",
    [
        {"subject_token_type": "magic"},
        {"subject_token": "junk"},
        {"requested_token_type": f"{TOKEN_TYPE}saml2"},
        {"actor_token": "somebody"},
    ],
)
async def test_an_exchange_that_is_not_offered_is_an_invalid_request(cluster, trade, form):
    answer = await trade(cluster.mint("worker"), **form)

    assert answer["error"] == "invalid_request"


async def test_an_unreadable_authorization_header_is_an_invalid_client(issuer, http):
    response = await http.post(issuer.token_url, data=LOGIN, headers={"Authorization": "Basic %%%"})

    assert response.json()["error"] == "invalid_client"


async def test_a_client_may_only_use_the_methods_that_are_allowed(http):
    async with TokenIssuer(clients={"app": "secret"}, auth_methods=["client_secret_post"]) as issuer:
        by_header = await http.post(issuer.token_url, data={"grant_type": "client_credentials"}, auth=("app", "secret"))

    assert by_header.json()["error"] == "invalid_client"


async def test_a_public_client_has_no_credentials_of_its_own(http):
    async with TokenIssuer(clients={"app": ""}) as issuer:
        response = await http.post(issuer.token_url, data={"grant_type": "client_credentials", "client_id": "app"})

    assert response.json()["error"] == "unauthorized_client"


async def test_scripted_failures_come_in_order_and_then_end(issuer, ask):
    issuer.fail_next("slow_down", description="hold on", retry_after=7)
    issuer.fail_next(status=502, times=2)
    issuer.fail_next("server_error", retry_after=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))
    issuer.fail_next(status=429, retry_after="soon")

    responses = [await ask(**LOGIN) for _ in range(6)]

    assert [response.status_code for response in responses] == [400, 502, 502, 500, 429, 200]
    assert responses[0].json() == {"error": "slow_down", "error_description": "hold on"}
    assert [responses[index].headers["Retry-After"] for index in (0, 3, 4)] == [
        "7",
        "Wed, 02 Jan 2030 03:04:05 GMT",
        "soon",
    ]


async def test_heal_switches_troubles_off(issuer, ask):
    issuer.fail_next("server_error", times=None)
    assert [(await ask(**LOGIN)).status_code for _ in range(3)] == [500, 500, 500]
    issuer.garbage = issuer.opaque_access_tokens = True
    issuer.delay = 3600
    issuer.lose_response(5)
    issuer.answer["expires_in"] = None

    issuer.heal()

    assert issuer.verify("ann", (await ask(**LOGIN)).json()["access_token"]) is None


async def test_an_answer_can_be_changed_member_by_member(issuer, ask):
    issuer.answer.update(expires_in="60", refresh_token=None)

    answer = (await ask(**LOGIN)).json()

    assert answer["expires_in"] == "60"
    assert "refresh_token" not in answer


async def test_opaque_tokens_can_be_verified_too(issuer, ask):
    issuer.opaque_access_tokens = True

    token = (await ask(**LOGIN)).json()["access_token"]

    assert "." not in token
    assert issuer.verify("ann", token) is None
    issuer.revoke(token)
    assert issuer.verify("ann", token) == "revoked"


async def test_garbage_is_no_json(issuer, ask):
    issuer.garbage = True

    response = await ask(**LOGIN)

    assert response.status_code == 200
    with pytest.raises(ValueError, match="Expecting value"):
        response.json()


async def test_a_refusing_outage_ends_on_the_same_port(issuer, http):
    await issuer.go_down("refuse")
    async with httpx.AsyncClient() as fresh:
        with pytest.raises(httpx.ConnectError):
            await fresh.post(issuer.token_url, data=LOGIN)

    await issuer.come_up()

    assert (await http.post(issuer.token_url, data=LOGIN)).status_code == 200


async def test_a_resetting_outage_accepts_and_cuts(issuer, ask):
    assert (await ask(**LOGIN)).status_code == 200
    await issuer.go_down("reset")
    for _ in range(2):
        with pytest.raises(httpx.ReadError):
            await ask(**LOGIN)

    await issuer.come_up()

    assert (await ask(**LOGIN)).status_code == 200
    assert issuer.fetches == 2


async def test_a_lost_response_is_an_exchange_all_the_same(issuer, ask):
    token = (await ask(**LOGIN)).json()["refresh_token"]
    issuer.lose_response()

    with pytest.raises(httpx.ReadError):
        await ask(grant_type="refresh_token", refresh_token=token)
    again = await ask(grant_type="refresh_token", refresh_token=token)

    assert again.json()["error"] == "invalid_grant"
    assert issuer.replays == 1


@pytest.mark.parametrize("after_exchange", [False, True])
async def test_a_hanging_request_is_answered_on_resume(issuer, ask, after_exchange):
    issuer.hang(after_exchange=after_exchange)
    requests = [asyncio.create_task(ask(**LOGIN)) for _ in range(3)]
    await issuer.reached(3)
    assert not any(request.done() for request in requests)

    issuer.resume()

    assert [(await request).status_code for request in requests] == [200, 200, 200]


async def test_closing_abandons_requests_that_hang_or_are_delayed(http):
    before = asyncio.all_tasks()
    async with TokenIssuer({"ann": "planted-password"}) as issuer:
        issuer.delay = 3600
        delayed = asyncio.create_task(http.post(issuer.token_url, data=LOGIN))
        await issuer.reached()
        issuer.delay = 0.0
        issuer.hang()
        hanging = asyncio.create_task(http.post(issuer.token_url, data=LOGIN))
        await issuer.reached(2)

    answers = await asyncio.gather(delayed, hanging, return_exceptions=True)

    assert all(isinstance(answer, (httpx.Response, httpx.TransportError)) for answer in answers)
    assert asyncio.all_tasks() == before


async def test_requests_are_counted_by_grant(issuer, ask):
    token = (await ask(**LOGIN)).json()["refresh_token"]
    await ask(grant_type="refresh_token", refresh_token=token)
    await ask(**LOGIN)

    assert issuer.requests == {"password": 2, "refresh_token": 1}
    assert issuer.fetches == 3


async def test_it_can_serve_https(http):
    authority = trustme.CA()
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(served)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)

    async with TokenIssuer({"ann": "planted-password"}, ssl_context=served) as issuer:
        async with httpx.AsyncClient(verify=trusted) as client:
            answer = (await client.post(issuer.token_url, data=LOGIN)).json()

        assert issuer.url.startswith("https://127.0.0.1:")
        assert issuer.verify("ann", answer["access_token"]) is None


async def test_no_secret_shows_in_a_repr(issuer):
    issuer.users.add("bob", "planted-too")

    assert "planted" not in repr(issuer) + repr(issuer.users)


async def test_it_starts_once_and_closes_any_number_of_times():
    issuer = TokenIssuer()
    with pytest.raises(RuntimeError, match="not started"):
        issuer.url  # noqa: B018
    with pytest.raises(RuntimeError, match="not running"):
        await issuer.go_down()

    await issuer.start()
    with pytest.raises(RuntimeError, match="started already"):
        await issuer.start()
    await issuer.aclose()
    await issuer.aclose()

    assert "stopped" in repr(issuer)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"algorithm": "HS256"}, "algorithm"),
        ({"device_lifetime": 0}, "device_lifetime"),
        ({"device_interval": -1}, "device_interval"),
        ({"client_keys": {"app": "no key"}}, "client_keys"),
        ({"trusted_issuers": {"cluster": pem(ec.generate_private_key(ec.SECP384R1()))}}, "trusted_issuers"),
        ({"auth_methods": ["magic"]}, "auth_methods"),
        ({"auth_methods": "none"}, "auth_methods"),
        ({"access_lifetime": 0}, "access_lifetime"),
        ({"refresh_lifetime": float("nan")}, "refresh_lifetime"),
        ({"users": {"": "x"}}, "user and password"),
        ({"ssl_context": True}, "ssl_context"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, names):
    with pytest.raises((TypeError, ValueError), match=names):
        TokenIssuer(**arguments)


async def test_wrong_troubles_are_refused_by_name(issuer):
    with pytest.raises(ValueError, match="times"):
        issuer.fail_next(times=0)
    with pytest.raises(ValueError, match="how"):
        await issuer.go_down("explode")


def test_only_known_users_can_be_disabled():
    users = UserStore({"ann": "one"})
    users.add("ann", "two")

    with pytest.raises(LookupError, match="no user 'bob'"):
        users.disable("bob")
    assert not users.check("ann", "one")
    assert users.check("ann", "two")
    assert not users.check("bob", "")
