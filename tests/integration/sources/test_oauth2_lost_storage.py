"""A storage loses tokens or goes back to older ones: no refresh token that was spent is sent again."""

from __future__ import annotations

import asyncio

import httpx
import processes
import pytest
from redis_server import RedisServer
from storages import Place
from support import FakeClock, secret

from asyncpool_creds import ProviderError, StorageFailed
from asyncpool_creds.providers.oauth2 import OAuth2
from asyncpool_creds.storage import MemoryStorage, SpentMarks
from asyncpool_creds.testing.issuer import TokenIssuer

pytestmark = pytest.mark.anyio

LOGIN = {"username": "ann", "password": secret("password")}


@pytest.fixture(scope="module")
def redis():
    with RedisServer(password=secret("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", "keyring", "keyring in parts", "redis"])
def place(request, tmp_path, redis):
    return Place(request.param, str(tmp_path), redis.url())


@pytest.fixture
async def storage(place):
    async with place.opened() as storage:
        yield storage


@pytest.fixture
async def issuer():
    async with TokenIssuer({"ann": secret("password")}) as running:
        yield running
        assert (running.replays, running.revoked_families) == (0, 0)


@pytest.fixture
async def refresh_token(issuer):
    async with httpx.AsyncClient() as http:
        answer = await http.post(issuer.token_url, data={"grant_type": "password", **LOGIN})
    issuer.requests.clear()
    return answer.json()["refresh_token"]


@pytest.fixture
async def make(issuer, observer):
    made = []

    def make(**options):
        provider = OAuth2(**{"issuer": issuer.url, **options})
        provider.report_to(observer)
        made.append(provider)
        return provider

    yield make
    for provider in made:
        await provider.aclose()


