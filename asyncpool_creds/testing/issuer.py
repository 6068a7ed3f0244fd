"""A token issuer: a real OAuth 2.0 and OpenID Connect token service on loopback, with troubles to switch on."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import hmac
import math
import os
import secrets
import socket
import ssl
import struct
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import TYPE_CHECKING, Final, Literal, Self, TypeAlias
from urllib.parse import unquote_plus

try:
    import jwt
    from aiohttp import web
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from jwt.algorithms import ECAlgorithm, RSAAlgorithm
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the token issuer needs aiohttp and PyJWT: pip install 'asyncpool-creds[testing]'") from _missing

from asyncpool_creds.testing._assertions import Assertion, Signers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping
    from types import TracebackType

    from asyncpool_creds import Clock
__all__ = ["Algorithm", "AuthMethod", "TokenIssuer", "UserStore"]

Algorithm: TypeAlias = Literal["ES256", "RS256"]
AuthMethod: TypeAlias = Literal["client_secret_basic", "client_secret_post", "private_key_jwt", "none"]

_AUTH_METHODS: Final[tuple[AuthMethod, ...]] = ("client_secret_basic", "client_secret_post", "private_key_jwt", "none")
_GRANTS: Final = (
    *("password", "client_credentials", "refresh_token"),
    "urn:ietf:params:oauth:grant-type:device_code",  # RFC 8628 section 3.4
    "urn:ietf:params:oauth:grant-type:jwt-bearer",  # RFC 7523 section 2.1
    "urn:ietf:params:oauth:grant-type:token-exchange",  # RFC 8693 section 2.1
)
_CLIENT_ASSERTION: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"  # RFC 7523 section 2.2
_TOKEN_TYPE: Final = "urn:ietf:params:oauth:token-type:"  # noqa: S105 - RFC 8693 section 3
_SUBJECT_TOKEN_TYPES: Final = frozenset(_TOKEN_TYPE + kind for kind in ("access_token", "id_token", "jwt"))
# The typ header tells the three kinds of token apart (RFC 9068 section 2.1 for the first).
_ACCESS, _ID, _REFRESH = "at+jwt", "JWT", "rt+jwt"
# Statuses other than 400 of the error codes in RFC 6749 sections 4.1.2.1 and 5.2.
_STATUS: Final = {"invalid_client": 401, "server_error": 500, "temporarily_unavailable": 503}
# Letters that do not look alike and make no words (RFC 8628 section 6.1).
_CODE_LETTERS: Final = "BCDFGHJKLMNPQRSTVWXZ"
# Seconds between the polls of a device that are added by slow_down (RFC 8628 section 3.5).
_SLOWER: Final = 5.0
_NO_STORE: Final = {"Cache-Control": "no-store", "Pragma": "no-cache"}  # RFC 6749 section 5.1
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close() sends RST


class UserStore:
    """The people who may log in.

    Disabling one takes effect at their next login or refresh; tokens they hold live on,
    as JSON Web Tokens do.

    Args:
        users: Passwords by user name.
    """

    def __init__(self, users: Mapping[str, str] | None = None) -> None:
        self._passwords: dict[str, str] = {}
        self._disabled: set[str] = set()
        for user, password in (users or {}).items():
            self.add(user, password)

    def add(self, user: str, password: str) -> None:
        """Let `user` log in with `password`; for one who is known already, that is a new password."""
        if not user or not password:
            raise ValueError("UserStore.add: user and password must not be empty")
        self._passwords[user] = password

    def disable(self, user: str) -> None:
        """Refuse logins and refreshes of `user` from now on."""
        self._disabled.add(self._known(user))

    def enable(self, user: str) -> None:
        """Take `disable` back."""
        self._disabled.discard(self._known(user))

    def is_disabled(self, user: str) -> bool:
        """Return whether `user` was disabled; one who is not known was not."""
        return user in self._disabled

    def check(self, user: str, password: str) -> bool:
        """Return whether this password is the user's and the user may log in."""
        expected = self._passwords.get(user, "")
        return hmac.compare_digest(expected.encode(), password.encode()) and self.may_log_in(user)

    def may_log_in(self, user: str) -> bool:
        """Return whether `user` is known and not disabled."""
        return user in self._passwords and user not in self._disabled

    def _known(self, user: str) -> str:
        if user not in self._passwords:
            raise LookupError(f"UserStore: there is no user {user!r}; add() comes first")
        return user

    def __repr__(self) -> str:
        return f"<UserStore {len(self._passwords)} users, {len(self._disabled)} disabled>"


