"""When a token says that it ends: JWT ``exp`` and SigV4 ``X-Amz-Expires``, read but never verified."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, cast
from urllib.parse import parse_qs

__all__ = ["LONGEST_PASSWORD", "Validity", "read_validity"]

# In bytes: PG_MAX_AUTH_TOKEN_LENGTH (PostgreSQL, src/include/libpq/auth.h); at more, a server ends the connection.
LONGEST_PASSWORD: Final = 65535


@dataclass(frozen=True, slots=True)
class Validity:
    """The span a token claims for itself, in aware UTC datetimes."""

    expires_at: datetime
    issued_at: datetime | None = None

    def anchored_at(self, requested_at: datetime) -> datetime:
        """Return the expiry by our own clock, for a token asked for at `requested_at`.

        A token that says how long it lives is trusted for that long from the moment we asked,
        so that a host whose clock is behind does not hand it out after the server has stopped
        taking it; never for longer than its absolute expiry, since it may have been cached.
        """
        if self.issued_at is None or self.expires_at - requested_at <= self.expires_at - self.issued_at:
            return self.expires_at
        return requested_at + (self.expires_at - self.issued_at)


def read_validity(token: str) -> Validity | None:
    """Return the span that `token` claims, or None if it is opaque or claims none.

    Reads the ``exp`` and ``iat`` claims of a JSON Web Token (RFC 7519 section 4.1) and
    the ``X-Amz-Date`` and ``X-Amz-Expires`` parameters of a presigned AWS request (RDS
    and DSQL tokens; Signature Version 4 for query strings). The signature is not
    checked: that is the server's business. What is too long for a password is not read.
    """
    if len(token) > LONGEST_PASSWORD:
        return None
    return _read_jwt(token) or _read_sigv4(token)


def _read_jwt(token: str) -> Validity | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    payload = parts[1]
    try:
        decoded: object = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    if not isinstance(decoded, dict):
        return None
    claims = cast("dict[str, object]", decoded)
    expires_at = _numeric_date(claims.get("exp"))
    if expires_at is None:
        return None
    issued_at = _numeric_date(claims.get("iat"))
    if issued_at is not None and issued_at >= expires_at:
        issued_at = None
    return Validity(expires_at, issued_at)


def _numeric_date(value: object) -> datetime | None:
    """Return a NumericDate (RFC 7519 section 2); issuers send ints, floats and digits in strings."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        seconds = float(value)
        if not math.isfinite(seconds):
            return None
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _read_sigv4(token: str) -> Validity | None:
    # The token is a URL without its scheme, so urlsplit() would misread host:port.
    _, question_mark, query = token.partition("?")
    if not question_mark:
        return None
    parameters = parse_qs(query)
    try:
        signed_at = datetime.strptime(parameters["X-Amz-Date"][-1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        life = timedelta(seconds=int(parameters["X-Amz-Expires"][-1]))
        return Validity(signed_at + life, signed_at) if life > timedelta() else None
    except (KeyError, ValueError, OverflowError):
        return None
