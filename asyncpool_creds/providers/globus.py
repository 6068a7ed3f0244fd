"""Tokens of Globus Auth, kept apart by the resource server that each is for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final, NoReturn, Self, cast
from urllib.parse import quote, unquote
from weakref import WeakSet

try:
    import httpx
except ImportError as _missing:  # pragma: no cover
    raise ImportError("Globus needs httpx: pip install 'asyncpool-creds[globus]'") from _missing

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential, password_flaw
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._events import Observer, RefreshFailed, log_event
from asyncpool_creds._tracebacks import clear_frames, clears_frames
from asyncpool_creds.providers._arguments import check_text
from asyncpool_creds.providers._exchange import Exchange
from asyncpool_creds.providers._http import HttpClient, complaint_about
from asyncpool_creds.providers._redaction import redact
from asyncpool_creds.providers._token_endpoint import (
    Answer,
    Client,
    Failure,
    TokenEndpoint,
    earliest,
    lifetime,
    refresh_token_in,
)
from asyncpool_creds.storage import MemoryStorage, StoredTokens, TokenStorage

__all__ = ["Globus", "GlobusResource"]

# https://docs.globus.org/api/auth/reference/ for these two and for "other_tokens".
_TOKEN: Final = "/v2/oauth2/token"  # noqa: S105 - a path
_REVOKE: Final = "/v2/oauth2/token/revoke"
_LONGEST_LIST: Final = 300
_NEW_LOGIN: Final = "store() its token response"


class Globus:
    """The tokens that a client of Globus Auth holds, by resource server.

    One login gives a token, and often a refresh token, for each resource server that its scopes
    name: one in the answer itself, the others in its ``other_tokens``. `store` keeps them apart,
    `resource` is the provider of one of them. Each is refreshed by itself, under a lock of its
    own, and what happens to one does not touch the others. `TokenManagers(globus.resource)`
    keeps them all fresh.

    A native app, or a confidential client that acts for a person, stores what the login of that
    person gave. A confidential client that acts for itself names `scopes`, and logs in whenever
    it has to.

    Use it as an async context manager, or call `aclose`; it can be used again afterwards.

    Args:
        client_id: The client.
        client_secret: Its secret; None: a native app, which has none.
        scopes: Resource servers and the scopes that the client has there by itself: a str with
            spaces, or several. For those, nothing is stored from logins of people.
        storage: Where tokens are kept; memory if not given. The keys are
            ``globus:<client_id>:<resource_server>``, and a digest of the scopes behind it where
            the client acts for itself: what it got with others, or from a person, is not used.
        namespace: Keeps the tokens of one person apart from those of others who use the same
            client and storage; it becomes part of the keys, as in ``globus:<client_id>/<namespace>:...``.
        url: Of Globus Auth.
        timeout: Seconds one request may take, as a whole.
        http_client: Makes the httpx client, for a proxy or a private certificate authority. Called
            once per process and event loop; it is closed with `aclose`.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty or makes no sense, or secrets would leave without TLS.
    """

    def __init__(
        self,
        client_id: str,
        *,
        client_secret: str | None = None,
        scopes: Mapping[str, str | Iterable[str]] | None = None,
        storage: TokenStorage | None = None,
        namespace: str | None = None,
        url: str = "https://auth.globus.org",
        timeout: float | timedelta = 10.0,
        http_client: Callable[[], httpx.AsyncClient] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if client_id is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError("Globus: client_id must be a str, not NoneType")
        for name, value in {"client_id": client_id, "client_secret": client_secret, "namespace": namespace}.items():
            check_text("Globus", name, value)
        if not isinstance(url, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Globus: url must be a str, not {type(url).__name__}")
        if complaint := complaint_about(url):
            raise ValueError(f"Globus: url {complaint}")
        if storage is not None and not isinstance(storage, TokenStorage):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Globus: storage must be a TokenStorage, as MemoryStorage() is, not {type(storage).__name__}"
            )
        self._scopes: Final = _read_scopes(scopes)
        if self._scopes and client_secret is None:
            raise ValueError("Globus: scopes without client_secret; only a confidential client logs in by itself")
        self._client: Final = Client(client_id, client_secret, "basic" if client_secret else None)
        self._url: Final = url.rstrip("/")
        self._storage: Final = MemoryStorage() if storage is None else storage
        owner = quote(client_id, safe="") + ("" if namespace is None else f"/{quote(namespace, safe='')}")
        self._prefix: Final = f"globus:{owner}:"
        self._http: Final = HttpClient("globus", timeout=timeout, make_client=http_client)
        self._clock: Final = SYSTEM_CLOCK if clock is None else clock
        # An exchange that has yet to store something outlives its resource.
        self._exchanges: Final = WeakSet[Exchange]()

    def __repr__(self) -> str:
        return f"<Globus client_id={self._client.id!r} at {self._url} keys={self._prefix!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Globus holds secrets and cannot be pickled; make one where it is needed")

    def resource(self, name: str) -> GlobusResource:
        """Return a new provider of the token for the resource server `name`.

        Args:
            name: As Globus Auth calls it: a host name such as ``"transfer.api.globus.org"``, or
                a UUID where the resource server has no other name.

        Raises:
            TypeError: `name` is no str.
            ValueError: `name` is empty.
        """
        _check_resource(name)
        source, scope = f"globus {name}", self._scopes.get(name)
        exchange = Exchange(
            source,
            _Login(source, name, self._endpoint(source, _TOKEN), scope),
            can_log_in=scope is not None,
            needs_a_person=False,
            first=None,
            storage=self._storage,
            key=self._key(name),
            clock=self._clock,
            new_login=_NEW_LOGIN,
        )
        self._exchanges.add(exchange)
        return GlobusResource(name, exchange, storage=self._storage, key=self._key(name), clock=self._clock)

    @clears_frames
    async def store(self, response: Mapping[str, object], *, requested_at: datetime | None = None) -> list[str]:
        """Keep the tokens of a login, each in place of what was there, and return their resource servers.

        The next fetch of a `resource` uses them without a request.

        Args:
            response: The token response of Globus Auth, as its JSON has it (``response.data`` in globus-sdk).
            requested_at: Aware datetime at which the request for it began: lifetimes count from
                there, and what was obtained later is left alone, so that a call that failed half
                way can be made again. None: now, in place of anything.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: It is no token response, or is for a resource server that the client logs in to by itself.
            Exception: Whatever the storage raises.
        """
        if not isinstance(response, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Globus: store() takes a token response as a mapping, such as response.data of globus-sdk, "
                f"not {type(response).__name__}"
            )
        if requested_at is not None and requested_at.utcoffset() is None:
            raise ValueError("Globus: requested_at is naive; give it a time zone, as in datetime.now(timezone.utc)")
        at = utc_now(self._clock) if requested_at is None else requested_at.astimezone(UTC)
        answers = _by_resource(Answer(at, response))
        if answers is None:
            raise ValueError(
                "Globus: this is no token response of Globus Auth, where each token has a resource_server and an "
                "access_token that a server would accept"
            )
        if own := [name for name in answers if name in self._scopes]:
            raise ValueError(
                f"Globus: the client logs in to {own[0]} by itself, as scopes say; store the tokens of people with a "
                "Globus of another namespace, without these scopes"
            )
        await self._save(answers, keep_newer=requested_at is not None)
        return list(answers)

    @clears_frames
    async def log_in(self) -> list[str]:
        """Log in as the client itself, once for all `scopes`, and return the resource servers of the answer.

        There is no need to: a `resource` logs in by itself. It saves requests where there are many.

        Raises:
            ProviderError: Globus Auth gave no tokens.
            ValueError: There are no `scopes`.
            Exception: Whatever the storage raises.
        """
        if not self._scopes:
            raise ValueError("Globus: log_in() needs scopes, which are those of the client itself; pass them")
        request = {"grant_type": "client_credentials", "scope": " ".join(self._scopes.values())}
        outcome = await self._endpoint("globus", _TOKEN).exchange(request)
        if isinstance(outcome, Failure):
            outcome.throw()
        answers = _by_resource(outcome)
        if answers is None:
            raise ProviderError("globus: the answer of Globus Auth has no tokens with resource servers")
        await self._save(answers, keep_newer=True)
        return list(answers)

    @clears_frames
    async def resources(self) -> list[str]:
        """Return the resource servers that tokens are stored for, sorted.

        Raises:
            Exception: Whatever the storage raises.
        """
        keys = await self._storage.keys(self._prefix)
        names = {key: unquote(key.removeprefix(self._prefix).partition("#")[0]) for key in keys}
        return sorted(name for key, name in names.items() if key == self._key(name))

    @clears_frames
    async def lookup(self, name: str) -> StoredTokens | None:
        """Return what is stored for the resource server `name`, expired or not; None: nothing is.

        Do not use the refresh token: it may be good once only, and is not yours.

        Raises:
            TypeError: `name` is no str.
            ValueError: `name` is empty.
            Exception: Whatever the storage raises.
        """
        _check_resource(name)
        return await self._storage.load(self._key(name))

    @clears_frames
    async def delete(self, name: str, *, revoke: bool = False) -> None:
        """Forget what is stored for the resource server `name`; that nothing is, is no error.

        A manager that holds the token already serves it on until it ends.

        Args:
            name: The resource server.
            revoke: Have Globus Auth revoke the refresh token and the access token first. Where that
                fails, they stay stored, and the call can be made again.

        Raises:
            ProviderError: They could not be revoked.
            TypeError: `name` is no str.
            ValueError: `name` is empty.
            Exception: Whatever the storage raises.
        """
        _check_resource(name)
        key = self._key(name)
        async with self._storage.lock(key):
            if revoke and (tokens := await self._storage.load(key)) is not None:
                await self._revoke(name, tokens)
            await self._storage.delete(key)

    @clears_frames
    async def aclose(self) -> None:
        """Finish the exchanges of refresh tokens that are going on, and close the HTTP client."""
        for exchange in tuple(self._exchanges):
            await exchange.aclose()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _save(self, answers: Mapping[str, Answer], *, keep_newer: bool) -> None:
        # All are read before one is stored.
        entries = {name: _tokens(answer) for name, answer in answers.items()}
        for name, tokens in entries.items():
            key = self._key(name)
            async with self._storage.lock(key):
                if not (keep_newer and _is_newer(await self._storage.load(key), tokens)):
                    await self._storage.save(key, tokens)

    async def _revoke(self, name: str, tokens: StoredTokens) -> None:
        # The refresh token first: whatever it can still make is then out of reach.
        access_token = None if tokens.credential is None else tokens.credential.password
        secrets = [token for token in (tokens.refresh_token, access_token) if token is not None]
        endpoint = self._endpoint(f"globus {name}", _REVOKE, secrets)
        for token in secrets:
            outcome = await endpoint.exchange({"token": token})
            if isinstance(outcome, Failure):
                outcome.throw()

    def _endpoint(self, source: str, path: str, secrets: Iterable[str] = ()) -> TokenEndpoint:
        return TokenEndpoint(
            source,
            issuer=None,
            token_url=self._url + path,
            client=self._client,
            parameters={},
            secrets=secrets,
            http=self._http,
            clock=self._clock,
        )

    def _key(self, name: str) -> str:
        key, scope = self._prefix + quote(name, safe=""), self._scopes.get(name)
        if scope is None:
            return key
        return f"{key}#{hashlib.sha256(' '.join(sorted(scope.split())).encode()).hexdigest()[:16]}"


class GlobusResource:
    """The provider of the token for one resource server; `Globus.resource` makes it.

    It gives what is stored as long as that is fresh, then exchanges the refresh token, or logs in
    as the client itself. Where neither is possible, or Globus Auth cannot be reached, a stored
    token that is stale is given once, as long as it is valid, with an event that says why.

    Cancelling `fetch` does not cut an exchange short: it is finished and stored in the background,
    and the next `fetch` joins it.
    """

    def __init__(self, name: str, exchange: Exchange, *, storage: TokenStorage, key: str, clock: Clock) -> None:
        self._name: Final = name
        self._exchange: Final = exchange
        self._storage: Final = storage
        self._storage_key: Final = key
        self._clock: Final = clock
        self._observer: Observer = log_event
        self._given: Credential | None = None
        self._refused: Credential | None = None

    @property
    def name(self) -> str:
        """The resource server."""
        return self._name

    def __repr__(self) -> str:
        return f"<GlobusResource {self._name!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a GlobusResource holds secrets and cannot be pickled; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return the access token that is stored, or one that is obtained now.

        Raises:
            ProviderError: None was to be had; ``retryable`` is False if a new login is needed, or
                Globus Auth refused the client.
            ProviderTimeout: Globus Auth did not answer in time.
        """
        try:
            credential = await self._exchange.fetch()
        except ProviderError as error:
            stale = await self._still_valid()
            if stale is None:
                raise
            self._report(error)
            credential = stale
        self._given = credential
        return credential

    def invalidate(self, credential: Credential) -> None:
        """Do not take `credential` from the storage again: a server has refused it."""
        self._refused = credential
        self._exchange.invalidate(credential)

    def report_to(self, observer: Observer) -> None:
        """Send events to `observer`."""
        self._observer = observer
        self._exchange.report_to(observer)

    @clears_frames
    async def aclose(self) -> None:
        """Finish the exchange of the refresh token, if one is going on; `Globus.aclose` closes the HTTP client."""
        await self._exchange.aclose()

    async def _still_valid(self) -> Credential | None:
        """Return the stored credential, though it is due for a refresh, unless it was given before."""
        try:
            tokens = await self._storage.load(self._storage_key)
        except Exception:  # noqa: BLE001 - the exchange has reported it
            return None
        credential = None if tokens is None else tokens.credential
        if credential is None or (credential.expires_at is not None and credential.expires_at <= utc_now(self._clock)):
            return None
        if any(seen is not None and seen.is_same_secret(credential) for seen in (self._given, self._refused)):
            return None
        return credential

    def _report(self, error: ProviderError) -> None:
        clear_frames(error)
        self._observer(
            RefreshFailed(
                at=utc_now(self._clock),
                provider=f"globus {self._name}",
                error=error,
                message=str(error),
                retryable=error.retryable,
                attempt=1,
                retry_in=None,
                still_valid=True,
            )
        )


