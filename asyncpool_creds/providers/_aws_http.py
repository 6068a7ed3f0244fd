"""How aiobotocore sends for us: it reads no more than it should, follows no redirect, and tells what came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Final, Protocol, cast
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import anyio
import anyio.to_thread

# botocore and aiobotocore ship no types: what is used of them is behind the protocols at the end of this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# What pyright makes out of their code is no more than a guess, such as that a constant has but one value.
# pyright: reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false, reportPrivateUsage=false
from aiobotocore.awsrequest import AioAWSResponse  # type: ignore[import-untyped]
from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]
from aiobotocore.parsers import AioResponseParserFactory  # type: ignore[import-untyped]
from aiobotocore.utils import AioContainerMetadataFetcher, AioIMDSFetcher  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    ConnectionClosedError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from asyncpool_creds.providers._answers import (
    MAX_ANSWER,
    MAX_PARSED_ON_LOOP,
    Answer,
    UnusableAnswer,
    is_direct,
    read_body,
)

__all__ = ["TIMEOUT", "Exchange", "ParserFactory", "Session", "guard_metadata", "watched"]

TIMEOUT: Final = 10.0
"""Seconds of one attempt to connect, of one wait for an answer, and of an answer as a whole."""

# What of a request is secret: header fields, and members of a form or of a JSON document, in lower case.
_SECRET_HEADERS: Final = frozenset(
    {
        "authorization",
        "x-amz-security-token",
        "x-amz-sso_bearer_token",
        "x-aws-ec2-metadata-token",
    }
)
_SECRET_MEMBERS: Final = frozenset(
    {
        "accesstoken",
        "clientsecret",
        "codeverifier",
        "devicecode",
        "refreshtoken",
        "samlassertion",
        "tokencode",
        "webidentitytoken",
    }
)


class Exchange:
    """The requests that one credential takes, as far as they may be told.

    Attributes:
        secrets: What was sent that has to stay secret.
        host: Where the last request went; None: there was none.
        is_metadata: Whether that was a metadata service, of a container or an instance.
        status: The HTTP status of the last answer; None: nothing came back.
        has_answers: Whether anything came back at all.
        unusable: Why the last answer was not read.
    """

    def __init__(self) -> None:
        self.secrets: set[str] = set()
        self.host: str | None = None
        self.is_metadata = False
        self.status: int | None = None
        self.has_answers = False
        self.unusable: UnusableAnswer | None = None

    @property
    def source(self) -> str | None:
        """Who was asked last."""
        return f"the metadata service {self.host}" if self.is_metadata else self.host

    def on_request(self, request: _Request, *, is_metadata: bool) -> None:
        """Take note of what is about to be sent."""
        self.host, self.is_metadata = urlsplit(request.url).hostname, is_metadata
        self.status = self.unusable = None
        self.secrets.update(_secrets_in(request))

    def on_answer(self, status: int) -> None:
        """Take note of the answer to it."""
        self.status, self.has_answers = status, True


_exchange: Final[ContextVar[Exchange | None]] = ContextVar("asyncpool_creds.aws", default=None)


@contextmanager
def watched() -> Generator[Exchange]:
    """Yield what is known of the requests that are made meanwhile."""
    exchange = Exchange()
    mark = _exchange.set(exchange)
    try:
        yield exchange
    finally:
        _exchange.reset(mark)


def _secrets_in(request: _Request) -> Iterator[str]:
    for name, value in request.headers.items():
        text = _text(value)
        if name.lower() in _SECRET_HEADERS:
            # Of a signed request, no more than the signature; of "Bearer ...", or of a value alone, the last word.
            yield from text.rpartition("Signature=")[2].split()[-1:]
    body = _text(request.body or b"")
    for name, value in _members(body):
        if name.lower() in _SECRET_MEMBERS:
            yield value


def _members(body: str) -> Iterator[tuple[str, str]]:
    try:
        waiting = [cast("object", json.loads(body))]
    except ValueError:
        yield from parse_qsl(body)
        return
    while waiting:
        document = waiting.pop()
        if isinstance(document, Mapping):
            for name, value in cast("Mapping[str, object]", document).items():
                if isinstance(value, str):
                    yield name, value
                else:
                    waiting.append(value)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# Sessions


class Session(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
    """An HTTP session of aiobotocore: what ``http_session_cls`` of its configuration wants."""

    is_metadata = False
    limit = MAX_ANSWER
    longest = TIMEOUT

    async def send(self, request: _Request) -> object:
        """Return the answer to `request`, which has been read.

        Raises:
            UnusableAnswer: There is too much of it, or it points to another address.
        """
        exchange = _exchange.get() or Exchange()
        exchange.on_request(request, is_metadata=self.is_metadata)
        # Else it would be read before it could be measured.
        request.stream_output = True
        try:
            with anyio.fail_after(self.longest):
                response = cast("_Response", await super().send(request))
                exchange.on_answer(response.status_code)
                body = await read_body(response.raw, self.limit)
        except UnusableAnswer as error:
            exchange.unusable = error
            raise
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from error
        except aiohttp.ClientPayloadError as error:
            raise ConnectionClosedError(endpoint_url=request.url, error=error) from error
        except aiohttp.ClientError as error:
            raise EndpointConnectionError(endpoint_url=request.url, error=error) from error
        return _make_answer(response.url, response.status_code, response.headers, Answer(response.raw, body))

    async def _get_session(self, proxy_url: str | None) -> _WithoutRedirects:
        return _WithoutRedirects(await super()._get_session(proxy_url))


if "_get_session" not in vars(AIOHTTPSession):  # pragma: no cover
    # There is no public way to tell it that redirects are not to be followed.
    raise ImportError("this aiobotocore is not known to asyncpool_creds yet: it would send secrets wherever it is told")


class _WithoutRedirects:
    """Sends as an aiohttp session does, to the given address and no other."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(
        self, method: str, url: object, *, proxy: str | None = None, **options: object
    ) -> aiohttp.ClientResponse:
        send = cast("_Send", self._session.request)
        return await send(
            method, url, proxy=None if is_direct(str(url)) else proxy, **{**options, "allow_redirects": False}
        )


