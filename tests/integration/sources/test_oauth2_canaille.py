"""The OAuth 2.0 provider against a server that is not ours: canaille, which is built on Authlib."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import httpx
import jwt
import pytest
from canaille_server import CanailleServer
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from support import secret

from asyncpool_creds import CredentialRefreshed, ProviderError, create_pool
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.storage import MemoryStorage
from asyncpool_creds.testing.door import TokenDoor

pytestmark = pytest.mark.anyio

LIFETIME = 3
LOGIN = {"username": "ann", "password": secret("password")}
CLIENT = {"client_id": "app", "client_secret": secret("client")}
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def canaille():
    key = ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True)
    with CanailleServer(
        user="ann", password=secret("password"), client_secret=secret("client"), client_key=key, lifetime=LIFETIME
    ) as server:
        yield server


@pytest.fixture
async def make(canaille):
    made = []

    def make(**options):
        provider = OAuth2(**{"issuer": canaille.url, **CLIENT, **options})
        made.append(provider)
        return provider

    yield make
    for provider in made:
        await provider.aclose()


@pytest.fixture
def keys(canaille):
    """The keys that the server publishes where its metadata says."""
    metadata = httpx.get(f"{canaille.url}/.well-known/openid-configuration").json()
    return jwt.PyJWKSet.from_dict(httpx.get(metadata["jwks_uri"]).json())


@pytest.fixture
def verify(canaille, keys):
    """Judge a token as a database does that knows the issuer's keys."""

    def verify(user, token):
        try:
            key = keys[jwt.get_unverified_header(token)["kid"]]
            claims = jwt.decode(token, key.key, algorithms=["RS256", "RS512"], audience="app", issuer=canaille.url)
        except (jwt.PyJWTError, KeyError) as error:
            return type(error).__name__
        return None if claims["sub"] == user else "subject"

    return verify


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


async def test_the_password_grant_gives_a_token_that_the_published_keys_prove(make, verify):
    before = datetime.now(UTC)

    credential = await make(**LOGIN, scope="openid", user_claim="sub").fetch()

    assert verify("ann", credential.password) is None
    assert credential.user == "ann"
    assert (
        before + timedelta(seconds=LIFETIME - 1)
        <= credential.expires_at
        <= datetime.now(UTC) + timedelta(seconds=LIFETIME)
    )


@pytest.fixture
def post(canaille):
    """Ask the server something as the client ``app``."""

    async def post(path, **form):
        async with httpx.AsyncClient(auth=("app", secret("client"))) as http:
            return (await http.post(f"{canaille.url}{path}", data=form)).json()

    return post


async def test_client_credentials_give_an_opaque_token_that_the_server_knows(make, post):
    credential = await make().fetch()

    answer = await post("/oauth/introspect", token=credential.password)
    assert answer["active"] is True
    assert answer["client_id"] == "app"
    assert abs(answer["exp"] - credential.expires_at.timestamp()) < 1


async def test_refresh_tokens_are_exchanged_one_after_another(make, post, verify):
    used = []

    class WatchedStorage(MemoryStorage):
        async def save(self, key, tokens):
            if tokens.is_being_spent:
                used.append(tokens.refresh_token)
            await super().save(key, tokens)

    provider = make(**LOGIN, storage=WatchedStorage())
    credentials = [await provider.fetch() for _ in range(5)]
    again = await post("/oauth/token", grant_type="refresh_token", refresh_token=used[-1])

    assert [verify("ann", credential.password) for credential in credentials] == [None] * 5
    assert len(set(used)) == 4
    assert again["error"] == "invalid_grant"


async def test_a_refresh_token_that_has_died_with_its_access_token_is_followed_by_a_login(make, verify):
    provider = make(**LOGIN)
    first = await provider.fetch()
    await asyncio.sleep(LIFETIME)

    second = await provider.fetch()

    assert verify("ann", first.password) == "ExpiredSignatureError"
    assert verify("ann", second.password) is None


async def test_a_pool_lives_through_the_tokens_of_a_door_that_checks_them(make, server, observer, verify):
    await server.create_role("ann")
    async with TokenDoor(server, verify) as door:
        pool = create_pool(
            door.dsn(user="ann"),
            credentials=make(**LOGIN),
            min_size=2,
            max_size=2,
            retire_when="rotated",
            on_event=observer,
        )
        async with pool:
            while len(observer.of(CredentialRefreshed)) < 3:
                assert await pool.fetchval("SELECT current_user") == "ann"
                await asyncio.sleep(0.02)

    assert door.refused == 0


async def test_a_client_proves_itself_by_signing(make, canaille):
    signed = []

    def sign():
        claims = {"iss": "signer", "sub": "signer", "aud": f"{canaille.url}/oauth/token", "exp": int(time.time()) + 60}
        signed.append(jwt.encode({**claims, "jti": str(len(signed))}, KEY, algorithm="ES256"))
        return signed[-1]

    provider = make(client_id="signer", client_secret=None, client_assertion=sign, user_claim="sub", **LOGIN)

    credentials = [await provider.fetch() for _ in range(2)]

    assert [credential.user for credential in credentials] == ["ann", "ann"]
    assert len(signed) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({**LOGIN, "password": secret("wrong")}, "invalid_request"),
        ({"client_secret": secret("wrong")}, "invalid_client"),
        ({**LOGIN, "client_id": "nobody"}, "invalid_client"),
        ({"refresh_token": secret("junk")}, "invalid_grant"),
    ],
)
async def test_what_the_server_refuses_is_refused_for_good(make, options, says):
    error = await refusal(make(**options))

    assert not error.retryable
    assert says in str(error)


async def test_an_identifier_that_is_not_the_servers_own_is_refused(make, canaille):
    error = await refusal(make(issuer=f"{canaille.url}/"))

    assert not error.retryable
    assert f"says that it is '{canaille.url}'" in str(error)
