"""Pictures of a run: throughput by concurrency, latency through a rotation, what drills cost; as PNG and as SVG."""

# matplotlib's arguments and results are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from benchmarks.drills import DRILLS, PATIENT
from benchmarks.faults import FAILED, GROUP, cell_name
from benchmarks.peers import HELD, HELD_UNRESET, PSYCOPG, PSYCOPG_RESET, SQLALCHEMY
from benchmarks.pools import OURS, PLAIN, UNRESET, WAITING
from benchmarks.report import CellReport, Report
from benchmarks.rounds import Effort

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = ["draw"]

_RATIO: Final = "throughput, asyncpg = 1"
_OURS: Final = {OURS: "#0b6e4f", WAITING: "#3bb273", UNRESET: "#7fd1ae"}
_COLOURS: Final = {
    **_OURS,
    HELD: "#444444",
    HELD_UNRESET: "#aaaaaa",
    PSYCOPG: "#1f77b4",
    PSYCOPG_RESET: "#9ecae1",
    SQLALCHEMY: "#d95f0e",
}
_FAULT_COLOURS: Final = {OURS: "#0b6e4f", PATIENT: "#7fd1ae", PLAIN: "#d95f0e", PSYCOPG: "#1f77b4"}
_TICKS: Final = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
_SHARES: Final = (("p50", "#9ecae1"), ("p99", "#3182bd"), ("longest", "#de2d26"))


def draw(report: Report, directory: Path) -> list[Path]:
    """Draw what `report` has figures for, and return the files.

    Needs matplotlib, which is imported here and nowhere else.
    """
    drawn: list[Path] = []
    throughput = [cell for cell in report["cells"] if cell["group"] == "throughput"]
    tasks: dict[str, set[int]] = {}
    for cell in throughput:
        operation, number = _operation(cell)
        tasks.setdefault(operation, set()).add(number)
    # One point is no curve.
    if operations := [operation for operation, numbers in tasks.items() if len(numbers) > 1]:
        drawn += _save(_throughput(throughput, operations), directory / "throughput")
    courses = [cell for cell in report["cells"] if cell["courses"]]
    for name in dict.fromkeys(cell["name"] for cell in courses):
        drawn += _save(_course([cell for cell in courses if cell["name"] == name]), directory / name)
    faults = {cell["name"]: cell for cell in report["cells"] if cell["group"] == GROUP}
    lives = [life for life in Effort().lives if any(cell_name(drill, life) in faults for drill in DRILLS)]
    if lives:
        drawn += _save(_faults(faults, lives), directory / "faults")
    return drawn


