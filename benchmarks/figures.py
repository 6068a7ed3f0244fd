"""What rounds become: pure statistics, and the verdict on a floor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Figure", "Metrics", "Result", "Round", "Row", "percentile", "quartiles", "ratios", "series"]

Metrics: TypeAlias = Mapping[str, float]
"""What one contender came to in one round."""
Round: TypeAlias = Mapping[str, Metrics]
"""What each contender came to, by its name, side by side in time."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a contender, once a round.

    Args:
        name: What it is, with its unit.
        values: One a round.
        at_least: The median must not be below it.
        at_most: The median must not be above it.
    """

    name: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

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


@dataclass(frozen=True, slots=True)
class Row:
    """A contender and its figures."""

    contender: str
    figures: tuple[Figure, ...]


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


def series(rounds: Sequence[Round], contender: str, metric: str, scale: float = 1.0) -> tuple[float, ...]:
    """Return a metric of a contender, round by round."""
    return tuple(one[contender][metric] * scale for one in rounds)


def ratios(rounds: Sequence[Round], over: str, under: str, metric: str) -> tuple[float, ...]:
    """Return the metric of `over` divided by that of `under`, round by round: each pair was measured side by side."""
    return tuple(one[over][metric] / one[under][metric] for one in rounds)
