"""The handoff: who goes on when, and what becomes of it if he is cancelled."""

from __future__ import annotations

import asyncio
import contextvars

import anyio
import pytest

from asyncpool_creds._handoff import Handoff

pytestmark = pytest.mark.anyio


class Stage:
    """A task that waits for a handoff, and what happens in which order."""

    def __init__(self):
        self.handoff = Handoff(asyncio.get_running_loop())
        self.seen = []
        self.task = asyncio.create_task(self._wait())

    async def _wait(self):
        try:
            self.seen.append(await self.handoff)
        except BaseException as error:
            self.seen.append(error)
            raise

    async def in_a_callback(self, *steps):
        """Run `steps` in a callback of the event loop, and wait for the task."""
        done = asyncio.Event()

        def callback():
            for step in steps:
                step()
            self.seen.append("the callback ends")
            done.set()

        asyncio.get_running_loop().call_soon(callback)
        await done.wait()
        await asyncio.wait([self.task])


@pytest.fixture
async def stage():
    stage = Stage()
    await asyncio.sleep(0)
    yield stage
    stage.task.cancel()
    await asyncio.wait([stage.task])


async def test_whoever_is_resumed_goes_on_at_once(stage):
    await stage.in_a_callback(lambda: stage.handoff.settle("it"), stage.handoff.resume)

    assert stage.seen == ["it", "the callback ends"]


async def test_whoever_is_resumed_soon_goes_on_in_the_next_turn(stage):
    await stage.in_a_callback(lambda: stage.handoff.settle("it"), stage.handoff.resume_soon)

    assert stage.seen == ["the callback ends", "it"]


async def test_an_error_is_raised(stage):
    await stage.in_a_callback(lambda: stage.handoff.fail(OSError("broken")), stage.handoff.resume)

    assert isinstance(stage.task.exception(), OSError)


async def test_what_is_there_already_is_not_waited_for():
    handoff = Handoff(asyncio.get_running_loop())
    handoff.settle("it")
    handoff.resume()  # nobody is there yet

    waiting = handoff.__await__()
    with pytest.raises(StopIteration) as stopped:
        next(waiting)
    assert stopped.value.value == "it"


@pytest.mark.parametrize("message", [None, "enough"])
async def test_whoever_is_cancelled_stops_waiting(stage, message):
    assert stage.task.cancel(message) and not stage.task.done()
    await asyncio.wait([stage.task])

    assert stage.task.cancelled()
    assert stage.handoff.done() and stage.handoff.cancelled()
    assert stage.seen[0].args == (() if message is None else (message,))
    stage.handoff.resume()  # nobody is there any more


async def test_what_was_handed_over_is_still_there_if_its_taker_is_cancelled_before_he_goes_on(stage):
    await stage.in_a_callback(lambda: stage.handoff.settle("it"), stage.handoff.resume_soon, stage.task.cancel)

    assert stage.task.cancelled()
    assert not stage.handoff.cancelled()
    assert stage.handoff.result() == "it"


@pytest.mark.parametrize("limit", [asyncio.timeout, anyio.fail_after])
async def test_a_time_limit_ends_the_wait(limit):
    handoff = Handoff(asyncio.get_running_loop())

    with pytest.raises(TimeoutError):
        if limit is asyncio.timeout:
            async with limit(1):
                await handoff
        else:
            with limit(1):
                await handoff

    assert handoff.cancelled()


async def test_the_task_goes_on_in_its_own_context():
    name = contextvars.ContextVar("name", default="somebody else's")
    handoff = Handoff(asyncio.get_running_loop())

    async def wait():
        name.set("its own")
        await handoff
        return name.get(), asyncio.current_task()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    handoff.settle(None)
    asyncio.get_running_loop().call_soon(handoff.resume)

    assert await task == ("its own", task)
    assert name.get() == "somebody else's"
