from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_world import World

from asyncpool_creds.testing.postgres import PostgresServer


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        asyncio.run(server.create_role("app"))
        yield server


@pytest.fixture(params=["serve", "refuse"])
async def world(server: PostgresServer, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A door before a real server, a source of tokens, a clock; on the way out, nothing may be left of anything."""
    async with World(server, expired_sessions=request.param) as world:
        yield world
