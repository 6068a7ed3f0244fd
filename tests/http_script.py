"""An HTTP server on loopback that answers as it is told to, byte by byte, and keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Self, TypeAlias

Answer: TypeAlias = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]


class ScriptedServer:
    """Use it as an async context manager; it listens on a free port of 127.0.0.1.

    Args:
        answer: Called with the stream to write to and all that was received of the request.

    Attributes:
        requests: What was received, one entry a request.
        reached: Set when a request has come.
        cut_off: Set when a client goes away before its answer is complete.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[bytes] = []
        self.reached = asyncio.Event()
        self.cut_off = asyncio.Event()
        self._tasks: set[asyncio.Task[object]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", request, re.IGNORECASE)
            request += await reader.readexactly(int(length[1])) if length else b""
            self.requests.append(request)
            self.reached.set()
            await self._answer(writer, request)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            self.cut_off.set()
        finally:
            writer.close()


def head(status: str = "200 OK", **headers: object) -> bytes:
    """Return the first lines of an answer; in the name of a header, an underscore is a dash."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def always(body: bytes | object, status: str = "200 OK", **headers: object) -> Answer:
    """Answer every request with `body`, as JSON unless it is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def answer(writer: asyncio.StreamWriter, _: bytes) -> None:
        writer.write(head(status, Content_Length=len(content), **headers) + content)

    return answer


def endlessly(first: bytes, chunk: bytes) -> Answer:
    """Answer with `first`, and then with `chunk` after `chunk` until the client has had enough."""

    async def answer(writer: asyncio.StreamWriter, _: bytes) -> None:
        writer.write(first)
        while True:
            writer.write(chunk)
            await writer.drain()

    return answer


def and_no_more(first: bytes = b"") -> Answer:
    """Answer with `first`, and keep the connection open."""

    async def answer(writer: asyncio.StreamWriter, _: bytes) -> None:
        writer.write(first)
        await asyncio.Event().wait()

    return answer