def _canvas(rows: int, columns: int, height: float, **sharing: Any) -> tuple[Canvas, Sequence[Sequence[Axes]]]:
    # A figure of its own, and no window or state of pyplot's.
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415 - not everybody draws

    canvas = Canvas(figsize=(12, height * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False, **sharing)
    return canvas, cast("Sequence[Sequence[Axes]]", axes)


def _save(canvas: Canvas, path: Path) -> list[Path]:
    from matplotlib import rc_context  # noqa: PLC0415

    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    # The same figures make the same files, on any day.
    with rc_context({"svg.hashsalt": path.name}):
        canvas.savefig(files[0], dpi=120)
        canvas.savefig(files[1], metadata={"Date": None})
    return files


# Throughput by concurrency


def _operation(cell: CellReport) -> tuple[str, int]:
    name, _, tasks = cell["name"].rpartition("-")
    return name, int(tasks)


def _throughput(cells: Sequence[CellReport], operations: Sequence[str]) -> Canvas:
    loops = list(dict.fromkeys(cell["loop"] for cell in cells))
    canvas, axes = _canvas(len(operations), len(loops), 4.2, sharey="row")
    for row, operation in zip(axes, operations, strict=True):
        for axis, loop in zip(row, loops, strict=True):
            here = [cell for cell in cells if cell["loop"] == loop and _operation(cell)[0] == operation]
            _throughput_of(axis, here)
            axis.set_title(f"{operation}, {loop}")
    canvas.legend(*_legend(axes), loc="outside lower center", ncols=4)
    return canvas


def _throughput_of(axis: Axes, cells: Sequence[CellReport]) -> None:
    cells = sorted(cells, key=_operation)
    places = {_operation(cell)[1]: place for place, cell in enumerate(cells)}
    for name, colour in _COLOURS.items():
        points = [
            (places[_operation(cell)[1]], cell["contenders"][name][_RATIO])
            for cell in cells
            if name in cell["contenders"]
        ]
        if points:
            medians = [figure["median"] for _, figure in points]
            spread = [
                [figure["median"] - figure["quartiles"][0] for _, figure in points],
                [figure["quartiles"][1] - figure["median"] for _, figure in points],
            ]
            width = 2.2 if name in _OURS else 1.1
            here = [place for place, _ in points]
            axis.errorbar(here, medians, yerr=spread, label=name, color=colour, lw=width, capsize=3, marker="o", ms=4)
    axis.axhline(1.0, color="black", lw=0.8, ls=":", label=PLAIN)
    axis.set_xticks(list(places.values()), [str(tasks) for tasks in places])
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axis.set_xlabel("tasks")
    axis.set_ylabel(_RATIO)
    axis.grid(visible=True, axis="y", alpha=0.3)


def _legend(axes: Sequence[Sequence[Axes]]) -> tuple[list[Any], list[str]]:
    """Return handles and labels, each once."""
    found: dict[str, Any] = {}
    for axis in (axis for row in axes for axis in row):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


# Latency through a rotation


def _course(cells: Sequence[CellReport]) -> Canvas:
    names = list(dict.fromkeys(name for cell in cells for name in cell["courses"]))
    canvas, axes = _canvas(len(cells), len(names), 3.2, sharex=True, sharey=True)
    for row, cell in zip(axes, cells, strict=True):
        for axis, name in zip(row, names, strict=True):
            moments = cell["courses"][name]
            for share, colour in _SHARES:
                heights = [moment[share] for moment in moments]
                axis.plot([moment["at"] for moment in moments], heights, color=colour, label=share)
            axis.axvline(0.0, color="black", lw=0.8, ls=":")
            axis.set_yscale("log")
            axis.grid(visible=True, axis="y", alpha=0.3)
            axis.set_title(name, fontsize="medium")
        row[0].set_ylabel(f"{cell['loop']}: acquire, ms")
    for axis in axes[-1]:
        axis.set_xlabel("seconds from the rotation")
    canvas.legend(*_legend(axes), loc="outside lower center", ncols=len(_SHARES))
    canvas.suptitle(cells[0]["meaning"].partition(":")[0])
    return canvas


# What drills cost


def _faults(cells: Mapping[str, CellReport], lives: Sequence[float]) -> Canvas:
    canvas, axes = _canvas(len(lives), 1, 3.4, sharex=True)
    width = 0.8 / len(_FAULT_COLOURS)
    for (axis,), life in zip(axes, lives, strict=True):
        for place, (name, colour) in enumerate(_FAULT_COLOURS.items()):
            found = [(x, cells.get(cell_name(drill, life))) for x, drill in enumerate(DRILLS)]
            bars = [(x, cell["contenders"][name][FAILED]["median"]) for x, cell in found if cell is not None]
            offsets = [x + (place - 1.5) * width for x, _ in bars]
            axis.bar(offsets, [failed for _, failed in bars], width, color=colour, label=name)
        # None at all is the best there is, and has to be seen beside thousands.
        axis.set_yscale("symlog", linthresh=10)
        axis.set_ylabel("failed queries")
        axis.set_title(f"tokens of {life:g} s", fontsize="medium")
        axis.grid(visible=True, axis="y", alpha=0.3)
    axes[-1][0].set_xticks(range(len(DRILLS)), [drill.name for drill in DRILLS], rotation=30, ha="right")
    canvas.legend(*_legend(axes), loc="outside lower center", ncols=len(_FAULT_COLOURS))
    return canvas
