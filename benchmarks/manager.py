"""What it costs to ask a manager for a token it has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from asyncpool_creds import TokenManager
from benchmarks.figures import Figure, Metrics, Row, ratios, series
from benchmarks.pools import OURS, PASSWORD, hour_long
from benchmarks.rounds import Cell, Conditions, Measurement, play, timed

__all__ = ["CELLS"]

_CALLS: Final = 20_000
# Nanoseconds.
_FLOOR: Final = 500
_EMPTY: Final = "empty coroutine"


def _calls(function: Callable[[], Awaitable[object]]) -> Measurement:
    async def work() -> None:
        for _ in range(_CALLS):
            await function()

    async def measure() -> Metrics:
        wall, cpu = await timed(work)
        return {"wall": wall / _CALLS, "cpu": cpu / _CALLS}

    return measure


async def _nothing() -> None:
    """Return at once."""


async def _measure(conditions: Conditions) -> tuple[Row, ...]:
    async with TokenManager(lambda: hour_long(PASSWORD)) as manager:
        contenders = {OURS: _calls(manager.get), _EMPTY: _calls(_nothing)}
        rounds = await play(contenders, conditions.effort.bursts, conditions)
    return (
        Row(_EMPTY, (Figure("ns", series(rounds, _EMPTY, "wall", 1e9)),)),
        Row(
            OURS,
            (
                Figure("ns", series(rounds, OURS, "wall", 1e9), at_most=_FLOOR),
                Figure("time, empty coroutine = 1", ratios(rounds, OURS, _EMPTY, "wall"), better="lower"),
            ),
        ),
    )


CELLS: Final = (
    Cell(
        name="get",
        group="manager",
        meaning="await TokenManager.get() while the token is fresh, against awaiting a coroutine that does nothing",
        rounds=lambda effort: effort.bursts,
        measure=_measure,
    ),
)
