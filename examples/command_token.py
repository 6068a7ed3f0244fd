"""A pool on the tokens that a command line tool prints.

Settings come from the environment::

    DATABASE_URL     postgresql://ann@db.example.com/app?sslmode=verify-full
    TOKEN_COMMAND    az account get-access-token --resource-type oss-rdbms --query accessToken --output tsv
                     aws rds generate-db-auth-token --hostname db.example.com --port 5432 --username ann

The tool is logged in already, by a person or by what it finds on the machine. Where there is a source of its own for
the same tokens, that one starts no process and knows more of its errors; this one works with any tool.
"""

import asyncio
import os
import shlex

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.command import Command


async def main() -> str:
    """Print and return who is logged in."""
    # A list: no shell is involved, so nothing that comes from elsewhere can turn into a command.
    credentials = Command(shlex.split(os.environ["TOKEN_COMMAND"]), timeout=20)
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=credentials, min_size=1
    )
    async with pool:
        user: str = await pool.fetchval("SELECT current_user::text")
        stats = pool.stats().manager
        if stats is not None and stats.seconds_left is not None:
            print("seconds until the token ends:", round(stats.seconds_left))
    print("connected as", user)
    return user


if __name__ == "__main__":
    asyncio.run(main())
