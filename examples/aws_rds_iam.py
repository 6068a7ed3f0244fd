"""Amazon RDS or Aurora with IAM tokens instead of a password.

What the database needs, once, from its master user::

    CREATE USER app;
    GRANT rds_iam TO app;

and the IAM identity of this program, besides IAM authentication switched on at the instance or cluster::

    {"Effect": "Allow", "Action": "rds-db:connect",
     "Resource": "arn:aws:rds-db:eu-west-1:123456789012:dbuser:cluster-ABCDEFGH/app"}

Settings come from the environment::

    DATABASE_URL  postgresql://app@db.abc123.eu-west-1.rds.amazonaws.com/app?sslmode=verify-full&sslrootcert=global-bundle.pem

and whatever botocore takes: a profile, a role, a web identity, a container or an instance need nothing more. The
certificates are at https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem.
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.aws import RDSIAM


async def main() -> str:
    """Print and return who is logged in."""
    # Host, port and user of the token are those of the URL, and the region is in the name of the host.
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=RDSIAM(), min_size=1
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
