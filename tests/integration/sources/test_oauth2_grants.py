"""The grants of the OAuth 2.0 provider that need a person at another device, or somebody else's token."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import CredentialExpired, CredentialRefreshed, ProviderError, ProviderTimeout, TokenManager
from asyncpool_creds.providers.oauth2 import DevicePrompt, OAuth2
from asyncpool_creds.storage import MemoryStorage
from asyncpool_creds.testing import VirtualClock
from asyncpool_creds.testing.issuer import TokenIssuer

pytestmark = pytest.mark.anyio

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


@pytest.fixture
async def make():
    made = []

    def make(*arguments, **options):
        provider = OAuth2(*arguments, **options)
        made.append(provider)
        return provider

    yield make
    for provider in made:
        await provider.aclose()


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


async def until(condition):
    """Wait for what no event announces."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


# A person at another device


class Person:
    """Sees prompts, and does nothing of their own accord."""

    def __init__(self, issuer):
        self._issuer = issuer
        self._asked = asyncio.Event()
        self.prompts = []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        self._asked.set()

    async def asked(self, times=1):
        while len(self.prompts) < times:
            self._asked.clear()
            await self._asked.wait()

    def log_in(self):
        self._issuer.approve(self.prompts[-1].user_code, "ann")

    def log_in_at_once(self, prompt):
        self(prompt)
        self.log_in()


@pytest.fixture
async def issuer():
    async with TokenIssuer({"ann": secret("password")}, device_interval=0.01) as running:
        yield running


@pytest.fixture
def person(issuer):
    return Person(issuer)


@pytest.mark.parametrize("is_async", [False, True])
async def test_somebody_logs_in_at_another_device_and_then_tokens_are_refreshed(make, issuer, person, is_async):
    async def prompt(shown):
        await asyncio.sleep(0)
        person.log_in_at_once(shown)

    before = datetime.now(UTC)
    provider = make(issuer.url, client_id="cli", prompt=prompt if is_async else person.log_in_at_once)

    credentials = [await provider.fetch() for _ in range(3)]

    (shown,) = person.prompts
    assert [issuer.verify("ann", credential.password) for credential in credentials] == [None] * 3
    assert issuer.requests == {DEVICE: 1, "refresh_token": 2}
    assert shown.verification_uri == f"{issuer.url}/device"
    assert shown.verification_uri_complete == f"{issuer.url}/device?user_code={shown.user_code}"
    assert timedelta(seconds=599) < shown.expires_at - before < timedelta(seconds=601)
    assert shown.user_code not in repr(shown)


async def test_it_asks_until_the_person_has_logged_in(make, issuer, person):
    fetch = asyncio.create_task(make(issuer.url, client_id="cli", prompt=person).fetch())
    await person.asked()
    await until(lambda: issuer.requests[DEVICE] >= 3)
    assert not fetch.done()

    person.log_in()

    assert issuer.verify("ann", (await fetch).password) is None


async def test_a_person_who_refuses_is_not_asked_again_at_once(make, issuer):
    provider = make(issuer.url, client_id="cli", prompt=lambda prompt: issuer.deny(prompt.user_code))

    error = await refusal(provider)

    assert not error.retryable
    assert "the user who was asked" in str(error)
    assert issuer.documents["/device_authorization"] == 1


async def test_a_code_that_nobody_used_in_time_is_followed_by_another(make, issuer, person):
    issuer.device_lifetime = 0.05
    provider = make(issuer.url, client_id="cli", prompt=person)

    error = await refusal(provider)
    issuer.device_lifetime = 60
    fetch = asyncio.create_task(provider.fetch())
    await person.asked(2)
    person.log_in()

    assert error.retryable
    assert "nobody logged in before the code expired" in str(error)
    assert issuer.verify("ann", (await fetch).password) is None


async def test_a_cancelled_fetch_leaves_the_login_going_on_and_the_next_one_joins_it(make, issuer, person):
    provider = make(issuer.url, client_id="cli", prompt=person)
    fetch = asyncio.create_task(provider.fetch())
    await person.asked()
    fetch.cancel()
    await asyncio.wait([fetch])

    joined = asyncio.create_task(provider.fetch())
    await asyncio.sleep(0)
    person.log_in()

    assert issuer.verify("ann", (await joined).password) is None
    assert len(person.prompts) == 1


