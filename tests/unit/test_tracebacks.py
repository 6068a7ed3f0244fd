from __future__ import annotations

import asyncio
import inspect
import pickle

import pytest
from shown_locals import assert_no_secret_in_locals
from support import assert_no_secret, secret

from asyncpool_creds import CredentialProvider
from asyncpool_creds._tracebacks import ForeignError, class_and_place, clears_frames, without_baggage

pytestmark = pytest.mark.anyio


class Source:
    """Fails in a frame below its own, with a cause, a context and a group, each with a secret in its locals."""

    @clears_frames
    async def fetch(self, token: str, *, how: str = "raises") -> str:
        """Return what it was given."""
        form = {"refresh_token": [token]}
        if how == "returns":
            return token
        if how == "hangs":
            await asyncio.Event().wait()
        try:
            self._post(form)
        except KeyError as error:
            cause = error
        try:
            self._post(form)
        except KeyError:
            raise ExceptionGroup("several", [ValueError("one"), cause]) from cause

    def _post(self, form):
        header = f"Basic {form['refresh_token'][0]}"
        raise KeyError(len(header))


async def test_an_async_function_that_clears_frames_leaves_no_locals_and_no_arguments():
    with pytest.raises(ExceptionGroup) as caught:
        await Source().fetch(secret(), how="raises")

    assert_no_secret_in_locals(caught.value, of_tests="")
    assert class_and_place(caught.value).startswith("ExceptionGroup at test_tracebacks.py:")


async def test_it_leaves_none_when_it_is_cancelled():
    fetch = asyncio.create_task(Source().fetch(secret(), how="hangs"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fetch.cancel()

    try:
        await fetch
    except asyncio.CancelledError as error:
        assert_no_secret_in_locals(error, of_tests="")


async def test_it_leaves_what_its_caller_was_handling_alone():
    outer = _raised(RuntimeError("of the caller"))
    frame = outer.__traceback__.tb_next.tb_frame
    assert frame.f_locals["error"] is outer
    try:
        _raise(outer)
    except RuntimeError:
        with pytest.raises(ExceptionGroup):
            await Source().fetch("token")

    assert frame.f_locals["error"] is outer


async def test_it_is_the_function_that_it_was_to_callers_and_tools():
    assert await Source().fetch(secret(), how="returns") == secret()
    assert inspect.iscoroutinefunction(Source.fetch)
    assert list(inspect.signature(Source.fetch).parameters) == ["self", "token", "how"]
    assert Source.fetch.__doc__ == "Return what it was given."
    assert isinstance(Source(), CredentialProvider)


class RequestError(Exception):
    def __init__(self):
        super().__init__("no")
        self.request = {"Authorization": secret()}


def _raise(error, cause=None):
    raise error from cause


def _raised(error, cause=None):
    try:
        _raise(error, cause)
    except Exception as raised:  # noqa: BLE001 - whatever it is
        return raised


@pytest.mark.parametrize(
    "error", [_raised(RequestError()), _raised(ValueError("no"), RequestError())], ids=["itself", "its cause"]
)
def test_an_exception_with_attributes_is_replaced_by_its_class_and_place(error):
    summary = without_baggage(error)

    assert isinstance(summary, ForeignError)
    assert str(summary).startswith(f"{type(error).__name__} at test_tracebacks.py:")
    assert summary.__traceback__ is error.__traceback__
    assert_no_secret(summary)
    assert str(pickle.loads(pickle.dumps(summary))) == str(summary)


def test_an_exception_that_has_nothing_but_its_text_stays_what_it_is():
    error = _raised(OSError(111, "Connection refused"), KeyError("x"))
    error.add_note("tried twice")

    assert without_baggage(error) is error
