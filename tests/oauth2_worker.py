"""Processes that fetch tokens, each led through a connection, and killed at any line of their exchange.

As a script it forks one for each line of its standard input, which says where to connect to and what to make, as JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from storages import Place

import asyncpool_creds.providers
from asyncpool_creds import Credential, CredentialRefreshed, Event, ProviderError, TokenManager
from asyncpool_creds.providers.oauth2 import OAuth2

# What the storages do is stopped in tests of their own.
PROVIDERS = str(Path(asyncpool_creds.providers.__file__).parent)


def die_at(line: int) -> None:
    """Kill this process when it comes to its n-th line of a provider's code from now on."""
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PROVIDERS):
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def client() -> httpx.AsyncClient:
    # Nothing here is served over TLS, and reading the certificate authorities takes its time.
    return httpx.AsyncClient(verify=False)


def name(credential: Credential) -> str:
    """Return what tells one token from another in every process, and is none."""
    return hashlib.sha256(credential.password.encode()).hexdigest()[:16]


async def work(port: int, place: Place, arguments: dict[str, Any]) -> None:
    """Do what comes through the connection, until it ends; a number is the line of the next fetch to die at."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def say(**members: object) -> None:
        writer.write(json.dumps(members).encode() + b"\n")

    provider = OAuth2(storage=place.open(), http_client=client, **arguments)
    manager: TokenManager | None = None

    def tell(event: Event) -> None:
        if isinstance(event, CredentialRefreshed):
            assert manager is not None
            assert manager.current is not None
            say(token=name(manager.current))

    async def fetch(line: int) -> None:
        if line:
            die_at(line)
        try:
            say(token=name(await provider.fetch()))
        except ProviderError as error:
            say(error=str(error), retryable=error.retryable)
        finally:
            sys.settrace(None)

    tasks: set[asyncio.Task[object]] = set()
    last_line = 0
    while line := await reader.readline():
        match json.loads(line):
            case "fetch":
                # Whoever waits for a lock must notice the end of the connection.
                tasks.add(asyncio.create_task(fetch(last_line)))
            case "tell the pid":
                say(pid=os.getpid())
            case "manage":
                manager = TokenManager(provider, on_event=tell)
                tasks.add(asyncio.create_task(manager.start()))
            case "stop managing":
                assert manager is not None
                await manager.aclose()
                say(fetches=manager.stats().fetches)
            case line_to_die_at:
                last_line = line_to_die_at


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
