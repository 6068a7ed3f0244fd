"""Which host names lead back to this machine, whatever a resolver says."""

from __future__ import annotations

import ipaddress

__all__ = ["is_loopback"]


def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine itself: ``localhost``, 127.0.0.0/8 or ::1, without an address scope.

    A scope (``::1%eth0``, RFC 4007) is refused: a resolver takes what stands before and after it for a name, and
    whoever owns that name (``127.0.0.1%.example.com``) answers.

    Args:
        host: A host name or an address, without brackets and port.
    """
    if host.lower() == "localhost":
        return True
    if "%" in host:
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # CPython 3.11 and 3.12 do not look into ::ffff:127.0.0.1 (RFC 4291 section 2.5.5.2).
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
