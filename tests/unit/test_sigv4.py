"""The verifier of RDS and DSQL tokens, against tokens that the SDK of AWS has signed."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import botocore.session
import pytest
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from support import assert_no_secret, secret

from asyncpool_creds.testing.sigv4 import SigV4Verifier

REGION = "eu-west-1"
HOST = f"db.abc123.{REGION}.rds.amazonaws.com"
CLUSTER = f"abc123.dsql.{REGION}.on.aws"
KEY = ReadOnlyCredentials("AKIAEXAMPLE", secret("key"), None)
SESSION = ReadOnlyCredentials("ASIAEXAMPLE", secret("temporary"), secret("session") + "+/=")


class Shifted:
    """The machine's clock, and an offset."""

    def __init__(self):
        self.offset = 0.0

    def time(self):
        return time.time() + self.offset

    def monotonic(self):
        return time.monotonic() + self.offset


@pytest.fixture(autouse=True)
def botocore_is_quiet():
    """Keep the SDK, which is no part of this, from logging what it signs."""
    logger = logging.getLogger("botocore.auth")
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(logging.NOTSET)


def sign(credentials=KEY, *, address=f"{HOST}:5432", service="rds-db", region=REGION, life=900, **query):
    query = query or {"Action": "connect", "DBUser": "app"}
    request = AWSRequest("GET", f"https://{address}/?{urlencode(query)}")
    SigV4QueryAuth(credentials, service, region, expires=life).add_auth(request)
    return request.url.removeprefix("https://")


def verifier(service="rds-db", **options):
    made = SigV4Verifier(service, **options)
    made.add_key(KEY.access_key, KEY.secret_key)
    return made


@pytest.fixture(scope="module")
def client():
    """Make clients of botocore's own, by service."""
    session = botocore.session.Session()
    session.set_credentials(SESSION.access_key, SESSION.secret_key, SESSION.token)
    return lambda service: session.create_client(service, region_name=REGION)


def test_it_takes_what_botocore_signs_for_rds(client):
    checks = SigV4Verifier(region=REGION, host=HOST, port=5432)
    checks.add_key(SESSION.access_key, SESSION.secret_key, session_token=SESSION.token)

    token = client("rds").generate_db_auth_token(HOST, 5432, "app")

    assert checks.verify("app", token) is None


@pytest.mark.parametrize("user", ["admin", "app"])
def test_it_takes_what_botocore_signs_for_dsql(client, user):
    checks = SigV4Verifier("dsql", region=REGION, host=CLUSTER)
    checks.add_key(SESSION.access_key, SESSION.secret_key, session_token=SESSION.token)
    dsql = client("dsql")

    connect, admin = dsql.generate_db_connect_auth_token(CLUSTER), dsql.generate_db_connect_admin_auth_token(CLUSTER)

    good, bad = (admin, connect) if user == "admin" else (connect, admin)
    assert checks.verify(user, good) is None
    assert "for the action" in checks.verify(user, bad)


@pytest.mark.parametrize("user", ["a b", "a+b", "a/b", "a%b", "a&b=c", "ä", "a~b", "a'b", ""])
def test_a_user_may_have_any_name(user):
    assert verifier().verify(user, sign(Action="connect", DBUser=user)) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"region": "eu-west-2"}, "signed for the region 'eu-west-1', not 'eu-west-2'"),
        ({"host": "other.example.com"}, f"for the host '{HOST}', not 'other.example.com'"),
        ({"port": 5433}, "for the port 5432, not 5433"),
        ({"service": "dsql"}, "signed for the service 'rds-db', not 'dsql'"),
    ],
)
def test_a_token_for_something_else_is_refused(options, reason):
    assert verifier(**options).verify("app", sign()) == reason


def test_a_token_for_somebody_else_is_refused():
    assert verifier().verify("eve", sign()) == "for the user 'app', not 'eve'"
    assert verifier().verify("app", sign(Action="connect")) == "for the user None, not 'app'"


def test_a_token_for_another_action_is_refused():
    assert verifier().verify("app", sign(Action="drop", DBUser="app")) == "for the action 'drop', not 'connect'"


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        ("DBUser=app", "DBUser=eve"),
        (HOST, "other"),
        (":5432", ":5433"),
        ("Expires=900", "Expires=901"),
        ("&X-Amz-Date", "&a=b&X-Amz-Date"),
    ],
)
def test_what_was_changed_after_signing_is_refused(part, instead):
    token = sign()
    assert part in token

    assert verifier().verify("eve", token.replace(part, instead)) == "the signature does not match"


