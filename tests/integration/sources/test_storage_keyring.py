"""Tokens in the keyring: what a keyring can do wrong."""

from __future__ import annotations

import stat
import sys
import threading

import anyio
import keyring
import pytest
from filelock import FileLock
from keyring.backend import KeyringBackend
from keyring.backends.fail import Keyring as NoKeyring
from keyring.backends.null import Keyring as KeyringOfNothing
from keyring.errors import KeyringLocked, PasswordSetError
from keyrings.alt.file import PlaintextKeyring
from support import assert_no_secret, secret

from asyncpool_creds.storage import StoredTokens
from asyncpool_creds.storage.keyring import KeyringStorage

pytestmark = pytest.mark.anyio

TOKENS = StoredTokens(refresh_token=secret("refresh"))
LONG = StoredTokens(refresh_token=secret("x" * 3000))


class Memory(KeyringBackend):
    """A keyring that tells what it is asked for."""

    priority = 1

    def __init__(self, longest=None):
        super().__init__()
        self.entries = {}
        self.threads = set()
        self.inside = self.most = 0
        self.error = None
        self.longest = longest

    def get_password(self, service, username):
        self.enter()
        return self.entries.get((service, username))

    def set_password(self, service, username, password):
        self.enter()
        if self.longest is not None and len(password.encode("utf-16-le")) > self.longest:
            raise OverflowError("The stub received bad data")  # as Windows says it
        self.entries[service, username] = password

    def delete_password(self, service, username):
        self.enter()
        del self.entries[service, username]

    def enter(self):
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error


@pytest.fixture
def backend():
    return Memory()


@pytest.fixture
def storage(backend, tmp_path):
    return KeyringStorage(backend=backend, lock_directory=tmp_path / "locks")


async def test_the_keyring_is_never_asked_on_the_event_loop(storage, backend):
    await storage.save("key", TOKENS)
    await storage.load("key")
    await storage.keys()
    await storage.delete("key")

    assert threading.get_ident() not in backend.threads


async def test_entries_are_found_under_the_service(backend, tmp_path):
    storage = KeyringStorage("our application", backend=backend, lock_directory=tmp_path)
    other = KeyringStorage("another", backend=backend, lock_directory=tmp_path)

    await storage.save("globus/transfer", TOKENS)

    assert {service for service, _ in backend.entries} == {"our application"}
    assert any("globus/transfer" in name for _, name in backend.entries)
    assert await other.keys() == []
    assert await other.load("globus/transfer") is None


async def test_capital_letters_count_even_in_a_keyring_that_does_not_tell_them(backend, tmp_path):
    class Careless(Memory):
        def get_password(self, service, username):
            return super().get_password(service, username.lower())

        def set_password(self, service, username, password):
            super().set_password(service, username.lower(), password)

    storage = KeyringStorage(backend=Careless(), lock_directory=tmp_path)
    await storage.save("Key", TOKENS)
    await storage.save("key", LONG)

    assert await storage.load("Key") == TOKENS
    assert await storage.load("key") == LONG
    assert await storage.keys() == ["Key", "key"]


async def test_nothing_is_left_of_what_was_deleted_but_an_empty_list(tmp_path):
    backend = Memory()
    storage = KeyringStorage(backend=backend, lock_directory=tmp_path, entry_limit=64)

    await storage.save("key", LONG)
    assert len(backend.entries) > 40
    await storage.save("key", TOKENS)
    assert len(backend.entries) < 10
    await storage.delete("key")

    assert list(backend.entries.values()) == ["[]"]


async def test_what_the_credential_manager_of_windows_cannot_take_is_split_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    backend = Memory(longest=2560)
    storage = KeyringStorage(backend=backend, lock_directory=tmp_path)

    await storage.save("key", LONG)

    assert await storage.load("key") == LONG


async def test_elsewhere_tokens_are_one_entry(storage, backend):
    await storage.save("key", LONG)

    assert len(backend.entries) == 2  # with the list


