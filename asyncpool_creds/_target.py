"""Where the connection arguments lead: hosts, role and whether TLS is on the way."""

from __future__ import annotations

import inspect
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from asyncpg import connect_utils

from asyncpool_creds._errors import InsecureTransport
from asyncpool_creds._provider import Target

__all__ = ["Route", "forbid_password", "read_route", "read_tls_context", "require_tls", "routing_arguments"]

# asyncpg's own reading of DSN, arguments, PG* variables and service files; there is no public
# one, and a second parser would sooner or later disagree with it about where a secret goes.
_parse: Final[Any] = getattr(connect_utils, "_parse_connect_dsn_and_args")  # noqa: B009 - the stubs leave it out
_PARSED: Final = frozenset(inspect.signature(_parse).parameters)


@dataclass(frozen=True, slots=True)
class Route:
    """What a set of connection arguments means.

    Args:
        targets: The hosts, in the order in which they are tried.
        tls: "required", "preferred" (plain text if the server has no TLS) or "disabled".
        session_attribute: The kind of server that is wanted (libpq's ``target_session_attrs``).
    """

    targets: tuple[Target, ...]
    tls: str
    session_attribute: str


def routing_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return those of asyncpg.connect's keyword `arguments` that say where a connection goes."""
    return {name: value for name, value in arguments.items() if name in _PARSED}


def read_route(dsn: str | None, arguments: Mapping[str, object]) -> Route:
    """Return the route that `dsn` and the routing `arguments` describe.

    Raises:
        asyncpg.ClientConfigurationError: As asyncpg.connect does.
    """
    addresses, parameters = _read(dsn, arguments)
    # asyncpg 0.30 and 0.31 say "disable" where they are given an SSLContext.
    disabled = "required" if parameters.ssl else "disabled"
    tls = {"disable": disabled, "allow": "preferred", "prefer": "preferred"}.get(parameters.sslmode.name, "required")
    targets = tuple(_target(address, parameters.user, parameters.database) for address in addresses)
    return Route(targets, tls, parameters.target_session_attrs.value)


def read_tls_context(dsn: str | None, arguments: Mapping[str, object]) -> ssl.SSLContext | None:
    """Return the context with which every connection is encrypted; None if there may be one in plain text.

    Raises:
        asyncpg.ClientConfigurationError: As asyncpg.connect does.
        OSError: As asyncpg.connect does: a file cannot be read.
    """
    _, parameters = _read(dsn, arguments)
    required = parameters.sslmode.name in ("require", "verify_ca", "verify_full")
    return parameters.ssl if required and isinstance(parameters.ssl, ssl.SSLContext) else None


def _read(dsn: str | None, arguments: Mapping[str, object]) -> tuple[Any, Any]:
    known: dict[str, object] = {}
    known.update(dict.fromkeys(_PARSED))
    known.update(arguments)
    # A password of ours keeps asyncpg from opening the password file.
    known.update(dsn=dsn, password="-")  # noqa: S106
    addresses, parameters = _parse(**known)
    return addresses, parameters


def _target(address: str | tuple[str, int], user: str | None, database: str | None) -> Target:
    if isinstance(address, str):
        directory, _, name = address.rpartition("/.s.PGSQL.")
        return Target(directory or address, int(name) if name.isdigit() else 5432, user, database)
    return Target(address[0], int(address[1]), user, database)


def require_tls(route: Route, setting: bool | None) -> bool:
    """Return whether TLS has to be forced for a credential to travel `route`.

    Raises:
        InsecureTransport: The arguments forbid TLS on a route that needs it.
    """
    if setting is False:
        return False
    exposed = [target.host for target in route.targets if setting or not _is_local(target.host)]
    if not exposed:
        return False
    if route.tls == "disabled" or any(_is_socket(host) for host in exposed):
        raise InsecureTransport(
            f"refusing to send a credential to {exposed[0]!r} without TLS; "
            "use sslmode=verify-full (or require), or pass require_tls=False if the network is trusted"
        )
    return route.tls == "preferred"


def forbid_password(dsn: str | None, arguments: Mapping[str, object]) -> None:
    """Make sure that there is only one source of passwords.

    Raises:
        ValueError: There is a password beside the credentials.
    """
    if arguments.get("password") is not None:
        raise ValueError("password= and credentials= exclude each other; remove password=")
    if dsn is None:
        return
    parts = urlsplit(dsn)
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise ValueError("the DSN carries a password and credentials= is given; remove the one in the DSN")


def _is_socket(host: str) -> bool:
    return host.startswith("/")


def _is_local(host: str) -> bool:
    if _is_socket(host) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
