"""A service whose database takes JSON Web Tokens, from login to many expiries later, on this machine alone.

The login service gives a pair of tokens for user and password. The access token is the database
password, and good for seconds here; the refresh token is exchanged for the next pair, once. Nothing
in the service itself knows about any of that: it uses a pool.

Needs: pip install 'asyncpool-creds[oauth2,testing]'
"""

import asyncio
from collections import Counter

import asyncpg

import asyncpool_creds
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from asyncpool_creds.testing.postgres import PostgresServer

TOKEN_LIFETIME = 2.0
TOKENS = 4


async def serve(pool: asyncpool_creds.CredentialPool[asyncpg.Record], counts: Counter[str], end: asyncio.Event) -> None:
    """Do what a service does: a query, again and again."""
    while not end.is_set():
        try:
            await pool.fetchval("SELECT current_user")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed query, and counted
            counts[f"failed: {type(error).__name__}"] += 1
        else:
            counts["served"] += 1
        await asyncio.sleep(0.01)


async def main(*, lifetime: float = TOKEN_LIFETIME, tokens: int = TOKENS) -> Counter[str]:
    """Run the service until so many tokens have been used up; print and return what happened."""
    counts: Counter[str] = Counter()
    enough, end = asyncio.Event(), asyncio.Event()

    def watch(event: asyncpool_creds.Event) -> None:
        if isinstance(event, asyncpool_creds.CredentialRefreshed):
            counts["tokens"] += 1
            if counts["tokens"] >= tokens:
                enough.set()

    async with (
        PostgresServer() as server,
        TokenIssuer({"ann": "correct horse"}, access_lifetime=lifetime) as issuer,
        TokenDoor(server, issuer.verify) as door,
    ):
        await server.create_role("ann")
        credentials = OAuth2(issuer.url, username="ann", password="correct horse")
        pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
            door.dsn(user="ann"), credentials=credentials, min_size=2, max_size=4, on_event=watch
        )
        async with pool:
            workers = [asyncio.create_task(serve(pool, counts, end), name=f"worker {number}") for number in range(4)]
            await enough.wait()
            end.set()
            await asyncio.gather(*workers)

        counts["logins"] = issuer.requests["password"]
        counts["exchanges"] = issuer.requests["refresh_token"]
        counts["replays"] = issuer.replays
        counts["refused connects"] = door.refused
    for name, number in counts.items():
        print(f"{name}: {number}")
    return counts


if __name__ == "__main__":
    asyncio.run(main())
