"""The process that owns a throw-away PostgreSQL, so that it is gone whatever happens to whoever asked for it.

Run as a script, with nothing but the standard library. The first line of standard input is the order, as JSON;
each further byte means: restart the server; the end of standard input means: stop it and remove its directory. For the
order and for each restart there is one line on standard output, the answer, as JSON: where the server is, or what
went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RESTART", "Answer", "Order"]

RESTART = b"r"
"""The byte that asks for a restart."""

# sun_path holds 104 bytes on macOS and 108 on Linux (unix(4), unix(7)).
_SOCKET_PATH_LIMIT = 100
_PORT_ATTEMPTS = 10
_STEP_TIMEOUT = 60.0
_STOP_TIMEOUT = 10.0
_POLL_INTERVAL = 0.005
_NOBODY_UID = 65534


class Order(TypedDict):
    """What is wanted; `port` 0 means a free one."""

    parent: int
    bin_directory: str
    host: str
    port: int
    configuration: str
    hba: str


class Answer(TypedDict):
    """What was made of it; `error` is empty if the server runs."""

    error: str
    directory: str
    port: int
    pid: int
    version: str


class _FailedError(Exception):
    """The server cannot be started; the text is for whoever asked."""


class _PortTakenError(Exception):
    """Somebody else took the port between our choosing it and the server's binding it."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """As whom the server runs: it refuses to run as root."""

    owner: tuple[int, int] | None = None
    prefix: tuple[str, ...] = ()
    drop_to: tuple[int, int] | None = None

    def popen(self, argv: list[str], directory: Path, output: int) -> subprocess.Popen[bytes]:
        # Of our environment the server gets what finds programs and libraries: no secrets, no PG* variables.
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        user, group = self.drop_to or (None, None)
        return subprocess.Popen(  # noqa: S603 - our own list of arguments
            [*self.prefix, *argv],
            cwd=directory,
            env={**environment, "LC_ALL": "C", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            user=user,
            group=group,
            extra_groups=None if self.drop_to is None else [],
        )

    def run(self, argv: list[str], directory: Path) -> str:
        """Run a program to its end and return what it printed.

        Raises:
            _FailedError: It could not be started, failed, or took too long.
        """
        with tempfile.TemporaryFile() as output:
            try:
                process = self.popen(argv, directory, output.fileno())
            except OSError as error:
                raise _FailedError(f"{argv[0]}: {error.strerror}") from error
            try:
                status = process.wait(_STEP_TIMEOUT)
            except subprocess.TimeoutExpired as error:
                raise _FailedError(f"{argv[0]}: not finished after {_STEP_TIMEOUT:.0f} s") from error
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
        if status != 0:
            raise _FailedError(f"{argv[0]}: exit status {status}\n{text}")
        return text


@dataclass(slots=True)
class _Server:
    """A data directory and, once started, the server in it."""

    order: Order
    directory: Path
    identity: _Identity = field(default_factory=_Identity)
    process: subprocess.Popen[bytes] | None = None

    def program(self, name: str) -> str:
        return str(Path(self.order["bin_directory"], name))

    def initialise(self) -> str:
        """Make the data directory and return the server's version."""
        failures: list[str] = []
        for identity in _identities():
            self.identity = identity
            if identity.owner is not None:
                os.chown(self.directory, *identity.owner)
            try:
                version = identity.run([self.program("postgres"), "--version"], self.directory)
                identity.run(
                    [
                        self.program("initdb"),
                        "--pgdata=data",
                        "--username=postgres",
                        "--auth=trust",
                        "--encoding=UTF8",
                        "--no-locale",
                        "--no-sync",
                        "--no-instructions",
                        "--wal-segsize=1",
                    ],
                    self.directory,
                )
            except _FailedError as error:
                failures.append(str(error))
                shutil.rmtree(self.directory / "data", ignore_errors=True)
                continue
            # It says "postgres (PostgreSQL)" and then its version.
            return version.split()[2]
        raise _FailedError("\n".join(failures))

    def start(self) -> int:
        """Start the server for the first time and return its port."""
        data = self.directory / "data"
        (data / "postgresql.conf").write_text(self.order["configuration"])
        (data / "pg_hba.conf").write_text(self.order["hba"])
        ports = (
            [self.order["port"]]
            if self.order["port"]
            else (_free_port(self.order["host"]) for _ in range(_PORT_ATTEMPTS))
        )
        for port in ports:
            with contextlib.suppress(_PortTakenError):
                self._start_on(port)
                return port
        raise _FailedError(f"the port is taken; the log of the server ends with\n{_tail(self.directory / 'log')}")

    def _start_on(self, port: int) -> None:
        """Start the server on this port; its log goes on where it was."""
        data = self.directory / "data"
        log = self.directory / "log"
        with log.open("ab") as output:
            began = output.tell()
            self.process = self.identity.popen(
                [
                    self.program("postgres"),
                    "-D",
                    "data",
                    "-c",
                    f"port={port}",
                    "-c",
                    f'unix_socket_directories="{self.directory}"',
                ],
                self.directory,
                output.fileno(),
            )
        deadline = time.monotonic() + _STEP_TIMEOUT
        while not _is_ready(data / "postmaster.pid"):
            status = self.process.poll()
            if status is not None:
                text = log.read_bytes()[began:].decode(errors="replace")
                if "Address already in use" in text:
                    raise _PortTakenError
                raise _FailedError(f"postgres: exit status {status}; its log ends with\n{_tail(log)}")
            if _is_abandoned(self.order["parent"], _POLL_INTERVAL):
                sys.exit()
            if time.monotonic() > deadline:
                raise _FailedError(f"postgres: not ready after {_STEP_TIMEOUT:.0f} s; its log ends with\n{_tail(log)}")

    def serve(self, port: int, version: str) -> None:
        """Tell where the server is, and restart it whenever asked, until it is to be stopped."""
        self._answer(port, version)
        parent = self.order["parent"]
        while True:
            if _is_abandoned(parent, 1.0):
                if os.getppid() != parent or os.read(0, 1) != RESTART:
                    return
                self._restart(port)
                self._answer(port, version)
            elif self.process is not None:
                self.process.poll()

    def _restart(self, port: int) -> None:
        """Stop the server and start it again where it was."""
        self._shut_down()
        try:
            self._start_on(port)
        except _PortTakenError as error:
            raise _FailedError(f"port {port} was taken while the server was restarted") from error

    def _answer(self, port: int, version: str) -> None:
        """Tell whoever asked for the server where it is."""
        if self.process is not None:
            directory = str(self.directory)
            _answer(Answer(error="", directory=directory, port=port, pid=self.process.pid, version=version))

    def _shut_down(self) -> None:
        """Stop the server, if it runs."""
        process = self.process
        if process is not None and process.poll() is None:
            # "Fast shutdown": its clients are told (57P01). If that takes too long, shared memory goes with SIGQUIT.
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_TIMEOUT)
                    break

    def stop(self) -> None:
        """Stop the server, if it runs, and remove the directory."""
        self._shut_down()
        shutil.rmtree(self.directory, ignore_errors=True)


