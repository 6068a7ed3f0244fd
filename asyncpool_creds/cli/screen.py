"""The demo as it is watched: live on a terminal, line by line elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

__all__ = ["Feed", "LiveScreen", "ProgressLines", "Screen", "SideState", "State", "open_screen"]

# Red is for failures.
_GENERATION_COLOURS: Final = ("cyan", "yellow", "magenta", "green", "dodger_blue1", "dark_orange")
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_MINIMUM_WIDTH, _MINIMUM_HEIGHT = 76, 20
_HEADER_HEIGHT: Final = 3
# Of a side, borders included, and without the rows of cells.
_SIDE_HEIGHT: Final = 12
_HISTORY_INTERVAL: Final = 0.5
_HISTORY_LENGTH: Final = 120
_FEED_LENGTH: Final = 100
# Events of two sides and of several connections mingle: equal ones are counted together over this many others,
# and over so many seconds without one.
_FEED_MERGE: Final = 4
_FEED_PAUSE: Final = 1.5
# A pool up to this size has a gap after each cell; a larger one has no room for that.
_SPACIOUS_POOL: Final = 20
_LEGEND_LENGTH: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SideState:
    """One side at one moment.

    Args:
        name: What it is.
        call: The call that made its pool.
        caption: What it does about its token.
        token: Number of the token that new connections are opened with.
        seconds_left: Until that token expires; negative once it has.
        connections: The number of the token that each was opened with; None for one that is closed.
        queries: As in the figures, and likewise the others.
        failed_queries: See above.
        refused_connects: See above.
        retired: See above.
        waits: See above.
    """

    name: str
    call: str
    caption: str
    token: int
    seconds_left: float
    connections: Sequence[int | None]
    queries: int
    failed_queries: int
    refused_connects: int
    retired: int
    waits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The demo at one moment.

    Args:
        elapsed: Seconds since the workload began.
        duration: Seconds it is to run.
        token_lifetime: Seconds that a token lives.
        summary: What runs here, in one line.
        sides: Ours, and the baseline if there is one.
    """

    elapsed: float
    duration: float
    token_lifetime: float
    summary: str
    sides: Sequence[SideState]


@dataclass(slots=True)
class _Entry:
    at: float
    side: str
    text: str
    style: str
    latest: float
    count: int = 1


class Feed(logging.Handler):
    """The latest news, where equal ones are counted and not repeated; a handler of log records, too.

    Attributes:
        epoch: When the workload began, on the monotonic clock; infinity before.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.epoch: float = math.inf
        self._entries: deque[_Entry] = deque(maxlen=_FEED_LENGTH)

    def note(self, side: str, text: str, style: str = "") -> None:
        """Add `text`, or count it if it was among the last few."""
        now = time.monotonic()
        for entry in list(self._entries)[-_FEED_MERGE:]:
            if (entry.side, entry.text) == (side, text) and now - entry.latest < _FEED_PAUSE:
                entry.count += 1
                entry.latest = now
                return
        self._entries.append(_Entry(now, side, text, style, now))

    def emit(self, record: logging.LogRecord) -> None:
        """Add the first line of `record`."""
        self.note(record.name.partition(".")[0], record.getMessage().partition("\n")[0], "yellow")

    def latest(self, count: int) -> Table:
        """Return the last `count` entries, the newest at the bottom."""
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right", style="dim", no_wrap=True, min_width=7)
        table.add_column(style="dim", no_wrap=True, min_width=8)
        table.add_column(justify="right", style="dim", no_wrap=True, min_width=4)
        table.add_column(no_wrap=True)
        for entry in list(self._entries)[-count:] if count > 0 else ():
            table.add_row(
                f"{max(entry.at - self.epoch, 0):.1f} s",
                entry.side,
                f"{entry.count:,}x" if entry.count > 1 else "",
                Text(entry.text, entry.style),
            )
        return table


class Screen(Protocol):
    """Where the demo is shown.

    Attributes:
        interval: Seconds between two calls of `show`.
    """

    interval: float

    def announce(self, text: str) -> None:
        """Say what is being done before there is anything to show."""
        ...

    def show(self, state: State) -> None:
        """Show how things stand."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_screen(console: Console, feed: Feed) -> Screen:
    """Return a live screen if `console` is a terminal that can show it, else progress lines."""
    # Not console.is_terminal: FORCE_COLOR makes that true for files as well.
    is_terminal = console.file.isatty() and not console.is_dumb_terminal
    if is_terminal and console.width >= _MINIMUM_WIDTH and console.height >= _MINIMUM_HEIGHT:
        return LiveScreen(console, feed)
    return ProgressLines(console)


