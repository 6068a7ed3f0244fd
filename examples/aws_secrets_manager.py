"""A user and password from AWS Secrets Manager, through a rotation.

The IAM identity of this program needs, and kms:Decrypt if the secret has a key of its own::

    {"Effect": "Allow", "Action": "secretsmanager:GetSecretValue",
     "Resource": "arn:aws:secretsmanager:eu-west-1:123456789012:secret:db-a1b2c3"}

Settings come from the environment::

    DATABASE_URL  postgresql://db.abc123.eu-west-1.rds.amazonaws.com/app?sslmode=verify-full&sslrootcert=global-bundle.pem
    SECRET        name or ARN of the secret
    SECONDS       how long to stay; 0 if not given

and whatever botocore takes: a profile, a role, a web identity, a container or an instance need nothing more.
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds import CredentialRefreshed, Event
from asyncpool_creds.providers.aws import SecretsManager


def tell(event: Event) -> None:
    """Print that the secret was rotated."""
    if isinstance(event, CredentialRefreshed) and event.rotated:
        print("the secret was rotated")


async def main() -> None:
    """Print who is logged in, before and after."""
    # A look every minute; after a refused login there is one at once.
    secret = SecretsManager(os.environ["SECRET"], refresh_every=60)
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=secret, min_size=1, on_event=[asyncpool_creds.log_event, tell]
    )
    async with pool:
        print("connected as", await pool.fetchval("SELECT current_user::text"))
        await asyncio.sleep(float(os.environ.get("SECONDS", "0")))
        print("connected as", await pool.fetchval("SELECT current_user::text"))


if __name__ == "__main__":
    asyncio.run(main())
