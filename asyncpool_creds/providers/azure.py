"""Microsoft Entra tokens as passwords of Azure Database for PostgreSQL."""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TypeAlias, cast
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

try:
    from azure.core.credentials_async import AsyncSupportsTokenInfo, AsyncTokenCredential
    from azure.core.exceptions import AzureError, HttpResponseError, ServiceRequestError, ServiceResponseError
    from azure.identity.aio import DefaultAzureCredential

    # With aiohttp: else the SDK imports it when it makes its first request, which holds the event loop up for 150 ms.
    from asyncpool_creds.providers._azure_http import HttpAnswer, Traffic, guard
except ImportError as _missing:  # pragma: no cover
    raise ImportError("Entra needs azure-identity and aiohttp: pip install 'asyncpool-creds[azure]'") from _missing

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._document import earliest_end, parse_object
from asyncpool_creds.providers._foreign import keep_secrets_out_of_logs, summary_of, working_for_us
from asyncpool_creds.providers._retry_after import parse_retry_after

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["DATABASE_SCOPE", "Entra"]

DATABASE_SCOPE: Final = "https://ossrdbms-aad.database.windows.net/.default"
"""The scope of Azure Database for PostgreSQL in the public cloud; ``az cloud show`` has the resource of another."""

_AnyCredential: TypeAlias = AsyncTokenCredential | AsyncSupportsTokenInfo

# How long before its expiry azure-identity takes a token for due if it was not told (DEFAULT_REFRESH_OFFSET).
_DUE_BEFORE_EXPIRY: Final = timedelta(minutes=5)
# Microsoft: "Microsoft Entra authentication and authorization error codes".
_ADVICE: Final = {
    "AADSTS50034": "there is no such user in this tenant",
    "AADSTS50057": "the user is disabled",
    "AADSTS50076": "the user has to log in with a second factor; use an identity that can log in by itself",
    "AADSTS50126": "wrong user name or password",
    "AADSTS50173": "the login was revoked, as by a new password; log in again",
    "AADSTS500011": "there is no such resource in this tenant; check scope",
    "AADSTS53003": "a Conditional Access policy forbids it; ask the administrator of the tenant",
    "AADSTS70011": "check scope, which ends with /.default",
    "AADSTS70021": "no federated credential of the application matches issuer, subject and audience of the token",
    "AADSTS700016": "there is no such application in this tenant; check client and tenant",
    "AADSTS700024": "the assertion has expired: is the token file still being renewed, is this host's clock right?",
    "AADSTS700027": "the application does not know this certificate",
    "AADSTS700082": "the login has not been used for too long; log in again",
    "AADSTS700211": "no federated credential of the application matches the issuer of the token",
    "AADSTS700212": "no federated credential of the application matches the audience of the token",
    "AADSTS700213": "no federated credential of the application matches the subject of the token",
    "AADSTS700222": "a token that Entra itself has issued is no federated credential",
    "AADSTS7000215": "wrong client secret; it is the secret's value that counts, not its ID",
    "AADSTS7000222": "the client secret has expired; make a new one",
    "AADSTS90002": "there is no such tenant; check it, and the authority",
    "AADSTS1002012": "check scope, which ends with /.default",
}
_TRANSIENT_CODES: Final = frozenset({"AADSTS50196", "AADSTS90033", "AADSTS90055"})
_NO_IDENTITY: Final = (
    "no identity to log in with; assign a managed identity to this host, set the AZURE_* variables of a service "
    "principal or workload identity, or log in with 'az login'"
)
_CODE: Final = re.compile(r"AADSTS\d{4,8}")
_USER_CLAIMS: Final = ("upn", "preferred_username", "unique_name")
_IDENTITY_NAME: Final = re.compile(
    r"/providers/Microsoft\.ManagedIdentity/userAssignedIdentities/([^/]+)$", re.IGNORECASE
)
# The chains among its credentials, and each credential of a chain, log what was answered, in the text of exceptions.
keep_secrets_out_of_logs(
    [name for name in logging.root.manager.loggerDict if name.startswith(("azure.core", "azure.identity"))]
)
# Clients inherited by a forked child: closing their sockets is the parent's business, so they are only kept.
_inherited: list[object] = []


