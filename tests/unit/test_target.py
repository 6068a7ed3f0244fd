"""Where the connection arguments lead, and what is on the way."""

from __future__ import annotations

import ssl

import pytest
import trustme

from asyncpool_creds import InsecureTransport
from asyncpool_creds._target import ambient_passwords, is_local, names_user, read_route, require_tls

REMOTE = "postgresql://app@db.example.com/app"
LOCAL = "postgresql://app@127.0.0.1/app"
# The directory that belongs to the server, and the one that belongs to everybody.
OWN, SHARED = "/run/postgresql", "/tmp"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path):
    for name in ("PGHOST", "PGPORT", "PGUSER", "PGSSLMODE", "PGSSLROOTCERT", "PGPASSWORD", "PGPASSFILE", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a root.crt would be


@pytest.fixture
def authority(tmp_path):
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "0:0:0:0:0:0:0:1", "/run/postgresql"])
def test_loopback_and_sockets_are_local(host):
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1%.evil.example", "127.0.0.1%lo", "::1%lo", "::1%.evil.example", "127.0.0.1%25lo"),
        *(
            "::ffff:127.0.0.1",
            "::ffff:7f00:1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "127.1",
            "127.0.0.1.",
            "127.0.0.01",
        ),
        *(
            "localhost.",
            "localhost.evil.example",
            "localhost%lo",
            "evil.localhost",
            "LOCALHOST",
            " localhost",
            "localhost\0",
        ),
        *("", "0.0.0.0", "::", "[::1]", "@abstract", "128.0.0.1", "127.0.0.1@evil.example", "db.example.com"),
    ],
)
def test_what_only_looks_like_loopback_is_another_machine(host):
    assert not is_local(host)


def unchecked(*, verify_mode=ssl.CERT_NONE, check_hostname=False):
    context = ssl.create_default_context()
    context.check_hostname = check_hostname
    context.verify_mode = verify_mode
    return context


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        ({"ssl": False}, "disabled"),
        ({"ssl": "disable"}, "disabled"),
        ({}, "preferred"),
        ({"ssl": "prefer"}, "preferred"),
        ({"ssl": "allow"}, "preferred"),
        ({"ssl": "require"}, "unverified"),
        ({"ssl": True}, "verified"),
        ({"ssl": ssl.create_default_context()}, "verified"),
        ({"ssl": unchecked()}, "unverified"),
        ({"ssl": unchecked(verify_mode=ssl.CERT_OPTIONAL)}, "unverified"),
        ({"ssl": unchecked(verify_mode=ssl.CERT_REQUIRED)}, "authority"),
    ],
    ids=str,
)
def test_arguments_say_how_far_the_server_is_verified(arguments, level):
    assert read_route(REMOTE, arguments).tls == level


@pytest.mark.parametrize(
    ("mode", "level"), [("verify-full", "verified"), ("verify-ca", "authority"), ("require", "authority")]
)
def test_a_dsn_with_an_authority_says_how_far_the_server_is_verified(authority, mode, level):
    assert read_route(f"{REMOTE}?sslmode={mode}&sslrootcert={authority}", {}).tls == level


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ssl": "require"}, "would not be verified"),
        ({}, "would not be verified"),
        ({"ssl": "disable"}, "no TLS"),
        ({"ssl": unchecked()}, "would not be verified"),
        ({"ssl": unchecked(verify_mode=ssl.CERT_REQUIRED)}, "not that it is for this host"),
    ],
    ids=str,
)
def test_a_server_that_has_to_be_verified_and_is_not_gets_nothing(arguments, said):
    with pytest.raises(InsecureTransport, match=f"'db.example.com': require_tls=\"verified\".*{said}.*verify-full"):
        require_tls(read_route(REMOTE, arguments), "verified")


@pytest.mark.parametrize("arguments", [{"ssl": True}, {"ssl": ssl.create_default_context()}])
def test_a_verified_server_passes_and_nothing_is_forced(arguments):
    assert require_tls(read_route(REMOTE, arguments), "verified") is False


@pytest.mark.parametrize("dsn", [LOCAL, "postgresql://app@[::1]/app", "postgresql://app@/app?host=/run/postgresql"])
@pytest.mark.parametrize("arguments", [{}, {"ssl": "disable"}])
def test_this_machine_need_not_be_verified(dsn, arguments):
    assert require_tls(read_route(dsn, arguments), "verified") is False


def test_one_remote_host_among_local_ones_has_to_be_verified():
    with pytest.raises(InsecureTransport, match=r"db\.example\.com"):
        require_tls(read_route("postgresql://app@127.0.0.1:1,db.example.com:2/app", {}), "verified")


@pytest.mark.parametrize(
    ("arguments", "level"),
    [({"ssl": True}, "verified"), ({"ssl": "require"}, "unverified"), ({}, "preferred"), ({"ssl": False}, "disabled")],
)
def test_a_route_knows_what_is_on_the_way(arguments, level):
    assert read_route(REMOTE, arguments).tls == level


# Sockets


@pytest.mark.parametrize("dsn", [None, "postgresql:///app", "postgresql://app@/app", "postgresql://app@/app?host="])
def test_no_socket_in_a_directory_of_everybodys_is_tried_unless_it_is_named(dsn):
    route = read_route(dsn, {})

    assert [target.host for target in route.targets] == [OWN, "/var/run/postgresql", "localhost"]
    assert SHARED in route.left_out


@pytest.mark.parametrize(
    ("dsn", "arguments", "variables"),
    [
        ("postgresql://app@/app?host=/tmp", {}, {}),
        ("postgresql://app@/app?host=/tmp,localhost", {}, {}),
        ("postgresql://app@%2Ftmp/app", {}, {}),
        (None, {"host": "/tmp"}, {}),
        (None, {"host": ["/tmp", "localhost"]}, {}),
        (None, {}, {"PGHOST": "/tmp"}),
    ],
)
def test_a_socket_in_a_directory_of_everybodys_is_used_if_it_is_named(monkeypatch, dsn, arguments, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    route = read_route(dsn, arguments)

    assert route.targets[0].host == SHARED
    assert route.left_out == ()


# What else has a say


def test_passwords_that_lie_around_are_found(monkeypatch, tmp_path):
    def found(dsn=REMOTE, **arguments):
        return ambient_passwords(dsn, arguments, besides="token")

    (tmp_path / "pgpass").touch()
    there, gone = str(tmp_path / "pgpass"), str(tmp_path / "gone")

    assert found() == []
    assert found(passfile=there) == ["passfile"]
    assert found(passfile=gone) == []
    assert found(f"{REMOTE}?passfile={there}") == ["passfile"]
    monkeypatch.setenv("PGPASSFILE", gone)
    assert found() == []
    monkeypatch.setenv("PGPASSFILE", there)
    assert found() == ["PGPASSFILE"]
    monkeypatch.setenv("PGPASSWORD", "x")
    assert found() == ["PGPASSWORD", "PGPASSFILE"]
    monkeypatch.setenv("PGPASSWORD", "token\n")  # where the source has it from
    assert found() == ["PGPASSFILE"]


def test_a_user_is_stated_or_that_of_the_operating_system(monkeypatch):
    assert names_user(REMOTE, {})
    assert names_user("postgresql://db/app?user=app", {})
    assert names_user(None, {"user": "app"})
    assert not names_user("postgresql://db/app", {})
    monkeypatch.setenv("PGUSER", "app")
    assert names_user("postgresql://db/app", {})
