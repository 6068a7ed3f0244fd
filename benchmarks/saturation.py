"""Who waits for how long where there are more tasks than connections, and none of them ever pauses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Final

from benchmarks.figures import Figure, Metrics, Round, Row, percentile, ratios, series
from benchmarks.pools import CONTENDERS, OURS, PLAIN, WAITING, AnyPool
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

__all__ = ["CELLS"]

_CONNECTIONS: Final = 20
_TASKS: Final = 50
_OPERATIONS: Final = 3000
# asyncpg's p99 is at least so many times ours.
_FLOOR: Final = 4.0


def _rounds(effort: Effort) -> int:
    return max(effort.blocks, 3)


def _turn(pool: AnyPool) -> Measurement:
    async def work(turns: Iterator[int], waits: list[float]) -> None:
        for _ in turns:
            asked = time.perf_counter()
            async with pool.acquire() as connection:
                waits.append(time.perf_counter() - asked)
                await connection.fetchval("SELECT 1")

    async def turn() -> Metrics:
        waits: list[float] = []
        turns = iter(range(_OPERATIONS))

        async def everybody() -> None:
            await asyncio.gather(*(work(turns, waits) for _ in range(_TASKS)))

        wall, _ = await timed(everybody)
        shares = {"p50": percentile(waits, 0.5), "p99": percentile(waits, 0.99), "max": max(waits)}
        return {**shares, "wall": wall / _OPERATIONS}

    return turn


async def _measure(conditions: Conditions) -> tuple[Row, ...]:
    async with AsyncExitStack() as pools:
        turns: dict[str, Measurement] = {}
        for name, contender in CONTENDERS.items():
            turns[name] = _turn(await pools.enter_async_context(contender(conditions.server, _CONNECTIONS, None)))
        rounds = await play(turns, _rounds(conditions.effort), conditions)
    return tuple(_row(rounds, name) for name in CONTENDERS)


def _row(rounds: list[Round], name: str) -> Row:
    waits = tuple(Figure(f"acquire {share} ms", series(rounds, name, share, 1e3)) for share in ("p50", "p99", "max"))
    cost = Figure("µs/op", series(rounds, name, "wall", 1e6))
    if name == PLAIN:
        return Row(name, (*waits, cost))
    floor = _FLOOR if name in (OURS, WAITING) else None
    shorter = Figure("asyncpg's p99, own = 1", ratios(rounds, PLAIN, name, "p99"), at_least=floor)
    throughput = Figure("throughput, asyncpg = 1", ratios(rounds, PLAIN, name, "wall"))
    return Row(name, (*waits, cost, shorter, throughput))


CELLS: Final = (
    Cell(
        name="saturation",
        group="saturation",
        meaning=f"time to acquire: {_TASKS} tasks on {_CONNECTIONS} connections, SELECT 1, no pause in between",
        rounds=_rounds,
        measure=_measure,
    ),
)
