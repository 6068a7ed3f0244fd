"""A pool on the tokens of an OAuth 2.0 issuer.

OIDC_ISSUER=https://login.example.com OIDC_CLIENT_ID=app OIDC_CLIENT_SECRET=... \
DATABASE_URL='postgresql://app@db.example.com/app?sslmode=verify-full' python examples/plain_asyncio.py
"""

import asyncio
import os

import asyncpool_creds
from asyncpool_creds.providers.oauth2 import OAuth2


def show(event: asyncpool_creds.Event) -> None:
    """Print what happens to credentials and connections."""
    print(event)


async def main() -> None:
    """Ask who we are, from ten tasks at once."""
    tokens = OAuth2(
        os.environ["OIDC_ISSUER"],
        client_id=os.environ["OIDC_CLIENT_ID"],
        client_secret=os.environ["OIDC_CLIENT_SECRET"],
    )
    async with asyncpool_creds.create_pool(
        os.environ["DATABASE_URL"], credentials=tokens, min_size=2, max_size=5, on_event=show
    ) as pool:
        users = await asyncio.gather(*(pool.fetchval("SELECT current_user::text") for _ in range(10)))
        print("connected as", *set(users))
        stats = pool.stats().manager
        print("tokens fetched:", 0 if stats is None else stats.fetches)


if __name__ == "__main__":
    asyncio.run(main())
