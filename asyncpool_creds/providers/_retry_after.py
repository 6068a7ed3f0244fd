"""What a server says of when to come back."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

__all__ = ["parse_rate_limit_reset", "parse_retry_after"]

_YEAR: Final = 366 * 86_400.0


def parse_retry_after(header: str | None, now: datetime) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date (RFC 9110 section 10.2.3); a year at most."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), _YEAR)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max((at - now).total_seconds(), 0.0), _YEAR)


def parse_rate_limit_reset(header: str | None, now: datetime) -> float | None:
    """Return the seconds until a rate limit ends: some state the moment, in seconds since 1970, and others the wait."""
    text = (header or "").strip()
    if not (text.isascii() and text.isdigit()):
        return None
    seconds = float(text)
    return seconds if seconds < _YEAR else min(max(seconds - now.timestamp(), 0.0), _YEAR)
