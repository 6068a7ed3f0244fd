"""The door: what it lets in, whom it refuses, and how it fails when told to."""

import asyncio
import gc
import socket
import ssl
import struct
import time

import asyncpg
import pytest

from asyncpool_creds.testing.door import Stage, TokenDoor
from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

TOKEN = "good"


@pytest.fixture(scope="module")
def server():
    with PostgresServer() as server:
        asyncio.run(server.create_role("app"))
        yield server


def verify(user, password):
    return None if password == TOKEN else f"{user} came with a bad token"


def connect(door, *, password=TOKEN, user="app", ssl="disable", timeout=5, **rest):
    return asyncpg.connect(
        host=door.host,
        port=door.port,
        user=user,
        database="postgres",
        password=password,
        ssl=ssl,
        timeout=timeout,
        **rest,
    )


async def test_a_good_token_gets_to_the_real_server(server):
    async with TokenDoor(server, verify) as door:
        connection = await connect(door)
        rows = await connection.fetch("SELECT current_user::text AS who, x FROM generate_series(1, $1) x", 50_000)
        await connection.close()

        assert (len(rows), rows[0]["who"]) == (50_000, "app")
        assert (door.attempts, door.accepted, door.refused, door.peak_live) == (1, 1, 0, 1)
        await door.until(lambda: door.live == 0)


async def test_a_large_answer_to_a_slow_reader_arrives_whole(server):
    async with TokenDoor(server, verify) as door:
        connection = await connect(door)
        length = 30_000_000

        text = await connection.fetchval("SELECT repeat('x', $1)", length)
        echoed = await connection.fetchval("SELECT length($1::text)", text)

        assert (len(text), echoed) == (length, length)
        await connection.close()


async def test_a_bad_token_is_refused_as_pam_would(server):
    async with TokenDoor(server, verify) as door:
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as refusal:
            await connect(door, password="bad")

        assert refusal.value.sqlstate == "28000"
        assert str(refusal.value) == 'PAM authentication failed for user "app"'
        assert door.refusals == ["app came with a bad token"]
        assert (door.accepted, door.refused, door.live) == (0, 1, 0)


@pytest.mark.parametrize(
    ("sqlstate", "kind"), [("28P01", asyncpg.InvalidPasswordError), ("08P01", asyncpg.ProtocolViolationError)]
)
async def test_a_refusal_can_be_worded_as_other_servers_do(server, sqlstate, kind):
    async with TokenDoor(server, verify, refusal_sqlstate=sqlstate, refusal_message="no, {user}") as door:
        with pytest.raises(kind, match="no, app"):
            await connect(door, password="bad")


async def test_verify_may_be_a_coroutine_function_and_be_exchanged(server):
    async def strict(user, password):
        await asyncio.sleep(0)
        return "closed today"

    async with TokenDoor(server, verify) as door:
        await (await connect(door)).close()
        door.verify = strict

        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await connect(door)

        assert door.refusals == ["closed today"]


async def test_a_verify_that_raises_lets_nobody_in_and_tells_no_secret(server):
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

    def broken(user, password):
        raise KeyError(password)

    async with TokenDoor(server, broken) as door:
        with pytest.raises(asyncpg.InternalServerError, match="KeyError") as refusal:
            await connect(door, password="planted-secret")

        assert "planted-secret" not in str(refusal.value)
        assert [type(error) for error in reported] == [KeyError]


async def test_an_unknown_role_is_refused_by_the_server_behind(server):
    async with TokenDoor(server, verify) as door:
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError, match='role "nobody_here" does not exist'):
            await connect(door, user="nobody_here")

        await door.until(lambda: door.live == 0)
        assert door.refusals == ["the server behind refused the login"]


async def test_a_backend_that_cannot_be_reached_or_wants_a_password_is_an_error_for_the_client(server):
    async with TokenDoor("/nonexistent/.s.PGSQL.1", verify) as door:
        with pytest.raises(asyncpg.PostgresConnectionError, match="cannot reach"):
            await connect(door)
    async with TokenDoor((server.host, server.port), verify) as door:
        with pytest.raises(asyncpg.InternalServerError, match="must trust the door"):
            await connect(door)


