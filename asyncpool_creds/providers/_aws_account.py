"""Who we are to AWS: one session of botocore with its clients, made and used without holding up the event loop."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast
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
except ImportError as _missing:  # pragma: no cover
    raise ImportError("the sources of AWS need aiobotocore: pip install 'asyncpool-creds[aws]'") from _missing

from asyncpool_creds._clock import Clock, utc_now
from asyncpool_creds._credential import Credential
from asyncpool_creds.providers._aws_errors import explain, refuses_keys
from asyncpool_creds.providers._aws_http import TIMEOUT, ParserFactory, Session, guard_metadata, watched
from asyncpool_creds.providers._foreign import summary_of, working_for_us

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["Account", "Client", "UnsignedToken"]

# botocore's name for the instance metadata service, and the latest that it makes up for the end of such credentials:
# where they are about to end it says "in 17 to 25 minutes", whatever the service said, to bridge its outages
# (InstanceMetadataFetcher._evaluate_expiration). All that is certain then is that new ones are there five minutes
# before the old ones end (Amazon EC2 User Guide, "Retrieve security credentials from instance metadata").
_INSTANCE_METADATA: Final = "iam-role"
_MADE_UP_END: Final = timedelta(minutes=25)
_CERTAIN_LIFE: Final = timedelta(minutes=5)

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class UnsignedToken:
    """What a token says: a request for `address` that is signed and never sent.

    Attributes:
        owner: Whose it is, for messages.
        service: The service that it is for, in the words of Signature Version 4.
        region: The region; None: the one that is configured.
        address: Host, or host and port.
        query: What is asked for.
        life: Seconds that it is good for.
    """

    owner: str
    service: str
    region: str | None
    address: str
    query: Mapping[str, str]
    life: int


class Account:
    """One session, with its clients, for a provider and all that were bound from it.

    The session finds and renews the credentials that sign; it is made in a thread, because it reads files. When AWS has
    refused its credentials there is a new one, which reads them anew.
    """

    def __init__(self, profile: str | None, clock: Clock) -> None:
        self._profile = profile
        self._clock = clock
        self._home: tuple[int, AbstractEventLoop] | None = None
        self._session: _Session | None = None
        self._opening = threading.Lock()
        self._clients: dict[tuple[str, str], Client] = {}
        self._users: set[object] = set()

    async def sign(self, token: UnsignedToken, user: str) -> Credential:
        """Return `token`, signed, as the password of `user`; it ends no later than what signed it.

        Raises:
            ProviderError: There is nothing to sign it with.
        """
        requested_at = utc_now(self._clock)

        async def work(session: _Session) -> tuple[str, datetime | None]:
            region = _region(session, token.region)
            keys = await session.get_credentials()
            if keys is None:
                raise botocore_exceptions.NoCredentialsError
            signature = _new_signature(await keys.get_frozen_credentials(), token.service, region, expires=token.life)
            # The only place with the end of the credentials; no other task has run since they were frozen.
            ends = _end_of_keys(keys, utc_now(self._clock))
            request = _new_request(method="GET", url=f"https://{token.address}/?{urlencode(token.query)}")
            signature.add_auth(request)
            return request.url.removeprefix("https://"), ends

        signed, ends = await self._work(f"{token.owner}: no token for {token.address}", work)
        credential = Credential.from_token(signed, user=user, requested_at=requested_at)
        if ends is None or credential.expires_at is None or credential.expires_at <= ends:
            return credential
        return Credential(credential.password, user=user, expires_at=ends)

    async def ask(
        self,
        user: object,
        what: str,
        service: str,
        region: str | None,
        operation: Callable[[Client], Awaitable[Mapping[str, object] | None]],
    ) -> Mapping[str, object]:
        """Return what `service` answers; the connections to it stay open until all users have closed.

        Args:
            user: Who asks, and will call `aclose`.
            what: Who could not have what, with which the message of an error begins.
            service: botocore's name of the service.
            region: Where; None: in the region that is configured.
            operation: What to ask.

        Raises:
            ProviderError: AWS said no, or there is nothing to sign the request with.
            ProviderTimeout: AWS did not answer in time.
        """

        async def work(session: _Session) -> Mapping[str, object]:
            client = await self._client(session, user, service, _region(session, region))
            return await operation(client) or {}

        return await self._work(what, work)

    def forget(self) -> None:
        """Look for credentials anew next time."""
        self._session = None

    async def aclose(self, user: object) -> None:
        """Close the connections to AWS, unless others use them."""
        self._users.discard(user)
        if not self._users and self._home == (os.getpid(), asyncio.get_running_loop()):
            await self._close_clients()

    async def _work(self, what: str, work: Callable[[_Session], Awaitable[_Made]]) -> _Made:
        """Return what comes of `work`; what goes wrong there is raised in our words."""
        with working_for_us(), watched() as exchange:
            try:
                return await work(await self._open())
            except Exception as error:
                if refuses_keys(error):
                    # The file that they come from may hold others by now.
                    self.forget()
                    await self._close_clients()
                failure = explain(what, error, exchange, self._clock)
                if failure is None:
                    raise
                cause = summary_of(error)
        # Here, where the exception is handled and gone: it would be the context of ours, with all that it holds.
        raise failure from cause

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

    async def _client(self, session: _Session, user: object, service: str, region: str) -> Client:
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

    async def _close_clients(self) -> None:
        while self._clients:
            # One at a time: those that a cancelled call leaves are there for the next one.
            _, client = self._clients.popitem()
            await client.close()


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


def _open_session(profile: str | None) -> _Session:
    """Return a session that has read its files; takes tens of milliseconds."""
    session = _new_session(profile=profile)
    # One attempt each, because the manager is the one who tries again. The models are loaded in a thread for the
    # clients, too, that botocore makes for itself to assume a role.
    config = _Config(
        connect_timeout=TIMEOUT,
        read_timeout=TIMEOUT,
        retries={"total_max_attempts": 1},
        warm_up_loader_caches=True,
        http_session_cls=Session,
    )
    session.set_default_client_config(config)
    session.register_component("response_parser_factory", ParserFactory())
    cast("_Loader", session.get_component("data_loader")).file_loader = _PatientFiles()
    guard_metadata(cast("_Resolver", session.get_component("credential_provider")).providers)
    session.get_scoped_config()
    return session


class _Config(AioConfig):  # type: ignore[misc]  # aiobotocore has no types
    """A configuration that stays ours in the clients that botocore makes for itself, to assume a role."""

    def merge(self, other_config: AioConfig) -> AioConfig:
        """Return this configuration with the options of another; aiobotocore 3.8 forgets its own two in doing so."""
        merged: AioConfig = super().merge(other_config)
        merged.http_session_cls, merged.warm_up_loader_caches = Session, True
        return merged


def _make_client(session: _Session, service: str, region: str) -> Client:
    """Return a client; takes several milliseconds, because a class is made for it with all that the service can do.

    There is no I/O in it, and nothing of it belongs to an event loop before its first request.
    """

    async def make() -> Client:
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


# What is used of aiobotocore


class _Keys(Protocol):
    method: str

    async def get_frozen_credentials(self) -> object: ...


class Client(Protocol):
    """What is asked of AWS."""

    async def get_secret_value(self, **request: object) -> Mapping[str, object]: ...

    async def get_cluster_credentials(self, **request: object) -> Mapping[str, object]: ...

    async def get_credentials(self, **request: object) -> Mapping[str, object]: ...

    async def close(self) -> None: ...


class _ClientContext(Protocol):
    async def __aenter__(self) -> Client: ...


class _Loader(Protocol):
    file_loader: object


class _Resolver(Protocol):
    providers: list[object]


class _Session(Protocol):
    def get_component(self, name: str) -> object: ...

    def register_component(self, name: str, component: object) -> None: ...

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


_new_session: Final = cast("Callable[..., _Session]", AioSession)
_new_request: Final = cast("Callable[..., _Request]", AWSRequest)
_new_signature: Final = cast("Callable[..., _Signature]", SigV4QueryAuth)