class _Pace:
    """How fast the counters of a side grow."""

    def __init__(self) -> None:
        self.queries: deque[float] = deque([0.0], maxlen=_HISTORY_LENGTH)
        self.failures: deque[float] = deque([0.0], maxlen=_HISTORY_LENGTH)
        self._last = (0.0, 0, 0)

    def update(self, elapsed: float, side: SideState, interval: float = _HISTORY_INTERVAL) -> None:
        """Take note of how the counters stand, if `interval` seconds have gone by since the last time."""
        then, queries, failures = self._last
        seconds = elapsed - then
        if seconds >= interval and seconds > 0:
            self.queries.append((side.queries - queries) / seconds)
            self.failures.append((side.failed_queries - failures) / seconds)
            self._last = (elapsed, side.queries, side.failed_queries)


class ProgressLines:
    """The demo line by line, every few seconds, for a file or a pipe."""

    interval: float = 2.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._paces: dict[str, _Pace] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback

    def announce(self, text: str) -> None:
        """Print `text`."""
        self._print(text)

    def show(self, state: State) -> None:
        """Print how things stand in one line."""
        words = [f"{state.elapsed:6.1f} s"]
        for side in state.sides:
            pace = self._paces.setdefault(side.name, _Pace())
            pace.update(state.elapsed, side, 0)
            left = side.seconds_left
            life = f"{left:.1f} s left" if left > 0 else f"expired {-left:.1f} s ago"
            words.append(
                f"{side.name}: token {side.token} ({life}), {pace.queries[-1]:,.0f} queries/s, "
                f"{side.failed_queries:,} failed"
            )
        self._print(" | ".join(words))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveScreen:
    """The demo on a whole terminal, redrawn several times a second."""

    interval: float = 0.2

    def __init__(self, console: Console, feed: Feed) -> None:
        self._console = console
        self._feed = feed
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._paces: dict[str, _Pace] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def announce(self, text: str) -> None:
        """Show `text` alone."""
        self._live.update(Text(text, "bold"), refresh=True)

    def show(self, state: State) -> None:
        """Draw how things stand."""
        for side in state.sides:
            self._paces.setdefault(side.name, _Pace()).update(state.elapsed, side)
        self._live.update(self._draw(state), refresh=True)

    def _draw(self, state: State) -> Layout:
        width, height = self._console.size
        room = width // len(state.sides) - 4
        # One scale for both, so that the curves can be compared.
        busiest = max(max(self._paces[side.name].queries) for side in state.sides)
        titles = [side.call for side in state.sides]
        if max(map(len, titles)) >= room:
            titles = [side.name for side in state.sides]
        cells = [_cells(side.connections, room) for side in state.sides]
        sides_height = min(_SIDE_HEIGHT + len(cells[0]), height - _HEADER_HEIGHT - 3)
        sides = Layout(size=sides_height)
        sides.split_row(
            *(
                Layout(
                    self._side(
                        side,
                        title=title,
                        token_lifetime=state.token_lifetime,
                        busiest=busiest,
                        cells=lines,
                        room=room,
                    )
                )
                for side, title, lines in zip(state.sides, titles, cells, strict=True)
            )
        )
        news = Panel(
            self._feed.latest(height - _HEADER_HEIGHT - sides_height - 2),
            title="latest events",
            title_align="left",
            subtitle="Ctrl-C: stop and show the summary",
            subtitle_align="right",
            border_style="bright_black",
            box=box.ROUNDED,
        )
        layout = Layout()
        layout.split_column(Layout(_header(state), size=_HEADER_HEIGHT), sides, Layout(news))
        return layout

    def _side(
        self,
        side: SideState,
        *,
        title: str,
        token_lifetime: float,
        busiest: float,
        cells: Sequence[Text],
        room: int,
    ) -> Panel:
        pace = self._paces[side.name]
        is_failing = side.failed_queries > 0
        rows = Table.grid(padding=(0, 1))
        rows.add_column(no_wrap=True, width=9)
        rows.add_column(justify="right", no_wrap=True, width=9)
        rows.add_column(no_wrap=True)
        sparks = room - 9 - 9 - 2
        rows.add_row("queries/s", f"[bold]{pace.queries[-1]:,.0f}[/]", _spark(pace.queries, busiest, sparks, "green"))
        rows.add_row(
            "failed",
            Text(f"{side.failed_queries:,}", "bold red" if is_failing else "bold green"),
            _spark(pace.failures, max(pace.failures), sparks, "red"),
        )
        rows.add_row("refused", f"{side.refused_connects:,}", Text("connects", "dim"))
        rows.add_row("retired", f"{side.retired:,}", Text("connections", "dim"))
        rows.add_row("waited", f"{side.waits:,}", Text("acquires", "dim"))
        return Panel(
            Group(
                Text(side.caption, "italic"),
                _token(side, token_lifetime, room),
                Text("connections, by their token", "dim"),
                *cells,
                _legend(side),
                "",
                rows,
            ),
            title=Text(title, "bold"),
            title_align="left",
            border_style="red" if is_failing else "green",
            box=box.ROUNDED,
        )


