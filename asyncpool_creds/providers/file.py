"""Credentials from a mounted file: a Kubernetes projected token, a Vault agent's template, a CSI driver's secret."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, NoReturn, cast

import anyio
import anyio.to_thread

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential, password_flaw
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._document import MAX_BYTES, earliest_end, parse_moment, parse_object

__all__ = ["File"]

# A file that is just being written is read again after each of these seconds; then what was good before goes on.
_PAUSES: Final = (0.02, 0.05, 0.1, 0.2)
# Of a text that was written less than these seconds ago, the rest may be on its way; JSON shows its own end.
_SETTLED_AFTER: Final = 0.05
# Threads that hang on a file system which does not answer. They cannot be ended, so there is an end to making them.
_MOST_THREADS: Final = 4
# A pipe must not hold the thread that opens it; on a regular file the flag means nothing (open(2)).
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class File:
    """A provider of whatever password or token a file holds.

    The file is read at every fetch, off the event loop, and whoever writes it may replace it in any way: in place,
    by renaming another one over it, by changing a symbolic link anywhere on the path (Kubernetes). A file that is
    empty, cut short, or that changes while it is read, is read again for about a third of a second, and then
    reported with a retryable error, so that the credential before it stays in use. A file that was touched, or
    written anew with what it held before, is no rotation.

    Whether others may read the file is your decision: its permissions are not looked at.

    Args:
        path: The file, in UTF-8; symbolic links are followed anew each time.
        format: ``"plain"``: all of it is the password, but for line breaks at the end. ``"json"``: an object with the
            members below. ``"auto"``: JSON if it begins with a brace.
        user: The database user to log in as; None: as the file says, or the connection's own.
        user_path: A second file that holds the user. If either changes while they are read, both are read again.
        password_key: The member with the password. The defaults are the shape of the secrets that AWS makes for RDS
            databases. A dot leads one level down: ``"data.password"``.
        user_key: The member with the user; it may be missing. Not looked at if the user is given otherwise.
        expires_at_key: The member with the time at which the server will refuse the password: seconds since 1970, or
            ISO 8601 with its time zone; it may be missing. A JSON Web Token says so itself; the earlier one counts.
        check_every: Seconds, or a timedelta, after which a manager looks for a change; None: only before the
            expiry, or when the server refuses the password. Less than a second counts as one.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty or out of range, or arguments contradict each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: Literal["auto", "plain", "json"] = "auto",  # noqa: A002 - no other word says it
        user: str | None = None,
        user_path: str | os.PathLike[str] | None = None,
        password_key: str = "password",  # noqa: S107 - the name of a member
        user_key: str = "username",
        expires_at_key: str = "expires_at",
        check_every: float | timedelta | None = 30.0,
        clock: Clock | None = None,
    ) -> None:
        keys = {"password_key": password_key, "user_key": user_key, "expires_at_key": expires_at_key}
        for name, value in keys.items():
            if value is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise TypeError(f"File: {name} must be a str, not None")
            check_text("File", name, value)
        check_text("File", "user", user)
        if format not in ("auto", "plain", "json"):
            raise ValueError(f"File: format must be 'auto', 'plain' or 'json', not {format!r}")
        if user is not None and user_path is not None:
            raise ValueError("File: pass either user or user_path")
        self._path: Final = _full_path("path", path)
        self._user_path: Final = None if user_path is None else _full_path("user_path", user_path)
        self._format: Final = format
        self._user: Final = user
        self._password_key: Final = password_key
        self._user_key: Final = user_key
        self._expires_at_key: Final = expires_at_key
        self._check_every: Final = None if check_every is None else parse_seconds("File", "check_every", check_every)
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._threads: Final[set[tuple[int, int]]] = set()
        self._latest: tuple[str, datetime] | None = None  # what the file held, and since when we know

    def __repr__(self) -> str:
        return f"<File {self._path} format={self._format}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a File provider holds a secret and cannot be pickled; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return what the file holds now.

        Raises:
            ProviderError: It holds nothing usable; ``retryable`` is True if that can pass by itself: it is
                missing, being written, or its file system is in trouble.
        """
        content = await self._read_when_settled()
        if flaw := password_flaw(content.password):
            raise ProviderError(f"file: the password in {self._path} {flaw}", retryable=False)
        now = utc_now(self._clock)
        if self._latest is None or self._latest[0] != content.password:
            self._latest = (content.password, now)
        # A life that a token states is counted from when it was first seen, not anew with every look at it.
        end = earliest_end(content.password, self._latest[1], content.expires_at)
        look = None if self._check_every is None else now + timedelta(seconds=self._check_every)
        return Credential(content.password, user=content.user, expires_at=end, refresh_at=look)

    async def _read_when_settled(self) -> _Content:
        for pause in _PAUSES:
            try:
                return await self._read_off_the_loop(is_last=False)
            except _Unsettled:
                await anyio.sleep(pause)
        try:
            return await self._read_off_the_loop(is_last=True)
        except _Unsettled as unsettled:
            raise ProviderError(
                f"file: {unsettled}, as if it were just being written; if that lasts, have it written to another "
                "file that is then renamed"
            ) from unsettled

    async def _read_off_the_loop(self, *, is_last: bool) -> _Content:
        process = os.getpid()
        if sum(owner == process for owner, _ in tuple(self._threads)) >= _MOST_THREADS:
            raise ProviderError(
                f"file: {_MOST_THREADS} attempts to read {self._path} are still waiting for its file system; "
                "is the server behind the mount reachable?"
            )
        # Left alone on cancellation: a file system that hangs must not hold up a close, nor use up what others share.
        return await anyio.to_thread.run_sync(
            self._read_in_thread, is_last, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
        )

    # In a thread

    def _read_in_thread(self, is_last: bool) -> _Content:
        thread = (os.getpid(), threading.get_ident())
        self._threads.add(thread)
        try:
            return self._read(is_last=is_last)
        finally:
            self._threads.discard(thread)

    def _read(self, *, is_last: bool) -> _Content:
        found = _read_text(self._path)
        user = self._user
        if self._user_path is not None:
            user = _read_text(self._user_path).text.rstrip("\r\n")
            if not user:
                raise _Unsettled(f"{self._user_path} is empty")
            if _read_text(self._path).identity != found.identity:
                raise _Unsettled(f"{self._path} changed while {self._user_path} was read")
        if self._format == "json" or (self._format == "auto" and found.text.lstrip().startswith("{")):
            return self._content(found.text, user)
        password = found.text.rstrip("\r\n")
        if not password:
            raise _Unsettled(f"{self._path} is empty")
        if not is_last and 0 <= time.time() - found.modified_at < _SETTLED_AFTER:
            raise _Unsettled(f"{self._path} was written a moment ago")
        return _Content(password, user, None)

    def _content(self, text: str, user: str | None) -> _Content:
        document = parse_object(text)
        if document is None:
            hint = "; format='plain' takes it as it is" if self._format == "auto" else ""
            raise _Unsettled(f"{self._path} holds {'no complete JSON object' if text.strip() else 'nothing'}{hint}")
        password = _member(document, self._password_key)
        if password == "":
            raise _Unsettled(f"{self._path} has an empty {self._password_key!r}")
        if not isinstance(password, str):
            raise self._complaint("password_key", self._password_key, "text")
        if user is None:
            named = _member(document, self._user_key)
            if named is not None and (not isinstance(named, str) or not named):
                raise self._complaint("user_key", self._user_key, "text")
            user = named
        expires_at = None
        stated = _member(document, self._expires_at_key)
        if stated is not None:
            expires_at = parse_moment(stated)
            if expires_at is None:
                raise self._complaint(
                    "expires_at_key", self._expires_at_key, "seconds since 1970, or ISO 8601 with zone"
                )
        return _Content(password, user, expires_at)

    def _complaint(self, argument: str, key: str, expected: str) -> ProviderError:
        return ProviderError(
            f"file: {self._path} has no member {key!r} that is {expected}; check its content, and {argument}",
            retryable=False,
        )


@dataclass(frozen=True, slots=True)
class _Content:
    password: str = field(repr=False)
    user: str | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Found:
    text: str = field(repr=False)
    identity: tuple[int, int, int, int]
    modified_at: float


class _Unsettled(Exception):
    """A file seems to be in the middle of being written."""


def _read_text(path: str) -> _Found:
    """Return what the file holds at one moment."""
    try:
        # The descriptor stays with one file, whatever becomes of the path meanwhile.
        with open(path, "rb", opener=_open) as file:
            before = os.fstat(file.fileno())
            _check_kind(path, before)
            data = file.read(MAX_BYTES + 1)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise _explain(path, error) from error
    if len(data) > MAX_BYTES:
        raise ProviderError(
            f"file: {path} holds more than {MAX_BYTES} bytes; that is no password, so check the path", retryable=False
        )
    if _identity(before) != _identity(after):
        raise _Unsettled(f"{path} changed while it was read")
    return _Found(_decode(path, data), _identity(after), after.st_mtime)


def _open(path: str, flags: int) -> int:  # noqa: ARG001 - what an opener is called with
    return os.open(path, _FLAGS)


def _check_kind(path: str, found: os.stat_result) -> None:
    # Not a directory either: open() refuses those itself.
    if not stat.S_ISREG(found.st_mode):
        raise ProviderError(f"file: {path} is a pipe, a socket or a device, and no file", retryable=False)


def _explain(path: str, error: OSError) -> ProviderError:
    """Return who has to do what."""
    if isinstance(error, FileNotFoundError):
        return ProviderError(f"file: {path} does not exist; is it mounted, and has it been written yet?")
    if isinstance(error, PermissionError):
        return ProviderError(
            f"file: {path} may not be read by this process (user {_user_id()}); change its owner, its mode or "
            "that of a directory above it (in a Kubernetes pod: fsGroup, or defaultMode of the volume)",
            retryable=False,
        )
    if isinstance(error, IsADirectoryError):
        return ProviderError(f"file: {path} is a directory; name the file in it", retryable=False)
    if isinstance(error, NotADirectoryError):
        return ProviderError(f"file: {path} leads through something that is no directory", retryable=False)
    return ProviderError(f"file: {path} cannot be read ({error.strerror})")


def _user_id() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "unknown"


def _decode(path: str, data: bytes) -> str:
    # The exception of a decoder carries the bytes, so it must not become part of another.
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        is_cut_short = error.end == len(data) and error.reason == "unexpected end of data"
    if is_cut_short:
        raise _Unsettled(f"{path} ends in the middle of a character")
    raise ProviderError(f"file: {path} is not UTF-8 text; was a binary secret mounted?", retryable=False)


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _member(document: Mapping[str, object], key: str) -> object:
    """Return the member `key`; a dot that is not part of a name leads one level down."""
    if key in document:
        return document[key]
    outer, dot, inner = key.partition(".")
    within = document.get(outer)
    return _member(cast("dict[str, object]", within), inner) if dot and isinstance(within, dict) else None


def _full_path(name: str, path: object) -> str:
    text: object = os.fspath(cast("os.PathLike[str]", path)) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"File: {name} must be a str or a path, not {type(text).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"File: {name} is empty, or contains a NUL")
    # Now, so that a later chdir() does not make it another file.
    return os.path.abspath(text)  # noqa: PTH100 - as text
