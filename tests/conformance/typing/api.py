"""Every public name as its users write it: read by the type checkers, never run."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Literal, assert_type

import asyncpg
import httpx

import asyncpool_creds
from asyncpool_creds import (
    BindableProvider,
    Clock,
    ClockSkewDetected,
    ConnectFailed,
    ConnectionInfo,
    ConnectionOpened,
    ConnectionRetired,
    Credential,
    CredentialError,
    CredentialExpired,
    CredentialFunction,
    CredentialInvalidated,
    CredentialPool,
    CredentialProvider,
    CredentialRefreshed,
    CredentialRefused,
    Credentials,
    CredentialUnavailable,
    Event,
    ExpiredSessionsServed,
    InsecureTransport,
    ManagerClosed,
    ManagerStats,
    Observer,
    PoolReady,
    PoolStats,
    ProviderError,
    ProviderTimeout,
    RefreshFailed,
    RefreshTokenExpiring,
    ReplacementFailed,
    RetireReason,
    RevocationFailed,
    Stamp,
    StorageFailed,
    Target,
    ThresholdReduced,
    TlsState,
    TokenManager,
    connect,
    create_pool,
    is_refusal,
    log_event,
)
from asyncpool_creds.providers.oauth2 import DevicePrompt, Grant, OAuth2, TokenSource
from asyncpool_creds.storage import MemoryStorage, SpentMarks, StoredTokens, TokenStorage
from asyncpool_creds.testing import RecordingObserver, ScriptedProvider, VirtualClock

# Sources


def plain_token() -> str:
    return "token"


async def token() -> str:
    return "token"


async def credential() -> Credential:
    return Credential(
        "token",
        user="app",
        expires_at=datetime.now(UTC) + timedelta(minutes=15),
        refresh_at=datetime.now(UTC) + timedelta(minutes=10),
        ends_session=True,
        version="7",
    )


class Source:
    async def fetch(self) -> Credential:
        one = Credential.from_token("token", user="app", requested_at=datetime.now(UTC))
        assert_type(one.password, str)
        assert_type(one.user, str | None)
        assert_type(one.expires_at, datetime | None)
        assert_type(one.fingerprint, str)
        assert_type(one.is_same_secret(one), bool)
        return one

    async def aclose(self) -> None: ...


class SourceByHost:
    def bind(self, target: Target) -> CredentialProvider:
        assert_type(target.host, str)
        assert_type(target.port, int)
        assert_type(target.user, str | None)
        assert_type(target.database, str | None)
        return Source()


class StoppedClock:
    def time(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0


provider: CredentialProvider = Source()
bindable: BindableProvider = SourceByHost()
functions: list[CredentialFunction] = [plain_token, token, credential, lambda: Credential("token")]
clock: Clock = StoppedClock()
virtual: Clock = VirtualClock()
everything: list[Credentials] = [provider, bindable, plain_token, token, TokenManager(credential)]

# Observers


def observe(event: Event) -> None:
    assert_type(event.at, datetime)
    match event:
        case CredentialRefreshed():
            assert_type(event.rotated, bool)
            assert_type(event.expires_at, datetime | None)
        case RefreshFailed():
            assert_type(event.retry_in, float | None)
            assert_type(event.still_valid, bool)
        case CredentialInvalidated():
            assert_type(event.generation, int)
        case ThresholdReduced():
            assert_type(event.setting, Literal["refresh_threshold", "min_validity"])
        case CredentialRefused():
            assert_type(event.sqlstate, str | None)
        case PoolReady():
            assert_type(event.name, str)
            assert_type(event.provider, str | None)
            assert_type(event.lifetime, float | None)
            tls: TlsState = event.tls
            assert_type(tls, TlsState)
            assert_type(event.size, int)
        case ClockSkewDetected():
            assert_type(event.skew, float)
        case ExpiredSessionsServed():
            assert_type(event.connections, int)
            assert_type(event.since, datetime)
            assert_type(event.error, BaseException | None)
        case ConnectFailed():
            assert_type(event.error, BaseException)
            assert_type(event.waiting, int)
        case ConnectionOpened():
            assert_type(event.replacement, bool)
        case ConnectionRetired():
            reason: RetireReason = event.reason
            assert_type(reason, RetireReason)
        case ReplacementFailed():
            assert_type(event.error, BaseException)
            assert_type(event.message, str)
        case StorageFailed():
            assert_type(event.action, Literal["load", "save", "lock"])
        case RefreshTokenExpiring():
            assert_type(event.expires_at, datetime)
        case RevocationFailed():
            assert_type(event.provider, str)
        case _:
            log_event(event)


observers: list[Observer] = [observe, log_event, print]

# Managers


async def managers() -> None:
    async with TokenManager(
        provider,
        refresh_threshold=timedelta(minutes=2),
        background=False,
        fetch_timeout=5,
        min_validity=10.0,
        default_lifetime=900,
        on_event=observe,
        clock=clock,
    ) as manager:
        assert_type(manager, TokenManager)
        assert_type(await manager.get(), Credential)
        assert_type(await manager.refresh(), Credential)
        assert_type(manager.current, Credential | None)
        assert_type(manager.stats(), ManagerStats)
        assert_type(manager.stats().seconds_left, float | None)
        stamp = await manager.stamp()
        assert_type(stamp, Stamp)
        assert_type(stamp.generation, int)
        manager.invalidate(stamp.credential)
        unsubscribe: Callable[[], None] = manager.subscribe(observe)
        unsubscribe()
    await manager.aclose()


# Pools


class OurRecord(asyncpg.Record):
    pass


async def approve(connection: object) -> bool:
    return connection is not None


async def pools() -> None:
    async with create_pool("postgresql://app@db/app", credentials=token) as pool:
        assert_type(pool, CredentialPool[asyncpg.Record])
        assert_type(await pool.fetch("SELECT 1"), list[asyncpg.Record])
        async with pool.acquire(timeout=5) as connection, connection.transaction():
            await connection.execute("SELECT 1")
        stats = pool.stats()
        assert_type(stats, PoolStats)
        assert_type(stats.connections, tuple[ConnectionInfo, ...])
        assert_type(stats.retired, Mapping[RetireReason, int])
        assert_type(pool.manager, TokenManager | None)
        await pool.drain()

    awaited = await create_pool(
        host="db",
        credentials=SourceByHost(),
        retire_when="rotated",
        max_lifetime=timedelta(hours=1),
        before_acquire=approve,
        after_release=lambda connection: not connection.is_in_transaction(),
        max_reconnects_per_second=5,
        require_tls=True,
        is_refusal=lambda error: is_refusal(error) or isinstance(error, asyncpg.InternalServerError),
        on_event=[observe, log_event],
        min_size=1,
        max_size=3,
        ssl=ssl.create_default_context(),
        server_settings={"application_name": "app"},
        record_class=OurRecord,
    )
    assert_type(awaited, CredentialPool[OurRecord])
    assert_type(await awaited.fetchrow("SELECT 1"), OurRecord | None)
    takes_any_pool(awaited)
    await awaited.close()

    one = await connect("postgresql://app@db/app", credentials=provider, require_tls="verified", timeout=5)
    await one.close()


def takes_any_pool(pool: asyncpg.Pool[OurRecord]) -> int:
    return pool.get_size()


# Errors


async def errors(manager: TokenManager) -> None:
    try:
        await manager.get()
    except ProviderTimeout as error:
        error_is_a_timeout: TimeoutError = error
        raise error_is_a_timeout from None
    except ProviderError as error:
        assert_type(error.retryable, bool)
        assert_type(error.retry_after, float | None)
    except (CredentialExpired, CredentialUnavailable, InsecureTransport, ManagerClosed) as error:
        root: CredentialError = error
        raise root from None
    raise ProviderError("no", retryable=False, retry_after=5)


# OAuth 2.0 and its storage


class Storage:
    async def load(self, key: str) -> StoredTokens | None:
        return StoredTokens(refresh_token=key, expires_at=None)

    async def save(self, key: str, tokens: StoredTokens) -> None: ...

    async def delete(self, key: str) -> None: ...

    async def keys(self, prefix: str = "") -> list[str]:
        return [prefix]

    @asynccontextmanager
    async def lock(self, key: str) -> AsyncGenerator[None]:
        yield


class StorageWithMarks(Storage):
    async def load_mark(self, key: str) -> str | None:
        return key

    async def save_mark(self, key: str, mark: str | None) -> None: ...


marks: SpentMarks = StorageWithMarks()
storages: list[TokenStorage] = [MemoryStorage(), Storage()]
grant: Grant = "password"
token_sources: list[TokenSource] = ["token", plain_token, token]


async def show(prompt: DevicePrompt) -> None:
    assert_type(prompt.user_code, str)
    assert_type(prompt.expires_at, datetime)


by_device: CredentialProvider = OAuth2("https://login.example.com", client_id="app", prompt=show)
oauth2: CredentialProvider = OAuth2(
    "https://login.example.com",
    client_id="app",
    client_secret="secret",
    client_auth="post",
    grant=grant,
    username="user",
    password="secret",
    scope="openid",
    audience="db",
    extra={"resource": "db"},
    use="id_token",
    user_claim="sub",
    storage=MemoryStorage(),
    storage_key="app",
    timeout=timedelta(seconds=5),
    http_client=lambda: httpx.AsyncClient(trust_env=False),
    clock=clock,
)

# Testing


async def testing() -> None:
    observer = RecordingObserver()
    recorder: Observer = observer
    recorder(Event(at=datetime.now(UTC)))
    assert_type(await observer.seen(CredentialRefreshed, count=2), CredentialRefreshed)
    assert_type(observer.of(RefreshFailed), list[RefreshFailed])
    scripted = ScriptedProvider(60, ProviderError, None, ScriptedProvider.HANG, token, clock=VirtualClock())
    source: CredentialProvider = scripted
    await source.fetch()
    assert_type(scripted.calls, int)


assert_type(asyncpool_creds.__version__, str)
