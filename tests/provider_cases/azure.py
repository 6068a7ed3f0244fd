"""Microsoft Entra tokens, by azure-identity itself, from a metadata endpoint on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from metadata_stubs import Answer, MetadataStub, app_service, azure_environment, virtual_machine

from asyncpool_creds.providers.azure import Entra
from asyncpool_creds.testing.door import TokenDoor
from provider_cases import Case, Life, database


@asynccontextmanager
async def entra_case() -> AsyncIterator[Case]:
    with MetadataStub() as stub, azure_environment(**app_service(stub)):
        source = Entra()

        async def fail() -> None:
            stub.answer = Answer(500)

        async def heal() -> None:
            stub.heal()

        yield Case(source, fail, stub.hang, stub.reached, heal)
        await source.aclose()


@asynccontextmanager
async def entra_life() -> AsyncIterator[Life]:
    name = "/subscriptions/1/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/ada"
    server = database()
    await server.create_role("ada")
    # The end is stated in whole seconds: a token lives for one at least.
    with MetadataStub(lifetime=2, claims={"xms_mirid": name}) as stub, azure_environment(**virtual_machine(stub)):
        async with TokenDoor(server, stub.verify) as door:
            yield Life(door.dsn(), Entra())


CASES = {"Entra": entra_case}
LIVES = {"Entra": entra_life}