def test_another_secret_key_is_refused():
    checks = verifier()
    checks.add_key(KEY.access_key, secret("other"))

    assert checks.verify("app", sign()) == "the signature does not match"


def test_the_order_of_parameters_does_not_matter():
    address, _, query = sign().partition("?")

    assert verifier().verify("app", f"{address}?{'&'.join(reversed(query.split('&')))}") is None


def test_a_token_ends_when_it_says():
    clock = Shifted()
    checks = verifier(clock=clock)
    token = sign()

    clock.offset = 898
    assert checks.verify("app", token) is None
    clock.offset = 900
    assert checks.verify("app", token) == "expired"


def test_a_clock_may_be_five_minutes_ahead():
    clock = Shifted()
    checks = verifier(clock=clock)
    token = sign()

    clock.offset = -298
    assert checks.verify("app", token) is None
    clock.offset = -302
    assert checks.verify("app", token) == "signed in the future"


def test_a_token_ends_with_the_credentials_that_signed_it():
    clock = Shifted()
    checks = SigV4Verifier(clock=clock)
    ends = datetime.now(UTC) + timedelta(seconds=60)
    checks.add_key(SESSION.access_key, SESSION.secret_key, session_token=SESSION.token, expires_at=ends)
    token = sign(SESSION)

    clock.offset = 59
    assert checks.verify("app", token) is None
    clock.offset = 61
    assert checks.verify("app", token) == "the credentials that signed it have expired"


def test_temporary_credentials_need_their_session_token():
    checks = SigV4Verifier()
    checks.add_key(SESSION.access_key, SESSION.secret_key, session_token=SESSION.token)
    checks.add_key(KEY.access_key, KEY.secret_key)
    reason = "not the session token of this access key"

    assert checks.verify("app", sign(SESSION)) is None
    assert checks.verify("app", sign(SESSION._replace(token=None))) == reason
    assert checks.verify("app", sign(SESSION._replace(token=secret("another")))) == reason
    assert checks.verify("app", sign(KEY._replace(token=SESSION.token))) == reason


def test_it_knows_several_keys_until_they_are_revoked():
    checks = verifier()
    checks.add_key("AKIAOTHER", secret("other"))
    other = sign(ReadOnlyCredentials("AKIAOTHER", secret("other"), None))
    assert checks.verify("app", sign()) is None
    assert checks.verify("app", other) is None

    checks.revoke_key("AKIAOTHER")
    checks.revoke_key("never known")

    assert checks.verify("app", sign()) is None
    assert checks.verify("app", other) == "unknown access key"


def test_what_is_public_may_be_changed():
    checks = verifier(port=1)

    checks.port = 5432

    assert checks.verify("app", sign()) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        secret(),
        "host:5432/",
        "host:nine/?a=b",
        "[host/?a=b",
        "host:5432/?" + "&".join(["a=b"] * 2),
        sign().replace("/?", "/path?"),
        sign() + "#fragment",
        sign() + "ä",
        sign().replace("X-Amz-Date", "X-Amz-Day"),
        sign().replace("X-Amz-Signature", "X-Amz-Sign"),
        sign().replace("Expires=900", "Expires=ever"),
        sign().replace("Expires=900", "Expires=0"),
        sign(life=604_801),
        sign().replace("aws4_request", "aws5_request"),
        sign().replace("HMAC-SHA256", "HMAC-MD5"),
        sign().replace("SignedHeaders=host", "SignedHeaders=date"),
        sign().replace("%2Frds-db", ""),
    ],
)
def test_what_is_no_token_is_refused(token):
    reason = verifier().verify("app", token)

    assert reason.startswith("no presigned request: ")
    assert_no_secret(reason)


def test_neither_the_verifier_nor_its_reasons_show_a_secret():
    checks = verifier()
    checks.add_key(SESSION.access_key, SESSION.secret_key, session_token=SESSION.token)

    assert repr(checks) == "<SigV4Verifier rds-db 2 keys>"
    assert_no_secret(repr(checks), repr(vars(checks)), checks.verify("app", sign(SESSION._replace(token=None))))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="service must be 'rds-db' or 'dsql', not 's3'"):
        SigV4Verifier("s3")
    with pytest.raises(ValueError, match="expires_at is a naive datetime"):
        SigV4Verifier().add_key("key", secret(), expires_at=datetime(2026, 1, 1))  # noqa: DTZ001 - the mistake
