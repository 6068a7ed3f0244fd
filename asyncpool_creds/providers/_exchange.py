"""A login that is kept going: refresh tokens are exchanged under a lock, stored before use, and never sent twice."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, TypeVar

import anyio

from asyncpool_creds._clock import utc_now
from asyncpool_creds._errors import ProviderError
from asyncpool_creds._events import Observer, RefreshTokenExpiring, StorageFailed, log_event
from asyncpool_creds._tracebacks import clear_frames, place_of
from asyncpool_creds.providers._spent import SPENT, is_mark_of, mark_of
from asyncpool_creds.providers._token_endpoint import Answer, Failure, refresh_token_in
from asyncpool_creds.storage import SpentMarks, StoredTokens, TokenStorage, UnreadableTokensError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

    from asyncpool_creds._clock import Clock
    from asyncpool_creds._credential import Credential

__all__ = ["Exchange", "Login"]

T = TypeVar("T")
_Action: TypeAlias = Literal["load", "save", "lock"]

_logger = logging.getLogger("asyncpool_creds")

_ANSWER_LOST: Final = "the issuer's answer to a refresh was lost, and with it the next refresh token"
_FORKED: Final = "this process is a fork, and the refresh token is its parent's; make the provider after forking"
_NONE_LEFT: Final = "there is no refresh token left"
_NONE_STORED: Final = "there is no refresh token in the storage"
_SENT_BEFORE: Final = (
    "there is no refresh token in the storage, and the refresh_token that the provider was made with was sent before; "
    "it may be good only once, so it is not sent again. Either the storage has lost its successor, or another provider "
    "was made with it (those that share a login need the same storage)"
)
_OLDER: Final = (
    "the refresh token in the storage was sent before, so it is not sent again; the storage has gone back to an older "
    "state (a restored backup, a replica that lags behind)"
)
# A manager that is not told otherwise refreshes this long before the end, or at this share of the life: the smaller.
_THRESHOLD: Final = timedelta(minutes=5)
_THRESHOLD_SHARE: Final = 5
# A person has to see the warning, and to find the time.
_WARN_BEFORE: Final = timedelta(days=3)
# Two expiries that are closer than this are the same one, computed from two answers.
_SAME_MOMENT: Final = timedelta(minutes=1)
# Between two answers, to tell an end that moves from one that stays: lifetimes are stated in whole seconds.
_LONG_ENOUGH: Final = timedelta(seconds=10)
# Seconds between attempts to store what could not be stored.
_FIRST_RETRY: Final = 1.0
_LONGEST_RETRY: Final = 60.0
# Seconds for the last attempt, when the provider closes.
_LAST_RETRY: Final = 5.0


class Login(Protocol):
    """What an exchange asks of its provider; nothing here need worry about cancellation or other callers."""

    async def prepare(self) -> None:
        """Do what can be done before a refresh token is marked: discovery."""
        ...

    async def refresh(self, refresh_token: str) -> Answer | Failure:
        """Spend a refresh token; an exception means that nothing was sent."""
        ...

    async def log_in(self) -> Answer | Failure:
        """Log in anew, by whatever means there are."""
        ...

    def credential_in(self, answer: Answer) -> Credential | Failure:
        """Return the credential that came with an answer."""
        ...


@dataclass(frozen=True, slots=True)
class _Unsaved:
    """Tokens that the storage would not take, and what it holds in their place, as far as is known."""

    tokens: StoredTokens
    replaces: StoredTokens | None


class Exchange:
    """Gets credentials from one login, in a task of its own.

    Every exchange is done under the lock of a storage. A credential that is there already, put there by another who
    shares the storage or for a caller who did not wait, is used instead of making an exchange, if it is fresh and was
    not given before. A refresh token that may be good only once is marked before it is sent; where the mark is found
    later, whoever sent it has died, and it is not sent again. One that cannot be marked is not sent either, unless it
    is in this memory alone.

    A storage may lose what it was given, or go back to an older state. So this process remembers what was sent, for all
    exchanges in it; and a storage that has `SpentMarks` remembers that the first refresh token was sent.

    Tokens that the storage has had and lost are not put back from memory. Another process may have taken them from
    there and spent them meanwhile, and only the storage could tell: what keeps a single process going would cost
    several of them their login. Besides, the loss may be the wish of somebody who has logged out. Tokens that no
    storage has taken yet are used, whatever it holds: nobody else can have spent them.

    Args:
        source: Who asks, for messages.
        where: The address of the issuer, for which the refresh tokens are good.
        login: How tokens are got.
        can_log_in: Whether `login` can log in without a refresh token.
        needs_a_person: Whether it takes a person to do so.
        first: A refresh token to start with.
        storage: Where tokens are kept.
        key: Under which name.
        clock: Where the time comes from.
        new_login: What to do with a new login, where a person has to do it.
    """

    def __init__(
        self,
        source: str,
        login: Login,
        *,
        where: str,
        can_log_in: bool,
        needs_a_person: bool,
        first: str | None,
        storage: TokenStorage,
        key: str,
        clock: Clock,
        new_login: str = "pass its refresh_token",
    ) -> None:
        self._source: Final = source
        self._where: Final = where
        self._login: Final = login
        self._can_log_in: Final = can_log_in
        self._needs_a_person: Final = needs_a_person
        self._first: Final = first
        self._storage: Final = storage
        self._marks: Final = storage if isinstance(storage, SpentMarks) else None
        self._key: Final = key
        self._clock: Final = clock
        self._new_login: Final = new_login
        self._observer: Observer = log_event
        self._birth_process: Final = os.getpid()
        self._home: tuple[int, AbstractEventLoop] | None = None
        self._flight: Task[Credential] | None = None
        self._must_finish = False  # what the issuer has done, or may have done, is not stored yet
        self._closing = False
        self._given: Credential | None = None
        self._refused: Credential | None = None
        self._passed_over: Credential | None = None  # in favour of one that came without the storage
        self._stored: StoredTokens | None = None  # as last seen there
        self._unsaved: _Unsaved | None = None
        self._saving: Task[None] | None = None
        self._warned_of: datetime | None = None
        self._is_mark_left = False  # though the first token is good: it could not be taken away

    def report_to(self, observer: Observer) -> None:
        """Send events to `observer`, and no longer to the log."""
        self._observer = observer

    def invalidate(self, credential: Credential) -> None:
        """Do not adopt `credential` again from the storage."""
        self._refused = credential

    async def fetch(self) -> Credential:
        """Return a credential that was not given before: one that is stored, or one of an exchange made now.

        Cancelling this does not cut an exchange short; the next call joins it.

        Raises:
            ProviderError: None was to be had.
        """
        home = (os.getpid(), asyncio.get_running_loop())
        if self._home != home:
            self._move_to(home)
        flight = self._flight
        if flight is None or flight.done():
            flight = self._flight = asyncio.create_task(self._run(), name=f"asyncpool_creds.{self._source}.fetch")
            flight.add_done_callback(_retrieve)
        # Not awaited directly: our own cancellation must not reach the exchange.
        await asyncio.wait((flight,))
        if flight.cancelled():
            raise ProviderError(f"{self._source}: the provider was closed while it was fetching")
        self._given = flight.result()
        return self._given

    async def aclose(self) -> None:
        """Finish the exchange of a refresh token, if one is going on, and store what is not stored yet."""
        if self._home != (os.getpid(), asyncio.get_running_loop()):
            return
        self._closing = True
        try:
            flight, saving = self._flight, self._saving
            if flight is not None and not flight.done():
                if not self._must_finish:
                    flight.cancel()
                await asyncio.wait((flight,))
            if saving is not None and not saving.done():
                saving.cancel()
                await asyncio.wait((saving,))
            if self._unsaved is not None:
                with anyio.move_on_after(_LAST_RETRY):
                    await self._save_again()
        finally:
            self._closing = False

    def _move_to(self, home: tuple[int, AbstractEventLoop]) -> None:
        # What belongs to another loop can be neither awaited nor cancelled from this one.
        self._home, self._flight, self._saving = home, None, None
        self._must_finish = self._closing = False
        if self._birth_process != home[0]:
            self._unsaved = None

    # -- in the task

    async def _run(self) -> Credential:
        try:
            async with self._locked():
                known = await self._known()
                credential = self._adoptable(known)
                if credential is None:
                    await self._login.prepare()
                    credential = await self._exchange(known)
                return credential
        except _StorageError as error:
            # Without the lock, or the mark, a refresh token that is good once might be sent twice.
            if not self._can_log_in or self._needs_a_person:
                raise ProviderError(
                    f"{self._source}: the storage of the refresh token failed, and without it the token is not sent; "
                    "see the cause"
                ) from error.reason
            self._let_close()
            self._passed_over = None if self._stored is None else self._stored.credential
            return _or_throw(self._login.credential_in(_or_throw(await self._login.log_in())))
        finally:
            self._must_finish = False

    @asynccontextmanager
    async def _locked(self) -> AsyncGenerator[None]:
        lock = self._storage.lock(self._key)
        await self._ask_storage("lock", lock.__aenter__)
        try:
            yield
        finally:
            try:
                await lock.__aexit__(None, None, None)
            except Exception as error:  # noqa: BLE001 - what was done under it is done
                self._report_storage("lock", error)

    async def _known(self) -> StoredTokens | None:
        """Return the tokens to go on with: those stored, or newer ones that could not be stored."""
        before = self._stored
        stored = self._stored = await self._ask_storage("load", partial(self._storage.load, self._key))
        if self._unsaved is not None:
            if self._is_newer(self._unsaved, stored):
                return self._unsaved.tokens
            # Another one who shares the storage has moved on.
            self._unsaved = None
        if stored is not None and not self._was_sent(stored):
            # What it has taken the place of was sent, by whoever has moved on.
            superseded = {self._first, None if before is None or before.is_reusable else before.refresh_token}
            for token in superseded - {None, stored.refresh_token}:
                SPENT.add(self._where, str(token))
        return stored

    def _is_newer(self, unsaved: _Unsaved, stored: StoredTokens | None) -> bool:
        """Return whether tokens that could not be stored are newer than what the storage holds."""
        if stored == unsaved.replaces:
            return True
        if unsaved.replaces is not None and unsaved.replaces.refresh_token == unsaved.tokens.refresh_token:
            return False  # what could not be stored is a mark, or its end: others may have had that token
        # Emptied, or gone back to an older state: nobody else has ever had these tokens.
        return stored is None or self._was_sent(stored)

    def _was_sent(self, tokens: StoredTokens) -> bool:
        """Return whether this process knows that the refresh token was sent, and may be good no more."""
        token = tokens.refresh_token
        return token is not None and not tokens.is_reusable and SPENT.has(self._where, token)

    def _adoptable(self, known: StoredTokens | None) -> Credential | None:
        """Return the credential that is there, if it is news and a manager would not refresh it at once."""
        credential = None if known is None else known.credential
        if known is None or credential is None:
            return None
        if self._given is not None and self._was_sent(known) and not known.is_being_spent:
            return None  # the storage has gone back to what was given before
        seen = (self._given, self._refused, self._passed_over)
        if any(one is not None and one.is_same_secret(credential) for one in seen):
            return None
        due = _due(credential, known.obtained_at or utc_now(self._clock))
        return credential if due is None or utc_now(self._clock) < due else None

    async def _exchange(self, known: StoredTokens | None) -> Credential:
        if (token := await self._to_spend(known)) is not None:
            outcome = await self._spend(token, known)
            if not isinstance(outcome, Failure):
                return outcome
            if not self._can_log_in and outcome.lost:
                raise self._login_needed(_ANSWER_LOST) from outcome.error
            if not self._can_log_in or not outcome.may_log_in_again:
                outcome.throw()
        elif not self._can_log_in:
            raise self._login_needed(self._why_none(known))
        answer = _or_throw(await self._login.log_in())
        return _or_throw(await self._keep(answer, StoredTokens()))

    def _why_none(self, known: StoredTokens | None) -> str:
        if known is None:
            if self._first is None:
                return _NONE_STORED
            return _SENT_BEFORE if SPENT.has(self._where, self._first) else _FORKED
        if known.is_being_spent:
            return _ANSWER_LOST
        return _OLDER if self._was_sent(known) else _NONE_LEFT

    async def _to_spend(self, known: StoredTokens | None) -> str | None:
        if known is None:
            # A fork has the parent's first token, too: only one of the two may use it.
            if self._first is None or self._birth_process != os.getpid() or await self._was_first_sent(self._first):
                return None
            return self._first
        if known.is_being_spent or self._was_sent(known):
            return None
        if known.expires_at is not None and self._can_log_in and known.expires_at <= utc_now(self._clock):
            return None
        return known.refresh_token

    async def _spend(self, token: str, known: StoredTokens | None) -> Credential | Failure:
        held = StoredTokens(refresh_token=token) if known is None else known
        self._must_finish = True
        if not held.is_reusable:
            await self._mark(held)
            if not SPENT.add(self._where, token):
                # In the meantime, by somebody in another event loop who has another storage.
                self._let_close()
                return Failure(self._login_needed(_SENT_BEFORE), refused=True)
        try:
            answer = await self._login.refresh(token)
        except Exception:
            await self._unmark(held)
            raise
        if isinstance(answer, Failure):
            if held.is_reusable:
                answer = replace(answer, lost=False)
            elif not answer.lost:
                await self._unmark(held)
            self._let_close()
            return answer
        return await self._keep(answer, held)

    def _let_close(self) -> None:
        """Go on with what may be cut short; if somebody is closing, it is."""
        self._must_finish = False
        if self._closing and self._flight is not None:
            self._flight.cancel()

    async def _keep(self, answer: Answer, held: StoredTokens) -> Credential | Failure:
        """Store what came with `answer` in place of `held`, and return its credential."""
        self._must_finish = True
        tokens = refresh_token_in(answer)
        if tokens is None or tokens.refresh_token == held.refresh_token:
            # It was left as it is, so it will be good again.
            tokens = replace(
                held,
                expires_at=(None if tokens is None else tokens.expires_at) or held.expires_at,
                is_being_spent=False,
                is_reusable=held.refresh_token is not None,
            )
        await self._note(tokens, held)
        credential = self._login.credential_in(answer)
        if isinstance(credential, Failure):
            await self._save(replace(tokens, credential=None, obtained_at=None))
            return credential
        tokens = replace(tokens, credential=credential, obtained_at=answer.requested_at)
        await self._save(tokens)
        self._warn(tokens, held, _due(credential, answer.requested_at))
        return credential

    def _warn(self, tokens: StoredTokens, held: StoredTokens, due: datetime | None) -> None:
        """Report a refresh token that ends before a person may notice, and that refreshing does not prolong."""
        end = tokens.expires_at
        if end is None or (self._can_log_in and not self._needs_a_person):
            return
        if self._warned_of is not None and abs(end - self._warned_of) <= _SAME_MOMENT:
            return
        ends_before_use = due is not None and end <= due
        if ends_before_use or (_is_end_fixed(tokens, held) and end - utc_now(self._clock) <= _WARN_BEFORE):
            self._warned_of = end
            advice = (
                "somebody must log in again by then; the next fetch after it will ask for it"
                if self._can_log_in
                else f"log in again by then, and {self._new_login}"
            )
            self._observer(
                RefreshTokenExpiring(at=utc_now(self._clock), provider=self._source, expires_at=end, advice=advice)
            )

    # -- what was sent

    async def _was_first_sent(self, first: str) -> bool:
        """Return whether anything says that the first refresh token was sent before."""
        if SPENT.has(self._where, first):
            return True
        if self._marks is None:
            return False
        mark = await self._ask_storage("load", partial(self._marks.load_mark, self._key))
        if mark is None or not is_mark_of(first, mark):
            return False
        SPENT.add(self._where, first)
        return True

    async def _note(self, tokens: StoredTokens, held: StoredTokens) -> None:
        """Remember what an answer says of the refresh token that was sent, and of the one that came."""
        if tokens.refresh_token is not None:
            # The issuer has just given it, or left it as it is.
            SPENT.discard(self._where, tokens.refresh_token)
        if held.refresh_token is None:
            return
        if tokens.refresh_token != held.refresh_token:
            SPENT.add(self._where, held.refresh_token)
            if held.is_reusable and held.refresh_token == self._first:
                await self._put_mark()  # the issuer has begun to rotate it
        elif held.refresh_token == self._first and (self._is_mark_left or not held.is_reusable):
            await self._take_mark_away()

    async def _put_mark(self) -> None:
        try:
            await self._save_mark()
        except Exception as error:  # noqa: BLE001 - the exchange cannot be undone
            self._report_storage("save", error, "the storage may not tell later that the first refresh token was sent")

    async def _save_mark(self) -> None:
        if self._marks is not None and self._first is not None:
            await self._marks.save_mark(self._key, mark_of(self._first))

    async def _take_mark_away(self) -> None:
        self._is_mark_left = False
        if self._marks is None:
            return
        try:
            await self._marks.save_mark(self._key, None)
        except Exception as error:  # noqa: BLE001 - it is tried again with the next exchange
            self._is_mark_left = True
            self._report_storage("save", error, "the mark of a refresh token that is still good could not be removed")

    # -- storing

    async def _mark(self, held: StoredTokens) -> None:
        """Say in the storage that a refresh token is about to be sent."""
        marked = replace(held, is_being_spent=True)
        is_ours_alone = self._unsaved is not None and (
            self._stored is None or self._stored.refresh_token != held.refresh_token
        )
        try:
            await self._ask_storage("save", partial(self._save_marks, marked), "a refresh token could not be marked")
        except _StorageError:
            if not is_ours_alone:
                # The mark may be there all the same, and nothing was sent.
                self._save_later(held, replaces=marked)
                raise
            self._save_later(marked, replaces=self._stored)
        else:
            self._stored, self._unsaved = marked, None

    async def _save_marks(self, marked: StoredTokens) -> None:
        await self._storage.save(self._key, marked)
        if marked.refresh_token == self._first:
            await self._save_mark()

    async def _unmark(self, held: StoredTokens) -> None:
        """Take the mark back: the token was not sent, or it was answered."""
        if held.is_reusable or held.refresh_token is None:
            return
        SPENT.discard(self._where, held.refresh_token)
        if held.refresh_token == self._first:
            await self._take_mark_away()
        await self._save(held)

    async def _save(self, tokens: StoredTokens) -> None:
        try:
            await self._storage.save(self._key, tokens)
        except Exception as error:  # noqa: BLE001 - the exchange cannot be undone: losing its result helps nobody
            self._save_later(tokens, replaces=self._stored)
            self._report_storage("save", error, "the newest tokens are in memory alone")
        else:
            self._stored, self._unsaved = tokens, None

    def _save_later(self, tokens: StoredTokens, *, replaces: StoredTokens | None) -> None:
        self._unsaved = _Unsaved(tokens, replaces)
        if not self._closing and (self._saving is None or self._saving.done()):
            name = f"asyncpool_creds.{self._source}.save"
            self._saving = asyncio.create_task(self._save_until_saved(), name=name)

    async def _save_until_saved(self) -> None:
        delay = _FIRST_RETRY
        while self._unsaved is not None:
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_RETRY)
            await self._save_again()

    async def _save_again(self) -> None:
        try:
            async with self._locked():
                await self._known()
                if self._unsaved is not None:
                    await self._save(self._unsaved.tokens)
        except _StorageError:
            _logger.debug("%s: what could not be stored is kept in memory for now", self._source)

    async def _ask_storage(self, action: _Action, request: Callable[[], Awaitable[T]], so: str | None = None) -> T:
        try:
            return await request()
        except Exception as error:  # noqa: BLE001 - a storage may be anybody's
            reason = self._report_storage(action, error, so)
        # Not in the handler: what a foreign exception says would be found as the context of this one.
        raise _StorageError(reason)

    def _report_storage(self, action: _Action, error: Exception, so: str | None = None) -> Exception:
        """Report a failure, and return it in words that can be shown."""
        place = place_of(error)
        clear_frames(error)
        shown: Exception
        if isinstance(error, (OSError, UnreadableTokensError)):
            shown, what = error, f"{type(error).__name__}: {error}"
        else:
            # It may quote what it was given.
            what = type(error).__name__ if place is None else f"{type(error).__name__} at {place}"
            shown = RuntimeError(f"the storage raised {what}")
        message = what if so is None else f"{what}; {so}"
        self._observer(
            StorageFailed(at=utc_now(self._clock), provider=self._source, action=action, error=shown, message=message)
        )
        return shown

    # -- small change

    def _login_needed(self, reason: str) -> ProviderError:
        return ProviderError(f"{self._source}: {reason}. A new login is needed: {self._new_login}", retryable=False)


class _StorageError(Exception):
    """The storage could not be locked, read or marked, which has been reported."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason: Final = reason


def _due(credential: Credential, obtained_at: datetime) -> datetime | None:
    """Return when a manager that is not told otherwise asks for the next one; None: not on its own."""
    end = credential.expires_at
    return None if end is None else end - min(_THRESHOLD, (end - obtained_at) / _THRESHOLD_SHARE)


def _is_end_fixed(tokens: StoredTokens, held: StoredTokens) -> bool:
    """Return whether the end of a refresh token is seen to stay where it is, while time goes by."""
    end, end_before = tokens.expires_at, held.expires_at
    if end is None or end_before is None or tokens.obtained_at is None or held.obtained_at is None:
        return False
    elapsed = tokens.obtained_at - held.obtained_at
    return elapsed >= _LONG_ENOUGH and end - end_before < elapsed / 2


def _or_throw(outcome: T | Failure) -> T:
    if isinstance(outcome, Failure):
        outcome.throw()
    return outcome


def _retrieve(flight: Task[Credential]) -> None:
    # The one who would have seen the error may have been cancelled. Whoever sees it finds no tokens in its frames.
    if not flight.cancelled() and (error := flight.exception()) is not None:
        clear_frames(error)
