"""The token endpoint of an OAuth 2.0 issuer: found, asked, its answers read and its refusals told apart."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal, NoReturn, cast
from urllib.parse import quote_plus

import httpx

from asyncpool_creds._clock import utc_now
from asyncpool_creds._errors import ProviderError
from asyncpool_creds.providers._document import earliest_end, parse_object
from asyncpool_creds.providers._http import (
    HttpClient,
    Response,
    Unanswered,
    complaint_about,
    is_transient,
    retry_after,
)
from asyncpool_creds.providers._redaction import redact
from asyncpool_creds.storage import StoredTokens

if TYPE_CHECKING:
    from asyncpool_creds._clock import Clock

__all__ = ["Answer", "Client", "Failure", "TokenEndpoint", "claim", "earliest", "lifetime", "refresh_token_in"]

# Whose fault it is and what to do, by the codes of RFC 6749 sections 4.1.2.1 and 5.2, and of RFC 8693 section 2.2.2:
# refusals for good.
_ADVICE: Final = {
    "access_denied": "the issuer's policy, or the user who was asked, forbids it",
    "invalid_client": "check client_id and how the client authenticates",
    "invalid_grant": "check what was logged in with, and whether the user may still log in",
    "invalid_request": "the issuer misses a parameter or dislikes one; see its manual, and 'extra'",
    "invalid_scope": "check scope",
    "invalid_target": "check audience and 'extra'",
    "unauthorized": "check client_id and how the client authenticates",  # Globus's word for invalid_client
    "unauthorized_client": "allow this grant for the client at the issuer",
    "unsupported_grant_type": "the issuer does not offer this grant; use another one",
}
# The issuer's trouble, not ours (RFC 6749 section 4.1.2.1; RFC 8628 section 3.5 for slow_down).
_TRANSIENT: Final = frozenset({"server_error", "slow_down", "temporarily_unavailable"})
# What a gateway says of an issuer to which it may have passed the request on (RFC 9110 sections 15.6.3 and 15.6.5).
_GATEWAY_STATUS: Final = frozenset({502, 504})
_OF_THE_CLIENT: Final = frozenset({"invalid_client", "unauthorized"})
_JWT_BEARER: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"  # RFC 7523 section 2.2
_SECRET_PARAMETERS: Final = frozenset(
    {
        *("refresh_token", "device_code", "password", "client_secret"),
        *("assertion", "client_assertion", "subject_token", "actor_token"),
    }
)
# What an issuer may quote of a request. Of anything else, such as `extra`, nobody knows.
_PUBLIC_PARAMETERS: Final = frozenset(
    {
        *("grant_type", "client_id", "client_assertion_type", "username"),
        *("scope", "audience", "subject_token_type"),
    }
)
# A parameter that nothing is known of is no secret if it is shorter than that, but a word such as "no".
_SHORTEST_SECRET: Final = 4
_LONGEST_DESCRIPTION: Final = 300
_END_OF_TIME: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: a client of the issuer, and how it proves that.

    Args:
        id: Its name; None: none.
        secret: Its secret; None: a public client, or one with an assertion.
        auth: How the secret is sent; None: as the metadata says, basic where it says nothing.
        assertion: Makes the assertion that the client authenticates with (RFC 7523 section 2.2).
    """

    id: str | None
    secret: str | None = field(default=None, repr=False)
    auth: Literal["basic", "post"] | None = None
    assertion: Callable[[], Awaitable[str]] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the issuer says, and when it was asked, as an aware UTC datetime."""

    requested_at: datetime
    members: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, and what that means for a refresh token.

    Args:
        error: To raise; its cause is set.
        lost: The exchange may have been done, but its result is gone.
        refused: The issuer does not like what it was shown, but for the client's own proof.
        code: The issuer's own word for it.
    """

    error: ProviderError
    lost: bool = False
    refused: bool = False
    code: str | None = None

    @property
    def may_log_in_again(self) -> bool:
        """Whether the original grant may work where a refresh token did not."""
        return self.lost or self.refused

    def throw(self) -> NoReturn:
        """Raise the error."""
        raise self.error


@dataclass(frozen=True, slots=True)
class _Addresses:
    token: str
    device_authorization: str | None
    client_auth: Literal["basic", "post"]


