"""Where the figures come from: what about this machine and these versions decides them."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import asyncpg

import asyncpool_creds

__all__ = ["describe", "is_installed"]

_PACKAGES: Final = (
    "uvloop",
    "psycopg",
    "psycopg-pool",
    "sqlalchemy",
    "aurora-dsql-python-connector",
    "cloud-sql-python-connector",
)


def describe(postgres_version: str) -> dict[str, str | int]:
    """Return processor, cores and versions; nothing that names the machine or the day."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "asyncpg": asyncpg.__version__,
        **{package: _version(package) or "not installed" for package in _PACKAGES},
        "postgres": postgres_version,
        "asyncpool_creds": asyncpool_creds.__version__,
    }


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is there, by its name on PyPI."""
    return _version(distribution) is not None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:model name|Processor|Hardware)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
