"""A fleet on virtual time: a server and a source that count who asks them, and the two kinds of replica that ask."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol, TypeAlias, cast
from unittest import mock

import asyncpg

from asyncpool_creds import Credential, CredentialRefreshed, Event, ProviderError, TokenManager
from asyncpool_creds._connector import AnyConnection
from asyncpool_creds._events import Observers, RetireReason
from asyncpool_creds._rotation import RetireWhen, Rotation, Session
from asyncpool_creds._slots import Slot
from asyncpool_creds.testing import VirtualClock

__all__ = ["CAUSES", "Cause", "Contender", "Fleet", "Life", "Naive", "Ours", "Scenario", "Service", "live", "peak"]

Cause: TypeAlias = Literal["first fill", "rotation"]
CAUSES: Final[tuple[Cause, ...]] = ("first fill", "rotation")

# Any would do, but the expiry of a token is a wall time, and results must not hang on the day.
_START: Final = datetime(2026, 1, 1, tzinfo=UTC)
_NAIVE_RETRY: Final = 1.0
# How often a life reports how far it is.
_STEP: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How large it is, and what it talks to.

    Args:
        replicas: Processes with one pool each.
        connections: Of each pool, which is always full.
        token_lifetime: Seconds.
        lifetimes: How many of them are lived through after the last replica has started.
        retire_when: The pool's argument of that name.
        connects_per_second: What the server can authenticate; those who come faster wait in order of arrival.
        connect_seconds: What a connect takes when nobody else connects.
        fetch_seconds: What the source takes for a token, however many ask.
        seed: Of the starts and of all jitter.
    """

    replicas: int = 1000
    connections: int = 20
    token_lifetime: float = 900.0
    lifetimes: float = 2.0
    retire_when: RetireWhen = "expired"
    connects_per_second: float = 2000.0
    connect_seconds: float = 0.03
    fetch_seconds: float = 0.05
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """How the fleet starts, and what happens to it.

    Args:
        name: For tables and files.
        meaning: In a sentence.
        spread: The share of a token's lifetime over which replicas start, at random.
        back: The source fails from half of the first lifetime until such a share of it is left; None: never.
    """

    name: str
    meaning: str
    spread: float = 0.0
    back: float | None = None

    def duration(self, fleet: Fleet) -> float:
        """Return the seconds from the first start to the end, with half a lifetime for what the last rotation takes."""
        return (self.spread + fleet.lifetimes + 0.5) * fleet.token_lifetime


