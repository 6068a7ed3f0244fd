"""Locks between the processes of one user, each a file in a private directory."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import anyio
from anyio.lowlevel import RunVar

try:
    from filelock import FileLock, Timeout
except ImportError as _missing:  # pragma: no cover
    raise ImportError("this storage needs filelock: pip install 'asyncpool-creds[file]'") from _missing

from asyncpool_creds.storage._turns import Turns, in_thread, pauses

__all__ = ["FileLocks", "threads"]

# Seconds between two attempts while somebody waits, which cost a few tenths of a millisecond of processor time each.
_LONGEST_PAUSE: Final = 0.05
_THREADS: Final = 4
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("asyncpool_creds.storage")


class FileLocks:
    """Locks between processes, each a file in a directory of the user's own.

    Args:
        directory: Where; made if it is not there.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory: Final = Path(directory).absolute()
        self._turns: Final = Turns()

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncGenerator[None]:
        """Hold the lock `name`."""
        async with self._turns.of(name):
            lock = self._lock(name)
            try:
                # A wait in the kernel could not be cancelled, and would keep a thread.
                for pause in pauses(_LONGEST_PAUSE):
                    if await in_thread(lambda: self._take(lock), threads()):
                        break
                    await anyio.sleep(pause)
                yield
            finally:
                if lock.is_locked:
                    await in_thread(lock.release, threads())

    @contextmanager
    def briefly(self, name: str, timeout: float = 10.0) -> Generator[None]:
        """Hold the lock `name`, in a thread, for something that takes milliseconds.

        Raises:
            TimeoutError: Somebody else has had it for `timeout` seconds: he is stopped, or his disk is.
        """
        self.check_directory()
        with self._lock(name).acquire(timeout=timeout, poll_interval=0.01):
            yield

    def check_directory(self) -> None:
        """Make the directory if there is none, and what it lies in, for this user alone.

        Raises:
            OSError: It cannot be made, or others could get at what is in it.
        """
        path = self.directory
        try:
            status = path.lstat()
        except FileNotFoundError:
            _make_private(path)
            status = path.lstat()
        number, complaint = errno.EPERM, ""
        if stat.S_ISLNK(status.st_mode):
            number, complaint = errno.ELOOP, "is a symbolic link; give the one it leads to"
        elif not stat.S_ISDIR(status.st_mode):
            number, complaint = errno.ENOTDIR, "is something else"
        # A user's profile is private by inheritance on Windows, which has neither owners nor modes of this kind.
        elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            complaint = f"belongs to user {status.st_uid}; give one of your own"
        elif hasattr(os, "geteuid") and (mode := stat.S_IMODE(status.st_mode)) & 0o077:
            complaint = f"is open to others (mode {mode:03o}); make it private: chmod 700"
        if complaint:
            raise OSError(number, f"the directory for tokens {complaint}", str(path))

    def _lock(self, name: str) -> FileLock:
        # Taken in one thread and released in another. Where there is no flock, a file that marks a
        # lock would outlive its killed holder: rather an error.
        return FileLock(self.directory / f"{name}.lock", mode=0o600, thread_local=False, fallback_to_soft=False)

    def _take(self, lock: FileLock) -> bool:
        self.check_directory()
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        return True


def _make_private(directory: Path) -> None:
    # One by one: `Path.mkdir(parents=True)` makes the parents for everybody to enter, whatever the mode.
    missing = list(itertools.takewhile(lambda path: not path.exists(), (directory, *directory.parents)))
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def threads() -> anyio.CapacityLimiter:
    """Return what limits the threads of all storages in this event loop."""
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
    return limiter
