"""Environment variables and fixed credentials as sources."""

from __future__ import annotations

import base64
import json
import os
import pickle
from datetime import UTC, datetime, timedelta

import pytest
from support import assert_no_secret, secret

from asyncpool_creds import CredentialProvider, ProviderError, TokenManager
from asyncpool_creds.providers.env import Environment, Static
from asyncpool_creds.testing import VirtualClock

pytestmark = pytest.mark.anyio


def jwt(expires_at: datetime) -> str:
    claims = {"name": secret(), "exp": expires_at.timestamp()}
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJub25lIn0.{payload}.x"


async def failure(provider: CredentialProvider) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


def test_they_are_credential_providers() -> None:
    assert isinstance(Environment(), CredentialProvider)
    assert isinstance(Static(secret()), CredentialProvider)


async def test_the_variable_of_libpq_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", secret())

    credential = await Environment().fetch()

    assert credential.password == secret()
    assert credential.user is None
    assert credential.expires_at is None
    assert credential.refresh_at is None


async def test_a_variable_is_read_at_each_fetch(monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> None:
    monkeypatch.setenv("PASSWORD", f"{secret()}-1")
    async with TokenManager(Environment("PASSWORD"), on_event=(), clock=clock) as manager:
        monkeypatch.setenv("PASSWORD", f"{secret()}-2")
        await manager.refresh()

        assert (await manager.get()).password == f"{secret()}-2"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
async def test_a_line_break_at_the_end_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setenv("PASSWORD", secret() + ending)
    monkeypatch.setenv("LOGIN", "ada" + ending)

    credential = await Environment("PASSWORD", user_variable="LOGIN").fetch()

    assert (credential.user, credential.password) == ("ada", secret())


async def test_a_user_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", secret())

    assert (await Environment("PASSWORD", user="ada").fetch()).user == "ada"


async def test_a_token_in_a_variable_says_itself_when_it_ends(
    monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    end = clock.now() + timedelta(minutes=10)
    monkeypatch.setenv("TOKEN", jwt(end))

    assert (await Environment("TOKEN", clock=clock).fetch()).expires_at == end


@pytest.mark.parametrize("variable", ["PASSWORD", "LOGIN"])
async def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("PASSWORD", secret())
    monkeypatch.setenv("LOGIN", "ada")
    monkeypatch.delenv(variable)

    error = await failure(Environment("PASSWORD", user_variable="LOGIN"))

    assert str(error) == f"environment: {variable} is not set; set it before this process is started"
    assert not error.retryable
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("value", ["", "\n"])
async def test_a_variable_that_is_empty_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PASSWORD", value)

    error = await failure(Environment("PASSWORD"))

    assert str(error).startswith("environment: PASSWORD is set, but empty")
    assert not error.retryable


@pytest.mark.parametrize("variable", ["PASSWORD", "LOGIN"])
async def test_a_variable_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("PASSWORD", secret())
    monkeypatch.setenv("LOGIN", "ada")
    monkeypatch.setitem(os.environb, variable.encode(), secret().encode() + b"\xff")

    error = await failure(Environment("PASSWORD", user_variable="LOGIN"))

    assert str(error) == f"environment: {variable} is not UTF-8 text; was a binary secret put in?"
    assert not error.retryable


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variable": None}, TypeError, "variable must be a str"),
        ({"variable": 7}, TypeError, "variable must be a str"),
        ({"variable": ""}, ValueError, "variable is empty"),
        ({"variable": "A=B"}, ValueError, "neither '=' nor a NUL"),
        ({"user_variable": "A\0"}, ValueError, "neither '=' nor a NUL"),
        ({"user_variable": ""}, ValueError, "user_variable is empty"),
        ({"user": ""}, ValueError, "user is empty"),
        ({"user": "ada", "user_variable": "LOGIN"}, ValueError, "either user or user_variable"),
    ],
)
def test_arguments_are_checked_when_the_provider_is_made(options, error, message) -> None:
    with pytest.raises(error, match=message):
        Environment(**options)


async def test_a_fixed_credential_never_ends_unless_it_says_so() -> None:
    end = datetime(2100, 1, 1, tzinfo=UTC)

    assert (await Static(secret()).fetch()).expires_at is None
    assert (await Static(jwt(end)).fetch()).expires_at == end
    assert (await Static(secret(), expires_at=end).fetch()).expires_at == end


async def test_a_fixed_credential_has_the_user_it_was_given() -> None:
    credential = await Static(secret(), user="ada").fetch()

    assert (credential.user, credential.password) == ("ada", secret())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"password": None}, TypeError, "password must be a str"),
        ({"password": ""}, ValueError, "password is empty"),
        ({"password": "a\0b"}, ValueError, "a NUL"),
        ({"password": "x", "user": ""}, TypeError, "user must be a non-empty str"),
        ({"password": "x", "expires_at": datetime(2100, 1, 1)}, ValueError, "naive datetime"),  # noqa: DTZ001
    ],
)
def test_a_fixed_credential_is_checked_when_the_provider_is_made(options, error, message) -> None:
    with pytest.raises(error, match=message):
        Static(**options)


def test_neither_shows_a_secret_nor_can_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", secret())

    for provider in (Environment("PASSWORD"), Static(secret(), user="ada")):
        assert_no_secret(repr(provider), str(provider))
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(provider)
