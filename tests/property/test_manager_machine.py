"""A manager in any order of events: what holds always, and what holds in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import Credential, CredentialExpired, ManagerClosed, ProviderError, TokenManager
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock

LIFETIMES = st.sampled_from([1.0, 5.0, 60.0, 600.0, 3600.0, None])
SECONDS = st.sampled_from([0.01, 0.5, 3.0, 20.0, 100.0, 1000.0, 10_000.0])
FETCH_TIMEOUT = 30.0
# The longest that a source is left alone after a failure is what it may ask for itself.
LONGEST_HOLD = 300.0


class Manager(RuleBasedStateMachine):
    @initialize(
        background=st.booleans(),
        threshold=st.sampled_from([None, 5.0, 59.0, 7200.0]),
        min_validity=st.sampled_from([None, 0.0, 4.9, 30.0]),
    )
    def begin(self, background: bool, threshold: float | None, min_validity: float | None) -> None:
        self.clock = VirtualClock()
        self.loop = self.clock.new_event_loop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.provider = ScriptedProvider(clock=self.clock, prefix=secret())
        self.observer = RecordingObserver()
        self.manager = TokenManager(
            self.provider,
            refresh_threshold=threshold,
            min_validity=min_validity,
            background=background,
            fetch_timeout=FETCH_TIMEOUT,
            on_event=self.observer,
            clock=self.clock,
        )
        self.minted: dict[str, float] = {}
        self.callers: list[asyncio.Task[Credential]] = []
        self.we_cancelled: set[asyncio.Task[Credential]] = set()
        self.closed = False

    # -- what the source does

    @rule(lifetime=LIFETIMES)
    def the_source_works(self, lifetime: float | None) -> None:
        def mint() -> Credential:
            credential = self.provider.mint(lifetime)
            if lifetime is not None:
                self.minted[credential.password] = self.clock.monotonic() + lifetime
            return credential

        self.provider.play(mint)

    @rule(lifetime=LIFETIMES)
    def the_source_repeats_itself(self, lifetime: float | None) -> None:
        self.provider.play(self.provider.mint(lifetime))

    @rule(
        error=st.sampled_from(
            [
                ProviderError("down"),
                ProviderError("slow down", retry_after=20.0),
                ProviderError("come back tomorrow", retry_after=86_400.0),
                ProviderError("invalid_grant", retryable=False),
                OSError("socket"),
                asyncio.CancelledError(),
            ]
        )
    )
    def the_source_fails(self, error: BaseException) -> None:
        self.provider.play(error)

    @rule()
    def the_source_is_late(self) -> None:
        self.provider.play(Credential(secret("late"), expires_at=self.clock.now() - timedelta(seconds=1)))

    @rule()
    def the_source_is_impatient(self) -> None:
        self.provider.play(
            lambda: Credential(
                secret(f"impatient {self.provider.calls}"), refresh_at=self.clock.now() - timedelta(seconds=1)
            )
        )

    @rule()
    def the_source_answers_nonsense(self) -> None:
        self.provider.play(lambda: 5)

    @rule()
    def the_source_hangs(self) -> None:
        self.provider.play(ScriptedProvider.HANG)

    @precondition(lambda self: self.provider.in_flight)
    @rule()
    def the_source_answers_at_last(self) -> None:
        self.provider.release()
        self.settle()

    # -- what time does

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.settle()

    @rule(seconds=SECONDS)
    def the_process_is_busy(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=SECONDS)
    def the_process_is_suspended(self, seconds: float) -> None:
        self.clock.suspend(seconds)

    @rule(hours=st.sampled_from([-1, 1]))
    def the_clock_is_stepped(self, hours: int) -> None:
        self.clock.step(3600 * hours)

    # -- what callers do

    @rule(method=st.sampled_from(["get", "refresh"]), count=st.integers(1, 3))
    def someone_calls(self, method: str, count: int) -> None:
        async def call() -> Credential:
            credential = await getattr(self.manager, method)()
            self.check(credential)
            return credential

        self.callers += [self.loop.create_task(call()) for _ in range(count)]

    @precondition(lambda self: any(not caller.done() for caller in self.callers))
    @rule(number=st.integers(0, 9))
    def a_caller_is_cancelled(self, number: int) -> None:
        waiting = [caller for caller in self.callers if not caller.done()]
        caller = waiting[number % len(waiting)]
        caller.cancel()
        self.we_cancelled.add(caller)

    @rule()
    def everyone_has_a_turn(self) -> None:
        self.settle()

    @precondition(lambda self: self.manager.current is not None)
    @rule()
    def someone_calls_while_there_is_a_good_one(self) -> None:
        async def call() -> None:
            coroutine = self.manager.get()
            with pytest.raises(StopIteration) as finished:
                coroutine.send(None)
            self.check(finished.value.value)

        self.run(call())

    @precondition(lambda self: self.provider.credentials)
    @rule(age=st.integers(0, 2))
    def a_server_refuses(self, age: int) -> None:
        self.manager.invalidate(self.provider.credentials[-1 - age % len(self.provider.credentials)])

    @rule()
    def the_source_recovers(self) -> None:
        self.the_source_works(3600.0)

        async def patient() -> None:
            for _ in range(int((LONGEST_HOLD + FETCH_TIMEOUT) / 10) + 2):
                try:
                    self.check(await self.manager.get())
                except CredentialExpired:
                    await asyncio.sleep(10)
                else:
                    return
            raise AssertionError("the source is back, and nobody noticed")

        self.run(patient())

    # -- what holds

    @invariant()
    def one_fetch_at_most_is_in_flight(self) -> None:
        assert self.provider.peak_in_flight <= 1
        assert self.provider.in_flight <= (0 if self.closed else 1)

    @invariant()
    def no_task_idles(self) -> None:
        assert len(tasks_of_ours(self.loop)) <= (0 if self.closed else 1)

    @invariant()
    def what_is_current_is_valid(self) -> None:
        if self.manager.current is not None:
            self.check(self.manager.current)

    @invariant()
    def nobody_hears_of_a_cancellation_that_was_not_his_own(self) -> None:
        for caller in self.callers:
            if caller.done() and caller not in self.we_cancelled:
                assert not caller.cancelled()
                error = caller.exception()
                assert error is None or isinstance(error, (CredentialExpired, ProviderError, ManagerClosed))
                assert not isinstance(error, ManagerClosed) or self.closed
        self.callers = [caller for caller in self.callers if not caller.done()]

    @invariant()
    def nothing_goes_wrong_behind_the_scenes(self) -> None:
        assert not self.complaints

    def teardown(self) -> None:
        callers = list(self.callers)
        self.closed = True
        self.run(self.manager.aclose())
        self.settle()

        assert self.provider.closed == 1
        assert not asyncio.all_tasks(self.loop)
        for caller in callers:
            assert caller in self.we_cancelled or caller.exception() is not None or caller.result() is not None
        for method in ("get", "refresh", "start"):
            with pytest.raises(ManagerClosed):
                self.run(getattr(self.manager, method)())
        calls = self.provider.calls
        self.run(asyncio.sleep(10_000))
        assert self.provider.calls == calls
        self.one_fetch_at_most_is_in_flight()
        self.nobody_hears_of_a_cancellation_that_was_not_his_own()
        self.nothing_goes_wrong_behind_the_scenes()
        assert_no_secret(self.manager, *self.observer.events)
        self.loop.close()

    # -- tools

    def run(self, coroutine: Coroutine[object, object, object]) -> None:
        self.loop.run_until_complete(coroutine)

    def settle(self) -> None:
        self.run(self.clock.settle())
        if not self.provider.in_flight:
            assert all(caller.done() for caller in self.callers), "someone waits for a flight that has landed"

    def check(self, credential: Credential) -> None:
        assert credential.expires_at is None or credential.expires_at > self.clock.now()
        if credential.password in self.minted:
            assert self.clock.monotonic() < self.minted[credential.password]


TestManager = Manager.TestCase
TestManager.settings = settings(max_examples=100, stateful_step_count=40)
