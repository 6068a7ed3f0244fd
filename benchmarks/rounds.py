"""How rounds are run: contenders take turns in an order that is random and repeatable, nothing else runs meanwhile."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks.figures import Metrics, Round, Row

__all__ = ["Cell", "Conditions", "Effort", "Measurement", "play", "repeated", "timed"]

Measurement: TypeAlias = Callable[[], Awaitable[Metrics]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Args:
        blocks: How often the pools of a throughput cell are made anew: luck in where the server's
            processes land would otherwise stay with one contender.
        rounds: Rounds of a throughput cell in each block.
        slice: Seconds, more or less, for which a contender runs in one round.
        herds: Rounds of a herd cell, and of those of scale.
        rotations: Rounds of the rotation cell.
        steady: Seconds before a rotation.
        bursts: Rounds of the manager's cell.
        drills: Rounds of a drill.
        lives: Seconds that the tokens of the drills live; those for others are left out.
        pace: What the seconds that the faults of a drill last are multiplied by, and those that are watched after them.
    """

    blocks: int = 10
    rounds: int = 8
    slice: float = 0.02
    herds: int = 15
    rotations: int = 7
    steady: float = 1.5
    bursts: int = 60
    drills: int = 1
    lives: tuple[float, ...] = (3.0, 20.0, 200.0)
    pace: float = 1.0

    def with_rounds(self, rounds: int) -> Effort:
        """Return this with so many rounds in every cell (rounded up to whole blocks)."""
        blocks = min(self.blocks, rounds)
        in_block = math.ceil(rounds / blocks)
        return replace(
            self, blocks=blocks, rounds=in_block, herds=rounds, rotations=rounds, bursts=rounds, drills=rounds
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a cell is given to measure with.

    Args:
        server: A PostgreSQL with the roles the cells need.
        effort: How much to measure.
        chance: Decides whose turn it is.
        tick: To be called after each round, outside what is timed.
        say: Shows a line above the progress.
    """

    server: PostgresServer
    effort: Effort
    chance: random.Random
    tick: Callable[[], None]
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One line of the suite.

    Args:
        name: For ``--only``.
        group: The table it stands in.
        meaning: What it measures, in a sentence.
        rounds: How many ticks it makes; none: it is left out.
        measure: Measures it.
        requires: Distributions that it cannot do without.
        only_loop: The one loop it is measured on; "virtual" if it brings its own, on a virtual clock; None: each.
    """

    name: str
    group: str
    meaning: str
    rounds: Callable[[Effort], int]
    measure: Callable[[Conditions], Coroutine[Any, Any, tuple[Row, ...]]]
    requires: tuple[str, ...] = ()
    only_loop: str | None = None


async def play(contenders: Mapping[str, Measurement], rounds: int, conditions: Conditions) -> list[Round]:
    """Run the rounds; in each, every contender has one turn."""
    played: list[Round] = []
    names = list(contenders)
    for _ in range(rounds):
        conditions.chance.shuffle(names)
        gc.collect()
        played.append({name: await contenders[name]() for name in names})
        conditions.tick()
    return played


async def timed(work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Return the wall time and the CPU time (of this process) that `work` takes, in seconds.

    Without the garbage collector, as timeit does it: its runs are rare and long next to a turn.
    """
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        await work()
        return time.perf_counter() - wall, time.process_time() - cpu
    finally:
        gc.enable()


def repeated(function: Callable[[], Awaitable[object]], times: int) -> Measurement:
    """Return what measures the wall time and the CPU time of one call, out of so many in a row."""

    async def work() -> None:
        for _ in range(times):
            await function()

    async def measure() -> Metrics:
        wall, cpu = await timed(work)
        return {"wall": wall / times, "cpu": cpu / times}

    return measure
