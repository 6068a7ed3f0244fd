"""Which credential a connect uses, and what happens when the server refuses it."""

import asyncio
import contextlib
import inspect
import socket

import asyncpg
import pytest
from support import assert_no_secret, secret

from asyncpool_creds import (
    ClockSkewDetected,
    Credential,
    CredentialExpired,
    CredentialInvalidated,
    CredentialRefused,
    CredentialUnavailable,
    ProviderError,
    TokenManager,
    create_pool,
    is_refusal,
)
from asyncpool_creds.testing import ScriptedProvider
from asyncpool_creds.testing.door import Stage, TokenDoor

pytestmark = pytest.mark.anyio

RESTORES_FLOOR = "init_size" in inspect.signature(asyncpg.create_pool).parameters
REFUSAL = asyncpg.InvalidAuthorizationSpecificationError


# Injection.


async def test_the_first_fill_uses_one_credential_fetched_once(cloud):
    async with cloud.pool(max_size=4):
        assert cloud.presented == [1, 1, 1, 1]
        assert cloud.provider.calls == 1


async def test_a_connect_within_acquire_uses_the_current_credential(cloud):
    async with cloud.pool(min_size=1, retire_when="never") as pool:
        await pool.manager.refresh()
        async with pool.acquire(), pool.acquire():
            assert cloud.presented == [1, 2]


async def test_a_connection_lost_while_idle_is_replaced_with_the_current_credential(cloud):
    async with cloud.pool(max_size=1, retire_when="never") as pool:
        await pool.manager.refresh()
        cloud.door.kill_connections()
        if RESTORES_FLOOR:
            await cloud.door.until(lambda: cloud.door.live == 1)
        else:
            await cloud.until(lambda: pool.get_size() == 0)

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.presented == [1, 2]


async def test_a_replacement_uses_the_newer_credential(cloud):
    async with cloud.pool(retire_when="rotated") as pool:
        await pool.manager.refresh()
        await cloud.door.until(lambda: cloud.presented == [1, 1, 2, 2])


async def test_the_credential_is_there_before_asyncpgs_connect_and_its_timeout_begin(cloud):
    calls = []

    async def connect(*arguments, **keywords):
        calls.append(keywords["timeout"])
        return await asyncpg.connect(*arguments, **keywords)

    cloud.provider.play(ScriptedProvider.HANG)
    async with cloud.pool(min_size=0, connect=connect, timeout=7) as pool:
        asking = asyncio.create_task(pool.fetchval("SELECT 1"))
        await cloud.provider.called()
        assert calls == []

        cloud.provider.release()

        assert await asking == 1
        assert calls == [7]


async def test_waiting_for_a_credential_counts_against_the_acquire_timeout_and_the_fetch_goes_on(cloud):
    cloud.provider.play(ScriptedProvider.HANG)
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0.02)
        assert (cloud.provider.in_flight, cloud.provider.cancelled) == (1, 0)

        cloud.provider.release()

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.provider.calls == 1


async def test_the_user_changes_with_the_credential(cloud):
    cloud.provider.play(
        Credential(secret("one"), user="app"),
        Credential(secret("two"), user="reporter"),
    )
    async with cloud.pool(max_size=1, retire_when="rotated") as pool:
        assert await pool.fetchval("SELECT current_user") == "app"

        await pool.manager.refresh()
        await cloud.door.until(lambda: cloud.presented == [1, 2] and cloud.door.live == 1)

        assert await pool.fetchval("SELECT current_user") == "reporter"


@pytest.mark.parametrize("kind", ["async function", "function", "provider", "manager"])
async def test_credentials_may_come_from(cloud, kind):
    manager = cloud.manager()

    async def fetch():
        return (await cloud.provider.fetch()).password

    def mint():
        credential = cloud.provider.mint(600)
        cloud.provider.credentials.append(credential)
        return credential

    sources = {"async function": fetch, "function": mint, "provider": cloud.provider, "manager": manager}
    async with cloud.pool(credentials=sources[kind]) as pool:
        assert await pool.fetchval("SELECT current_user") == "app"
        assert isinstance(pool.manager, TokenManager)
        assert (pool.manager is manager) is (kind == "manager")


