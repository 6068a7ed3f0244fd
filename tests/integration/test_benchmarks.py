"""The benchmark command on a real server, with so few rounds that only its shape can be judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def _benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--loop", "asyncio", "--quick", "--rounds", "1", *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_json_is_one_object_on_stdout_with_every_round_of_every_contender():
    run = _benchmarks("--json", "--only", "acquire-1", "--only", "herd", "--only", "get")

    report = json.loads(run.stdout)
    assert run.returncode == 0
    assert {"cpu", "cores", "python", "asyncpg", "postgres"} <= set(report["machine"])
    assert [cell["name"] for cell in report["cells"]] == ["acquire-1", "herd-manager", "herd-pool", "get"]
    acquire = report["cells"][0]["contenders"]
    assert set(acquire) == {"asyncpg", "asyncpg again", "asyncpool_creds", "asyncpool_creds, wait_for_reset"}
    ratio = acquire["asyncpool_creds"]["throughput, asyncpg = 1"]
    assert ratio["at_least"] == 8.0
    assert ratio["rounds"] == [ratio["median"]]


def test_a_herd_makes_one_fetch_and_asyncpg_one_for_each_connection():
    run = _benchmarks("--json", "--check", "--only", "herd-pool")

    contenders = json.loads(run.stdout)["cells"][0]["contenders"]
    assert run.returncode == 0, run.stderr
    assert contenders["asyncpool_creds"]["fetches"]["median"] == 1
    assert contenders["asyncpg"]["fetches"]["median"] == 10


def test_those_who_wait_longest_wait_less_than_at_asyncpgs_pool():
    run = _benchmarks("--json", "--only", "saturation")

    saturation = json.loads(run.stdout)["cells"][0]["contenders"]
    assert run.returncode == 0, run.stderr
    assert set(saturation) == {"asyncpg", "asyncpg again", "asyncpool_creds", "asyncpool_creds, wait_for_reset"}
    assert saturation["asyncpool_creds"]["asyncpg's p99, own = 1"]["rounds"]


def test_a_rotation_is_survived_by_every_contender_and_is_reported_in_a_table():
    run = _benchmarks("--only", "rotation")

    assert run.returncode == 0, run.stderr
    for contender in ("asyncpool_creds", "expire_connections()", "close and reconnect"):
        assert contender in run.stdout
    assert "rotation on asyncio" in run.stderr


def test_a_cell_that_does_not_exist_is_refused_with_the_names_of_those_that_do():
    run = _benchmarks("--only", "nonsense")

    assert run.returncode == 2
    assert "fetchval-200" in run.stderr
