"""What a process, and a mark, know of refresh tokens that were spent."""

from __future__ import annotations

import threading

import processes
import pytest
from support import assert_no_secret, secret

from asyncpool_creds.providers._spent import SpentTokens, is_mark_of, mark_of

pytestmark = pytest.mark.anyio

HERE = "https://login.example.com"
TOKEN = secret("refresh")


@pytest.mark.parametrize("other", ["https://login.example.com/token", "https://LOGIN.example.com/realms/a"])
def test_a_token_is_known_wherever_its_issuer_is_named(other):
    spent = SpentTokens()

    assert spent.add(HERE, TOKEN)

    assert spent.has(other, TOKEN)
    assert not spent.add(other, TOKEN)
    assert not spent.has("https://other.example.com", TOKEN)
    assert not spent.has(HERE, secret("another"))


def test_a_discarded_token_is_not_known():
    spent = SpentTokens()
    spent.add(HERE, TOKEN)

    spent.discard(HERE, TOKEN)
    spent.discard(HERE, TOKEN)

    assert not spent.has(HERE, TOKEN)


def test_the_token_that_was_renewed_the_longest_ago_is_forgotten():
    spent = SpentTokens(limit=3)
    for name in ("first", "a", "b", "c", "d"):
        spent.add(HERE, secret(name))
        spent.add(HERE, secret("first"))

    known = [name for name in ("first", "a", "b", "c", "d") if spent.has(HERE, secret(name))]

    assert known == ["first", "c", "d"]


def test_one_of_many_threads_gets_to_send_a_token():
    spent, gate = SpentTokens(), threading.Barrier(8)
    winners = []

    def send():
        gate.wait()
        winners.extend(number for number in range(500) if spent.add(HERE, secret(str(number))))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(winners) == list(range(500))


async def test_a_fork_knows_what_its_parent_knew():
    spent = SpentTokens()
    spent.add(HERE, TOKEN)

    async def in_child():
        return spent.has(HERE, TOKEN)

    assert await processes.in_forked_child(in_child)


def test_no_token_is_in_what_is_known():
    spent = SpentTokens()
    spent.add(HERE, TOKEN)

    assert_no_secret(spent, vars(spent), mark_of(TOKEN))


def test_a_mark_is_of_one_token_and_looks_different_each_time():
    marks = {mark_of(TOKEN) for _ in range(10)}

    assert len(marks) == 10
    assert all(is_mark_of(TOKEN, mark) for mark in marks)
    assert not any(is_mark_of(secret("another"), mark) for mark in marks)
    assert all(is_mark_of(TOKEN, f"{mark}\n") for mark in marks)


@pytest.mark.parametrize("mark", ["", "x", ":", "00:00", mark_of(TOKEN)[:-2], f"{mark_of(TOKEN)}00", "ü:ü"])
def test_a_mark_that_cannot_be_read_is_of_every_token(mark):
    assert is_mark_of(TOKEN, mark)


def test_a_token_may_hold_any_text():
    odd = "\ud800\0\N{SNOWMAN}"
    spent = SpentTokens()

    assert spent.add(HERE, odd)
    assert spent.has(HERE, odd)
    assert is_mark_of(odd, mark_of(odd))