async def test_set_connect_args_keeps_the_injection(cloud, server):
    async with cloud.pool(max_size=1) as pool:
        pool.set_connect_args(cloud.dsn(), server_settings={"application_name": "changed"})
        await pool.expire_connections()

        assert await pool.fetchval("SHOW application_name") == "changed"
        assert cloud.presented == [1, 1]


async def test_a_password_in_the_environment_is_not_used(cloud, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", secret("environment"))

    async with cloud.pool() as pool:
        assert await pool.fetchval("SELECT 1") == 1
        assert set(cloud.presented) == {1}


@pytest.mark.parametrize(
    ("query", "keywords", "advice"),
    [
        ("", {"password": secret("keyword")}, r"password= and credentials= exclude each other"),
        ("", {"password": lambda: secret("keyword")}, r"password= and credentials= exclude each other"),
        (f"&password={secret('query')}", {}, "the DSN carries a password"),
    ],
)
async def test_a_password_beside_the_credentials_is_an_error_before_anything_is_opened(cloud, query, keywords, advice):
    with pytest.raises(ValueError, match=advice):
        create_pool(cloud.dsn() + query, credentials=cloud.provider, **keywords)

    assert (cloud.provider.calls, cloud.door.attempts) == (0, 0)


async def test_a_password_in_the_dsn_is_an_error_before_anything_is_opened(cloud):
    dsn = cloud.dsn().replace("app@", f"app:{secret('dsn')}@")

    with pytest.raises(ValueError, match="the DSN carries a password"):
        create_pool(dsn, credentials=cloud.provider)

    assert (cloud.provider.calls, cloud.door.attempts) == (0, 0)


async def test_a_password_that_comes_with_set_connect_args_is_an_error_of_the_next_connect(cloud):
    async with cloud.pool(min_size=0) as pool:
        pool.set_connect_args(cloud.dsn(), password=secret("late"))
        with pytest.raises(ValueError, match="exclude each other"):
            await pool.fetchval("SELECT 1")
        pool.set_connect_args(cloud.dsn())

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.door.attempts == 1


async def test_the_token_shows_neither_in_a_connections_parameters_nor_in_logged_queries(cloud):
    logged = []
    async with cloud.pool(max_size=1) as pool, pool.acquire() as connection:
        with connection.query_logger(logged.append):
            await connection.fetchval("SELECT 1")
        await asyncio.sleep(0)

        assert logged
        assert_no_secret(*logged, repr(connection), repr(connection._params), *(repr(query) for query in logged))
        assert_no_secret(*(repr(query.conn_params) for query in logged), repr(pool), repr(pool.manager), pool.stats())


# Several hosts.


class PerHost:
    """A source whose tokens are for one host each."""

    def __init__(self, providers):
        self.providers = providers
        self.bound = []

    def bind(self, target):
        self.bound.append(target)
        return self.providers[target.port]


def taking(provider, presented):
    def verify(user, password):
        presented.append((user, password))
        return None if any(password == issued.password for issued in provider.credentials) else "unknown"

    return verify


@pytest.fixture
def closed_port():
    """A port of this machine on which nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def test_hosts_that_share_a_credential_are_tried_in_order_with_one_fetch(cloud, closed_port):
    dsn = f"postgresql://app@127.0.0.1:{closed_port},127.0.0.1:{cloud.door.port}/postgres?sslmode=disable"

    async with cloud.pool(dsn=dsn) as pool:
        assert await pool.fetchval("SELECT 1") == 1
        assert (cloud.presented, cloud.provider.calls) == ([1, 1], 1)


async def test_a_refused_shared_credential_is_refreshed_once_for_all_hosts(cloud, server):
    cloud.refused.add(1)
    async with TokenDoor(server, cloud.door.verify) as second:
        dsn = (
            f"postgresql://app@{cloud.door.host}:{cloud.door.port},{second.host}:{second.port}/postgres?sslmode=disable"
        )

        async with cloud.pool(dsn=dsn, max_size=1) as pool:
            assert await pool.fetchval("SELECT 1") == 1
            assert cloud.provider.calls == 2


async def test_a_bindable_provider_has_one_manager_per_host_and_each_host_gets_its_own_token(server, closed_port):
    providers = [ScriptedProvider(prefix=secret("a")), ScriptedProvider(prefix=secret("b"))]
    presented = ([], [])
    async with (
        TokenDoor(server, taking(providers[0], presented[0])) as first,
        TokenDoor(server, taking(providers[1], presented[1])) as second,
    ):
        source = PerHost({closed_port: ScriptedProvider(), first.port: providers[0], second.port: providers[1]})
        dsn = "postgresql://app@127.0.0.1:{},127.0.0.1:{}/postgres?sslmode=disable"

        async with create_pool(dsn.format(first.port, second.port), credentials=source, min_size=1, max_size=2) as pool:
            assert await pool.fetchval("SELECT 1") == 1
            assert (len(presented[0]), len(presented[1])) == (1, 0)
            pool.set_connect_args(dsn.format(closed_port, second.port))
            async with pool.acquire(), pool.acquire():
                pass

            assert [len(seen) for seen in presented] == [1, 1]
            assert [(t.host, t.port, t.user, t.database) for t in source.bound] == [
                ("127.0.0.1", port, "app", "postgres") for port in (first.port, closed_port, second.port)
            ]
            assert [provider.calls for provider in providers] == [1, 1]

        assert [provider.closed for provider in providers] == [1, 1]


async def test_a_bindable_provider_of_one_host_is_bound_once_to_what_the_dsn_says(cloud):
    source = PerHost({cloud.door.port: cloud.provider})

    async with cloud.pool(credentials=source, max_size=3) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert [target.port for target in source.bound] == [cloud.door.port]
    assert (cloud.provider.calls, cloud.provider.closed) == (1, 1)


async def test_target_session_attrs_decides_among_hosts_that_have_a_token_each(server):
    credentials = [Credential(secret("reader"), user="reader"), Credential(secret("app"), user="app")]
    providers = [ScriptedProvider(credential) for credential in credentials]
    async with TokenDoor(server, lambda _, __: None) as first, TokenDoor(server, lambda _, __: None) as second:
        source = PerHost({first.port: providers[0], second.port: providers[1]})
        dsn = f"postgresql://{first.host}:{first.port},{second.host}:{second.port}/postgres?sslmode=disable"

        for wanted, user in (("read-write", "app"), ("read-only", "reader"), ("any", "reader"), ("primary", "reader")):
            async with create_pool(
                dsn, credentials=source, max_size=1, min_size=1, target_session_attrs=wanted
            ) as pool:
                assert await pool.fetchval("SELECT current_user") == user
            for provider in providers:
                provider.closed = 0


async def test_prefer_standby_takes_a_primary_if_there_is_no_standby(server):
    provider = ScriptedProvider(Credential(secret()))
    async with TokenDoor(server, lambda _, __: None) as first, TokenDoor(server, lambda _, __: None) as second:
        source = PerHost({first.port: provider, second.port: provider})
        dsn = f"postgresql://app@{first.host}:{first.port},{second.host}:{second.port}/postgres?sslmode=disable"

        async with create_pool(
            dsn, credentials=source, max_size=1, min_size=1, target_session_attrs="prefer-standby"
        ) as pool:
            assert await pool.fetchval("SELECT 1") == 1


async def test_with_no_host_up_the_error_is_that_of_the_last_one(closed_port):
    source = PerHost({closed_port: ScriptedProvider(prefix=secret())})
    dsn = f"postgresql://app@127.0.0.1:{closed_port},localhost:{closed_port}/postgres?sslmode=disable"

    with pytest.raises(OSError, match="onnect") as failure:
        await create_pool(dsn, credentials=source, max_size=1, min_size=1)

    assert [target.host for target in source.bound] == ["127.0.0.1", "localhost"]
    assert any("credential" in note for note in failure.value.__notes__)


# A refused credential.


async def test_a_refused_credential_is_fetched_anew_and_the_connect_tried_once_more(cloud):
    cloud.refused.add(1)

    async with cloud.pool(max_size=1) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert cloud.presented == [1, 2]
    assert (cloud.door.attempts, cloud.provider.calls) == (2, 2)
    (refused,) = cloud.observer.of(CredentialRefused)
    assert (refused.generation, refused.sqlstate, refused.retrying) == (1, "28000", True)
    assert len(cloud.observer.of(CredentialInvalidated)) == 1


async def test_many_refused_connects_share_one_refresh(cloud):
    cloud.refused.add(1)
    async with cloud.pool(min_size=0, max_size=5) as pool:
        cloud.door.hang_at(Stage.VERIFY)
        asking = [asyncio.create_task(pool.fetchval("SELECT 1")) for _ in range(5)]
        await cloud.door.reached(Stage.VERIFY, 5)
        cloud.door.clear_faults()

        assert await asyncio.gather(*asking) == [1] * 5
    assert sorted(cloud.presented) == [1] * 5 + [2] * 5
    assert cloud.provider.calls == 2


async def test_a_refused_credential_that_is_no_longer_current_is_not_a_reason_to_fetch(cloud):
    async with cloud.pool(min_size=0) as pool:
        cloud.door.hang_at(Stage.VERIFY)
        asking = asyncio.create_task(pool.fetchval("SELECT 1"))
        await cloud.door.reached(Stage.VERIFY)
        await pool.manager.refresh()
        cloud.refused.add(1)
        cloud.door.clear_faults()

        assert await asking == 1
        assert cloud.presented == [1, 2]
        assert cloud.provider.calls == 2
        assert cloud.observer.of(CredentialInvalidated) == []


async def test_a_wrong_role_is_tried_twice_and_then_the_servers_own_error_is_raised(cloud):
    cloud.refuses_all = True
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(REFUSAL, match='PAM authentication failed for user "app"') as refusal:
            await pool.fetchval("SELECT 1")

    assert type(refusal.value) is REFUSAL
    assert (cloud.presented, cloud.provider.calls) == ([1, 2], 2)
    (note,) = refusal.value.__notes__
    assert note.startswith("asyncpool_creds: connected with credential ")
    assert note.endswith(
        "compare the role, and the token's issuer, audience and user claim, with what the server expects"
    )
    assert [event.retrying for event in cloud.observer.of(CredentialRefused)] == [True, False]


async def test_the_advice_for_a_wrong_role_stays_while_no_other_credential_is_fetched(cloud):
    cloud.refuses_all = True
    async with cloud.pool(min_size=0) as pool:
        for _ in range(2):
            with pytest.raises(REFUSAL) as refusal:
                await pool.fetchval("SELECT 1")

    assert cloud.provider.calls == 2
    assert "compare the role" in refusal.value.__notes__[0]


@pytest.mark.parametrize("fault", ["refused", "starting up", "name", "full"])
async def test_a_connect_that_came_to_no_login_is_not_noted_as_one(cloud, closed_port, fault):
    dsn = cloud.dsn()
    match fault:
        case "refused":
            dsn = dsn.replace(f":{cloud.door.port}", f":{closed_port}")
        case "starting up":
            cloud.door.starting_up = True
        case "name":
            dsn = f"postgresql://app@database.invalid:{closed_port}/postgres?sslmode=require"
        case _:
            cloud.door.refuse_with("53300", "sorry, too many clients already")
    async with cloud.pool(dsn=dsn, min_size=0) as pool:
        with pytest.raises((OSError, asyncpg.PostgresError)) as failure:
            await pool.fetchval("SELECT 1")

    (note,) = failure.value.__notes__
    assert note.startswith("asyncpool_creds: not connected; the credential to use was ")
    assert cloud.provider.credentials[0].fingerprint in note


@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [
        ("28000", "The IAM authentication failed because of too many competing requests."),
        ("28P01", "Rate of connection to proxy exceeded 200."),
        ("08P01", "server login has been failing, cached error: password authentication failed for user app"),
    ],
)
async def test_an_overloaded_server_costs_no_new_credential(cloud, sqlstate, text):
    cloud.door.refuse_with(sqlstate, text)
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(asyncpg.PostgresError, match=text[:20]):
            await pool.fetchval("SELECT 1")

    assert (cloud.door.attempts, cloud.provider.calls) == (1, 1)
    assert cloud.observer.of(CredentialRefused) == cloud.observer.of(CredentialInvalidated) == []


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


async def test_a_token_of_unknown_life_that_is_refused_in_time_hints_at_default_lifetime(cloud, caplog):
    cloud.provider.play(*(Credential(secret(str(number))) for number in range(3)))
    async with cloud.pool(max_size=1) as pool:
        for number in (1, 2):
            cloud.clock.advance(30)
            cloud.refused.add(number)
            await pool.expire_connections()
            assert await pool.fetchval("SELECT 1") == 1

    (told,) = warnings_in(caplog)
    assert "ScriptedProvider" in told
    assert "refused 30 s after it was fetched" in told
    assert "TokenManager(..., default_lifetime=SECONDS)" in told


@pytest.mark.parametrize("case", ["states its expiry", "never served", "role refused"])
async def test_another_refusal_hints_at_no_default_lifetime(cloud, caplog, case):
    if case != "states its expiry":
        cloud.provider.play(*(Credential(secret(str(number))) for number in range(3)))
    async with cloud.pool(min_size=0, max_size=1) as pool:
        if case != "never served":
            assert await pool.fetchval("SELECT 1") == 1
            await pool.expire_connections()
        cloud.refused.add(1)
        cloud.refuses_all = case == "role refused"
        with contextlib.suppress(REFUSAL):
            await pool.fetchval("SELECT 1")

    assert cloud.provider.calls == 2
    assert warnings_in(caplog) == []


async def test_a_password_in_the_environment_is_told_once(cloud, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PGPASSWORD", secret("environment"))
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    (tmp_path / "pgpass").write_text(secret("file"))

    async with cloud.pool() as pool:
        await pool.expire_connections()
        assert await pool.fetchval("SELECT 1") == 1

    one, another = warnings_in(caplog)
    assert one.startswith("PGPASSWORD is set, and not used: credentials= comes first")
    assert another.startswith("PGPASSFILE is set, and not used")


async def test_a_password_in_the_environment_that_is_the_source_is_not_worth_a_word(cloud, monkeypatch, caplog):
    held = cloud.provider.mint(600)
    monkeypatch.setenv("PGPASSWORD", held.password)
    cloud.provider.play(held)

    async with cloud.pool() as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert warnings_in(caplog) == []


async def test_a_source_that_is_given_the_user_may_call_it_otherwise(cloud, caplog):
    class PerUser:
        def bind(self, target):
            cloud.provider.play(Credential(secret(), user="reporter" if target.user == "app" else "nobody"))
            return cloud.provider

    async with cloud.pool(credentials=PerUser(), max_size=1) as pool:
        assert await pool.fetchval("SELECT current_user") == "reporter"

    assert warnings_in(caplog) == []


async def test_a_password_in_the_environment_is_no_matter_without_credentials(cloud, monkeypatch, caplog):
    monkeypatch.setenv("PGPASSWORD", "x")

    create_pool(cloud.dsn(), min_size=0)

    assert warnings_in(caplog) == []


async def test_a_user_that_the_source_overrules_is_told_once(cloud, caplog):
    cloud.provider.play(Credential(secret(), user="reporter"))
    async with cloud.pool(max_size=2) as pool:
        assert await pool.fetchval("SELECT current_user") == "reporter"

    (told,) = warnings_in(caplog)
    assert told == (
        "the user 'app' of the connection arguments is not used: "
        "the credential of ScriptedProvider comes with the user 'reporter'"
    )


@pytest.mark.parametrize("user", ["app", ""])
async def test_a_user_that_the_source_confirms_or_is_left_to_is_not_worth_a_word(cloud, caplog, user):
    cloud.provider.play(Credential(secret(), user="app"))
    async with cloud.pool(dsn=cloud.dsn().replace("app@", f"{user}@" if user else ""), max_size=1) as pool:
        assert await pool.fetchval("SELECT current_user") == "app"

    assert warnings_in(caplog) == []


async def test_a_wrong_role_makes_neither_a_loop_of_fetches_nor_of_logins(cloud):
    cloud.refuses_all = True
    async with cloud.pool(min_size=0) as pool:
        for _ in range(10):
            with pytest.raises(REFUSAL):
                await pool.fetchval("SELECT 1")
        assert (cloud.provider.calls, cloud.door.attempts) == (2, 11)

        cloud.clock.advance(1.5)
        for _ in range(10):
            with pytest.raises(REFUSAL):
                await pool.fetchval("SELECT 1")
        assert (cloud.provider.calls, cloud.door.attempts) == (3, 22)

        cloud.clock.advance(1.5)
        for _ in range(10):
            with pytest.raises(REFUSAL):
                await pool.fetchval("SELECT 1")
        assert (cloud.provider.calls, cloud.door.attempts) == (3, 32)


async def test_a_wrong_role_that_is_put_right_works_at_once(cloud):
    cloud.refuses_all = True
    async with cloud.pool(min_size=0) as pool:
        for _ in range(3):
            with pytest.raises(REFUSAL):
                await pool.fetchval("SELECT 1")

        cloud.refuses_all = False

        assert await pool.fetchval("SELECT 1") == 1


async def test_a_source_that_has_nothing_newer_leaves_the_refusal_as_it_is(cloud):
    cloud.provider.play(Credential(secret("static")))
    cloud.refused.update({1, 2})
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(REFUSAL) as refusal:
            await pool.fetchval("SELECT 1")

    assert cloud.presented == [1]
    assert any("no newer one" in note for note in refusal.value.__notes__)


async def test_a_source_that_is_down_leaves_the_refusal_as_it_is_and_the_credential_in_use(cloud):
    cloud.provider.play(600, ProviderError("the source is down"))
    cloud.refused.add(1)
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(REFUSAL) as refusal:
            await pool.fetchval("SELECT 1")
        assert any("the server refused it" in note for note in refusal.value.__notes__)
        assert cloud.provider.calls == 2
        cloud.refused.clear()

        assert await pool.fetchval("SELECT 1") == 1
        assert cloud.presented == [1, 1]


async def test_another_error_of_the_server_passes_unchanged_with_a_note(cloud):
    cloud.door.refuse_with("3D000", 'database "gone" does not exist')
    async with cloud.pool(min_size=0) as pool:
        with pytest.raises(asyncpg.InvalidCatalogNameError) as failure:
            await pool.fetchval("SELECT 1")

    assert (cloud.door.attempts, cloud.provider.calls) == (1, 1)
    assert str(failure.value) == 'database "gone" does not exist'
    (note,) = failure.value.__notes__
    assert "ScriptedProvider" in note
    assert f"{cloud.clock.now():%Y-%m-%d %H:%M:%S} UTC" in note
    assert cloud.provider.credentials[0].fingerprint in note
    assert "generation 1" in note


async def test_the_classifier_can_be_replaced(cloud):
    judged = []

    def refuses(error):
        judged.append(type(error))
        return isinstance(error, asyncpg.CannotConnectNowError)

    cloud.refused.add(1)
    async with cloud.pool(min_size=0, is_refusal=refuses) as pool:
        with pytest.raises(REFUSAL):
            await pool.fetchval("SELECT 1")
        assert (cloud.door.attempts, cloud.provider.calls, judged) == (1, 1, [REFUSAL])

        cloud.door.starting_up = True
        with pytest.raises(asyncpg.CannotConnectNowError):
            await pool.fetchval("SELECT 1")
        assert (cloud.door.attempts, cloud.provider.calls) == (3, 2)


async def test_a_refusal_over_tls_that_a_second_try_without_it_hides_is_still_one(tls_cloud):
    tls_cloud.door.require_tls = True
    tls_cloud.refused.add(1)

    async with tls_cloud.pool(dsn=tls_cloud.door.dsn(), max_size=1) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    assert tls_cloud.presented == [1, 2]
    assert tls_cloud.provider.calls == 2


async def test_the_dropped_role_of_a_lease_is_replaced_by_that_of_the_next(cloud):
    """As Vault does at the end of a lease."""
    for number in (1, 2):
        await cloud.server.create_role(f"v-app-{number}")
    lease = [
        Credential(
            secret(f"lease-{number}"),
            user=f"v-app-{number}",
            expires_at=cloud.provider.mint(100 * number).expires_at,
            ends_session=True,
        )
        for number in (1, 2)
    ]
    cloud.provider.play(*lease)
    async with cloud.pool(max_size=1) as pool:
        assert await pool.fetchval("SELECT current_user") == "v-app-1"

        cloud.clock.advance(91)
        assert await pool.fetchval("SELECT current_user") == "v-app-2"
        await cloud.server.execute('DROP ROLE "v-app-1"')
        assert await pool.fetchval("SELECT current_user") == "v-app-2"

    await cloud.server.execute('DROP ROLE "v-app-2"')


def _with_cause(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (asyncpg.InvalidPasswordError('password authentication failed for user "app"'), True),
        (REFUSAL('PAM authentication failed for user "app"'), True),
        (REFUSAL('RADIUS authentication failed for user "app"'), True),
        (REFUSAL('LDAP authentication failed for user "app"'), True),
        (REFUSAL("The access token has expired or is not valid"), True),
        (REFUSAL('no pg_hba.conf entry for host "1.2.3.4", user "app", database "app", no encryption'), False),
        (REFUSAL('pg_hba.conf rejects connection for host "1.2.3.4", user "app", database "app"'), False),
        (REFUSAL('role "app" is not permitted to log in'), False),
        (REFUSAL("connection requires a valid client certificate"), False),
        (REFUSAL('certificate authentication failed for user "app"'), False),
        (asyncpg.ProtocolViolationError("SASL authentication failed"), True),
        (asyncpg.ProtocolViolationError("PAM authentication failed"), True),
        (asyncpg.ProtocolViolationError("password authentication failed"), True),
        (asyncpg.ProtocolViolationError("invalid message format"), False),
        (asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"), False),
        (asyncpg.TooManyConnectionsError("sorry, too many clients already"), False),
        (asyncpg.CannotConnectNowError("the database system is starting up"), False),
        (asyncpg.InvalidCatalogNameError('database "gone" does not exist'), False),
        (ConnectionRefusedError(), False),
        (TimeoutError(), False),
        (_with_cause(REFUSAL("no pg_hba.conf entry ... no encryption"), asyncpg.InvalidPasswordError("no")), True),
        (_with_cause(OSError(), asyncpg.TooManyConnectionsError("no")), False),
    ],
    ids=lambda value: f"{type(value).__name__}: {value}"[:60] if isinstance(value, Exception) else None,
)
def test_what_counts_as_a_refusal_of_the_credential(error, refused):
    assert is_refusal(error) is refused


# A source that gives nothing.


async def test_a_source_that_fails_for_good_is_one_typed_error_of_create_pool(cloud):
    cloud.provider.play(ProviderError("access denied", retryable=False))

    with pytest.raises(CredentialExpired, match="access denied") as failure:
        await cloud.pool()

    assert isinstance(failure.value.__cause__, ProviderError)
    assert (cloud.provider.calls, cloud.door.attempts) == (1, 0)


async def test_a_failing_source_is_asked_once_for_many_waiting_acquires(cloud):
    async with cloud.pool(min_size=0, max_size=5) as pool:
        cloud.provider.play(ProviderError("down"))
        outcomes = await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20)), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [CredentialUnavailable] * 20
    assert (cloud.provider.calls, cloud.door.attempts) == (1, 0)


# A server whose clock is ahead.


async def test_a_refusal_teaches_how_far_the_clock_of_the_server_is_ahead(cloud):
    cloud.provider.play(20)
    cloud.ahead = 10.0
    async with cloud.pool(min_size=0, max_size=1) as pool:
        for _ in range(20):
            connection = await pool.acquire()
            await connection.close()
            await pool.release(connection)
            cloud.clock.advance(3)

    (skew,) = cloud.observer.of(ClockSkewDetected)
    assert 0 < skew.skew <= 10
    assert skew.lifetime == pytest.approx(20)
    # Each refusal has the one before it shortened by; then there are none.
    assert len(cloud.observer.of(CredentialRefused)) <= 2
    assert len(cloud.presented) - 20 <= 2


async def test_a_credential_that_is_revoked_is_no_sign_of_a_skew(cloud):
    async with cloud.pool(min_size=0, max_size=1) as pool:
        await pool.fetchval("SELECT 1")
        cloud.refused.add(1)
        cloud.door.kill_connections()
        await cloud.until(lambda: pool.get_size() == 0)
        assert await pool.fetchval("SELECT 1") == 1

        assert cloud.observer.of(ClockSkewDetected) == []
        assert pool.manager.stats().seconds_left == pytest.approx(600)


# What a source may have beside fetch.


class Leases:
    """A source that knows how long sessions last, and revokes what is superseded."""

    session_lifetime: float | None = 100.0

    def __init__(self, cloud):
        self._cloud = cloud
        self.revoked = []
        self.live_at_revocation = []

    async def fetch(self):
        return await self._cloud.provider.fetch()

    async def revoke(self, credential):
        self.live_at_revocation.append(self._cloud.door.live)
        self.revoked.append(self._cloud.provider.credentials.index(credential) + 1)


async def test_a_superseded_credential_is_revoked_once_its_last_connection_is_closed(cloud):
    source = Leases(cloud)
    async with cloud.pool(credentials=cloud.manager(source), max_size=2, retire_when="rotated") as pool:
        await pool.fetchval("SELECT 1")
        async with pool.acquire() as held:
            pool.manager.invalidate(cloud.provider.credentials[0])
            await pool.manager.stamp()
            await cloud.until(lambda: pool.stats().by_generation.get(2) == 1)
            assert source.revoked == []
            assert await held.fetchval("SELECT 1") == 1
        await cloud.until(lambda: source.revoked == [1])

        assert pool.stats().by_generation == {2: 2}


async def test_the_end_of_sessions_that_a_source_knows_of_is_the_pools_max_lifetime(cloud):
    source = Leases(cloud)
    async with cloud.pool(credentials=cloud.manager(source), max_size=1) as pool:
        (connection,) = pool.stats().connections
        assert 95 < connection.seconds_left <= 100


async def test_a_max_lifetime_that_was_given_comes_before_what_the_source_knows(cloud):
    source = Leases(cloud)
    async with cloud.pool(credentials=cloud.manager(source), max_size=1, max_lifetime=10) as pool:
        (connection,) = pool.stats().connections
        assert connection.seconds_left <= 10


async def test_a_session_lifetime_that_is_no_duration_is_refused_by_name(cloud):
    source = Leases(cloud)
    source.session_lifetime = -1

    with pytest.raises(ValueError, match="session_lifetime"):
        cloud.pool(credentials=cloud.manager(source))


# A full server.


async def test_an_acquire_whose_own_retired_connection_still_fills_the_server_waits_for_its_end(cloud):
    attempts = []

    async def connect(*arguments, **keywords):
        attempts.append(pool.stats().connections if len(attempts) else ())
        if len(attempts) == 2:
            raise asyncpg.TooManyConnectionsError("sorry, too many clients already")
        return await asyncpg.connect(*arguments, **keywords)

    manager = cloud.manager(background=False)
    async with cloud.pool(credentials=manager, max_size=1, connect=connect, expired_sessions="refuse") as pool:
        cloud.clock.advance(600)

        assert await pool.fetchval("SELECT 1") == 1

    assert len(attempts) == 3


async def test_a_full_server_is_the_callers_trouble_when_nothing_of_ours_is_on_its_way_out(cloud):
    attempts = []

    async def connect(*_arguments, **_keywords):
        attempts.append(1)
        raise asyncpg.TooManyConnectionsError("sorry, too many clients already")

    async with cloud.pool(min_size=0, max_size=1, connect=connect) as pool:
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await pool.fetchval("SELECT 1")

    assert len(attempts) == 1
