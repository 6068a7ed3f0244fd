from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

from hypothesis import example, given
from hypothesis import strategies as st

from asyncpool_creds import Credential
from asyncpool_creds._expiry import Validity, read_validity

moments = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31, 23, 59, 59), timezones=st.just(UTC))  # noqa: DTZ001
whole_moments = moments.map(lambda moment: moment.replace(microsecond=0))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
any_text = st.text(st.characters())  # surrogates too


def jwt(claims: object) -> str:
    def segment(part: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")

    return f"{segment({'alg': 'none'})}.{segment(claims)}."


@given(any_text)
@example("a.é.c")
@example("?X-Amz-Date=%FF&X-Amz-Expires=\ud800")
def test_no_text_is_too_strange_to_be_read(token):
    validity = read_validity(token)

    assert validity is None or isinstance(validity, Validity)


@given(st.binary())
def test_no_payload_is_too_strange_to_be_read(payload):
    token = f"e30.{base64.urlsafe_b64encode(payload).decode()}."

    assert read_validity(token) is None or isinstance(read_validity(token), Validity)


@given(any_text, any_text)
@example("20260101T000000Z", "9" * 5000)
@example("99991231T235959Z", "900")
@example("20260101T000000Z", "900.0")
def test_no_query_is_too_strange_to_be_read(date, expires):
    validity = read_validity(f"db:5432/?X-Amz-Date={date}&X-Amz-Expires={expires}")

    assert validity is None or isinstance(validity, Validity)


@given(json_values, json_values)
def test_no_claims_are_too_strange_to_be_read(exp, iat):
    validity = read_validity(jwt({"exp": exp, "iat": iat}))

    assert validity is None or validity.issued_at is None or validity.issued_at < validity.expires_at


@given(json_values)
def test_no_payload_need_be_an_object(payload):
    assert read_validity(jwt(payload)) is None or isinstance(payload, dict)


@given(whole_moments, st.sampled_from([int, float, str, lambda seconds: f"{seconds:.3f}"]))
def test_the_expiry_of_a_token_is_read_back(expires_at, spelling):
    token = jwt({"exp": spelling(int(expires_at.timestamp()))})

    assert read_validity(token) == Validity(expires_at)


@given(whole_moments, st.integers(1, 604_800), st.text(max_size=30))
def test_the_span_of_a_presigned_request_is_read_back(signed_at, life, noise):
    signed_at = min(signed_at, datetime(9999, 1, 1, tzinfo=UTC))
    query = urlencode(
        {
            "Action": "connect",
            "DBUser": noise,
            "X-Amz-Date": signed_at.strftime("%Y%m%dT%H%M%SZ"),
            "X-Amz-Expires": life,
            "X-Amz-Security-Token": noise,
        }
    )

    assert read_validity(f"db:5432/?{query}") == Validity(signed_at + timedelta(seconds=life), signed_at)


@given(moments, moments, moments)
def test_anchoring_only_ever_shortens_a_life(issued_at, expires_at, requested_at):
    validity = Validity(expires_at, issued_at if issued_at < expires_at else None)

    anchored = validity.anchored_at(requested_at)

    assert anchored <= expires_at
    if validity.issued_at is None or requested_at >= issued_at:
        assert anchored == expires_at


@given(any_text.filter(bool), moments)
def test_a_credential_made_from_any_token_shows_nothing_of_it(token, requested_at):
    try:
        credential = Credential.from_token(token, requested_at=requested_at)
    except ValueError as error:
        assert len(token) < 8 or token not in repr(error.args)
    else:
        assert len(token) < 8 or token not in repr(credential)
