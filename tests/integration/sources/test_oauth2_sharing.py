"""What the OAuth 2.0 provider keeps in a storage: for others, for later, and in spite of the storage."""

from __future__ import annotations

import asyncio
import itertools
import re
import traceback
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx
import pytest
from support import FakeClock, assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import (
    CredentialRefreshed,
    CredentialRefused,
    ProviderError,
    RefreshFailed,
    RefreshTokenExpiring,
    StorageFailed,
    TokenManager,
    create_pool,
)
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.storage import MemoryStorage, StoredTokens
from asyncpool_creds.testing import RecordingObserver, VirtualClock
from asyncpool_creds.testing.door import TokenDoor
from asyncpool_creds.testing.issuer import TokenIssuer

pytestmark = pytest.mark.anyio

LOGIN = {"username": "ann", "password": secret("password")}
DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
DAY = 86_400.0


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def issuer(clock):
    async with TokenIssuer({"ann": secret("password")}, clock=clock) as running:
        yield running


@pytest.fixture
async def live_issuer():
    """One on the machine's clock, for devices, which wait between their polls."""
    async with TokenIssuer({"ann": secret("password")}, device_interval=0.01) as running:
        yield running


@pytest.fixture
async def make(issuer, clock, observer):
    made = []

    def make(**options):
        provider = OAuth2(**{"issuer": issuer.url, "clock": clock, **options})
        provider.report_to(observer)
        made.append(provider)
        return provider

    yield make
    for provider in made:
        await provider.aclose()


@pytest.fixture
def refresh_token(issuer):
    async def refresh_token():
        async with httpx.AsyncClient() as http:
            answer = await http.post(issuer.token_url, data={"grant_type": "password", **LOGIN})
        issuer.requests.clear()
        return answer.json()["refresh_token"]

    return refresh_token


_numbers = itertools.count(1)


def unspent():
    """Return a refresh token that this process has not sent yet, as it knows all those that it has."""
    return secret(f"first {next(_numbers)}")


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


# What another one has fetched


async def test_what_another_has_fetched_is_used_and_no_request_is_made(make, issuer):
    storage = MemoryStorage()
    one, other = (make(**LOGIN, storage=storage, user_claim="sub") for _ in range(2))

    first = await one.fetch()
    adopted = await other.fetch()

    assert adopted.is_same_secret(first)
    assert (adopted.user, adopted.expires_at) == ("ann", first.expires_at)
    assert issuer.requests == {"password": 1}
    assert issuer.documents == {"/.well-known/openid-configuration": 1}


async def test_whoever_asks_a_second_time_wants_another_one_and_the_rest_follow(make, issuer):
    storage = MemoryStorage()
    providers = [make(**LOGIN, storage=storage) for _ in range(4)]

    rounds = [[await provider.fetch() for provider in providers] for _ in range(5)]

    assert [len({credential.password for credential in each}) for each in rounds] == [1] * 5
    assert issuer.requests == {"password": 1, "refresh_token": 4}


async def test_two_that_refresh_at_the_same_time_make_one_exchange(make, issuer):
    storage = MemoryStorage()
    one, other = (make(**LOGIN, storage=storage) for _ in range(2))
    await asyncio.gather(one.fetch(), other.fetch())

    first, second = await asyncio.gather(one.fetch(), other.fetch())

    assert first.is_same_secret(second)
    assert issuer.requests == {"password": 1, "refresh_token": 1}


async def test_a_fleet_of_clients_shares_a_token(make, issuer):
    storage = MemoryStorage()
    options = {"client_id": "app", "client_secret": secret("client"), "storage": storage}
    fleet = [make(**options) for _ in range(5)]

    for _ in range(3):
        await asyncio.gather(*(provider.fetch() for provider in fleet))

    assert issuer.requests == {"client_credentials": 3}


@pytest.mark.parametrize(
    ("life", "age", "is_adopted"),
    [(300, 239, True), (300, 240, False), (300, 400, False), (7200, 6899, True), (7200, 6900, False)],
)
async def test_what_a_manager_would_refresh_at_once_is_not_adopted(make, issuer, clock, life, age, is_adopted):
    issuer.access_lifetime = life
    storage = MemoryStorage()
    first = await make(**LOGIN, storage=storage).fetch()

    clock.now += age
    second = await make(**LOGIN, storage=storage).fetch()

    assert second.is_same_secret(first) is is_adopted
    assert issuer.fetches == (1 if is_adopted else 2)


