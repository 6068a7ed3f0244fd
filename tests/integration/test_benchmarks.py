"""The benchmark command on a real server, with so few rounds that only its shape can be judged."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_ASYNCPG_POOLS = {
    "asyncpg",
    "asyncpg again",
    "asyncpool_creds",
    "asyncpool_creds, wait_for_reset",
    "asyncpool_creds, reset=False",
}
_PEERS = {"psycopg_pool", "psycopg_pool, asyncpg's reset", "SQLAlchemy on asyncpg"}
_BY_HAND = {"held by hand", "held by hand, reset"}


def _benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--loop", "asyncio", "--quick", "--rounds", "1", *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_json_is_one_object_on_stdout_with_every_round_of_every_contender():
    run = _benchmarks("--json", "--only", "acquire-1", "--only", "herd", "--only", "get")

    report = json.loads(run.stdout)
    assert run.returncode == 0
    assert {"cpu", "cores", "python", "asyncpg", "postgres"} <= set(report["machine"])
    assert [cell["name"] for cell in report["cells"]] == ["acquire-1", "herd-manager", "herd-pool", "get"]
    acquire = report["cells"][0]["contenders"]
    assert set(acquire) == _ASYNCPG_POOLS | _PEERS
    ratio = acquire["asyncpool_creds"]["throughput, asyncpg = 1"]
    assert ratio["at_least"] == 8.0
    assert ratio["rounds"] == pytest.approx([ratio["median"]], rel=1e-5)


def test_a_herd_makes_one_fetch_and_asyncpg_one_for_each_connection():
    run = _benchmarks("--json", "--check", "--only", "herd-pool")

    contenders = json.loads(run.stdout)["cells"][0]["contenders"]
    assert run.returncode == 0, run.stderr
    assert contenders["asyncpool_creds"]["fetches"]["median"] == 1
    assert contenders["asyncpg"]["fetches"]["median"] == 10


def test_throughput_is_measured_against_everybody_who_can_do_the_same_and_drawn(tmp_path):
    run = _benchmarks("--results", str(tmp_path), "--only", "select-1", "--only", "select-50", "--only", "fetchval-1")

    select, crowd, fetchval = json.loads((tmp_path / "figures.json").read_text())["cells"]
    assert run.returncode == 0, run.stderr
    assert set(select["contenders"]) == set(crowd["contenders"]) == _ASYNCPG_POOLS | _PEERS | _BY_HAND
    assert set(fetchval["contenders"]) == _ASYNCPG_POOLS | _BY_HAND
    against_psycopg = crowd["contenders"]["asyncpool_creds, reset=False"]["throughput, psycopg_pool = 1"]
    assert (against_psycopg["at_least"], against_psycopg["better"]) == (1.0, "higher")
    assert crowd["contenders"]["asyncpool_creds"]["throughput, by hand with reset = 1"]["median"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "throughput.png", "throughput.svg"}


def test_the_longest_waits_of_everybody_are_compared():
    run = _benchmarks("--json", "--only", "saturation")

    saturation = json.loads(run.stdout)["cells"][0]["contenders"]
    assert run.returncode == 0, run.stderr
    assert set(saturation) == _ASYNCPG_POOLS | _PEERS
    for share in ("p99", "max"):
        assert saturation["asyncpool_creds"][f"asyncpg's {share}, own = 1"]["at_least"] == 4.0


def test_a_herd_of_ten_thousand_makes_one_fetch_too():
    run = _benchmarks("--json", "--only", "herd-manager")

    contenders = json.loads(run.stdout)["cells"][0]["contenders"]
    assert run.returncode == 0, run.stderr
    many = contenders["asyncpool_creds, 10,000 callers"]
    assert many["fetches"]["median"] == 1
    assert many["time each, among 1,000 = 1"]["at_most"] == 1.5


def test_what_a_thousand_managers_and_the_pools_take_stays_below_its_bounds():
    run = _benchmarks("--json", "--check", "--only", "scale")

    cells = {cell["name"]: cell["contenders"] for cell in json.loads(run.stdout)["cells"]}
    assert run.returncode == 0, run.stderr
    assert cells["scale-memory"]["asyncpool_creds"]["bytes each"]["median"] > 0
    assert cells["scale-idle"]["asyncpool_creds, 60 min"]["fetches an hour"]["median"] == 1000
    assert cells["scale-idle-pool"]["asyncpg"]["wake-ups an hour"]["median"] == 0
    assert cells["scale-refresh"]["task that sleeps"]["in one second"]["median"] == 1000


def test_a_rotation_is_survived_by_every_contender_and_is_reported_in_a_table():
    run = _benchmarks("--only", "rotation")

    assert run.returncode == 0, run.stderr
    for contender in ("asyncpool_creds", "expire_connections()", "close and reconnect"):
        assert contender in run.stdout
    assert "rotation on asyncio" in run.stderr


def test_a_rotation_under_tls_is_followed_through_time_and_keeps_nobody_waiting(tmp_path):
    run = _benchmarks("--results", str(tmp_path), "--only", "rotation-tls")

    (rotation,) = json.loads((tmp_path / "figures.json").read_text())["cells"]
    assert run.returncode == 0, run.stderr
    ours, course = rotation["contenders"]["asyncpool_creds"], rotation["courses"]["asyncpool_creds"]
    assert ours["p99, own steady = 1"]["at_most"] == 1.3
    assert ours["acquires that waited for a connect"]["rounds"] == [0]
    assert ours["failed workers"]["rounds"] == [0]
    assert course[0]["at"] < -0.6
    assert course[-1]["at"] > 0.9
    assert (tmp_path / "rotation-tls.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "rotation-tls.svg").read_text()


def test_tokens_are_compared_where_the_connectors_are_and_their_absence_is_named():
    run = _benchmarks("--json", "--only", "token")

    installed = {found.name for found in distributions()}
    are_there = {"aurora-dsql-python-connector", "cloud-sql-python-connector"} <= installed
    contenders = [name for cell in json.loads(run.stdout)["cells"] for name in cell["contenders"]]
    assert run.returncode == 0, run.stderr
    assert ("AuroraDSQL.fetch()" in contenders) is are_there
    assert ("token is left out" in run.stderr) is not are_there


def test_a_drill_takes_all_contenders_through_it_at_once_and_is_drawn_and_written_down(tmp_path):
    run = _benchmarks("--results", str(tmp_path), "--only", "faults-restart")
    page = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults_page", str(tmp_path / "figures.json")],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    (restart,) = json.loads((tmp_path / "figures.json").read_text())["cells"]
    contenders = restart["contenders"]
    assert (run.returncode, page.returncode) == (0, 0), run.stderr + page.stderr
    assert (restart["name"], restart["loop"]) == ("faults-restart-3", "asyncio")
    assert set(contenders) == {"asyncpool_creds", "asyncpool_creds, connect_patience=10", "asyncpg", "psycopg_pool"}
    assert all(figures["queries"]["median"] > 100 for figures in contenders.values())
    assert contenders["asyncpg"]["failed"]["median"] > 0
    assert contenders["asyncpool_creds"]["lost beyond asyncpg's"]["at_most"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "faults.png", "faults.svg"}
    assert "failed (" in run.stderr
    assert f"| database restarted | {contenders['asyncpool_creds']['failed']['median']:,.0f}" in page.stdout.replace(
        "| **", "| "
    )


def test_a_cell_that_does_not_exist_is_refused_with_the_names_of_those_that_do():
    run = _benchmarks("--only", "nonsense")

    assert run.returncode == 2
    assert "fetchval-200" in run.stderr
