"""A task goes on in the very moment in which what it waits for is handed to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any, TypeAlias, TypeVar, cast

__all__ = ["hand_over"]

ValueT = TypeVar("ValueT")
_Callbacks: TypeAlias = Iterable[tuple[Callable[[Any], object], Context]]


def hand_over(waiter: asyncio.Future[ValueT], value: ValueT) -> None:
    """Settle `waiter`, and let the task that awaits it go on here and now, up to its next suspension.

    A future by itself wakes its task in the next turn of the event loop: a system call away, in which everybody else
    has a turn too. Only from a callback of the loop: a task cannot run inside another's turn.
    """
    # asyncio has no name for it; a future that hides who awaits it wakes him in its own time.
    waiting = tuple(cast("_Callbacks", getattr(waiter, "_callbacks", None) or ()))
    for callback, _ in waiting:
        waiter.remove_done_callback(callback)
    waiter.set_result(value)
    for callback, context in waiting:
        context.run(callback, waiter)
