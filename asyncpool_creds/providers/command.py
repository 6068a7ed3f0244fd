"""Credentials that an external command prints: a token, JSON, or a Kubernetes ExecCredential."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, NoReturn, cast

import anyio
import anyio.to_thread

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential, password_flaw
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._document import MAX_BYTES, earliest_end, parse_moment, parse_object
from asyncpool_creds.providers._redaction import redact

__all__ = ["Command"]

# Says to a plugin of kubectl, kubelogin for one, that nobody is there to log in with a browser
# (https://kubernetes.io/docs/reference/access-authn-authz/authentication/#input-and-output-formats).
_EXEC_INFO: Final = "KUBERNETES_EXEC_INFO"
_NOT_INTERACTIVE: Final = json.dumps(
    {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "spec": {"interactive": False}}
)
_KILL: Final = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL
# Between SIGTERM and SIGKILL, and again until a killed process must be gone.
_GRACE: Final = 1.0
# For the rest of the output once the command has ended: something it left behind may hold the pipes open for ever.
_LINGER: Final = 0.5
_MAX_STDERR: Final = 4096
_LONGEST_QUOTE: Final = 400
_QUOTED_LINES: Final = 3
# Two strings this long are not the same by accident; fewer than so many can be looked for in no time.
_SHORTEST_SECRET: Final = 6
_MOST_PIECES: Final = 200
_BETWEEN_PIECES: Final = re.compile(r"[\s\"'=:,;{}\[\]()<>]+")
_UNPRINTABLE: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\S\n]+|[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Command:
    """A provider of the token or password that a command prints on its standard output.

    It prints one line of text; or a JSON object with ``password`` or ``token`` and, if they are known, ``user``,
    ``expires_at`` (seconds since 1970, or ISO 8601 with its time zone) and ``expires_in`` (seconds); or an
    ``ExecCredential`` as plugins of kubectl do, whose ``status.token`` and ``status.expirationTimestamp`` are used
    (Kubernetes client authentication v1). A JSON Web Token says when it ends itself; the earliest counts.

    The command gets the environment of this process, a standard input that is at its end, and a session and process
    group of its own. When it takes too long, or the fetch is cancelled, the whole group gets SIGTERM, a second
    later SIGKILL, and `fetch` returns once the command has ended.

    Arguments are visible to every user of the machine (ps(1)): secrets belong into `env`. Errors quote the last lines
    of the standard error, but for what was also printed on the standard output, or came with `env`.

    Args:
        arguments: The program and its arguments. No shell is involved; where one is wanted: ``["sh", "-c", "..."]``.
        user: The database user to log in as; None: as the command says, or the connection's own.
        env: Variables to add to the environment.
        timeout: Seconds, or a timedelta, that it may take. Cloud command lines take several on a cold start.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type; `arguments` is a str.
        ValueError: An argument is empty or out of range.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | timedelta = 20.0,
        clock: Clock | None = None,
    ) -> None:
        check_text("Command", "user", user)
        self._arguments: Final = _check_arguments(arguments)
        self._user: Final = user
        self._env: Final = _check_env(env)
        self._timeout: Final = parse_seconds("Command", "timeout", timeout)
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock

    @property
    def _program(self) -> str:
        return self._arguments[0]

    def __repr__(self) -> str:
        return f"<Command {self._program} timeout={self._timeout:g}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Command provider may hold secrets and cannot be pickled; make one where it is needed")

    @clears_frames
    async def fetch(self) -> Credential:
        """Run the command and return what it printed.

        Raises:
            ProviderError: It printed nothing usable. ``retryable`` is True if another run may go better: it failed,
                printed nothing, or was cut short; False if it cannot be run, or prints something else.
            ProviderTimeout: It took longer than `timeout`.
        """
        requested_at = utc_now(self._clock)
        run = _Run(self._arguments, {_EXEC_INFO: _NOT_INTERACTIVE, **os.environ, **self._env}, self._timeout)
        # A task that nobody else can cancel: however often the caller is, the processes are ended.
        running = asyncio.create_task(run.off_the_loop(), name=f"asyncpool_creds: run {self._program}")
        try:
            await asyncio.wait((running,))
        except asyncio.CancelledError:
            run.give_up()
            await _outlast(running)
            raise
        try:
            printed = running.result()
        except OSError as error:
            raise self._explain(error) from error
        return self._read(printed, requested_at)

    def _explain(self, error: OSError) -> ProviderError:
        """Return why the command could not be started, and who has to do what."""
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return ProviderError(
                f"command: {self._program!r} was not found, or the interpreter that its first line names; "
                "install it, or give its full path",
                retryable=False,
            )
        if isinstance(error, PermissionError) or error.errno == errno.ENOEXEC:
            return ProviderError(
                f"command: {self._program!r} cannot be executed by this process; check what it is, and its mode",
                retryable=False,
            )
        # Out of processes, memory or file descriptors.
        return ProviderError(f"command: {self._program!r} could not be started ({error.strerror})")

    # What it printed

    def _read(self, printed: _Printed, requested_at: datetime) -> Credential:
        if printed.is_too_much:
            raise self._complaint(f"printed more than {MAX_BYTES} bytes; it must print the token and no more")
        if printed.was_stopped:
            ending = "was stopped" if printed.status is not None else "cannot be killed; does it run as another user?"
            raise ProviderTimeout(
                f"command: {self._program!r} did not end within {self._timeout:g} s and {ending}{self._quote(printed)}"
            )
        if printed.status != 0:
            status = printed.status or 0
            how = f"exited with status {status}" if status > 0 else f"was ended by {_signal_name(-status)}"
            raise ProviderError(
                f"command: {self._program!r} {how}{self._quote(printed)}"
            ) from subprocess.CalledProcessError(status, self._program)
        text = _decode(printed.stdout)
        if text is None:
            raise self._complaint("printed something that is not UTF-8 text")
        text = text.strip()
        if not text:
            raise ProviderError(
                f"command: {self._program!r} succeeded, but its standard output is empty{self._quote(printed)}"
            )
        if text.startswith("{"):
            return self._from_json(text, requested_at)
        if len(text.splitlines()) > 1:
            raise self._complaint("printed several lines; a token is one, and messages belong to standard error")
        return self._credential(text, self._user, requested_at)

    def _from_json(self, text: str, requested_at: datetime) -> Credential:
        document = parse_object(text)
        if document is None:
            raise ProviderError(f"command: {self._program!r} printed JSON that is broken or cut short")
        if document.get("kind") == "ExecCredential":
            status = document.get("status")
            members = cast("dict[str, object]", status) if isinstance(status, dict) else {}
            token, where = members.get("token"), "'status.token'"
            ends = [self._moment("status.expirationTimestamp", members.get("expirationTimestamp"))]
            user = self._user
        else:
            token, where = document.get("password") or document.get("token"), "'password' or 'token'"
            ends = [
                self._moment("expires_at", document.get("expires_at")),
                self._life(requested_at, document.get("expires_in")),
            ]
            named = document.get("user")
            if named is not None and (not isinstance(named, str) or not named):
                raise self._complaint("printed a 'user' that is no text")
            user = self._user or named
        if not isinstance(token, str) or not token:
            raise self._complaint(f"printed JSON without {where}, as text")
        return self._credential(token, user, requested_at, *ends)

    def _moment(self, name: str, value: object) -> datetime | None:
        if value is None:
            return None
        moment = parse_moment(value)
        if moment is None:
            raise self._complaint(f"printed an {name!r} that is neither seconds since 1970 nor ISO 8601 with time zone")
        return moment

    def _life(self, requested_at: datetime, value: object) -> datetime | None:
        if value is None:
            return None
        try:
            seconds = float(value) if isinstance(value, (int, float, str)) and value is not True else math.nan
            return requested_at + timedelta(seconds=seconds)
        except (ValueError, OverflowError):
            pass
        raise self._complaint("printed an 'expires_in' that is no number of seconds")

    def _credential(self, token: str, user: str | None, requested_at: datetime, *ends: datetime | None) -> Credential:
        if flaw := password_flaw(token):
            raise self._complaint(f"printed a token that {flaw}")
        return Credential(token, user=user, expires_at=earliest_end(token, requested_at, *ends))

    def _complaint(self, what: str) -> ProviderError:
        return ProviderError(f"command: {self._program!r} {what}", retryable=False)

    def _quote(self, printed: _Printed) -> str:
        """Return what the command said on its standard error, for a message."""
        said = _last_words(bytes(printed.stderr), is_cut=printed.stderr_is_cut)
        if not said:
            return ""
        printed_words = set(_BETWEEN_PIECES.split(printed.stdout.decode(errors="replace")))
        words = {word for word in printed_words if len(word) >= _SHORTEST_SECRET}
        secrets = [value for value in self._env.values() if len(value) >= _SHORTEST_SECRET]
        if len(words) + len(secrets) > _MOST_PIECES:
            return ""
        return f"; it said: {redact(said, secrets, longest=_LONGEST_QUOTE, words=words, is_end_shown=True)}"


