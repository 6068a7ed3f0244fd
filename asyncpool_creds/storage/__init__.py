"""Where refresh tokens are kept, so that one that is good only once is never used twice."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

from asyncpool_creds.storage.memory import MemoryStorage

__all__ = ["MemoryStorage", "StoredTokens", "TokenStorage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTokens:
    """What is kept between two fetches; the secret is never part of ``repr``.

    Args:
        refresh_token: The refresh token to use next. None: the last one is spent and its
            successor was lost, so that only a new login helps.
        expires_at: Aware datetime from which the issuer refuses it; None: not known.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The token is empty, or the datetime is naive.
    """

    refresh_token: str | None = field(repr=False)
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        token, expires_at = self.refresh_token, self.expires_at
        if token is not None and not isinstance(token, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"StoredTokens: refresh_token must be a str or None, not {type(token).__name__}")
        if token == "":
            raise ValueError("StoredTokens: refresh_token is empty; None says that there is none")
        if expires_at is None:
            return
        if not isinstance(expires_at, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"StoredTokens: expires_at must be a datetime or None, not {type(expires_at).__name__}")
        if expires_at.utcoffset() is None:
            raise ValueError("StoredTokens: expires_at is naive; give it a time zone, as in datetime.now(timezone.utc)")
        object.__setattr__(self, "expires_at", expires_at.astimezone(UTC))


@runtime_checkable
class TokenStorage(Protocol):
    """Keeps tokens by name.

    Whoever exchanges a refresh token does all of it under the lock: load, exchange, save, and
    only then use what came::

        async with storage.lock(key):
            stored = await storage.load(key)
            fresh = await exchange(stored)
            await storage.save(key, fresh)
    """

    async def load(self, key: str) -> StoredTokens | None:
        """Return what was saved last under `key`; None: nothing ever was."""
        ...

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there; on return they are safe."""
        ...

    def lock(self, key: str) -> AbstractAsyncContextManager[None]:
        """Return the lock of `key`: one holder at a time among all who share this storage.

        It is not reentrant. Cancelling one who waits for it takes nothing from the others.
        """
        ...