def _header(state: State) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(ratio=1, no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(
        "[bold]asyncpool-creds demo[/]", f"[bold]{min(state.elapsed, state.duration):.0f}[/] of {state.duration:g} s"
    )
    bar = ProgressBar(total=state.duration, completed=state.elapsed, complete_style="white", finished_style="white")
    return Group(line, Text(state.summary, "dim", no_wrap=True, overflow="ellipsis"), bar)


def _token(side: SideState, token_lifetime: float, room: int) -> Table:
    """Draw the token that new connections are opened with, and what is left of its life."""
    left = side.seconds_left
    colour = _colour(side.token)
    name = f"token {side.token}"
    rest = Text(f"{left:.1f} s left", colour) if left > 0 else Text(f"expired {_ago(-left)} ago", "bold red")
    bar = ProgressBar(
        total=token_lifetime,
        completed=max(left, 0.0),
        width=max(room - len(name) - len(rest) - 2, 4),
        style="bright_black" if left > 0 else "red",
        complete_style=colour,
        finished_style=colour,
    )
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(name, f"bold {colour}"), bar, rest)
    return line


def _cells(connections: Sequence[int | None], room: int) -> list[Text]:
    """Draw each connection as a cell with the number and in the colour of its token."""
    gap = " " if len(connections) <= _SPACIOUS_POOL else ""
    columns = (room + len(gap)) // (2 + len(gap))
    lines: list[Text] = []
    for start in range(0, len(connections), columns):
        line = Text()
        for token in connections[start : start + columns]:
            if token is None:
                line.append(" -", "red")
            else:
                line.append(f"{token % 100:2d}", Style(color="black", bgcolor=_colour(token)))
            line.append(gap)
        lines.append(line)
    return lines


def _legend(side: SideState) -> Text:
    line = Text()
    counts = Counter(token for token in side.connections if token is not None)
    for token in sorted(counts)[-_LEGEND_LENGTH:]:
        line.append(f"{counts[token]} with token {token}  ", _colour(token))
    closed = len(side.connections) - counts.total()
    if closed:
        line.append(f"{closed} closed", "red")
    return line


def _spark(values: Sequence[float], maximum: float, room: int, style: str) -> Text:
    shown = list(values)[-max(room, 1) :]
    if maximum <= 0:
        return Text(_SPARKS[0] * len(shown), "bright_black")
    steps = (min(int(value / maximum * len(_SPARKS)), len(_SPARKS) - 1) for value in shown)
    return Text("".join(_SPARKS[step] for step in steps), style)


def _colour(token: int) -> str:
    return _GENERATION_COLOURS[token % len(_GENERATION_COLOURS)]


def _ago(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"
