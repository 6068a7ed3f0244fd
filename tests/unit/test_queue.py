"""The queue of slots: order, hand-off, and that no slot is lost or given twice, whoever is cancelled when."""

from __future__ import annotations

import asyncio
import random

import asyncpg
import pytest

from asyncpool_creds._queue import SlotQueue

pytestmark = pytest.mark.anyio


class Slot:
    """What the queue asks of one."""

    def __init__(self, name, *, connected=True):
        self.name, self.connected = name, connected

    def is_connected(self):
        return self.connected

    def check_out(self):
        return self if self.connected else None

    def __repr__(self):
        return self.name


def queue_of(*slots, fair=True):
    queue = SlotQueue(fair=fair)
    queue.fill(slots)
    return queue


async def waiting(queue, count):
    """Return tasks that wait for a slot, in order."""
    tasks = [asyncio.create_task(queue.get()) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


@pytest.mark.parametrize("fair", [True, False])
async def test_the_last_one_back_goes_out_first_and_those_with_a_connection_before_the_others(fair):
    one, other, vacant = Slot("one"), Slot("other"), Slot("vacant", connected=False)
    queue = queue_of(one, other, vacant, fair=fair)

    assert [await queue.get() for _ in range(3)] == [other, one, vacant]


async def test_what_is_ready_is_taken_at_once_but_not_past_somebody_who_waits():
    ready, vacant = Slot("ready"), Slot("vacant", connected=False)
    queue = queue_of(vacant, ready)

    assert queue.check_out() is ready
    assert queue.check_out() is None
    assert await queue.get() is vacant
    (waiter,) = await waiting(queue, 1)
    queue.put_nowait(ready)
    assert queue.check_out() is None
    assert await waiter is ready


async def test_those_who_wait_are_served_in_order_of_arrival_and_nobody_overtakes_them():
    slot = Slot("slot")
    queue = queue_of()
    tasks = await waiting(queue, 3)

    queue.put_nowait(slot)
    late = asyncio.create_task(queue.get())
    for task in [*tasks, late]:
        assert await task is slot
        queue.put_nowait(slot)


async def test_where_it_is_not_fair_whoever_comes_takes_what_is_there():
    slot = Slot("slot")
    queue = queue_of(fair=False)
    (waiter,) = await waiting(queue, 1)

    queue.put_nowait(slot)
    assert await queue.get() is slot
    await asyncio.sleep(0)
    assert not waiter.done()
    queue.put_nowait(slot)
    assert await waiter is slot


@pytest.mark.parametrize("fair", [True, False])
async def test_a_slot_that_was_handed_to_one_who_is_cancelled_goes_to_the_next(fair):
    slot = Slot("slot")
    queue = queue_of(fair=fair)
    first, second = await waiting(queue, 2)

    queue.put_nowait(slot)
    first.cancel()

    assert await second is slot
    assert first.cancelled() or await asyncio.wait([first])
    assert queue.qsize() == 0


async def test_nothing_is_kept_of_those_who_have_given_up():
    queue = queue_of()
    tasks = await waiting(queue, 100)
    still_there = tasks.pop(50)

    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

    assert len(queue._waiting) == 1
    queue.put_nowait(Slot("back"))
    assert (await still_there).name == "back"


@pytest.mark.parametrize("fair", [True, False])
async def test_whoever_was_cancelled_a_moment_before_is_passed_over(fair):
    slot = Slot("slot")
    queue = queue_of(fair=fair)
    first, second = await waiting(queue, 2)

    first.cancel()
    queue.put_nowait(slot)

    assert await second is slot
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_slot_handed_to_the_only_one_who_waits_comes_back_if_he_is_cancelled():
    slot = Slot("slot")
    queue = queue_of()
    (waiter,) = await waiting(queue, 1)

    queue.put_nowait(slot)
    waiter.cancel()
    await asyncio.wait([waiter])

    assert queue.check_out() is slot


async def test_nobody_connects_while_a_connection_is_on_its_way_back():
    slot, vacant = Slot("slot"), Slot("vacant", connected=False)
    queue = queue_of(vacant)
    queue.resetting = 1
    (waiter,) = await waiting(queue, 1)

    # The next one cannot count on that reset as well.
    assert await queue.get() is vacant
    queue.resetting = 0
    queue.put_nowait(slot)
    assert await waiter is slot


async def test_whoever_waits_too_long_for_a_reset_connects_after_all():
    vacant = Slot("vacant", connected=False)
    queue = queue_of(vacant)
    queue.resetting = 1

    assert await queue.get() is vacant


async def test_whoever_is_served_by_a_callback_goes_on_when_that_has_nothing_more_to_do():
    slot, seen = Slot("slot"), []
    queue = queue_of()

    async def take():
        seen.append(await queue.get())

    def give_back():
        queue.hold()
        queue.put_nowait(slot)
        seen.append("put back")
        queue.let_go()
        seen.append("nothing more")

    task = asyncio.create_task(take())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(give_back)
    await task

    assert seen == ["put back", slot, "nothing more"]


@pytest.mark.parametrize("fair", [True, False])
async def test_a_slot_is_not_lost_if_whoever_is_to_have_it_is_cancelled_by_one_who_goes_on_before_him(fair):
    slots = Slot("slot"), Slot("other")
    queue = queue_of(fair=fair)

    async def take_and_cancel():
        taken = await queue.get()
        second.cancel()
        return taken

    first = asyncio.create_task(take_and_cancel())
    await asyncio.sleep(0)
    second, third = await waiting(queue, 2)

    def give_back():
        queue.hold()
        for slot in slots:
            queue.put_nowait(slot)
        queue.let_go()

    asyncio.get_running_loop().call_soon(give_back)
    with pytest.raises(asyncio.CancelledError):
        await second

    assert {await first, await third} == set(slots)


async def test_asyncpgs_floor_gets_slots_without_a_connection_alone():
    connected, vacant = Slot("connected"), Slot("vacant", connected=False)
    queue = queue_of(vacant, connected)

    assert queue.get_disconnected_nowait() is vacant
    with pytest.raises(asyncio.QueueEmpty):
        queue.get_disconnected_nowait()
    assert queue.check_out() is connected


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("seed", range(20))
async def test_in_a_storm_of_cancellations_no_slot_is_lost_and_none_given_twice(fair, seed):
    chance = random.Random(seed)
    slots = [Slot(str(number), connected=chance.random() < 0.7) for number in range(4)]
    queue = queue_of(*slots, fair=fair)
    held = set()

    async def work():
        for _ in range(20):
            slot = queue.check_out() or await queue.get()
            assert slot not in held
            held.add(slot)
            try:
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                held.discard(slot)
                queue.put_nowait(slot)

    tasks = [asyncio.create_task(work()) for _ in range(12)]
    while not all(task.done() for task in tasks):
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
        await asyncio.sleep(0)

    assert [task.exception() for task in tasks if not task.cancelled()].count(None) + sum(
        task.cancelled() for task in tasks
    ) == len(tasks)
    assert queue.qsize() == len(slots)
    assert {await queue.get() for _ in slots} == set(slots)


@pytest.mark.parametrize("fair", [True, False])
async def test_closing_turns_away_those_who_wait(fair):
    queue = queue_of(fair=fair)
    tasks = await waiting(queue, 3)

    queue.close()

    for task in tasks:
        with pytest.raises(asyncpg.InterfaceError, match="pool is closing"):
            await task


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("is_held", [False, True])
async def test_closing_turns_away_one_who_was_served_and_has_not_run_since_and_loses_no_slot(fair, is_held):
    queue = queue_of(fair=fair)
    (task,) = await waiting(queue, 1)
    if is_held:
        queue.hold()
    queue.put_nowait(Slot("returned"))

    queue.close()

    if is_held:
        asyncio.get_running_loop().call_soon(queue.let_go)
    with pytest.raises(asyncpg.InterfaceError, match="pool is closing"):
        await task
    assert queue.qsize() == 1


async def test_a_waiter_that_is_cancelled_as_the_queue_closes_is_cancelled():
    queue = queue_of()
    (task,) = await waiting(queue, 1)

    queue.close()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