class TokenEndpoint:
    """An issuer's token endpoint, and what its metadata says beside it; discovered once, and anew if it has moved.

    Args:
        source: Who asks, for messages.
        issuer: The issuer's identifier, whose metadata names the endpoint.
        token_url: The endpoint itself, instead; with it there is nothing to discover.
        client: Who asks, for the issuer.
        parameters: What is part of every request.
        secrets: What the issuer may quote and nobody is to read.
        http: What the requests go through.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        source: str,
        *,
        issuer: str | None,
        token_url: str | None,
        client: Client,
        parameters: Mapping[str, str],
        secrets: Iterable[str | None],
        http: HttpClient,
        clock: Clock,
    ) -> None:
        self._source: Final = source
        self._issuer: Final = issuer or ""
        self._client: Final = client
        self._parameters: Final = parameters
        self._secrets: Final = tuple(secret for secret in (*secrets, client.secret) if secret)
        self._http: Final = http
        self._clock: Final = clock
        self._is_discovered: Final = token_url is None
        self._addresses = None if token_url is None else _Addresses(token_url, None, client.auth or "basic")

    @property
    def url(self) -> str | None:
        """The endpoint, once it is known."""
        return None if self._addresses is None else self._addresses.token

    async def find(self) -> None:
        """Discover the endpoint, unless it is known.

        Raises:
            ProviderError: The metadata could not be had, or makes no sense.
        """
        if self._addresses is None:
            self._addresses = await self._discover()

    async def exchange(self, request: Mapping[str, str]) -> Answer | Failure:
        """Return what the token endpoint answers, or what is wrong with it."""
        return await self._post((await self._found()).token, {**self._parameters, **request})

    async def authorize_device(self) -> Answer | Failure:
        """Return what the device authorization endpoint answers (RFC 8628 section 3.1), or what is wrong with it."""
        url = (await self._found()).device_authorization
        if url is None:
            message = (
                f"{self._source}: the metadata of issuer {self._issuer!r} names no device_authorization_endpoint; "
                "it does not offer the device grant"
            )
            return Failure(ProviderError(message, retryable=False))
        return await self._post(url, dict(self._parameters))

    async def _found(self) -> _Addresses:
        await self.find()
        assert self._addresses is not None  # noqa: S101
        return self._addresses

    async def _post(self, url: str, form: dict[str, str]) -> Answer | Failure:
        headers = await self._authenticate(form)
        secrets = _secrets_in(form, headers)
        requested_at = utc_now(self._clock)
        response = await self._http.request("POST", url, headers=headers, form=form)
        if isinstance(response, Unanswered):
            return Failure(response.error, lost=response.was_sent)
        members = response.members
        if response.is_success and members is not None and "error" not in members:
            return Answer(requested_at, members)
        return self._refusal(response, refreshing="refresh_token" in form, secrets=secrets)

    async def _authenticate(self, form: dict[str, str]) -> dict[str, str]:
        """Add to `form` what the client proves itself with, or return it as a header."""
        client = self._client
        if client.id is None:
            return {}
        if client.assertion is not None:
            form |= {
                "client_id": client.id,
                "client_assertion_type": _JWT_BEARER,
                "client_assertion": await client.assertion(),
            }
        elif client.secret is None:
            form["client_id"] = client.id
        elif (await self._found()).client_auth == "post":
            form |= {"client_id": client.id, "client_secret": client.secret}
        else:
            return {"Authorization": _basic(client.id, client.secret)}
        return {}

    async def _discover(self) -> _Addresses:
        url, other_url = _metadata_urls(self._issuer)
        response = await self._get(url)
        if response.status_code == 404:
            response = await self._get(other_url)
        if not response.is_success:
            status = response.status_code
            raise ProviderError(
                f"{self._source}: no metadata of issuer {self._issuer!r} (HTTP {status}); "
                "check the identifier, or pass token_url",
                retryable=is_transient(status),
                retry_after=retry_after(response, utc_now(self._clock)),
            )
        return self._read_metadata(response.members)

    async def _get(self, url: str) -> Response:
        response = await self._http.request("GET", url)
        if isinstance(response, Unanswered):
            raise response.error
        return response

    def _read_metadata(self, metadata: Mapping[str, object] | None) -> _Addresses:
        if metadata is None:
            raise ProviderError(
                f"{self._source}: the metadata of issuer {self._issuer!r} is no JSON object; check the identifier"
            )
        if metadata.get("issuer") != self._issuer:
            # Or else one issuer could pose as another (RFC 8414 section 3.3).
            stated = redact(str(metadata.get("issuer")), (), longest=_LONGEST_DESCRIPTION)
            raise ProviderError(
                f"{self._source}: the metadata of issuer {self._issuer!r} says that it is {stated!r}; "
                f"they must be the same to the letter: correct 'issuer' if that is the right one",
                retryable=False,
            )
        # Basic is what holds when nothing is said (RFC 8414 section 2).
        methods = metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        offers_basic = not isinstance(methods, list) or "client_secret_basic" in methods
        offers_post = isinstance(methods, list) and "client_secret_post" in methods
        device = metadata.get("device_authorization_endpoint")  # RFC 8628 section 4
        return _Addresses(
            self._address("token_endpoint", metadata.get("token_endpoint")),
            None if device is None else self._address("device_authorization_endpoint", device),
            self._client.auth or ("post" if offers_post and not offers_basic else "basic"),
        )

    def _address(self, name: str, url: object) -> str:
        complaint = complaint_about(url) if isinstance(url, str) else "is missing"
        if complaint is not None or not isinstance(url, str):
            raise ProviderError(
                f"{self._source}: {name} in the metadata of issuer {self._issuer!r} {complaint}", retryable=False
            )
        return url

    def _refusal(self, response: Response, *, refreshing: bool, secrets: Iterable[str]) -> Failure:
        where, status = response.url, response.status_code
        code, description = _complaint(response.members or {})
        wait = retry_after(response, utc_now(self._clock))
        if self._is_discovered and not code and not is_transient(status):
            # Whatever speaks there, it is no token endpoint any more: the next request looks for it anew.
            self._addresses = None
        if response.is_redirect:
            message = (
                f"{self._source}: {where} redirects (HTTP {status}), where secrets do not follow; correct the address"
            )
            return Failure(ProviderError(message, retryable=False))
        if not isinstance(code, str) or not code:
            if response.is_success:
                # It may well have done the exchange before it spoke garbage.
                message = (
                    f"{self._source}: {where} answered with something that is no token response; "
                    "is it a token endpoint?"
                )
                return Failure(ProviderError(message), lost=True)
            message = f"{self._source}: {where} failed (HTTP {status})"
            error = ProviderError(message, retryable=is_transient(status), retry_after=wait)
            return Failure(error, lost=status in _GATEWAY_STATUS)
        told = self._redact(code, secrets)
        if isinstance(description, str) and description:
            told += f": {self._redact(description, secrets)}"
        if code in _TRANSIENT or is_transient(status):
            message = f"{self._source}: {where} is in trouble (HTTP {status}, {told}); it is asked again later"
            return Failure(ProviderError(message, retry_after=wait), code=code)
        advice = _ADVICE.get(code.lower(), "see the issuer's manual")
        if refreshing and code == "invalid_grant":
            advice = "the refresh token is expired, revoked or used up; a new login is needed: pass its refresh_token"
        message = f"{self._source}: {where} refused (HTTP {status}, {told}); {advice}"
        error = ProviderError(message, retryable=False, retry_after=wait)
        return Failure(error, refused=code.lower() not in _OF_THE_CLIENT, code=code)

    def _redact(self, text: str, secrets: Iterable[str]) -> str:
        """Return what the issuer says without any secret it may quote, on one line."""
        return redact(text, (*self._secrets, *secrets), longest=_LONGEST_DESCRIPTION)


def _secrets_in(form: Mapping[str, str], headers: Mapping[str, str]) -> list[str]:
    """Return what of a request nobody but the issuer is to read."""
    secrets = [header.removeprefix("Basic ") for header in headers.values()]
    for name, value in form.items():
        if name in _SECRET_PARAMETERS or (name not in _PUBLIC_PARAMETERS and len(value) >= _SHORTEST_SECRET):
            secrets.append(value)
    return secrets


def _complaint(members: Mapping[str, object]) -> tuple[object, object]:
    """Return the error and its description: those of RFC 6749 section 5.2, or else those of a list of errors."""
    errors = members.get("errors")
    if "error" not in members and isinstance(errors, list) and errors and isinstance(errors[0], Mapping):
        first = cast("Mapping[str, object]", errors[0])  # as in JSON:API, and at Globus
        return first.get("code"), first.get("detail")
    return members.get("error"), members.get("error_description")


def refresh_token_in(answer: Answer) -> StoredTokens | None:
    """Return the refresh token that came with `answer`, and when it ends, if that can be told."""
    members = answer.members
    token = members.get("refresh_token")
    if not isinstance(token, str) or not token:
        return None
    # Keycloak's and Entra's names for it; zero is Keycloak's word for never.
    life = lifetime(members.get("refresh_expires_in")) or lifetime(members.get("refresh_token_expires_in"))
    return StoredTokens(refresh_token=token, expires_at=earliest(answer.requested_at, life, token))


def lifetime(value: object) -> timedelta | None:
    """Return a lifetime that an issuer states; some send digits in a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        life = timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        return None
    return life if life >= timedelta() else None


