"""Operations a second through a pool of ten, by what is done and by how many tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from benchmarks.figures import Figure, Metrics, Round, Row, ratios, series
from benchmarks.pools import CONTENDERS, OURS, PLAIN, WAITING, Reset, Worker, workers
from benchmarks.rounds import Cell, Conditions, Effort, Measurement, play, timed

if TYPE_CHECKING:
    import asyncpg

__all__ = ["CELLS"]

_CONNECTIONS: Final = 10
# CPython specialises its code to the types it meets, and asyncpg's pool is shared by contenders with different
# ones: after so many operations it has got used to those whose turn it is, as it is for good in a service.
_WARM_UP: Final = 150
# asyncpg's throughput is 1; the control shows how far from that the noise reaches.
_NOTHING_SENT: Final = 8.0
_ONE_TASK: Final = {OURS: 1.8, WAITING: 1.05}
_SEVERAL_TASKS: Final = {OURS: 1.0, WAITING: 1.15}
_MEANINGS: Final = {
    "acquire": "acquire and release, nothing sent by the caller",
    "select": "acquire, SELECT 1, release",
    "fetchval": "pool.fetchval('SELECT 1')",
}


def _rounds(effort: Effort) -> int:
    return effort.blocks * effort.rounds


def _floor(operation: str, tasks: int, name: str) -> float | None:
    if operation == "acquire":
        return _NOTHING_SENT if name in _ONE_TASK else None
    return (_ONE_TASK if tasks == 1 else _SEVERAL_TASKS).get(name)


def _cell(operation: str, tasks: int) -> Cell:
    async def measure(conditions: Conditions) -> tuple[Row, ...]:
        rounds = await _measure(conditions, operation, tasks, reset=None)
        return tuple(_row(rounds, name, floor=_floor(operation, tasks, name)) for name in CONTENDERS)

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

    rounds = await _measure(conditions, "acquire", 1, reset=reset)
    return tuple(_with_added_cpu(_row(rounds, name, floor=None), rounds) for name in CONTENDERS)


def _with_added_cpu(row: Row, rounds: list[Round]) -> Row:
    if row.contender == PLAIN:
        return row
    added = tuple(1e9 * (one[row.contender]["cpu"] - one[PLAIN]["cpu"]) for one in rounds)
    return Row(row.contender, (*row.figures, Figure("added CPU ns/op", added)))


async def _measure(conditions: Conditions, operation: str, tasks: int, *, reset: Reset) -> list[Round]:
    effort = conditions.effort
    rounds: list[Round] = []
    for _ in range(effort.blocks):
        async with AsyncExitStack() as pools:
            names = list(CONTENDERS)
            conditions.chance.shuffle(names)
            found: dict[str, Worker] = {}
            for name in names:
                pool = CONTENDERS[name](conditions.server, _CONNECTIONS, reset)
                found[name] = workers(await pools.enter_async_context(pool))[operation]
            operations = await _calibrate(found.values(), tasks, effort.slice)
            turns = {name: _turn(worker, tasks, operations) for name, worker in found.items()}
            rounds += await play(turns, effort.rounds, conditions)
    return rounds


def _turn(worker: Worker, tasks: int, operations: int) -> Measurement:
    async def turn() -> Metrics:
        await _work(worker, tasks, max(_WARM_UP, tasks))
        wall, cpu = await timed(lambda: _work(worker, tasks, operations))
        return {"wall": wall / operations, "cpu": cpu / operations}

    return turn


async def _calibrate(workers: Iterable[Worker], tasks: int, seconds: float) -> int:
    """Warm everyone up, and return how many operations fill so many seconds: the same number for all."""
    fastest = 1.0
    for worker in workers:
        operations = max(_WARM_UP, tasks)
        for _ in range(3):
            wall, _ = await timed(lambda: _work(worker, tasks, operations))  # noqa: B023 - called at once
            fastest = min(fastest, wall / operations)
    # More than one for each task, so that starting the tasks is not what is measured.
    return max(round(seconds / fastest), 2 * tasks)


async def _work(worker: Worker, tasks: int, operations: int) -> None:
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
    ratio = Figure("throughput, asyncpg = 1", ratios(rounds, PLAIN, name, "wall"), at_least=floor)
    cpu_ratio = Figure("CPU, asyncpg = 1", ratios(rounds, name, PLAIN, "cpu"))
    return Row(name, (cost, cpu, ratio, cpu_ratio))


CELLS: Final = (
    *(_cell("acquire", tasks) for tasks in (1, 10)),
    *(_cell("select", tasks) for tasks in (1, 10)),
    *(_cell("fetchval", tasks) for tasks in (1, 10, 50, 200)),
    Cell(
        name="bookkeeping",
        group="bookkeeping",
        meaning="acquire and release with a reset that sends nothing, one task: the pool's own work and no server",
        rounds=_rounds,
        measure=_measure_bookkeeping,
    ),
)
