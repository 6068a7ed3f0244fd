from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest

from asyncpool_creds._expiry import Validity, read_validity

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)
EPOCH_NOON = NOON.timestamp()


def jwt(claims: object) -> str:
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return f"eyJhbGciOiJub25lIn0.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.c2ln"


@pytest.mark.parametrize(
    "exp",
    [
        int(EPOCH_NOON),
        float(EPOCH_NOON),
        str(int(EPOCH_NOON)),
        f"{EPOCH_NOON:.1f}",
        f"{EPOCH_NOON:.9e}",
    ],
    ids=["int", "float", "digits", "decimal in a string", "exponent"],
)
def test_the_exp_claim_is_read_however_it_is_written(exp):
    assert read_validity(jwt({"exp": exp})) == Validity(NOON)


def test_a_fraction_of_a_second_is_kept():
    validity = read_validity(jwt({"exp": EPOCH_NOON + 0.25}))

    assert validity == Validity(NOON + timedelta(milliseconds=250))


@pytest.mark.parametrize("padding", range(4))
def test_a_payload_of_any_length_is_read(padding):
    assert read_validity(jwt({"exp": EPOCH_NOON, "pad": "x" * padding})) == Validity(NOON)


def test_the_issue_time_is_read_too():
    assert read_validity(jwt({"exp": EPOCH_NOON, "iat": EPOCH_NOON - 900})) == Validity(
        NOON, NOON - timedelta(minutes=15)
    )


@pytest.mark.parametrize("iat", [EPOCH_NOON, EPOCH_NOON + 1, True, "soon", None, float("nan"), [1]])
def test_a_senseless_issue_time_is_left_out(iat):
    assert read_validity(jwt({"exp": EPOCH_NOON, "iat": iat})) == Validity(NOON)


@pytest.mark.parametrize(
    "exp",
    [
        True,
        None,
        "",
        "soon",
        [EPOCH_NOON],
        {"at": EPOCH_NOON},
        float("nan"),
        float("inf"),
        float("-inf"),
        "nan",
        "1e400",
        1e18,
        -1e18,
        10**400,
    ],
    ids=lambda exp: repr(exp)[:20],
)
def test_an_exp_claim_that_is_no_moment_makes_the_token_opaque(exp):
    assert read_validity(jwt({"exp": exp})) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        "opaque",
        "a.b",
        "a.b.c.d.e",
        "..",
        "a.b.c",
        "a.!!!!.c",
        "a.é.c",
        jwt([1, 2]),
        jwt("text"),
        jwt({}),
        jwt(b"\xff\xfe"),
        jwt(b'{"exp": '),
        jwt(b"[" * 100_000),
        jwt(b'{"exp": ' + b"9" * 5000 + b"}"),
    ],
    ids=lambda token: token[:24] or "empty",
)
def test_what_is_no_token_is_opaque(token):
    assert read_validity(token) is None


def sigv4(**parameters: str | None) -> str:
    query = {
        "Action": "connect",
        "DBUser": "app",
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": "AKID%2F20260329%2Feu-west-1%2Frds-db%2Faws4_request",
        "X-Amz-Date": "20260329T120000Z",
        "X-Amz-Expires": "900",
        "X-Amz-SignedHeaders": "host",
        "X-Amz-Signature": "0" * 64,
    } | {name.replace("_", "-"): value for name, value in parameters.items()}
    return "&".join(f"{name}={value}" for name, value in query.items() if value is not None)


QUARTER = Validity(NOON + timedelta(minutes=15), NOON)


@pytest.mark.parametrize(
    "address",
    [
        "db.abc.eu-west-1.rds.amazonaws.com:5432/",
        "db.abc.eu-west-1.rds.amazonaws.com:5432",
        "cluster.dsql.us-east-1.on.aws/",
        "[::1]:5432/",
        "https://db:5432/",
        "",
    ],
)
def test_a_presigned_request_is_read_whatever_stands_before_the_query(address):
    assert read_validity(f"{address}?{sigv4()}") == QUARTER


def test_the_order_of_parameters_does_not_matter():
    query = "&".join(reversed(sigv4(X_Amz_Security_Token="a%2Fb%3D%3D?c").split("&")))

    assert read_validity(f"db:5432/?{query}") == QUARTER


def test_the_last_of_repeated_parameters_counts():
    assert read_validity(f"db:5432/?X-Amz-Expires=60&{sigv4()}") == QUARTER


@pytest.mark.parametrize(
    "changes",
    [
        {"X_Amz_Date": None},
        {"X_Amz_Expires": None},
        {"X_Amz_Date": "2026-03-29T12:00:00Z"},
        {"X_Amz_Date": "20261329T120000Z"},
        {"X_Amz_Date": ""},
        {"X_Amz_Expires": "soon"},
        {"X_Amz_Expires": "0"},
        {"X_Amz_Expires": "-900"},
        {"X_Amz_Expires": "9" * 30},
        {"X_Amz_Expires": "9" * 5000},
        {"X_Amz_Expires": "300000000000"},
    ],
    ids=lambda changes: "=".join(str(part)[:20] for item in changes.items() for part in item),
)
def test_a_presigned_request_without_a_sensible_span_is_opaque(changes):
    assert read_validity(f"db:5432/?{sigv4(**changes)}") is None


def test_a_life_is_counted_from_our_own_request_when_our_clock_is_behind():
    validity = Validity(NOON + timedelta(minutes=15), NOON)

    expires_at = validity.anchored_at(NOON - timedelta(hours=1))

    assert expires_at == NOON - timedelta(minutes=45)


def test_a_token_from_a_cache_is_not_given_a_second_life():
    validity = Validity(NOON + timedelta(minutes=15), NOON)

    expires_at = validity.anchored_at(NOON + timedelta(minutes=10))

    assert expires_at == NOON + timedelta(minutes=15)


def test_an_expiry_without_an_issue_time_is_absolute():
    assert Validity(NOON).anchored_at(NOON - timedelta(hours=1)) == NOON


def test_a_token_that_lasts_until_the_end_of_time_can_be_anchored():
    end_of_time = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)

    assert Validity(end_of_time, NOON).anchored_at(NOON + timedelta(seconds=5)) == end_of_time
