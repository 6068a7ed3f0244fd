"""A door in front of PostgreSQL that checks tokens as a cloud database does, and fails on demand."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import socket
import ssl
import struct
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast
from urllib.parse import quote, urlencode

from asyncpool_creds.testing.postgres import PostgresServer, finish

try:
    import trustme
except ImportError as _missing:
    raise ImportError(
        "asyncpool_creds.testing.door needs trustme for its certificates: pip install 'asyncpool-creds[testing]'"
    ) from _missing

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Backend", "Stage", "TokenDoor", "Verify"]

Verify: TypeAlias = Callable[[str, str], "str | Awaitable[str | None] | None"]
Backend: TypeAlias = "PostgresServer | str | tuple[str, int]"

_HOST = "127.0.0.1"

# Codes in the place of a protocol version, and a limit (PostgreSQL: src/include/libpq/pqcomm.h).
_CANCEL_REQUEST = 80877102
_SSL_REQUEST = 80877103
_GSSENC_REQUEST = 80877104
_PROTOCOL_MAJOR = 3
_MAX_STARTUP_LENGTH = 10_000
_MAX_MESSAGE_LENGTH = 1 << 20

_HEADER = struct.Struct("!ci")
_STARTUP = struct.Struct("!ii")
_ASK_CLEARTEXT = b"R" + struct.pack("!ii", 8, 3)
_AUTHENTICATION_OK = bytes(4)
_READY_IDLE = b"Z\x00\x00\x00\x05I"
# On, zero seconds: close() drops the connection with RST instead of FIN (socket(7)).
_LINGER_RESET = struct.pack("ii", 1, 0)

_TERMINATED = ("57P01", "terminating connection due to administrator command")
_STARTING_UP = ("57P03", "the database system is starting up")
_TOO_MANY = ("53300", "sorry, too many clients already")


class Stage(enum.Enum):
    """How far a connection has come; a fault at a stage strikes before the next thing happens."""

    ACCEPT = "accept"
    """TCP stands; nothing has been read."""
    TLS_REQUEST = "tls request"
    """The client asked for TLS; it has no answer."""
    TLS_HANDSHAKE = "tls handshake"
    """The client was told to go ahead with TLS; its hello is not answered."""
    STARTUP = "startup"
    """The client said who it is; it has no answer."""
    PASSWORD_REQUEST = "password request"  # noqa: S105 - a stage
    """The client was asked for its password; the answer is not looked at."""
    VERIFY = "verify"
    """The password is here; it has not been checked."""
    BACKEND_CONNECT = "backend connect"
    """The password is good; the server behind has not been contacted."""
    AUTHENTICATED = "authenticated"
    """The client was told that it is let in (AuthenticationOk), and not yet that it may ask (ReadyForQuery)."""
    READY = "ready"
    """The client may ask; nothing it asks is passed on."""


@dataclass(slots=True)
class _Fault:
    kill: bool
    left: int | None
    over: asyncio.Event = field(default_factory=asyncio.Event)


class _RefusedError(Exception):
    """The client is to be told off."""

    def __init__(self, sqlstate: str, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message
        self.reason = message if reason is None else reason


class TokenDoor:
    """PostgreSQL as a cloud offers it: it asks for a token, checks it, and lets the client through to the server.

    The client is asked for a cleartext password (as RDS does for IAM), `verify` judges it, and the door then
    connects to `backend` as the same user, without a password, and passes bytes both ways. Requests to cancel a
    query pass too. Every query pays for the detour: keep the door out of what a benchmark measures.

    Everything without an underscore may be changed while the door is open, and holds for connections that come
    later. Lives on the event loop that entered it; leaving it drops every connection.

    Args:
        backend: A `PostgresServer`, the path of a Unix socket, or host and port; it must trust the door.
        verify: Called with user and password; returns (or, if a coroutine function, gives) None to let the client
            in, else the reason why not, for `refusals`. The client is not told it.
        tls: Offer TLS, with a certificate for localhost and 127.0.0.1 from an authority of the door's own.
        require_tls: Refuse who comes without TLS, in the words of a server with hostssl lines only. Implies `tls`.
        refusal_sqlstate: What a refused client is told. The default is what PAM says, and so RDS; SCRAM says
            28P01, pgbouncer 08P01.
        refusal_message: The message that goes with it; ``{user}`` is replaced.

    Attributes:
        delay: Seconds to wait before each verification.
        down: Reset new TCP connections as soon as they stand.
        starting_up: Refuse logins with 57P03, as a server does that has just been started.
        too_many_connections: Refuse logins with 53300.
        max_connections: Refuse logins with 53300 while `live` is this high; None: no limit.
        refusals: Why each login was refused, in order.
        attempts: TCP connections that came, those that carried only a cancel request included.
        accepted: Logins that `verify` let in.
        refused: Logins refused, for whatever reason.
        cancel_requests: Cancel requests passed on.
        live: Connections let in and not ended.
        peak_live: The highest `live` ever was; may be set back.
        startup: What the client that came last said of itself: ``user``, ``database``, ``options`` and others.
    """

    def __init__(
        self,
        backend: Backend,
        verify: Verify,
        *,
        tls: bool = False,
        require_tls: bool = False,
        refusal_sqlstate: str = "28000",
        refusal_message: str = 'PAM authentication failed for user "{user}"',
    ) -> None:
        self.verify: Verify = verify
        self.require_tls: bool = require_tls
        self.refusal_sqlstate: str = refusal_sqlstate
        self.refusal_message: str = refusal_message
        self.delay: float = 0.0
        self.down: bool = False
        self.starting_up: bool = False
        self.too_many_connections: bool = False
        self.max_connections: int | None = None
        self.refusals: list[str] = []
        self.attempts: int = 0
        self.accepted: int = 0
        self.refused: int = 0
        self.cancel_requests: int = 0
        self.live: int = 0
        self.peak_live: int = 0
        self.startup: Mapping[str, str] = {}
        self._board = _Board(backend)
        self._tls = tls or require_tls
        self._server: asyncio.Server | None = None
        self._port = 0

    # Life.

    async def __aenter__(self) -> Self:
        board = self._board
        if board.is_open:
            raise RuntimeError("the door is open already")
        board.material = _Material() if self._tls else None
        try:
            await self._listen()
        except BaseException:
            board.remove_material()
            raise
        board.is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        board = self._board
        if not board.is_open:
            return
        board.is_open = False
        self._stop_listening()
        self._port = 0
        sessions = list(board.sessions)
        for session in sessions:
            session.kill()
        for _, waiter in board.waiters:
            if not waiter.done():
                waiter.set_exception(RuntimeError("the door was closed while somebody waited for it"))
        try:
            await finish(future for session in sessions for future in session.endings())
        finally:
            board.remove_material()

    # Where it is.

    @property
    def host(self) -> str:
        """The loopback address it listens on."""
        return _HOST

    @property
    def port(self) -> int:
        """The TCP port."""
        self._check_open()
        return self._port

    @property
    def ca_pem_path(self) -> str:
        """The file with the certificate of the door's authority, for ``sslrootcert``."""
        return str(self._material().authority_file)

    def client_context(self) -> ssl.SSLContext:
        """Return a context that trusts the door and nobody else, for ``ssl=``."""
        return ssl.create_default_context(cafile=self.ca_pem_path)

    def dsn(self, *, user: str = "app", database: str = "postgres", sslmode: str | None = None) -> str:
        """Return a connection string without a password; one that verifies the server names the authority too."""
        dsn = f"postgresql://{quote(user, safe='')}@{self.host}:{self.port}/{quote(database, safe='')}"
        if sslmode is None:
            return dsn
        query = {"sslmode": sslmode}
        if sslmode.startswith("verify-"):
            query["sslrootcert"] = self.ca_pem_path
        return f"{dsn}?{urlencode(query)}"

    # Faults.

    def hang_at(self, stage: Stage, *, times: int | None = None) -> None:
        """Keep connections waiting at `stage` until `clear_faults` or the end of the door.

        Replaces a fault at the same stage, and lets those go on who were kept by it. What `reached` counts at
        this stage starts anew.

        Args:
            stage: Where.
            times: How many connections to keep; None: all.
        """
        self._board.set_fault(stage, _Fault(kill=False, left=times))

    def kill_at(self, stage: Stage, *, times: int | None = None) -> None:
        """Reset connections (TCP RST) that reach `stage`; otherwise as `hang_at`."""
        self._board.set_fault(stage, _Fault(kill=True, left=times))

    def refuse_with(self, sqlstate: str, message: str) -> None:
        """Refuse every login, before asking for a password, with an error of your choice."""
        self._board.refusal = (sqlstate, message)

    def clear_faults(self) -> None:
        """Behave again: end `hang_at`, `kill_at` and `refuse_with`, and switch off the three flags.

        Connections that were kept waiting go on where they were. `delay` and `max_connections` stay.
        """
        self.down = self.starting_up = self.too_many_connections = False
        self._board.refusal = None
        for fault in self._board.faults.values():
            fault.over.set()
        self._board.faults.clear()

    async def go_down(self) -> None:
        """Refuse new TCP connections, as a host does on which no server listens, until `come_up`.

        Those that stand are left alone: `kill_connections` ends them.
        """
        self._check_open()
        self._stop_listening()

    async def come_up(self) -> None:
        """Listen again, on the same port."""
        self._check_open()
        if self._server is None:
            await self._listen()

    def kill_connections(self) -> int:
        """Reset every connection (TCP RST), logging in or let in, as a fail-over does; return how many."""
        sessions = list(self._board.sessions)
        for session in sessions:
            session.kill()
        return len(sessions)

    def close_connections(self) -> int:
        """Say good-bye (57P01, then FIN) to every connection, as a proxy does that recycles its connections.

        Idle ones go now, and are counted; those with a query or a transaction go as soon as it ends.
        """
        return sum(session.recycle() for session in list(self._board.sessions))

    def close_idlest(self) -> bool:
        """Say good-bye in the same way to the connection that has been idle for longest; return whether one was idle.

        As a load balancer does that cuts connections on which nothing has come for a while.
        """
        idle = [session for session in self._board.sessions if session.is_idle]
        return bool(idle) and min(idle, key=lambda session: session.last_used).recycle()

    async def reached(self, stage: Stage, count: int = 1) -> None:
        """Wait until `count` connections have come as far as `stage`.

        Counted from the last `hang_at` or `kill_at` for this stage, else from the beginning: those that came
        before the call count, so there is nothing to miss.
        """
        await self.until(lambda: self._board.reached[stage] >= count)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, looked at whenever one of the door's counters changes.

        ``await door.until(lambda: door.live == 0)``
        """
        if condition():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (condition, waiter)
        self._board.waiters.append(entry)
        try:
            await waiter
        finally:
            self._board.waiters.remove(entry)

    async def _listen(self) -> None:
        loop, board = asyncio.get_running_loop(), self._board
        server = await loop.create_server(
            lambda: _Session(self, board, loop).client, _HOST, self._port, backlog=1024, reuse_address=True
        )
        self._port = server.sockets[0].getsockname()[1]
        self._server = server

    def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def _check_open(self) -> None:
        if not self._board.is_open:
            raise RuntimeError("the door is not open; use it inside 'async with TokenDoor(...) as door:'")

    def _material(self) -> _Material:
        material = self._board.material
        if material is None:
            raise RuntimeError("the door is not open, or has no TLS; make it with tls=True")
        return material


class _Material:
    """A certificate authority, a certificate of it for us, and the authority's certificate in a file."""

    def __init__(self) -> None:
        authority = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with authority.issue_cert("localhost", _HOST).private_key_and_cert_chain_pem.tempfile() as file:
            self.context.load_cert_chain(file)
        self.directory = tempfile.TemporaryDirectory(prefix="asyncpool-door-")
        self.authority_file = Path(self.directory.name, "ca.pem")
        authority.cert_pem.write_to_path(str(self.authority_file))


