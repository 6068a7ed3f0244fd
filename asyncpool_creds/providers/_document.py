"""A secret as files and commands write it down: text, or a JSON object, with the time at which it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, cast

from asyncpool_creds._expiry import read_validity

__all__ = ["MAX_BYTES", "earliest_end", "parse_moment", "parse_object"]

# Twice the longest password: the rest is for what stands around it. This much JSON is read within a millisecond or two.
MAX_BYTES: Final = 1 << 17
# Sooner than the year 5138 it is seconds; later, somebody has written milliseconds.
_LATEST: Final = 1e11


def parse_object(text: str | bytes) -> Mapping[str, object] | None:
    """Return a JSON object; None for anything else, such as the first half of one."""
    # The decoder's exceptions carry the document, so none gets out of here.
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, object]", document) if isinstance(document, dict) else None


def parse_moment(value: object) -> datetime | None:
    """Return seconds since 1970, or an ISO 8601 time with its time zone, as a datetime; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        return _parse_iso(value) if isinstance(value, str) else None
    return datetime.fromtimestamp(seconds, UTC) if math.isfinite(seconds) and 0 <= seconds < _LATEST else None


def _parse_iso(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
        return None if moment.utcoffset() is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def earliest_end(token: str, requested_at: datetime, *stated: datetime | None) -> datetime | None:
    """Return when a token ends: by what is stated, or by what it says itself, whichever comes first."""
    ends = [end for end in stated if end is not None]
    validity = read_validity(token)
    if validity is not None:
        ends.append(validity.anchored_at(requested_at))
    return min(ends, default=None)
