"""Tokens of Globus Auth for several resource servers, all kept fresh, one of them a database's password.

Settings come from the environment::

    GLOBUS_CLIENT_ID      the client
    GLOBUS_CLIENT_SECRET  its secret: it acts for itself, and logs in whenever it has to
    GLOBUS_TOKENS         without a secret: a file with the token response of a person's login, as JSON
                          (globus-sdk: json.dump(response.data, file))
    GLOBUS_DATABASE       the resource server that the database is, such as 6c54e3c5-6b1f-4a54-9f0e-6a8b0a1c9f02
    GLOBUS_AUTH           leave it out for https://auth.globus.org
    DATABASE_URL          postgresql://app@db.example.org/app?sslmode=verify-full

Tokens are kept in memory here. Where refresh tokens must outlive the program, pass
storage=FileStorage("tokens") (asyncpool_creds.storage.file), and store a login only once.
"""

import asyncio
import json
import os
from pathlib import Path

import asyncpool_creds
from asyncpool_creds.providers.globus import Globus


def make() -> Globus:
    """Return the client, as the environment describes it."""
    database, secret = os.environ["GLOBUS_DATABASE"], os.environ.get("GLOBUS_CLIENT_SECRET")
    own = {
        "transfer.api.globus.org": "urn:globus:auth:scope:transfer.api.globus.org:all",
        database: f"https://auth.globus.org/scopes/{database}/all",
    }
    return Globus(
        os.environ["GLOBUS_CLIENT_ID"],
        client_secret=secret,
        scopes=own if secret else None,
        url=os.environ.get("GLOBUS_AUTH", "https://auth.globus.org"),
    )


async def log_in(globus: Globus) -> None:
    """Get a token for each resource server, all with one login."""
    if "GLOBUS_CLIENT_SECRET" in os.environ:
        await globus.log_in()
    else:
        await globus.store(json.loads(Path(os.environ["GLOBUS_TOKENS"]).read_text()))  # noqa: ASYNC240 - once, at start


async def main() -> None:
    """Print what tokens there are, and who is logged in to the database."""
    async with make() as globus, asyncpool_creds.TokenManagers(globus.resource) as managers:
        await log_in(globus)
        # From here on, all are refreshed in the background, each in its own time.
        await managers.start(*await globus.resources())
        for name in managers.names():
            credential = await managers.get(name)
            print(name, "until", credential.expires_at)

        database = managers.manager(os.environ["GLOBUS_DATABASE"])
        async with asyncpool_creds.create_pool(os.environ["DATABASE_URL"], credentials=database, min_size=1) as pool:
            print("connected as", await pool.fetchval("SELECT current_user::text"))


if __name__ == "__main__":
    asyncio.run(main())
