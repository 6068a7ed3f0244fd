from __future__ import annotations

import base64
import copy
import dataclasses
import json
import pickle
from datetime import UTC, datetime, timedelta, timezone

import pytest
from support import assert_no_secret, secret

from asyncpool_creds import Credential
from asyncpool_creds.testing import VirtualClock

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)


def test_a_password_is_enough():
    credential = Credential(secret())

    assert credential.password == secret()
    assert credential.user is None
    assert credential.expires_at is None
    assert credential.refresh_at is None
    assert not credential.ends_session
    assert credential.version is None


def test_only_the_password_is_positional():
    with pytest.raises(TypeError):
        Credential(secret(), "app")


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"password": b"token"}, TypeError, "password must be a str, not bytes"),
        ({"password": None}, TypeError, "password must be a str, not NoneType"),
        ({"password": ""}, ValueError, "password is empty"),
        ({"password": "a\0b"}, ValueError, "NUL"),
        ({"password": "a\ud800b"}, ValueError, "password"),
        ({"password": secret() * 6000}, ValueError, r"more than 65535 bytes.*PG_MAX_AUTH_TOKEN_LENGTH"),
        ({"password": "é" * 40_000}, ValueError, "more than 65535 bytes"),
        ({"user": "app\0options"}, ValueError, "user holds characters that no server accepts"),
        ({"user": "app\udcff"}, ValueError, "user holds characters that no server accepts"),
        ({"user": 7}, TypeError, "user must be a non-empty str or None, not int"),
        ({"user": ""}, (TypeError, ValueError), "user must be a non-empty str"),
        ({"version": 7}, TypeError, "version must be a non-empty str"),
        ({"expires_at": datetime(2026, 3, 29, 12)}, ValueError, "expires_at is a naive datetime"),  # noqa: DTZ001
        ({"refresh_at": datetime(2026, 3, 29, 12)}, ValueError, "refresh_at is a naive datetime"),  # noqa: DTZ001
        ({"expires_at": 1_800_000_000}, TypeError, "expires_at must be an aware datetime or None, not int"),
        ({"refresh_at": NOON.date()}, TypeError, "refresh_at must be an aware datetime or None, not date"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(arguments, error, names):
    with pytest.raises(error, match=names) as caught:
        Credential(**({"password": secret()} | arguments))

    assert_no_secret(caught.value)


def test_the_longest_password_that_postgresql_takes_is_one():
    assert len(Credential("x" * 65_535).password) == 65_535


def test_a_wrong_password_is_not_quoted():
    with pytest.raises(ValueError, match="password") as caught:
        Credential(secret("\ud800"))

    assert_no_secret(caught.value)


def test_times_are_kept_in_utc():
    paris = timezone(timedelta(hours=2))

    credential = Credential(secret(), expires_at=NOON.astimezone(paris), refresh_at=NOON.astimezone(paris))

    assert credential.expires_at == credential.refresh_at == NOON
    assert credential.expires_at.tzinfo is UTC
    assert credential.refresh_at.tzinfo is UTC


def test_it_cannot_be_changed():
    credential = Credential(secret())

    with pytest.raises(dataclasses.FrozenInstanceError):
        credential.password = secret("other")
    with pytest.raises((AttributeError, TypeError)):
        credential.note = "more"


def test_its_repr_shows_the_fingerprint_the_user_and_the_end():
    credential = Credential(secret(), user="app", expires_at=NOON)

    assert repr(credential) == f"<Credential {credential.fingerprint} user='app', expires=2026-03-29T12:00:00+00:00>"
    assert str(credential) == repr(credential)


def test_its_repr_says_never_where_there_is_no_end():
    credential = Credential(secret())

    assert repr(credential) == f"<Credential {credential.fingerprint} expires=never>"


def test_a_fingerprint_tells_secrets_apart_and_nothing_else():
    one, again, other = Credential(secret("one")), Credential(secret("one"), user="app"), Credential(secret("other"))

    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 8
    assert int(one.fingerprint, 16) >= 0


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_refuses_to_be_pickled(protocol):
    with pytest.raises(TypeError, match="cannot be pickled") as caught:
        pickle.dumps(Credential(secret()), protocol)

    assert_no_secret(caught.value)


def test_nothing_that_holds_it_can_be_pickled_either():
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps({"credential": [Credential(secret())]})


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_value_that_cannot_change_is_itself(duplicate):
    credential = Credential(secret())

    assert duplicate(credential) is credential


def test_replacing_a_field_checks_it_again():
    credential = Credential(secret(), user="app")

    assert dataclasses.replace(credential, expires_at=NOON) == Credential(secret(), user="app", expires_at=NOON)
    with pytest.raises(ValueError, match="naive"):
        dataclasses.replace(credential, expires_at=NOON.replace(tzinfo=None))


def test_equal_credentials_are_one_in_a_set():
    credentials = {Credential(secret(), expires_at=NOON), Credential(secret(), expires_at=NOON), Credential(secret())}

    assert len(credentials) == 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {}, True),
        ({"expires_at": NOON}, {}, True),
        ({"password": secret("other")}, {}, False),
        ({"user": "app"}, {}, False),
        ({"user": "app"}, {"user": "app"}, True),
        ({"version": "1"}, {"version": "2"}, False),
        ({"version": "1", "password": secret("other")}, {"version": "1"}, True),
        ({"version": "1", "user": "app"}, {"version": "1"}, False),
        ({"version": "1"}, {}, True),
        ({"version": "1", "password": secret("other")}, {}, False),
    ],
)
def test_the_version_decides_what_is_the_same_secret_where_both_have_one(one, other, same):
    left, right = Credential(**({"password": secret()} | one)), Credential(**({"password": secret()} | other))

    assert left.is_same_secret(right) is same
    assert right.is_same_secret(left) is same


