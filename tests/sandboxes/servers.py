"""Real sandbox services in processes of their own, and peers that misbehave."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

COMMAND = Path(sys.executable).with_name("agentloop")


@dataclass
class Server:
    process: asyncio.subprocess.Process
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def serving(folder: Path, *options: str, **settings: Any) -> AsyncIterator[Server]:
    """`agentloop sandbox serve` over the kind `process`, with this configuration; ended afterwards."""
    if os.geteuid() != 0:
        pytest.skip("the kind 'process' needs root")
    config = folder / "sandbox.yaml"
    config.write_text(yaml.safe_dump({"kind": "process", "scope": "process", "preload": [], "warm": 1, **settings}))
    arguments = ["sandbox", "serve", "--config", str(config), *(options if "--port" in options else ("--port", "0", *options))]
    process = await asyncio.create_subprocess_exec(COMMAND, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        found = re.search(r"served at (\S+)", line)
        assert found, line
        yield Server(process, found[1])
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()


@dataclass
class Peer:
    """A service that answers with what `script` says: bytes to send, or `None` to hang up."""

    script: Callable[[int, str], bytes | None]
    url: str = ""
    after_s: float = 0.0
    """How long it takes to answer a request."""
    requests: list[str] = field(default_factory=list)
    """First lines, pings left out."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            first = head.split("\r\n")[0].removesuffix(" HTTP/1.1")
            if first == "GET /v1/ping":
                writer.write(http(200, b'"pong"'))
            else:
                self.requests.append(first)
                reply = self.script(len(self.requests), first)
                await asyncio.sleep(self.after_s)
                if reply is not None:
                    writer.write(reply)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()


def http(status: int, body: bytes, **headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = [f"HTTP/1.1 {status} Status", "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*head, *lines, "", ""]).encode() + body


@asynccontextmanager
async def peer(script: Callable[[int, str], bytes | None]) -> AsyncIterator[Peer]:
    found = Peer(script)
    server = await asyncio.start_server(found.answer, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield found
