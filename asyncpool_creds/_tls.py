"""The SSLContext of a set of connection arguments, read from its files once, and again when one of them has changed."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from asyncpg.compat import get_pg_home_directory

from asyncpool_creds._target import file_state, read_tls_context

__all__ = ["TlsContext"]

# Where libpq looks, and asyncpg as well: https://www.postgresql.org/docs/current/libpq-ssl.html
_PARAMETERS: Final = ("sslrootcert", "sslcrl", "sslcert", "sslkey")
_DEFAULTS: Final = ("root.crt", "root.crl", "postgresql.crt", "postgresql.key")
# Where OpenSSL looks for the system's authorities, which ``ssl=True`` trusts.
_OF_THE_SYSTEM: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_VARIABLES: Final = (
    *("PGSSLROOTCERT", "PGSSLCRL", "PGSSLCERT", "PGSSLKEY"),
    *("PGSSLMODE", "PGSSLNEGOTIATION", "PGSSLMINPROTOCOLVERSION", "PGSSLMAXPROTOCOLVERSION", "SSLKEYLOGFILE"),
    *_OF_THE_SYSTEM,
)


class TlsContext:
    """asyncpg makes a context for every connect: it parses the certificate authorities each time, on the event loop."""

    def __init__(self) -> None:
        self._made: tuple[object, ssl.SSLContext | None] | None = None

    def of(self, dsn: str | None, arguments: Mapping[str, object]) -> ssl.SSLContext | None:
        """Return what asyncpg would make of `dsn` and the routing `arguments`.

        None where it has to see for itself: TLS is not certain, the context is the caller's, or a service file, which
        may name anything, is in use.

        Raises:
            asyncpg.ClientConfigurationError: As asyncpg.connect does.
            OSError: As asyncpg.connect does.
        """
        query = parse_qs(urlsplit(dsn or "").query)
        if isinstance(arguments.get("ssl"), ssl.SSLContext) or any(
            (arguments.get("service"), "service" in query, os.environ.get("PGSERVICE"))
        ):
            return None
        variables = tuple(os.environ.get(name) for name in _VARIABLES)
        state = dsn, dict(arguments), variables, tuple(file_state(path) for path in _files(query))
        if self._made is None or self._made[0] != state:
            self._made = state, read_tls_context(dsn, arguments)
        return self._made[1]


def _files(query: Mapping[str, list[str]]) -> Iterator[Path]:
    """Yield every file that may have a say: looking at too many does no harm."""
    for parameter, variable in zip(_PARAMETERS, _VARIABLES, strict=False):
        yield from (Path(value) for value in (*query.get(parameter, ()), os.environ.get(variable)) if value)
    system = ssl.get_default_verify_paths()
    for variable, default in zip(_OF_THE_SYSTEM, (system.openssl_cafile, system.openssl_capath), strict=True):
        yield Path(os.environ.get(variable) or default)
    home = get_pg_home_directory()
    if home is not None:
        yield from (Path(home, name) for name in _DEFAULTS)
