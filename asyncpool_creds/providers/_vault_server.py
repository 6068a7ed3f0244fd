"""A Vault server: its HTTP API, the token that is shown there, and what its refusals mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, cast

import anyio
import httpx

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._events import Observer, RefreshTokenExpiring, RevocationFailed, log_event
from asyncpool_creds._tracebacks import class_and_place
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._http import (
    HttpClient,
    Response,
    Unanswered,
    complaint_about,
    is_transient,
    retry_after,
)
from asyncpool_creds.providers._redaction import redact
from asyncpool_creds.providers._vault_login import FIT_FOR_HEADER, TokenAuth, VaultAuth, VaultLogin

__all__ = ["Answer", "Failure", "Token", "Vault", "life_of", "object_in", "text_in"]

# What passes by itself, next to what passes at every HTTP server: a node that has not yet seen our last write (412),
# one that only stands by for disasters (472), or for performance (473). Vault, "HTTP API: HTTP status codes".
_TRANSIENT_STATUS: Final = frozenset({412, 472, 473})
_LONGEST_TEXT: Final = 300
# In seconds; Vault itself goes to 292 years, which is more than a datetime has left one day.
_LONGEST_LIFE: Final = 100 * 365 * 86400


@dataclass(frozen=True, slots=True)
class Token:
    """A token as Vault describes it.

    Args:
        secret: The token.
        term: What it was first given for.
        expires_at: When it ends, as far as is known; None: never, or nothing is known.
        is_renewable: Whether Vault renews it.
        is_ours: Whether it is from a login of our own, and nobody else's.
        is_revocable: Whether it is ours to revoke; Vault does not revoke batch tokens.
        is_known: Whether Vault has described it at all.
        is_limited: Whether it is good for a number of requests only.
    """

    secret: str = field(repr=False)
    term: timedelta = timedelta()
    expires_at: datetime | None = None
    is_renewable: bool = False
    is_ours: bool = False
    is_revocable: bool = False
    is_known: bool = True
    is_limited: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    requested_at: datetime
    members: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that gave nothing; `status` is None if there was no answer. The cause of the error is set."""

    error: ProviderError
    status: int | None = None


