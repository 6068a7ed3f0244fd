"""What a provider may have beside ``fetch``, and when its manager uses it."""

from __future__ import annotations

import asyncio

import pytest
from support import secret, tasks_of_ours

from asyncpool_creds import (
    Credential,
    ProviderError,
    RefreshTokenExpiring,
    RevocationFailed,
    StorageFailed,
    TokenManager,
)
from asyncpool_creds.testing import RecordingObserver

pytestmark = pytest.mark.anyio


class Source:
    """Counts, and remembers what it is told."""

    session_lifetime = 3600.0

    def __init__(self) -> None:
        self.fetched = 0
        self.invalidated: list[Credential] = []
        self.revoked: list[str] = []
        self.revocation: BaseException | None = None
        self.may_revoke = asyncio.Event()
        self.may_revoke.set()
        self.report = None
        self.closed = False

    async def fetch(self) -> Credential:
        self.fetched += 1
        return Credential(secret(str(self.fetched)))

    def invalidate(self, credential: Credential) -> None:
        self.invalidated.append(credential)

    async def revoke(self, credential: Credential) -> None:
        await self.may_revoke.wait()
        if self.revocation is not None:
            raise self.revocation
        assert not self.closed
        self.revoked.append(credential.password.rpartition("-")[2])

    def report_to(self, observer) -> None:
        assert self.fetched == 0
        self.report = observer

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def manager(source, observer, anyio_backend):
    async with TokenManager(source, background=False, on_event=observer) as manager:
        yield manager


async def settle() -> None:
    """Let the tasks run that nothing holds up."""
    while tasks_of_ours():
        await asyncio.wait(tasks_of_ours())


@pytest.fixture
async def silent_manager(source, observer, anyio_backend):
    """Whose credentials were never handed out but with a stamp."""
    manager = TokenManager(source, background=False, on_event=observer)
    yield manager
    await manager.aclose()


async def rotate(manager: TokenManager) -> None:
    """Have the manager hold a newer credential, without being handed it."""
    stamp = await manager.stamp()
    manager.invalidate(stamp.credential)
    await manager.stamp()


async def test_it_hears_of_a_refused_credential(manager, source):
    credential = await manager.get()

    manager.invalidate(credential)
    manager.invalidate(credential)

    assert source.invalidated == [credential]


async def test_its_events_go_where_its_managers_go(manager, source, observer, clock):
    event = StorageFailed(at=clock.now(), provider="Source", action="save", error=OSError(), message="OSError")
    later = RecordingObserver()
    manager.subscribe(later)

    source.report(event)

    assert observer.of(StorageFailed) == [event]
    assert later.events == [event]


async def test_its_session_lifetime_is_the_managers(manager):
    assert manager.session_lifetime == 3600.0


async def test_a_manager_of_a_function_knows_of_no_session_lifetime():
    assert TokenManager(lambda: "token").session_lifetime is None


async def test_a_superseded_credential_is_revoked_when_its_last_connection_has_gone(silent_manager, source):
    stamp = await silent_manager.stamp()
    stamp.hold()
    stamp.hold()
    await rotate(silent_manager)
    stamp.let_go()
    await settle()
    assert source.revoked == []

    stamp.let_go()
    await settle()

    assert source.revoked == ["1"]


async def test_a_superseded_credential_without_connections_is_revoked_at_once_and_once(silent_manager, source):
    stamp = await silent_manager.stamp()
    await rotate(silent_manager)
    await settle()
    stamp.hold()
    stamp.let_go()
    await settle()

    assert source.revoked == ["1"]


async def test_the_current_credential_is_not_revoked_when_it_has_no_connection(silent_manager, source):
    stamp = await silent_manager.stamp()
    stamp.hold()
    stamp.let_go()
    await settle()

    assert source.revoked == []


@pytest.mark.parametrize("ask", [TokenManager.get, TokenManager.__call__, TokenManager.refresh])
async def test_what_was_handed_out_is_not_revoked_since_nobody_knows_where_it_went(silent_manager, source, ask):
    await ask(silent_manager)
    await rotate(silent_manager)
    await settle()

    assert source.revoked == []


async def test_what_was_seen_as_current_is_not_revoked(silent_manager, source):
    await silent_manager.stamp()
    assert silent_manager.current is not None
    await rotate(silent_manager)
    await settle()

    assert source.revoked == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ProviderError("vault is sealed"), "vault is sealed"),
        (OSError(secret()), "Source: revoke() raised OSError; see the cause"),
    ],
    ids=["ProviderError", "OSError"],
)
async def test_a_revocation_that_fails_is_an_event(silent_manager, source, observer, error, told):
    source.revocation = error
    await silent_manager.stamp()
    await rotate(silent_manager)
    await settle()

    (event,) = observer.of(RevocationFailed)
    assert event.message == str(event.error) == told
    assert event.provider == "Source"


async def test_closing_waits_for_a_revocation_before_it_closes_the_source(silent_manager, source):
    source.may_revoke.clear()
    await silent_manager.stamp()
    await rotate(silent_manager)
    closing = asyncio.create_task(silent_manager.aclose())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not source.closed

    source.may_revoke.set()
    await closing

    assert source.revoked == ["1"]
    assert source.closed


async def test_nothing_is_revoked_by_a_manager_that_is_closed(silent_manager, source):
    stamp = await silent_manager.stamp()
    stamp.hold()
    await rotate(silent_manager)
    await silent_manager.aclose()

    stamp.let_go()

    assert not tasks_of_ours()
    assert source.revoked == []


async def test_calling_a_manager_gives_the_password(manager):
    assert await manager() == secret("1")


async def test_an_event_that_warns_of_a_login_reaches_observers(manager, source, observer, clock):
    event = RefreshTokenExpiring(at=clock.now(), provider="Source", expires_at=clock.now(), advice="log in again")

    source.report(event)

    assert observer.of(RefreshTokenExpiring) == [event]
