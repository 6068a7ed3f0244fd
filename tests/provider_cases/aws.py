"""Tokens, secrets and passwords of Amazon Web Services."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aws_stub import REGION, AwsStub, environment, static_key, web_identity
from support import secret

from asyncpool_creds.providers.aws import RDSIAM, AuroraDSQL, Redshift, SecretsManager
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.sigv4 import SigV4Verifier
from provider_cases import Case, Life, database

RDS_HOST = f"db.abc123.{REGION}.rds.amazonaws.com"
DSQL_HOST = f"abc123.dsql.{REGION}.on.aws"


def _case(source: RDSIAM | AuroraDSQL | SecretsManager | Redshift, stub: AwsStub, *, for_ever: bool = False) -> Case:
    return Case(source, stub.fail, stub.hang, stub.hangs, stub.heal, lives_for_ever=for_ever)


@asynccontextmanager
async def rds_case() -> AsyncIterator[Case]:
    stub = AwsStub()
    async with stub.running():
        with web_identity(stub):
            yield _case(RDSIAM(RDS_HOST, user="app"), stub)


@asynccontextmanager
async def dsql_case() -> AsyncIterator[Case]:
    stub = AwsStub()
    async with stub.running():
        with web_identity(stub):
            yield _case(AuroraDSQL(DSQL_HOST, "app"), stub)


@asynccontextmanager
async def secret_case() -> AsyncIterator[Case]:
    stub = AwsStub()
    stub.secret = {"SecretString": json.dumps({"username": "app", "password": secret()}), "VersionId": "v1"}
    async with stub.running():
        with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
            source = SecretsManager("db", region=REGION)
            yield _case(source, stub, for_ever=True)
            await source.aclose()


@asynccontextmanager
async def redshift_case() -> AsyncIterator[Case]:
    stub = AwsStub()
    async with stub.running():
        with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
            source = Redshift("cluster", user="app", region=REGION)
            yield _case(source, stub)
            await source.aclose()


@asynccontextmanager
async def container_life() -> AsyncIterator[Life]:
    """Tokens for a quarter of an hour, which die with the credentials of the container after a second and a half."""
    verifier = SigV4Verifier(region=REGION, host="127.0.0.1")
    stub = AwsStub(verifier, lifetime=1.5)
    server = database()
    await server.create_role("app")
    async with stub.running(), TokenDoor(server, verifier.verify) as door:
        verifier.port = door.port
        with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container"):
            yield Life(door.dsn(user="app"), RDSIAM(region=REGION))


@asynccontextmanager
async def web_identity_life() -> AsyncIterator[Life]:
    """The same with a role, which is assumed anew for every token, and Aurora DSQL."""
    verifier = SigV4Verifier("dsql", region=REGION, host="127.0.0.1")
    stub = AwsStub(verifier, lifetime=1.5)
    server = database()
    await server.create_role("app")
    async with stub.running(), TokenDoor(server, verifier.verify) as door:
        with web_identity(stub):
            yield Life(door.dsn(user="app"), AuroraDSQL(region=REGION))


@asynccontextmanager
async def dsql_life() -> AsyncIterator[Life]:
    verifier = SigV4Verifier("dsql", region=REGION, host="127.0.0.1")
    server = database()
    await server.create_role("admin")
    async with TokenDoor(server, verifier.verify) as door:
        with environment(**static_key(verifier)):
            yield Life(door.dsn(user="admin"), AuroraDSQL(region=REGION, token_lifetime=2))


@asynccontextmanager
async def secret_life() -> AsyncIterator[Life]:
    """A secret that is rotated between two users, as AWS's "alternating users" strategy does."""
    stub, numbers = AwsStub(), itertools.count(1)
    users = itertools.cycle(("app_clone", "app"))
    known = {"app": secret("0")}

    async def rotate() -> None:
        user, number = next(users), next(numbers)
        known[user] = secret(str(number))
        put(user, f"v{number}")

    def put(user: str, version: str) -> None:
        document = {"engine": "postgres", "username": user, "password": known[user]}
        stub.secret = {"SecretString": json.dumps(document), "VersionId": version}

    def verify(user: str, password: str) -> str | None:
        return None if known.get(user) == password else "not the user's password"

    put("app", "v0")
    server = database()
    await server.create_role("app")
    await server.create_role("app_clone")
    async with stub.running(), TokenDoor(server, verify) as door:
        with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
            yield Life(door.dsn(user="app"), SecretsManager("db", region=REGION), turn=rotate)


@asynccontextmanager
async def redshift_life() -> AsyncIterator[Life]:
    stub = AwsStub(lifetime=1.5)
    server = database()
    await server.create_role("IAM:app")
    async with stub.running(), TokenDoor(server, stub.verify_password) as door:
        with environment(AWS_ENDPOINT_URL=stub.url, **static_key()):
            yield Life(door.dsn(user="app"), Redshift("cluster", region=REGION))


CASES = {"RDSIAM": rds_case, "AuroraDSQL": dsql_case, "SecretsManager": secret_case, "Redshift": redshift_case}
LIVES = {
    "RDSIAM, container": container_life,
    "AuroraDSQL, web identity": web_identity_life,
    "AuroraDSQL, administrator": dsql_life,
    "SecretsManager": secret_life,
    "Redshift": redshift_life,
}
