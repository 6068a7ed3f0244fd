"""Where tokens are kept, so that one that is good only once is never used twice and a fleet can share what it has."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol, Self, cast, runtime_checkable

from asyncpool_creds._credential import Credential, Sealed, never_pickled
from asyncpool_creds.storage.memory import MemoryStorage

__all__ = ["MemoryStorage", "SpentMarks", "StoredTokens", "TokenStorage"]

FORMAT: Final = 1
# Far more than tokens need, and little enough to be read and parsed: whatever is longer was not written by a storage.
LONGEST_TEXT: Final = 1_048_576


class UnreadableTokensError(ValueError):
    """What is stored makes no sense. This says where it is and what to do, and nothing of what was read."""


class LaterFormatError(UnreadableTokensError):
    """What is stored was written by a later version of asyncpool_creds: it is neither read nor overwritten."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} was written by a later version of asyncpool_creds: install that version here, or keep the tokens "
            "of this one in a place of their own; nothing is read or overwritten"
        )


_SEAL: Final = Sealed("StoredTokens are not copied field by field, since that would show them: use to_json()")


@never_pickled("StoredTokens cannot be pickled: write down what to_json() returns, where nobody else reads it")
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTokens:
    """What is kept between two fetches, immutable.

    No secret is part of ``repr``. Only `to_json` writes them down: ``dataclasses.asdict``, ``astuple`` and ``pickle``
    refuse, a copy is the tokens themselves, and ``dataclasses.replace`` works.

    Args:
        refresh_token: The refresh token to use next. None: there is none, or the last one is
            spent and its successor was lost.
        expires_at: Aware datetime from which the issuer refuses the refresh token; None: not known.
        credential: What came with it, for others who share the storage.
        obtained_at: Aware datetime at which the request for it began.
        is_being_spent: Set before a refresh token that may be good once only is sent. Where it is still
            set later, whoever sent it has died, and whether the issuer has seen the token is not known.
        is_reusable: The issuer was seen to leave the refresh token as it is.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The token is empty, or the datetime is naive.
    """

    # First, so that nothing was copied before it.
    seal: object = field(default=_SEAL, init=False, repr=False, compare=False)
    refresh_token: str | None = field(default=None, repr=False)
    expires_at: datetime | None = None
    credential: Credential | None = None
    obtained_at: datetime | None = None
    is_being_spent: bool = False
    is_reusable: bool = False

    def __post_init__(self) -> None:
        token, credential = self.refresh_token, self.credential
        if token is not None and not isinstance(token, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"StoredTokens: refresh_token must be a str or None, not {type(token).__name__}")
        if token == "":
            raise ValueError("StoredTokens: refresh_token is empty; None says that there is none")
        if credential is not None and not isinstance(credential, Credential):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"StoredTokens: credential must be a Credential or None, not {type(credential).__name__}")
        for name in ("expires_at", "obtained_at"):
            object.__setattr__(self, name, _aware_utc(name, getattr(self, name)))

    def to_json(self) -> str:
        """Return everything, secrets included, for a storage to write down."""
        document: dict[str, object] = {
            "format": FORMAT,
            "refresh_token": self.refresh_token,
            "expires_at": _to_text(self.expires_at),
            "obtained_at": _to_text(self.obtained_at),
            "is_being_spent": self.is_being_spent,
            "is_reusable": self.is_reusable,
        }
        if (credential := self.credential) is not None:
            document["credential"] = {
                "password": credential.password,
                "user": credential.user,
                "expires_at": _to_text(credential.expires_at),
                "refresh_at": _to_text(credential.refresh_at),
                "ends_session": credential.ends_session,
                "version": credential.version,
            }
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return what `to_json` wrote; members it does not know are left out.

        Raises:
            ValueError: It is not what `to_json` wrote, or a later version of it wrote it, or it is longer
                than 1 MiB. What it is, is not told: it may be a secret.
        """
        tokens = cls._read(text)
        if tokens is None:
            if is_later_format(text):
                raise LaterFormatError("what is stored")
            raise UnreadableTokensError("these are no stored tokens, or damaged ones; delete them, and log in again")
        return tokens

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @classmethod
    def _read(cls, text: str | bytes) -> Self | None:
        if len(text) > LONGEST_TEXT:
            return None
        # The exceptions quote what they were given, so none gets out of here.
        try:
            document = _members(json.loads(text))
            if document["format"] != FORMAT:
                return None
            credential = document.get("credential")
            return cls(
                refresh_token=cast("str | None", document["refresh_token"]),
                expires_at=_from_text(document["expires_at"]),
                credential=None if credential is None else _credential(_members(credential)),
                obtained_at=_from_text(document["obtained_at"]),
                is_being_spent=document["is_being_spent"] is True,
                is_reusable=document["is_reusable"] is True,
            )
        except (KeyError, TypeError, ValueError, RecursionError):
            return None


@runtime_checkable
class TokenStorage(Protocol):
    """Keeps tokens by name.

    Whoever exchanges a refresh token does all of it under the lock: load, exchange, save, and
    only then use what came::

        async with storage.lock(key):
            stored = await storage.load(key)
            fresh = await exchange(stored)
            await storage.save(key, fresh)

    It may also have `SpentMarks`.
    """

    async def load(self, key: str) -> StoredTokens | None:
        """Return what was saved last under `key`; None: nothing is there."""
        ...

    async def save(self, key: str, tokens: StoredTokens) -> None:
        """Keep `tokens` in place of what was there; on return they are safe."""
        ...

    async def delete(self, key: str) -> None:
        """Forget what was saved under `key`; that nothing was is no error."""
        ...

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that something is saved under and that begin with `prefix`, sorted."""
        ...

    def lock(self, key: str) -> AbstractAsyncContextManager[None]:
        """Return the lock of `key`: one holder at a time among all who share this storage.

        It is not reentrant. Cancelling one who waits for it takes nothing from the others.
        """
        ...


