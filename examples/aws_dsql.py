"""Amazon Aurora DSQL with IAM tokens, which the pool signs on this machine.

What the database needs, once, from its administrator::

    CREATE ROLE app WITH LOGIN;
    AWS IAM GRANT app TO 'arn:aws:iam::123456789012:role/service';

and the IAM identity of this program (``dsql:DbConnectAdmin`` instead, for the user ``admin``)::

    {"Effect": "Allow", "Action": "dsql:DbConnect", "Resource": "arn:aws:dsql:eu-west-1:123456789012:cluster/abc123"}

Settings come from the environment::

    DATABASE_URL  postgresql://app@abc123.dsql.eu-west-1.on.aws/postgres?sslmode=verify-full&sslrootcert=AmazonRootCA1.pem

and whatever botocore takes: a profile, a role, a web identity, a container or an instance need nothing more. The
certificate is at https://www.amazontrust.com/repository/AmazonRootCA1.pem.
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.aws import AuroraDSQL


async def main() -> None:
    """Print who is logged in, and for how long."""
    # Host and user of the token are those of the URL, and the region is in the name of the host. DSQL lets a session
    # outlive its token, so there is no need to replace one before DSQL ends it, after an hour.
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=AuroraDSQL(), min_size=1, retire_when="never"
    )
    async with pool:
        print("connected as", await pool.fetchval("SELECT current_user::text"))
        for connection in pool.stats().connections:
            if connection.seconds_left is not None:
                print("minutes until it is replaced:", round(connection.seconds_left / 60))


if __name__ == "__main__":
    asyncio.run(main())
