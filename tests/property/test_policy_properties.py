from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from asyncpool_creds._policy import (
    RefreshPolicy,
    error_cache_ttl,
    invalidation_backoff,
    replacement_gap,
    retry_delay,
    same_secret_delay,
    session_deadlines,
)

chances = st.floats(0, 1, exclude_max=True)
lifetimes = st.floats(1e-3, 1e10)
durations = st.floats(1e-3, 1e10)
hints = st.none() | st.floats(-1e10, 1e10)
attempts = st.integers(1, 10_000)
retry_afters = st.none() | st.floats(-1e6, 1e12)


@given(st.none() | durations, st.none() | st.just(0.0) | durations, lifetimes, hints, chances)
@example(60.0, None, 60.0, None, 0.0)
@example(5.0, None, 3600.0, None, 0.5)
@example(None, 9.999, 10.0, None, 0.5)
def test_a_refresh_is_due_before_the_end_of_use_and_that_before_the_expiry(
    threshold, min_validity, lifetime, hint, chance
):
    plan = RefreshPolicy(threshold, min_validity).plan(lifetime=lifetime, hint=hint, chance=chance)

    assert 0 <= plan.refresh_in <= plan.usable_for <= plan.expires_in == lifetime
    if min_validity != 0:
        assert plan.usable_for < plan.expires_in


@given(st.none() | durations, lifetimes, chances)
@example(59.9, 60.0, 0.0)
@example(299.0, 300.0, 0.0)
def test_a_life_is_never_spent_on_refreshing(threshold, lifetime, chance):
    plan = RefreshPolicy(threshold).plan(lifetime=lifetime, hint=None, chance=chance)

    assert plan.refresh_in >= lifetime / 20


@given(st.none() | st.just(0.0) | durations, lifetimes, chances)
@example(59.9, 60.0, 0.0)
def test_a_credential_is_used_for_a_fair_part_of_its_life(min_validity, lifetime, chance):
    plan = RefreshPolicy(min_validity=min_validity).plan(lifetime=lifetime, hint=None, chance=chance)

    assert plan.usable_for >= lifetime / 20


@given(durations, lifetimes, chances)
def test_a_threshold_is_cut_if_and_only_if_it_leaves_no_life_worth_the_name(threshold, lifetime, chance):
    plan = RefreshPolicy(threshold).plan(lifetime=lifetime, hint=None, chance=chance)

    if threshold <= lifetime / 2:
        assert plan.threshold_cut is None
    if threshold >= lifetime:
        assert 0 < plan.threshold_cut < lifetime


@given(lifetimes, st.floats(0, 1), chances)
@example(1.0, 1.0, 0.0)  # less than a second away, and the life is not longer than a second
def test_a_hint_is_never_anticipated(lifetime, share, chance):
    plan = RefreshPolicy().plan(lifetime=lifetime, hint=lifetime * share * 0.85, chance=chance)

    assert plan.refresh_in >= lifetime * share * 0.85


@given(attempts, st.floats(0, 1e10) | st.just(math.inf), chances)
def test_a_retry_comes_within_a_third_of_what_is_left_and_not_at_once(attempt, remaining, chance):
    delay = retry_delay(attempt, remaining=remaining, retry_after=None, chance=chance)

    assert 0.1 <= delay <= max(0.1, min(60.0, remaining / 3))


@given(attempts, st.none() | st.floats(0, 1e10) | st.just(math.inf), retry_afters, st.booleans(), chances)
def test_retry_after_is_honoured_within_the_remaining_life(attempt, remaining, retry_after, retryable, chance):
    without = retry_delay(attempt, remaining=remaining, retry_after=None, retryable=retryable, chance=chance)

    delay = retry_delay(attempt, remaining=remaining, retry_after=retry_after, retryable=retryable, chance=chance)

    assert delay >= without
    longest = 60.0 if remaining is None else min(300.0, remaining / 3)
    assert delay <= max(without, longest)
    if retry_after is not None:
        assert delay >= min(retry_after, longest)


@given(retry_afters)
def test_an_error_is_shared_for_a_second_unless_the_source_asked_for_more(retry_after):
    ttl = error_cache_ttl(retry_after=retry_after)

    assert 1.0 <= ttl <= 60.0
    if retry_after is not None:
        assert ttl >= min(retry_after, 60.0)


@given(st.none() | st.floats(-1e10, 1e10))
def test_asking_again_for_the_same_secret_takes_its_time_but_not_all_that_is_left(remaining):
    delay = same_secret_delay(remaining=remaining)

    assert 0.1 <= delay <= 30.0
    if remaining is not None and remaining > 0.4:
        assert delay <= remaining / 4


@given(st.integers(1, 10_000), st.floats(0, 1e10) | st.just(math.inf))
def test_refusals_are_heard_ever_more_rarely(streak, remaining):
    backoff = invalidation_backoff(streak, remaining=remaining)

    assert 0.1 <= backoff <= invalidation_backoff(streak + 1, remaining=remaining) <= 60.0
    assert backoff <= max(remaining / 3, 0.1)


@given(durations, chances)
def test_a_connection_is_replaced_within_the_last_twentieth_of_its_life(max_lifetime, chance):
    replace_at, gone_at = session_deadlines(max_lifetime, chance=chance)

    assert max_lifetime * 0.94999 <= replace_at < gone_at <= max_lifetime


@given(
    st.integers(0, 10_000),
    st.none() | st.floats(-1e6, 1e9),
    st.booleans(),
    st.floats(0, 1e3),
    st.floats(1e-3, 1e4),
    chances,
)
def test_replacements_keep_to_the_cap_and_where_they_can_to_the_window(
    pending, window, spread, cost, per_second, chance
):
    gap = replacement_gap(
        pending=pending, window=window, spread=spread, cost=cost, per_second=per_second, chance=chance
    )

    assert gap >= 1 / per_second
    assert math.isfinite(gap)
    if window is not None:
        assert gap * pending <= max(window * 0.8, pending / per_second) * (1 + 1e-9)
