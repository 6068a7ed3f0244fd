"""The throw-away server: up for whoever asks, and gone whatever happens to them."""

import asyncio
import datetime as dt
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
import asyncpg
import pytest

from asyncpool_creds.testing.postgres import PostgresServer

pytestmark = pytest.mark.anyio

DEADLINE = 10.0

HOLD_A_SERVER = """
import os, sys
from asyncpool_creds.testing.postgres import PostgresServer
with PostgresServer() as server:
    print(server.pid, server.port, server.socket_directory, os.geteuid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server():
    """For tests that leave no trace but roles of their own."""
    with PostgresServer() as server:
        yield server


def is_running(pid):
    """A process that has ended and waits for its parent to notice does not run."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_is_gone(pid, port, directory, *, within=0.0):
    # The process that cleans up is nobody's child any more: there is nothing to wait for but the outcome.
    deadline = time.monotonic() + within
    while is_running(pid) or is_listening(port) or Path(directory).exists():
        assert time.monotonic() < deadline, (is_running(pid), is_listening(port), Path(directory).exists())
        time.sleep(0.01)


def as_ordinary_user(argv):
    """Return a command that runs `argv` as somebody who is not root."""
    if os.geteuid() != 0:
        return argv
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--", *argv]


class Holder:
    """Another Python process that holds a server."""

    def __init__(self, argv=(sys.executable, "-c", HOLD_A_SERVER), **options):
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def __enter__(self):
        pid, port, self.directory, self.uid = self.process.stdout.readline().split()
        self.server = (int(pid), int(port), self.directory)
        assert is_listening(int(port))
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)


def test_a_server_is_up_at_once_and_gone_at_the_end_of_the_block():
    with PostgresServer() as server:
        place = (server.pid, server.port, server.socket_directory)

        assert is_listening(server.port)
        assert len(server.socket_path) < 100
        assert Path(server.socket_path).is_socket()
        assert int(server.version.split(".")[0]) >= 17

    assert_is_gone(*place)
    assert "ready to accept connections" in server.log()
    with pytest.raises(RuntimeError, match="does not run"):
        server.dsn()


async def test_a_server_in_an_async_block_leaves_the_loop_free():
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with PostgresServer() as server:
        place = (server.pid, server.port, server.socket_directory)
        rows = await server.fetch("SELECT current_user::text AS who, version()")
    ticking.cancel()

    assert ticks > 50
    assert rows[0]["who"] == "postgres"
    assert_is_gone(*place)


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_start_that_is_cancelled_leaves_nothing(how):
    server = PostgresServer()

    async def enter():
        async with server:
            raise AssertionError("got in")

    if how == "scope":
        with anyio.move_on_after(0.05) as scope:
            await enter()
        assert scope.cancelled_caught
    else:
        task = asyncio.create_task(enter())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with server:
        await server.execute("SELECT 1")


def test_an_exception_in_the_block_ends_the_server():
    with pytest.raises(KeyError), PostgresServer() as server:
        place = (server.pid, server.port, server.socket_directory)
        raise KeyError

    assert_is_gone(*place)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_parent_that_is_killed_leaves_nothing(number):
    with Holder(stderr=subprocess.DEVNULL) as holder:
        holder.process.send_signal(number)

        holder.process.wait(DEADLINE)

        assert_is_gone(*holder.server, within=DEADLINE)


def test_a_parent_that_is_killed_with_its_group_leaves_nothing():
    with Holder(start_new_session=True) as holder:
        os.killpg(holder.process.pid, signal.SIGKILL)

        assert_is_gone(*holder.server, within=DEADLINE)


def test_a_parent_that_is_killed_while_a_fork_of_it_lives_leaves_nothing():
    script = HOLD_A_SERVER.replace("    print(", "    os.fork() or (sys.stdin.read(), os._exit(0))\n    print(")
    with Holder([sys.executable, "-W", "ignore", "-c", script]) as holder:
        holder.process.kill()

        assert_is_gone(*holder.server, within=DEADLINE)


def test_a_server_whose_keeper_was_killed_is_ended_by_stop():
    with PostgresServer() as server:
        place = (server.pid, server.port, server.socket_directory)
        keeper = subprocess.run(
            ["ps", "-o", "ppid=", "-p", str(server.pid)], capture_output=True, text=True, check=True
        ).stdout
        os.kill(int(keeper), signal.SIGKILL)

    assert_is_gone(*place)


def test_an_ordinary_user_can_start_a_server():
    with Holder(as_ordinary_user([sys.executable, "-c", HOLD_A_SERVER])) as holder:
        assert holder.uid != "0"
        holder.process.communicate(timeout=DEADLINE)

        assert holder.process.returncode == 0
        assert_is_gone(*holder.server)


def test_a_place_others_may_not_enter_is_no_obstacle():
    with tempfile.TemporaryDirectory(prefix="private-") as private:
        # Made 0700: when run as root, the unprivileged "nobody" cannot get in.
        with Holder(env={**os.environ, "TMPDIR": private}) as holder:
            assert holder.directory.startswith(os.path.realpath(private))
            holder.process.communicate(timeout=DEADLINE)

            assert holder.process.returncode == 0
        assert_is_gone(*holder.server)
        assert list(Path(private).iterdir()) == []


def test_a_long_path_for_temporary_files_is_avoided():
    with (
        tempfile.TemporaryDirectory(prefix="long-" + "x" * 80) as long,
        Holder(env={**os.environ, "TMPDIR": long}) as holder,
    ):
        assert not holder.directory.startswith(long)


