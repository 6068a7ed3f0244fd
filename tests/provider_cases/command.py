"""A script that prints a token, fails or hangs."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from support import MARKER, secret

from asyncpool_creds.providers.command import Command
from asyncpool_creds.testing.door import TokenDoor
from provider_cases import Case, Life, database

SCRIPT = """
case $(cat "$DIRECTORY/answer") in
good) printf '{"token": "%s", "expires_in": 300}' "$TOKEN" ;;
bad) echo 'cannot log in' >&2; exit 3 ;;
hang) : > "$DIRECTORY/hangs"; exec sleep 30 ;;
esac
"""


@asynccontextmanager
async def command_case() -> AsyncIterator[Case]:
    with tempfile.TemporaryDirectory() as directory:
        source = Command(["sh", "-c", SCRIPT], env={"DIRECTORY": directory, "TOKEN": secret()})

        def become(answer: str) -> None:
            Path(directory, "answer").write_text(answer, encoding="utf-8")

        async def fail() -> None:
            become("bad")

        async def heal() -> None:
            become("good")

        async def hangs() -> None:
            while not Path(directory, "hangs").exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
                await asyncio.sleep(0.005)

        become("good")
        yield Case(source, fail, lambda: become("hang"), hangs, heal)


@asynccontextmanager
async def command_life() -> AsyncIterator[Life]:
    def verify(user: str, password: str) -> str | None:
        issued_at = int(password.removeprefix(f"{MARKER}-")) / 1e9
        return None if time.time() < issued_at + 1 else "expired"

    server = database()
    await server.create_role("ada")
    async with TokenDoor(server, verify) as door:
        script = """printf '{"token": "%s-%s", "expires_in": 1}' "$PREFIX" "$(date +%s%N)" """
        yield Life(door.dsn(user="ada"), Command(["sh", "-c", script], env={"PREFIX": MARKER}))


CASES = {"Command": command_case}
LIVES = {"Command": command_life}
