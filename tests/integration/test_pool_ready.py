"""What a pool says once it has been initialised."""

import logging

import asyncpg
import pytest
from support import secret

from asyncpool_creds import PoolReady, create_pool
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider

pytestmark = pytest.mark.anyio


async def ready(**arguments):
    observer = RecordingObserver()
    async with create_pool(arguments.pop("dsn"), on_event=observer, **arguments):
        (event,) = observer.of(PoolReady)
        return event


def facts(event):
    return event.name, event.provider, event.lifetime, event.tls, event.size


async def test_a_pool_that_is_ready_says_where_it_leads_and_by_what(cloud):
    event = await ready(dsn=cloud.dsn(), credentials=cloud.manager(), min_size=2, max_size=5)

    name = f"app@127.0.0.1:{cloud.door.port}/postgres"
    assert facts(event) == (name, "ScriptedProvider", 600.0, "none", 2)
    assert event.at == cloud.clock.now()


async def test_a_credential_without_an_end_has_no_lifetime(cloud):
    cloud.provider.play(None)

    assert (await ready(dsn=cloud.dsn(), credentials=cloud.manager(), min_size=1)).lifetime is None


async def test_a_shared_managers_credential_has_its_whole_life_though_a_part_is_over(cloud):
    manager = cloud.manager()
    await manager.start()
    cloud.clock.advance(100)

    assert (await ready(dsn=cloud.dsn(), credentials=manager, min_size=1)).lifetime == 600.0


async def test_a_pool_that_opens_nothing_yet_has_asked_nobody(cloud):
    event = await ready(dsn=cloud.dsn(), credentials=cloud.manager(), min_size=0)

    assert (event.provider, event.lifetime, event.tls, event.size) == ("ScriptedProvider", None, "none", 0)
    assert cloud.provider.calls == 0


async def test_a_pool_without_credentials_is_ready_too_and_hides_its_password(cloud, server):
    cloud.provider.play(None)
    token = (await cloud.provider.fetch()).password
    event = await ready(dsn=cloud.dsn(), password=token, min_size=1)

    assert (event.provider, event.lifetime, event.size) == (None, None, 1)
    assert token not in repr(event)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(("sslmode", "tls"), [("require", "unverified"), ("verify-full", "verified")])
async def test_tls_is_verified_if_the_servers_name_is(tls_cloud, size, sslmode, tls):
    dsn = tls_cloud.door.dsn(sslmode=sslmode)

    assert (await ready(dsn=dsn, credentials=tls_cloud.manager(), min_size=size)).tls == tls


async def test_several_hosts_are_all_named(cloud):
    event = await ready(
        dsn="postgresql://app@127.0.0.1:1,[::1]:2/shop", credentials=cloud.manager(), min_size=0, ssl="disable"
    )

    assert event.name == "app@127.0.0.1:1,[::1]:2/shop"


@pytest.mark.parametrize("with_credentials", [True, False])
async def test_a_unix_socket_is_local(cloud, with_credentials):
    arguments = {"host": "/var/run/postgresql", "user": "app", "database": "shop", "min_size": 0}
    if with_credentials:
        arguments["credentials"] = cloud.manager()

    event = await ready(dsn=None, **arguments)

    assert (event.name, event.tls) == ("app@/var/run/postgresql:5432/shop", "local")


async def test_arguments_of_a_connect_of_the_users_own_do_not_keep_a_pool_from_opening(cloud):
    async def connect(*arguments, **keywords):
        raise AssertionError

    event = await ready(dsn="instance-of-mine", connect=connect, min_size=0, ssl="as they like it")

    assert (event.name, event.tls) == ("unknown", "none")


async def test_a_pool_that_is_ready_is_a_line_at_info(cloud, caplog):
    caplog.set_level(logging.INFO, logger="asyncpool_creds")
    provider = ScriptedProvider(899.7, clock=cloud.clock, prefix=secret())
    cloud.provider = provider
    async with create_pool(cloud.dsn(), credentials=cloud.manager(), min_size=1):
        pass

    (line,) = [one.getMessage() for one in caplog.records if isinstance(one.event, PoolReady)]
    assert line == (
        f'Pool "app@127.0.0.1:{cloud.door.port}/postgres" is ready: 1 connection, '
        'credentials of "ScriptedProvider" that live for 15 min, no TLS.'
    )


async def test_a_pool_that_could_not_be_opened_is_not_ready(cloud):
    observer = RecordingObserver()
    cloud.refuses_all = True

    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await create_pool(cloud.dsn(), credentials=cloud.manager(), min_size=1, on_event=observer)

    assert observer.of(PoolReady) == []
