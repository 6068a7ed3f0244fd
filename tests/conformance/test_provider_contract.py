"""What holds for every source of credentials; a new one adds its case to tests/provider_cases."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from provider_cases import Case, Source, all_cases
from support import assert_no_secret

from asyncpool_creds import Credential, CredentialProvider, ProviderError, TokenManager
from asyncpool_creds._provider import close_provider

pytestmark = pytest.mark.anyio

CASES = all_cases()


@pytest.fixture(params=CASES)
async def case(request: pytest.FixtureRequest, anyio_backend: object) -> AsyncIterator[Case]:
    async with CASES[request.param]() as made:
        yield made


@pytest.fixture(params=[name for name in CASES if name != "function"])
async def provider_case(request: pytest.FixtureRequest, anyio_backend: object) -> AsyncIterator[Case]:
    """What is a provider by itself, and not for a manager only."""
    async with CASES[request.param]() as made:
        yield made


def manager_of(source: Source) -> TokenManager:
    return TokenManager(source, background=False, on_event=[])


def provider_of(case: Case) -> CredentialProvider:
    assert isinstance(case.source, CredentialProvider)
    return case.source


async def other_tasks() -> set[asyncio.Task[object]]:
    """Return the tasks that are left once those that can end have ended."""
    for _ in range(20):
        await asyncio.sleep(0)
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_it_gives_a_credential_that_ends_in_aware_utc(case: Case) -> None:
    async with manager_of(case.source) as manager:
        credential = await manager.get()

    assert isinstance(credential, Credential)
    if case.lives_for_ever:
        assert credential.expires_at is None
        return
    assert credential.expires_at is not None
    assert credential.expires_at.tzinfo is UTC
    assert timedelta(minutes=4) < credential.expires_at - datetime.now(UTC) <= timedelta(minutes=5)


async def test_whatever_goes_wrong_is_a_provider_error_with_its_cause(case: Case) -> None:
    async with manager_of(case.source) as manager:
        await case.fail()

        with pytest.raises(ProviderError) as caught:
            await manager.refresh()

        assert caught.value.retryable is not case.fails_for_good
        assert caught.value.__cause__ is not None


async def test_it_works_again_after_a_failure(case: Case) -> None:
    async with manager_of(case.source) as manager:
        await case.fail()
        with pytest.raises(ProviderError):
            await manager.refresh()
        await case.heal()

        assert await manager.refresh() == manager.current


async def test_a_fetch_that_is_given_up_leaves_no_task(case: Case) -> None:
    before = await other_tasks()
    manager = manager_of(case.source)
    case.hang()
    waiter = asyncio.create_task(manager.get())
    await case.hangs()

    waiter.cancel()
    await asyncio.wait([waiter])
    closing = asyncio.create_task(manager.aclose())
    await case.heal()
    await closing

    assert await other_tasks() - before == set()


async def test_a_cancelled_fetch_is_cancelled_and_the_next_one_works(provider_case: Case) -> None:
    provider = provider_of(provider_case)
    provider_case.hang()
    fetch = asyncio.create_task(provider.fetch())
    await provider_case.hangs()

    fetch.cancel()
    await asyncio.wait([fetch])

    assert fetch.cancelled()
    await provider_case.heal()
    assert (await provider.fetch()).password


async def test_closing_twice_is_closing(case: Case) -> None:
    manager = manager_of(case.source)
    await manager.get()

    await manager.aclose()
    await manager.aclose()
    if isinstance(case.source, CredentialProvider):
        await close_provider(case.source)
        await close_provider(case.source)


async def test_after_closing_it_works_or_says_what_is_wrong(provider_case: Case) -> None:
    provider = provider_of(provider_case)
    await provider.fetch()
    await close_provider(provider)

    try:
        answer: object = await provider.fetch()
    except (ProviderError, RuntimeError) as error:
        answer = str(error)

    assert isinstance(answer, Credential) or "aclose" in str(answer)


async def test_neither_the_source_nor_its_manager_shows_a_secret(case: Case) -> None:
    async with manager_of(case.source) as manager:
        await manager.get()

        assert_no_secret(repr(case.source), str(case.source), repr(manager), manager.stats(), manager.name)
        with pytest.raises((TypeError, pickle.PicklingError, AttributeError)):
            pickle.dumps(case.source)


async def test_one_call_at_a_time_is_all_a_manager_makes(case: Case) -> None:
    async with manager_of(case.source) as manager:
        credentials = await asyncio.gather(*(manager.refresh() for _ in range(100)))

        assert len({id(credential) for credential in credentials}) == 1
        assert manager.stats().fetches == 2