async def test_what_has_no_end_is_adopted_at_any_age(make, issuer, clock):
    issuer.opaque_access_tokens = True
    issuer.answer["expires_in"] = None
    storage = MemoryStorage()
    first = await make(**LOGIN, storage=storage).fetch()

    clock.now += 365 * DAY

    assert (await make(**LOGIN, storage=storage).fetch()).is_same_secret(first)


async def test_what_is_shared_outlives_an_issuer_that_is_down(make, issuer):
    storage = MemoryStorage()
    first = await make(**LOGIN, storage=storage).fetch()

    await issuer.go_down()

    assert (await make(**LOGIN, storage=storage).fetch()).is_same_secret(first)


async def test_what_a_server_refused_is_not_adopted(make, issuer):
    storage = MemoryStorage()
    refused = await make(**LOGIN, storage=storage).fetch()
    provider = make(**LOGIN, storage=storage)

    provider.invalidate(refused)
    credential = await provider.fetch()

    assert not credential.is_same_secret(refused)
    assert issuer.requests == {"password": 1, "refresh_token": 1}


async def test_a_token_that_is_refused_everywhere_is_replaced_once(make, issuer):
    storage = MemoryStorage()
    managers = [TokenManager(make(**LOGIN, storage=storage), background=False, on_event=()) for _ in range(3)]
    refused = [await manager.get() for manager in managers]

    for manager, credential in zip(managers, refused, strict=True):
        manager.invalidate(credential)
    renewed = [await manager.get() for manager in managers]
    for manager in managers:
        await manager.aclose()

    assert (
        len({credential.password for credential in refused})
        == len({credential.password for credential in renewed})
        == 1
    )
    assert not renewed[0].is_same_secret(refused[0])
    assert issuer.requests == {"password": 1, "refresh_token": 1}


@pytest.mark.parametrize(
    "difference",
    [
        {"username": "bob"},
        {"client_id": "app"},
        {"scope": "openid"},
        {"audience": "other"},
        {"extra": {"resource": "r"}},
        {"use": "id_token", "scope": "openid"},
        {"user": "somebody"},
        {"storage_key": "other"},
    ],
)
async def test_those_who_ask_for_something_else_do_not_share(make, issuer, difference):
    issuer.users.add("bob", secret("password"))
    storage = MemoryStorage()
    first = await make(**LOGIN, storage=storage).fetch()

    second = await make(**{**LOGIN, **difference}, storage=storage).fetch()

    assert not second.is_same_secret(first)
    assert issuer.requests == {"password": 2}


async def test_a_client_does_not_pass_for_the_person_who_logs_in_with_it(make, live_issuer):
    storage = MemoryStorage()
    app = {"issuer": live_issuer.url, "clock": None, "client_id": "app", "storage": storage}
    await make(**app, client_secret=secret("client")).fetch()

    person = make(**app, prompt=lambda prompt: live_issuer.approve(prompt.user_code, "ann"))

    assert live_issuer.verify("ann", (await person.fetch()).password) is None


# Refresh tokens that may be used again


async def test_a_reusable_refresh_token_is_marked_once_and_survives_a_lost_answer(make, issuer, refresh_token):
    issuer.rotate_refresh_tokens = False
    marks = []

    class WatchedStorage(MemoryStorage):
        async def save(self, key, tokens):
            marks.append(tokens.is_being_spent)
            await super().save(key, tokens)

    provider = make(refresh_token=await refresh_token(), storage=WatchedStorage())
    await provider.fetch()
    await provider.fetch()
    issuer.lose_response()

    error = await refusal(provider)
    await provider.fetch()

    assert error.retryable
    assert "broke before the answer was complete" in str(error)
    assert marks == [True, False, False, False]
    assert issuer.requests == {"refresh_token": 4}


