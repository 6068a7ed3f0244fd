"""What a storage that fails says and leaves in a traceback: no tokens."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from asyncpool_creds._tracebacks import clear_frames

__all__ = ["quotes", "without_locals"]

_WORD: Final = re.compile(r"[\w.~+/=-]{8,}")


@contextmanager
def without_locals() -> Generator[None]:
    """Empty the frames of whatever fails in here: what is read or written passes through many, foreign ones too."""
    outside = sys.exception()
    try:
        yield
    except BaseException as error:
        # A cancellation may have the failure that it met as its cause.
        clear_frames(error, outside=outside)
        raise


def quotes(complaint: str, text: str) -> bool:
    """Return whether a foreign complaint repeats anything of a text that holds secrets, however much it cuts off."""
    return any(word in text for word in _WORD.findall(complaint))
