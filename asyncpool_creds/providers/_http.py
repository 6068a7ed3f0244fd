"""HTTP as every source uses it: one place for timeouts, connections, what may be read from an answer, and errors."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

# httpx imports its transport with the first client, which takes 15 ms: the event loop would wait.
import httpcore  # noqa: F401  # pyright: ignore[reportUnusedImport]
import httpx

from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds.providers._arguments import parse_seconds
from asyncpool_creds.providers._retry_after import parse_rate_limit_reset, parse_retry_after

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = [
    "HttpClient",
    "Unanswered",
    "complaint_about",
    "is_transient",
    "retry_after",
    "without_query",
]

# Nothing of the request can have left when one of these is raised.
_NOTHING_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
# Too many requests, too early, took too long: 408 (RFC 9110), 425 (RFC 8470), 429 (RFC 6585).
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429})
# What those who send no Retry-After with a 429 send instead: Okta the first, Auth0 the second.
_RATE_LIMIT_RESETS: Final = ("X-Rate-Limit-Reset", "X-RateLimit-Reset")
# Clients inherited by a forked child: closing their sockets is the parent's business, so they are only kept.
_inherited: list[httpx.AsyncClient] = []


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request without an answer.

    Args:
        error: To raise.
        cause: Of the error; raise the one from the other.
        was_sent: True if the server may have seen the request, and done what it asks for.
    """

    error: ProviderError
    cause: Exception | None = field(default=None)
    was_sent: bool = False


class HttpClient:
    """The requests of one source.

    The httpx client behind it is made on the first request in a process and event loop. No connection is kept:
    requests are minutes apart, and one that meets a connection which the server is just closing is a lost answer,
    which can cost a refresh token or a lease. Nothing is tried twice: the manager is the one who tries again.

    Args:
        source: Who asks, for messages.
        timeout: Seconds, or a timedelta, that one request may take as a whole.
        make_client: Makes the httpx client; None: one of httpx's defaults.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `timeout` is not more than zero and finite.
    """

    def __init__(
        self, source: str, *, timeout: float | timedelta, make_client: Callable[[], httpx.AsyncClient] | None
    ) -> None:
        if make_client is not None and not callable(make_client):
            raise TypeError(f"{source}: http_client must be a function that makes an httpx.AsyncClient, not a client")
        self._source: Final = source
        self._timeout: Final = parse_seconds(source, "timeout", timeout)
        self._make_client: Final = make_client
        self._client: httpx.AsyncClient | None = None
        self._home: tuple[int, AbstractEventLoop] | None = None

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        form: Mapping[str, str] | None = None,
        document: object = None,
    ) -> httpx.Response | Unanswered:
        """Return the answer, whatever its status, or what became of the request.

        An exception comes from the function that makes the client: nothing was sent.

        Args:
            method: The HTTP method.
            url: Where to; redirects are not followed, because secrets must not be.
            headers: More headers.
            form: Sent as a form.
            document: Sent as JSON, unless None.
        """
        client = await self._open()
        # A third of the time for connecting and for TLS each, so that running out of
        # time as a whole always means that the request has left.
        timeout = httpx.Timeout(self._timeout, connect=self._timeout / 3, pool=self._timeout / 3)
        where = without_query(url)
        try:
            with anyio.fail_after(self._timeout):
                return await client.request(
                    method,
                    url,
                    # A client of the caller's would keep the connection.
                    headers={"Accept": "application/json", "Connection": "close", **(headers or {})},
                    data=form,
                    json=document,
                    timeout=timeout,
                    follow_redirects=False,
                )
        except TimeoutError as error:
            return Unanswered(self._timed_out(where), error, was_sent=True)
        except httpx.RequestError as error:
            # The request that was sent has the secrets in its body, and an exception can be pickled.
            error.request = httpx.Request(method, url)
            if isinstance(error, _NOTHING_SENT):
                kind = ProviderTimeout if isinstance(error, httpx.TimeoutException) else ProviderError
                reason = f"{type(error).__name__}: {error}"
                message = f"{self._source}: {where} cannot be reached ({reason}); check address and network"
                return Unanswered(kind(message), error)
            if isinstance(error, httpx.TimeoutException):
                return Unanswered(self._timed_out(where), error, was_sent=True)
            # Its text may quote what was sent.
            message = (
                f"{self._source}: the connection to {where} broke before the answer was complete "
                f"({type(error).__name__})"
            )
            return Unanswered(ProviderError(message), error, was_sent=True)
        except Exception as error:  # noqa: BLE001 - from the caller's own hook or transport
            message = f"{self._source}: the http_client failed at {where} ({type(error).__name__})"
            # httpx's own would show the request that was sent.
            cause = None if isinstance(error, httpx.HTTPError) else error
            return Unanswered(ProviderError(message), cause, was_sent=True)

    async def aclose(self) -> None:
        """Close the connections; a later request opens new ones. Nothing happens in another loop, or in a fork."""
        client = self._client
        if client is not None and self._home == (os.getpid(), asyncio.get_running_loop()):
            self._client = None
            await client.aclose()

    async def _open(self) -> httpx.AsyncClient:
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            if self._client is not None and self._home is not None and self._home[0] != home[0]:
                _inherited.append(self._client)
            # What belongs to another loop can be neither awaited nor closed from this one.
            self._home, self._client = home, None
        if self._client is None and self._make_client is not None:
            self._client = self._make_client()
        if self._client is None:
            # Reading the certificate authorities takes 20 ms: not on the event loop.
            client = await anyio.to_thread.run_sync(_make_client)
            if self._client is None:
                self._client = client
        return self._client

    def _timed_out(self, where: str) -> ProviderTimeout:
        return ProviderTimeout(f"{self._source}: {where} did not answer within {self._timeout:g} s")


def _make_client() -> httpx.AsyncClient:
    authorities = _load_authorities(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    return httpx.AsyncClient(verify=authorities, limits=httpx.Limits(max_keepalive_connections=0))


@functools.cache
def _load_authorities(_file: str | None, _directory: str | None) -> ssl.SSLContext:
    """Return the certificate authorities that httpx trusts by default, once for all sources of a process.

    A thousand tenants would hold a thousand copies. The arguments are the variables in which httpx looks itself.
    """
    return httpx.create_ssl_context()


def complaint_about(address: str) -> str | None:
    """Return what is wrong with an address that secrets are to be sent to; never the address, which may hold one."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return "is not a valid URL"
    if url.userinfo:
        return "must not contain a user or password; there are arguments for them"
    if not url.host or url.scheme not in ("http", "https"):
        return "must be a full URL, such as 'https://login.example.com/oauth2/token'"
    if url.fragment:
        return "must not contain a fragment"
    if url.scheme == "http" and not _is_loopback(url.host):
        return "must be https: secrets are sent there; plain http is for loopback addresses only"
    return None


def is_transient(status: int) -> bool:
    """Return whether an HTTP status is the server's trouble, which passes, and not ours."""
    return status >= 500 or status in _TRANSIENT_STATUS


def retry_after(response: httpx.Response, now: datetime) -> float | None:
    """Return the seconds to wait that an answer asks for; None: it does not, or not in a way that can be read."""
    wait = parse_retry_after(response.headers.get("Retry-After"), now)
    if wait is not None or response.status_code != 429:
        return wait
    resets = (parse_rate_limit_reset(response.headers.get(name), now) for name in _RATE_LIMIT_RESETS)
    return next((reset for reset in resets if reset is not None), None)


def without_query(url: str) -> str:
    """Return `url` for a message."""
    return url.partition("?")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
