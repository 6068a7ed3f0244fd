"""A fleet, simulated: how many connects and fetches a second a thousand replicas make of a rotation.

``python -m benchmarks.fleet`` runs the library's own policy, token managers and rotations, and beside them what is
usual without them, on virtual time against a modelled server and source; see `benchmarks.fleet_model`. Without jitter
means that every number which the library draws at random (from `random.random`) is 0.5: the same delays on average,
and for all the same.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from asyncpool_creds._pool import DEFAULT_RECONNECTS_PER_SECOND
from benchmarks import fleet_plot, machine, report
from benchmarks.figures import Figure, Result, Row
from benchmarks.fleet_model import Contender, Fleet, Life, Naive, Ours, Scenario, live, peak

__all__ = ["main"]

_OURS: Final = "asyncpool_creds"
_NAIVE: Final = "naive pool"
_AT_ONCE: Final = Scenario(name="at-once", meaning="all replicas start in the same moment")
_SPREAD: Final = Scenario(name="spread", meaning="replicas start at random over one lifetime of a token", spread=1.0)
_OUTAGE: Final = Scenario(
    name="outage",
    meaning="as at-once, and the source fails from half of the first lifetime until a fiftieth of it is left",
    back=1 / 50,
)
_SCENARIOS: Final = (_AT_ONCE, _SPREAD, _OUTAGE)
_QUICK: Final = {"replicas": 100, "lifetimes": 1.0}
# The naive fleet's peak of connects is at least so many times ours, where all start at once.
_FLOOR: Final = 20.0
# Where they start spread there is no storm to prevent: no fleet that replaces every connection once in the life of a
# token connects at less than 22 a second (1,000 replicas, 20 connections, 900 s), and the naive peak is six replicas.
_FLOOR_SPREAD: Final = 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _options(arguments)
    fleet = Fleet(
        replicas=options.replicas,
        connections=options.connections,
        token_lifetime=options.token_lifetime,
        lifetimes=options.lifetimes,
        retire_when=options.retire_when,
        seed=options.seed,
    )
    lives = _simulate(fleet, _contenders(options.cap))
    results = [_result(fleet, scenario, lives[scenario], options.floor) for scenario in _SCENARIOS]
    description = machine.describe("modelled")
    if options.json:
        settings = {**asdict(fleet), "cap": options.cap, "floor": options.floor}
        sys.stdout.write(report.as_json(report.assemble(description, settings, results)) + "\n")
    else:
        console = Console()
        report.print_tables(console if console.is_terminal else Console(width=200), description, results)
    for path in fleet_plot.save(fleet, lives, options.results):
        sys.stderr.write(f"written: {path}\n")
    return report.judge(report.broken_floors(results)) if options.check else 0


def _contenders(cap: float) -> dict[str, Contender]:
    return {
        _OURS: Ours(cap),
        f"{_OURS}, no jitter": Ours(cap, has_jitter=False),
        f"{_OURS}, no cap": Ours(math.inf),
        _NAIVE: Naive(),
    }


def _simulate(fleet: Fleet, contenders: Mapping[str, Contender]) -> dict[Scenario, dict[str, Life]]:
    lives: dict[Scenario, dict[str, Life]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = len(contenders) * sum(scenario.duration(fleet) for scenario in _SCENARIOS)
        task = progress.add_task("", total=total)

        def tick(seconds: float) -> None:
            progress.advance(task, seconds)

        for scenario in _SCENARIOS:
            lives[scenario] = {}
            for name, contender in contenders.items():
                progress.update(task, description=f"{scenario.name}: {name}")
                lives[scenario][name] = live(fleet, scenario, contender, tick)
    return lives


def _result(fleet: Fleet, scenario: Scenario, lives: Mapping[str, Life], floor: float) -> Result:
    rows = tuple(Row(name, _figures(fleet, scenario, lives, name, floor)) for name in lives)
    return Result(cell=scenario.name, group="fleet", meaning=scenario.meaning, loop="virtual", rows=rows)


def _figures(
    fleet: Fleet, scenario: Scenario, lives: Mapping[str, Life], name: str, floor: float
) -> tuple[Figure, ...]:
    life, naive = lives[name], lives[_NAIVE]
    connects, fetches = peak(life.server.asked["rotation"]), peak(life.source.asked["rotation"])
    # Every connection once in the life of a token: slower is impossible.
    least = fleet.replicas * fleet.connections / fleet.token_lifetime
    # Nothing is demanded after an outage: with short tokens there is no time in which the server could do it all.
    at_least = {_AT_ONCE: floor, _SPREAD: _FLOOR_SPREAD}.get(scenario) if name == _OURS else None
    return (
        Figure("peak connects/s", (connects,)),
        Figure("naive's peak, own = 1", (peak(naive.server.asked["rotation"]) / connects,), at_least, better="higher"),
        Figure("least possible peak = 1", (connects / least,)),
        Figure("slowest connect ms", (life.server.slowest["rotation"] * 1e3,)),
        Figure("peak fetches/s", (fetches,)),
        Figure("naive's peak fetches, own = 1", (peak(naive.source.asked["rotation"]) / fetches,), better="higher"),
        Figure("replaced too late", (life.late,), at_most=0 if at_least is not None else None),
        Figure("first fill: peak connects/s", (peak(life.server.asked["first fill"]),)),
        Figure("first fill: peak fetches/s", (peak(life.source.asked["first fill"]),)),
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    normal = Fleet()
    parser.add_argument("--replicas", type=_count, metavar="N", help=f"default: {normal.replicas}")
    parser.add_argument(
        "--connections", type=_count, default=normal.connections, metavar="N", help="of each; default: %(default)s"
    )
    parser.add_argument(
        "--token-lifetime",
        type=_positive,
        default=normal.token_lifetime,
        metavar="SECONDS",
        help="default: %(default)g, as Amazon RDS has it",
    )
    parser.add_argument(
        "--lifetimes",
        type=_at_least_one,
        metavar="N",
        help=f"to live through after the last start; default: {normal.lifetimes:g}",
    )
    parser.add_argument(
        "--retire-when",
        choices=("expired", "rotated"),
        default=normal.retire_when,
        help="of our pools; default: %(default)s",
    )
    parser.add_argument(
        "--cap",
        type=_positive,
        default=DEFAULT_RECONNECTS_PER_SECOND,
        metavar="PER_SECOND",
        help="max_reconnects_per_second of each of our pools; default: %(default)g",
    )
    parser.add_argument("--seed", type=int, default=normal.seed, help="of starts and jitter; default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="{replicas} replicas, {lifetimes:g} lifetime".format(**_QUICK)
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a floor does not hold")
    parser.add_argument(
        "--floor",
        type=_positive,
        default=_FLOOR,
        metavar="TIMES",
        help="started at once, the naive peak of connects is at least so many times ours; default: %(default)g",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="DIRECTORY",
        help="where fleet.png and fleet.svg go; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    for name, quick in _QUICK.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else getattr(normal, name))
    if not machine.is_installed("matplotlib"):
        parser.error("matplotlib is not installed; pip install --group test has it")
    return options


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _at_least_one(text: str) -> float:
    number = _positive(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"in less than one lifetime nothing rotates; got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
