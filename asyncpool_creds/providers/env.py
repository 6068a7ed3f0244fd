"""Credentials from environment variables, and fixed ones: for tests, and for the way to something better."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Final, NoReturn

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential, password_flaw
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text

__all__ = ["Environment", "Static"]


class Environment:
    """A provider of the password or token in an environment variable, as it is at each fetch.

    The password never expires, unless it is a token that says otherwise. Line breaks at its end, which secrets tend to
    come with, are not part of it.

    Args:
        variable: The variable with the password; the default is the one that libpq reads.
        user: The database user to log in as; None: as `user_variable` says, or the connection's own.
        user_variable: A variable with the user.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty, is no name of a variable, or contradicts another.
    """

    def __init__(
        self,
        variable: str = "PGPASSWORD",
        *,
        user: str | None = None,
        user_variable: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        if variable is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError("Environment: variable must be a str, not None")
        for name, value in {"variable": variable, "user": user, "user_variable": user_variable}.items():
            check_text("Environment", name, value)
        for name in (variable, user_variable or ""):
            if "=" in name or "\0" in name:
                raise ValueError("Environment: the name of a variable contains neither '=' nor a NUL")
        if user is not None and user_variable is not None:
            raise ValueError("Environment: pass either user or user_variable")
        self._variable: Final = variable
        self._user: Final = user
        self._user_variable: Final = user_variable
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock

    def __repr__(self) -> str:
        return f"<Environment {self._variable}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Environment provider cannot be pickled: it would find another environment; make one there")

    @clears_frames
    async def fetch(self) -> Credential:
        """Return what the variables hold now.

        Raises:
            ProviderError: One is not set, or is empty or unusable; never retryable, since nobody but this process
                can set it.
        """
        user = self._user if self._user_variable is None else _value_of(self._user_variable)
        password = _value_of(self._variable)
        if flaw := password_flaw(password):
            raise ProviderError(f"environment: {self._variable} {flaw}", retryable=False)
        now = utc_now(self._clock)
        return Credential.from_token(password, user=user, requested_at=now)


class Static:
    """A provider of one password or token for ever.

    Args:
        password: The password. A token that says when it ends is believed.
        user: The database user to log in as; None: the connection's own.
        expires_at: Aware datetime from which the server refuses it, if the password does not say so itself.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The password is empty, or has characters that PostgreSQL cannot receive; `expires_at` is naive.
    """

    def __init__(self, password: str, *, user: str | None = None, expires_at: datetime | None = None) -> None:
        self._credential: Final = (
            Credential.from_token(password, user=user)
            if expires_at is None
            else Credential(password, user=user, expires_at=expires_at)
        )

    def __repr__(self) -> str:
        return f"<Static {self._credential!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Static provider holds a secret and cannot be pickled; make one where it is needed")

    async def fetch(self) -> Credential:
        """Return the credential."""
        return self._credential


def _value_of(variable: str) -> str:
    try:
        value = os.environ[variable].rstrip("\r\n")
    except KeyError as error:
        raise ProviderError(
            f"environment: {variable} is not set; set it before this process is started", retryable=False
        ) from error
    if not value:
        raise ProviderError(
            f"environment: {variable} is set, but empty; is the secret that it is filled from?", retryable=False
        )
    # What os.environ makes of bytes that it cannot decode.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ProviderError(f"environment: {variable} is not UTF-8 text; was a binary secret put in?", retryable=False)
    return value
