"""Processes of tests: forks of this one, and the examples."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import anyio.to_thread

_EXAMPLES = Path(__file__).parents[1] / "examples"


def fork() -> int:
    """Fork beside other threads, of which CPython 3.12 and later warn; the child does not touch any of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


async def in_forked_child(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Return what the coroutine function `work` returns in a forked child, by way of JSON."""
    read, write = os.pipe()
    child = fork()
    if not child:
        try:
            os.write(write, json.dumps(asyncio.run(work())).encode())
        finally:
            os._exit(0)
    os.close(write)
    await anyio.to_thread.run_sync(os.waitpid, child, 0)
    with open(read, "rb") as pipe:  # noqa: ASYNC230, PTH123
        return json.loads(pipe.read())


async def run_example(name: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run an example in this environment, with every warning an error."""
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-W", "error", str(_EXAMPLES / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
