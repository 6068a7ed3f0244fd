"""A source of credentials: one method, or any function."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from asyncpool_creds._clock import Clock, utc_now
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import CredentialError, CredentialExpired, ProviderError
from asyncpool_creds._events import Observer
from asyncpool_creds._tracebacks import class_and_place, clears_frames

__all__ = [
    "BindableProvider",
    "CredentialFunction",
    "CredentialProvider",
    "Target",
    "as_provider",
    "ask",
    "close_provider",
    "foreign_error",
    "invalidate_at",
    "let_report",
    "provider_name",
    "revoke_at",
    "session_lifetime_of",
]

CredentialFunction: TypeAlias = Callable[[], "Credential | str | Awaitable[Credential | str]"]


@runtime_checkable
class CredentialProvider(Protocol):
    """A source of credentials.

    It need not cache, retry or coordinate callers: the manager does, and calls `fetch` from
    one task at a time. It must let cancellation through: that is how a fetch that takes too
    long, or is no longer wanted, is ended.

    A provider may also have any of these, and its manager then uses them:

    - ``async def aclose(self) -> None``: release everything. Called once, when the manager closes.
    - ``def invalidate(self, credential: Credential) -> None``: a server refused this credential.
      The next `fetch` should not give the same one again if another can be had.
    - ``async def revoke(self, credential: Credential) -> None``: this credential is superseded,
      and no connection that was opened with it is left. Not called for one that was handed out by
      `TokenManager.get`, since nobody knows where it went. An error is an event, and no more.
    - ``def report_to(self, observer: Observer) -> None``: where to send events of its own. Called
      once, before anything else.
    - ``session_lifetime: float | None``: seconds after which the server ends any session; a pool
      takes it for its ``max_lifetime`` where it was given none.
    """

    async def fetch(self) -> Credential:
        """Return a credential fetched now.

        Raises:
            ProviderError: The source gave none. Any other exception counts as a
                retryable one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """The server that a token is meant for, as the connection arguments name it.

    Args:
        host: Host name, or the path of a Unix socket.
        port: TCP port.
        user: The role to log in as.
        database: The database; None: the server's default for the user.
    """

    host: str
    port: int
    user: str | None
    database: str | None


@runtime_checkable
class BindableProvider(Protocol):
    """A source whose tokens name the host, port and user they are for (RDS IAM)."""

    def bind(self, target: Target, /) -> CredentialProvider:
        """Return the provider of tokens for `target`; called once per host of a pool."""
        ...


class FunctionProvider:
    """A function that returns a credential or a token, as a provider."""

    __slots__ = ("_clock", "_function")

    def __init__(self, function: CredentialFunction, clock: Clock) -> None:
        self._function = function
        self._clock = clock

    @property
    def name(self) -> str:
        return str(getattr(self._function, "__qualname__", type(self._function).__qualname__))

    async def fetch(self) -> Credential:
        requested_at = utc_now(self._clock)
        answer = self._function()
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, str):
            return Credential.from_token(answer, requested_at=requested_at)
        return answer


def as_provider(source: CredentialProvider | CredentialFunction, clock: Clock) -> CredentialProvider:
    """Return `source` as a provider.

    Raises:
        TypeError: It is neither a provider nor a function.
    """
    if isinstance(source, type):
        raise TypeError(
            f"credentials: got the class {source.__qualname__}; pass an instance, as in {source.__qualname__}(...)"
        )
    if isinstance(source, CredentialProvider):
        return source
    if callable(source):
        return FunctionProvider(source, clock)
    raise TypeError(
        f"credentials: expected a TokenManager, a CredentialProvider (an object with 'async def fetch(self)') "
        f"or a function that returns a Credential or a str, not {type(source).__name__}"
    )


def provider_name(provider: object) -> str:
    """Return a name for messages and events; never a repr, which may show what it should not."""
    return provider.name if isinstance(provider, FunctionProvider) else type(provider).__qualname__


@clears_frames
async def ask(provider: CredentialProvider) -> Credential:
    """Fetch once, turning whatever goes wrong into a `ProviderError` with its cause.

    The text of a foreign exception is not copied: it may quote the request, secret included. Nor are the locals of the
    frames it came through left for whoever logs them: only its place is told.
    """
    name = provider_name(provider)
    try:
        credential = await provider.fetch()
    except ProviderError:
        raise
    except CredentialExpired as error:
        # Of another manager, which this source asks: what that one's source said decides.
        source = error.__cause__
        retryable = not isinstance(source, ProviderError) or source.retryable
        raise ProviderError(f"{name}: {error}", retryable=retryable) from error
    except CredentialError as error:
        raise ProviderError(f"{name}: {error}", retryable=False) from error
    except Exception as error:
        raise ProviderError(f"{name}: {foreign_error(error)}") from error
    if not isinstance(credential, Credential):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ProviderError(
            f"{name}: expected a Credential (or, from a function, a str), got {type(credential).__name__}",
            retryable=False,
        )
    return credential


def foreign_error(error: BaseException) -> str:
    """Return what is said of an exception that is none of ours: its class and its place, never its text."""
    hint = ", which looks like a mistake in the provider" if isinstance(error, (TypeError, ValueError)) else ""
    return f"fetch() raised {class_and_place(error)}{hint}; see the cause"


def invalidate_at(provider: CredentialProvider, credential: Credential) -> None:
    """Call the provider's ``invalidate``, if it has one."""
    invalidate = getattr(provider, "invalidate", None)
    if invalidate is not None:
        invalidate(credential)


def revoke_at(provider: CredentialProvider, credential: Credential) -> Coroutine[None, None, None] | None:
    """Return the call of the provider's ``revoke``, if it has one."""
    revoke = getattr(provider, "revoke", None)
    return None if revoke is None else revoke(credential)


def let_report(provider: CredentialProvider, observer: Observer) -> None:
    """Call the provider's ``report_to``, if it has one."""
    report_to = getattr(provider, "report_to", None)
    if report_to is not None:
        report_to(observer)


def session_lifetime_of(provider: CredentialProvider | BindableProvider) -> float | None:
    """Return the provider's ``session_lifetime``, if it has one."""
    lifetime: float | None = getattr(provider, "session_lifetime", None)
    return lifetime


@clears_frames
async def close_provider(provider: CredentialProvider) -> None:
    """Call the provider's ``aclose``, if it has one."""
    aclose = getattr(provider, "aclose", None)
    if aclose is not None:
        await aclose()
