"""Token managers by name: one for each tenant, account or resource server, made when it is first asked for."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeAlias

import anyio

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import CredentialError, CredentialExpired, ManagerClosed
from asyncpool_creds._events import Observer, Observers, log_event
from asyncpool_creds._manager import TokenManager
from asyncpool_creds._provider import (
    CredentialFunction,
    CredentialProvider,
    as_provider,
    close_provider,
    invalidate_at,
    let_report,
    revoke_at,
    session_lifetime_of,
)

__all__ = ["ProviderOf", "TokenManagers"]

ProviderOf: TypeAlias = Callable[
    [str], "CredentialProvider | CredentialFunction | Awaitable[CredentialProvider | CredentialFunction]"
]


class TokenManagers:
    """Keep credentials fresh under many names, each with a `TokenManager` of its own.

    What happens to one does not touch the others: each has its own refreshes, retries and errors.
    Names are made as they are asked for and kept until they are discarded, so whoever serves
    ever new ones discards those that are no longer wanted.

    Use it as an async context manager, or call `aclose`. Nothing is fetched before it is asked
    for; `start` asks for several names at once. Events name their source together with the
    name it has here: ``GlobusResource 'transfer.api.globus.org'``.

    Args:
        provider_of: Returns the source for a name: a provider, or a function as `TokenManager`
            takes it. It may be async; then it is awaited as part of the first fetch, with that
            fetch's time limit and retries.
        refresh_threshold: As for `TokenManager`; so are all that follow.
        background: See there.
        fetch_timeout: See there.
        min_validity: See there.
        default_lifetime: See there.
        patience: See there.
        on_event: An observer, or several, for the events of all; default: `log_event`.
        clock: Where the time comes from, for tests.

    Raises:
        TypeError: `provider_of` is no function, or `on_event` is not what it should be.
        ValueError: A duration is negative, not finite or not a number.
    """

    def __init__(
        self,
        provider_of: ProviderOf,
        *,
        refresh_threshold: float | timedelta | None = None,
        background: bool = True,
        fetch_timeout: float | timedelta = 30.0,
        min_validity: float | timedelta | None = None,
        default_lifetime: float | timedelta | None = None,
        patience: float | timedelta = 0.0,
        on_event: Observer | Iterable[Observer] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not callable(provider_of):
            raise TypeError(
                "TokenManagers: provider_of must be a function that takes a name and returns the provider for it, "
                f"not {type(provider_of).__name__}"
            )
        self._provider_of = provider_of
        self._observers = Observers(on_event)
        self._clock = clock
        self._make = functools.partial(
            _Member,
            refresh_threshold=refresh_threshold,
            background=background,
            fetch_timeout=fetch_timeout,
            min_validity=min_validity,
            default_lifetime=default_lifetime,
            patience=patience,
            on_event=self._observers,
            clock=clock,
        )
        self._make(lambda: "")  # a wrong argument shows now, and not with the first name
        self._managers: dict[str, TokenManager] = {}
        self._closings: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def manager(self, name: str) -> TokenManager:
        """Return the manager of `name`; it is made if there is none.

        It may be given to pools, and is closed by `discard` and `aclose` only.

        Raises:
            ManagerClosed: The managers are closed.
            TypeError: `name` is no str, or `provider_of` returned no source.
        """
        manager = self._managers.get(name)
        if manager is not None:
            return manager
        if self._is_closed:
            raise ManagerClosed("the token managers are closed; make new ones")
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"TokenManagers: a name must be a str, not {type(name).__name__}")
        source: CredentialProvider | CredentialFunction | Awaitable[CredentialProvider | CredentialFunction]
        # A coroutine that is made now, for a manager that is never used, would complain that nobody awaited it.
        source = self._awaited(name) if inspect.iscoroutinefunction(self._provider_of) else self._provider_of(name)
        if inspect.isawaitable(source):
            source = self._awaited(name, source)
        label = None
        if isinstance(source, _Awaited):
            label = str(getattr(self._provider_of, "__qualname__", type(self._provider_of).__qualname__))
        manager = self._managers[name] = self._make(source).named(name, label)
        return manager

    def _awaited(
        self, name: str, promise: Awaitable[CredentialProvider | CredentialFunction] | None = None
    ) -> CredentialProvider:
        return _Awaited(self._provider_of, name, promise, self._clock)

    async def get(self, name: str) -> Credential:
        """Return a credential of `name` that is valid now, as `TokenManager.get` does.

        Raises:
            CredentialExpired: Nothing valid is held and the source is failing; its error is the cause.
            ManagerClosed: The managers are closed, or `name` was discarded meanwhile.
            RuntimeError: The manager belongs to another event loop.
        """
        return await self.manager(name).get()

    async def start(self, *names: str) -> Self:
        """Fetch the first credential of each name, all at once, so that a broken source shows now.

        Those that work are started even if others are not.

        Raises:
            CredentialExpired: Of the one that gave nothing. If there are several, its message is
                those of all, and its cause a group of their errors.
        """
        managers = {name: self.manager(name) for name in names}
        errors: dict[str, Exception] = {}

        async def start_one(name: str, manager: TokenManager) -> None:
            try:
                await manager.start()
            except Exception as error:  # noqa: BLE001 - the others are to be started, whatever it is
                errors[name] = error

        async with anyio.create_task_group() as group:
            for name, manager in managers.items():
                group.start_soon(start_one, name, manager, name=f"asyncpool_creds: start {manager.name}")
        failed = [errors[name] for name in managers if name in errors]
        _raise_if_any(failed, len(managers))
        return self

    def names(self) -> tuple[str, ...]:
        """Return the names that there are managers of, in the order in which they were first asked for."""
        return tuple(self._managers)

    async def discard(self, name: str) -> None:
        """Close the manager of `name` and forget it; without one, nothing happens.

        Whoever asks for the name again gets a new manager. If the caller is cancelled, closing goes on by itself.
        """
        manager = self._managers.pop(name, None)
        if manager is not None:
            await self._close([manager])

    def subscribe(self, callback: Observer) -> Callable[[], None]:
        """Call `callback` with every event of every name from now on; return a function that ends that."""
        return self._observers.subscribe(callback)

    async def aclose(self) -> None:
        """Close all managers at once; those that are being discarded are waited for.

        May be called again. If the caller is cancelled, closing goes on by itself. An error of one
        does not keep the others open.

        Raises:
            ExceptionGroup: Several could not be closed; the error of a single one is raised itself.
        """
        self._is_closed = True
        await self._close(list(self._managers.values()))

    async def _close(self, managers: list[TokenManager]) -> None:
        loop = asyncio.get_running_loop()
        earlier = [closing for closing in self._closings if closing.get_loop() is loop] if self._is_closed else []
        name = f"asyncpool_creds: close {len(managers)} managers"
        closing = loop.create_task(_close_all(managers, earlier), name=name)
        self._closings.add(closing)
        closing.add_done_callback(self._closed)
        await asyncio.shield(closing)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closings.discard(closing)
        if not closing.cancelled():
            closing.exception()  # the one who would have seen it may have been cancelled

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<TokenManagers {'closed' if self._is_closed else 'open'} names={len(self._managers)}>"


class _Member(TokenManager):
    """A manager that says which of many it is."""

    def named(self, name: str, source: str | None) -> Self:
        self._name = f"{source or self._name} {name!r}"
        return self


class _Awaited:
    """A provider that has yet to be awaited.

    Args:
        provider_of: Called again where the first attempt came to nothing.
        name: What it is called with.
        promise: What it returned; None: it has yet to be called.
        clock: For a source that is a function.
    """

    def __init__(
        self,
        provider_of: ProviderOf,
        name: str,
        promise: Awaitable[CredentialProvider | CredentialFunction] | None,
        clock: Clock,
    ) -> None:
        self._provider_of = provider_of
        self._for = name
        self._promise = promise
        self._clock = clock
        self._provider: CredentialProvider | None = None
        self._observer: Observer = log_event

    async def fetch(self) -> Credential:
        if self._provider is None:
            self._provider = await self._find()
        return await self._provider.fetch()

    async def _find(self) -> CredentialProvider:
        promise, self._promise = self._promise, None
        source = self._provider_of(self._for) if promise is None else promise
        if inspect.isawaitable(source):
            source = await source
        provider = as_provider(source, self._clock)
        let_report(provider, self._observer)
        return provider

    @property
    def session_lifetime(self) -> float | None:
        return None if self._provider is None else session_lifetime_of(self._provider)

    def report_to(self, observer: Observer) -> None:
        self._observer = observer

    def invalidate(self, credential: Credential) -> None:
        if self._provider is not None:
            invalidate_at(self._provider, credential)

    async def revoke(self, credential: Credential) -> None:
        revocation = None if self._provider is None else revoke_at(self._provider, credential)
        if revocation is not None:
            await revocation

    async def aclose(self) -> None:
        if inspect.iscoroutine(self._promise):
            self._promise.close()  # or it complains that nobody awaited it
        if self._provider is not None:
            await close_provider(self._provider)


async def _close_all(managers: list[TokenManager], earlier: list[asyncio.Task[None]]) -> None:
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(manager.aclose(), name=f"asyncpool_creds: close {manager.name}") for manager in managers]
    if tasks or earlier:
        await asyncio.wait([*tasks, *earlier])
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    if len(errors) > 1:
        raise BaseExceptionGroup(f"{len(errors)} of {len(managers)} token managers could not be closed", errors)
    if errors:
        raise errors[0]


def _raise_if_any(errors: list[Exception], asked: int) -> None:
    for error in errors:
        if not isinstance(error, CredentialError):
            raise error
    if len(errors) == 1:
        raise errors[0]
    if errors:
        message = f"{len(errors)} of {asked} token managers have no credential: " + "; ".join(map(str, errors))
        raise CredentialExpired(message) from ExceptionGroup("what went wrong", errors)
