"""A pool on a password or token that Kubernetes, a Vault agent or a CSI driver keeps in a file.

What the pod needs, for a Secret with the keys "username" and "password" (a projected token: docs/providers/file.md)::

    volumes:
      - name: database
        secret: {secretName: database, defaultMode: 0440}
    containers:
      - volumeMounts:
          - {name: database, mountPath: /var/run/secrets/database, readOnly: true}  # no subPath: it is never updated

Settings come from the environment::

    DATABASE_URL     postgresql://db.example.com/app?sslmode=verify-full
    PASSWORD_FILE    /var/run/secrets/database/password: text, or JSON as AWS writes it for RDS
    USER_FILE        /var/run/secrets/database/username; leave it out if the JSON or DATABASE_URL has the user
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.file import File


async def main() -> str:
    """Print and return who is logged in."""
    credentials = File(os.environ["PASSWORD_FILE"], user_path=os.environ.get("USER_FILE"))
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=credentials, min_size=1
    )
    async with pool:
        user: str = await pool.fetchval("SELECT current_user::text")
    print("connected as", user)
    return user


if __name__ == "__main__":
    asyncio.run(main())