async def test_several_servers_live_side_by_side():
    async with PostgresServer() as one, PostgresServer() as other:
        await one.execute("CREATE TABLE here (x int)")

        assert one.port != other.port
        assert (await other.fetch("SELECT to_regclass('here') IS NULL AS missing"))[0]["missing"]


def test_bad_settings_are_answered_with_the_end_of_the_log():
    with pytest.raises(RuntimeError, match='unrecognized configuration parameter "shared_bufers"'):
        PostgresServer(settings={"shared_bufers": "1"}).start()


def test_a_port_that_is_taken_is_named_as_the_reason():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        with pytest.raises(RuntimeError, match=r"the port is taken(.|\n)*Address already in use"):
            PostgresServer(port=taken.getsockname()[1]).start()


def test_a_server_is_started_once():
    with PostgresServer() as server, pytest.raises(RuntimeError, match="started already"):
        server.start()
    server.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"port": "1"}}, "settings: 'port' cannot be set here; pass port="),
        ({"settings": {"work_mem": "1MB\nfsync = on"}}, "settings: 'work_mem' has a line break"),
        ({"max_connections": 3}, "max_connections: expected at least 4"),
        ({"port": 70000}, "port: expected 0 to 65535, got 70000"),
    ],
)
def test_nonsense_is_refused_before_anything_is_started(arguments, message):
    with pytest.raises(ValueError, match=message):
        PostgresServer(**arguments)


def test_a_string_for_hba_is_a_mistake():
    with pytest.raises(TypeError, match="pass a list of lines"):
        PostgresServer(hba="host all all all trust")


async def test_settings_and_limits_reach_the_server():
    async with PostgresServer(settings={"application_name": "it's"}, max_connections=7) as server:
        rows = await server.fetch(
            "SELECT current_setting('max_connections') AS most, current_setting('fsync') AS fsync"
        )
        told = await server.fetch("SELECT boot_val, reset_val FROM pg_settings WHERE name = 'work_mem'")

        assert dict(rows[0]) == {"most": "7", "fsync": "off"}
        server.reload(settings={"work_mem": "9MB"})
        assert told[0]["reset_val"] != (await server.fetch("SHOW work_mem"))[0]["work_mem"] == "9MB"


async def test_a_role_gets_in_by_its_password_and_no_other_way(server):
    await server.create_role("o'app \\ \"x", password="p'w \\ \"@/?")
    good = await asyncpg.connect(server.dsn(user="o'app \\ \"x", password="p'w \\ \"@/?"))
    assert good.get_settings().server_encoding == "UTF8"
    await good.close()

    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(server.dsn(user="o'app \\ \"x", password="wrong"))
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(server.dsn(user="postgres", password="wrong", via_socket=False))
    by_socket = await asyncpg.connect(server.dsn(user="o'app \\ \"x", via_socket=True))
    await by_socket.close()


async def test_a_role_can_be_changed_and_its_password_can_expire(server):
    await server.create_role("app", password="one")
    await server.create_role("app", password="two", valid_until=dt.datetime(2001, 1, 1, tzinfo=dt.UTC))
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(server.dsn(user="app", password="two"))
    await server.create_role("app", password="three")
    await (await asyncpg.connect(server.dsn(user="app", password="three"))).close()

    with pytest.raises(ValueError, match="aware"):
        await server.create_role("app", valid_until=dt.datetime(2001, 1, 1))  # noqa: DTZ001 - the mistake


async def test_a_reload_makes_new_rules_count():
    async with PostgresServer() as server:
        await server.create_role("app")
        server.reload(hba=["host all app 127.0.0.1/32 trust"])
        await (await asyncpg.connect(server.dsn(user="app"))).close()

        server.reload(hba=["host all app 127.0.0.1/32 reject"])

        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await asyncpg.connect(server.dsn(user="app"))


async def test_a_restart_tells_the_clients_keeps_port_data_and_log_and_makes_a_new_process():
    async with PostgresServer() as server:
        await server.execute("CREATE TABLE kept AS SELECT 1 AS x")
        connection = await asyncpg.connect(server.dsn())
        port, pid = server.port, server.pid
        told = []
        connection.add_termination_listener(told.append)
        server.reload(settings={"work_mem": "5MB"})

        await anyio.to_thread.run_sync(server.restart)
        await anyio.to_thread.run_sync(server.restart)

        with pytest.raises(asyncpg.InterfaceError):
            await connection.fetchval("SELECT 1")
        assert told
        assert server.port == port
        assert server.pid != pid
        assert not is_running(pid)
        assert [row["x"] for row in await server.fetch("SELECT x FROM kept")] == [1]
        assert (await server.fetch("SHOW work_mem"))[0][0] == "5MB"
        assert server.log().count("received fast shutdown request") == 2
        place = (server.pid, port, server.socket_directory)
    assert_is_gone(*place)


def test_a_restart_that_fails_says_why_and_leaves_nothing():
    with PostgresServer() as server:
        place = (server.pid, server.port, server.socket_directory)
        Path(server.socket_directory, "data", "postgresql.conf").write_text("no line of a configuration\n")

        with pytest.raises(RuntimeError, match="syntax error"):
            server.restart()

        assert_is_gone(*place, within=DEADLINE)
        with pytest.raises(RuntimeError, match="does not run"):
            server.restart()
