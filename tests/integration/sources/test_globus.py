"""Globus Auth: tokens by resource server, kept, refreshed, looked up, listed, deleted and revoked, over real HTTP."""

from __future__ import annotations

import asyncio
import pickle
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from globus_auth import (
    CLIENT,
    DATABASE,
    DATABASE_SCOPE,
    GROUPS,
    GROUPS_SCOPE,
    TRANSFER,
    TRANSFER_SCOPE,
    UNAUTHORIZED,
    GlobusAuth,
)
from support import assert_no_secret, secret, tasks_of_ours

from asyncpool_creds import (
    CredentialExpired,
    CredentialProvider,
    CredentialRefreshed,
    ProviderError,
    ProviderTimeout,
    RefreshFailed,
    StorageFailed,
    TokenManagers,
)
from asyncpool_creds.providers.globus import Globus
from asyncpool_creds.storage import MemoryStorage, StoredTokens
from asyncpool_creds.storage.file import FileStorage

pytestmark = pytest.mark.anyio

SERVICE = "2f2d7a7e-94f1-4a0e-8a3f-2c8a1a4f3b03"


class AheadClock:
    """The machine's clock, and as much later as a test says."""

    ahead = 0.0

    def time(self):
        return time.time() + self.ahead

    def monotonic(self):
        return time.monotonic() + self.ahead


