"""The examples of AWS run, in a container with a role."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from aws_stub import REGION, AwsStub, environment
from processes import run_example
from support import secret

from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer
from asyncpool_creds.testing.sigv4 import SigV4Verifier

pytestmark = pytest.mark.anyio


async def run(example: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return await run_example(example, {**os.environ, **variables})


async def test_the_rds_example_runs() -> None:
    verifier = SigV4Verifier(region=REGION, host="127.0.0.1")
    stub = AwsStub(verifier, lifetime=3600)
    async with PostgresServer() as server, stub.running(), TokenDoor(server, verifier.verify) as door:
        await server.create_role("app")
        verifier.port = door.port
        with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container", AWS_DEFAULT_REGION=REGION):
            done = await run("aws_rds_iam.py", DATABASE_URL=door.dsn(user="app"))

    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "connected as app"
    assert 890 < int(second.rpartition(" ")[2]) <= 900


async def test_the_dsql_example_runs() -> None:
    verifier = SigV4Verifier("dsql", region=REGION, host="127.0.0.1")
    stub = AwsStub(verifier, lifetime=3600)
    async with PostgresServer() as server, stub.running(), TokenDoor(server, verifier.verify) as door:
        await server.create_role("app")
        with environment(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{stub.url}/container", AWS_DEFAULT_REGION=REGION):
            done = await run("aws_dsql.py", DATABASE_URL=door.dsn(user="app"))

    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "connected as app"
    assert second in {"minutes until it is replaced: 54", "minutes until it is replaced: 55"}


async def test_the_redshift_example_runs() -> None:
    stub = AwsStub(lifetime=900)
    async with PostgresServer() as server, stub.running(), TokenDoor(server, stub.verify_password) as door:
        await server.create_role("IAM:app")
        variables = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{stub.url}/container",
            "AWS_ENDPOINT_URL_REDSHIFT": stub.url,
            "AWS_DEFAULT_REGION": REGION,
        }
        with environment(**variables):
            done = await run("aws_redshift.py", DATABASE_URL=door.dsn(user="app"), CLUSTER="sales")

    assert done.stderr == ""
    assert done.stdout == "connected as IAM:app\n"


async def test_the_secrets_manager_example_runs() -> None:
    stub = AwsStub(lifetime=3600)
    document = {"username": "app", "password": secret()}
    stub.secret = {"SecretString": json.dumps(document), "VersionId": "v1"}
    async with (
        PostgresServer() as server,
        stub.running(),
        TokenDoor(server, lambda user, password: None if password == document["password"] else "no") as door,
    ):
        await server.create_role("app")
        variables = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{stub.url}/container",
            "AWS_ENDPOINT_URL_SECRETS_MANAGER": stub.url,
            "AWS_DEFAULT_REGION": REGION,
        }
        with environment(**variables):
            done = await run("aws_secrets_manager.py", DATABASE_URL=door.dsn().replace("app@", ""), SECRET="db")

    assert done.stderr == ""
    assert done.stdout.splitlines() == ["connected as app", "connected as app"]
