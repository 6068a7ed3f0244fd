"""The guard that keeps credentials from leaving for another host in the clear."""

import asyncio
import inspect
import socket
import ssl

import asyncpg
import pytest
import trustme
from support import secret

from asyncpool_creds import Credential, InsecureTransport, _target, _tls, connect, create_pool

pytestmark = pytest.mark.anyio

# A spelling of 127.0.0.1 that every resolver knows (inet_aton(3)) and that is no IP address to the guard:
# a remote host, as far as it can tell.
REMOTE = "127.1"
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


class Listener:
    """A server without TLS that records what it is sent."""

    def __init__(self):
        self.connections = 0
        self.received = b""

    async def serve(self, reader, writer):
        self.connections += 1
        while chunk := await reader.read(4096):
            self.received += chunk
            if chunk == SSL_REQUEST:
                writer.write(b"N")
        writer.close()


@pytest.fixture
async def listener():
    listener = Listener()
    server = await asyncio.start_server(listener.serve, "127.0.0.1", 0)
    listener.port = server.sockets[0].getsockname()[1]
    yield listener
    server.close()
    await server.wait_closed()


def provide():
    return Credential(secret("guarded"))


def opening(listener, query="", host=REMOTE, **keywords):
    return create_pool(
        f"postgresql://app@{host}:{listener.port}/postgres{query}", credentials=provide, min_size=1, **keywords
    )


@pytest.mark.parametrize("keywords", [{"ssl": False}, {"ssl": "disable"}])
async def test_a_remote_host_without_tls_is_an_error_before_a_connection_is_made(listener, keywords):
    with pytest.raises(InsecureTransport, match=r"refusing to send a credential to '127\.1' without TLS"):
        opening(listener, **keywords)

    assert (listener.connections, listener.received) == (0, b"")


async def test_tls_switched_off_in_the_dsn_is_an_error_before_a_connection_is_made(listener):
    with pytest.raises(InsecureTransport):
        opening(listener, "?sslmode=disable")

    assert (listener.connections, listener.received) == (0, b"")


async def test_a_single_connection_is_guarded_too(listener):
    with pytest.raises(InsecureTransport):
        await connect(f"postgresql://app@{REMOTE}:{listener.port}/postgres?sslmode=disable", credentials=provide)

    assert (listener.connections, listener.received) == (0, b"")


@pytest.mark.parametrize("query", ["", "?sslmode=prefer", "?sslmode=allow"])
async def test_a_server_without_tls_is_asked_for_it_and_sent_nothing_else(listener, query):
    with pytest.raises(InsecureTransport, match="the server offers no TLS") as refusal:
        await opening(listener, query)

    assert (listener.connections, listener.received) == (1, SSL_REQUEST)
    assert isinstance(refusal.value.__cause__, ConnectionError)


async def test_a_server_without_tls_at_the_end_of_a_single_connect_is_sent_nothing_either(listener):
    with pytest.raises(InsecureTransport, match="the server offers no TLS"):
        await connect(f"postgresql://app@{REMOTE}:{listener.port}/postgres", credentials=provide)

    assert listener.received == SSL_REQUEST


async def test_require_stays_asyncpgs_own_error(listener):
    with pytest.raises(ConnectionError):
        await opening(listener, "?sslmode=require")

    assert listener.received == SSL_REQUEST


async def test_one_remote_host_among_local_ones_is_enough(listener):
    dsn = f"postgresql://app@127.0.0.1:{listener.port},{REMOTE}:{listener.port}/postgres?sslmode=disable"

    with pytest.raises(InsecureTransport):
        create_pool(dsn, credentials=provide)

    assert listener.connections == 0


