"""What a traceback may give away: frames are emptied of what their locals hold, and named by file and line."""

from __future__ import annotations

import contextlib
import inspect
import opcode
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

__all__ = ["clear_frames", "place_of"]

_YIELD: Final = opcode.opmap["YIELD_VALUE"]
_CAN_BE_SUSPENDED: Final = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


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
            waiting += one.exceptions
