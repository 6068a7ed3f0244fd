"""A web service with one pool for its whole life.

pip install 'asyncpool-creds[oauth2]' fastapi uvicorn

OIDC_ISSUER=https://login.example.com OIDC_CLIENT_ID=app OIDC_CLIENT_SECRET=... \
DATABASE_URL='postgresql://app@db.example.com/app?sslmode=verify-full' uvicorn --app-dir examples fastapi_service:app
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, TypeAlias

import asyncpg
from fastapi import Depends, FastAPI, Request, Response

import asyncpool_creds
from asyncpool_creds.providers.oauth2 import OAuth2

Pool: TypeAlias = "asyncpool_creds.CredentialPool[asyncpg.Record]"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open the pool before the first request, and close it after the last."""
    tokens = OAuth2(
        os.environ["OIDC_ISSUER"],
        client_id=os.environ["OIDC_CLIENT_ID"],
        client_secret=os.environ["OIDC_CLIENT_SECRET"],
    )
    async with asyncpool_creds.create_pool(os.environ["DATABASE_URL"], credentials=tokens, min_size=2) as pool:
        app.state.pool = pool
        yield


def pool_of(request: Request) -> object:
    """Return the pool of the application."""
    return request.app.state.pool


app = FastAPI(lifespan=lifespan)


@app.get("/whoami")
async def whoami(pool: Annotated[Pool, Depends(pool_of)]) -> str:
    """Return the database user."""
    return str(await pool.fetchval("SELECT current_user::text"))


@app.get("/health")
async def health(response: Response, pool: Annotated[Pool, Depends(pool_of)]) -> dict[str, float | None]:
    """Return 503 once there is no valid credential: no new connection could be opened."""
    manager = pool.manager
    if manager is None or manager.current is None:
        response.status_code = 503
    return {"seconds_left": None if manager is None else manager.stats().seconds_left}