def earliest(requested_at: datetime, life: timedelta | None, token: str) -> datetime | None:
    """Return when a token ends: what the answer says or what the token says, whichever comes first."""
    stated = None if life is None or life >= _END_OF_TIME - requested_at else requested_at + life
    return earliest_end(token, requested_at, stated)


def claim(token: str, name: str) -> str | None:
    """Return a claim of a JSON Web Token; its signature is the database's business."""
    _, _, rest = token.partition(".")
    payload, _, _ = rest.partition(".")
    try:
        claims = parse_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        return None
    value = None if claims is None else claims.get(name)
    return value if isinstance(value, str) and value else None


def _metadata_urls(issuer: str) -> tuple[str, str]:
    """Return where OpenID Connect Discovery 1.0 (section 4) and RFC 8414 (section 3.1) keep an issuer's metadata."""
    url = httpx.URL(issuer)
    path = url.path.rstrip("/")
    return (
        str(url.copy_with(path=f"{path}/.well-known/openid-configuration")),
        str(url.copy_with(path=f"/.well-known/oauth-authorization-server{path}")),
    )


def _basic(client_id: str, client_secret: str) -> str:
    """Return the Authorization header; both parts are form-encoded first (RFC 6749 section 2.3.1)."""
    pair = f"{quote_plus(client_id)}:{quote_plus(client_secret)}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
