"""The way of a credential into a connection: resolve, guard, connect, and answer one refusal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import sys
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeAlias

import asyncpg

from asyncpool_creds._clock import utc_now
from asyncpool_creds._connect_errors import reached_authentication
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import CredentialError, InsecureTransport
from asyncpool_creds._events import CredentialRefused, Observers
from asyncpool_creds._manager import Stamp, TokenManager
from asyncpool_creds._provider import Target
from asyncpool_creds._target import (
    RequireTls,
    Route,
    ambient_passwords,
    ambient_state,
    forbid_password,
    is_local,
    names_host,
    names_user,
    read_route,
    read_tls_context,
    require_tls,
    routing_arguments,
)
from asyncpool_creds._tls import TlsContext
from asyncpool_creds._tracebacks import clear_frames

__all__ = ["AnyConnection", "ConnectFunction", "Connector", "check_arguments"]

AnyConnection: TypeAlias = "asyncpg.Connection[Any]"
ConnectFunction: TypeAlias = Callable[..., Coroutine[Any, Any, AnyConnection]]

_logger = logging.getLogger("asyncpool_creds")

# The next connect may take longer than the last.
_CONNECT_MARGIN: Final = 1.25

_TWO_REFUSED: Final = (
    "; it was fetched because the one before it was refused: compare the role, and the token's issuer, audience and "
    "user claim, with what the server expects"
)


def check_arguments(require_tls: object, is_refusal: object) -> None:
    """Make sure that the arguments of a connector make sense.

    Raises:
        TypeError: `is_refusal` is no function.
        ValueError: `require_tls` is neither None, nor a bool, nor "verified".
    """
    if require_tls is not None and not isinstance(require_tls, bool) and require_tls != "verified":
        raise ValueError(f'require_tls must be None, True, False or "verified", not {require_tls!r}')
    if not callable(is_refusal):
        raise TypeError(f"is_refusal must be a function that takes an exception, not {type(is_refusal).__name__}")


class ManagerOf(Protocol):
    """How a connector finds the manager for a host."""

    def __call__(self, target: Target) -> TokenManager: ...


class Connector:
    """Opens connections with the current credential of the manager that is responsible for the host.

    Args:
        connect: The user's own; None: asyncpg's.
        manager_of: Finds the manager.
        one_manager_per_host: Whether each host gets a credential of its own.
        require_tls: The guard: see `create_pool`.
        is_refusal: Decides whether the error of a connect is a refused credential.
        observers: Hear of refusals.
        told: What has been logged as a warning already, so that it is not again.
    """

    def __init__(
        self,
        connect: ConnectFunction | None,
        *,
        manager_of: ManagerOf,
        one_manager_per_host: bool,
        require_tls: RequireTls,
        is_refusal: Callable[[BaseException], bool],
        observers: Observers,
        told: set[tuple[str, ...]] | None = None,
    ) -> None:
        self._connect: ConnectFunction = connect or asyncpg.connect
        self._is_custom = connect is not None
        self._manager_of = manager_of
        self._one_manager_per_host = one_manager_per_host
        self._require_tls: RequireTls = require_tls
        self._is_refusal = is_refusal
        self._observers = observers
        self._tls = TlsContext()
        self._read: tuple[tuple[object, ...], Route, bool] | None = None
        self._told: set[tuple[str, ...]] | None = told
        self._has_looked_around = False
        # Of the latest only: what went before it is superseded.
        self._accepted: weakref.ref[Stamp] | None = None
        self._refused_when_new: weakref.ref[Stamp] | None = None

    def route(self, dsn: str | None, arguments: dict[str, object]) -> tuple[Route, bool]:
        """Return the route of these arguments, and whether TLS has to be forced on it: its `tls` counts that in.

        Read once for as long as the arguments, the environment and the service file stay the same: reading builds an
        SSLContext.
        """
        routing = routing_arguments(arguments)
        state = dsn, routing, ambient_state(dsn, routing)
        if self._read is None or self._read[0] != state:
            forbid_password(dsn, arguments)
            try:
                route = read_route(dsn, routing)
            except asyncpg.ClientConfigurationError:
                if not self._is_custom:
                    raise
                # A connect= of the user's own may read its arguments in its own way; then so is its transport.
                route = Route((Target(dsn or "", 0, None, None),), "unknown", "any")
            force_tls = require_tls(route, self._require_tls)
            if force_tls:
                route = read_route(dsn, {**routing, "ssl": "require"})
            self._read = state, route, force_tls
            self._warn_of_unverified(route)
        return self._read[1], self._read[2]

    async def open(self, dsn: str | None, arguments: dict[str, object]) -> tuple[AnyConnection, Stamp]:
        """Return a new connection, and the stamp of the credential it was opened with."""
        route, force_tls = self.route(dsn, arguments)
        if force_tls:
            arguments = {**arguments, "ssl": "require"}
        if not self._is_custom and not names_host(dsn, arguments, variables=False):
            # What the guard has looked at is where it goes, whatever becomes of the environment or a service file
            # while the credential is fetched.
            hosts, ports = zip(*((target.host, target.port) for target in route.targets), strict=True)
            arguments = {**arguments, "host": list(hosts), "port": list(ports)}
        if not self._is_custom and route.is_encrypted:
            context = self._tls.of(dsn, routing_arguments(arguments))
            if context is None and not isinstance(arguments.get("ssl"), ssl.SSLContext):
                # Of a service file, which might say something else by the time of the connect.
                context = read_tls_context(dsn, routing_arguments(arguments))
            if context is not None:
                arguments = {**arguments, "ssl": context}
        several = len(route.targets) > 1
        try:
            if self._one_manager_per_host and several:
                return await self._open_first_fitting(dsn, arguments, route, force_tls=force_tls)
            return await self._open_at(self._manager_of(route.targets[0]), dsn, arguments, force_tls=force_tls)
        except OSError as error:
            if route.left_out:
                error.add_note(
                    f"asyncpool_creds: no socket in {' or '.join(route.left_out)} was tried, since anybody on this "
                    "host can put one there, and get the credential; to use one, name the directory in host="
                )
            raise

    def is_refused(self, error: BaseException) -> bool:
        """Return whether the error of a connect says that the server refused the credential."""
        if self._is_refusal(error):
            return True
        # After a refusal under TLS, asyncpg's sslmode=prefer tries without; 0.30 and 0.31 then report that one only.
        return (
            self._read is not None
            and self._read[1].tls == "preferred"
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
        loop = asyncio.get_running_loop()
        began = loop.time()
        has_served = self._accepted is not None and self._accepted() is stamp
        try:
            return await self._connect_with(manager, stamp, dsn, arguments, force_tls=force_tls), stamp
        except Exception as error:
            if not self.is_refused(error):
                error.add_note(_note(manager, stamp, error))
                raise
            left, took = stamp.seconds_left(manager.clock), loop.time() - began
            newer = await self._ask_for_newer(manager, stamp, error, lasting=took)
            if newer is None:
                raise
        try:
            connection = await self._connect_with(manager, newer, dsn, arguments, force_tls=force_tls)
        except Exception as error:
            outcome = ""
            if self.is_refused(error):
                self._refused_when_new = weakref.ref(newer)
                outcome = _TWO_REFUSED
                self._report(manager, newer, error, retrying=False)
            error.add_note(_note(manager, newer, error, outcome))
            raise
        manager.learn_skew(stamp, left)
        self._warn_of_unknown_lifetime(manager, stamp, has_served=has_served)
        return connection, newer

    async def _ask_for_newer(
        self, manager: TokenManager, stamp: Stamp, refusal: Exception, *, lasting: float
    ) -> Stamp | None:
        """Return the stamp of a newer credential, if any; if it can, one that outlives `lasting` seconds."""
        manager.invalidate(stamp.credential)
        newer: Stamp | None = None
        try:
            newer = await manager.stamp()
            if newer.seconds_left(manager.clock) <= lasting * _CONNECT_MARGIN:
                # It would end during a connect that takes as long as this one did.
                with contextlib.suppress(CredentialError):
                    await manager.refresh()
                newer = await manager.stamp()
        except CredentialError as error:
            outcome = f"; the server refused it and no new one is to be had: {error}"
            refusal.add_note(_note(manager, stamp, refusal, outcome))
        else:
            if newer.generation == stamp.generation:
                newer = None
                # Of one that was refused when it was new, the source is not asked at each connect for another.
                again = self._refused_when_new is not None and self._refused_when_new() is stamp
                outcome = _TWO_REFUSED if again else "; the server refused it, and no newer one is to be had"
                refusal.add_note(_note(manager, stamp, refusal, outcome))
        self._report(manager, stamp, refusal, retrying=newer is not None)
        return newer

    async def _connect_with(
        self, manager: TokenManager, stamp: Stamp, dsn: str | None, arguments: dict[str, object], *, force_tls: bool
    ) -> AnyConnection:
        credential = stamp.credential
        self._warn_of_ambient_passwords(credential, dsn, arguments)
        if credential.user is not None:
            self._warn_of_overruled_user(manager, credential.user, dsn, arguments)
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
            self._accepted = weakref.ref(stamp)
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

    # -- what is told once

    def _warn_of_unverified(self, route: Route) -> None:
        remote = [target.host for target in route.targets if not is_local(target.host)]
        if remote and route.tls == "unverified" and self._require_tls is not False:
            self._warn(
                ("unverified", remote[0]),
                f"{remote[0]!r}: TLS, but the server is not verified: use sslmode=verify-full, with sslrootcert= naming"
                " the authority that issued its certificate, or whoever answers in its place gets the credential",
            )

    def _warn_of_ambient_passwords(self, credential: Credential, dsn: str | None, arguments: dict[str, object]) -> None:
        if self._has_looked_around:
            return
        self._has_looked_around = True
        for name in ambient_passwords(dsn, arguments, besides=credential.password):
            self._warn(
                ("ambient", name),
                f"{name} is set, and not used: credentials= comes first; unset it, unless a source of yours reads it",
            )

    def _warn_of_overruled_user(
        self, manager: TokenManager, user: str, dsn: str | None, arguments: dict[str, object]
    ) -> None:
        if self._one_manager_per_host:
            return  # such a source was given the user of the arguments, and knows what it is called at the server
        stated = None if self._read is None else self._read[1].targets[0].user
        topic = ("user", str(stated))
        if stated not in (None, user) and topic not in (self._told or ()) and names_user(dsn, arguments):
            self._warn(
                topic,
                f"the user {stated!r} of the connection arguments is not used: the credential of {manager.name} comes "
                f"with the user {user!r}",
            )

    def _warn_of_unknown_lifetime(self, manager: TokenManager, refused: Stamp, *, has_served: bool) -> None:
        """Tell what to do, where a credential that served was refused, and the next one was not."""
        if has_served and refused.expires_at is None:
            age = (utc_now(manager.clock) - refused.obtained_at).total_seconds()
            self._warn(
                ("lifetime", manager.name),
                f"a credential of {manager.name} that states no expiry served, was refused {age:.0f} s after it was "
                "fetched, and the next one was accepted; if each has a lifetime, state it, so that it is replaced in "
                "time: credentials=TokenManager(..., default_lifetime=SECONDS)",
            )

    def _warn(self, topic: tuple[str, ...], sentence: str) -> None:
        if self._told is None:
            self._told = set()
        if topic not in self._told:
            self._told.add(topic)
            _logger.warning("%s", sentence)


def _note(manager: TokenManager, stamp: Stamp, error: Exception, outcome: str = "") -> str:
    # What the server said before it asked for a password, or did not say, is nothing about the credential.
    connected = outcome or reached_authentication(error)
    return (
        f"asyncpool_creds: {'connected with credential' if connected else 'not connected; the credential to use was'} "
        f"{stamp.credential.fingerprint} of {manager.name}, "
        f"generation {stamp.generation}, obtained at {stamp.obtained_at:%Y-%m-%d %H:%M:%S} UTC{outcome}"
    )
