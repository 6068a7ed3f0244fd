"""Cloud SQL for PostgreSQL with IAM tokens instead of a password.

What the project needs, once::

    gcloud sql instances patch INSTANCE --database-flags=cloudsql.iam_authentication=on
    gcloud sql users create orders-api@acme.iam --instance=INSTANCE --type=cloud_iam_service_account
    gcloud projects add-iam-policy-binding acme --role=roles/cloudsql.instanceUser \
        --member=serviceAccount:orders-api@acme.iam.gserviceaccount.com

Settings come from the environment::

    DATABASE_URL    postgresql://0123abcd.5678ef.europe-west1.sql.goog/app?sslmode=verify-full&sslrootcert=server-ca.pem
    CLOUD_SQL_USER  leave it out to log in as the account itself; your own login does not know its address

On Google Cloud, the service account of the host is used; elsewhere, the file that
GOOGLE_APPLICATION_CREDENTIALS names, or the login of ``gcloud auth application-default login``.
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.gcp import CloudSQLIAM


async def main() -> str:
    """Print and return who is logged in."""
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=CloudSQLIAM(user=os.environ.get("CLOUD_SQL_USER")), min_size=1
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