async def test_options_for_cockroachdb_do_not_reach_postgresql(server):
    async with TokenDoor(server, verify) as door:
        options = "--crdb:jwt_auth_enabled=true --work_mem=5MB"

        connection = await connect(door, server_settings={"options": options})

        assert door.startup["options"] == options
        assert await connection.fetchval("SHOW work_mem") == "5MB"
        await connection.close()


async def test_tls_is_offered_and_can_be_verified(server):
    async with TokenDoor(server, verify, tls=True) as door:
        by_context = await connect(door, ssl=door.client_context())
        by_dsn = await asyncpg.connect(door.dsn(sslmode="verify-full"), password=TOKEN)
        in_clear = await asyncpg.connect(door.dsn(sslmode="disable"), password=TOKEN)

        for connection in (by_context, by_dsn, in_clear):
            assert await connection.fetchval("SELECT repeat('x', 1000000)") == "x" * 1_000_000
            await connection.close()


async def test_a_client_that_does_not_trust_the_certificate_leaves_before_its_password(server):
    async with TokenDoor(server, verify, tls=True) as door:
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(door, ssl=ssl.create_default_context())

        assert door.startup == {}


async def test_a_door_that_requires_tls_speaks_as_a_server_with_hostssl_only(server):
    async with TokenDoor(server, verify, require_tls=True) as door:
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as refusal:
            await connect(door)
        await (await connect(door, ssl="require")).close()

        assert str(refusal.value) == (
            'no pg_hba.conf entry for host "127.0.0.1", user "app", database "postgres", no encryption'
        )


async def test_without_tls_there_is_no_authority_to_name(server):
    async with TokenDoor(server, verify) as door:
        with pytest.raises(RuntimeError, match="tls=True"):
            door.client_context()
        with pytest.raises(OSError, match="rejected SSL upgrade"):
            await connect(door, ssl="require")


@pytest.mark.parametrize("tls", [False, True])
async def test_a_cancel_request_reaches_the_query(server, tls):
    async with TokenDoor(server, verify, tls=tls) as door:
        connection = await connect(door, ssl=door.client_context() if tls else "disable")

        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(600)", timeout=0.05)

        assert await connection.fetchval("SELECT 1") == 1
        assert door.cancel_requests == 1
        await connection.close()


@pytest.mark.parametrize("stage", Stage)
async def test_a_connection_that_hangs_at_a_stage_goes_on_when_the_fault_is_cleared(server, stage):
    async with TokenDoor(server, verify, tls=True) as door:
        door.hang_at(stage)
        tls = door.client_context()

        async def ask():
            connection = await connect(door, ssl=tls)
            answer = await connection.fetchval("SELECT 1")
            await connection.close()
            return answer

        asking = asyncio.create_task(ask())
        await door.reached(stage)
        assert not asking.done()
        door.clear_faults()

        assert await asking == 1


@pytest.mark.parametrize("stage", Stage)
async def test_a_connection_that_hangs_at_a_stage_ends_with_the_door(server, stage):
    async with TokenDoor(server, verify, tls=True) as door:
        door.hang_at(stage)
        tls = door.client_context()

        async def ask():
            connection = await connect(door, ssl=tls)
            await connection.fetchval("SELECT 1")

        asking = asyncio.create_task(ask())
        await door.reached(stage)

    with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        await asking
    assert door.live == 0


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("stage", Stage)
async def test_a_connection_can_be_killed_at_a_stage_once(server, stage, tls):
    if not tls and stage in {Stage.TLS_REQUEST, Stage.TLS_HANDSHAKE}:
        stage = Stage.ACCEPT
    async with TokenDoor(server, verify, tls=tls) as door:
        door.kill_at(stage, times=1)
        context = door.client_context() if tls else "disable"

        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            connection = await connect(door, ssl=context)
            await connection.fetchval("SELECT 1")

        await door.reached(stage)
        assert door.live == 0
        await (await connect(door, ssl=context)).close()


