"""The pure half of the benchmarks: statistics, floors, and what is shown of them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import compare, drills, faults, faults_page, figures, report
from benchmarks.__main__ import _QUICK
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


def test_durations_are_taken_together_by_when_they_began():
    first, second = figures.moments([(-0.04, 0.001), (0.01, 0.004), (0.02, 0.002), (0.049, 0.003)], width=0.05)

    assert (first.at, first.p50, first.p99, first.longest) == (-0.025, 1.0, 1.0, 1.0)
    assert (second.at, second.p50, second.p99, second.longest) == (0.025, 3.0, 4.0, 4.0)


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
    result = _result(Figure("ratio", (1.0, 0.5, 0.9), at_least=0.97, better="higher"))

    parsed = json.loads(report.as_json(report.assemble({"cpu": "x"}, {"seed": 1}, [result])))

    assert parsed["cells"][0]["contenders"]["ours"]["ratio"] == {
        "median": 0.9,
        "quartiles": [0.7, 0.95],
        "min": 0.5,
        "max": 1.0,
        "at_least": 0.97,
        "at_most": None,
        "better": "higher",
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
    assert {effort.herds, effort.rotations, effort.bursts, effort.drills} == {rounds}


# Two runs


def _run(*values, better="higher", cell="cell", machine=None, effort=None):
    result = Result(
        cell=cell,
        group="group",
        meaning="what it is",
        loop="asyncio",
        rows=(Row("ours", (Figure("ratio", values, better=better), Figure("ms", (7.0,)))),),
    )
    return report.assemble(machine or {"cpu": "x", "cores": 2}, {"effort": effort or {"rounds": 3}}, [result])


@pytest.mark.parametrize(
    ("before", "after", "better", "regression"),
    [
        ((2.0, 2.0, 2.0), (1.7, 1.7, 1.7), "higher", True),
        ((2.0, 2.0, 2.0), (1.9, 1.9, 1.9), "higher", False),
        ((2.0, 2.0, 2.0), (4.0, 4.0, 4.0), "higher", False),
        ((1.0, 1.0, 1.0), (1.2, 1.2, 1.2), "lower", True),
        ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), "lower", False),
        # As much worse as the first, and it may be chance.
        ((2.0, 1.5, 2.5), (1.7, 1.2, 2.2), "higher", False),
    ],
)
def test_what_got_worse_by_more_than_the_tolerance_and_the_noise_is_a_regression(before, after, better, regression):
    (change,) = compare.changes(_run(*before, better=better), _run(*after, better=better))

    assert change.place == ("cell", "asyncio", "ours", "ratio")
    assert change.is_regression(tolerance=0.1) is regression


def test_more_rounds_make_less_noise():
    few, many = [0.9, 1.0, 1.1], [0.9, 1.0, 1.1] * 20

    (of_few,) = compare.changes(_run(*few), _run(*few))
    (of_many,) = compare.changes(_run(*many), _run(*many))

    assert 0 < of_many.noise < of_few.noise / 2


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (_run(1.0, machine={"cpu": "y", "cores": 2}), "different machines: cpu is 'x' before and 'y' after"),
        (_run(1.0, machine={"cpu": "x", "cores": 4}), "different machines: cores is 2 before and 4 after"),
        (_run(1.0, effort={"rounds": 9}), "different effort"),
        (_run(1.0, cell="another"), "no ratio in common"),
    ],
)
def test_runs_that_have_nothing_to_do_with_each_other_are_not_compared(other, complaint):
    with pytest.raises(compare.IncomparableError, match=complaint):
        compare.changes(_run(1.0), other)


def _stored(path, run):
    path.write_text(report.as_json(run))
    return str(path)


def test_the_command_names_what_got_worse_and_exits_with_1(tmp_path, capsys):
    before = _stored(tmp_path / "before.json", _run(2.0, 2.0))
    after = _stored(tmp_path / "after.json", _run(1.0, 1.0, machine={"cpu": "x", "cores": 2, "asyncpg": "0.32"}))

    status = compare.main([before, after])

    shown = capsys.readouterr().out
    assert status == 1
    assert "+100.0%" in shown
    assert "1 of 1 ratios got worse" in shown
    assert "asyncpg: None before, 0.32 after" in shown
    assert compare.main([after, before]) == 0
    assert compare.main([before, after, "--tolerance", "1.5"]) == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not JSON", "cannot be read as JSON"),
        ("[]", "not written by this suite"),
        (
            '{"machine": {}, "settings": {}, "cells": [{"contenders": {"ours": {"ms": {}}}}]}',
            "which figures",
        ),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_2(tmp_path, capsys, text, complaint):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    _stored(good, _run(1.0))
    bad.write_text(text)

    assert compare.main([str(bad), str(good)]) == 2
    assert complaint in capsys.readouterr().err


# Drills


def test_a_whole_run_of_the_drills_stays_below_25_minutes_and_a_quick_one_below_3():
    assert sum(cell.rounds(Effort()) for cell in faults.CELLS) < 25 * 60
    assert sum(cell.rounds(_QUICK) for cell in faults.CELLS) < 3 * 60


@pytest.mark.parametrize(
    ("drill", "name", "rival", "lost", "expected"),
    [
        ("403", drills.OURS, drills.PLAIN, 0, 0),
        ("403", drills.OURS, drills.PLAIN, 3, 3),
        ("dns", drills.OURS, drills.PLAIN, 100, 160),
        ("dns", drills.PATIENT, drills.PSYCOPG, 0, 0),
        ("dns", drills.PATIENT, drills.PSYCOPG, 100, 160),
    ],
)
def test_ours_may_lose_as_many_as_the_other_and_more_only_where_chance_decides(drill, name, rival, lost, expected):
    (drill,) = (one for one in drills.DRILLS if one.name == drill)
    in_flight = 7
    outcome = drills.Outcome(
        queries=9000,
        failed=lost + in_flight,
        in_flight=in_flight,
        longest=1.0,
        recovered=0.0,
        errors={"OSError": lost},
        is_well=True,
    )

    assert faults.allowed(drill, name, {rival: outcome}) == pytest.approx(expected)


def test_the_first_refresh_is_near_however_long_tokens_live():
    lives = {life: drills.Timing(life=life) for life in (3, 20, 200)}

    assert {life: timing.first_life - timing.last_fifth for life, timing in lives.items()} == {
        3: pytest.approx(2.4),
        20: 4,
        200: 4,
    }
    assert {life: timing.outage for life, timing in lives.items()} == {3: 9, 20: 60, 200: 74}


@pytest.mark.parametrize(("over_asyncpg", "shown"), [(0.0, "| 1,234 (5) · 2.00 s · 0.3 s |"), (7.0, "| **1,234 (5)")])
def test_the_page_of_the_drills_shows_what_was_lost_and_marks_what_is_worse(over_asyncpg, shown):
    seen = {"failed": 1234.0, "of them in flight": 5.0, "longest s": 2.0, "s to full recovery": 0.31}
    rows = [Row(name, tuple(Figure(*one) for one in _each_once(seen))) for name in drills.CONTENDERS]
    rows[0] = Row(rows[0].contender, (*rows[0].figures, Figure("lost beyond asyncpg's", (over_asyncpg,), at_most=0)))
    result = Result(cell="faults-403-20", group="faults", meaning="", loop="asyncio", rows=tuple(rows))
    versions = ("cpu", "cores", "python", "asyncpg", "psycopg", "psycopg-pool", "postgres", "asyncpool_creds")

    page = faults_page.render(report.assemble(dict.fromkeys(versions, "x"), {}, [result]))

    (row,) = (line for line in page.splitlines() if line.startswith("| one 403 |") and "1,234" in line)
    assert shown in row.removeprefix("| one 403 ")


def _each_once(values):
    return [(name, (value,)) for name, value in values.items()]


def test_a_run_without_drills_has_no_page():
    with pytest.raises(ValueError, match="no drills"):
        faults_page.render(report.assemble({}, {}, [_result(Figure("ms", (1.0,)))]))


def test_the_page_in_the_docs_is_what_the_stored_run_came_to():
    stored = Path(__file__).parents[2] / "benchmarks/results/faults/figures.json"

    page = faults_page.render(json.loads(stored.read_text()))

    assert (Path(__file__).parents[2] / "docs/faults.md").read_text() == page
