"""A server that answers with whatever it is given, be it HTTP or not, for as long as somebody reads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import ssl
from collections.abc import Callable, Iterable
from typing import Self

Answer = Callable[[bytes], Iterable[bytes]]


def http(status: int, body: bytes | str = b"", *, kind: str = "application/json", headers: str = "") -> Answer:
    """Return a whole answer; `headers` end with a line feed each."""
    content = body.encode() if isinstance(body, str) else body
    length = f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{headers}{length}".encode()
    return lambda _: [head + content]


def echo(status: int, template: str, kind: str = "application/json") -> Answer:
    """Return an answer in which ``@`` stands for all that was asked."""
    lines = str.maketrans({'"': " ", "\r": " ", "\n": " ", "<": " ", "&": " ", "\\": " "})
    return lambda asked: http(status, template.replace("@", asked.decode("latin-1").translate(lines)), kind=kind)(asked)


def endless(asked: bytes) -> Iterable[bytes]:
    """Answer with more and more of a document."""
    del asked
    chunk = b"100000\r\n" + b"A" * 0x100000 + b"\r\n"
    head = b'HTTP/1.1 200 X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n"\r\n'
    return itertools.chain([head], itertools.repeat(chunk))


class RawServer:
    """Answers on loopback.

    Attributes:
        answer: Makes the answer to a request, which is its argument, head and body.
        asked: Every request.
        sent: How many bytes somebody has taken.
    """

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.sent = 0
        self._tls = tls

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls, limit=1 << 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        port = self._server.sockets[0].getsockname()[1]
        return f"https://localhost:{port}" if self._tls else f"http://127.0.0.1:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            asked = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", asked, re.IGNORECASE)
            asked += await reader.readexactly(int(length[1])) if length else b""
            self.asked.append(asked)
            for chunk in self.answer(asked):
                writer.write(chunk)
                await writer.drain()
                self.sent += len(chunk)
        with contextlib.suppress(OSError):
            writer.close()
