"""What one task waits for, and goes on with in the very moment in which it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar

__all__ = ["Handoff"]

ValueT = TypeVar("ValueT")


class Handoff(Generic[ValueT]):
    """An awaitable for one task, which is settled first and resumed when whoever settled it has nothing more to do.

    A future of asyncio's wakes its task in the next turn of the event loop: a system call away, in which everybody
    else has a turn too. This one can do so at once, from a callback of the loop. It has what `asyncio.Task` asks of
    whatever it awaits, and no more.

    Args:
        loop: The event loop of the task.
    """

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_error", "_is_done", "_loop", "_value")

    _value: ValueT

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._is_done = False
        self._error: BaseException | None = None
        self._callbacks: list[tuple[Callable[[Any], object], Context]] = []

    # -- for whoever has something to hand over

    def done(self) -> bool:
        """Return whether it is settled or cancelled."""
        return self._is_done

    def cancelled(self) -> bool:
        """Return whether the task was cancelled before there was anything."""
        return isinstance(self._error, asyncio.CancelledError)

    def settle(self, value: ValueT) -> None:
        """Hand `value` over; the task does not know yet."""
        self._value, self._is_done = value, True

    def fail(self, error: BaseException) -> None:
        """Hand over an error to be raised; the task does not know yet."""
        self._error, self._is_done = error, True

    def resume(self) -> None:
        """Let the task go on here and now, up to its next suspension.

        Only from a callback of the event loop: a task cannot run inside another's turn.
        """
        callbacks, self._callbacks = self._callbacks, []
        for callback, context in callbacks:
            context.run(callback, self)

    def resume_soon(self) -> None:
        """Let the task go on in the next turn of the event loop."""
        callbacks, self._callbacks = self._callbacks, []
        for callback, context in callbacks:
            self._loop.call_soon(callback, self, context=context)

    # -- for the task

    def __await__(self) -> Generator[Any, None, ValueT]:
        if not self._is_done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop."""
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Have `callback` called when the task is to go on: it is how that is done."""
        self._callbacks.append((callback, copy_context() if context is None else context))
        if self._is_done:
            self.resume_soon()

    def cancel(self, msg: object = None) -> bool:
        """Have the task raise `asyncio.CancelledError`, unless something was handed over already."""
        if self._is_done:
            return False
        self.fail(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        self.resume_soon()
        return True

    def result(self) -> ValueT:
        """Return what was handed over, or raise it."""
        if self._error is not None:
            raise self._error
        return self._value