class TestFromToken:
    # A real signature cannot carry the marker; an unsigned token of ours does, inside its payload.
    def token(self, **claims: float) -> str:
        payload = base64.urlsafe_b64encode(json.dumps({"jti": secret(), **claims}).encode()).decode().rstrip("=")
        return f"e30.{payload}."

    def test_an_opaque_token_never_ends(self):
        assert Credential.from_token(secret(), user="app") == Credential(secret(), user="app")

    def test_the_life_of_a_token_is_counted_from_the_request(self):
        token = self.token(iat=NOON.timestamp(), exp=NOON.timestamp() + 900)

        credential = Credential.from_token(token, user="app", requested_at=NOON - timedelta(minutes=5))

        assert credential.expires_at == NOON + timedelta(minutes=10)
        assert credential.user == "app"
        assert credential.password == token
        assert_no_secret(credential)

    def test_a_request_without_a_time_was_made_now(self):
        now = VirtualClock().now()
        token = self.token(iat=now.timestamp() + 3600, exp=now.timestamp() + 7200)

        credential = Credential.from_token(token)

        assert timedelta(minutes=59) < credential.expires_at - now < timedelta(minutes=61)

    def test_a_token_without_an_issue_time_ends_when_it_says(self):
        credential = Credential.from_token(self.token(exp=NOON.timestamp()), requested_at=NOON - timedelta(days=1))

        assert credential.expires_at == NOON

    def test_a_token_that_lasts_until_the_end_of_time_is_welcome(self):
        end_of_time = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
        token = self.token(iat=NOON.timestamp(), exp=end_of_time.timestamp())

        credential = Credential.from_token(token, requested_at=NOON + timedelta(seconds=1))

        assert credential.expires_at == end_of_time

    def test_a_naive_request_time_is_refused(self):
        with pytest.raises(ValueError, match="requested_at is a naive datetime"):
            Credential.from_token(self.token(exp=NOON.timestamp()), requested_at=NOON.replace(tzinfo=None))

    @pytest.mark.parametrize("token", [b"bytes", None, 7])
    def test_what_is_no_text_is_refused(self, token):
        with pytest.raises(TypeError, match="password must be a str"):
            Credential.from_token(token)

    def test_a_subclass_makes_its_own_kind(self):
        class Special(Credential):
            pass

        assert type(Special.from_token(secret())) is Special


@pytest.mark.parametrize(
    "copy_fields", [dataclasses.asdict, dataclasses.astuple, pickle.dumps, lambda one: one.__getstate__()]
)
def test_a_credential_is_not_copied_field_by_field(copy_fields):
    credential = Credential(secret(), user="app")

    with pytest.raises(TypeError, match="Credential") as caught:
        copy_fields(credential)

    assert_no_secret(caught.value)
    assert dataclasses.replace(credential, user="reporter").password == credential.password
