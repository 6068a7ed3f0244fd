"""Tokens kept in files of a private directory, for the processes of one user."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, cast

import anyio.to_thread

from asyncpool_creds.storage import LONGEST_TEXT, LaterFormatError, StoredTokens, UnreadableTokensError, is_later_format
from asyncpool_creds.storage._file_locks import FileLocks, threads
from asyncpool_creds.storage._frames import without_locals
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
        directory: Where. It is made if it is not there, and so is what it lies in, for this user alone (0700).

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
            OSError: The file cannot be read, is larger than 1 MiB, or the directory is not private.
            ValueError: The file is damaged, or of a later version.
        """
        with without_locals():
            return await anyio.to_thread.run_sync(self._load, key, abandon_on_cancel=True, limiter=threads())

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there; on return they are on the disk.

        Raises:
            OSError: They could not be written, or are larger than 1 MiB. What was there before still is.
            ValueError: A later version has written what is there, which still is.
        """
        with without_locals():
            await in_thread(lambda: self._save(key, tokens), threads())

    async def delete(self, key: str) -> None:
        """Forget what was saved under `key`.

        Raises:
            OSError: The file could not be removed.
        """
        with without_locals():
            await in_thread(lambda: self._delete(self._path(key)), threads())

    async def load_mark(self, key: str) -> str | None:
        """Return the mark of `key`, which is a file of its own; None: there is none.

        Raises:
            OSError: The file cannot be read, is larger than 1 MiB, or the directory is not private.
        """
        return await anyio.to_thread.run_sync(self._load_mark, key, abandon_on_cancel=True, limiter=threads())

    async def save_mark(self, key: str, mark: str | None) -> None:
        """Keep `mark` in place of what was there, or nothing if it is None.

        Raises:
            OSError: The file could not be written or removed.
        """
        path = self._mark_path(key)
        if mark is None:
            await in_thread(lambda: self._delete(path), threads())
        else:
            content = f"{mark}\n".encode()
            await in_thread(lambda: self._write(path, content), threads())

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that something is saved under and that begin with `prefix`, sorted.

        Raises:
            OSError: A file cannot be read, is larger than 1 MiB, or the directory is not private.
            ValueError: A file is damaged, or of a later version.
        """
        with without_locals():
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
        if len(content) > LONGEST_TEXT:
            raise OSError(errno.EFBIG, "these tokens are larger than 1 MiB, and no file of tokens is", str(path))
        self._write(path, content, check=_check_replaceable)

    def _load_mark(self, key: str) -> str | None:
        self._locks.check_directory()
        content = _read(self._mark_path(key))
        return None if content is None else content.decode(errors="replace")

    def _write(self, path: Path, content: bytes, *, check: Callable[[Path], None] = lambda _: None) -> None:
        with self._locks.briefly("write"):
            check(path)
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

    def _delete(self, path: Path) -> None:
        with self._locks.briefly("write"), suppress(FileNotFoundError):
            path.unlink()
            self._sync()

    def _keys(self, prefix: str) -> list[str]:
        self._locks.check_directory()
        found = ((path, _read(path)) for path in self._directory.glob("*.tokens"))
        keys = (_parse(path, content)[0] for path, content in found if content is not None)
        return sorted(key for key in keys if key.startswith(prefix))

    def _path(self, key: str) -> Path:
        return self._directory / f"{_name(key)}.tokens"

    def _mark_path(self, key: str) -> Path:
        return self._directory / f"{_name(key)}.spent"

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
        content = file.read(LONGEST_TEXT + 1)
    if len(content) > LONGEST_TEXT:
        raise _too_large(path)
    return content


def _check_replaceable(path: Path) -> None:
    """Raise an error if what is at `path` may be worth more than what is to take its place."""
    try:
        content = _read(path)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise
        return  # a link or a pipe, which is replaced, not written to
    if content is not None and any(map(is_later_format, content.splitlines())):
        raise _later(path)


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
    if any(map(is_later_format, content.splitlines())):
        raise _later(path)
    raise _damaged(path)


def _later(path: Path) -> LaterFormatError:
    return LaterFormatError(f"the file with the tokens, {path},")


def _too_large(path: Path) -> OSError:
    return OSError(errno.EFBIG, "the file with the tokens is larger than 1 MiB; delete it", str(path))


def _damaged(path: Path) -> UnreadableTokensError:
    return UnreadableTokensError(f"the file with the tokens is damaged: {path}; delete it, and log in again")
