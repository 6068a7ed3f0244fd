"""Operations a second through a pool of ten, by what is done and by how many tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from benchmarks.figures import Figure, Metrics, Round, Row, ratios, series
from benchmarks.peers import HELD, PEERS, PSYCOPG
from benchmarks.pools import CONTROL, OURS, PLAIN, POOLS, UNRESET, WAITING, AnyContender, asyncpg_pool, our_pool
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

if TYPE_CHECKING:
    import asyncpg

__all__ = ["CELLS"]

_Worker: TypeAlias = Callable[[Iterator[int]], Coroutine[Any, Any, None]]

_CONNECTIONS: Final = 10
# CPython specialises its code to the types it meets, and asyncpg's pool is shared by contenders with different
# ones: after so many operations it has got used to those whose turn it is, as it is for good in a service.
_WARM_UP: Final = 150
# asyncpg's throughput is 1; the control shows how far from that the noise reaches.
_NOTHING_SENT: Final = {OURS: 8.0, WAITING: 8.0, UNRESET: 8.0}
_ONE_TASK: Final = {OURS: 1.8, WAITING: 1.05, UNRESET: 1.8}
_SEVERAL_TASKS: Final = {OURS: 1.15, WAITING: 1.15, UNRESET: 1.15}
# With nothing reset on either side.
_AGAINST_PSYCOPG: Final = 1.0
_MEANINGS: Final = {
    "acquire": "acquire and release, nothing sent by the caller",
    "select": "acquire, SELECT 1, release",
    "fetchval": "pool.fetchval('SELECT 1')",
}


def _rounds(effort: Effort) -> int:
    return effort.blocks * effort.rounds


def _floors(operation: str, tasks: int) -> Mapping[str, float]:
    if operation == "acquire":
        return _NOTHING_SENT
    return _ONE_TASK if tasks == 1 else _SEVERAL_TASKS


def _cell(operation: str, tasks: int) -> Cell:
    everybody = {**POOLS, **PEERS}
    contenders = {name: contender for name, contender in everybody.items() if operation in contender.operations}
    floors = _floors(operation, tasks)

    async def measure(conditions: Conditions) -> tuple[Row, ...]:
        rounds = await _measure(conditions, contenders, operation, tasks)
        return tuple(_with_peers(_row(rounds, name, floor=floors.get(name)), rounds, tasks) for name in contenders)

    return Cell(
        name=f"{operation}-{tasks}",
        group="throughput",
        meaning=f"{_MEANINGS[operation]}: {tasks} task{'s' * (tasks > 1)} on {_CONNECTIONS} connections",
        rounds=_rounds,
        measure=measure,
    )


async def _measure_bookkeeping(conditions: Conditions) -> tuple[Row, ...]:
    async def reset(connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Send nothing."""

    opened = {
        PLAIN: partial(asyncpg_pool, reset=reset),
        CONTROL: partial(asyncpg_pool, reset=reset),
        OURS: partial(our_pool, reset=reset),
    }
    contenders = {name: replace(POOLS[name], open=open_pool) for name, open_pool in opened.items()}
    rounds = await _measure(conditions, contenders, "acquire", 1)
    return tuple(_with_added_cpu(_row(rounds, name, floor=None), rounds) for name in contenders)


def _with_added_cpu(row: Row, rounds: list[Round]) -> Row:
    if row.contender == PLAIN:
        return row
    added = tuple(1e9 * (one[row.contender]["cpu"] - one[PLAIN]["cpu"]) for one in rounds)
    return Row(row.contender, (*row.figures, Figure("added CPU ns/op", added)))


def _with_peers(row: Row, rounds: list[Round], tasks: int) -> Row:
    """Return `row` with what ours is against those who do as much, or as little, as it does."""
    name, figures = row.contender, row.figures
    if name in (OURS, WAITING) and HELD in rounds[0]:
        against = ratios(rounds, HELD, name, "wall")
        figures = (*figures, Figure("throughput, by hand with reset = 1", against, better="higher"))
    if name == UNRESET and PSYCOPG in rounds[0]:
        floor = _AGAINST_PSYCOPG if tasks > 1 else None
        against = ratios(rounds, PSYCOPG, name, "wall")
        figures = (*figures, Figure("throughput, psycopg_pool = 1", against, at_least=floor, better="higher"))
    return Row(name, figures)


async def _measure(
    conditions: Conditions, contenders: Mapping[str, AnyContender], operation: str, tasks: int
) -> list[Round]:
    effort = conditions.effort
    rounds: list[Round] = []
    for _ in range(effort.blocks):
        async with AsyncExitStack() as pools:
            names = list(contenders)
            conditions.chance.shuffle(names)
            turns: dict[str, Measurement] = {}
            for name in names:
                contender = contenders[name]
                pool = await pools.enter_async_context(contender.open(conditions.server, _CONNECTIONS))
                worker: _Worker = partial(contender.operations[operation], pool)
                turns[name] = _turn(worker, tasks, await _calibrate(worker, tasks, effort.slice))
            rounds += await play(turns, effort.rounds, conditions)
    return rounds


def _turn(worker: _Worker, tasks: int, operations: int) -> Measurement:
    async def turn() -> Metrics:
        await _work(worker, tasks, max(_WARM_UP, tasks))
        wall, cpu = await timed(lambda: _work(worker, tasks, operations))
        return {"wall": wall / operations, "cpu": cpu / operations}

    return turn


async def _calibrate(worker: _Worker, tasks: int, seconds: float) -> int:
    """Warm `worker` up, and return how many operations fill so many seconds."""
    fastest = seconds
    operations = max(_WARM_UP, tasks)
    for _ in range(3):
        wall, _ = await timed(lambda: _work(worker, tasks, operations))
        fastest = min(fastest, wall / operations)
    # More than one for each task, so that starting the tasks is not what is measured.
    return max(round(seconds / fastest), 2 * tasks)


async def _work(worker: _Worker, tasks: int, operations: int) -> None:
    turns = iter(range(operations))
    if tasks == 1:
        await worker(turns)
    else:
        await asyncio.gather(*(worker(turns) for _ in range(tasks)))


def _row(rounds: list[Round], name: str, *, floor: float | None) -> Row:
    cost = Figure("µs/op", series(rounds, name, "wall", 1e6))
    cpu = Figure("CPU µs/op", series(rounds, name, "cpu", 1e6))
    if name == PLAIN:
        return Row(name, (cost, cpu))
    ratio = Figure("throughput, asyncpg = 1", ratios(rounds, PLAIN, name, "wall"), at_least=floor, better="higher")
    cpu_ratio = Figure("CPU, asyncpg = 1", ratios(rounds, name, PLAIN, "cpu"), better="lower")
    return Row(name, (cost, cpu, ratio, cpu_ratio))


CELLS: Final = (
    *(_cell("acquire", tasks) for tasks in (1, 10)),
    *(_cell(operation, tasks) for operation in ("select", "fetchval") for tasks in (1, 10, 50, 200)),
    Cell(
        name="bookkeeping",
        group="bookkeeping",
        meaning="acquire and release with a reset that sends nothing, one task: the pool's own work and no server",
        rounds=_rounds,
        measure=_measure_bookkeeping,
    ),
)