def _identities() -> Iterator[_Identity]:
    """Yield the ways of not being root, the simplest first."""
    if os.geteuid() != 0:
        yield _Identity()
        return
    try:
        entry = pwd.getpwnam("nobody")
        nobody = (entry.pw_uid, entry.pw_gid)
    except KeyError:
        nobody = (_NOBODY_UID, _NOBODY_UID)
    yield _Identity(owner=nobody, drop_to=nobody)
    # An environment under /root is out of nobody's reach. In a user namespace root's files stay within reach of
    # a process that does not look like root and has none of its powers.
    unshare = shutil.which("unshare")
    if unshare is not None:
        prefix = (unshare, "--user", "--map-user=1000", "--map-group=1000", "--")
        yield _Identity(owner=(0, 0), prefix=prefix)


def _make_directory() -> Path:
    """Make the directory of everything, where the path of a socket in it stays short enough."""
    for name in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp makes names nobody can guess
        parent = Path(name).resolve()
        if len(f"{parent}/asyncpool-pg-12345678/.s.PGSQL.65535.lock") < _SOCKET_PATH_LIMIT:
            return Path(tempfile.mkdtemp(prefix="asyncpool-pg-", dir=parent))
    raise _FailedError("no directory for temporary files with a path short enough for a Unix socket")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(pid_file: Path) -> bool:
    """Tell whether the server says so in the eighth line of postmaster.pid (miscinit.h)."""
    try:
        lines = pid_file.read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[7].strip() == "ready"


def _is_abandoned(parent: int, timeout: float) -> bool:
    """Wait up to `timeout` seconds for the order to stop; return whether it came."""
    readable, _, _ = select.select([sys.stdin], [], [], timeout)
    # A forked child of our parent may keep the pipe open for longer than our parent lives.
    return bool(readable) or os.getppid() != parent


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _quit(_number: int, _frame: object) -> NoReturn:
    sys.exit()


def _carry_on(_number: int, _frame: object) -> None:
    """Do nothing about a signal that was meant for our parent."""


def _answer(answer: Answer) -> None:
    print(json.dumps(answer), flush=True)  # noqa: T201 - the answer


def main() -> None:
    """Carry out the order on standard input."""
    signal.signal(signal.SIGTERM, _quit)
    for number in (signal.SIGINT, signal.SIGHUP):
        # Not SIG_IGN: the server would inherit it, and not hear a SIGINT that comes before it has its own handler.
        signal.signal(number, _carry_on)
    # Unbuffered: select() must see what comes after the order.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    order: Order = json.loads(line)
    nothing = Answer(error="", directory="", port=0, pid=0, version="")
    try:
        server = _Server(order, _make_directory())
    except (OSError, _FailedError) as error:
        _answer({**nothing, "error": str(error)})
        return
    try:
        version = server.initialise()
        if _is_abandoned(order["parent"], 0.0):
            return
        port = server.start()
        server.serve(port, version)
    except (OSError, _FailedError) as error:
        with contextlib.suppress(BrokenPipeError):
            _answer({**nothing, "error": str(error)})
    finally:
        # Once is enough: a second signal must not cut the cleaning short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.stop()


if __name__ == "__main__":
    main()
