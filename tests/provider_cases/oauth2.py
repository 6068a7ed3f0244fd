"""Tokens of an OAuth 2.0 issuer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from support import secret

from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from provider_cases import Case, Life, database

CLIENT = {"client_id": "app", "client_secret": secret("app")}


def password(issuer: TokenIssuer, cluster: TokenIssuer) -> dict[str, Any]:
    return {"username": "ada", "password": secret("ada")}


def device(issuer: TokenIssuer, cluster: TokenIssuer) -> dict[str, Any]:
    return {"prompt": lambda prompt: issuer.approve(prompt.user_code, "ada")}


def jwt_bearer(issuer: TokenIssuer, cluster: TokenIssuer) -> dict[str, Any]:
    return {"assertion": lambda: cluster.mint("ada", audience=issuer.url)}


def token_exchange(issuer: TokenIssuer, cluster: TokenIssuer) -> dict[str, Any]:
    return {"subject_token": lambda: cluster.mint("ada", audience=issuer.url)}


def case_of(
    login: Callable[[TokenIssuer, TokenIssuer], dict[str, Any]],
) -> Callable[[], AbstractAsyncContextManager[Case]]:
    """Return what makes the case of a grant; `login` makes its arguments."""

    @asynccontextmanager
    async def case() -> AsyncIterator[Case]:
        async with (
            TokenIssuer(algorithm="RS256") as cluster,
            TokenIssuer(
                {"ada": secret("ada")},
                clients={"app": secret("app")},
                trusted_issuers={cluster.url: cluster.public_key},
                device_interval=0.01,
            ) as issuer,
        ):
            source = OAuth2(issuer.url, user="ada", **CLIENT, **login(issuer, cluster))

            async def heal() -> None:
                issuer.heal()
                await issuer.come_up()

            yield Case(source, issuer.go_down, issuer.hang, issuer.reached, heal)
            await source.aclose()

    return case


@asynccontextmanager
async def oauth2_life() -> AsyncIterator[Life]:
    server = database()
    await server.create_role("ada")
    async with (
        TokenIssuer({"ada": secret("ada")}, access_lifetime=1) as issuer,
        TokenDoor(server, issuer.verify) as door,
    ):
        yield Life(door.dsn(user="ada"), OAuth2(issuer.url, username="ada", password=secret("ada")))


CASES = {
    "OAuth2": case_of(password),
    "OAuth2 device": case_of(device),
    "OAuth2 JWT bearer": case_of(jwt_bearer),
    "OAuth2 token exchange": case_of(token_exchange),
}
LIVES = {"OAuth2": oauth2_life}
