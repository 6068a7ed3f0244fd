"""Tokens kept in the keyring of the operating system, for the processes of one user."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

try:
    import keyring
    import keyring.backends.fail
    import keyring.backends.null
    import platformdirs
    from keyring.backend import KeyringBackend
    from keyring.errors import KeyringError
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the keyring needs a library: pip install 'asyncpool-creds[keyring]'") from _missing

from asyncpool_creds.storage import LaterFormatError, StoredTokens, UnreadableTokensError, is_later_format
from asyncpool_creds.storage._file_locks import FileLocks
from asyncpool_creds.storage._frames import quotes, without_locals
from asyncpool_creds.storage._turns import in_thread

__all__ = ["KeyringStorage"]

_T = TypeVar("_T")
# CRED_MAX_CREDENTIAL_BLOB_SIZE of wincred.h is 5 * 512 bytes, and the text is kept as UTF-16 there.
_WINDOWS_LIMIT: Final = 1280
# A keyring may ask the user to unlock it while others wait.
_PATIENCE: Final = 60.0
# Entries begin with "{" or "[" otherwise.
_SPLIT: Final = "split"
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("asyncpool_creds.storage.keyring")


class KeyringStorage:
    """A `TokenStorage` in the keyring: macOS Keychain, Secret Service, Windows Credential Manager, or another backend.

    The processes of one user may share it. The keyring library is synchronous and may ask the user to unlock
    the keyring: it is called in a thread, by one caller at a time. Cancelling `save`, `delete` or
    the end of `lock` waits for that call.

    Args:
        service: Under which name the entries are shown in the keyring.
        backend: A keyring; None: the one that the ``keyring`` library finds, when it is first needed.
        lock_directory: Where the files of the locks are, private to the user; None: in the user's directory for
            the state of programs.
        entry_limit: Characters that one entry can take; longer tokens are split. None: 1280 on Windows, where the
            Credential Manager takes no more, and no limit elsewhere.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `service` is empty, or `entry_limit` is below 64.
    """

    def __init__(
        self,
        service: str = "asyncpool_creds",
        *,
        backend: KeyringBackend | None = None,
        lock_directory: str | os.PathLike[str] | None = None,
        entry_limit: int | None = None,
    ) -> None:
        if not isinstance(service, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"KeyringStorage: service must be a str, not {type(service).__name__}")
        if not service:
            raise ValueError("KeyringStorage: service is empty")
        if backend is not None and not isinstance(backend, KeyringBackend):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"KeyringStorage: backend must be a KeyringBackend, not {type(backend).__name__}")
        if lock_directory is not None and not isinstance(lock_directory, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"KeyringStorage: lock_directory must be a path, not {type(lock_directory).__name__}")
        if entry_limit is not None and (not isinstance(entry_limit, int) or isinstance(entry_limit, bool)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"KeyringStorage: entry_limit must be an int, not {type(entry_limit).__name__}")
        if entry_limit is not None and entry_limit < 64:
            raise ValueError(f"KeyringStorage: entry_limit must be at least 64, not {entry_limit}")
        # Not the runtime directory: a login session has one, and a job of cron does not, but they must meet.
        directory = lock_directory or Path(platformdirs.user_state_dir("asyncpool_creds", appauthor=False)) / "keyring"
        if entry_limit is None and sys.platform == "win32":
            entry_limit = _WINDOWS_LIMIT
        self._service: Final = service
        self._locks: Final = FileLocks(directory)
        self._entries: Final = _Entries(service, backend, entry_limit)

    async def load(self, key: str) -> StoredTokens | None:
        """Return what was saved last under `key`.

        Raises:
            OSError: There is no keyring, or it refuses, or it is locked.
            ValueError: The entry is damaged, or of a later version.
        """
        with without_locals():
            text = await self._get(_entry(key))
            return None if text is None else StoredTokens.from_json(text)

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there.

        Raises:
            OSError: There is no keyring, or it refuses, or it is locked. What was there before still is.
            ValueError: A later version has written what is there, which still is.
        """
        with without_locals():
            await in_thread(self._alone(lambda: self._save(key, tokens)), _one())

    async def delete(self, key: str) -> None:
        """Forget what was saved under `key`.

        Raises:
            OSError: There is no keyring, or it refuses, or it is locked.
        """
        with without_locals():
            await in_thread(self._alone(lambda: self._delete(key)), _one())

    async def load_mark(self, key: str) -> str | None:
        """Return the mark of `key`, which is an entry of its own; None: there is none.

        Raises:
            OSError: There is no keyring, or it refuses, or it is locked.
            ValueError: The entry is damaged.
        """
        return await self._get(_mark_entry(key))

    async def save_mark(self, key: str, mark: str | None) -> None:
        """Keep `mark` in place of what was there, or nothing if it is None.

        Raises:
            OSError: There is no keyring, or it refuses, or it is locked.
        """
        name = _mark_entry(key)
        await in_thread(
            self._alone(lambda: self._entries.remove(name) if mark is None else self._entries.put(name, mark)), _one()
        )

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that something is saved under and that begin with `prefix`, sorted.

        Raises:
            OSError: There is no keyring, or it refuses, or it is locked.
            ValueError: The entry that has the list is damaged.
        """
        job = self._alone(lambda: self._keys(prefix))
        with without_locals():
            return await anyio.to_thread.run_sync(job, abandon_on_cancel=True, limiter=_one())

    @asynccontextmanager
    async def lock(self, key: str) -> AsyncGenerator[None]:
        """Hold the lock of `key`.

        Raises:
            OSError: The file of the lock cannot be opened, or its directory is not private.
        """
        async with self._locks.hold(self._lock_name(key)):
            yield

    async def _get(self, name: str) -> str | None:
        job = self._alone(lambda: self._entries.get(name))
        return await anyio.to_thread.run_sync(job, abandon_on_cancel=True, limiter=_one())

    def _alone(self, job: Callable[[], _T]) -> Callable[[], _T]:
        """Return `job` as something that no two processes do at a time.

        A keyring may be a file that is read and written as a whole, and what is kept here can be several entries.
        """

        def alone() -> _T:
            with self._locks.briefly(self._lock_name(None), _PATIENCE):
                return job()

        return alone

    def _lock_name(self, key: str | None) -> str:
        return hashlib.sha256(json.dumps([self._service, key]).encode()).hexdigest()

    # There is no way to ask a keyring what it has. The list is longer than what there is,
    # if anything, whenever somebody is killed.

    def _save(self, key: str, tokens: StoredTokens) -> None:
        if self._is_later(key):
            raise LaterFormatError(f"the entry {_entry(key)!r} in the keyring")
        listed = self._listed()
        if key not in listed:
            self._entries.put(_LIST, json.dumps([*listed, key]))
        self._entries.put(_entry(key), tokens.to_json())

    def _is_later(self, key: str) -> bool:
        try:
            text = self._entries.get(_entry(key))
        except ValueError:
            return False  # a part is missing, so that nobody can read it
        return text is not None and is_later_format(text)

    def _delete(self, key: str) -> None:
        self._entries.remove(_entry(key))
        listed = self._listed()
        if key in listed:
            self._entries.put(_LIST, json.dumps([one for one in listed if one != key]))

    def _keys(self, prefix: str) -> list[str]:
        listed = (key for key in self._listed() if key.startswith(prefix))
        return sorted(key for key in listed if self._entries.get(_entry(key)) is not None)

    def _listed(self) -> list[str]:
        text = self._entries.get(_LIST)
        try:
            listed: object = [] if text is None else json.loads(text)
        except ValueError:
            listed = None
        if isinstance(listed, list):
            return cast("list[str]", listed)
        raise UnreadableTokensError(
            f"the list of tokens in the keyring, {_LIST!r} of {self._service!r}, is damaged; delete it"
        )

    def __repr__(self) -> str:
        return f"<KeyringStorage {self._service!r} in {self._entries!r}>"


_LIST: Final = "keys"


def _entry(key: str) -> str:
    return f"tokens {_short(key)}"


def _mark_entry(key: str) -> str:
    return f"spent {_short(key)}"


def _short(key: str) -> str:
    # The key is for those who look into the keyring; some of which tell no capital letters from small ones.
    return f"{key[:64]} {hashlib.sha256(key.encode()).hexdigest()[:32]}"


class _Entries:
    """Texts by name, of any length; whoever is killed leaves the old one or the new one."""

    def __init__(self, service: str, backend: KeyringBackend | None, limit: int | None) -> None:
        self._service = service
        self._backend = backend
        self._limit = limit

    def get(self, name: str) -> str | None:
        head = self._get(name)
        if head is None or not head.startswith(_SPLIT):
            return head
        letter, count = _read_head(head)
        parts = [self._get(_part(name, letter, number)) for number in range(count)]
        if not parts or None in parts:
            raise UnreadableTokensError(f"the entry {name!r} of {self._service!r} in the keyring is damaged; delete it")
        return "".join(cast("list[str]", parts))

    def put(self, name: str, text: str) -> None:
        old, _ = _read_head(self._get(name))
        if self._limit is None or len(text) <= self._limit:
            self._set(name, text)
            self._clear(name, "a", 0, seen=old)
            self._clear(name, "b", 0, seen=old)
            return
        # The parts of the old text stay what they are until the head names the new ones.
        letter, other = ("b", "a") if old == "a" else ("a", "b")
        parts = [text[start : start + self._limit] for start in range(0, len(text), self._limit)]
        for number, part in enumerate(parts):
            self._set(_part(name, letter, number), part)
        self._set(name, f"{_SPLIT} {letter} {len(parts)}")
        self._clear(name, letter, len(parts), seen=letter)
        self._clear(name, other, 0, seen=other)

    def remove(self, name: str) -> None:
        old, _ = _read_head(self._get(name))
        self._delete(name)
        self._clear(name, "a", 0, seen=old)
        self._clear(name, "b", 0, seen=old)

    def _clear(self, name: str, letter: str, first: int, *, seen: str) -> None:
        """Delete the parts from number `first`, those that somebody killed has left included."""
        if not seen and self._limit is None:
            return  # nothing was ever split: each look may be a question to the user
        count = first
        while self._get(_part(name, letter, count)) is not None:
            count += 1
        # From the end, so that those that are left can be found by counting.
        for number in reversed(range(first, count)):
            self._delete(_part(name, letter, number))

    def _get(self, name: str) -> str | None:
        return self._ask(lambda backend: backend.get_password(self._service, name))

    def _set(self, name: str, text: str) -> None:
        def set_password(backend: KeyringBackend) -> None:
            backend.set_password(self._service, name, text)  # pyright: ignore[reportUnknownMemberType] - untyped wrapper

        self._ask(set_password, told=text)

    def _delete(self, name: str) -> None:
        if self._get(name) is not None:
            self._ask(lambda backend: backend.delete_password(self._service, name))

    def _ask(self, question: Callable[[KeyringBackend], _T], *, told: str = "") -> _T:
        cause: KeyringError | None = None
        try:
            if self._backend is None:
                self._backend = keyring.get_keyring()
            backend = self._backend
            if not isinstance(backend, (keyring.backends.fail.Keyring, keyring.backends.null.Keyring)):
                return question(backend)
            complaint = (
                "there is no keyring to keep tokens in: start a Secret Service (GNOME Keyring, KWallet, KeePassXC), or "
                "install a keyring of another kind (pip install keyrings.alt), or use FileStorage"
            )
        except KeyringError as error:
            if quotes(str(error), told):
                complaint = f"the keyring ({self!r}) refused: {type(error).__name__}; is it unlocked?"
            else:
                complaint = f"the keyring ({self!r}) refused: {type(error).__name__}: {error}; is it unlocked?"
                cause = error
        except Exception as error:  # noqa: BLE001 - a backend raises what its system does
            # It may quote what is kept, as configparser does.
            complaint = f"the keyring ({self!r}) failed: {type(error).__name__}; is it damaged?"
        raise OSError(complaint) from cause

    def __repr__(self) -> str:
        return _describe(self._backend)


def _describe(backend: KeyringBackend | None) -> str:
    # Not its repr: a backend may be made with a password.
    return "the default keyring" if backend is None else f"{type(backend).__module__}.{type(backend).__qualname__}"


def _part(name: str, letter: str, number: int) -> str:
    return f"{letter}{number} of {name}"


def _read_head(head: str | None) -> tuple[str, int]:
    """Return the letter and the number of the parts that an entry consists of; no letter: it is in one."""
    words = (head or "").split()
    if len(words) == 3 and words[0] == _SPLIT and words[1] in ("a", "b") and words[2].isdecimal():
        return words[1], int(words[2])
    return "", 0


def _one() -> anyio.CapacityLimiter:
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(1)
        _limiter.set(limiter)
    return limiter
