"""The way from a password in an environment variable to tokens, one deployment at a time.

1. ``asyncpg.create_pool`` becomes ``asyncpool_creds.create_pool``, and the password stays where it is.
2. Where the settings of an issuer are there, tokens are used; where they are not, the password. No deployment waits
   for another.
3. Once every deployment has them, the password goes: from here, and from the database.

Settings come from the environment::

    DATABASE_URL     postgresql://app@db.example.com/app?sslmode=verify-full
    PGPASSWORD       the password of old; for asyncpg itself it has no meaning any more
    OIDC_ISSUER, OIDC_CLIENT_ID, OIDC_CLIENT_SECRET    of the issuer, where there is one already

Needs: pip install 'asyncpool-creds[oauth2]'
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.env import Environment
from asyncpool_creds.providers.oauth2 import OAuth2


def credentials() -> OAuth2 | Environment:
    """Return where this deployment gets its credentials.

    Its settings decide, and not what works at the moment: with a chain, a failure of the issuer would bring the
    password back, silently.
    """
    if "OIDC_ISSUER" not in os.environ:
        return Environment("PGPASSWORD")
    return OAuth2(
        os.environ["OIDC_ISSUER"],
        client_id=os.environ["OIDC_CLIENT_ID"],
        client_secret=os.environ["OIDC_CLIENT_SECRET"],
    )


async def main() -> str:
    """Print and return which kind of credential was used."""
    source = credentials()
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=source, min_size=1
    )
    async with pool:
        user: str = await pool.fetchval("SELECT current_user::text")
    kind = "password" if isinstance(source, Environment) else "token"
    print("connected as", user, "with a", kind)
    return kind


if __name__ == "__main__":
    asyncio.run(main())