class Service:
    """What a whole fleet asks: answers in order of arrival, and remembers when it was asked and why.

    Attributes:
        asked: Seconds since the fleet's first start, by cause.
        slowest: The longest that an answer took, in seconds, by cause.
    """

    def __init__(self, *, seconds: float, per_second: float | None = None) -> None:
        self._seconds = seconds
        self._interval = 0.0 if per_second is None else 1 / per_second
        self._free_at = 0.0
        self.asked: dict[Cause, list[float]] = {cause: [] for cause in CAUSES}
        self.slowest: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)

    async def ask(self, cause: Cause) -> None:
        """Return when the answer is there."""
        now = asyncio.get_running_loop().time()
        self.asked[cause].append(now)
        self._free_at = max(self._free_at, now) + self._interval
        takes = self._free_at - now + self._seconds
        self.slowest[cause] = max(self.slowest[cause], takes)
        await asyncio.sleep(takes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What one kind of fleet did in one scenario.

    Args:
        server: Counted the connects.
        source: Counted the fetches, failed ones too.
        late: Connections that reached the end of their token before they were replaced.
        duration: Seconds lived.
    """

    server: Service
    source: Service
    late: int
    duration: float


class _World:
    """What the replicas of one life share."""

    def __init__(self, fleet: Fleet, scenario: Scenario, clock: VirtualClock) -> None:
        self.fleet = fleet
        self.clock = clock
        self.server = Service(seconds=fleet.connect_seconds, per_second=fleet.connects_per_second)
        self.source = Service(seconds=fleet.fetch_seconds)
        self.late = 0
        self._minted = 0
        lifetime = fleet.token_lifetime
        self._fails_from = lifetime / 2
        self._fails_until = 0.0 if scenario.back is None else lifetime * (1 - scenario.back)

    async def fetch(self, cause: Cause) -> Credential:
        """Return a new token of the asker's own."""
        await self.source.ask(cause)
        if self._fails_from <= self.clock.monotonic() < self._fails_until:
            raise ProviderError("the modelled source is down")
        self._minted += 1
        expires_at = self.clock.now() + timedelta(seconds=self.fleet.token_lifetime)
        return Credential(f"token-{self._minted}", expires_at=expires_at)


class _Replica(Protocol):
    async def live(self, until: float) -> None:
        """Fill the pool, keep it until that moment, and close it."""
        ...


class _Connection:
    """What `Rotation` uses of an asyncpg connection."""

    __slots__ = ("_closed", "_host", "session")

    def __init__(self, session: Session, host: _OurReplica) -> None:
        self.session = session
        self._host = host
        self._closed = False
        if session.stamp is not None:
            session.stamp.hold()

    def is_closed(self) -> bool:
        return self._closed

    async def close(self) -> None:
        self.terminate()

    def terminate(self) -> None:
        if not self._closed:
            self._closed = True
            if self.session.stamp is not None:
                self.session.stamp.let_go()
            self._host.look()


class _OurReplica:
    """A token manager and a rotation of the library's, and for the rest of the pool its slots, full and at rest."""

    # What a slot asks of its pool.
    _generation = 0

    def __init__(self, world: _World, *, per_second: float) -> None:
        self._world = world
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._fetched = False
        self._manager = TokenManager(self._fetch, clock=world.clock, on_event=self._observe)
        self._rotation = Rotation(
            self,
            loop=loop,
            clock=world.clock,
            retire_when=world.fleet.retire_when,
            per_second=per_second,
            has_hooks=False,
            observers=Observers(()),
        )
        self.connecting: set[Slot] = set()
        self._slots = [
            Slot(cast("asyncpg.Pool[Any]", self), max_queries=0, setup=None, max_inactive_time=0.0)
            for _ in range(world.fleet.connections)
        ]

    async def live(self, until: float) -> None:
        await self._manager.start()
        # As asyncpg fills a pool: one, and when that has worked, the others.
        await self._fill(self._slots[0])
        await asyncio.gather(*(self._fill(slot) for slot in self._slots[1:]))
        self._rotation.start(in_background=True)
        await asyncio.sleep(until - self._loop.time())
        await self._rotation.stop()
        await self._manager.aclose()

    async def _fill(self, slot: Slot) -> None:
        slot.fill(await self._connect("first fill"))

    async def _connect(self, cause: Cause) -> AnyConnection:
        # As the pool does it: what the connection is marked with is taken before the handshake.
        epoch, opened = self._rotation.epoch, self._world.clock.monotonic()
        stamp = await self._manager.stamp()
        await self._world.server.ask(cause)
        return cast("AnyConnection", _Connection(Session(stamp, opened, epoch, None, expired_sessions="refuse"), self))

    async def _fetch(self) -> Credential:
        cause: Cause = "rotation" if self._fetched else "first fill"
        credential = await self._world.fetch(cause)
        self._fetched = True
        return credential

    def _observe(self, event: Event) -> None:
        if isinstance(event, CredentialRefreshed):
            self._rotation.look()

    def look(self) -> None:
        self._rotation.look()

    # -- what the rotation asks for

    def slots(self) -> Sequence[Slot]:
        return self._slots

    def session_of(self, connection: AnyConnection) -> Session | None:
        return cast("_Connection", connection).session

    async def open_replacement(self) -> AnyConnection:
        return await self._connect("rotation")

    def retire(self, connection: AnyConnection, reason: RetireReason) -> None:  # noqa: ARG002 - the protocol's
        self._world.late += reason == "expired"

    def close_later(self, connection: AnyConnection) -> asyncio.Task[None]:
        return self._loop.create_task(cast("_Connection", connection).close())

    def restore_floor(self) -> None:
        """Do nothing: the pool is never below its size."""

    def is_source_failing(self) -> bool:
        return self._manager.is_failing

    def is_refused(self, error: BaseException) -> bool:  # noqa: ARG002 - the protocol's
        return False


class _NaiveReplica:
    """A pool that is told of its token's end when it has come: a new token, and all connections anew at once."""

    def __init__(self, world: _World) -> None:
        self._world = world
        self._loop = asyncio.get_running_loop()

    async def live(self, until: float) -> None:
        ends = await self._fetch("first fill")
        await self._connect("first fill", 1)
        await self._connect("first fill", self._world.fleet.connections - 1)
        while ends < until:
            await asyncio.sleep(ends - self._loop.time())
            ends = await self._fetch("rotation")
            await self._connect("rotation", self._world.fleet.connections)

    async def _fetch(self, cause: Cause) -> float:
        """Return when the new token ends."""
        while True:
            try:
                await self._world.fetch(cause)
            except ProviderError:
                await asyncio.sleep(_NAIVE_RETRY)
            else:
                return self._loop.time() + self._world.fleet.token_lifetime

    async def _connect(self, cause: Cause, count: int) -> None:
        await asyncio.gather(*(self._world.server.ask(cause) for _ in range(count)))


class Contender(Protocol):
    """A kind of fleet."""

    @property
    def has_jitter(self) -> bool:
        """Whether chance decides anything in it."""
        ...

    def replica(self, world: _World) -> _Replica:
        """Return a new replica."""
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """Replicas that run the library's manager and rotation.

    Args:
        per_second: Cap on the background connects of each replica.
        has_jitter: False: every number that the library draws at random is the middle one.
    """

    per_second: float
    has_jitter: bool = True

    def replica(self, world: _World) -> _Replica:
        return _OurReplica(world, per_second=self.per_second)


@dataclass(frozen=True, slots=True)
class Naive:
    """Replicas that reconnect when the token has ended."""

    has_jitter: bool = False

    def replica(self, world: _World) -> _Replica:
        return _NaiveReplica(world)


def live(fleet: Fleet, scenario: Scenario, contender: Contender, tick: Callable[[float], None]) -> Life:
    """Return what the contender's fleet does in the scenario; `tick` is told of virtual seconds as they pass.

    The result is the same for the same arguments, whatever else the process has drawn at random.
    """
    clock = VirtualClock(_START)
    world = _World(fleet, scenario, clock)
    duration = scenario.duration(fleet)
    # Every contender starts alike.
    chance = random.Random(f"{fleet.seed} {scenario.name}")
    starts = [chance.random() * scenario.spread * fleet.token_lifetime for _ in range(fleet.replicas)]

    async def one(start: float) -> None:
        await asyncio.sleep(start)
        await contender.replica(world).live(duration)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(one(start))
            while (left := duration - clock.monotonic()) > 0:
                step = min(_STEP, left)
                await asyncio.sleep(step)
                tick(step)

    with _chance(fleet.seed, jitter=contender.has_jitter):
        clock.run(everybody())
    return Life(server=world.server, source=world.source, late=world.late, duration=duration)


@contextlib.contextmanager
def _chance(seed: int, *, jitter: bool) -> Generator[None, None, None]:
    """Give the library's jitter a seed, or take it away: it is drawn from `random.random` and nowhere else."""
    drawn = random.Random(seed).random if jitter else lambda: 0.5
    with mock.patch.object(random, "random", drawn):
        yield


def peak(moments: Sequence[float], seconds: float = 1.0) -> int:
    """Return how many of the moments lie within the `seconds` in which most of them do."""
    ordered = sorted(moments)
    most = first = 0
    for last, moment in enumerate(ordered):
        while ordered[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most