@dataclass(frozen=True, slots=True)
class _Login:
    """How one resource server's token is got."""

    source: str
    resource: str
    endpoint: TokenEndpoint
    scope: str | None

    async def prepare(self) -> None:
        """Do nothing: there is nothing to discover."""

    async def refresh(self, refresh_token: str) -> Answer | Failure:
        outcome = await self.endpoint.exchange({"grant_type": "refresh_token", "refresh_token": refresh_token})
        if isinstance(outcome, Answer):
            # Whatever it is called now: this is what the refresh token was good for.
            return (_by_resource(outcome) or {}).get(self.resource, outcome)
        if outcome.code == "invalid_grant":
            message = (
                f"{self.source}: Globus Auth refused the refresh token (invalid_grant): it is expired, revoked or used "
                f"up. A new login is needed: {_NEW_LOGIN}"
            )
            return replace(outcome, error=ProviderError(message, retryable=False))
        return outcome

    async def log_in(self) -> Answer | Failure:
        outcome = await self.endpoint.exchange({"grant_type": "client_credentials", "scope": self.scope or ""})
        if isinstance(outcome, Failure):
            return outcome
        answers = _by_resource(outcome) or {}
        if self.resource in answers:
            return answers[self.resource]
        named = redact(" and ".join(answers) or "none", (), longest=_LONGEST_LIST)
        message = f"{self.source}: the scopes belong to another resource server ({named}); name that one in scopes"
        return Failure(ProviderError(message, retryable=False))

    def credential_in(self, answer: Answer) -> Credential | Failure:
        try:
            return _credential(answer)
        except ValueError:
            message = f"{self.source}: the answer of Globus Auth has no access_token that a server would accept"
            return Failure(ProviderError(message, retryable=False))


