"""Where the figures come from: what about this machine and these versions decides them."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import asyncpg

import asyncpool_creds

__all__ = ["describe"]


def describe(postgres_version: str) -> dict[str, str | int]:
    """Return processor, cores and versions; nothing that names the machine or the day."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "asyncpg": asyncpg.__version__,
        "uvloop": _installed("uvloop"),
        "postgres": postgres_version,
        "asyncpool_creds": asyncpool_creds.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:model name|Processor|Hardware)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
