from __future__ import annotations

import asyncio
import base64
import functools
from datetime import timedelta

import pytest
from support import secret

from asyncpool_creds import (
    BindableProvider,
    Credential,
    CredentialError,
    CredentialProvider,
    ManagerClosed,
    ProviderError,
    ProviderTimeout,
    Target,
)
from asyncpool_creds._provider import as_provider, ask, close_provider, provider_name
from asyncpool_creds.testing import ScriptedProvider, VirtualClock

pytestmark = pytest.mark.anyio

CREDENTIAL = Credential(secret(), user="app")


def _returns_text() -> str:
    return secret()


def _returns_credential() -> Credential:
    return CREDENTIAL


async def _returns_text_later() -> str:
    await asyncio.sleep(1)
    return secret()


async def _returns_credential_later() -> Credential:
    await asyncio.sleep(1)
    return CREDENTIAL


class _Callable:
    def __call__(self) -> str:
        return secret()


class _CallableLater:
    async def __call__(self) -> Credential:
        await asyncio.sleep(1)
        return CREDENTIAL


class _WithMethod:
    async def token(self) -> str:
        return secret()


@pytest.mark.parametrize(
    ("function", "credential"),
    [
        (_returns_text, Credential(secret())),
        (_returns_credential, CREDENTIAL),
        (_returns_text_later, Credential(secret())),
        (_returns_credential_later, CREDENTIAL),
        (_Callable(), Credential(secret())),
        (_CallableLater(), CREDENTIAL),
        (_WithMethod().token, Credential(secret())),
        (lambda: CREDENTIAL, CREDENTIAL),
        (functools.partial(Credential, secret(), user="app"), CREDENTIAL),
        (lambda: _returns_text_later(), Credential(secret())),  # noqa: PLW0108 - no coroutine function, but gives a coroutine
        (functools.partial(_CallableLater()), CREDENTIAL),
        (
            functools.wraps(_returns_text_later)(lambda: asyncio.ensure_future(_returns_text_later())),
            Credential(secret()),
        ),
    ],
    ids=[
        *("sync text", "sync", "async text", "async", "object", "async object", "method", "lambda", "partial"),
        *("coroutine", "partial of an async object", "wrapped coroutine function"),
    ],
)
async def test_any_function_is_a_provider(function, credential, clock):
    provider = as_provider(function, clock)

    assert isinstance(provider, CredentialProvider)
    assert await ask(provider) == credential


async def test_the_life_of_a_token_from_a_function_begins_with_the_request(clock: VirtualClock):
    issued_at = clock.now() + timedelta(minutes=10)  # the source's clock is ahead of ours
    claims = f'{{"iat": {issued_at.timestamp()}, "exp": {(issued_at + timedelta(minutes=15)).timestamp()}}}'

    async def token() -> str:
        await asyncio.sleep(20)
        return f"e30.{base64.urlsafe_b64encode(claims.encode()).decode().rstrip('=')}."

    credential = await ask(as_provider(token, clock))

    assert credential.expires_at == clock.now() - timedelta(seconds=20) + timedelta(minutes=15)


def test_a_provider_is_taken_as_it_is(clock):
    provider = ScriptedProvider(clock=clock)

    assert as_provider(provider, clock) is provider


def test_a_provider_that_can_be_called_too_is_a_provider(clock):
    class Both(ScriptedProvider):
        def __call__(self) -> str:
            raise AssertionError

    provider = Both()

    assert as_provider(provider, clock) is provider


@pytest.mark.parametrize("wrong", [ScriptedProvider, Credential, str])
def test_a_class_is_not_its_instance(wrong, clock):
    with pytest.raises(TypeError, match=rf"got the class {wrong.__name__}; pass an instance, as in {wrong.__name__}\("):
        as_provider(wrong, clock)


@pytest.mark.parametrize("wrong", [None, 5, "token", secret(), CREDENTIAL, {"password": secret()}, ()], ids=repr)
def test_what_cannot_provide_is_refused_without_being_quoted(wrong, clock):
    with pytest.raises(TypeError, match=f"credentials: expected .* not {type(wrong).__name__}$"):
        as_provider(wrong, clock)


@pytest.mark.parametrize(
    "wrong", [None, b"token", 5, {"password": secret()}, Credential], ids=["None", "bytes", "int", "dict", "class"]
)
async def test_a_wrong_answer_is_refused_for_good_by_the_name_of_its_type(wrong, clock):
    def tokens() -> object:
        return wrong

    with pytest.raises(ProviderError, match=f"tokens: expected a Credential .* got {type(wrong).__name__}") as caught:
        await ask(as_provider(tokens, clock))

    assert not caught.value.retryable


