"""An asyncpg pool whose password never goes stale."""

from asyncpool_creds._clock import Clock
from asyncpool_creds._connect_errors import is_refusal
from asyncpool_creds._credential import Credential
from asyncpool_creds._errors import (
    CredentialError,
    CredentialExpired,
    CredentialUnavailable,
    InsecureTransport,
    ManagerClosed,
    ProviderError,
    ProviderTimeout,
)
from asyncpool_creds._events import (
    ClockSkewDetected,
    ConnectionOpened,
    ConnectionRetired,
    CredentialInvalidated,
    CredentialRefreshed,
    CredentialRefused,
    Event,
    ExpiredSessionsServed,
    Observer,
    RefreshFailed,
    RefreshTokenExpiring,
    ReplacementFailed,
    RetireReason,
    RevocationFailed,
    StorageFailed,
    ThresholdReduced,
    log_event,
)
from asyncpool_creds._manager import ManagerStats, Stamp, TokenManager
from asyncpool_creds._managers import TokenManagers
from asyncpool_creds._pool import ConnectionInfo, CredentialPool, Credentials, PoolStats, connect, create_pool
from asyncpool_creds._provider import BindableProvider, CredentialFunction, CredentialProvider, Target

__all__ = [
    "BindableProvider",
    "Clock",
    "ClockSkewDetected",
    "ConnectionInfo",
    "ConnectionOpened",
    "ConnectionRetired",
    "Credential",
    "CredentialError",
    "CredentialExpired",
    "CredentialFunction",
    "CredentialInvalidated",
    "CredentialPool",
    "CredentialProvider",
    "CredentialRefreshed",
    "CredentialRefused",
    "CredentialUnavailable",
    "Credentials",
    "Event",
    "ExpiredSessionsServed",
    "InsecureTransport",
    "ManagerClosed",
    "ManagerStats",
    "Observer",
    "PoolStats",
    "ProviderError",
    "ProviderTimeout",
    "RefreshFailed",
    "RefreshTokenExpiring",
    "ReplacementFailed",
    "RetireReason",
    "RevocationFailed",
    "Stamp",
    "StorageFailed",
    "Target",
    "ThresholdReduced",
    "TokenManager",
    "TokenManagers",
    "connect",
    "create_pool",
    "is_refusal",
    "log_event",
]

_VERSION = "0.1.0"


def __getattr__(name: str) -> str:
    # Lazy, so that a later move to importlib.metadata costs no import time.
    if name == "__version__":
        return _VERSION
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