class ShakyStorage(MemoryStorage):
    """Fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.saves_that_work = None

    async def save(self, key, tokens):
        if self.saves_that_work is not None:
            if self.saves_that_work == 0:
                raise OSError(28, "No space left on device")
            self.saves_that_work -= 1
        await super().save(key, tokens)


@pytest.fixture
def clock():
    return AheadClock()


@pytest.fixture
def storage():
    return ShakyStorage()


@pytest.fixture
async def auth(anyio_backend):
    async with GlobusAuth(clients={SERVICE: secret("service: +")}) as auth:
        yield auth


@pytest.fixture
async def make(auth, clock, storage):
    made = []

    def make(client_id=CLIENT, **options):
        made.append(Globus(client_id, **{"url": auth.url, "storage": storage, "clock": clock, **options}))
        return made[-1]

    yield make
    for globus in made:
        await globus.aclose()
    assert tasks_of_ours() == set()


@pytest.fixture
def globus(make):
    return make()


@pytest.fixture
def service(make):
    """A client that acts for itself, at two resource servers."""
    return make(
        SERVICE, client_secret=secret("service: +"), scopes={DATABASE: [DATABASE_SCOPE], TRANSFER: TRANSFER_SCOPE}
    )


async def refusal(resource):
    with pytest.raises(ProviderError) as caught:
        await resource.fetch()
    assert caught.value.__context__ is None or caught.value.__cause__ is not None
    return caught.value


def issued(response):
    """Return the access tokens of a token response, by resource server."""
    return {token["resource_server"]: token["access_token"] for token in [response, *response["other_tokens"]]}


# -- entries


async def test_a_login_is_kept_apart_by_resource_server(globus, auth, clock):
    response = auth.log_in(TRANSFER_SCOPE, GROUPS_SCOPE, DATABASE_SCOPE)

    assert await globus.store(response) == [TRANSFER, GROUPS, DATABASE]

    assert await globus.resources() == [DATABASE, GROUPS, TRANSFER]
    entries = [await globus.lookup(name) for name in (TRANSFER, GROUPS, DATABASE)]
    assert {name: entry.credential.password for name, entry in zip(issued(response), entries, strict=True)} == issued(
        response
    )
    assert len({entry.refresh_token for entry in entries}) == 3
    assert all(entry.credential.expires_at - entry.obtained_at == timedelta(minutes=5) for entry in entries)


async def test_what_is_stored_is_given_without_a_request(globus, auth):
    response = auth.log_in(TRANSFER_SCOPE, DATABASE_SCOPE)
    await globus.store(response)

    credentials = {name: await globus.resource(name).fetch() for name in (TRANSFER, DATABASE)}

    assert {name: credential.password for name, credential in credentials.items()} == issued(response)
    assert auth.requests == {}


async def test_the_keys_are_those_of_the_client_and_the_resource_server(globus, auth, storage):
    await globus.store(auth.log_in(TRANSFER_SCOPE, DATABASE_SCOPE))

    assert await storage.keys() == [f"globus:{CLIENT}:{DATABASE}", f"globus:{CLIENT}:{TRANSFER}"]


async def test_clients_and_people_who_share_a_storage_do_not_see_each_other(make, auth):
    all_of_them = [
        make("a"),
        make("a:b"),
        make("a/b"),
        make("a", namespace="b"),
        make("a", namespace="b:"),
        make("a", namespace="b/"),
    ]
    responses = []
    for globus in all_of_them:
        responses.append(auth.log_in(TRANSFER_SCOPE))
        await globus.store(responses[-1])

    for globus, response in zip(all_of_them, responses, strict=True):
        assert await globus.resources() == [TRANSFER]
        assert (await globus.lookup(TRANSFER)).credential.password == response["access_token"]


async def test_a_new_login_takes_the_place_of_the_old_one(globus, auth):
    await globus.store(auth.log_in(TRANSFER_SCOPE, GROUPS_SCOPE))
    again = auth.log_in(TRANSFER_SCOPE, offline=False)

    await globus.store(again)

    assert (await globus.lookup(TRANSFER)).credential.password == again["access_token"]
    assert (await globus.lookup(TRANSFER)).refresh_token is None
    assert (await globus.lookup(GROUPS)).refresh_token is not None


async def test_a_login_that_is_stored_again_does_not_bring_back_what_was_spent(globus, auth, clock):
    response, requested_at = auth.log_in(TRANSFER_SCOPE, GROUPS_SCOPE), datetime.now(UTC)
    await globus.store(response, requested_at=requested_at)
    clock.ahead = 290
    await globus.resource(TRANSFER).fetch()

    await globus.store(response, requested_at=requested_at)

    assert (await globus.lookup(TRANSFER)).refresh_token not in (response["refresh_token"], None)
    clock.ahead = 580
    await globus.resource(TRANSFER).fetch()
    assert auth.replays == 0


async def test_a_login_takes_the_place_of_what_was_lost(globus, auth, storage):
    response = auth.log_in(TRANSFER_SCOPE)
    key = f"globus:{CLIENT}:{TRANSFER}"
    await storage.save(
        key, StoredTokens(refresh_token=secret(), obtained_at=datetime.now(UTC) + timedelta(1), is_being_spent=True)
    )

    await globus.store(response, requested_at=datetime.now(UTC))

    assert (await globus.resource(TRANSFER).fetch()).password == response["access_token"]


async def test_lifetimes_count_from_the_request(globus, auth):
    requested_at = datetime(2030, 1, 1, tzinfo=UTC)

    await globus.store(auth.log_in(TRANSFER_SCOPE), requested_at=requested_at.astimezone())

    assert (await globus.lookup(TRANSFER)).credential.expires_at == requested_at + timedelta(minutes=5)


async def test_a_naive_time_is_refused(globus, auth):
    with pytest.raises(ValueError, match="requested_at is naive"):
        await globus.store(auth.log_in(TRANSFER_SCOPE), requested_at=datetime.now(UTC).replace(tzinfo=None))


@pytest.mark.parametrize(
    "spoil",
    [
        {"resource_server": None},
        {"resource_server": ""},
        {"access_token": None},
        {"access_token": 5},
        {"other_tokens": [{"access_token": secret()}]},
        {"other_tokens": [secret()]},
    ],
)
async def test_what_is_no_token_response_is_refused_as_a_whole(globus, auth, spoil):
    with pytest.raises(ValueError, match="no token response of Globus Auth"):
        await globus.store({**auth.log_in(TRANSFER_SCOPE, GROUPS_SCOPE), **spoil})

    assert await globus.resources() == []


async def test_a_token_that_no_server_accepts_is_refused_as_a_whole(globus, auth):
    response = auth.log_in(TRANSFER_SCOPE, GROUPS_SCOPE)
    response["other_tokens"][0]["access_token"] = f"{secret()}\0"

    with pytest.raises(ValueError, match="access_token that a server would accept"):
        await globus.store(response)

    assert await globus.resources() == []


async def test_an_object_of_an_sdk_is_refused_with_a_hint(globus):
    with pytest.raises(TypeError, match=r"such as response\.data of globus-sdk, not object"):
        await globus.store(object())


async def test_nothing_is_looked_up_where_nothing_is(globus):
    assert await globus.lookup(TRANSFER) is None
    assert await globus.resources() == []


@pytest.mark.parametrize("use", ["resource", "lookup", "delete"])
async def test_a_resource_server_has_a_name(globus, use):
    for name, kind in ((None, TypeError), ("", ValueError)):
        with pytest.raises(kind, match="the name of a resource server"):
            answer = getattr(globus, use)(name)
            if asyncio.iscoroutine(answer):
                await answer


# -- refreshing


async def test_a_stale_token_is_refreshed_and_the_others_are_left_alone(globus, auth, clock):
    response = auth.log_in(TRANSFER_SCOPE, DATABASE_SCOPE)
    await globus.store(response)
    clock.ahead = 250  # a fifth of five minutes is left at 240

    credential = await globus.resource(DATABASE).fetch()

    assert credential.password != issued(response)[DATABASE]
    assert (await globus.lookup(DATABASE)).credential == credential
    assert (await globus.lookup(TRANSFER)).credential.password == issued(response)[TRANSFER]
    assert auth.requests == {"refresh_token": 1}


async def test_each_exchange_uses_the_refresh_token_of_the_one_before(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    resource = globus.resource(DATABASE)

    passwords = {(await resource.fetch()).password for _ in range(5)}

    assert len(passwords) == 5
    assert auth.requests == {"refresh_token": 5}
    assert auth.replays == 0


async def test_a_refresh_token_that_is_left_as_it_is_is_used_again(globus, auth, storage):
    auth.rotates = False
    response = auth.log_in(DATABASE_SCOPE, access_lifetime=0)
    await globus.store(response)
    resource = globus.resource(DATABASE)

    for _ in range(3):
        await resource.fetch()

    entry = await globus.lookup(DATABASE)
    assert entry.refresh_token == response["refresh_token"]
    assert entry.is_reusable
    assert not entry.is_being_spent


async def test_a_stale_refresh_token_is_not_replayed(make, auth):
    """Who waits for the lock does not go on with what was read before it: it is spent by then."""
    auth.access_lifetime = 0  # nobody can use what another has fetched
    first, second = make(), make()
    await first.store(auth.log_in(DATABASE_SCOPE))
    auth.hang()
    one = asyncio.create_task(first.resource(DATABASE).fetch())
    await auth.reached()
    other = asyncio.create_task(second.resource(DATABASE).fetch())
    for _ in range(100):
        await asyncio.sleep(0)

    auth.heal()
    credentials = await asyncio.gather(one, other)

    assert credentials[0].password != credentials[1].password
    assert auth.requests == {"refresh_token": 2}
    assert auth.replays == 0


async def test_those_who_share_a_storage_make_one_exchange(auth, clock, tmp_path):
    async def fetch(storage):
        async with Globus(CLIENT, url=auth.url, storage=storage, clock=clock) as globus:
            return await globus.resource(DATABASE).fetch()

    async with Globus(CLIENT, url=auth.url, storage=FileStorage(tmp_path / "tokens")) as globus:
        await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))

    credentials = await asyncio.gather(*(fetch(FileStorage(tmp_path / "tokens")) for _ in range(8)))

    assert len({credential.password for credential in credentials}) == 1
    assert auth.requests == {"refresh_token": 1}


async def test_a_rotated_token_that_cannot_be_stored_is_not_lost(globus, auth, storage, observer):
    """It serves from memory, is exchanged from there, and is stored when that is possible again."""
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    resource = globus.resource(DATABASE)
    resource.report_to(observer)
    storage.saves_that_work = 1  # the mark of the first exchange, and nothing after it

    passwords = {(await resource.fetch()).password for _ in range(3)}
    storage.saves_that_work = None
    await resource.aclose()

    assert len(passwords) == 3
    assert auth.replays == 0
    assert "No space left on device" in observer.of(StorageFailed)[0].message
    entry = await globus.lookup(DATABASE)
    assert entry.credential.password in passwords
    await globus.resource(DATABASE).fetch()
    clock_of_a_new_process = AheadClock()
    clock_of_a_new_process.ahead = 290
    async with Globus(CLIENT, url=auth.url, storage=storage, clock=clock_of_a_new_process) as after_a_restart:
        await after_a_restart.resource(DATABASE).fetch()
    assert auth.replays == 0


async def test_a_new_name_of_the_resource_server_costs_no_refresh_token(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    resource = globus.resource(DATABASE)
    auth.answer = {"resource_server": "database.example.org"}

    await resource.fetch()
    await resource.fetch()

    assert auth.replays == 0
    assert await globus.resources() == [DATABASE]


async def test_the_token_may_be_among_the_others_of_an_answer(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    own = auth.log_in(DATABASE_SCOPE)
    auth.answer = {"resource_server": TRANSFER, "access_token": secret(), "other_tokens": [own]}

    credential = await globus.resource(DATABASE).fetch()

    assert credential.password == own["access_token"]
    assert (await globus.lookup(DATABASE)).refresh_token == own["refresh_token"]


async def test_an_answer_that_is_lost_costs_the_login_of_one_resource_server_only(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, TRANSFER_SCOPE, access_lifetime=0))
    auth.loses = True
    error = await refusal(globus.resource(DATABASE))
    auth.loses = False

    assert "answer to a refresh was lost" in str(error)
    assert "store() its token response" in str(error)
    assert not error.retryable
    assert (await refusal(globus.resource(DATABASE))).retryable is False
    assert (await globus.resource(TRANSFER).fetch()).password
    assert auth.requests == {"refresh_token": 2}


# -- where there is nothing to refresh with


async def test_without_a_refresh_token_what_is_stored_serves_until_it_ends(globus, auth, clock, observer):
    response = auth.log_in(DATABASE_SCOPE, offline=False)
    await globus.store(response)
    clock.ahead = 290
    resource = globus.resource(DATABASE)
    resource.report_to(observer)

    assert (await resource.fetch()).password == response["access_token"]

    (event,) = observer.of(RefreshFailed)
    assert event.provider == f"globus {DATABASE}"
    assert event.still_valid
    assert "there is no refresh token left. A new login is needed: store() its token response" in event.message
    error = await refusal(resource)
    assert str(error) == event.message
    assert not error.retryable
    assert auth.requests == {}


async def test_what_has_ended_is_not_given(globus, auth, clock):
    await globus.store(auth.log_in(DATABASE_SCOPE, offline=False))
    clock.ahead = 301

    assert "A new login is needed" in str(await refusal(globus.resource(DATABASE)))


async def test_what_was_refused_is_not_given(globus, auth, clock):
    await globus.store(auth.log_in(DATABASE_SCOPE, offline=False))
    resource = globus.resource(DATABASE)

    resource.invalidate(await globus.resource(DATABASE).fetch())

    assert "A new login is needed" in str(await refusal(resource))


async def test_in_an_outage_a_new_process_has_what_is_still_valid(globus, auth, clock, observer):
    response = auth.log_in(DATABASE_SCOPE)
    await globus.store(response)
    clock.ahead = 290
    await auth.go_down()
    resource = globus.resource(DATABASE)
    resource.report_to(observer)

    assert (await resource.fetch()).password == response["access_token"]
    assert observer.of(RefreshFailed)[0].retryable
    assert (await refusal(resource)).retryable
    await auth.come_up()
    assert (await resource.fetch()).password != response["access_token"]


async def test_where_nothing_is_stored_it_says_so(globus):
    error = await refusal(globus.resource(DATABASE))

    assert str(error) == (
        f"globus {DATABASE}: there is no refresh token in the storage. A new login is needed: store() its token "
        "response"
    )
    assert not error.retryable


async def test_a_login_that_is_stored_meanwhile_is_found(globus, auth):
    resource = globus.resource(DATABASE)
    await refusal(resource)

    await globus.store(auth.log_in(DATABASE_SCOPE))

    assert (await resource.fetch()).password


async def test_a_storage_that_cannot_be_read_is_an_error_with_its_cause(make, auth, observer):
    class Broken(MemoryStorage):
        async def load(self, key):
            raise OSError("I/O error")

    resource = make(storage=Broken()).resource(DATABASE)
    resource.report_to(observer)

    error = await refusal(resource)

    assert isinstance(error.__cause__, OSError)
    assert {event.action for event in observer.of(StorageFailed)} == {"load"}


# -- a client by itself


async def test_a_client_logs_in_by_itself_for_each_resource_server(service, auth):
    database, transfer = service.resource(DATABASE), service.resource(TRANSFER)

    credentials = [await database.fetch(), await transfer.fetch(), await database.fetch()]

    assert len({credential.password for credential in credentials}) == 3
    assert auth.scopes == [DATABASE_SCOPE, TRANSFER_SCOPE, DATABASE_SCOPE]
    assert auth.verifier(DATABASE)("app", credentials[0].password) is None
    assert auth.verifier(TRANSFER)("app", credentials[1].password) is None


async def test_one_login_serves_all_of_a_client(service, auth):
    assert await service.log_in() == [DATABASE, TRANSFER]

    passwords = {(await service.resource(name).fetch()).password for name in (DATABASE, TRANSFER)}

    assert len(passwords) == 2
    assert auth.scopes == [f"{DATABASE_SCOPE} {TRANSFER_SCOPE}"]
    assert await service.resources() == [DATABASE, TRANSFER]
    assert (await service.lookup(DATABASE)).refresh_token is None


async def test_a_client_that_logs_in_by_itself_needs_no_storage(service, auth, storage, observer):
    storage.saves_that_work = 0
    resource = service.resource(DATABASE)
    resource.report_to(observer)

    assert (await resource.fetch()).password
    assert (await resource.fetch()).password


async def test_scopes_of_one_resource_server_are_asked_for_together(make, auth):
    service = make(SERVICE, client_secret=secret("service: +"), scopes={TRANSFER: [f" {TRANSFER_SCOPE} ", "x y"]})

    error = await refusal(service.resource(TRANSFER))

    assert auth.scopes == [f"{TRANSFER_SCOPE} x y"]
    assert "invalid_scope" in str(error)
    assert not error.retryable


async def test_other_scopes_are_another_login(make, auth):
    def client(*scopes):
        return make(SERVICE, client_secret=secret("service: +"), scopes={DATABASE: scopes})

    narrow = await client(DATABASE_SCOPE).resource(DATABASE).fetch()
    wide = await client(DATABASE_SCOPE, GROUPS_SCOPE).resource(DATABASE).fetch()

    assert auth.scopes == [DATABASE_SCOPE, f"{DATABASE_SCOPE} {GROUPS_SCOPE}"]
    assert (await client(DATABASE_SCOPE).resource(DATABASE).fetch()) == narrow
    again = client(GROUPS_SCOPE, DATABASE_SCOPE)
    assert (await again.resource(DATABASE).fetch()) == wide
    assert await again.resources() == [DATABASE]
    assert (await again.lookup(DATABASE)).credential == wide
    assert auth.requests == {"client_credentials": 2}


async def test_a_client_by_itself_does_not_act_for_a_person(make, service, auth):
    """Not even where the tokens of people are in the same storage under the same client."""
    of_people = make(SERVICE, client_secret=secret("service: +"))
    response = auth.log_in(DATABASE_SCOPE, GROUPS_SCOPE)
    await of_people.store(response)

    assert await service.resources() == [GROUPS]
    credential = await service.resource(DATABASE).fetch()

    assert credential.password != response["access_token"]
    assert auth.requests == {"client_credentials": 1}
    assert await service.resources() == [DATABASE, GROUPS]
    assert await of_people.resources() == [DATABASE, GROUPS]
    assert (await of_people.resource(DATABASE).fetch()).password == response["access_token"]


async def test_a_resource_server_may_have_any_name(globus, auth):
    for name in ("a#b", "a/b:c d", "ä%23"):
        await globus.store({**auth.log_in(DATABASE_SCOPE), "resource_server": name})

    assert await globus.resources() == ["a#b", "a/b:c d", "ä%23"]
    assert await globus.lookup("a") is None


async def test_a_resource_server_with_another_name_than_its_scopes_is_refused(make):
    service = make(SERVICE, client_secret=secret("service: +"), scopes={"transfer": TRANSFER_SCOPE})

    error = await refusal(service.resource("transfer"))

    assert f"belong to another resource server ({TRANSFER}); name that one in scopes" in str(error)
    assert not error.retryable


async def test_logging_in_needs_scopes(globus):
    with pytest.raises(ValueError, match="needs scopes"):
        await globus.log_in()


async def test_a_login_that_fails_is_an_error(service, auth):
    auth.refusal = (403, {"error": "access_denied", "error_description": f"not {secret('service: +')}"})

    with pytest.raises(ProviderError, match=r"^globus: .*access_denied: not \[redacted\]"):
        await service.log_in()


async def test_a_login_without_resource_servers_is_an_error(service, auth):
    auth.answer = {"resource_server": None}

    with pytest.raises(ProviderError, match="has no tokens with resource servers"):
        await service.log_in()
    assert "(none)" in str(await refusal(service.resource(DATABASE)))


async def test_what_people_may_do_is_kept_apart_from_what_the_client_may(service, auth):
    with pytest.raises(ValueError, match=f"logs in to {DATABASE} by itself"):
        await service.store(auth.log_in(GROUPS_SCOPE, DATABASE_SCOPE))

    assert await service.resources() == []
    await service.store(auth.log_in(GROUPS_SCOPE))


async def test_a_client_with_a_secret_proves_itself_when_it_refreshes(make, auth):
    globus = make(SERVICE, client_secret=secret("service: +"))
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))

    assert (await globus.resource(DATABASE).fetch()).password


# -- errors


@pytest.mark.parametrize(
    ("answer", "text", "retryable"),
    [
        ((401, {"error": "invalid_grant"}), "refused the refresh token (invalid_grant)", False),
        (UNAUTHORIZED, "unauthorized: Unauthorized); check client_id and how the client authenticates", False),
        (
            (401, {"errors": UNAUTHORIZED[1]["errors"]}),
            "UNAUTHORIZED: Call must be authenticated); check client_id and how",
            False,
        ),
        ((403, {"errors": [{"code": "FORBIDDEN", "detail": "no"}]}), "(HTTP 403, FORBIDDEN: no)", False),
        ((400, {"errors": [5]}), "failed (HTTP 400)", False),
        ((400, {"errors": []}), "failed (HTTP 400)", False),
        ((404, "not JSON of Globus"), "failed (HTTP 404)", False),
        ((429, {"errors": [{"code": "TOO_MANY_REQUESTS", "detail": "slow down"}]}), "in trouble (HTTP 429", True),
        ((500, {"errors": [{"code": "INTERNAL", "detail": "oh"}]}), "in trouble (HTTP 500, INTERNAL: oh)", True),
        ((503, {"error": "temporarily_unavailable"}), "in trouble (HTTP 503", True),
    ],
)
async def test_an_error_of_globus_auth_says_what_it_is(globus, auth, answer, text, retryable):
    response = auth.log_in(DATABASE_SCOPE, access_lifetime=0)
    await globus.store(response)
    resource = globus.resource(DATABASE)
    auth.refusal = answer

    error = await refusal(resource)

    assert str(error).startswith(f"globus {DATABASE}: ")
    assert text in str(error)
    assert error.retryable is retryable
    # None of them costs the refresh token.
    auth.refusal = None
    assert (await resource.fetch()).password


async def test_it_says_when_to_come_back(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    auth.refusal, auth.headers = (429, {"error": "slow_down"}), {"Retry-After": "17"}

    assert (await refusal(globus.resource(DATABASE))).retry_after == 17


async def test_a_refresh_token_that_is_revoked_asks_for_a_login(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    auth.rescind(DATABASE)

    error = await refusal(globus.resource(DATABASE))

    assert "expired, revoked or used up. A new login is needed: store() its token response" in str(error)


async def test_who_takes_too_long_is_given_up_and_the_token_is_not_sent_again(make, auth):
    globus = make(timeout=0.3)
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    auth.hang()

    error = await refusal(globus.resource(DATABASE))
    auth.heal()

    assert isinstance(error.__cause__, ProviderTimeout)
    assert "answer to a refresh was lost" in str(error)
    await refusal(globus.resource(DATABASE))
    assert auth.requests == {"refresh_token": 1}


async def test_an_answer_without_a_token_that_a_server_accepts_is_an_error_and_costs_no_refresh_token(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    resource = globus.resource(DATABASE)
    for token in (None, "", f"{secret()}\0"):
        auth.answer = {"access_token": token}
        assert "has no access_token that a server would accept" in str(await refusal(resource))
    auth.answer = {}

    assert (await resource.fetch()).password
    assert auth.replays == 0


# -- deleting


async def test_what_is_deleted_is_gone(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, TRANSFER_SCOPE))

    await globus.delete(DATABASE)
    await globus.delete(DATABASE)

    assert await globus.resources() == [TRANSFER]
    assert await globus.lookup(DATABASE) is None
    assert auth.revoked == []


@pytest.mark.parametrize("client", ["native", "confidential"])
async def test_what_is_deleted_may_be_revoked_first(make, auth, client):
    globus = make() if client == "native" else make(SERVICE, client_secret=secret("service: +"))
    response = auth.log_in(DATABASE_SCOPE, TRANSFER_SCOPE)
    await globus.store(response)

    await globus.delete(DATABASE, revoke=True)

    assert auth.revoked == [response["refresh_token"], response["access_token"]]
    assert auth.verifier(DATABASE)("app", response["access_token"]) is not None
    assert auth.verifier(TRANSFER)("app", issued(response)[TRANSFER]) is None
    assert await globus.resources() == [TRANSFER]


async def test_what_has_no_refresh_token_is_revoked_by_its_access_token(service, auth):
    await service.log_in()

    await service.delete(DATABASE, revoke=True)
    await service.delete("nothing.example.org", revoke=True)

    assert len(auth.revoked) == 1


async def test_what_cannot_be_revoked_stays(globus, auth):
    response = auth.log_in(DATABASE_SCOPE)
    await globus.store(response)
    auth.refusal = (500, {"error": "server_error", "error_description": f"cannot revoke {response['access_token']}"})

    with pytest.raises(ProviderError, match=f"^globus {DATABASE}: .*/revoke is in trouble"):
        await globus.delete(DATABASE, revoke=True)

    assert await globus.resources() == [DATABASE]
    auth.refusal = None
    await globus.delete(DATABASE, revoke=True)
    assert await globus.resources() == []


async def test_a_token_is_not_deleted_while_it_is_exchanged(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    auth.hang()
    fetching = asyncio.create_task(globus.resource(DATABASE).fetch())
    await auth.reached()
    deleting = asyncio.create_task(globus.delete(DATABASE, revoke=True))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not deleting.done()

    auth.heal()
    credential = await fetching
    await deleting

    assert credential.password in auth.revoked
    assert await globus.resources() == []


# -- managers of all


@asynccontextmanager
async def managers_of(globus, **options):
    async with TokenManagers(globus.resource, **options) as managers:
        yield await managers.start(*await globus.resources())


async def test_all_are_refreshed_in_the_background(make, auth, observer):
    auth.access_lifetime = 0.5
    globus, refreshed = make(clock=None), asyncio.Event()
    await globus.store(auth.log_in(TRANSFER_SCOPE, GROUPS_SCOPE, DATABASE_SCOPE))

    def watch(event):
        by_name = [event.provider for event in observer.of(CredentialRefreshed)]
        if {by_name.count(name) for name in by_name} >= {3} and len(set(by_name)) == 3 and len(by_name) >= 9:
            refreshed.set()

    async with managers_of(globus, on_event=[observer, watch]) as managers:
        await refreshed.wait()
        credentials = {name: await managers.get(name) for name in managers.names()}

    assert all(auth.verifier(name)("app", credential.password) is None for name, credential in credentials.items())
    assert auth.replays == 0
    assert observer.of(RefreshFailed) == []
    assert {event.provider for event in observer.events} == {
        f"GlobusResource {name!r}" for name in (TRANSFER, GROUPS, DATABASE)
    }


async def test_the_threshold_says_when(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE))

    async with managers_of(globus, refresh_threshold=200, background=False, on_event=[]) as managers:
        stamp = await managers.manager(DATABASE).stamp()

    assert 200 >= (stamp.expires_at - stamp.refresh_at).total_seconds() >= 175


async def test_the_end_of_one_login_does_not_disturb_the_others(make, auth, observer):
    auth.access_lifetime = 0.5
    globus, lived = make(clock=None), asyncio.Event()
    await globus.store(auth.log_in(TRANSFER_SCOPE, DATABASE_SCOPE))

    def watch(event):
        if len([e for e in observer.of(CredentialRefreshed) if TRANSFER in e.provider]) >= 3:
            lived.set()

    async with managers_of(globus, on_event=[observer, watch]) as managers:
        auth.rescind(DATABASE)
        await lived.wait()

        with pytest.raises(CredentialExpired, match="A new login is needed"):
            await managers.get(DATABASE)
        assert auth.verifier(TRANSFER)("app", (await managers.get(TRANSFER)).password) is None
        # And a new login mends it.
        await globus.store(auth.log_in(DATABASE_SCOPE))
        credential = await managers.manager(DATABASE).refresh()
        assert auth.verifier(DATABASE)("app", credential.password) is None

    assert all(DATABASE in event.provider for event in observer.of(RefreshFailed))


# -- the provider as such


async def test_it_is_a_provider(globus):
    assert isinstance(globus.resource(DATABASE), CredentialProvider)
    assert globus.resource(DATABASE).name == DATABASE


async def test_it_shows_no_secret(service):
    resource = service.resource(DATABASE)

    assert_no_secret(service, resource)
    assert repr(resource) == f"<GlobusResource {DATABASE!r}>"
    assert SERVICE in repr(service)
    for thing in (service, resource):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing)


def test_it_works_in_one_event_loop_after_another():
    storage = MemoryStorage()

    async def life():
        async with GlobusAuth() as auth, Globus(CLIENT, url=auth.url, storage=storage) as globus:
            await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
            return (await globus.resource(DATABASE).fetch()).password

    assert asyncio.run(life()) != asyncio.run(life())


async def test_it_can_be_closed_and_used_again(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    resource = globus.resource(DATABASE)
    await resource.fetch()

    await globus.aclose()
    await globus.aclose()

    assert (await resource.fetch()).password


async def test_closing_finishes_an_exchange(globus, auth):
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    before = await globus.lookup(DATABASE)
    auth.hang()
    resource = globus.resource(DATABASE)
    fetching = asyncio.create_task(resource.fetch())
    await auth.reached()
    fetching.cancel()
    closing = asyncio.create_task(globus.aclose())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not closing.done()

    auth.heal()
    await closing

    entry = await globus.lookup(DATABASE)
    assert entry.refresh_token not in (before.refresh_token, None)
    assert not entry.is_being_spent


async def test_the_http_client_is_the_callers_if_he_likes(make, auth):
    seen = []

    async def note(request):
        seen.append(request.url.path)

    globus = make(http_client=lambda: httpx.AsyncClient(event_hooks={"request": [note]}))
    await globus.store(auth.log_in(DATABASE_SCOPE, access_lifetime=0))
    await globus.resource(DATABASE).fetch()

    assert seen == ["/v2/oauth2/token"]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"client_id": None}, TypeError, "client_id must be a str"),
        ({"client_id": ""}, ValueError, "client_id is empty"),
        ({"client_id": 5}, TypeError, "client_id must be a str"),
        ({"client_secret": ""}, ValueError, "client_secret is empty; is an environment variable missing"),
        ({"namespace": 5}, TypeError, "namespace must be a str"),
        ({"url": None}, TypeError, "url must be a str"),
        ({"url": "http://auth.globus.org"}, ValueError, "url must be https"),
        ({"url": "auth.globus.org"}, ValueError, "url must be a full URL"),
        ({"storage": {}}, TypeError, "storage must be a TokenStorage"),
        ({"scopes": {TRANSFER: TRANSFER_SCOPE}}, ValueError, "scopes without client_secret"),
        ({"scopes": TRANSFER_SCOPE, "client_secret": secret()}, TypeError, "scopes must map resource servers"),
        ({"scopes": {TRANSFER: []}, "client_secret": secret()}, ValueError, f"the scopes of {TRANSFER} are empty"),
        ({"scopes": {TRANSFER: [5]}, "client_secret": secret()}, TypeError, f"the scopes of {TRANSFER} must be"),
        ({"scopes": {"": "x"}, "client_secret": secret()}, ValueError, "the name of a resource server is empty"),
        ({"timeout": 0}, ValueError, "timeout must be more than zero"),
        ({"http_client": httpx}, TypeError, "http_client must be a function"),
    ],
    ids=lambda value: None if isinstance(value, (dict, type)) else value.replace(TRANSFER, "it"),
)
def test_what_is_wrong_with_an_argument_is_said_at_once(options, kind, text):
    with pytest.raises(kind, match=r"^(Globus|globus): ") as caught:
        Globus(**{"client_id": CLIENT, **options})

    assert text in str(caught.value)
