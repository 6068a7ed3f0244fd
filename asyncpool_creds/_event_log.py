"""The log: a line when something begins to fail, at most one a minute while it does, and one when it works again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from asyncpool_creds import _fork

__all__ = ["Entry", "EventLog", "Sentence", "duration", "quoted"]

_logger = logging.getLogger("asyncpool_creds")

# Seconds between two lines about the same failure.
_INTERVAL: Final = 60.0
# What fails, recovers and fails again, time after time, may have so many lines at once, and then one each interval.
_BURST: Final = 5
# A failure that nothing was heard of for so many seconds is over, where nothing tells of a recovery.
_FORGOTTEN_AFTER: Final = 600.0
# A hundred sources that fail at the same moment have a line each; so many of these at once come with a traceback.
_TRACEBACKS: Final = 20
# Failures that are remembered; past that, those that were heard of least recently are forgotten.
_REMEMBERED: Final = 1000
# Characters of somebody else's text.
_LONGEST_QUOTATION: Final = 500

# A template and its arguments, kept apart because error trackers group lines by their template.
Sentence: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is to be said about one event.

    Args:
        level: The level of `logging`; of a recovery, INFO.
        sentences: What is said.
        failure: What fails; the entries of one failure are counted, and not all are written. None: nothing fails.
        severity: A failure that becomes more severe than it was is told at once.
        error: The exception; its traceback goes with the line that tells when a failure begins, or becomes more severe.
        recoveries: What works again, if it failed before, each with a sentence that lacks its end, such as
            ``("%s answers again", "Vault")``.
    """

    level: int
    sentences: tuple[Sentence, ...]
    failure: Hashable | None = None
    severity: int = 0
    error: BaseException | None = None
    recoveries: tuple[tuple[Hashable, Sentence], ...] = ()


class Dated(Protocol):
    """An event of any kind."""

    @property
    def at(self) -> datetime:
        """When it happened."""
        ...


EventT_contra = TypeVar("EventT_contra", bound=Dated, contravariant=True)


class EventLog(Generic[EventT_contra]):
    """Writes events to the logger ``asyncpool_creds``, and remembers what fails.

    It may be called from several threads. Time is what the events say; a clock that is set back costs no line.

    Args:
        entry_of: Returns what is to be said about an event.
    """

    __slots__ = ("_entry_of", "_failures", "_tracebacks")

    def __init__(self, entry_of: Callable[[EventT_contra], Entry]) -> None:
        self._entry_of = entry_of
        self._failures: dict[Hashable, _Failure] = {}
        self._tracebacks: _Allowance | None = None

    def __call__(self, event: EventT_contra) -> None:
        """Write a line about `event`, or count it: then it is written at level DEBUG."""
        entry = self._entry_of(event)
        with _guard.lock:
            level, sentences, error = self._decide(entry, event.at.timestamp())
        # Outside of the lock: a handler may do anything.
        if _logger.isEnabledFor(level):
            template = " ".join(sentence[0] for sentence in sentences)
            arguments = [argument for sentence in sentences for argument in sentence[1:]]
            _logger.log(level, template, *arguments, exc_info=error, extra={"event": event})

    def _decide(self, entry: Entry, at: float) -> tuple[int, tuple[Sentence, ...], BaseException | None]:
        recovered: list[Sentence] = []
        for name, sentence in entry.recoveries:
            failure = self._failures.get(name)
            if failure is not None and (end := failure.recover(at)) is not None:
                recovered.append((f"{sentence[0]}, {end[0]}", *sentence[1:], *end[1:]))
        if recovered:
            return logging.INFO, tuple(recovered), None
        if entry.failure is None:
            return entry.level, entry.sentences, None
        failure = self._failure(entry.failure, at)
        if not failure.fail(entry.severity, at):
            return logging.DEBUG, entry.sentences, None
        error = entry.error if failure.wants_traceback and self._may_show_traceback(at) else None
        if error is not None:
            failure.traceback_at = at
        return entry.level, (*entry.sentences, *failure.so_far(at)), error

    def _failure(self, name: Hashable, at: float) -> _Failure:
        failure = self._failures.pop(name, None) or _Failure(at)
        self._failures[name] = failure  # last in the order
        if len(self._failures) > _REMEMBERED:
            del self._failures[next(iter(self._failures))]
        return failure

    def _may_show_traceback(self, at: float) -> bool:
        if self._tracebacks is None:
            self._tracebacks = _Allowance(_TRACEBACKS, at)
        self._tracebacks.pass_time(at)
        return self._tracebacks.take()


