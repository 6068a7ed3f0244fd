"""What the demo measured, and what it means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

__all__ = ["AcquireTimes", "Figures", "Outcome", "SideFigures"]

_OK: Final = 0
_FAILED: Final = 1
_SIGNALLED: Final = 128  # plus the number of the signal, as shells have it


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireTimes:
    """Milliseconds that successful acquires took; None if there was none."""

    p50: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFigures:
    """One side of the demo.

    Args:
        queries: Statements that were answered.
        failed_queries: Attempts that an exception ended, at whichever step.
        rotations: How often a new token took the place of the one before.
        token_fetches: Requests to the token issuer.
        refused_connects: Logins that the server turned down.
        retired: Connections given up and closed while the workload ran.
        acquire_ms: How long acquires took.
        acquires_that_waited_for_a_connect: Likewise, after the pool was filled.
    """

    queries: int
    failed_queries: int
    rotations: int
    token_fetches: int
    refused_connects: int
    retired: int
    acquire_ms: AcquireTimes
    acquires_that_waited_for_a_connect: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The whole demo: the object that ``--json`` prints."""

    ours: SideFigures
    baseline: SideFigures | None
    duration_s: float
    token_lifetime_s: float
    postgres_version: str
    asyncpg_version: str
    python_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The figures, and what else there is to say at the end.

    Args:
        figures: The figures.
        failures: What failed on our side, by exception.
        baseline_failures: What failed on the other one.
        money_is_conserved: Whether our side's accounts add up.
        recycle_interval: Seconds between two recyclings of the baseline's connections.
        signal: The signal that ended the demo early, if one did.
    """

    figures: Figures
    failures: Mapping[str, int]
    baseline_failures: Mapping[str, int]
    money_is_conserved: bool
    recycle_interval: float
    signal: int | None = None

    @property
    def exit_status(self) -> int:
        """1 if a query of ours failed or money got lost; else 128 and the signal, if there was one; else 0."""
        if self.figures.ours.failed_queries or not self.money_is_conserved:
            return _FAILED
        return _OK if self.signal is None else _SIGNALLED + self.signal

    def as_json(self) -> str:
        """Return the figures as one JSON object."""
        return json.dumps(asdict(self.figures), indent=2)

    def print_to(self, console: Console) -> None:
        """Print the summary."""
        console.print(self._table(), *(Padding(text, (1, 1, 0, 1)) for text in self._sentences()), "", highlight=False)

    def _table(self) -> Table:
        figures = self.figures
        sides = [figures.ours] if figures.baseline is None else [figures.ours, figures.baseline]
        title = (
            f"{figures.duration_s:.0f} s with tokens of {figures.token_lifetime_s:g} s on PostgreSQL "
            f"{figures.postgres_version}, asyncpg {figures.asyncpg_version}, Python {figures.python_version}"
        )
        table = Table(title=title, title_style="bold", box=box.ROUNDED, expand=False)
        table.add_column()
        table.add_column("asyncpool_creds", justify="right")
        if figures.baseline is not None:
            table.add_column("plain asyncpg", justify="right")
        table.add_row("queries answered", *(f"{side.queries:,}" for side in sides))
        table.add_row(
            "queries failed",
            *(f"[bold {'red' if side.failed_queries else 'green'}]{side.failed_queries:,}[/]" for side in sides),
            end_section=True,
        )
        table.add_row("token rotations", *(f"{side.rotations:,}" for side in sides))
        table.add_row("tokens fetched", *(f"{side.token_fetches:,}" for side in sides))
        table.add_row("connects refused", *(f"{side.refused_connects:,}" for side in sides))
        table.add_row("connections replaced or closed", *(f"{side.retired:,}" for side in sides), end_section=True)
        table.add_row("acquire, median", *(_milliseconds(side.acquire_ms.p50) for side in sides))
        table.add_row("acquire, 99th percentile", *(_milliseconds(side.acquire_ms.p99) for side in sides))
        table.add_row("acquire, longest", *(_milliseconds(side.acquire_ms.max) for side in sides))
        table.add_row(
            "acquires that waited for a connect", *(f"{side.acquires_that_waited_for_a_connect:,}" for side in sides)
        )
        return table

    def _sentences(self) -> list[str]:
        sentences = [self._about_ours()]
        if self.figures.baseline is not None:
            sentences.append(self._about_baseline(self.figures.baseline))
        return sentences

    def _about_ours(self) -> str:
        ours = self.figures.ours
        if not self.money_is_conserved:
            return "[bold red]Money got lost: the accounts on our side do not add up.[/]"
        if ours.failed_queries:
            return (
                f"[bold red]asyncpool_creds: {ours.failed_queries:,} failed quer{_ies(ours.failed_queries)}[/] "
                f"({_list(self.failures)}). That must not be: please report it."
            )
        if not ours.rotations:
            return (
                f"No query failed on asyncpool_creds, but no token was replaced either: let it run for longer than "
                f"the {self.figures.token_lifetime_s:g} s that a token lives."
            )
        waited = ours.acquires_that_waited_for_a_connect
        patience = f"{waited:,} acquire{_s(waited)} that waited" if waited else "no acquire that waited"
        return (
            f"[bold green]asyncpool_creds: {ours.rotations:,} new token{_s(ours.rotations)}, no failed query, "
            f"{patience} for a connect.[/] Each token was fetched before the one before it expired, and each "
            f"connection changed places with a new one that stood already: {ours.retired:,} in this run. "
            "Nothing else recycles this pool's connections."
        )

    def _about_baseline(self, baseline: SideFigures) -> str:
        how = (
            f"Its connections are recycled every {self.recycle_interval:g} s, as a proxy or a fail-over would do, but "
            "gently, by asyncpg's own expire_connections(), which interrupts no query."
        )
        if not baseline.failed_queries:
            return f"Plain asyncpg kept the token from the start, and got away with it: no failed query. {how}"
        return (
            f"[bold red]Plain asyncpg: {baseline.failed_queries:,} failed quer{_ies(baseline.failed_queries)}[/] "
            f"({_list(self.baseline_failures)}). {how} That did no harm until the token from the start expired; "
            "from then on each new connection was refused."
        )


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f} ms"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _ies(count: int) -> str:
    return "y" if count == 1 else "ies"


def _list(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in failures.items())
