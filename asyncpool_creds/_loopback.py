"""Which host names lead back to this machine, whatever a resolver says."""

from __future__ import annotations

import ipaddress
from typing import Final

__all__ = ["is_loopback"]

_LOOPBACK_6: Final = ipaddress.IPv6Address("::1")  # unequal to one with a scope


def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine itself: ``localhost``, 127.0.0.0/8 in decimal numbers, or ::1.

    Another spelling is not, wherever it may lead. A scope above all (``::1%eth0``, RFC 4007): a resolver may take it
    for a part of a name, and whoever owns that name (``127.0.0.1%.example.com``) answers.

    Args:
        host: A host name or an address, without brackets and port.
    """
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_loopback
    return address == _LOOPBACK_6
