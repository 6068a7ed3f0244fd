"""The demo: a pool that lives through many tokens, and beside it one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import signal
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import asyncpg
from rich.console import Console

import asyncpool_creds
from asyncpool_creds.cli.figures import AcquireTimes, Figures, Outcome, SideFigures
from asyncpool_creds.cli.screen import Feed, Screen, SideState, State, open_screen
from asyncpool_creds.cli.workload import ROLE, SCHEMA, TOTAL, TOTAL_QUERY, Meter, work
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from asyncpool_creds.testing.postgres import PostgresServer

__all__ = ["Options", "run"]

_Side: TypeAlias = "_Ours | _Baseline"

_CANNOT_RUN: Final = 2
_SIGNALLED: Final = 128
_PASSWORD: Final = "the password that is good at the token issuer only"  # noqa: S105 - of a server that lives for a minute
# Seconds between two recyclings of the baseline's connections. While its token is good, they do no harm.
_RECYCLE_INTERVAL: Final = 3.0
# Seconds that visits which are going on at the end may take before they are cancelled.
_PATIENCE: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says.

    Args:
        duration: Seconds that the workload runs.
        token_lifetime: Seconds that a token lives.
        workers: Tasks on either side.
        pool_size: Connections on either side.
        baseline: Whether there is a plain asyncpg pool beside ours.
        json: Whether the result is printed as JSON.
    """

    duration: float = 30.0
    token_lifetime: float = 5.0
    workers: int = 20
    pool_size: int = 10
    baseline: bool = True
    json: bool = False


def run(options: Options) -> int:
    """Run the demo and return the exit status of the command.

    The result goes to standard output and all else to standard error.
    """
    end = _End()
    try:
        outcome = asyncio.run(_play(options, end, Console(stderr=True)))
    except asyncio.CancelledError:
        if end.signal is None:
            raise
        return _SIGNALLED + end.signal
    except _CannotStartError as error:
        sys.stderr.write(f"asyncpool-creds demo: {error}\n")
        return _CANNOT_RUN
    if options.json:
        sys.stdout.write(outcome.as_json() + "\n")
    else:
        outcome.print_to(Console())
    if outcome.exit_status == 1:
        sys.stderr.write("asyncpool-creds demo: a query failed, or money got lost\n")
    return outcome.exit_status


class _CannotStartError(Exception):
    """Something that the demo needs does not start; the text says what."""


