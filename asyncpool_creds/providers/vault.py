"""Database logins from HashiCorp Vault and OpenBao: made for the occasion, rotated, or kept as a secret."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, Literal

try:
    import httpx
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the Vault providers need httpx: pip install 'asyncpool-creds[vault]'") from _missing

from asyncpool_creds._clock import Clock, utc_now
from asyncpool_creds._credential import Credential, password_flaw
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._events import Observer
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._vault_login import (
    AppRoleAuth,
    JWTAuth,
    KubernetesAuth,
    TokenAuth,
    TokenFileAuth,
    Unpicklable,
    VaultAuth,
    VaultLogin,
    parse_path,
    require_text,
)
from asyncpool_creds.providers._vault_server import Answer, Failure, Token, Vault, life_of, object_in, text_in

__all__ = [
    "AppRoleAuth",
    "JWTAuth",
    "KubernetesAuth",
    "TokenAuth",
    "TokenFileAuth",
    "VaultAuth",
    "VaultDatabase",
    "VaultKV",
    "VaultLogin",
    "VaultStaticRole",
]

# Vault looks for static roles that are due every five seconds (queueTickInterval of the database engine), later ones
# after failures, and cuts their ttl to whole seconds. Until then the old password is good, so it is not called expired
# sooner. Twice the ten seconds of minimum validity must fit in, or managers would ask before the ttl has passed.
_VAULTS_INTERVAL: Final = timedelta(seconds=5)
_ROTATION_GRACE: Final = timedelta(seconds=30)
_ROUNDED_OFF: Final = timedelta(seconds=1)


class _Provider(Unpicklable):
    """What the three providers have in common: a way to Vault, and the end of it."""

    def __init__(
        self,
        *,
        address: str | None,
        auth: VaultAuth | str | None,
        namespace: str | None,
        timeout: float | timedelta,
        http_client: Callable[[], httpx.AsyncClient] | None,
        clock: Clock | None,
    ) -> None:
        self._vault: Final = Vault(
            type(self).__name__,
            address=address,
            auth=auth,
            namespace=namespace,
            timeout=timeout,
            http_client=http_client,
            clock=clock,
        )

    def report_to(self, observer: Observer) -> None:
        """Send events to `observer` instead of the log."""
        self._vault.observer = observer

    @clears_frames
    async def aclose(self) -> None:
        """Revoke the token of our own login, and close the HTTP client; a later `fetch` logs in again.

        What cannot be revoked is a `RevocationFailed` event, and lives until its own end.
        """
        self._vault.leave_parent()
        await self._vault.aclose()


class VaultDatabase(_Provider):
    """A provider of database users that Vault makes for the occasion and drops when their lease ends.

    Each fetch renews the lease of the user that is held, so that user and password stay the same, until Vault grants
    less than the full term because the role's ``max_ttl`` is near: then a new user is asked for in time, and the old
    one's lease is revoked as soon as its last connection has gone. Leases die with the token they were taken with, so
    that one is renewed first, once half of its term is over, and no credential is said to live longer than it. Where
    it cannot be renewed, a new login is made, and leases of the old token are replaced and not renewed.

    Give it to one manager only: the leases are revoked when that one is done with them. Make it after forking.

    Args:
        role: The role of the database secrets engine.
        address: Of Vault; None: ``BAO_ADDR`` or ``VAULT_ADDR`` in the environment.
        auth: How to log in, or a token; None: ``BAO_TOKEN`` or ``VAULT_TOKEN`` in the environment.
        namespace: The namespace; None: ``BAO_NAMESPACE`` or ``VAULT_NAMESPACE`` in the environment, or none.
        mount: Where the database secrets engine is mounted.
        revoke: Whether leases are revoked that are not needed any more, all of them on closing. The token needs
            ``update`` on ``sys/leases/revoke`` for it. False leaves them, and the token, to end by themselves.
        timeout: Seconds, or a timedelta, one request may take as a whole; closing takes no longer either.
        http_client: Makes the httpx client, for a private certificate authority, a proxy or a client certificate:
            ``lambda: httpx.AsyncClient(verify=context)``. Called once per process and event loop; the provider closes
            what it made.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is missing or empty, or secrets would leave without TLS: a plain ``http`` address must
            be a loopback one.
    """

    def __init__(
        self,
        role: str,
        *,
        address: str | None = None,
        auth: VaultAuth | str | None = None,
        namespace: str | None = None,
        mount: str = "database",
        revoke: bool = True,
        timeout: float | timedelta = 10.0,
        http_client: Callable[[], httpx.AsyncClient] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._path: Final = f"{parse_path('VaultDatabase', 'mount', mount)}/creds/{_parse_name('VaultDatabase', role)}"
        super().__init__(
            address=address, auth=auth, namespace=namespace, timeout=timeout, http_client=http_client, clock=clock
        )
        self._revoke: Final = revoke
        self._lease: _Lease | None = None  # of the user that is held
        self._leases: dict[str, _Lease] = {}  # all that are not revoked, by their ids

    def __repr__(self) -> str:
        return f"<VaultDatabase {self._path} at {self._vault.where}>"

    @clears_frames
    async def fetch(self) -> Credential:
        """Return the user that is held with a later end, or a new one.

        A lease that is taken while the caller is cancelled is not revoked: it lives until its own end.

        Raises:
            ProviderError: Vault gave none; ``retryable`` is False if it refused for good.
            ProviderTimeout: It did not answer in time.
        """
        self._leave_parent()
        lease = self._lease
        token = self._fit_for_leases(await self._vault.token(timedelta() if lease is None else lease.term))
        self._forget_ended()
        if lease is not None and lease.is_renewable and lease.token == token.secret:
            renewed = await self._renew(lease, token)
            # It may have been refused by the database meanwhile.
            if renewed is not None and self._lease is lease:
                return self._keep(renewed)
        token, answer = await self._vault.read(self._path, token, "check role and mount")
        return self._keep(self._taken(self._fit_for_leases(token), answer))

    def invalidate(self, credential: Credential) -> None:
        """Take a new lease at the next fetch if `credential` is the one that is held."""
        if self._lease is not None and self._lease.identifier == credential.version:
            self._lease = None

    @clears_frames
    async def revoke(self, credential: Credential) -> None:
        """Revoke the lease of `credential`; Vault drops its user at once.

        Raises:
            ProviderError: It did not; the lease lives until its own end, or until `aclose`.
        """
        self.invalidate(credential)
        self._leave_parent()
        lease = self._leases.get(credential.version or "")
        token = self._vault.held
        if lease is None or token is None or not self._revoke:
            return
        failure = await self._vault.revoke(lease.identifier, token)
        if failure is not None:
            raise failure.error
        self._leases.pop(lease.identifier, None)

    @clears_frames
    async def aclose(self) -> None:
        """Revoke the leases that are left and the token of our own login, and close the HTTP client.

        A later `fetch` logs in again. What cannot be revoked is a `RevocationFailed` event, and ends by itself.
        """
        self._leave_parent()
        leases = {lease.identifier: lease.token for lease in self._leases.values()}
        self._lease, self._leases = None, {}
        await self._vault.aclose(revoke=self._revoke, leases=leases)

    def _leave_parent(self) -> None:
        """Forget what was leased before a fork: it is the parent's to renew and to revoke."""
        if self._vault.leave_parent():
            self._lease, self._leases = None, {}

    def _fit_for_leases(self, token: Token) -> Token:
        """Return the token if it is known how long what it takes will live."""
        if not token.is_known:
            raise ProviderError(
                "vault: the token may not look itself up (HTTP 403), and leases end with it: it is wrong, expired or "
                "revoked, or lacks the policy 'default'; pass another one",
                retryable=False,
            )
        if token.is_limited:
            raise ProviderError(
                "vault: the token is good for a number of requests only, and leases end with it; "
                "set token_num_uses of the auth method's role to 0, or make the token without num_uses",
                retryable=False,
            )
        return token

    async def _renew(self, lease: _Lease, token: Token) -> _Lease | None:
        """Return the lease with a later end; None if a new one is needed."""
        answer = await self._vault.ask("PUT", "sys/leases/renew", token=token, document={"lease_id": lease.identifier})
        if isinstance(answer, Failure):
            # Not found, past its max_ttl, or forbidden; 500: the database, or this very user, is in trouble.
            if answer.error.retryable and answer.status != 500:
                raise answer.error
            return None
        granted = life_of(answer.members.get("lease_duration"))
        if granted is None:
            return None
        end = answer.requested_at + granted
        renewed = replace(
            lease,
            is_renewable=answer.members.get("renewable") is True,
            credential=replace(lease.credential, expires_at=_earlier(end, token.expires_at)),
        )
        # To be revoked, it has to be known for as long as it lives.
        self._leases[lease.identifier] = renewed
        # Cut short by its max_ttl. One that is cut short by the token's end, a new one would be as well.
        if granted < lease.term and (token.expires_at is None or end < token.expires_at - _ROUNDED_OFF):
            return None
        return renewed

    def _taken(self, token: Token, answer: Answer) -> _Lease:
        """Return the new lease that an answer holds."""
        data = object_in(answer.members, "data")
        user, password = text_in(data, "username"), text_in(data, "password")
        identifier, term = text_in(answer.members, "lease_id"), life_of(answer.members.get("lease_duration"))
        if user is None or password is None or identifier is None or term is None:
            raise ProviderError(
                f"vault: {self._path} gave no lease of a user and password; "
                "is that a role with dynamic credentials of a database secrets engine?",
                retryable=False,
            )
        expires_at = _earlier(answer.requested_at + term, token.expires_at)
        return _Lease(
            identifier=identifier,
            token=token.secret,
            term=term,
            is_renewable=answer.members.get("renewable") is True,
            # The lease is the secret's identity.
            credential=_credential(
                self._path, password, user=user, expires_at=expires_at, ends_session=True, version=identifier
            ),
        )

    def _keep(self, lease: _Lease) -> Credential:
        self._lease = self._leases[lease.identifier] = lease
        return lease.credential

    def _forget_ended(self) -> None:
        now = utc_now(self._vault.clock)
        self._leases = {
            identifier: lease
            for identifier, lease in self._leases.items()
            if lease.credential.expires_at is None or lease.credential.expires_at > now
        }