async def test_a_limit_that_was_lifted_or_set_later_loses_nothing(backend, tmp_path):
    split = KeyringStorage(backend=backend, lock_directory=tmp_path, entry_limit=100)
    whole = KeyringStorage(backend=backend, lock_directory=tmp_path)

    await split.save("key", LONG)
    assert await whole.load("key") == LONG
    await whole.save("key", LONG)

    assert len(backend.entries) == 2
    assert await split.load("key") == LONG


async def test_a_missing_part_is_named_and_nothing_is_shown(backend, tmp_path):
    storage = KeyringStorage(backend=backend, lock_directory=tmp_path, entry_limit=64)
    await storage.save("key", LONG)
    part = next(name for name in backend.entries if name[1].startswith("a7 of tokens key"))
    del backend.entries[part]

    with pytest.raises(
        ValueError, match=r"the entry 'tokens key [0-9a-f]+' of 'asyncpool_creds' .* is damaged"
    ) as caught:
        await storage.load("key")
    assert_no_secret(caught.value)
    await storage.save("key", TOKENS)
    assert await storage.load("key") == TOKENS


@pytest.mark.parametrize("text", ["", "{", "{}", "split", "split a", "split a 0", "split c 1"])
async def test_a_damaged_entry_is_an_error(storage, backend, text):
    await storage.save("key", TOKENS)
    name = next(name for name in backend.entries if name[1].startswith("tokens"))
    backend.entries[name] = text

    with pytest.raises(ValueError, match="damaged"):
        await storage.load("key")
    await storage.save("key", TOKENS)
    assert await storage.load("key") == TOKENS


async def test_an_entry_of_a_later_format_is_neither_read_nor_overwritten(storage, backend):
    await storage.save("key", TOKENS)
    name = next(name for name in backend.entries if name[1].startswith("tokens"))
    text = backend.entries[name] = backend.entries[name].replace('"format": 1', '"format": 2')

    for question in (storage.load("key"), storage.save("key", LONG)):
        with pytest.raises(ValueError, match="was written by a later version of asyncpool_creds") as caught:
            await question
        assert_no_secret(caught.value)

    assert backend.entries[name] == text
    await storage.delete("key")
    await storage.save("key", LONG)
    assert await storage.load("key") == LONG


@pytest.mark.parametrize("text", ["", "{}", "nonsense"])
async def test_a_damaged_list_is_an_error(storage, backend, text):
    await storage.save("key", TOKENS)
    backend.entries["asyncpool_creds", "keys"] = text

    with pytest.raises(ValueError, match="the list of tokens in the keyring, 'keys' of 'asyncpool_creds', is damaged"):
        await storage.keys()


@pytest.mark.parametrize("backend", [NoKeyring(), KeyringOfNothing()], ids=["none", "null"])
async def test_that_there_is_no_keyring_is_told_with_what_to_install(monkeypatch, tmp_path, backend):
    monkeypatch.setattr(keyring, "get_keyring", lambda: backend)
    storage = KeyringStorage(lock_directory=tmp_path)

    for question in (storage.load("key"), storage.save("key", TOKENS), storage.delete("key"), storage.keys()):
        with pytest.raises(OSError, match=r"there is no keyring .* start a Secret Service .*pip install keyrings\.alt"):
            await question


async def test_the_keyring_is_the_one_that_is_configured(monkeypatch, tmp_path, backend):
    monkeypatch.setattr(keyring, "get_keyring", lambda: backend)

    await KeyringStorage(lock_directory=tmp_path).save("key", TOKENS)

    assert len(backend.entries) == 2


async def test_a_locked_keyring_says_so(storage, backend):
    await storage.save("key", TOKENS)
    backend.error = KeyringLocked("Failed to unlock the collection!")

    with pytest.raises(OSError, match=r"Memory\) refused: KeyringLocked: Failed to unlock .*; is it unlocked\?"):
        await storage.load("key")
    backend.error = None
    assert await storage.load("key") == TOKENS


