"""Google Cloud IAM tokens, by google-auth itself, from a token endpoint and a metadata server on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from google.oauth2 import service_account
from metadata_stubs import Answer, MetadataStub, google_environment, key_of_service_account

from asyncpool_creds.providers.gcp import CloudSQLIAM
from asyncpool_creds.testing.door import TokenDoor
from provider_cases import Case, Life, database


@asynccontextmanager
async def cloud_sql_case() -> AsyncIterator[Case]:
    with MetadataStub() as stub:
        key = key_of_service_account(stub)
        source = CloudSQLIAM(service_account.Credentials.from_service_account_info(key))

        async def fail() -> None:
            stub.answer = Answer(500)

        async def heal() -> None:
            stub.heal()

        yield Case(source, fail, stub.hang, stub.reached, heal)


@asynccontextmanager
async def cloud_sql_life() -> AsyncIterator[Life]:
    server = database()
    await server.create_role("app@project.iam")
    with MetadataStub(lifetime=1) as stub, google_environment(stub):
        async with TokenDoor(server, stub.verify) as door:
            yield Life(door.dsn(), CloudSQLIAM())


CASES = {"CloudSQLIAM": cloud_sql_case}
LIVES = {"CloudSQLIAM": cloud_sql_life}
