"""Where the connection arguments lead: hosts, role and whether TLS is on the way."""

from __future__ import annotations

import inspect
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import parse_qs, urlsplit

from asyncpg import connect_utils
from asyncpg.compat import get_pg_home_directory

from asyncpool_creds._errors import InsecureTransport
from asyncpool_creds._loopback import is_loopback
from asyncpool_creds._provider import Target

__all__ = [
    "RequireTls",
    "Route",
    "TlsLevel",
    "ambient_passwords",
    "ambient_state",
    "file_state",
    "forbid_password",
    "is_local",
    "names_host",
    "names_user",
    "read_route",
    "read_tls_context",
    "require_tls",
    "routing_arguments",
]

RequireTls: TypeAlias = "bool | Literal['verified'] | None"
TlsLevel: TypeAlias = Literal["verified", "authority", "unverified", "preferred", "disabled", "unknown"]

# asyncpg's own reading of DSN, arguments, PG* variables and service files; there is no public
# one, and a second parser would sooner or later disagree with it about where a secret goes.
_parse: Final[Any] = getattr(connect_utils, "_parse_connect_dsn_and_args")  # noqa: B009 - the stubs leave it out
_PARSED: Final = frozenset(inspect.signature(_parse).parameters)

# Where libpq looks, and asyncpg from 0.31 on: https://www.postgresql.org/docs/current/libpq-pgservice.html
_SERVICE_FILE: Final = ".pg_service.conf"
# All that asyncpg reads.
_VARIABLES: Final = (
    *("PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGTARGETSESSIONATTRS", "PGSERVICE", "PGSERVICEFILE"),
    *("PGSSLMODE", "PGSSLNEGOTIATION", "PGSSLROOTCERT", "PGSSLCRL", "PGSSLCERT", "PGSSLKEY"),
)


# Among the directories in which asyncpg looks for a socket by itself; anybody on the host can put one there.
_SHARED_DIRECTORIES: Final = ("/tmp", "/private/tmp")  # noqa: S108


@dataclass(frozen=True, slots=True)
class Route:
    """What a set of connection arguments means.

    Args:
        targets: The hosts, in the order in which they are tried.
        tls: What is on the way to a host: "verified" (its certificate and its name are checked), "authority" (the
            certificate is, the name is not: ``verify-ca``), "unverified" (encrypted, to whoever answers), "preferred"
            (the same, or plain text if the server has no TLS), "disabled", or "unknown" where a `connect` of the
            user's own reads its arguments in its own way.
        session_attribute: The kind of server that is wanted (libpq's ``target_session_attrs``).
        left_out: Directories in which asyncpg would look for a socket by itself, and anybody could have put one.
    """

    targets: tuple[Target, ...]
    tls: TlsLevel
    session_attribute: str
    left_out: tuple[str, ...] = ()

    @property
    def is_encrypted(self) -> bool:
        """Whether there is TLS on the way to every host that is reached by TCP."""
        return self.tls in ("verified", "authority", "unverified")


def routing_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return those of asyncpg.connect's keyword `arguments` that say where a connection goes."""
    return {name: value for name, value in arguments.items() if name in _PARSED}


def ambient_state(dsn: str | None, arguments: Mapping[str, object]) -> tuple[object, ...]:
    """Return what a route depends on besides `dsn` and `arguments`: as long as this is equal, so is the route."""
    service = arguments.get("service") or os.environ.get("PGSERVICE") or "service=" in (dsn or "")
    variables = tuple((name, os.environ[name]) for name in _VARIABLES if name in os.environ)
    if not service:
        return variables
    stated = arguments.get("servicefile") or os.environ.get("PGSERVICEFILE")
    home = get_pg_home_directory()
    files = [Path(str(stated))] if stated else [] if home is None else [Path(home, _SERVICE_FILE)]
    return (*variables, *map(file_state, files))


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when the content of a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_route(dsn: str | None, arguments: Mapping[str, object]) -> Route:
    """Return the route that `dsn` and the routing `arguments` describe.

    Raises:
        asyncpg.ClientConfigurationError: As asyncpg.connect does.
    """
    addresses, parameters = _read(dsn, arguments)
    targets = tuple(_target(address, parameters.user, parameters.database) for address in addresses)
    left_out: tuple[str, ...] = ()
    if len(targets) > 1 and not names_host(dsn, arguments):
        left_out = tuple(target.host for target in targets if target.host in _SHARED_DIRECTORIES)
        targets = tuple(target for target in targets if target.host not in left_out)
    return Route(targets, _tls_level(parameters), parameters.target_session_attrs.value, left_out)


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


