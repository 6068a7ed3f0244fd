from __future__ import annotations

import asyncio
import contextvars
import socket
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import anyio
import pytest

from asyncpool_creds import Clock
from asyncpool_creds.testing import VirtualClock

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)


def test_it_starts_at_the_real_time_cut_to_a_second():
    before, clock, after = int(time.time()), VirtualClock(), time.time()

    assert before <= clock.time() <= after
    assert clock.now().microsecond == 0


def test_it_starts_where_it_is_told_to():
    clock: Clock = VirtualClock(NOON.astimezone(timezone(timedelta(hours=2))))

    assert clock.time() == NOON.timestamp()
    assert VirtualClock(NOON).now() == NOON
    assert VirtualClock(NOON).now().tzinfo is UTC


def test_it_refuses_a_naive_start():
    with pytest.raises(ValueError, match="naive"):
        VirtualClock(NOON.replace(tzinfo=None))


@pytest.mark.parametrize("threshold", [-1, float("nan")])
def test_it_refuses_a_senseless_threshold(threshold):
    with pytest.raises(ValueError, match="autojump_threshold"):
        VirtualClock(autojump_threshold=threshold)


def test_it_stands_still_by_itself():
    clock = VirtualClock(NOON)

    assert (clock.now(), clock.monotonic()) == (clock.now(), clock.monotonic())


def test_advancing_moves_both_clocks():
    clock = VirtualClock(NOON)

    clock.advance(90)

    assert clock.now() == NOON + timedelta(seconds=90)
    assert clock.monotonic() == 90


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_step_moves_the_wall_clock_alone(seconds):
    clock = VirtualClock(NOON)

    clock.step(seconds)

    assert clock.now() == NOON + timedelta(seconds=seconds)
    assert clock.monotonic() == 0


def test_a_suspension_moves_the_wall_clock_alone():
    clock = VirtualClock(NOON)

    clock.suspend(3600)

    assert clock.now() == NOON + timedelta(hours=1)
    assert clock.monotonic() == 0


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_time_does_not_run_backwards(seconds):
    clock = VirtualClock(NOON)

    with pytest.raises(ValueError, match="advance"):
        clock.advance(seconds)
    with pytest.raises(ValueError, match="suspend"):
        clock.suspend(seconds)
    assert clock.now() == NOON


def test_many_small_steps_do_not_add_up_to_an_error():
    clock = VirtualClock(NOON)

    for _ in range(100_000):
        clock.advance(0.01)

    assert clock.now() == NOON + timedelta(seconds=1000)


@pytest.mark.anyio
async def test_a_day_passes_at_once(clock: VirtualClock):
    started, noon = time.perf_counter(), clock.now()

    await asyncio.sleep(86_400 * 3)

    assert clock.now() == noon + timedelta(days=3)
    assert asyncio.get_running_loop().time() == clock.monotonic() == 86_400 * 3
    assert time.perf_counter() - started < 1


@pytest.mark.anyio
async def test_a_century_passes_at_once(clock: VirtualClock):
    await asyncio.sleep(100 * 365 * 86_400 + 0.1)
    await asyncio.sleep(0.1)

    assert clock.monotonic() == pytest.approx(100 * 365 * 86_400 + 0.2, rel=1e-12)