class _Board:
    """What a door and its sessions share."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.is_open = False
        self.material: _Material | None = None
        self.refusal: tuple[str, str] | None = None
        self.faults: dict[Stage, _Fault] = {}
        self.reached: Counter[Stage] = Counter()
        self.waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.sessions: set[_Session] = set()

    def set_fault(self, stage: Stage, fault: _Fault) -> None:
        replaced = self.faults.get(stage)
        if replaced is not None:
            replaced.over.set()
        self.faults[stage] = fault
        self.reached[stage] = 0

    def changed(self) -> None:
        """Wake those for whom the world is as they wished."""
        for condition, waiter in self.waiters:
            if not waiter.done() and condition():
                waiter.set_result(None)

    def remove_material(self) -> None:
        if self.material is not None:
            self.material.directory.cleanup()
            self.material = None


class _End(asyncio.Protocol):
    """One end of a session: a buffer during the login, then a pipe into the other end."""

    transport: asyncio.Transport
    wire: asyncio.Transport

    def __init__(self, session: _Session, loop: asyncio.AbstractEventLoop) -> None:
        self.buffer = bytearray()
        self.lost: asyncio.Future[None] = loop.create_future()
        # The last bytes that came since the other end last spoke.
        self.last = b""
        self.other: _End | None = None
        self._session = session
        self._loop = loop
        self._more: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self.wire = cast("asyncio.Transport", transport)
        self._session.made(self)

    def data_received(self, data: bytes) -> None:
        other = self.other
        if other is None:
            self.buffer += data
            if self._more is not None and not self._more.done():
                self._more.set_result(None)
            return
        other.transport.write(data)
        self._session.last_used = self._loop.time()
        self.last = data if len(data) >= len(_READY_IDLE) else self.last[1 - len(_READY_IDLE) :] + data
        other.last = b""
        if self._session.leaving:
            self._session.recycle()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.lost.done():
            self.lost.set_result(None)
        self._session.end()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.transport.resume_reading()

    async def read(self, count: int) -> bytes:
        """Return the next `count` bytes; the session's task is cancelled if they cannot come any more."""
        while len(self.buffer) < count:
            self._more = self._loop.create_future()
            await self._more
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    async def message(self) -> tuple[bytes, bytes]:
        """Return the type and the body of the next message."""
        kind, length = _HEADER.unpack(await self.read(_HEADER.size))
        if not 4 <= length <= _MAX_MESSAGE_LENGTH:
            raise _RefusedError("08P01", f"invalid length of a message of type {kind!r}: {length}")
        return kind, await self.read(length - 4)

    def reset(self) -> None:
        """Drop the connection with RST."""
        if not self.lost.done():
            wire_socket = self.wire.get_extra_info("socket")
            # For a connection that is being closed uvloop gives no socket, or one without a descriptor (ValueError);
            # a Unix socket knows no RST.
            if wire_socket is not None and wire_socket.family != socket.AF_UNIX:
                with contextlib.suppress(OSError, ValueError):
                    wire_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            self.wire.abort()


