"""Frames to and from the driver in a container, over the engine's attach stream."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

_FRAME = struct.Struct(">II")
"""As in repl_driver.py: length of the header, length of the body."""
_STREAM = struct.Struct(">BxxxI")
"""The engine's own frames (https://docs.docker.com/reference/api/engine/, «attach»): 1 stdout or 2 stderr, length."""
_MOST = 2**30
_COMPLAINT = 4096
"""Bytes kept of what the driver itself wrote to stderr."""

Answer = tuple[dict[str, Any], bytes]


class Gone(Exception):
    """The container's streams ended."""


def checked(answer: Mapping[str, Any]) -> None:
    """Raise the error that an answer tells of, as the `OSError` that it was in there."""
    if "errno" in answer:
        raise OSError(answer["errno"], answer["error"])


async def _next(answers: asyncio.Queue[Answer | None]) -> Answer:
    answer = await answers.get()
    if answer is None:
        raise Gone
    return answer


class Channel:
    """Asks one driver. Reads all the time, so that the engine never waits for us."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, asyncio.Queue[Answer | None]] = {}
        self._last = 0
        self._complaint = b""
        self._task = asyncio.create_task(self._read(), name="docker-channel")

    @property
    def alive(self) -> bool:
        return not self._task.done()

    @property
    def complaint(self) -> str:
        """What the driver said before it died, if anything."""
        return " ".join(self._complaint.decode(errors="replace").split())

    async def ask(self, op: str, body: bytes = b"", **header: Any) -> Answer:
        """One request, one answer. Raises `Gone`."""
        async with self.asking(op, body, **header) as answers:
            return await _next(answers)

    @asynccontextmanager
    async def asking(self, op: str, body: bytes = b"", **header: Any) -> AsyncIterator[asyncio.Queue[Answer | None]]:
        """One request and the queue of its answers; `None` in it: the container is gone."""
        self._last += 1
        number = self._last
        answers = self._waiting[number] = asyncio.Queue()
        try:
            await self._send({"id": number, "op": op, **header}, body)
            yield answers
        finally:
            del self._waiting[number]

    async def stream(self, op: str, **header: Any) -> bytes:
        """One request that is answered in parts; the parts together. Raises `Gone`, and what `checked` does."""
        parts: list[bytes] = []
        async with self.asking(op, **header) as answers:
            while True:
                answer, part = await _next(answers)
                if not answer.get("more"):
                    checked(answer)
                    return b"".join(parts)
                parts.append(part)

    async def tell(self, op: str) -> None:
        """A request that is not answered."""
        await self._send({"id": 0, "op": op}, b"")

    async def _send(self, header: Mapping[str, Any], body: bytes) -> None:
        if not self.alive:
            raise Gone
        head = json.dumps(header).encode()
        try:
            self._writer.write(_FRAME.pack(len(head), len(body)) + head + body)
            await self._writer.drain()
        except OSError as error:
            raise Gone from error

    async def _read(self) -> None:
        pending = bytearray()
        try:
            while True:
                stream, size = _STREAM.unpack(await self._reader.readexactly(_STREAM.size))
                data = await self._reader.readexactly(size)
                if stream == 2:
                    self._complaint = (self._complaint + data)[-_COMPLAINT:]
                    continue
                pending += data
                while len(pending) >= _FRAME.size:
                    head, body = _FRAME.unpack_from(pending)
                    if head > _MOST or body > _MOST:
                        return
                    end = _FRAME.size + head + body
                    if len(pending) < end:
                        break
                    header = json.loads(pending[_FRAME.size : _FRAME.size + head])
                    waiting = self._waiting.get(header["id"])
                    if waiting is not None:
                        waiting.put_nowait((header, bytes(pending[_FRAME.size + head : end])))
                    del pending[:end]
        except (asyncio.IncompleteReadError, OSError, ValueError, KeyError):
            return
        finally:
            for waiting in self._waiting.values():
                waiting.put_nowait(None)

    def hang_up(self) -> None:
        """Close our side: the driver ends itself and with it everything in the container. What it still says is read."""
        try:
            self._writer.write_eof()
        except (OSError, NotImplementedError):
            self._writer.close()

    async def close(self) -> None:
        """Stop reading; call it when the container is gone."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
