"""Azure Database for PostgreSQL with Microsoft Entra tokens instead of a password.

What the server needs, once, from a Microsoft Entra administrator of it::

    SELECT * FROM pgaadauth_create_principal('orders-api', false, false);

Settings come from the environment::

    DATABASE_URL     postgresql://acme.postgres.database.azure.com/app?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt
    ENTRA_USER       the role; leave it out to log in as whom the token names
    AZURE_CLIENT_ID  which of the host's identities is meant, if it has several

On Azure, the identity of the host is used; elsewhere, the login of ``az login``.
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.azure import Entra


async def main() -> str:
    """Print and return who is logged in."""
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=Entra(user=os.environ.get("ENTRA_USER")), min_size=1
    )
    async with pool:
        user: str = await pool.fetchval("SELECT current_user::text")
        print("connected as", user)
        stats = pool.stats().manager
        if stats is not None and stats.seconds_left is not None:
            print("seconds until the token ends:", round(stats.seconds_left))
    return user


if __name__ == "__main__":
    asyncio.run(main())