class TokenIssuer:
    """An OAuth 2.0 token service over real HTTP, for tests and demonstrations.

    ``POST /token`` knows the grants ``password`` (an access and a refresh token, and an
    ID token if the scope has ``openid``), ``client_credentials`` (an access token),
    ``refresh_token``, the device grant (RFC 8628: like ``password``, once `approve` was
    called), the JWT bearer grant (RFC 7523) and token exchange (RFC 8693; both give an
    access token). Refresh tokens are good once: exchanging one gives a new pair,
    and using a spent one revokes its whole family (RFC 9700 section 4.14.2). The keys
    are at ``/jwks.json``, the metadata at ``/.well-known/openid-configuration`` and
    ``/.well-known/oauth-authorization-server``; devices get their codes at
    ``POST /device_authorization``.

    Use it as an async context manager, or call `start` and `aclose`; it runs on the
    caller's event loop, on a free port of 127.0.0.1. Settings and troubles are
    attributes and methods that take effect with the next request.

    Args:
        users: Who may log in; a mapping of passwords by user, or a store to share.
        clients: Secrets by client id; an empty secret makes a public client. Without
            clients, whoever asks is served.
        client_keys: Public keys, as PEM, of further clients, by client id: they prove
            themselves by signing (``private_key_jwt``, RFC 7523 section 2.2).
        trusted_issuers: Public keys, as PEM, of those whose tokens are taken as assertions
            and subject tokens, by the ``iss`` of these. A token exchange takes tokens of
            this issuer as well.
        auth_methods: How clients may authenticate, also stated in the metadata.
        audience: The ``aud`` of access tokens, unless the request names another.
        algorithm: Of the signatures.
        access_lifetime: Seconds an access or ID token lives.
        refresh_lifetime: Seconds a refresh token lives.
        device_lifetime: Seconds a code for a device lives.
        device_interval: Seconds a device has to wait between two polls.
        clock: Where the time comes from; the machine's clock if not given.
        ssl_context: Serve HTTPS with it.

    Attributes:
        access_lifetime: See above; may be changed while running.
        refresh_lifetime: Likewise.
        device_lifetime: Likewise.
        device_interval: Likewise.
        one_time_assertions: If False, an assertion that has a ``jti`` may be used again.
        rotate_refresh_tokens: If False, refresh tokens may be used again and refreshing
            returns none.
        clock_skew: Seconds by which the issuer's clock is ahead of the one `verify` uses.
        delay: Seconds before each answer of the token endpoint.
        opaque_access_tokens: If True, access tokens are random strings, not JSON Web Tokens.
        garbage: If True, the token endpoint answers 200 with a body that is no JSON.
        answer: Members put into every good answer of the token endpoint; one whose value
            is None is taken out: ``issuer.answer["expires_in"] = None``.
        requests: Token requests received, by grant type.
        documents: Requests for anything else, by path: metadata, keys, codes for devices.
        replays: Spent refresh tokens that were used again.
        revoked_families: Families of refresh tokens revoked because of that.
    """

    def __init__(
        self,
        users: Mapping[str, str] | UserStore | None = None,
        *,
        clients: Mapping[str, str] | None = None,
        client_keys: Mapping[str, str] | None = None,
        trusted_issuers: Mapping[str, str] | None = None,
        auth_methods: Collection[AuthMethod] = _AUTH_METHODS,
        audience: str = "postgresql",
        algorithm: Algorithm = "ES256",
        access_lifetime: float = 300.0,
        refresh_lifetime: float = 86_400.0,
        device_lifetime: float = 600.0,
        device_interval: float = 5.0,
        clock: Clock | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if algorithm not in ("ES256", "RS256"):
            raise ValueError(f"TokenIssuer: algorithm must be 'ES256' or 'RS256', not {algorithm!r}")
        if isinstance(auth_methods, str) or set(auth_methods) - set(_AUTH_METHODS) or not auth_methods:
            raise ValueError(f"TokenIssuer: auth_methods takes some of {', '.join(map(repr, _AUTH_METHODS))}")
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"TokenIssuer: ssl_context must be an ssl.SSLContext, not {type(ssl_context).__name__}")
        _check_durations(
            access_lifetime=access_lifetime,
            refresh_lifetime=refresh_lifetime,
            device_lifetime=device_lifetime,
            device_interval=device_interval,
        )
        self.users: Final = users if isinstance(users, UserStore) else UserStore(users)
        self.access_lifetime = access_lifetime
        self.refresh_lifetime = refresh_lifetime
        self.device_lifetime = device_lifetime
        self.device_interval = device_interval
        self.one_time_assertions = True
        self.rotate_refresh_tokens = True
        self.clock_skew: float = 0.0
        self.delay: float = 0.0
        self.opaque_access_tokens: bool = False
        self.garbage: bool = False
        self.answer: dict[str, object] = {}
        self.requests: Counter[str] = Counter()
        self.documents: Counter[str] = Counter()
        self.replays: int = 0
        self.revoked_families: int = 0
        self._clients: Final = dict(clients or {})
        self._client_keys: Final = Signers("client_keys", client_keys)
        self._trusted: Final = Signers("trusted_issuers", trusted_issuers)
        self._auth_methods: Final = tuple(auth_methods)
        self._audience: Final = audience
        self._audiences: Final = {audience, *self._clients, *self._client_keys.names}
        self._algorithm: Final[Algorithm] = algorithm
        self._clock: Final = clock
        self._ssl_context: Final = ssl_context
        self._keys: Final = {(first := _key(algorithm, 0)).id: first}
        self._signing_key = first
        self._key_number = 0
        self._opaque: dict[str, str] = {}
        self._revoked: set[str] = set()
        self._families: dict[str, _Family] = {}
        self._devices: dict[str, _Device] = {}
        self._failures: deque[_Failure] = deque()
        self._responses_to_lose = 0
        self._resetting = False
        self._hang_at: Literal["before", "after"] | None = None
        self._resumed = asyncio.Event()
        self._arrival = asyncio.Event()
        self._held = 0
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "stopped" if self._runner is None else "down" if self._site is None or self._resetting else "up"
        return f"<TokenIssuer {state} port={self._port} fetches={self.fetches}>"

    async def start(self) -> None:
        """Listen; returns when requests are answered."""
        if self._runner is not None:
            raise RuntimeError("TokenIssuer: started already")
        app = web.Application(middlewares=[self._reset_connections])
        app.router.add_post("/token", self._token)
        app.router.add_post("/device_authorization", self._authorize_device)
        app.router.add_get("/jwks.json", self._jwks)
        app.router.add_get("/.well-known/openid-configuration", self._metadata)
        app.router.add_get("/.well-known/oauth-authorization-server", self._metadata)
        self._closing.clear()
        # aclose() wakes every handler that waits, so none needs a grace period.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await self._listen()

    async def aclose(self) -> None:
        """Stop listening and cut every connection; requests that hang are abandoned. Does nothing when stopped."""
        runner, self._runner, self._site = self._runner, None, None
        self._closing.set()
        self.resume()
        if runner is not None:
            await runner.cleanup()

    @property
    def url(self) -> str:
        """The issuer identifier: the ``iss`` of its tokens, and the base of its addresses."""
        if not self._port:
            raise RuntimeError("TokenIssuer: not started; use 'async with TokenIssuer(...)'")
        return f"{'http' if self._ssl_context is None else 'https'}://127.0.0.1:{self._port}"

    @property
    def token_url(self) -> str:
        """The address of the token endpoint."""
        return f"{self.url}/token"

    @property
    def public_key(self) -> str:
        """The key that its signatures are checked with at this moment, as PEM: for who trusts this issuer."""
        key = self._signing_key.private.public_key()
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_bytes(encoding, form).decode()

    @property
    def fetches(self) -> int:
        """Token requests received, of all grants together."""
        return self.requests.total()

    # Tokens

    def mint(self, user: str, *, lifetime: float | None = None, audience: str | None = None) -> str:
        """Return an access token for `user`, who need not be known, without a request.

        Args:
            user: The subject.
            lifetime: Seconds; `access_lifetime` if not given. A negative one makes an expired token.
            audience: The ``aud``; the issuer's own if not given.
        """
        life = self.access_lifetime if lifetime is None else lifetime
        return self._sign(_ACCESS, life, sub=user, aud=audience or self._audience)

    def verify(self, user: str, token: str) -> str | None:
        """Return None if `token` is good for the database user `user` now, else the reason why it is not.

        Access tokens and ID tokens are good. The time is the clock's own, without `clock_skew`, as a
        database server's would be.

        Returns:
            None, ``"malformed"``, ``"signature"``, ``"kind"`` (a refresh token), ``"issuer"``, ``"expired"``,
            ``"audience"``, ``"subject"`` (another user's) or ``"revoked"``.
        """
        claims = self._read(self._opaque.get(token, token), (_ACCESS, _ID))
        if isinstance(claims, str):
            return claims
        if claims.expires_at <= self._now():
            return "expired"
        if claims.audience not in self._audiences:
            return "audience"
        if claims.subject != user:
            return "subject"
        return "revoked" if claims.id in self._revoked else None

    def revoke(self, token: str) -> None:
        """Have `verify` refuse this access or ID token from now on.

        Raises:
            ValueError: It is not one of this issuer's.
        """
        claims = self._read(self._opaque.get(token, token), (_ACCESS, _ID))
        if not isinstance(claims, _Claims):
            raise ValueError(f"TokenIssuer.revoke: token is not one of this issuer's access or ID tokens ({claims})")  # noqa: TRY004
        self._revoked.add(claims.id)

    def rotate_key(self, *, keep_old: bool = True) -> None:
        """Sign with a new key from now on.

        Args:
            keep_old: If False, the old keys leave the key set at once, and what they signed is refused.
        """
        self._key_number += 1
        if not keep_old:
            self._keys.clear()
        self._signing_key = _key(self._algorithm, self._key_number)
        self._keys[self._signing_key.id] = self._signing_key

    # People at devices

    def approve(self, user_code: str, user: str) -> None:
        """Let `user` log in at the device that shows `user_code`: its next poll gets the tokens.

        Raises:
            LookupError: No device waits with this code, or the user may not log in.
        """
        device = self._waiting(user_code)
        if not self.users.may_log_in(user):
            raise LookupError(f"TokenIssuer.approve: there is no user {user!r} who may log in")
        device.user = user

    def deny(self, user_code: str) -> None:
        """Refuse the login at the device that shows `user_code`.

        Raises:
            LookupError: No device waits with this code.
        """
        self._waiting(user_code).is_denied = True

    def _waiting(self, user_code: str) -> _Device:
        for device in self._devices.values():
            if device.user_code == user_code and device.expires_at > self._issuing_time():
                return device
        raise LookupError("TokenIssuer: no device waits with this user code")

    # Troubles

    async def go_down(self, how: Literal["refuse", "reset"] = "refuse") -> None:
        """Cut every connection, and refuse new ones, or accept and reset them, until `come_up`."""
        if how not in ("refuse", "reset"):
            raise ValueError(f"TokenIssuer.go_down: how must be 'refuse' or 'reset', not {how!r}")
        runner = self._running()
        self._resetting = how == "reset"
        site = self._site
        if how == "refuse" and site is not None:
            self._site = None
            await site.stop()
        server = runner.server
        for connection in () if server is None else tuple(server.connections):
            _reset(connection.transport)

    async def come_up(self) -> None:
        """Serve again, on the same port."""
        self._running()
        self._resetting = False
        if self._site is None:
            await self._listen()

    def fail_next(
        self,
        error: str | None = None,
        *,
        status: int | None = None,
        description: str | None = None,
        retry_after: float | datetime | str | None = None,
        times: int | None = 1,
    ) -> None:
        """Answer the next token requests with an error instead of an exchange.

        Args:
            error: An error code (RFC 6749 section 5.2); without one the body is not JSON, as a proxy's would be.
            status: The HTTP status; what the code calls for if not given, 503 without a code.
            description: The ``error_description``.
            retry_after: Adds a Retry-After header: seconds, an aware datetime, or the text as it is.
            times: How many requests; None: all until `heal`.
        """
        if times is not None and times < 1:
            raise ValueError(f"TokenIssuer.fail_next: times must be 1 or more, or None, not {times!r}")
        headers: dict[str, str] = {}
        match retry_after:
            case None:
                pass
            case datetime():
                headers["Retry-After"] = format_datetime(retry_after.astimezone(UTC), usegmt=True)
            case str():
                headers["Retry-After"] = retry_after
            case _:
                headers["Retry-After"] = f"{retry_after:.0f}"
        if status is None:
            status = 503 if error is None else _STATUS.get(error, 400)
        self._failures.append(_Failure(status, error, description, headers, times))

    def lose_response(self, times: int = 1) -> None:
        """Do the next exchanges but cut the connection instead of answering: the new refresh token is lost."""
        self._responses_to_lose = times

    def hang(self, *, after_exchange: bool = False) -> None:
        """Leave token requests without an answer until `resume`.

        Args:
            after_exchange: Hang when the exchange is done, rather than before it.
        """
        self._hang_at = "after" if after_exchange else "before"
        self._resumed.clear()
        self._arrival.clear()

    def resume(self) -> None:
        """Answer the requests that hang."""
        self._hang_at = None
        self._resumed.set()

    async def reached(self, requests: int = 1) -> None:
        """Return when so many requests hang or are delayed."""
        while self._held < requests:
            self._arrival.clear()
            await self._arrival.wait()

    def heal(self) -> None:
        """Switch every trouble off but an outage, which `come_up` ends."""
        self.resume()
        self._failures.clear()
        self._responses_to_lose = 0
        self.clock_skew = self.delay = 0.0
        self.opaque_access_tokens = self.garbage = False
        self.answer.clear()

    # The HTTP side

    def _running(self) -> web.AppRunner:
        if self._runner is None:
            raise RuntimeError("TokenIssuer: not running")
        return self._runner

    async def _listen(self) -> None:
        runner = self._running()
        site = web.TCPSite(runner, "127.0.0.1", self._port, ssl_context=self._ssl_context, reuse_address=True)
        await site.start()
        self._site = site
        address: tuple[str, int] = runner.addresses[-1]
        self._port = address[1]

    @web.middleware
    async def _reset_connections(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self._resetting:
            _reset(request.transport)
            return web.Response()
        return await handler(request)

    async def _metadata(self, request: web.Request) -> web.Response:
        self.documents[request.path] += 1
        return web.json_response(
            {
                "issuer": self.url,
                "token_endpoint": self.token_url,
                "device_authorization_endpoint": f"{self.url}/device_authorization",
                "jwks_uri": f"{self.url}/jwks.json",
                "grant_types_supported": list(_GRANTS),
                "response_types_supported": ["token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": [self._algorithm],
                "token_endpoint_auth_methods_supported": list(self._auth_methods),
                "token_endpoint_auth_signing_alg_values_supported": ["ES256", "RS256"],
            }
        )

    async def _authorize_device(self, request: web.Request) -> web.Response:
        self.documents[request.path] += 1
        parameters = await _parameters(request)
        try:
            client = self._authenticate(request, parameters)
        except _Refusal as refusal:
            return refusal.response(request)
        expires_at = self._issuing_time() + self.device_lifetime
        device = _Device(
            client, parameters.get("scope", ""), parameters.get("audience"), expires_at, self.device_interval
        )
        self._devices[device.code] = device
        where = f"{self.url}/device"
        answer = {
            "device_code": device.code,
            "user_code": device.user_code,
            "verification_uri": where,
            "verification_uri_complete": f"{where}?user_code={device.user_code}",
            "expires_in": _whole(self.device_lifetime),
            "interval": _whole(self.device_interval),
        }
        return web.json_response(answer, headers=_NO_STORE)

    async def _jwks(self, request: web.Request) -> web.Response:
        self.documents[request.path] += 1
        return web.json_response({"keys": [key.public_jwk() for key in self._keys.values()]})

    async def _token(self, request: web.Request) -> web.Response:
        parameters = await _parameters(request)
        grant = parameters.get("grant_type", "")
        self.requests[grant] += 1
        await self._pause()
        await self._hold("before")
        if self._failures:
            return self._scripted_failure()
        try:
            answer = self._exchange(grant, self._authenticate(request, parameters), parameters)
        except _Refusal as refusal:
            return refusal.response(request)
        await self._hold("after")
        if self._responses_to_lose:
            self._responses_to_lose -= 1
            _reset(request.transport)
        if self.garbage:
            return web.Response(text="<html>It works!</html>", content_type="application/json")
        merged = {name: value for name, value in {**answer, **self.answer}.items() if value is not None}
        return web.json_response(merged, headers=_NO_STORE)

    async def _pause(self) -> None:
        if self.delay:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.delay):
                    await self._wait_for(self._closing)

    async def _hold(self, at: Literal["before", "after"]) -> None:
        if self._hang_at == at:
            await self._wait_for(self._resumed)

    async def _wait_for(self, event: asyncio.Event) -> None:
        self._held += 1
        self._arrival.set()
        try:
            await event.wait()
        finally:
            self._held -= 1

    def _scripted_failure(self) -> web.Response:
        failure = self._failures[0]
        if failure.times is not None:
            failure.times -= 1
            if not failure.times:
                self._failures.popleft()
        if failure.error is None:
            return web.Response(text="<html>out of order</html>", status=failure.status, headers=failure.headers)
        body = {"error": failure.error}
        if failure.description is not None:
            body["error_description"] = failure.description
        return web.json_response(body, status=failure.status, headers=failure.headers)

    # The exchange: synchronous, so that two requests with one refresh token cannot both win

    def _authenticate(self, request: web.Request, parameters: Mapping[str, str]) -> str | None:
        """Return the id of the client that asks, or None if it gave none."""
        basic = _basic_credentials(request.headers.get("Authorization"))
        posted, asserted = parameters.get("client_secret"), parameters.get("client_assertion")
        if sum(proof is not None for proof in (basic, posted, asserted)) > 1:
            raise _Refusal("invalid_request", "more than one client authentication method")
        if asserted is not None:
            return self._authenticate_by_key(asserted, parameters)
        client, secret = basic if basic is not None else (parameters.get("client_id"), posted)
        if not self._clients and not self._client_keys.names:
            return client
        method = "client_secret_basic" if basic is not None else "none" if posted is None else "client_secret_post"
        expected = self._clients.get(client or "")
        if (
            expected is None
            or method not in self._auth_methods
            or not hmac.compare_digest(expected.encode(), (secret or "").encode())
        ):
            raise _Refusal("invalid_client", "client authentication failed")
        return client

    def _authenticate_by_key(self, assertion: str, parameters: Mapping[str, str]) -> str:
        """Return the id of the client that signed `assertion` (RFC 7523 section 3)."""
        signed = None
        if "private_key_jwt" in self._auth_methods and parameters.get("client_assertion_type") == _CLIENT_ASSERTION:
            signed = self._client_keys.read(assertion, self._issuing_time())
        if signed is None or signed.subject != signed.issuer or not self._takes(signed, self._client_keys):
            raise _Refusal("invalid_client", "client authentication failed")
        if parameters.get("client_id", signed.subject) != signed.subject:
            raise _Refusal("invalid_client", "client_id is not the one that signed")
        return signed.subject

    def _exchange(self, grant: str, client: str | None, parameters: Mapping[str, str]) -> dict[str, object]:
        match grant:
            case "password":
                return self._log_in(client, parameters)
            case "client_credentials":
                if client is None or self._clients.get(client) == "":
                    raise _Refusal("unauthorized_client", "a public client has no credentials of its own")
                return self._answer(
                    client, client, scope=parameters.get("scope", ""), audience=parameters.get("audience")
                )
            case "refresh_token":
                return self._refresh(client, parameters.get("refresh_token"))
            case "urn:ietf:params:oauth:grant-type:device_code":
                return self._poll(client, parameters.get("device_code"))
            case "urn:ietf:params:oauth:grant-type:jwt-bearer":
                return self._bear(client, parameters)
            case "urn:ietf:params:oauth:grant-type:token-exchange":
                return self._trade(client, parameters)
            case "":
                raise _Refusal("invalid_request", "grant_type is required, once, in a form")
            case _:
                raise _Refusal("unsupported_grant_type", "this issuer does not know that grant")

    def _log_in(self, client: str | None, parameters: Mapping[str, str]) -> dict[str, object]:
        user, password = parameters.get("username"), parameters.get("password")
        if user is None or password is None:
            raise _Refusal("invalid_request", "username and password are required")
        if not self.users.check(user, password):
            raise _Refusal("invalid_grant", "wrong user or password")
        family = _Family(user, client, parameters.get("scope", ""), parameters.get("audience"))
        self._families[family.id] = family
        return self._pair(family)

    def _refresh(self, client: str | None, token: str | None) -> dict[str, object]:
        if token is None:
            raise _Refusal("invalid_request", "refresh_token is required")
        claims = self._read(token, (_REFRESH,))
        family = None if isinstance(claims, str) else self._families.get(claims.family)
        if isinstance(claims, str) or family is None or claims.subject != family.user or client != family.client:
            raise _Refusal("invalid_grant", "refresh token is not valid")
        if family.revoked:
            raise _Refusal("invalid_grant", "refresh token is revoked")
        if claims.id != family.current:
            family.revoked = True
            self.replays += 1
            self.revoked_families += 1
            raise _Refusal("invalid_grant", "refresh token was used before; the whole family is revoked")
        if claims.expires_at <= self._issuing_time():
            raise _Refusal("invalid_grant", "refresh token is expired")
        if not self.users.may_log_in(family.user):
            raise _Refusal("invalid_grant", "the user may not log in any more")
        if not self.rotate_refresh_tokens:
            return self._answer(family.user, client, scope=family.scope, audience=family.audience)
        return self._pair(family)

    def _poll(self, client: str | None, code: str | None) -> dict[str, object]:
        """Tell a device how far its user has come (RFC 8628 section 3.5)."""
        if code is None:
            raise _Refusal("invalid_request", "device_code is required")
        device = self._devices.get(code)
        if device is None or device.client != client:
            raise _Refusal("invalid_grant", "device code is not valid")
        now = self._issuing_time()
        if now >= device.expires_at:
            raise _Refusal("expired_token", "nobody came in time")
        if device.is_denied:
            raise _Refusal("access_denied", "the user refused")
        asked_at, device.asked_at = device.asked_at, now
        if now - asked_at < device.interval:
            device.interval += _SLOWER
            raise _Refusal("slow_down", f"{device.interval:g} seconds are between two polls from now on")
        if device.user is None:
            raise _Refusal("authorization_pending", "the user has not come yet")
        del self._devices[code]
        family = _Family(device.user, client, device.scope, device.audience)
        self._families[family.id] = family
        return self._pair(family)

    def _bear(self, client: str | None, parameters: Mapping[str, str]) -> dict[str, object]:
        """Answer an assertion of somebody who is trusted (RFC 7523 sections 2.1 and 3.1)."""
        assertion = parameters.get("assertion")
        if assertion is None:
            raise _Refusal("invalid_request", "assertion is required")
        signed = self._trusted.read(assertion, self._issuing_time())
        if signed is None or self.users.is_disabled(signed.subject) or not self._takes(signed, self._trusted):
            raise _Refusal("invalid_grant", "assertion is not valid")
        return self._answer(
            signed.subject, client, scope=parameters.get("scope", ""), audience=parameters.get("audience")
        )

    def _trade(self, client: str | None, parameters: Mapping[str, str]) -> dict[str, object]:
        """Answer a token of our own, or of somebody who is trusted, with another one (RFC 8693 section 2.2)."""
        token = parameters.get("subject_token")
        wanted = parameters.get("requested_token_type", f"{_TOKEN_TYPE}access_token")
        if token is None or parameters.get("subject_token_type") not in _SUBJECT_TOKEN_TYPES:
            raise _Refusal("invalid_request", "subject_token and a subject_token_type that is known are required")
        if wanted != f"{_TOKEN_TYPE}access_token" or "actor_token" in parameters:
            raise _Refusal("invalid_request", "there are access tokens here, for the subject itself, and no others")
        subject = self._subject_of(token)
        if subject is None or self.users.is_disabled(subject):
            # Not invalid_grant (section 2.2.2).
            raise _Refusal("invalid_request", "subject_token is not valid")
        answer = self._answer(subject, client, scope=parameters.get("scope", ""), audience=parameters.get("audience"))
        return {**answer, "issued_token_type": wanted}

    def _subject_of(self, token: str) -> str | None:
        ours = self._read(self._opaque.get(token, token), (_ACCESS, _ID))
        if isinstance(ours, _Claims):
            is_good = ours.expires_at > self._issuing_time() and ours.id not in self._revoked
            return ours.subject if is_good else None
        signed = self._trusted.read(token, self._issuing_time())
        return None if signed is None else signed.subject

    def _takes(self, assertion: Assertion, signers: Signers) -> bool:
        """Return whether an assertion is meant for this issuer, and was not used before (RFC 7523 section 3)."""
        is_for_us = not assertion.audiences.isdisjoint({self.url, self.token_url})
        return is_for_us and (signers.use(assertion) or not self.one_time_assertions)

    def _pair(self, family: _Family) -> dict[str, object]:
        answer = self._answer(family.user, family.client, scope=family.scope, audience=family.audience)
        family.current = secrets.token_hex(8)
        answer["refresh_token"] = self._sign(
            _REFRESH, self.refresh_lifetime, sub=family.user, aud=self.url, jti=family.current, family=family.id
        )
        return answer

    def _answer(self, user: str, client: str | None, *, scope: str, audience: str | None) -> dict[str, object]:
        access = self.mint(user, audience=audience)
        if self.opaque_access_tokens:
            handle = secrets.token_urlsafe(32)
            self._opaque[handle] = access
            access = handle
        lifetime = self.access_lifetime
        answer: dict[str, object] = {
            "access_token": access,
            "token_type": "Bearer",
            "expires_in": _whole(lifetime),
        }
        if scope:
            answer["scope"] = scope
        if "openid" in scope.split():
            # The audience of an ID token is the client (OpenID Connect Core section 2).
            self._audiences.add(client or self._audience)
            answer["id_token"] = self._sign(_ID, lifetime, sub=user, aud=client or self._audience)
        return answer

    # Signing and reading

    def _now(self) -> float:
        return time.time() if self._clock is None else self._clock.time()

    def _issuing_time(self) -> float:
        return self._now() + self.clock_skew

    def _sign(self, kind: str, lifetime: float, **claims: str) -> str:
        now = self._issuing_time()
        payload = {"iss": self.url, "iat": now, "exp": now + lifetime, "jti": secrets.token_hex(8), **claims}
        key = self._signing_key
        return jwt.encode(payload, key.private, algorithm=self._algorithm, headers={"kid": key.id, "typ": kind})

    def _read(self, token: str, kinds: tuple[str, ...]) -> _Claims | str:  # noqa: PLR0911 - one reason each
        """Return what a signed token says, or why it cannot be believed; times are the caller's to judge."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            return "malformed"
        key = self._keys.get(header.get("kid", ""))
        if key is None:
            return "signature"
        try:
            # PyJWT reads the machine's clock; we have our own.
            claims = jwt.decode(
                token,
                key.private.public_key(),
                algorithms=[self._algorithm],
                options={
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "verify_aud": False,
                    "verify_iss": False,
                },
            )
        except jwt.InvalidSignatureError:
            return "signature"
        except jwt.InvalidTokenError:
            return "malformed"
        if header.get("typ") not in kinds:
            return "kind"
        if claims["iss"] != self.url:
            return "issuer"
        return _Claims(claims["jti"], claims["sub"], claims["aud"], claims["exp"], claims.get("family", ""))


@dataclass(frozen=True, slots=True)
class _Claims:
    id: str
    subject: str
    audience: str
    expires_at: float
    family: str


@dataclass(slots=True)
class _Family:
    """The refresh tokens that descend from one login; only the current one is good."""

    user: str
    client: str | None
    scope: str
    audience: str | None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    current: str = ""
    revoked: bool = False


def _check_durations(**durations: float) -> None:
    for name, seconds in durations.items():
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"TokenIssuer: {name} must be more than zero seconds and finite, not {seconds!r}")


def _whole(seconds: float) -> float:
    """Return `seconds` as most issuers write them."""
    return int(seconds) if float(seconds).is_integer() else seconds


def _user_code() -> str:
    letters = "".join(secrets.choice(_CODE_LETTERS) for _ in range(8))
    return f"{letters[:4]}-{letters[4:]}"


@dataclass(slots=True)
class _Device:
    """A device whose user is to log in elsewhere."""

    client: str | None
    scope: str
    audience: str | None
    expires_at: float
    interval: float
    code: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    user_code: str = field(default_factory=_user_code, repr=False)
    asked_at: float = -math.inf
    user: str | None = None
    is_denied: bool = False


@dataclass(slots=True)
class _Failure:
    status: int
    error: str | None
    description: str | None
    headers: Mapping[str, str]
    times: int | None


class _Refusal(Exception):
    def __init__(self, error: str, description: str) -> None:
        super().__init__(error)
        self.error = error
        self.description = description

    def response(self, request: web.Request) -> web.Response:
        """Return it as an answer (RFC 6749 section 5.2)."""
        headers = dict(_NO_STORE)
        if self.error == "invalid_client" and "Authorization" in request.headers:
            headers["WWW-Authenticate"] = 'Basic realm="token"'
        body = {"error": self.error, "error_description": self.description}
        return web.json_response(body, status=_STATUS.get(self.error, 400), headers=headers)


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = field(repr=False)

    def public_jwk(self) -> dict[str, object]:
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            jwk, algorithm = ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True), "ES256"
        else:
            jwk, algorithm = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True), "RS256"
        return {**jwk, "kid": self.id, "use": "sig", "alg": algorithm}


@functools.cache
def _key(algorithm: Algorithm, number: int) -> _Key:
    # Once per process: an RSA key takes a good part of a second to find.
    private = (
        ec.generate_private_key(ec.SECP256R1())
        if algorithm == "ES256"
        else rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    return _Key(f"{algorithm}-{number}", private)


async def _parameters(request: web.Request) -> dict[str, str]:
    form = await request.post()
    # A parameter that is repeated counts as missing (RFC 6749 section 3.2).
    return {name: value for name, value in form.items() if isinstance(value, str) and len(form.getall(name)) == 1}


def _basic_credentials(header: str | None) -> tuple[str, str] | None:
    """Return id and secret of HTTP Basic authentication; both are form-encoded within (RFC 6749 section 2.3.1)."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        client, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise _Refusal("invalid_client", "the Authorization header is not readable") from None
    return unquote_plus(client), unquote_plus(secret)


def _reset(transport: asyncio.Transport | None) -> None:
    """Close a connection with RST, as a crashed host or a fail-over would."""
    if transport is None:
        return
    # By its descriptor, because the sockets that uvloop shows have no setsockopt.
    shown = transport.get_extra_info("socket")
    if shown is not None and (descriptor := shown.fileno()) >= 0:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()
