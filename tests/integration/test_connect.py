"""A single connection, opened with a credential that is current."""

import asyncio
import traceback

import asyncpg
import pytest
from support import assert_no_secret, secret

from asyncpool_creds import (
    Credential,
    CredentialExpired,
    CredentialRefreshed,
    CredentialRefused,
    ProviderError,
    connect,
)
from asyncpool_creds.testing import ScriptedProvider
from asyncpool_creds.testing.door import Stage

pytestmark = pytest.mark.anyio


async def test_a_connection_is_asyncpgs_own_and_opened_with_the_credential(cloud):
    connection = await connect(cloud.dsn(), credentials=cloud.provider, server_settings={"application_name": "one"})

    assert type(connection) is asyncpg.Connection
    assert await connection.fetchval("SHOW application_name") == "one"
    assert cloud.presented == [1]
    assert_no_secret(repr(connection), repr(connection._params))
    await connection.close()


async def test_a_provider_is_asked_once_and_closed(cloud):
    connection = await connect(cloud.dsn(), credentials=cloud.provider)

    assert (cloud.provider.calls, cloud.provider.closed) == (1, 1)
    await connection.close()


async def test_a_provider_is_closed_after_a_failure_too(cloud):
    cloud.door.refuse_with("3D000", 'database "gone" does not exist')

    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await connect(cloud.dsn(), credentials=cloud.provider)

    assert cloud.provider.closed == 1


async def test_a_provider_is_closed_when_the_connect_is_cancelled(cloud):
    cloud.door.hang_at(Stage.VERIFY)
    connecting = asyncio.create_task(connect(cloud.dsn(), credentials=cloud.provider))
    await cloud.door.reached(Stage.VERIFY)

    connecting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert cloud.provider.closed == 1


async def test_a_manager_stays_open_and_serves_several(cloud):
    manager = cloud.manager()

    connections = [await connect(cloud.dsn(), credentials=manager) for _ in range(2)]

    assert (cloud.presented, cloud.provider.calls, cloud.provider.closed) == ([1, 1], 1, 0)
    for connection in connections:
        await connection.close()


async def test_a_function_will_do(cloud):
    async def fetch():
        return (await cloud.provider.fetch()).password

    connection = await connect(cloud.dsn(), credentials=fetch)

    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_a_refused_credential_is_fetched_anew_once(cloud, observer):
    cloud.refused.add(1)

    connection = await connect(cloud.dsn(), credentials=cloud.provider, on_event=observer)

    assert cloud.presented == [1, 2]
    assert len(observer.of(CredentialRefreshed)) == 2
    assert [event.retrying for event in observer.of(CredentialRefused)] == [True]
    await connection.close()


async def test_the_classifier_can_be_replaced(cloud):
    cloud.refused.add(1)

    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await connect(cloud.dsn(), credentials=cloud.provider, is_refusal=lambda _: False)

    assert cloud.presented == [1]


async def test_a_source_that_fails_is_one_typed_error(cloud):
    cloud.provider.play(ProviderError("access denied", retryable=False))

    with pytest.raises(CredentialExpired, match="access denied"):
        await connect(cloud.dsn(), credentials=cloud.provider)

    assert (cloud.door.attempts, cloud.provider.closed) == (0, 1)


async def test_the_user_of_the_credential_comes_before_that_of_the_dsn(cloud):
    cloud.provider.play(Credential(secret(), user="reporter"))

    connection = await connect(cloud.dsn(), credentials=cloud.provider)

    assert await connection.fetchval("SELECT current_user") == "reporter"
    await connection.close()


async def test_a_bindable_provider_is_bound_to_the_host(cloud):
    class PerHost:
        def bind(self, target):
            self.target = target
            return cloud.provider

    source = PerHost()

    connection = await connect(cloud.dsn(), credentials=source)

    assert (source.target.host, source.target.port, source.target.user) == ("127.0.0.1", cloud.door.port, "app")
    assert (cloud.provider.calls, cloud.provider.closed) == (1, 1)
    await connection.close()


async def test_without_credentials_it_is_asyncpgs_connect(server):
    connection = await connect(server.dsn(), server_settings={"application_name": "plain"})

    assert await connection.fetchval("SHOW application_name") == "plain"
    await connection.close()


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"credentials": 5}, TypeError, "credentials"),
        ({"credentials": ScriptedProvider}, TypeError, "credentials"),
        ({"password": secret()}, ValueError, "password="),
        ({"on_event": 5}, TypeError, "on_event"),
        ({"on_event": [5]}, TypeError, "on_event"),
        ({"require_tls": "yes"}, ValueError, "require_tls"),
        ({"is_refusal": "28000"}, TypeError, "is_refusal"),
    ],
)
async def test_a_bad_argument_is_named_and_nothing_is_opened(cloud, keywords, kind, message):
    with pytest.raises(kind, match=message):
        await connect(cloud.dsn(), **{"credentials": cloud.provider, **keywords})

    assert (cloud.door.attempts, cloud.provider.calls) == (0, 0)


async def test_no_frame_of_a_failed_connect_keeps_the_secret(cloud):
    cloud.refuses_all = True

    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as caught:
        await connect(cloud.dsn(), credentials=cloud.manager())

    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "connect_utils" in shown
    assert_no_secret(shown)