@dataclass(slots=True)
class _Printed:
    """What came of a run.

    Args:
        stdout: No more than is allowed, and one byte.
        stderr: The end of it.
        stderr_is_cut: There was more before.
        status: As `subprocess` has it, negative for a signal; None if the process could not be killed.
        was_stopped: It was told to end, because it took too long or printed too much.
    """

    stdout: bytearray = field(default_factory=bytearray, repr=False)
    stderr: bytearray = field(default_factory=bytearray, repr=False)
    stderr_is_cut: bool = False
    status: int | None = None
    was_stopped: bool = False

    @property
    def is_too_much(self) -> bool:
        return len(self.stdout) > MAX_BYTES


class _Run:
    """One run of a command, on an event loop in a thread of its own.

    A loop stands still until a program that it starts has been loaded (vfork(2)), and how it learns of the program's
    end differs from loop to loop and from one Python to the next. None of that is to concern the caller's.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], timeout: float) -> None:
        self._arguments = arguments
        self._env = env
        self._timeout = timeout
        self._scope = anyio.CancelScope()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_given_up = False

    async def off_the_loop(self) -> _Printed:
        # Not one of the threads that everybody shares: a login does not wait for them.
        try:
            return await anyio.to_thread.run_sync(self._run, limiter=anyio.CapacityLimiter(1))
        finally:
            self.give_up()

    def give_up(self) -> None:
        """End the command, if it is running; from any thread."""
        self._is_given_up = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself, and its loop is closed
                self._loop.call_soon_threadsafe(self._scope.cancel)

    # In the thread

    def _run(self) -> _Printed:
        return asyncio.run(self._main())

    async def _main(self) -> _Printed:
        # In this order, which is the reverse of that above: one of the two sees what the other did.
        self._loop = asyncio.get_running_loop()
        if self._is_given_up:
            return _Printed()
        transport, watch = await self._loop.subprocess_exec(
            lambda: _Watch(self._scope),
            *self._arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._env,
            start_new_session=sys.platform != "win32",
        )
        try:
            self._scope.deadline = anyio.current_time() + self._timeout
            with self._scope:
                await watch.has_ended.wait()
            if transport.get_returncode() is None:
                watch.printed.was_stopped = True
                await _end(transport, watch)
            with anyio.move_on_after(_LINGER):
                await watch.is_silent.wait()
            watch.printed.status = transport.get_returncode()
        finally:
            # Some versions of CPython let the error of their own attempt to kill it through (before 3.13).
            with contextlib.suppress(PermissionError):
                transport.close()
        return watch.printed


class _Watch(asyncio.SubprocessProtocol):
    """Keeps what a process prints, within bounds.

    Not anyio's process, which in some versions takes it for running while something in its background holds a pipe.

    Args:
        scope: Of the wait for its end; cancelled if it prints too much.
    """

    def __init__(self, scope: anyio.CancelScope) -> None:
        self.printed = _Printed()
        self.has_ended = asyncio.Event()
        self.is_silent = asyncio.Event()
        self._scope = scope
        self._pipes = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        printed = self.printed
        if fd == 1:
            printed.stdout += data[: MAX_BYTES + 1 - len(printed.stdout)]
            if printed.is_too_much:
                self._scope.cancel()
        else:
            printed.stderr += data
            printed.stderr_is_cut |= len(printed.stderr) > _MAX_STDERR
            del printed.stderr[:-_MAX_STDERR]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - as it is called
        self._pipes.discard(fd)
        if not self._pipes:
            self.is_silent.set()

    def process_exited(self) -> None:
        self.has_ended.set()


async def _outlast(task: asyncio.Task[_Printed]) -> None:
    """Wait for the end of `task`, even if the one who waits is cancelled again."""
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                continue  # the first one is passed on as soon as the task has ended
    if not task.cancelled():
        task.exception()  # nobody is left to hear of it


async def _end(process: asyncio.SubprocessTransport, watch: _Watch) -> None:
    """End a process and those it started, as far as they are in its group."""
    _signal(process, signal.SIGTERM)
    with anyio.move_on_after(_GRACE):
        await watch.has_ended.wait()
        # Whoever still holds its pipes has not ended.
        await watch.is_silent.wait()
    _signal(process, _KILL)
    with anyio.move_on_after(_GRACE):
        await watch.has_ended.wait()


def _signal(process: asyncio.SubprocessTransport, number: signal.Signals) -> None:
    if sys.platform == "win32":  # pragma: no cover
        process.kill()
    else:
        # The group keeps its number while there is a process in it, even if the one it is named after has ended.
        try:
            os.killpg(process.get_pid(), number)
        except (ProcessLookupError, PermissionError):
            # All have ended; or they are somebody else's (sudo), and what becomes of them shows in the waiting.
            return


def _decode(data: bytearray) -> str | None:
    # The exception of a decoder carries the bytes, so it must not become part of another.
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None


def _last_words(stderr: bytes, *, is_cut: bool) -> str:
    """Return the last lines as one; without a beginning that was cut in two, which may be half a secret."""
    if is_cut:
        stderr = stderr.partition(b"\n")[2]
    text = _UNPRINTABLE.sub(" ", stderr.decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines()]
    return " | ".join([line for line in lines if line][-_QUOTED_LINES:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _check_arguments(arguments: object) -> tuple[str, ...]:
    if isinstance(arguments, (str, bytes)):
        raise TypeError(
            "Command: arguments must be a list, such as ['vault', 'read', '-field=password', 'database/creds/app'], "
            f"not {type(arguments).__name__}; no shell takes it apart"
        )
    if not isinstance(arguments, Sequence):
        raise TypeError(f"Command: arguments must be a list of str, not {type(arguments).__name__}")
    checked: list[str] = []
    for argument in cast("Sequence[object]", arguments):
        text = os.fspath(cast("os.PathLike[str]", argument)) if isinstance(argument, os.PathLike) else argument
        if not isinstance(text, str):
            raise TypeError(f"Command: arguments must be str or paths, not {type(text).__name__}")
        if "\0" in text:
            raise ValueError("Command: an argument contains a NUL")
        checked.append(text)
    if not checked or not checked[0]:
        raise ValueError("Command: arguments is empty; its first item is the program")
    return tuple(checked)


def _check_env(env: object) -> dict[str, str]:
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise TypeError(f"Command: env must map str to str, not {type(env).__name__}")
    checked: dict[str, str] = {}
    for name, value in cast("Mapping[object, object]", env).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("Command: env must map str to str")
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise ValueError("Command: a name in env is empty or contains '=', or something in it a NUL")
        checked[name] = value
    return checked
