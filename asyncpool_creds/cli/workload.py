"""The demo's workload: tellers who move money between accounts and check that none gets lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from array import array
from collections import Counter
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import asyncpg

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    _Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    _Connection: TypeAlias = PoolConnectionProxy[asyncpg.Record]

__all__ = ["ROLE", "SCHEMA", "TOTAL", "TOTAL_QUERY", "Meter", "MoneyLostError", "Sample", "work"]

ROLE: Final = "app"
_ACCOUNTS: Final = 100
_BALANCE: Final = 1000
TOTAL: Final = _ACCOUNTS * _BALANCE
TOTAL_QUERY: Final = "SELECT sum(balance)::bigint AS total FROM accounts"
SCHEMA: Final = "\n".join(
    (
        # Half-empty pages: an updated row finds room beside its former self.
        "CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50);",
        f"INSERT INTO accounts SELECT id, {_BALANCE} FROM generate_series(1, {_ACCOUNTS}) AS id;",  # noqa: S608 - ours
        f"GRANT SELECT, UPDATE ON accounts TO {ROLE};",
    )
)
_READ: Final = "SELECT balance FROM accounts WHERE id = $1"
_WRITE: Final = "UPDATE accounts SET balance = balance + $2 WHERE id = $1"

# Seconds between two visits of a teller to the pool, on average. The database, the door in front of it
# and both pools share this machine: without a pause this would measure the processor.
_PAUSE: Final = 0.03
# Seconds more after a failure, as a client that tries again would wait: a side that fails must not
# slow the other one down with refused connects.
_PAUSE_AFTER_FAILURE: Final = 0.25

_SAMPLE_SIZE: Final = 100_000


class MoneyLostError(Exception):
    """The accounts do not add up."""


class Sample:
    """Measurements in bounded memory: all of them up to `size`, then a uniform random sample.

    This is Algorithm R (Vitter, "Random Sampling with a Reservoir", 1985). The maximum is always exact.
    """

    def __init__(self, size: int = _SAMPLE_SIZE) -> None:
        self._size = size
        self._kept = array("d")
        self._seen = 0
        self._maximum: float | None = None

    def add(self, value: float) -> None:
        """Take one more measurement."""
        self._seen += 1
        if self._maximum is None or value > self._maximum:
            self._maximum = value
        if len(self._kept) < self._size:
            self._kept.append(value)
        elif (place := random.randrange(self._seen)) < self._size:  # noqa: S311 - statistics
            self._kept[place] = value

    @property
    def maximum(self) -> float | None:
        """The largest measurement; None without any."""
        return self._maximum

    def percentile(self, percent: int) -> float | None:
        """Return the `percent`-th percentile (1 to 99), interpolated; None without measurements."""
        if len(self._kept) < 2:
            return self._maximum
        return statistics.quantiles(self._kept, n=100, method="inclusive")[percent - 1]


class Meter:
    """What happened to the workload on one pool, as the workload itself saw it.

    Attributes:
        queries: Statements that were answered.
        failures: Visits to the pool that an exception ended, at whichever step, by exception.
        acquire_times: Seconds that each successful acquire took.
        waits: Acquires during which a connection was opened, as far as `connecting` was called for it.
    """

    def __init__(self) -> None:
        self.queries = 0
        self.failures: Counter[str] = Counter()
        self.acquire_times: Sample = Sample()
        self.waits: int = 0
        self._acquiring: set[asyncio.Task[Any] | None] = set()

    @contextlib.asynccontextmanager
    async def connection(self, pool: _Pool) -> AsyncGenerator[_Connection]:
        """Acquire and release a connection, and take the time of the former."""
        task = asyncio.current_task()
        self._acquiring.add(task)
        started = time.perf_counter()
        try:
            connection: _Connection = await pool.acquire()
        finally:
            self._acquiring.discard(task)
        self.acquire_times.add(time.perf_counter() - started)
        try:
            yield connection
        finally:
            await pool.release(connection)

    def connecting(self) -> None:
        """Note that the running task opens a connection: an acquire waits for it, or else some task of the pool's."""
        task = asyncio.current_task()
        if task in self._acquiring:
            self._acquiring.discard(task)
            self.waits += 1

    def failed(self, error: Exception) -> None:
        """Note that `error` ended a visit."""
        code = getattr(error, "sqlstate", None)
        self.failures[type(error).__name__ if code is None else f"{type(error).__name__} ({code})"] += 1


async def work(pool: _Pool, meter: Meter, closing_time: asyncio.Event) -> None:
    """Be a teller until closing time; the visit that is going on then is finished."""
    while not closing_time.is_set():
        visit = random.choice((_transfer, _audit))  # noqa: S311 - a workload
        try:
            await visit(pool, meter)
        except Exception as error:  # noqa: BLE001 - whatever it is, this is what the demo counts
            meter.failed(error)
            await _rest(_PAUSE_AFTER_FAILURE, closing_time)
        await _rest(random.uniform(0, 2 * _PAUSE), closing_time)  # noqa: S311 - a workload


async def _rest(seconds: float, closing_time: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await closing_time.wait()


async def _transfer(pool: _Pool, meter: Meter) -> None:
    # In the order of their numbers: two transfers never wait for each other's second account.
    first, second = sorted(random.sample(range(1, _ACCOUNTS + 1), 2))
    async with meter.connection(pool) as connection, connection.transaction():
        balance: int = await connection.fetchval(_READ, first)
        amount = random.randint(-_BALANCE, max(balance, 0))  # noqa: S311 - a workload
        await connection.execute(_WRITE, first, -amount)
        await connection.execute(_WRITE, second, amount)
    meter.queries += 3


async def _audit(pool: _Pool, meter: Meter) -> None:
    async with meter.connection(pool) as connection, connection.transaction(readonly=True):
        total: int = await connection.fetchval(TOTAL_QUERY)
    meter.queries += 1
    if total != TOTAL:
        raise MoneyLostError(f"the accounts add up to {total}, not to {TOTAL}")