async def test_a_login_that_ends_while_nobody_waits_is_not_lost(make, issuer, person):
    issuer.answer["refresh_token"] = None
    provider = make(issuer.url, client_id="cli", prompt=person)
    fetch = asyncio.create_task(provider.fetch())
    await person.asked()
    fetch.cancel()
    await asyncio.wait([fetch])
    person.log_in()
    await until(lambda: not tasks_of_ours())

    credential = await provider.fetch()

    assert issuer.verify("ann", credential.password) is None
    assert len(person.prompts) == 1
    assert issuer.documents["/device_authorization"] == 1


async def test_a_person_may_take_longer_than_the_manager_waits_for_a_fetch(issuer, person, observer):
    provider = OAuth2(issuer.url, client_id="cli", prompt=person)
    manager = TokenManager(provider, fetch_timeout=0.05, on_event=observer)
    with pytest.raises(CredentialExpired) as caught:
        await manager.get()
    await person.asked()

    person.log_in()
    await observer.seen(CredentialRefreshed)
    credential = await manager.get()
    await manager.aclose()

    assert isinstance(caught.value.__cause__, ProviderTimeout)
    assert issuer.verify("ann", credential.password) is None
    assert len(person.prompts) == 1


async def test_closing_ends_the_login_of_a_person(make, issuer, person):
    provider = make(issuer.url, client_id="cli", prompt=person)
    fetch = asyncio.create_task(provider.fetch())
    await person.asked()

    await provider.aclose()

    with pytest.raises(ProviderError, match="closed while it was fetching"):
        await fetch
    assert tasks_of_ours() == set()


async def test_closing_does_not_wait_for_the_person_that_a_refused_refresh_token_asks_for(make, issuer, person):
    provider = make(issuer.url, client_id="cli", prompt=person.log_in_at_once)
    await provider.fetch()
    issuer.hang()
    fetch = asyncio.create_task(provider.fetch())
    await issuer.reached()
    closing = asyncio.create_task(provider.aclose())
    await asyncio.sleep(0)
    issuer.fail_next("invalid_grant")

    issuer.resume()
    await closing

    with pytest.raises(ProviderError, match="closed while it was fetching"):
        await fetch
    assert len(person.prompts) == 1


async def test_a_lost_answer_to_a_refresh_asks_the_person_again(make, issuer, person):
    provider = make(issuer.url, client_id="cli", prompt=person.log_in_at_once)
    await provider.fetch()
    issuer.lose_response()

    credential = await provider.fetch()

    assert issuer.verify("ann", credential.password) is None
    assert len(person.prompts) == 2
    assert issuer.replays == 0


async def test_those_who_share_a_storage_ask_one_person_once(make, issuer, person):
    storage = MemoryStorage()
    providers = [make(issuer.url, client_id="cli", prompt=person, storage=storage) for _ in range(3)]
    fetches = [asyncio.create_task(provider.fetch()) for provider in providers]
    await person.asked()

    person.log_in()
    credentials = [await fetch for fetch in fetches]

    assert len({credential.password for credential in credentials}) == 1
    assert len(person.prompts) == 1
    assert issuer.requests.keys() == {DEVICE}


async def test_a_prompt_that_fails_is_an_error_and_the_next_fetch_prompts_again(issuer, person):
    prompts = [lambda _: 1 / 0, person.log_in_at_once]

    def prompt(shown):
        prompts.pop(0)(shown)

    manager = TokenManager(OAuth2(issuer.url, client_id="cli", prompt=prompt), background=False, on_event=())

    with pytest.raises(ProviderError) as caught:
        await manager.refresh()
    credential = await manager.refresh()
    await manager.aclose()

    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert issuer.verify("ann", credential.password) is None


async def test_an_issuer_without_the_device_grant_is_named(make, issuer, person):
    def handle(request):
        return httpx.Response(
            200, json={"issuer": "https://login.example.com", "token_endpoint": "https://login.example.com/token"}
        )

    client = httpx.MockTransport(handle)
    provider = make(
        "https://login.example.com",
        client_id="cli",
        prompt=person,
        http_client=lambda: httpx.AsyncClient(transport=client),
    )

    error = await refusal(provider)

    assert not error.retryable
    assert "names no device_authorization_endpoint" in str(error)


