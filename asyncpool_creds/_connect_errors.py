"""What the error of a connect says: about the credential, and about trying again."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from typing import Final

import asyncpg

from asyncpool_creds._errors import CredentialError

__all__ = ["class_and_code", "is_passing", "is_refusal", "reached_authentication"]

# 28000 (invalid_authorization_specification) also covers refusals that no new token mends.
_NOT_THE_CREDENTIAL: Final = (
    "no pg_hba.conf entry",
    "pg_hba.conf rejects",
    "is not permitted to log in",
    "requires a valid client certificate",
    "certificate authentication failed",
    "ident authentication failed",
    "peer authentication failed",
    # RDS Proxy: https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/rds-proxy.troubleshooting.html
    "allowed only with ssl connections",
    "requires tls connections",
    "has no credentials for the role",
)
# Poolers report authentication as a protocol violation (08P01): PgBouncer, Cloud SQL's managed pooling, RDS Proxy.
_POOLER_REFUSALS: Final = (
    "sasl authentication failed",
    "pam authentication failed",
    "password authentication failed",
    "iam authentication failed for the role",
)

# A server or a pooler that has too much to do, under whatever SQLSTATE it says so (28000, 08P01 and XX000 were seen).
# RDS Proxy ("too many competing requests", "Rate of connection to proxy exceeded", "maximum number of client
# connections"): https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/rds-proxy.troubleshooting.html
# PgBouncer ("no more connections allowed (max_client_conn)", "query_wait_timeout", "server login has been failing,
# cached error: ... (server_login_retry)"): https://github.com/pgbouncer/pgbouncer/issues/293, /445 and /1094
# PostgreSQL ("sorry, too many clients already", "remaining connection slots are reserved"), which Neon's and
# Supabase's proxies pass on: https://github.com/neondatabase/neon/issues/5368
# Supavisor ("Max client connections reached", "MaxClientsInSessionMode: max clients reached", and its codes in
# brackets): https://github.com/supabase/supabase/issues/21166, https://github.com/supabase/supavisor/pull/473
# Aurora DSQL ("Unable to accept connection, rate exceeded"):
# https://docs.aws.amazon.com/aurora-dsql/latest/userguide/CHAP_quotas.html
_OVERLOAD: Final = re.compile(
    r"""
      \btoo\ many\ (?:\w+\ ){0,3}(?:requests?|connections?|clients?|attempts?|logins?|sessions?|errors|failures)\b
    | \b(?:rate|quota)\b[^.;]*\bexceeded\b | \bexceeded\b[^.;]*\b(?:rate|quota)\b | \b(?:rate|connections?)[ -]limit
    | \bthrottl | \boverload
    | \bmaximum\ number\ of\ (?:client\ )?connections\b
    | \bmax(?:imum)?[ _](?:client[ _]connections?|clients?|client_conn)\b
    | \bno\ more\ connections\ allowed\b | \bremaining\ connection\ slots\ are\ reserved\b
    | \bserver\ login\ has\ been\ failing\b | \bserver_login_retry\b | \bquery_wait_timeout\b
    | \bclient_login_timeout\b | \bserver\ conn\ crashed\b | \b(?:pgbouncer|bouncer|pooler)\b.*\bshut
    | \((?:EMAXCONN\w*|ECHECKOUTTIMEOUT|ECIRCUITBREAKER|EDBHANDLEREXITED)\)
    | \b(?:server|service|system|database|proxy)\ is\ (?:\w+\ ){0,2}(?:busy|unavailable)\b
    | \btemporarily\ unavailable\b | \bservice\ unavailable\b | \b(?:try\ again|retry)\ later\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# What stands in quotes is the name of a role or a database, and may be anything.
_QUOTED: Final = re.compile(r'"[^"]*"')

