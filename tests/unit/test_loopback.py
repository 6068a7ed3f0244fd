from __future__ import annotations

import pytest

from asyncpool_creds._loopback import is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.8.7", "::1", "0:0:0:0:0:0:0:1"])
def test_this_machine_is_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1%.example.com", "127.0.0.1%25.example.com", "::1%.example.com", "::1%lo", "localhost%.example.com"),
        *("127.0.0.1.example.com", "localhost.example.com", "localhost.", "127.1", "0x7f000001", "2130706433"),
        *(
            "0.0.0.0",
            "::",
            "128.0.0.1",
            "::ffff:127.0.0.1",
            "LOCALHOST",
            "127.0.0.01",
            "[::1]",
            " 127.0.0.1",
            "127.0.0.1\0",
            "",
        ),
    ],
)
def test_what_leads_elsewhere_or_nobody_knows_where_is_not(host):
    assert not is_loopback(host)