class Entra:
    """A provider of Microsoft Entra access tokens, from any asynchronous credential of azure-identity.

    azure-identity has a cache of its own, refreshes what is in it at most every 30 s, and keeps
    it to itself if that fails. So if it gives the same token again, although the database
    refused that one or it is due, it is asked once more, for one that its cache cannot have:
    with a claims request for a token issued from now on. A credential that knows no claims
    gives what it has; a managed identity's endpoint has a cache, too, which nobody gets past.

    Logging in as a group takes ``user``: the token does not know which of the groups is meant.

    Args:
        credential: From ``azure.identity.aio``, or one that works like it; it belongs to one
            event loop. None: a ``DefaultAzureCredential``, made when it is first needed, which
            leaves retries to the manager, and closed by `aclose`.
        user: The database role. None: whom the token names, in its claims ``xms_mirid`` (the name
            of a user-assigned managed identity), ``upn``, ``preferred_username`` or
            ``unique_name``; the connection's own where it names nobody, as those of service
            principals and system-assigned identities do.
        scope: The scope to ask for; other clouds than the public one have their own.
        close_credential: Close the credential that was handed in, too.
        timeout: Seconds that a token may take: azure-identity's own retries can go on for minutes.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type, or the credential is a blocking one
            (``azure.identity``, without ``aio``).
        ValueError: An argument is empty, or a duration makes no sense.
    """

    def __init__(
        self,
        credential: AsyncTokenCredential | AsyncSupportsTokenInfo | None = None,
        *,
        user: str | None = None,
        scope: str = DATABASE_SCOPE,
        close_credential: bool = False,
        timeout: float | timedelta = 15.0,
        clock: Clock | None = None,
    ) -> None:
        if credential is not None:
            _check_credential(credential)
        check_text("Entra", "user", user)
        check_text("Entra", "scope", scope)
        self._given: Final = credential
        self._closes_given: Final = close_credential
        self._user: Final = user
        self._scope: Final = scope
        self._timeout: Final = parse_seconds("Entra", "timeout", timeout)
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._traffic: Final = Traffic()
        self._own: DefaultAzureCredential | None = None
        self._home: tuple[int, AbstractEventLoop] | None = None
        self._closed = False
        self._last: str | None = None
        self._refused: str | None = None

    def __repr__(self) -> str:
        kind = "DefaultAzureCredential" if self._given is None else type(self._given).__qualname__
        return f"<Entra {kind} scope={self._scope!r} user={self._user!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Entra provider holds secrets and cannot be pickled; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return the newest token that can be had.

        Raises:
            ProviderError: There is none; ``retryable`` is False if that was said for good.
            ProviderTimeout: There was no answer in time.
        """
        with anyio.move_on_after(self._timeout):
            return await self._fetch()
        silent = f"; {self._traffic.host} has not answered" if self._traffic.is_unanswered else ""
        raise ProviderTimeout(f"azure: no token within {self._timeout:g} s{silent}")

    def invalidate(self, credential: Credential) -> None:
        """Let the next `fetch` give another token, if azure-identity can get one."""
        self._refused = credential.password

    @clears_frames
    async def aclose(self) -> None:
        """Close the credential, if that is up to this provider; its own one is made anew by the next `fetch`."""
        if self._home not in (None, (os.getpid(), asyncio.get_running_loop())):
            return
        if self._given is None:
            own, self._own = self._own, None
            if own is not None:
                await own.close()
        elif self._closes_given and not self._closed:
            self._closed = True
            await self._given.close()

    async def _fetch(self) -> Credential:
        source = await self._open()
        requested_at = utc_now(self._clock)
        guard(source, self._traffic)
        with working_for_us():
            try:
                token = await self._ask(source)
                if token.value == self._refused or (token.value == self._last and token.is_due(requested_at)):
                    token = await self._ask_past_the_cache(source, token)
            except ProviderError:
                raise
            except Exception as error:
                if not isinstance(error, AzureError) and self._traffic.url is None:
                    # Of a credential that is none of azure-identity's, or of its user.
                    raise
                failure, cause = self._explain(error), summary_of(error, self._safe_text(error))
            else:
                self._last, self._refused = token.value, None
                return self._credential(token, requested_at)
        # Here, where the exception is handled and gone: it would be the context of ours, with all that it holds.
        raise failure from cause

    # The credential of azure-identity

    async def _open(self) -> _AnyCredential:
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            self._move_to(home)
        if self._given is not None:
            if self._closed:
                raise ProviderError("azure: aclose() has closed the credential; make a new Entra", retryable=False)
            return self._given
        if self._own is None:
            # It reads certificates and token files. One thread of its own: nobody's turn is taken.
            made = await anyio.to_thread.run_sync(
                self._make_own, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
            )
            self._own = self._own or made
        return self._own

    def _move_to(self, home: tuple[int, AbstractEventLoop]) -> None:
        if self._home is not None and self._given is not None:
            raise ProviderError(
                "azure: a credential belongs to the process and event loop that first used it; make another one here, "
                "and another Entra for it, or let Entra make its own",
                retryable=False,
            )
        if self._own is not None and self._home is not None and self._home[0] != home[0]:
            _inherited.append(self._own)
        # What belongs to another loop can be neither awaited nor closed from this one.
        self._home, self._own = home, None

    def _make_own(self) -> DefaultAzureCredential:
        try:
            # Retries are the manager's business, who honours Retry-After and can be closed meanwhile.
            return DefaultAzureCredential(retry_total=0)
        except (ValueError, TypeError, OSError) as error:
            raise ProviderError(
                f"azure: DefaultAzureCredential cannot be made ({type(error).__name__}); check the AZURE_* variables",
                retryable=False,
            ) from error

    async def _ask(self, source: _AnyCredential, claims: str | None = None) -> _Token:
        self._traffic.forget()
        if hasattr(source, "get_token_info"):
            info = await cast("AsyncSupportsTokenInfo", source).get_token_info(
                self._scope, options={} if claims is None else {"claims": claims}
            )
            return self._token(info.token, info.expires_on, info.refresh_on)
        asked = cast("AsyncTokenCredential", cast("object", source))
        answer = await (asked.get_token(self._scope, claims=claims) if claims else asked.get_token(self._scope))
        return self._token(answer.token, answer.expires_on, None)

    def _token(self, value: object, expires_on: float, refresh_on: float | None) -> _Token:
        # azure-identity hands on what it was given under that name, be it what it may.
        if not isinstance(value, str):
            where = self._source or "the credential"
            raise ProviderError(f"azure: {where} answered with something that is no token; is it a proxy?")
        return _Token(value, _moment(expires_on), None if refresh_on is None else _moment(refresh_on))

    async def _ask_past_the_cache(self, source: _AnyCredential, held: _Token) -> _Token:
        try:
            return await self._ask(source, _issued_from(utc_now(self._clock)))
        except AzureError as error:
            if any(self._evidence(error)):
                raise
            # Nobody was asked: some credentials know no claims, Azure CLI's among them.
            return held

    # Answers

    def _credential(self, token: _Token, requested_at: datetime) -> Credential:
        try:
            return Credential(
                token.value,
                user=self._user or _user_in(token.value),
                expires_at=earliest_end(token.value, requested_at, token.expires_at),
                refresh_at=token.refresh_at,
            )
        except ValueError:
            raise ProviderError("azure: the token has characters that no server accepts as a password") from None

    def _evidence(self, error: BaseException) -> tuple[HttpAnswer | None, str | None, str | None]:
        """Return what was answered, the code that Entra gave, and why there was no answer where one was due."""
        links = list(_links(error))
        answer = next(filter(None, map(_answer_in, links)), self._traffic.answer)
        code = next((found[0] for link in links if (found := _CODE.search(str(link)))), None)
        lost = next((link for link in links if isinstance(link, (ServiceRequestError, ServiceResponseError))), None)
        if answer is not None or (lost is None and not self._traffic.is_lost):
            return answer, code, None
        return None, code, "no answer" if lost is None else type(lost).__name__

    def _safe_text(self, error: BaseException) -> str | None:
        """Return what the SDK says, where there was no answer that it could quote."""
        return None if self._traffic.has_answers or _answer_in(error) is not None else str(error)

    def _explain(self, error: BaseException) -> ProviderError:
        """Return what went wrong in words of ours: the SDK's may quote what was sent or received."""
        traffic = self._traffic
        if traffic.unusable is not None:
            return ProviderError(f"azure: {self._source} {traffic.unusable}")
        answer, code, lost = self._evidence(error)
        if lost is not None:
            where = traffic.host or "Entra, or the metadata endpoint,"
            return ProviderError(f"azure: {where} cannot be reached ({lost}); check address and network")
        if answer is None and code is None:
            return ProviderError(f"azure: {_NO_IDENTITY}; the cause lists what was tried", retryable=False)
        where = "Entra" if answer is None else answer.host
        told = ", ".join(filter(None, (None if answer is None else f"HTTP {answer.status}", code)))
        if code in _TRANSIENT_CODES or (answer is not None and answer.is_transient):
            wait = parse_retry_after(answer.retry_after, utc_now(self._clock)) if answer else None
            return ProviderError(f"azure: {where} is in trouble ({told}); it is asked again later", retry_after=wait)
        if answer is not None and answer.status < 400:
            said = f"azure: {self._source or where} answered with something that is no token ({told}); is it a proxy?"
            return ProviderError(said)
        advice = _NO_IDENTITY if code is None else _ADVICE.get(code, "see Microsoft's list of AADSTS error codes")
        return ProviderError(f"azure: {where} refused ({told}); {advice}", retryable=False)

    @property
    def _source(self) -> str | None:
        """Who was asked last: Entra is asked over TLS, and metadata services over plain HTTP."""
        traffic = self._traffic
        is_metadata = traffic.url is not None and traffic.url.startswith("http:")
        return f"the metadata service {traffic.host}" if is_metadata else traffic.host


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    expires_at: datetime
    refresh_at: datetime | None

    def is_due(self, now: datetime) -> bool:
        """Return whether azure-identity itself would rather have another one."""
        due_at = self.expires_at - _DUE_BEFORE_EXPIRY
        return now >= (due_at if self.refresh_at is None else min(due_at, self.refresh_at))


