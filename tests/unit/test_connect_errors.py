"""What the error of a connect says: whether the credential was refused, and whether it is worth trying again."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl

import asyncpg
import pytest

from asyncpool_creds import CredentialExpired, InsecureTransport
from asyncpool_creds._connect_errors import is_passing, is_refusal, reached_authentication

REFUSED = asyncpg.InvalidAuthorizationSpecificationError
WRONG_PASSWORD = asyncpg.InvalidPasswordError
PROTOCOL = asyncpg.ProtocolViolationError


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def with_sqlstate(sqlstate: str, text: str) -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"C": sqlstate, "M": text, "S": "FATAL"})


OVERLOAD = [
    # RDS Proxy
    "The IAM authentication failed because of too many competing requests.",
    "The maximum number of client connections to the proxy exceeded 500.",
    "Rate of connection to proxy exceeded 200.",
    # PgBouncer
    "no more connections allowed (max_client_conn)",
    "server login has been failing, try again later (server_login_retry)",
    'server login has been failing, cached error: password authentication failed for user "x" (server_login_retry)',
    "query_wait_timeout",
    "client_login_timeout",
    "pgbouncer is shutting down",
    # PostgreSQL, and proxies that pass its words on
    "sorry, too many clients already",
    'too many connections for role "app"',
    "remaining connection slots are reserved for roles with the SUPERUSER attribute",
    "Too many connections attempts",
    # Supavisor
    "Max client connections reached",
    "MaxClientsInSessionMode: max clients reached - in Session mode max clients are limited to pool_size",
    "(EMAXCONN) max client connections reached, limit: 200",
    "(ECIRCUITBREAKER) failed to retrieve database credentials after multiple attempts, new connections are blocked",
    "(ECHECKOUTTIMEOUT) unable to check out connection from the pool",
    # Aurora DSQL
    "Unable to accept connection, too many open connections.",
    "Unable to accept connection, rate exceeded.",
    # Azure, and others in these words
    "The server is busy. Please try again later.",
    "The service is currently busy. Retry the request after 10 seconds.",
    "The service is temporarily unavailable",
    "login throttled",
    "Quota exceeded for IAM logins per minute",
    "IAM authentication rate limit reached",
    "connection limit exceeded for role app",
]


@pytest.mark.parametrize("text", OVERLOAD)
@pytest.mark.parametrize("kind", [REFUSED, WRONG_PASSWORD, PROTOCOL], ids=["28000", "28P01", "08P01"])
def test_words_of_overload_are_no_refusal_under_any_sqlstate(kind, text):
    assert not is_refusal(kind(text))
    assert is_passing(kind(text))


@pytest.mark.parametrize("text", OVERLOAD)
def test_words_of_overload_pass_under_an_internal_error_too(text):
    assert is_passing(with_sqlstate("XX000", text))


@pytest.mark.parametrize(
    "error",
    [
        WRONG_PASSWORD('password authentication failed for user "too many requests"'),
        WRONG_PASSWORD('password authentication failed for user "overload"'),
        REFUSED('PAM authentication failed for user "server is busy"'),
        REFUSED('PAM authentication failed for user "no pg_hba.conf entry"'),
        REFUSED('Cloud SQL IAM user authentication failed for user "app@acme.iam"'),
        REFUSED("The IAM authentication failed for the role app. Check the IAM token for this role and try again."),
        PROTOCOL("The IAM authentication failed for the role app. Check the IAM token for this role and try again."),
        WRONG_PASSWORD("The password that was provided for the role app is wrong."),
        REFUSED("The access token has expired or is not valid"),
        REFUSED("JWT: the lifetime of the token exceeds the limit"),
        REFUSED("the maximum lifetime of the token was exceeded; try again with another"),
        caused_by(REFUSED("no pg_hba.conf entry for host, no encryption"), WRONG_PASSWORD("no")),
    ],
    ids=str,
)
def test_a_refused_credential_is_a_refusal_and_does_not_pass(error):
    assert is_refusal(error)
    assert not is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        REFUSED("IAM is allowed only with SSL connections."),
        REFUSED("This RDS Proxy requires TLS connections."),
        REFUSED("This RDS proxy has no credentials for the role app. Check the credentials for this role."),
        REFUSED('no pg_hba.conf entry for host "1.2.3.4", user "app", database "app", no encryption'),
        REFUSED('role "app" is not permitted to log in'),
    ],
    ids=str,
)
def test_what_no_credential_and_no_time_mends_is_neither(error):
    assert not is_refusal(error)
    assert not is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        ConnectionAbortedError(),
        BrokenPipeError(),
        ConnectionError("unexpected connection_lost() call"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),  # the socket of a server that restarts
        OSError(
            "Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), "
            "[Errno 111] Connect call failed ('127.0.0.1', 1)"
        ),
        TimeoutError(),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        socket.gaierror(socket.EAI_FAIL, "Non-recoverable failure in name resolution"),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        ssl.SSLZeroReturnError(),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        with_sqlstate("57P01", "terminating connection due to administrator command"),
        with_sqlstate("57P02", "terminating connection because of crash of another server process"),
        asyncpg.TooManyConnectionsError("sorry"),
        with_sqlstate("53400", "a limit"),
        with_sqlstate("53200", "out of memory"),
        with_sqlstate("08006", "connection failure"),
        with_sqlstate("08001", "could not connect to the upstream"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.TargetServerAttributeNotMatched("None of the hosts match the target attribute requirement read-write"),
        caused_by(REFUSED("no pg_hba.conf entry for host, no encryption"), asyncpg.TooManyConnectionsError("sorry")),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)
def test_a_connect_that_may_succeed_later_is_passing(error):
    assert is_passing(error)
    assert not is_refusal(error)


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InvalidCatalogNameError('database "gone" does not exist'),
        with_sqlstate("53100", "could not extend file: No space left on device"),
        with_sqlstate("55000", 'database "x" is not currently accepting connections'),
        PROTOCOL("invalid message format"),
        ssl.SSLCertVerificationError("certificate verify failed"),
        ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
        ConnectionError('PostgreSQL server at "db:5432" rejected SSL upgrade'),
        PermissionError(errno.EACCES, "Permission denied"),
        socket.gaierror(socket.EAI_SERVICE, "Servname not supported for ai_socktype"),
        caused_by(InsecureTransport("not sent"), ConnectionError("rejected")),
        caused_by(CredentialExpired("none"), TimeoutError()),
        asyncpg.InterfaceError("pool is closing"),
        ValueError("bad port"),
        TypeError("unexpected keyword"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)
def test_what_time_does_not_mend_is_not_passing(error):
    assert not is_passing(error)


@pytest.mark.parametrize(
    ("error", "reached"),
    [
        (WRONG_PASSWORD('password authentication failed for user "app"'), True),
        (asyncpg.InvalidCatalogNameError('database "gone" does not exist'), True),
        (asyncpg.CannotConnectNowError("the database system is starting up"), False),
        (asyncpg.TooManyConnectionsError("sorry, too many clients already"), False),
        (REFUSED('no pg_hba.conf entry for host "1.2.3.4", user "app"'), False),
        (ConnectionRefusedError(), False),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
        (ssl.SSLCertVerificationError("certificate verify failed"), False),
        (TimeoutError(), False),
        (InsecureTransport("not sent"), False),
    ],
    ids=lambda value: f"{type(value).__name__}"[:60] if isinstance(value, Exception) else None,
)
def test_only_an_answer_from_authentication_on_says_that_the_credential_was_looked_at(error, reached):
    assert reached_authentication(error) is reached
