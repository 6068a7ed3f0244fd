"""What can go wrong with a credential, and whose fault it is."""

from __future__ import annotations

__all__ = [
    "CredentialError",
    "CredentialExpired",
    "CredentialUnavailable",
    "InsecureTransport",
    "ManagerClosed",
    "ProviderError",
    "ProviderTimeout",
]


class CredentialError(Exception):
    """The root of every error this package raises about credentials."""


class ProviderError(CredentialError):
    """The source gave no usable credential; the source's own error is the cause.

    Args:
        message: What failed, whose fault it is and what to do about it.
        retryable: False if the source refused for good (a revoked grant, access
            denied): asking again without a change on their side is pointless.
        retry_after: Seconds the source asked us to wait before the next request
            (the HTTP ``Retry-After`` header, RFC 9110 section 10.2.3).
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after = retry_after


class ProviderTimeout(ProviderError, TimeoutError):
    """The source did not answer within ``fetch_timeout``."""


class CredentialExpired(CredentialError):
    """There is nothing valid to hand out; the cause is the last `ProviderError`."""


class CredentialUnavailable(CredentialExpired):
    """The source has never given a credential; the cause is the last `ProviderError`.

    What catches `CredentialExpired` catches it, too: for a caller, both mean that nothing valid can be had now.
    """


class InsecureTransport(CredentialError):
    """A credential was about to leave for a remote host without TLS; nothing was sent."""


class ManagerClosed(CredentialError):
    """The token manager is closed and hands out nothing more."""
