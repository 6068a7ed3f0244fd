"""A credential: what the database asks for, and until when it is good."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from typing import Final, NoReturn, Self, TypeVar

from asyncpool_creds._expiry import LONGEST_PASSWORD, read_validity

__all__ = ["Credential", "Sealed", "never_pickled", "password_flaw", "text_flaw"]

_Class = TypeVar("_Class")

# Fingerprints are keyed and die with the process: a hash of a short password that
# anyone could recompute from a log would be the password itself, a little slower.
_FINGERPRINT_KEY: Final = os.urandom(32)


class Sealed:
    """A field that nobody can copy, so that whoever copies field by field gets an error instead of secrets.

    Args:
        message: What the error says.
    """

    __slots__ = ("_message",)

    def __init__(self, message: str) -> None:
        self._message = message

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(self._message)

    __deepcopy__ = __reduce__ = _refuse


def never_pickled(message: str) -> Callable[[type[_Class]], type[_Class]]:
    """Return a decorator for a class whose instances are not pickled, nor give their state to who asks for it.

    It stands above ``@dataclass``: CPython before 3.11.4 writes a ``__getstate__`` of its own over that of a frozen
    dataclass with slots (https://github.com/python/cpython/issues/104035).

    Args:
        message: What the TypeError says.
    """

    def refuse(_self: object) -> NoReturn:
        raise TypeError(message)

    def seal(cls: type[_Class]) -> type[_Class]:
        for name in ("__reduce__", "__getstate__"):
            setattr(cls, name, refuse)
        return cls

    return seal


_SEAL: Final = Sealed("a Credential is not copied field by field, since that would show its secret: read what you need")


@never_pickled("a Credential cannot be pickled: fetch it again where it is needed")
@dataclass(frozen=True, slots=True)
class Credential:
    """A user's password or token, immutable, with the time it ends.

    The secret is never part of ``repr`` or ``str``, and ``pickle`` and ``dataclasses.asdict`` refuse to copy it.

    Args:
        password: The password or token to give to the server.
        user: The user it belongs to; None if the connection's own user is meant.
        expires_at: Aware datetime from which the server refuses it; None: never.
        refresh_at: Aware datetime from which the source wants to be asked again
            (Entra's ``refresh_on``, Redshift's ``nextRefreshTime``, a share of a
            Vault lease); comes before any refresh threshold.
        ends_session: True if the server also ends, or cripples, the sessions opened
            with it when it expires (a Vault dynamic role is dropped).
        version: The source's own name for this secret (a Secrets Manager version
            id). Where two credentials both have one, it alone decides whether the
            secret is the same.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A datetime is naive; the password is empty, or longer than 65,535 bytes (PostgreSQL's own limit);
            password or user have characters that PostgreSQL cannot receive.
    """

    # First, so that nothing was copied before it.
    seal: object = field(default=_SEAL, init=False, repr=False, compare=False)
    password: str = field(repr=False)
    _: KW_ONLY
    user: str | None = None
    expires_at: datetime | None = None
    refresh_at: datetime | None = None
    ends_session: bool = False
    version: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.password, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Credential: password must be a str, not {type(self.password).__name__}")
        if not self.password:
            raise ValueError("Credential: password is empty; the source gave no token")
        if flaw := password_flaw(self.password):
            raise ValueError(f"Credential: password {flaw}")
        for name in ("user", "version"):
            value: object = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"Credential: {name} must be a non-empty str or None, not {type(value).__name__}")
        if self.user is not None and (flaw := text_flaw(self.user)):
            raise ValueError(f"Credential: user {flaw}")
        for name in ("expires_at", "refresh_at"):
            object.__setattr__(self, name, _aware_utc(name, getattr(self, name)))

    @classmethod
    def from_token(cls, token: str, *, user: str | None = None, requested_at: datetime | None = None) -> Self:
        """Return a credential whose expiry is read from the token itself.

        Understands JSON Web Tokens and the presigned requests that AWS uses as tokens;
        any other token gets ``expires_at=None``.

        Args:
            token: The token.
            user: The user it belongs to.
            requested_at: Aware datetime at which the request for it began; now, if
                not given. A life stated by the token is counted from here.
        """
        validity = read_validity(token) if isinstance(token, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if validity is None:
            return cls(token, user=user)
        anchor = _aware_utc("requested_at", requested_at) or datetime.now(UTC)
        return cls(token, user=user, expires_at=validity.anchored_at(anchor))

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that tell this secret from others within this process; safe to log."""
        return hashlib.blake2b(self.password.encode(), digest_size=4, key=_FINGERPRINT_KEY).hexdigest()

    def is_same_secret(self, other: Credential) -> bool:
        """Return whether `other` opens the same door: the same version, or the same user and password."""
        if self.version is not None and other.version is not None:
            return self.version == other.version and self.user == other.user
        return self.password == other.password and self.user == other.user

    def __repr__(self) -> str:
        user = "" if self.user is None else f"user={self.user!r}, "
        expiry = "never" if self.expires_at is None else self.expires_at.isoformat(timespec="seconds")
        return f"<Credential {self.fingerprint} {user}expires={expiry}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


def password_flaw(password: str) -> str | None:
    """Return why PostgreSQL cannot receive `password`, as the end of a sentence about it; None if it can."""
    too_long = f"has more than {LONGEST_PASSWORD} bytes, and PostgreSQL takes no more (PG_MAX_AUTH_TOKEN_LENGTH)"
    if len(password) > LONGEST_PASSWORD:
        return too_long
    return text_flaw(password) or (too_long if len(password.encode()) > LONGEST_PASSWORD else None)


def text_flaw(text: str) -> str | None:
    """Return why PostgreSQL cannot receive `text` as a name or password, as the end of a sentence; None if it can."""
    # Behind a NUL in a user, a server would read further parameters of the session.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "holds characters that no server accepts: a NUL, or a lone surrogate"
    return None


def _aware_utc(name: str, value: datetime | None) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} must be an aware datetime or None, not {type(value).__name__}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise ValueError(f"{name} is a naive datetime; give it a time zone, as in datetime.now(timezone.utc)")
    return value.astimezone(UTC)
