"""One program for the cluster, the laptop and the test run: it takes the credential that it finds.

Settings come from the environment::

    DATABASE_URL     postgresql://app@db.example.com/app?sslmode=verify-full
    TOKEN_FILE       where the cluster mounts a token; /var/run/secrets/database/token if not set
    TOKEN_COMMAND    what prints a token on a laptop; that of the Azure CLI if not set
    PGPASSWORD       what a test run uses
"""

import asyncio
import os
import shlex

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.chain import Chain
from asyncpool_creds.providers.command import Command
from asyncpool_creds.providers.env import Environment
from asyncpool_creds.providers.file import File

AZURE_CLI = "az account get-access-token --resource-type oss-rdbms --query accessToken --output tsv"


async def main() -> str | None:
    """Print who is logged in; print and return the name of the source that made it possible."""
    credentials = Chain(
        File(os.environ.get("TOKEN_FILE", "/var/run/secrets/database/token")),
        Command(shlex.split(os.environ.get("TOKEN_COMMAND", AZURE_CLI))),
        Environment("PGPASSWORD"),
        # Each of them; what hangs must leave time for those behind it.
        timeout=8,
    )
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=credentials, min_size=1
    )
    async with pool:
        print("connected as", await pool.fetchval("SELECT current_user::text"))
    print("by", credentials.in_use)
    return credentials.in_use


if __name__ == "__main__":
    asyncio.run(main())
