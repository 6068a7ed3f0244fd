"""Amazon Web Services: tokens of RDS and Aurora DSQL, secrets of Secrets Manager, passwords of Redshift."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TypeVar, cast
from urllib.parse import urlencode

import anyio
import anyio.to_thread

# botocore and aiobotocore ship no types: what is used of them is behind the protocols at the end of this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
try:
    from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]
    from botocore import exceptions as botocore_exceptions  # type: ignore[import-untyped]
    from botocore.auth import SigV4QueryAuth  # type: ignore[import-untyped]
    from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
    from botocore.loaders import JSONFileLoader  # type: ignore[import-untyped]
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the sources of AWS need aiobotocore: pip install 'asyncpool-creds[aws]'") from _missing

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds._provider import Target
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._document import parse_object
from asyncpool_creds.providers._retry_after import parse_retry_after

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["RDSIAM", "AuroraDSQL", "Redshift", "SecretsManager"]

_POSTGRESQL_PORT: Final = 5432
# "Each token has a lifetime of 15 minutes" (Amazon RDS User Guide, "IAM database authentication").
_RDS_TOKEN_LIFETIME: Final = 900
# A quarter of an hour by default, a week at most (Aurora DSQL User Guide, "Generating an authentication token").
_DSQL_TOKEN_LIFETIME: Final = 900.0
_LONGEST_DSQL_TOKEN_LIFETIME: Final = 604_800
# Amazon Redshift API Reference, GetClusterCredentials: DurationSeconds.
_REDSHIFT_LIFETIMES: Final = (900, 3600)
# Of one attempt to connect, and of one wait for an answer.
_TIMEOUT: Final = 10.0
# botocore's name for the instance metadata service, and the latest that it makes up for the end of such credentials:
# where they are about to end it says "in 17 to 25 minutes", whatever the service said, to bridge its outages
# (InstanceMetadataFetcher._evaluate_expiration). All that is certain then is that new ones are there five minutes
# before the old ones end (Amazon EC2 User Guide, "Retrieve security credentials from instance metadata").
_INSTANCE_METADATA: Final = "iam-role"
_MADE_UP_END: Final = timedelta(minutes=25)
_CERTAIN_LIFE: Final = timedelta(minutes=5)

_REGION: Final = r"(?P<{}>[a-z]{{2,4}}(?:-[a-z]+)+-\d+)"
# The region comes before "rds"; in GovCloud and older names of China, after it. The domains are those of the partitions
# in botocore's partitions.json.
_AWS_DOMAINS: Final = (
    r"(?:amazonaws\.(?:com|com\.cn|eu)|c2s\.ic\.gov|sc2s\.sgov\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)\.?$"
)
_RDS_HOST: Final = re.compile(
    rf"\.(?:{_REGION.format('before')}\.rds|rds\.{_REGION.format('after')})\.{_AWS_DOMAINS}", re.IGNORECASE
)
# Those of PrivateLink have a suffix after "dsql".
_DSQL_HOST: Final = re.compile(rf"\.dsql(?:-[a-z0-9]+)?\.{_REGION.format('before')}\.on\.aws\.?$", re.IGNORECASE)
_REDSHIFT_HOST: Final = re.compile(
    rf"^(?P<name>[^.]+)\.[^.]+\.{_REGION.format('before')}\.redshift(?P<serverless>-serverless)?\.{_AWS_DOMAINS}",
    re.IGNORECASE,
)
_SECRET_ARN: Final = re.compile(rf"^arn:[^:]+:secretsmanager:{_REGION.format('before')}:")


class RDSIAM:
    """A provider of IAM tokens for RDS and Aurora, signed on this machine: no request is made for one.

    Given to ``create_pool``, it takes host, port and user from the DSN, and makes a token for each host. What is passed
    here comes first: through a tunnel, or behind a name of your own, pass the endpoint's real `host` (and `port`),
    because RDS takes tokens for that name only.

    A token ends after 15 minutes, or with the credentials that signed it. These are found, and renewed, as botocore
    does: environment, profile, assumed role, web identity, container, instance.

    Args:
        host: The endpoint of the instance, cluster or proxy.
        port: Its port; 5432 if there is no DSN to take it from.
        user: The database user; it needs the role ``rds_iam``.
        region: The region; None: as the host name says, or else the one that is configured for botocore.
        profile: A profile of the AWS configuration; None: as botocore chooses.
        clock: Where the time comes from; the machine's clocks if not given. Signatures carry the machine's time.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty, or `host` is not the name of a host alone.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        user: str | None = None,
        *,
        region: str | None = None,
        profile: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        _check_texts("RDSIAM", host=host, user=user, region=region, profile=profile)
        _check_host("RDSIAM", host)
        _check_port("RDSIAM", port)
        self._host: Final = host
        self._port: Final = port
        self._user: Final = user
        self._region: Final = region
        self._profile: Final = profile
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._account = _Account(profile)

    def bind(self, target: Target) -> RDSIAM:
        """Return a provider of tokens for `target`, which shares everything with this one.

        Raises:
            ValueError: `target` is a Unix socket, and no `host` was given.
        """
        bound = RDSIAM(
            self._host or target.host,
            self._port or target.port,
            self._user or target.user,
            region=self._region,
            profile=self._profile,
            clock=self._clock,
        )
        bound._account = self._account
        return bound

    async def fetch(self) -> Credential:
        """Return a token signed now.

        Raises:
            ProviderError: There is nothing to sign it with, or it is not known for whom it is.
        """
        host, user = _known("RDSIAM", self._host, self._user)
        region = self._region or _region_in(_RDS_HOST, host)
        address = f"{host}:{self._port or _POSTGRESQL_PORT}"
        return await self._account.sign(
            _Token("RDSIAM", "rds-db", region, address, {"Action": "connect", "DBUser": user}, _RDS_TOKEN_LIFETIME),
            user,
            self._clock,
        )

    def invalidate(self, credential: Credential) -> None:
        """Look for other credentials to sign with next time: these may have been revoked."""
        del credential
        self._account.forget()

    def __repr__(self) -> str:
        return f"<RDSIAM host={self._host!r} port={self._port!r} user={self._user!r} region={self._region!r}>"

    def __reduce__(self) -> NoReturn:
        raise _not_to_be_pickled(self)


