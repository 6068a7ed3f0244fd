"""Google Cloud IAM tokens as passwords of Cloud SQL and AlloyDB."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, Protocol, cast
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

try:
    import google.auth
    import google.auth.transport
    import requests
    import urllib3.exceptions
    from google.auth import compute_engine
    from google.auth.credentials import Credentials, Scoped
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from google.auth.transport.requests import Request
    from google.oauth2.credentials import Credentials as UserCredentials
except ImportError as _missing:  # pragma: no cover
    raise ImportError("CloudSQLIAM needs google-auth and requests: pip install 'asyncpool-creds[gcp]'") from _missing

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._tracebacks import ForeignError, clears_frames
from asyncpool_creds.providers._answers import UnusableAnswer, check_head, check_size, is_direct
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._document import parse_object
from asyncpool_creds.providers._foreign import (
    NONSENSE,
    keep_secrets_out_of_logs,
    summary_of,
    working_for_us,
)
from asyncpool_creds.providers._retry_after import parse_retry_after

__all__ = ["LOGIN_SCOPE", "CloudSQLIAM"]

LOGIN_SCOPE: Final = "https://www.googleapis.com/auth/sqlservice.login"
"""The scope of a Cloud SQL login; AlloyDB's is ``https://www.googleapis.com/auth/alloydb.login``."""

# Metadata servers hand out the same token until four or five minutes before its end; google-auth asks them 3:45 before
# it, and no sooner (REFRESH_THRESHOLD in google/auth/_helpers.py).
_KEPT_BY_METADATA_SERVER: Final = timedelta(minutes=3, seconds=45)
# Beside 5xx: took too long, too many requests (RFC 9110, RFC 6585).
_TRANSIENT_STATUS: Final = frozenset({408, 429})
# Threads cannot be cancelled; more than this many that hang are not waited for.
_MAX_HANGING: Final = 3
_SERVICE_ACCOUNT_DOMAIN: Final = ".gserviceaccount.com"
# Bytes that are read at once.
_CHUNK: Final = 1 << 14
# Where the metadata server of Google has everything ("About VM metadata").
_METADATA_PATH: Final = "/computeMetadata/"
_NO_CREDENTIALS: Final = (
    "no usable credentials; attach a service account to this host, set GOOGLE_APPLICATION_CREDENTIALS to a file "
    "that is in order, or log in with 'gcloud auth application-default login'"
)
# The codes of RFC 6749 section 5.2, and those of Google's APIs (google.rpc.Code).
_ADVICE: Final = {
    "NOT_FOUND": "there is no such service account",
    "PERMISSION_DENIED": (
        "to impersonate an account takes the role Service Account Token Creator on it, and the IAM Service Account "
        "Credentials API"
    ),
    "invalid_client": "check the client's id and secret",
    "invalid_grant": "the key is deleted, the login was revoked or has expired, or this host's clock is wrong",
    "invalid_scope": "the login does not include this scope; log in anew, with --scopes",
    "unauthorized_client": "the account may not have this scope, or not act for this subject",
}
_CODE: Final = re.compile(r"[A-Za-z_]{1,40}")
# Where it does not find what it looks for, google-auth logs what it was answered instead.
keep_secrets_out_of_logs([name for name in logging.root.manager.loggerDict if name.startswith("google.")])


