"""Whatever an HTTP server answers, a source gives a credential or says what is wrong, and whose fault it is."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncpool_creds import Credential, ProviderError
from asyncpool_creds._provider import ask
from asyncpool_creds.providers.globus import Globus
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.providers.vault import AppRoleAuth, VaultDatabase, VaultKV, VaultStaticRole

ISSUER = "https://login.example.com"
NAMES = st.sampled_from(
    [
        *(
            "access_token",
            "id_token",
            "refresh_token",
            "expires_in",
            "refresh_expires_in",
            "error",
            "error_description",
        ),
        *("errors", "code", "detail", "auth", "data", "metadata", "client_token", "lease_duration", "lease_id"),
        *("renewable", "ttl", "creation_ttl", "expire_time", "num_uses", "username", "password", "deletion_time"),
        *("version", "created_time", "issuer", "token_endpoint", "token_endpoint_auth_methods_supported"),
        *("device_authorization_endpoint", "other_tokens", "resource_server", "scope", "token_type"),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=())),
    st.sampled_from(
        [
            *("token", "a\0b", "\ud800", ISSUER, f"{ISSUER}/token", "http://[::1%25.evil]/", "https://[", "x" * 70_000),
            *("eyJhbGciOiJub25lIn0.eyJleHAiOjFlNDAwfQ.x", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJcdTAwMDAifQ.x", "9" * 400),
        ]
    ),
)
VALUES = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(NAMES, part, max_size=8))
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=20).map(json.dumps).map(str.encode) | st.binary(max_size=200)
STATUSES = st.sampled_from([200, 200, 200, 204, 302, 400, 401, 403, 404, 412, 429, 472, 500, 502, 503])
HEADERS = st.dictionaries(
    st.sampled_from(["Retry-After", "X-Rate-Limit-Reset", "X-RateLimit-Reset"]),
    st.sampled_from(["1", "9" * 400, "-1", "nan", "Mon, 01 Jan 0001 00:00:00 +2359", "soon", ""]),
)

SOURCES = {
    "OAuth2": lambda client: OAuth2(
        token_url=f"{ISSUER}/token", client_id="app", client_secret="s", user_claim="sub", http_client=client
    ),
    "OAuth2 discovery": lambda client: OAuth2(
        ISSUER, client_id="app", username="ann", password="s", use="id_token", http_client=client
    ),
    "OAuth2 device": lambda client: OAuth2(ISSUER, client_id="app", prompt=lambda _: None, http_client=client),
    "Globus": lambda client: Globus("app", client_secret="s", scopes={"rs": "all"}, http_client=client).resource("rs"),
    "VaultKV": lambda client: VaultKV("db", address=ISSUER, auth="token", http_client=client),
    "VaultDatabase": lambda client: VaultDatabase(
        "app", address=ISSUER, auth=AppRoleAuth("role", secret_id="s"), http_client=client
    ),
    "VaultStaticRole": lambda client: VaultStaticRole("app", address=ISSUER, auth="token", http_client=client),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@given(answers=st.lists(st.tuples(STATUSES, HEADERS, DOCUMENTS), min_size=1, max_size=4))
def test_garbage_is_named_as_that_and_is_no_mistake_of_ours(make, answers):
    turn = iter(answers)

    def answer(_):
        status, headers, body = next(turn, answers[-1])
        return httpx.Response(status, headers=headers, content=body)

    async def fetch():
        source = make(lambda: httpx.AsyncClient(transport=httpx.MockTransport(answer)))
        async with asyncio.timeout(5.0):
            try:
                outcome = await ask(source)
            except ProviderError as error:
                outcome = error
        await source.aclose()
        return outcome

    outcome = asyncio.run(fetch())

    if not isinstance(outcome, Credential):
        assert "fetch() raised" not in str(outcome)
        assert len(str(outcome)) < 2000
        assert str(outcome).isprintable()
