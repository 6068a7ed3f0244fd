"""Tokens of an OAuth 2.0 or OpenID Connect issuer as database passwords."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeAlias, cast
from urllib.parse import quote_plus

import anyio
import anyio.to_thread

try:
    import httpx
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the OAuth 2.0 provider needs httpx: pip install 'asyncpool-creds[oauth2]'") from _missing

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._expiry import read_validity
from asyncpool_creds.storage import MemoryStorage, StoredTokens, TokenStorage

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

__all__ = ["Grant", "OAuth2"]

Grant: TypeAlias = Literal["client_credentials", "password", "refresh_token"]

_logger = logging.getLogger("asyncpool_creds")

# Whose fault it is and what to do, by the codes of RFC 6749 sections 4.1.2.1 and 5.2: refusals for good.
_ADVICE: Final = {
    "access_denied": "the issuer's policy forbids it; ask its administrator",
    "invalid_client": "check client_id, client_secret and client_auth",
    "invalid_grant": "check username and password, and whether the user may still log in",
    "invalid_request": "the issuer misses a parameter or dislikes one; see its manual, and 'extra'",
    "invalid_scope": "check scope",
    "unauthorized_client": "allow this grant for the client at the issuer",
    "unsupported_grant_type": "the issuer does not offer this grant; use another one",
}
# The issuer's trouble, not ours (RFC 6749 section 4.1.2.1; RFC 8628 section 3.5 for slow_down).
_TRANSIENT: Final = frozenset({"server_error", "slow_down", "temporarily_unavailable"})
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429})
# Nothing of the request can have left when one of these is raised.
_NOTHING_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
_OUR_PARAMETERS: Final = frozenset(
    {"grant_type", "client_id", "client_secret", "username", "password", "refresh_token", "scope", "audience"}
)
_ANSWER_LOST: Final = "the issuer's answer to a refresh was lost, and with it the next refresh token"
_FORKED: Final = "this process is a fork, and the refresh token is its parent's; make the provider after forking"
_LONGEST_DESCRIPTION: Final = 300
_END_OF_TIME: Final = datetime.max.replace(tzinfo=UTC)
_JWT: Final = re.compile(r"eyJ[\w-]+\.[\w-]*\.?[\w-]*")
# Clients inherited by a forked child: closing their sockets is the parent's business, so they are only kept.
_inherited: list[httpx.AsyncClient] = []


class OAuth2:
    """A provider of tokens from an OAuth 2.0 or OpenID Connect token endpoint (RFC 6749).

    The grant follows from the arguments: `username` and `password` make the password
    grant, `refresh_token` alone the refresh token grant, a client with a secret alone the
    client credentials grant. Whatever the grant, a refresh token that the issuer hands out is
    used for the next fetch, under the lock of `storage`, and its successor is stored before
    anyone uses what came with it. When the issuer refuses it, or its answer is lost, the
    original grant is used again; a refresh token is never sent a second time unless it is
    certain that the issuer did not see it, or did answer.

    Cancelling `fetch` does not cut an exchange short: it is finished and stored in the
    background, and the next `fetch` joins it. `aclose` waits for it; the provider can be used
    again afterwards.

    Args:
        issuer: The issuer's identifier, exactly as its metadata says it; the token
            endpoint is discovered there (OpenID Connect Discovery 1.0, RFC 8414).
        token_url: The token endpoint, instead.
        client_id: The client.
        client_secret: Its secret; None: a public client, or none at all.
        client_auth: How the secret is sent: ``"basic"`` (client_secret_basic) or ``"post"``
            (client_secret_post). None: as the metadata says, basic where it says nothing.
        grant: States the grant where the arguments allow more than one, or merely to be clear.
        username: Of the user who logs in.
        password: Theirs.
        refresh_token: One to start with, of an earlier login.
        scope: Scopes, separated by spaces. An ID token needs ``openid``, a refresh token often
            ``offline_access``.
        audience: Whom the token is for, where the issuer wants to be told (Auth0).
        extra: More parameters of the token request.
        use: Which token is the database password.
        user: The database user to log in as; None: the connection's own.
        user_claim: The claim of the token that names the database user, such as ``"sub"``.
        storage: Where refresh tokens are kept; memory if not given.
        storage_key: Under which name; derived from endpoint, client and user if not given.
        timeout: Seconds one request may take, as a whole.
        http_client: Makes the httpx client, for a proxy, a private certificate authority or
            client certificates: ``lambda: httpx.AsyncClient(verify=context)``. Called once per
            process and event loop; the provider closes what it made.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Arguments are missing or contradict each other, or secrets would leave
            without TLS: a plain ``http`` address must be a loopback one.
    """

    def __init__(
        self,
        issuer: str | None = None,
        *,
        token_url: str | None = None,
        client_id: str | None = None,
        client_secret: str | None = None,
        client_auth: Literal["basic", "post"] | None = None,
        grant: Grant | None = None,
        username: str | None = None,
        password: str | None = None,
        refresh_token: str | None = None,
        scope: str | None = None,
        audience: str | None = None,
        extra: Mapping[str, str] | None = None,
        use: Literal["access_token", "id_token"] = "access_token",
        user: str | None = None,
        user_claim: str | None = None,
        storage: TokenStorage | None = None,
        storage_key: str | None = None,
        timeout: float | timedelta = 10.0,
        http_client: Callable[[], httpx.AsyncClient] | None = None,
        clock: Clock | None = None,
    ) -> None:
        strings = {
            "issuer": issuer,
            "token_url": token_url,
            "client_id": client_id,
            "client_secret": client_secret,
            "username": username,
            "password": password,
            "refresh_token": refresh_token,
            "scope": scope,
            "audience": audience,
            "user": user,
            "user_claim": user_claim,
            "storage_key": storage_key,
        }
        for name, value in strings.items():
            _check_string(name, value)
        _check_addresses(issuer, token_url)
        _check_client(client_id, client_secret, client_auth)
        _check_use(use, user, user_claim)
        if storage is not None and not isinstance(storage, TokenStorage):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"OAuth2: storage must be a TokenStorage, as MemoryStorage() is, not {type(storage).__name__}"
            )
        if http_client is not None and not callable(http_client):
            raise TypeError("OAuth2: http_client must be a function that makes an httpx.AsyncClient, not a client")
        self._grant: Final = _grant(grant, username, password, refresh_token, client_secret)
        self._issuer: Final = issuer
        self._client_id: Final = client_id
        self._client_secret: Final = client_secret
        self._username: Final = username
        self._password: Final = password
        self._first_refresh_token: Final = refresh_token
        self._parameters: Final = _parameters(scope, audience, extra)
        self._use: Final = use
        self._user: Final = user
        self._user_claim: Final = user_claim
        self._storage: Final = MemoryStorage() if storage is None else storage
        self._storage_key: Final = storage_key or self._default_key(issuer or token_url or "")
        self._timeout: Final = _seconds(timeout)
        self._make_client: Final = http_client
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        # With token_url there is nothing to discover.
        self._endpoint = None if token_url is None else _Endpoint(token_url, client_auth or "basic")
        self._client_auth: Final = client_auth
        self._birth_process: Final = os.getpid()
        self._client: httpx.AsyncClient | None = None
        self._home: tuple[int, AbstractEventLoop] | None = None
        self._flight: Task[Credential] | None = None
        self._spending = False
        self._unsaved: _Unsaved | None = None

    def __repr__(self) -> str:
        where = self._issuer or (self._endpoint.url if self._endpoint else None)
        return f"<OAuth2 {self._grant} at {where} client_id={self._client_id!r} use={self._use}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an OAuth2 provider holds secrets and cannot be pickled; make one where it is needed")

    async def fetch(self) -> Credential:
        """Return a token fetched now, with the expiry that the answer and the token itself state.

        Raises:
            ProviderError: The issuer gave none; ``retryable`` is False if it refused for good.
            ProviderTimeout: It did not answer in time.
        """
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            self._move_to(home)
        flight = self._flight
        if flight is None or flight.done():
            flight = self._flight = asyncio.create_task(self._fetch(), name="asyncpool_creds.oauth2.fetch")
            flight.add_done_callback(_retrieve)
        # Not awaited directly: our own cancellation must not reach the exchange.
        await asyncio.wait((flight,))
        if flight.cancelled():
            raise ProviderError("oauth2: the provider was closed while it was fetching")
        return flight.result()

    async def aclose(self) -> None:
        """Finish the exchange of a refresh token, if one is going on, and close the HTTP client."""
        if self._home != (os.getpid(), asyncio.get_running_loop()):
            return
        flight, client = self._flight, self._client
        if flight is not None and not flight.done():
            if not self._spending:
                flight.cancel()
            await asyncio.wait((flight,))
        if client is not None:
            self._client = None
            await client.aclose()

    # The fetch, in its own task

    def _move_to(self, home: tuple[int, AbstractEventLoop]) -> None:
        if self._client is not None and self._home is not None and self._home[0] != home[0]:
            _inherited.append(self._client)
        # What belongs to another loop can be neither awaited nor closed from this one.
        self._home, self._client, self._flight, self._spending = home, None, None, False
        if self._birth_process != home[0]:
            self._unsaved = None

    async def _fetch(self) -> Credential:
        if self._client is None:
            self._client = await self._open()
        if self._endpoint is None:
            self._endpoint = await self._discover(self._client)
        async with self._storage.lock(self._storage_key):
            known = await self._known()
            if (token := self._to_spend(known)) is not None:
                try:
                    outcome = await self._spend(self._client, self._endpoint, token, known)
                finally:
                    self._spending = False
                if isinstance(outcome, Credential):
                    return outcome
                if self._grant == "refresh_token" and outcome.lost:
                    raise _login_needed(_ANSWER_LOST) from outcome.error
                if self._grant == "refresh_token" or not outcome.may_log_in_again:
                    raise outcome.error from outcome.cause
            elif self._grant == "refresh_token":
                raise _login_needed(_FORKED if known is None else _ANSWER_LOST)
            return await self._log_in(self._client, self._endpoint)

    async def _open(self) -> httpx.AsyncClient:
        if self._make_client is not None:
            return self._make_client()
        # Reading the certificate authorities takes 20 ms and more: not on the event loop.
        context = await anyio.to_thread.run_sync(httpx.create_ssl_context)
        # No connection is kept: requests are minutes apart, and one that meets a connection which the
        # issuer is just closing is a lost answer, which costs a refresh token.
        return httpx.AsyncClient(verify=context, limits=httpx.Limits(max_keepalive_connections=0))

    async def _known(self) -> StoredTokens | None:
        """Return the tokens to go on with: those stored, or newer ones that could not be stored."""
        stored = await self._storage.load(self._storage_key)
        unsaved = self._unsaved
        if unsaved is None:
            return stored
        if stored != unsaved.replaces:
            # Another one who shares the storage has moved on.
            self._unsaved = None
            return stored
        return unsaved.tokens

    def _to_spend(self, known: StoredTokens | None) -> str | None:
        if known is None:
            # A fork has the parent's first token, too: only one of the two may use it.
            return self._first_refresh_token if self._birth_process == os.getpid() else None
        if known.expires_at is not None and self._grant != "refresh_token" and known.expires_at <= self._now():
            return None
        return known.refresh_token

    async def _spend(
        self, client: httpx.AsyncClient, endpoint: _Endpoint, token: str, known: StoredTokens | None
    ) -> Credential | _Failure:
        self._spending = True
        outcome = await self._post(client, endpoint, {"grant_type": "refresh_token", "refresh_token": token})
        if isinstance(outcome, _Failure):
            if outcome.lost:
                await self._save(StoredTokens(refresh_token=None), known)
            return outcome
        successor = self._refresh_token_in(outcome)
        if successor is not None and successor.refresh_token != token:
            await self._save(successor, known)
        self._spending = False
        return self._credential(outcome)

    async def _log_in(self, client: httpx.AsyncClient, endpoint: _Endpoint) -> Credential:
        request = {"grant_type": str(self._grant)}
        if self._grant == "password":
            request |= {"username": self._username or "", "password": self._password or ""}
        outcome = await self._post(client, endpoint, request)
        if isinstance(outcome, _Failure):
            raise outcome.error from outcome.cause
        tokens = self._refresh_token_in(outcome)
        known = await self._storage.load(self._storage_key)
        if tokens is None and known is not None and known.refresh_token is not None:
            # There is no new one, and the old one was refused or has expired.
            tokens = StoredTokens(refresh_token=None)
        if tokens is not None:
            await self._save(tokens, known)
        credential = self._credential(outcome)
        if isinstance(credential, _Failure):
            raise credential.error from credential.cause
        return credential

    async def _save(self, tokens: StoredTokens, known: StoredTokens | None) -> None:
        replaces = known if self._unsaved is None else self._unsaved.replaces
        self._unsaved = _Unsaved(tokens, replaces)
        try:
            await self._storage.save(self._storage_key, tokens)
        except Exception:
            # The exchange is done and cannot be undone: losing its result too would help nobody.
            _logger.exception("oauth2: the new refresh token could not be stored and is kept in memory alone")
        else:
            self._unsaved = None

    # Requests

    async def _post(
        self, client: httpx.AsyncClient, endpoint: _Endpoint, request: Mapping[str, str]
    ) -> _Answer | _Failure:
        """Return the answer of the token endpoint, or what is wrong with it."""
        form = {**self._parameters, **request}
        headers = {"Accept": "application/json"}
        if self._client_id is not None:
            if self._client_secret is None:
                form["client_id"] = self._client_id
            elif endpoint.client_auth == "post":
                form |= {"client_id": self._client_id, "client_secret": self._client_secret}
            else:
                headers["Authorization"] = _basic(self._client_id, self._client_secret)
        requested_at = self._now()
        response = await self._send(client, "POST", endpoint.url, headers, form)
        if isinstance(response, _Failure):
            return response
        members = _read_object(response.content)
        if response.is_success and members is not None and "error" not in members:
            return _Answer(requested_at, members)
        return self._refusal(response, members or {}, refreshing="refresh_token" in request, request=request)

    async def _send(
        self,
        client: httpx.AsyncClient,
        method: str,
        url: str,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
    ) -> httpx.Response | _Failure:
        # A third of the time for connecting and for TLS each, so that running out of
        # time as a whole always means that the request has left.
        timeout = httpx.Timeout(self._timeout, connect=self._timeout / 3, pool=self._timeout / 3)
        where = _without_query(url)
        try:
            with anyio.fail_after(self._timeout):
                return await client.request(
                    method, url, headers=dict(headers), data=form, timeout=timeout, follow_redirects=False
                )
        except TimeoutError as error:
            return _Failure(self._timed_out(where), error, lost=True)
        except httpx.RequestError as error:
            # The request that was sent has the secrets in its body, and an exception can be pickled.
            error.request = httpx.Request(method, url)
            if isinstance(error, _NOTHING_SENT):
                kind = ProviderTimeout if isinstance(error, httpx.TimeoutException) else ProviderError
                reason = f"{type(error).__name__}: {error}"
                return _Failure(kind(f"oauth2: {where} cannot be reached ({reason}); check address and network"), error)
            if isinstance(error, httpx.TimeoutException):
                return _Failure(self._timed_out(where), error, lost=True)
            # Its text may quote what was sent.
            message = f"oauth2: the connection to {where} broke before the answer was complete ({type(error).__name__})"
            return _Failure(ProviderError(message), error, lost=True)

    def _timed_out(self, where: str) -> ProviderTimeout:
        return ProviderTimeout(f"oauth2: {where} did not answer within {self._timeout:g} s")

    async def _discover(self, client: httpx.AsyncClient) -> _Endpoint:
        """Return the token endpoint that the issuer's metadata names."""
        issuer = self._issuer or ""
        url, other_url = _metadata_urls(issuer)
        response = await self._get(client, url)
        if response.status_code == 404:
            response = await self._get(client, other_url)
        if not response.is_success:
            status = response.status_code
            raise ProviderError(
                f"oauth2: no metadata of issuer {issuer!r} (HTTP {status}); check the identifier, or pass token_url",
                retryable=_is_transient(status),
                retry_after=_retry_after(response, self._now()),
            )
        return _read_metadata(issuer, _read_object(response.content), self._client_auth)

    async def _get(self, client: httpx.AsyncClient, url: str) -> httpx.Response:
        response = await self._send(client, "GET", url, {"Accept": "application/json"})
        if isinstance(response, _Failure):
            raise response.error from response.cause
        return response

    # Answers

    def _refusal(
        self, response: httpx.Response, members: Mapping[str, object], *, refreshing: bool, request: Mapping[str, str]
    ) -> _Failure:
        where, status = _without_query(str(response.request.url)), response.status_code
        code = members.get("error")
        retry_after = _retry_after(response, self._now())
        if response.is_redirect:
            message = f"oauth2: {where} redirects (HTTP {status}), where secrets do not follow; correct the address"
            return _Failure(ProviderError(message, retryable=False))
        if not isinstance(code, str) or not code:
            if response.is_success:
                # It may well have done the exchange before it spoke garbage.
                message = f"oauth2: {where} answered with something that is no token response; is it a token endpoint?"
                return _Failure(ProviderError(message), lost=True)
            message = f"oauth2: {where} failed (HTTP {status})"
            return _Failure(ProviderError(message, retryable=_is_transient(status), retry_after=retry_after))
        description = members.get("error_description")
        told = self._redact(code, request)
        if isinstance(description, str) and description:
            told += f": {self._redact(description, request)}"
        if code in _TRANSIENT or _is_transient(status):
            message = f"oauth2: {where} is in trouble (HTTP {status}, {told}); it is asked again later"
            return _Failure(ProviderError(message, retry_after=retry_after))
        advice = _ADVICE.get(code, "see the issuer's manual")
        if refreshing and code == "invalid_grant":
            advice = "the refresh token is expired, revoked or used up; a new login is needed: pass its refresh_token"
        message = f"oauth2: {where} refused (HTTP {status}, {told}); {advice}"
        error = ProviderError(message, retryable=False, retry_after=retry_after)
        return _Failure(error, refused=code != "invalid_client")

    def _redact(self, text: str, request: Mapping[str, str]) -> str:
        """Return what the issuer says without any secret it may quote, on one line."""
        secrets = (self._client_secret, self._password, self._first_refresh_token, request.get("refresh_token"))
        for secret in secrets:
            for form in () if secret is None else (secret, quote_plus(secret)):
                text = text.replace(form, "[redacted]")
        text = " ".join(_JWT.sub("[redacted]", text).split())
        return text if len(text) <= _LONGEST_DESCRIPTION else f"{text[:_LONGEST_DESCRIPTION]}..."

    def _refresh_token_in(self, answer: _Answer) -> StoredTokens | None:
        token = answer.members.get("refresh_token")
        if not isinstance(token, str) or not token:
            return None
        # Keycloak's and Entra's names for it; zero is Keycloak's word for never.
        members = answer.members
        life = _lifetime(members.get("refresh_expires_in")) or _lifetime(members.get("refresh_token_expires_in"))
        return StoredTokens(refresh_token=token, expires_at=_earliest(answer.requested_at, life, token))

    def _credential(self, answer: _Answer) -> Credential | _Failure:
        token = answer.members.get(self._use)
        if not isinstance(token, str) or not token:
            hint = "; ask for scope 'openid'" if self._use == "id_token" else ""
            message = f"oauth2: the issuer's answer has no {self._use}{hint}"
            return _Failure(ProviderError(message, retryable=False), refused=True)
        user = self._user
        if self._user_claim is not None:
            user = _claim(token, self._user_claim)
            if user is None:
                message = f"oauth2: the {self._use} has no claim {self._user_claim!r} to name a user; check user_claim"
                return _Failure(ProviderError(message, retryable=False))
        # expires_in is about the access token alone.
        life = _lifetime(answer.members.get("expires_in")) if self._use == "access_token" else None
        try:
            return Credential(token, user=user, expires_at=_earliest(answer.requested_at, life, token))
        except ValueError:
            message = f"oauth2: the {self._use} holds characters that no server accepts as a password"
            return _Failure(ProviderError(message, retryable=False))

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)

    def _default_key(self, where: str) -> str:
        who = self._username or self._client_id or ""
        parts = (where, self._client_id, self._username, self._first_refresh_token, sorted(self._parameters.items()))
        # A new first refresh token is a new login, and must not be shadowed by what is stored of the last one.
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"oauth2:{who}@{where}#{digest[:16]}"


