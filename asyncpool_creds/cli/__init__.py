"""The command ``asyncpool-creds``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import asyncpool_creds

__all__ = ["main"]

_CANNOT_RUN = 2  # argparse's own status for arguments it does not understand
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: Those of the command line, if not given.

    Raises:
        SystemExit: From argparse, for ``--help``, ``--version`` and arguments that are wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except KeyboardInterrupt:  # before the demo listens to signals itself, or after
        return _INTERRUPTED


def _demo(options: argparse.Namespace) -> int:
    try:
        from asyncpool_creds.cli import demo  # noqa: PLC0415 - needs the extra
    except ImportError as error:
        if (error.name or "").startswith("asyncpool_creds"):
            raise
        sys.stderr.write(f"asyncpool-creds demo: pip install 'asyncpool-creds[demo]' comes first ({error})\n")
        return _CANNOT_RUN
    return demo.run(
        demo.Options(
            duration=options.duration,
            token_lifetime=options.token_lifetime,
            workers=options.workers,
            pool_size=options.pool_size,
            baseline=options.baseline,
            json=options.json,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asyncpool-creds", description=asyncpool_creds.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {asyncpool_creds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="watch a pool live through many tokens on a real PostgreSQL",
        description="Start a PostgreSQL that refuses expired tokens and a service that issues them, and run the same "
        "workload on a pool of this package and on a plain asyncpg pool with the token it got at the start.",
        epilog="Exit status: 0 if no query on this package's pool failed, 1 if one did or money got lost, 2 if the "
        "demo cannot run, 130 or 143 if it was ended early by SIGINT (Ctrl-C) or SIGTERM.",
    )
    demo.add_argument(
        "--duration",
        type=_seconds(1, 86_400),
        default=30.0,
        metavar="SECONDS",
        help="how long the workload runs (default: 30)",
    )
    demo.add_argument(
        "--token-lifetime",
        type=_seconds(1, 86_400),
        default=5.0,
        metavar="SECONDS",
        help="how long a token lives (default: 5)",
    )
    demo.add_argument(
        "--workers", type=_count(1000), default=20, metavar="NUMBER", help="tasks on either side (default: 20)"
    )
    demo.add_argument(
        "--pool-size", type=_count(100), default=10, metavar="NUMBER", help="connections on either side (default: 10)"
    )
    demo.add_argument("--no-baseline", dest="baseline", action="store_false", help="leave the plain asyncpg pool out")
    demo.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, and nothing else, on standard output"
    )
    return parser


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not least <= seconds <= most:
            raise argparse.ArgumentTypeError(f"expected seconds from {least:g} to {most:g}, got {text!r}")
        return seconds

    return parse


def _count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            count = int(text)
        except ValueError:
            count = 0
        if not 1 <= count <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text!r}")
        return count

    return parse