def _answer_in(error: BaseException) -> HttpAnswer | None:
    response = cast("_Response | None", error.response) if isinstance(error, HttpResponseError) else None
    if response is None:
        return None
    host = urlsplit(response.request.url).hostname or "Entra"
    return HttpAnswer(host, response.status_code, response.headers.get("Retry-After"))


class _Response(Protocol):
    """What azure-core's classes of responses, of which there are several, have in common."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def request(self) -> _Request: ...


class _Request(Protocol):
    url: str


def _links(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_credential(credential: object) -> None:
    if isinstance(credential, type):
        raise TypeError(f"Entra: got the class {credential.__qualname__}; pass an instance of it")
    method = getattr(credential, "get_token_info", None) or getattr(credential, "get_token", None)
    kind = type(credential)
    if not callable(method):
        raise TypeError(
            f"Entra: credential must be one of azure.identity.aio, as DefaultAzureCredential() is, not {kind.__name__}"
        )
    if not inspect.iscoroutinefunction(method) and not hasattr(kind, "__aenter__"):
        raise TypeError(
            f"Entra: {kind.__module__}.{kind.__qualname__} would block the event loop; "
            f"take the credential of that name from azure.identity.aio"
        )


def _moment(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)


def _issued_from(now: datetime) -> str:
    """Return the claims request for a token issued from `now` on.

    It is what a service sends that knows of a revocation (Microsoft: "How to use Continuous Access Evaluation
    enabled APIs in your applications").
    """
    return f'{{"access_token":{{"nbf":{{"essential":true,"value":"{int(now.timestamp())}"}}}}}}'


def _user_in(token: str) -> str | None:
    """Return whom a token names; its signature is the database's business."""
    _, _, rest = token.partition(".")
    payload, _, _ = rest.partition(".")
    try:
        claims = parse_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)).decode()) or {}
    except ValueError:
        return None
    identity = claims.get("xms_mirid")
    if isinstance(identity, str) and (found := _IDENTITY_NAME.search(identity)):
        return found[1]
    names = (claims.get(name) for name in _USER_CLAIMS)
    return next((name for name in names if isinstance(name, str) and name), None)
