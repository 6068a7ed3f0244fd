"""A source of credentials that does what a test tells it to."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast

from asyncpool_creds import Clock, Credential

if TYPE_CHECKING:
    from typing import Never

__all__ = ["Answer", "ScriptedProvider"]


class _Entry(Enum):
    HANG = "hang"


Answer: TypeAlias = (
    Credential | float | BaseException | type[BaseException] | Callable[[], object] | Literal[_Entry.HANG] | None
)


class ScriptedProvider:
    """A `CredentialProvider` that answers from a script and remembers what was asked of it.

    Each call takes the next entry of the script, and every call after the last entry
    repeats that entry. An entry is one of:

    - a number: mints ``token-1``, ``token-2`` and so on, good for so many seconds from
      the call (an empty script mints for ever, an hour each);
    - ``None``: mints a token that never expires;
    - a `Credential`: returned as it is;
    - an exception, or a class of one: raised;
    - a function without parameters, or a coroutine function: its result is returned,
      whatever it is;
    - `ScriptedProvider.HANG`: waits until `release` or its own cancellation.

    ::

        provider = ScriptedProvider(60, ProviderError("down"), 60, clock=clock)

    Args:
        script: The entries, in order.
        clock: What lifetimes are counted from; the machine's own clock if not given.
        user: The user of minted credentials.
        prefix: What minted passwords begin with.
        delay: Seconds that every answer takes, on the time of the running loop.
    """

    HANG: Final = _Entry.HANG

    def __init__(
        self,
        *script: Answer,
        clock: Clock | None = None,
        user: str | None = None,
        prefix: str = "token",
        delay: float = 0.0,
    ) -> None:
        self._script: tuple[Answer, ...] = ()
        self._next = 0
        self._clock = clock
        self._user = user
        self._prefix = prefix
        self._delay = delay
        self._minted = 0
        self._hanging: list[asyncio.Future[Answer]] = []
        self._called = asyncio.Event()

        self.called_at: list[datetime] = []
        self.credentials: list[Credential] = []
        self.in_flight: int = 0
        self.peak_in_flight: int = 0
        self.cancelled: int = 0
        self.closed: int = 0

        self.play(*script)

    @property
    def calls(self) -> int:
        """How often `fetch` was called; `called_at` has the times."""
        return len(self.called_at)

    def play(self, *script: Answer) -> None:
        """Replace the script, from the next call on."""
        self._script = script or (3600.0,)
        self._next = 0

    def mint(self, lifetime: float | None) -> Credential:
        """Return the next token, good for `lifetime` seconds from now; None: for ever."""
        self._minted += 1
        expires_at = None if lifetime is None else self._now() + timedelta(seconds=lifetime)
        return Credential(f"{self._prefix}-{self._minted}", user=self._user, expires_at=expires_at)

    async def called(self, count: int = 1) -> None:
        """Return once `fetch` has been called `count` times since the provider was made."""
        while self.calls < count:
            await self._called.wait()

    def release(self, answer: Answer = 3600.0) -> None:
        """Let the calls that hang go on with `answer`.

        Raises:
            RuntimeError: None hangs; wait for one with `called`.
        """
        hanging = [future for future in self._hanging if not future.done()]
        if not hanging:
            raise RuntimeError("release(): no call of fetch() hangs at this moment")
        for future in hanging:
            future.set_result(answer)

    async def fetch(self) -> Credential:
        """Answer with the next entry of the script.

        Raises:
            RuntimeError: The provider was closed.
        """
        if self.closed:
            raise RuntimeError("fetch() was called after aclose()")
        answer = self._script[min(self._next, len(self._script) - 1)]
        self._next += 1
        self.called_at.append(self._now())
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        # Wakes those who wait now; the next ones wait for the next call, perhaps on another loop.
        self._called.set()
        self._called = asyncio.Event()
        try:
            if self._delay:
                await asyncio.sleep(self._delay)
            credential = await self._perform(answer)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if isinstance(credential, Credential):  # pyright: ignore[reportUnnecessaryIsInstance] - a script may lie
            self.credentials.append(credential)
        return credential

    async def aclose(self) -> None:
        """Count the call in `closed`; from now on `fetch` is an error."""
        self.closed += 1

    async def _perform(self, answer: Answer) -> Credential:
        while answer is _Entry.HANG:
            answer = await self._released()
        if answer is None or isinstance(answer, (int, float)):
            return self.mint(answer)
        if isinstance(answer, Credential):
            return answer
        if isinstance(answer, BaseException) or (isinstance(answer, type) and issubclass(answer, BaseException)):
            _raise(answer)
        result = answer()
        if inspect.isawaitable(result):
            result = await result
        # Perhaps it is none: what a manager makes of that is worth a test.
        return cast("Credential", result)

    async def _released(self) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._hanging.append(future)
        try:
            return await future
        finally:
            self._hanging.remove(future)

    def _now(self) -> datetime:
        return datetime.now(UTC) if self._clock is None else datetime.fromtimestamp(self._clock.time(), UTC)


def _raise(error: BaseException | type[BaseException]) -> Never:
    # One instance may be raised many times: it must not drag along the frames of earlier ones.
    raise error.with_traceback(None) if isinstance(error, BaseException) else error
