"""A source that is no coroutine function: it may block, and nobody but those who wait for a token must notice."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from support import secret

from asyncpool_creds import Credential, CredentialExpired, ProviderError, ProviderTimeout, TokenManager
from asyncpool_creds._clock import SYSTEM_CLOCK
from asyncpool_creds._provider import as_provider, ask
from asyncpool_creds._tracebacks import place_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend(request):
    """Real time: these are about threads."""
    return "asyncio", {"use_uvloop": request.config.getoption("event_loop") == "uvloop"}


class Blocked:
    """A function that returns when it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.calls = 0
        self.answer: object = secret()

    def __call__(self) -> object:
        self.calls += 1
        assert self.go_on.wait(30)
        return self.answer

    async def given_up(self) -> None:
        """Let the threads go on, and wait for their end."""
        self.go_on.set()
        while any(thread.name == "asyncpool_creds: call Blocked" for thread in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_the_loop_goes_on_while_a_function_blocks():
    blocked = Blocked()
    manager = TokenManager(blocked, on_event=())
    asking = asyncio.create_task(manager.get())
    while not blocked.calls:  # noqa: ASYNC110 - it is in a thread
        await asyncio.sleep(0.001)

    assert not asking.done()
    blocked.go_on.set()

    assert (await asking).password == secret()
    await manager.aclose()


async def test_a_function_that_hangs_is_bounded_by_the_fetch_timeout_and_its_late_answer_dropped():
    blocked = Blocked()
    manager = TokenManager(blocked, fetch_timeout=0.05, on_event=())

    with pytest.raises(CredentialExpired) as caught:
        await manager.get()

    assert isinstance(caught.value.__cause__, ProviderTimeout)
    await blocked.given_up()
    assert manager.stats().generation == 0
    await manager.aclose()


async def test_a_late_coroutine_is_closed_and_does_not_complain():
    async def never_awaited() -> str:
        raise AssertionError

    blocked = Blocked()
    blocked.answer = never_awaited()
    provider = as_provider(blocked, SYSTEM_CLOCK)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await ask(provider)

    await blocked.given_up()
    blocked.answer = None

    gc.collect()  # the suite fails on "was never awaited"


async def test_functions_that_hang_are_not_called_without_end_and_are_again_once_one_returns():
    blocked = Blocked()
    provider = as_provider(blocked, SYSTEM_CLOCK)
    for _ in range(8):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ask(provider)

    with pytest.raises(ProviderError, match=r"Blocked: 8 earlier calls have not returned.* time limit") as caught:
        await ask(provider)

    assert caught.value.retryable
    assert blocked.calls == 8
    await blocked.given_up()
    assert (await ask(provider)).password == secret()


async def test_a_function_that_hangs_takes_no_thread_of_the_application():
    blocked = Blocked()
    manager = TokenManager(blocked, fetch_timeout=0.01, on_event=())
    with pytest.raises(CredentialExpired):
        await manager.get()

    executor_threads = [thread for thread in threading.enumerate() if "asyncio" in thread.name.lower()]
    anyio_threads = [thread for thread in threading.enumerate() if "anyio" in thread.name.lower()]

    assert await asyncio.to_thread(lambda: 5) == 5
    assert not executor_threads
    assert not anyio_threads
    await blocked.given_up()
    await manager.aclose()


def test_a_function_that_never_returns_does_not_hold_the_end_of_the_process():
    program = """
        import asyncio, threading
        from asyncpool_creds import CredentialExpired, TokenManager

        async def main():
            manager = TokenManager(threading.Event().wait, fetch_timeout=0.05, on_event=())
            try:
                await manager.get()
            except CredentialExpired as error:
                print(type(error.__cause__).__name__)
            await manager.aclose()

        asyncio.run(main())
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "ProviderTimeout\n", "")
    assert time.monotonic() - started < 30


async def test_errors_of_a_function_keep_their_place():
    def reads_a_document() -> str:
        return {}["access_token"]

    provider = as_provider(reads_a_document, SYSTEM_CLOCK)

    with pytest.raises(ProviderError, match=r"raised KeyError at test_blocking_functions\.py:\d+ in reads_a_document"):
        await ask(provider)


async def test_an_error_of_ours_from_a_function_passes_unchanged():
    error = ProviderError("denied", retryable=False)

    def fails() -> str:
        raise error

    with pytest.raises(ProviderError, match="denied") as caught:
        await ask(as_provider(fails, SYSTEM_CLOCK))

    assert caught.value is error
    assert place_of(error).endswith("in fails")


async def test_a_stop_iteration_is_an_error_as_any_other():
    with pytest.raises(ProviderError, match="raised RuntimeError"):
        await ask(as_provider(iter(()).__next__, SYSTEM_CLOCK))


@pytest.mark.parametrize("wants", [asyncio.get_running_loop, asyncio.current_task], ids=["loop", "task"])
async def test_a_function_that_wants_the_loop_is_told_the_way_out(wants):
    def sync_source() -> object:
        return wants()

    with pytest.raises(ProviderError, match=r"sync_source: it asked for the event loop.*make it 'async def'") as caught:
        await ask(as_provider(sync_source, SYSTEM_CLOCK))

    assert not caught.value.retryable
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_another_runtime_error_is_just_that():
    def broken() -> str:
        raise RuntimeError("dictionary changed size during iteration")

    with pytest.raises(ProviderError, match="raised RuntimeError at test_blocking_functions"):
        await ask(as_provider(broken, SYSTEM_CLOCK))


async def test_what_a_function_returns_to_await_is_awaited_on_the_loop():
    loop = asyncio.get_running_loop()

    async def token() -> str:
        assert asyncio.get_running_loop() is loop
        return secret()

    def source() -> object:
        assert threading.current_thread() is not threading.main_thread()
        return token()

    assert (await ask(as_provider(source, SYSTEM_CLOCK))).password == secret()


async def test_a_function_sees_no_context_of_the_caller_through_a_manager():
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen = []

    def source() -> Credential:
        seen.append(request.get())
        return Credential(secret())

    async with TokenManager(source, on_event=()) as manager:
        request.set("of the caller")
        await manager.refresh()

    assert seen == ["none", "none"]
