"""The simulated fleet, with so few replicas that arithmetic says what must come out."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.fleet_model import Fleet, Life, Naive, Ours, Scenario, live, peak

_FLEET = Fleet(replicas=12, connections=5, lifetimes=1.0)
_AT_ONCE = Scenario(name="at-once", meaning="")
_SPREAD = Scenario(name="spread", meaning="", spread=1.0)
_OUTAGE = Scenario(name="outage", meaning="", back=1 / 50)
_OURS = Ours(25.0)
# With a token of 900 s, a refresh is due 180 s before its end.
_DUE = 720.0


def _live(contender=_OURS, scenario=_AT_ONCE, fleet=_FLEET) -> Life:
    return live(fleet, scenario, contender, lambda _: None)


def _asked(life: Life):
    return life.server.asked, life.source.asked


@pytest.mark.parametrize(
    ("moments", "expected"),
    [((), 0), ((5.0,), 1), ((0.0, 1.0, 2.0), 1), ((0.0, 0.9, 1.8, 1.85), 3), ((3.0, 0.2, 0.1), 2)],
)
def test_a_peak_is_counted_in_whatever_second_is_the_fullest(moments, expected):
    assert peak(moments) == expected


def test_a_naive_fleet_that_started_at_once_connects_everything_in_the_same_second_whenever_tokens_end():
    life = _live(Naive(), fleet=replace(_FLEET, lifetimes=2.0))

    assert peak(life.server.asked["first fill"]) == 12 * 5
    assert peak(life.server.asked["rotation"]) == 12 * 5
    assert len(life.server.asked["rotation"]) == 2 * 12 * 5
    assert peak(life.source.asked["rotation"]) == 12
    assert min(life.source.asked["rotation"]) == pytest.approx(900 + _FLEET.fetch_seconds)


def test_a_server_serves_a_storm_in_order_and_no_faster_than_it_can():
    fleet = replace(_FLEET, connects_per_second=10.0, connect_seconds=0.5)

    life = _live(Naive(), fleet=fleet)

    assert life.server.slowest["rotation"] == pytest.approx(12 * 5 / 10 + 0.5)


def test_ours_replaces_every_connection_between_the_refresh_and_the_end_and_never_all_at_once():
    life = _live()

    rotation = life.server.asked["rotation"]
    assert len(rotation) == 12 * 5
    assert min(rotation) > _DUE
    assert max(rotation) < 900
    assert peak(rotation) <= 12 * 5 / 6
    assert peak(life.source.asked["rotation"]) <= 6
    assert life.late == 0


def test_the_first_fill_is_the_same_for_ours_and_the_naive_fleet():
    ours, naive = _live(), _live(Naive())

    assert ours.server.asked["first fill"] == naive.server.asked["first fill"]


def test_without_jitter_a_fleet_moves_in_step():
    life = _live(Ours(25.0, has_jitter=False))

    assert len(set(life.source.asked["rotation"])) == 1
    assert peak(life.server.asked["rotation"]) == 12


def test_pools_that_retire_what_has_rotated_wait_for_nothing_but_the_jitter_of_the_refresh():
    life = _live(fleet=replace(_FLEET, retire_when="rotated"))

    assert max(life.server.asked["rotation"]) < _DUE + 0.1 * 180 + 5


def test_an_outage_of_the_source_is_made_up_for_before_the_tokens_end():
    life = _live(scenario=_OUTAGE)

    assert min(life.source.asked["rotation"]) < 882  # and was refused
    assert min(life.server.asked["rotation"]) >= 882
    assert max(life.server.asked["rotation"]) < 900
    assert life.late == 0


@pytest.mark.parametrize("contender", [_OURS, Naive()])
def test_replicas_that_start_spread_rotate_spread(contender):
    life = _live(contender, _SPREAD)

    assert peak(life.source.asked["first fill"]) < 6
    assert peak(life.source.asked["rotation"]) < 6


@pytest.mark.parametrize("scenario", [_AT_ONCE, _SPREAD])
def test_the_same_seed_gives_the_same_moments_whatever_else_was_drawn(scenario):
    first = _live(scenario=scenario)
    random.random()

    assert _asked(_live(scenario=scenario)) == _asked(first)


def test_another_seed_gives_others():
    assert _asked(_live(fleet=replace(_FLEET, seed=2))) != _asked(_live())


def test_the_process_has_its_own_chance_back_afterwards():
    drawn = random.random

    _live(Ours(25.0, has_jitter=False))

    assert random.random == drawn


def test_the_whole_life_is_told_as_it_passes():
    ticks = []

    life = live(_FLEET, _SPREAD, Naive(), ticks.append)

    assert life.duration == (1 + 1 + 0.5) * 900
    assert sum(ticks) == pytest.approx(life.duration)
