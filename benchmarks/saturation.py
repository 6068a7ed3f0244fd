"""Who waits for how long where there are more tasks than connections, and none of them ever pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final, TypeAlias

from benchmarks.figures import Figure, Metrics, Round, Row, percentile, ratios, series
from benchmarks.peers import PEERS, PSYCOPG
from benchmarks.pools import OURS, PLAIN, POOLS, UNRESET, WAITING
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

__all__ = ["CELLS"]

_Worker: TypeAlias = Callable[[Iterator[int], list[float]], Coroutine[Any, Any, None]]

_CONNECTIONS: Final = 20
_TASKS: Final = 50
_OPERATIONS: Final = 3000
_OF_OURS: Final = (OURS, WAITING, UNRESET)
# asyncpg's p99, and its longest wait, are at least so many times ours.
_FLOOR: Final = 4.0
# And what is done in the meantime is not less.
_THROUGHPUT: Final = 1.0


def _rounds(effort: Effort) -> int:
    return effort.blocks


def _turn(worker: _Worker) -> Measurement:
    async def turn() -> Metrics:
        waits: list[float] = []
        turns = iter(range(_OPERATIONS))

        async def everybody() -> None:
            await asyncio.gather(*(worker(turns, waits) for _ in range(_TASKS)))

        wall, _ = await timed(everybody)
        shares = {"p50": percentile(waits, 0.5), "p99": percentile(waits, 0.99), "max": max(waits)}
        return {**shares, "wall": wall / _OPERATIONS}

    return turn


async def _measure(conditions: Conditions) -> tuple[Row, ...]:
    async with AsyncExitStack() as pools:
        turns: dict[str, Measurement] = {}
        for name, contender in {**POOLS, **PEERS}.items():
            if contender.waiting is not None:
                pool = await pools.enter_async_context(contender.open(conditions.server, _CONNECTIONS))
                turns[name] = _turn(partial(contender.waiting, pool))
        rounds = await play(turns, _rounds(conditions.effort), conditions)
    return tuple(_row(rounds, name) for name in turns)


def _row(rounds: list[Round], name: str) -> Row:
    figures = [Figure(f"acquire {share} ms", series(rounds, name, share, 1e3)) for share in ("p50", "p99", "max")]
    figures.append(Figure("µs/op", series(rounds, name, "wall", 1e6)))
    if name == PLAIN:
        return Row(name, tuple(figures))
    floor, throughput = (_FLOOR, _THROUGHPUT) if name in _OF_OURS else (None, None)
    for share in ("p99", "max"):
        shorter = ratios(rounds, PLAIN, name, share)
        figures.append(Figure(f"asyncpg's {share}, own = 1", shorter, at_least=floor, better="higher"))
    if name in _OF_OURS:
        against = ratios(rounds, name, PSYCOPG, "p99")
        figures.append(Figure("p99, psycopg_pool = 1", against, better="lower"))
    speed = ratios(rounds, PLAIN, name, "wall")
    figures.append(Figure("throughput, asyncpg = 1", speed, at_least=throughput, better="higher"))
    return Row(name, tuple(figures))


CELLS: Final = (
    Cell(
        name="saturation",
        group="saturation",
        meaning=f"time to acquire: {_TASKS} tasks on {_CONNECTIONS} connections, SELECT 1, no pause in between",
        rounds=_rounds,
        measure=_measure,
    ),
)
