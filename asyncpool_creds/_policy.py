"""When to refresh, retry, retire and reconnect: arithmetic without clocks, tasks or I/O.

All times are seconds. `chance` is a number in [0, 1) from the caller's random source,
so that every decision here can be repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

__all__ = [
    "RefreshPlan",
    "RefreshPolicy",
    "error_cache_ttl",
    "first_gap",
    "invalidation_backoff",
    "parse_rate",
    "parse_seconds",
    "plausible_skew",
    "reconnect_delay",
    "replacement_gap",
    "retry_delay",
    "same_secret_delay",
    "session_deadlines",
    "shortened",
]

# The default threshold is the smaller of five minutes and a fifth of the life. A fixed
# five minutes would refresh a five-minute token for ever (globus tokens did).
DEFAULT_THRESHOLD: Final = 300.0
THRESHOLD_SHARE: Final = 1 / 5
# A longer threshold is cut. Not at the whole life: a five-minute token that took a moment to arrive,
# or was rounded up, would be refreshed within that moment again.
LONGEST_SHARE: Final = 9 / 10
# A credential must survive the handshake it is handed out for.
DEFAULT_MIN_VALIDITY: Final = 10.0
MIN_VALIDITY_SHARE: Final = 1 / 20
# Refreshes of one fleet are spread over this share of the time left to expiry.
JITTER_SHARE: Final = 1 / 10
# A server that ends sessions with the credential gets the last tenth of the life for itself.
ENDS_SESSION_SHARE: Final = 9 / 10

RETRY_BASE: Final = 1.0
RETRY_CAP: Final = 60.0
RETRY_FLOOR: Final = 0.1
# No pause is longer than this share of the remaining life: after it there is time for two tries, with four ninths of
# the life left for replacing connections.
REMAINING_SHARE: Final = 1 / 3
# A source may ask for patience; one that asks for a day has a typo.
RETRY_AFTER_CAP: Final = 300.0
# With nothing valid to hand out, an outage is to end when it ends: the source is asked this often,
UNAVAILABLE_RETRY_CAP: Final = 5.0
# this often if it has refused for good, which a person may have mended since,
PERMANENT_RETRY: Final = 30.0
# and never later than this, whatever it asked for.
UNAVAILABLE_RETRY_AFTER_CAP: Final = 60.0
# So long callers share an error before one of them asks again; the single flight protects the source.
ERROR_CACHE_TTL: Final = 1.0
# A server's clock that is further ahead than this has a credential refused for another reason.
LARGEST_SKEW: Final = 60.0
# azure-identity's floor between two attempts that yield the same token.
SAME_SECRET_FLOOR: Final = 30.0
LIFETIME_JITTER: Final = 0.05
RECONNECT_BASE: Final = 0.05
RECONNECT_CAP: Final = 1.0
# Seconds before the first of them ends in which none is replaced by plan: a connect may take longer than usual.
REPLACEMENT_RESERVE: Final = 0.5
# The gap after a background connect, in its own durations: of a hundred callers, one can meet it.
COURTESY: Final = 99
# Seconds; a slow server takes long for a connect, but not the loop's time.
COURTESY_CAP: Final = 0.5


def parse_seconds(name: str, value: float | timedelta, *, zero: bool = False) -> float:
    """Return the argument `name` as seconds.

    Raises:
        ValueError: Not a number or a timedelta, negative, not finite, or zero where that means nothing.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    return _parse_number(name, value, "a number of seconds or a timedelta", zero=zero)


def parse_rate(name: str, value: float) -> float:
    """Return the argument `name` as a number per second.

    Raises:
        ValueError: Not a number, not positive, or not finite.
    """
    return _parse_number(name, value, "a number per second", zero=False)