async def test_connection_arguments_that_are_set_later_are_guarded(cloud):
    async with cloud.pool(min_size=0) as pool:
        pool.set_connect_args(f"postgresql://app@{REMOTE}:{cloud.door.port}/postgres?sslmode=disable")
        with pytest.raises(InsecureTransport):
            await pool.fetchval("SELECT 1")

        assert (cloud.door.attempts, cloud.presented) == (0, [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_loopback_needs_no_tls(cloud, host):
    dsn = f"postgresql://app@{host}:{cloud.door.port}/postgres?sslmode=disable"
    async with cloud.pool(dsn=dsn, max_size=1) as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def test_the_ipv6_loopback_needs_no_tls():
    create_pool("postgresql://app@[::1]:1/postgres?sslmode=disable", credentials=provide)


async def test_a_unix_socket_needs_no_tls(cloud, server):
    dsn = f"postgresql://app@/postgres?host={server.socket_directory}&port={server.port}"
    async with cloud.pool(dsn=dsn, max_size=1) as pool:
        assert await pool.fetchval("SELECT current_user") == "app"


async def test_without_the_guard_a_credential_leaves_as_it_is_told(cloud):
    dsn = f"postgresql://app@{REMOTE}:{cloud.door.port}/postgres?sslmode=disable"
    async with cloud.pool(dsn=dsn, max_size=1, require_tls=False) as pool:
        assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", REMOTE])
async def test_a_guard_that_holds_everywhere_knows_no_loopback(listener, host):
    with pytest.raises(InsecureTransport):
        opening(listener, "?sslmode=disable", host=host, require_tls=True)
    with pytest.raises(InsecureTransport, match="offers no TLS"):
        await opening(listener, host=host, require_tls=True)

    assert listener.received == SSL_REQUEST


async def test_a_guard_that_holds_everywhere_knows_no_unix_socket(server):
    dsn = f"postgresql://app@/postgres?host={server.socket_directory}&port={server.port}"

    with pytest.raises(InsecureTransport):
        create_pool(dsn, credentials=provide, require_tls=True)


async def test_prefer_means_require_where_the_guard_holds(tls_cloud):
    tls_cloud.door.require_tls = True
    tls_cloud.refused.add(1)
    dsn = f"postgresql://app@{REMOTE}:{tls_cloud.door.port}/postgres"

    async with tls_cloud.pool(dsn=dsn, max_size=1) as pool:
        assert await pool.fetchval("SELECT 1") == 1

    # A refused login over "prefer" would have been tried once more without TLS.
    assert tls_cloud.presented == [1, 2]
    assert tls_cloud.door.attempts == 2


@pytest.mark.parametrize("require_tls", [None, True, False])
async def test_a_verified_server_passes_the_guard(tls_cloud, require_tls):
    tls_cloud.door.require_tls = True
    context = tls_cloud.door.client_context()
    dsn = f"postgresql://app@localhost:{tls_cloud.door.port}/postgres"

    async with tls_cloud.pool(dsn=dsn, max_size=1, ssl=context, require_tls=require_tls) as pool:
        assert await pool.fetchval("SELECT 1") == 1
    async with tls_cloud.pool(
        dsn=tls_cloud.door.dsn(sslmode="verify-full"), max_size=1, require_tls=require_tls
    ) as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def test_the_guard_is_for_credentials_only(listener):
    pool = create_pool(f"postgresql://app@{REMOTE}:{listener.port}/postgres", ssl=False, require_tls=True, min_size=0)

    async with pool:
        assert pool.manager is None


async def test_a_refused_port_is_no_matter_of_the_guard():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await create_pool(
                f"postgresql://app@{REMOTE}:{bound.getsockname()[1]}/postgres", credentials=provide, min_size=1
            )


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


UNVERIFIED = f"{REMOTE!r}: TLS, but the server is not verified: use sslmode=verify-full"


@pytest.mark.parametrize("query", ["?sslmode=require", ""])
async def test_a_remote_server_that_is_not_verified_is_told_once(tls_cloud, caplog, query):
    dsn = f"postgresql://app@{REMOTE}:{tls_cloud.door.port}/postgres{query}"
    async with tls_cloud.pool(dsn=dsn) as pool:
        await pool.expire_connections()
        assert await pool.fetchval("SELECT 1") == 1

    (told,) = warnings_in(caplog)
    assert told.startswith(UNVERIFIED)


async def test_many_single_connections_to_a_server_that_is_not_verified_are_told_once(tls_cloud, caplog):
    dsn = f"postgresql://app@0x7f000001:{tls_cloud.door.port}/postgres?sslmode=require"
    for _ in range(2):
        connection = await connect(dsn, credentials=tls_cloud.manager())
        await connection.close()

    (told,) = warnings_in(caplog)
    assert "'0x7f000001': TLS, but the server is not verified" in told


@pytest.mark.parametrize(
    ("host", "keywords"),
    [
        (REMOTE, {"ssl": True}),
        (REMOTE, {"ssl": ssl.create_default_context()}),
        (REMOTE, {"ssl": "require", "require_tls": False}),
        ("127.0.0.1", {"ssl": "require"}),
        ("localhost", {}),
    ],
)
async def test_a_server_that_is_verified_trusted_or_local_is_not_worth_a_word(listener, caplog, host, keywords):
    opening(listener, host=host, **keywords)

    assert warnings_in(caplog) == []


@pytest.mark.parametrize("query", ["", "?sslmode=prefer", "?sslmode=require", "?sslmode=disable"])
async def test_a_server_that_has_to_be_verified_gets_nothing_before_it_is(listener, query):
    with pytest.raises(InsecureTransport, match='require_tls="verified"'):
        opening(listener, query, require_tls="verified")
    with pytest.raises(InsecureTransport, match='require_tls="verified"'):
        await connect(
            f"postgresql://app@{REMOTE}:{listener.port}/postgres{query}", credentials=provide, require_tls="verified"
        )

    assert (listener.connections, listener.received) == (0, b"")


async def test_a_zone_does_not_make_loopback_of_another_machine(listener):
    with pytest.raises(InsecureTransport, match=r"'127\.0\.0\.1%\.evil'"):
        create_pool("postgresql://app@127.0.0.1%25.evil/postgres?sslmode=disable", credentials=provide)
    with pytest.raises(InsecureTransport, match=r"'127\.0\.0\.1%\.evil'"):
        create_pool(host="127.0.0.1%.evil", port=listener.port, user="app", ssl=False, credentials=provide)


async def test_no_credential_goes_to_a_socket_that_anybody_could_have_put_there(monkeypatch, listener):
    tried = []

    async def record(_dsn, **keywords):
        tried.append((keywords["host"], keywords["port"]))
        raise ConnectionRefusedError

    monkeypatch.delenv("PGHOST", raising=False)
    monkeypatch.setattr("asyncpg.connect", record)

    with pytest.raises(ConnectionRefusedError) as refused:
        await connect(port=listener.port, user="app", credentials=provide)

    assert tried == [(["/run/postgresql", "/var/run/postgresql", "localhost"], [listener.port] * 3)]
    assert "no socket in /tmp or /private/tmp was tried" in refused.value.__notes__[-1]


async def test_without_a_host_the_local_server_is_found_as_ever(cloud, monkeypatch):
    monkeypatch.delenv("PGHOST", raising=False)

    connection = await connect(
        port=cloud.door.port, user="app", database="postgres", credentials=cloud.manager(), timeout=10
    )

    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


WITH_SERVICES = "service" in inspect.signature(asyncpg.connect).parameters


@pytest.mark.parametrize("where", ["environment", *(["service"] if WITH_SERVICES else [])])
@pytest.mark.parametrize("moves", ["before the connect", "during the fetch"])
async def test_a_server_that_moves_away_is_guarded_where_it_goes(listener, cloud, monkeypatch, tmp_path, where, moves):
    def point(host, port):
        if where == "environment":
            monkeypatch.setenv("PGHOST", host)
            monkeypatch.setenv("PGPORT", str(port))
        else:
            (tmp_path / "service").write_text(f"[db]\nhost={host}\nport={port}\n")
            monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "service"))

    async def fetch():
        if moves == "during the fetch":
            point(REMOTE, listener.port)
        return await cloud.provider.fetch()

    point("127.0.0.1", cloud.door.port)
    dsn = "postgresql://?service=db" if where == "service" else None
    manager = cloud.manager(fetch)
    async with cloud.pool(
        dsn=dsn, credentials=manager, user="app", database="postgres", ssl=False, min_size=0, max_size=1
    ) as pool:
        if moves == "during the fetch":
            assert await pool.fetchval("SELECT 1") == 1
            await pool.expire_connections()
        point(REMOTE, listener.port)
        with pytest.raises(InsecureTransport):
            await pool.fetchval("SELECT 1")

    assert (listener.connections, listener.received) == (0, b"")


