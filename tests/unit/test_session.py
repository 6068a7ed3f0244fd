"""What a pool knows about one of its connections."""

from __future__ import annotations

import math

import pytest

from asyncpool_creds._rotation import Session


def test_without_a_credential_or_a_lifetime_it_never_ends(clock):
    session = Session(None, clock.monotonic(), epoch=0, max_lifetime=None, expired_sessions="serve")

    assert session.seconds_left(clock, "expired", 0) == session.seconds_until_due(clock, "expired", 0) == math.inf
    assert session.due(clock, "expired", 0) is None


def test_its_replacement_is_due_before_its_end(clock):
    session = Session(None, clock.monotonic(), epoch=0, max_lifetime=1000.0, expired_sessions="serve")
    left = session.seconds_left(clock, "expired", 0)

    assert 975 <= left <= 1000
    assert session.seconds_until_due(clock, "expired", 0) == pytest.approx(left - 25)
    clock.advance(left - 10)
    assert session.due(clock, "expired", 0) == "max_lifetime" and session.ended(clock, "expired", 0) is None
    clock.advance(10)
    assert session.ended(clock, "expired", 0) == "max_lifetime"


def test_one_from_before_a_drain_has_no_time_left(clock):
    session = Session(None, clock.monotonic(), epoch=0, max_lifetime=1000.0, expired_sessions="serve")

    assert session.ended(clock, "expired", 1) == "drained"
    assert session.seconds_left(clock, "expired", 1) == session.seconds_until_due(clock, "expired", 1) == 0.0