# The pace of a device, in virtual time


class Pace:
    """An issuer that follows a script, and the seconds between the polls it saw."""

    issuer = "https://login.example.com"

    def __init__(self, *answers, **authorization):
        self._clock = VirtualClock()
        self._answers = iter(answers)
        members = {
            "device_code": secret("device"),
            "user_code": "WDJB-MJHT",
            "verification_uri": "https://e.org/device",
        }
        self._authorization = {**members, "expires_in": 600, **authorization}
        self.gaps = []
        self.prompts = []
        self._asked_at = 0.0

    def _handle(self, request):
        match request.url.path:
            case "/device":
                self._asked_at = self._clock.monotonic()
                return httpx.Response(200, json={k: v for k, v in self._authorization.items() if v is not None})
            case "/token":
                self.gaps.append(self._clock.monotonic() - self._asked_at)
                self._asked_at = self._clock.monotonic()
                answer = next(self._answers)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            case _:
                addresses = {
                    "token_endpoint": f"{self.issuer}/token",
                    "device_authorization_endpoint": f"{self.issuer}/device",
                }
                return httpx.Response(200, json={"issuer": self.issuer, **addresses})

    def log_in(self):
        """Return the credential, or raise what the provider raises."""

        async def main():
            provider = OAuth2(
                self.issuer,
                client_id="cli",
                prompt=self.prompts.append,
                http_client=lambda: httpx.AsyncClient(transport=httpx.MockTransport(self._handle)),
                clock=self._clock,
            )
            try:
                return await provider.fetch()
            finally:
                await provider.aclose()

        return self._clock.run(main())


def error(code, status=400, **headers):
    return httpx.Response(status, json={"error": code}, headers=headers)


def pending():
    return error("authorization_pending")


def tokens():
    return httpx.Response(200, json={"access_token": secret("access"), "token_type": "Bearer"})


@pytest.mark.parametrize(
    ("interval", "pause"), [(7, 7), ("7", 7), (0.5, 0.5), (None, 5), (0, 5), (-1, 5), ("often", 5), (True, 5)]
)
def test_a_device_polls_as_often_as_the_issuer_says(interval, pause):
    pace = Pace(pending(), pending(), tokens(), interval=interval)

    pace.log_in()

    assert pace.gaps == [pause] * 3


@pytest.mark.parametrize(
    ("answer", "pause"),
    [
        (error("slow_down"), 12),
        (httpx.ConnectError("no route"), 14),
        (httpx.ReadTimeout("late"), 14),
        (httpx.ReadError("reset"), 14),
        (httpx.Response(200, text="<html>"), 14),
        (httpx.Response(503), 14),
        (httpx.Response(429, headers={"Retry-After": "60"}), 60),
        (error("too_many_requests", 429), 14),
        (error("temporarily_unavailable", 503, **{"Retry-After": "1"}), 14),
        (error("server_error", 500), 14),
    ],
)
def test_a_device_that_is_in_the_way_polls_less_often_and_goes_on(answer, pause):
    pace = Pace(answer, pending(), tokens(), interval=7)

    credential = pace.log_in()

    assert credential.password == secret("access")
    assert pace.gaps == [7, pause, pause]
    assert len(pace.prompts) == 1


@pytest.mark.parametrize(
    ("answer", "retryable", "says"),
    [
        (error("access_denied"), False, "access_denied"),
        (error("invalid_grant"), False, "invalid_grant"),
        (error("invalid_client", 401), False, "check client_id"),
        (httpx.Response(302, headers={"Location": "https://evil.example.com"}), False, "redirects"),
        (error("expired_token"), True, "nobody logged in before the code expired"),
    ],
)
def test_an_answer_that_ends_the_login_is_told(answer, retryable, says):
    pace = Pace(pending(), answer)

    with pytest.raises(ProviderError, match=says) as caught:
        pace.log_in()

    assert caught.value.retryable is retryable
    assert len(pace.gaps) == 2


def test_a_device_does_not_poll_for_longer_than_its_code_lives():
    pace = Pace(*(pending() for _ in range(20)), expires_in=60)

    with pytest.raises(ProviderError, match="nobody logged in before the code expired"):
        pace.log_in()

    assert pace.gaps == [5] * 12