class AuroraDSQL:
    """A provider of IAM tokens for Aurora DSQL, signed on this machine: no request is made for one.

    Host and user as with `RDSIAM`. A token is for the administrator, or for all other roles: it does not name one.

    Args:
        host: The endpoint of the cluster.
        user: The database role; one that is not ``admin`` must be granted to the IAM identity.
        admin: Make tokens for the administrator (``dsql:DbConnectAdmin``) or for the others
            (``dsql:DbConnect``); None: as `user` is ``admin`` or not.
        token_lifetime: Seconds, or a timedelta, that a token is good for: at most a week, and never longer than the
            credentials that signed it. Connections outlive their token.
        region: The region; None: as the host name says, or else the one that is configured for botocore.
        profile: A profile of the AWS configuration; None: as botocore chooses.
        clock: Where the time comes from; the machine's clocks if not given. Signatures carry the machine's time.

    Attributes:
        session_lifetime: Seconds after which DSQL ends a session; a pool makes it its ``max_lifetime``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty or out of range, or `host` is not the name of a host alone.
    """

    # Aurora DSQL User Guide, "Cluster quotas and database limits": maximum connection duration, 60 minutes.
    session_lifetime: Final = 3600.0

    def __init__(
        self,
        host: str | None = None,
        user: str | None = None,
        *,
        admin: bool | None = None,
        token_lifetime: float | timedelta = _DSQL_TOKEN_LIFETIME,
        region: str | None = None,
        profile: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        _check_texts("AuroraDSQL", host=host, user=user, region=region, profile=profile)
        _check_host("AuroraDSQL", host)
        if admin is not None and not isinstance(admin, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"AuroraDSQL: admin must be a bool or None, not {type(admin).__name__}")
        self._host: Final = host
        self._user: Final = user
        self._admin: Final = admin
        self._token_lifetime: Final = _lifetime("AuroraDSQL", token_lifetime, 1, _LONGEST_DSQL_TOKEN_LIFETIME)
        self._region: Final = region
        self._profile: Final = profile
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._account = _Account(profile)

    def bind(self, target: Target) -> AuroraDSQL:
        """Return a provider of tokens for `target`, which shares everything with this one.

        Raises:
            ValueError: `target` is a Unix socket, and no `host` was given.
        """
        bound = AuroraDSQL(
            self._host or target.host,
            self._user or target.user,
            admin=self._admin,
            token_lifetime=self._token_lifetime,
            region=self._region,
            profile=self._profile,
            clock=self._clock,
        )
        bound._account = self._account
        return bound

    async def fetch(self) -> Credential:
        """Return a token signed now.

        Raises:
            ProviderError: There is nothing to sign it with, or it is not known for whom it is.
        """
        host, user = _known("AuroraDSQL", self._host, self._user)
        region = self._region or _region_in(_DSQL_HOST, host)
        admin = user == "admin" if self._admin is None else self._admin
        action = {"Action": "DbConnectAdmin" if admin else "DbConnect"}
        return await self._account.sign(
            _Token("AuroraDSQL", "dsql", region, host, action, self._token_lifetime), user, self._clock
        )

    def invalidate(self, credential: Credential) -> None:
        """Look for other credentials to sign with next time: these may have been revoked."""
        del credential
        self._account.forget()

    def __repr__(self) -> str:
        return f"<AuroraDSQL host={self._host!r} user={self._user!r} region={self._region!r}>"

    def __reduce__(self) -> NoReturn:
        raise _not_to_be_pickled(self)


class SecretsManager:
    """A provider of the user and password in a secret, always of the version that is current (``AWSCURRENT``).

    A secret says nothing about its end, so it is looked at again every `refresh_every` seconds, and when a server
    refuses the password. A version that is known already is no rotation: no connection is replaced.

    Args:
        secret: Name or ARN of the secret.
        user_key: The key of the user in a secret that is a JSON object; the user is the connection's own where the
            secret has no such key. The default is that of the secrets which RDS manages.
        password_key: The key of the password; None: the whole secret is the password, whatever it looks like. A
            secret that is no JSON object always is.
        user: The database user, whatever the secret says.
        refresh_every: Seconds, or a timedelta, between two looks. The manager makes half a minute of less.
        region: The region; None: as the ARN says, or else the one that is configured for botocore.
        profile: A profile of the AWS configuration; None: as botocore chooses.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty or out of range.
    """

    def __init__(
        self,
        secret: str,
        *,
        user_key: str = "username",
        password_key: str | None = "password",  # noqa: S107 - the name of a key
        user: str | None = None,
        refresh_every: float | timedelta = 300.0,
        region: str | None = None,
        profile: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        _check_texts("SecretsManager", password_key=password_key, user=user, region=region, profile=profile)
        for name, value in (("secret", secret), ("user_key", user_key)):
            if value is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise TypeError(f"SecretsManager: {name} must be a str, not None")
            check_text("SecretsManager", name, value)
        self._secret: Final = secret
        self._user_key: Final = user_key
        self._password_key: Final = password_key
        self._user: Final = user
        self._refresh_every: Final = parse_seconds("SecretsManager", "refresh_every", refresh_every)
        self._region: Final = region or _region_in(_SECRET_ARN, secret)
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._account: Final = _Account(profile)

    async def fetch(self) -> Credential:
        """Return what the current version of the secret holds now.

        Raises:
            ProviderError: AWS did not give the secret, or there is no password in it.
            ProviderTimeout: AWS did not answer in time.
        """
        what = f"SecretsManager: the secret {self._secret!r} was not read"
        requested_at = _now(self._clock)
        with _explained(what, self._clock, permission="secretsmanager:GetSecretValue, and kms:Decrypt with its key"):
            client = await self._account.client(self, "secretsmanager", self._region)
            answer = await client.get_secret_value(SecretId=self._secret, VersionStage="AWSCURRENT") or {}
        user, password = self._read(answer)
        version = answer.get("VersionId")
        try:
            return Credential(
                password,
                user=user,
                refresh_at=requested_at + timedelta(seconds=self._refresh_every),
                version=version if isinstance(version, str) else None,
            )
        except ValueError:
            raise self._unusable("its password is empty, or holds characters that no server accepts") from None

    def _read(self, answer: Mapping[str, object]) -> tuple[str | None, str]:
        text = answer.get("SecretString")
        if "SecretBinary" in answer:
            raise self._unusable("it is binary; store it as a string, or as JSON")
        if not isinstance(text, str):
            raise ProviderError(
                f"SecretsManager: what AWS answered about {self._secret!r} is no secret; is it a proxy?"
            )
        document = None if self._password_key is None else parse_object(text)
        if document is None or self._password_key is None:
            return self._user, text
        password, user = document.get(self._password_key), document.get(self._user_key)
        if not isinstance(password, str):
            raise self._unusable(f"it has no string under the key {self._password_key!r}; pass password_key")
        if user is not None and not (isinstance(user, str) and user):
            raise self._unusable(f"what it has under the key {self._user_key!r} is no user; pass user_key")
        return self._user or user, password

    def _unusable(self, reason: str) -> ProviderError:
        return ProviderError(f"SecretsManager: the secret {self._secret!r} is of no use: {reason}", retryable=False)

    async def aclose(self) -> None:
        """Close the connections to AWS; a later `fetch` opens new ones."""
        await self._account.aclose(self)

    def __repr__(self) -> str:
        return f"<SecretsManager {self._secret!r} region={self._region!r}>"

    def __reduce__(self) -> NoReturn:
        raise _not_to_be_pickled(self)


class Redshift:
    """A provider of temporary users and passwords for Redshift, provisioned or serverless.

    The user that comes back is not the one that was asked for (``IAM:app``), and the pool logs in as that one. Given
    to ``create_pool``, it takes from the DSN what is not passed here: user and database, and from the name of an
    endpoint of AWS the cluster or workgroup, and the region.

    Args:
        cluster: The identifier of a provisioned cluster.
        workgroup: The name of a serverless workgroup, instead.
        user: The database user. Serverless has no use for it: IAM's identity is the user.
        database: The database to log in to; None: any, if there is no DSN either.
        auto_create: Create the user if there is none (provisioned alone).
        groups: Database groups that the user joins for the session (provisioned alone).
        token_lifetime: Seconds, or a timedelta, that a password is good for: 900 to 3600.
        region: The region; None: as the host name says, or else the one that is configured for botocore.
        profile: A profile of the AWS configuration; None: as botocore chooses.
        clock: Where the time comes from; the machine's clocks if not given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty or out of range, or does not go with another one.
    """

    def __init__(
        self,
        cluster: str | None = None,
        *,
        workgroup: str | None = None,
        user: str | None = None,
        database: str | None = None,
        auto_create: bool = False,
        groups: Sequence[str] = (),
        token_lifetime: float | timedelta = 900.0,
        region: str | None = None,
        profile: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        texts = {"cluster": cluster, "workgroup": workgroup, "user": user, "database": database}
        _check_texts("Redshift", **texts, region=region, profile=profile)
        if isinstance(groups, str) or not all(isinstance(group, str) and group for group in groups):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError("Redshift: groups must be a sequence of names")
        if cluster is not None and workgroup is not None:
            raise ValueError("Redshift: pass either cluster or workgroup")
        if workgroup is not None and (auto_create or groups):
            raise ValueError("Redshift: auto_create and groups are for provisioned clusters; leave them out")
        self._cluster: Final = cluster
        self._workgroup: Final = workgroup
        self._user: Final = user
        self._database: Final = database
        self._auto_create: Final = auto_create
        self._groups: Final = tuple(groups)
        self._token_lifetime: Final = _lifetime("Redshift", token_lifetime, *_REDSHIFT_LIFETIMES)
        self._region: Final = region
        self._profile: Final = profile
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._account = _Account(profile)

    def bind(self, target: Target) -> Redshift:
        """Return a provider for `target`, which shares everything with this one."""
        named = _REDSHIFT_HOST.search(target.host)
        cluster, workgroup, region = self._cluster, self._workgroup, self._region
        if named is not None:
            region = region or named["before"].lower()
            if cluster is None and workgroup is None and named["serverless"]:
                workgroup = named["name"].lower()
            elif cluster is None and workgroup is None:
                cluster = named["name"].lower()
        bound = Redshift(
            cluster,
            workgroup=workgroup,
            user=self._user or target.user,
            database=self._database or target.database,
            auto_create=self._auto_create,
            groups=self._groups,
            token_lifetime=self._token_lifetime,
            region=region,
            profile=self._profile,
            clock=self._clock,
        )
        bound._account = self._account
        return bound

    async def fetch(self) -> Credential:
        """Return a user and password made now; serverless gives the same until its ``nextRefreshTime``.

        Raises:
            ProviderError: AWS gave none, or it is not known for what they are.
            ProviderTimeout: AWS did not answer in time.
        """
        if self._workgroup is not None:
            return await self._ask_serverless(self._workgroup)
        if self._cluster is None:
            raise ProviderError(
                "Redshift: neither cluster nor workgroup is known, and no endpoint of AWS in a DSN to tell; "
                "pass cluster, or workgroup",
                retryable=False,
            )
        if self._user is None:
            raise ProviderError("Redshift: it is not known for which user; pass user", retryable=False)
        return await self._ask_cluster(self._cluster, self._user)

    async def _ask_cluster(self, cluster: str, user: str) -> Credential:
        request: dict[str, object] = {"ClusterIdentifier": cluster, "DbUser": user}
        request["DurationSeconds"] = self._token_lifetime
        if self._database is not None:
            request["DbName"] = self._database
        if self._auto_create:
            request["AutoCreate"] = True
        if self._groups:
            request["DbGroups"] = list(self._groups)
        what = f"Redshift: no password for {user!r} of the cluster {cluster!r}"
        permission = "redshift:GetClusterCredentials" + (", redshift:CreateClusterUser" if self._auto_create else "")
        requested_at = _now(self._clock)
        with _explained(what, self._clock, permission=permission):
            client = await self._account.client(self, "redshift", self._region)
            answer = await client.get_cluster_credentials(**request) or {}
        return self._credential(what, requested_at, answer, "DbUser", "DbPassword", "Expiration", "NextRefreshTime")

    async def _ask_serverless(self, workgroup: str) -> Credential:
        request: dict[str, object] = {"workgroupName": workgroup, "durationSeconds": self._token_lifetime}
        if self._database is not None:
            request["dbName"] = self._database
        what = f"Redshift: no password for the workgroup {workgroup!r}"
        requested_at = _now(self._clock)
        with _explained(what, self._clock, permission="redshift-serverless:GetCredentials"):
            client = await self._account.client(self, "redshift-serverless", self._region)
            answer = await client.get_credentials(**request) or {}
        return self._credential(what, requested_at, answer, "dbUser", "dbPassword", "expiration", "nextRefreshTime")

    def _credential(self, what: str, requested_at: datetime, answer: Mapping[str, object], *names: str) -> Credential:
        user, password, expires_at, refresh_at = (answer.get(name) for name in names)
        if not (isinstance(user, str) and isinstance(password, str) and isinstance(expires_at, datetime)):
            raise ProviderError(f"{what}: what AWS answered has no user, password or expiration; is it a proxy?")
        # By our own clock it is never good for longer than was asked for.
        ends = min(expires_at.astimezone(UTC), requested_at + timedelta(seconds=self._token_lifetime))
        hint = refresh_at if isinstance(refresh_at, datetime) and refresh_at < ends else None
        return Credential(password, user=user, expires_at=ends, refresh_at=hint)

    async def aclose(self) -> None:
        """Close the connections to AWS, unless others share them; a later `fetch` opens new ones."""
        await self._account.aclose(self)

    def __repr__(self) -> str:
        where = f"workgroup={self._workgroup!r}" if self._workgroup else f"cluster={self._cluster!r}"
        return f"<Redshift {where} user={self._user!r} region={self._region!r}>"

    def __reduce__(self) -> NoReturn:
        raise _not_to_be_pickled(self)


# Whoever we are to AWS


@dataclass(frozen=True, slots=True)
class _Token:
    """A token to be signed: a request for `address` that nobody sends."""

    owner: str
    service: str
    region: str | None
    address: str
    query: Mapping[str, str]
    life: int


class _Account:
    """One session of botocore, with its clients, for a provider and all that were bound from it.

    The session finds and renews the credentials that sign; it is made in a thread, because it reads files.
    """

    def __init__(self, profile: str | None) -> None:
        self._profile = profile
        self._home: tuple[int, AbstractEventLoop] | None = None
        self._session: _Session | None = None
        self._opening = threading.Lock()
        self._clients: dict[tuple[str, str], _Client] = {}
        self._users: set[object] = set()

    async def sign(self, token: _Token, user: str, clock: Clock) -> Credential:
        """Return `token`, signed; it ends no later than what signed it."""
        requested_at = _now(clock)
        with _explained(f"{token.owner}: no token for {token.address}", clock):
            session = await self._open()
            region = _region(session, token.region)
            keys = await session.get_credentials()
            if keys is None:
                raise botocore_exceptions.NoCredentialsError
            frozen = await keys.get_frozen_credentials()
            # The only place with the end of the credentials; no other task has run since they were frozen.
            ends = _end_of_keys(keys, _now(clock))
            request = _new_request(method="GET", url=f"https://{token.address}/?{urlencode(token.query)}")
            _new_signature(frozen, token.service, region, expires=token.life).add_auth(request)
        credential = Credential.from_token(request.url.removeprefix("https://"), user=user, requested_at=requested_at)
        if ends is None or credential.expires_at is None or credential.expires_at <= ends:
            return credential
        return Credential(credential.password, user=user, expires_at=ends)

    def forget(self) -> None:
        """Look for credentials anew next time."""
        self._session = None

    async def client(self, user: object, service: str, region: str | None) -> _Client:
        """Return the client for `service`, which is closed when all users have closed."""
        session = await self._open()
        region = _region(session, region)
        self._users.add(user)
        client = self._clients.get((service, region))
        if client is None:
            if await session.get_credentials() is None:
                raise botocore_exceptions.NoCredentialsError
            made = await _in_thread(lambda: _make_client(session, service, region))
            # Another user may have made one meanwhile.
            client = self._clients.setdefault((service, region), made)
            if client is not made:
                await made.close()
        return client

    async def aclose(self, user: object) -> None:
        self._users.discard(user)
        if self._users or self._home != (os.getpid(), asyncio.get_running_loop()):
            return
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()

    async def _open(self) -> _Session:
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            if self._home is not None and self._home[0] != home[0]:
                _inherited.append(self._clients)
            # What belongs to another loop can be neither awaited nor closed from this one.
            self._home, self._session, self._clients, self._users = home, None, {}, set()
            self._opening = threading.Lock()
        session = self._session
        return await _in_thread(self._open_here) if session is None else session

    def _open_here(self) -> _Session:
        with self._opening:
            if self._session is None:
                self._session = _open_session(self._profile)
            return self._session


# Clients inherited by a forked child: closing their sockets is the parent's business, so they are only kept.
_inherited: list[object] = []


def _region(session: _Session, named: str | None) -> str:
    """Return the region to work in, which becomes the session's where it has none: roles are assumed there."""
    configured = session.get_config_variable("region")
    region = named or (configured if isinstance(configured, str) else None)
    if region is None:
        raise botocore_exceptions.NoRegionError
    if configured is None:
        session.set_config_variable("region", region)
    return region


def _end_of_keys(keys: _Keys, now: datetime) -> datetime | None:
    # botocore tells it nowhere else.
    ends: object = getattr(keys, "_expiry_time", None)
    if not isinstance(ends, datetime):
        return None
    if keys.method == _INSTANCE_METADATA and ends - now < _MADE_UP_END:
        return min(ends, now + _CERTAIN_LIFE)
    return ends


# Sessions and clients

_Made = TypeVar("_Made")


def _open_session(profile: str | None) -> _Session:
    """Return a session that has read its files; takes tens of milliseconds."""
    session = _new_session(profile=profile)
    # One attempt each, because the manager is the one who tries again. The models are loaded in a thread for the
    # clients, too, that botocore makes for itself to assume a role.
    config = AioConfig(
        connect_timeout=_TIMEOUT, read_timeout=_TIMEOUT, retries={"total_max_attempts": 1}, warm_up_loader_caches=True
    )
    session.set_default_client_config(config)
    session.get_component("data_loader").file_loader = _PatientFiles()
    session.get_scoped_config()
    return session


def _make_client(session: _Session, service: str, region: str) -> _Client:
    """Return a client; takes several milliseconds, because a class is made for it with all that the service can do.

    There is no I/O in it, and nothing of it belongs to an event loop before its first request.
    """

    async def make() -> _Client:
        return await session.create_client(service, region_name=region).__aenter__()

    return asyncio.run(make())


async def _in_thread(function: Callable[[], _Made]) -> _Made:
    # With a slot of its own: whoever fills the default ones with his work does not keep us waiting.
    return await anyio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


class _PatientFiles:
    """Reads botocore's models, and lets others have the interpreter meanwhile.

    A thread is not enough: json.loads() keeps the GIL from start to end, which is 15 ms for the list of endpoints.
    """

    def __init__(self) -> None:
        self.exists: Callable[[str], bool] = JSONFileLoader().exists

    def load_file(self, file_path: str) -> object:
        """Return what is in the file of that name without its extension; None: there is none."""
        for extension, read in ((".json", open), (".json.gz", gzip.open)):
            path = Path(file_path + extension)
            if path.is_file():
                with read(path, "rb") as file:
                    return json.loads(file.read(), object_pairs_hook=_Breather())
        return None


class _Breather:
    """Makes the objects of a JSON document, and pauses after every five hundred."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self, members: list[tuple[str, object]]) -> dict[str, object]:
        self._made += 1
        if self._made % 500 == 0:
            # Not zero: whoever waits for the GIL has to wake up before we take it again.
            time.sleep(0.0001)
        return dict(members)


# At DEBUG, botocore logs requests and answers with all that is in them, and with warnings the exceptions that quote
# them. Of what it does for us, it logs neither.
_is_ours: ContextVar[bool] = ContextVar("asyncpool_creds.aws", default=False)


def _may_be_logged(record: logging.LogRecord) -> bool:
    if not _is_ours.get():
        return True
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        record.msg, record.args = f"{record.getMessage()} ({type(error).__name__}: {_line(str(error))})", None
        record.exc_info = None
    return record.levelno > logging.DEBUG


for _package in ("botocore", "aiobotocore"):
    for _module in (
        *("auth", "credentials", "endpoint", "hooks", "httpsession", "parsers", "retryhandler", "tokens", "utils"),
    ):
        logging.getLogger(f"{_package}.{_module}").addFilter(_may_be_logged)


# Errors

_LONGEST_DESCRIPTION: Final = 300
_JWT: Final = re.compile(r"eyJ[\w-]+\.[\w-]*\.?[\w-]*")
# The codes of AWS by what is to be done (AWS General Reference, "Common errors", and the pages of the operations).
_DENIED: Final = frozenset(
    {"AccessDenied", "AccessDeniedException", "NotAuthorized", "UnauthorizedException", "UnauthorizedOperation"}
)
_UNKNOWN_KEYS: Final = frozenset(
    {
        "AuthFailure",
        "IncompleteSignature",
        "IncompleteSignatureException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "OptInRequired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})
_NOT_FOUND: Final = frozenset({"ClusterNotFound", "ClusterNotFoundFault", "ResourceNotFoundException"})
_TRANSIENT: Final = frozenset(
    {
        "IDPCommunicationError",
        "InternalError",
        "InternalFailure",
        "InternalServerException",
        "InternalServiceError",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_TIMED_OUT: Final = (botocore_exceptions.ConnectTimeoutError, botocore_exceptions.ReadTimeoutError)
# What goes wrong before AWS can say anything, and whether it may pass; the first that fits. {} is what botocore says.
_PROBLEMS: Final[tuple[tuple[tuple[type[Exception], ...], str, bool], ...]] = (
    (_TIMED_OUT, f"AWS did not answer within {_TIMEOUT:g} s ({{}}); check the network", True),
    (
        (botocore_exceptions.ConnectionError, botocore_exceptions.HTTPClientError),
        "AWS cannot be reached ({}); check network, proxy and certificates",
        True,
    ),
    (
        (botocore_exceptions.NoCredentialsError,),
        "there are no AWS credentials: botocore found none in environment, profile, container or instance",
        False,
    ),
    (
        (botocore_exceptions.NoRegionError,),
        "the region is not known: no name tells it; pass region, or configure one for botocore",
        False,
    ),
    (
        (
            botocore_exceptions.LoginError,
            botocore_exceptions.SSOError,
            botocore_exceptions.TokenRetrievalError,
        ),
        "a login is needed ({}); run 'aws sso login' or 'aws login'",
        False,
    ),
    (
        (
            botocore_exceptions.ConfigNotFound,
            botocore_exceptions.ConfigParseError,
            botocore_exceptions.InvalidConfigError,
            botocore_exceptions.InvalidIMDSEndpointError,
            botocore_exceptions.InvalidIMDSEndpointModeError,
            botocore_exceptions.MissingDependencyException,
            botocore_exceptions.ParamValidationError,
            botocore_exceptions.PartialCredentialsError,
            botocore_exceptions.ProfileNotFound,
            botocore_exceptions.RefreshWithMFAUnsupportedError,
            botocore_exceptions.UnknownCredentialError,
            botocore_exceptions.ValidationError,
        ),
        "the configuration of AWS is wrong ({})",
        False,
    ),
)
_NO_KEYS: Final = "the credentials that sign could not be had ({})"


@contextmanager
def _explained(what: str, clock: Clock, *, permission: str | None = None) -> Generator[None]:
    """Raise what botocore raises as a `ProviderError`, and keep it from logging what it sends and receives."""
    mark = _is_ours.set(True)
    try:
        yield
    except botocore_exceptions.ClientError as error:
        refusal = _refusal(what, cast("_ClientError", error), permission, _now(clock))
        _scrub(error)
        raise refusal from error
    except botocore_exceptions.BotoCoreError as error:
        _scrub(error)
        raise _failure(what, error) from error
    except (OSError, RuntimeError) as error:
        # A file that cannot be read; credentials that are still expired after having been renewed.
        told = _line(f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error))
        raise ProviderError(f"{what}: {_NO_KEYS.format(told)}") from error
    except (ResponseParserError, AttributeError, KeyError, TypeError, ValueError) as error:
        # What botocore makes of an answer that it did not expect; the text may quote it.
        _scrub(error)
        kind = type(error).__name__
        raise ProviderError(f"{what}: an answer makes no sense ({kind}); is there a proxy in between?") from error
    finally:
        _is_ours.reset(mark)


def _refusal(what: str, error: _ClientError, permission: str | None, now: datetime) -> ProviderError:
    """Return what AWS itself said, and what to do about it."""
    stated = cast("Mapping[str, str]", error.response.get("Error", {}))
    metadata = cast("Mapping[str, object]", error.response.get("ResponseMetadata", {}))
    headers = cast("Mapping[str, str]", metadata.get("HTTPHeaders", {}))
    status = metadata.get("HTTPStatusCode", 0)
    code, message = stated.get("Code", "Unknown"), _line(stated.get("Message", ""))
    # A refused signature comes with everything that should have been signed, session token included.
    error.response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.args = (f"{error.operation_name}: {code}: {message}",)

    transient = isinstance(status, int) and (status >= 500 or status == 429)
    retryable = transient or code in _TRANSIENT or code in _EXPIRED
    if code in _DENIED:
        wanted = f"sts:{error.operation_name}" if error.operation_name.startswith("AssumeRole") else permission
        advice = f"allow {wanted} for this identity"
    elif code in _UNKNOWN_KEYS:
        advice = "check the access key and its secret, the region, and the clock of this host"
    elif code in _EXPIRED:
        advice = "the credentials that sign have expired; those of the environment have to be replaced by hand"
    elif code in _NOT_FOUND:
        advice = "check the name, the region and the account"
    elif retryable:
        advice = "it is asked again later"
    else:
        advice = "correct the arguments, or what they name"
    return ProviderError(
        f"{what}: AWS refused {error.operation_name} (HTTP {status}, {code}: {message}); {advice}",
        retryable=retryable,
        retry_after=parse_retry_after(headers.get("retry-after"), now),
    )


def _failure(what: str, error: Exception) -> ProviderError:
    """Return what went wrong before AWS could say anything."""
    text = str(error)
    if isinstance(error, botocore_exceptions.ParamValidationError):
        text = text.partition(":")[2]  # the title is on a line of its own
    told = _line(text).rstrip(".")
    known = ((problem, retryable) for kinds, problem, retryable in _PROBLEMS if isinstance(error, kinds))
    problem, retryable = next(known, (_NO_KEYS, True))
    kind = ProviderTimeout if isinstance(error, _TIMED_OUT) else ProviderError
    return kind(f"{what}: {problem.format(told)}", retryable=retryable)


def _scrub(error: BaseException) -> None:
    """Take requests and documents out of an exception and those behind it: they hold keys and tokens."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, botocore_exceptions.HTTPClientError):
            seen.request = seen.response = None
        if isinstance(seen, json.JSONDecodeError):
            seen.doc = ""
        if isinstance(seen, ResponseParserError):
            seen.args = ("the answer makes no sense",)
        seen = seen.__cause__ or seen.__context__


def _line(text: str) -> str:
    """Return the first line of what AWS, or botocore, says, at a length that fits into a message."""
    line = _JWT.sub("[redacted]", text.strip().partition("\n")[0])
    return line if len(line) <= _LONGEST_DESCRIPTION else f"{line[:_LONGEST_DESCRIPTION]}..."


def _known(owner: str, host: str | None, user: str | None) -> tuple[str, str]:
    if host is None or user is None:
        missing = "host" if host is None else "user"
        raise ProviderError(
            f"{owner}: it is not known for which {missing} a token is wanted; give the provider itself to create_pool, "
            f"which takes it from the DSN, or pass {missing}",
            retryable=False,
        )
    # The names of AWS are in lower case, and a dot at the end is for resolvers only.
    return host.rstrip(".").lower(), user


def _not_to_be_pickled(provider: object) -> TypeError:
    name = type(provider).__name__
    return TypeError(f"a provider such as {name} belongs to its process and cannot be pickled; make one where needed")


# Arguments


def _check_texts(owner: str, **values: str | None) -> None:
    for name, value in values.items():
        check_text(owner, name, value)


def _check_host(owner: str, host: str | None) -> None:
    if host is None:
        return
    if host.startswith("/"):
        raise ValueError(f"{owner}: a token is for a host, and {host!r} is a Unix socket; pass host")
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(f"{owner}: host must be the name of a host and nothing else, not {host!r}")


def _check_port(owner: str, port: int | None) -> None:
    if port is None:
        return
    if not isinstance(port, int) or isinstance(port, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{owner}: port must be an int, not {type(port).__name__}")
    if not 0 < port < 65536:
        raise ValueError(f"{owner}: port must be between 1 and 65535, not {port}")


def _lifetime(owner: str, lifetime: float | timedelta, shortest: int, longest: int) -> int:
    seconds = parse_seconds(owner, "token_lifetime", lifetime)
    if not shortest <= seconds <= longest:
        raise ValueError(f"{owner}: token_lifetime must be between {shortest} and {longest} seconds, not {lifetime!r}")
    return int(seconds)


def _region_in(pattern: re.Pattern[str], name: str) -> str | None:
    """Return the region that a host name, or an ARN, tells."""
    found = pattern.search(name)
    return None if found is None else next(region.lower() for region in found.groups() if region is not None)


def _now(clock: Clock) -> datetime:
    return datetime.fromtimestamp(clock.time(), UTC)


# What is used of aiobotocore


class _Keys(Protocol):
    method: str

    async def get_frozen_credentials(self) -> object: ...


class _Client(Protocol):
    async def get_secret_value(self, **request: object) -> Mapping[str, object]: ...

    async def get_cluster_credentials(self, **request: object) -> Mapping[str, object]: ...

    async def get_credentials(self, **request: object) -> Mapping[str, object]: ...

    async def close(self) -> None: ...


class _ClientContext(Protocol):
    async def __aenter__(self) -> _Client: ...


class _Loader(Protocol):
    file_loader: object


class _Session(Protocol):
    def get_component(self, name: str) -> _Loader: ...

    def get_config_variable(self, name: str) -> object: ...

    def set_config_variable(self, name: str, value: str) -> None: ...

    def get_scoped_config(self) -> object: ...

    def set_default_client_config(self, config: object) -> None: ...

    async def get_credentials(self) -> _Keys | None: ...

    def create_client(self, service: str, *, region_name: str) -> _ClientContext: ...


class _Request(Protocol):
    url: str


class _Signature(Protocol):
    def add_auth(self, request: _Request) -> None: ...


class _ClientError(Protocol):
    args: tuple[object, ...]
    operation_name: str
    response: Mapping[str, object]


_new_session: Final = cast("Callable[..., _Session]", AioSession)
_new_request: Final = cast("Callable[..., _Request]", AWSRequest)
_new_signature: Final = cast("Callable[..., _Signature]", SigV4QueryAuth)
