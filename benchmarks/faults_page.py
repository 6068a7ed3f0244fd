"""``docs/faults.md`` as a run wrote it: ``python -m benchmarks.faults_page figures.json > docs/faults.md``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, cast

from benchmarks.drills import DRILLS, OURS, PATIENT, PLAIN, PSYCOPG
from benchmarks.faults import FAILED, GROUP, IN_FLIGHT, LONGEST, RECOVERED, cell_name
from benchmarks.report import CellReport, FigureReport, Report
from benchmarks.rounds import Effort

__all__ = ["main", "render"]

_COLUMNS: Final = {OURS: "ours", PATIENT: "ours, `connect_patience=10`", PLAIN: "asyncpg", PSYCOPG: "psycopg_pool"}
_INTRODUCTION: Final = """\
# What a fault costs

Written by `python -m benchmarks --only faults` and `benchmarks.faults_page`: no figure in here was typed by hand.
Measured on {machine}.

Twenty workers on a pool of ten connections ask for 10 ms of work each, pause for 50 to 150 ms, and ask again. Something
goes wrong, everything is well again, and it is watched for a while. Four pools go through it at the same time, in one
process, each with a token issuer and a door of its own, all in front of one PostgreSQL:

- **ours**: `create_pool(dsn, credentials=TokenManager(OAuth2(...)))`, as it comes;
- **ours, `connect_patience=10`**: an acquire goes on trying for ten seconds, and the manager has `patience=10`;
- **asyncpg**: `password=` the usual function, which keeps a token until its last fifth, asks for another one then, and
  uses the old one while it lives if it gets none;
- **psycopg_pool**: `conninfo=` a function that asks the same one, and `check=AsyncConnectionPool.check_connection`,
  without which each connection that was cut costs a query. Its `timeout` is 30 s, as it comes.

In a cell: **failed queries**, and in brackets how many of them had a connection and lost it, because the server was
working on them, or had just gone and nobody had noticed yet (psycopg_pool, which asks the server at each checkout,
notices that; and with everything in one process, noticing takes ten milliseconds and more); the **longest** that a
query took, with its acquire, whether it failed or not; and the seconds from the end of the fault until the last query
**ended that failed or took more than a second** (`-`: none did).
"""
_NOTES: Final = """\
## What is what

- *Issuer down for three lives*: it refuses connections. With tokens of 200 s that would be ten minutes; it is shortened
  to half a minute more than the token in hand has left.
- *One 403*, *one 429*: the answer to the next request for a token, whoever makes it; the one after that is served.
- *Database restarted*: a real restart (fast shutdown, start) of the real server, and nobody listens for a second.
- *57P03*: all connections are reset, as in a fail-over, and new ones are told that the server is starting up.
- *Connects 2 s slow*: for 12 s, the door looks at each password two seconds late.
- *Server clock 10 s ahead*: for 15 to 32 s, the door refuses each token ten seconds before its end; one of 3 s always.
- *DNS gone*: the name of the database cannot be resolved (`EAI_AGAIN`); connections that stand are left alone.
- *Two at once*: both begin in the same moment, unless it says otherwise.

In all of them but the issuer's outages, the restart and 57P03, a proxy cuts the idlest connection of each pool once a
second: a pool whose connections all stand asks for no token, opens nothing, and notices nothing. However long tokens
live, the first one of a run has four seconds and the last fifth of its life left (or the 3 s that it lives), so the
first refresh falls into the fault, or is what it hits. asyncpg and psycopg_pool ask for tokens only when they connect.

A bold cell of ours is worse than what it is compared with, which is asyncpg for ours as it comes, and psycopg_pool for
`connect_patience=10`. Queries that lost their connection under them are left out of that. Where the other one lost
none, ours may lose none. Only without patience, while connects fail, who happens to need one is lost with either;
there, a fifth and two queries of each worker are no difference.
"""


def render(report: Report) -> str:
    """Return the page; a drill that was not run has a row without figures.

    Raises:
        ValueError: The run had no drills.
    """
    cells = {cell["name"]: cell for cell in report["cells"] if cell["group"] == GROUP}
    if not cells:
        raise ValueError("this run had no drills; pass --only faults")
    machine = report["machine"]
    named = ("cpu", "python", "asyncpg", "psycopg", "psycopg-pool", "postgres", "asyncpool_creds")
    described = f"{machine['cores']} cores of " + ", ".join(
        f"{machine[name]}" if name in {"cpu", "python"} else f"{name} {machine[name]}" for name in named
    )
    parts = [_INTRODUCTION.format(machine=described)]
    for life in Effort().lives:
        parts += [f"## Tokens of {life:g} s\n", "\n".join(_table(cells, life)) + "\n"]
    return "\n".join([*parts, _NOTES])


def _table(cells: dict[str, CellReport], life: float) -> Iterator[str]:
    yield f"| | {' | '.join(_COLUMNS.values())} |"
    yield f"|---|{'---|' * len(_COLUMNS)}"
    for drill in DRILLS:
        cell = cells.get(cell_name(drill, life))
        row = ["" if cell is None else _shown(cell["contenders"][name]) for name in _COLUMNS]
        yield f"| {drill.title} | {' | '.join(row)} |"


def _shown(figures: dict[str, FigureReport]) -> str:
    failed, in_flight = (figures[name]["median"] for name in (FAILED, IN_FLIGHT))
    recovered = figures[RECOVERED]["median"]
    text = f"{failed:,.0f}" + (f" ({in_flight:.0f})" if in_flight else "")
    text += f" · {figures[LONGEST]['median']:.2f} s · " + (f"{recovered:.1f} s" if recovered else "-")
    return text if all(figure["holds"] for figure in figures.values()) else f"**{text}**"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults_page", description=__doc__)
    parser.add_argument("figures", type=Path, metavar="FIGURES.json", help="what --results or --json wrote")
    options = parser.parse_args(arguments)
    sys.stdout.write(render(cast("Report", json.loads(options.figures.read_text(encoding="utf-8")))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