class _Session:
    """One client, from its TCP connection to the end of both connections."""

    def __init__(self, door: TokenDoor, board: _Board, loop: asyncio.AbstractEventLoop) -> None:
        self.client = _End(self, loop)
        self.backend: _End | None = None
        self.leaving = False
        self.last_used = loop.time()
        self._door = door
        self._board = board
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._is_let_in = False
        self._is_over = False

    def made(self, end: _End) -> None:
        """Take note of a connection that stands."""
        if end is not self.client:
            self.backend = end
            if self._is_over:
                end.reset()
            return
        self._board.sessions.add(self)
        self._door.attempts += 1
        if self._door.down or not self._board.is_open:
            self.kill()
        else:
            self._task = self._loop.create_task(self._serve(), name="asyncpool_creds.testing: login at the door")
        self._board.changed()

    def end(self) -> None:
        """Close what is open, after what has been written to it; harmless if done already."""
        if not self._is_over:
            self._is_over = True
            if self._is_let_in:
                self._door.live -= 1
            for end in self._ends():
                end.transport.close()
            if self._task is not None and self._task is not asyncio.current_task(self._loop):
                self._task.cancel()
            self._board.changed()
        if all(end.lost.done() for end in self._ends()):
            self._board.sessions.discard(self)

    def kill(self) -> None:
        """Drop both connections, and what has been written to them."""
        for end in self._ends():
            end.reset()
        self.end()

    @property
    def is_idle(self) -> bool:
        """Whether it is let in and has neither a query nor a transaction."""
        return not self._is_over and self.backend is not None and self.backend.last.endswith(_READY_IDLE)

    def recycle(self) -> bool:
        """Say good-bye to the client if it is idle, else as soon as it is; return whether it was."""
        self.leaving = True
        if not self.is_idle:
            return False
        self.client.transport.write(_error(*_TERMINATED))
        self.end()
        return True

    def endings(self) -> list[asyncio.Future[None]]:
        """Return what is done when nothing is left of the session."""
        endings = [end.lost for end in self._ends()]
        return endings if self._task is None else [*endings, self._task]

    def _ends(self) -> list[_End]:
        return [self.client] if self.backend is None else [self.client, self.backend]

    async def _serve(self) -> None:
        try:
            await self._login()
        except _RefusedError as refusal:
            self._door.refused += 1
            self._door.refusals.append(refusal.reason)
            self.client.transport.write(_error(refusal.sqlstate, refusal.message))
            self.end()
        except OSError:
            # The client went away, or does not like our certificate.
            self.end()
        except BaseException:
            self.kill()
            raise

    async def _login(self) -> None:
        door = self._door
        await self._reach(Stage.ACCEPT)
        code, packet, encrypted = await self._read_startup()
        if code == _CANCEL_REQUEST:
            await self._pass_cancel_request(packet)
            return
        if code >> 16 != _PROTOCOL_MAJOR:
            raise _RefusedError("0A000", f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}")
        parameters = _parameters(packet)
        user = parameters.get("user", "")
        door.startup = parameters
        await self._reach(Stage.STARTUP)
        self._look_over(user, parameters.get("database", user), encrypted=encrypted)
        self.client.transport.write(_ASK_CLEARTEXT)
        await self._reach(Stage.PASSWORD_REQUEST)
        kind, body = await self.client.message()
        if kind != b"p":
            raise _RefusedError("08P01", f"expected password response, got message type {kind!r}")
        password = body.removesuffix(b"\0").decode()
        await self._reach(Stage.VERIFY)
        await self._verify(user, password)
        door.accepted += 1
        door.live += 1
        door.peak_live = max(door.peak_live, door.live)
        self._is_let_in = True
        await self._reach(Stage.BACKEND_CONNECT)
        await self._log_in_behind(_startup_packet(code, parameters))

    async def _read_startup(self) -> tuple[int, bytes, bool]:
        """Return the first packet that is more than a wish for encryption, and whether it came encrypted."""
        client = self.client
        material = self._board.material
        encrypted = False
        while True:
            length, code = _STARTUP.unpack(await client.read(_STARTUP.size))
            if not _STARTUP.size <= length <= _MAX_STARTUP_LENGTH:
                raise _RefusedError("08P01", "invalid length of startup packet")
            if code == _SSL_REQUEST and not encrypted:
                await self._reach(Stage.TLS_REQUEST)
                if material is None:
                    client.transport.write(b"N")
                    continue
                if client.buffer:
                    # What came in the clear must not be taken for what came encrypted (CVE-2021-23214).
                    raise _RefusedError("08P01", "received unencrypted data after SSL request")
                # The client's hello is for the TLS layer, which starts reading again.
                client.transport.pause_reading()
                client.transport.write(b"S")
                await self._reach(Stage.TLS_HANDSHAKE)
                client.transport = await self._secure(material.context)
                encrypted = True
            elif code in {_SSL_REQUEST, _GSSENC_REQUEST}:
                client.transport.write(b"N")
            else:
                return code, await client.read(length - _STARTUP.size), encrypted

    async def _secure(self, context: ssl.SSLContext) -> asyncio.Transport:
        client = self.client
        try:
            secured = await self._loop.start_tls(client.wire, client, context, server_side=True)
        except BaseException:
            # A connection that is lost before TLS stands is not reported to the protocol above it.
            client.connection_lost(None)
            raise
        if secured is None:
            # So says asyncio of a connection that was closed in the meantime.
            client.connection_lost(None)
            raise ConnectionAbortedError
        return secured

    def _look_over(self, user: str, database: str, *, encrypted: bool) -> None:
        """Refuse whoever has no chance whatever the password."""
        door = self._door
        if not user:
            raise _RefusedError("28000", "no PostgreSQL user name specified in startup packet")
        if door.starting_up:
            raise _RefusedError(*_STARTING_UP)
        if door.too_many_connections or self._is_full():
            raise _RefusedError(*_TOO_MANY)
        if self._board.refusal is not None:
            raise _RefusedError(*self._board.refusal)
        if door.require_tls and not encrypted:
            raise _RefusedError(
                "28000",
                f'no pg_hba.conf entry for host "{_HOST}", user "{user}", database "{database}", no encryption',
            )

    async def _verify(self, user: str, password: str) -> None:
        door = self._door
        if door.delay:
            await asyncio.sleep(door.delay)
        try:
            verdict = door.verify(user, password)
            if inspect.isawaitable(verdict):
                verdict = await verdict
        except Exception as error:
            self._loop.call_exception_handler({"message": "verify() of a TokenDoor failed", "exception": error})
            # The text of the error may quote the token.
            raise _RefusedError("XX000", f"verify() of the TokenDoor raised {type(error).__name__}") from error
        if verdict is not None:
            message = door.refusal_message.replace("{user}", user)
            raise _RefusedError(door.refusal_sqlstate, message, verdict)
        # Others may have been let in since it was looked at.
        if self._is_full():
            raise _RefusedError(*_TOO_MANY)

    def _is_full(self) -> bool:
        return self._door.max_connections is not None and self._door.live >= self._door.max_connections

    async def _log_in_behind(self, packet: bytes) -> None:
        """Log in at the server behind, pass its answer on, and join both ends."""
        client = self.client
        try:
            backend = await self._connect()
        except OSError as error:
            raise _RefusedError("08006", f"the door cannot reach the server behind: {error.strerror}") from error
        backend.transport.write(packet)
        kind = b""
        while kind != b"Z":
            kind, body = await backend.message()
            if kind == b"R" and body != _AUTHENTICATION_OK:
                raise _RefusedError("XX000", "the server behind the door asks for a password; it must trust the door")
            client.transport.write(_HEADER.pack(kind, len(body) + 4) + body)
            if kind == b"R":
                await self._reach(Stage.AUTHENTICATED)
            elif kind == b"E":
                self._door.refused += 1
                self._door.refusals.append("the server behind refused the login")
                self.end()
                return
        await self._reach(Stage.READY)
        self._join(backend)

    def _join(self, backend: _End) -> None:
        client = self.client
        client.other, backend.other = backend, client
        if client.buffer:
            backend.transport.write(bytes(client.buffer))
        else:
            backend.last = _READY_IDLE
        if backend.buffer:
            client.transport.write(bytes(backend.buffer))
        if self.leaving:
            self.recycle()

    async def _pass_cancel_request(self, packet: bytes) -> None:
        self._door.cancel_requests += 1
        self._board.changed()
        backend = await self._connect()
        backend.transport.write(_STARTUP.pack(_STARTUP.size + len(packet), _CANCEL_REQUEST) + packet)
        # The server hangs up when it has passed the signal on; end() then lets the client know.
        await backend.lost

    async def _connect(self) -> _End:
        backend = self._board.backend
        end = _End(self, self._loop)
        try:
            if isinstance(backend, tuple):
                await self._loop.create_connection(lambda: end, *backend)
            else:
                path = backend.socket_path if isinstance(backend, PostgresServer) else backend
                await self._loop.create_unix_connection(lambda: end, path)
        except asyncio.CancelledError:
            # uvloop drops a connection whose making is cancelled, and tells its protocol nothing.
            end.connection_lost(None)
            raise
        return end

    async def _reach(self, stage: Stage) -> None:
        """Let happen what was ordered for this stage."""
        board = self._board
        board.reached[stage] += 1
        board.changed()
        fault = board.faults.get(stage)
        if fault is None or fault.left == 0:
            return
        if fault.left is not None:
            fault.left -= 1
        if fault.kill:
            self.kill()
            raise ConnectionAbortedError
        await fault.over.wait()


def _error(sqlstate: str, message: str) -> bytes:
    """Return an ErrorResponse (protocol-error-fields)."""
    fields = (("S", "FATAL"), ("V", "FATAL"), ("C", sqlstate), ("M", message))
    body = b"".join(f"{name}{value}\0".encode() for name, value in fields) + b"\0"
    return _HEADER.pack(b"E", len(body) + 4) + body


def _parameters(packet: bytes) -> dict[str, str]:
    words = [word.decode(errors="replace") for word in packet.split(b"\0")]
    return {name: value for name, value in zip(words[::2], words[1::2], strict=False) if name}


def _startup_packet(version: int, parameters: Mapping[str, str]) -> bytes:
    """Return the packet for the server behind, without what only CockroachDB understands (``--crdb:...``)."""
    words: list[str] = []
    for name, value in parameters.items():
        kept = value
        if name == "options":
            kept = " ".join(word for word in value.split(" ") if not word.startswith("--crdb:"))
        words += [name, kept]
    body = b"".join(word.encode() + b"\0" for word in words) + b"\0"
    return _STARTUP.pack(_STARTUP.size + len(body), version) + body
