"""A source that never works here, and behind it one that does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support import secret

from asyncpool_creds.providers.chain import Chain
from asyncpool_creds.providers.env import Environment
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from provider_cases import Case, Life, database
from provider_cases.core import function_case


@asynccontextmanager
async def chain_case() -> AsyncIterator[Case]:
    async with function_case() as behind:
        source = Chain(Environment("A_VARIABLE_NOBODY_SETS"), behind.source)
        yield Case(source, behind.fail, behind.hang, behind.hangs, behind.heal)


@asynccontextmanager
async def chain_life() -> AsyncIterator[Life]:
    server = database()
    await server.create_role("ada")
    async with (
        TokenIssuer({"ada": secret("ada")}, access_lifetime=1) as issuer,
        TokenDoor(server, issuer.verify) as door,
    ):
        issuer_tokens = OAuth2(issuer.url, username="ada", password=secret("ada"))
        yield Life(door.dsn(user="ada"), Chain(Environment("A_VARIABLE_NOBODY_SETS"), issuer_tokens))


CASES = {"Chain": chain_case}
LIVES = {"Chain": chain_life}
