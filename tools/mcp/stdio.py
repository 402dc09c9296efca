"""A transport for the SDK's client: a server's process, with limits.

The SDK has one too. This one bounds what it reads (a line without an end would be kept whole), gives the server exactly the
environment that it is told to, keeps what the server writes to standard error, and needs no child watcher of the event
loop's policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import mcp_types
from mcp.shared.message import SessionMessage

logger = logging.getLogger(__name__)

TOO_LARGE, UNREADABLE = -32050, -32051
"""JSON-RPC error codes of what stands in for an answer that was too large, or could not be read."""

_CHUNK = 65_536
_TAIL_LINES, _LINE_CHARS = 50, 500
_FILE_BYTES = 10_000_000
_EXIT_S, _TERM_S = 1.0, 0.5  # after the end of its input; after SIGTERM
_ID = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d+)\s*,')


class ServerLog:
    """What a server said beside the protocol: its last lines, and a file if there is to be one."""

    def __init__(self, file: Path | None = None) -> None:
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._file = file

    def add(self, line: bytes, note: str = "") -> None:
        text = note + line.decode(errors="replace").rstrip()
        self._lines.append(text[:_LINE_CHARS])
        if self._file is not None:
            with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as file:
                if file.tell() < _FILE_BYTES:
                    file.write(text[:_CHUNK] + "\n")

    def tail(self) -> str:
        return "\n".join(self._lines)


@contextlib.asynccontextmanager
async def stdio_transport(
    command: list[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None,
    log: ServerLog,
    max_message_bytes: int,
    ended: Callable[[], None],
) -> AsyncIterator[tuple[Any, Any]]:
    """The streams of the SDK's client to a new process, which is gone with everything that it started (in its process group)
    when this ends. `ended` is called when the server closes its output. Raises `OSError` if it cannot be started."""
    process = subprocess.Popen(  # noqa: ASYNC220 - for a moment, and in the background loop
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(env),
        cwd=cwd,
        bufsize=0,
        start_new_session=True,
    )
    to_session, from_server = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_server, from_session = anyio.create_memory_object_stream[SessionMessage](0)
    tasks: list[asyncio.Task[None]] = []
    transports: list[asyncio.BaseTransport] = []
    try:
        stdout, stderr = await _reader(process.stdout, transports), await _reader(process.stderr, transports)
        stdin = await _writer(process.stdin, transports)

        async def read() -> None:
            with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                async with to_session:
                    async for message in _messages(stdout, max_message_bytes, log):
                        await to_session.send(SessionMessage(message))
            ended()

        async def write() -> None:
            with contextlib.suppress(OSError):
                async for message in from_session:
                    line = message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
                    stdin.write(line)
                    await stdin.drain()
            stdin.close()

        async def keep() -> None:
            async for line, _ in _lines(stderr, _CHUNK):
                log.add(line)

        tasks += [asyncio.create_task(work()) for work in (read, write, keep)]
        yield from_server, to_server
    finally:
        with anyio.CancelScope(shield=True):
            for stream in (from_server, to_server, to_session):
                stream.close()
            if tasks:
                await asyncio.wait({tasks[1]}, timeout=0.2)  # what was accepted is written, then its input ends
            for transport in transports[2:]:
                transport.close()
            await _stop(process)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            from_session.close()
            for transport in transports:
                transport.close()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


async def _stop(process: subprocess.Popen[bytes]) -> None:
    """Waits a little, then kills the process group. Not reaped before that: until then its number is nobody else's."""
    if not await _gone(process, _EXIT_S):
        _signal(process, signal.SIGTERM)
        await _gone(process, _TERM_S)
    _signal(process, signal.SIGKILL)
    if not await _gone(process, 2.0):
        logger.warning("the MCP server's process %d could not be killed", process.pid)
    process.poll()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _gone(process: subprocess.Popen[bytes], seconds: float) -> bool:
    now = asyncio.get_running_loop().time
    end = now() + seconds
    while True:
        try:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:  # noqa: ASYNC222
                return True
        except ChildProcessError:
            return True
        if now() >= end:
            return False
        await asyncio.sleep(0.01)


async def _reader(pipe: Any, transports: list[asyncio.BaseTransport]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_CHUNK)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    transports.append(transport)
    return reader


async def _writer(pipe: Any, transports: list[asyncio.BaseTransport]) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, pipe)
    transports.append(transport)
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _lines(reader: asyncio.StreamReader, limit: int) -> AsyncIterator[tuple[bytes, bool]]:
    """Lines, and whether one was longer than `limit` bytes: of that one only the beginning, at once; the rest is dropped."""
    line, dropping = bytearray(), False
    while chunk := await reader.read(_CHUNK):
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            if not dropping:
                line += piece
                yield bytes(line[:limit]), len(line) > limit
            line, dropping = bytearray(), False
        if not dropping:
            line += rest
            if len(line) > limit:
                yield bytes(line[:limit]), True
                line, dropping = bytearray(), True
    if line and not dropping:
        yield bytes(line), False


async def _messages(reader: asyncio.StreamReader, limit: int, log: ServerLog) -> AsyncIterator[Any]:
    """The protocol's messages; everything else goes to the log."""
    async for line, too_large in _lines(reader, limit):
        if too_large:
            log.add(line[:200], "stdout, too large: ")
            if stand_in := _error(line, TOO_LARGE, f"the answer is larger than {limit} bytes"):
                yield stand_in
            continue
        if not line.strip():
            continue
        try:
            yield mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
        except (ValueError, RecursionError):
            log.add(line, "stdout: ")
            if stand_in := _error(line, UNREADABLE, "the answer is no JSON-RPC message, or nested too deeply"):
                yield stand_in


def _error(line: bytes, code: int, message: str) -> mcp_types.JSONRPCError | None:
    """What stands in for an answer that cannot be handed on; `None` if it does not begin with whose answer it is."""
    if not (found := _ID.match(line)):
        return None
    return mcp_types.JSONRPCError(jsonrpc="2.0", id=int(found[1]), error=mcp_types.ErrorData(code=code, message=message))
