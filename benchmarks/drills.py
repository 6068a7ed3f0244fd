"""What can go wrong between a service, its tokens and its database, and pools under load side by side while it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self, TypeAlias, TypeVar

import asyncpg
import httpx
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool

import asyncpool_creds
from asyncpool_creds import TokenManager
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer
from asyncpool_creds.testing.postgres import PostgresServer
from benchmarks.pools import AnyPool

__all__ = [
    "CONNECTIONS",
    "CONTENDERS",
    "DRILLS",
    "OURS",
    "PATIENT",
    "PLAIN",
    "PSYCOPG",
    "ROLE",
    "WORKERS",
    "Contender",
    "Drill",
    "Outcome",
    "Timing",
    "ours",
    "run",
]

HostT = TypeVar("HostT")

WORKERS: Final = 20
CONNECTIONS: Final = 10
ROLE: Final = "bench_faults"
_SECRET: Final = "benchmark-secret"  # what the token issuer asks for
# The only name there is to resolve: loopback by its name, so that no guard asks for TLS.
_HOST: Final = "localhost"
_ADDRESS: Final = "127.0.0.1"
_QUERY: Final = "SELECT pg_sleep(0.01)"
# Seconds between an answer and the next query of a worker: at least, and at most. Drawn at random, and the same for all
# contenders, or an outage that keeps all workers waiting would leave them in step.
_THINK: Final = (0.05, 0.15)
# Before anything goes wrong, in seconds.
_STEADY: Final = 1.0
# A timer that comes so many seconds late comes from a loop that had other things to do.
_HELD_UP: Final = 0.005
# A query that takes longer is stalled.
_STALL: Final = 1.0
# Who still waits so many seconds after the end of a drill is counted as failed.
_GRACE: Final = 2.0
# A token is refreshed when this share of its life is left.
_REFRESH_SHARE: Final = 0.2
# Seconds for which a patient contender goes on trying.
_PATIENCE: Final = 10.0

OURS: Final = "asyncpool_creds"
PATIENT: Final = "asyncpool_creds, connect_patience=10"
PLAIN: Final = "asyncpg"
PSYCOPG: Final = "psycopg_pool"


# Drills


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things take.

    Args:
        life: Seconds a token lives.
        lead: Seconds from the opening of the pools to the first refresh, if tokens live long enough.
        pace: What the seconds that a fault lasts are multiplied by.
        after: Seconds that are watched after the end of a fault.
    """

    life: float
    lead: float = 4.0
    pace: float = 1.0
    after: float = 8.0

    @property
    def last_fifth(self) -> float:
        """Seconds before its end at which a token is refreshed."""
        return self.life * _REFRESH_SHARE

    @property
    def first_life(self) -> float:
        """Seconds the first token lives: its refresh is not far away, however long the others live."""
        return min(self.life, self.lead + self.last_fifth)

    @property
    def outage(self) -> float:
        """Three lives; of tokens that live for minutes, until half a minute after the end of the one in hand.

        At least two, because the one in hand may just have been refreshed.
        """
        return self.first_life + 30.0 if self.life > 60 else max(3 * self.life * self.pace, 2 * self.life)


@dataclass(slots=True)
class _Side:
    """A contender's own world: its token issuer, its door to the server, and what its workers went through."""

    name: str
    clock: _ServerClock
    issuer: TokenIssuer
    door: TokenDoor
    queries: list[_Query] = field(default_factory=list)
    fault_over: float = math.inf


class _ServerClock:
    """The clock of the database server, which may be ahead of everybody else's."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class _Query:
    """One query of a worker, in seconds of the event loop's clock.

    Args:
        began: When the worker asked for a connection.
        ended: When it had its answer, or an error.
        error: The type of the error; None: an answer.
        in_flight: It had a connection, and lost that under the query: no pool can help it.
    """

    began: float
    ended: float
    error: str | None
    in_flight: bool

    @property
    def is_bad(self) -> bool:
        """Whether a user would have noticed."""
        return self.error is not None or self.ended - self.began > _STALL


@dataclass(slots=True)
class _Scene:
    """What all sides have in common: the PostgreSQL behind all doors, and what the event loop asks for names."""

    server: PostgresServer
    resolver: _Resolver
    _restart: asyncio.Task[None] | None = None

    async def restart(self) -> None:
        """Return when the server has been restarted, once for all sides."""
        if self._restart is None:
            self._restart = asyncio.create_task(asyncio.to_thread(self.server.restart), name="restart of the server")
        await self._restart


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong.

    Args:
        strike: Goes wrong for one side, for so many seconds, and returns when all is well again.
        lasts: For how many seconds.
    """

    strike: Callable[[_Scene, _Side, float], Awaitable[None]]
    lasts: Callable[[Timing], float]