if WITH_SERVICES:

    async def test_a_service_that_gives_up_tls_during_the_fetch_is_not_followed(listener, monkeypatch, tmp_path):
        def write(mode):
            file.write_text(f"[db]\nhost={REMOTE}\nport={listener.port}\nuser=app\nsslmode={mode}\n")

        async def fetch():
            write("disable")
            return provide()

        file = tmp_path / "service"
        monkeypatch.setenv("PGSERVICEFILE", str(file))
        write("require")

        with pytest.raises(ConnectionError):
            await connect("postgresql://?service=db", credentials=fetch)

        assert listener.received == SSL_REQUEST


async def test_all_connections_of_a_pool_share_a_context(tls_cloud, monkeypatch):
    made = []
    read = _target.read_tls_context
    monkeypatch.setattr(_tls, "read_tls_context", lambda *arguments: made.append(read(*arguments)) or made[-1])

    async with tls_cloud.pool(dsn=tls_cloud.door.dsn(sslmode="verify-full"), min_size=3, max_size=3) as pool:
        await pool.expire_connections()
        assert await pool.fetchval("SELECT 1") == 1

    assert len(made) == 1


def test_a_context_is_made_anew_when_its_file_changes(tmp_path):
    def issued_by():
        return [dict(name[0] for name in one["issuer"])["organizationalUnitName"] for one in context().get_ca_certs()]

    def context():
        return contexts.of(f"postgresql://app@{REMOTE}:1/postgres?sslmode=verify-full&sslrootcert={authority}", {})

    contexts, authority = _tls.TlsContext(), tmp_path / "ca.pem"
    for name in ("one", "another"):
        trustme.CA(organization_unit_name=name).cert_pem.write_to_path(str(authority))
        assert issued_by() == [name]
        assert context() is context()


