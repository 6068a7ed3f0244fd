"""The command: chooses cells and loops, shows progress, reports, and with ``--check`` judges."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks import (
    faults,
    herd,
    machine,
    manager,
    plots,
    report,
    rotation,
    saturation,
    scale,
    throughput,
    token_paths,
)
from benchmarks.figures import Result
from benchmarks.pools import PASSWORD, ROLE
from benchmarks.rounds import Cell, Conditions, Effort

_CELLS: Final[tuple[Cell, ...]] = (
    *throughput.CELLS,
    *saturation.CELLS,
    *herd.CELLS,
    *rotation.CELLS,
    *manager.CELLS,
    *token_paths.CELLS,
    *scale.CELLS,
    *faults.CELLS,
)
_QUICK: Final = Effort(
    blocks=2, rounds=4, slice=0.01, herds=3, rotations=1, steady=0.7, bursts=10, lives=(3.0,), pace=0.4
)
# A cell keeps the pools of all its contenders open at once.
_MAX_CONNECTIONS: Final = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _options(arguments)
    cells = _possible(
        [cell for cell in _CELLS if options.only is None or any(cell in chosen for chosen in options.only)]
    )
    loops = list(_LOOPS) if options.loop == "both" else [options.loop]
    effort = _QUICK if options.quick else Effort()
    if options.rounds is not None:
        effort = effort.with_rounds(options.rounds)

    # What is loaded stays; collecting between rounds need not look at it.
    gc.freeze()
    with PostgresServer(max_connections=_MAX_CONNECTIONS) as server:
        asyncio.run(server.create_role(ROLE, password=PASSWORD))
        results = _run(server, cells, loops, effort, options.seed)
        description = machine.describe(server.version)

    settings = {"quick": options.quick, "seed": options.seed, "loops": loops, "effort": asdict(effort)}
    figures = report.assemble(description, settings, results)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "figures.json").write_text(report.as_json(figures) + "\n", encoding="utf-8")
        plots.draw(figures, options.results)
    if options.json:
        sys.stdout.write(report.as_json(figures) + "\n")
    else:
        # Wide enough for the widest table where there is no terminal to be seen on.
        console = Console()
        report.print_tables(console if console.is_terminal else Console(width=320), description, results)
    return report.judge(figures["broken_floors"]) if options.check else 0


def _possible(cells: Sequence[Cell]) -> list[Cell]:
    """Return those whose distributions are installed, and say which are not."""
    possible: list[Cell] = []
    for cell in cells:
        missing = [distribution for distribution in cell.requires if not machine.is_installed(distribution)]
        if missing:
            sys.stderr.write(
                f"{cell.name} is left out: {' and '.join(missing)} not installed; pip install --group benchmarks\n"
            )
        else:
            possible.append(cell)
    return possible


def _run(
    server: PostgresServer, cells: Sequence[Cell], loops: Sequence[str], effort: Effort, seed: int
) -> list[Result]:
    results: list[Result] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn between rounds only: a thread that draws would be measured too.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        turns = [
            (cell, loop)
            for cell in cells
            if cell.rounds(effort)
            for loop in (loops if cell.only_loop is None else [cell.only_loop])
        ]
        task = progress.add_task("", total=sum(cell.rounds(effort) for cell, _ in turns))

        def tick() -> None:
            progress.update(task, advance=1, refresh=True)

        def say(line: str) -> None:
            console.print(line, soft_wrap=True, highlight=False)

        for cell, loop in turns:
            progress.update(task, description=f"{cell.name} on {loop}", refresh=True)
            if not console.is_terminal:
                console.print(f"{cell.name} on {loop}")
            # The same order of turns whatever else is measured.
            chance = random.Random(f"{seed} {cell.name}")
            conditions = Conditions(server=server, effort=effort, chance=chance, tick=tick, say=say)
            with asyncio.Runner(loop_factory=_LOOPS.get(loop)) as runner:
                rows = runner.run(cell.measure(conditions))
            results.append(Result(cell=cell.name, group=cell.group, meaning=cell.meaning, loop=loop, rows=rows))
    return results


def _uvloop() -> asyncio.AbstractEventLoop:
    import uvloop  # noqa: PLC0415 - it does not exist for every platform

    return uvloop.new_event_loop()


_LOOPS: Final[Mapping[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": _uvloop,
}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look in a fraction of the time, too noisy to judge by")
    parser.add_argument(
        "--only",
        action="append",
        type=_cells_called,
        metavar="NAME",
        help=f"a cell, or else all whose names begin so; may be repeated: {', '.join(cell.name for cell in _CELLS)}",
    )
    parser.add_argument("--loop", choices=(*_LOOPS, "both"), default="both", help="the event loop; default: both")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, single rounds included")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="store figures.json and the plots there; default: nothing is stored"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a floor does not hold")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="so many rounds in every cell")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which contenders take turns; default: 1")
    options = parser.parse_args(arguments)
    if options.loop != "asyncio" and importlib.util.find_spec("uvloop") is None:
        parser.error("uvloop is not installed; install it, or pass --loop asyncio")
    if options.results is not None and not machine.is_installed("matplotlib"):
        parser.error("--results draws plots, and matplotlib is not installed: pip install --group test")
    return options


def _cells_called(name: str) -> tuple[Cell, ...]:
    exactly = tuple(cell for cell in _CELLS if cell.name == name)
    cells = exactly or tuple(cell for cell in _CELLS if cell.name.startswith(f"{name}-"))
    if not cells:
        raise argparse.ArgumentTypeError(f"no cell is called {name!r}; there are {', '.join(c.name for c in _CELLS)}")
    return cells


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