async def _issuer_down(scene: _Scene, side: _Side, lasts: float) -> None:
    del scene
    await side.issuer.go_down()
    await asyncio.sleep(lasts)
    await side.issuer.come_up()


async def _answers_once(scene: _Scene, side: _Side, lasts: float, **answer: Any) -> None:  # what fail_next takes
    del scene
    asked = side.issuer.fetches
    side.issuer.fail_next(**answer)
    # Whoever opens no connection asks for no token, and is not waited for.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(lasts):
            while side.issuer.fetches == asked:  # noqa: ASYNC110 - the issuer counts, and tells nobody
                await asyncio.sleep(0.01)


async def _restarted(scene: _Scene, side: _Side, lasts: float) -> None:
    await side.door.go_down()
    await scene.restart()
    # An empty server is up again in no time; one that has something to write is not.
    await asyncio.sleep(lasts)
    await side.door.come_up()


async def _restarted_late(scene: _Scene, side: _Side, lasts: float) -> None:
    await asyncio.sleep(lasts)
    await _restarted(scene, side, 1.0)


async def _starting_up(scene: _Scene, side: _Side, lasts: float) -> None:
    del scene
    side.door.starting_up = True
    side.door.kill_connections()
    await asyncio.sleep(lasts)
    side.door.starting_up = False


async def _slow_connects(scene: _Scene, side: _Side, lasts: float) -> None:
    del scene
    side.door.delay = 2.0
    await asyncio.sleep(lasts)
    side.door.delay = 0.0


async def _clock_ahead(scene: _Scene, side: _Side, lasts: float) -> None:
    del scene
    # Of the issuer's clock, which reads the server's, so much is taken off again.
    side.clock.ahead, side.issuer.clock_skew = 10.0, -10.0
    await asyncio.sleep(lasts)
    side.clock.ahead = side.issuer.clock_skew = 0.0


async def _no_names(scene: _Scene, side: _Side, lasts: float) -> None:
    del side
    scene.resolver.is_gone = True
    await asyncio.sleep(lasts)
    scene.resolver.is_gone = False