def _by_resource(answer: Answer) -> dict[str, Answer] | None:
    """Return each token of an answer by its resource server; None: it is no answer of Globus Auth."""
    others = answer.members.get("other_tokens")
    found: dict[str, Answer] = {}
    for token in [answer.members, *(cast("list[object]", others) if isinstance(others, list) else [])]:
        if not isinstance(token, Mapping):
            return None
        members = cast("Mapping[str, object]", token)
        name, access_token = members.get("resource_server"), members.get("access_token")
        if not (isinstance(name, str) and name and isinstance(access_token, str) and access_token):
            return None
        if password_flaw(access_token):
            return None
        found[name] = Answer(answer.requested_at, members)
    return found


def _tokens(answer: Answer) -> StoredTokens:
    return replace(
        refresh_token_in(answer) or StoredTokens(), credential=_credential(answer), obtained_at=answer.requested_at
    )


def _credential(answer: Answer) -> Credential:
    token = answer.members.get("access_token")
    if not isinstance(token, str):
        raise ValueError("no access token")  # noqa: TRY004 - as for one that no server accepts
    return Credential(
        token, expires_at=earliest(answer.requested_at, lifetime(answer.members.get("expires_in")), token)
    )


def _is_newer(stored: StoredTokens | None, tokens: StoredTokens) -> bool:
    if stored is None or stored.obtained_at is None or tokens.obtained_at is None or stored.is_being_spent:
        return False
    return stored.obtained_at > tokens.obtained_at


def _read_scopes(scopes: Mapping[str, str | Iterable[str]] | None) -> dict[str, str]:
    if scopes is None:
        return {}
    if not isinstance(scopes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Globus: scopes must map resource servers to their scopes, not {type(scopes).__name__}")
    read: dict[str, str] = {}
    for name, wanted in scopes.items():
        _check_resource(name)
        parts = [wanted] if isinstance(wanted, str) else list(wanted)
        if not all(isinstance(part, str) for part in parts):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Globus: the scopes of {name} must be a str, or several")
        read[name] = " ".join(" ".join(parts).split())
        if not read[name]:
            raise ValueError(f"Globus: the scopes of {name} are empty")
    return read


def _check_resource(name: str) -> None:
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Globus: the name of a resource server must be a str, not {type(name).__name__}")
    if not name:
        raise ValueError("Globus: the name of a resource server is empty")
