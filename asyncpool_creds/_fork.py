"""Who has to know that the process was forked: sockets, tasks and timers belong to the parent."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Forkable", "watch"]


class Forkable(Protocol):
    """Something that must not go on as before in a forked child."""

    def _forked(self) -> None: ...


_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(owner: Forkable) -> None:
    """Call ``owner._forked()`` in every child forked while `owner` lives."""
    _watched.add(owner)


def _tell() -> None:
    for owner in tuple(_watched):
        owner._forked()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_tell)
