"""Checks of constructor arguments that several sources have in common."""

from __future__ import annotations

import math
from datetime import timedelta

__all__ = ["check_text", "parse_seconds"]


def check_text(owner: str, name: str, value: object) -> None:
    """Raise unless `value`, the argument `name` of `owner`, is None or a str with something in it.

    Raises:
        TypeError: It is neither.
        ValueError: It is empty.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} must be a str, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{owner}: {name} is empty; is an environment variable missing?")


def parse_seconds(owner: str, name: str, value: float | timedelta) -> float:
    """Return the argument `name` of `owner` as seconds.

    Raises:
        TypeError: It is neither a number nor a timedelta.
        ValueError: It is not more than zero, or not finite.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{owner}: {name} must be a number of seconds or a timedelta, not {type(value).__name__}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{owner}: {name} must be more than zero and finite, not {value!r}")
    return float(seconds)
