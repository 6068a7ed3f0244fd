"""Chains in pools, where what names its server is bound to it."""

from __future__ import annotations

import pytest

from asyncpool_creds import ProviderError, connect
from asyncpool_creds.providers.chain import Chain
from asyncpool_creds.providers.env import Environment

pytestmark = pytest.mark.anyio


class PerServer:
    """A source whose tokens name their server."""

    session_lifetime = 900.0

    def __init__(self, tokens):
        self.tokens = tokens
        self.targets = []

    def bind(self, target):
        self.targets.append(target)
        return self.tokens


@pytest.fixture
def per_server(cloud):
    return PerServer(cloud.provider)


async def test_a_pool_binds_a_chain_to_its_server(cloud, per_server):
    chain = Chain(Environment("A_VARIABLE_NOBODY_SETS"), per_server)

    async with cloud.pool(credentials=chain, max_size=2) as pool:
        assert await pool.fetchval("SELECT current_user::text") == "app"

    assert [(target.host, target.port, target.user) for target in per_server.targets] == [
        ("127.0.0.1", cloud.door.port, "app")
    ]
    assert (cloud.provider.calls, cloud.provider.closed) == (1, 1)


async def test_a_connection_binds_a_chain_to_its_server(cloud, per_server):
    connection = await connect(cloud.dsn(), credentials=Chain(per_server))

    assert [target.port for target in per_server.targets] == [cloud.door.port]
    await connection.close()


async def test_a_pool_takes_the_next_source_if_the_bound_one_fails(cloud, per_server):
    per_server.tokens = Environment("A_VARIABLE_NOBODY_SETS")

    async with cloud.pool(credentials=Chain(per_server, cloud.provider)) as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_pool_without_any_source_says_what_each_of_them_said(cloud, per_server, monkeypatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    cloud.provider.play(ProviderError("token service: no such role", retryable=False))

    with pytest.raises(Exception, match=r"no source gave a credential: 1\. ScriptedProvider: token service") as caught:
        async with cloud.pool(credentials=Chain(per_server, Environment())):
            pass

    assert "2. Environment: environment: PGPASSWORD is not set" in str(caught.value)
