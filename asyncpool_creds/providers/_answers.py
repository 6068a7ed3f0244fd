"""Answers to the SDKs of vendors: how much is read of one, and what a proxy is for."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from asyncpool_creds._loopback import is_loopback

if TYPE_CHECKING:
    # Not every SDK brings it.
    import aiohttp

__all__ = [
    "MAX_ANSWER",
    "MAX_PARSED_ON_LOOP",
    "Answer",
    "UnusableAnswer",
    "check_head",
    "check_size",
    "is_direct",
    "read_body",
]

MAX_ANSWER: Final = 1 << 20
"""Bytes of an answer that are read. Tokens of PostgreSQL end at 65535 bytes, and secrets of AWS at 65536."""

MAX_PARSED_ON_LOOP: Final = 1 << 16
"""Bytes that an SDK may parse on the event loop, which takes it less than a millisecond."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# The name of Google's metadata server, which stands for its link-local address.
_METADATA_NAMES: Final = frozenset({"metadata.google.internal"})
# What botocore takes for a metadata service beside link-local addresses (Amazon EC2 and EKS User Guides).
_METADATA_ADDRESSES: Final = frozenset({"fd00:ec2::23", "fd00:ec2::254"})


class UnusableAnswer(Exception):
    """An answer that is not read, and why: words that follow the name of who gave it."""


class Answer:
    """An answer of aiohttp that has been read: for SDKs that want to read it themselves."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self._response = response
        self._body = body

    async def read(self) -> bytes:
        """Return all of it."""
        return self._body

    def __getattr__(self, name: str) -> object:
        return getattr(self._response, name)


async def read_body(response: aiohttp.ClientResponse, limit: int = MAX_ANSWER) -> bytes:
    """Return the body of an answer for which no encoding was accepted.

    Raises:
        UnusableAnswer: It has more than `limit` bytes; it is compressed; it points elsewhere.
    """
    try:
        check_head(response.status, response.headers)
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            check_size(len(body), limit)
    except BaseException:
        # Whatever is still coming is not waited for.
        response.close()
        raise
    return bytes(body)


def check_head(status: int, headers: Mapping[str, str]) -> None:
    """Raise unless an answer is worth reading.

    Raises:
        UnusableAnswer: It points elsewhere, or it is compressed: what was asked for is ``identity``, so that an
            answer is no larger than it looks.
    """
    if status in _REDIRECTS:
        raise UnusableAnswer(
            f"points to another address (HTTP {status}), which is not followed, because the request holds secrets; "
            f"is it a proxy?"
        )
    encoding = headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise UnusableAnswer("compresses its answer, which was not asked for; is it a proxy?")


def check_size(size: int, limit: int = MAX_ANSWER) -> None:
    """Raise if an answer is too large.

    Raises:
        UnusableAnswer: It has more than `limit` bytes.
    """
    if size > limit:
        raise UnusableAnswer(f"answered with more than {limit >> 10} KiB; is it a proxy?")


def is_direct(url: str) -> bool:
    """Return whether `url` is plain http to this host or its metadata service, where no proxy has any business."""
    try:
        address = urlsplit(url)
        host = (address.hostname or "").rstrip(".")
    except ValueError:
        return False
    if address.scheme != "http":
        return False
    if is_loopback(host) or host in _METADATA_NAMES or host in _METADATA_ADDRESSES:
        return True
    try:
        # Not with a zone: what stands behind it may be anything.
        return ipaddress.ip_address("" if "%" in host else host).is_link_local
    except ValueError:
        return False