@pytest.mark.anyio
async def test_sleepers_wake_in_the_order_of_time(clock: VirtualClock):
    woken: list[tuple[float, float]] = []

    async def sleeper(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((seconds, clock.monotonic()))

    async with anyio.create_task_group() as tasks:
        for seconds in (30, 10, 20):
            tasks.start_soon(sleeper, seconds)

    assert woken == [(10, 10), (20, 20), (30, 30)]


@pytest.mark.anyio
async def test_a_timeout_comes_at_its_time(clock: VirtualClock):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await asyncio.Event().wait()

    assert clock.monotonic() == 5

    with anyio.move_on_after(5) as scope:
        await anyio.sleep_forever()

    assert scope.cancelled_caught
    assert clock.monotonic() == 10


@pytest.mark.anyio
async def test_timers_that_advancing_made_due_run_at_the_new_time(clock: VirtualClock):
    woken: list[float] = []
    loop = asyncio.get_running_loop()
    for seconds in (1, 2, 60):
        loop.call_later(seconds, lambda: woken.append(clock.monotonic()))

    clock.advance(10)
    await clock.settle()

    assert woken == [10, 10]
    assert clock.monotonic() == 10


@pytest.mark.anyio
async def test_settling_lets_everyone_run_and_time_stand_still(clock: VirtualClock):
    steps: list[int] = []

    async def busy() -> None:
        for step in range(50):
            steps.append(step)
            await asyncio.sleep(0)
        await asyncio.sleep(60)
        steps.append(-1)

    task = asyncio.create_task(busy())
    await clock.settle()

    assert steps == list(range(50))
    assert clock.monotonic() == 0
    task.cancel()


@pytest.mark.anyio
async def test_several_may_wait_for_others_to_settle(clock: VirtualClock):
    async with asyncio.timeout(1):
        await asyncio.gather(clock.settle(), clock.settle(), clock.settle())

    assert clock.monotonic() == 0


@pytest.mark.anyio
async def test_settling_can_be_cancelled(clock: VirtualClock):
    task = asyncio.create_task(clock.settle())
    await asyncio.sleep(0)

    task.cancel()
    await clock.settle()

    assert task.cancelled()


@pytest.mark.anyio
async def test_settling_needs_a_loop_of_the_same_clock():
    with pytest.raises(RuntimeError, match="this clock's new_event_loop"):
        await VirtualClock().settle()


def test_settling_needs_a_virtual_loop(clock: VirtualClock):
    with pytest.raises(RuntimeError, match="this clock's new_event_loop"):
        asyncio.run(clock.settle())


@pytest.mark.anyio
async def test_input_that_is_there_comes_before_the_next_timer(clock: VirtualClock):
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.send(b"ping")

        async with asyncio.timeout(5):
            received = await asyncio.get_running_loop().sock_recv(left, 10)

    assert received == b"ping"
    assert clock.monotonic() == 0


@pytest.mark.anyio
async def test_time_stands_still_while_a_thread_works(clock: VirtualClock):
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("inside")
    may_end = threading.Event()
    threading.Timer(0.02, may_end.set).start()

    async with asyncio.timeout(5):
        finished = await asyncio.to_thread(lambda: may_end.wait(10) and variable.get())

    assert finished == "inside"
    assert clock.monotonic() == 0
    await asyncio.sleep(1)
    assert clock.monotonic() == 1


def test_an_answer_on_its_way_holds_time_within_the_threshold():
    clock = VirtualClock(autojump_threshold=10)

    async def main() -> bytes:
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            threading.Timer(0.02, right.send, (b"pong",)).start()
            async with asyncio.timeout(5):
                return await asyncio.get_running_loop().sock_recv(left, 10)

    assert clock.run(main()) == b"pong"
    assert clock.monotonic() == 0


def test_beyond_the_threshold_time_moves():
    clock = VirtualClock(autojump_threshold=0.01)

    clock.run(asyncio.sleep(60))

    assert clock.monotonic() == 60


@pytest.mark.anyio
async def test_with_nothing_to_wait_for_a_thread_can_still_wake_the_loop():
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()

    threading.Timer(0.02, lambda: loop.call_soon_threadsafe(woken.set)).start()

    await woken.wait()


def test_a_program_can_be_run_without_a_plugin():
    clock = VirtualClock(NOON)

    async def main() -> datetime:
        await asyncio.sleep(3600)
        await asyncio.to_thread(int)  # the executor is joined in real time at the end
        return clock.now()

    assert clock.run(main()) == NOON + timedelta(hours=1)


def test_several_loops_share_one_clock():
    clock = VirtualClock(NOON)

    clock.run(asyncio.sleep(60))
    clock.run(asyncio.sleep(60))

    assert clock.monotonic() == 120
