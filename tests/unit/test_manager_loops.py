"""One manager, one event loop; a forked child starts afresh. A clear error or a clean restart, never a hang."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Coroutine

import pytest
from support import secret

from asyncpool_creds import ManagerClosed, TokenManager
from asyncpool_creds.testing import ScriptedProvider, VirtualClock


@pytest.fixture
def manager(provider: ScriptedProvider, clock: VirtualClock) -> TokenManager:
    return TokenManager(provider, clock=clock)


def test_it_is_bound_to_the_loop_of_its_first_use_and_not_of_its_making(manager, clock):
    async def main() -> None:
        await manager.get()
        await manager.aclose()

    clock.run(main())


@pytest.mark.parametrize("call", ["get", "refresh", "start", "stamp"])
def test_use_from_another_loop_is_a_clear_error_while_its_own_lives(manager, clock, call):
    own = clock.new_event_loop()
    own.run_until_complete(manager.get())

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="one manager per event loop") as caught:
            await getattr(manager, call)()
        assert str(caught.value).count("_VirtualLoop") == 2

    clock.run(elsewhere())
    own.run_until_complete(manager.aclose())
    own.close()


@pytest.mark.parametrize("call", ["get", "refresh", "start", "stamp"])
def test_a_manager_whose_loop_is_closed_moves_to_the_running_one(manager, provider, clock, call):
    provider.play(60)
    clock.run(manager.get())

    async def elsewhere() -> None:
        await getattr(manager, call)()
        calls = provider.calls
        await asyncio.sleep(60)
        assert provider.calls > calls  # it refreshes there, too
        await manager.aclose()

    clock.run(elsewhere())
    assert provider.closed == 1


def test_it_cannot_be_closed_from_another_loop_while_its_own_lives(manager, clock):
    own = clock.new_event_loop()
    own.run_until_complete(manager.get())

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="one manager per event loop"):
            await manager.aclose()

    clock.run(elsewhere())
    own.run_until_complete(manager.aclose())
    own.close()


def test_a_credential_can_be_refused_when_its_loop_is_gone(manager, clock):
    clock.run(manager.get())

    manager.invalidate(manager.current)

    assert manager.current is None


def test_it_can_be_closed_from_another_loop_when_its_own_is_gone(manager, provider, clock):
    clock.run(manager.get())

    clock.run(manager.aclose())

    assert provider.closed == 1


def test_it_can_be_closed_when_its_loop_ended_in_the_middle_of_a_flight(manager, provider, clock):
    provider.play(ScriptedProvider.HANG)

    async def main() -> None:
        task = asyncio.create_task(manager.get())
        await provider.called()
        task.cancel()

    clock.run(main())
    clock.run(manager.aclose())

    assert (provider.cancelled, provider.closed) == (1, 1)


def test_it_can_be_closed_when_its_loop_was_closed_under_a_flight(manager, provider, clock, caplog):
    provider.play(ScriptedProvider.HANG)
    own = clock.new_event_loop()
    waiting = own.create_task(manager.get())
    own.run_until_complete(provider.called())
    flight = next(iter(asyncio.all_tasks(own) - {waiting}))
    own.close()

    async def elsewhere() -> None:
        async with asyncio.timeout(5):
            await manager.aclose()

    clock.run(elsewhere())

    assert provider.closed == 1
    for task in (waiting, flight):  # what a program that does such things leaves behind is not our business
        task._log_destroy_pending = False
        with contextlib.suppress(RuntimeError):
            task.get_coro().close()


def test_a_program_that_ends_without_closing_leaves_no_noise(manager, provider, clock, caplog):
    provider.play(60)
    clock.run(manager.get())

    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


def in_a_child(main: Callable[[], Coroutine[object, object, str]], clock: VirtualClock) -> str:
    """Return what `main` returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "nothing"
        try:
            signal.alarm(10)
            answer = clock.run(main())
        except BaseException:  # noqa: BLE001 - nothing of the child may run on in the test suite
            answer = traceback.format_exc()
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.anyio
class TestFork:
    async def test_a_child_starts_with_the_credential_it_inherited(self, new_manager, provider, clock):
        manager = await new_manager().start()

        async def child() -> str:
            credential = await manager.get()
            return f"{credential.fingerprint} after {provider.calls}"

        assert in_a_child(child, clock) == f"{manager.current.fingerprint} after 1"
        assert await manager.get() is provider.credentials[0]

    async def test_a_child_refreshes_on_a_loop_of_its_own(self, new_manager, provider, clock):
        manager = await new_manager().start()

        async def child() -> str:
            await asyncio.sleep(3500)
            answer = f"generation {manager.stats().generation}"
            await manager.aclose()
            return answer

        async def child_that_calls_first() -> str:
            await manager.get()
            return await child()

        assert in_a_child(child, clock) == "generation 1"
        assert in_a_child(child_that_calls_first, clock) == "generation 2"
        assert manager.stats().generation == 1

    async def test_a_child_forked_during_a_flight_makes_its_own(self, new_manager, provider, clock):
        provider.play(ScriptedProvider.HANG, 60)
        manager = new_manager()
        caller = asyncio.create_task(manager.get())
        await provider.called()

        async def child() -> str:
            credentials = await asyncio.gather(manager.get(), manager.get())
            await manager.aclose()
            return f"{len(set(credentials))} credential, {provider.calls} calls"

        assert in_a_child(child, clock) == "1 credential, 2 calls"
        provider.release()
        assert await caller is provider.credentials[0]

    async def test_a_child_of_a_closed_manager_has_a_closed_manager(self, new_manager, clock):
        manager = await new_manager().start()
        await manager.aclose()

        async def child() -> str:
            try:
                await manager.get()
            except ManagerClosed:
                await manager.aclose()
                return "closed"
            return "open"

        assert in_a_child(child, clock) == "closed"

    async def test_what_a_child_does_is_not_seen_by_its_parent(self, new_manager, provider, clock):
        manager = await new_manager().start()

        async def child() -> str:
            manager.invalidate(manager.current)
            return (await manager.get()).password

        assert in_a_child(child, clock) == f"{secret()}-2"
        assert manager.current is provider.credentials[0]
