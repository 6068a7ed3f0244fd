"""Amazon Web Services: tokens of RDS and Aurora DSQL, secrets of Secrets Manager, passwords of Redshift."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn

from asyncpool_creds._clock import SYSTEM_CLOCK, Clock, utc_now
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._provider import Target
from asyncpool_creds._tracebacks import clears_frames
from asyncpool_creds.providers._arguments import check_text, parse_seconds
from asyncpool_creds.providers._aws_account import Account, UnsignedToken
from asyncpool_creds.providers._document import parse_object

__all__ = ["RDSIAM", "AuroraDSQL", "Redshift", "SecretsManager"]

_POSTGRESQL_PORT: Final = 5432
# "Each token has a lifetime of 15 minutes" (Amazon RDS User Guide, "IAM database authentication").
_RDS_TOKEN_LIFETIME: Final = 900
# A quarter of an hour by default, a week at most (Aurora DSQL User Guide, "Generating an authentication token").
_DSQL_TOKEN_LIFETIME: Final = 900.0
_LONGEST_DSQL_TOKEN_LIFETIME: Final = 604_800
# Amazon Redshift API Reference, GetClusterCredentials: DurationSeconds.
_REDSHIFT_LIFETIMES: Final = (900, 3600)

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


class _Provider:
    """What the four have in common: a region, the clocks, and the account whose keys are used."""

    def __init__(self, region: str | None, profile: str | None, clock: Clock | None) -> None:
        self._region: Final = region
        self._profile: Final = profile
        self._clock: Final[Clock] = SYSTEM_CLOCK if clock is None else clock
        self._account = Account(profile, self._clock)

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"a provider such as {name} belongs to its process and cannot be pickled; make one where needed"
        )


class _Signer(_Provider):
    """A provider of tokens that are signed on this machine."""

    def invalidate(self, credential: Credential) -> None:
        """Look for other credentials to sign with next time: these may have been revoked."""
        del credential
        self._account.forget()


class RDSIAM(_Signer):
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
        super().__init__(region, profile, clock)
        self._host: Final = host
        self._port: Final = port
        self._user: Final = user

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

    @clears_frames
    async def fetch(self) -> Credential:
        """Return a token signed now.

        Raises:
            ProviderError: There is nothing to sign it with, or it is not known for whom it is.
        """
        host, user = _known("RDSIAM", self._host, self._user)
        region = self._region or _region_in(_RDS_HOST, host)
        address = f"{host}:{self._port or _POSTGRESQL_PORT}"
        return await self._account.sign(
            UnsignedToken(
                "RDSIAM", "rds-db", region, address, {"Action": "connect", "DBUser": user}, _RDS_TOKEN_LIFETIME
            ),
            user,
        )

    def __repr__(self) -> str:
        return f"<RDSIAM host={self._host!r} port={self._port!r} user={self._user!r} region={self._region!r}>"


class AuroraDSQL(_Signer):
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
        session_lifetime: Seconds that a connection lives; a pool makes it its ``max_lifetime``. DSQL ends sessions
            after an hour: whoever is handed one in its last moment has five minutes left.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is empty or out of range, or `host` is not the name of a host alone.
    """

    # Aurora DSQL User Guide, "Cluster quotas and database limits": maximum connection duration, 60 minutes; maximum
    # transaction time, 5 minutes. AWS's own connectors stop at 55 minutes, too.
    session_lifetime: Final = 3300.0

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
        super().__init__(region, profile, clock)
        self._host: Final = host
        self._user: Final = user
        self._admin: Final = admin
        self._token_lifetime: Final = _lifetime("AuroraDSQL", token_lifetime, 1, _LONGEST_DSQL_TOKEN_LIFETIME)

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

    @clears_frames
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
            UnsignedToken("AuroraDSQL", "dsql", region, host, action, self._token_lifetime), user
        )

    def __repr__(self) -> str:
        return f"<AuroraDSQL host={self._host!r} user={self._user!r} region={self._region!r}>"


class SecretsManager(_Provider):
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
        super().__init__(region or _region_in(_SECRET_ARN, secret), profile, clock)
        self._secret: Final = secret
        self._user_key: Final = user_key
        self._password_key: Final = password_key
        self._user: Final = user
        self._refresh_every: Final = parse_seconds("SecretsManager", "refresh_every", refresh_every)

    @clears_frames
    async def fetch(self) -> Credential:
        """Return what the current version of the secret holds now.

        Raises:
            ProviderError: AWS did not give the secret, or there is no password in it.
            ProviderTimeout: AWS did not answer in time.
        """
        requested_at = utc_now(self._clock)
        answer = await self._account.ask(
            self,
            f"SecretsManager: the secret {self._secret!r} was not read",
            "secretsmanager",
            self._region,
            lambda client: client.get_secret_value(SecretId=self._secret, VersionStage="AWSCURRENT"),
        )
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

    @clears_frames
    async def aclose(self) -> None:
        """Close the connections to AWS; a later `fetch` opens new ones."""
        await self._account.aclose(self)

    def __repr__(self) -> str:
        return f"<SecretsManager {self._secret!r} region={self._region!r}>"


class Redshift(_Provider):
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
        super().__init__(region, profile, clock)
        self._cluster: Final = cluster
        self._workgroup: Final = workgroup
        self._user: Final = user
        self._database: Final = database
        self._auto_create: Final = auto_create
        self._groups: Final = tuple(groups)
        self._token_lifetime: Final = _lifetime("Redshift", token_lifetime, *_REDSHIFT_LIFETIMES)

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

    @clears_frames
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
        requested_at = utc_now(self._clock)
        answer = await self._account.ask(
            self, what, "redshift", self._region, lambda client: client.get_cluster_credentials(**request)
        )
        return self._credential(what, requested_at, answer)

    async def _ask_serverless(self, workgroup: str) -> Credential:
        request: dict[str, object] = {"workgroupName": workgroup, "durationSeconds": self._token_lifetime}
        if self._database is not None:
            request["dbName"] = self._database
        what = f"Redshift: no password for the workgroup {workgroup!r}"
        requested_at = utc_now(self._clock)
        answer = await self._account.ask(
            self, what, "redshift-serverless", self._region, lambda client: client.get_credentials(**request)
        )
        return self._credential(what, requested_at, answer)

    def _credential(self, what: str, requested_at: datetime, answer: Mapping[str, object]) -> Credential:
        # The two services call things by the same names, but for the case of the first letter.
        found = {name[:1].lower() + name[1:]: value for name, value in answer.items()}
        user, password, expires_at = found.get("dbUser"), found.get("dbPassword"), found.get("expiration")
        if not (isinstance(user, str) and isinstance(password, str) and isinstance(expires_at, datetime)):
            raise ProviderError(f"{what}: what AWS answered has no user, password or expiration; is it a proxy?")
        # By our own clock it is never good for longer than was asked for.
        ends = min(expires_at.astimezone(UTC), requested_at + timedelta(seconds=self._token_lifetime))
        # Serverless says when it has a new one; clusters make one for every request.
        refresh_at = found.get("nextRefreshTime")
        hint = refresh_at if isinstance(refresh_at, datetime) and refresh_at < ends else None
        return Credential(password, user=user, expires_at=ends, refresh_at=hint)

    @clears_frames
    async def aclose(self) -> None:
        """Close the connections to AWS, unless others share them; a later `fetch` opens new ones."""
        await self._account.aclose(self)

    def __repr__(self) -> str:
        where = f"workgroup={self._workgroup!r}" if self._workgroup else f"cluster={self._cluster!r}"
        return f"<Redshift {where} user={self._user!r} region={self._region!r}>"


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
