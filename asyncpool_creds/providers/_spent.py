"""Refresh tokens that must not be sent again: what this process knows of them, and the mark that a storage keeps."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import OrderedDict
from typing import Final
from urllib.parse import urlsplit

__all__ = ["SPENT", "SpentTokens", "is_mark_of", "mark_of"]

# At 32 bytes of fingerprint and about 150 in memory each, ten megabytes at most. A token that is exchanged every five
# minutes takes more than half a year to get there, and what is in use is renewed.
_LIMIT: Final = 65_536
_SALT_SIZE: Final = 16
_MARK_SIZE: Final = 8
_PURPOSE: Final = b"asyncpool_creds"


class SpentTokens:
    """Which refresh tokens were sent, and may have been good only once.

    Only fingerprints are kept, made with a key that dies with the process. Threads may share it, and a
    forked child knows what its parent had spent. Beyond `limit` tokens, the one that was renewed the longest
    ago is forgotten.

    Args:
        limit: How many are remembered.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit: Final = limit
        self._key: Final = os.urandom(32)
        self._fingerprints: Final = OrderedDict[bytes, object]()

    def add(self, where: str, token: str) -> bool:
        """Remember `token`, or renew it; return whether it is news, which it is to one of several threads only.

        Args:
            where: The address of the issuer: its host decides, since providers may name it in several ways.
            token: The refresh token.
        """
        fingerprint, mine = self._fingerprint(where, token), object()
        is_news = self._fingerprints.setdefault(fingerprint, mine) is mine
        if is_news:
            while len(self._fingerprints) > self._limit:
                self._fingerprints.popitem(last=False)
        else:
            self._fingerprints.move_to_end(fingerprint)
        return is_news

    def discard(self, where: str, token: str) -> None:
        """Forget `token`: it was not sent after all, or turned out to be reusable."""
        self._fingerprints.pop(self._fingerprint(where, token), None)

    def has(self, where: str, token: str) -> bool:
        """Return whether `token` is remembered."""
        return self._fingerprint(where, token) in self._fingerprints

    def _fingerprint(self, where: str, token: str) -> bytes:
        address = urlsplit(where)
        text = f"{address.netloc.lower()} {token}"
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=32, key=self._key).digest()


SPENT: Final = SpentTokens()
"""What this process knows: one for all providers and event loops."""


def mark_of(token: str) -> str:
    """Return what a storage may keep to tell later that `token` was spent.

    A fast hash is enough: a refresh token is not a password that somebody chose, but a random number of at least 128
    bits (RFC 6749 section 10.10), which nobody finds by trying. There is no key, because it would have to lie beside
    the mark to be there after a restart. The salt keeps marks of one token in two places from being recognized as
    such. Only 64 bits of the hash are kept: as many tokens fit it that whoever reads the mark cannot tell which one it
    was, and few enough that none of them turns up by chance.
    """
    salt = os.urandom(_SALT_SIZE)
    return f"{salt.hex()}:{_digest(salt, token).hex()}"


def is_mark_of(token: str, mark: str) -> bool:
    """Return whether `mark` says that `token` was spent; one that cannot be read says so of every token."""
    salt_text, _, digest_text = mark.strip().partition(":")
    try:
        salt, digest = bytes.fromhex(salt_text), bytes.fromhex(digest_text)
    except ValueError:
        return True
    if len(salt) != _SALT_SIZE or len(digest) != _MARK_SIZE:
        return True
    return hmac.compare_digest(digest, _digest(salt, token))


def _digest(salt: bytes, token: str) -> bytes:
    text = token.encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=_MARK_SIZE, salt=salt, person=_PURPOSE).digest()