@dataclass(frozen=True, slots=True)
class _Endpoint:
    url: str
    client_auth: Literal["basic", "post"]


@dataclass(frozen=True, slots=True)
class _Answer:
    requested_at: datetime
    members: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Failure:
    """What went wrong, and what that means for a refresh token.

    Args:
        error: To raise.
        cause: Of the error.
        lost: The exchange may have been done, but its result is gone.
        refused: The issuer does not like what it was shown, but for the client's own secret.
    """

    error: ProviderError
    cause: Exception | None = None
    lost: bool = False
    refused: bool = False

    @property
    def may_log_in_again(self) -> bool:
        """Whether the original grant may work where a refresh token did not."""
        return self.lost or self.refused


@dataclass(frozen=True, slots=True)
class _Unsaved:
    """Tokens that the storage would not take, and what it held then."""

    tokens: StoredTokens
    replaces: StoredTokens | None


def _login_needed(reason: str) -> ProviderError:
    return ProviderError(f"oauth2: {reason}. A new login is needed: pass its refresh_token", retryable=False)


def _retrieve(flight: Task[Credential]) -> None:
    # The one who would have seen the error may have been cancelled.
    if not flight.cancelled():
        flight.exception()


def _check_string(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"OAuth2: {name} must be a str, not {type(value).__name__}")
    if not value:
        raise ValueError(f"OAuth2: {name} is empty; is an environment variable missing?")


