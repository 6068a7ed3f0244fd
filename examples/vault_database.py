"""PostgreSQL with users that HashiCorp Vault or OpenBao makes for this service, and drops when it ends.

What Vault needs, once, from an administrator::

    vault secrets enable database
    vault write database/config/orders plugin_name=postgresql-database-plugin allowed_roles=orders \
        connection_url='postgresql://{{username}}:{{password}}@db.example.com/orders?sslmode=verify-full' \
        username=vault password=...
    vault write database/roles/orders db_name=orders default_ttl=1h max_ttl=24h creation_statements="\
        CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE orders"

and a policy for the service: ``read`` on ``database/creds/orders``, ``update`` on ``sys/leases/revoke``.

Settings come from the environment::

    DATABASE_URL          postgresql://db.example.com/orders?sslmode=verify-full, without a user
    VAULT_ADDR            https://vault.example.com:8200
    VAULT_DATABASE_ROLE   orders
    VAULT_ROLE_ID, VAULT_SECRET_ID_FILE   to log in by AppRole; or
    VAULT_TOKEN           a token; or
    VAULT_KUBERNETES_ROLE to log in with the service account of the pod
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.vault import AppRoleAuth, KubernetesAuth, TokenAuth, VaultAuth, VaultDatabase


def how_to_log_in() -> VaultAuth:
    """Return the way for which there are settings."""
    if "VAULT_ROLE_ID" in os.environ:
        return AppRoleAuth(os.environ["VAULT_ROLE_ID"], secret_id_file=os.environ["VAULT_SECRET_ID_FILE"])
    if "VAULT_KUBERNETES_ROLE" in os.environ:
        return KubernetesAuth(os.environ["VAULT_KUBERNETES_ROLE"])
    return TokenAuth(os.environ["VAULT_TOKEN"])


async def main() -> str:
    """Print and return who is logged in."""
    credentials = VaultDatabase(os.environ["VAULT_DATABASE_ROLE"], auth=how_to_log_in())
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=credentials, min_size=1
    )
    async with pool:
        user: str = await pool.fetchval("SELECT current_user::text")
        print("connected as", user)
        stats = pool.stats().manager
        if stats is not None and stats.seconds_left is not None:
            print("seconds until this user is replaced:", round(stats.seconds_left))
    # Vault has dropped the user: the lease was revoked with the last connection.
    return user


if __name__ == "__main__":
    asyncio.run(main())
