"""A file that somebody else writes, on a file system that can stop answering."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from support import secret

from asyncpool_creds.providers.file import File
from asyncpool_creds.testing.door import TokenDoor
from provider_cases import Case, Life, database


class HangingFileSystem:
    """Holds up whoever opens one path, as a network file system without its server does."""

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        self._loop = asyncio.get_running_loop()
        self._answers = threading.Event()
        self._answers.set()
        self._reached = asyncio.Event()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        open_file = os.open

        def held_up(path: Any, *arguments: Any, **keywords: Any) -> int:
            if path == self._path and not self._answers.is_set():
                self._loop.call_soon_threadsafe(self._reached.set)
                self._answers.wait()
            return open_file(path, *arguments, **keywords)

        self._patch.setattr(os, "open", held_up)
        return self

    def __exit__(self, *_: object) -> None:
        self.answer()
        self._patch.undo()

    def hang(self) -> None:
        self._reached.clear()
        self._answers.clear()

    def answer(self) -> None:
        self._answers.set()

    async def reached(self) -> None:
        await self._reached.wait()


@asynccontextmanager
async def file_case() -> AsyncIterator[Case]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "secret.json")

        def write() -> None:
            path.write_text(json.dumps({"password": secret(), "expires_at": time.time() + 300}), encoding="utf-8")

        async def heal() -> None:
            file_system.answer()
            write()

        async def fail() -> None:
            path.unlink()  # noqa: ASYNC240 - a test may

        write()
        with HangingFileSystem(path) as file_system:
            yield Case(File(path), fail, file_system.hang, file_system.reached, heal)


@asynccontextmanager
async def file_life() -> AsyncIterator[Life]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "token")
        good: list[str] = []

        def write(token: str) -> None:
            path.with_suffix(".new").write_text(token, encoding="utf-8")
            path.with_suffix(".new").rename(path)

        async def turn() -> None:
            good.append(f"{secret()}-{len(good)}")
            write(good[-1])

        def verify(user: str, password: str) -> str | None:
            # As databases with two passwords per user do: the one before is good until the next.
            return None if password in good[-2:] else "not of today"

        await turn()
        server = database()
        await server.create_role("ada")
        async with TokenDoor(server, verify) as door:
            yield Life(door.dsn(user="ada"), File(path, check_every=1), turn=turn)


CASES = {"File": file_case}
LIVES = {"File": file_life}