@pytest.mark.parametrize(
    "members",
    [
        {"device_code": None},
        {"user_code": 5},
        {"verification_uri": None},
        {"expires_in": None},
        {"expires_in": "soon"},
        {"expires_in": 1e12},
    ],
)
def test_what_is_no_device_authorization_is_refused(members):
    pace = Pace(**members)

    with pytest.raises(ProviderError, match="no device authorization") as caught:
        pace.log_in()

    assert not caught.value.retryable
    assert pace.prompts == []


def test_an_address_that_needs_no_typing_is_optional():
    pace = Pace(tokens())

    pace.log_in()

    (prompt,) = pace.prompts
    assert isinstance(prompt, DevicePrompt)
    assert prompt.verification_uri_complete is None


# Somebody else's token


@pytest.fixture
async def cluster():
    """Whose tokens the issuer trusts: a Kubernetes cluster, say."""
    async with TokenIssuer(algorithm="RS256") as running:
        running.rotate_key()  # else it would have the key of every other issuer
        yield running


@pytest.fixture
async def trusting(cluster):
    async with TokenIssuer(
        clients={"app": secret("client")}, trusted_issuers={cluster.url: cluster.public_key}
    ) as running:
        yield running


def sync(token):
    return token


def callable_sync(token):
    return lambda: token


def callable_async(token):
    async def give():
        await asyncio.sleep(0)
        return token

    return give


@pytest.mark.parametrize("give", [sync, callable_sync, callable_async])
async def test_an_assertion_is_exchanged_for_a_token(make, trusting, cluster, give):
    provider = make(
        trusting.url,
        assertion=give(cluster.mint("worker", audience=trusting.url)),
        user_claim="sub",
        client_id="app",
        client_secret=secret("client"),
    )

    credential = await provider.fetch()

    assert credential.user == "worker"
    assert trusting.verify("worker", credential.password) is None
    assert trusting.requests == {BEARER: 1}


async def test_a_function_is_asked_for_an_assertion_for_every_login(make, trusting, cluster):
    provider = make(
        token_url=trusting.token_url,
        client_id="app",
        client_secret=secret("client"),
        assertion=lambda: cluster.mint("worker", audience=trusting.token_url),
    )

    credentials = [await provider.fetch() for _ in range(3)]

    assert [trusting.verify("worker", credential.password) for credential in credentials] == [None] * 3
    assert trusting.requests == {BEARER: 3}


async def test_an_assertion_that_was_used_up_is_refused_for_good(make, trusting, cluster):
    assertion = cluster.mint("worker", audience=trusting.url)
    provider = make(trusting.url, client_id="app", client_secret=secret("client"), assertion=assertion)
    await provider.fetch()

    error = await refusal(provider)

    assert not error.retryable
    assert "invalid_grant" in str(error)


@pytest.mark.parametrize("give", [sync, callable_sync, callable_async])
async def test_a_token_is_exchanged_for_another(make, trusting, cluster, give):
    provider = make(
        trusting.url,
        client_id="app",
        client_secret=secret("client"),
        subject_token=give(cluster.mint("worker")),
        subject_token_type=ID_TOKEN,
        audience="database",
    )

    credentials = [await provider.fetch() for _ in range(2)]

    assert trusting.requests == {EXCHANGE: 2}
    for credential in credentials:
        claims = jwt.decode(credential.password, options={"verify_signature": False})
        assert (claims["sub"], claims["aud"]) == ("worker", "database")


async def test_the_parameters_of_a_token_exchange_reach_the_issuer(make):
    seen = []

    def handle(request):
        seen.append(dict(httpx.QueryParams(request.content.decode())))
        return tokens()

    provider = make(
        token_url="https://login.example.com/token",
        subject_token=secret("subject"),
        scope="db",
        extra={"requested_token_type": ID_TOKEN, "actor_token": secret("actor"), "actor_token_type": ID_TOKEN},
        http_client=lambda: httpx.AsyncClient(transport=httpx.MockTransport(handle)),
    )

    await provider.fetch()

    assert seen == [
        {
            "grant_type": EXCHANGE,
            "subject_token": secret("subject"),
            "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "scope": "db",
            "requested_token_type": ID_TOKEN,
            "actor_token": secret("actor"),
            "actor_token_type": ID_TOKEN,
        }
    ]