@runtime_checkable
class SpentMarks(Protocol):
    """What a `TokenStorage` may have besides: a mark for each key that is kept apart from the tokens.

    A provider that was made with a refresh token saves a mark before it sends that token for the first time. Where the
    tokens are lost and the mark is not, the provider says that a login is needed, instead of sending it again.
    A mark gives away nothing about the token. It is not among `TokenStorage.keys`, and outlives
    `TokenStorage.delete`. A storage without these methods works, without marks.
    """

    async def load_mark(self, key: str) -> str | None:
        """Return the mark of `key`; None: there is none."""
        ...

    async def save_mark(self, key: str, mark: str | None) -> None:
        """Keep `mark` in place of what was there, for as long as can be; None: there is none any more."""
        ...


def is_later_format(text: str | bytes) -> bool:
    """Return whether a later version wrote this, as far as this one can tell."""
    if len(text) > LONGEST_TEXT:
        return False
    try:
        number = _members(json.loads(text)).get("format")
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(number, int) and not isinstance(number, bool) and number > FORMAT


def _aware_utc(name: str, moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"StoredTokens: {name} must be a datetime or None, not {type(moment).__name__}")
    if moment.utcoffset() is None:
        raise ValueError(f"StoredTokens: {name} is naive; give it a time zone, as in datetime.now(timezone.utc)")
    return moment.astimezone(UTC)


def _credential(document: dict[str, object]) -> Credential:
    return Credential(
        cast("str", document["password"]),
        user=cast("str | None", document["user"]),
        expires_at=_from_text(document["expires_at"]),
        refresh_at=_from_text(document["refresh_at"]),
        ends_session=document["ends_session"] is True,
        version=cast("str | None", document["version"]),
    )


def _members(document: object) -> dict[str, object]:
    if not isinstance(document, dict):
        raise TypeError
    return cast("dict[str, object]", document)


def _to_text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _from_text(text: object) -> datetime | None:
    return None if text is None else datetime.fromisoformat(cast("str", text))
