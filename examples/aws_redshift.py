"""Amazon Redshift with users that AWS makes for a quarter of an hour.

The IAM identity of this program needs, for a provisioned cluster::

    {"Effect": "Allow", "Action": "redshift:GetClusterCredentials",
     "Resource": ["arn:aws:redshift:eu-west-1:123456789012:dbuser:sales/app",
                  "arn:aws:redshift:eu-west-1:123456789012:dbname:sales/dev"]}

and for a serverless workgroup::

    {"Effect": "Allow", "Action": "redshift-serverless:GetCredentials",
     "Resource": "arn:aws:redshift-serverless:eu-west-1:123456789012:workgroup/0123abcd-..."}

Settings come from the environment::

    DATABASE_URL  postgresql://app@sales.abc123.eu-west-1.redshift.amazonaws.com:5439/dev?sslmode=verify-full&sslrootcert=amazon-trust-ca-bundle.crt
    CLUSTER       where the URL does not name it, because it leads through a tunnel

and whatever botocore takes: a profile, a role, a web identity, a container or an instance need nothing more. The
certificates are at https://s3.amazonaws.com/redshift-downloads/amazon-trust-ca-bundle.crt
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.aws import Redshift


async def main() -> None:
    """Print who is logged in: not the user of the URL, but the one that came back."""
    # User and database are those of the URL; cluster or workgroup, and the region, are in the name of the host.
    credentials = Redshift(os.environ.get("CLUSTER"))
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=credentials, min_size=1
    )
    async with pool:
        print("connected as", await pool.fetchval("SELECT current_user::text"))


if __name__ == "__main__":
    asyncio.run(main())
