"""What is shown: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Better, Figure, Result, quartiles

__all__ = ["CellReport", "FigureReport", "Report", "as_json", "assemble", "broken_floors", "judge", "print_tables"]


class FigureReport(TypedDict):
    """A figure of a contender; `Figure` says what is what."""

    median: float
    quartiles: list[float]
    min: float
    max: float
    at_least: float | None
    at_most: float | None
    better: Better | None
    holds: bool
    rounds: list[float]


class CellReport(TypedDict):
    """A cell on one event loop: figures, and what was followed through time, by contender."""

    name: str
    group: str
    meaning: str
    loop: str
    contenders: dict[str, dict[str, FigureReport]]
    courses: dict[str, list[dict[str, float]]]


class Report(TypedDict):
    """A run, as it is stored."""

    machine: dict[str, str | int]
    settings: dict[str, object]
    cells: list[CellReport]
    broken_floors: list[str]


def print_tables(console: Console, machine: Mapping[str, str | int], results: Sequence[Result]) -> None:
    """Print the machine, and one table for each group of cells: medians, and the middle half in brackets."""
    console.print(", ".join(f"{name}: {value}" for name, value in machine.items()), highlight=False)
    for group, members in groupby(sorted(results, key=lambda one: _first_place(results, one.group)), _group):
        console.print(_table(group, list(members)))


def _group(result: Result) -> str:
    return result.group


def _first_place(results: Sequence[Result], group: str) -> int:
    return next(place for place, result in enumerate(results) if result.group == group)


def _table(group: str, results: Sequence[Result]) -> Table:
    columns = list(dict.fromkeys(figure.name for result in results for row in result.rows for figure in row.figures))
    meanings = "\n".join(dict.fromkeys(f"{result.cell}: {result.meaning}" for result in results))
    table = Table(title=group, caption=meanings, title_justify="left", caption_justify="left")
    for name in ("cell", "loop", "contender"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for result in results:
        for row in result.rows:
            figures = {figure.name: figure for figure in row.figures}
            cells = [_shown(figures[name]) if name in figures else "" for name in columns]
            table.add_row(result.cell, result.loop, row.contender, *cells, end_section=row is result.rows[-1])
    return table


def _shown(figure: Figure) -> str:
    low, high = quartiles(figure.values)
    text = f"{_number(figure.median)} ({_number(low)}-{_number(high)})" if low != high else _number(figure.median)
    if not figure.has_floor:
        return text
    return f"[green]{text}[/]" if figure.holds else f"[bold red]{text} ![/]"


def _number(value: float) -> str:
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    # Three significant digits, as far as four decimals show them.
    decimals = min(4, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}"


def judge(broken: Sequence[str]) -> int:
    """Name the floors that do not hold on stderr; return the exit status."""
    for complaint in broken:
        sys.stderr.write(f"floor broken: {complaint}\n")
    return 1 if broken else 0


def broken_floors(results: Sequence[Result]) -> list[str]:
    """Return a sentence for each floor that does not hold."""
    return [_complaint(result, contender, figure) for result in results for contender, figure in result.broken()]


def _complaint(result: Result, contender: str, figure: Figure) -> str:
    demands = [
        f"{word} {_number(bound)}"
        for word, bound in (("at least", figure.at_least), ("at most", figure.at_most))
        if bound is not None
    ]
    return (
        f"{result.cell} on {result.loop}: {contender}: {figure.name}: "
        f"{_number(figure.median)}, wanted {' and '.join(demands)}"
    )


def assemble(machine: Mapping[str, str | int], settings: Mapping[str, object], results: Sequence[Result]) -> Report:
    """Return everything, the single rounds too."""
    return {
        "machine": dict(machine),
        "settings": dict(settings),
        "cells": [
            {
                "name": result.cell,
                "group": result.group,
                "meaning": result.meaning,
                "loop": result.loop,
                "contenders": {
                    row.contender: {figure.name: _figure(figure) for figure in row.figures} for row in result.rows
                },
                "courses": {
                    row.contender: [asdict(moment) for moment in row.course] for row in result.rows if row.course
                },
            }
            for result in results
        ],
        "broken_floors": broken_floors(results),
    }


def as_json(report: Report) -> str:
    """Return `report` as one JSON object, on one line: most of it is single rounds."""
    return json.dumps(report, allow_nan=False)


def _figure(figure: Figure) -> FigureReport:
    low, high = quartiles(figure.values)
    return {
        "median": figure.median,
        "quartiles": [low, high],
        "min": min(figure.values),
        "max": max(figure.values),
        "at_least": figure.at_least,
        "at_most": figure.at_most,
        "better": figure.better,
        "holds": figure.holds,
        "rounds": [float(f"{value:.6g}") for value in figure.values],
    }
