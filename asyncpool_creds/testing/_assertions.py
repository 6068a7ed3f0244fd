"""Tokens that somebody else has signed, and the keys they are checked with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Assertion", "Signers"]


@dataclass(frozen=True, slots=True)
class Assertion:
    """What a signed token says.

    Args:
        issuer: Who signed it.
        subject: Of whom it speaks.
        audiences: For whom it is.
        id: Its own; empty: it has none.
    """

    issuer: str
    subject: str
    audiences: frozenset[str]
    id: str


class Signers:
    """Those whose signature counts.

    Args:
        name: The argument that `keys` came in, for messages.
        keys: Public keys, as PEM, by what their owners call themselves.

    Raises:
        ValueError: A key is none, or of a kind that is not known here.
    """

    def __init__(self, name: str, keys: Mapping[str, str] | None) -> None:
        self._keys: Final = {owner: _read_key(name, owner, key) for owner, key in (keys or {}).items()}
        self._used: set[tuple[str, str]] = set()

    @property
    def names(self) -> frozenset[str]:
        """Who they are."""
        return frozenset(self._keys)

    def read(self, token: str, now: float) -> Assertion | None:
        """Return what one of them has signed, if its time has come and is not over (RFC 7523 section 3)."""
        try:
            issuer = str(jwt.decode(token, options={"verify_signature": False}).get("iss"))
            key = self._keys.get(issuer)
            if key is None:
                return None
            claims = jwt.decode(
                token,
                key,
                algorithms=["RS256" if isinstance(key, rsa.RSAPublicKey) else "ES256"],
                options={
                    "require": ["exp", "sub"],
                    # PyJWT reads the machine's clock; we have our own.
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "verify_aud": False,
                },
            )
            audience = claims.get("aud", [])
            audiences = frozenset([audience] if isinstance(audience, str) else audience)
            is_good = float(claims["exp"]) > now >= float(claims.get("nbf", now))
        except (jwt.InvalidTokenError, TypeError, ValueError):
            return None
        return Assertion(issuer, claims["sub"], audiences, str(claims.get("jti", ""))) if is_good else None

    def use(self, assertion: Assertion) -> bool:
        """Return whether an assertion is used for the first time; one without an id always is."""
        use = (assertion.issuer, assertion.id)
        is_new = use not in self._used
        if assertion.id:
            self._used.add(use)
        return is_new


def _read_key(name: str, owner: str, text: str) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    try:
        key = serialization.load_pem_public_key(text.encode())
    except ValueError:
        key = None
    if isinstance(key, rsa.RSAPublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise ValueError(f"TokenIssuer: {name} takes public keys as PEM, RSA or P-256; that of {owner!r} is none of these")
