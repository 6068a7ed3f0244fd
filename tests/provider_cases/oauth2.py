"""Tokens of an OAuth 2.0 issuer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support import secret

from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from asyncpool_creds.testing.postgres import PostgresServer
from provider_cases import Case, Life


@asynccontextmanager
async def oauth2_case() -> AsyncIterator[Case]:
    async with TokenIssuer({"ada": secret("ada")}, clients={"app": secret("app")}) as issuer:
        source = OAuth2(
            issuer.url, client_id="app", client_secret=secret("app"), username="ada", password=secret("ada"), user="ada"
        )

        async def heal() -> None:
            issuer.heal()
            await issuer.come_up()

        yield Case(source, issuer.go_down, issuer.hang, issuer.reached, heal)
        await source.aclose()


@asynccontextmanager
async def oauth2_life() -> AsyncIterator[Life]:
    async with PostgresServer() as server, TokenIssuer({"ada": secret("ada")}, access_lifetime=2) as issuer:
        await server.create_role("ada")
        async with TokenDoor(server, issuer.verify) as door:
            yield Life(door.dsn(user="ada"), OAuth2(issuer.url, username="ada", password=secret("ada")))


CASES = {"OAuth2": oauth2_case}
LIVES = {"OAuth2": oauth2_life}
