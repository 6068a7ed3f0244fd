"""HTTP as every source uses it: one place for timeouts, connections, what may be read from an answer, and errors."""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

# httpx imports its transport with the first client, which takes 15 ms: the event loop would wait.
import httpcore
import httpx

from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._loopback import is_loopback
from asyncpool_creds._tracebacks import class_and_place, clear_frames, without_baggage
from asyncpool_creds.providers._arguments import parse_seconds
from asyncpool_creds.providers._document import parse_object
from asyncpool_creds.providers._retry_after import parse_rate_limit_reset, parse_retry_after

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = [
    "HttpClient",
    "Response",
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
# No token response, metadata or secret comes near it: a megabyte of JSON is some thousand tokens.
_MOST_BYTES: Final = 1 << 20
_TOO_MUCH: Final = f"more than {_MOST_BYTES} bytes, which nothing that is asked for there has"
# More JSON than that takes longer to read than an event loop should stand still.
_MOST_BYTES_ON_THE_LOOP: Final = 1 << 16
# zlib's word for either of its own format and gzip's, whichever it finds (zlib manual, inflateInit2).
_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS + 32
# Clients inherited by a forked child: closing their sockets is the parent's business, so they are only kept.
_inherited: list[httpx.AsyncClient] = []


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, as far as it is of use.

    Args:
        url: What was asked, without its query.
        status_code: The HTTP status.
        headers: Its headers.
        is_empty: True if there is nothing behind the headers.
        members: The JSON object behind the headers; None if there is something else, or nothing.
    """

    url: str
    status_code: int
    headers: Mapping[str, str] = field(repr=False)
    is_empty: bool
    members: Mapping[str, object] | None = field(repr=False)

    @property
    def is_success(self) -> bool:
        return 200 <= self.status_code < 300

    @property
    def is_redirect(self) -> bool:
        return 300 <= self.status_code < 400


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request without an answer.

    Args:
        error: To raise; its cause is set.
        was_sent: True if the server may have seen the request, and done what it asks for.
    """

    error: ProviderError
    was_sent: bool = False


class HttpClient:
    """The requests of one source.

    The httpx client behind it is made on the first request in a process and event loop. No connection is kept:
    requests are minutes apart, and one that meets a connection which the server is just closing is a lost answer,
    which can cost a refresh token or a lease. Nothing is tried twice: the manager is the one who tries again. No
    redirect is followed, and plain http, which is for loopback, does not go through a proxy.

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
    ) -> Response | Unanswered:
        """Return the answer, whatever its status, or what became of the request.

        No error that comes of it, and no cause of one, has a local or an attribute with what was sent.

        An exception comes from the function that makes the client: nothing was sent.

        Args:
            method: The HTTP method.
            url: Where to; redirects are not followed, because secrets must not be.
            headers: More headers.
            form: Sent as a form.
            document: Sent as JSON, unless None.
        """
        client = await self._open()
        exchange = self._exchange(client, method, url, headers=headers or {}, form=form, document=document)
        # The frame of this function is in the traceback of what fails, and cannot be emptied while it runs.
        del headers, form, document
        outside = sys.exception()
        try:
            with anyio.fail_after(self._timeout):
                return await exchange
        except Exception as error:  # noqa: BLE001 - also from the caller's own hook or transport
            clear_frames(error, outside=outside)
            return self._without_answer(error, method, without_query(url))

    async def _exchange(
        self,
        client: httpx.AsyncClient,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
        document: object,
    ) -> Response:
        # A third of the time for connecting and for TLS each, so that running out of
        # time as a whole always means that the request has left.
        timeout = httpx.Timeout(self._timeout, connect=self._timeout / 3, pool=self._timeout / 3)
        ours = {
            "Accept": "application/json",
            # What is small enough to be taken needs no compression.
            "Accept-Encoding": "identity",
            # A client of the caller's would keep the connection.
            "Connection": "close",
        }
        async with client.stream(
            method, url, headers={**ours, **headers}, data=form, json=document, timeout=timeout, follow_redirects=False
        ) as response:
            try:
                content = await _read(response)
            except _UnfitError:
                if response.is_success:
                    raise
                content = b"?"  # the status says enough
        return Response(
            url=without_query(url),
            status_code=response.status_code,
            headers=response.headers,
            is_empty=not content,
            members=await _parse(content),
        )

    def _without_answer(self, error: Exception, method: str, where: str) -> Unanswered:
        """Return what is to be said and done about `error`, whose frames are empty."""
        if isinstance(error, TimeoutError):
            return _unanswered(self._timed_out(where), error, was_sent=True)
        if isinstance(error, _NOTHING_SENT):
            # The request that was not sent has the secrets in its body, and an exception can be pickled.
            error.request = httpx.Request(method, where)
            kind = ProviderTimeout if isinstance(error, httpx.TimeoutException) else ProviderError
            reason = f"{type(error).__name__}: {error}"
            message = f"{self._source}: {where} cannot be reached ({reason}); check address and network"
            return _unanswered(kind(message), error)
        if isinstance(error, _UnfitError):
            message = f"{self._source}: {where} answered with {error}; is it the right address?"
            return Unanswered(ProviderError(message), was_sent=True)
        # From here on, texts and attributes may hold what was sent: servers and hooks quote it.
        cause = without_baggage(error)
        if isinstance(error, httpx.TimeoutException):
            return _unanswered(self._timed_out(where), cause, was_sent=True)
        if isinstance(error, httpx.RequestError):
            message = (
                f"{self._source}: the connection to {where} broke before the answer was complete "
                f"({type(error).__name__})"
            )
            return _unanswered(ProviderError(message), cause, was_sent=True)
        message = f"{self._source}: the http_client failed at {where} ({class_and_place(error)})"
        return _unanswered(ProviderError(message), cause, was_sent=True)

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
            client = self._make_client()
            if not isinstance(client, httpx.AsyncClient):  # pyright: ignore[reportUnnecessaryIsInstance]
                message = f"{self._source}: http_client must make an httpx.AsyncClient, not {type(client).__name__}"
                raise ProviderError(message, retryable=False)
            _keep_loopback_from_proxies(client)
            self._client = client
        if self._client is None:
            # Reading the certificate authorities takes 20 ms: not on the event loop.
            client = await anyio.to_thread.run_sync(_make_client)
            if self._client is None:
                self._client = client
        return self._client

    def _timed_out(self, where: str) -> ProviderTimeout:
        return ProviderTimeout(f"{self._source}: {where} did not answer within {self._timeout:g} s")


def _unanswered(error: ProviderError, cause: Exception, *, was_sent: bool = False) -> Unanswered:
    error.__cause__ = cause
    return Unanswered(error, was_sent=was_sent)


def _make_client() -> httpx.AsyncClient:
    authorities = _load_authorities(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    return httpx.AsyncClient(
        verify=authorities,
        limits=httpx.Limits(max_keepalive_connections=0),
        # Plain http is for loopback. A proxy that the environment or the system names is elsewhere, and would read it.
        mounts={"http://": None},
    )


@functools.cache
def _load_authorities(_file: str | None, _directory: str | None) -> ssl.SSLContext:
    """Return the certificate authorities that httpx trusts by default, once for all sources of a process.

    A thousand tenants would hold a thousand copies. The arguments are the variables in which httpx looks itself.
    """
    return httpx.create_ssl_context()


def _keep_loopback_from_proxies(client: httpx.AsyncClient) -> None:
    """Have a client of the caller's send plain http directly, whatever proxies it has or found in the environment."""
    parts = vars(client)  # httpx has no public way to say, or to ask, where a client that is made sends something
    own: httpx.AsyncBaseTransport = parts["_transport"]
    direct = own
    if _is_proxied(own):
        # It is never used for TLS.
        direct = httpx.AsyncHTTPTransport(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        parts["_transport"] = _ProxyForRemote(own, direct)
    mounts: dict[object, httpx.AsyncBaseTransport | None] = parts["_mounts"]
    for pattern, transport in mounts.items():
        if transport is not None and _is_proxied(transport):
            mounts[pattern] = _ProxyForRemote(transport, direct)


def _is_proxied(transport: httpx.AsyncBaseTransport) -> bool:
    return isinstance(getattr(transport, "_pool", None), (httpcore.AsyncHTTPProxy, httpcore.AsyncSOCKSProxy))


class _ProxyForRemote(httpx.AsyncBaseTransport):
    """Goes through a proxy, but for plain http to this machine."""

    def __init__(self, proxy: httpx.AsyncBaseTransport, direct: httpx.AsyncBaseTransport) -> None:
        self._proxy: Final = proxy
        self._direct: Final = direct

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        is_ours = request.url.scheme == "http" and is_loopback(request.url.host)
        return await (self._direct if is_ours else self._proxy).handle_async_request(request)

    async def aclose(self) -> None:
        await self._proxy.aclose()  # nothing is kept open by the other one, or it is the client's own


class _UnfitError(Exception):
    """An answer that is not read to its end; the text says what it is."""


async def _read(response: httpx.Response) -> bytes:
    """Return what stands behind the headers.

    Raises:
        _UnfitError: It is too long, however it comes, or cannot be decompressed.
    """
    if response.is_stream_consumed:  # by a hook of the caller's
        content = response.content
        if len(content) > _MOST_BYTES:
            raise _UnfitError(_TOO_MUCH)
        return content
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and float(length) > _MOST_BYTES:
        raise _UnfitError(_TOO_MUCH)
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise _UnfitError("a Content-Encoding that was not asked for")
    inflate = None if coding == "identity" else zlib.decompressobj(_GZIP_OR_ZLIB)
    received, read = 0, bytearray()
    async for chunk in response.aiter_raw():
        received += len(chunk)
        # Never more at a time than is allowed in all: a kilobyte can hold a megabyte.
        read += chunk if inflate is None else _inflated(inflate.decompress, chunk, _MOST_BYTES + 1 - len(read))
        if max(received, len(read)) > _MOST_BYTES:
            raise _UnfitError(_TOO_MUCH)
    if inflate is not None and received and not inflate.eof:
        raise _UnfitError("compressed data that is cut short")
    return bytes(read)


async def _parse(content: bytes) -> Mapping[str, object] | None:
    if len(content) <= _MOST_BYTES_ON_THE_LOOP:
        return parse_object(content)
    # Not one of the threads that everybody shares: a login does not wait for them.
    return await anyio.to_thread.run_sync(parse_object, content, limiter=anyio.CapacityLimiter(1))


def _inflated(decompress: Callable[[bytes, int], bytes], chunk: bytes, most: int) -> bytes:
    try:
        return decompress(chunk, most)
    except zlib.error:
        raise _UnfitError("compressed data that is broken") from None


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
    if url.scheme == "http" and not is_loopback(url.host):
        return "must be https: secrets are sent there; plain http is for loopback addresses only"
    return None


def is_transient(status: int) -> bool:
    """Return whether an HTTP status is the server's trouble, which passes, and not ours."""
    return status >= 500 or status in _TRANSIENT_STATUS


def retry_after(response: Response, now: datetime) -> float | None:
    """Return the seconds to wait that an answer asks for; None: it does not, or not in a way that can be read."""
    wait = parse_retry_after(response.headers.get("Retry-After"), now)
    if wait is not None or response.status_code != 429:
        return wait
    resets = (parse_rate_limit_reset(response.headers.get(name), now) for name in _RATE_LIMIT_RESETS)
    return next((reset for reset in resets if reset is not None), None)


def without_query(url: str) -> str:
    """Return `url` for a message."""
    return url.partition("?")[0]
