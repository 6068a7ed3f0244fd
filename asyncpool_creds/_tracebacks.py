"""What a traceback may give away: frames are emptied of what their locals hold, and named by file and line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import opcode
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar, cast

__all__ = ["ForeignError", "class_and_place", "clear_frames", "clears_frames", "place_of", "without_baggage"]

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, object]])

_YIELD: Final = opcode.opmap["YIELD_VALUE"]
_CAN_BE_SUSPENDED: Final = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class ForeignError(Exception):
    """Stands for an exception of somebody else's that carries what it was about, such as a request with its headers.

    Its text is the class and the place of the other one, its traceback is that one's.
    """


def clears_frames(function: F) -> F:
    """Have an async function leave no locals in the traceback of what it raises, its own arguments included."""

    @functools.wraps(function)
    async def cleared(*args: object, **kwargs: object) -> object:
        outside = sys.exception()
        running = function(*args, **kwargs)
        del args, kwargs  # this frame is the one that cannot be emptied while it runs
        try:
            return await running
        except BaseException as error:
            clear_frames(error, outside=outside)
            raise

    return cast("F", cleared)


def clear_frames(error: BaseException, *, outside: BaseException | None = None) -> None:
    """Empty the frames through which `error`, its causes and its contexts came: tools that log locals find none.

    A frame that is still running keeps its own, and so does one that is suspended.

    Args:
        error: The exception.
        outside: What was being handled before whatever failed began (`sys.exception()`): not ours to empty.
    """
    for one in _chain(error, outside):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            _clear(frame)


def place_of(error: BaseException) -> str | None:
    """Return where `error` was raised, such as ``tokens.py:9 in parse``; None where that is not known."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return None
    frame, line = frames[-1]
    return f"{Path(frame.f_code.co_filename).name}:{line} in {frame.f_code.co_name}"


def class_and_place(error: BaseException) -> str:
    """Return what may be told of any exception, such as ``KeyError at tokens.py:9 in parse``: never its text."""
    place = place_of(error)
    return type(error).__name__ if place is None else f"{type(error).__name__} at {place}"


def without_baggage(error: Exception) -> Exception:
    """Return `error`, or a `ForeignError` in its place if it, or what led to it, has more than a text to show.

    Attributes of an exception are pickled, and shown by some error trackers: a request with its headers among them.
    """
    if not any(vars(one).keys() - {"__notes__"} for one in _chain(error, None)):
        return error
    return ForeignError(class_and_place(error)).with_traceback(error.__traceback__)


def _clear(frame: FrameType) -> None:
    code = frame.f_code
    if code.co_flags & _CAN_BE_SUSPENDED and code.co_code[frame.f_lasti] == _YIELD:
        # An error that somebody keeps and raises later may come from a task that goes on: before 3.13, emptying the
        # frame of a suspended coroutine would end it.
        return
    with contextlib.suppress(RuntimeError):  # it is running
        frame.clear()


def _chain(error: BaseException, outside: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and every exception that its traceback would show, except `outside` and what led to it."""
    seen: set[int] = {id(outside)}
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
        if isinstance(one, BaseExceptionGroup):
            waiting += cast("BaseExceptionGroup[BaseException]", one).exceptions
