"""Keyword arguments that nobody takes: found when a pool is made, and not by its first connect."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import asyncpg

from asyncpool_creds._manager import TokenManager

__all__ = ["check_keywords"]

# What asyncpg's pool gives to each connect, besides what its user gave.
_FROM_THE_POOL: Final = ("loop", "connection_class", "record_class")
# libpq's words for what asyncpg calls otherwise: https://www.postgresql.org/docs/current/libpq-connect.html
_LIBPQ: Final[Mapping[str, str]] = {
    "dbname": "database",
    "username": "user",
    "hostname": "host",
    "sslmode": "ssl",
    "connect_timeout": "timeout",
    "application_name": "server_settings",
    "options": "server_settings",
}


def check_keywords(
    caller: Callable[..., object],
    keywords: Iterable[str],
    *,
    with_credentials: bool,
    connect: Callable[..., object] | None = None,
    elsewhere: Iterable[Callable[..., object]] = (),
) -> None:
    """Make sure that every connect will take `keywords`.

    Checked against the signature of the installed `asyncpg.connect`, or of `connect`; not where that ends in
    ``**keywords``, and so may take anything.

    Args:
        caller: The function of ours that was given them.
        keywords: Their names.
        with_credentials: Whether a password is given to each connect.
        connect: The user's own function; None: asyncpg's.
        elsewhere: Other functions of ours that they may have been meant for.

    Raises:
        TypeError: One is not taken, with advice about what was meant.
    """
    if connect is not None and not callable(connect):  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError(f"connect must be a coroutine function, as asyncpg.connect is, not {type(connect).__name__}")
    accepted = _accepted_by(asyncpg.connect if connect is None else connect)
    if accepted is None:
        return
    for keyword in keywords:
        if keyword not in accepted:
            raise TypeError(_advice(keyword, caller, accepted, elsewhere))
    needed = (*_FROM_THE_POOL, "password") if with_credentials else _FROM_THE_POOL
    missing = [name for name in needed if name not in accepted]
    if connect is not None and missing:
        raise TypeError(
            f"connect= takes no {missing[0]}=, and is called with {', '.join(f'{name}=' for name in needed)}; "
            "let it take what asyncpg.connect takes, as **keywords does"
        )


def _accepted_by(function: Callable[..., object]) -> frozenset[str] | None:
    """Return the keywords that `function` takes; None if that cannot be said."""
    names: set[str] = set()
    seen: set[int] = set()
    while id(function) not in seen:
        seen.add(id(function))
        try:
            parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        except (TypeError, ValueError):  # of something that is not written in Python
            return None
        names.update(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return frozenset(names)
        # A wrapper, such as a tracer's, hands on what it does not take for itself.
        function = getattr(function, "__wrapped__", function)
    return None


def _advice(
    keyword: str, caller: Callable[..., object], accepted: frozenset[str], elsewhere: Iterable[Callable[..., object]]
) -> str:
    here = accepted | _arguments_of(caller)
    meant_for = {name: owner.__name__ for owner in (*elsewhere, TokenManager) for name in _arguments_of(owner) - here}
    meant: str | None = _LIBPQ.get(keyword, keyword)
    if meant not in here and meant not in meant_for:
        meant = next(iter(difflib.get_close_matches(keyword, sorted({*here, *meant_for}), n=1)), None)
    text = f"{caller.__name__}() got an unexpected keyword argument {keyword!r}"
    if meant is None:
        return text
    if meant != keyword:
        text += f"; did you mean {meant!r}?"
    owner = meant_for.get(meant)
    if owner is None:
        return text
    text += f"{':' if meant == keyword else ''} {meant} is an argument of {owner}"
    return f"{text}: credentials=TokenManager(..., {meant}=...)" if owner == "TokenManager" else text


def _arguments_of(function: Callable[..., object]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