async def test_an_issuer_may_begin_to_rotate_refresh_tokens(make, issuer, refresh_token):
    issuer.rotate_refresh_tokens = False
    provider = make(refresh_token=await refresh_token())
    await provider.fetch()
    issuer.rotate_refresh_tokens = True

    for _ in range(3):
        await provider.fetch()
    issuer.lose_response()
    error = await refusal(provider)

    assert "A new login is needed" in str(error)
    assert issuer.replays == 0


# A storage that fails


class FailingStorage(MemoryStorage):
    """Fails at what is named in `failing`: "lock", "unlock", "load", "mark", "save".

    "late" makes a save that fails one that has happened all the same.
    """

    def __init__(self, *failing):
        super().__init__()
        self.failing = set(failing)

    @asynccontextmanager
    async def lock(self, key):
        self._fail_at("lock")
        async with super().lock(key):
            yield
            self._fail_at("unlock")

    async def load(self, key):
        self._fail_at("load")
        return await super().load(key)

    async def save(self, key, tokens):
        if "late" in self.failing:
            await super().save(key, tokens)
        self._fail_at("mark" if tokens.is_being_spent else "save")
        await super().save(key, tokens)

    def _fail_at(self, what):
        if what in self.failing:
            raise OSError(f"cannot {what}")


@pytest.mark.parametrize("what", ["lock", "load", "mark"])
async def test_who_can_log_in_alone_does_so_while_the_storage_fails(make, issuer, observer, what):
    storage = FailingStorage()
    provider = make(**LOGIN, storage=storage)
    await provider.fetch()

    storage.failing = {what}
    credentials = [await provider.fetch() for _ in range(2)]
    storage.failing = set()
    credentials.append(await provider.fetch())

    assert [issuer.verify("ann", credential.password) for credential in credentials] == [None] * 3
    assert issuer.requests == {"password": 3, "refresh_token": 1}
    assert issuer.replays == 0
    assert {event.action for event in observer.of(StorageFailed)} == {"save" if what == "mark" else what}
    assert all(f"cannot {what}" in event.message for event in observer.of(StorageFailed))


@pytest.mark.parametrize("what", ["lock", "load", "mark"])
async def test_a_refresh_token_is_not_sent_while_the_storage_fails(make, issuer, refresh_token, what):
    storage = FailingStorage(what)
    provider = make(refresh_token=await refresh_token(), storage=storage)

    errors = [await refusal(provider) for _ in range(2)]
    sent = issuer.fetches
    storage.failing = set()
    credentials = [await provider.fetch() for _ in range(2)]

    assert sent == 0
    assert [error.retryable for error in errors] == [True, True]
    assert all("storage of the refresh token failed" in str(error) for error in errors)
    assert all(isinstance(error.__cause__, OSError) for error in errors)
    assert [issuer.verify("ann", credential.password) for credential in credentials] == [None] * 2
    assert issuer.requests == {"refresh_token": 2}


@pytest.mark.parametrize("what", ["lock", "load", "mark"])
async def test_nobody_is_asked_to_log_in_because_the_storage_fails(make, live_issuer, what):
    prompts = []

    def prompt(shown):
        prompts.append(shown)
        live_issuer.approve(shown.user_code, "ann")

    storage = FailingStorage()
    provider = make(issuer=live_issuer.url, clock=None, client_id="cli", prompt=prompt, storage=storage)
    await provider.fetch()
    storage.failing = {what}

    error = await refusal(provider)
    storage.failing = set()
    await provider.fetch()

    assert error.retryable
    assert len(prompts) == 1
    assert live_issuer.requests == {DEVICE: 1, "refresh_token": 1}


async def test_a_mark_that_was_made_though_the_storage_failed_is_taken_back(make, issuer, refresh_token):
    storage = FailingStorage("mark", "late")
    provider = make(refresh_token=await refresh_token(), storage=storage, storage_key="key")
    await refusal(provider)
    (key,) = await storage.keys()
    marked = await storage.load(key)
    storage.failing = set()

    await provider.aclose()
    tokens = await storage.load(key)
    await provider.fetch()

    assert (marked.is_being_spent, tokens.is_being_spent) == (True, False)
    assert issuer.requests == {"refresh_token": 1}