async def test_a_client_that_gives_up_during_a_hang_is_forgotten(server):
    async with TokenDoor(server, verify) as door:
        door.hang_at(Stage.BACKEND_CONNECT)
        connecting = asyncio.create_task(connect(door))
        await door.reached(Stage.BACKEND_CONNECT)
        assert door.live == 1

        connecting.cancel()

        await door.until(lambda: door.live == 0)
        with pytest.raises(asyncio.CancelledError):
            await connecting


async def test_a_new_fault_at_a_stage_releases_those_the_old_one_kept(server):
    async with TokenDoor(server, verify) as door:
        door.hang_at(Stage.VERIFY)
        connecting = asyncio.create_task(connect(door))
        await door.reached(Stage.VERIFY)

        door.kill_at(Stage.VERIFY)

        await (await connecting).close()
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await connect(door)
        await door.reached(Stage.VERIFY)


async def test_kill_connections_resets_every_connection(server):
    async with TokenDoor(server, verify) as door:
        loop = asyncio.get_running_loop()
        lost = [loop.create_future() for _ in range(3)]
        connections = [await connect(door) for _ in lost]
        for connection, future in zip(connections, lost, strict=True):
            connection.add_termination_listener(lambda _, future=future: future.set_result(None))

        killed = door.kill_connections()

        assert (killed, door.live, door.peak_live) == (3, 0, 3)
        await asyncio.gather(*lost)
        assert all(connection.is_closed() for connection in connections)


async def test_a_reset_is_a_reset_on_the_wire(server):
    async with TokenDoor(server, verify) as door:
        door.down = True
        reader, writer = await asyncio.open_connection(door.host, door.port)

        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)

        writer.close()
        assert door.attempts == 1


async def test_close_connections_takes_idle_ones_now_and_others_when_they_are_idle(server):
    async with TokenDoor(server, verify) as door:
        idle, busy = await connect(door), await connect(door)
        told = asyncio.get_running_loop().create_future()
        idle.add_termination_listener(lambda _: told.set_result(None))
        async with busy.transaction():
            await busy.execute("SELECT 1")

            assert door.close_connections() == 1

            await told
            assert door.live == 1
            assert await busy.fetchval("SELECT 2") == 2

        await door.until(lambda: door.live == 0)
        assert idle.is_closed()
        busy.terminate()


async def test_the_idlest_connection_is_closed_alone_and_one_that_works_never(server):
    async with TokenDoor(server, verify) as door:
        first, second = await connect(door), await connect(door)
        working = asyncio.ensure_future(first.fetchval("SELECT pg_sleep(0.2)"))
        await asyncio.sleep(0.05)

        assert door.close_idlest()
        await door.until(lambda: door.live == 1)
        assert not door.close_idlest()
        await working

        assert not first.is_closed()
        assert second.is_closed()
        await first.close()


async def test_a_door_that_is_down_refuses_newcomers_leaves_the_others_and_comes_up_on_its_port(server):
    async with TokenDoor(server, verify) as door:
        connection, port = await connect(door), door.port
        await door.go_down()
        await door.go_down()

        with pytest.raises(ConnectionRefusedError):
            await connect(door)
        assert await connection.fetchval("SELECT 1") == 1

        await door.come_up()
        await door.come_up()
        another = await connect(door)
        assert (await another.fetchval("SELECT 1"), door.port) == (1, port)
        await another.close()
        await connection.close()
        await door.go_down()

    with pytest.raises(RuntimeError, match="not open"):
        await door.come_up()
    async with door:
        await (await connect(door)).close()


