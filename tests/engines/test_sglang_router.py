"""The real router (`pip install sglang-router`) in front of servers over the local engine."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentloop.engines.base import Sampling
from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.errors import EngineError
from agentloop.trajectory import StopReason
from tests.engines.peers import MODEL, Peer, running
from tests.engines.support import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not installed"),
]

PROMPT = [5, 6, 7, 8]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def peers() -> Iterator[Sequence[Peer]]:
    with running(2, "--weight-version", "0") as peers:
        yield peers


@pytest.fixture
def router(peers: Sequence[Peer]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--policy", "manual", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "error"]
    process = subprocess.Popen(
        [*command, "--worker-urls", *(peer.url for peer in peers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ},
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


async def requests_on(peer: Peer) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{peer.url}/get_load") as response:
        return sum(load["num_reqs"] for load in await response.json())


async def up(engine: SGLangServerEngine) -> None:
    for _ in range(60):
        try:
            return await engine.start()
        except EngineError:
            await asyncio.sleep(0.5)
    raise AssertionError("the router did not start")


async def test_a_router_is_one_replica_whose_workers_take_aborts_and_weights(
    peers: Sequence[Peer], router: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"weights_dir": tmp_path, "ignore_eos": True, "probe_interval_s": 0.5}
    engine = SGLangServerEngine({"urls": router, **settings})
    try:
        await up(engine)
        assert engine.weight_version == 0

        ids = list(PROMPT)
        for turn in range(4):  # sticky: every turn finds the keys and values of the one before
            answer = await engine.generate(ids, Sampling(6, seed=turn), trajectory_id="t")
            assert answer.cached_tokens == (0 if turn == 0 else len(ids) - 2)
            ids += [*answer.ids, 3]
        same = [await engine.generate(PROMPT, Sampling(6, seed=9), trajectory_id=f"s{i}") for i in range(4)]
        assert len({tuple(answer.ids) for answer in same}) == 1, "the router hands the seed on"

        for end in ("abort", "cancel"):
            task = asyncio.create_task(engine.generate(PROMPT, Sampling(900), trajectory_id=end))
            await until(lambda: engine.replicas[0].in_flight > 0)
            await asyncio.sleep(0.1)
            if end == "abort":
                await engine.abort_all()
                assert (await task).stop_reason is StopReason.ABORTED
            else:
                task.cancel()
                await asyncio.wait([task])
                await engine.release(end)
            assert [await requests_on(peer) for peer in peers] == [0, 0]

        await engine.update_weights_from_disk(str(MODEL), 5)
        for i in range(6):
            answer = await engine.generate(PROMPT, Sampling(2), trajectory_id=f"u{i}")
            assert (answer.min_weight_version, answer.weight_version) == (5, 5)

        peers[0].signal(signal.SIGKILL)
        for i in range(6):
            assert len((await engine.generate(PROMPT, Sampling(2), trajectory_id=f"k{i}")).ids) == 2
        await engine.update_weights_from_disk(str(MODEL), 6)  # the worker that is gone takes no part
        peers[0].kill()
        await asyncio.to_thread(peers[0].start)

        async def version() -> str:
            async with aiohttp.ClientSession() as session, session.get(f"{peers[0].url}/model_info") as response:
                return str((await response.json())["weight_version"])

        async with asyncio.timeout(30):
            while await version() != "6":  # noqa: ASYNC110 - it is another process that changes it
                await asyncio.sleep(0.1)
    finally:
        await engine.close()