def _parse_number(name: str, value: float, expected: str, *, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{name} must be {expected}, not {value!r}")  # noqa: TRY004 - a word here is a bad value
    try:
        number = float(value)
    except OverflowError:  # an int of more than three hundred digits
        number = math.inf
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be {'zero or more' if zero else 'more than zero'} and finite, not {value!r}")
    return number


@dataclass(frozen=True, slots=True)
class RefreshPlan:
    """What to do with one credential, in seconds from the moment it was obtained.

    Args:
        refresh_in: Refresh from here on; None: never on its own.
        usable_for: Hand it out until here; None: for ever.
        expires_in: The server refuses it from here on; None: never.
        threshold_cut: The threshold used instead of the one asked for, if that was too long.
        min_validity_cut: Likewise for the minimum validity.
    """

    refresh_in: float | None
    usable_for: float | None
    expires_in: float | None
    threshold_cut: float | None = None
    min_validity_cut: float | None = None


@dataclass(frozen=True, slots=True)
class RefreshPolicy:
    """How long before its expiry a credential is refreshed, and until when it is handed out.

    Args:
        threshold: Seconds before expiry; None: the smaller of five minutes and a fifth of the life.
        min_validity: Seconds a handed-out credential has left; None: the smaller of ten
            seconds and a twentieth of the life.
    """

    threshold: float | None = None
    min_validity: float | None = None

    def plan(self, *, lifetime: float | None, hint: float | None, chance: float) -> RefreshPlan:
        """Return the plan for a credential with `lifetime` seconds left.

        A `hint` from the source (seconds until it wants to be asked again) comes before the
        threshold. The jitter delays a refresh, by at most a tenth of the time left to expiry.
        """
        if hint is not None and lifetime is not None and hint >= lifetime:
            hint = None  # it would be too late
        if hint is not None:
            # One in the past, or a moment away, would be a refresh loop with a source that means it.
            hint = max(hint, same_secret_delay(remaining=lifetime) if hint <= 0 else RETRY_BASE)
        if lifetime is None:
            return RefreshPlan(hint, None, None)
        threshold, threshold_cut = self._share(self.threshold, DEFAULT_THRESHOLD, THRESHOLD_SHARE, lifetime)
        margin, margin_cut = self._share(self.min_validity, DEFAULT_MIN_VALIDITY, MIN_VALIDITY_SHARE, lifetime)
        usable_for = lifetime - margin
        # A credential short of its minimum validity makes callers wait, so the refresh begins before that.
        latest = max(usable_for - margin, usable_for / 2)
        asked = lifetime - threshold if hint is None else hint
        refresh_in = min(asked, latest)
        # Where the source wants to be asked soon, no more than a tenth of that: a look is not the end of a life.
        spread = usable_for - refresh_in if hint is None else min(usable_for - refresh_in, hint)
        refresh_in += spread * JITTER_SHARE * chance
        return RefreshPlan(refresh_in, usable_for, lifetime, threshold_cut, margin_cut)

    @staticmethod
    def _share(asked: float | None, default: float, share: float, lifetime: float) -> tuple[float, float | None]:
        if asked is None:
            return min(default, lifetime * share), None
        if asked < lifetime * LONGEST_SHARE:
            return asked, None
        return lifetime * share, lifetime * share


def retry_delay(
    attempt: int, *, remaining: float | None, retry_after: float | None, chance: float, retryable: bool = True
) -> float:
    """Return the seconds to wait after the `attempt`-th failure in a row.

    Exponential with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"); half a minute after a
    refusal for good. What the source asks for with Retry-After is honoured. All of it within a third of the
    `remaining` life, so that there are two more tries while the old credential works; with nothing valid left
    (`remaining` is None), within five seconds, or a minute if the source asked for it.
    """
    cap, longest = (
        (RETRY_CAP, RETRY_AFTER_CAP)
        if remaining is not None
        else (
            UNAVAILABLE_RETRY_CAP,
            UNAVAILABLE_RETRY_AFTER_CAP,
        )
    )
    delay = min(cap, RETRY_BASE * 2.0 ** min(attempt - 1, 16)) * chance if retryable else PERMANENT_RETRY
    if retry_after is not None:
        delay = max(delay, min(retry_after, longest))
    if remaining is not None:
        delay = min(delay, remaining * REMAINING_SHARE)
    return max(delay, RETRY_FLOOR)


def error_cache_ttl(*, retry_after: float | None) -> float:
    """Return for how many seconds callers share the last error while nothing valid is held."""
    return (
        ERROR_CACHE_TTL if retry_after is None else max(ERROR_CACHE_TTL, min(retry_after, UNAVAILABLE_RETRY_AFTER_CAP))
    )


def reconnect_delay(attempt: int, *, chance: float) -> float:
    """Return the seconds to wait after the `attempt`-th connect in a row that failed while callers wait for one.

    Short, because they feel it: from 50 ms, doubling up to a second, of which up to half is left to chance.
    """
    return min(RECONNECT_CAP, RECONNECT_BASE * 2.0 ** min(attempt - 1, 16)) * (0.5 + chance / 2)


def same_secret_delay(*, remaining: float | None, hint: float | None = None) -> float:
    """Return the seconds until asking again a source that gave the same secret without a later expiry.

    A source that says when (its `hint`, in seconds from now) is asked then, if that is sooner: it knows what a
    look costs.
    """
    delay = SAME_SECRET_FLOOR if remaining is None else max(RETRY_FLOOR, min(SAME_SECRET_FLOOR, remaining / 4))
    return delay if hint is None or hint <= 0 else min(delay, max(hint, RETRY_BASE))


def invalidation_backoff(streak: int, *, remaining: float) -> float:
    """Return for how many seconds after the `streak`-th invalidation in a row another one is ignored.

    A wrong role is not a stale token: the server would refuse every new token too. Never more than a third of the
    `remaining` life.
    """
    return min(RETRY_CAP, RETRY_BASE * 2.0 ** min(streak - 1, 16), max(remaining * REMAINING_SHARE, RETRY_FLOOR))


def plausible_skew(seconds_left: float) -> float:
    """Return by how much the server's clock is ahead if it refused a credential that had `seconds_left`; 0: not so.

    A credential that had longer to live was revoked, or never right.
    """
    return seconds_left if 0 < seconds_left <= LARGEST_SKEW else 0.0


def shortened(lifetime: float, *, skew: float) -> float:
    """Return what is left of `lifetime` under a clock that is ahead by `skew`; a tenth at least, to have a try."""
    return max(lifetime - skew, lifetime * (1 - LONGEST_SHARE))


def session_deadlines(max_lifetime: float | None, *, chance: float) -> tuple[float | None, float | None]:
    """Return when a connection wants replacing and when it must be gone, in seconds from its start.

    The end is up to 2.5 % early, at random: pools whose connections were all opened at once would
    reconnect at once. Replacement is due another 2.5 % before it, so that the new one stands in time.
    """
    if max_lifetime is None:
        return None, None
    half = max_lifetime * LIFETIME_JITTER / 2
    end = max_lifetime - half * chance
    return end - half, end


def first_gap(*, ahead: int, window: float | None, per_second: float) -> float:
    """Return the seconds until the first of a pool's background connects, while those of `ahead` other pools are at it.

    Pools that share a manager hear of a rotation in the same moment. They begin one by one, `per_second`, and
    within a fifth of the `window` that is left until the first connection ends.
    """
    wait = ahead / per_second
    return wait if window is None else min(wait, max(window, 0.0) / 5)


def replacement_gap(
    *, pending: int, window: float | None, spread: bool, cost: float, per_second: float, chance: float
) -> float:
    """Return the seconds to wait between two background connects.

    Never faster than `per_second`. With `spread`, the `pending` ones take four fifths of the `window` that is left
    until the first of them ends, jittered; of a short one less, down to its half, so that there is time for a connect
    that takes longer than usual. Without, or where there is no window, it is ninety-nine times as long as
    the last connect took, half a second at most, so that callers do not feel it; or less, if time gets short.
    """
    cap = 1 / per_second
    courtesy = min(cost * COURTESY, COURTESY_CAP)
    if window is None:
        return max(cap, courtesy)
    window = max(window, 0.0)
    planned = window * 0.8
    if spread:
        planned = min(planned, window - min(REPLACEMENT_RESERVE, window / 2))
    even = planned / max(pending, 1)
    return max(cap, even * (0.5 + chance / 2) if spread else min(even, courtesy))
