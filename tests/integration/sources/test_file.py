"""The file provider against everything that is done to mounted files."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from provider_cases.file import HangingFileSystem
from support import FakeClock, secret

from asyncpool_creds import CredentialProvider, CredentialRefreshed, ProviderError, TokenManager
from asyncpool_creds.providers.file import File

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "secret"


def write(path, content, *, settled=True):
    """Write a file as if that had been a while ago."""
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if settled:
        settle(path)


def settle(path):
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))


def jwt(**claims):
    payload = base64.urlsafe_b64encode(json.dumps({"name": secret(), **claims}).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJub25lIn0.{payload}.x"


async def failure(provider):
    with pytest.raises(ProviderError) as caught:
        await provider.fetch()
    return caught.value


@pytest.fixture
def between_reads(monkeypatch):
    """Call a function each time the provider is about to read again."""
    calls = []
    sleep = anyio.sleep

    async def intercepted(seconds):
        calls.append(seconds)
        await sleep(0)
        if actions:
            actions.pop(0)()

    actions = []
    monkeypatch.setattr("anyio.sleep", intercepted)
    return calls, actions


# What it holds


def test_it_is_a_credential_provider(path):
    assert isinstance(File(path), CredentialProvider)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n"])
async def test_text_is_the_password_but_for_line_breaks_at_its_end(path, ending):
    write(path, f" {secret()} {ending}")

    credential = await File(path).fetch()

    assert credential.password == f" {secret()} "
    assert credential.user is None
    assert credential.expires_at is None


async def test_a_byte_order_mark_is_no_part_of_it(path):
    write(path, "\ufeff" + secret())

    assert (await File(path).fetch()).password == secret()


async def test_a_json_web_token_says_itself_when_it_ends(path, clock):
    write(path, jwt(exp=clock.now + 600) + "\n")

    assert (await File(path, clock=clock).fetch()).expires_at == clock.after(600)


async def test_the_life_of_a_token_counts_from_when_it_was_first_seen(path, clock):
    # The clock here is five minutes behind the issuer's.
    write(path, jwt(iat=clock.now + 300, exp=clock.now + 900))
    provider = File(path, clock=clock)

    first = await provider.fetch()
    clock.now += 60
    second = await provider.fetch()

    assert first.expires_at == second.expires_at == clock.after(540)


async def test_a_secret_of_rds_is_understood(path):
    write(path, {"username": "ada", "password": secret(), "engine": "postgres", "host": "db", "port": 5432})

    credential = await File(path).fetch()

    assert (credential.user, credential.password) == ("ada", secret())
    assert credential.expires_at is None


async def test_the_members_have_the_names_they_are_given(path, clock):
    write(
        path,
        {"data": {"login": "ada", "secret": {"now": secret()}}, "lease.end": "2027-01-15T08:10:00Z", "password": "old"},
    )
    provider = File(
        path, password_key="data.secret.now", user_key="data.login", expires_at_key="lease.end", clock=clock
    )

    credential = await provider.fetch()

    assert (credential.user, credential.password) == ("ada", secret())
    assert credential.expires_at == datetime(2027, 1, 15, 8, 10, tzinfo=UTC)


async def test_the_earlier_end_counts(path, clock):
    write(path, {"password": jwt(exp=clock.now + 600), "expires_at": clock.now + 300})
    earlier = await File(path, clock=clock).fetch()
    write(path, {"password": jwt(exp=clock.now + 600), "expires_at": clock.now + 900})
    later = await File(path, clock=clock).fetch()

    assert (earlier.expires_at, later.expires_at) == (clock.after(300), clock.after(600))


async def test_a_user_that_is_given_comes_before_that_of_the_file(path):
    write(path, {"username": 7, "password": secret()})

    assert (await File(path, user="bob").fetch()).user == "bob"


async def test_the_user_may_be_in_a_file_of_its_own(path, tmp_path):
    write(path, secret())
    write(tmp_path / "username", "ada\n")

    assert (await File(path, user_path=tmp_path / "username").fetch()).user == "ada"


async def test_a_password_that_begins_with_a_brace_needs_to_be_called_plain(path):
    write(path, "{" + secret())

    error = await failure(File(path))
    credential = await File(path, format="plain").fetch()

    assert "format='plain' takes it as it is" in str(error)
    assert credential.password == "{" + secret()


async def test_json_may_be_demanded(path):
    write(path, "[]")

    error = await failure(File(path, format="json"))

    assert "no complete JSON object" in str(error)
    assert "plain" not in str(error)


async def test_a_manager_is_told_when_to_look_again(path, clock):
    write(path, secret())

    assert (await File(path, clock=clock).fetch()).refresh_at == clock.after(30)
    assert (await File(path, check_every=timedelta(minutes=5), clock=clock).fetch()).refresh_at == clock.after(300)
    assert (await File(path, check_every=None, clock=clock).fetch()).refresh_at is None


async def test_a_manager_looks_as_often_as_it_was_told_even_if_it_finds_nothing_new(path, clock, observer):
    write(path, f"{secret()}-1")
    file = File(path, check_every=5, clock=clock)
    async with TokenManager(file, clock=clock, background=False, on_event=observer) as manager:
        for looks, content in enumerate((1, 1, 1, 2, 2, 3), 1):
            write(path, f"{secret()}-{content}")
            clock.now += 4.9
            await manager.stamp()
            await asyncio.sleep(0)
            assert manager.stats().fetches == looks
            clock.now += 0.2
            await manager.stamp()
            await asyncio.sleep(0)
            assert manager.stats().fetches == looks + 1

            # It shares the look that is under way.
            assert (await manager.refresh()).password == f"{secret()}-{content}"
            assert manager.stats().fetches == looks + 1

    assert [event.rotated for event in observer.of(CredentialRefreshed)] == [False] * 4 + [True, False, True]


# How it changes


async def test_it_is_read_anew_each_time_even_if_its_status_does_not_show_a_change(path):
    write(path, f"{secret()}-1")
    before = path.stat()
    provider = File(path)
    first = await provider.fetch()

    with path.open("r+") as file:
        file.write(f"{secret()}-2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert (first.password, (await provider.fetch()).password) == (f"{secret()}-1", f"{secret()}-2")


async def test_a_file_that_was_touched_or_written_again_is_no_rotation(path):
    write(path, secret())
    async with TokenManager(File(path), on_event=()) as manager:
        settle(path)
        await manager.refresh()
        path.unlink()
        write(path, secret())
        await manager.refresh()

        assert manager.stats().rotations == 0


async def test_a_file_that_is_renamed_over_it_is_a_rotation(path, tmp_path):
    write(path, f"{secret()}-1")
    async with TokenManager(File(path), on_event=()) as manager:
        write(tmp_path / "new", f"{secret()}-2")
        (tmp_path / "new").rename(path)
        await manager.refresh()

        assert manager.stats().rotations == 1
        assert (await manager.get()).password == f"{secret()}-2"


def publish(volume, number):
    """Replace all files of a volume at once, as the kubelet does (kubernetes/pkg/volume/util/atomic_writer.go)."""
    new = volume / f"..2027_{number}"
    new.mkdir()
    write(new / "password", f"{secret()}-{number}")
    write(new / "username", f"user-{number}")
    (volume / "..data_tmp").symlink_to(new.name)
    (volume / "..data_tmp").rename(volume / "..data")
    for name in ("password", "username"):
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    old = volume / f"..2027_{number - 1}"
    if old.exists():
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


async def test_the_volume_of_a_pod_is_followed_through_its_links(tmp_path):
    publish(tmp_path, 1)
    provider = File(tmp_path / "password", user_path=tmp_path / "username")

    first = await provider.fetch()
    publish(tmp_path, 2)
    second = await provider.fetch()

    assert (first.user, first.password) == ("user-1", f"{secret()}-1")
    assert (second.user, second.password) == ("user-2", f"{secret()}-2")


async def test_user_and_password_are_of_the_same_moment(tmp_path, monkeypatch):
    publish(tmp_path, 1)
    opened, open_file = [], os.open

    def swapping(path, *arguments, **keywords):
        if str(path).startswith(str(tmp_path)):
            opened.append(Path(path).name)
            if len(opened) == 2:
                publish(tmp_path, 2)
        return open_file(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", swapping)
    credential = await File(tmp_path / "password", user_path=tmp_path / "username").fetch()

    assert (credential.user, credential.password) == ("user-2", f"{secret()}-2")
    assert opened == ["password", "username", "password"] * 2


async def test_every_reading_of_a_volume_that_changes_all_the_time_is_whole(tmp_path):
    publish(tmp_path, 1)
    provider = File(tmp_path / "password", user_path=tmp_path / "username")
    stop = threading.Event()

    def keep_publishing():
        number = 1
        while not stop.wait(0.001):
            number += 1
            publish(tmp_path, number)

    thread = threading.Thread(target=keep_publishing)
    thread.start()
    seen = []
    try:
        while len(seen) < 50:
            try:
                seen.append(await provider.fetch())
            except ProviderError as error:
                assert error.retryable
    finally:
        stop.set()
        thread.join()

    assert [one.user.removeprefix("user-") for one in seen] == [one.password.rpartition("-")[2] for one in seen]
    assert len({one.user for one in seen}) > 1


# Half-written


@pytest.mark.parametrize(
    "half",
    ["", "\n", '{"password": "abc', '{"password": ""}', "{", "abc\u00e4".encode()[:-1]],
    ids=["empty", "a line break", "half an object", "an empty password", "a brace", "half a letter"],
)
async def test_what_is_half_written_is_read_again(path, between_reads, half):
    _, actions = between_reads
    write(path, half)
    actions.append(lambda: None)
    actions.append(lambda: write(path, {"password": secret()}))

    assert (await File(path).fetch()).password == secret()


@pytest.mark.parametrize(
    ("half", "message"),
    [
        ("", "is empty"),
        ('{"password": "abc', "no complete JSON object"),
        ('{"password": ""}', "empty 'password'"),
        ("abc\u00e4".encode()[:-1], "in the middle of a character"),
    ],
)
async def test_what_stays_half_written_leaves_the_one_before_in_use(path, half, message):
    write(path, secret())
    async with TokenManager(File(path), on_event=()) as manager:
        write(path, half)
        with anyio.fail_after(2):
            with pytest.raises(ProviderError, match=message) as caught:
                await manager.refresh()

        assert caught.value.retryable
        assert (await manager.get()).password == secret()


async def test_an_empty_user_file_is_half_written(path, tmp_path, between_reads):
    _, actions = between_reads
    write(path, secret())
    write(tmp_path / "user", "")
    actions.append(lambda: write(tmp_path / "user", "ada"))

    assert (await File(path, user_path=tmp_path / "user").fetch()).user == "ada"


async def test_text_that_was_written_a_moment_ago_is_read_again(path, between_reads):
    calls, actions = between_reads
    write(path, secret(), settled=False)
    in_the_future = datetime.now(UTC).timestamp() + 3600
    os.utime(path, (in_the_future, in_the_future))
    await File(path).fetch()
    assert calls == []

    write(path, secret(), settled=False)
    actions.append(lambda: write(path, f"{secret()}-whole"))

    assert (await File(path).fetch()).password == f"{secret()}-whole"


async def test_text_that_is_written_all_the_time_is_taken_in_the_end(path, between_reads):
    calls, actions = between_reads
    write(path, secret(), settled=False)
    actions.extend([lambda: write(path, secret(), settled=False)] * 4)

    assert (await File(path).fetch()).password == secret()
    assert len(calls) == 4


async def test_a_file_that_changes_while_it_is_read_is_read_again(path, monkeypatch):
    write(path, f"{secret()}-1")
    fstat, seen = os.fstat, []

    def changing(descriptor):
        found = fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_ino == path.stat().st_ino:
            seen.append(found)
            if len(seen) == 1:
                write(path, f"{secret()}-whole")
        return found

    monkeypatch.setattr(os, "fstat", changing)

    assert (await File(path).fetch()).password == f"{secret()}-whole"
    assert len(seen) == 4


# What goes wrong


async def test_a_missing_file_may_come(path):
    error = await failure(File(path))

    assert str(error) == f"file: {path} does not exist; is it mounted, and has it been written yet?"
    assert error.retryable
    assert isinstance(error.__cause__, FileNotFoundError)


async def test_a_file_that_may_not_be_read_is_no_passing_trouble(path):
    program = """
