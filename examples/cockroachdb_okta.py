"""CockroachDB with tokens from Okta (or any OpenID Connect issuer) instead of a password.

What the cluster needs, once, from an administrator (CockroachDB manual, "Cluster Single Sign-on
using JSON Web Tokens")::

    SET CLUSTER SETTING server.jwt_authentication.enabled = on;
    SET CLUSTER SETTING server.jwt_authentication.issuers.configuration = 'https://acme.okta.com/oauth2/default';
    SET CLUSTER SETTING server.jwt_authentication.jwks_auto_fetch.enabled = on;
    SET CLUSTER SETTING server.jwt_authentication.audience = '<the client id; for access tokens, their audience>';
    SET CLUSTER SETTING server.jwt_authentication.claim = 'email';
    SET CLUSTER SETTING server.identity_map.configuration =
        'https://acme.okta.com/oauth2/default /^(.*)@acme\\.com$ \\1';

And what Okta needs: a claim "email" in ID tokens, included "Always" (Security, API, the
authorization server, Claims). By default it is left out of one that comes with an access token.

Settings come from the environment::

    DATABASE_URL          postgresql://ann@db.example.com:26257/defaultdb?sslmode=verify-full
    OKTA_ISSUER           https://acme.okta.com/oauth2/default
    OKTA_CLIENT_ID        of an application with the grants "Resource Owner Password" and "Refresh Token"
    OKTA_CLIENT_SECRET    leave it out for a public client
    OKTA_USERNAME, OKTA_PASSWORD
"""

import asyncio
import os

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.oauth2 import OAuth2


async def main() -> str:
    """Print and return the version of the cluster that the token opened."""
    credentials = OAuth2(
        issuer=os.environ["OKTA_ISSUER"],
        client_id=os.environ["OKTA_CLIENT_ID"],
        client_secret=os.environ.get("OKTA_CLIENT_SECRET"),
        username=os.environ["OKTA_USERNAME"],
        password=os.environ["OKTA_PASSWORD"],
        # The ID token says who somebody is; offline_access asks for a refresh token, so that
        # the password is sent once and not every hour.
        scope="openid email offline_access",
        use="id_token",
    )
    pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"],
        credentials=credentials,
        min_size=1,
        # Without it CockroachDB takes the token for a password. The server receives the startup
        # parameter options=--crdb:jwt_auth_enabled=true. An options= in the URL would be replaced
        # by this one: put everything here, as in "--crdb:jwt_auth_enabled=true --cluster=acme-42".
        server_settings={"options": "--crdb:jwt_auth_enabled=true"},
        # CockroachDB lets open sessions outlive their token. Where they must not, the default
        # retire_when="expired" replaces them before it ends; "never" leaves them alone.
        retire_when="expired",
    )
    async with pool:
        version: str = await pool.fetchval("SELECT version()")
    print(version)
    return version


if __name__ == "__main__":
    asyncio.run(main())