def fail():
    raise FileNotFoundError("/var/run/secrets/token")


async def fail_later():
    await asyncio.sleep(0)
    fail()


@pytest.mark.parametrize("argument", ["assertion", "subject_token", "client_assertion"])
@pytest.mark.parametrize("function", [fail, fail_later])
async def test_a_token_that_cannot_be_had_is_an_error_that_names_it(make, trusting, argument, function):
    error = await refusal(make(trusting.url, client_id="app", **{argument: function}))

    assert error.retryable
    assert f"{argument} raised FileNotFoundError" in str(error)
    assert isinstance(error.__cause__, FileNotFoundError)
    assert trusting.fetches == 0


async def test_what_a_function_for_tokens_says_in_our_words_is_passed_on(make, trusting):
    def fail():
        raise ProviderError("the signer is out of order", retryable=False, retry_after=5)

    error = await refusal(make(trusting.url, assertion=fail))

    assert (str(error), error.retryable, error.retry_after) == ("the signer is out of order", False, 5)


@pytest.mark.parametrize("token", [None, "", b"bytes"])
async def test_what_is_no_token_is_not_sent(make, trusting, token):
    error = await refusal(make(trusting.url, assertion=lambda: token))

    assert not error.retryable
    assert "assertion gave no token" in str(error)
    assert trusting.fetches == 0


@pytest.mark.parametrize("argument", ["assertion", "subject_token"])
async def test_no_token_of_somebody_else_is_quoted(make, trusting, argument):
    token = secret("of somebody else")
    trusting.fail_next("invalid_grant", description=f"what do I do with {token}?")

    error = await refusal(make(trusting.url, **{argument: token}))

    assert "[redacted]" in str(error)
    assert_no_secret(error)


# A client that signs

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC_KEY = (
    KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
)


def signing(issuer):
    """Return what makes a client assertion (RFC 7523 section 2.2), and counts what it made."""
    made = []

    def sign():
        made.append(time.time())
        claims = {"iss": "app", "sub": "app", "aud": issuer.token_url, "exp": made[-1] + 60, "jti": str(len(made))}
        return jwt.encode(claims, KEY, "ES256")

    return sign, made


@pytest.fixture
async def of_signers():
    async with TokenIssuer(
        {"ann": secret("password")}, client_keys={"app": PUBLIC_KEY}, device_interval=0.01
    ) as running:
        yield running


async def test_a_client_signs_every_request(make, of_signers):
    sign, made = signing(of_signers)
    provider = make(of_signers.url, client_id="app", client_assertion=sign, user_claim="sub")

    credentials = [await provider.fetch() for _ in range(3)]

    assert [credential.user for credential in credentials] == ["app"] * 3
    assert of_signers.requests == {"client_credentials": 3}
    assert len(made) == 3


async def test_a_client_signs_for_people_too(make, of_signers):
    sign, made = signing(of_signers)
    person = Person(of_signers)
    options = {"client_id": "app", "client_assertion": sign}
    by_password = make(of_signers.url, username="ann", password=secret("password"), **options)
    at_a_device = make(of_signers.url, prompt=person.log_in_at_once, **options)

    credentials = [await provider.fetch() for provider in (by_password, at_a_device) for _ in range(2)]

    assert [of_signers.verify("ann", credential.password) for credential in credentials] == [None] * 4
    assert of_signers.requests == {"password": 1, DEVICE: 1, "refresh_token": 2}
    assert len(made) == 5


@pytest.mark.parametrize("what", ["client_assertion", "http_client"])
async def test_a_refresh_token_survives_what_fails_before_it_is_sent(make, of_signers, what):
    sign, _ = signing(of_signers)
    is_broken = False

    def client_assertion():
        if is_broken and what == "client_assertion":
            raise FileNotFoundError("key.pem")
        return sign()

    def http_client():
        if is_broken and what == "http_client":
            raise FileNotFoundError("ca.pem")
        return httpx.AsyncClient()

    storage = MemoryStorage()
    login = {"username": "ann", "password": secret("password")}
    await make(of_signers.url, client_id="app", client_assertion=sign, storage=storage, **login).fetch()
    (key,) = await storage.keys()
    provider = make(
        of_signers.url,
        client_id="app",
        client_assertion=client_assertion,
        http_client=http_client,
        refresh_token=(await storage.load(key)).refresh_token,
    )
    await provider.fetch()
    await provider.aclose()

    is_broken = True
    with pytest.raises((ProviderError, FileNotFoundError)):
        await provider.fetch()
    is_broken = False
    await provider.fetch()

    assert of_signers.requests == {"password": 1, "refresh_token": 2}
    assert of_signers.replays == 0


