from __future__ import annotations

import math
from datetime import timedelta
from fractions import Fraction

import pytest

from asyncpool_creds._policy import (
    RefreshPlan,
    RefreshPolicy,
    error_cache_ttl,
    first_gap,
    invalidation_backoff,
    parse_rate,
    parse_seconds,
    plausible_skew,
    replacement_gap,
    retry_delay,
    same_secret_delay,
    session_deadlines,
    shortened,
)

MINUTE, HOUR = 60.0, 3600.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(1, 1.0), (0.5, 0.5), (timedelta(minutes=5), 300.0), (timedelta(milliseconds=1), 0.001)],
)
def test_a_duration_is_seconds_or_a_timedelta(value, seconds):
    assert parse_seconds("fetch_timeout", value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        -1,
        -0.001,
        timedelta(),
        timedelta(seconds=-1),
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        "soon",
        "5",
        b"5",
        None,
        True,
        [5],
        5j,
        Fraction(1, 2),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_nonsense_for_a_duration_is_refused_by_name(value):
    with pytest.raises(ValueError, match="fetch_timeout must be"):
        parse_seconds("fetch_timeout", value)


@pytest.mark.parametrize("value", [0, 0.0, timedelta()])
def test_zero_is_a_duration_where_it_means_something(value):
    assert parse_seconds("min_validity", value, zero=True) == 0


@pytest.mark.parametrize("value", [-1, math.nan, "soon"])
def test_nonsense_is_refused_where_zero_is_allowed(value):
    with pytest.raises(ValueError, match="min_validity must be"):
        parse_seconds("min_validity", value, zero=True)


@pytest.mark.parametrize(("value", "rate"), [(1, 1.0), (0.5, 0.5)])
def test_a_rate_is_a_number(value, rate):
    assert parse_rate("max_reconnects_per_second", value) == rate


@pytest.mark.parametrize(
    "value", [0, -1, math.nan, math.inf, 10**400, "fast", None, True], ids=lambda value: repr(value)[:20]
)
def test_nonsense_for_a_rate_is_refused_by_name(value):
    with pytest.raises(ValueError, match="max_reconnects_per_second must be"):
        parse_rate("max_reconnects_per_second", value)


def plan(policy: RefreshPolicy, lifetime: float | None, hint: float | None = None, chance: float = 0.0) -> RefreshPlan:
    return policy.plan(lifetime=lifetime, hint=hint, chance=chance)


@pytest.mark.parametrize(
    ("lifetime", "refresh_in", "usable_for"),
    [
        (24 * HOUR, 24 * HOUR - 5 * MINUTE, 24 * HOUR - 10),
        (HOUR, 55 * MINUTE, HOUR - 10),
        (25 * MINUTE, 20 * MINUTE, 25 * MINUTE - 10),
        (15 * MINUTE, 12 * MINUTE, 15 * MINUTE - 10),
        (5 * MINUTE, 4 * MINUTE, 5 * MINUTE - 10),
        (MINUTE, 48.0, 57.0),
        (5.0, 4.0, 4.75),
        (1.0, 0.8, 0.95),
    ],
)
def test_the_default_threshold_is_five_minutes_or_a_fifth_of_the_life(lifetime, refresh_in, usable_for):
    assert plan(RefreshPolicy(), lifetime) == RefreshPlan(
        pytest.approx(refresh_in), pytest.approx(usable_for), lifetime
    )


def test_a_credential_without_end_never_goes_stale():
    assert plan(RefreshPolicy(), None) == RefreshPlan(None, None, None)


def test_a_credential_without_end_is_refreshed_when_its_source_asks_for_it():
    assert plan(RefreshPolicy(), None, hint=HOUR) == RefreshPlan(HOUR, None, None)


@pytest.mark.parametrize(
    ("threshold", "refresh_in"),
    [(MINUTE, 59 * MINUTE), (30 * MINUTE, 30 * MINUTE), (53 * MINUTE, 7 * MINUTE)],
)
def test_a_threshold_is_taken_from_the_end(threshold, refresh_in):
    assert plan(RefreshPolicy(threshold=threshold), HOUR).refresh_in == pytest.approx(refresh_in)
    assert plan(RefreshPolicy(threshold=threshold), HOUR).threshold_cut is None


@pytest.mark.parametrize("threshold", [0.9 * HOUR, HOUR - 0.1, HOUR, 24 * HOUR])
def test_a_threshold_that_leaves_less_than_a_tenth_of_the_life_is_cut_to_a_fifth(threshold):
    result = plan(RefreshPolicy(threshold=threshold), HOUR)

    assert result.threshold_cut == pytest.approx(HOUR / 5)
    assert result.refresh_in == pytest.approx(HOUR - HOUR / 5)


@pytest.mark.parametrize("min_validity", [0.9 * MINUTE, MINUTE, 2 * MINUTE])
def test_a_minimum_validity_that_leaves_less_than_a_tenth_of_the_life_is_cut_to_a_twentieth(min_validity):
    result = plan(RefreshPolicy(min_validity=min_validity), MINUTE)

    assert result.min_validity_cut == pytest.approx(3.0)
    assert result.usable_for == pytest.approx(57.0)


def test_a_minimum_validity_of_zero_uses_the_last_second():
    assert plan(RefreshPolicy(min_validity=0.0), HOUR).usable_for == HOUR


def test_a_refresh_begins_before_the_credential_may_no_longer_be_handed_out():
    result = plan(RefreshPolicy(threshold=5.0), HOUR)

    assert result.refresh_in < result.usable_for


def test_a_hint_of_the_source_comes_before_the_threshold():
    assert plan(RefreshPolicy(threshold=MINUTE), HOUR, hint=10 * MINUTE).refresh_in == 10 * MINUTE


@pytest.mark.parametrize("lifetime", [None, HOUR])
@pytest.mark.parametrize("hint", [0.0, -5.0, -HOUR])
def test_a_hint_in_the_past_means_soon_and_not_at_once(lifetime, hint):
    assert plan(RefreshPolicy(), lifetime, hint=hint).refresh_in == 30.0


@pytest.mark.parametrize("lifetime", [None, HOUR])
def test_a_hint_a_moment_away_means_a_second(lifetime):
    assert plan(RefreshPolicy(), lifetime, hint=0.001).refresh_in == 1.0


def test_a_hint_that_comes_too_late_is_not_taken():
    assert plan(RefreshPolicy(), HOUR, hint=HOUR).refresh_in == 55 * MINUTE


def test_the_jitter_delays_by_up_to_a_tenth_of_the_time_left():
    early = plan(RefreshPolicy(), HOUR, chance=0.0).refresh_in
    late = plan(RefreshPolicy(), HOUR, chance=0.999999).refresh_in

    assert late - early == pytest.approx((HOUR - 10 - 55 * MINUTE) / 10, rel=1e-3)


@pytest.mark.parametrize(
    ("attempt", "delay"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (8, 30.0), (10**9, 30.0)]
)
def test_retries_back_off_exponentially_to_a_minute(attempt, delay):
    assert retry_delay(attempt, remaining=math.inf, retry_after=None, chance=0.5) == delay


def test_a_retry_comes_while_the_old_credential_works():
    assert retry_delay(20, remaining=9.0, retry_after=None, chance=0.99) == 3.0


@pytest.mark.parametrize("remaining", [0.6, 2.0, 40.0, 300.0])
def test_no_pause_takes_more_than_a_third_of_what_is_left(remaining):
    longest = pytest.approx(remaining / 3)
    assert retry_delay(20, remaining=remaining, retry_after=120.0, chance=0.99) == longest
    if remaining < 90:
        assert retry_delay(1, remaining=remaining, retry_after=None, retryable=False, chance=0.0) == longest


@pytest.mark.parametrize(
    ("retryable", "retry_after", "longest"),
    [(True, None, 5.0), (False, None, 30.0), (True, 20.0, 20.0), (True, 300.0, 60.0)],
)
def test_a_source_is_asked_on_while_nothing_is_valid(retryable, retry_after, longest):
    delays = [
        retry_delay(attempt, remaining=None, retry_after=retry_after, retryable=retryable, chance=0.9999999)
        for attempt in (1, 5, 1000)
    ]
    assert max(delays) == pytest.approx(longest)


@pytest.mark.parametrize(("chance", "remaining"), [(0.0, math.inf), (0.99, 0.01), (0.99, 0.0)])
def test_a_retry_never_comes_at_once(chance, remaining):
    assert retry_delay(1, remaining=remaining, retry_after=None, chance=chance) == 0.1


@pytest.mark.parametrize(
    ("retry_after", "delay"),
    [(20.0, 20.0), (300.0, 300.0), (86_400.0, 300.0), (0.0, 0.5), (-5.0, 0.5), (math.nan, 0.5)],
)
def test_the_patience_a_source_asks_for_is_honoured_within_reason(retry_after, delay):
    assert retry_delay(1, remaining=HOUR, retry_after=retry_after, chance=0.5) == delay


@pytest.mark.parametrize(
    ("retry_after", "seconds"), [(None, 1.0), (0.0, 1.0), (20.0, 20.0), (86_400.0, 60.0), (math.nan, 1.0)]
)
def test_callers_share_an_error_for_a_second_or_as_the_source_asked(retry_after, seconds):
    assert error_cache_ttl(retry_after=retry_after) == seconds


@pytest.mark.parametrize(("remaining", "delay"), [(None, 30.0), (HOUR, 30.0), (40.0, 10.0), (0.2, 0.1), (-1.0, 0.1)])
def test_the_same_secret_again_is_no_reason_to_ask_at_once(remaining, delay):
    assert same_secret_delay(remaining=remaining) == delay


@pytest.mark.parametrize(("hint", "delay"), [(5.0, 5.0), (0.01, 1.0), (100.0, 30.0), (0.0, 30.0), (-5.0, 30.0)])
def test_a_source_that_says_when_to_look_again_is_asked_then(hint, delay):
    assert same_secret_delay(remaining=None, hint=hint) == delay


def test_refusals_in_a_row_are_heard_ever_more_rarely():
    backoffs = [invalidation_backoff(streak, remaining=math.inf) for streak in (1, 2, 3, 6, 7, 1000)]
    assert backoffs == [1.0, 2.0, 4.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(("remaining", "longest"), [(9.0, 3.0), (0.0, 0.1)])
def test_refusals_are_heard_while_there_is_time_to_do_something(remaining, longest):
    assert invalidation_backoff(1000, remaining=remaining) == longest


@pytest.mark.parametrize(("left", "skew"), [(10.0, 10.0), (60.0, 60.0), (61.0, 0.0), (math.inf, 0.0), (-1.0, 0.0)])
def test_a_refusal_with_seconds_left_tells_how_far_the_clock_is_ahead(left, skew):
    assert plausible_skew(left) == skew


@pytest.mark.parametrize(("lifetime", "skew", "left"), [(20.0, 0.0, 20.0), (20.0, 8.0, 12.0), (20.0, 50.0, 2.0)])
def test_a_life_is_shortened_but_not_away(lifetime, skew, left):
    assert shortened(lifetime, skew=skew) == pytest.approx(left)


def test_a_connection_without_a_maximum_lives_on():
    assert session_deadlines(None, chance=0.5) == (None, None)


def test_a_connection_is_replaced_before_it_has_to_go():
    assert session_deadlines(1000.0, chance=0.0) == pytest.approx((975.0, 1000.0))
    assert session_deadlines(1000.0, chance=0.999999) == pytest.approx((950.0, 975.0), rel=1e-5)


def gap(
    *,
    pending: int = 10,
    window: float | None = None,
    spread: bool = True,
    cost: float = 0.0,
    per_second: float = 10.0,
    chance: float = 0.0,
) -> float:
    return replacement_gap(
        pending=pending, window=window, spread=spread, cost=cost, per_second=per_second, chance=chance
    )


@pytest.mark.parametrize("spread", [True, False])
def test_without_a_deadline_connects_are_spaced_by_the_cap_or_by_what_they_cost(spread):
    assert gap(cost=0.001, spread=spread) == pytest.approx(0.1)
    assert gap(cost=0.004, spread=spread) == pytest.approx(0.396)
    assert gap(cost=3.0, spread=spread) == pytest.approx(0.5)


def test_replacements_are_spread_over_four_fifths_of_the_time():
    assert gap(window=100.0, chance=0.999999) == pytest.approx(8.0, rel=1e-3)
    assert gap(window=100.0, chance=0.0) == pytest.approx(4.0)


def test_of_a_short_time_a_reserve_is_kept_for_a_late_connect():
    assert gap(window=2.5, chance=0.999999) == pytest.approx(0.2, rel=1e-3)
    assert gap(window=2.0, chance=0.999999) == pytest.approx(0.15, rel=1e-3)
    assert gap(window=0.9, chance=0.999999, per_second=1000.0) == pytest.approx(0.045, rel=1e-3)


def test_those_that_are_not_spread_take_no_more_time_than_they_need():
    assert gap(window=100.0, spread=False) == pytest.approx(0.1)
    assert gap(window=100.0, spread=False, cost=3.0) == pytest.approx(0.5)


def test_courtesy_ends_where_time_gets_short():
    assert gap(window=6.25, cost=0.05, spread=False) == pytest.approx(0.5)
    assert gap(window=4.0, cost=0.05, spread=False) == pytest.approx(0.32)


@pytest.mark.parametrize("spread", [True, False])
def test_the_cap_holds_however_short_the_time(spread):
    for window, pending in ((0.01, 10), (-5.0, 10), (0.0, 0)):
        assert gap(window=window, pending=pending, cost=1.0, spread=spread) == pytest.approx(0.1)


# The first background connect of a pool.


def test_a_pool_that_is_alone_begins_at_once():
    assert first_gap(ahead=0, window=300.0, per_second=25.0) == 0.0


def test_pools_that_begin_together_follow_each_other_at_the_cap():
    assert [first_gap(ahead=ahead, window=300.0, per_second=25.0) for ahead in (1, 2, 200)] == [0.04, 0.08, 8.0]


@pytest.mark.parametrize(("window", "expected"), [(10.0, 2.0), (0.0, 0.0), (-5.0, 0.0), (None, 8.0)])
def test_no_pool_waits_for_the_others_until_it_is_late(window, expected):
    assert first_gap(ahead=200, window=window, per_second=25.0) == expected
