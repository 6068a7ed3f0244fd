"""The check that RDS and Aurora DSQL make of an IAM token: who signed it, with what, for whom and until when."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias
from urllib.parse import parse_qsl, quote, urlsplit

from asyncpool_creds import Clock

__all__ = ["SigV4Verifier", "TokenService"]

TokenService: TypeAlias = Literal["rds-db", "dsql"]

_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_TERMINATOR: Final = "aws4_request"
_EMPTY_BODY: Final = hashlib.sha256(b"").hexdigest()
# The longest life of a presigned request (AWS IAM User Guide, "Authentication methods", query parameters): a week.
_LONGEST_LIFE: Final = 604_800
# How far ahead of the server's the signer's clock may be (same guide: requests are good within five minutes).
_SKEW: Final = timedelta(minutes=5)


class SigV4Verifier:
    """Judges IAM tokens as the database would: recomputes the signature, and looks at what was signed.

    A token of RDS or DSQL is a presigned ``GET`` request without its scheme (AWS Signature Version 4, query
    parameters). It is good for as long as it says, and no longer than the temporary credentials that signed it.

    ``TokenDoor(server, verifier.verify)`` is a PostgreSQL with IAM authentication. What is public may be changed at
    any time.

    Args:
        service: Whose tokens: ``"rds-db"`` (RDS, Aurora, RDS Proxy) or ``"dsql"``.
        region: The region that tokens must be signed for; None: any.
        host: The host name that they must be for; None: any.
        port: The port that RDS tokens must be for; None: any. DSQL tokens name none.
        clock: Where the time comes from; the machine's clocks if not given.

    Attributes:
        service: See above.
        region: See above.
        host: See above.
        port: See above.
    """

    def __init__(
        self,
        service: TokenService = "rds-db",
        *,
        region: str | None = None,
        host: str | None = None,
        port: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        if service not in ("rds-db", "dsql"):
            raise ValueError(f"SigV4Verifier: service must be 'rds-db' or 'dsql', not {service!r}")
        self.service: TokenService = service
        self.region: str | None = region
        self.host: str | None = host
        self.port: int | None = port
        self._time = time.time if clock is None else clock.time
        self._keys: dict[str, _Key] = {}

    def add_key(
        self,
        access_key: str,
        secret_key: str,
        *,
        session_token: str | None = None,
        expires_at: datetime | None = None,
    ) -> None:
        """Take tokens signed with this key; one that is known already is replaced.

        Args:
            access_key: The access key id, which tokens state.
            secret_key: The secret that belongs to it.
            session_token: Of temporary credentials; tokens must carry the same.
            expires_at: Aware datetime at which the credentials end; None: never.

        Raises:
            ValueError: `expires_at` is naive.
        """
        if expires_at is not None and expires_at.utcoffset() is None:
            raise ValueError("SigV4Verifier: expires_at is a naive datetime; give it a time zone")
        self._keys[access_key] = _Key(secret_key, session_token, expires_at)

    def revoke_key(self, access_key: str) -> None:
        """Refuse, from now on, what was signed with this key."""
        self._keys.pop(access_key, None)

    def verify(self, user: str, token: str) -> str | None:
        """Return None if the database would let `user` in with `token`, else the reason why not."""
        try:
            request = _Presigned.parse(token)
        except _MalformedError as error:
            return f"no presigned request: {error}"
        if request.service != self.service:
            return f"signed for the service {request.service!r}, not {self.service!r}"
        return self._check_signature(request) or self._check_time(request) or self._check_purpose(request, user)

    def _check_signature(self, request: _Presigned) -> str | None:
        key = self._keys.get(request.access_key)
        if key is None:
            return "unknown access key"
        if not _is_same(request.parameters.get("X-Amz-Security-Token", ""), key.session_token or ""):
            return "not the session token of this access key"
        if not _is_same(request.sign(key.secret), request.parameters["X-Amz-Signature"]):
            return "the signature does not match"
        if key.expires_at is not None and self._now() >= key.expires_at:
            return "the credentials that signed it have expired"
        return None

    def _check_time(self, request: _Presigned) -> str | None:
        if request.signed_at > self._now() + _SKEW:
            return "signed in the future"
        if self._now() >= request.signed_at + timedelta(seconds=request.life):
            return "expired"
        return None

    def _check_purpose(self, request: _Presigned, user: str) -> str | None:
        if self.region is not None and request.region != self.region:
            return f"signed for the region {request.region!r}, not {self.region!r}"
        if self.host is not None and request.host != self.host.lower():
            return f"for the host {request.host!r}, not {self.host!r}"
        action = request.parameters.get("Action")
        if self.service == "dsql":
            # The user is not named; whether it is the administrator is (Aurora DSQL User Guide, "Database roles
            # and IAM authentication").
            expected = "DbConnectAdmin" if user == "admin" else "DbConnect"
            return None if action == expected else f"for the action {action!r}, not {expected!r}"
        if action != "connect":
            return f"for the action {action!r}, not 'connect'"
        if self.port is not None and request.port != self.port:
            return f"for the port {request.port}, not {self.port}"
        named = request.parameters.get("DBUser")
        return None if named == user else f"for the user {named!r}, not {user!r}"

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._time(), UTC)

    def __repr__(self) -> str:
        where = "" if self.host is None else f" at {self.host}"
        return f"<SigV4Verifier {self.service}{where} {len(self._keys)} keys>"


class _MalformedError(Exception):
    """What was sent is no token."""


@dataclass(frozen=True, slots=True)
class _Key:
    secret: str = field(repr=False)
    session_token: str | None = field(repr=False)
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Presigned:
    """A presigned request, taken apart."""

    authority: str
    host: str
    port: int | None
    parameters: dict[str, str] = field(repr=False)
    access_key: str
    day: str
    region: str
    service: str
    signed_at: datetime
    life: int

    @classmethod
    def parse(cls, token: str) -> _Presigned:
        """Return the request; the error says what is wrong with it, and quotes nothing of it."""
        try:
            # The token has no scheme, without which host:port would be read as one.
            url = urlsplit(f"https://{token}")
            host, port = url.hostname, url.port
            pairs = parse_qsl(url.query, keep_blank_values=True, strict_parsing=True)
        except ValueError:
            raise _MalformedError("it is no URL with a query") from None
        parameters = dict(pairs)
        if len(parameters) != len(pairs):
            raise _MalformedError("a parameter comes twice")
        if not token.isascii() or not host or url.path != "/" or url.fragment:
            raise _MalformedError("it is not about the path / of a host")
        try:
            algorithm, date = parameters["X-Amz-Algorithm"], parameters["X-Amz-Date"]
            access_key, day, region, service, terminator = parameters["X-Amz-Credential"].split("/")
            signed_at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            life = int(parameters["X-Amz-Expires"])
            headers, _ = parameters["X-Amz-SignedHeaders"], parameters["X-Amz-Signature"]
        except (KeyError, ValueError):
            raise _MalformedError("a parameter of the signature is missing, or malformed") from None
        if algorithm != _ALGORITHM or terminator != _TERMINATOR or headers != "host" or not date.startswith(f"{day}T"):
            raise _MalformedError("the parameters of the signature are not those of Signature Version 4")
        if not 0 < life <= _LONGEST_LIFE:
            raise _MalformedError("X-Amz-Expires is out of range")
        # As a client sends it: the port of https is left out.
        authority = host if port in (None, 443) else f"{host}:{port}"
        return cls(authority, host, port, parameters, access_key, day, region, service, signed_at, life)

    def sign(self, secret: str) -> str:
        """Return the signature that this request has if it was signed with `secret` ("Create a signed request")."""
        signed = sorted((name, value) for name, value in self.parameters.items() if name != "X-Amz-Signature")
        query = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in signed)
        canonical = "\n".join(("GET", "/", query, f"host:{self.authority}", "", "host", _EMPTY_BODY))
        scope = f"{self.day}/{self.region}/{self.service}/{_TERMINATOR}"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = "\n".join((_ALGORITHM, self.parameters["X-Amz-Date"], scope, digest))
        key = f"AWS4{secret}".encode()
        for part in (self.day, self.region, self.service, _TERMINATOR):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, to_sign.encode(), "sha256").hex()


def _is_same(one: str, other: str) -> bool:
    # As bytes: strings with anything but ASCII in them are refused by compare_digest().
    return hmac.compare_digest(one.encode(), other.encode())