# Bad arguments

URL = "https://login.example.com/token"
ISSUER = "https://login.example.com"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"issuer": ISSUER, "prompt": "show it"}, TypeError, "prompt must be a function"),
        ({"token_url": URL, "prompt": print}, ValueError, "prompt needs issuer"),
        ({"token_url": URL, "assertion": 5}, TypeError, "assertion must be a str"),
        ({"token_url": URL, "assertion": ""}, ValueError, "assertion is empty"),
        ({"token_url": URL, "subject_token": b"planted"}, TypeError, "subject_token must be a str"),
        ({"token_url": URL, "client_assertion": "", "client_id": "app"}, ValueError, "client_assertion is empty"),
        ({"token_url": URL, "client_assertion": "planted"}, ValueError, "client_assertion without client_id"),
        (
            {"token_url": URL, "client_id": "app", "client_secret": "planted", "client_assertion": "planted"},
            ValueError,
            "either client_secret or client_assertion",
        ),
        (
            {"token_url": URL, "client_id": "app", "client_assertion": "planted", "client_auth": "post"},
            ValueError,
            "client_auth without client_secret",
        ),
        (
            {"token_url": URL, "subject_token_type": ID_TOKEN, "assertion": "planted"},
            ValueError,
            "subject_token_type without subject_token",
        ),
        (
            {"token_url": URL, "assertion": "planted", "subject_token": "planted"},
            ValueError,
            "these arguments are for jwt_bearer and token_exchange",
        ),
        (
            {"issuer": ISSUER, "prompt": print, "username": "ann", "password": "planted"},
            ValueError,
            "these arguments are for password and device_code",
        ),
        ({"token_url": URL, "grant": "jwt_bearer"}, ValueError, "'jwt_bearer' needs assertion"),
        ({"token_url": URL, "grant": "token_exchange"}, ValueError, "'token_exchange' needs subject_token"),
        ({"token_url": URL, "grant": "device_code"}, ValueError, "'device_code' needs prompt"),
        (
            {"token_url": URL, "grant": "refresh_token", "assertion": "planted"},
            ValueError,
            "'refresh_token' has no use for assertion",
        ),
        (
            {"token_url": URL, "assertion": "planted", "storage": MemoryStorage()},
            ValueError,
            "storage_key with assertion",
        ),
        (
            {"token_url": URL, "subject_token": "planted", "storage": MemoryStorage()},
            ValueError,
            "storage_key with subject_token",
        ),
        (
            {"token_url": URL, "assertion": "planted", "extra": {"client_assertion": "planted"}},
            ValueError,
            "extra may not contain 'client_assertion'",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, says):
    with pytest.raises(error, match=says) as caught:
        OAuth2(**arguments)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "grant"),
    [
        ({"token_url": URL, "client_id": "app", "grant": "client_credentials"}, "client_credentials"),
        ({"token_url": URL, "client_id": "app", "client_assertion": "planted"}, "client_credentials"),
        (
            {"token_url": URL, "client_id": "app", "client_secret": "planted", "refresh_token": "planted"},
            "refresh_token",
        ),
        ({"token_url": URL, "client_id": "app", "client_secret": "planted", "assertion": "planted"}, "jwt_bearer"),
        ({"token_url": URL, "subject_token": "planted", "refresh_token": "planted"}, "token_exchange"),
        ({"issuer": ISSUER, "prompt": print, "refresh_token": "planted"}, "device_code"),
    ],
)
def test_the_grant_follows_from_the_arguments(arguments, grant):
    shown = repr(OAuth2(**arguments))

    assert shown.startswith(f"<OAuth2 {grant} at ")
    assert "planted" not in shown
