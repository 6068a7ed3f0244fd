"""The pure half of the benchmarks: statistics, floors, and what is shown of them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import figures, report
from benchmarks.figures import Figure, Result, Row
from benchmarks.rounds import Effort

_ROUNDS = [
    {"asyncpg": {"wall": 2.0}, "ours": {"wall": 1.0}},
    {"asyncpg": {"wall": 3.0}, "ours": {"wall": 3.0}},
    {"asyncpg": {"wall": 4.0}, "ours": {"wall": 1.0}},
]


def _result(*figures_of_ours: Figure) -> Result:
    return Result(
        cell="cell", group="group", meaning="what it is", loop="asyncio", rows=(Row("ours", figures_of_ours),)
    )


def test_ratios_compare_what_was_measured_side_by_side_and_not_the_medians():
    ratios = figures.ratios(_ROUNDS, "asyncpg", "ours", "wall")

    assert ratios == (2.0, 1.0, 4.0)
    assert Figure("ratio", ratios).median == 2.0


def test_a_series_is_scaled():
    assert figures.series(_ROUNDS, "ours", "wall", 1e3) == (1000.0, 3000.0, 1000.0)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_a_percentile_is_a_value_that_was_measured(share, expected):
    assert figures.percentile(range(100, 0, -1), share) == expected


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


def test_quartiles_of_a_single_round_are_that_round():
    assert figures.quartiles([7.0]) == (7.0, 7.0)
    assert figures.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


@pytest.mark.parametrize(("values", "holds"), [((0.90, 0.97, 0.98), True), ((0.90, 0.96, 1.50), False)])
def test_a_floor_is_held_by_the_median(values, holds):
    figure = Figure("ratio", values, at_least=0.97)

    assert figure.holds is holds


def test_a_broken_floor_is_named_with_cell_loop_figure_value_and_demand():
    result = _result(Figure("fetches", (2.0,), at_most=1), Figure("ms", (5.0,)))

    assert report.broken_floors([result]) == ["cell on asyncio: ours: fetches: 2, wanted at most 1"]


def test_json_holds_every_round_and_the_verdict():
    result = _result(Figure("ratio", (1.0, 0.5, 0.9), at_least=0.97))

    parsed = json.loads(report.as_json({"cpu": "x"}, {"seed": 1}, [result]))

    assert parsed["cells"][0]["contenders"]["ours"]["ratio"] == {
        "median": 0.9,
        "quartiles": [0.7, 0.95],
        "min": 0.5,
        "max": 1.0,
        "at_least": 0.97,
        "at_most": None,
        "holds": False,
        "rounds": [1.0, 0.5, 0.9],
    }
    assert len(parsed["broken_floors"]) == 1


def test_the_table_shows_median_and_spread_and_marks_what_is_broken():
    output = io.StringIO()
    result = _result(Figure("ratio", (1.0, 0.5, 0.9), at_least=0.97), Figure("ms", (12.345,)))

    report.print_tables(Console(file=output, width=120), {"cpu": "some processor"}, [result])

    assert "cpu: some processor" in output.getvalue()
    assert "0.900 (0.700-0.950) !" in output.getvalue()
    assert "12.3" in output.getvalue()


@pytest.mark.parametrize("rounds", [1, 7, 40])
def test_a_number_of_rounds_holds_for_every_cell(rounds):
    effort = Effort().with_rounds(rounds)

    assert rounds <= effort.blocks * effort.rounds < rounds + effort.blocks
    assert {effort.herds, effort.rotations, effort.bursts} == {rounds}
