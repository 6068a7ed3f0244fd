"""Tokens kept in files of a private directory, for the processes of one user."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, cast

import anyio.to_thread

from asyncpool_creds.storage import StoredTokens
from asyncpool_creds.storage._file_locks import FileLocks, threads
from asyncpool_creds.storage._turns import in_thread

__all__ = ["FileStorage"]

# Never through a link, and never waiting for the other end of a pipe; Windows has neither.
_SAFELY: Final[int] = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class FileStorage:
    """A `TokenStorage` in a directory, one file for each key.

    Any number of processes may share it, and be killed at any moment: a file is what it was, or
    what it was to become, and the locks of a dead process are free at once. It needs a
    file system with ``flock`` (every local one, and NFS from version 4).

    Cancelling `save`, `delete` or the end of `lock` waits for the disk.

    Args:
        directory: Where. It is made if it is not there, for this user alone (0700).

    Raises:
        TypeError: `directory` is no path.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if not isinstance(directory, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"FileStorage: directory must be a path, not {type(directory).__name__}")
        self._locks: Final = FileLocks(directory)
        self._directory: Final = self._locks.directory

    async def load(self, key: str) -> StoredTokens | None:
        """Return what was saved last under `key`.

        Raises:
            OSError: The file cannot be read, or the directory is not private.
            ValueError: The file is damaged.
        """
        return await anyio.to_thread.run_sync(self._load, key, abandon_on_cancel=True, limiter=threads())

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there; on return they are on the disk.

        Raises:
            OSError: They could not be written. What was there before still is.
        """
        await in_thread(lambda: self._save(key, tokens), threads())

    async def delete(self, key: str) -> None:
        """Forget what was saved under `key`.

        Raises:
            OSError: The file could not be removed.
        """
        await in_thread(lambda: self._delete(key), threads())

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that something is saved under and that begin with `prefix`, sorted.

        Raises:
            OSError: A file cannot be read, or the directory is not private.
            ValueError: A file is damaged.
        """
        return await anyio.to_thread.run_sync(self._keys, prefix, abandon_on_cancel=True, limiter=threads())

    @asynccontextmanager
    async def lock(self, key: str) -> AsyncGenerator[None]:
        """Hold the lock of `key`.

        Raises:
            OSError: The file of the lock cannot be opened, or the directory is not private.
        """
        async with self._locks.hold(_name(key)):
            yield

    def _load(self, key: str) -> StoredTokens | None:
        self._locks.check_directory()
        path = self._path(key)
        content = _read(path)
        if content is None:
            return None
        found, tokens = _parse(path, content)
        if found != key:
            raise _damaged(path)
        return tokens

    def _save(self, key: str, tokens: StoredTokens) -> None:
        path = self._path(key)
        content = f"{json.dumps({'key': key})}\n{tokens.to_json()}\n".encode()
        with self._locks.briefly("write"):
            # Whoever wrote these is dead: the living have the lock.
            for left in self._directory.glob("*.tmp"):
                left.unlink(missing_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._directory, suffix=".tmp")  # 0600
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(descriptor)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._sync()

    def _delete(self, key: str) -> None:
        with self._locks.briefly("write"), suppress(FileNotFoundError):
            self._path(key).unlink()
            self._sync()

    def _keys(self, prefix: str) -> list[str]:
        self._locks.check_directory()
        found = ((path, _read(path)) for path in self._directory.glob("*.tokens"))
        keys = (_parse(path, content)[0] for path, content in found if content is not None)
        return sorted(key for key in keys if key.startswith(prefix))

    def _path(self, key: str) -> Path:
        return self._directory / f"{_name(key)}.tokens"

    def _sync(self) -> None:
        """Have the names of the files survive a loss of power, too."""
        if os.name == "nt":
            return  # no directory can be opened there
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __repr__(self) -> str:
        return f"<FileStorage {str(self._directory)!r}>"


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | _SAFELY)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "the file with the tokens is a symbolic link; delete it", str(path)) from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "the file with the tokens is no regular file; delete it", str(path))
        return file.read()


def _parse(path: Path, content: bytes) -> tuple[str, StoredTokens]:
    # What is wrong with them is not told: it would be told with them.
    try:
        head, tokens = content.splitlines()
        document = cast("dict[str, object]", json.loads(head))
        key = document["key"]
        if isinstance(key, str):
            return key, StoredTokens.from_json(tokens)
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise _damaged(path)


def _damaged(path: Path) -> ValueError:
    return ValueError(f"the file with the tokens is damaged: {path}; delete it, and log in again")