async def refusal(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


async def entry_of(storage):
    (key,) = await storage.keys()
    return key, await storage.load(key)


class Switchable(MemoryStorage):
    """Fails to save from a given save on, and keeps marks, which outlive the tokens."""

    def __init__(self):
        super().__init__()
        self.saves = self.failing_from = 0
        self.marks = {}
        self.failing_marks = False

    async def save(self, key, tokens):
        self.saves += 1
        if self.failing_from and self.saves >= self.failing_from:
            raise OSError("READONLY You can't write against a read only replica.")
        await super().save(key, tokens)

    async def load_mark(self, key):
        return self.marks.get(key)

    async def save_mark(self, key, mark):
        if self.failing_marks:
            raise OSError("cannot mark")
        self.marks[key] = mark


# Emptied


async def test_an_emptied_storage_needs_a_login_and_no_request(make, issuer, storage, refresh_token):
    provider = make(refresh_token=refresh_token, storage=storage)
    for _ in range(2):
        await provider.fetch()
    key, _ = await entry_of(storage)

    await storage.delete(key)
    errors = [await refusal(provider) for _ in range(2)]

    assert all("was sent before" in str(error) for error in errors)
    assert all("A new login is needed: pass its refresh_token" in str(error) for error in errors)
    assert [error.retryable for error in errors] == [False, False]
    assert issuer.requests == {"refresh_token": 2}


async def test_an_emptied_storage_is_no_trouble_for_who_can_log_in(make, issuer, storage, refresh_token):
    provider = make(refresh_token=refresh_token, **LOGIN, storage=storage, storage_key="key")
    await provider.fetch()
    key, _ = await entry_of(storage)

    await storage.delete(key)
    for _ in range(2):
        await provider.fetch()

    assert issuer.requests == {"refresh_token": 2, "password": 1}


async def test_an_emptied_storage_is_no_trouble_for_a_reusable_token(make, issuer, storage, refresh_token):
    issuer.rotate_refresh_tokens = False
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    key, _ = await entry_of(storage)

    await storage.delete(key)
    await provider.fetch()

    assert issuer.requests == {"refresh_token": 2}
    if isinstance(storage, SpentMarks):
        assert await storage.load_mark(key) is None


async def test_an_emptied_storage_after_an_issuer_began_to_rotate(make, issuer, storage, refresh_token):
    issuer.rotate_refresh_tokens = False
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    issuer.rotate_refresh_tokens = True
    await provider.fetch()
    key, _ = await entry_of(storage)

    await storage.delete(key)

    assert "was sent before" in str(await refusal(provider))
    if isinstance(storage, SpentMarks):
        assert await storage.load_mark(key) is not None


async def test_a_token_that_was_not_sent_may_still_be_sent(make, issuer, storage, refresh_token):
    provider = make(refresh_token=refresh_token, storage=storage, issuer=None, token_url=issuer.token_url)
    await issuer.go_down()
    await refusal(provider)
    key, _ = await entry_of(storage)
    await issuer.come_up()

    await storage.delete(key)
    await make(refresh_token=refresh_token, storage=storage, issuer=None, token_url=issuer.token_url).fetch()

    assert issuer.requests == {"refresh_token": 1}


async def test_a_token_whose_answer_was_lost_is_not_sent_from_another_storage(make, issuer, refresh_token):
    issuer.lose_response()
    first = await refusal(make(refresh_token=refresh_token))

    second = await refusal(make(refresh_token=refresh_token))

    assert "answer to a refresh was lost" in str(first)
    assert "was sent before" in str(second)
    assert issuer.requests == {"refresh_token": 1}


# Others in the process


async def test_a_second_provider_does_not_send_what_the_first_has_spent(make, issuer, refresh_token):
    await make(refresh_token=refresh_token).fetch()

    error = await refusal(make(refresh_token=refresh_token, token_url=issuer.token_url, issuer=None, user="other"))

    assert "those that share a login need the same storage" in str(error)
    assert issuer.requests == {"refresh_token": 1}


async def test_a_provider_in_another_event_loop_does_not_send_it_either(make, issuer, refresh_token):
    await make(refresh_token=refresh_token).fetch()
    errors = []

    async def elsewhere():
        provider = OAuth2(issuer.url, refresh_token=refresh_token)
        errors.append(await refusal(provider))
        await provider.aclose()

    await asyncio.to_thread(lambda: asyncio.run(elsewhere()))

    assert "was sent before" in str(errors[0])


async def test_a_provider_in_a_fork_does_not_send_what_its_parent_has_spent(make, issuer, refresh_token):
    await make(refresh_token=refresh_token).fetch()

    async def in_child():
        return str(await refusal(OAuth2(issuer.url, refresh_token=refresh_token)))

    assert "was sent before" in await processes.in_forked_child(in_child)


async def test_two_that_send_in_the_same_moment_send_once(make, issuer, refresh_token):
    class Meeting(MemoryStorage):
        """Lets another one be faster, between the mark and the request."""

        async def save(self, key, tokens):
            await super().save(key, tokens)
            if tokens.is_being_spent:
                await other.fetch()

    other = make(refresh_token=refresh_token)

    error = await refusal(make(refresh_token=refresh_token, storage=Meeting()))

    assert "was sent before" in str(error)
    assert issuer.requests == {"refresh_token": 1}


async def test_the_token_of_another_issuer_is_another_one(make):
    tokens = httpx.MockTransport(lambda _: httpx.Response(200, json={"access_token": "a", "refresh_token": "b"}))
    options = {
        "refresh_token": secret("by chance"),
        "issuer": None,
        "http_client": lambda: httpx.AsyncClient(transport=tokens),
    }

    for host in ("one", "other"):
        await make(token_url=f"https://{host}.example.com/token", **options).fetch()

    assert "was sent before" in str(await refusal(make(token_url="https://ONE.example.com/v2/token", **options)))


# Marks


async def test_a_mark_is_not_the_token_and_no_hash_that_others_would_find(make, storage, refresh_token, place):
    if place.kind == "memory":
        return  # it is gone with what it could be marked in
    await make(refresh_token=refresh_token, storage=storage, storage_key="one").fetch()
    key, tokens = await entry_of(storage)

    mark = await storage.load_mark(key)
    await storage.delete(key)

    assert await storage.load_mark(key) == mark
    assert refresh_token not in mark
    assert tokens.refresh_token not in mark
    assert len(mark) < 60


async def test_a_token_is_not_sent_if_its_mark_cannot_be_saved(make, issuer, observer, refresh_token):
    storage = Switchable()
    provider = make(refresh_token=refresh_token, storage=storage)
    storage.failing_marks = True

    error = await refusal(provider)
    sent = issuer.fetches
    storage.failing_marks = False
    await provider.fetch()

    assert error.retryable
    assert str(error.__cause__) == "cannot mark"
    assert sent == 0
    assert "a refresh token could not be marked" in observer.of(StorageFailed)[0].message


async def test_a_mark_that_cannot_be_read_is_a_mark(make, storage, refresh_token, issuer, place):
    if place.kind == "memory":
        return
    provider = make(refresh_token=refresh_token, storage=storage, issuer=None, token_url=issuer.token_url)
    await issuer.go_down()
    await refusal(provider)
    await issuer.come_up()
    key, _ = await entry_of(storage)
    await storage.delete(key)

    await storage.save_mark(key, "what is this?")

    assert "was sent before" in str(await refusal(provider))
    assert issuer.requests == {}


async def test_a_mark_that_cannot_be_saved_when_an_issuer_begins_to_rotate_is_told(
    make, issuer, observer, refresh_token
):
    storage = Switchable()
    issuer.rotate_refresh_tokens = False
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    issuer.rotate_refresh_tokens = True
    storage.failing_marks = True

    for _ in range(2):
        await provider.fetch()

    (event,) = observer.of(StorageFailed)
    assert "the storage may not tell later that the first refresh token was sent" in event.message
    assert issuer.requests == {"refresh_token": 3}


@pytest.mark.parametrize("why", ["not sent", "reusable"])
async def test_a_mark_that_could_not_be_removed_is_removed_later(make, issuer, observer, refresh_token, why):
    class Keeping(Switchable):
        async def save_mark(self, key, mark):
            if mark is None and self.failing_marks:
                raise OSError("cannot remove")
            self.marks[key] = mark

    storage = Keeping()
    provider = make(refresh_token=refresh_token, storage=storage, issuer=None, token_url=issuer.token_url)
    storage.failing_marks = True
    if why == "not sent":
        await issuer.go_down()
        use = refusal
    else:
        issuer.rotate_refresh_tokens = False
        use = OAuth2.fetch
    await use(provider)
    left = [mark is not None for mark in storage.marks.values()]

    storage.failing_marks = False
    for _ in range(2):
        await use(provider)

    assert left == [True]
    assert set(storage.marks.values()) == {None}
    assert ["could not be removed" in event.message for event in observer.of(StorageFailed)] == [True]


# Gone back


async def test_an_older_entry_is_not_sent(make, issuer, storage, refresh_token):
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    key, backup = await entry_of(storage)
    await provider.fetch()

    await storage.save(key, backup)
    error = await refusal(provider)

    assert "the storage has gone back to an older state" in str(error)
    assert "A new login is needed" in str(error)
    assert issuer.requests == {"refresh_token": 2}


async def test_an_older_entry_that_catches_up_is_gone_on_with(make, issuer, storage, refresh_token):
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    key, lagging = await entry_of(storage)
    await provider.fetch()
    _, newest = await entry_of(storage)
    await storage.save(key, lagging)
    await refusal(provider)

    await storage.save(key, newest)
    await provider.fetch()

    assert issuer.requests == {"refresh_token": 3}


async def test_an_older_entry_is_replaced_by_who_can_log_in(make, issuer, storage):
    provider = make(**LOGIN, storage=storage)
    await provider.fetch()
    key, backup = await entry_of(storage)
    await provider.fetch()

    await storage.save(key, backup)
    for _ in range(2):
        await provider.fetch()

    assert issuer.requests == {"password": 2, "refresh_token": 2}


@pytest.mark.parametrize("state", ["unmarked", "marked", "empty"])
async def test_a_failover_between_mark_and_save_costs_no_login(make, issuer, refresh_token, state):
    """Whatever the new primary has, nobody else has ever had the tokens that only this process has."""
    storage = Switchable()
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    key, unmarked = await entry_of(storage)
    storage.failing_from = storage.saves + 2

    await provider.fetch()
    storage.failing_from = 0
    if state == "unmarked":
        await storage.save(key, unmarked)
    elif state == "empty":
        await storage.delete(key)
    for _ in range(2):
        await provider.fetch()

    assert issuer.requests == {"refresh_token": 4}


async def test_what_another_process_has_saved_counts_more_than_what_could_not_be_saved(make, issuer, refresh_token):
    storage = Switchable()
    provider = make(refresh_token=refresh_token, storage=storage)
    await provider.fetch()
    key, _ = await entry_of(storage)
    storage.failing_from = storage.saves + 2
    await provider.fetch()
    storage.failing_from = 0
    async with httpx.AsyncClient() as http:
        answer = await http.post(issuer.token_url, data={"grant_type": "password", **LOGIN})
    others = answer.json()["refresh_token"]
    _, marked = await entry_of(storage)

    await storage.save(key, type(marked)(refresh_token=others))
    await provider.fetch()

    assert issuer.requests == {"refresh_token": 3, "password": 1}
    assert (await storage.load(key)).refresh_token != others


async def test_what_was_seen_in_the_storage_and_superseded_is_not_sent(make, issuer, refresh_token):
    """By another process, of which this one sees only what it leaves in the storage."""
    storage = MemoryStorage()
    clock = FakeClock()
    provider = make(refresh_token=refresh_token, storage=storage, clock=clock)
    await provider.fetch()
    key, seen = await entry_of(storage)
    async with httpx.AsyncClient() as http:
        form = {"grant_type": "refresh_token", "refresh_token": seen.refresh_token}
        answer = (await http.post(issuer.token_url, data=form)).json()
    others = type(seen)(refresh_token=answer["refresh_token"])
    await storage.save(key, others)
    await issuer.go_down()
    await refusal(provider)
    await issuer.come_up()

    await storage.save(key, seen)

    assert "gone back to an older state" in str(await refusal(provider))
