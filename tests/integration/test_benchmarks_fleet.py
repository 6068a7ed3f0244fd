"""The command that simulates a fleet, with a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_OURS = "asyncpool_creds"
_CONTENDERS = {_OURS, f"{_OURS}, no jitter", f"{_OURS}, no cap", "naive pool"}


def _fleet(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    small = ("--replicas", "10", "--connections", "5", "--lifetimes", "1", "--results", str(results))
    command = [sys.executable, "-m", "benchmarks.fleet", *small, *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_json_is_one_object_on_stdout_with_the_peaks_of_every_contender(tmp_path):
    run = _fleet(tmp_path, "--json", "--seed", "3")

    report = json.loads(run.stdout)
    assert run.returncode == 0, run.stderr
    assert {"python", "asyncpg", "asyncpool_creds"} <= set(report["machine"])
    assert {"replicas": 10, "connections": 5, "lifetimes": 1.0, "seed": 3}.items() <= report["settings"].items()
    assert [cell["name"] for cell in report["cells"]] == ["at-once", "spread", "outage"]
    for cell in report["cells"]:
        assert set(cell["contenders"]) == _CONTENDERS
    at_once = report["cells"][0]["contenders"]
    assert at_once["naive pool"]["peak connects/s"]["median"] == 10 * 5
    ours = at_once[_OURS]["peak connects/s"]["median"]
    assert at_once[_OURS]["naive's peak, own = 1"]["median"] == 10 * 5 / ours
    assert at_once[_OURS]["naive's peak, own = 1"]["at_least"] == 20
    assert at_once[_OURS]["replaced too late"]["median"] == 0
    assert at_once[_OURS]["first fill: peak connects/s"]["median"] == 10 * 5


def test_the_same_seed_draws_the_same_plot_and_another_a_different_one(tmp_path):
    for directory, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        assert _fleet(tmp_path / directory, "--seed", seed).returncode == 0

    def plots(directory):
        return [(tmp_path / directory / f"fleet.{kind}").read_bytes() for kind in ("png", "svg")]

    assert plots("one") == plots("again") != plots("two")
    png, svg = plots("one")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"</svg>" in svg


@pytest.mark.parametrize(("floor", "status"), [("2", 0), ("1000", 1)])
def test_check_fails_where_the_floor_is_not_reached_and_says_so(tmp_path, floor, status):
    run = _fleet(tmp_path, "--check", "--floor", floor)

    assert run.returncode == status, run.stderr
    assert ("floor broken: at-once" in run.stderr) is (status == 1)
    for contender in _CONTENDERS:
        assert contender in run.stdout
    assert "written: " in run.stderr


@pytest.mark.parametrize(
    "arguments", [("--replicas", "0"), ("--lifetimes", "0.5"), ("--token-lifetime", "nan"), ("--connections", "-1")]
)
def test_a_fleet_that_cannot_be_is_refused(tmp_path, arguments):
    run = _fleet(tmp_path, *arguments)

    assert run.returncode == 2
    assert arguments[0] in run.stderr
    assert not list(tmp_path.iterdir())