class CloudSQLIAM:
    """A provider of Google Cloud access tokens for database logins.

    google-auth blocks, so each fetch is made in a thread of its own, which is left alone when the
    fetch is cancelled or takes too long: it makes no further request, and the one under way ends
    with `timeout`. A copy of the credentials is asked; those handed in stay as they are.

    Metadata servers have a cache, which nobody gets past: their tokens are asked for again 3
    minutes and 45 seconds before they end, when there are new ones. That of a Compute Engine
    machine ignores `scope`, and its token is good for all that the machine may do.

    There is nothing to close.

    Args:
        credentials: Of google-auth: a service account's, impersonated ones, a user's, a
            workload's. None: Application Default Credentials, looked for at the first fetch, and
            again after a refusal for good.
        user: The database user. None: as Cloud SQL derives it from the e-mail address of the
            credentials ("Manage users with IAM database authentication",
            https://cloud.google.com/sql/docs/postgres/add-manage-iam-users): a service account's
            without ``.gserviceaccount.com``, a person's as a whole, both in lower case. The
            connection's own if the credentials do not know their address, as a person's often do not.
        scope: The scope of the token.
        timeout: Seconds that a token may take.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty, or a duration makes no sense.
    """

    def __init__(
        self,
        credentials: Credentials | None = None,
        *,
        user: str | None = None,
        scope: str = LOGIN_SCOPE,
        timeout: float | timedelta = 15.0,
        clock: Clock | None = None,
    ) -> None:
        if credentials is not None and not isinstance(credentials, Credentials):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"CloudSQLIAM: credentials must be of google-auth, as google.auth.default()[0] is, "
                f"not {type(credentials).__name__}"
            )
        check_text("CloudSQLIAM", "user", user)
        check_text("CloudSQLIAM", "scope", scope)
        self._given: Final = credentials
        self._credentials = credentials
        self._user: Final = user
        self._scope: Final = scope
        self._timeout: Final = parse_seconds("CloudSQLIAM", "timeout", timeout)
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._hanging: list[_Errand] = []

    def __repr__(self) -> str:
        kind = "default" if self._given is None else type(self._given).__module__
        return f"<CloudSQLIAM {kind} credentials scope={self._scope!r} user={self._user!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CloudSQLIAM provider holds secrets and cannot be pickled; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return a token asked for now.

        Raises:
            ProviderError: There is none; ``retryable`` is False if that was said for good.
            ProviderTimeout: There was no answer in time.
        """
        self._hanging = [errand for errand in self._hanging if errand.is_hanging]
        if len(self._hanging) >= _MAX_HANGING:
            raise ProviderTimeout(f"gcp: the last {len(self._hanging)} requests still hang; no further one is made yet")
        requested_at = utc_now(self._clock)
        errand = _Errand(self._credentials, self._scope, self._timeout, requested_at)
        try:
            with anyio.move_on_after(self._timeout):
                # One thread for each fetch: nobody's turn is taken.
                self._credentials, token = await anyio.to_thread.run_sync(
                    errand.run, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
                )
                return self._credential(token, requested_at)
        except ProviderError as error:
            if not error.retryable:
                self._credentials = self._given
            raise
        finally:
            errand.abandon()
            self._hanging.append(errand)
        raise ProviderTimeout(f"gcp: no token within {self._timeout:g} s")

    def _credential(self, token: _Token, requested_at: datetime) -> Credential:
        expires_at = refresh_at = None
        if token.life is not None:
            expires_at = requested_at + token.life
            if token.is_kept and token.life > _KEPT_BY_METADATA_SERVER:
                refresh_at = expires_at - _KEPT_BY_METADATA_SERVER
        user = self._user or (None if token.email is None else _user_of(token.email))
        try:
            return Credential(token.value, user=user, expires_at=expires_at, refresh_at=refresh_at)
        except ValueError:
            raise ProviderError("gcp: the token has characters that no server accepts as a password") from None


def _user_of(email: str) -> str:
    return email.lower().removesuffix(_SERVICE_ACCOUNT_DOMAIN)


@dataclass(frozen=True, slots=True)
class _Token:
    """What google-auth gave.

    Args:
        value: The token.
        life: How long it lived when it came; None: for ever.
        email: Whose it is, as far as the credentials know.
        is_kept: Whether a metadata server hands out this one, and no other, until it is about to end.
    """

    value: str = field(repr=False)
    life: timedelta | None
    email: str | None
    is_kept: bool


class _Errand:
    """One fetch, in its thread."""

    def __init__(self, credentials: Credentials | None, scope: str, timeout: float, now: datetime) -> None:
        self._credentials = credentials
        self._scope = scope
        self._transport = _Transport(time.monotonic() + timeout, now)
        self._process = os.getpid()
        self._is_running = False

    @property
    def is_hanging(self) -> bool:
        """Whether its thread is still at it; threads stay behind when a process forks."""
        return self._is_running and self._process == os.getpid()

    def abandon(self) -> None:
        """Let no further request be made."""
        self._transport.abandon()

    def run(self) -> tuple[Credentials, _Token]:
        """Return the credentials to go on with, and their token.

        Raises:
            ProviderError: They gave none.
        """
        self._is_running = True
        transport = self._transport
        try:
            with working_for_us():
                login = _for_login(self._credentials or _find(transport), self._scope)
                transport.is_refreshing = True
                login.refresh(transport)
                # It knows its address by now, and may have a new refresh token.
                return cast("Credentials", login), _read(login)
        except ProviderError as error:
            # Of our own transport. It comes through frames of google-auth, which hold what was sent.
            failure, cause = error.with_traceback(None), error.__cause__
        except UnusableAnswer as error:
            failure, cause = ProviderError(f"gcp: {transport.source} {error}"), summary_of(error)
        except GoogleAuthError as error:
            failure, cause = _explain(error, transport), summary_of(error, _safe_text(error, transport))
        except NONSENSE as error:
            # google-auth does not look at what it is given before it takes something out.
            failure, cause = ProviderError(_no_token(transport)), summary_of(error)
        except Exception as error:
            if not transport.has_sent:
                raise
            failure = ProviderError(f"gcp: google-auth failed at {transport.source} ({type(error).__name__})")
            cause = summary_of(error)
        finally:
            transport.close()
            self._is_running = False
        # Here, where the exception is handled and gone: it would be the context of ours, with all that it holds.
        failure.__context__ = None
        raise failure from cause


@dataclass(frozen=True, slots=True)
class _Answer:
    host: str
    status: int


class _Session(requests.Session):
    """What google-auth sends with: to the given address and no other, past every proxy where the answer is at home."""

    def __init__(self) -> None:
        super().__init__()
        self.ends_at = 0.0
        # So that an answer is no larger than it looks.
        self.headers["Accept-Encoding"] = "identity"

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return None: requests would send the form, with client secret and refresh token, to wherever it is told."""
        del resp
        return None

    def merge_environment_settings(self, url: Any, *settings: Any, **named: Any) -> Any:
        """Return the settings for a request to `url`; a proxy is none of them on the way to a metadata service."""
        merged = super().merge_environment_settings(url, *settings, **named)
        if is_direct(str(url)):
            merged["proxies"] = {}
        return merged

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Return the answer to `request`, which has been read.

        Raises:
            UnusableAnswer: There is too much of it, or it points to another address.
            requests.RequestException: It takes too long, or breaks off.
        """
        response = super().send(request, **{**options, "stream": True})
        with contextlib.closing(response.raw) as raw:
            # Whatever is still coming is not waited for.
            check_head(response.status_code, response.headers)
            response.raw = io.BytesIO(self._read(raw))
        return response

    def _read(self, raw: Any) -> bytes:
        body = bytearray()
        # Of two ways to read, the one that waits for no more than the next packet; urllib3 before 2 has not got it.
        read = getattr(raw, "read1", raw.read)
        try:
            while chunk := read(_CHUNK):
                body += chunk
                check_size(len(body))
                if time.monotonic() > self.ends_at:
                    raise requests.ReadTimeout("the answer takes too long")
        except urllib3.exceptions.ReadTimeoutError as error:
            raise requests.ReadTimeout(error) from error
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError(error) from error
        return bytes(body)


class _Transport(google.auth.transport.Request):
    """What google-auth makes its requests with.

    It ends with the fetch, and knows what google-auth does not tell: status and Retry-After. During
    the refresh itself, trouble that passes is reported at once: to ask again is the manager's
    business, who can be closed meanwhile.

    Attributes:
        is_refreshing: False while credentials are looked for, where silence means that there is no server.
        answer: The last answer.
        has_answers: Whether there was one at all, so that what google-auth says may quote it.
    """

    def __init__(self, ends_at: float, now: datetime) -> None:
        self.session = _Session()  # google-auth looks for it
        self.session.ends_at = ends_at
        self._send = cast("Callable[..., _Response]", Request(self.session))
        self.is_refreshing = False
        self.answer: _Answer | None = None
        self.has_answers = False
        self._url: str | None = None
        self._now = now

    @property
    def has_sent(self) -> bool:
        """Whether there was any request."""
        return self._url is not None

    @property
    def source(self) -> str:
        """Who was asked last."""
        if self._url is None:
            return "google-auth"
        address = urlsplit(self._url)
        host = address.hostname or "Google"
        return f"the metadata service {host}" if address.path.startswith(_METADATA_PATH) else host

    def abandon(self) -> None:
        """Let no further request be made."""
        self.session.ends_at = 0.0

    def close(self) -> None:
        """Close the connections."""
        self.session.close()

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **more: object,
    ) -> _Response:
        left = self.session.ends_at - time.monotonic()
        if left <= 0:
            raise ProviderTimeout("gcp: no token in time")
        self._url, self.answer = url, None
        host = urlsplit(url).hostname or "Google"
        try:
            response = self._send(url, method, body, headers, min(timeout or left, left), **more)
        except TransportError as error:
            if not self.is_refreshing:
                raise
            is_late = isinstance(error.__cause__, requests.Timeout)
            kind, what = (ProviderTimeout, "does not answer") if is_late else (ProviderError, "cannot be reached")
            reason = type(error.__cause__ or error).__name__
            failure = kind(f"gcp: {host} {what} ({reason}); check address and network")
            failure.__cause__ = summary_of(error)
        else:
            self.answer, self.has_answers = _Answer(host, response.status), True
            if not self.is_refreshing or not (response.status >= 500 or response.status in _TRANSIENT_STATUS):
                return response
            wait = parse_retry_after(response.headers.get("Retry-After"), self._now)
            failure = ProviderError(
                f"gcp: {host} is in trouble (HTTP {response.status}); it is asked again later", retry_after=wait
            )
            failure.__cause__ = ForeignError(f"HTTP status {response.status}")
        raise failure


# google-auth has types for few of its names.


class _Response(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...


class _Login(Protocol):
    token: object
    expiry: datetime | None

    def refresh(self, request: google.auth.transport.Request) -> None: ...


class _Scopable(Protocol):
    def with_scopes(self, scopes: Sequence[str]) -> _Login: ...


def _find(transport: _Transport) -> Credentials:
    default = cast("Callable[..., tuple[Credentials, str | None]]", google.auth.default)
    return default(request=transport)[0]


def _for_login(credentials: Credentials, scope: str) -> _Login:
    """Return a copy that asks for nothing but `scope`."""
    if isinstance(credentials, Scoped):
        return cast("_Scopable", credentials).with_scopes([scope])
    if isinstance(credentials, UserCredentials):
        kept = ("refresh_token", "token_uri", "client_id", "client_secret", "rapt_token", "refresh_handler")
        arguments = {name: getattr(credentials, name) for name in (*kept, "universe_domain", "account")}
        return cast("Callable[..., _Login]", UserCredentials)(None, scopes=[scope], **arguments)
    return cast("_Login", copy.copy(credentials))


def _read(login: _Login) -> _Token:
    if not isinstance(login.token, str) or not login.token:
        raise TypeError("no token")
    life = None
    if login.expiry is not None:
        # It is in UTC, and does not say so.
        life = login.expiry.replace(tzinfo=UTC) - datetime.now(UTC)
    emails = (getattr(login, name, None) for name in ("service_account_email", "account"))
    email = next((email for email in emails if isinstance(email, str) and "@" in email), None)
    return _Token(login.token, life, email, is_kept=isinstance(login, compute_engine.Credentials))


# Errors


def _safe_text(error: GoogleAuthError, transport: _Transport) -> str | None:
    """Return what google-auth says, where there was no answer that it could quote."""
    return None if transport.has_answers else str(next(iter(error.args), ""))


def _no_token(transport: _Transport) -> str:
    return f"gcp: {transport.source} answered with something that is no token; is it a proxy?"


def _explain(error: GoogleAuthError, transport: _Transport) -> ProviderError:
    """Return what went wrong in words of ours: google-auth quotes what it was answered."""
    if isinstance(error, DefaultCredentialsError):
        return ProviderError(f"gcp: {_NO_CREDENTIALS}", retryable=False)
    answer, retryable = transport.answer, bool(getattr(error, "retryable", False))
    if answer is None:
        return ProviderError(
            f"gcp: {transport.source} gave no token ({type(error).__name__}); see the cause", retryable=retryable
        )
    if answer.status < 400:
        return ProviderError(_no_token(transport))
    code = next(filter(None, map(_code_in, error.args)), None)
    advice = _ADVICE.get(code or "", "check the credentials, and what they may do")
    if code is None and answer.status == 404:
        advice = "this host has no service account; attach one"
    told = ", ".join(filter(None, (f"HTTP {answer.status}", code)))
    return ProviderError(f"gcp: {answer.host} refused ({told}); {advice}", retryable=retryable)


def _code_in(said: object) -> str | None:
    """Return the code in the body of an answer, which google-auth hands on as it is, or parsed."""
    body = parse_object(said) if isinstance(said, str) else said
    if not isinstance(body, Mapping):
        return None
    code = cast("Mapping[str, object]", body).get("error")
    if isinstance(code, Mapping):
        code = cast("Mapping[str, object]", code).get("status")
    return code if isinstance(code, str) and _CODE.fullmatch(code) else None
