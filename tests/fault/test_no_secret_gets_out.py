"""The planted secret is in nothing that a pool in trouble says, shows or leaves behind.

conftest.py searches every log record, event, credential, caught exception and output of the whole suite; this is
for what nobody catches or prints.
"""

from __future__ import annotations

import asyncio
import logging
import traceback

import anyio
import asyncpg
import pytest
from fault_world import LIFETIME, PATIENCE, World
from support import assert_no_secret, find_secret, secret

import asyncpool_creds
from asyncpool_creds import CredentialPool, ProviderError, TokenManager, log_event

pytestmark = pytest.mark.anyio


def shown(pool: CredentialPool[asyncpg.Record]) -> list[object]:
    """Return everything of a pool that somebody may print."""
    manager = pool.manager
    tasks = asyncio.all_tasks()
    return [
        pool,
        pool.stats(),
        manager,
        manager.stats(),
        manager.current,
        *map(repr, tasks),
        *(repr(task.get_stack()) for task in tasks),
    ]


async def test_a_pool_that_meets_every_trouble_shows_no_token(world: World, caplog):
    caplog.set_level(logging.DEBUG)
    pool = await world.pool(world.manager(on_event=(log_event, world.observer)), min_size=1, on_event=log_event)
    errors: list[BaseException] = []

    async def attempt():
        try:
            with anyio.fail_after(PATIENCE):
                await pool.fetchval("SELECT 1", timeout=1.0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be clean
            errors.append(error)
        assert_no_secret(*shown(pool))

    await attempt()
    for sqlstate, message in (("28000", "PAM said no"), ("28P01", "password"), ("53300", "full"), ("XX000", "broken")):
        world.door.refuse_with(sqlstate, message)
        await pool.expire_connections()
        await attempt()
        world.door.clear_faults()
        world.clock.advance(100.0)
    for failure in (ProviderError("down"), RuntimeError("boom"), ProviderError("denied", retryable=False)):
        world.provider.play(failure)
        world.clock.advance(LIFETIME)
        await attempt()
    world.provider.play(world.mint)
    world.clock.advance(LIFETIME)
    await attempt()

    assert len(errors) == 7
    assert_no_secret(*errors, *world.observer.events, *caplog.records)
    assert_no_secret(*("".join(traceback.format_exception(error)) for error in errors))
    await world.assert_serves(pool)
    await world.assert_closes(pool)
    assert_no_secret(pool, pool.manager, pool.stats())


async def test_a_source_that_quotes_its_token_in_an_error_is_not_quoted_again(world, caplog, leak_detector):
    caplog.set_level(logging.DEBUG)
    quoted = secret("in-the-error")

    async def leak():
        raise RuntimeError(f"POST /token?password={quoted} failed")

    manager = world.manager(leak, on_event=(log_event, world.observer))
    with anyio.fail_after(PATIENCE):
        try:
            await manager.get()
        except asyncpool_creds.CredentialExpired as expired:
            # The source's own words are its own, in a traceback, too; ours are without them.
            ours = [str(expired), repr(expired), str(expired.__cause__), repr(expired.__cause__)]
    assert_no_secret(*ours, *world.observer.events, *(record.getMessage() for record in caplog.records))
    assert all("exc_info of LogRecord" in leak for leak in leak_detector.take_leaks())


async def test_what_a_source_returned_by_mistake_is_not_shown(world):
    class Token:
        def __repr__(self):
            return secret("in-a-repr")

    for mistake in (lambda: [Token()], lambda: {"access_token": secret()}, lambda: secret().encode()):
        manager = TokenManager(mistake, on_event=world.observer, clock=world.clock)
        with pytest.raises(asyncpool_creds.CredentialExpired):
            await manager.get()
        await manager.aclose()
        assert_no_secret(manager, *world.observer.events)


async def test_asyncpgs_query_logger_and_parameters_do_not_show_the_token(world):
    logged = []
    pool = await world.pool(min_size=1)
    async with pool.acquire() as connection:
        with connection.query_logger(logged.append):
            await connection.fetchval("SELECT 1")
        await world.until(lambda: bool(logged))

        assert_no_secret(*map(repr, logged), repr(connection), repr(connection._params))
    await world.assert_closes(pool)


async def test_a_planted_secret_would_have_been_found(world):
    """The search is worth nothing if it cannot see what it looks for."""
    error = RuntimeError("no")
    error.add_note(secret("in a note"))

    assert find_secret(error) is not None
    assert find_secret({"deep": [error]}) is not None