class VaultStaticRole(_Provider):
    """A provider of the password of a database user whom Vault gives a new one from time to time.

    The password is fetched when its ``ttl`` has passed and not before, because until then Vault gives the same one. The
    old one is dead as soon as there is a new one, which Vault makes some seconds late: until then it is asked every few
    seconds. A login that meets the change is refused once and tried again with the new password. Open sessions are not
    touched by any of that; ``retire_when="never"`` keeps a pool from replacing their connections.

    Args:
        role: The static role of the database secrets engine.
        address: Of Vault; None: ``BAO_ADDR`` or ``VAULT_ADDR`` in the environment.
        auth: How to log in, or a token; None: ``BAO_TOKEN`` or ``VAULT_TOKEN`` in the environment.
        namespace: The namespace; None: ``BAO_NAMESPACE`` or ``VAULT_NAMESPACE`` in the environment, or none.
        mount: Where the database secrets engine is mounted.
        timeout: Seconds, or a timedelta, one request may take as a whole; closing takes no longer either.
        http_client: Makes the httpx client, as for `VaultDatabase`.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is missing or empty, or secrets would leave without TLS.
    """

    def __init__(
        self,
        role: str,
        *,
        address: str | None = None,
        auth: VaultAuth | str | None = None,
        namespace: str | None = None,
        mount: str = "database",
        timeout: float | timedelta = 10.0,
        http_client: Callable[[], httpx.AsyncClient] | None = None,
        clock: Clock | None = None,
    ) -> None:
        mount = parse_path("VaultStaticRole", "mount", mount)
        self._path: Final = f"{mount}/static-creds/{_parse_name('VaultStaticRole', role)}"
        super().__init__(
            address=address, auth=auth, namespace=namespace, timeout=timeout, http_client=http_client, clock=clock
        )
        self._latest: tuple[str, datetime] | None = None  # the password, and when it was first said to be due

    def __repr__(self) -> str:
        return f"<VaultStaticRole {self._path} at {self._vault.where}>"

    @clears_frames
    async def fetch(self) -> Credential:
        """Return the password that is set now.

        Raises:
            ProviderError: Vault gave none; ``retryable`` is False if it refused for good.
            ProviderTimeout: It did not answer in time.
        """
        self._vault.leave_parent()
        _, answer = await self._vault.read(self._path, await self._vault.token(), "check role and mount")
        data = object_in(answer.members, "data")
        user, password, ttl = text_in(data, "username"), text_in(data, "password"), life_of(data.get("ttl"))
        if user is None or password is None or ttl is None:
            raise ProviderError(
                f"vault: {self._path} gave no user and password with a ttl; "
                "is that a static role of a database secrets engine?",
                retryable=False,
            )
        due = self._due(password, answer.requested_at, answer.requested_at + ttl)
        refresh_at = max(due + _ROUNDED_OFF, answer.requested_at + _VAULTS_INTERVAL)
        return _credential(self._path, password, user=user, refresh_at=refresh_at, expires_at=due + _ROTATION_GRACE)

    def _due(self, password: str, requested_at: datetime, due: datetime) -> datetime:
        """Return when the password is due for rotation: now, if it was due before and is still there.

        Where a role is rotated on a schedule, Vault names the rotation after the next while the next is overdue
        (hashicorp/vault-secrets-operator #730). After some time that is believed: the schedule has been changed.
        """
        if self._latest is not None and self._latest[0] == password:
            earlier = self._latest[1]
            if earlier <= requested_at < earlier + _ROTATION_GRACE:
                return requested_at
        self._latest = (password, due)
        return due


