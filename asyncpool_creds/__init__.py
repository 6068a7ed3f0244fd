"""An asyncpg pool whose password never goes stale."""

import inspect

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
    ConnectFailed,
    ConnectionOpened,
    ConnectionRetired,
    CredentialInvalidated,
    CredentialRefreshed,
    CredentialRefused,
    Event,
    ExpiredSessionsServed,
    Observer,
    PoolReady,
    RefreshFailed,
    RefreshTokenExpiring,
    ReplacementFailed,
    RetireReason,
    RevocationFailed,
    StorageFailed,
    ThresholdReduced,
    TlsState,
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
    "ConnectFailed",
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
    "PoolReady",
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
    "TlsState",
    "TokenManager",
    "TokenManagers",
    "connect",
    "create_pool",
    "is_refusal",
    "log_event",
]

_VERSION = "0.1.0"


def _show_as_public(name: str) -> None:
    """Have a class or function show as ``asyncpool_creds.name``, in tracebacks above all, not by where it is kept."""
    thing = globals()[name]
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        return  # an alias of a type
    if inspect.isclass(thing):
        # typing.get_type_hints reads them in the namespace of __module__, which is about to be another one.
        if annotations := inspect.get_annotations(thing, eval_str=True):
            thing.__annotations__ = annotations
        # inspect.getsource finds a class by __module__, too. Python 3.13 would show this file at the line of the other.
        if "__firstlineno__" in vars(thing):
            delattr(thing, "__firstlineno__")
    thing.__module__ = __name__


for _name in __all__:
    _show_as_public(_name)


def __getattr__(name: str) -> str:
    # Lazy, so that a later move to importlib.metadata costs no import time.
    if name == "__version__":
        return _VERSION
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
