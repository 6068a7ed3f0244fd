"""A regression check: ``python -m benchmarks.compare BEFORE.json AFTER.json`` exits with status 1 if a ratio got worse.

Only ratios are compared, because both sides of one were measured side by side in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, cast

from rich.console import Console
from rich.table import Table

from benchmarks.report import FigureReport, Report

__all__ = ["Change", "IncomparableError", "changes", "main"]

_Place: TypeAlias = tuple[str, str, str, str]
"""Cell, loop, contender, figure."""

# Where these differ, so do the figures, whatever was changed in between.
_MACHINE: Final = ("cpu", "cores", "system")
# Notches of a box plot (McGill, Tukey and Larsen, 1978): medians whose notches do not overlap differ, at about 95 %.
_NOTCH: Final = 1.57


class IncomparableError(Exception):
    """What two files hold has nothing to do with each other; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A ratio, before and after.

    Args:
        place: Cell, loop, contender, figure.
        before: The figure as it was.
        after: As it is.
        worse: By which share it got worse; negative: better.
        noise: What share of it may be chance: the half notches of both.
    """

    place: _Place
    before: FigureReport
    after: FigureReport
    worse: float
    noise: float

    def is_regression(self, tolerance: float) -> bool:
        """Return whether it got worse by more than `tolerance`, beyond the noise of both runs."""
        return self.worse > tolerance + self.noise


def changes(before: Report, after: Report) -> list[Change]:
    """Return what became of each ratio that both hold.

    Raises:
        IncomparableError: They come from different machines, or were measured differently, or share no ratio.
    """
    for name in _MACHINE:
        one, other = before["machine"].get(name), after["machine"].get(name)
        if one != other:
            raise IncomparableError(f"measured on different machines: {name} is {one!r} before and {other!r} after")
    effort, other_effort = before["settings"].get("effort"), after["settings"].get("effort")
    if effort != other_effort:
        raise IncomparableError(
            f"measured with different effort: {effort} before and {other_effort} after; "
            "pass the same --quick and --rounds to both"
        )
    then, now = dict(_ratios(before)), dict(_ratios(after))
    found = [_change(place, then[place], figure) for place, figure in now.items() if place in then]
    if not found:
        raise IncomparableError("the two runs have no ratio in common; pass the same --only and --loop to both")
    return found


def _ratios(report: Report) -> Iterator[tuple[_Place, FigureReport]]:
    for cell in report["cells"]:
        for contender, figures in cell["contenders"].items():
            for name, figure in figures.items():
                if figure["better"] is not None:
                    yield (cell["name"], cell["loop"], contender, name), figure


def _change(place: _Place, before: FigureReport, after: FigureReport) -> Change:
    old, new = before["median"], after["median"]
    worse = old / new - 1 if after["better"] == "higher" else new / old - 1
    return Change(place=place, before=before, after=after, worse=worse, noise=_half_notch(before) + _half_notch(after))


def _half_notch(figure: FigureReport) -> float:
    low, high = figure["quartiles"]
    return _NOTCH * (high - low) / math.sqrt(len(figure["rounds"])) / figure["median"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _options(arguments)
    try:
        before, after = (_read(path) for path in (options.before, options.after))
        found = changes(before, after)
    except IncomparableError as error:
        sys.stderr.write(f"cannot be compared: {error}\n")
        return 2
    regressions = [change for change in found if change.is_regression(options.tolerance)]
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    for name, value in after["machine"].items():
        if before["machine"].get(name) != value:
            console.print(f"{name}: {before['machine'].get(name)} before, {value} after", highlight=False)
    console.print(_table(found if options.all else regressions, options.tolerance))
    console.print(f"{len(regressions)} of {len(found)} ratios got worse by more than {options.tolerance:.0%} and noise")
    return 1 if regressions else 0


def _read(path: Path) -> Report:
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IncomparableError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not {"machine", "settings", "cells"} <= found.keys():
        raise IncomparableError(f"{path} was not written by this suite: it needs machine, settings and cells")
    report = cast("Report", found)
    figures = [figure for cell in report["cells"] for row in cell["contenders"].values() for figure in row.values()]
    if not all("better" in figure for figure in figures):
        raise IncomparableError(f"{path} is from a version of this suite that did not say which figures are ratios")
    return report


def _table(changed: Sequence[Change], tolerance: float) -> Table:
    table = Table(title="Ratios: medians, and the middle half in brackets", title_justify="left")
    for name in ("cell", "loop", "contender", "figure"):
        table.add_column(name)
    for name in ("before", "after", "worse by", "noise"):
        table.add_column(name, justify="right")
    for change in changed:
        style = "bold red" if change.is_regression(tolerance) else None
        shown = (_shown(change.before), _shown(change.after), f"{change.worse:+.1%}", f"{change.noise:.1%}")
        table.add_row(*change.place, *shown, style=style)
    return table


def _shown(figure: FigureReport) -> str:
    low, high = figure["quartiles"]
    return f"{figure['median']:.3g} ({low:.3g}-{high:.3g})"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE.json", help="what --results or --json wrote then")
    parser.add_argument("after", type=Path, metavar="AFTER.json", help="what it wrote now")
    parser.add_argument(
        "--tolerance", type=_share, default=0.1, metavar="SHARE", help="by how much it may get worse; default: 0.1"
    )
    parser.add_argument("--all", action="store_true", help="show every ratio, and not only those that got worse")
    return parser.parse_args(arguments)


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
