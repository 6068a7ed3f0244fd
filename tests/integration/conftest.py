"""A database as a cloud offers it: a real PostgreSQL behind a door that takes tokens which are good at this moment."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import asyncpg
import pytest
from support import secret

from asyncpool_creds import CredentialPool, TokenManager, create_pool
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

# A test that hangs is stopped; on a busy machine, eight processes with fifty exchanges each take a third of this.
_TIME_LIMIT = 60.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def limited(**arguments: Any) -> None:
            with anyio.fail_after(_TIME_LIMIT):
                await test(**arguments)

        pyfuncitem.obj = limited


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:

        async def create_roles() -> None:
            for role in ("app", "reporter", "reader"):
                await server.create_role(role)
            await server.execute("ALTER ROLE reader SET default_transaction_read_only = on")

        asyncio.run(create_roles())
        yield server


class Cloud:
    """A door, the source of the tokens it takes, and a clock for both.

    Attributes:
        presented: The token of each login that came as far as the check, by its number: 1 for the
            first the provider gave out; 0 for what it never did.
        refused: Tokens that are refused although the source gave them out, by number.
        refuses_all: Whether every token is refused.
        ahead: Seconds by which the clock of the door is ahead.
    """

    def __init__(self, server: PostgresServer, clock: VirtualClock, observer: RecordingObserver, *, tls: bool) -> None:
        self.server = server
        self.clock = clock
        self.observer = observer
        self.provider = ScriptedProvider(600, clock=clock, prefix=secret())
        self.door = TokenDoor(server, self._verify, tls=tls)
        self.presented: list[int] = []
        self.refused: set[int] = set()
        self.refuses_all = False
        self.ahead = 0.0
        self._managers: list[TokenManager] = []

    def _verify(self, user: str, password: str) -> str | None:
        issued = self.provider.credentials
        number = next((n for n, credential in enumerate(issued, 1) if credential.password == password), 0)
        self.presented.append(number)
        if number == 0:
            return "never given out"
        if self.refuses_all or number in self.refused:
            return "refused because the test says so"
        credential = issued[number - 1]
        if credential.expires_at is not None and credential.expires_at <= self.clock.now() + timedelta(
            seconds=self.ahead
        ):
            return "expired"
        return None if credential.user in (None, user) else "somebody else's"

    def manager(self, provider: object = None, **arguments: Any) -> TokenManager:
        """Return a manager on the test's clock; it is closed after the test."""
        source: Any = provider or self.provider
        manager = TokenManager(source, **{"clock": self.clock, "on_event": (), **arguments})
        self._managers.append(manager)
        return manager

    def pool(self, **arguments: Any) -> CredentialPool[asyncpg.Record]:
        """Return a pool at the door: with a manager on the test's clock, two connections, and the test's observer."""
        arguments.setdefault("credentials", self.manager())
        arguments.setdefault("max_size", 2)
        arguments.setdefault("min_size", arguments["max_size"])
        arguments.setdefault("on_event", self.observer)
        return create_pool(arguments.pop("dsn", self.dsn()), **arguments)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what neither an event nor a counter of the door announces."""
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.001)

    def dsn(self) -> str:
        """Return where the door is; without TLS, so that a refused login is one attempt and not two."""
        return self.door.dsn(sslmode="disable")

    async def close(self) -> None:
        """Close the managers, and see that nothing of the package's is left."""
        for manager in self._managers:
            await manager.aclose()
        with anyio.fail_after(5):
            await self.door.until(lambda: self.door.live == 0)
        left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("asyncpool_creds: ")]
        assert left == []


@pytest.fixture
async def cloud(server: PostgresServer, clock: VirtualClock, observer: RecordingObserver) -> AsyncIterator[Cloud]:
    cloud = Cloud(server, clock, observer, tls=False)
    async with cloud.door:
        yield cloud
        await cloud.close()


@pytest.fixture
async def tls_cloud(server: PostgresServer, clock: VirtualClock, observer: RecordingObserver) -> AsyncIterator[Cloud]:
    cloud = Cloud(server, clock, observer, tls=True)
    async with cloud.door:
        yield cloud
        await cloud.close()
