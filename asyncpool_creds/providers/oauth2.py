"""Tokens of an OAuth 2.0 or OpenID Connect issuer as database passwords."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, NoReturn, TypeAlias

try:
    import httpx
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the OAuth 2.0 provider needs httpx: pip install 'asyncpool-creds[oauth2]'") from _missing

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock
from asyncpool_creds._credential import Credential, password_flaw
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._events import Observer
from asyncpool_creds._tracebacks import class_and_place, clears_frames
from asyncpool_creds.providers._arguments import check_text
from asyncpool_creds.providers._exchange import Exchange
from asyncpool_creds.providers._http import HttpClient, complaint_about
from asyncpool_creds.providers._token_endpoint import (
    Answer,
    Client,
    Failure,
    TokenEndpoint,
    claim,
    earliest,
    lifetime,
)
from asyncpool_creds.storage import MemoryStorage, TokenStorage

__all__ = ["DevicePrompt", "Grant", "OAuth2", "TokenSource"]

Grant: TypeAlias = Literal[
    "client_credentials", "password", "refresh_token", "device_code", "jwt_bearer", "token_exchange"
]
TokenSource: TypeAlias = str | Callable[[], "str | Awaitable[str]"]

_GRANT_TYPES: Final[Mapping[Grant, str]] = {
    "client_credentials": "client_credentials",
    "password": "password",
    "refresh_token": "refresh_token",
    "device_code": "urn:ietf:params:oauth:grant-type:device_code",  # RFC 8628 section 3.4
    "jwt_bearer": "urn:ietf:params:oauth:grant-type:jwt-bearer",  # RFC 7523 section 2.1
    "token_exchange": "urn:ietf:params:oauth:grant-type:token-exchange",  # RFC 8693 section 2.1
}
# What each grant needs; of those that stand for a login by themselves, one at most.
_NEEDS: Final[Mapping[Grant, str]] = {
    "password": "username and password",
    "jwt_bearer": "assertion",
    "token_exchange": "subject_token",
    "device_code": "prompt",
    "refresh_token": "refresh_token",
    "client_credentials": "client_id, and client_secret or client_assertion",
}
_LOGINS: Final[tuple[Grant, ...]] = ("password", "jwt_bearer", "token_exchange", "device_code")
# Those whose user is in a token that is made when it is needed.
_OF_ANYBODY: Final[tuple[Grant, ...]] = ("jwt_bearer", "token_exchange")
_ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - RFC 8693 section 3
# Seconds between polls where the issuer does not say (RFC 8628 section 3.2), and more of them when it says slow_down
# (section 3.5).
_POLL_INTERVAL: Final = 5.0
_OUR_PARAMETERS: Final = frozenset(
    {
        *("grant_type", "client_id", "client_secret", "client_assertion", "client_assertion_type"),
        *("username", "password", "refresh_token", "scope", "audience"),
        *("assertion", "subject_token", "subject_token_type", "device_code"),
    }
)


@dataclass(frozen=True, slots=True)
class DevicePrompt:
    """What a person has to be shown to log in on another device (RFC 8628 section 3.3).

    Args:
        verification_uri: Where to go.
        user_code: What to type in there; not part of ``repr``.
        verification_uri_complete: Where to go without having to type; None: the issuer has no such address.
        expires_at: Until when, as an aware UTC datetime.
    """

    verification_uri: str
    user_code: str = field(repr=False)
    verification_uri_complete: str | None = field(repr=False)
    expires_at: datetime


class OAuth2:
    """A provider of tokens from an OAuth 2.0 or OpenID Connect token endpoint (RFC 6749).

    The grant follows from the arguments: `username` and `password` make the password
    grant, `assertion` the JWT bearer grant (RFC 7523), `subject_token` the token exchange
    (RFC 8693), `prompt` the device grant (RFC 8628), `refresh_token` alone the refresh token
    grant, a client that can prove itself alone the client credentials grant. Whatever the grant,
    a refresh token that the issuer hands out is used for the next fetch, under the lock of
    `storage`, and its successor is stored before anyone uses what came with it. When the issuer
    refuses it, or its answer is lost, the original grant is used again; a refresh token is never
    sent a second time unless it is certain that the issuer did not see it, or did answer.

    Those who share a storage share what is in it: a credential that another one has fetched is
    used, if it is news and fresh, and no request is made.

    Cancelling `fetch` does not cut an exchange short: it is finished and stored in the
    background, and the next `fetch` joins it. `aclose` waits for it; the provider can be used
    again afterwards.

    Args:
        issuer: The issuer's identifier, exactly as its metadata says it; the token
            endpoint is discovered there (OpenID Connect Discovery 1.0, RFC 8414).
        token_url: The token endpoint, instead.
        client_id: The client.
        client_secret: Its secret; None: a public client, one with a `client_assertion`, or none at all.
        client_auth: How the secret is sent: ``"basic"`` (client_secret_basic) or ``"post"``
            (client_secret_post). None: as the metadata says, basic where it says nothing.
        client_assertion: A token that the client proves itself with instead of a secret
            (private_key_jwt, RFC 7523 section 2.2; the token of a workload identity), or a
            function that returns one and is called for every request.
        grant: States the grant where the arguments allow more than one, or merely to be clear.
        username: Of the user who logs in.
        password: Theirs.
        refresh_token: One to start with, of an earlier login.
        assertion: A JWT that is exchanged for a token (RFC 7523 section 2.1), or a function that
            returns one and is called for every login.
        subject_token: The token that is exchanged for another (RFC 8693), or a function that
            returns it and is called for every login.
        subject_token_type: What kind it is, as a URN of RFC 8693 section 3; an access token if not given.
        prompt: Called with a `DevicePrompt` when somebody has to log in on another device; sync or
            async, and done when it is shown. It needs an `issuer`. Where the manager's
            ``fetch_timeout`` is shorter than the person takes, the login goes on, and the
            next fetch joins it.
        scope: Scopes, separated by spaces. An ID token needs ``openid``, a refresh token often
            ``offline_access``.
        audience: Whom the token is for, where the issuer wants to be told (Auth0).
        extra: More parameters of the token request.
        use: Which token is the database password.
        user: The database user to log in as; None: the connection's own.
        user_claim: The claim of the token that names the database user, such as ``"sub"``.
        storage: Where tokens are kept; memory if not given.
        storage_key: Under which name; derived from the other arguments if not given. A storage
            needs it with `assertion` and `subject_token`, which alone tell whose login it is. What
            follows from another `refresh_token` is another login, whatever the name.
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
        client_assertion: TokenSource | None = None,
        grant: Grant | None = None,
        username: str | None = None,
        password: str | None = None,
        refresh_token: str | None = None,
        assertion: TokenSource | None = None,
        subject_token: TokenSource | None = None,
        subject_token_type: str | None = None,
        prompt: Callable[[DevicePrompt], Awaitable[None] | None] | None = None,
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
            "subject_token_type": subject_token_type,
            "scope": scope,
            "audience": audience,
            "user": user,
            "user_claim": user_claim,
            "storage_key": storage_key,
        }
        for name, value in strings.items():
            check_text("OAuth2", name, value)
        tokens = {"client_assertion": client_assertion, "assertion": assertion, "subject_token": subject_token}
        for name, token in tokens.items():
            if not callable(token):
                check_text("OAuth2", name, token)
        _check_addresses(issuer, token_url)
        _check_client(client_id, client_secret, client_auth, client_assertion)
        _check_use(use, user, user_claim)
        if storage is not None and not isinstance(storage, TokenStorage):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"OAuth2: storage must be a TokenStorage, as MemoryStorage() is, not {type(storage).__name__}"
            )
        if prompt is not None and not callable(prompt):
            raise TypeError(f"OAuth2: prompt must be a function that takes a DevicePrompt, not {type(prompt).__name__}")
        if prompt is not None and issuer is None:
            raise ValueError("OAuth2: prompt needs issuer, whose metadata says where codes for devices are to be had")
        if subject_token_type is not None and subject_token is None:
            raise ValueError("OAuth2: subject_token_type without subject_token")
        if (username is None) != (password is None):
            raise ValueError("OAuth2: username and password belong together; one of them is missing")
        self._grant: Final = _grant(
            grant,
            {
                "password": username is not None,
                "jwt_bearer": assertion is not None,
                "token_exchange": subject_token is not None,
                "device_code": prompt is not None,
                "refresh_token": refresh_token is not None,
                # A client can also prove itself by a certificate, which httpx sends.
                "client_credentials": client_secret is not None
                or client_assertion is not None
                or (client_id is not None and grant == "client_credentials"),
            },
        )
        if self._grant in _OF_ANYBODY and storage is not None and storage_key is None:
            raise ValueError(
                f"OAuth2: storage needs a storage_key with {_NEEDS[self._grant]}: no other argument tells whose login "
                "it is, and another's must not be taken for it"
            )
        self._where: Final = issuer or token_url or ""
        self._client_id: Final = client_id
        self._use: Final = use
        self._http: Final = HttpClient("oauth2", timeout=timeout, make_client=http_client)
        clock = SYSTEM_CLOCK if clock is None else clock
        parameters = _parameters(scope, audience, extra)
        client = Client(
            client_id,
            client_secret,
            client_auth,
            None if client_assertion is None else lambda: _token("client_assertion", client_assertion),
        )
        endpoint = TokenEndpoint(
            "oauth2",
            issuer=issuer,
            token_url=token_url,
            client=client,
            parameters=parameters,
            secrets=(password, refresh_token),
            http=self._http,
            clock=clock,
        )
        login = _Login(
            endpoint=endpoint,
            grant=self._grant,
            username=username,
            password=password,
            assertion=assertion,
            subject_token=subject_token,
            subject_token_type=subject_token_type or _ACCESS_TOKEN,
            prompt=prompt,
            use=use,
            user=user,
            user_claim=user_claim,
            clock=clock,
        )
        identity = (self._where, self._grant, client_id, username, sorted(parameters.items()), use, user, user_claim)
        self._exchange: Final = Exchange(
            "oauth2",
            login,
            can_log_in=self._grant != "refresh_token",
            needs_a_person=self._grant == "device_code",
            first=refresh_token,
            storage=MemoryStorage() if storage is None else storage,
            key=_key(storage_key or f"oauth2:{username or client_id}@{self._where}#{_digest(identity)}", refresh_token),
            clock=clock,
        )

    def __repr__(self) -> str:
        return f"<OAuth2 {self._grant} at {self._where} client_id={self._client_id!r} use={self._use}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an OAuth2 provider holds secrets and cannot be pickled; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return a token with the expiry that the answer and the token itself state.

        It is fetched now, or it is one that another who shares the storage has just fetched.

        Raises:
            ProviderError: The issuer gave none; ``retryable`` is False if it refused for good.
            ProviderTimeout: It did not answer in time.
        """
        return await self._exchange.fetch()

    def invalidate(self, credential: Credential) -> None:
        """Do not take `credential` from the storage again: a server has refused it."""
        self._exchange.invalidate(credential)

    def report_to(self, observer: Observer) -> None:
        """Send events to `observer`."""
        self._exchange.report_to(observer)

    @clears_frames
    async def aclose(self) -> None:
        """Finish the exchange of a refresh token, if one is going on, and close the HTTP client."""
        await self._exchange.aclose()
        await self._http.aclose()


@dataclass(frozen=True, slots=True, repr=False)
class _Login:
    """The original grant, as the exchange uses it."""

    endpoint: TokenEndpoint
    grant: Grant
    username: str | None
    password: str | None
    assertion: TokenSource | None
    subject_token: TokenSource | None
    subject_token_type: str
    prompt: Callable[[DevicePrompt], Awaitable[None] | None] | None
    use: Literal["access_token", "id_token"]
    user: str | None
    user_claim: str | None
    clock: Clock

    async def prepare(self) -> None:
        """Discover the token endpoint."""
        await self.endpoint.find()

    async def refresh(self, refresh_token: str) -> Answer | Failure:
        """Spend `refresh_token` (RFC 6749 section 6)."""
        return await self.endpoint.exchange({"grant_type": "refresh_token", "refresh_token": refresh_token})

    async def log_in(self) -> Answer | Failure:
        """Use the original grant."""
        if self.grant == "device_code":
            return await self._log_in_on_a_device()
        request = {"grant_type": _GRANT_TYPES[self.grant]}
        if self.grant == "password":
            request |= {"username": self.username or "", "password": self.password or ""}
        elif self.grant == "jwt_bearer":
            request["assertion"] = await _token("assertion", self.assertion)
        elif self.grant == "token_exchange":
            request["subject_token"] = await _token("subject_token", self.subject_token)
            request["subject_token_type"] = self.subject_token_type
        return await self.endpoint.exchange(request)

    def credential_in(self, answer: Answer) -> Credential | Failure:
        """Return the token that is the password."""
        token = answer.members.get(self.use)
        if not isinstance(token, str) or not token:
            hint = "; ask for scope 'openid'" if self.use == "id_token" else ""
            message = f"oauth2: the issuer's answer has no {self.use}{hint}"
            return Failure(ProviderError(message, retryable=False), refused=True)
        if flaw := password_flaw(token):
            return Failure(ProviderError(f"oauth2: the {self.use} {flaw}", retryable=False))
        user = self.user
        if self.user_claim is not None:
            user = claim(token, self.user_claim)
            if user is None:
                message = f"oauth2: the {self.use} has no claim {self.user_claim!r} to name a user; check user_claim"
                return Failure(ProviderError(message, retryable=False))
        # expires_in is about the access token alone.
        life = lifetime(answer.members.get("expires_in")) if self.use == "access_token" else None
        return Credential(token, user=user, expires_at=earliest(answer.requested_at, life, token))

    async def _log_in_on_a_device(self) -> Answer | Failure:
        """Show somebody a code, and ask until they have logged in with it (RFC 8628)."""
        authorization = await self.endpoint.authorize_device()
        if isinstance(authorization, Failure):
            return authorization
        members = authorization.members
        device_code, prompt = members.get("device_code"), _read_prompt(authorization)
        if prompt is None or not isinstance(device_code, str) or self.prompt is None:
            message = "oauth2: the issuer's answer is no device authorization (RFC 8628 section 3.2)"
            return Failure(ProviderError(message, retryable=False))
        shown = self.prompt(prompt)
        if inspect.isawaitable(shown):
            await shown
        interval = lifetime(members.get("interval"))
        pause = interval.total_seconds() if interval else _POLL_INTERVAL
        while self.clock.time() < prompt.expires_at.timestamp():
            await asyncio.sleep(pause)
            outcome = await self.endpoint.exchange(
                {"grant_type": _GRANT_TYPES["device_code"], "device_code": device_code}
            )
            if not isinstance(outcome, Failure):
                return outcome
            if outcome.code == "slow_down":
                pause += _POLL_INTERVAL
            elif outcome.error.retryable:
                # Section 3.5 demands it of a timeout.
                pause = max(2 * pause, outcome.error.retry_after or 0.0)
            elif outcome.code == "expired_token":
                break
            elif outcome.code != "authorization_pending":
                return outcome
        message = "oauth2: nobody logged in before the code expired; the next fetch asks for another one"
        return Failure(ProviderError(message))


async def _token(name: str, source: TokenSource | None) -> str:
    try:
        token: object = source() if callable(source) else source
        if inspect.isawaitable(token):
            token = await token
    except ProviderError:
        raise
    except Exception as error:
        raise ProviderError(f"oauth2: {name} raised {class_and_place(error)}; see the cause") from error
    if not isinstance(token, str) or not token:
        raise ProviderError(f"oauth2: {name} gave no token but {type(token).__name__}", retryable=False)
    return token


def _read_prompt(answer: Answer) -> DevicePrompt | None:
    members = answer.members
    where, code = members.get("verification_uri"), members.get("user_code")
    complete = members.get("verification_uri_complete")
    expires_at = earliest(answer.requested_at, lifetime(members.get("expires_in")), "")
    if not isinstance(where, str) or not isinstance(code, str) or expires_at is None:
        return None
    return DevicePrompt(where, code, complete if isinstance(complete, str) else None, expires_at)


def _key(name: str, first: str | None) -> str:
    # A new first refresh token is a new login, and must not be shadowed by what is stored of the last one.
    return name if first is None else f"{name}#{_digest(first)}"


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _check_addresses(issuer: str | None, token_url: str | None) -> None:
    if (issuer is None) == (token_url is None):
        raise ValueError("OAuth2: pass either issuer, whose metadata names the token endpoint, or token_url")
    for name, address in (("issuer", issuer), ("token_url", token_url)):
        if address is not None and (complaint := complaint_about(address)):
            raise ValueError(f"OAuth2: {name} {complaint}")


def _check_client(
    client_id: str | None, client_secret: str | None, client_auth: str | None, client_assertion: object
) -> None:
    if client_auth not in (None, "basic", "post"):
        raise ValueError(f"OAuth2: client_auth must be 'basic', 'post' or None, not {client_auth!r}")
    for name, proof in (("client_secret", client_secret), ("client_assertion", client_assertion)):
        if proof is not None and client_id is None:
            raise ValueError(f"OAuth2: {name} without client_id")
    if client_secret is not None and client_assertion is not None:
        raise ValueError("OAuth2: pass either client_secret or client_assertion")
    if client_auth is not None and client_secret is None:
        raise ValueError("OAuth2: client_auth without client_secret; there is nothing else that it could send")


def _check_use(use: str, user: str | None, user_claim: str | None) -> None:
    if use not in ("access_token", "id_token"):
        raise ValueError(f"OAuth2: use must be 'access_token' or 'id_token', not {use!r}")
    if user is not None and user_claim is not None:
        raise ValueError("OAuth2: pass either user or user_claim")


def _grant(asked: Grant | None, possible: Mapping[Grant, bool]) -> Grant:
    """Return the grant that the arguments make; `possible` has them in the order of precedence."""
    if asked is not None and asked not in possible:
        raise ValueError(f"OAuth2: grant must be one of {', '.join(map(repr, possible))}, not {asked!r}")
    logins: list[Grant] = [grant for grant in _LOGINS if possible[grant]]
    if len(logins) > 1:
        raise ValueError(f"OAuth2: pass what one grant needs; these arguments are for {' and '.join(logins)}")
    if asked is None:
        asked = next((grant for grant, is_possible in possible.items() if is_possible), None)
    if asked is None:
        raise ValueError(
            "OAuth2: nothing to log in with; pass username and password, assertion, subject_token, prompt, "
            "refresh_token, or client_id and client_secret or client_assertion"
        )
    if logins and asked not in logins:
        raise ValueError(f"OAuth2: grant {asked!r} has no use for {_NEEDS[logins[0]]}; leave that out")
    if not possible[asked]:
        raise ValueError(f"OAuth2: grant {asked!r} needs {_NEEDS[asked]}")
    return asked


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
