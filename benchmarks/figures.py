"""What rounds become: pure statistics, and the verdict on a floor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "Better",
    "Figure",
    "Metrics",
    "Moment",
    "Result",
    "Round",
    "Row",
    "moments",
    "percentile",
    "quartiles",
    "ratios",
    "series",
]

Metrics: TypeAlias = Mapping[str, float]
"""What one contender came to in one round."""
Round: TypeAlias = Mapping[str, Metrics]
"""What each contender came to, by its name, side by side in time."""
Better: TypeAlias = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a contender, once a round.

    Args:
        name: What it is, with its unit.
        values: One a round.
        at_least: The median must not be below it.
        at_most: The median must not be above it.
        better: Which way is up, if it is a ratio of two that were measured side by side: such figures can be compared
            between runs. None: it depends on the machine.
    """

    name: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None
    better: Better | None = None

    @property
    def median(self) -> float:
        """The middle of the values."""
        return statistics.median(self.values)

    @property
    def has_floor(self) -> bool:
        """Whether anything is demanded of it."""
        return self.at_least is not None or self.at_most is not None

    @property
    def holds(self) -> bool:
        """Whether the median is on the right side of what is demanded."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= self.median <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What many durations in a short stretch of time came to.

    Args:
        at: The middle of the stretch, in seconds.
        p50: Their median, in milliseconds; and so on.
    """

    at: float
    p50: float
    p99: float
    longest: float


@dataclass(frozen=True, slots=True)
class Row:
    """A contender and its figures; and the course of things, where a cell follows them through time."""

    contender: str
    figures: tuple[Figure, ...]
    course: tuple[Moment, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a cell came to on one event loop."""

    cell: str
    group: str
    meaning: str
    loop: str
    rows: tuple[Row, ...]

    def broken(self) -> list[tuple[str, Figure]]:
        """Return contender and figure wherever a floor does not hold."""
        return [(row.contender, figure) for row in self.rows for figure in row.figures if not figure.holds]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the values between which the middle half lies."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("percentile: no values")
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def moments(durations: Iterable[tuple[float, float]], width: float) -> tuple[Moment, ...]:
    """Return what `durations` (when one began, how long it took; seconds) came to in stretches of `width` seconds."""
    stretches: dict[int, list[float]] = {}
    for began, took in durations:
        stretches.setdefault(math.floor(began / width), []).append(took * 1e3)
    return tuple(
        Moment(at=(place + 0.5) * width, p50=percentile(took, 0.5), p99=percentile(took, 0.99), longest=max(took))
        for place, took in sorted(stretches.items())
    )


def series(rounds: Sequence[Round], contender: str, metric: str, scale: float = 1.0) -> tuple[float, ...]:
    """Return a metric of a contender, round by round."""
    return tuple(one[contender][metric] * scale for one in rounds)


def ratios(rounds: Sequence[Round], over: str, under: str, metric: str) -> tuple[float, ...]:
    """Return the metric of `over` divided by that of `under`, round by round: each pair was measured side by side."""
    return tuple(one[over][metric] / one[under][metric] for one in rounds)
