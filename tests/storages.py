"""The storages that the contract is tested on, in this process and, run as a script, in others.

As a script: ``storages.py PLACE WHAT [ARGUMENT]``, with the place as JSON; what it does stands at the functions.
"""

# ruff: noqa: T201 - the standard output is how it answers

from __future__ import annotations

import asyncio
import contextvars
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lag_probe
from keyrings.alt.file import PlaintextKeyring
from lag_probe import LagProbe

import asyncpool_creds.storage
from asyncpool_creds.storage import MemoryStorage, StoredTokens
from asyncpool_creds.storage.file import FileStorage
from asyncpool_creds.storage.keyring import KeyringStorage
from asyncpool_creds.storage.redis import RedisStorage

KEY = "key"


@dataclass(frozen=True)
class Place:
    """Where storages of one kind meet: all that are opened at one place have the same tokens and locks.

    Args:
        kind: "memory", "file", "keyring", "keyring in parts", "redis".
        directory: For what is in files; it tells places apart, too.
        url: Of the Redis server.
        lock_lifetime: Of locks in Redis, in seconds.
    """

    kind: str
    directory: str
    url: str = ""
    lock_lifetime: float = 1.0

    def open(self) -> Any:
        """Return a storage that shares nothing with others but the place; memory cannot be opened twice."""
        match self.kind:
            case "memory":
                return MemoryStorage()
            case "file":
                return FileStorage(f"{self.directory}/tokens")
            case "keyring" | "keyring in parts":
                backend = PlaintextKeyring()
                backend.file_path = f"{self.directory}/keyring.cfg"
                limit = 64 if self.kind == "keyring in parts" else None
                return KeyringStorage(backend=backend, lock_directory=f"{self.directory}/locks", entry_limit=limit)
            case "redis":
                return RedisStorage(self.url, prefix=f"{self.directory}:", lock_lifetime=self.lock_lifetime)
            case _:
                raise AssertionError(self.kind)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Any]:
        """Open a storage, and close what it keeps open."""
        storage = self.open()
        try:
            yield storage
        finally:
            if hasattr(storage, "aclose"):
                await storage.aclose()

    def process(self, what: str, argument: object = "") -> subprocess.Popen[str]:
        """Do `what` with this place in another process."""
        command = [sys.executable, __file__, json.dumps(asdict(self)), what, str(argument)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def steps_that_block(job: Callable[[], Coroutine[Any, Any, None]], *, attempts: int = 3) -> list[object]:
    """Do `job`, and return what of it, and of the tasks it starts, has held the event loop up in every attempt."""
    for _ in range(attempts):
        probe, context = LagProbe(), contextvars.copy_context()
        context.run(lag_probe._is_watched.set, True)
        with probe.watching():
            await asyncio.get_running_loop().create_task(job(), context=context)
        assert probe.steps > 1
        if not probe.blocking:
            break
    return list(probe.blocking)


async def exchange(place: Place, times: str) -> None:
    """Exchange the token that is there for its successor, a number, that often; print those that were used."""
    async with place.opened() as storage:
        for _ in range(int(times)):
            async with storage.lock(KEY):
                token = (await storage.load(KEY)).refresh_token
                print(token)
                await asyncio.sleep(0)
                await storage.save(KEY, StoredTokens(refresh_token=str(int(token) + 1)))


async def hold(place: Place, state: str) -> None:
    """Save `state` under the lock, say so; when told on the standard input, save a later one, and say how that went."""
    async with place.opened() as storage, storage.lock(KEY):
        await storage.save(KEY, StoredTokens(refresh_token=state, is_being_spent=True))
        print("held", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        try:
            await storage.save(KEY, StoredTokens(refresh_token=f"{state}, later"))
        except OSError as error:
            print(error)
        else:
            print("saved")


def die_saving(place: Place, step: str) -> None:
    """Save, and be killed at a line of the storage's code, every `step`-th in turn; print what is left each time.

    That is which tokens are found, the keys, and the names of the files that are there.
    """
    for line in itertools.count(1, int(step)):
        assert _in_fork(lambda: _with_storage(place, lambda storage: storage.save(KEY, _tokens("old")))) == 0

        def die(line: int = line) -> None:
            _kill_at(line)
            asyncio.run(_with_storage_(place, lambda storage: storage.save(KEY, _tokens("new"))))

        status = _in_fork(die)
        assert status in (0, -signal.SIGKILL), status
        # Whatever is left can be read: an error would be as good as tokens that are lost.
        assert _in_fork(lambda: _with_storage(place, lambda storage: _show(place, storage))) == 0
        if status == 0:
            return


def _tokens(name: str) -> StoredTokens:
    # Longer than one entry of a keyring with little room.
    return StoredTokens(refresh_token=name * 50)


async def _show(place: Place, storage: Any) -> None:
    tokens = await storage.load(KEY)
    keys = await storage.keys()
    async with asyncio.timeout(5), storage.lock(KEY):
        pass
    files = sorted(path.name for path in Path(place.directory).rglob("*"))  # noqa: ASYNC240 - nobody else is here
    found = next((name for name in ("old", "new") if tokens == _tokens(name)), repr(tokens))
    print(json.dumps([found, keys, files]), flush=True)


def _with_storage(place: Place, job: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(_with_storage_(place, job))


async def _with_storage_(place: Place, job: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    async with place.opened() as storage:
        await job(storage)


def _in_fork(job: Callable[[], None]) -> int:
    """Do it in a child: this process never has a thread, so that it can be forked again and again."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        child = os.fork()
    if not child:
        status = 1
        try:
            job()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(line: int) -> None:
    """Kill this process when it comes to its n-th line of a storage's code, in whichever thread."""
    package = str(Path(asyncpool_creds.storage.__file__).parent)
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


if __name__ == "__main__":
    _place, _what, _argument = Place(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]
    if _what == "die saving":
        die_saving(_place, _argument)
    else:
        asyncio.run({"exchange": exchange, "hold": hold}[_what](_place, _argument))
