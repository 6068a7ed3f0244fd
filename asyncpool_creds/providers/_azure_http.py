"""How azure-core sends for us: it reads no more than it should, past every proxy where the answer is at home."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, Self, cast
from urllib.parse import urlsplit

import aiohttp
from azure.core.pipeline.transport import AioHttpTransport

from asyncpool_creds.providers._answers import MAX_PARSED_ON_LOOP, Answer, UnusableAnswer, is_direct, read_body

__all__ = ["HttpAnswer", "Traffic", "guard"]

# Beside 5xx: what passes (Microsoft: "How to use managed identities on an Azure VM to acquire an access token", error
# handling; 404 and 410 are an endpoint that is being updated), and what HTTP itself means to pass.
_TRANSIENT_STATUS: Final = frozenset({404, 408, 410, 425, 429})
# Where a virtual machine has its metadata. Elsewhere nobody answers, so silence there says nothing.
_METADATA_HOST: Final = "169.254.169.254"


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What may be told of an answer: who gave it, its status, and when to ask again."""

    host: str
    status: int
    retry_after: str | None

    @property
    def is_transient(self) -> bool:
        """Whether it tells of trouble that passes."""
        return self.status >= 500 or self.status in _TRANSIENT_STATUS


class Traffic:
    """The last request of a credential, and what came of it: a chain of credentials keeps only the text of an error.

    Attributes:
        url: Where it went; None: there was none.
        answer: What came back; None: nothing.
        unusable: Why what came back was not read.
        has_answers: Whether anything came back since `forget`, so that what the SDK says may quote it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.url: str | None = None
        self.answer: HttpAnswer | None = None
        self.unusable: UnusableAnswer | None = None
        self.has_answers = False

    @property
    def host(self) -> str | None:
        """Where the last request went."""
        return None if self.url is None else urlsplit(self.url).hostname or "Entra"

    @property
    def is_unanswered(self) -> bool:
        """Whether nothing has come back yet."""
        return self.url is not None and self.answer is None

    @property
    def is_lost(self) -> bool:
        """Whether it should have been answered."""
        return self.is_unanswered and self.host != _METADATA_HOST

    def on_request(self, url: str) -> None:
        """Take note of a request that is about to be sent."""
        self.url, self.answer, self.unusable = url, None, None

    def on_answer(self, status: int, headers: Mapping[str, str]) -> None:
        """Take note of the answer to it."""
        self.answer = HttpAnswer(self.host or "Entra", status, headers.get("Retry-After"))
        self.has_answers = True


def guard(credential: object, traffic: Traffic) -> None:
    """Let every transport of azure-core that `credential` has send by a session of ours, which tells `traffic`.

    A transport that somebody has made with a session or a class of their own stays as it is, and so does one that
    has been closed.
    """
    for transport in _transports_of(credential):
        is_closed = transport.session is None and getattr(transport, "_has_been_opened", False)
        if not is_closed and not isinstance(transport.session, _Session):
            transport.session = cast("aiohttp.ClientSession", _Session(transport, traffic))


def _transports_of(credential: object) -> Iterator[_Transport]:
    """Yield what `credential` sends with: azure-identity hides it in parts of parts, with no way to ask for it."""
    seen: set[int] = set()
    waiting = [credential]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if type(one) is AioHttpTransport:
            if getattr(one, "_session_owner", False):
                yield cast("_Transport", one)
        elif isinstance(one, (list, tuple)):
            waiting += cast("list[object]", one)
        elif one is credential or any(kind.__module__.startswith("azure.") for kind in type(one).__mro__):
            waiting += getattr(one, "__dict__", {}).values()


class _Session:
    """Sends as the aiohttp session of a transport does; what comes back has been read, as far as it should be.

    Args:
        transport: Whose session it is.
        traffic: Who is told of requests and answers.
    """

    auto_decompress = False

    def __init__(self, transport: _Transport, traffic: Traffic) -> None:
        # One that has been used before it came to us has its connections already.
        self._session: aiohttp.ClientSession | None = transport.session
        self._uses_environment = bool(getattr(transport, "_use_env_settings", True))
        self._direct: aiohttp.ClientSession | None = None
        self._traffic = traffic

    async def __aenter__(self) -> Self:
        return self

    async def close(self) -> None:
        """Close the connections; the transport makes another session when it is opened again."""
        sessions, self._session, self._direct = (self._session, self._direct), None, None
        for session in sessions:
            if session is not None:
                await session.close()

    async def request(self, method: str, url: str, *, headers: Mapping[str, str], **options: object) -> Answer:
        self._traffic.on_request(url)
        send = cast("_Send", self._session_for(url).request)
        response = await send(
            method, url, headers={**headers, "Accept-Encoding": "identity"}, **{**options, "allow_redirects": False}
        )
        self._traffic.on_answer(response.status, response.headers)
        try:
            # It is parsed on the event loop.
            return Answer(response, await read_body(response, MAX_PARSED_ON_LOOP))
        except UnusableAnswer as error:
            self._traffic.unusable = error
            raise

    def _session_for(self, url: str) -> aiohttp.ClientSession:
        if is_direct(url):
            session = self._direct = self._direct or _open_session(uses_environment=False)
        else:
            session = self._session = self._session or _open_session(uses_environment=self._uses_environment)
        return session


def _open_session(*, uses_environment: bool) -> aiohttp.ClientSession:
    """Return a session as azure-core makes one."""
    return aiohttp.ClientSession(trust_env=uses_environment, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)


class _Transport(Protocol):
    """What is used of azure-core's transport: pyright does not find the names that it imports on demand."""

    session: aiohttp.ClientSession | None


class _Send(Protocol):
    async def __call__(self, method: str, url: str, /, **options: object) -> aiohttp.ClientResponse: ...
