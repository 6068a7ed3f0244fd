"""What goes wrong at AWS, in words that quote no secret; and what its SDK may not log."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Protocol, cast

# botocore ships no types: what is used of it is behind the protocol at the end of this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from botocore import exceptions as botocore_exceptions  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from asyncpool_creds._clock import Clock, utc_now
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds.providers._retry_after import parse_retry_after

__all__ = ["TIMEOUT", "explained", "refuses_keys"]

# In seconds, of one attempt to connect, and of one wait for an answer.
TIMEOUT: Final = 10.0

_LONGEST_DESCRIPTION: Final = 300
_JWT: Final = re.compile(r"eyJ[\w-]+\.[\w-]*\.?[\w-]*")
# The codes of AWS by what is to be done (AWS General Reference, "Common errors", and the pages of the operations).
_DENIED: Final = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ForbiddenException",
        "NotAuthorized",
        "UnauthorizedException",
        "UnauthorizedOperation",
    }
)
_PERMISSIONS: Final = {
    "AssumeRole": "sts:AssumeRole",
    "AssumeRoleWithWebIdentity": "sts:AssumeRoleWithWebIdentity",
    "GetClusterCredentials": "redshift:GetClusterCredentials (with auto_create also redshift:CreateClusterUser, "
    "with groups redshift:JoinGroup)",
    "GetCredentials": "redshift-serverless:GetCredentials",
    "GetSecretValue": "secretsmanager:GetSecretValue, and kms:Decrypt with its key",
}
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
    (_TIMED_OUT, f"AWS did not answer within {TIMEOUT:g} s ({{}}); check the network", True),
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
def explained(what: str, clock: Clock) -> Generator[None]:
    """Raise what botocore raises as a `ProviderError`, and keep it from logging what it sends and receives.

    Args:
        what: Who wanted what, with which the message begins.
        clock: Where the time comes from.
    """
    mark = _is_ours.set(True)
    try:
        yield
    except botocore_exceptions.ClientError as error:
        refusal = _refusal(what, cast("_ClientError", error), clock)
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


def refuses_keys(error: Exception) -> bool:
    """Return whether AWS has refused the credentials that signed, so that others are wanted."""
    if not isinstance(error, botocore_exceptions.ClientError):
        return False
    code, _ = _stated(cast("_ClientError", error))
    return code in _UNKNOWN_KEYS or code in _EXPIRED


def _stated(error: _ClientError) -> tuple[str, str]:
    """Return the code and the message of a refusal."""
    stated = cast("Mapping[str, str]", error.response.get("Error", {}))
    return stated.get("Code", "Unknown"), _line(stated.get("Message", ""))


def _refusal(what: str, error: _ClientError, clock: Clock) -> ProviderError:
    """Return what AWS itself said, and what to do about it."""
    metadata = cast("Mapping[str, object]", error.response.get("ResponseMetadata", {}))
    headers = cast("Mapping[str, str]", metadata.get("HTTPHeaders", {}))
    status = metadata.get("HTTPStatusCode", 0)
    operation, (code, message) = error.operation_name, _stated(error)
    # A refused signature comes with everything that should have been signed, session token included.
    error.response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.args = (f"{operation}: {code}: {message}",)

    transient = isinstance(status, int) and (status >= 500 or status == 429)
    retryable = transient or code in _TRANSIENT or code in _EXPIRED
    if code in _DENIED:
        advice = f"allow {_PERMISSIONS.get(operation, operation)} for this identity"
    elif code in _UNKNOWN_KEYS:
        advice = "check the access key and its secret, the region, and the clock of this host"
    elif code in _EXPIRED:
        advice = (
            "the credentials that sign have expired; those of a file or the environment are for somebody to replace"
        )
    elif code in _NOT_FOUND:
        advice = "check the name, the region and the account"
    elif retryable:
        advice = "it is asked again later"
    else:
        advice = "correct the arguments, or what they name"
    return ProviderError(
        f"{what}: AWS refused {operation} (HTTP {status}, {code}: {message}); {advice}",
        retryable=retryable,
        retry_after=parse_retry_after(headers.get("retry-after"), utc_now(clock)),
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


# At DEBUG, botocore logs requests and answers with all that is in them, and with warnings the exceptions that quote
# them. Of what it does for us, it logs neither.
_is_ours: Final[ContextVar[bool]] = ContextVar("asyncpool_creds.aws", default=False)
_TALKATIVE: Final = (
    *("auth", "credentials", "endpoint", "hooks", "httpsession", "parsers", "retryhandler", "tokens", "utils"),
)


def _may_be_logged(record: logging.LogRecord) -> bool:
    if not _is_ours.get():
        return True
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        record.msg, record.args = f"{record.getMessage()} ({type(error).__name__}: {_line(str(error))})", None
        record.exc_info = None
    return record.levelno > logging.DEBUG


for _package in ("botocore", "aiobotocore"):
    for _module in _TALKATIVE:
        logging.getLogger(f"{_package}.{_module}").addFilter(_may_be_logged)


class _ClientError(Protocol):
    """What is used of botocore's ``ClientError``."""

    args: tuple[object, ...]
    operation_name: str
    response: Mapping[str, object]
