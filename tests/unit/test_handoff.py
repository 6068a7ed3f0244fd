"""The handoff: who goes on when, and what becomes of it if he is cancelled."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from asyncpool_creds._handoff import hand_over

pytestmark = pytest.mark.anyio


class Stage:
    """A task that waits for a future, and what happens in which order."""

    def __init__(self, future):
        self.future = future
        self.seen = []
        self.task = asyncio.create_task(self._wait())

    async def _wait(self):
        try:
            self.seen.append(await self.future)
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


def c_future():
    return asyncio.get_running_loop().create_future()


def python_future():
    return asyncio.futures._PyFuture(loop=asyncio.get_running_loop())


@pytest.fixture(params=[c_future, python_future])
async def stage(request):
    stage = Stage(request.param())
    await asyncio.sleep(0)
    yield stage
    stage.task.cancel()
    await asyncio.wait([stage.task])


async def test_whoever_waits_goes_on_at_once(stage):
    await stage.in_a_callback(lambda: hand_over(stage.future, "it"))

    assert stage.seen == ["it", "the callback ends"]


async def test_he_goes_on_once(stage):
    await stage.in_a_callback(lambda: hand_over(stage.future, "it"))
    for _ in range(3):
        await asyncio.sleep(0)

    assert stage.seen == ["it", "the callback ends"]
    assert stage.task.done() and stage.task.exception() is None


async def test_what_is_handed_to_nobody_is_there_for_whoever_comes():
    future = asyncio.get_running_loop().create_future()

    hand_over(future, "it")

    assert await future == "it"


async def test_whoever_is_cancelled_in_the_same_moment_has_had_it(stage):
    await stage.in_a_callback(lambda: hand_over(stage.future, "it"), stage.task.cancel)

    assert stage.seen == ["it", "the callback ends"]
    assert not stage.task.cancelled()


async def test_the_task_goes_on_in_its_own_context():
    name = contextvars.ContextVar("name", default="somebody else's")
    future = asyncio.get_running_loop().create_future()

    async def wait():
        name.set("mine")
        await future
        return name.get()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(hand_over, future, "it")

    assert await task == "mine"


async def test_where_a_future_hides_who_awaits_it_he_goes_on_in_the_next_turn():
    class Opaque:
        """A future of an event loop that is not built on asyncio's."""

        def __init__(self):
            self._inner = asyncio.get_running_loop().create_future()

        def set_result(self, value):
            self._inner.set_result(value)

        def __await__(self):
            return self._inner.__await__()

    future, seen = Opaque(), []

    async def wait():
        seen.append(await future)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    hand_over(future, "it")
    assert seen == []
    await task
    assert seen == ["it"]
