"""Tokens of Globus Auth: of a person, whose refresh tokens are good once, and of a client by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from globus_auth import CLIENT, DATABASE, DATABASE_SCOPE, TRANSFER_SCOPE, GlobusAuth
from support import secret

from asyncpool_creds.providers.globus import Globus
from asyncpool_creds.testing.door import TokenDoor
from provider_cases import Case, Life, MakeCase, MakeLife, database

SERVICE = "2f2d7a7e-94f1-4a0e-8a3f-2c8a1a4f3b03"


async def of_a_person(auth: GlobusAuth) -> Globus:
    globus = Globus(CLIENT, url=auth.url)
    # Long over: the first fetch is an exchange.
    await globus.store(auth.log_in(TRANSFER_SCOPE, DATABASE_SCOPE, access_lifetime=0))
    return globus


async def of_a_client(auth: GlobusAuth) -> Globus:
    return Globus(SERVICE, client_secret=secret("service"), scopes={DATABASE: DATABASE_SCOPE}, url=auth.url)


def case(make: Callable[[GlobusAuth], Awaitable[Globus]]) -> MakeCase:
    @asynccontextmanager
    async def globus_case() -> AsyncIterator[Case]:
        async with GlobusAuth(clients={SERVICE: secret("service")}) as auth:
            globus = await make(auth)
            source = globus.resource(DATABASE)

            async def heal() -> None:
                auth.heal()
                await auth.come_up()

            yield Case(source, auth.go_down, auth.hang, auth.reached, heal)
            await source.aclose()
            await globus.aclose()

    return globus_case


def life(make: Callable[[GlobusAuth], Awaitable[Globus]]) -> MakeLife:
    @asynccontextmanager
    async def globus_life() -> AsyncIterator[Life]:
        server = database()
        await server.create_role("app")
        async with (
            GlobusAuth(1, clients={SERVICE: secret("service")}) as auth,
            TokenDoor(server, auth.verifier(DATABASE)) as door,
            await make(auth) as globus,
        ):
            yield Life(door.dsn(), globus.resource(DATABASE))

    return globus_life


CASES = {"Globus": case(of_a_person), "Globus client": case(of_a_client)}
LIVES = {"GlobusResource, person": life(of_a_person), "GlobusResource, client": life(of_a_client)}