def _check_addresses(issuer: str | None, token_url: str | None) -> None:
    if (issuer is None) == (token_url is None):
        raise ValueError("OAuth2: pass either issuer, whose metadata names the token endpoint, or token_url")
    for name, address in (("issuer", issuer), ("token_url", token_url)):
        if address is not None and (complaint := _complaint_about(address)):
            raise ValueError(f"OAuth2: {name} {complaint}")


def _check_client(client_id: str | None, client_secret: str | None, client_auth: str | None) -> None:
    if client_auth not in (None, "basic", "post"):
        raise ValueError(f"OAuth2: client_auth must be 'basic', 'post' or None, not {client_auth!r}")
    if client_secret is not None and client_id is None:
        raise ValueError("OAuth2: client_secret without client_id")
    if client_auth is not None and client_secret is None:
        raise ValueError("OAuth2: client_auth without client_secret; a public client does not authenticate")


def _check_use(use: str, user: str | None, user_claim: str | None) -> None:
    if use not in ("access_token", "id_token"):
        raise ValueError(f"OAuth2: use must be 'access_token' or 'id_token', not {use!r}")
    if user is not None and user_claim is not None:
        raise ValueError("OAuth2: pass either user or user_claim")


def _grant(
    asked: Grant | None,
    username: str | None,
    password: str | None,
    refresh_token: str | None,
    client_secret: str | None,
) -> Grant:
    if (username is None) != (password is None):
        raise ValueError("OAuth2: username and password belong together; one of them is missing")
    if asked not in (None, "client_credentials", "password", "refresh_token"):
        raise ValueError(f"OAuth2: grant must be 'client_credentials', 'password' or 'refresh_token', not {asked!r}")
    if asked is None and username is None and refresh_token is None and client_secret is None:
        raise ValueError(
            "OAuth2: nothing to log in with; pass username and password, refresh_token, or client_id and client_secret"
        )
    if asked == "password" and username is None:
        raise ValueError("OAuth2: grant 'password' needs username and password")
    if asked == "refresh_token" and refresh_token is None:
        raise ValueError("OAuth2: grant 'refresh_token' needs refresh_token")
    if asked in ("refresh_token", "client_credentials") and username is not None:
        raise ValueError(f"OAuth2: grant {asked!r} has no use for username and password; leave them out")
    return asked or ("password" if username else "refresh_token" if refresh_token else "client_credentials")