async def test_what_only_memory_has_is_used_though_it_cannot_be_marked(make, issuer, refresh_token):
    storage = FailingStorage("save")
    provider = make(refresh_token=await refresh_token(), storage=storage)
    await provider.fetch()
    storage.failing = {"save", "mark"}

    credentials = [await provider.fetch() for _ in range(3)]
    storage.failing = set()
    credentials.append(await provider.fetch())

    assert [issuer.verify("ann", credential.password) for credential in credentials] == [None] * 4
    assert issuer.requests == {"refresh_token": 5}
    assert issuer.replays == 0


async def test_what_only_memory_has_is_not_sent_again_either_when_its_answer_is_lost(make, issuer, refresh_token):
    storage = FailingStorage("save")
    provider = make(refresh_token=await refresh_token(), storage=storage)
    await provider.fetch()
    storage.failing = {"save", "mark"}
    issuer.lose_response()

    errors = [await refusal(provider) for _ in range(2)]

    assert all("A new login is needed" in str(error) for error in errors)
    assert issuer.requests == {"refresh_token": 2}
    assert issuer.replays == 0


async def test_a_storage_that_cannot_unlock_is_reported_and_no_more(make, issuer, observer):
    provider = make(**LOGIN, storage=FailingStorage("unlock"))

    credential = await provider.fetch()

    assert issuer.verify("ann", credential.password) is None
    assert [event.action for event in observer.of(StorageFailed)] == ["lock"]


async def test_what_a_storage_says_in_a_foreign_exception_is_not_repeated(make, observer):
    class ChattyStorage(MemoryStorage):
        async def load(self, key):
            raise ValueError(f"what is {secret('stored')}?")

    await make(**LOGIN, storage=ChattyStorage()).fetch()

    (event,) = observer.of(StorageFailed)
    assert re.fullmatch(r"ValueError at test_oauth2_sharing\.py:\d+ in load", event.message)
    assert str(event.error) == f"the storage raised {event.message}"


async def test_a_foreign_exception_of_a_storage_is_nowhere_in_the_error(make, refresh_token):
    class ChattyStorage(MemoryStorage):
        async def load(self, key):
            raise LookupError(f"what is {secret('stored')}?")

    error = await refusal(make(refresh_token=await refresh_token(), storage=ChattyStorage()))

    assert str(error.__cause__).startswith("the storage raised LookupError at test_oauth2_sharing.py")
    assert_no_secret(error)


async def test_the_error_in_an_event_has_no_tokens_in_its_frames(issuer):
    class CarelessStorage(MemoryStorage):
        async def save(self, key, tokens):
            text = tokens.to_json()
            raise OSError(f"cannot save {len(text)} characters")

    shown = []

    def show(event):
        if isinstance(event, StorageFailed):
            shown.extend(traceback.TracebackException.from_exception(event.error, capture_locals=True).format())

    provider = OAuth2(issuer.url, **LOGIN, storage=CarelessStorage())
    provider.report_to(show)
    credential = await provider.fetch()
    await provider.aclose()

    assert "cannot save" in "".join(shown)
    assert credential.password not in "".join(shown)


@pytest.mark.parametrize("what", ["lock", "load", "mark", None])
async def test_an_error_leaves_no_token_in_the_frames_it_came_through(make, issuer, refresh_token, what):
    storage = FailingStorage()
    provider = make(refresh_token=await refresh_token(), storage=storage)
    await provider.fetch()
    if what is None:
        issuer.lose_response()
    else:
        storage.failing = {what}

    error = await refusal(provider)

    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    issued = (await storage.load((await MemoryStorage.keys(storage))[0])).refresh_token if what != "load" else None
    assert "in _run" in shown
    assert issued is None or issued not in shown
    assert not re.search(r"refresh_token = |token = '", shown)


async def test_closing_saves_what_could_not_be_saved(make, issuer):
    storage = FailingStorage()
    provider = make(**LOGIN, storage=storage)
    await provider.fetch()
    storage.failing = {"save"}
    newest = await provider.fetch()
    storage.failing = set()

    await provider.aclose()
    adopted = await make(**LOGIN, storage=storage).fetch()

    assert adopted.is_same_secret(newest)
    assert tasks_of_ours() == set()


