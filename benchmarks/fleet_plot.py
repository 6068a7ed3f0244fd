"""The plot of the fleet: connects a second through the rotations, and the peaks of every contender."""

# matplotlib leaves its **kwargs untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.fleet_model import Fleet, Life, Scenario, peak

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save"]

_COLOURS: Final = ("#0072b2", "#56b4e9", "#009e73", "#d55e00")  # Okabe and Ito's, told apart by everybody
_STYLES: Final = ("-", "-", ":", "-")
# Along the axis of time; more of them would be a carpet.
_STRETCHES: Final = 225


def save(fleet: Fleet, lives: Mapping[Scenario, Mapping[str, Life]], directory: Path) -> tuple[Path, ...]:
    """Write ``fleet.png`` and ``fleet.svg``, the same for the same lives; return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415 - the figures are to be had without it
    from matplotlib.figure import Figure  # noqa: PLC0415

    paths = (directory / "fleet.png", directory / "fleet.svg")
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "fleet", "font.size": 8}):
        figure = Figure(figsize=(13, 3.2 * len(lives)), layout="constrained")
        figure.suptitle(
            f"{fleet.replicas:,} replicas with {fleet.connections} connections each, "
            f"tokens of {fleet.token_lifetime:g} s: what a rotation asks of the server and of the source"
        )
        grid = figure.subplots(len(lives), 3, squeeze=False, width_ratios=(2, 1, 1))
        for (timeline, connects, fetches), (scenario, contenders) in zip(grid, lives.items(), strict=True):
            _draw_timeline(timeline, scenario, contenders)
            _draw_peaks(
                connects,
                "peak of connects in one second",
                {name: peak(life.server.asked["rotation"]) for name, life in contenders.items()},
            )
            _draw_peaks(
                fetches,
                "peak of fetches in one second",
                {name: peak(life.source.asked["rotation"]) for name, life in contenders.items()},
            )
            fetches.set_yticks([])
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS))
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_timeline(axes: Axes, scenario: Scenario, contenders: Mapping[str, Life]) -> None:
    styles = zip(contenders.items(), _COLOURS, _STYLES, strict=True)
    for order, ((name, life), colour, style) in enumerate(styles):
        moments, rates = _busiest_seconds(life.server.asked["rotation"], life.duration)
        # The first lies on top of those that differ from it in one thing only.
        axes.plot(moments, rates, color=colour, linestyle=style, linewidth=1.2, label=name, zorder=3 - order / 10)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{scenario.name}: {scenario.meaning}", loc="left")
    axes.set_xlabel("seconds since the first start")
    axes.set_ylabel("connects in a second")


def _busiest_seconds(moments: Sequence[float], duration: float) -> tuple[list[float], list[int]]:
    """Return the stretches of time that the plot can show, and for each how much its busiest second had."""
    stretch = max(1, round(duration / _STRETCHES))
    counts = Counter(int(moment) for moment in moments)
    starts = range(0, math.ceil(duration), stretch)
    busiest = [max(counts[second] for second in range(start, start + stretch)) for start in starts]
    return [start + stretch / 2 for start in starts], busiest


def _draw_peaks(axes: Axes, title: str, peaks: Mapping[str, int]) -> None:
    names = list(peaks)[::-1]
    bars = axes.barh(names, [peaks[name] for name in names], color=_COLOURS[::-1])
    axes.bar_label(bars, labels=[f"{peaks[name]:,}" for name in names], padding=3)
    axes.set_xscale("log")
    axes.set_xlim(1, max(10, *peaks.values()) * 10)
    axes.set_title(title, loc="left")
