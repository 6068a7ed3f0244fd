"""The way of a credential into a connection: resolve, guard, connect, and answer one refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias

import asyncpg

from asyncpool_creds._clock import utc_now
from asyncpool_creds._errors import CredentialError, InsecureTransport
from asyncpool_creds._events import CredentialRefused, Observers
from asyncpool_creds._manager import Stamp, TokenManager
from asyncpool_creds._provider import Target
from asyncpool_creds._target import Route, forbid_password, read_route, require_tls, routing_arguments
from asyncpool_creds._tls import TlsContext
from asyncpool_creds._tracebacks import clear_frames

__all__ = ["AnyConnection", "ConnectFunction", "Connector", "check_arguments"]

AnyConnection: TypeAlias = "asyncpg.Connection[Any]"
ConnectFunction: TypeAlias = Callable[..., Coroutine[Any, Any, AnyConnection]]


def check_arguments(require_tls: object, is_refusal: object) -> None:
    """Make sure that the arguments of a connector make sense.

    Raises:
        TypeError: `is_refusal` is no function.
        ValueError: `require_tls` is neither None nor a bool.
    """
    if require_tls is not None and not isinstance(require_tls, bool):
        raise ValueError(f"require_tls must be None, True or False, not {require_tls!r}")
    if not callable(is_refusal):
        raise TypeError(f"is_refusal must be a function that takes an exception, not {type(is_refusal).__name__}")


class ManagerOf(Protocol):
    """How a connector finds the manager for a host."""

    def __call__(self, target: Target) -> TokenManager: ...


class Connector:
    """Opens connections with the current credential of the manager that is responsible for the host."""

    def __init__(
        self,
        connect: ConnectFunction | None,
        *,
        manager_of: ManagerOf,
        one_manager_per_host: bool,
        require_tls: bool | None,
        is_refusal: Callable[[BaseException], bool],
        observers: Observers,
    ) -> None:
        self._connect: ConnectFunction = connect or asyncpg.connect
        self._is_custom = connect is not None
        self._manager_of = manager_of
        self._one_manager_per_host = one_manager_per_host
        self._require_tls = require_tls
        self._is_refusal = is_refusal
        self._observers = observers
        self._tls = TlsContext()
        self._read: tuple[str | None, dict[str, object], Route, bool] | None = None

    def route(self, dsn: str | None, arguments: dict[str, object]) -> tuple[Route, bool]:
        """Return the route of these arguments, and whether TLS has to be forced on it.

        Read once for as long as the arguments stay the same: reading builds an SSLContext.
        """
        routing = routing_arguments(arguments)
        if self._read is None or self._read[0] != dsn or self._read[1] != routing:
            forbid_password(dsn, arguments)
            try:
                route = read_route(dsn, routing)
            except asyncpg.ClientConfigurationError:
                if not self._is_custom:
                    raise
                # A connect= of the user's own may read its arguments in its own way; then so is its transport.
                route = Route((Target(dsn or "", 0, None, None),), "required", "any")
            self._read = dsn, routing, route, require_tls(route, self._require_tls)
        return self._read[2], self._read[3]

    async def open(self, dsn: str | None, arguments: dict[str, object]) -> tuple[AnyConnection, Stamp]:
        """Return a new connection, and the stamp of the credential it was opened with."""
        route, force_tls = self.route(dsn, arguments)
        if force_tls:
            arguments = {**arguments, "ssl": "require"}
        if not self._is_custom and (force_tls or route.tls == "required"):
            context = self._tls.of(dsn, routing_arguments(arguments))
            if context is not None:
                arguments = {**arguments, "ssl": context}
        several = len(route.targets) > 1
        if self._one_manager_per_host and several:
            return await self._open_first_fitting(dsn, arguments, route, force_tls=force_tls)
        return await self._open_at(self._manager_of(route.targets[0]), dsn, arguments, force_tls=force_tls)

    def _is_refused(self, error: Exception) -> bool:
        if self._is_refusal(error):
            return True
        # After a refusal under TLS, asyncpg's sslmode=prefer tries without; 0.30 and 0.31 then report that one only.
        return (
            self._read is not None
            and self._read[2].tls == "preferred"
            and isinstance(error, asyncpg.InvalidAuthorizationSpecificationError)
            and "no encryption" in str(error)
            and error.__cause__ is None
        )

    async def _open_first_fitting(
        self, dsn: str | None, arguments: dict[str, object], route: Route, *, force_tls: bool
    ) -> tuple[AnyConnection, Stamp]:
        """Try the hosts one by one, each with its own credential, as asyncpg would with a shared one."""
        wanted = route.session_attribute
        last_error: Exception = asyncpg.InterfaceError("the connection arguments name no host")
        # asyncpg's prefer-standby means: any standby, else whatever answers.
        for attribute in ("standby", "any") if wanted == "prefer-standby" else (wanted,):
            for target in route.targets:
                one_host = {**arguments, "host": target.host, "port": target.port, "target_session_attrs": attribute}
                try:
                    return await self._open_at(self._manager_of(target), dsn, one_host, force_tls=force_tls)
                except (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched) as error:
                    last_error = error
        raise last_error

    async def _open_at(
        self, manager: TokenManager, dsn: str | None, arguments: dict[str, object], *, force_tls: bool
    ) -> tuple[AnyConnection, Stamp]:
        # The stamp is the one whose secret is used: a rotation during the handshake leaves it behind.
        stamp = await manager.stamp()
        try:
            return await self._connect_with(stamp, dsn, arguments, force_tls=force_tls), stamp
        except Exception as error:
            if not self._is_refused(error):
                error.add_note(_note(manager, stamp, ""))
                raise
            newer = await self._ask_for_newer(manager, stamp, error)
            if newer is None:
                raise
        try:
            return await self._connect_with(newer, dsn, arguments, force_tls=force_tls), newer
        except Exception as error:
            outcome = ""
            if self._is_refused(error):
                outcome = "; it was fetched because the one before it was refused, so look at the role, not the token"
                self._report(manager, newer, error, retrying=False)
            error.add_note(_note(manager, newer, outcome))
            raise

    async def _ask_for_newer(self, manager: TokenManager, stamp: Stamp, refusal: Exception) -> Stamp | None:
        manager.invalidate(stamp.credential)
        newer: Stamp | None = None
        try:
            newer = await manager.stamp()
        except CredentialError as error:
            refusal.add_note(_note(manager, stamp, f"; the server refused it and no new one is to be had: {error}"))
        else:
            if newer.generation == stamp.generation:
                newer = None
                refusal.add_note(_note(manager, stamp, "; the server refused it, and no newer one is to be had"))
        self._report(manager, stamp, refusal, retrying=newer is not None)
        return newer

    async def _connect_with(
        self, stamp: Stamp, dsn: str | None, arguments: dict[str, object], *, force_tls: bool
    ) -> AnyConnection:
        credential = stamp.credential
        if credential.user is not None:
            arguments = {**arguments, "user": credential.user}
        stamp.hold()
        outside = sys.exception()
        try:
            # A function, because asyncpg shows a plain string in Connection._params and in every LoggedQuery.
            connection = await self._connect(dsn, **{**arguments, "password": lambda: credential.password})
        except BaseException as error:
            stamp.let_go()
            clear_frames(error, outside=outside)  # the secret lies in asyncpg's in the clear
            if force_tls and isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):
                raise InsecureTransport(
                    "the server offers no TLS, so the credential was not sent; "
                    "turn TLS on there, or pass require_tls=False if the network is trusted"
                ) from error
            raise
        if isinstance(connection, asyncpg.Connection):  # pyright: ignore[reportUnnecessaryIsInstance]
            connection.add_termination_listener(lambda _: stamp.let_go())
        else:
            stamp.let_go()  # asyncpg says what is wrong with it
        return connection

    def _report(self, manager: TokenManager, stamp: Stamp, refusal: Exception, *, retrying: bool) -> None:
        self._observers(
            CredentialRefused(
                at=utc_now(manager.clock),
                fingerprint=stamp.credential.fingerprint,
                generation=stamp.generation,
                sqlstate=getattr(refusal, "sqlstate", None),
                retrying=retrying,
                error=refusal,
                message=str(refusal),
            )
        )


def _note(manager: TokenManager, stamp: Stamp, outcome: str) -> str:
    return (
        f"asyncpool_creds: connected with credential {stamp.credential.fingerprint} of {manager.name}, "
        f"generation {stamp.generation}, obtained at {stamp.obtained_at:%Y-%m-%d %H:%M:%S} UTC{outcome}"
    )
