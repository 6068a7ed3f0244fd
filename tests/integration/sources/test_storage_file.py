"""Tokens in files: who may read them, what is refused, what a wait costs."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import time
from pathlib import Path

import anyio
import pytest
from support import assert_no_secret, secret

from asyncpool_creds.storage import StoredTokens
from asyncpool_creds.storage.file import FileStorage

pytestmark = pytest.mark.anyio

TOKENS = StoredTokens(refresh_token=secret("refresh"))
OTHERS = StoredTokens(refresh_token=secret("another"))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "deep" / "tokens"


@pytest.fixture
def storage(directory):
    return FileStorage(directory)


def files(directory, pattern="*"):
    return sorted(directory.glob(pattern))


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def test_nothing_is_made_before_it_is_used(directory):
    FileStorage(directory)

    assert not directory.parent.exists()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
async def test_nobody_else_can_read_what_is_made(storage, directory, mask):
    before = os.umask(mask)
    try:
        async with storage.lock("key"):
            await storage.save("key", TOKENS)
    finally:
        os.umask(before)

    assert mode(directory) == 0o700
    assert len(files(directory)) == 3
    assert {mode(path) for path in files(directory)} == {0o600}


async def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = FileStorage("tokens")
    monkeypatch.chdir("/")

    await storage.save("key", TOKENS)

    assert len(files(tmp_path / "tokens", "*.tokens")) == 1


def on_everything(storage):
    return {
        "load": lambda: storage.load("key"),
        "save": lambda: storage.save("key", TOKENS),
        "delete": lambda: storage.delete("key"),
        "keys": storage.keys,
        "lock": lambda: take(storage),
    }


async def take(storage):
    async with storage.lock("key"):
        pass


@pytest.mark.parametrize("what", ["load", "save", "delete", "keys", "lock"])
async def test_a_directory_that_is_open_to_others_is_refused(storage, directory, what):
    directory.mkdir(parents=True)
    directory.chmod(0o750)

    with pytest.raises(PermissionError, match=r"is open to others \(mode 750\); make it private: chmod 700") as caught:
        await on_everything(storage)[what]()
    assert caught.value.filename == str(directory)


@pytest.mark.parametrize("what", ["load", "save", "delete", "keys", "lock"])
async def test_a_directory_of_somebody_else_is_refused(storage, directory, what, monkeypatch):
    directory.mkdir(parents=True, mode=0o700)
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)

    with pytest.raises(PermissionError, match=f"belongs to user {us}; give one of your own"):
        await on_everything(storage)[what]()


@pytest.mark.parametrize("what", ["load", "save", "delete", "keys", "lock"])
async def test_a_link_to_a_directory_is_refused(storage, directory, tmp_path, what):
    tmp_path.joinpath("elsewhere").mkdir(mode=0o700)
    directory.parent.mkdir()
    directory.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="the directory for tokens is a symbolic link"):
        await on_everything(storage)[what]()
    assert files(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("what", ["load", "save", "delete", "keys", "lock"])
async def test_what_is_no_directory_is_refused(storage, directory, what):
    directory.parent.mkdir()
    directory.write_text("")

    with pytest.raises(NotADirectoryError, match="the directory for tokens is something else"):
        await on_everything(storage)[what]()


async def test_a_link_is_neither_read_nor_written_through(storage, directory, tmp_path):
    await storage.save("key", TOKENS)
    (path,) = files(directory, "*.tokens")
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()

    with pytest.raises(OSError, match="is a symbolic link; delete it") as caught:
        await storage.load("key")
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="is a symbolic link"):
        await storage.keys()
    await storage.save("key", OTHERS)

    assert await storage.load("key") == OTHERS
    assert elsewhere.read_bytes() == before


async def test_a_lock_is_not_taken_through_a_link(storage, directory, tmp_path):
    await take(storage)
    (path,) = files(directory, "*.lock")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError) as caught:
        await take(storage)
    assert caught.value.errno == errno.ELOOP
    assert not (tmp_path / "elsewhere").exists()


async def test_a_pipe_is_refused_and_not_waited_for(storage, directory):
    await storage.save("key", TOKENS)
    (path,) = files(directory, "*.tokens")
    path.unlink()
    os.mkfifo(path)

    with anyio.fail_after(5), pytest.raises(OSError, match="is no regular file; delete it"):
        await storage.load("key")


async def test_what_the_system_says_of_anything_else_is_told(storage, directory, monkeypatch):
    await storage.save("key", TOKENS)
    (path,) = files(directory, "*.tokens")
    path.unlink()
    monkeypatch.chdir(directory)  # its name is too long for a socket otherwise
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)

        with pytest.raises(OSError, match=path.name) as caught:
            await storage.load("key")
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-30],
        lambda content: content + content,
        lambda content: content.replace(b"key", b"yek", 1),
        lambda content: content.replace(b'"key": "key"', b'"key": 5'),
        lambda content: content.replace(b'"format": 1', b'"format": -2'),
        lambda content: b"\xff\0" + content,
        lambda content: b"[" * 100_000 + b"\n{}",
        lambda content: b"[]\n[]\n",
    ],
)
async def test_a_damaged_file_is_named_and_not_shown(storage, directory, damage):
    await storage.save("key", TOKENS)
    (path,) = files(directory, "*.tokens")
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(ValueError, match=r"damaged: .*; delete it, and log in again") as caught:
        await storage.load("key")
    assert str(path) in str(caught.value)
    assert_no_secret(caught.value)
    await storage.save("key", OTHERS)
    assert await storage.load("key") == OTHERS


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b'"format": 1', b'"format": 2'),
        lambda content: b'{"format": 3}\n' + content,
        lambda content: content.replace(b'"key": "key"', b'"format": 2, "key": "key"').replace(
            b'"format": 1', b'"f": 1'
        ),
    ],
)
async def test_a_file_of_a_later_format_is_neither_read_nor_overwritten(storage, directory, change):
    await storage.save("key", TOKENS)
    (path,) = files(directory, "*.tokens")
    path.write_bytes(content := change(path.read_bytes()))

    for question in (storage.load("key"), storage.save("key", OTHERS), storage.keys()):
        with pytest.raises(ValueError, match="was written by a later version of asyncpool_creds") as caught:
            await question
        assert str(path) in str(caught.value)
        assert_no_secret(caught.value)

    assert path.read_bytes() == content
    await storage.delete("key")
    await storage.save("key", OTHERS)


async def test_a_file_over_a_mebibyte_is_neither_read_nor_overwritten(storage, directory):
    await storage.save("key", TOKENS)
    (path,) = files(directory, "*.tokens")
    with path.open("ab") as file:
        file.truncate(2**40)  # a sparse file: reading all of it would take all memory

    for question in (storage.load("key"), storage.save("key", OTHERS), storage.keys()):
        with pytest.raises(OSError, match="is larger than 1 MiB; delete it") as caught:
            await question
        assert caught.value.filename == str(path)

    assert path.stat().st_size == 2**40


async def test_tokens_over_a_mebibyte_are_not_saved(storage):
    await storage.save("key", TOKENS)

    with pytest.raises(OSError, match="these tokens are larger than 1 MiB") as caught:
        await storage.save("key", StoredTokens(refresh_token=secret("x" * 1_048_576)))

    assert_no_secret(caught.value)
    assert await storage.load("key") == TOKENS


async def test_as_much_as_can_be_saved_can_be_loaded(storage):
    frame = len('{"key": "key"}\n\n') + len(StoredTokens(refresh_token="x").to_json()) - 1
    for length, fits in ((1_048_576 - frame, True), (1_048_576 - frame + 1, False)):
        tokens = StoredTokens(refresh_token="x" * length)
        if fits:
            await storage.save("key", tokens)
            assert await storage.load("key") == tokens
        else:
            with pytest.raises(OSError, match="larger than 1 MiB"):
                await storage.save("key", tokens)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
async def test_what_the_directory_lies_in_is_made_for_the_user_alone(tmp_path, mask):
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    before = os.umask(mask)
    try:
        await FileStorage(there / "a" / "b" / "tokens").save("key", TOKENS)
    finally:
        os.umask(before)

    made = [there / "a", there / "a" / "b", there / "a" / "b" / "tokens"]
    assert [mode(path) for path in made] == [0o700] * 3
    assert mode(there) == 0o755


async def test_a_mark_is_a_private_file_that_outlives_the_tokens(storage, directory):
    await storage.save("key", TOKENS)
    await storage.save_mark("key", "a:b")

    (path,) = files(directory, "*.spent")
    assert mode(path) == 0o600
    for tokens in files(directory, "*.tokens"):
        tokens.unlink()
    assert (await storage.load_mark("key")).strip() == "a:b"


async def test_the_file_of_another_key_is_not_taken_for_ones_own(storage, directory):
    await storage.save("one", TOKENS)
    (path,) = files(directory, "*.tokens")
    await storage.save("two", OTHERS)
    (other,) = set(files(directory, "*.tokens")) - {path}
    other.replace(path)

    with pytest.raises(ValueError, match="damaged"):
        await storage.load("one")


async def test_what_a_dead_writer_has_left_is_gone_with_the_next_save(storage, directory):
    await storage.save("key", TOKENS)
    directory.joinpath("tmpabc.tmp").write_text(secret("half"))

    await storage.save("another", TOKENS)

    assert files(directory, "*.tmp") == []
    assert await storage.keys() == ["another", "key"]


async def test_what_cannot_be_written_changes_nothing(storage, directory, monkeypatch):
    await storage.save("key", TOKENS)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        await storage.save("key", OTHERS)
    monkeypatch.undo()

    assert await storage.load("key") == TOKENS
    assert files(directory, "*.tmp") == []


async def test_what_is_saved_is_on_the_disk_before_it_has_its_name_and_then_the_name(storage, directory, monkeypatch):
    await storage.save("key", TOKENS)
    steps = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor):
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def rename(path, target):
        steps.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    await storage.save("key", OTHERS)

    assert steps == ["file", "name", "directory"]


async def test_two_storages_of_one_process_exclude_each_other(directory):
    one, other = FileStorage(directory), FileStorage(directory)
    order = []

    async def work(storage, name):
        async with storage.lock("key"):
            order.append(name)
            await asyncio.sleep(0.002)
            order.append(name)

    async with asyncio.timeout(10):
        await asyncio.gather(*(work(storage, number) for number, storage in enumerate([one, other] * 10)))

    assert len(order) == 40
    assert order[::2] == order[1::2]


async def test_somebody_who_waits_costs_next_to_nothing(directory):
    holder, waiters = FileStorage(directory), FileStorage(directory)
    entered = []

    async def wait():
        async with waiters.lock("key"):
            entered.append(True)

    async with holder.lock("key"):
        waiting = [asyncio.create_task(wait()) for _ in range(50)]
        await asyncio.sleep(0.2)  # the first attempts are close together
        cpu, start = time.process_time(), time.perf_counter()
        await asyncio.sleep(1)
        share = (time.process_time() - cpu) / (time.perf_counter() - start)
    await asyncio.gather(*waiting)

    assert len(entered) == 50
    assert share < 0.5  # of one core, for all of them together, on a slow and busy machine


@pytest.mark.parametrize("directory", [5, None, b"x"])
def test_what_is_no_path_is_refused(directory):
    with pytest.raises(TypeError, match="directory must be a path, not"):
        FileStorage(directory)
