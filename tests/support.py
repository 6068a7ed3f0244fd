"""What tests share. Above all the planted secret: every fake password carries a marker that may show up nowhere.

Make passwords and tokens with `secret`; what conftest.py sees by itself (log records, events, credentials,
exceptions caught by ``pytest.raises``, output) is searched without being asked; `assert_no_secret` is for the rest.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import pickle
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from asyncpool_creds.testing import VirtualClock

# Letters only: it looks the same in a URL, in SQL and in JSON.
MARKER = "PLANTEDSECRET"


def secret(name: str = "token") -> str:
    """Return a fake password or token that tells itself from others by `name`."""
    return f"{MARKER}-{name}"


def assert_no_secret(*things: object) -> None:
    """Fail if the marker can be read from any of `things`, in any way one of them ends up in a log."""
    for thing in things:
        leak = find_secret(thing)
        assert leak is None, f"the planted secret is in {leak}"


class FakeClock:
    """Stands still until it is set; both of its clocks show the same."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def after(self, seconds: float) -> datetime:
        return datetime.fromtimestamp(self.now + seconds, UTC)


def tasks_of_ours(loop: asyncio.AbstractEventLoop | None = None) -> set[asyncio.Task[object]]:
    """Return the tasks of `loop`, or of the running one, that this package has started and that still run."""
    return {task for task in asyncio.all_tasks(loop) if task.get_name().startswith("asyncpool_creds")}


class CountingClock(VirtualClock):
    """Counts in `wakeups` how often its loop was asleep and a timer woke it."""

    wakeups = 0

    def advance(self, seconds: float) -> None:
        self.wakeups += 1
        super().advance(seconds)


def find_secret(thing: object) -> str | None:
    """Return where in `thing` the marker is, in words; None if it is nowhere."""
    for where, text in _texts(thing, type(thing).__name__, set()):
        if any(form in text for form in _FORMS):
            return where
    return None


def _texts(thing: object, where: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Yield everything that printing, logging, walking or pickling `thing` shows."""
    if isinstance(thing, str):
        yield where, thing
        return
    if isinstance(thing, (bytes, bytearray)):
        yield where, bytes(thing).decode("latin-1")
        return
    if thing is None or isinstance(thing, (int, float)) or id(thing) in seen:
        return
    seen.add(id(thing))

    for render in (repr, str, format):
        yield f"{render.__name__}() of {where}", render(thing)
    parts: dict[str, Any] = {}
    if isinstance(thing, BaseException):
        yield f"traceback of {where}", "".join(traceback.format_exception(thing))
        parts = {"args": thing.args, "cause": thing.__cause__, "context": thing.__context__}
        parts |= vars(thing)  # __notes__ among them
        if isinstance(thing, BaseExceptionGroup):
            parts["exceptions"] = thing.exceptions
    elif isinstance(thing, logging.LogRecord):
        yield f"message of {where}", thing.getMessage()
        parts = {**vars(thing), "exc_info": thing.exc_info and thing.exc_info[1]}
    elif isinstance(thing, Mapping):
        parts = {f"key {number}": key for number, key in enumerate(thing)}
        parts |= {f"value {number}": value for number, value in enumerate(thing.values())}
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = {str(number): part for number, part in enumerate(thing)}
    for name, part in parts.items():
        yield from _texts(part, f"{name} of {where}", seen)
    with contextlib.suppress(Exception):  # most things refuse, a credential above all
        yield f"pickle of {where}", pickle.dumps(thing).decode("latin-1")


def _forms(marker: bytes) -> Iterable[str]:
    """The marker as it is, and as it looks inside base64 (Basic authentication, a JSON Web Token)."""
    yield marker.decode()
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + marker).decode()
        # The outer characters also hold bits of the neighbours.
        yield encoded[-(-offset * 8 // 6) : (offset + len(marker)) * 8 // 6]


_FORMS = tuple(_forms(MARKER.encode()))