class _End:
    """The early end: a first signal stops the workload, a second one, or one that comes before it, everything."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked_for = asyncio.Event()
        self._workload_runs = False

    @contextlib.contextmanager
    def listening(self) -> Generator[None]:
        """Take the signals from here on."""
        loop, main = asyncio.get_running_loop(), asyncio.current_task()

        def handle(number: int) -> None:
            is_first, self.signal = self.signal is None, self.signal or number
            self.asked_for.set()
            if main is not None and not (is_first and self._workload_runs):
                main.cancel()

        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, handle, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def wait(self, seconds: float) -> None:
        """Wait for so long, or until a signal comes."""
        self._workload_runs = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.asked_for.wait()


class _Ours:
    """The pool of this package, with the token issuer as the source of its credentials."""

    name: Final = "asyncpool_creds"

    def __init__(self, door: TokenDoor, issuer: TokenIssuer, feed: Feed, options: Options) -> None:
        self.meter = Meter()
        self._door = door
        self._feed = feed
        self._waits_of_filling = 0
        self.pool: asyncpool_creds.CredentialPool[asyncpg.Record] = asyncpool_creds.create_pool(
            door.dsn(user=ROLE, database="ours", sslmode="disable"),
            credentials=OAuth2(issuer.url, username=ROLE, password=_PASSWORD),
            min_size=options.pool_size,
            max_size=options.pool_size,
            # Tokens this short leave a seventh of their life to replace every connection: from the refresh
            # (a fifth before expiry) on, less jitter and reserve. The default of 25 a second is for tokens
            # that live for minutes, and is too slow for a hundred connections or for tokens of one second.
            max_reconnects_per_second=max(25.0, 10 * options.pool_size / options.token_lifetime),
            on_event=self._tell,
        )

    def filled(self) -> None:
        """Count from here on: the pool has its connections."""
        self._waits_of_filling = self.pool.stats().waits

    def state(self) -> SideState:
        stats = self.pool.stats()
        manager = _manager_stats(stats)
        return SideState(
            name=self.name,
            call="asyncpool_creds.create_pool(credentials=…)",
            caption="renews tokens, replaces connections",
            token=manager.generation,
            seconds_left=manager.seconds_left or 0.0,
            connections=[one.generation for one in stats.connections],
            queries=self.meter.queries,
            failed_queries=self.meter.failures.total(),
            refused_connects=self._door.refused,
            retired=sum(stats.retired.values()),
            waits=stats.waits - self._waits_of_filling,
        )

    def figures(self) -> SideFigures:
        stats = self.pool.stats()
        manager = _manager_stats(stats)
        return SideFigures(
            queries=self.meter.queries,
            failed_queries=self.meter.failures.total(),
            rotations=manager.rotations,
            token_fetches=manager.fetches,
            refused_connects=self._door.refused,
            retired=sum(stats.retired.values()),
            acquire_ms=_acquire_times(self.meter),
            acquires_that_waited_for_a_connect=stats.waits - self._waits_of_filling,
        )

    def _tell(self, event: asyncpool_creds.Event) -> None:
        match event:
            case asyncpool_creds.CredentialRefreshed(generation=token, expires_at=end, at=now):
                life = "" if end is None else f", good for {(end - now).total_seconds():.1f} s"
                self._feed.note("ours", f"token {token} is here{life}", "bold")
            case asyncpool_creds.ConnectionRetired(generation=token, reason="rotated"):
                self._feed.note("ours", f"connection of token {token} replaced in time")
            case asyncpool_creds.ConnectionRetired(generation=token, reason=reason):
                self._feed.note("ours", f"connection of token {token} retired: {reason}", "yellow")
            case asyncpool_creds.ConnectionOpened(replacement=False, generation=token):
                self._feed.note("ours", f"connection opened with token {token}")
            case asyncpool_creds.CredentialRefused(generation=token):
                self._feed.note("ours", f"token {token} was refused", "red")
            case asyncpool_creds.RefreshFailed(error=error):
                self._feed.note("ours", f"no new token: {error}", "red")
            case asyncpool_creds.ReplacementFailed(error=error):
                self._feed.note("ours", f"no new connection: {error}; the old ones serve on", "red")
            case _:
                pass


class _Baseline:
    """A plain asyncpg pool with the token that it got at the start."""

    name: Final = "plain asyncpg"

    def __init__(self, door: TokenDoor, token: asyncpool_creds.Credential, feed: Feed, options: Options) -> None:
        self.meter = Meter()
        self._door = door
        self._feed = feed
        self._size = options.pool_size
        self._expires_at = 0.0 if token.expires_at is None else token.expires_at.timestamp()
        self._closed = 0
        self.pool: asyncpg.Pool[asyncpg.Record] = asyncpg.create_pool(
            door.dsn(user=ROLE, database="baseline", sslmode="disable"),
            password=token.password,
            min_size=options.pool_size,
            max_size=options.pool_size,
            connect=self._connect,
        )

    async def recycle(self) -> None:
        """Recycle the connections every few seconds, for ever."""
        while True:
            await asyncio.sleep(_RECYCLE_INTERVAL)
            # asyncpg's gentle way, and not the door's close_connections(): a server that closes a connection
            # may meet a query on its way there, which fails on any pool, and would be no fault of the token's.
            await self.pool.expire_connections()
            self._feed.note("baseline", "connections recycled by expire_connections()")

    def state(self) -> SideState:
        size = self.pool.get_size()
        return SideState(
            name=self.name,
            call="asyncpg.create_pool(password=…)",
            caption="keeps the token it got at the start",
            token=1,
            seconds_left=self._expires_at - time.time(),
            connections=[1] * size + [None] * (self._size - size),
            queries=self.meter.queries,
            failed_queries=self.meter.failures.total(),
            refused_connects=self._door.refused,
            retired=self._closed,
            waits=self.meter.waits,
        )

    def figures(self) -> SideFigures:
        return SideFigures(
            queries=self.meter.queries,
            failed_queries=self.meter.failures.total(),
            rotations=0,
            token_fetches=1,
            refused_connects=self._door.refused,
            retired=self._closed,
            acquire_ms=_acquire_times(self.meter),
            acquires_that_waited_for_a_connect=self.meter.waits,
        )

    async def _connect(self, *arguments: Any, **keywords: Any) -> asyncpg.Connection[Any]:
        self.meter.connecting()
        try:
            connection: asyncpg.Connection[Any] = await asyncpg.connect(*arguments, **keywords)
        except asyncpg.PostgresError as error:
            self._feed.note("baseline", f"new connection refused ({error.sqlstate})", "red")
            raise
        connection.add_termination_listener(self._one_closed)
        return connection

    def _one_closed(self, _connection: object) -> None:
        self._closed += 1


async def _play(options: Options, end: _End, console: Console) -> Outcome:
    feed = Feed()
    with end.listening(), _logging_to(feed), open_screen(console, feed) as screen:
        screen.announce("Starting PostgreSQL and a token issuer ...")
        async with contextlib.AsyncExitStack() as stack:
            server = PostgresServer(max_connections=2 * options.pool_size + 20)
            try:
                await stack.enter_async_context(server)
            except RuntimeError as error:
                raise _CannotStartError(str(error)) from error
            issuer = await stack.enter_async_context(
                TokenIssuer({ROLE: _PASSWORD}, access_lifetime=options.token_lifetime)
            )
            screen.announce(
                f"PostgreSQL {server.version} (process {server.pid}, {server.socket_directory}) "
                f"and the token issuer ({issuer.url}) are up"
            )
            await server.create_role(ROLE)
            ours = await _open_ours(stack, server, issuer, feed, options)
            baseline = await _open_baseline(stack, server, issuer, feed, options) if options.baseline else None
            ours.filled()

            sides: Sequence[_Side] = (ours,) if baseline is None else (ours, baseline)
            feed.epoch = time.monotonic()
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(_show(screen, server, options, sides), name="demo: show how things stand")]
                if baseline is not None:
                    others.append(group.create_task(baseline.recycle(), name="demo: recycle the baseline"))
                await _work(options, end, sides)
                for task in others:
                    task.cancel()
            duration = time.monotonic() - feed.epoch

            # Before the pools close: that is no longer part of the run.
            figures = Figures(
                ours=ours.figures(),
                baseline=None if baseline is None else baseline.figures(),
                duration_s=round(duration, 3),
                token_lifetime_s=options.token_lifetime,
                postgres_version=server.version,
                asyncpg_version=asyncpg.__version__,
                python_version=platform.python_version(),
            )
            rows = await server.fetch(TOTAL_QUERY, database="ours")
    return Outcome(
        figures=figures,
        failures=ours.meter.failures,
        baseline_failures={} if baseline is None else baseline.meter.failures,
        money_is_conserved=rows[0]["total"] == TOTAL,
        recycle_interval=_RECYCLE_INTERVAL,
        signal=end.signal,
    )


async def _open_ours(
    stack: contextlib.AsyncExitStack, server: PostgresServer, issuer: TokenIssuer, feed: Feed, options: Options
) -> _Ours:
    await _make_database(server, "ours")
    door = await stack.enter_async_context(TokenDoor(server, issuer.verify))
    side = _Ours(door, issuer, feed, options)
    await stack.enter_async_context(side.pool)
    return side


async def _open_baseline(
    stack: contextlib.AsyncExitStack, server: PostgresServer, issuer: TokenIssuer, feed: Feed, options: Options
) -> _Baseline:
    await _make_database(server, "baseline")
    door = await stack.enter_async_context(TokenDoor(server, issuer.verify))
    provider = OAuth2(issuer.url, username=ROLE, password=_PASSWORD)
    try:
        token = await provider.fetch()
    finally:
        await provider.aclose()
    side = _Baseline(door, token, feed, options)
    await stack.enter_async_context(side.pool)
    return side


async def _make_database(server: PostgresServer, name: str) -> None:
    await server.execute(f"CREATE DATABASE {name}")
    await server.execute(SCHEMA, database=name)


async def _work(options: Options, end: _End, sides: Sequence[_Side]) -> None:
    """Have the tellers work on all sides, until time is up or a signal comes."""
    closing_time = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        tellers = [
            group.create_task(work(side.pool, side.meter, closing_time), name=f"demo: teller {number} of {side.name}")
            for side in sides
            for number in range(options.workers)
        ]
        await end.wait(options.duration)
        closing_time.set()
        await asyncio.wait(tellers, timeout=_PATIENCE)
        for task in tellers:
            task.cancel()


async def _show(screen: Screen, server: PostgresServer, options: Options, sides: Sequence[_Side]) -> None:
    started = time.monotonic()
    tasks = f"{options.workers} tasks" + (" a side" if len(sides) > 1 else "")
    summary = f"PostgreSQL {server.version} refuses tokens older than {options.token_lifetime:g} s; {tasks} move money"
    while True:
        await asyncio.sleep(screen.interval)
        screen.show(
            State(
                elapsed=time.monotonic() - started,
                duration=options.duration,
                token_lifetime=options.token_lifetime,
                summary=summary,
                sides=[side.state() for side in sides],
            )
        )


@contextlib.contextmanager
def _logging_to(feed: Feed) -> Generator[None]:
    """Send log records to the feed, where they do not disturb the picture."""
    root = logging.getLogger()
    root.addHandler(feed)
    try:
        yield
    finally:
        root.removeHandler(feed)


def _manager_stats(stats: asyncpool_creds.PoolStats) -> asyncpool_creds.ManagerStats:
    assert stats.manager is not None  # noqa: S101 - a pool with credentials has one
    return stats.manager


def _acquire_times(meter: Meter) -> AcquireTimes:
    times = meter.acquire_times
    return AcquireTimes(
        p50=_milliseconds(times.percentile(50)),
        p99=_milliseconds(times.percentile(99)),
        max=_milliseconds(times.maximum),
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