_ISSUER_DOWN: Final = Fault(_issuer_down, lambda timing: timing.outage)
_SAYS_403: Final = Fault(
    partial(_answers_once, error="access_denied", status=403), lambda timing: timing.first_life + 1.0
)
_SAYS_429: Final = Fault(partial(_answers_once, status=429, retry_after=120), lambda timing: timing.first_life + 1.0)
_RESTARTED: Final = Fault(_restarted, lambda _: 1.0)
# With so much of the issuer's outage left as whoever is patient waits for a connection.
_RESTARTED_LATE: Final = Fault(_restarted_late, lambda timing: timing.outage - 6.0 * timing.pace)
_STARTING_UP: Final = Fault(_starting_up, lambda timing: 6.0 * timing.pace)
_SLOW_CONNECTS: Final = Fault(_slow_connects, lambda timing: 12.0 * timing.pace)
# Of tokens that live for less than a minute, two are fetched meanwhile.
_CLOCK_AHEAD: Final = Fault(_clock_ahead, lambda timing: min(12.0 + timing.life, 32.0) * timing.pace)
_NO_NAMES: Final = Fault(_no_names, lambda timing: 8.0 * timing.pace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """A fault, or several at once, under load.

    Args:
        name: For ``--only``.
        title: For people.
        faults: What goes wrong, all of it at the same time.
        cuts: Whether a proxy cuts an idle connection every second. Without that, a pool whose connections all stand
            notices nothing of what becomes of connects.
        concerns_source: Whether its consequences come as late as the end of the token in hand.
        fails_connects: Whether connects fail meanwhile. Who needs one then is lost, and who needs one is chance.
    """

    name: str
    title: str
    faults: tuple[Fault, ...]
    cuts: bool = True
    concerns_source: bool = False
    fails_connects: bool = False

    def watched(self, timing: Timing) -> float:
        """Return how many seconds are watched after the fault."""
        return timing.after + (timing.last_fifth if self.concerns_source else 0.0)

    def takes(self, timing: Timing) -> float:
        """Return about how many seconds it takes."""
        return _STEADY + max(fault.lasts(timing) for fault in self.faults) + self.watched(timing)


DRILLS: Final[Sequence[Drill]] = (
    Drill(
        name="issuer",
        title="issuer down for three lives",
        faults=(_ISSUER_DOWN,),
        cuts=False,
        concerns_source=True,
    ),
    Drill(name="403", title="one 403", faults=(_SAYS_403,), concerns_source=True),
    Drill(name="429", title="one 429 with `Retry-After: 120`", faults=(_SAYS_429,), concerns_source=True),
    Drill(name="restart", title="database restarted", faults=(_RESTARTED,), cuts=False, fails_connects=True),
    Drill(name="57p03", title="57P03 for 6 s", faults=(_STARTING_UP,), cuts=False, fails_connects=True),
    Drill(name="slow", title="connects 2 s slow", faults=(_SLOW_CONNECTS,)),
    Drill(name="clock", title="server clock 10 s ahead", faults=(_CLOCK_AHEAD,), fails_connects=True),
    Drill(name="dns", title="DNS gone for 8 s", faults=(_NO_NAMES,), fails_connects=True),
    Drill(
        name="two-issuer-restart",
        title="issuer down for three lives, and database restarted 6 s before its end",
        faults=(_ISSUER_DOWN, _RESTARTED_LATE),
        cuts=False,
        concerns_source=True,
        fails_connects=True,
    ),
    Drill(
        name="two-403-57p03",
        title="one 403, and 57P03 for 6 s",
        faults=(_SAYS_403, _STARTING_UP),
        concerns_source=True,
        fails_connects=True,
    ),
    Drill(
        name="two-429-slow",
        title="one 429 with `Retry-After: 120`, and connects 2 s slow",
        faults=(_SAYS_429, _SLOW_CONNECTS),
        concerns_source=True,
    ),
    Drill(
        name="two-dns-restart",
        title="DNS gone for 8 s, and database restarted",
        faults=(_NO_NAMES, _RESTARTED),
        fails_connects=True,
    ),
)


# Contenders

Ask: TypeAlias = Callable[[Callable[[], None]], Awaitable[None]]
"""Makes one query, and calls what it is given as soon as it has a connection for it."""
Contender: TypeAlias = Callable[[str, TokenIssuer, Timing], AbstractAsyncContextManager[Ask]]
"""Opens a pool by its DSN, for tokens of an issuer."""


def ours(*, connect_patience: float = 0.0, **settings: Any) -> Contender:  # create_pool's own
    """Return our pool with these settings; a patient one has a manager that is as patient."""
    return partial(_ours, {"connect_patience": connect_patience, **settings})


@asynccontextmanager
async def _ours(settings: Mapping[str, Any], dsn: str, issuer: TokenIssuer, timing: Timing) -> AsyncGenerator[Ask]:
    source = OAuth2(token_url=issuer.token_url, client_id=ROLE, client_secret=_SECRET)
    patience = settings["connect_patience"]
    async with TokenManager(source, refresh_threshold=timing.last_fifth, patience=patience) as manager:
        pool: AnyPool = asyncpool_creds.create_pool(
            dsn, credentials=manager, min_size=CONNECTIONS, max_size=CONNECTIONS, **settings
        )
        async with _opened(pool):
            yield partial(_ask_asyncpg, pool)


@asynccontextmanager
async def _plain(dsn: str, issuer: TokenIssuer, timing: Timing) -> AsyncGenerator[Ask]:
    async with httpx.AsyncClient() as client:
        token = _CachedToken(client, issuer.token_url, timing.last_fifth)
        pool: AnyPool = asyncpg.create_pool(dsn, password=token, min_size=CONNECTIONS, max_size=CONNECTIONS)
        async with _opened(pool):
            yield partial(_ask_asyncpg, pool)


@asynccontextmanager
async def _opened(pool: AnyPool) -> AsyncGenerator[None]:
    await pool
    try:
        yield
    finally:
        # Not closed: it would wait for what a fault has left hanging.
        pool.terminate()


async def _ask_asyncpg(pool: AnyPool, connected: Callable[[], None]) -> None:
    async with pool.acquire() as connection:
        connected()
        await connection.execute(_QUERY)


@asynccontextmanager
async def _psycopg(dsn: str, issuer: TokenIssuer, timing: Timing) -> AsyncGenerator[Ask]:
    async with httpx.AsyncClient() as client:
        token = _CachedToken(client, issuer.token_url, timing.last_fifth)

        async def conninfo() -> str:
            return make_conninfo(dsn, password=await token(), gssencmode="disable")

        pool: AsyncConnectionPool[AsyncConnection[tuple[Any, ...]]] = AsyncConnectionPool(
            conninfo,
            kwargs={"autocommit": True},
            min_size=CONNECTIONS,
            max_size=CONNECTIONS,
            # Otherwise it hands out every connection that was cut: it learns of it from the query that fails.
            check=AsyncConnectionPool.check_connection,
            open=False,
        )

        async def ask(connected: Callable[[], None]) -> None:
            async with pool.connection() as connection:
                connected()
                await connection.execute(_QUERY)

        await pool.open(wait=True)
        try:
            yield ask
        finally:
            await pool.close(timeout=1.0)


class _CachedToken:
    """The function that people write: it keeps a token until its last fifth, and then as long as it gets no other.

    Args:
        client: What it asks with.
        url: Where.
        last_fifth: Seconds before its end at which it asks for another one.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, last_fifth: float) -> None:
        self._client = client
        self._url = url
        self._last_fifth = last_fifth
        self._token = ""
        self._ends_at = 0.0
        self._lock = asyncio.Lock()

    async def __call__(self) -> str:
        async with self._lock:
            if time.time() >= self._ends_at - self._last_fifth:
                try:
                    await self._fetch()
                except httpx.HTTPError:
                    if time.time() >= self._ends_at:
                        raise
            return self._token

    async def _fetch(self) -> None:
        form = {"grant_type": "client_credentials", "client_id": ROLE, "client_secret": _SECRET}
        asked_at = time.time()
        answer = (await self._client.post(self._url, data=form)).raise_for_status().json()
        self._token, self._ends_at = answer["access_token"], asked_at + answer["expires_in"]


CONTENDERS: Final[Mapping[str, Contender]] = {
    OURS: ours(),
    PATIENT: ours(connect_patience=_PATIENCE),
    PLAIN: _plain,
    PSYCOPG: _psycopg,
}


# The run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a drill was for one contender.

    Args:
        queries: How many there were.
        failed: How many of them raised.
        in_flight: How many of those lost their connection under the query.
        longest: Seconds that the longest took, from asking for a connection to an answer or an error.
        recovered: Seconds from the end of the fault to the end of the last query that failed or was stalled; one whose
            connection is cut is no sign of the fault.
        errors: Types of the errors, and how often each was raised.
        is_well: Whether the latest queries were answered (or in flight), as many as there are workers.
    """

    queries: int
    failed: int
    in_flight: int
    longest: float
    recovered: float
    errors: Mapping[str, int]
    is_well: bool

    @property
    def lost(self) -> int:
        """Queries that failed, and would not have with another pool."""
        return self.failed - self.in_flight

    def __str__(self) -> str:
        errors = ", ".join(f"{count} {name}" for name, count in self.errors.items())
        return (
            f"{self.failed} of {self.queries} failed ({self.in_flight} in flight), longest {self.longest:.2f} s, "
            f"recovered after {self.recovered:.2f} s" + (f": {errors}" if errors else "")
        )


async def run(
    drill: Drill,
    timing: Timing,
    server: PostgresServer,
    contenders: Mapping[str, Contender] = CONTENDERS,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Outcome]:
    """Run a drill for all contenders at the same time, and return what it was for each.

    Args:
        drill: What goes wrong.
        timing: How long things take.
        server: Has the role `ROLE`, and lets in by its Unix socket whoever comes.
        contenders: Who takes part, by name.
        tick: Called once a second.
    """
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as closing:
        closing.enter_context(_quiet_logs())
        scene = _Scene(server, closing.enter_context(_Resolver(loop)))
        sides = [await closing.enter_async_context(_side(name, scene, timing)) for name in contenders]
        asking = [
            await closing.enter_async_context(contenders[side.name](_dsn(side), side.issuer, timing)) for side in sides
        ]
        for side in sides:
            side.issuer.access_lifetime = timing.life
        stop = asyncio.Event()
        workers = [
            asyncio.create_task(_work(side, ask, stop, random.Random(number)), name=f"{side.name}, worker {number}")
            for side, ask in zip(sides, asking, strict=True)
            for number in range(WORKERS)
        ]
        every_second = [tick, *(side.door.close_idlest for side in sides if drill.cuts)]
        beat = asyncio.create_task(_each_second(every_second), name="progress and cuts of a drill")
        try:
            await asyncio.sleep(_STEADY)
            await asyncio.gather(*(_strike(drill, timing, scene, side) for side in sides))
            await asyncio.sleep(drill.watched(timing))
            stop.set()
            await asyncio.wait(workers, timeout=_GRACE)
        finally:
            tasks = [beat, *workers]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for worker in workers:
            # A mistake in here is no failed query.
            if not worker.cancelled():
                worker.result()
        return {side.name: _outcome(side) for side in sides}


async def _strike(drill: Drill, timing: Timing, scene: _Scene, side: _Side) -> None:
    await asyncio.gather(*(fault.strike(scene, side, fault.lasts(timing)) for fault in drill.faults))
    side.fault_over = asyncio.get_running_loop().time()


async def _each_second(actions: Sequence[Callable[[], object]]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 1.0
        await asyncio.sleep(1.0)
        # When a loop has been held up, all workers ask at once, and a cut would hit one of them.
        while loop.time() - due > _HELD_UP:
            due = loop.time() + 0.05
            await asyncio.sleep(0.05)
        for action in actions:
            action()


async def _work(side: _Side, ask: Ask, stop: asyncio.Event, chance: random.Random) -> None:
    loop = asyncio.get_running_loop()
    while not stop.is_set():
        await asyncio.sleep(chance.uniform(*_THINK))
        began = loop.time()
        is_connected = False

        def connected() -> None:
            nonlocal is_connected
            is_connected = True

        error: str | None = None
        in_flight = False
        try:
            await ask(connected)
        except asyncio.CancelledError:
            # The drill is over, and it still has no answer.
            side.queries.append(_Query(began, loop.time(), "NoAnswer", in_flight=False))
            raise
        except Exception as raised:  # noqa: BLE001 - whatever it is, the query failed
            error = type(raised).__name__
            # asyncpg's InterfaceError says that the connection was closed before the query.
            in_flight = is_connected and not isinstance(raised, asyncpg.InterfaceError)
        side.queries.append(_Query(began, loop.time(), error, in_flight))


def _outcome(side: _Side) -> Outcome:
    bad = [query for query in side.queries if query.is_bad]
    failed = [query.error for query in bad if query.error is not None]
    return Outcome(
        queries=len(side.queries),
        failed=len(failed),
        in_flight=sum(query.in_flight for query in bad),
        longest=max(query.ended - query.began for query in side.queries),
        recovered=max([0.0, *(query.ended - side.fault_over for query in bad if not query.in_flight)]),
        errors=Counter(failed),
        is_well=all(query.error is None or query.in_flight for query in side.queries[-WORKERS:]),
    )


@asynccontextmanager
async def _side(name: str, scene: _Scene, timing: Timing) -> AsyncGenerator[_Side]:
    clock = _ServerClock()
    issuer = TokenIssuer(clients={ROLE: _SECRET}, access_lifetime=timing.first_life, clock=clock)
    door = TokenDoor(scene.server, issuer.verify)
    async with issuer, door:
        yield _Side(name, clock, issuer, door)


def _dsn(side: _Side) -> str:
    return f"postgresql://{ROLE}@{_HOST}:{side.door.port}/postgres?sslmode=disable"


class _Resolver:
    """Resolves the name of the database on one event loop, until it is gone.

    There is no one place through which all go. asyncpg, and so ours, leaves the name to the event loop's
    ``create_connection``; psycopg asks its ``getaddrinfo`` before it connects. Both are replaced: asyncio's
    ``create_connection`` would ask ``getaddrinfo`` too, uvloop's resolves by itself. Other names are left alone; the
    issuers are named by their address.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_gone = False
        self._loop = loop
        self._originals: Mapping[str, Callable[..., Awaitable[Any]]] = {
            "create_connection": loop.create_connection,
            "getaddrinfo": loop.getaddrinfo,
        }

    def __enter__(self) -> Self:
        setattr(self._loop, "create_connection", self._create_connection)  # noqa: B010 - for mypy a method is no place
        setattr(self._loop, "getaddrinfo", self._getaddrinfo)  # noqa: B010
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(self._loop, name, original)

    async def _create_connection(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str | None = None, port: int | None = None, **rest: Any
    ) -> tuple[asyncio.BaseTransport, asyncio.BaseProtocol]:
        made: tuple[asyncio.BaseTransport, asyncio.BaseProtocol] = await self._originals["create_connection"](
            factory, self._resolved(host), port, **rest
        )
        return made

    async def _getaddrinfo(self, host: str | bytes | None, port: str | bytes | int | None, **rest: Any) -> list[Any]:
        found: list[Any] = await self._originals["getaddrinfo"](self._resolved(host), port, **rest)
        return found

    def _resolved(self, host: HostT) -> HostT | str:
        if host != _HOST:
            return host
        if self.is_gone:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return _ADDRESS


@contextmanager
def _quiet_logs() -> Generator[None]:
    """Keep thousands of lines about what goes wrong on purpose from the terminal; they are written all the same."""
    silent = logging.NullHandler()
    loggers = [logging.getLogger(name) for name in ("asyncpool_creds", "asyncpg", "psycopg", "psycopg.pool", "asyncio")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(silent)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagates in zip(loggers, before, strict=True):
            logger.removeHandler(silent)
            logger.propagate = propagates
