"""Keyword arguments that nobody takes fail when a pool is made, with advice."""

from __future__ import annotations

import functools
import unittest.mock

import asyncpg
import pytest

from asyncpool_creds import TokenManager, connect, create_pool

pytestmark = pytest.mark.anyio

DSN = "postgresql://app@localhost/db"


def never_asked() -> str:
    raise AssertionError


@pytest.fixture(params=[never_asked, None], ids=["credentials", "plain"])
def credentials(request):
    return request.param


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("comand_timeout", "did you mean 'command_timeout'?"),
        ("statement_cache", "did you mean 'statement_cache_size'?"),
        ("max_lifetme", "did you mean 'max_lifetime'?"),
        ("on_events", "did you mean 'on_event'?"),
        ("dbname", "did you mean 'database'?"),
        ("sslmode", "did you mean 'ssl'?"),
        ("application_name", "did you mean 'server_settings'?"),
        ("refresh_threshold", ": refresh_threshold is an argument of TokenManager: credentials=TokenManager(..., "),
        ("default_lifetme", "did you mean 'default_lifetime'? default_lifetime is an argument of TokenManager: "),
        ("wibble", "unexpected keyword argument 'wibble'"),
    ],
)
async def test_a_keyword_that_nobody_takes_fails_when_the_pool_is_made(credentials, keyword, advice):
    with pytest.raises(TypeError) as caught:
        create_pool(DSN, credentials=credentials, **{keyword: 5})

    assert advice in str(caught.value)
    assert str(caught.value).startswith(f"create_pool() got an unexpected keyword argument {keyword!r}")


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("comand_timeout", "did you mean 'command_timeout'?"),
        ("min_size", ": min_size is an argument of create_pool"),
        ("max_lifetme", "did you mean 'max_lifetime'? max_lifetime is an argument of create_pool"),
        ("refresh_threshold", ": refresh_threshold is an argument of TokenManager: credentials=TokenManager(..., "),
    ],
)
async def test_a_keyword_that_nobody_takes_fails_in_connect_before_a_token_is_fetched(credentials, keyword, advice):
    with pytest.raises(TypeError) as caught:
        await connect(DSN, credentials=credentials, **{keyword: 5})

    assert advice in str(caught.value)
    assert str(caught.value).startswith(f"connect() got an unexpected keyword argument {keyword!r}")


async def test_every_argument_of_the_managers_own_is_known_by_its_place():
    for name in ("background", "fetch_timeout", "min_validity", "default_lifetime", "clock"):
        with pytest.raises(TypeError, match=f"{name} is an argument of TokenManager"):
            create_pool(DSN, credentials=TokenManager(never_asked), **{name: 5})


async def test_arguments_that_are_set_later_are_checked_as_they_are_set():
    pool = create_pool(DSN, credentials=never_asked, min_size=0)

    with pytest.raises(TypeError, match=r"set_connect_args\(\) got an unexpected .*did you mean 'command_timeout'"):
        pool.set_connect_args(DSN, comand_timeout=5)

    pool.set_connect_args(DSN, command_timeout=5)


async def test_what_asyncpg_takes_is_taken(credentials):
    create_pool(
        DSN,
        credentials=credentials,
        timeout=3,
        command_timeout=4,
        statement_cache_size=0,
        ssl="require",
        krbsrvname="x",
    )


# asyncpg.connect as tracers leave it


async def real(*arguments, **keywords):
    raise AssertionError


@pytest.fixture
def patch(monkeypatch):
    return functools.partial(monkeypatch.setattr, asyncpg, "connect")


async def test_a_tracer_that_says_what_it_wraps_is_looked_through(patch, credentials):
    @functools.wraps(asyncpg.connect)
    async def traced(*arguments, tenant=None, **keywords):
        raise AssertionError

    patch(traced)

    create_pool(DSN, credentials=credentials, tenant="a", timeout=5)
    with pytest.raises(TypeError, match="did you mean 'tenant'"):
        create_pool(DSN, credentials=credentials, tennant="a")
    with pytest.raises(TypeError, match="did you mean 'command_timeout'"):
        create_pool(DSN, credentials=credentials, comand_timeout=5)


@pytest.mark.parametrize(
    "opaque",
    [real, unittest.mock.AsyncMock(), unittest.mock.MagicMock(), functools.partial(real, timeout=5)],
    ids=["wrapper", "async mock", "mock", "partial"],
)
async def test_a_tracer_that_takes_anything_is_not_second_guessed(patch, credentials, opaque):
    patch(opaque)

    create_pool(DSN, credentials=credentials, comand_timeout=5)
    create_pool(DSN, credentials=credentials, connect=opaque, comand_timeout=5)


async def test_a_wrapper_that_wraps_itself_ends_nothing(patch, credentials):
    async def odd(*arguments, **keywords):
        raise AssertionError

    odd.__wrapped__ = odd
    patch(odd)

    create_pool(DSN, credentials=credentials, anything=5)


async def test_asyncpgs_create_pool_may_be_replaced_by_ours(monkeypatch, credentials):
    monkeypatch.setattr(asyncpg, "create_pool", create_pool)

    create_pool(DSN, credentials=credentials)


# A connect= of the user's own


async def by_tenant(dsn, *, tenant, password=None, loop, connection_class, record_class):
    raise AssertionError


async def test_a_connect_that_says_what_it_takes_is_believed(credentials):
    create_pool(DSN, credentials=credentials, connect=by_tenant, tenant="a")

    with pytest.raises(TypeError, match="did you mean 'tenant'"):
        create_pool(DSN, credentials=credentials, connect=by_tenant, tennant="a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'command_timeout'"):
        create_pool(DSN, credentials=credentials, connect=by_tenant, tenant="a", command_timeout=5)


async def test_a_connect_that_does_not_take_what_it_is_called_with_is_told():
    async def without_password(dsn, *, loop, connection_class, record_class):
        raise AssertionError

    async def with_nothing(dsn):
        raise AssertionError

    create_pool(DSN, connect=without_password)
    with pytest.raises(TypeError, match=r"connect= takes no password=.*as \*\*keywords does"):
        create_pool(DSN, credentials=never_asked, connect=without_password)
    with pytest.raises(TypeError, match="connect= takes no loop="):
        create_pool(DSN, connect=with_nothing)


async def test_a_partial_of_asyncpgs_connect_takes_what_that_takes(credentials):
    mine = functools.partial(asyncpg.connect, timeout=5)

    create_pool(DSN, credentials=credentials, connect=mine, timeout=6)
    with pytest.raises(TypeError, match="did you mean 'timeout'"):
        create_pool(DSN, credentials=credentials, connect=mine, timout=6)


async def test_a_connect_that_cannot_be_called_is_refused(credentials):
    with pytest.raises(TypeError, match=r"connect must be a coroutine function, .* not str"):
        create_pool(DSN, credentials=credentials, connect="asyncpg")
