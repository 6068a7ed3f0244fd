"""A TLS end in front of a server that has none, in a process of its own: what it computes is not on anybody's loop.

As a script it is that process: it takes the server's host and port and a file with key and certificate, prints the
port it listens on, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlencode

import trustme

from asyncpool_creds.testing.postgres import PostgresServer

__all__ = ["secured"]

_HOST: Final = "127.0.0.1"
# PostgreSQL: src/include/libpq/pqcomm.h; the length, and a code in the place of a protocol version.
_SSL_REQUEST: Final = (8).to_bytes(4) + (80877103).to_bytes(4)
_YES: Final = b"S"


@asynccontextmanager
async def secured(server: PostgresServer, user: str) -> AsyncGenerator[str]:
    """Open an encrypted way to `server`; give the DSN by which `user` takes it, checking certificate and host name."""
    authority = trustme.CA()
    with tempfile.TemporaryDirectory(prefix="asyncpool-front-") as directory:
        certificate, root = Path(directory, "front.pem"), Path(directory, "ca.pem")
        authority.issue_cert("localhost", _HOST).private_key_and_cert_chain_pem.write_to_path(str(certificate))
        authority.cert_pem.write_to_path(str(root))
        command = [sys.executable, "-m", __name__, server.host, str(server.port), str(certificate)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        try:
            if process.stdout is None or process.stdin is None:
                raise RuntimeError("the front has no pipes")
            port = (await process.stdout.readline()).decode().strip()
            if not port:
                raise RuntimeError("the front did not start; what it says of it is above")
            query = urlencode({"sslmode": "verify-full", "sslrootcert": str(root)})
            yield f"postgresql://{user}@{_HOST}:{port}/postgres?{query}"
        finally:
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()


# The other process


class _End(asyncio.Protocol):
    """One end of a session: what comes in goes out at the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Caller(_End):
    """A client, who has to ask for TLS first."""

    def __init__(self, front: _Front) -> None:
        super().__init__()
        self._front = front
        self._request = b""

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            super().data_received(data)
            return
        self._request += data
        if len(self._request) >= len(_SSL_REQUEST):
            self._front.welcome(self, asked_for_tls=self._request == _SSL_REQUEST)


class _Front:
    """Where clients come, and who takes care of them."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._backend = (host, port)
        self._context = context
        self._welcomes: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Listen, say where, and serve until the input ends."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Caller(self), _HOST, 0, backlog=1024)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        # Whoever is still connected then is hung up on: the process ends.
        await loop.run_in_executor(None, sys.stdin.read)

    def welcome(self, caller: _Caller, *, asked_for_tls: bool) -> None:
        """Join `caller` and the server behind, in a task."""
        task = asyncio.create_task(self._join(caller, asked_for_tls=asked_for_tls), name="welcome a client")
        self._welcomes.add(task)
        task.add_done_callback(self._welcomes.discard)

    async def _join(self, caller: _Caller, *, asked_for_tls: bool) -> None:
        wire = caller.transport
        if wire is None:
            return
        if not asked_for_tls:
            wire.close()
            return
        loop = asyncio.get_running_loop()
        # What comes next is for the TLS layer, which starts reading again.
        wire.pause_reading()
        behind = _End()
        behind.other = caller
        await loop.create_connection(lambda: behind, *self._backend)
        caller.other = behind
        wire.write(_YES)
        try:
            caller.transport = await loop.start_tls(wire, caller, self._context, server_side=True)
        except OSError:
            # Whoever goes away during the handshake is gone.
            caller.connection_lost(None)


def _main() -> None:
    host, port, certificate = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
        runner.run(_Front(host, int(port), context).serve())


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - it does not exist for every platform
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    _main()
