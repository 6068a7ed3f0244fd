"""Credentials from the first of several sources that has some."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NoReturn

import anyio

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._events import Observer
from asyncpool_creds._provider import (
    BindableProvider,
    CredentialFunction,
    CredentialProvider,
    Target,
    as_provider,
    ask,
    close_provider,
    invalidate_at,
    let_report,
    provider_name,
    revoke_at,
    session_lifetime_of,
)
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import parse_seconds

__all__ = ["Chain"]

# Of so many credentials it is known who gave them. One that was superseded that often is nobody's concern any more.
_MOST_REMEMBERED: Final = 64


class Chain:
    """A provider that asks several, in order, and stays with the first that gives a credential.

    The one that worked is asked first from then on. When it fails, all others are asked again, in order, and the next
    one that works takes its place, until that one fails. What counts is that a source gives a credential which has not
    expired; what the server makes of it does not lead to another source.

    What a manager says about a credential (`invalidate`, `revoke`) goes to the source that gave it. If one of the
    sources wants to know its server (RDS IAM), the chain does too: it has ``bind`` then, and belongs into `create_pool`
    rather than into a `TokenManager`. `aclose` closes all.

    Args:
        providers: The sources: providers, or functions that return a `Credential` or a token.
        timeout: Seconds, or a timedelta, that each of them may take, so that one that gets no answer where it runs
            (a cloud's metadata endpoint on a laptop) leaves time for the next; None: no limit. The manager's
            ``fetch_timeout`` holds for all of them together. A chain of one gives a limit to that one.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no source, or `timeout` is not more than zero and finite.
    """

    def __init__(
        self,
        *providers: CredentialProvider | BindableProvider | CredentialFunction,
        timeout: float | timedelta | None = 10.0,
        clock: Clock | None = None,
    ) -> None:
        if not providers:
            raise ValueError("Chain: pass at least one provider")
        self._timeout: Final = None if timeout is None else parse_seconds("Chain", "timeout", timeout)
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._members: Final = tuple(_member(provider, self._clock) for provider in providers)
        self._working: _Member | None = None
        self._given: Final[deque[tuple[Credential, _Member]]] = deque(maxlen=_MOST_REMEMBERED)
        if any(member.bindable is not None for member in self._members):
            # Of the instance: a class with bind() would make every chain one that has to be bound.
            self.bind: Callable[[Target], Chain] = self._bind

    @property
    def in_use(self) -> str | None:
        """The name of the source that gave the latest credential; None before the first."""
        return None if self._working is None else self._working.name

    @property
    def session_lifetime(self) -> float | None:
        """Seconds after which the server ends any session, says the source in use; at first, the least of all."""
        if self._working is not None:
            return self._working.session_lifetime
        lifetimes = [member.session_lifetime for member in self._members]
        return min((lifetime for lifetime in lifetimes if lifetime is not None), default=None)

    def __repr__(self) -> str:
        return f"<Chain of {', '.join(member.name for member in self._members)}; in use: {self.in_use}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Chain cannot be pickled, as its sources may hold secrets; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return a credential of the source that worked last, or else of the first that works.

        Raises:
            ProviderError: None gave any. The message has what each of them said; the cause is an `ExceptionGroup`
                of their errors; ``retryable`` is True if it is for one of them.
        """
        errors: dict[_Member, ProviderError] = {}
        others = (member for member in self._members if member is not self._working)
        for member in (*((self._working,) if self._working else ()), *others):
            outcome = await self._ask(member)
            if isinstance(outcome, Credential):
                self._working = member
                self._remember(outcome, member)
                return outcome
            errors[member] = outcome
        raise _all_failed([(member.name, errors[member]) for member in self._members])

    def invalidate(self, credential: Credential) -> None:
        """Tell the source of `credential` that a server refused it."""
        giver = self._giver_of(credential)
        if giver is not None and giver.provider is not None:
            invalidate_at(giver.provider, credential)

    @clears_frames
    async def revoke(self, credential: Credential) -> None:
        """Let the source of `credential` revoke it."""
        giver = self._giver_of(credential)
        revocation = None if giver is None or giver.provider is None else revoke_at(giver.provider, credential)
        if revocation is not None:
            await revocation

    def report_to(self, observer: Observer) -> None:
        """Let every source report to `observer`."""
        for provider in self._providers():
            let_report(provider, observer)

    @clears_frames
    async def aclose(self) -> None:
        """Close every source, even if one of them cannot be closed; its error is raised then."""
        async with AsyncExitStack() as stack:
            for provider in reversed(self._providers()):
                stack.push_async_callback(close_provider, provider)

    def _bind(self, target: Target) -> Chain:
        """Return a chain for `target`: of the sources bound to it, and of those that need not be."""
        bound = (member.source if member.bindable is None else member.bindable.bind(target) for member in self._members)
        return Chain(*bound, timeout=self._timeout, clock=self._clock)

    async def _ask(self, member: _Member) -> Credential | ProviderError:
        if member.provider is None:
            return ProviderError(
                f"{member.name}: its tokens name their server; give the chain to create_pool() as it is, and not to a "
                "TokenManager",
                retryable=False,
            )
        credential: Credential | None = None
        try:
            with anyio.move_on_after(math.inf if self._timeout is None else self._timeout):
                credential = await ask(member.provider)
        except ProviderError as error:
            return error
        if credential is None:
            return ProviderTimeout(f"{member.name}: no answer within the chain's timeout ({self._timeout:g} s)")
        ago = 0.0 if credential.expires_at is None else self._clock.time() - credential.expires_at.timestamp()
        if credential.expires_at is not None and ago >= 0:
            return ProviderError(f"{member.name}: gave a credential that expired {ago:.0f} s ago")
        return credential

    def _remember(self, credential: Credential, giver: _Member) -> None:
        for known in tuple(self._given):
            if known[0].is_same_secret(credential):
                self._given.remove(known)
        self._given.append((credential, giver))

    def _giver_of(self, credential: Credential) -> _Member | None:
        return next((giver for known, giver in self._given if known.is_same_secret(credential)), None)

    def _providers(self) -> list[CredentialProvider]:
        return [member.provider for member in self._members if member.provider is not None]


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A source of a chain.

    Args:
        name: Of the source, for messages.
        source: As it was given.
        provider: Whom to ask; None: it can only be bound.
        bindable: Whom to bind; None: it need not be.
    """

    name: str
    source: CredentialProvider | BindableProvider | CredentialFunction
    provider: CredentialProvider | None
    bindable: BindableProvider | None

    @property
    def session_lifetime(self) -> float | None:
        source = self.provider or self.bindable
        return None if source is None else session_lifetime_of(source)


def _member(source: CredentialProvider | BindableProvider | CredentialFunction, clock: Clock) -> _Member:
    if isinstance(source, BindableProvider) and not isinstance(source, type):
        return _Member(
            provider_name(source), source, source if isinstance(source, CredentialProvider) else None, source
        )
    try:
        provider = as_provider(source, clock)
    except TypeError as error:
        raise TypeError(f"Chain: {error}") from None
    return _Member(provider_name(provider), source, provider, None)


def _all_failed(errors: list[tuple[str, ProviderError]]) -> ProviderError:
    said = "; ".join(
        f"{number}. {error}" if str(error).startswith(f"{name}:") else f"{number}. {name}: {error}"
        for number, (name, error) in enumerate(errors, 1)
    )
    waits = [error.retry_after for _, error in errors if error.retry_after is not None]
    failure = ProviderError(
        f"chain: no source gave a credential: {said}",
        retryable=any(error.retryable for _, error in errors),
        retry_after=min(waits, default=None),
    )
    failure.__cause__ = ExceptionGroup("what each source of the chain said", [error for _, error in errors])
    return failure
