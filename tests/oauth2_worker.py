"""Processes that fetch tokens, each led through a connection, and stopped at any step of an exchange.

As a script it forks one for each line of its standard input, which says where to connect to and what to make, as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from storages import Place

from asyncpool_creds import Credential, CredentialRefreshed, Event, ProviderError, TokenManager
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.storage import StoredTokens

# The steps of an exchange that a process can be stopped at; between "request sent" and "answer received" is the issuer.
STEPS_BEFORE_THE_MARK = ("before the lock", "lock held", "loaded", "before the mark")
STEPS_UNTIL_THE_SAVE = ("marked", "before the request", "answer received", "before the save")
STEPS_AFTER_THE_SAVE = ("saved", "before the unlock", "unlocked")


class Stops:
    """Where the process stops, and says so."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self.step: str | None = None

    async def at(self, step: str) -> None:
        if step == self.step:
            self._say(stopped=step)
            await asyncio.Event().wait()

    def client(self) -> httpx.AsyncClient:
        async def request(_: httpx.Request) -> None:
            await self.at("before the request")

        async def response(_: httpx.Response) -> None:
            await self.at("answer received")

        # Nothing here is served over TLS, and reading the certificate authorities takes its time.
        return httpx.AsyncClient(event_hooks={"request": [request], "response": [response]}, verify=False)


class StoppingStorage:
    """A storage that stops where it is told to."""

    def __init__(self, storage: Any, stops: Stops) -> None:
        self._storage = storage
        self._stops = stops

    async def load(self, key: str) -> StoredTokens | None:
        tokens: StoredTokens | None = await self._storage.load(key)
        await self._stops.at("loaded")
        return tokens

    async def save(self, key: str, tokens: StoredTokens) -> None:
        await self._stops.at("before the mark" if tokens.is_being_spent else "before the save")
        await self._storage.save(key, tokens)
        await self._stops.at("marked" if tokens.is_being_spent else "saved")

    async def delete(self, key: str) -> None:
        await self._storage.delete(key)

    async def keys(self, prefix: str = "") -> list[str]:
        keys: list[str] = await self._storage.keys(prefix)
        return keys

    @asynccontextmanager
    async def lock(self, key: str) -> AsyncIterator[None]:
        await self._stops.at("before the lock")
        async with self._storage.lock(key):
            await self._stops.at("lock held")
            yield
            await self._stops.at("before the unlock")
        await self._stops.at("unlocked")


def name(credential: Credential) -> str:
    """Return what tells one token from another in every process, and is none."""
    return hashlib.sha256(credential.password.encode()).hexdigest()[:16]


async def work(port: int, place: Place, arguments: dict[str, Any]) -> None:
    """Do what comes through the connection, until it ends; anything but a command is the name of a step to stop at."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def say(**members: object) -> None:
        writer.write(json.dumps(members).encode() + b"\n")

    stops = Stops(say)
    provider = OAuth2(storage=StoppingStorage(place.open(), stops), http_client=stops.client, **arguments)
    manager: TokenManager | None = None

    def tell(event: Event) -> None:
        if isinstance(event, CredentialRefreshed):
            assert manager is not None
            assert manager.current is not None
            say(token=name(manager.current))

    async def fetch() -> None:
        try:
            say(token=name(await provider.fetch()))
        except ProviderError as error:
            say(error=str(error), retryable=error.retryable)

    tasks: set[asyncio.Task[object]] = set()
    while line := await reader.readline():
        match json.loads(line):
            case "fetch":
                # A process that is stopped must notice the end of its connection.
                tasks.add(asyncio.create_task(fetch()))
            case "tell the pid":
                say(pid=os.getpid())
            case "manage":
                manager = TokenManager(provider, on_event=tell)
                tasks.add(asyncio.create_task(manager.start()))
            case "stop managing":
                assert manager is not None
                await manager.aclose()
                say(fetches=manager.stats().fetches)
            case step:
                stops.step = step


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that were forked
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                port, place, arguments = json.loads(line)
                asyncio.run(work(port, Place(**place), arguments))
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