@pytest.mark.parametrize(
    ("query", "arguments", "variables"),
    [
        ("", {}, {}),
        ("?sslmode=prefer", {}, {}),
        ("?sslmode=disable", {}, {}),
        ("?service=some", {"ssl": "require"}, {}),
        ("", {"ssl": "require", "service": "some"}, {}),
        ("", {"ssl": "require"}, {"PGSERVICE": "some"}),
        ("", {"ssl": ssl.create_default_context()}, {}),
    ],
)
def test_where_a_context_is_not_ours_to_make_asyncpg_sees_for_itself(monkeypatch, query, arguments, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert _tls.TlsContext().of(f"postgresql://app@{REMOTE}:1/postgres{query}", arguments) is None


def test_a_context_of_the_systems_authorities_is_made_anew_when_there_are_others(monkeypatch, tmp_path):
    def names():
        certificates = contexts.of(f"postgresql://app@{REMOTE}:1/postgres", {"ssl": True}).get_ca_certs()
        return {dict(name[0] for name in one["issuer"]).get("organizationalUnitName") for one in certificates}

    contexts = _tls.TlsContext()
    for name in ("one", "another"):
        trustme.CA(organization_unit_name=name).cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "one.pem"))
    assert names() == {"one"}

    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "another.pem"))
    assert names() == {"another"}

    (tmp_path / "one.pem").replace(tmp_path / "another.pem")
    assert names() == {"one"}


@pytest.mark.parametrize("change", [{"PGSSLMODE": "verify-full"}, {"PGSSLMINPROTOCOLVERSION": "TLSv1.3"}])
def test_a_context_is_made_anew_when_the_environment_says_something_else(monkeypatch, tmp_path, change):
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("PGSSLROOTCERT", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("PGSSLMODE", "verify-ca")
    contexts, dsn = _tls.TlsContext(), f"postgresql://app@{REMOTE}:1/postgres"

    before = contexts.of(dsn, {})
    assert contexts.of(dsn, {}) is before
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    after = contexts.of(dsn, {})

    assert (after.check_hostname, after.minimum_version) != (before.check_hostname, before.minimum_version)