async def test_a_provider_must_answer_with_a_credential_and_not_with_text(clock):
    with pytest.raises(ProviderError, match=r"ScriptedProvider: expected a Credential .* got str"):
        await ask(ScriptedProvider(_returns_text, clock=clock))


@pytest.mark.parametrize("answer", ["", "a\0b"])
async def test_a_function_that_returns_no_token_is_told_so(answer, clock):
    with pytest.raises(ProviderError) as caught:
        await ask(as_provider(lambda: answer, clock))

    assert "password" in str(caught.value.__cause__)


async def test_an_error_of_ours_passes_unchanged(clock):
    error = ProviderError("slow down", retryable=False, retry_after=5)

    with pytest.raises(ProviderError) as caught:
        await ask(ScriptedProvider(error, clock=clock))

    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError("quoted request"),
        TimeoutError("quoted request"),
        LookupError("quoted request"),
        TypeError("quoted request"),
        ValueError("quoted request"),
        ExceptionGroup("quoted request", [OSError("quoted request")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_error_becomes_one_that_may_be_retried_and_does_not_quote_it(error, clock):
    with pytest.raises(ProviderError) as caught:
        await ask(ScriptedProvider(error, clock=clock))

    assert caught.value.retryable
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith(f"ScriptedProvider: fetch() raised {type(error).__name__}")
    assert "quoted" not in str(caught.value)


async def test_a_mistake_in_the_provider_is_called_one(clock):
    with pytest.raises(ProviderError, match="looks like a mistake in the provider"):
        await ask(ScriptedProvider(TypeError("bad argument"), clock=clock))


async def test_a_provider_whose_fetch_is_not_async_is_told_so(clock):
    class Synchronous:
        def fetch(self) -> Credential:
            return CREDENTIAL

    with pytest.raises(ProviderError, match="looks like a mistake in the provider"):
        await ask(as_provider(Synchronous(), clock))


async def test_an_error_of_another_manager_is_final(clock):
    with pytest.raises(ProviderError, match="ScriptedProvider: that one is closed") as caught:
        await ask(ScriptedProvider(ManagerClosed("that one is closed"), clock=clock))

    assert not caught.value.retryable
    assert isinstance(caught.value.__cause__, CredentialError)


async def test_a_timeout_of_ours_passes_unchanged(clock):
    with pytest.raises(ProviderTimeout, match=r"^slow$"):
        await ask(ScriptedProvider(ProviderTimeout("slow"), clock=clock))


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit], ids=lambda error: error.__name__)
async def test_what_is_no_error_passes(error, clock):
    with pytest.raises(error):
        await ask(ScriptedProvider(error, clock=clock))


class _Hidden:
    def __repr__(self) -> str:
        return secret()

    async def fetch(self) -> Credential:
        return CREDENTIAL


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (_Hidden(), "_Hidden"),
        (_returns_text, "_returns_text"),
        (_WithMethod().token, "_WithMethod.token"),
        (_Callable(), "_Callable"),
        (functools.partial(_returns_text), "partial"),
        (lambda: secret(), "<lambda>"),  # noqa: PLW0108
    ],
)
def test_a_source_is_called_by_its_name_and_never_by_its_repr(source, name, clock):
    assert provider_name(as_provider(source, clock)) == name


def test_the_protocols_can_be_asked_for_at_runtime():
    class Bindable:
        def bind(self, target: Target) -> CredentialProvider:
            raise AssertionError

    assert isinstance(ScriptedProvider(), CredentialProvider)
    assert not isinstance(_returns_text, CredentialProvider)
    assert isinstance(Bindable(), BindableProvider)
    assert not isinstance(ScriptedProvider(), BindableProvider)


def test_a_target_is_a_value():
    target = Target(host="db", port=5432, user="app", database=None)

    assert target == Target("db", 5432, "app", None)
    with pytest.raises(AttributeError):
        target.port = 1


async def test_a_provider_is_closed_if_it_can_be(clock):
    provider = ScriptedProvider(clock=clock)

    await close_provider(provider)

    assert provider.closed == 1


async def test_a_provider_without_an_end_needs_no_closing(clock):
    await close_provider(as_provider(_returns_text, clock))
