"""What the SDKs of vendors raise and log, without what they sent and received."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from asyncpool_creds._tracebacks import ForeignError, class_and_place

__all__ = ["NONSENSE", "keep_secrets_out_of_logs", "summary_of", "working_for_us"]

# What an SDK raises when an answer is not what it takes it for. RecursionError: JSON that is nested too deep.
NONSENSE: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
_DEEPEST: Final = 8
_LONGEST_LINE: Final = 300


def summary_of(error: BaseException, text: str | None = None) -> ForeignError:
    """Return what stands for `error`, and for what led to it, as the cause of an error of ours.

    The exceptions themselves are not kept. They hold requests, answers and headers in their attributes, their texts,
    and the locals of their frames, and with them what has to stay secret.

    Args:
        error: What the SDK raised.
        text: What it says, where that is known to quote neither request nor answer.
    """
    links = [f"{type(link).__module__}.{class_and_place(link)}" for link in _links(error)]
    if text:
        links[0] += f": {text}"
    return ForeignError("; caused by ".join(links))


def _links(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen and len(seen) < _DEEPEST:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# Logs

_works_for_us: Final[ContextVar[bool]] = ContextVar("asyncpool_creds.foreign", default=False)


@contextmanager
def working_for_us() -> Generator[None]:
    """Keep requests, answers and exceptions that quote them out of the logs of an SDK, which is working for us."""
    mark = _works_for_us.set(True)
    try:
        yield
    finally:
        _works_for_us.reset(mark)


def keep_secrets_out_of_logs(loggers: Iterable[str]) -> None:
    """Let the named loggers of an SDK tell nothing that it sends or receives while it works for us.

    Nothing below INFO is logged: there they show requests and answers. Of the rest, exceptions and documents are
    replaced by their class, and only the first line remains.
    """
    for name in loggers:
        logging.getLogger(name).addFilter(_may_be_logged)


def _may_be_logged(record: logging.LogRecord) -> bool:
    if not _works_for_us.get():
        return True
    if isinstance(record.args, tuple):
        record.args = tuple(map(_loggable, record.args))
    elif record.args:
        record.args = {name: _loggable(value) for name, value in record.args.items()}
    error = record.exc_info[1] if record.exc_info else None
    line = record.getMessage().partition("\n")[0][:_LONGEST_LINE]
    record.msg, record.args = line if error is None else f"{line} ({type(error).__name__})", None
    record.exc_info = record.exc_text = record.stack_info = None
    return record.levelno > logging.DEBUG


def _loggable(value: object) -> object:
    kind = type(value)
    return kind.__name__ if issubclass(kind, (BaseException, bytes, Mapping, list)) else value