import asyncio, os, sys
from asyncpool_creds import ProviderError
from asyncpool_creds.providers.file import File
for path in ("/no/such/file", sys.argv[1]):
    try:
        asyncio.run(File(path).fetch())
    except ProviderError as error:
        print(error.retryable, error)
    if os.geteuid() == 0:
        os.seteuid(65534)
os.seteuid(os.getuid())
"""
    write(path, secret())
    path.chmod(0)

    done = await anyio.run_process([sys.executable, "-c", program, path])

    said = done.stdout.decode().splitlines()[1]
    assert said.startswith(f"False file: {path} may not be read by this process (user ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "is a directory"),
        (os.mkfifo, "is a pipe, a socket or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device"),
        (lambda path: path.symlink_to("/etc/passwd/secret"), "leads through something that is no directory"),
        (lambda path: write(path, b"\xff\xfe\x00"), "is not UTF-8 text"),
        (lambda path: write(path, "a\0b"), "holds characters that no server accepts: a NUL"),
        (lambda path: write(path, "x" * 200_000), "more than 131072 bytes"),
        (lambda path: write(path, {"user": "ada"}), "has no member 'password' that is text"),
        (lambda path: write(path, {"password": 7}), "has no member 'password' that is text"),
        (lambda path: write(path, {"password": "x", "username": 7}), "has no member 'username' that is text"),
        (lambda path: write(path, {"password": "x", "username": ""}), "has no member 'username' that is text"),
        (lambda path: write(path, {"password": "x", "expires_at": "soon"}), "has no member 'expires_at' that is sec"),
    ],
)
async def test_what_only_a_person_can_mend_is_no_passing_trouble(path, make, message):
    make(path)

    with anyio.fail_after(2):
        error = await failure(File(path))

    assert message in str(error)
    assert not error.retryable


async def test_other_trouble_of_the_file_system_may_pass(path):
    path.symlink_to(path)

    error = await failure(File(path))

    assert f"{path} cannot be read (Too many levels of symbolic links)" in str(error)
    assert error.retryable


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": 7}, TypeError, "path must be a str or a path, not int"),
        ({"path": b"/secret"}, TypeError, "path must be a str or a path, not bytes"),
        ({"path": ""}, ValueError, "path is empty"),
        ({"path": "a\0b"}, ValueError, "path is empty, or contains a NUL"),
        ({"user_path": ""}, ValueError, "user_path is empty"),
        ({"user": ""}, ValueError, "user is empty"),
        ({"user": "ada", "user_path": "/user"}, ValueError, "either user or user_path"),
        ({"format": "yaml"}, ValueError, "format must be"),
        ({"password_key": None}, TypeError, "password_key must be a str"),
        ({"user_key": 7}, TypeError, "user_key must be a str"),
        ({"expires_at_key": ""}, ValueError, "expires_at_key is empty"),
        ({"check_every": 0}, ValueError, "check_every must be more than zero"),
        ({"check_every": True}, TypeError, "check_every must be a number"),
    ],
)
def test_arguments_are_checked_when_the_provider_is_made(options, error, message):
    with pytest.raises(error, match=message):
        File(**{"path": "/secret", **options})


async def test_a_path_stays_what_it_was_when_the_provider_was_made(path, monkeypatch):
    write(path, secret())
    monkeypatch.chdir(path.parent)
    provider = File(path.name)
    monkeypatch.chdir("/")

    assert (await provider.fetch()).password == secret()
    assert repr(provider) == f"<File {path} format=auto>"


# A file system that does not answer


async def test_a_file_system_that_hangs_does_not_hold_up_a_close(path):
    write(path, secret())
    manager = TokenManager(File(path), on_event=())
    with HangingFileSystem(path) as file_system:
        file_system.hang()
        getting = asyncio.create_task(manager.get())
        await file_system.reached()

        with anyio.fail_after(2):
            await manager.aclose()
            await asyncio.wait((getting,))
        assert getting.exception() is not None


async def test_a_file_system_that_hangs_does_not_use_up_all_threads(path):
    write(path, secret())
    provider = File(path)
    with HangingFileSystem(path) as file_system:
        for _ in range(4):
            file_system.hang()
            fetch = asyncio.create_task(provider.fetch())
            await file_system.reached()
            fetch.cancel()
            await asyncio.wait((fetch,))

        error = await failure(provider)

        assert "4 attempts to read" in str(error)
        assert error.retryable
        file_system.answer()
        with anyio.fail_after(2):
            while True:
                try:
                    assert (await provider.fetch()).password == secret()
                    break
                except ProviderError:
                    await asyncio.sleep(0.005)


async def test_it_works_in_one_event_loop_after_another(path):
    write(path, secret())
    provider = File(path)

    first = await anyio.to_thread.run_sync(asyncio.run, provider.fetch())
    second = await provider.fetch()

    assert first.is_same_secret(second)
