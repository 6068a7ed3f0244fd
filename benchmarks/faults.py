"""What is lost when something goes wrong: ours, asyncpg and psycopg_pool side by side, through the same drills."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks import drills
from benchmarks.drills import DRILLS, OURS, PATIENT, PLAIN, PSYCOPG, WORKERS, Drill, Outcome, Timing
from benchmarks.figures import Figure, Row
from benchmarks.rounds import Cell, Conditions, Effort

__all__ = ["CELLS", "FAILED", "GROUP", "IN_FLIGHT", "LONGEST", "RECOVERED", "allowed", "cell_name", "timing_for"]

GROUP: Final = "faults"
FAILED: Final = "failed"
IN_FLIGHT: Final = "of them in flight"
LONGEST: Final = "longest s"
RECOVERED: Final = "s to full recovery"
_LIVES: Final = Effort().lives
# With whom each of ours is compared.
_RIVALS: Final[Mapping[str, str]] = {OURS: PLAIN, PATIENT: PSYCOPG}


def allowed(drill: Drill, name: str, outcomes: Mapping[str, Outcome]) -> float:
    """Return how many queries a contender of ours may lose in a drill where the one it is compared with lost so many.

    As many, and so none where the other lost none. But without patience, where connects fail, who needs one is lost:
    how many those are depends on how fast they fail, and on chance. There, a fifth and two queries of each worker are
    no difference.
    """
    rival = outcomes[_RIVALS[name]].lost
    return 1.2 * rival + 2 * WORKERS if drill.fails_connects and (name != PATIENT or rival) else rival


def cell_name(drill: Drill, life: float) -> str:
    """Return the name of the cell of a drill with tokens that live for so many seconds."""
    return f"{GROUP}-{drill.name}-{life:g}"


def timing_for(life: float, effort: Effort) -> Timing:
    """Return how long things take with so much effort."""
    full = Timing(life=life)
    return Timing(life=life, lead=full.lead * effort.pace, pace=effort.pace, after=full.after * effort.pace)


def _rounds(drill: Drill, life: float, effort: Effort) -> int:
    """Return a tick for each second, because a round takes up to two minutes."""
    return effort.drills * math.ceil(drill.takes(timing_for(life, effort))) if life in effort.lives else 0


async def _measure(conditions: Conditions, drill: Drill, life: float) -> tuple[Row, ...]:
    effort = conditions.effort
    await conditions.server.create_role(drills.ROLE)
    played: list[Mapping[str, Outcome]] = []
    for _ in range(effort.drills):
        outcomes = await drills.run(drill, timing_for(life, effort), conditions.server, tick=conditions.tick)
        for name, outcome in outcomes.items():
            conditions.say(f"  {name}: {outcome}")
        played.append(outcomes)
    return tuple(Row(name, _figures(drill, played, name)) for name in played[0])


def _figures(drill: Drill, played: Sequence[Mapping[str, Outcome]], name: str) -> tuple[Figure, ...]:
    mine = [outcomes[name] for outcomes in played]
    rival = _RIVALS.get(name)
    beyond = [] if rival is None else [outcomes[name].lost - allowed(drill, name, outcomes) for outcomes in played]
    return (
        Figure("queries", tuple(float(one.queries) for one in mine)),
        Figure(FAILED, tuple(float(one.failed) for one in mine)),
        Figure(IN_FLIGHT, tuple(float(one.in_flight) for one in mine)),
        Figure(LONGEST, tuple(one.longest for one in mine)),
        Figure(RECOVERED, tuple(one.recovered for one in mine)),
        *([Figure(f"lost beyond {rival}'s", tuple(max(one, 0.0) for one in beyond), at_most=0)] if beyond else []),
    )


def _cell(drill: Drill, life: float) -> Cell:
    return Cell(
        name=cell_name(drill, life),
        group=GROUP,
        meaning=f"{drill.title}, with tokens that live for {life:g} s",
        rounds=lambda effort: _rounds(drill, life, effort),
        measure=lambda conditions: _measure(conditions, drill, life),
        # Hardly anything in here depends on how fast the loop is, and it takes long enough as it is.
        only_loop="asyncio",
    )


CELLS: Final = tuple(_cell(drill, life) for life in _LIVES for drill in DRILLS)