class _Allowance:
    """So many at once, and one more with each interval that has passed since."""

    __slots__ = ("_left", "_most", "_seen", "passed")

    def __init__(self, most: int, at: float) -> None:
        self._most = most
        self._left = float(most)
        self._seen = at
        self.passed = 0.0

    def pass_time(self, at: float) -> float:
        """Return the seconds since the last call: none if the clock was set back, or events come out of order."""
        seconds = max(0.0, at - self._seen)
        self._seen = at
        self.passed += seconds
        self._left = min(self._most, self._left + seconds / _INTERVAL)
        return seconds

    def take(self) -> bool:
        """Return whether one is left, which then is taken."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class _Failure:
    """Something that fails, or has failed; its own time passes with the events that tell of it."""

    __slots__ = ("_began", "_count", "_is_on", "_lines", "_severity", "_told", "traceback_at", "wants_traceback")

    def __init__(self, at: float) -> None:
        self._lines = _Allowance(_BURST, at)
        self._is_on = False
        self._told: float | None = None  # when a line was last written
        self._begin()

    def _begin(self) -> None:
        self._began = self._lines.passed
        self._count = 0
        self._severity = -1  # of the most severe line of this failure; none was written yet
        self.traceback_at: float | None = None
        self.wants_traceback = False

    def fail(self, severity: int, at: float) -> bool:
        """Count one more failure; return whether a line is to be written."""
        silence = self._lines.pass_time(at)
        if not self._is_on or silence > _FORGOTTEN_AFTER:
            self._begin()
            self._is_on = True
        self._count += 1
        is_news = severity > self._severity
        is_due = self._told is None or self._lines.passed - self._told >= _INTERVAL
        if not (is_news and self._lines.take()) and not is_due:
            return False
        self.wants_traceback = is_news
        self._severity = max(severity, self._severity)
        self._told = self._lines.passed
        return True

    def recover(self, at: float) -> Sentence | None:
        """Return the end of a sentence about the recovery, or None if nobody has heard of a failure."""
        if not self._is_on:
            return None
        self._lines.pass_time(at)
        self._is_on = False
        if self._severity < 0:
            return None
        attempts = "1 failed attempt" if self._count == 1 else f"{self._count} failed attempts"
        return "after %s and %s.", duration(self._lines.passed - self._began), attempts

    def so_far(self, at: float) -> tuple[Sentence, ...]:
        """Return what a line that is not the first one adds."""
        said: tuple[Sentence, ...] = ()
        if self._count > 1:
            said = (("It has failed %s times in %s.", str(self._count), duration(self._lines.passed - self._began)),)
        if self.traceback_at is not None and self.traceback_at != at:
            moment = datetime.fromtimestamp(self.traceback_at, UTC)
            said += (("The traceback is with the line of %s UTC.", f"{moment:%H:%M:%S}"),)
        return said


def duration(seconds: float) -> str:
    """Return `seconds` as people say it, rounded: ``0.4 s``, ``4 min 10 s``, ``2 h``."""
    if not seconds < 1e9:
        return "more than 30 years"
    seconds = max(0.0, seconds)
    if seconds < 59.5:
        digits = 0 if seconds >= 9.95 else 1 if seconds >= 0.095 else 2
        return f"{round(seconds, digits):g} s"
    whole = round(seconds)
    if whole < 3570:
        return _two(whole, 60, "min", "s")
    if whole < 84600:
        return _two(round(whole / 60), 60, "h", "min")
    return _two(round(whole / 3600), 24, "d", "h")


def _two(amount: int, size: int, large: str, small: str) -> str:
    many, few = divmod(amount, size)
    return f"{many} {large} {few} {small}" if few else f"{many} {large}"


def quoted(text: str) -> str:
    """Return somebody else's text in quotation marks: on one line, with nothing in it that a terminal would obey."""
    if len(text) > _LONGEST_QUOTATION:
        text = text[: _LONGEST_QUOTATION - 1] + "…"
    line = " ".join(text.split())
    return '"' + "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line) + '"'


class _Guard:
    """The lock of all logs: it is held for microseconds, and a thousand managers have a log each."""

    def __init__(self) -> None:
        self._forked()

    def _forked(self) -> None:
        # A thread that held it does not exist in the child.
        self.lock = threading.RLock()


_guard: Final = _Guard()
_fork.watch(_guard)
