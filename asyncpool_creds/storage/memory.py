"""Tokens kept in memory: gone with the process, and not shared with a fork of it."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from asyncpool_creds.storage._turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from asyncpool_creds.storage import StoredTokens

__all__ = ["MemoryStorage"]


class MemoryStorage:
    """A `TokenStorage` for one process.

    Providers may share one, within one event loop. A forked child finds it empty: both
    would spend the same refresh token.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, StoredTokens] = {}
        self._turns = Turns()
        self._process = os.getpid()

    async def load(self, key: str) -> StoredTokens | None:
        """Return what was saved last under `key`."""
        self._forget_if_forked()
        return self._tokens.get(key)

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there."""
        self._forget_if_forked()
        self._tokens[key] = tokens

    async def delete(self, key: str) -> None:
        """Forget what was saved under `key`."""
        self._forget_if_forked()
        self._tokens.pop(key, None)

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that something is saved under and that begin with `prefix`, sorted."""
        self._forget_if_forked()
        return sorted(key for key in self._tokens if key.startswith(prefix))

    @asynccontextmanager
    async def lock(self, key: str) -> AsyncGenerator[None]:
        """Hold the lock of `key`."""
        self._forget_if_forked()
        async with self._turns.of(key):
            yield

    def _forget_if_forked(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._tokens.clear()
            self._turns = Turns()

    def __repr__(self) -> str:
        return f"<MemoryStorage {len(self._tokens)} tokens>"
