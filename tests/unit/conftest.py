from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import TokenManager
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock


@pytest.fixture
def anyio_backend(clock: VirtualClock) -> tuple[str, dict[str, object]]:
    """Every test of this folder runs in virtual time: no timer waits, none depends on the machine."""
    return "asyncio", {"loop_factory": clock.new_event_loop}


@pytest.fixture
def provider(clock: VirtualClock) -> ScriptedProvider:
    """Mints planted secrets, an hour each; tests give it another script with `play`."""
    return ScriptedProvider(clock=clock, prefix=secret())


@pytest.fixture
async def new_manager(
    provider: ScriptedProvider, clock: VirtualClock, observer: RecordingObserver
) -> AsyncIterator[Callable[..., TokenManager]]:
    """Make managers of the provider; they are closed after the test, and must leave no task behind."""
    managers: list[TokenManager] = []

    def new(source: object = provider, **options: object) -> TokenManager:
        managers.append(TokenManager(source, **({"clock": clock, "on_event": observer} | options)))
        return managers[-1]

    yield new
    for manager in managers:
        await manager.aclose()
        assert_no_secret(manager, manager.stats())
    await clock.settle()
    assert not tasks_of_ours()


@pytest.fixture
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)
