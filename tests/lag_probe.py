"""What holds the event loop up: every step of a refresh is timed, and of every task that a refresh starts."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread

# What a step may take before other tasks feel it, in seconds on a machine that is no slower than the yardstick.
LIMIT = 0.010
if "COVERAGE_PROCESS_CONFIG" in os.environ:
    LIMIT *= 2  # every line costs twice as much where it is counted
_YARDSTICK = 0.001
_REFRESH = "TokenManager._fly"  # a factory is not told the name of the task before CPython 3.13
# A refresh sets it off, and what it connects to is no matter of the source.
_ROTATION = "Rotation._run"
_is_watched: contextvars.ContextVar[bool] = contextvars.ContextVar("is_watched", default=False)


@dataclass
class LagProbe:
    """The steps that were measured.

    A step counts as blocking if it computes for longer than the limit, or if it takes longer than the limit and the
    thread went to sleep in it. Being put aside by the machine for the sake of other processes is neither; waiting for
    another thread of this one that was put aside looks like the latter, so what blocks only now and then is no proof.

    Attributes:
        steps: How many were measured.
        blocking: The coroutine, the seconds of processor time and the seconds in all, of each that blocked.
    """

    steps: int = 0
    blocking: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the refreshes of every token manager in the running loop."""
        # What other tests have left, the collector would go through for a tenth of a second.
        gc.disable()
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **keywords: Any) -> asyncio.Future[Any]:
            name = str(getattr(coroutine, "__qualname__", type(coroutine).__qualname__))
            context = keywords.get("context")
            if name == _REFRESH and context is not None:
                context.run(_is_watched.set, True)
            elif name == _ROTATION:
                context = contextvars.copy_context() if context is None else context
                context.run(_is_watched.set, False)
                return asyncio.Task(coroutine, loop=loop, **{**keywords, "context": context})
            elif not (_is_watched.get() if context is None else context.get(_is_watched, False)):
                return asyncio.Task(coroutine, loop=loop, **keywords)
            return asyncio.Task(_Timed(coroutine, self, name), loop=loop, **keywords)

        loop.set_task_factory(make)
        try:
            yield
        finally:
            loop.set_task_factory(before)
            gc.enable()


class _Timed(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are timed."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], probe: LagProbe, name: str) -> None:
        self._coroutine = coroutine
        self._probe = probe
        self._name = name

    def send(self, value: Any) -> Any:
        with self._measured():
            return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        with self._measured():
            return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        wall, cpu, sleeps = time.perf_counter(), time.thread_time(), _sleeps()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            self._probe.steps += 1
            slept = _sleeps() > sleeps
            if cpu > LIMIT or (wall > LIMIT and slept):
                limit = LIMIT * max(1.0, _measure_yardstick() / _YARDSTICK)
                if cpu > limit or (wall > limit and slept):
                    self._probe.blocking.append((self._name, cpu, wall))


def _measure_yardstick() -> float:
    """Return the seconds of processor time that a fixed piece of work costs here and now: a millisecond or less.

    Two processes that share a core, or a small machine, make it more, and everything else in the same measure.
    """
    started = time.thread_time()
    sum(number * number for number in range(20_000))
    return time.thread_time() - started


def _sleeps() -> int:
    """Return how often this thread has gone to sleep of its own accord (getrusage(2), Linux)."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


async def watch(refresh: Callable[[], Awaitable[object]], *, attempts: int = 3, tolerated: int = 0) -> LagProbe:
    """Return the probe of the first attempt in which no more steps blocked than are tolerated, or of the last one."""
    for _ in range(attempts):
        probe = LagProbe()
        with probe.watching():
            await refresh()
        if len(probe.blocking) <= tolerated:
            break
    return probe


async def watch_cold(imports: str, provider: str, environment: Mapping[str, str] | None = None) -> LagProbe:
    """Return what `watch` does, of the first fetch of a process, with everything that is imported for it.

    Args:
        imports: The line that imports the provider's class.
        provider: The expression that makes the provider.
        environment: More variables.
    """
    command = [sys.executable, "-c", _COLD.format(imports=imports, provider=provider), str(Path(__file__).parent)]
    # What measures coverage takes time, too.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    variables = {**inherited, **(environment or {})}
    for _ in range(3):
        done = await anyio.to_thread.run_sync(
            lambda: subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        )
        assert done.stderr == ""
        probe = LagProbe(*json.loads(done.stdout))
        if not probe.blocking:
            break
    return probe


_COLD = """
import asyncio, json, sys
sys.path[:0] = sys.argv[1:2]
from lag_probe import LagProbe
from asyncpool_creds import TokenManager
{imports}

async def main():
    probe = LagProbe()
    with probe.watching():
        async with TokenManager({provider}) as manager:
            await manager.get()
    print(json.dumps([probe.steps, probe.blocking]))

asyncio.run(main())
"""