async def test_the_words_of_a_keyring_that_breaks_are_not_repeated(tmp_path):
    backend = PlaintextKeyring()
    backend.file_path = str(tmp_path / "keyring.cfg")
    storage = KeyringStorage(backend=backend, lock_directory=tmp_path / "locks")
    await storage.save("key", TOKENS)
    tmp_path.joinpath("keyring.cfg").write_text(f"{secret('this is not how such a file begins')}")

    with pytest.raises(
        OSError, match=r"PlaintextKeyring\) failed: MissingSectionHeaderError; is it damaged\?"
    ) as caught:
        await storage.load("key")
    assert_no_secret(caught.value)


@pytest.mark.parametrize("length", [8, 20, 1000])
async def test_a_keyring_that_quotes_what_it_was_given_is_not_repeated(backend, tmp_path, length):
    class Chatty(Memory):
        def set_password(self, service, username, password):
            start = password.find(secret("r"))
            if start >= 0:
                raise PasswordSetError(f"cannot keep {password[start : start + length]!r}")

    storage = KeyringStorage(backend=Chatty(), lock_directory=tmp_path)

    with pytest.raises(OSError, match=r"Chatty\) refused: PasswordSetError; is it unlocked\?") as caught:
        await storage.save("key", StoredTokens(refresh_token=secret("refresh")))
    assert_no_secret(caught.value)


async def test_a_keyring_that_asks_the_user_holds_nobody_up_who_gives_up_waiting(backend, tmp_path):
    answered, asked = threading.Event(), threading.Event()

    class Asking(Memory):
        def get_password(self, service, username):
            asked.set()
            answered.wait(10)
            return super().get_password(service, username)

    storage = KeyringStorage(backend=Asking(), lock_directory=tmp_path)

    try:
        with anyio.move_on_after(10) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(storage.load, "key")
                await anyio.to_thread.run_sync(asked.wait)
                tasks.cancel_scope.cancel()
        assert not scope.cancelled_caught
    finally:
        answered.set()


async def test_only_one_process_at_a_time_uses_the_keyring(storage, tmp_path, backend):
    await storage.save("key", TOKENS)
    (lock,) = tmp_path.joinpath("locks").glob("*.lock")
    backend.threads.clear()

    with FileLock(lock):
        with anyio.move_on_after(0.2) as scope:
            await storage.load("key")

        # Not later: the thread that was given up goes on with the end of the lock.
        assert backend.threads == set()
    assert scope.cancelled_caught


async def test_locks_are_private_and_where_the_user_keeps_such_things(monkeypatch, tmp_path, backend):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    storage = KeyringStorage(backend=backend)

    async with storage.lock("key"):
        await storage.save("key", TOKENS)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in files} == {0o700}


def test_the_name_of_the_keyring_is_in_the_repr_and_nothing_that_it_holds(tmp_path):
    class WithPassword(Memory):
        def __repr__(self):
            return secret("the keyring's password")

    storage = KeyringStorage(backend=WithPassword(), lock_directory=tmp_path)

    assert repr(storage).startswith("<KeyringStorage 'asyncpool_creds' in ")
    assert_no_secret(storage)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"service": 5}, TypeError, "service must be a str, not int"),
        ({"service": ""}, ValueError, "service is empty"),
        ({"backend": "macOS"}, TypeError, "backend must be a KeyringBackend, not str"),
        ({"lock_directory": 5}, TypeError, "lock_directory must be a path, not int"),
        ({"entry_limit": "1"}, TypeError, "entry_limit must be an int, not str"),
        ({"entry_limit": 10}, ValueError, "entry_limit must be at least 64, not 10"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, names):
    with pytest.raises(error, match=names):
        KeyringStorage(**arguments)