# Connection exceptions (08, but for protocol violations), want of memory or room for a connection, a server that is
# shutting down, has crashed, or is starting up. Not 53100: a full disk stays full.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_PASSING_STATES: Final = frozenset(
    {"08000", "08001", "08003", "08004", "08006"} | {"53000", "53200", "53300", "53400"} | {"57P01", "57P02", "57P03"}
)
_PASSING_ERRNOS: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "ESHUTDOWN", "ENOTCONN"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        # A server that restarts takes its socket's file away; a backlog is full; ports or descriptors run out.
        *("ENOENT", "EAGAIN", "EADDRNOTAVAIL", "ENOBUFS", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
)
# Questions that no name server could answer. A name that "does not exist" is what a broken resolver says, too.
_WRONG_QUESTIONS: Final = frozenset(
    getattr(socket, name)
    for name in ("EAI_BADFLAGS", "EAI_FAMILY", "EAI_SERVICE", "EAI_SOCKTYPE")
    if hasattr(socket, name)
)
# asyncio puts the errors of several addresses into one text.
_ERRNO_IN_TEXT: Final = re.compile(r"\[Errno (\d+)\]")


def is_refusal(error: BaseException) -> bool:
    """Return whether `error` says that the server refused the credential itself.

    That is SQLSTATE 28P01; 28000, unless its text names a cause that no new credential
    mends (pg_hba.conf, a role without LOGIN, a client certificate); and 08P01 with the
    texts of PgBouncer, RDS Proxy and Cloud SQL's managed pooling. Words of overload ("too
    many competing requests", "server login has been failing") are no refusal under any
    code. asyncpg's default ``ssl=prefer`` may hide the refusal behind that of its second
    try, so the cause is looked at too.
    """
    text = _text(error)
    match error:
        case asyncpg.PostgresError() if _OVERLOAD.search(text):
            return False
        case asyncpg.InvalidPasswordError():
            return True
        case asyncpg.InvalidAuthorizationSpecificationError() if not any(s in text for s in _NOT_THE_CREDENTIAL):
            return True
        case asyncpg.ProtocolViolationError() if any(s in text for s in _POOLER_REFUSALS):
            return True
        case _:
            # Not the context too: that may be an older refusal, which the caller is just handling.
            return error.__cause__ is not None and is_refusal(error.__cause__)


def is_passing(error: BaseException) -> bool:
    """Return whether a connect failed in a way that passes by itself, so that the same connect may succeed later.

    That is a host that cannot be found or reached, a connection that is refused, reset or takes too long, and a server
    that is starting, stopping, full or overloaded. It is not a refused credential, a database that does not exist, a
    certificate that is not trusted, or anything of ours.
    """
    match error:
        case CredentialError() | ssl.SSLCertVerificationError():
            return False
        case asyncpg.PostgresError():
            if _OVERLOAD.search(_text(error)):
                return True
            passes = getattr(error, "sqlstate", None) in _PASSING_STATES
        case asyncpg.TargetServerAttributeNotMatched():
            passes = True  # in the middle of a failover, no host is the primary
        case OSError():
            passes = _is_passing_failure(error)
        case _:
            passes = False
    return passes or (error.__cause__ is not None and not is_refusal(error) and is_passing(error.__cause__))


def reached_authentication(error: BaseException) -> bool:
    """Return whether the server is known to have come as far as the credential when it answered with `error`."""
    return (
        isinstance(error, asyncpg.PostgresError)
        and not is_passing(error)
        and not any(text in _text(error) for text in ("pg_hba.conf", "ssl connections", "tls connections"))
    )


def class_and_code(error: BaseException) -> str:
    """Return the class of `error`, and its SQLSTATE if it has one: its text may quote what nobody is to read."""
    code = getattr(error, "sqlstate", None)
    return type(error).__name__ if code is None else f"{type(error).__name__} ({code})"


def _is_passing_failure(error: OSError) -> bool:
    match error:
        case socket.gaierror():
            return error.errno not in _WRONG_QUESTIONS
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | ssl.SSLSyscallError() | TimeoutError():
            return True
        case ssl.SSLError():
            return False
        case ConnectionError():
            # A server without TLS will not have it in a minute.
            return "rejected SSL upgrade" not in str(error)
        case _:
            numbers = {error.errno, *map(int, _ERRNO_IN_TEXT.findall(str(error)))}
            return not numbers.isdisjoint(_PASSING_ERRNOS)


def _text(error: BaseException) -> str:
    return _QUOTED.sub('""', str(error)).lower()
