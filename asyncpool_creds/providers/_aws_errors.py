"""What goes wrong at AWS, in words that quote no secret; and what its SDK may not log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, cast

# botocore ships no types: what is used of it is behind the protocol at the end of this module.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from botocore import exceptions as botocore_exceptions  # type: ignore[import-untyped]

from asyncpool_creds._clock import Clock, utc_now
from asyncpool_creds._errors import ProviderError, ProviderTimeout
from asyncpool_creds.providers._aws_http import TIMEOUT, Exchange
from asyncpool_creds.providers._foreign import NONSENSE, keep_secrets_out_of_logs
from asyncpool_creds.providers._redaction import redact
from asyncpool_creds.providers._retry_after import parse_retry_after

__all__ = ["explain", "refuses_keys"]

_LONGEST_DESCRIPTION: Final = 300
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
# Beside 5xx: took too long, too many requests (RFC 9110, RFC 6585).
_TRANSIENT_STATUS: Final = frozenset({408, 429})
# What aiobotocore raises where a metadata service has given no credentials; the text quotes its answer.
_NO_METADATA: Final = (
    botocore_exceptions.CredentialRetrievalError,
    botocore_exceptions.HTTPClientError,
    botocore_exceptions.MetadataRetrievalError,
    botocore_exceptions.NoCredentialsError,
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


def explain(what: str, error: Exception, exchange: Exchange, clock: Clock) -> ProviderError | None:
    """Return what aiobotocore has raised in words of ours; None: it is not for us to explain.

    Args:
        what: Who wanted what, with which the message begins.
        error: What was raised.
        exchange: What was sent meanwhile, and what came back.
        clock: Where the time comes from.
    """
    metadata = _trouble_with_metadata(error, exchange)
    if isinstance(error, botocore_exceptions.ClientError):
        failure = _refusal(what, cast("_ClientError", cast("object", error)), exchange, clock)
    elif exchange.unusable is not None:
        failure = ProviderError(f"{what}: {exchange.source} {exchange.unusable}")
    elif metadata is not None:
        failure = metadata.about(what)
    elif isinstance(error, botocore_exceptions.BotoCoreError):
        failure = _failure(what, error, exchange)
    elif isinstance(error, (OSError, RuntimeError)) and not isinstance(error, NONSENSE):
        # A file that cannot be read; credentials that are still expired after having been renewed.
        said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        failure = ProviderError(f"{what}: {_NO_KEYS.format(_line(said, exchange.secrets))}")
    elif exchange.host is not None or isinstance(error, NONSENSE):
        # What botocore makes of an answer that it did not expect; the text may quote it.
        failure = ProviderError(f"{what}: {_nonsense(exchange)}")
    else:
        return None
    return failure


def _nonsense(exchange: Exchange) -> str:
    if exchange.host is None:
        return "the credentials that sign make no sense; look at where the configuration of AWS takes them from"
    if exchange.status is None:
        return f"{exchange.host} answered with something that makes no sense; is there a proxy?"
    if _is_transient(exchange.status):
        return f"{exchange.host} is in trouble (HTTP {exchange.status}); it is asked again later"
    return f"{exchange.host} answered with something that makes no sense (HTTP {exchange.status}); is there a proxy?"


@dataclass(frozen=True, slots=True)
class _Trouble:
    said: str
    retryable: bool = True
    is_late: bool = False

    def about(self, what: str) -> ProviderError:
        kind = ProviderTimeout if self.is_late else ProviderError
        return kind(f"{what}: {self.said}", retryable=self.retryable)


def _trouble_with_metadata(error: Exception, exchange: Exchange) -> _Trouble | None:
    """Return what is wrong with the metadata service, if that is what was asked last, and has not given credentials."""
    if not exchange.is_metadata or not isinstance(error, (*NONSENSE, *_NO_METADATA)):
        return None
    # aiobotocore raises this one, and none of its kinds, where what came back is no HTTP.
    is_garbage = type(error) is botocore_exceptions.HTTPClientError
    who, status = exchange.source, 200 if is_garbage else exchange.status
    if status is None:
        # Not every host has one: where it has never answered, silence means no more than that.
        if isinstance(error, botocore_exceptions.NoCredentialsError) and not exchange.has_answers:
            return None
        return _Trouble(f"{who} does not answer; check address and network", is_late=True)
    if status == 200:
        return _Trouble(f"{who} answered with something that is no credential; is it a proxy?")
    if _is_transient(status):
        return _Trouble(f"{who} is in trouble (HTTP {status}); it is asked again later")
    return _Trouble(f"{who} refused (HTTP {status}); give this host or container a role", retryable=False)


def _is_transient(status: int) -> bool:
    return status >= 500 or status in _TRANSIENT_STATUS


def refuses_keys(error: Exception) -> bool:
    """Return whether AWS has refused the credentials that signed, so that others are wanted."""
    if not isinstance(error, botocore_exceptions.ClientError):
        return False
    code, _ = _stated(cast("_ClientError", error))
    return code in _UNKNOWN_KEYS or code in _EXPIRED


def _stated(error: _ClientError, secrets: Iterable[str] = ()) -> tuple[str, str]:
    """Return the code and the message of a refusal."""
    stated = error.response.get("Error")
    named = cast("Mapping[str, object]", stated if isinstance(stated, Mapping) else {})
    # A refused signature comes with everything that should have been signed, session token included.
    code, message = _line(str(named.get("Code", "")), secrets), _line(str(named.get("Message", "")), secrets)
    return code or "Unknown", message


def _refusal(what: str, error: _ClientError, exchange: Exchange, clock: Clock) -> ProviderError:
    """Return what AWS itself said, and what to do about it."""
    metadata = cast("Mapping[str, object]", error.response.get("ResponseMetadata", {}))
    headers = cast("Mapping[str, str]", metadata.get("HTTPHeaders", {}))
    status = metadata.get("HTTPStatusCode", 0)
    operation, (code, message) = error.operation_name, _stated(error, exchange.secrets)
    transient = isinstance(status, int) and _is_transient(status)
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


def _failure(what: str, error: Exception, exchange: Exchange) -> ProviderError:
    """Return what went wrong before AWS could say anything."""
    text = str(error)
    if type(error) is botocore_exceptions.HTTPClientError:
        # What it says may quote what came back.
        text = type(cast("_HttpError", error).kwargs.get("error")).__name__
    if isinstance(error, botocore_exceptions.ParamValidationError):
        text = text.partition(":")[2]  # the title is on a line of its own
    told = _line(text, exchange.secrets).rstrip(".")
    known = ((problem, retryable) for kinds, problem, retryable in _PROBLEMS if isinstance(error, kinds))
    problem, retryable = next(known, (_NO_KEYS, True))
    kind = ProviderTimeout if isinstance(error, _TIMED_OUT) else ProviderError
    return kind(f"{what}: {problem.format(told)}", retryable=retryable)


def _line(text: str, secrets: Iterable[str]) -> str:
    """Return the first line of what AWS, or botocore, says, at a length that fits into a message."""
    return redact(next(iter(text.strip().splitlines()), ""), secrets, longest=_LONGEST_DESCRIPTION)


# At DEBUG, botocore logs requests and answers with all that is in them, and with warnings the exceptions that quote
# them.
_TALKATIVE: Final = (
    *("auth", "credentials", "endpoint", "hooks", "httpsession", "parsers", "retryhandler", "tokens", "utils"),
)
keep_secrets_out_of_logs(f"{package}.{module}" for package in ("botocore", "aiobotocore") for module in _TALKATIVE)


class _HttpError(Protocol):
    """What is used of botocore's ``HTTPClientError``."""

    kwargs: Mapping[str, object]


class _ClientError(Protocol):
    """What is used of botocore's ``ClientError``."""

    operation_name: str
    response: Mapping[str, object]