def _tls_level(parameters: Any) -> TlsLevel:
    if parameters.sslmode.name in ("allow", "prefer"):
        return "preferred"
    # asyncpg 0.30 and 0.31 say "disable" where they are given an SSLContext.
    context = parameters.ssl
    if not isinstance(context, ssl.SSLContext):
        return "disabled"
    # With a root.crt in its place, asyncpg and libpq check the certificate under sslmode=require, too.
    if context.verify_mode != ssl.CERT_REQUIRED:
        return "unverified"
    return "verified" if context.check_hostname else "authority"


def require_tls(route: Route, setting: RequireTls) -> bool:
    """Return whether TLS has to be forced for a credential to travel `route`.

    Raises:
        InsecureTransport: The arguments forbid TLS on a route that needs it, or do not verify a server that has to be.
    """
    if setting is False:
        return False
    exposed = [target.host for target in route.targets if setting is True or not is_local(target.host)]
    if not exposed:
        return False
    if setting == "verified" and route.tls != "verified":
        raise InsecureTransport(
            f'refusing to send a credential to {exposed[0]!r}: require_tls="verified", and {_UNVERIFIED[route.tls]}; '
            "use sslmode=verify-full, with sslrootcert= naming the authority that issued its certificate"
        )
    if route.tls == "disabled" or any(_is_socket(host) for host in exposed):
        raise InsecureTransport(
            f"refusing to send a credential to {exposed[0]!r} without TLS; "
            "use sslmode=verify-full, or pass require_tls=False if the network is trusted"
        )
    return route.tls == "preferred"


_UNVERIFIED: Final[Mapping[TlsLevel, str]] = {
    "authority": "the certificate of the server would be verified, but not that it is for this host",
    "unverified": "the server would not be verified",
    "preferred": "the server would not be verified",
    "disabled": "there would be no TLS",
    "unknown": "connect= decides by itself how it gets there",
}


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


def ambient_passwords(dsn: str | None, arguments: Mapping[str, object], *, besides: str) -> list[str]:
    """Return what else would give asyncpg a password: a variable, and a password file that exists.

    Args:
        dsn: Of the connection.
        arguments: Of the connection.
        besides: The password that is used. A variable that holds the same is where it came from.
    """
    variable = os.environ.get("PGPASSWORD", "").rstrip("\r\n")
    found = ["PGPASSWORD"] if variable and variable != besides else []
    stated = arguments.get("passfile") or next(iter(parse_qs(urlsplit(dsn or "").query).get("passfile", ())), None)
    name, path = ("passfile", stated) if stated else ("PGPASSFILE", os.environ.get("PGPASSFILE"))
    if path and Path(str(path)).is_file():
        found.append(name)
    return found


def names_user(dsn: str | None, arguments: Mapping[str, object]) -> bool:
    """Return whether the user is stated, and not just that of the operating system."""
    parts = urlsplit(dsn or "")
    return bool(
        arguments.get("user") or parts.username or "user" in parse_qs(parts.query) or os.environ.get("PGUSER"),
    )


def names_host(dsn: str | None, arguments: Mapping[str, object], *, variables: bool = True) -> bool:
    """Return whether a host is stated in the arguments or, with `variables`, in the environment.

    A service file may still name one.
    """
    parts = urlsplit(dsn or "")
    return bool(
        arguments.get("host")
        or parts.netloc.rpartition("@")[2]
        or any(parse_qs(parts.query).get("host", ()))
        or (variables and os.environ.get("PGHOST"))
    )


def _is_socket(host: str) -> bool:
    return host.startswith("/")


def is_local(host: str) -> bool:
    """Return whether `host` is a Unix socket, or certain to be this machine's loopback."""
    return _is_socket(host) or is_loopback(host)