def _parameters(scope: str | None, audience: str | None, extra: Mapping[str, str] | None) -> dict[str, str]:
    parameters = dict(extra or {})
    for name, value in parameters.items():
        if not isinstance(name, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError("OAuth2: extra must map str to str")
        if name in _OUR_PARAMETERS:
            raise ValueError(f"OAuth2: extra may not contain {name!r}; there is an argument for it")
    if scope is not None:
        parameters["scope"] = scope
    if audience is not None:
        parameters["audience"] = audience
    return parameters


def _seconds(timeout: float | timedelta) -> float:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"OAuth2: timeout must be a number of seconds or a timedelta, not {type(timeout).__name__}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"OAuth2: timeout must be more than zero and finite, not {timeout!r}")
    return float(seconds)


def _complaint_about(address: str) -> str | None:
    """Return what is wrong with an address that secrets are to be sent to; never the address, which may hold one."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return "is not a valid URL"
    if url.userinfo:
        return "must not contain a user or password; there are arguments for them"
    if not url.host or url.scheme not in ("http", "https"):
        return "must be a full URL, such as 'https://login.example.com/oauth2/token'"
    if url.fragment:
        return "must not contain a fragment"
    if url.scheme == "http" and not _is_loopback(url.host):
        return "must be https: secrets are sent there; plain http is for loopback addresses only"
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _metadata_urls(issuer: str) -> tuple[str, str]:
    """Return where OpenID Connect Discovery 1.0 (section 4) and RFC 8414 (section 3.1) keep an issuer's metadata."""
    url = httpx.URL(issuer)
    path = url.path.rstrip("/")
    return (
        str(url.copy_with(path=f"{path}/.well-known/openid-configuration")),
        str(url.copy_with(path=f"/.well-known/oauth-authorization-server{path}")),
    )


def _read_metadata(
    issuer: str, metadata: Mapping[str, object] | None, asked: Literal["basic", "post"] | None
) -> _Endpoint:
    if metadata is None:
        raise ProviderError(f"oauth2: the metadata of issuer {issuer!r} is no JSON object; check the identifier")
    if metadata.get("issuer") != issuer:
        # Or else one issuer could pose as another (RFC 8414 section 3.3).
        stated = str(metadata.get("issuer"))[:_LONGEST_DESCRIPTION]
        raise ProviderError(
            f"oauth2: the metadata of issuer {issuer!r} says that it is {stated!r}; "
            f"they must be the same to the letter: correct 'issuer' if that is the right one",
            retryable=False,
        )
    url = metadata.get("token_endpoint")
    complaint = _complaint_about(url) if isinstance(url, str) else "is missing"
    if complaint is not None or not isinstance(url, str):
        raise ProviderError(f"oauth2: token_endpoint in the metadata of issuer {issuer!r} {complaint}", retryable=False)
    # Basic is what holds when nothing is said (RFC 8414 section 2).
    methods = metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
    offers_basic = not isinstance(methods, list) or "client_secret_basic" in methods
    offers_post = isinstance(methods, list) and "client_secret_post" in methods
    return _Endpoint(url, asked or ("post" if offers_post and not offers_basic else "basic"))


def _basic(client_id: str, client_secret: str) -> str:
    """Return the Authorization header; both parts are form-encoded first (RFC 6749 section 2.3.1)."""
    pair = f"{quote_plus(client_id)}:{quote_plus(client_secret)}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _read_object(text: bytes) -> dict[str, object] | None:
    # The decoder's exceptions carry the document, so none gets out of here.
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, object]", document) if isinstance(document, dict) else None


def _is_transient(status: int) -> bool:
    return status >= 500 or status in _TRANSIENT_STATUS


def _retry_after(response: httpx.Response, now: datetime) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date (RFC 9110 section 10.2.3)."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max((at - now).total_seconds(), 0.0)


def _lifetime(value: object) -> timedelta | None:
    """Return a lifetime that an issuer states; some send digits in a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        life = timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        return None
    return life if life >= timedelta() else None


def _earliest(requested_at: datetime, life: timedelta | None, token: str) -> datetime | None:
    """Return when a token ends: what the answer says or what the token says, whichever comes first."""
    ends: list[datetime] = []
    if life is not None and life < _END_OF_TIME - requested_at:
        ends.append(requested_at + life)
    validity = read_validity(token)
    if validity is not None:
        ends.append(validity.anchored_at(requested_at))
    return min(ends, default=None)


def _claim(token: str, name: str) -> str | None:
    """Return a claim of a JSON Web Token; its signature is the database's business."""
    _, _, rest = token.partition(".")
    payload, _, _ = rest.partition(".")
    try:
        claims = _read_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        return None
    value = None if claims is None else claims.get(name)
    return value if isinstance(value, str) and value else None


def _without_query(url: str) -> str:
    return url.partition("?")[0]
