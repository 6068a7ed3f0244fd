"""What the token for a connect costs: ours, and those of the connectors that Amazon and Google give to their users."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Generator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol, TypeAlias, cast

from asyncpool_creds import TokenManager
from benchmarks.figures import Figure, Round, Row, ratios, series
from benchmarks.rounds import Cell, Conditions, play, repeated

__all__ = ["CELLS"]

_DSQL_HOST: Final = "cluster.dsql.eu-west-1.on.aws"
_RDS_HOST: Final = "db.abc123.eu-west-1.rds.amazonaws.com"
_INSTANCE: Final = ("project", "region", "instance")
# Keys that open nothing; and nobody else's, and no question to a network.
_ENVIRONMENT: Final = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}

_GET: Final = "TokenManager.get(), fresh"
_DSQL: Final = "AuroraDSQL.fetch()"
_RDS: Final = "RDSIAM.fetch()"
_DSQL_CONNECTOR: Final = "Aurora DSQL connector"
_CLOUD_SQL_CONNECTOR: Final = "Cloud SQL connector, fresh"

# A token of ours is not dearer than one of Amazon's own connector.
_FLOOR: Final = 1.0


async def _measure(conditions: Conditions) -> tuple[Row, ...]:
    from asyncpool_creds.providers.aws import RDSIAM, AuroraDSQL  # noqa: PLC0415 - what the cell requires

    with _environment():
        dsql = AuroraDSQL(_DSQL_HOST, "app")
        rds = RDSIAM(_RDS_HOST, user="app")
        cache = await _filled_cache()
        try:
            async with TokenManager(dsql) as manager:

                async def connector_of_cloud_sql() -> object:
                    information = await cache.connect_info()
                    # Made at the first connect, and kept.
                    return await information.create_ssl_context(enable_iam_auth=True)

                contenders = {
                    _GET: repeated(manager.get, 2_000),
                    _DSQL: repeated(dsql.fetch, 20),
                    _RDS: repeated(rds.fetch, 20),
                    _DSQL_CONNECTOR: repeated(_connector_of_dsql(), 1),
                    _CLOUD_SQL_CONNECTOR: repeated(connector_of_cloud_sql, 2_000),
                }
                for measurement in contenders.values():
                    await measurement()  # finds the keys, reads the files
                rounds = await play(contenders, conditions.effort.bursts, conditions)
        finally:
            await cache.close()
    return tuple(_row(rounds, name) for name in contenders)


def _row(rounds: list[Round], name: str) -> Row:
    # Ratios are of CPU time: nothing is waited for here.
    figures = [
        Figure("µs a connect", series(rounds, name, "wall", 1e6)),
        Figure("CPU µs a connect", series(rounds, name, "cpu", 1e6)),
    ]
    if name in (_GET, _DSQL):
        speed = ratios(rounds, _DSQL_CONNECTOR, name, "cpu")
        figures.append(Figure("speed, DSQL connector = 1", speed, at_least=_FLOOR, better="higher"))
    if name == _GET:
        speed = ratios(rounds, _CLOUD_SQL_CONNECTOR, name, "cpu")
        figures.append(Figure("speed, Cloud SQL connector = 1", speed, better="higher"))
    return Row(name, tuple(figures))


@contextlib.contextmanager
def _environment() -> Generator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# Amazon's

_Parse: TypeAlias = Callable[[str | None, dict[str, Any], str], object]


def _connector_of_dsql() -> Callable[[], Awaitable[object]]:
    """Return what the ``connect`` of its pool does before it connects; it computes and does not await."""
    # It ships no types; that it is there is what the cell requires.
    from dsql_core.connection_utils import (  # type: ignore[import-untyped]  # noqa: PLC0415
        ConnectionUtilities,  # pyright: ignore[reportUnknownVariableType]
    )

    parse = cast("_Parse", ConnectionUtilities.parse_properties_and_set_token)

    async def arguments() -> object:
        return parse(None, {"host": _DSQL_HOST, "user": "app"}, "asyncpg")

    return arguments


# Google's


class _Information(Protocol):
    async def create_ssl_context(self, enable_iam_auth: bool = False) -> object: ...


class _Cache(Protocol):
    async def connect_info(self) -> _Information: ...

    async def close(self) -> None: ...


async def _filled_cache() -> _Cache:
    """Return what the connector looks into for each connect, filled: filling it takes Google's Admin API."""
    import trustme  # noqa: PLC0415
    from google.cloud.sql.connector.connection_info import ConnectionInfo  # noqa: PLC0415
    from google.cloud.sql.connector.connection_name import ConnectionName  # noqa: PLC0415
    from google.cloud.sql.connector.instance import RefreshAheadCache  # noqa: PLC0415

    authority = trustme.CA()
    certificate = authority.issue_cert("instance.example.com")
    name = ConnectionName(*_INSTANCE)
    information = ConnectionInfo(
        conn_name=name,
        client_cert=certificate.cert_chain_pems[0].bytes().decode(),
        server_ca_cert=authority.cert_pem.bytes().decode(),
        private_key=certificate.private_key_pem.bytes(),
        ip_addrs={"PRIMARY": "192.0.2.1"},
        database_version="POSTGRES_17",
        expiration=datetime.now(UTC) + timedelta(hours=1),
    )

    class Client:
        async def get_connection_info(self, *_: object) -> ConnectionInfo:
            return information

    keys: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    keys.set_result(None)
    cache = cast("Callable[..., _Cache]", RefreshAheadCache)(name, Client(), keys, enable_iam_auth=True)
    await cache.connect_info()
    return cache


CELLS: Final = (
    Cell(
        name="token",
        group="token for a connect",
        meaning="what a connect does for its token, offline: it is signed with keys that open nothing, or in a cache",
        rounds=lambda effort: effort.bursts,
        measure=_measure,
        requires=("aiobotocore", "aurora-dsql-python-connector", "cloud-sql-python-connector"),
    ),
)