class Vault:
    """The HTTP API of a server, and the token that is shown there."""

    def __init__(
        self,
        name: str,
        *,
        address: str | None,
        auth: VaultAuth | str | None,
        namespace: str | None,
        timeout: float | timedelta,
        http_client: Callable[[], httpx.AsyncClient] | None,
        clock: Clock | None,
    ) -> None:
        self._name: Final = name
        address = _or_environment(name, "address", address, "ADDR")
        if address is None:
            raise ValueError(f"{name}: pass address, or set VAULT_ADDR")
        if complaint := complaint_about(address):
            raise ValueError(f"{name}: address {complaint}")
        self._address: Final = address.rstrip("/").removesuffix("/v1")
        if auth is None or isinstance(auth, str):
            token = _or_environment(name, "auth", auth, "TOKEN")
            if token is None:
                raise ValueError(f"{name}: pass auth, such as AppRoleAuth(...) or a token, or set VAULT_TOKEN")
            auth = TokenAuth(token)
        if not isinstance(auth, VaultAuth):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name}: auth must be a VaultAuth, such as AppRoleAuth(...), not {type(auth).__name__}")
        self._auth: Final = auth
        self._namespace: Final = _or_environment(name, "namespace", namespace, "NAMESPACE")
        if self._namespace is not None and not FIT_FOR_HEADER.fullmatch(self._namespace):
            raise ValueError(f"{name}: namespace has a space, a line break or something else that no namespace has")
        self._http: Final = HttpClient("vault", timeout=timeout, make_client=http_client)
        self._timeout: Final = parse_seconds(name, "timeout", timeout)
        self.clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._process = os.getpid()
        self._tried: str | None = None  # the token with which something was read, or tried to
        self._warned_of: str | None = None
        self.held: Token | None = None
        self.observer: Observer = log_event

    @property
    def where(self) -> str:
        """The server and the namespace, for a repr."""
        return self._address if self._namespace is None else f"{self._address} namespace={self._namespace}"

    def leave_parent(self) -> bool:
        """Forget what is the parent's, if this process is a fork; return whether it is."""
        if self._process == os.getpid():
            return False
        self._process, self.held, self._tried = os.getpid(), None, None
        return True

    # The token

    async def token(self, needed: timedelta = timedelta()) -> Token:
        """Return a token that is good: renewed if it ends before `needed`, replaced if most of its term is over."""
        held = self.held
        if held is None or (held.expires_at is not None and held.expires_at <= utc_now(self.clock)):
            held = await self._log_in()
            if not held.is_renewable:
                return held
        if held.is_renewable and self._ends_within(max(held.term / 2, min(needed, held.term)), held):
            held = await self._renew(held)
        if held.is_known and not self._ends_within(held.term / 2, held):
            return held
        try:
            fresh = await self._log_in()
        except ProviderError as error:
            # What is held is good yet, and long enough for somebody to do something about it.
            self._warn_of_end(held, f"a new login failed: {error}")
            return held
        if fresh.secret == held.secret:
            self._warn_of_end(fresh, "it cannot be renewed any further, so another one is needed: pass one")
        return fresh

    def _ends_within(self, life: timedelta, token: Token) -> bool:
        return token.expires_at is not None and token.expires_at - utc_now(self.clock) < life

    async def _renew(self, token: Token) -> Token:
        """Return the token with a later end, if Vault gives it one."""
        answer = await self.ask("POST", "auth/token/renew-self", token=token, document={})
        if isinstance(answer, Failure):
            # 500: the auth method will not have it, because the role has gone or has other policies by now.
            if answer.error.retryable and answer.status != 500:
                raise answer.error
            return token
        auth = object_in(answer.members, "auth")
        life = life_of(auth.get("lease_duration"))
        if life is None:
            return token
        end = answer.requested_at + life
        self.held = replace(token, expires_at=end, is_renewable=auth.get("renewable") is True)
        return self.held

    async def _log_in(self) -> Token:
        """Get another token, or the same one anew, and hold it."""
        try:
            login = await self._auth.login()
        except ProviderError:
            raise
        except Exception as error:
            method = type(self._auth).__name__
            raise ProviderError(f"vault: login() of {method} raised {class_and_place(error)}; see the cause") from error
        token = await (self._look_up(login) if isinstance(login, str) else self._exchange(login))
        self.held = token
        return token

    async def _exchange(self, login: VaultLogin) -> Token:
        answer = await self.ask("POST", login.path, document=login.document, advice=login.advice)
        if isinstance(answer, Failure):
            raise answer.error
        auth = object_in(answer.members, "auth")
        secret, life = text_in(auth, "client_token"), life_of(auth.get("lease_duration"))
        if secret is None or not FIT_FOR_HEADER.fullmatch(secret) or life is None:
            raise ProviderError(f"vault: {login.path} gave no token; is a second factor asked for?", retryable=False)
        return Token(
            secret,
            term=life,
            # Zero is for ever.
            expires_at=answer.requested_at + life if life else None,
            is_renewable=auth.get("renewable") is True,
            is_ours=True,
            is_revocable=auth.get("token_type") != "batch",
            is_limited=auth.get("num_uses") not in (0, None),
        )

    async def _look_up(self, secret: str) -> Token:
        if not FIT_FOR_HEADER.fullmatch(secret):
            raise ProviderError("vault: what should be a token has characters that no token has", retryable=False)
        unknown = Token(secret, is_known=False)
        answer = await self.ask("GET", "auth/token/lookup-self", token=unknown)
        if isinstance(answer, Failure):
            # Not good any more, or not allowed to look itself up: what it is needed for will show.
            if answer.status == 403:
                return unknown
            raise answer.error
        data = object_in(answer.members, "data")
        life = life_of(data.get("ttl"))
        if life is None:
            return unknown
        return Token(
            secret,
            term=life_of(data.get("creation_ttl")) or life,
            # A ttl of zero is that of a token which never ends, or that of one in its last second.
            expires_at=answer.requested_at + life if data.get("expire_time") is not None else None,
            is_renewable=data.get("renewable") is True,
            is_limited=data.get("num_uses") not in (0, None),
        )

    def _warn_of_end(self, token: Token, advice: str) -> None:
        if token.expires_at is not None and self._warned_of != token.secret:
            self._warned_of = token.secret
            advice = f"the Vault token ends, and whatever depends on it; {advice}"
            self.observer(
                RefreshTokenExpiring(
                    at=utc_now(self.clock), provider=self._name, expires_at=token.expires_at, advice=advice
                )
            )

    # Requests

    async def read(self, path: str, token: Token, advice: str) -> tuple[Token, Answer]:
        """Return what is at `path`, and the token that was good for it.

        A token that is refused is replaced once, if there is another: it may have been revoked.

        Raises:
            ProviderError: There is nothing to be had.
        """
        answer = await self.ask("GET", path, token=token, advice=advice)
        # At the first refusal of a new login, its policies are to blame, and another would not help at once.
        is_news = not token.is_ours or token.secret == self._tried
        if is_news and isinstance(answer, Failure) and answer.status == 403:
            refused = token
            token = await self._log_in()
            if token.secret != refused.secret:
                answer = await self.ask("GET", path, token=token, advice=advice)
        self._tried = token.secret
        if isinstance(answer, Failure):
            if answer.status == 403:
                raise self._forbidden(path, token)
            raise answer.error
        return token, answer

    @staticmethod
    def _forbidden(path: str, token: Token) -> ProviderError:
        if token.is_ours or token.is_known:
            return ProviderError(
                f"vault: permission denied (HTTP 403): the token is good, but its policies do not let it read {path}; "
                f"""add to one of them: path "{path}" {{ capabilities = ["read"] }}, and check mount and namespace""",
                retryable=False,
            )
        return ProviderError(
            f"vault: the token was refused (HTTP 403) for {path}: it is wrong, expired or revoked; pass a new one. "
            "(If it is good: it lacks the policy 'default', and may neither look itself up nor read that.)",
            retryable=False,
        )

    async def ask(
        self,
        method: str,
        path: str,
        *,
        token: Token | None = None,
        document: Mapping[str, str] | None = None,
        advice: str = "see the server's log",
    ) -> Answer | Failure:
        """Send one request; return what came of it."""
        # Agents may be told to serve nobody without the first one, so that a browser cannot be made to ask them.
        headers = {"X-Vault-Request": "true"}
        if token is not None:
            headers["X-Vault-Token"] = token.secret
        if self._namespace is not None:
            headers["X-Vault-Namespace"] = self._namespace
        requested_at = utc_now(self.clock)
        response = await self._http.request(
            method, f"{self._address}/v1/{path}", headers=headers, document=None if document is None else dict(document)
        )
        if isinstance(response, Unanswered):
            return Failure(response.error)
        if response.is_success and (response.members is not None or response.is_empty):
            return Answer(requested_at, response.members or {})
        secrets = [value for name, value in (document or {}).items() if name not in ("role", "lease_id")]
        text = _complaint(response.members or {}, secrets if token is None else [*secrets, token.secret])
        return Failure(self._explain(path, response, text, advice), response.status_code)

    def _explain(self, path: str, response: Response, text: str, advice: str) -> ProviderError:
        """Return whose fault a refusal is, and what to do about it."""
        status = response.status_code
        told = f"HTTP {status}: {text}" if text else f"HTTP {status}"
        if response.is_success:
            return ProviderError(f"vault: {path} answered with no JSON object ({told}); is {self._address} Vault?")
        if response.is_redirect:
            return ProviderError(
                f"vault: {self._address} sends us elsewhere ({told}), as a standby does that does not forward; secrets "
                "do not follow: use the address of the active server, or of a load balancer that knows it"
            )
        if is_transient(status) or status in _TRANSIENT_STATUS:
            reasons = {
                412: "has not seen our last write yet; it is asked again",
                429: "is asked too often, by a quota of its own, or stands by; it is asked again later",
                472: "is a standby for disasters; use the address of the primary cluster",
                473: "is a standby for performance that does not forward; use the address of the active server",
                502: "or the database behind it is in trouble; it is asked again",
                503: "is sealed, or starting; if nobody is at it, have it unsealed",
            }
            reason = reasons.get(status, "or what is behind it is in trouble; see the server's log")
            wait = retry_after(response, utc_now(self.clock))
            return ProviderError(f"vault: {self._address} {reason} ({path}, {told})", retry_after=wait)
        if status == 404:
            message = f"vault: there is no {path} ({told}); {advice}, and the namespace"
        else:
            message = f"vault: {path} was refused ({told}); {advice}"
        return ProviderError(message, retryable=False)

    # The end

    async def revoke(self, lease: str, token: Token) -> Failure | None:
        """Revoke a lease; one that has ended already is no failure."""
        path = "sys/leases/revoke"
        advice = f"allow the token to 'update' {path}, or pass revoke=False"
        answer = await self.ask("PUT", path, token=token, document={"lease_id": lease}, advice=advice)
        return answer if isinstance(answer, Failure) else None

    async def aclose(self, *, revoke: bool = True, leases: Mapping[str, str] | None = None) -> None:
        """Revoke leases, given with the tokens they were taken with, and the token if it is ours; close the client."""
        token, self.held, self._tried = self.held, None, None
        try:
            if revoke and token is not None:
                with anyio.move_on_after(self._timeout) as limit:
                    await self._give_back(token, leases or {})
                if limit.cancelled_caught:
                    self._report(ProviderTimeout(f"vault: not all was revoked, because {self._address} took too long"))
        finally:
            await self._http.aclose()

    async def _give_back(self, token: Token, leases: Mapping[str, str]) -> None:
        for lease, parent in leases.items():
            # Those of a token that is revoked end with it.
            if not token.is_revocable or parent != token.secret:
                failure = await self.revoke(lease, token)
                if failure is not None:
                    self._report(failure.error)
        if token.is_revocable:
            answer = await self.ask("POST", "auth/token/revoke-self", token=token, document={})
            # One that has ended already is refused.
            if isinstance(answer, Failure) and answer.status != 403:
                self._report(answer.error)

    def _report(self, error: ProviderError) -> None:
        self.observer(RevocationFailed(at=utc_now(self.clock), provider=self._name, error=error, message=str(error)))


def _complaint(members: Mapping[str, object], secrets: list[str]) -> str:
    """Return what Vault says is wrong, on one line, without any secret it may quote."""
    said: list[str] = []
    for name in ("errors", "warnings"):
        lines = members.get(name)
        said += [str(line) for line in cast("list[object]", lines)] if isinstance(lines, list) else []
    if deleted_at := object_in(object_in(members, "data"), "metadata").get("deletion_time"):
        said.append(f"its latest version was deleted at {deleted_at}")
    return redact("; ".join(said), secrets, longest=_LONGEST_TEXT)


def object_in(members: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = members.get(name)
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def text_in(members: Mapping[str, object], name: str) -> str | None:
    value = members.get(name)
    return value if isinstance(value, str) and value else None


def life_of(value: object) -> timedelta | None:
    """Return a number of seconds that Vault states."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        return None
    return timedelta(seconds=min(value, _LONGEST_LIFE))


def _or_environment(owner: str, argument: str, value: str | None, name: str) -> str | None:
    """Return an argument, or what the environment says; OpenBao's own variables come before Vault's, as in its CLI."""
    check_text(owner, argument, value)
    return value or os.environ.get(f"BAO_{name}") or os.environ.get(f"VAULT_{name}") or None