async def test_what_a_closed_client_is_told_is_57p01(server):
    async with TokenDoor(server, verify) as door:
        reader, writer = await asyncio.open_connection(door.host, door.port)
        body = struct.pack("!i", 196608) + b"user\0app\0database\0postgres\0\0"
        writer.write(struct.pack("!i", len(body) + 4) + body)
        await reader.readexactly(9)
        writer.write(b"p" + struct.pack("!i", 4 + len(TOKEN) + 1) + TOKEN.encode() + b"\0")
        await reader.readuntil(b"Z\0\0\0\5I")
        await door.until(lambda: door.live == 1)

        door.close_connections()
        farewell = await reader.read()

        assert b"C57P01\0" in farewell
        writer.close()


async def test_too_many_connections_is_said_while_switched_on(server):
    async with TokenDoor(server, verify) as door:
        door.too_many_connections = True
        with pytest.raises(asyncpg.TooManyConnectionsError, match="sorry, too many clients already"):
            await connect(door)

        door.clear_faults()

        await (await connect(door)).close()


async def test_max_connections_is_never_exceeded(server):
    async with TokenDoor(server, verify) as door:
        door.max_connections = 3
        door.hang_at(Stage.VERIFY)
        connecting = [asyncio.create_task(connect(door)) for _ in range(8)]
        await door.reached(Stage.VERIFY, 8)
        door.clear_faults()

        outcomes = await asyncio.gather(*connecting, return_exceptions=True)

        refused = [outcome for outcome in outcomes if isinstance(outcome, asyncpg.TooManyConnectionsError)]
        assert (len(refused), door.live, door.peak_live) == (5, 3, 3)
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await connect(door)
        for outcome in outcomes:
            if outcome not in refused:
                await outcome.close()


async def test_a_server_that_starts_up_and_any_other_refusal_can_be_played(server):
    async with TokenDoor(server, verify) as door:
        door.starting_up = True
        with pytest.raises(asyncpg.CannotConnectNowError, match="the database system is starting up"):
            await connect(door)
        door.clear_faults()
        door.refuse_with("3D000", 'database "gone" does not exist')
        with pytest.raises(asyncpg.InvalidCatalogNameError, match="gone"):
            await connect(door)
        door.clear_faults()
        await (await connect(door)).close()

        assert door.refused == len(door.refusals) == 2


async def test_a_delay_comes_before_the_verification(server):
    async with TokenDoor(server, verify) as door:
        door.delay = 0.05
        started = time.monotonic()

        await (await connect(door)).close()

        assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize("packet", [b"\0\0\0\1\0\0\0\0", b"\x16\3\1\2\0\1\0\1", struct.pack("!ii", 9, 196608) + b"\0"])
async def test_nonsense_is_answered_with_an_error(server, packet):
    async with TokenDoor(server, verify) as door:
        reader, writer = await asyncio.open_connection(door.host, door.port)
        writer.write(packet)

        answer = await reader.read()

        assert answer.startswith(b"E")
        writer.close()


async def test_nothing_is_left_after_the_door_is_closed(server):
    before = asyncio.all_tasks()
    door = TokenDoor(server, verify, tls=True)
    async with door:
        port = door.port
        authority = door.ca_pem_path
        connections = [await connect(door, ssl=door.client_context()) for _ in range(3)]
        door.hang_at(Stage.VERIFY)
        connecting = asyncio.create_task(connect(door))
        await door.reached(Stage.VERIFY)
        waiting = asyncio.create_task(door.until(lambda: False))
        await asyncio.sleep(0)

    with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
        await connecting
    with pytest.raises(RuntimeError, match="closed while somebody waited"):
        await waiting
    for connection in connections:
        connection.terminate()
    assert asyncio.all_tasks() == before
    with pytest.raises(FileNotFoundError):
        ssl.create_default_context(cafile=authority)
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))
    with pytest.raises(RuntimeError, match="not open"):
        door.dsn()
    gc.collect()


async def test_leaving_the_door_under_cancellation_still_closes_everything(server):
    door = TokenDoor(server, verify)
    inside = asyncio.Event()

    async def live():
        async with door:
            connection = await connect(door)
            try:
                inside.set()
                await asyncio.Event().wait()
            finally:
                connection.terminate()

    task = asyncio.create_task(live())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert door.live == 0
    async with door:
        await (await connect(door)).close()