async def test_closing_while_the_storage_fails_is_closing(make, observer):
    storage = FailingStorage("save")
    provider = make(**LOGIN, storage=storage)
    await provider.fetch()

    await provider.aclose()

    assert tasks_of_ours() == set()
    assert len(observer.of(StorageFailed)) == 2


async def test_closing_during_an_exchange_saves_its_result_or_leaves_no_task(make, issuer):
    storage = FailingStorage()
    provider = make(**LOGIN, storage=storage)
    await provider.fetch()
    storage.failing = {"save"}
    issuer.hang()
    fetch = asyncio.create_task(provider.fetch())
    await issuer.reached()
    closing = asyncio.create_task(provider.aclose())
    await asyncio.sleep(0)

    issuer.resume()
    await closing
    await fetch

    assert tasks_of_ours() == set()


async def test_closing_while_a_login_is_being_stored_lets_it_be_stored(make, issuer):
    class SlowStorage(MemoryStorage):
        def __init__(self):
            super().__init__()
            self.is_saving, self.may_go_on = asyncio.Event(), asyncio.Event()

        async def save(self, key, tokens):
            self.is_saving.set()
            await self.may_go_on.wait()
            await super().save(key, tokens)

    storage = SlowStorage()
    provider = make(**LOGIN, storage=storage)
    fetch = asyncio.create_task(provider.fetch())
    await storage.is_saving.wait()
    closing = asyncio.create_task(provider.aclose())
    await asyncio.sleep(0)

    storage.may_go_on.set()
    await closing

    assert (await make(**LOGIN, storage=storage).fetch()).is_same_secret(await fetch)
    assert issuer.requests == {"password": 1}


# In virtual time: an issuer that follows a script


class Script:
    """A provider whose issuer is a function, on a clock that jumps."""

    def __init__(self, answer, **options):
        self.clock = VirtualClock()
        self.times = []
        self.observer = RecordingObserver()
        self._answer = answer
        self._options = options

    def _handle(self, request):
        self.times.append(self.clock.monotonic())
        return self._answer(dict(httpx.QueryParams(request.content.decode())))

    def provider(self, **options):
        options = {"token_url": "https://login.example.com/token", **self._options, **options}
        transport = httpx.MockTransport(self._handle)
        return OAuth2(http_client=lambda: httpx.AsyncClient(transport=transport), clock=self.clock, **options)


def tokens(number, **members):
    return httpx.Response(200, json={"access_token": f"access {number}", "token_type": "Bearer", **members})