class VaultKV(_Provider):
    """A provider of a user and password that somebody has put into Vault's key/value store.

    Args:
        path: The secret, below the mount and without ``data/``: ``"apps/billing/db"``.
        address: Of Vault; None: ``BAO_ADDR`` or ``VAULT_ADDR`` in the environment.
        auth: How to log in, or a token; None: ``BAO_TOKEN`` or ``VAULT_TOKEN`` in the environment.
        namespace: The namespace; None: ``BAO_NAMESPACE`` or ``VAULT_NAMESPACE`` in the environment, or none.
        mount: Where the store is mounted.
        kv_version: Which kind of store: 2 keeps versions, 1 does not.
        username_field: The field with the user; None: the connection's own user.
        password_field: The field with the password.
        refresh_every: Seconds, or a timedelta, after which a manager looks for a change; None: only when the server
            refuses the password. Less than a second counts as one.
        timeout: Seconds, or a timedelta, one request may take as a whole; closing takes no longer either.
        http_client: Makes the httpx client, as for `VaultDatabase`.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is missing or empty, or secrets would leave without TLS.
    """

    def __init__(
        self,
        path: str,
        *,
        address: str | None = None,
        auth: VaultAuth | str | None = None,
        namespace: str | None = None,
        mount: str = "secret",
        kv_version: Literal[1, 2] = 2,
        username_field: str | None = "username",
        password_field: str = "password",  # noqa: S107 - the name of a field
        refresh_every: float | timedelta | None = 300.0,
        timeout: float | timedelta = 10.0,
        http_client: Callable[[], httpx.AsyncClient] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if kv_version not in (1, 2):
            raise ValueError(f"VaultKV: kv_version must be 1 or 2, not {kv_version!r}")
        check_text("VaultKV", "username_field", username_field)
        require_text("VaultKV", "password_field", password_field)
        mount, below = parse_path("VaultKV", "mount", mount), parse_path("VaultKV", "path", path)
        self._path: Final = f"{mount}/data/{below}" if kv_version == 2 else f"{mount}/{below}"
        super().__init__(
            address=address, auth=auth, namespace=namespace, timeout=timeout, http_client=http_client, clock=clock
        )
        self._kv_version: Final = kv_version
        self._username_field: Final = username_field
        self._password_field: Final = password_field
        self._refresh_every: Final = (
            None
            if refresh_every is None
            else timedelta(seconds=parse_seconds("VaultKV", "refresh_every", refresh_every))
        )

    def __repr__(self) -> str:
        return f"<VaultKV {self._path} at {self._vault.where}>"

    @clears_frames
    async def fetch(self) -> Credential:
        """Return what the secret holds now.

        Raises:
            ProviderError: Vault gave nothing usable; ``retryable`` is False if it refused for good.
            ProviderTimeout: It did not answer in time.
        """
        self._vault.leave_parent()
        token = await self._vault.token()
        _, answer = await self._vault.read(self._path, token, "check path, mount and kv_version")
        data, version = object_in(answer.members, "data"), None
        waits = [] if self._refresh_every is None else [self._refresh_every]
        if self._kv_version == 2:
            metadata, data = object_in(data, "metadata"), object_in(data, "data")
            # The number alone starts again at 1 when all versions were deleted.
            if isinstance(metadata.get("version"), int) and (created_at := text_in(metadata, "created_time")):
                version = f"{metadata['version']} of {created_at}"
        elif hint := life_of(answer.members.get("lease_duration")):
            # The secret's own field ttl, or what the mount is configured with.
            waits.append(hint)
        return _credential(
            self._path,
            self._field(data, self._password_field, "password_field"),
            user=None
            if self._username_field is None
            else self._field(data, self._username_field, "username_field", "; None takes the connection's own user"),
            refresh_at=answer.requested_at + min(waits) if waits else None,
            version=version,
        )

    def _field(self, data: Mapping[str, object], name: str, argument: str, hint: str = "") -> str:
        value = text_in(data, name)
        if value is None:
            what = "is no text" if data.get(name) else "is not there, or empty"
            raise ProviderError(
                f"vault: field {name!r} of {self._path} {what}; check the secret, kv_version and {argument}{hint}",
                retryable=False,
            )
        return value


@dataclass(frozen=True, slots=True)
class _Lease:
    """A user that Vault has made.

    Args:
        identifier: The lease's id.
        token: The token it was taken with, and dies with.
        term: What it was first given for.
        is_renewable: Whether Vault renews it.
        credential: The user, with the latest end known.
    """

    identifier: str
    token: str = field(repr=False)
    term: timedelta
    is_renewable: bool
    credential: Credential


def _credential(
    path: str,
    password: str,
    *,
    user: str | None,
    expires_at: datetime | None = None,
    refresh_at: datetime | None = None,
    ends_session: bool = False,
    version: str | None = None,
) -> Credential:
    if flaw := password_flaw(password):
        raise ProviderError(f"vault: the password of {path} {flaw}", retryable=False)
    return Credential(
        password,
        user=user,
        expires_at=expires_at,
        refresh_at=refresh_at,
        ends_session=ends_session,
        version=version,
    )


def _earlier(end: datetime, other: datetime | None) -> datetime:
    return end if other is None else min(end, other)


def _parse_name(owner: str, role: object) -> str:
    path = parse_path(owner, "role", role)
    if "/" in path:
        raise ValueError(f"{owner}: role must be the name alone, not {role!r}; there is an argument for the mount")
    return path
