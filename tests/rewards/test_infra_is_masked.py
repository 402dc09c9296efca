"""What fails below a code reward while a test runs (a pool's daemon, a service, the way to the Docker engine) is a failure of
the reward, by itself and as verl's reward manager: never a 0."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentloop.rewards.code import CodeReward
from agentloop.sandboxes import SandboxError, load_sandbox
from agentloop.trajectory import EndReason, Sample, Trajectory
from tests.conformance.sandboxes import available
from tests.rewards.ledgers import conversation

TRUTH = {"fn": "f", "tests": [{"args": [number], "expected": 1} for number in range(3)]}
ANSWER = "```python\nimport time\ndef f(n):\n    time.sleep(6)\n    return 1\n```"
QUICK = "```python\ndef f(n):\n    return 1\n```"


def daemons(folder: str) -> set[int]:
    """The pools' daemons whose sockets are in `folder`."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "agentloop.sandboxes.node" in words and folder in words:
                found.add(int(path.parent.name))
    return found


@asynccontextmanager
async def cut(path: str) -> AsyncIterator[tuple[str, Any]]:
    """A way to a unix socket that can be cut for good: its address, and what cuts it."""
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.write_eof()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(path)
        writers.extend((writer, back))
        await asyncio.gather(carry(reader, back), carry(there, writer))

    with tempfile.TemporaryDirectory() as folder:
        server = await asyncio.start_unix_server(connected, f"{folder}/docker.sock")

        def end() -> None:
            server.close()
            for writer in writers:
                writer.transport.abort()

        yield f"unix://{folder}/docker.sock", end
        end()


def kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def breaking(kind: str) -> AsyncIterator[tuple[dict[str, Any], Any]]:
    """A sandbox's settings, and what breaks it below."""
    available(kind)
    if kind == "docker":
        host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if not host.startswith("unix://"):
            pytest.skip("the Docker engine is not at a unix socket")
        async with cut(host.removeprefix("unix://")) as (address, end):
            yield {"kind": "docker", "scope": "process", "host": address, "start_timeout_s": 10}, end
        return
    if kind == "process":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AGENTLOOP_RUN_DIR", folder)
            yield {"kind": "process", "scope": "process"}, lambda: kill(daemons(folder))
        return
    service = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agentloop.cli", "sandbox", "serve", "--port", "0", "--max-concurrency", "4"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert service.stdout is not None
        line = (await asyncio.wait_for(service.stdout.readline(), 60)).decode()
        yield {"kind": "remote", "endpoints": [line.split()[-1]], "overhead_s": 5}, service.kill
    finally:
        with suppress(ProcessLookupError):
            service.kill()
        await service.wait()


def trajectory() -> Trajectory:
    made = conversation([], sample=Sample([{"role": "user", "content": "q"}], ground_truth=TRUTH))
    made.end_reason = EndReason.FINAL_ANSWER
    return made


@pytest.mark.parametrize("kind", ["process", "docker", "remote"])
async def test_a_sandbox_that_breaks_while_it_grades(kind: str) -> None:
    async with breaking(kind) as (config, end):
        reward = CodeReward(sandbox=load_sandbox(config), timeout_s=8.0, parallel=2)
        made = trajectory()
        assert (await reward(made, made.sample, QUICK)).value == 1.0
        grading = asyncio.ensure_future(reward(made, made.sample, ANSWER))
        await asyncio.sleep(1.5)
        end()
        async with asyncio.timeout(60):
            try:
                with pytest.raises(SandboxError):
                    await grading
            finally:
                await reward.sandbox.close()


async def test_as_verls_reward_manager_it_raises() -> None:
    pytest.importorskip("verl")
    from agentloop.verl.reward import VerlReward
    from agentloop.verl.reward_manager import AgentloopRewardManager

    manager = AgentloopRewardManager.__new__(AgentloopRewardManager)
    manager.loop = asyncio.get_running_loop()
    async with breaking("process") as (config, end):
        manager.reward = CodeReward(sandbox=load_sandbox(config), timeout_s=8.0)

        async def compute_score(data: Any) -> Any:
            return await manager.run_single(pickle.loads(pickle.dumps(data)))

        verls = VerlReward([SimpleNamespace(compute_score=SimpleNamespace(remote=compute_score))])
        made = trajectory()
        assert (await verls(made, made.sample, QUICK)).value == 1.0
        grading = asyncio.ensure_future(verls(made, made.sample, ANSWER))
        await asyncio.sleep(1.5)
        end()
        async with asyncio.timeout(60):
            with pytest.raises(SandboxError):
                await grading
            await manager.reward.sandbox.close()
