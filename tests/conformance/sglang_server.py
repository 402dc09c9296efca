"""The engine `sglang_server` for the conformance suite: over servers of our own on the CPU, and over a real one on a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from agentloop.engines.base import Engine
from agentloop.engines.local import LocalEngine
from agentloop.engines.serve_local import LocalServer
from agentloop.engines.sglang_server import SGLangServerEngine

START_S = 600.0
"""A real server compiles kernels when it starts for the first time."""


async def running(engine: SGLangServerEngine) -> int:
    """Requests on all servers, as they tell."""
    count = 0
    async with aiohttp.ClientSession() as session:
        for url in engine.config.urls:
            async with session.get(f"{url}/get_load") as response:
                count += sum(load["num_reqs"] for load in await response.json())
    return count


@asynccontextmanager
async def over_local(model: Path) -> AsyncIterator[Engine]:
    """Two replicas in this process."""
    servers = [
        LocalServer(LocalEngine.load(str(model), max_slots=8), model_path=str(model), weight_version="0") for _ in range(2)
    ]
    for server in servers:
        await server.start()
    with tempfile.TemporaryDirectory() as folder:
        urls = [server.url for server in servers]
        engine = SGLangServerEngine({"urls": urls, "ignore_eos": True, "weights_dir": folder, "probe_interval_s": 0.5})
        await engine.start()
        yield engine
        await engine.close()
    for server in servers:
        await server.close()


def free_port() -> int:
    """Not one of the highest: SGLang takes the one 10,000 above it too."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(20_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port


@asynccontextmanager
async def over_sglang(model: Path, arguments: Sequence[str]) -> AsyncIterator[Engine]:
    """One real server, a process of its own; what it says goes to stderr."""
    url = f"http://127.0.0.1:{free_port()}"
    command = ["--model-path", str(model), "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--weight-version", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sglang.launch_server", *command, *arguments, stdout=2, start_new_session=True
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"ignore_eos": True, "weights_dir": folder, "unavailable_s": START_S}
            engine = SGLangServerEngine({"urls": url, **settings})
            started = asyncio.create_task(engine.wait_until_up())
            ended = asyncio.create_task(process.wait())
            await asyncio.wait({started, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not started.done():
                raise RuntimeError(f"the server ended with status {ended.result()} before it was up")
            await started
            yield engine
            await engine.close()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, 9)
            await process.wait()
