"""What those see who log the locals of a traceback: traceback's capture_locals, rich, Sentry."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping

from support import find_secret


def assert_no_secret_in_locals(error: BaseException, *, of_tests: str) -> None:
    """Fail if the planted secret is in a local of a frame through which `error`, or what led to it, came.

    Args:
        error: As it was caught.
        of_tests: ``__file__`` of the test, whose own locals do not count.
    """
    for one in _chain(error):
        for frame, line in traceback.walk_tb(one.__traceback__):
            code = frame.f_code
            if code.co_filename == of_tests:
                continue
            for name, value in frame.f_locals.items():
                leak = find_secret(_shown(value))
                assert leak is None, f"the planted secret is in {name} at {code.co_filename}:{line} ({code.co_name})"


def _shown(value: object) -> object:
    """Return what a tracker shows of a value: it looks into containers, and takes the repr of the rest."""
    if isinstance(value, Mapping):
        return {str(key): _shown(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_shown(part) for part in value]
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - an object that is not finished has no repr
        return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
            waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
