"""What it costs to ask a manager for a token it has."""

from __future__ import annotations

from typing import Final

from asyncpool_creds import TokenManager
from benchmarks.figures import Figure, Row, ratios, series
from benchmarks.pools import OURS, PASSWORD, hour_long
from benchmarks.rounds import Cell, Conditions, play, repeated

__all__ = ["CELLS"]

_CALLS: Final = 20_000
# Nanoseconds.
_FLOOR: Final = 500
_EMPTY: Final = "empty coroutine"


async def _nothing() -> None:
    """Return at once."""


async def _measure(conditions: Conditions) -> tuple[Row, ...]:
    async with TokenManager(lambda: hour_long(PASSWORD)) as manager:
        contenders = {OURS: repeated(manager.get, _CALLS), _EMPTY: repeated(_nothing, _CALLS)}
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
