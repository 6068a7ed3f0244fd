"""Calls of functions that may block, in threads that hold up neither the event loop nor the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Final, Generic, ParamSpec, TypeVar

__all__ = ["BlockingCalls", "TooManyCallsHang"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

# Threads cannot be ended, so there is an end to making them: with the usual limit of 30 seconds for a fetch, that many
# have been given up after four minutes.
_MOST_THREADS: Final = 8


class TooManyCallsHang(Exception):
    """So many calls have not returned that no other is begun."""

    def __init__(self) -> None:
        super().__init__(f"{_MOST_THREADS} earlier calls have not returned")


class BlockingCalls(Generic[_T]):
    """Calls a function from an event loop, without waiting longer for it than the caller wants.

    Not a pool of threads: of those that anyio and asyncio share with the application, one that hangs would be missing
    there, and each is waited for when the process ends. These are daemon threads, so the end of the process does not
    wait for a call that hangs.
    """

    __slots__ = ("_function", "_given_up")

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._given_up: tuple[threading.Thread, ...] = ()

    async def call(self, name: str) -> _T:
        """Call the function and return what it returns, or raise what it raises.

        A cancellation ends the wait, not the thread: a late answer is dropped.

        Args:
            name: Of the thread.

        Raises:
            TooManyCallsHang: Eight calls that were given up have not returned.
        """
        self._given_up = tuple(thread for thread in self._given_up if thread.is_alive())
        if len(self._given_up) >= _MOST_THREADS:
            raise TooManyCallsHang
        call = _Call(self._function)
        executor = _OneThread(name)
        # Not a future of our own: a loop in virtual time stands still for what it knows to run in an executor.
        waiter = asyncio.get_running_loop().run_in_executor(executor, contextvars.copy_context().run, call)
        try:
            await waiter
        except asyncio.CancelledError:
            self._given_up += (executor.thread,)
            call.give_up()
            raise
        return call.outcome()


class _Call(Generic[_T]):
    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._answer: list[_T] = []
        self._error: BaseException | None = None
        self._given_up = False

    def __call__(self) -> None:
        # Kept here and not in the future, which takes no StopIteration.
        try:
            self._answer.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            self._error = error
        if self._given_up:
            self._drop()

    def outcome(self) -> _T:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # which would hold this frame, which holds it
        return self._answer.pop()

    def give_up(self) -> None:
        self._given_up = True
        self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(IndexError):  # there is none yet, or the other thread has dropped it
            answer = self._answer.pop()
            if inspect.iscoroutine(answer):
                answer.close()  # nobody will await it


class _OneThread(Executor):
    """Runs one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.thread: threading.Thread

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled

        def run() -> None:
            future.set_result(fn(*args, **kwargs))

        self.thread = threading.Thread(target=run, name=self._name, daemon=True)
        self.thread.start()
        return future