class _MetadataSession(Session):
    """A session for a metadata service, which answers at once, with a page of JSON, and is behind no proxy."""

    is_metadata = True
    limit = MAX_PARSED_ON_LOOP

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout=timeout)
        self.longest = 2 * timeout


class _MetadataSessions:
    """What aiobotocore's fetchers want of a session: that it is open while they use it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    @asynccontextmanager
    async def acquire(self) -> AsyncGenerator[_MetadataSession]:
        async with _MetadataSession(self._timeout) as session:
            yield session


def guard_metadata(providers: list[object]) -> None:
    """Let the fetchers of metadata among botocore's providers of credentials send by sessions of ours.

    They take a session as an argument, but nobody can pass one to who makes them.
    """
    for provider in providers:
        for fetcher in list(vars(provider).values()):
            if isinstance(fetcher, AioContainerMetadataFetcher):
                fetcher._session = _MetadataSessions(fetcher.TIMEOUT_SECONDS)  # noqa: SLF001 - see above
                # One attempt, because the manager is the one who tries again.
                fetcher.RETRY_ATTEMPTS, fetcher.SLEEP_TIME = 1, 0
            elif isinstance(fetcher, AioIMDSFetcher):
                fetcher._session = _MetadataSessions(fetcher._timeout)  # noqa: SLF001 - see above


# Parsing


class ParserFactory(AioResponseParserFactory):  # type: ignore[misc]  # aiobotocore has no types
    """Makes parsers that do not hold up the event loop, however much there is to parse."""

    def create_parser(self, protocol_name: str) -> _PatientParser:
        """Return the parser for answers in a protocol."""
        return _PatientParser(super().create_parser(protocol_name))


class _PatientParser:
    def __init__(self, parser: _Parser) -> None:
        self._parser = parser

    async def parse(self, response: Mapping[str, object], shape: object) -> object:
        body = response["body"]
        if not isinstance(body, bytes) or len(body) <= MAX_PARSED_ON_LOOP:
            return await self._parser.parse(response, shape)
        # There is no I/O in it.
        return await anyio.to_thread.run_sync(
            lambda: asyncio.run(_awaited(self._parser.parse(response, shape))), limiter=anyio.CapacityLimiter(1)
        )


async def _awaited(parsing: Awaitable[object]) -> object:
    return await parsing


# What is used of aiobotocore


class _Request(Protocol):
    url: str
    headers: Mapping[str, str | bytes]
    body: str | bytes | None
    stream_output: bool


class _Response(Protocol):
    url: str
    status_code: int
    headers: Mapping[str, str]
    raw: aiohttp.ClientResponse


class _Parser(Protocol):
    def parse(self, response: Mapping[str, object], shape: object) -> Awaitable[object]: ...


class _MakeAnswer(Protocol):
    def __call__(self, url: str, status_code: int, headers: Mapping[str, str], raw: object, /) -> object: ...


class _Send(Protocol):
    async def __call__(self, method: str, url: object, /, **options: object) -> aiohttp.ClientResponse: ...


_make_answer: Final = cast("_MakeAnswer", AioAWSResponse)
