from __future__ import annotations

import pickle

import pytest

from asyncpool_creds import (
    CredentialError,
    CredentialExpired,
    InsecureTransport,
    ManagerClosed,
    ProviderError,
    ProviderTimeout,
)


@pytest.mark.parametrize("kind", [ProviderError, ProviderTimeout, CredentialExpired, InsecureTransport, ManagerClosed])
def test_every_error_has_one_root(kind):
    assert issubclass(kind, CredentialError)


def test_a_timeout_is_also_the_builtin_one():
    error = ProviderTimeout("no answer")

    assert isinstance(error, TimeoutError)
    assert isinstance(error, ProviderError)
    assert error.retryable
    assert str(error) == "no answer"


def test_a_provider_error_may_be_retried_unless_it_says_otherwise():
    error = ProviderError("down")

    assert error.retryable
    assert error.retry_after is None


def test_a_provider_error_keeps_what_the_source_asked_for():
    error = ProviderError("slow down", retryable=False, retry_after=7.5)

    assert not error.retryable
    assert error.retry_after == 7.5
    assert str(error) == "slow down"


def test_a_provider_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(ProviderTimeout("slow", retryable=False, retry_after=3)))

    assert (str(error), error.retryable, error.retry_after) == ("slow", False, 3)