def test_what_could_not_be_saved_is_saved_in_the_background_with_growing_pauses():
    script = Script(lambda _: tokens(1, refresh_token=secret("new")), refresh_token=unspent())
    attempts = []

    class TimedStorage(FailingStorage):
        async def save(self, key, tokens):
            attempts.append(script.clock.monotonic())
            await super().save(key, tokens)

    storage = TimedStorage("save")

    async def main():
        provider = script.provider(storage=storage, storage_key="key")
        provider.report_to(script.observer)
        await provider.fetch()
        await asyncio.sleep(200)
        storage.failing = set()
        await asyncio.sleep(61)
        (key,) = await storage.keys()
        saved = await storage.load(key)
        left = tasks_of_ours()
        await provider.aclose()
        return saved, left

    saved, left = script.clock.run(main())

    # The mark and the first attempt; then one second later, two, four... at most a minute.
    assert attempts == [0, 0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert saved.refresh_token == secret("new")
    assert saved.credential.password == "access 1"
    assert left == set()
    assert len(script.observer.of(StorageFailed)) == 9


@pytest.mark.parametrize("what", ["lock", "load"])
def test_a_storage_that_fails_at_more_than_saving_is_tried_again_too(what):
    script = Script(lambda _: tokens(1, refresh_token=secret("new")), refresh_token=unspent())
    storage = FailingStorage("save")

    async def main():
        provider = script.provider(storage=storage)
        provider.report_to(script.observer)
        await provider.fetch()
        storage.failing = {what}
        await asyncio.sleep(20)
        storage.failing = set()
        await asyncio.sleep(20)
        (key,) = await storage.keys()
        saved = await storage.load(key)
        await provider.aclose()
        return saved

    assert script.clock.run(main()).refresh_token == secret("new")


def test_what_another_has_stored_meanwhile_is_not_overwritten_in_the_background():
    script = Script(lambda _: tokens(1, refresh_token=secret("mine")), refresh_token=unspent())
    storage = FailingStorage("save")
    others = StoredTokens(refresh_token=secret("others"))

    async def main():
        provider = script.provider(storage=storage)
        provider.report_to(script.observer)
        await provider.fetch()
        (key,) = await storage.keys()
        storage.failing = set()
        await storage.save(key, others)
        await asyncio.sleep(60)
        stored, left = await storage.load(key), tasks_of_ours()
        await provider.aclose()
        return stored, left

    assert script.clock.run(main()) == (others, set())


def test_closing_does_not_wait_for_ever_for_a_storage_that_hangs():
    script = Script(lambda _: tokens(1, refresh_token=secret("new")), refresh_token=unspent())

    class HangingStorage(FailingStorage):
        hangs = False

        async def load(self, key):
            if self.hangs:
                await asyncio.Event().wait()
            return await super().load(key)

    storage = HangingStorage("save")

    async def main():
        provider = script.provider(storage=storage)
        provider.report_to(script.observer)
        await provider.fetch()
        storage.hangs = True
        await provider.aclose()
        return script.clock.monotonic(), tasks_of_ours()

    assert script.clock.run(main()) == (5, set())


def test_an_issuer_that_asks_for_patience_gets_it():
    answers = iter(
        [
            tokens(1, expires_in=200),  # it is asked again within a third of what is left of this
            httpx.Response(429, headers={"Retry-After": "7"}),
            httpx.Response(429, json={"error": "too_many_requests"}, headers={"Retry-After": "4"}),
            tokens(2, expires_in=100),
        ]
    )
    script = Script(lambda _: next(answers), client_id="app", client_secret=secret("client"))

    async def main():
        async with TokenManager(script.provider(), clock=script.clock, on_event=script.observer) as manager:
            await script.observer.seen(CredentialRefreshed, count=2)
            assert (await manager.get()).password == "access 2"

    script.clock.run(main())

    first, second, third, fourth = script.times
    assert first == 0
    assert 160 <= second <= 180
    assert third - second == pytest.approx(7)
    assert fourth - third == pytest.approx(4)
    assert [event.retry_in for event in script.observer.of(RefreshFailed)] == [7, 4]
    assert all(event.still_valid for event in script.observer.of(RefreshFailed))


# Refresh tokens that end


class Lives:
    """An issuer whose refresh tokens live as `life` says: a function of the time since the login."""

    def __init__(self, life, *, access=300.0, **options):
        self._life, self._access = life, access
        self._number = 0
        self.script = Script(self._answer, **{"refresh_token": unspent(), **options})

    def _answer(self, form):
        self._number += 1
        life = self._life(self.script.clock.monotonic())
        member = {} if life is None else {"refresh_expires_in": life}
        return tokens(self._number, expires_in=self._access, refresh_token=secret(str(self._number)), **member)

    def warnings(self, *, days, every=3600.0):
        """Return what was warned of by fetching for so long, as days since the start."""
        clock, observer = self.script.clock, self.script.observer

        async def main():
            provider = self.script.provider()
            provider.report_to(observer)
            for _ in range(int(days * DAY / every)):
                await provider.fetch()
                await asyncio.sleep(every)
            await provider.aclose()

        start = clock.now()
        clock.run(main())
        return [round((event.at - start) / timedelta(days=1), 1) for event in observer.of(RefreshTokenExpiring)]


def test_a_refresh_token_whose_end_is_fixed_is_warned_of_once_in_time():
    # Whole seconds, as issuers state them: the end that follows from them is another one each time.
    lives = Lives(lambda now: int(10 * DAY - now - 0.3 * (now % 7)))

    assert lives.warnings(days=9.9, every=3601.3) == [7.0]
    (event,) = lives.script.observer.of(RefreshTokenExpiring)
    assert event.provider == "oauth2"
    assert abs(event.expires_at - (event.at + timedelta(days=3))) < timedelta(hours=1.1)
    assert event.advice == "log in again by then, and pass its refresh_token"


@pytest.mark.parametrize(
    ("life", "access"),
    [
        (lambda _: 30 * DAY, 300),
        (lambda _: 1800, 300),
        (lambda _: 300, 300),  # as long as the access token, which is refreshed sooner
        (lambda _: DAY, 300),
        (lambda now: int(now + DAY) - now, 300),  # a JSON Web Token, which ends with a whole second
        (lambda _: None, 300),
        (lambda _: 0, 300),  # Keycloak's word for never
    ],
)
@pytest.mark.parametrize("every", [240, 0.7])
def test_a_refresh_token_that_refreshing_prolongs_is_not_warned_of(life, access, every):
    assert Lives(life, access=access).warnings(days=every * 30 / DAY, every=every) == []


def test_a_refresh_token_that_ends_before_it_is_needed_is_warned_of_at_once():
    assert Lives(lambda _: 60, access=300).warnings(days=300 / DAY, every=300) == [0.0]


def test_a_refresh_token_whose_prolongation_comes_to_an_end_is_warned_of():
    # A session that idles out after an hour, and ends after ten.
    lives = Lives(lambda now: int(min(3600, 36_000 - now)))

    assert lives.warnings(days=35_900 / DAY, every=300) == [0.4]


def test_who_can_log_in_alone_is_not_warned():
    lives = Lives(lambda now: int(10 * DAY - now), username="ann", password=secret("password"))

    assert lives.warnings(days=9.9) == []


def test_a_person_who_will_be_asked_is_warned_of_that():
    lives = Lives(lambda now: int(10 * DAY - now), prompt=print, issuer="https://login.example.com", token_url=None)
    handle = lives.script._handle

    def with_metadata(request):
        if request.method == "GET":
            where = "https://login.example.com"
            return httpx.Response(200, json={"issuer": where, "token_endpoint": f"{where}/token"})
        return handle(request)

    lives.script._handle = with_metadata

    assert lives.warnings(days=9.9) == [7.0]
    (event,) = lives.script.observer.of(RefreshTokenExpiring)
    assert event.advice == "somebody must log in again by then; the next fetch after it will ask for it"


async def test_the_managers_observers_are_told(issuer, clock, refresh_token, observer):
    issuer.answer["refresh_expires_in"] = 10
    async with TokenManager(
        OAuth2(issuer.url, refresh_token=await refresh_token(), clock=clock), clock=clock, on_event=observer
    ):
        assert len(observer.of(RefreshTokenExpiring)) == 1


async def test_the_end_of_a_refresh_token_that_stays_is_remembered(make, issuer, clock):
    issuer.rotate_refresh_tokens = False
    issuer.answer["refresh_expires_in"] = 600
    provider = make(**LOGIN)
    await provider.fetch()
    issuer.answer["refresh_expires_in"] = None
    await provider.fetch()

    clock.now += 600
    await provider.fetch()

    assert issuer.requests == {"password": 2, "refresh_token": 1}


# A pool, and an issuer that changes its keys


@pytest.mark.parametrize("keep_old", [True, False])
async def test_a_pool_goes_on_when_the_issuer_changes_its_key(server, observer, keep_old):
    async with TokenIssuer({"app": secret("password")}) as issuer, TokenDoor(server, issuer.verify) as door:
        credentials = OAuth2(issuer.url, username="app", password=secret("password"))
        async with create_pool(
            door.dsn(user="app"), credentials=credentials, min_size=1, max_size=3, on_event=observer
        ) as pool:
            assert await pool.fetchval("SELECT 1") == 1
            issuer.rotate_key(keep_old=keep_old)
            await pool.expire_connections()

            assert await pool.fetchval("SELECT 1") == 1

        # A key that is gone takes the refresh tokens with it that were signed with it.
        assert issuer.requests == ({"password": 1} if keep_old else {"password": 2, "refresh_token": 1})
        assert issuer.documents == {"/.well-known/openid-configuration": 1}
        assert {event.retrying for event in observer.of(CredentialRefused)} == (set() if keep_old else {True})
