"""The sources that the contract tests are run with: one module for each file in ``asyncpool_creds/providers``.

A module has ``CASES``, from a name to a function that makes a `Case`, and ``LIVES``, from a name to one that makes a
`Life`; each is an async context manager. A case is a source that can be made to fail and to hang. A life is a source
together with a real PostgreSQL that takes its credentials for a few seconds each.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeAlias

from asyncpool_creds import BindableProvider, CredentialFunction, CredentialProvider
from asyncpool_creds.testing.postgres import PostgresServer

Source: TypeAlias = CredentialProvider | CredentialFunction


@dataclass
class Case:
    """A source and what can be done to it.

    Args:
        source: The source; its credentials live five minutes, or for ever.
        fail: From now on, every fetch fails, with an error that has a cause.
        hang: From now on, no fetch ends.
        hangs: Returns once a fetch hangs.
        heal: From now on, fetches work again; those that hang may end.
        lives_for_ever: True if its credentials have no end.
        fails_for_good: True if nothing but a person ends the failure that `fail` begins.
    """

    source: Source
    fail: Callable[[], Awaitable[None]]
    hang: Callable[[], None]
    hangs: Callable[[], Awaitable[None]]
    heal: Callable[[], Awaitable[None]]
    lives_for_ever: bool = False
    fails_for_good: bool = False


@dataclass
class Life:
    """A source and a database that takes what it gives.

    Args:
        dsn: Of the real PostgreSQL, or of a door in front of it that refuses what has expired.
        credentials: The source.
        turn: Does what makes the next credential differ from this one, if time alone does not
            (a secret is rotated, a file is written).
    """

    dsn: str
    credentials: CredentialProvider | BindableProvider | CredentialFunction
    turn: Callable[[], Awaitable[None]] | None = None


MakeCase: TypeAlias = Callable[[], AbstractAsyncContextManager[Case]]
MakeLife: TypeAlias = Callable[[], AbstractAsyncContextManager[Life]]


@functools.cache
def database() -> PostgresServer:
    """Return the PostgreSQL behind the doors of all lives: one for a whole test run, in which each has its role."""
    server = PostgresServer()
    server.start()
    atexit.register(server.stop)
    return server


def all_cases() -> dict[str, MakeCase]:
    """Return the cases of every module here, by name."""
    return {name: make for module in _modules() for name, make in getattr(module, "CASES", {}).items()}


def all_lives() -> dict[str, MakeLife]:
    """Return the lives of every module here, by name."""
    return {name: make for module in _modules() for name, make in getattr(module, "LIVES", {}).items()}


def _modules() -> list[object]:
    return [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
